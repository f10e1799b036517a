//! Inodes, and what is kept within them.

use super::superblock::Superblock;
use crate::bytes::{le16, le32, slice, u8_at};
use crate::crc::crc32c;
use crate::disk::Fault;
use crate::fs::Kind;

const ENCRYPTED: u32 = 0x800;
const EXTENTS: u32 = 0x8_0000;
const INLINE: u32 = 0x1000_0000;
/// The 60 bytes that are a map, a short link, or the begin of inline data.
const MAP: usize = 0x28;
const MAP_LENGTH: usize = 60;
/// Attributes of the namespace "system.".
const SYSTEM: u8 = 7;

pub struct Inode {
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    flags: u32,
    bytes: Vec<u8>,
}

impl Inode {
    pub fn parse(number: u64, bytes: Vec<u8>, superblock: &Superblock) -> Result<Inode, Fault> {
        if let Some(seed) = superblock.checksum_seed {
            check(number, &bytes, seed)?;
        }
        let kind = match le16(&bytes, 0) >> 12 {
            0x4 => Kind::Folder,
            0x8 => Kind::File,
            0xa => Kind::Link,
            _ => Kind::Other,
        };
        Ok(Inode {
            kind,
            size: u64::from(le32(&bytes, 0x6c)) << 32 | u64::from(le32(&bytes, 4)),
            flags: le32(&bytes, 0x20),
            bytes,
        })
    }

    pub fn is_encrypted(&self) -> bool {
        self.flags & ENCRYPTED != 0
    }

    pub fn has_extents(&self) -> bool {
        self.flags & EXTENTS != 0
    }

    /// The root of an extent tree, or block numbers.
    pub fn map(&self) -> &[u8] {
        slice(&self.bytes, MAP, MAP_LENGTH)
    }

    /// The target of a symbolic link that is kept in the place of the map.
    pub fn short_link(&self) -> Option<Vec<u8>> {
        let short = self.size < MAP_LENGTH as u64 && self.flags & (EXTENTS | INLINE) == 0;
        short.then(|| slice(self.map(), 0, self.size as usize).to_vec())
    }

    /// The content, if it is kept in the inode: in the place of the map, and in the attribute
    /// "system.data". At most an inode's size.
    pub fn inline(&self) -> Result<Option<Vec<u8>>, Fault> {
        if self.flags & INLINE == 0 {
            return Ok(None);
        }
        let mut content = self.map().to_vec();
        if let Some(more) = self.attribute(b"data") {
            content.extend_from_slice(more);
        }
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if size > content.len() {
            return Err(Fault::Damaged("inline data that is not whole"));
        }
        content.truncate(size);
        Ok(Some(content))
    }

    /// The value of a "system." attribute that is kept in the inode.
    fn attribute(&self, wanted: &[u8]) -> Option<&[u8]> {
        let header = 128 + usize::from(le16(&self.bytes, 0x80));
        if le32(&self.bytes, header) != 0xea02_0000 {
            return None;
        }
        let first = header + 4;
        let mut at = first;
        // Each entry is at least 16 bytes long, and four bytes of zeros end them.
        while le32(&self.bytes, at) != 0 {
            let name = usize::from(u8_at(&self.bytes, at));
            let value = first + usize::from(le16(&self.bytes, at + 2));
            let is_wanted = u8_at(&self.bytes, at + 1) == SYSTEM
                && slice(&self.bytes, at + 16, name) == wanted
                && le32(&self.bytes, at + 4) == 0;
            if is_wanted {
                let size = usize::try_from(le32(&self.bytes, at + 8)).ok()?;
                return self.bytes.get(value..value.checked_add(size)?);
            }
            at += (16 + name + 3) & !3;
        }
        None
    }
}

/// The checksum is over number, generation and the inode itself without its checksum.
fn check(number: u64, bytes: &[u8], seed: u32) -> Result<(), Fault> {
    let mut crc = crc32c(seed, &(number as u32).to_le_bytes());
    crc = crc32c(crc, slice(bytes, 0x64, 4));
    crc = crc32c(crc, slice(bytes, 0, 0x7c));
    crc = crc32c(crc, &[0; 2]);
    crc = crc32c(crc, slice(bytes, 0x7e, 2));
    let wide = bytes.len() > 128 && le16(bytes, 0x80) >= 4;
    if bytes.len() > 128 {
        crc = crc32c(crc, slice(bytes, 0x80, 2));
        crc = crc32c(crc, if wide { &[0; 2] } else { slice(bytes, 0x82, 2) });
        crc = crc32c(crc, bytes.get(0x84..).unwrap_or_default());
    }
    let low = u32::from(le16(bytes, 0x7c));
    let (found, wanted) = match wide {
        true => (u32::from(le16(bytes, 0x82)) << 16 | low, crc),
        false => (low, crc & 0xffff),
    };
    if found == wanted {
        Ok(())
    } else {
        Err(Fault::Damaged("an inode's checksum"))
    }
}
