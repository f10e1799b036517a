//! From a machine's configuration to devices on its PCI bus.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::balloon::{Balloon, BalloonControl};
use super::block::Block;
use super::console::Console;
use super::mem::{Mem, MemControl};
use super::net::Net;
use super::rng::Rng;
use super::vsock::Vsock;
use super::{VirtioDevice, VirtioPciDevice};
use crate::config::{DiskConfig, MachineConfig, MachineFiles, NetConfig, NetFiles};
use crate::device::{Board, Device, DeviceError, SavedDevice, SavedDevices};
use crate::pci::{PciBus, RootComplex, SLOTS};

/// Which device is in which slot, beyond the order of the configuration: part of a saved machine, since
/// devices come and go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Ids in the order of the configuration's disks; the first ones, as far as it goes.
    disks: Vec<String>,
    /// The same of its networks.
    nets: Vec<String>,
    /// By id.
    slots: BTreeMap<String, u8>,
}

impl Placement {
    pub fn disks(&self) -> &[String] {
        &self.disks
    }

    pub fn nets(&self) -> &[String] {
        &self.nets
    }
}

/// A device that can come and go, by its index among its kind in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HotDevice {
    Disk(usize),
    Net(usize),
}

/// The bus of a running machine and who is where.
pub struct Places {
    root: Arc<RootComplex>,
    placement: Placement,
}

impl Places {
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Which of the devices that can come and go it is, and its slot.
    pub fn find(&self, id: &str) -> Option<(HotDevice, u8)> {
        let index = |ids: &[String]| ids.iter().position(|known| known == id);
        let device = match index(&self.placement.disks) {
            Some(index) => HotDevice::Disk(index),
            None => HotDevice::Net(index(&self.placement.nets)?),
        };
        Some((device, *self.placement.slots.get(id)?))
    }

    /// Id of the device in a slot, if it is one of those.
    pub fn in_slot(&self, slot: u8) -> Option<(String, HotDevice)> {
        let mut slots = self.placement.slots.iter();
        let (id, _) = slots.find(|(_, taken)| **taken == slot)?;
        let (device, _) = self.find(id)?;
        Some((id.clone(), device))
    }

    /// Takes a device off the bus.
    pub fn forget(&mut self, id: &str) {
        self.placement.disks.retain(|disk| disk != id);
        self.placement.nets.retain(|net| net != id);
        if let Some(slot) = self.placement.slots.remove(id) {
            self.root.remove(slot.into());
        }
    }

    /// Id of the device that is made next: a number that none of its kind has.
    fn next(&self, kind: &str) -> String {
        let mut number = 0;
        loop {
            let id = format!("{kind}{number}");
            if !self.placement.slots.contains_key(&id) {
                return id;
            }
            number += 1;
        }
    }

    /// Puts a function where it was, or into the first free slot.
    fn insert(&mut self, id: &str, device: &VirtioPciDevice) -> Result<u8, DeviceError> {
        let slot = match self.placement.slots.get(id) {
            Some(slot) => usize::from(*slot),
            None => self.root.free_slot().unwrap_or(SLOTS),
        };
        (self.root.insert(slot, device.function()))
            .map_err(|error| DeviceError::new(id, "take its place on the PCI bus", error))?;
        let slot = slot as u8;
        self.placement.slots.insert(id.to_owned(), slot);
        Ok(slot)
    }
}

/// What stands behind PCI.
pub struct Attached {
    pub devices: Vec<Arc<dyn Device>>,
    pub places: Places,
    pub balloon: Option<BalloonControl>,
    pub hot_memory: Option<MemControl>,
}

/// Makes the root complex and all virtio devices of a machine. What it keeps of `files` it duplicates.
///
/// Slots are given in a fixed order (disks, console, random numbers, balloon, hot memory, networks, vsock),
/// so that a guest finds its devices in the same places after every start.
pub fn attach(
    config: &MachineConfig,
    files: &MachineFiles,
    board: &Board,
    placement: Placement,
    saved: &mut SavedDevices,
) -> Result<Attached, DeviceError> {
    let bus = PciBus::plug(board)?;
    let mut places = Places {
        root: bus.root().clone(),
        placement,
    };
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for (index, (disk, file)) in config.disks.iter().zip(&files.disks).enumerate() {
        let id = match places.placement.disks.get(index) {
            Some(id) => id.clone(),
            None => format!("disk{index}"),
        };
        let file = file
            .try_clone()
            .map_err(|error| DeviceError::new(&id, "duplicate its descriptor", error))?;
        let make = |saved: Option<&SavedDevice>| {
            let block = Block::open(&id, disk, file, &board.threads)?;
            Ok(Box::new(match saved {
                Some(saved) => Block::restore(saved, block)?,
                None => block,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug(&id, make, &mut places, board, saved)?);
        if places.placement.disks.len() <= index {
            places.placement.disks.push(id);
        }
    }
    if !config.console_ports.is_empty() {
        let (ports, files) = (&config.console_ports, &files.console_ports);
        let make = |saved: Option<&SavedDevice>| {
            let console = Console::new("console0", ports, files, &board.reactor)?;
            Ok(Box::new(match saved {
                Some(saved) => Console::restore(saved, console)?,
                None => console,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug("console0", make, &mut places, board, saved)?);
    }
    if let Some(rng) = &config.rng {
        let make = |saved: Option<&SavedDevice>| {
            Ok(Box::new(match saved {
                Some(saved) => Rng::restore(saved, rng, &board.reactor)?,
                None => Rng::new("rng0", rng, &board.reactor)?,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug("rng0", make, &mut places, board, saved)?);
    }
    let (balloon, hot_memory) = memory(config, &mut devices, &mut places, board, saved)?;
    for (index, (net, files)) in config.nets.iter().zip(&files.nets).enumerate() {
        let id = match places.placement.nets.get(index) {
            Some(id) => id.clone(),
            None => format!("net{index}"),
        };
        let make = |saved: Option<&SavedDevice>| {
            let device = Net::open(&id, net, files, &board.threads)?;
            Ok(Box::new(match saved {
                Some(saved) => Net::restore(saved, device)?,
                None => device,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug(&id, make, &mut places, board, saved)?);
        if places.placement.nets.len() <= index {
            places.placement.nets.push(id);
        }
    }
    if let (Some(config), Some(listener)) = (&config.vsock, &files.vsock) {
        let id = "vsock0";
        let listener = listener
            .try_clone()
            .map_err(|error| DeviceError::new(id, "duplicate its descriptor", error))?;
        let make = |saved: Option<&SavedDevice>| {
            Ok(Box::new(match saved {
                Some(saved) => Vsock::restore(saved, config, listener, &board.threads)?,
                None => Vsock::new(id, config, listener, &board.threads)?,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug(id, make, &mut places, board, saved)?);
    }
    if let Some(state) = saved.take(bus.id())? {
        bus.load(&state)?;
    }
    // After the functions: its reset looks at where theirs has put their BARs.
    devices.push(Arc::new(bus));
    Ok(Attached {
        devices,
        places,
        balloon,
        hot_memory,
    })
}

/// What gives memory and takes it, and the host's hands on it.
fn memory(
    config: &MachineConfig,
    devices: &mut Vec<Arc<dyn Device>>,
    places: &mut Places,
    board: &Board,
    saved: &mut SavedDevices,
) -> Result<(Option<BalloonControl>, Option<MemControl>), DeviceError> {
    let mut balloon_control = None;
    if let Some(config) = &config.balloon {
        let make = |saved: Option<&SavedDevice>| {
            let balloon = match saved {
                Some(saved) => Balloon::restore(saved, config, board)?,
                None => Balloon::new("balloon0", config, board),
            };
            balloon_control = Some(balloon.control());
            Ok(Box::new(balloon) as Box<dyn VirtioDevice>)
        };
        devices.push(plug("balloon0", make, places, board, saved)?);
    }
    let mut hot_memory = None;
    if let Some(config) = &config.hot_memory {
        let make = |saved: Option<&SavedDevice>| {
            let device = match saved {
                Some(saved) => Mem::restore(saved, board)?,
                None => Mem::new("memory0", config, board)?,
            };
            hot_memory = Some(device.control());
            Ok(Box::new(device) as Box<dyn VirtioDevice>)
        };
        devices.push(plug("memory0", make, places, board, saved)?);
    }
    Ok((balloon_control, hot_memory))
}

/// Makes a disk for a machine that runs: no ring can be made any more, so threads do its I/O, which the
/// spawner makes (`MachineConfig::hot_disks`).
pub fn attach_disk(
    disk: &DiskConfig,
    file: File,
    board: &Board,
    places: &mut Places,
) -> Result<(String, u8, Arc<dyn Device>), DeviceError> {
    let id = places.next("disk");
    let block = Block::open_with_threads(&id, disk, file, &board.threads)?;
    let device = VirtioPciDevice::new(&id, Box::new(block), board)?;
    let slot = places.insert(&id, &device)?;
    places.placement.disks.push(id.clone());
    Ok((id, slot, Arc::new(device)))
}

/// Makes a network for a machine that runs, on threads that the spawner makes
/// (`MachineConfig::hot_nets`).
pub fn attach_net(
    net: &NetConfig,
    files: &NetFiles,
    board: &Board,
    places: &mut Places,
) -> Result<(String, u8, Arc<dyn Device>), DeviceError> {
    let id = places.next("net");
    let device = Net::open(&id, net, files, &board.threads)?;
    let device = VirtioPciDevice::new(&id, Box::new(device), board)?;
    let slot = places.insert(&id, &device)?;
    places.placement.nets.push(id.clone());
    Ok((id, slot, Arc::new(device)))
}

/// Puts a device on the bus, new or as it was saved; `make` makes it from the state of its own.
fn plug(
    id: &str,
    make: impl FnOnce(Option<&SavedDevice>) -> Result<Box<dyn VirtioDevice>, DeviceError>,
    places: &mut Places,
    board: &Board,
    saved: &mut SavedDevices,
) -> Result<Arc<dyn Device>, DeviceError> {
    let device = match saved.take(id)? {
        Some(state) => VirtioPciDevice::restore(&state, board, |state| make(Some(state)))?,
        None => VirtioPciDevice::new(id, make(None)?, board)?,
    };
    places.insert(id, &device)?;
    Ok(Arc::new(device))
}
