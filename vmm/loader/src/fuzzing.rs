//! The body of the fuzz target `disk_boot` (`vmm/fuzz`): takes any bytes for a user's disk, and panics
//! only where there is a bug. Compiled for `cargo fuzz` and for tests; a machine never has it.

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
pub fn disk_boot(input: &[u8]) {
    check(&mut Sparse::new(input));
}

/// Searches any disk, on a small budget.
fn check(disk: &mut dyn ReadAt) {
    let size = disk.size();
    let limits = Limits {
        memory: 16 << 20,
        // An endless loop is an end by steps, not by time, which would depend on the machine.
        work: Duration::from_secs(60),
        wait: Duration::from_secs(60),
        bytes: 256 << 20,
        steps: 300_000,
        kept: 32 << 20,
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

#[cfg(test)]
#[path = "../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whatever_a_disk_holds_is_an_answer() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/disk_boot");
        replay::replay(&seeds, 1500, disk_boot);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(input in prop::collection::vec(any::<u8>(), 0..3000)) {
            disk_boot(&input);
            check(&mut input.as_slice());
        }

        #[test]
        fn any_script_is_an_answer(script in "(if|then|else|fi|while|do|done|for|in|function|menuentry|submenu|set|linux|initrd|search|\\[|\\]|\\{|\\}|;|\n| |'|\"|\\$|\\{a\\}|a=|b|/|-|!|=|>|blscfg|source|\\\\){0,80}") {
            let _ = crate::config::grub::parses(&script);
        }
    }
}
