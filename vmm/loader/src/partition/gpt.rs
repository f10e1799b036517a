//! GPT (UEFI specification 2.10, section 5.3), with its checksums and its second header.

use super::{Partition, Scheme, Table, tolerate};
use crate::bytes::{guid, le32, le64, slice};
use crate::crc::crc32;
use crate::disk::{Disk, Fault};

/// More entries, and bytes of them, than any disk has (128 of 128 bytes is usual).
const MAX_ENTRIES: u32 = 1024;
const MAX_TABLE: u64 = 1 << 20;
const UNUSED: &str = "00000000-0000-0000-0000-000000000000";

struct Header {
    /// In sectors.
    entries_at: u64,
    entries: u32,
    entry_size: u32,
    entries_crc: u32,
}

pub fn read(disk: &Disk<'_>) -> Result<Table, Fault> {
    let mut remark = String::new();
    for sector in [512u64, 4096] {
        let mut head = [0; 512];
        if tolerate(disk.read(sector, &mut head))?.is_none() || !head.starts_with(b"EFI PART") {
            continue;
        }
        match table(disk, sector, 1)? {
            Ok(partitions) => return Ok(found(partitions, "a GPT")),
            Err(problem) => remark = format!("the GPT's {problem}"),
        }
        // Where the first one says, though it is damaged: the disk may have grown since.
        let other = le64(&head, 32);
        for place in [other, (disk.size() / sector).saturating_sub(1)] {
            if let Ok(partitions) = table(disk, sector, place)? {
                return Ok(found(
                    partitions,
                    "a GPT (its second header: the first is damaged)",
                ));
            }
        }
        remark.push_str(", and the second header is no better");
    }
    if remark.is_empty() {
        let place = (disk.size() / 512).saturating_sub(1);
        if let Ok(partitions) = table(disk, 512, place)? {
            return Ok(found(
                partitions,
                "a GPT (its second header: the first is gone)",
            ));
        }
    }
    Ok(Table {
        partitions: Vec::new(),
        remark,
    })
}

fn found(partitions: Vec<Partition>, remark: &str) -> Table {
    let none = if partitions.is_empty() {
        " without partitions"
    } else {
        ""
    };
    Table {
        partitions,
        remark: format!("{remark}{none}"),
    }
}

/// The table whose header stands at sector `place`; or what is wrong with it.
fn table(
    disk: &Disk<'_>,
    sector: u64,
    place: u64,
) -> Result<Result<Vec<Partition>, &'static str>, Fault> {
    let header = match header(disk, sector, place)? {
        Ok(header) => header,
        Err(problem) => return Ok(Err(problem)),
    };
    let length = u64::from(header.entries) * u64::from(header.entry_size);
    let Some(at) = header.entries_at.checked_mul(sector) else {
        return Ok(Err("entries are behind the disk's end"));
    };
    let mut entries = vec![0; length as usize];
    if tolerate(disk.read(at, &mut entries))?.is_none() {
        return Ok(Err("entries are behind the disk's end"));
    }
    if crc32(&entries) != header.entries_crc {
        return Ok(Err("entries have a wrong checksum"));
    }
    let mut partitions = Vec::new();
    for (entry, number) in entries.chunks(header.entry_size as usize).zip(1..) {
        let kind = guid(entry);
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if kind == UNUSED || first == 0 || last < first {
            continue;
        }
        let start = first.checked_mul(sector);
        let size = (last - first)
            .checked_add(1)
            .and_then(|count| count.checked_mul(sector));
        let (Some(start), Some(size)) = (start, size) else {
            continue;
        };
        if start >= disk.size() {
            continue;
        }
        partitions.push(Partition {
            scheme: Scheme::Gpt,
            number,
            start,
            size: size.min(disk.size() - start),
            kind,
        });
    }
    Ok(Ok(partitions))
}

fn header(disk: &Disk<'_>, sector: u64, place: u64) -> Result<Result<Header, &'static str>, Fault> {
    let mut bytes = [0; 512];
    let at = place.saturating_mul(sector);
    if place == 0 || tolerate(disk.read(at, &mut bytes))?.is_none() {
        return Ok(Err("header is behind the disk's end"));
    }
    if !bytes.starts_with(b"EFI PART") {
        return Ok(Err("header is missing"));
    }
    let size = le32(&bytes, 12) as usize;
    if !(92..=512).contains(&size) {
        return Ok(Err("header has an absurd size"));
    }
    let mut zeroed = bytes;
    if let Some(crc) = zeroed.get_mut(16..20) {
        crc.fill(0);
    }
    if crc32(slice(&zeroed, 0, size)) != le32(&bytes, 16) {
        return Ok(Err("header has a wrong checksum"));
    }
    if le64(&bytes, 24) != place {
        return Ok(Err("header says that it belongs elsewhere"));
    }
    let header = Header {
        entries_at: le64(&bytes, 72),
        entries: le32(&bytes, 80),
        entry_size: le32(&bytes, 84),
        entries_crc: le32(&bytes, 88),
    };
    let length = u64::from(header.entries) * u64::from(header.entry_size);
    let absurd = header.entries == 0
        || header.entries > MAX_ENTRIES
        || !(128..=4096).contains(&header.entry_size)
        || length > MAX_TABLE;
    if absurd {
        return Ok(Err("header describes an absurd number of entries"));
    }
    Ok(Ok(header))
}
