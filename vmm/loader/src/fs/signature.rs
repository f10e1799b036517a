//! Tells what a volume holds by the bytes that file systems put at fixed places.

use crate::bytes::{le16, le32, slice, text, uuid};
use crate::disk::{Fault, Volume};

/// Something that this loader does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Other {
    pub name: &'static str,
    /// A Linux root or /boot may be in it: the guest itself could read it.
    pub may_hold_linux: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signature {
    Ext,
    Fat,
    Other(Other),
    None,
}

/// Offset, bytes, name, and whether a Linux may be in it.
const OTHERS: &[(u64, &[u8], &str, bool)] = &[
    (0, b"XFSB", "XFS", true),
    (0x1_0040, b"_BHRfS_M", "btrfs", true),
    (0x218, b"LVM2 001", "LVM", true),
    (0x18, b"LVM2 001", "LVM", true),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID", true),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID", true),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "F2FS", true),
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)", false),
    (0, b"-FVE-FS-", "BitLocker (encrypted)", false),
    (3, b"NTFS    ", "NTFS", false),
    (3, b"EXFAT   ", "exFAT", false),
    (4086, b"SWAPSPACE2", "swap", false),
    (0, b"hsqs", "squashfs", false),
    (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "EROFS", false),
    (0x8001, b"CD001", "ISO 9660", false),
];

/// By what a configuration searches for a file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// In lower case.
    pub uuid: String,
    pub label: String,
}

/// Identity of a file system that Linux reads for the loader; of others there is none.
pub fn identify(volume: &Volume<'_>, name: &str) -> Result<Identity, Fault> {
    // Where UUID and label stand, and bytes of the label.
    let (at, label_at, length) = match name {
        "XFS" => (32, 108, 12),
        "btrfs" => (0x1_0020, 0x1_012b, 256),
        "ext4" => (1024 + 0x68, 1024 + 0x78, 16),
        _ => return Ok(Identity::default()),
    };
    let mut label_bytes = [0; 256];
    let label_bytes = label_bytes.get_mut(..length).unwrap_or_default();
    volume.read(label_at, label_bytes)?;
    Ok(Identity {
        uuid: uuid(&volume.bytes::<16>(at)?),
        label: text(label_bytes),
    })
}

pub fn recognise(volume: &Volume<'_>) -> Result<Signature, Fault> {
    let mut head = [0; 4096];
    let length = volume.size.min(4096) as usize;
    match volume.read(0, head.get_mut(..length).unwrap_or_default()) {
        Ok(()) => {}
        Err(fault) if fault.ends_the_search() => return Err(fault),
        Err(_) => return Ok(Signature::None),
    }
    for (offset, magic, name, may_hold_linux) in OTHERS {
        let mut found = [0; 16];
        let Some(found) = found.get_mut(..magic.len()) else {
            continue;
        };
        match volume.read(*offset, found) {
            Ok(()) if found == *magic => {
                return Ok(Signature::Other(Other {
                    name,
                    may_hold_linux: *may_hold_linux,
                }));
            }
            Err(fault) if fault.ends_the_search() => return Err(fault),
            _ => {}
        }
    }
    if le16(&head, 1024 + 0x38) == 0xef53 {
        return Ok(Signature::Ext);
    }
    if is_fat(&head) {
        return Ok(Signature::Fat);
    }
    Ok(Signature::None)
}

/// A jump, then a parameter block in which every field is possible.
fn is_fat(head: &[u8]) -> bool {
    let jump = matches!(slice(head, 0, 3), [0xeb, _, 0x90] | [0xe9, _, _]);
    let sector = le16(head, 11);
    let [cluster] = *slice(head, 13, 1) else {
        return false;
    };
    let (reserved, copies) = (le16(head, 14), slice(head, 16, 1));
    let sectors = le32(head, 32).max(le16(head, 19).into());
    jump && matches!(sector, 512 | 1024 | 2048 | 4096)
        && cluster.is_power_of_two()
        && reserved > 0
        && matches!(copies, [1..=4])
        && sectors > 0
        && le16(head, 510) == 0xaa55
}
