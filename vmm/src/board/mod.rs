//! The fixed devices of the board: what a PC has besides PCI, as little of it as Linux wants.
//!
//! Hardware-reduced ACPI, so no PIC, no PIT, no PM timer: the interrupt controllers are the local
//! APICs (in the kernel) and one IOAPIC (here, since the chip is split).

mod ioapic;
mod ports;
mod serial;

use std::sync::Arc;

pub use ioapic::IoApic;
pub use ports::{KeyboardController, ResetRegister};
pub use serial::{SerialPort, SerialResources};

use crate::bus::BusError;
use crate::config::MachineFiles;
use crate::device::{Board, Device, DeviceError};
use crate::layout;

/// The fixed devices of one machine.
pub struct FixedDevices {
    pub ioapic: Arc<IoApic>,
    pub all: Vec<Arc<dyn Device>>,
}

/// Makes the fixed devices and puts them on the buses.
pub fn attach(
    files: &MachineFiles,
    ioapic: Arc<IoApic>,
    board: &Board,
) -> Result<FixedDevices, DeviceError> {
    let bus = |device: &'static str| {
        move |error: BusError| DeviceError::new(device, "take its addresses", error)
    };
    board
        .mmio
        .insert(layout::IOAPIC.base, layout::IOAPIC.size, ioapic.clone())
        .map_err(bus("ioapic"))?;

    let line = ioapic.line(layout::SERIAL_IRQ);
    let resources = SerialResources::open("serial0", &files.serial, line, board)?;
    let serial = SerialPort::new(resources)?;
    board
        .pio
        .insert(layout::SERIAL_PORT.into(), 8, serial.clone())
        .map_err(bus("serial0"))?;

    // The reset register stands in the middle of PCI's ports and answers there.
    let keyboard = Arc::new(KeyboardController(board.requests.clone()));
    board
        .pio
        .insert(layout::KEYBOARD_PORT.into(), 5, keyboard)
        .map_err(bus("keyboard"))?;

    let all: Vec<Arc<dyn Device>> = vec![ioapic.clone(), serial];
    Ok(FixedDevices { ioapic, all })
}
