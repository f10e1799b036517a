//! Mounts that write nothing to the disk: a device-mapper snapshot takes what they write into memory.
//!
//! A journal must be replayed to see the newest kernel, and no mount option does that without writing.
//! The guest may have been suspended to its disk: whoever replays it there damages what is to be resumed.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};

use crate::{mounted, tool};

/// RAM disks that may be: each takes what is written to it, and no more than this, KiB.
const DISKS: usize = 16;
const SIZE: u64 = 512 << 10;

/// A volume's writable copy.
pub struct Overlay {
    device: PathBuf,
    number: usize,
}

impl Overlay {
    /// Number `number` of all, over the block device `device`.
    pub fn new(number: usize, device: &Path) -> Result<Overlay, String> {
        if number >= DISKS {
            return Err(format!("more than {DISKS} volumes to mount"));
        }
        tool::modprobe(&["brd", &format!("rd_nr={DISKS}"), &format!("rd_size={SIZE}")])?;
        tool::modprobe(&["dm-snapshot"])?;
        let name = device.file_name().unwrap_or_default().to_string_lossy();
        let sectors = crate::read(&format!("/sys/class/block/{name}/size"))?;
        // Not kept over a reboot, in chunks of 8 sectors.
        let table = format!(
            "0 {} snapshot {} /dev/ram{number} N 8",
            sectors.trim(),
            device.display()
        );
        let overlay = format!("overlay{number}");
        tool::run(
            "/sbin/dmsetup",
            &["create", &overlay, "--noudevsync", "--table", &table],
        )?;
        let device = named(&overlay).ok_or_else(|| format!("{overlay} did not come up"))?;
        Ok(Overlay { device, number })
    }

    /// Mounts it, read only for all that we do ourselves.
    pub fn mount(&self, kind: &str, options: Option<&str>) -> Result<PathBuf, String> {
        let at = self.number * 2 + usize::from(options.is_some());
        let point = mounted::mount_point(at).map_err(|error| format!("/mnt: {error}"))?;
        let options = options.map(std::ffi::CString::new).transpose();
        let options = options.map_err(|error| error.to_string())?;
        let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
        mount(&self.device, &point, kind, flags, options.as_deref())
            .map_err(|error| format!("it cannot be mounted: {error}"))?;
        Ok(point)
    }
}

/// The device-mapper's device of this name.
fn named(name: &str) -> Option<PathBuf> {
    let found = devices().into_iter().find(|device| device.name == name);
    found.map(|device| device.path)
}

/// A device of the device-mapper.
pub struct Mapped {
    pub name: String,
    pub uuid: String,
    pub path: PathBuf,
}

pub fn devices() -> Vec<Mapped> {
    let entries = std::fs::read_dir("/sys/class/block").into_iter().flatten();
    let device = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let text = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
        Some(Mapped {
            name: text("dm/name")?.trim().to_owned(),
            uuid: text("dm/uuid")?.trim().to_owned(),
            path: Path::new("/dev").join(entry.file_name()),
        })
    };
    let mut devices: Vec<Mapped> = entries.filter_map(device).collect();
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    devices
}
