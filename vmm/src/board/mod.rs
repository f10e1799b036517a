//! The fixed devices of the board: what a PC has besides PCI, as little of it as Linux wants.
//!
//! Hardware-reduced ACPI, so no PIC, no PIT, no PM timer: the interrupt controllers are the local
//! APICs (in the kernel) and one IOAPIC (here, since the chip is split).

pub mod acpi;
pub mod generation;
mod ioapic;
mod ports;
mod power;
mod processors;
mod pvpanic;
mod rtc;
mod serial;
mod slots;
pub mod smbios;
mod verdict;
mod watchdog;

use std::sync::Arc;
use std::time::SystemTime;

pub use ioapic::IoApic;
pub use ports::{KeyboardController, ResetRegister};
pub use power::{EVENT_GENERATION, PowerPort, PowerResources};
pub use processors::{Processors, ProcessorsResources};
pub use pvpanic::PvPanic;
pub use rtc::Rtc;
pub use serial::{SerialPort, SerialResources};
pub use slots::{PciSlots, SlotsResources};
pub use verdict::BootVerdict;
pub use watchdog::{Watchdog, WatchdogResources};

use crate::bus::BusError;
use crate::config::{BootSource, MachineConfig, MachineFiles};
use crate::device::{Board, Device, DeviceError, Restore, SavedDevices};
use crate::interrupt::MsiController;
use crate::layout;

/// The fixed devices of one machine.
pub struct FixedDevices {
    pub power: Arc<PowerPort>,
    pub slots: Arc<PciSlots>,
    /// Of a machine whose vCPUs come and go.
    pub processors: Option<Arc<Processors>>,
    pub panic: Option<Arc<PvPanic>>,
    /// Of a machine that boots a disk.
    pub verdict: Option<Arc<BootVerdict>>,
    pub all: Vec<Arc<dyn Device>>,
}

/// The interrupt controller comes first: vCPUs report to it, devices pull at its pins.
pub fn interrupts(
    msi: Arc<dyn MsiController>,
    saved: &mut SavedDevices,
) -> Result<Arc<IoApic>, DeviceError> {
    Ok(Arc::new(match saved.take(ioapic::ID)? {
        Some(state) => IoApic::restore_saved(msi, &state)?,
        None => IoApic::new(msi),
    }))
}

/// Makes the fixed devices and puts them on the buses.
pub fn attach(
    config: &MachineConfig,
    files: &MachineFiles,
    ioapic: Arc<IoApic>,
    board: &Board,
    saved: &mut SavedDevices,
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
    let serial = match saved.take("serial0")? {
        Some(state) => <Arc<SerialPort>>::restore_saved(resources, &state)?,
        None => SerialPort::new(resources)?,
    };
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

    let line = ioapic.line(layout::ACPI_SCI);
    let resources = PowerResources {
        line,
        requests: board.requests.clone(),
    };
    let power = Arc::new(match saved.take(power::ID)? {
        Some(state) => PowerPort::restore_saved(resources, &state)?,
        None => PowerPort::new(resources),
    });
    board
        .pio
        .insert(layout::ACPI_PM_PORT.into(), power::SIZE, power.clone())
        .map_err(bus("power"))?;

    let slots = pci_slots(&power, board, saved)?;

    let now: rtc::Now = Arc::new(SystemTime::now);
    let rtc = Arc::new(match saved.take(rtc::ID)? {
        Some(state) => Rtc::restore_saved(now, &state)?,
        None => Rtc::new(now),
    });
    board
        .pio
        .insert(layout::RTC_PORT.into(), 2, rtc.clone())
        .map_err(bus("rtc"))?;

    let mut all: Vec<Arc<dyn Device>> = vec![ioapic, serial, power.clone(), slots.clone(), rtc];
    let processors = match config.cpus.max {
        Some(_) => Some(hot_processors(config, &power, board, saved)?),
        None => None,
    };
    all.extend(processors.clone().map(|device| device as Arc<dyn Device>));
    let mut panic = None;
    if config.pvpanic {
        let port = Arc::new(PvPanic::new(board.requests.clone()));
        board
            .pio
            .insert(layout::PVPANIC_PORT.into(), 1, port.clone())
            .map_err(bus("pvpanic"))?;
        panic = Some(port);
    }
    if config.watchdog.is_some() {
        all.push(watchdog(board, saved)?);
    }
    let verdict = match config.boot {
        BootSource::Disk(_) => Some(verdict(board, saved)?),
        BootSource::Files => None,
    };
    all.extend(verdict.clone().map(|verdict| verdict as Arc<dyn Device>));
    Ok(FixedDevices {
        power,
        slots,
        processors,
        panic,
        verdict,
        all,
    })
}

fn pci_slots(
    power: &Arc<PowerPort>,
    board: &Board,
    saved: &mut SavedDevices,
) -> Result<Arc<PciSlots>, DeviceError> {
    let resources = SlotsResources {
        power: power.clone(),
        requests: board.requests.clone(),
    };
    let slots = Arc::new(match saved.take(slots::ID)? {
        Some(state) => PciSlots::restore_saved(resources, &state)?,
        None => PciSlots::new(resources),
    });
    board
        .pio
        .insert(layout::SLOTS_PORT.into(), slots::SIZE, slots.clone())
        .map_err(|error| DeviceError::new(slots::ID, "take its addresses", error))?;
    Ok(slots)
}

fn hot_processors(
    config: &MachineConfig,
    power: &Arc<PowerPort>,
    board: &Board,
    saved: &mut SavedDevices,
) -> Result<Arc<Processors>, DeviceError> {
    let resources = ProcessorsResources {
        power: power.clone(),
        requests: board.requests.clone(),
    };
    let processors = Arc::new(match saved.take(processors::ID)? {
        Some(state) => Processors::restore_saved(resources, &state)?,
        None => Processors::new(resources, config.cpus.count),
    });
    let taken = board.pio.insert(
        layout::PROCESSORS_PORT.into(),
        processors::SIZE,
        processors.clone(),
    );
    taken.map_err(|error| DeviceError::new(processors::ID, "take its addresses", error))?;
    Ok(processors)
}

fn watchdog(board: &Board, saved: &mut SavedDevices) -> Result<Arc<Watchdog>, DeviceError> {
    let resources = WatchdogResources::open(board)?;
    let watchdog = match saved.take(watchdog::ID)? {
        Some(state) => <Arc<Watchdog>>::restore_saved(resources, &state)?,
        None => Watchdog::new(resources),
    };
    let taken = board.pio.insert(
        layout::WATCHDOG_PORT.into(),
        watchdog::SIZE,
        watchdog.clone(),
    );
    taken.map_err(|error| DeviceError::new("watchdog", "take its addresses", error))?;
    Ok(watchdog)
}

fn verdict(board: &Board, saved: &mut SavedDevices) -> Result<Arc<BootVerdict>, DeviceError> {
    let requests = board.requests.clone();
    let verdict = Arc::new(match saved.take(verdict::ID)? {
        Some(state) => BootVerdict::restore_saved(requests, &state)?,
        None => BootVerdict::new(requests),
    });
    let taken = board
        .pio
        .insert(layout::VERDICT_PORT.into(), 1, verdict.clone());
    taken.map_err(|error| DeviceError::new(verdict::ID, "take its addresses", error))?;
    Ok(verdict)
}
