//! The first page of a snapshot's file: of which form it is, and where all else lies.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{Compression, MOST_MEMORY, UNCHECKED};
use crate::stream::{StreamError, io, malformed};

const MAGIC: [u8; 8] = *b"FRACTUSM";
/// Bytes of the head that mean something, with their checksum.
pub const HEAD: usize = 52;

/// What the head says, as far as it can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub compression: Compression,
    pub flags: u32,
    /// Bytes of the machine's memory.
    pub memory: u64,
    /// Where the frames begin, and their bytes.
    pub frames: u64,
    pub length: u64,
}

impl Head {
    pub fn bytes(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&MAGIC);
        head[8..12].copy_from_slice(&self.compression.form().to_le_bytes());
        head[12..16].copy_from_slice(&self.flags.to_le_bytes());
        let begin = self.compression.begin();
        for (at, number) in [
            (16, begin),
            (24, self.memory),
            (32, self.frames),
            (40, self.length),
        ] {
            head[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let checksum = crc32fast::hash(&head[..HEAD - 4]);
        head[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
        head
    }

    /// # Errors
    /// The file has none, or one that this build does not know, or what it says cannot be.
    pub fn read(file: &File) -> Result<Self, StreamError> {
        let size = file.metadata().map_err(io("look at"))?.len();
        let mut head = [0; HEAD];
        match file.read_exact_at(&mut head, 0) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(StreamError::Magic);
            }
            other => other.map_err(io("read"))?,
        }
        let (magic, checksum) = (&head[..8], &head[HEAD - 4..]);
        if head == [0; HEAD] {
            return Err(StreamError::Unfinished);
        }
        if magic != MAGIC {
            return Err(StreamError::Magic);
        }
        if checksum != crc32fast::hash(&head[..HEAD - 4]).to_le_bytes() {
            return Err(StreamError::Checksum {
                what: "its head".to_owned(),
            });
        }
        let number = |at: usize| {
            let bytes = head.get(at..).and_then(|bytes| bytes.first_chunk());
            u64::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let form = number(8) as u32;
        let compression = Compression::of(form).ok_or(StreamError::Format { found: form })?;
        let (begin, read) = (
            number(16),
            Head {
                compression,
                flags: (number(8) >> 32) as u32,
                memory: number(24),
                frames: number(32),
                length: number(40),
            },
        );
        if begin != compression.begin() || read.flags & !UNCHECKED != 0 {
            return Err(malformed("a head that this build does not know"));
        }
        let before_frames = match compression {
            Compression::None => begin.checked_add(read.memory),
            Compression::Zstd => Some(begin),
        };
        let overlap = before_frames.is_none_or(|end| end > read.frames);
        if read.memory > MOST_MEMORY || overlap {
            return Err(malformed("its memory and its frames overlap"));
        }
        let end = read.frames.checked_add(read.length);
        if end.is_none_or(|end| end > size) {
            return Err(StreamError::Truncated { what: "its frames" });
        }
        Ok(read)
    }
}

/// [`crate::stream::frame::seal`] of a file, its head as well.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn seal(file: &File, numbered: bool) -> std::io::Result<()> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0)?;
    let checksum = crc32fast::hash(&head[..HEAD - 4]);
    head[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&head, 0)?;
    let Ok(Head { frames, length, .. }) = Head::read(file) else {
        return Ok(());
    };
    let mut bytes = vec![0; length.min(crate::stream::MOST_STATE as u64) as usize];
    file.read_exact_at(&mut bytes, frames)?;
    crate::stream::frame::seal(&mut bytes, numbered);
    file.write_all_at(&bytes, frames)
}
