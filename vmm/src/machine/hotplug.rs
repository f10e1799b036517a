//! Devices that come and go while the machine runs.
//!
//! A function is put on the bus and the guest told; to take one away the guest is asked, and when it has
//! ejected the function the device is drained and dropped ([`Event::DeviceGone`]). A guest that does not
//! listen keeps its device until it is reset. What the machine is then made of is in its configuration
//! and its saved state.

use std::fs::File;
use std::sync::Arc;

use super::{Event, Machine, MachineError, RunState};
use crate::config::{BootSource, ConfigError, DiskConfig, MAX_DISKS, MAX_NETS};
use crate::config::{NetConfig, NetFiles};
use crate::device::Device;
use crate::virtio::{self, HotDevice};

impl Machine {
    /// Gives the guest another disk; returns the id that [`Machine::detach`] takes.
    pub fn attach_disk(&mut self, disk: DiskConfig, file: File) -> Result<String, MachineError> {
        self.not_ended("given a disk")?;
        let count = self.config.disks.len();
        if count >= MAX_DISKS {
            return Err(ConfigError::DiskCount { count: count + 1 }.into());
        }
        disk.validate(count)?;
        let kept = file.try_clone().map_err(MachineError::Descriptor)?;
        let (id, slot, device) = virtio::attach_disk(&disk, file, &self.board, &mut self.places)?;
        self.config.disks.push(disk);
        self.files.disks.push(kept);
        self.fill(slot, device);
        Ok(id)
    }

    /// Gives the guest another network; returns the id that [`Machine::detach`] takes. Its threads,
    /// one a pair of queues, are among those that [`crate::config::MachineConfig::hot_nets`] allows.
    pub fn attach_net(&mut self, net: NetConfig, files: NetFiles) -> Result<String, MachineError> {
        self.not_ended("given a network")?;
        let index = self.config.nets.len();
        if index >= MAX_NETS {
            return Err(ConfigError::NetCount { count: index + 1 }.into());
        }
        net.validate(index)?;
        net.validate_files(&files)?;
        let (id, slot, device) = virtio::attach_net(&net, &files, &self.board, &mut self.places)?;
        self.config.nets.push(net);
        self.files.nets.push(NetFiles {
            vhost: Vec::new(),
            ..files
        });
        self.fill(slot, device);
        Ok(id)
    }

    pub(super) fn not_ended(&self, action: &'static str) -> Result<(), MachineError> {
        let state = self.state;
        match state {
            RunState::Stopped => Err(MachineError::WrongState { state, action }),
            _ => Ok(()),
        }
    }

    pub(super) fn fill(&mut self, slot: u8, device: Arc<dyn Device>) {
        // What it writes is taken down by nobody, and nobody will know of it once it has gone again.
        if device.writes_unseen() {
            self.stop_tracking();
        }
        // The bus itself comes last: its reset looks at where functions have put their BARs.
        let at = self.devices.len().saturating_sub(1);
        self.devices.insert(at, device);
        self.slots.filled(slot);
    }

    /// Asks the guest to let a disk or network go; [`Event::DeviceGone`] says when it has. May be asked again.
    pub fn detach(&mut self, id: &str) -> Result<(), MachineError> {
        let (device, slot) = (self.places.find(id))
            .ok_or_else(|| MachineError::NoSuchDevice { id: id.to_owned() })?;
        if self.is_booted(device) {
            return Err(MachineError::BootDisk { id: id.to_owned() });
        }
        self.slots.ask(slot);
        Ok(())
    }

    fn is_booted(&self, device: HotDevice) -> bool {
        match (self.config.boot, device) {
            (BootSource::Disk(booted), HotDevice::Disk(index)) => booted == index,
            _ => false,
        }
    }

    /// The guest has let go of some slots. What it was not asked for stays where it is: a device belongs to
    /// the owner, and the guest may take it again.
    pub(super) fn slots_ejected(&mut self) {
        let asked = self.slots.asked();
        let ejected = self.slots.take_ejected().into_iter();
        for slot in ejected.filter(|slot| asked.contains(slot)) {
            self.remove(slot);
        }
    }

    /// What a guest was asked for and did not give goes when it is reset: it has no driver then.
    pub(super) fn remove_asked(&mut self) {
        for slot in self.slots.asked() {
            self.remove(slot);
        }
    }

    fn remove(&mut self, slot: u8) {
        let Some((id, device)) = self.places.in_slot(slot) else {
            return;
        };
        if self.is_booted(device) {
            return;
        }
        // Off the bus first: from here on no access begins.
        self.places.forget(&id);
        self.slots.emptied(slot);
        match device {
            HotDevice::Disk(index) => {
                self.config.disks.remove(index);
                self.files.disks.remove(index);
                if let BootSource::Disk(booted) = &mut self.config.boot
                    && *booted > index
                {
                    *booted -= 1;
                }
            }
            HotDevice::Net(index) => {
                self.config.nets.remove(index);
                self.files.nets.remove(index);
            }
        }
        if let Some(at) = self.devices.iter().position(|device| device.id() == id) {
            let device = self.devices.remove(at);
            if let Err(error) = device.pause() {
                // Its storage hangs. What is in flight keeps what it needs alive.
                tracing::warn!(device = id, %error, "a device went before it came to rest");
            }
            drop::<Arc<_>>(device);
        }
        self.announce(Event::DeviceGone { id });
    }
}
