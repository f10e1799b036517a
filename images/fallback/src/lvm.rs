//! Logical volumes: LVM's own program makes them devices.

use std::path::PathBuf;

use crate::{overlay, tool};

/// No udev, no daemons, nothing written: neither backups of metadata nor a check of a pool.
const CONFIG: &str = "devices{use_devicesfile=0 obtain_device_list_from_udev=0} \
    activation{udev_sync=0 udev_rules=0 monitoring=0} backup{backup=0 archive=0} \
    global{use_lvmpolld=0 use_lvmlockd=0 thin_check_executable=\"\" cache_check_executable=\"\"}";

pub struct LogicalVolume {
    /// As the device-mapper has it: `vg-lv`, with the dashes of names doubled.
    pub name: String,
    pub path: PathBuf,
}

/// Activates all that there is.
pub fn activate() -> Result<Vec<LogicalVolume>, String> {
    tool::modprobe(&["dm-mod"])?;
    let arguments = [
        "vgchange",
        "--activate",
        "y",
        "--ignoremonitoring",
        "--config",
        CONFIG,
    ];
    let outcome = tool::run("/sbin/lvm", &arguments);
    let volumes: Vec<LogicalVolume> = overlay::devices()
        .into_iter()
        .filter(|device| is_visible(&device.uuid))
        .map(|device| LogicalVolume {
            name: device.name,
            path: device.path,
        })
        .collect();
    match outcome {
        // Some may be there where others are damaged.
        Err(error) if volumes.is_empty() => Err(error),
        _ => Ok(volumes),
    }
}

/// Parts of volumes, which are devices too, have a suffix to the UUIDs of group and volume.
fn is_visible(uuid: &str) -> bool {
    uuid.strip_prefix("LVM-")
        .is_some_and(|rest| rest.len() == 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_volumes_are_none() {
        let whole = format!("LVM-{}", "x".repeat(64));
        assert!(is_visible(&whole));
        assert!(!is_visible(&format!("{whole}-tdata")));
        assert!(!is_visible("overlay") && !is_visible(""));
    }
}
