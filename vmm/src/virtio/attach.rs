//! From a machine's configuration to devices on its PCI bus.

use std::sync::Arc;

use super::block::Block;
use super::console::Console;
use super::rng::Rng;
use super::{VirtioDevice, VirtioPciDevice};
use crate::config::{MachineConfig, MachineFiles};
use crate::device::{Board, Device, DeviceError};
use crate::pci::{PciBus, RootComplex};

/// Makes the root complex and all virtio devices of a machine. What it keeps of `files` it duplicates.
///
/// Slots are given in a fixed order (disks, console, random numbers), so that a guest finds its devices
/// in the same places after every start.
pub fn attach(
    config: &MachineConfig,
    files: &MachineFiles,
    board: &Board,
) -> Result<Vec<Arc<dyn Device>>, DeviceError> {
    let bus = PciBus::plug(board)?;
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for (index, (disk, file)) in config.disks.iter().zip(&files.disks).enumerate() {
        let id = format!("disk{index}");
        let file = file
            .try_clone()
            .map_err(|error| DeviceError::new(&id, "duplicate its descriptor", error))?;
        let block = Block::open(&id, disk, file, &board.threads)?;
        devices.push(plug(&id, Box::new(block), bus.root(), board)?);
    }
    if !config.console_ports.is_empty() {
        let (ports, files) = (&config.console_ports, &files.console_ports);
        let console = Console::new("console0", ports, files, &board.reactor)?;
        devices.push(plug("console0", Box::new(console), bus.root(), board)?);
    }
    if let Some(rng) = &config.rng {
        let device = Rng::new("rng0", rng, &board.reactor)?;
        devices.push(plug("rng0", Box::new(device), bus.root(), board)?);
    }
    // After the functions: its reset looks at where theirs has put their BARs.
    devices.push(Arc::new(bus));
    Ok(devices)
}

fn plug(
    id: &str,
    device: Box<dyn VirtioDevice>,
    root: &RootComplex,
    board: &Board,
) -> Result<Arc<dyn Device>, DeviceError> {
    let device = VirtioPciDevice::new(id, device, board)?;
    let slot = root.free_slot().unwrap_or(usize::MAX);
    root.insert(slot, device.function())
        .map_err(|error| DeviceError::new(id, "take its place on the PCI bus", error))?;
    Ok(Arc::new(device))
}
