//! What is on the disk: partitions and logical volumes, each read by the loader's own code where that can
//! read it, else mounted by Linux.

use std::fs::File;
use std::path::{Path, PathBuf};

use fractus_loader::disk::{Disk, Fault, Volume};
use fractus_loader::fs::{self, Content, FileSystem, Tree};
use fractus_loader::partition::{self, Partition};

use crate::lvm;
use crate::mounted::Mounted;
use crate::overlay::Overlay;

/// All that was found.
#[derive(Default)]
pub struct Collection {
    pub trees: Vec<Tree<'static>>,
    /// Of each tree.
    pub origins: Vec<Origin>,
    /// For people: what is not among them, and why.
    pub remarks: Vec<String>,
}

/// Where a tree's files come from.
pub enum Origin {
    /// On the bytes of this device that the loader says.
    Device(File),
    Mounted(Mounted),
}

/// As the loader itself looks at.
const MAX_VOLUMES: usize = 64;

/// Looks through disk number `index`.
pub fn collect(index: usize) -> Result<Collection, String> {
    let name = disks()?.into_iter().nth(index);
    let name = name.ok_or_else(|| format!("the machine has no disk {index}"))?;
    let mut collecting = Collecting::default();
    collecting
        .disk(&name)
        .map_err(|fault| format!("{name}: {fault}"))?;
    if std::mem::take(&mut collecting.physical_volumes) {
        collecting.logical_volumes();
    }
    Ok(collecting.collection)
}

/// Names of the machine's disks, in the order of its slots.
fn disks() -> Result<Vec<String>, String> {
    let entries = std::fs::read_dir("/sys/block").map_err(|e| format!("/sys/block: {e}"))?;
    let mut disks: Vec<(PathBuf, String)> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let device = Path::new("/sys/block").join(&name).join("device");
            let slot = name
                .starts_with("vd")
                .then(|| device.canonicalize().ok())??;
            Some((slot, name))
        })
        .collect();
    disks.sort();
    Ok(disks.into_iter().map(|(_, name)| name).collect())
}

#[derive(Default)]
struct Collecting {
    collection: Collection,
    /// There is something of LVM.
    physical_volumes: bool,
    overlays: usize,
}

/// How a volume is called.
struct Names {
    /// For people: `partition 2`.
    place: String,
    /// GRUB's: `hd0,gpt2`.
    device: String,
    number: Option<u32>,
    kind: String,
    /// The block device that Linux mounts.
    node: PathBuf,
}

impl Collecting {
    /// Errors are those that end the search.
    fn disk(&mut self, name: &str) -> Result<(), Fault> {
        let node = Path::new("/dev").join(name);
        let disk = open(&node)?;
        let table = partition::table(disk)?;
        self.remark(table.remark);
        for partition in table.partitions.iter().take(MAX_VOLUMES) {
            let Partition {
                scheme,
                number,
                start,
                size,
                kind,
            } = partition;
            let names = Names {
                place: format!("partition {number}"),
                device: format!("hd0,{}{number}", scheme.grub_name()),
                number: Some(*number),
                kind: kind.clone(),
                node: Path::new("/dev").join(format!("{name}{number}")),
            };
            let volume = Volume {
                disk,
                start: *start,
                size: *size,
            };
            self.volume(volume, &node, names)?;
        }
        let names = Names {
            place: "the whole disk".to_owned(),
            device: "hd0".to_owned(),
            number: None,
            kind: String::new(),
            node: node.clone(),
        };
        self.volume(whole(disk), &node, names)
    }

    fn logical_volumes(&mut self) {
        let volumes = match lvm::activate() {
            Ok(volumes) => volumes,
            Err(error) => return self.remark(error),
        };
        for lvm::LogicalVolume { name, path } in volumes.into_iter().take(MAX_VOLUMES) {
            let names = Names {
                place: format!("logical volume {name}"),
                device: format!("lvm/{name}"),
                number: None,
                kind: String::new(),
                node: path.clone(),
            };
            let outcome = open(&path).and_then(|disk| self.volume(whole(disk), &path, names));
            if let Err(fault) = outcome {
                self.remark(format!("logical volume {name}: {fault}"));
            }
        }
    }

    /// `device` is what the volume is a part of.
    fn volume(
        &mut self,
        volume: Volume<'static>,
        device: &Path,
        names: Names,
    ) -> Result<(), Fault> {
        let place = names.place.clone();
        match fs::open(volume)? {
            Content::Readable(kind, system) => {
                let origin = Origin::Device(file(device)?);
                self.add(volume, names, kind, system, origin);
            }
            Content::Broken(kind, Fault::Unsupported(_)) => self.mount(volume, names, kind)?,
            Content::Broken(kind, fault) => {
                self.remark(format!("{place}: {kind} that cannot be read: {fault}"));
            }
            Content::Other(other) if other.name == "LVM" => self.physical_volumes = true,
            Content::Other(other) if linux_name(other.name).is_some() => {
                self.mount(volume, names, other.name)?;
            }
            Content::Other(other) => self.remark(format!("{place} is {}", other.name)),
            Content::Unknown if names.number.is_some() => {
                self.remark(format!("{place}: no known file system"));
            }
            Content::Unknown => {}
        }
        Ok(())
    }

    fn mount(&mut self, volume: Volume<'static>, names: Names, kind: &str) -> Result<(), Fault> {
        let identity = fs::identify(&volume, kind)?;
        let number = self.overlays;
        self.overlays += 1;
        let mounted = Overlay::new(number, &names.node).and_then(|overlay| {
            let linux = linux_name(kind).unwrap_or(kind);
            let mut roots = vec![overlay.mount(linux, None)?];
            if kind == "btrfs" {
                // By default the root is what the distribution has set; this is what is above it.
                roots.push(overlay.mount(linux, Some("subvolid=5"))?);
            }
            Ok(Mounted::new(roots, identity))
        });
        match mounted {
            Ok(mounted) => {
                let system = Box::new(mounted.clone());
                self.add(volume, names, kind, system, Origin::Mounted(mounted));
            }
            Err(error) => self.remark(format!("{}: {kind}: {error}", names.place)),
        }
        Ok(())
    }

    fn add(
        &mut self,
        volume: Volume<'static>,
        names: Names,
        kind: &str,
        system: Box<dyn FileSystem + 'static>,
        origin: Origin,
    ) {
        self.collection.trees.push(Tree {
            system,
            disk: volume.disk,
            name: format!("{} ({kind})", names.place),
            device: names.device,
            number: names.number,
            kind: names.kind,
        });
        self.collection.origins.push(origin);
    }

    fn remark(&mut self, remark: String) {
        self.collection.remarks.push(remark);
    }
}

/// As Linux calls a file system that it mounts for us.
fn linux_name(name: &str) -> Option<&'static str> {
    Some(match name {
        "XFS" => "xfs",
        "btrfs" => "btrfs",
        "ext4" => "ext4",
        _ => return None,
    })
}

fn file(path: &Path) -> Result<File, Fault> {
    File::open(path).map_err(|source| Fault::Io { offset: 0, source })
}

/// A block device, open for the life of this process, with a budget of its own.
fn open(path: &Path) -> Result<&'static Disk<'static>, Fault> {
    let device = Box::leak(Box::new(BlockDevice::open(file(path)?)?));
    let limits = crate::limits().map_err(|error| Fault::Io {
        offset: 0,
        source: std::io::Error::other(error),
    })?;
    Ok(Box::leak(Box::new(Disk::new(device, limits))))
}

fn whole(disk: &'static Disk<'static>) -> Volume<'static> {
    Volume {
        disk,
        start: 0,
        size: disk.size(),
    }
}

/// A block device has an end instead of a length.
struct BlockDevice {
    file: File,
    size: u64,
}

impl BlockDevice {
    fn open(file: File) -> Result<BlockDevice, Fault> {
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0));
        let size = size.map_err(|error| Fault::Io {
            offset: 0,
            source: error.into(),
        })?;
        Ok(BlockDevice { file, size })
    }
}

impl fractus_loader::ReadAt for BlockDevice {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buffer, offset)
    }

    fn size(&self) -> u64 {
        self.size
    }
}
