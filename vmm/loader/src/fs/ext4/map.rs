//! Where an inode's bytes stand: extents, or the block lists of ext2 and ext3.

use super::Ext4;
use super::inode::Inode;
use super::journal::MARK;
use crate::bytes::{le16, le32, slice};
use crate::disk::{Fault, Piece, Pieces};

const EXTENT_MAGIC: u16 = 0xf30a;
/// Headers, index entries and extents are all of this size.
const ENTRY: usize = 12;
const MAX_DEPTH: u16 = 5;
/// Extents that are longer are reserved and read as zero.
const MAX_EXTENT: u64 = 32768;

/// The pieces of `inode`, in exactly its size.
pub fn pieces(ext4: &Ext4<'_>, inode: &Inode) -> Result<Vec<Piece>, Fault> {
    let mut walk = Walk {
        ext4,
        pieces: Pieces::default(),
        blocks: inode.size.div_ceil(ext4.superblock.block_size),
        next: 0,
    };
    if inode.has_extents() {
        walk.extents(inode.map(), None)?;
    } else {
        walk.lists(inode.map())?;
    }
    walk.pieces.finish(inode.size)
}

struct Walk<'r, 'a> {
    ext4: &'r Ext4<'a>,
    pieces: Pieces,
    /// Blocks that the file has.
    blocks: u64,
    /// The first one that has no piece yet.
    next: u64,
}

impl Walk<'_, '_> {
    /// One node of an extent tree. Depth falls by one with every level, and blocks only go up.
    fn extents(&mut self, node: &[u8], depth: Option<u16>) -> Result<(), Fault> {
        let is = le16(node, 6);
        let expected = depth.is_none_or(|depth| depth == is) && is <= MAX_DEPTH;
        if le16(node, 0) != EXTENT_MAGIC || !expected {
            return Err(Fault::Damaged("an extent tree"));
        }
        let count = usize::from(le16(node, 2));
        if (count + 1) * ENTRY > node.len() {
            return Err(Fault::Damaged("an extent tree's node"));
        }
        for index in 1..=count {
            self.ext4.volume.step()?;
            let entry = slice(node, index * ENTRY, ENTRY);
            if is == 0 {
                self.extent(entry)?;
            } else {
                let child = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
                let child = self.ext4.block(child)?;
                self.extents(&child, Some(is - 1))?;
            }
            if self.next >= self.blocks {
                break;
            }
        }
        Ok(())
    }

    fn extent(&mut self, entry: &[u8]) -> Result<(), Fault> {
        let logical = u64::from(le32(entry, 0));
        let start = u64::from(le16(entry, 6)) << 32 | u64::from(le32(entry, 8));
        let length = u64::from(le16(entry, 4));
        let (length, reserved) = match length > MAX_EXTENT {
            true => (length - MAX_EXTENT, true),
            false => (length, false),
        };
        if logical < self.next || length == 0 {
            return Err(Fault::Damaged("extents out of order"));
        }
        if logical >= self.blocks {
            self.next = self.blocks;
            return Ok(());
        }
        self.hole(logical - self.next)?;
        let length = length.min(self.blocks - logical);
        if reserved {
            self.hole(length)
        } else {
            self.run(start, length)
        }
    }

    fn hole(&mut self, blocks: u64) -> Result<(), Fault> {
        self.next += blocks;
        let length = blocks * self.ext4.superblock.block_size;
        self.pieces.push(Piece::Zero { length })
    }

    /// Blocks that follow each other; those that the journal holds stand there.
    fn run(&mut self, start: u64, length: u64) -> Result<(), Fault> {
        let (size, superblock) = (self.ext4.superblock.block_size, &self.ext4.superblock);
        let end = start
            .checked_add(length)
            .filter(|end| *end <= superblock.blocks);
        let end = end.ok_or(Fault::Damaged("a file behind the file system's end"))?;
        if start == 0 {
            return Err(Fault::Damaged("a file on the superblock"));
        }
        let base = self.ext4.volume.start;
        let mut at = start;
        let moved: Vec<u64> = self.ext4.journal.within(start, end).collect();
        for block in moved {
            self.ext4.volume.step()?;
            self.pieces.push(Piece::Disk {
                offset: base + at * size,
                length: (block - at) * size,
            })?;
            let (place, escaped) = self.ext4.journal.place(block);
            if place >= superblock.blocks {
                return Err(Fault::Damaged("a journal behind the file system's end"));
            }
            self.pieces.push(match escaped {
                // Four bytes differ; the rest stays on the disk.
                true => Piece::Bytes(MARK.to_vec()),
                false => Piece::Bytes(Vec::new()),
            })?;
            let skip = if escaped { MARK.len() as u64 } else { 0 };
            self.pieces.push(Piece::Disk {
                offset: base + place * size + skip,
                length: size - skip,
            })?;
            at = block + 1;
        }
        self.next += length;
        self.pieces.push(Piece::Disk {
            offset: base + at * size,
            length: (end - at) * size,
        })
    }

    /// Twelve blocks, then a list of blocks, a list of lists, a list of those.
    fn lists(&mut self, map: &[u8]) -> Result<(), Fault> {
        for index in 0..12 {
            self.listed(le32(map, index * 4), 0)?;
        }
        for (index, depth) in [(12, 1), (13, 2), (14, 3)] {
            self.listed(le32(map, index * 4), depth)?;
        }
        Ok(())
    }

    fn listed(&mut self, block: u32, depth: u32) -> Result<(), Fault> {
        if self.next >= self.blocks {
            return Ok(());
        }
        self.ext4.volume.step()?;
        let per_block = self.ext4.superblock.block_size / 4;
        if block == 0 {
            let blocks = per_block.pow(depth).min(self.blocks - self.next);
            return self.hole(blocks);
        }
        if depth == 0 {
            return self.run(block.into(), 1);
        }
        let list = self.ext4.block(block.into())?;
        for entry in list.chunks(4) {
            self.listed(le32(entry, 0), depth - 1)?;
        }
        Ok(())
    }
}
