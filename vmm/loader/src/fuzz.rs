//! What a user's disk can do to the loader, driven by bytes: for `cargo fuzz` and for property tests.

use std::io;
use std::time::Duration;

use crate::disk::{Limits, Piece, ReadAt};
use crate::find::find;

/// A disk that is mostly zeros: chunks of content, each led by where it stands (in units of 512 bytes,
/// two bytes) and how long it is (two bytes).
struct Sparse<'a> {
    chunks: Vec<(u64, &'a [u8])>,
}

const SIZE: u64 = 24 << 20;

impl<'a> Sparse<'a> {
    fn new(mut input: &'a [u8]) -> Self {
        let mut chunks = Vec::new();
        while let Some(([a, b, c, d], rest)) = input.split_first_chunk::<4>() {
            let length = usize::from(u16::from_le_bytes([*c, *d]));
            let (chunk, rest) = rest.split_at(length.min(rest.len()));
            chunks.push((u64::from(u16::from_le_bytes([*a, *b])) * 512, chunk));
            input = rest;
        }
        Sparse { chunks }
    }
}

impl ReadAt for Sparse<'_> {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        for (start, chunk) in &self.chunks {
            let from = offset.max(*start);
            let to = end.min(start + chunk.len() as u64);
            if from >= to {
                continue;
            }
            let source = chunk.get((from - start) as usize..(to - start) as usize);
            let target = buffer.get_mut((from - offset) as usize..(to - offset) as usize);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        SIZE
    }
}

/// Searches a disk made of `input`, and checks what is promised of an answer.
///
/// # Panics
/// If the loader does, or promises what is not there: a bug.
pub fn fuzz_find(input: &[u8]) {
    check(&mut Sparse::new(input));
}

/// Searches any disk, on a small budget.
pub(crate) fn check(disk: &mut dyn ReadAt) {
    let size = disk.size();
    let limits = Limits {
        memory: 16 << 20,
        // An endless loop is an end by steps, not by time, which would depend on the machine.
        work: Duration::from_secs(60),
        wait: Duration::from_secs(60),
        bytes: 256 << 20,
        steps: 300_000,
    };
    let Ok(found) = find(disk, &limits) else {
        return;
    };
    let files = std::iter::once(&found.kernel).chain(&found.initrds);
    let mut sum = 0;
    for file in files {
        let mut length = 0;
        for piece in &file.pieces {
            length += piece.length();
            if let Piece::Disk { offset, length } = piece {
                let end = offset.checked_add(*length);
                assert!(
                    end.is_some_and(|end| end <= size),
                    "a piece leaves the disk"
                );
            }
        }
        assert_eq!(length, file.size, "pieces that are not the file");
        sum += length;
    }
    assert!(sum <= 2 * limits.memory, "larger than memory");
}
