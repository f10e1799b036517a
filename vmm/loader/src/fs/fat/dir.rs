//! Entries of a FAT folder, with their long names.

use crate::bytes::{le16, le32, slice, u8_at};
use crate::disk::{Disk, Fault, Piece};
use crate::fs::{Kind, Node};

const ENTRY: usize = 32;
const VOLUME_LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;
/// Characters of a long name in one entry, and where they stand.
const CHARACTERS: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
const MAX_LONG: usize = 20;

pub struct Entry {
    pub node: Node,
    short: String,
    long: Option<String>,
}

impl Entry {
    pub fn name(&self) -> &str {
        self.long.as_deref().unwrap_or(&self.short)
    }

    /// Names are the same in capital and small letters; `wanted` is in small ones.
    pub fn is_called(&self, wanted: &str) -> bool {
        let same = |name: &str| name.to_lowercase() == wanted;
        same(&self.short) || self.long.as_deref().is_some_and(same)
    }
}

/// The parts of a long name, which stand before the entry that they name, last part first.
#[derive(Default)]
struct Long {
    parts: Vec<[u16; 13]>,
    /// Number of the part that must come next; 0: complete.
    next: u8,
    checksum: u8,
}

impl Long {
    fn take(&mut self, entry: &[u8]) {
        let order = u8_at(entry, 0);
        let number = order & 0x3f;
        if order & 0x40 != 0 {
            self.parts.clear();
            self.next = number;
            self.checksum = u8_at(entry, 13);
        }
        if number == 0 || number != self.next || u8_at(entry, 13) != self.checksum {
            *self = Long::default();
            return;
        }
        if self.parts.len() < MAX_LONG {
            self.parts.push(CHARACTERS.map(|at| le16(entry, at)));
        }
        self.next -= 1;
    }

    /// The name, if the parts are whole and belong to the entry with this short name.
    fn finish(&mut self, short: &[u8]) -> Option<String> {
        let long = std::mem::take(self);
        let checksum = short
            .iter()
            .fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if long.parts.is_empty() || long.next != 0 || long.checksum != checksum {
            return None;
        }
        let units = long.parts.iter().rev().flatten().copied();
        let units: Vec<u16> = units
            .take_while(|unit| *unit != 0 && *unit != 0xffff)
            .collect();
        Some(String::from_utf16_lossy(&units))
    }
}

/// Calls `each` for every entry until it says false.
pub fn walk(
    disk: &Disk<'_>,
    pieces: &[Piece],
    mut each: impl FnMut(Entry) -> bool,
) -> Result<(), Fault> {
    let mut long = Long::default();
    for piece in pieces {
        let Piece::Disk { offset, length } = piece else {
            continue;
        };
        for at in (0..*length).step_by(ENTRY) {
            disk.step()?;
            let mut entry = [0; ENTRY];
            disk.read(offset + at, &mut entry)?;
            match (u8_at(&entry, 0), u8_at(&entry, 11)) {
                (0, _) => return Ok(()),
                (0xe5, _) => long = Long::default(),
                (_, LONG_NAME) => long.take(&entry),
                (b'.', _) => long = Long::default(),
                (_, attributes) if attributes & VOLUME_LABEL != 0 => long = Long::default(),
                (_, attributes) => {
                    let long = long.finish(slice(&entry, 0, 11));
                    if !each(read(&entry, attributes, long)) {
                        return Ok(());
                    }
                }
            }
        }
    }
    Ok(())
}

fn read(entry: &[u8], attributes: u8, long: Option<String>) -> Entry {
    let cluster = u64::from(le16(entry, 20)) << 16 | u64::from(le16(entry, 26));
    let kind = if attributes & FOLDER != 0 {
        Kind::Folder
    } else {
        Kind::File
    };
    Entry {
        node: Node {
            id: cluster,
            kind,
            size: le32(entry, 28).into(),
        },
        short: short(entry),
        long,
    }
}

/// `NAME.EXT`, in small letters where Windows NT's flags say so.
fn short(entry: &[u8]) -> String {
    let flags = u8_at(entry, 12);
    let part = |at: usize, length: usize, small: bool| {
        let text = String::from_utf8_lossy(slice(entry, at, length));
        let text = text.trim_end();
        if small {
            text.to_lowercase()
        } else {
            text.to_owned()
        }
    };
    let name = part(0, 8, flags & 0x08 != 0);
    let extension = part(8, 3, flags & 0x10 != 0);
    if extension.is_empty() {
        name
    } else {
        format!("{name}.{extension}")
    }
}
