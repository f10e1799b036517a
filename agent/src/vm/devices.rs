//! The devices of a machine that have names: what the agent calls them, and the machine itself.
//!
//! Owned by the process's loop; it must say of the machine what the machine is, whoever asks and
//! however often.

use std::fs::File;
use std::os::fd::OwnedFd;

use fractus_agent_api::device::DeviceId;
use fractus_vmm::config::DiskConfig;

use super::log;
use super::protocol::{FromMachine, Has};
use super::supervise::Supervisor;

#[derive(Debug, Default)]
pub struct Devices(Vec<Named>);

#[derive(Debug)]
struct Named {
    id: DeviceId,
    /// What the machine calls it.
    name: String,
    asked: bool,
}

impl Devices {
    /// Of a machine that was just built with disks of these names: it numbers them.
    pub fn new(disks: &[Option<DeviceId>]) -> Self {
        let named = disks.iter().enumerate().filter_map(|(index, id)| {
            Some(Named {
                id: (*id)?,
                name: format!("disk{index}"),
                asked: false,
            })
        });
        Self(named.collect())
    }

    pub fn all(&self) -> Vec<Has> {
        let has = |Named { id, asked, .. }: &Named| Has {
            id: *id,
            asked: *asked,
        };
        self.0.iter().map(has).collect()
    }

    pub fn has(&self, id: DeviceId) -> bool {
        self.name(id).is_some()
    }

    /// What the machine calls it.
    pub fn name(&self, id: DeviceId) -> Option<&str> {
        let named = self.0.iter().find(|named| named.id == id)?;
        Some(&named.name)
    }

    pub fn came(&mut self, id: DeviceId, name: String) {
        self.0.push(Named {
            id,
            name,
            asked: false,
        });
    }

    pub fn asked(&mut self, id: DeviceId) {
        if let Some(named) = self.0.iter_mut().find(|named| named.id == id) {
            named.asked = true;
        }
    }

    /// The machine has it no more; false: it had no name.
    pub fn went(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|named| named.name != name);
        self.0.len() < before
    }
}

/// What the agent wants of devices. It is told what the machine has then, and so hears the same however
/// often it asks.
impl Supervisor {
    pub(super) fn attach_disk(&mut self, id: DeviceId, config: DiskConfig, files: Vec<OwnedFd>) {
        if self.devices.has(id) {
            return self.tell(&self.status());
        }
        let Ok([file]) = <[OwnedFd; 1]>::try_from(files) else {
            return self.refuse(id, "one descriptor is wanted with a disk".to_owned());
        };
        match self.guest.attach_disk(config, File::from(file)) {
            Ok(name) => {
                self.devices.came(id, name);
                self.tell(&self.status());
            }
            Err(error) => self.refuse(id, error.to_string()),
        }
    }

    pub(super) fn detach(&mut self, id: DeviceId) {
        if let Some(name) = self.devices.name(id) {
            if let Err(error) = self.guest.detach(name) {
                return self.refuse(id, error.to_string());
            }
            self.devices.asked(id);
        }
        self.tell(&self.status());
    }

    pub(super) fn device_gone(&mut self, name: &str) {
        if self.devices.went(name) {
            self.tell(&self.status());
        }
    }

    fn refuse(&mut self, id: DeviceId, detail: String) {
        log::line(format_args!("device {id}: refused: {detail}"));
        self.tell(&FromMachine::DeviceRefused { id, detail });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_name_is_used_again_for_another_device() {
        let id = |number| DeviceId(uuid::Uuid::from_u128(number));
        let mut devices = Devices::new(&[None, Some(id(1)), Some(id(2))]);
        assert_eq!(devices.name(id(2)), Some("disk2"));
        devices.asked(id(1));
        let asked = |devices: &Devices| {
            devices
                .all()
                .iter()
                .map(|has| has.asked)
                .collect::<Vec<_>>()
        };
        assert_eq!(asked(&devices), [true, false]);
        assert!(devices.went("disk1"));
        assert!(!devices.went("disk1") && !devices.has(id(1)));
        devices.came(id(3), "disk1".to_owned());
        assert_eq!(asked(&devices), [false, false]);
        assert_eq!(devices.name(id(3)), Some("disk1"));
    }
}
