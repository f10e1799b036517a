//! ext2, ext3 and ext4 (Linux's Documentation/filesystems/ext4), with a journal that was not replayed.
//!
//! The checksums of superblock and inodes are verified, so that damage is named instead of booted; what
//! hangs below an inode is bounded and not verified.

mod dir;
mod inode;
mod journal;
mod map;
mod superblock;

use crate::disk::{Fault, Piece, Pieces, Volume};
use crate::fs::{FileSystem, Kind, MAX_NAMES, Node};
use inode::Inode;
use journal::Journal;
use superblock::Superblock;

/// Bytes of a folder that are looked at.
const MAX_FOLDER: u64 = 64 << 20;
const MAX_LINK: u64 = 4096;
const ROOT: u64 = 2;

pub struct Ext4<'a> {
    volume: Volume<'a>,
    superblock: Superblock,
    journal: Journal,
}

impl<'a> Ext4<'a> {
    pub fn open(volume: Volume<'a>) -> Result<Ext4<'a>, Fault> {
        let superblock = Superblock::read(&volume)?;
        let mut found = Ext4 {
            volume,
            superblock,
            journal: Journal::default(),
        };
        if found.superblock.needs_recovery {
            found.journal = journal::read(&found)?;
        }
        Ok(found)
    }

    /// A block as the journal leaves it.
    fn block(&self, number: u64) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; self.superblock.block_size as usize];
        self.read(number, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads within a block.
    fn read(&self, block: u64, within: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let (place, escaped) = self.journal.place(block);
        if place >= self.superblock.blocks {
            return Err(Fault::OutOfBounds);
        }
        let offset = place * self.superblock.block_size + within;
        self.volume.read(offset, buffer)?;
        if escaped {
            journal::unescape(within, buffer);
        }
        Ok(())
    }

    fn inode(&self, number: u64) -> Result<Inode, Fault> {
        let superblock = &self.superblock;
        let index = number.checked_sub(1).ok_or(Fault::Damaged("inode 0"))?;
        let group = index / superblock.inodes_per_group;
        if group >= superblock.groups {
            return Err(Fault::Damaged("an inode that is not there"));
        }
        let (block, within) = superblock.descriptor(group)?;
        let mut descriptor = [0; 64];
        let size = superblock.descriptor_size.min(64) as usize;
        self.read(
            block,
            within,
            descriptor.get_mut(..size).unwrap_or_default(),
        )?;
        let table = superblock.inode_table(&descriptor);
        let at = (index % superblock.inodes_per_group) * superblock.inode_size;
        let block = table
            .checked_add(at / superblock.block_size)
            .ok_or(Fault::OutOfBounds)?;
        let mut bytes = vec![0; superblock.inode_size as usize];
        self.read(block, at % superblock.block_size, &mut bytes)?;
        Inode::parse(number, bytes, superblock)
    }

    fn node(&self, number: u64) -> Result<Node, Fault> {
        let inode = self.inode(number)?;
        Ok(Node {
            id: number,
            kind: inode.kind,
            size: inode.size,
        })
    }

    /// Where an inode's bytes stand, on the volume.
    fn map(&self, inode: &Inode) -> Result<Vec<Piece>, Fault> {
        if let Some(bytes) = inode.inline()? {
            let mut pieces = Pieces::default();
            pieces.push(Piece::Bytes(bytes))?;
            return pieces.finish(inode.size);
        }
        map::pieces(self, inode)
    }

    /// Calls `each` for every name of a folder until it says false.
    fn walk(&self, folder: Node, mut each: impl FnMut(&[u8], u64) -> bool) -> Result<(), Fault> {
        let inode = self.inode(folder.id)?;
        if inode.kind != Kind::Folder {
            return Err(Fault::NotAFolder);
        }
        if inode.size > MAX_FOLDER {
            return Err(Fault::TooLarge {
                size: inode.size,
                limit: MAX_FOLDER,
            });
        }
        if inode.is_encrypted() {
            return Err(Fault::Unsupported("an encrypted folder"));
        }
        if let Some(bytes) = inode.inline()? {
            dir::walk_inline(&self.volume, &bytes, &mut each)?;
            return Ok(());
        }
        let block_size = self.superblock.block_size;
        for piece in self.map(&inode)? {
            let (offset, length) = match piece {
                Piece::Disk { offset, length } => (offset, length),
                Piece::Bytes(bytes) if !dir::walk(&self.volume, &bytes, &mut each)? => {
                    return Ok(());
                }
                // A hole has no entries.
                Piece::Bytes(_) | Piece::Zero { .. } => continue,
            };
            let first = (offset - self.volume.start) / block_size;
            for block in first..first + length / block_size {
                let mut bytes = vec![0; block_size as usize];
                self.volume.read(block * block_size, &mut bytes)?;
                if !dir::walk(&self.volume, &bytes, &mut each)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

impl FileSystem for Ext4<'_> {
    fn root(&self) -> Result<Node, Fault> {
        self.node(ROOT)
    }

    fn lookup(&self, folder: Node, name: &str) -> Result<Node, Fault> {
        let mut found = None;
        self.walk(folder, |entry, inode| {
            if entry == name.as_bytes() {
                found = Some(inode);
            }
            found.is_none()
        })?;
        self.node(found.ok_or(Fault::NotFound)?)
    }

    fn names(&self, folder: Node) -> Result<Vec<String>, Fault> {
        let mut names = Vec::new();
        self.walk(folder, |name, _| {
            names.push(String::from_utf8_lossy(name).into_owned());
            names.len() < MAX_NAMES
        })?;
        Ok(names)
    }

    fn link(&self, node: Node) -> Result<String, Fault> {
        let inode = self.inode(node.id)?;
        if inode.kind != Kind::Link || inode.size > MAX_LINK {
            return Err(Fault::Damaged("a symbolic link"));
        }
        let bytes = match inode.short_link() {
            Some(bytes) => bytes,
            None => crate::disk::read_pieces(self.volume.disk, &self.map(&inode)?)?,
        };
        Ok(crate::bytes::text(&bytes))
    }

    fn pieces(&self, node: Node, limit: u64) -> Result<Vec<Piece>, Fault> {
        let inode = self.inode(node.id)?;
        if inode.size > limit {
            let size = inode.size;
            return Err(Fault::TooLarge { size, limit });
        }
        if inode.is_encrypted() {
            return Err(Fault::Unsupported("an encrypted file"));
        }
        self.map(&inode)
    }

    fn uuid(&self) -> &str {
        &self.superblock.uuid
    }

    fn label(&self) -> &str {
        &self.superblock.label
    }
}
