//! The superblock, and where group descriptors stand.

use crate::bytes::{le16, le32, slice, text, uuid};
use crate::crc::crc32c;
use crate::disk::{Fault, Volume};

/// Incompatible features that this reader knows: file types in folders, recovery, meta block groups,
/// extents, 64 bit, multiple-mount protection, flexible groups, values of attributes in inodes,
/// checksum seed, large folders, inline data, encryption and case folding (of single folders).
const KNOWN: u32 = 0x2
    | 0x4
    | 0x10
    | 0x40
    | 0x80
    | 0x100
    | 0x200
    | 0x400
    | 0x2000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
const RECOVERY: u32 = 0x4;
const JOURNAL_DEVICE: u32 = 0x8;
const META_GROUPS: u32 = 0x10;
const BITS_64: u32 = 0x80;
const SEED: u32 = 0x2000;
const HAS_JOURNAL: u32 = 0x4;
const SPARSE_2: u32 = 0x200;
const SPARSE: u32 = 0x1;
const CHECKSUMS: u32 = 0x400;

pub struct Superblock {
    /// Bytes.
    pub block_size: u64,
    pub blocks: u64,
    pub groups: u64,
    pub inodes_per_group: u64,
    pub inode_size: u64,
    pub descriptor_size: u64,
    pub journal_inode: u64,
    pub needs_recovery: bool,
    /// Of inodes' checksums, where they have them.
    pub checksum_seed: Option<u32>,
    pub uuid: String,
    pub label: String,
    first_block: u64,
    blocks_per_group: u64,
    first_meta_group: u64,
    incompatible: u32,
    sparse: bool,
    /// The two groups with a copy of the superblock, of "sparse_super2".
    backups: Option<[u64; 2]>,
}

impl Superblock {
    pub fn read(volume: &Volume<'_>) -> Result<Superblock, Fault> {
        let bytes = volume.bytes::<1024>(1024)?;
        let incompatible = le32(&bytes, 0x60);
        let (compatible, read_only) = (le32(&bytes, 0x5c), le32(&bytes, 0x64));
        if incompatible & JOURNAL_DEVICE != 0 {
            return Err(Fault::Unsupported("a journal alone"));
        }
        if incompatible & !KNOWN != 0 {
            return Err(Fault::Unsupported(
                "a feature that this loader does not know",
            ));
        }
        let checksums = read_only & CHECKSUMS != 0;
        if checksums && crc32c(!0, slice(&bytes, 0, 0x3fc)) != le32(&bytes, 0x3fc) {
            return Err(Fault::Damaged("the superblock's checksum"));
        }
        let seed = match incompatible & SEED != 0 {
            true => le32(&bytes, 0x270),
            false => crc32c(!0, slice(&bytes, 0x68, 16)),
        };
        let wide = incompatible & BITS_64 != 0;
        let high = if wide {
            u64::from(le32(&bytes, 0x150))
        } else {
            0
        };
        let log_size = le32(&bytes, 0x18);
        if log_size > 6 {
            return Err(Fault::Damaged("the superblock's block size"));
        }
        let block_size = 1024u64 << log_size;
        let blocks = high << 32 | u64::from(le32(&bytes, 4));
        let first_block = u64::from(le32(&bytes, 0x14));
        let blocks_per_group = u64::from(le32(&bytes, 0x20));
        let inodes_per_group = u64::from(le32(&bytes, 0x28));
        let (inode_size, extra) = match le32(&bytes, 0x4c) {
            0 => (128, false),
            _ => (u64::from(le16(&bytes, 0x58)), true),
        };
        let descriptor_size = if wide {
            u64::from(le16(&bytes, 0xfe))
        } else {
            32
        };
        let sizes = inode_size.is_power_of_two()
            && (128..=block_size).contains(&inode_size)
            && descriptor_size.is_power_of_two()
            && (32..=1024).contains(&descriptor_size);
        let counts = blocks_per_group > 0
            && inodes_per_group > 0
            && first_block < blocks
            && blocks
                .checked_mul(block_size)
                .is_some_and(|size| size <= volume.size);
        if !sizes || !counts {
            return Err(Fault::Damaged(
                "the superblock's numbers (is the file system larger than its partition?)",
            ));
        }
        Ok(Superblock {
            block_size,
            blocks,
            groups: (blocks - first_block).div_ceil(blocks_per_group),
            inodes_per_group,
            inode_size,
            descriptor_size,
            journal_inode: le32(&bytes, 0xe0).into(),
            needs_recovery: compatible & HAS_JOURNAL != 0 && incompatible & RECOVERY != 0,
            checksum_seed: (checksums && extra).then_some(seed),
            uuid: uuid(slice(&bytes, 0x68, 16)),
            label: text(slice(&bytes, 0x78, 16)),
            first_block,
            blocks_per_group,
            first_meta_group: le32(&bytes, 0x104).into(),
            incompatible,
            sparse: read_only & SPARSE != 0,
            backups: (compatible & SPARSE_2 != 0)
                .then(|| [0x24c, 0x250].map(|at| le32(&bytes, at).into())),
        })
    }

    /// Block, and offset within it, of a group's descriptor.
    pub fn descriptor(&self, group: u64) -> Result<(u64, u64), Fault> {
        let per_block = self.block_size / self.descriptor_size;
        let index = group / per_block;
        let within = group % per_block * self.descriptor_size;
        let block = if self.incompatible & META_GROUPS != 0 && index >= self.first_meta_group {
            let group = index * per_block;
            // With clusters of blocks of 1 KiB the first group begins at block 0, and its
            // superblock at block 1.
            let late = self.block_size == 1024 && index == 0 && self.first_block == 0;
            let copy = u64::from(self.has_superblock(group)) + u64::from(late);
            let start = group.checked_mul(self.blocks_per_group);
            start.and_then(|start| start.checked_add(self.first_block + copy))
        } else {
            // Behind the superblock, which stands at byte 1024.
            Some(1024 / self.block_size + 1 + index)
        };
        Ok((block.ok_or(Fault::OutOfBounds)?, within))
    }

    fn has_superblock(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if let Some(backups) = self.backups {
            return backups.contains(&group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        !self.sparse || group == 1 || [3, 5, 7].into_iter().any(power_of)
    }

    /// The first block of the inodes that a descriptor tells of.
    pub fn inode_table(&self, descriptor: &[u8]) -> u64 {
        let high = if self.incompatible & BITS_64 != 0 && self.descriptor_size >= 64 {
            u64::from(le32(descriptor, 0x28))
        } else {
            0
        };
        high << 32 | u64::from(le32(descriptor, 8))
    }
}
