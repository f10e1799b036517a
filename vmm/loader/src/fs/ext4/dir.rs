//! Entries of a folder: read one after the other, also where there is a hash tree (whose inner nodes
//! look like unused entries).

use crate::bytes::{le16, le32, slice, u8_at};
use crate::disk::{Fault, Volume};

/// Bytes of an entry before its name.
const HEADER: usize = 8;

/// Calls `each` with name and inode for the entries of a block, until it says false; so does this.
pub fn walk(
    volume: &Volume<'_>,
    block: &[u8],
    each: &mut impl FnMut(&[u8], u64) -> bool,
) -> Result<bool, Fault> {
    let mut at = 0;
    while at + HEADER <= block.len() {
        volume.step()?;
        let inode = u64::from(le32(block, at));
        let length = match le16(block, at + 4) {
            // Of blocks of 64 KiB.
            0 | 0xffff => block.len() - at,
            length => length.into(),
        };
        let name = usize::from(u8_at(block, at + 6));
        if length < HEADER || length % 4 != 0 || at + length > block.len() {
            return Err(Fault::Damaged("a folder's entry"));
        }
        if inode != 0 {
            if HEADER + name > length {
                return Err(Fault::Damaged("a folder's entry"));
            }
            if name > 0 && !each(slice(block, at + HEADER, name), inode) {
                return Ok(false);
            }
        }
        at += length;
    }
    Ok(true)
}

/// A folder within an inode: the parent's inode, entries in the rest of the map's 60 bytes, and more in
/// the attribute, which is a block of its own.
pub fn walk_inline(
    volume: &Volume<'_>,
    bytes: &[u8],
    each: &mut impl FnMut(&[u8], u64) -> bool,
) -> Result<bool, Fault> {
    let first = slice(bytes, 4, 56);
    let second = bytes.get(60..).unwrap_or_default();
    Ok(walk(volume, first, each)? && walk(volume, second, each)?)
}
