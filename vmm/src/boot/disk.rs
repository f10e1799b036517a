//! Boots what is on a disk: the loader says where kernel and initrds stand, and they go from there into
//! guest memory.
//!
//! The disk's descriptor is the one that the block device has, or a duplicate: read with pread at aligned
//! places, because it may be O_DIRECT. It is read while no vCPU runs and every device is at rest: before
//! the first start and within a reset, so that a kernel that the guest has replaced is what boots next.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use fractus_loader::{Found, FoundFile, Limits, Piece, ReadAt, find};

use super::{Boot, BootError, Source, load};
use crate::cpu::BootRegisters;
use crate::layout::Layout;
use crate::memory::GuestMemory;

/// What O_DIRECT asks at most of offset, length and buffer.
const ALIGNMENT: u64 = 4096;
/// Bytes read at once.
const CHUNK: u64 = 1 << 20;

/// A disk that a machine boots from.
#[derive(Debug)]
pub struct BootDisk {
    file: File,
    /// With room to begin at an aligned address.
    buffer: RefCell<Vec<u8>>,
}

impl BootDisk {
    /// Made before the process is locked down.
    pub fn new(file: File) -> BootDisk {
        fractus_loader::disk::worked();
        BootDisk {
            file,
            buffer: RefCell::new(Vec::new()),
        }
    }

    /// Bytes of the disk now.
    fn bytes(&self) -> u64 {
        // A block device has no length, but an end.
        let end = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0));
        end.unwrap_or_default()
    }

    /// Fills `target` from `offset` on.
    fn read(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let mut buffer = self.buffer.borrow_mut();
        buffer.resize((CHUNK + ALIGNMENT) as usize, 0);
        let skip = buffer.as_ptr().align_offset(ALIGNMENT as usize);
        let buffer = buffer.get_mut(skip..).unwrap_or_default();
        let (mut at, mut rest) = (offset, target);
        while !rest.is_empty() {
            let start = at - at % ALIGNMENT;
            let within = (at - start) as usize;
            let wanted = (within + rest.len()).next_multiple_of(ALIGNMENT as usize);
            let take = wanted.min(CHUNK as usize);
            let part = buffer.get_mut(..take).unwrap_or_default();
            let read = match FileExt::read_at(&self.file, part, start) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            let found = part.get(within..read).unwrap_or_default();
            let length = found.len().min(rest.len());
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(found.get(..length).unwrap_or_default());
            rest = later;
            at += length as u64;
        }
        Ok(())
    }

    /// Looks for a kernel and loads it, with `more` behind its command line; memory is zero. A buffer is
    /// kept only meanwhile.
    pub fn load(
        &self,
        more: &str,
        rsdp: u64,
        memory: &GuestMemory,
        layout: &Layout,
    ) -> Result<BootRegisters, BootError> {
        let limits = Limits::for_memory(layout.low.size);
        let outcome = find(&mut &*self, &limits)
            .map_err(BootError::from)
            .and_then(|found| self.load_found(found, more, rsdp, memory, layout));
        *self.buffer.borrow_mut() = Vec::new();
        outcome
    }

    fn load_found(
        &self,
        found: Found,
        more: &str,
        rsdp: u64,
        memory: &GuestMemory,
        layout: &Layout,
    ) -> Result<BootRegisters, BootError> {
        let Found {
            kernel,
            initrds,
            mut command_line,
            how,
        } = found;
        tracing::info!(%how, kernel = %kernel.name, "boot from disk");
        if !more.is_empty() {
            command_line.push(' ');
            command_line.push_str(more);
        }
        let file = kernel.name.clone();
        let initrd = (!initrds.is_empty()).then(|| DiskFile::new(self, joined(initrds)));
        let kernel = DiskFile::new(self, kernel.pieces);
        let boot = Boot {
            kernel: &kernel,
            initrd: initrd.as_ref().map(|initrd| initrd as &dyn Source),
            command_line: &command_line,
            rsdp,
        };
        load(&boot, memory, layout).map_err(|source| BootError::OnDisk {
            how,
            file,
            source: Box::new(source),
        })
    }
}

impl ReadAt for &BootDisk {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read(offset, buffer)
    }

    fn size(&self) -> u64 {
        self.bytes()
    }
}

/// One file out of several: each begins at a multiple of 4 bytes, as Linux wants archives.
fn joined(files: Vec<FoundFile>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut length = 0u64;
    for file in files {
        let gap = length.next_multiple_of(4) - length;
        if gap > 0 {
            pieces.push(Piece::Zero { length: gap });
        }
        length += gap + file.size;
        pieces.extend(file.pieces);
    }
    pieces
}

/// A file that stands in pieces on a disk.
struct DiskFile<'a> {
    disk: &'a BootDisk,
    /// Each with the place in the file at which it begins.
    pieces: Vec<(u64, Piece)>,
    size: u64,
}

impl<'a> DiskFile<'a> {
    fn new(disk: &'a BootDisk, pieces: Vec<Piece>) -> DiskFile<'a> {
        let mut size = 0;
        let place = |piece: Piece| {
            let begin = size;
            size += piece.length();
            (begin, piece)
        };
        let pieces = pieces.into_iter().map(place).collect();
        DiskFile { disk, pieces, size }
    }
}

impl Source for DiskFile<'_> {
    /// What one piece has of it.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let after = self.pieces.partition_point(|(begin, _)| *begin <= offset);
        let piece = after
            .checked_sub(1)
            .and_then(|index| self.pieces.get(index));
        let Some((begin, piece)) = piece else {
            return Ok(0);
        };
        let within = offset - begin;
        let left = piece.length().saturating_sub(within);
        let take = left.min(buffer.len() as u64) as usize;
        let target = buffer.get_mut(..take).unwrap_or_default();
        match piece {
            Piece::Disk { offset, .. } => self.disk.read(offset + within, target)?,
            Piece::Zero { .. } => target.fill(0),
            Piece::Bytes(bytes) => {
                let found = bytes.get(within as usize..).unwrap_or_default();
                target.copy_from_slice(found.get(..take).unwrap_or_default());
            }
        }
        Ok(take)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_pieces_read_as_one_and_archives_are_aligned() {
        let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&content, 0).unwrap();
        let disk = BootDisk::new(file);
        let one = |pieces: Vec<Piece>| FoundFile {
            name: String::new(),
            size: pieces.iter().map(Piece::length).sum(),
            pieces,
        };
        let pieces = joined(vec![
            one(vec![
                Piece::Disk {
                    offset: 5,
                    length: 2_500_001,
                },
                Piece::Zero { length: 1 },
            ]),
            one(vec![Piece::Bytes(b"end".to_vec())]),
        ]);
        let file = DiskFile::new(&disk, pieces);
        let mut bytes = vec![1; 2_500_007];
        super::super::read_exact(&file, 0, &mut bytes, "it").unwrap();
        assert!(bytes[..2_500_001] == content[5..2_500_006]);
        assert_eq!(bytes[2_500_001..], *b"\0\0\0end");
        assert_eq!(file.size().unwrap(), 2_500_007);
        // Past the end there is nothing.
        assert_eq!(file.read_at(2_500_007, &mut [0; 4]).unwrap(), 0);
        assert!(disk.read(2_999_999, &mut [0; 2]).is_err());
    }
}
