//! From a machine's configuration to devices on its PCI bus.

use std::sync::Arc;

use super::balloon::{Balloon, BalloonControl};
use super::block::Block;
use super::console::Console;
use super::net::Net;
use super::rng::Rng;
use super::{VirtioDevice, VirtioPciDevice};
use crate::config::{MachineConfig, MachineFiles};
use crate::device::{Board, Device, DeviceError, SavedDevice, SavedDevices};
use crate::pci::{PciBus, RootComplex};

/// What stands behind PCI.
pub struct Attached {
    pub devices: Vec<Arc<dyn Device>>,
    pub balloon: Option<BalloonControl>,
}

/// Makes the root complex and all virtio devices of a machine. What it keeps of `files` it duplicates.
///
/// Slots are given in a fixed order (disks, console, random numbers, balloon, networks), so that a guest
/// finds its devices
/// in the same places after every start.
pub fn attach(
    config: &MachineConfig,
    files: &MachineFiles,
    board: &Board,
    saved: &mut SavedDevices,
) -> Result<Attached, DeviceError> {
    let bus = PciBus::plug(board)?;
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for (index, (disk, file)) in config.disks.iter().zip(&files.disks).enumerate() {
        let id = format!("disk{index}");
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
        devices.push(plug(&id, make, bus.root(), board, saved)?);
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
        devices.push(plug("console0", make, bus.root(), board, saved)?);
    }
    if let Some(rng) = &config.rng {
        let make = |saved: Option<&SavedDevice>| {
            Ok(Box::new(match saved {
                Some(saved) => Rng::restore(saved, rng, &board.reactor)?,
                None => Rng::new("rng0", rng, &board.reactor)?,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug("rng0", make, bus.root(), board, saved)?);
    }
    let mut control = None;
    if let Some(config) = &config.balloon {
        let make = |saved: Option<&SavedDevice>| {
            let balloon = match saved {
                Some(saved) => Balloon::restore(saved, config, board)?,
                None => Balloon::new("balloon0", config, board),
            };
            control = Some(balloon.control());
            Ok(Box::new(balloon) as Box<dyn VirtioDevice>)
        };
        devices.push(plug("balloon0", make, bus.root(), board, saved)?);
    }
    for (index, (net, files)) in config.nets.iter().zip(&files.nets).enumerate() {
        let id = format!("net{index}");
        let make = |saved: Option<&SavedDevice>| {
            let device = Net::open(&id, net, files, &board.threads)?;
            Ok(Box::new(match saved {
                Some(saved) => Net::restore(saved, device)?,
                None => device,
            }) as Box<dyn VirtioDevice>)
        };
        devices.push(plug(&id, make, bus.root(), board, saved)?);
    }
    if let Some(state) = saved.take(bus.id())? {
        bus.load(&state)?;
    }
    // After the functions: its reset looks at where theirs has put their BARs.
    devices.push(Arc::new(bus));
    Ok(Attached {
        devices,
        balloon: control,
    })
}

/// Puts a device on the bus, new or as it was saved; `make` makes it from the state of its own.
fn plug(
    id: &str,
    make: impl FnOnce(Option<&SavedDevice>) -> Result<Box<dyn VirtioDevice>, DeviceError>,
    root: &RootComplex,
    board: &Board,
    saved: &mut SavedDevices,
) -> Result<Arc<dyn Device>, DeviceError> {
    let device = match saved.take(id)? {
        Some(state) => VirtioPciDevice::restore(&state, board, |state| make(Some(state)))?,
        None => VirtioPciDevice::new(id, make(None)?, board)?,
    };
    let slot = root.free_slot().unwrap_or(usize::MAX);
    root.insert(slot, device.function())
        .map_err(|error| DeviceError::new(id, "take its place on the PCI bus", error))?;
    Ok(Arc::new(device))
}
