//! FAT12, FAT16 and FAT32 (Microsoft's FAT specification 1.03).

mod dir;

use crate::bytes::{le16, le32, slice, u8_at};
use crate::disk::{Fault, Piece, Pieces, Volume};
use crate::fs::{FileSystem, Kind, MAX_NAMES, Node};

/// Bytes of a folder that are looked at.
const MAX_FOLDER: u64 = 2 << 20;
/// The identity of the fixed root folder of FAT12 and FAT16.
const FIXED_ROOT: u64 = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Fat12,
    Fat16,
    Fat32,
}

pub struct Fat<'a> {
    volume: Volume<'a>,
    width: Width,
    /// Bytes.
    cluster: u64,
    /// Bytes from the volume's begin: the table, the fixed root and the first cluster.
    table: u64,
    fixed_root: u64,
    fixed_root_size: u64,
    data: u64,
    clusters: u32,
    root_cluster: u32,
    uuid: String,
    label: String,
}

impl<'a> Fat<'a> {
    pub fn open(volume: Volume<'a>) -> Result<Fat<'a>, Fault> {
        let head = volume.bytes::<512>(0)?;
        let sector = u64::from(le16(&head, 11));
        let per_cluster = u64::from(u8_at(&head, 13));
        let reserved = u64::from(le16(&head, 14));
        let copies = u64::from(u8_at(&head, 16));
        let root_entries = u64::from(le16(&head, 17));
        let sectors = match le16(&head, 19) {
            0 => u64::from(le32(&head, 32)),
            sectors => sectors.into(),
        };
        let table_sectors = match le16(&head, 22) {
            0 => u64::from(le32(&head, 36)),
            sectors => sectors.into(),
        };
        if !matches!(sector, 512 | 1024 | 2048 | 4096) || !per_cluster.is_power_of_two() {
            return Err(Fault::Damaged("the parameter block"));
        }
        let root_sectors = (root_entries * 32).div_ceil(sector);
        let first_data = reserved + copies * table_sectors + root_sectors;
        let clusters = sectors.saturating_sub(first_data) / per_cluster;
        if clusters == 0 || table_sectors == 0 || reserved == 0 {
            return Err(Fault::Damaged("the parameter block"));
        }
        if sectors.saturating_mul(sector) > volume.size {
            return Err(Fault::Damaged(
                "the parameter block (the file system is larger than its partition)",
            ));
        }
        let width = match clusters {
            0..4085 => Width::Fat12,
            4085..65525 => Width::Fat16,
            _ => Width::Fat32,
        };
        let clusters = u32::try_from(clusters).map_err(|_| Fault::Damaged("its size"))?;
        let extended = if width == Width::Fat32 { 67 } else { 39 };
        let id = le32(&head, extended);
        let label = String::from_utf8_lossy(slice(&head, extended + 4, 11));
        Ok(Fat {
            volume,
            width,
            cluster: sector * per_cluster,
            table: reserved * sector,
            fixed_root: (reserved + copies * table_sectors) * sector,
            fixed_root_size: root_entries * 32,
            data: first_data * sector,
            clusters,
            root_cluster: le32(&head, 44) & 0x0fff_ffff,
            uuid: format!("{:04x}-{:04x}", id >> 16, id & 0xffff),
            label: label.trim_end().to_owned(),
        })
    }

    /// Bytes from the disk's begin.
    fn place(&self, cluster: u32) -> Result<u64, Fault> {
        let index = cluster
            .checked_sub(2)
            .filter(|index| *index < self.clusters);
        let index = index.ok_or(Fault::Damaged("a cluster that is not there"))?;
        Ok(self.volume.start + self.data + u64::from(index) * self.cluster)
    }

    /// What follows `cluster`; `None` at a chain's end.
    fn next(&self, cluster: u32) -> Result<Option<u32>, Fault> {
        let number = u64::from(cluster);
        let (value, last) = match self.width {
            Width::Fat12 => {
                let pair = le16(
                    &self.volume.bytes::<2>(self.table + number + number / 2)?,
                    0,
                );
                let value = if number % 2 == 0 {
                    pair & 0xfff
                } else {
                    pair >> 4
                };
                (u32::from(value), 0xff8)
            }
            Width::Fat16 => {
                let value = le16(&self.volume.bytes::<2>(self.table + number * 2)?, 0);
                (u32::from(value), 0xfff8)
            }
            Width::Fat32 => {
                let value = le32(&self.volume.bytes::<4>(self.table + number * 4)?, 0);
                (value & 0x0fff_ffff, 0x0fff_fff8)
            }
        };
        Ok((value < last).then_some(value))
    }

    /// The clusters from `first` on, as far as `size` bytes need them (a folder: to the chain's end).
    fn chain(&self, first: u32, size: u64, folder: bool) -> Result<Vec<Piece>, Fault> {
        let wanted = if folder { MAX_FOLDER } else { size };
        let mut pieces = Pieces::default();
        let mut cluster = Some(first);
        let mut turns = 0;
        while pieces.length() < wanted {
            self.volume.step()?;
            let Some(number) = cluster else { break };
            turns += 1;
            if turns > self.clusters {
                return Err(Fault::Damaged("a chain of clusters in a circle"));
            }
            pieces.push(Piece::Disk {
                offset: self.place(number)?,
                length: self.cluster,
            })?;
            cluster = self.next(number)?;
        }
        if folder {
            let size = pieces.length();
            return pieces.finish(size);
        }
        if pieces.length() < size {
            return Err(Fault::Damaged(
                "a chain of clusters that ends within its file",
            ));
        }
        pieces.finish(size)
    }

    /// A folder's entries, whole.
    fn folder(&self, node: Node) -> Result<Vec<Piece>, Fault> {
        if node.id == FIXED_ROOT && self.width != Width::Fat32 {
            return Ok(vec![Piece::Disk {
                offset: self.volume.start + self.fixed_root,
                length: self.fixed_root_size,
            }]);
        }
        let first = match node.id {
            FIXED_ROOT => self.root_cluster,
            id => u32::try_from(id).map_err(|_| Fault::NotFound)?,
        };
        self.chain(first, 0, true)
    }
}

impl FileSystem for Fat<'_> {
    fn root(&self) -> Result<Node, Fault> {
        Ok(Node {
            id: FIXED_ROOT,
            kind: Kind::Folder,
            size: 0,
        })
    }

    fn lookup(&self, folder: Node, name: &str) -> Result<Node, Fault> {
        let wanted = name.to_lowercase();
        let mut found = None;
        dir::walk(self.volume.disk, &self.folder(folder)?, |entry| {
            if entry.is_called(&wanted) {
                found = Some(entry.node);
            }
            found.is_none()
        })?;
        found.ok_or(Fault::NotFound)
    }

    fn names(&self, folder: Node) -> Result<Vec<String>, Fault> {
        let mut names = Vec::new();
        dir::walk(self.volume.disk, &self.folder(folder)?, |entry| {
            names.push(entry.name().to_owned());
            names.len() < MAX_NAMES
        })?;
        Ok(names)
    }

    fn link(&self, _: Node) -> Result<String, Fault> {
        Err(Fault::Unsupported("symbolic links on FAT"))
    }

    fn pieces(&self, node: Node, limit: u64) -> Result<Vec<Piece>, Fault> {
        let size = node.size;
        if size > limit {
            return Err(Fault::TooLarge { size, limit });
        }
        let first = u32::try_from(node.id).map_err(|_| Fault::NotFound)?;
        self.chain(first, size, false)
    }

    fn uuid(&self) -> &str {
        &self.uuid
    }

    fn label(&self) -> &str {
        &self.label
    }
}
