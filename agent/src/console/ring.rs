//! A log in a file of bounded size: the last bytes written, in a ring.
//!
//! Written by the machine's process (which lives on when the agent does not), read by the agent at any
//! time. The file is a header of 16 bytes (magic, and the count of all bytes ever written, both
//! little-endian) and the ring behind it; data goes in before the count that covers it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: u64 = 0x3130_474f_4c52_4346; // "FCRLOG01"
const HEADER: u64 = 16;

/// The writing end. Only one at a time may write to a file; another one is to [follow](RingWriter::follow) then.
#[derive(Debug)]
pub struct RingWriter {
    file: File,
    /// Bytes of the ring.
    size: u64,
    written: u64,
}

impl RingWriter {
    /// Goes on where the file's last writer stopped; a file that is no ring is begun anew.
    pub fn new(file: File, size: u64) -> io::Result<Self> {
        let written = match read_header(&file) {
            Ok(written) => written,
            Err(_) => {
                file.set_len(0)?;
                write_header(&file, 0)?;
                0
            }
        };
        Ok(Self {
            file,
            size,
            written,
        })
    }

    /// Goes on where the file stands by now: another process has written to it meanwhile.
    pub fn follow(&mut self) -> io::Result<()> {
        self.written = read_header(&self.file)?;
        Ok(())
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Of more than a ring's worth only the end stays.
        let skipped = bytes.len().saturating_sub(self.size as usize);
        self.written += skipped as u64;
        let (_, mut rest) = bytes.split_at(skipped);
        while !rest.is_empty() {
            let at = self.written % self.size;
            let (now, later) = rest.split_at(rest.len().min((self.size - at) as usize));
            self.file.write_all_at(now, HEADER + at)?;
            self.written += now.len() as u64;
            rest = later;
        }
        write_header(&self.file, self.written)
    }
}

fn write_header(file: &File, written: u64) -> io::Result<()> {
    let mut header = [0; HEADER as usize];
    header[..8].copy_from_slice(&MAGIC.to_le_bytes());
    header[8..].copy_from_slice(&written.to_le_bytes());
    file.write_all_at(&header, 0)
}

fn read_header(file: &File) -> io::Result<u64> {
    let (mut magic, mut written) = ([0; 8], [0; 8]);
    file.read_exact_at(&mut magic, 0)?;
    file.read_exact_at(&mut written, 8)?;
    if u64::from_le_bytes(magic) != MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a ring"));
    }
    Ok(u64::from_le_bytes(written))
}

/// What the ring holds, oldest first. `size` is that of the ring as its writer was told.
pub fn read(file: &File, size: u64) -> io::Result<Vec<u8>> {
    let end = match read_header(file) {
        Ok(end) => end,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let start = end.saturating_sub(size);
    let mut bytes = vec![0; (end - start) as usize];
    let (head, tail) = bytes.split_at_mut((end - start).min(size - start % size) as usize);
    file.read_exact_at(head, HEADER + start % size)?;
    file.read_exact_at(tail, HEADER)?;
    // What was overwritten while we read is no longer what it was.
    let overrun = read_header(file)?
        .saturating_sub(size)
        .saturating_sub(start);
    bytes.drain(..(overrun as usize).min(bytes.len()));
    Ok(bytes)
}

/// The last `lines` lines; a last line without its end counts as one.
pub fn last_lines(bytes: &[u8], lines: usize) -> &[u8] {
    if lines == 0 {
        return &[];
    }
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let start = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .nth(lines - 1)
        .map_or(0, |(at, _)| at + 1);
    bytes.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_ring_holds_the_last_bytes_written(
            writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12),
            reopen in any::<usize>(),
        ) {
            let file = tempfile::tempfile().unwrap();
            let mut writer = RingWriter::new(file.try_clone().unwrap(), 32).unwrap();
            let mut all = Vec::new();
            for (index, bytes) in writes.iter().enumerate() {
                if index == reopen % 12 {
                    writer = RingWriter::new(file.try_clone().unwrap(), 32).unwrap();
                }
                writer.write(bytes).unwrap();
                all.extend_from_slice(bytes);
            }
            let kept = all.split_off(all.len().saturating_sub(32));
            prop_assert_eq!(read(&file, 32).unwrap(), kept);
            prop_assert!(file.metadata().unwrap().len() <= HEADER + 32);
        }
    }

    #[test]
    fn two_that_write_in_turn_overwrite_nothing_of_each_other() {
        let file = tempfile::tempfile().unwrap();
        let writer = || RingWriter::new(file.try_clone().unwrap(), 32).unwrap();
        let (mut one, mut other) = (writer(), writer());
        for round in [b"one ", b"two "] {
            for writer in [&mut one, &mut other] {
                writer.follow().unwrap();
                writer.write(round).unwrap();
            }
        }
        assert_eq!(read(&file, 32).unwrap(), b"one one two two ");
    }

    #[test]
    fn a_file_that_was_never_written_reads_as_empty() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(read(&file, 32).unwrap(), b"");
    }

    #[test]
    fn lines_are_counted_from_the_end() {
        let text = b"one\ntwo\nthree";
        assert_eq!(last_lines(text, 1), b"three");
        assert_eq!(last_lines(text, 2), b"two\nthree");
        assert_eq!(last_lines(text, 9), text);
        assert_eq!(last_lines(b"one\ntwo\n", 1), b"two\n");
        assert_eq!(last_lines(text, 0), b"");
    }
}
