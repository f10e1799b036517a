//! A machine's devices in the VMM's words, and the files that go with them.

use std::fs::File;
use std::os::fd::OwnedFd;

use fractus_agent_api::device::{DeviceId, Disk, Nic};
use fractus_vmm::config::{BootSource, DiskConfig, DiskLimit, MachineConfig, NetConfig, NetLimit};

use super::launch::failed;
use super::{Plan, ProcessError};
use crate::machine::make::OpenDevice;
use crate::network::vhost;
use crate::paths::MachinePaths;
use crate::vm::protocol::FileRole;
use crate::volume::OpenDisk;
use crate::volume::directory;

/// Disks that may come while a machine runs, at a time; what is more than these comes with the machine's
/// next start.
pub(super) const HOT_DISKS: u8 = 4;
/// The same for pairs of queues of networks.
pub(super) const HOT_NETS: u8 = 4;

/// Bytes of the config drive that comes with a guest at most.
const MOST_DRIVE: u64 = 64 << 20;

/// Files with the roles they are handed over in.
#[derive(Default)]
pub(super) struct Files {
    pub roles: Vec<FileRole>,
    pub files: Vec<OwnedFd>,
    /// Names of the disks among them.
    pub disks: Vec<Option<DeviceId>>,
    /// Bytes that each of these may have, should its content come from elsewhere.
    pub most: Vec<u64>,
    /// Bytes of the largest of them.
    pub largest: u64,
    /// Names of the networks.
    pub nets: Vec<Option<DeviceId>>,
}

impl Files {
    pub fn push(&mut self, role: FileRole, file: impl Into<OwnedFd>) {
        self.roles.push(role);
        self.files.push(file.into());
    }

    fn push_disk(&mut self, id: Option<DeviceId>, disk: OpenDisk, most: u64) {
        self.push(FileRole::Disk, disk.file);
        self.disks.push(id);
        self.most.push(most);
        self.largest = self.largest.max(disk.bytes);
    }

    fn push_net(&mut self, id: DeviceId, taps: Vec<OwnedFd>) {
        for tap in taps {
            self.push(FileRole::Tap, tap);
        }
        self.nets.push(Some(id));
    }
}

/// In the order in which a guest finds its disks: root disk, config drive, the others; then its networks.
pub(super) fn open(
    plan: &mut Plan,
    paths: &MachinePaths,
    config: &mut MachineConfig,
    files: &mut Files,
) -> Result<(), ProcessError> {
    if plan.spec.root_disk.is_some() {
        let disk = directory::open(&paths.disk(), false)?;
        config.disks.push(DiskConfig {
            read_only: false,
            serial_number: plan.id.0.simple().to_string().chars().take(20).collect(),
            direct: disk.direct,
            limit: None,
            queues: 1,
        });
        let shape = plan.arrives.as_ref().map(|arriving| arriving.shape);
        let most = shape.and_then(|shape| shape.root_disk).unwrap_or(0);
        files.push_disk(None, disk, most);
        if plan.spec.boot.kernel.is_none() {
            config.boot = BootSource::Disk(0);
        }
    }
    if plan.spec.guest.instance.is_some() {
        let drive = paths.config_drive();
        // The one that stands here is another's, whose content comes.
        let mut options = File::options();
        let open = options
            .read(true)
            .write(plan.arrives.is_some())
            .open(&drive);
        let file = open.map_err(failed(format!("opening {}", drive.display())))?;
        let (direct, bytes) = (false, 0);
        config.disks.push(DiskConfig {
            read_only: true,
            serial_number: "config-2".to_owned(),
            direct,
            limit: None,
            queues: 1,
        });
        files.push_disk(
            None,
            OpenDisk {
                file,
                direct,
                bytes,
            },
            MOST_DRIVE,
        );
    }
    for device in plan.devices.drain(..) {
        match device {
            OpenDevice::Disk(disk, open) => {
                config.disks.push(disk_config(&disk, &open));
                let most = disk.size.next_multiple_of(directory::BLOCK);
                files.push_disk(Some(disk.id), open, most);
            }
            OpenDevice::Nic(nic, taps) => {
                config.nets.push(net_config(&nic));
                files.push_net(nic.id, taps);
            }
        }
    }
    // The kernel keeps no rate of ours.
    let free = config.nets.iter().filter(|net| net.limit.is_none());
    let pairs = free.map(|net| usize::from(net.queues)).sum();
    for device in vhost::open_all(pairs) {
        files.push(FileRole::Vhost, device);
    }
    Ok(())
}

pub(super) fn disk_config(disk: &Disk, open: &OpenDisk) -> DiskConfig {
    DiskConfig {
        read_only: disk.read_only,
        serial_number: disk.serial_number(),
        direct: open.direct,
        limit: disk.limit.map(|limit| DiskLimit {
            bytes_per_second: limit.bytes_per_second,
            operations_per_second: limit.operations_per_second,
            burst_ms: limit.burst_ms,
        }),
        queues: 1,
    }
}

pub(super) fn net_config(nic: &Nic) -> NetConfig {
    NetConfig {
        mac: nic.mac.0,
        queues: nic.queues,
        mtu: nic.mtu,
        limit: nic.limit.map(|limit| NetLimit {
            bytes_per_second: limit.bytes_per_second,
            packets_per_second: limit.packets_per_second,
            burst_ms: limit.burst_ms,
        }),
        addresses: Vec::new(),
    }
}
