//! MBR: four entries, one of which may begin a chain of logical partitions.

use super::{Partition, Scheme, Table, tolerate};
use crate::bytes::{le16, le32, slice, u8_at};
use crate::disk::{Disk, Fault};

const SECTOR: u64 = 512;
/// More logical partitions than Linux numbers; a chain that is longer goes in circles.
const MAX_LOGICAL: u32 = 128;

struct Entry {
    flag: u8,
    kind: u8,
    /// In sectors.
    start: u64,
    count: u64,
}

fn entries(sector: &[u8; 512]) -> [Entry; 4] {
    [446, 462, 478, 494].map(|at| {
        let bytes = slice(sector, at, 16);
        Entry {
            flag: u8_at(bytes, 0),
            kind: u8_at(bytes, 4),
            start: le32(bytes, 8).into(),
            count: le32(bytes, 12).into(),
        }
    })
}

impl Entry {
    fn is_used(&self) -> bool {
        self.kind != 0 && self.count != 0
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn partition(&self, number: u32, base: u64, disk: &Disk<'_>) -> Option<Partition> {
        let start = base.checked_add(self.start)? * SECTOR;
        (start < disk.size() && self.start != 0).then(|| Partition {
            scheme: Scheme::Mbr,
            number,
            start,
            size: (self.count * SECTOR).min(disk.size() - start),
            kind: format!("{:02x}", self.kind),
        })
    }
}

fn sector(disk: &Disk<'_>, at: u64) -> Result<Option<[u8; 512]>, Fault> {
    let mut bytes = [0; 512];
    let read = tolerate(disk.read(at.saturating_mul(SECTOR), &mut bytes))?;
    Ok(read
        .filter(|()| le16(&bytes, 510) == 0xaa55)
        .map(|()| bytes))
}

pub fn read(disk: &Disk<'_>) -> Result<Table, Fault> {
    let Some(first) = sector(disk, 0)? else {
        return Ok(Table {
            remark: "no partition table".to_owned(),
            ..Table::default()
        });
    };
    let entries = entries(&first);
    // A boot sector of a FAT file system ends in the same two bytes.
    let plausible = entries.iter().all(|entry| entry.flag & 0x7f == 0);
    if !plausible || !entries.iter().any(Entry::is_used) {
        return Ok(Table {
            remark: "no partition table".to_owned(),
            ..Table::default()
        });
    }
    let mut partitions = Vec::new();
    let mut remark = "an MBR".to_owned();
    for (entry, number) in entries.iter().zip(1..) {
        if !entry.is_used() {
        } else if entry.is_extended() {
            if !logical(disk, entry.start, &mut partitions)? {
                remark.push_str(" whose chain of logical partitions is broken");
            }
        } else if entry.kind == 0xee {
            remark.push_str(" that announces a GPT");
        } else {
            partitions.extend(entry.partition(number, 0, disk));
        }
    }
    partitions.sort_by_key(|partition| partition.number);
    Ok(Table { partitions, remark })
}

/// Follows the chain; false when it breaks off or does not end.
fn logical(disk: &Disk<'_>, base: u64, found: &mut Vec<Partition>) -> Result<bool, Fault> {
    let mut next = 0;
    for number in 5..5 + MAX_LOGICAL {
        disk.step()?;
        let Some(bytes) = sector(disk, base.saturating_add(next))? else {
            return Ok(false);
        };
        let [partition, link, ..] = entries(&bytes);
        if partition.is_used() {
            found.extend(partition.partition(number, base.saturating_add(next), disk));
        }
        if !link.is_used() || !link.is_extended() {
            return Ok(true);
        }
        next = link.start;
    }
    Ok(false)
}
