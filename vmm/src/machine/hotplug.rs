//! Devices that come and go while the machine runs.
//!
//! A function is put on the bus and the guest told; to take one away the guest is asked, and when it has
//! ejected the function the device is drained and dropped ([`Event::DeviceGone`]). A guest that does not
//! listen keeps its device until it is reset. What the machine is then made of is in its configuration
//! and its saved state.

use std::fs::File;
use std::sync::Arc;

use super::{Event, Machine, MachineError, RunState};
use crate::config::{BootSource, ConfigError, DiskConfig, MAX_DISKS};
use crate::virtio;

impl Machine {
    /// Gives the guest another disk; returns the id that [`Machine::detach`] takes.
    pub fn attach_disk(&mut self, disk: DiskConfig, file: File) -> Result<String, MachineError> {
        if self.state == RunState::Stopped {
            return Err(MachineError::WrongState {
                state: self.state,
                action: "given a disk",
            });
        }
        let count = self.config.disks.len();
        if count >= MAX_DISKS {
            return Err(ConfigError::DiskCount { count: count + 1 }.into());
        }
        disk.validate(count)?;
        let (id, slot, device) = virtio::attach_disk(&disk, file, &self.board, &mut self.places)?;
        // The bus itself comes last: its reset looks at where functions have put their BARs.
        let at = self.devices.len().saturating_sub(1);
        self.devices.insert(at, device);
        self.config.disks.push(disk);
        self.slots.filled(slot);
        Ok(id)
    }

    /// Asks the guest to let a disk go; [`Event::DeviceGone`] says when it has. May be asked again.
    pub fn detach(&mut self, id: &str) -> Result<(), MachineError> {
        let (index, slot) = (self.places.disk(id))
            .ok_or_else(|| MachineError::NoSuchDevice { id: id.to_owned() })?;
        if self.config.boot == BootSource::Disk(index) {
            return Err(MachineError::BootDisk { id: id.to_owned() });
        }
        self.slots.ask(slot);
        Ok(())
    }

    /// The guest has let go of some slots. What it was not asked for stays where it is: a disk belongs to
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
        let Some((id, index)) = self.places.disk_in(slot) else {
            return;
        };
        let booted = match self.config.boot {
            BootSource::Disk(booted) => Some(booted),
            BootSource::Files => None,
        };
        if booted == Some(index) {
            return;
        }
        // Off the bus first: from here on no access begins.
        self.places.forget_disk(&id);
        self.slots.emptied(slot);
        self.config.disks.remove(index);
        if let Some(booted) = booted.filter(|booted| *booted > index) {
            self.config.boot = BootSource::Disk(booted - 1);
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
