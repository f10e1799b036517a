//! A connection whose other end may read slowly, but not arbitrarily so: each megabyte has its time, and so has an
//! answer.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// For so many bytes: the other side may have a disk to make durable meanwhile.
const PIECE: usize = 1 << 20;
const ROOM: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(120);

/// Of a socket that does not block.
pub struct Paced {
    socket: UnixStream,
    written: usize,
    /// From when on there is no room for the piece.
    write_by: Option<Instant>,
    /// From when on something is waited for.
    read_by: Option<Instant>,
    /// For how long.
    answer: Duration,
}

impl Paced {
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            written: 0,
            write_by: None,
            read_by: None,
            answer: ANSWER,
        }
    }

    /// To a process of this host: an answer has this time.
    pub fn with_answer_in(socket: UnixStream, answer: Duration) -> Self {
        Self {
            answer,
            ..Self::new(socket)
        }
    }

    /// The time for the next piece begins.
    pub fn allow(&mut self) {
        (self.written, self.write_by) = (0, None);
        self.read_by = None;
    }
}

fn wait(socket: &UnixStream, for_what: PollFlags, by: Instant) -> io::Result<()> {
    let left = by.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    let timeout = Timespec::try_from(left).ok();
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), for_what)];
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl AsFd for Paced {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Write for Paced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match (&self.socket).write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let by = self.write_by.get_or_insert_with(|| Instant::now() + ROOM);
                    wait(&self.socket, PollFlags::OUT, *by)?;
                }
                Ok(length) => {
                    self.written += length;
                    if self.written >= PIECE {
                        self.allow();
                    }
                    return Ok(length);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// What follows may be long in coming, and has its own time then.
    fn flush(&mut self) -> io::Result<()> {
        (self.written, self.write_by) = (0, None);
        Ok(())
    }
}

impl Read for Paced {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let by = *self
            .read_by
            .get_or_insert_with(|| Instant::now() + self.answer);
        loop {
            match (&self.socket).read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(&self.socket, PollFlags::IN, by)?;
                }
                read => return read,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for_without_end() {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut near = Paced::new(near);
        near.write_all(b"here").unwrap();
        near.write_by = Some(Instant::now() + Duration::from_millis(20));
        let error = near.write_all(&vec![0; 16 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        near.read_by = Some(Instant::now() + Duration::from_millis(20));
        assert_eq!(near.read(&mut [0]).unwrap_err().kind(), ErrorKind::TimedOut);
        let reads = std::thread::spawn(move || {
            let (mut far, mut all) = (far, Vec::new());
            far.write_all(b"!").unwrap();
            far.read_to_end(&mut all).unwrap();
            all.len()
        });
        near.allow();
        near.write_all(&vec![0; 3 << 20]).unwrap();
        near.read_by = None;
        assert_eq!(near.read(&mut [0]).unwrap(), 1);
        drop(near);
        assert!(reads.join().unwrap() > 3 << 20);
    }
}
