//! The devices of a machine that have names: what the agent calls them, and the machine itself.
//!
//! Owned by the process's loop; it must say of the machine what the machine is, whoever asks and
//! however often.

use std::fs::File;
use std::os::fd::OwnedFd;

use fractus_agent_api::device::{DeviceId, DeviceKind};
use fractus_vmm::config::{DiskConfig, NetConfig, NetFiles};

use super::guest::GuestError;
use super::log;
use super::protocol::{FromMachine, Has};
use super::supervise::Supervisor;

#[derive(Debug, Default)]
pub struct Devices(Vec<Named>);

#[derive(Debug)]
struct Named {
    id: DeviceId,
    kind: DeviceKind,
    /// What the machine calls it.
    name: String,
    asked: bool,
}

impl Devices {
    /// Of a machine that was just built with disks and networks of these names: it numbers them.
    pub fn new(disks: &[Option<DeviceId>], nets: &[Option<DeviceId>]) -> Self {
        let disks = numbered(DeviceKind::Disk, "disk", disks);
        Self(
            disks
                .chain(numbered(DeviceKind::Nic, "net", nets))
                .collect(),
        )
    }

    /// Of a machine that has these already: its names for them, and the agent's.
    pub fn going_on(
        disks: (&[String], &[Option<DeviceId>]),
        nets: (&[String], &[Option<DeviceId>]),
    ) -> Self {
        let named = |kind, (names, ids): (&[String], &[Option<DeviceId>])| {
            let pairs = names
                .iter()
                .zip(ids)
                .filter_map(|(name, id)| Some((name.clone(), (*id)?)));
            let named = pairs.map(|(name, id)| Named {
                id,
                kind,
                name,
                asked: false,
            });
            named.collect::<Vec<_>>()
        };
        let mut all = named(DeviceKind::Disk, disks);
        all.extend(named(DeviceKind::Nic, nets));
        Self(all)
    }

    pub fn all(&self) -> Vec<Has> {
        let has = |named: &Named| Has {
            id: named.id,
            kind: named.kind,
            asked: named.asked,
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

    /// What the agent calls what the machine calls so, if it has a name for it.
    pub fn id(&self, name: &str) -> Option<DeviceId> {
        let named = self.0.iter().find(|named| named.name == name)?;
        Some(named.id)
    }

    pub fn came(&mut self, kind: DeviceKind, id: DeviceId, name: String) {
        self.0.push(Named {
            id,
            kind,
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

fn numbered(kind: DeviceKind, word: &str, ids: &[Option<DeviceId>]) -> impl Iterator<Item = Named> {
    ids.iter().enumerate().filter_map(move |(index, id)| {
        Some(Named {
            id: (*id)?,
            kind,
            name: format!("{word}{index}"),
            asked: false,
        })
    })
}

/// What the agent wants of devices, and of the machine's size. It is told what the machine has then, and so hears the same however
/// often it asks.
impl Supervisor {
    pub(super) fn attach_disk(&mut self, id: DeviceId, config: DiskConfig, files: Vec<OwnedFd>) {
        if self.devices.has(id) {
            return self.tell(&self.status());
        }
        let Ok([file]) = <[OwnedFd; 1]>::try_from(files) else {
            return self.refuse(id, "one descriptor is wanted with a disk".to_owned());
        };
        let attached = self.guest.attach_disk(config, File::from(file));
        self.attached(DeviceKind::Disk, id, attached);
    }

    pub(super) fn attach_net(&mut self, id: DeviceId, config: NetConfig, files: Vec<OwnedFd>) {
        if self.devices.has(id) {
            return self.tell(&self.status());
        }
        // A locked-down process takes no vhost-net: it moves the packets until its next start.
        let net = NetFiles {
            taps: files.into_iter().map(File::from).collect(),
            vhost: Vec::new(),
        };
        let attached = self.guest.attach_net(config, net);
        self.attached(DeviceKind::Nic, id, attached);
    }

    fn attached(&mut self, kind: DeviceKind, id: DeviceId, name: Result<String, GuestError>) {
        match name {
            Ok(name) => {
                self.devices.came(kind, id, name);
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

    pub(super) fn resize(&mut self, vcpus: u8, hot_memory: u64) {
        if let Err(error) = self.guest.resize(vcpus, hot_memory) {
            let detail = error.to_string();
            log::line(format_args!("another size: refused: {detail}"));
            self.tell(&FromMachine::ResizeRefused { detail });
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
        let mut devices = Devices::new(&[None, Some(id(1)), Some(id(2))], &[Some(id(9))]);
        assert_eq!(devices.name(id(9)), Some("net0"));
        assert!(devices.went("net0"));
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
        devices.came(DeviceKind::Disk, id(3), "disk1".to_owned());
        assert_eq!(asked(&devices), [false, false]);
        assert_eq!(devices.name(id(3)), Some("disk1"));
    }
}
