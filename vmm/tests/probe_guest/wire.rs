//! Connections that are slow.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// An end by which so many bytes a second go out.
pub struct Slow {
    pub end: UnixStream,
    pub rate: u64,
}

impl Read for Slow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.end.read(buffer)
    }
}

impl Write for Slow {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.end.write(&buffer[..buffer.len().min(64 << 10)])?;
        let takes = Duration::from_micros(written as u64 * 1_000_000 / self.rate);
        // sleeps because that is what makes the connection slow
        std::thread::sleep(takes);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.end.flush()
    }
}

impl AsFd for Slow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}
