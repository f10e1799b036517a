//! As much of ACPI as a guest needs that does without a real interpreter: the processors and the
//! IOAPIC (MADT), PCI configuration space (MCFG), how to power off, reset and hear the power button
//! (FADT, and the `_S5_` package in the DSDT). ACPI 6.5, chapter 5.

use crate::cpu::{self, MAX_CPUS};
use crate::memory::{self, read_u8, read_u16, read_u32, read_u64};

const RSDP: u64 = u64::from_le_bytes(*b"RSD PTR ");
const SLEEP_ENABLE_PM1: u16 = 1 << 13;
const SLEEP_ENABLE_REDUCED: u8 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
/// The power button in our DSDT's event register.
const EVENT_BUTTON: u8 = 1;

/// A register as a generic address structure names it.
#[derive(Clone, Copy)]
pub enum Register {
    Port(u16),
    Memory(u64),
}

impl Register {
    fn read(at: u64) -> Option<Self> {
        let address = read_u64(at + 4);
        match (read_u8(at), address) {
            (_, 0) => None,
            (0, address) => memory::map(address, 8).then_some(Self::Memory(address)),
            (1, port) => Some(Self::Port(port as u16)),
            _ => None,
        }
    }

    pub fn write8(self, value: u8) {
        match self {
            Self::Port(port) => cpu::outb(port, value),
            Self::Memory(address) => memory::write_u8(address, value),
        }
    }
}

pub struct Acpi {
    apic_ids: [u32; MAX_CPUS],
    cpus: usize,
    pub ioapic: Option<u64>,
    pub ecam: Option<u64>,
    pub hardware_reduced: bool,
    pub sleep_control: Option<Register>,
    pub reset: Option<(Register, u8)>,
    pub pm1a_event: Option<u16>,
    pub pm1a_control: Option<u16>,
    pub sci: u8,
    /// Port of the generic event device's register: which events there were, cleared by reading.
    events: Option<u16>,
    /// SLP_TYP of S5.
    pub sleep_type: u8,
    interrupts: u64,
}

impl Acpi {
    /// Reads the tables; with none of them, one processor and the legacy ports are what there is.
    pub fn read(rsdp: u64) -> Self {
        let mut acpi = Self {
            apic_ids: [0; MAX_CPUS],
            cpus: 0,
            ioapic: None,
            ecam: None,
            hardware_reduced: false,
            sleep_control: None,
            reset: None,
            pm1a_event: None,
            pm1a_control: None,
            sci: 9,
            events: None,
            sleep_type: 5,
            interrupts: 0,
        };
        let Some(rsdp) = find_rsdp(rsdp) else {
            return acpi;
        };
        let (root, width) = match (read_u8(rsdp + 15), read_u64(rsdp + 24)) {
            (2.., xsdt) if xsdt != 0 => (xsdt, 8),
            _ => (u64::from(read_u32(rsdp + 16)), 4),
        };
        let mut at = root + 36;
        while at + width <= root + u64::from(read_u32(root + 4)) {
            let table = if width == 8 {
                read_u64(at)
            } else {
                u64::from(read_u32(at))
            };
            memory::map(table, 1 << 20);
            match &read_u32(table).to_le_bytes() {
                b"APIC" => acpi.read_madt(table),
                b"MCFG" => acpi.ecam = Some(read_u64(table + 44)),
                b"FACP" => acpi.read_fadt(table),
                _ => {}
            }
            at += width;
        }
        acpi
    }

    /// APIC ids of the processors, the boot processor's first (as tables list them).
    pub fn processors(&self) -> &[u32] {
        &self.apic_ids[..self.cpus]
    }

    fn add_processor(&mut self, apic_id: u32, flags: u32) {
        let usable = flags & 1 != 0 && apic_id < 255;
        if usable && self.cpus < MAX_CPUS && !self.processors().contains(&apic_id) {
            self.apic_ids[self.cpus] = apic_id;
            self.cpus += 1;
        }
    }

    fn read_madt(&mut self, table: u64) {
        let mut at = table + 44;
        let end = table + u64::from(read_u32(table + 4));
        while at + 2 <= end {
            match read_u8(at) {
                0 => self.add_processor(u32::from(read_u8(at + 3)), read_u32(at + 4)),
                1 if self.ioapic.is_none() => self.ioapic = Some(u64::from(read_u32(at + 4))),
                9 => self.add_processor(read_u32(at + 4), read_u32(at + 8)),
                _ => {}
            }
            at += u64::from(read_u8(at + 1).max(2));
        }
    }

    fn read_fadt(&mut self, table: u64) {
        let length = read_u32(table + 4);
        let port = |offset: u64| match read_u32(table + offset) {
            0 => None,
            port => Some(port as u16),
        };
        let flags = read_u32(table + 112);
        self.hardware_reduced = flags & 1 << 20 != 0;
        self.sci = read_u16(table + 46) as u8;
        if !self.hardware_reduced {
            self.pm1a_event = port(56);
            self.pm1a_control = port(64);
        }
        if flags & 1 << 10 != 0 && length >= 129 {
            self.reset =
                Register::read(table + 116).map(|register| (register, read_u8(table + 128)));
        }
        if length >= 268 {
            self.sleep_control = Register::read(table + 244);
        }
        let dsdt = match if length >= 148 {
            read_u64(table + 140)
        } else {
            0
        } {
            0 => u64::from(read_u32(table + 40)),
            wide => wide,
        };
        if dsdt != 0 && memory::map(dsdt, 1 << 20) {
            self.sleep_type = sleep_type(dsdt).unwrap_or(self.sleep_type);
            if let Some((interrupt, port)) = event_device(dsdt).filter(|_| self.hardware_reduced) {
                self.sci = interrupt;
                self.events = Some(port);
            }
        }
    }

    /// S5. Returns if the machine is still there some time later.
    pub fn power_off(&self) {
        if self.hardware_reduced
            && let Some(register) = self.sleep_control
        {
            register.write8(self.sleep_type << 2 | SLEEP_ENABLE_REDUCED);
        }
        if let Some(port) = self.pm1a_control {
            cpu::outw(port, u16::from(self.sleep_type) << 10 | SLEEP_ENABLE_PM1);
        }
    }

    /// Returns if the machine is still there.
    pub fn reboot(&self) {
        if let Some((register, value)) = self.reset {
            register.write8(value);
        }
        cpu::outb(0x64, 0xfe);
        cpu::outb(0xcf9, 0x06);
    }

    /// Lets the power button raise the SCI. False where there is nothing to hear it by.
    pub fn listen_to_button(&self) -> bool {
        if self.events.is_some() {
            return true;
        }
        let Some(port) = self.pm1a_event else {
            return false;
        };
        cpu::outw(port, POWER_BUTTON);
        cpu::outw(port + 2, POWER_BUTTON);
        if let Some(control) = self.pm1a_control {
            // SCI_EN: fixed events by ACPI, not by SMM.
            cpu::outw(control, cpu::inw(control) | 1);
        }
        true
    }

    /// True once for each press. `interrupts`: how many SCIs there were; asks the register only when
    /// that number has changed.
    pub fn button_pressed_since(&mut self, interrupts: u64) -> bool {
        if interrupts == self.interrupts {
            return false;
        }
        self.interrupts = interrupts;
        if let Some(port) = self.events {
            return cpu::inb(port) & EVENT_BUTTON != 0;
        }
        let Some(port) = self.pm1a_event else {
            return false;
        };
        let pressed = cpu::inw(port) & POWER_BUTTON != 0;
        if pressed {
            cpu::outw(port, POWER_BUTTON);
        }
        pressed
    }
}

/// Where the loader says, else in the BIOS area.
fn find_rsdp(given: u64) -> Option<u64> {
    let found = |&address: &u64| read_u64(address) == RSDP;
    if given != 0 {
        return Some(given).filter(found);
    }
    (0xe_0000..0x10_0000).step_by(16).find(found)
}

/// The first number in `Name (_S5_, Package {…})`.
fn sleep_type(dsdt: u64) -> Option<u8> {
    let end = dsdt + u64::from(read_u32(dsdt + 4)).min(1 << 20);
    let name = u32::from_le_bytes(*b"_S5_");
    let at = (dsdt + 36..end.saturating_sub(10)).find(|&at| read_u32(at) == name)? + 4;
    if read_u8(at) != 0x12 {
        return None;
    }
    // PkgLength: its top two bits say how many bytes follow; then the number of elements.
    let element = at + 1 + u64::from(read_u8(at + 1) >> 6) + 2;
    match read_u8(element) {
        0x00 => Some(0),
        0x01 => Some(1),
        0x0a => Some(read_u8(element + 1)),
        0x0b | 0x0c => Some(read_u8(element + 1)),
        _ => None,
    }
}

/// Interrupt and register of the generic event device, as our DSDT (and others of its kind) describe
/// it: an extended interrupt descriptor, then an operation region in I/O space.
fn event_device(dsdt: u64) -> Option<(u8, u16)> {
    let end = dsdt + u64::from(read_u32(dsdt + 4)).min(1 << 20);
    let id = u64::from_le_bytes(*b"ACPI0013");
    let device = (dsdt + 36..end.saturating_sub(64)).find(|&at| read_u64(at) == id)?;
    // Descriptor type, length of 6 (one interrupt), flags, count; then the number.
    let interrupt = (device..end - 16)
        .find(|&at| read_u8(at) == 0x89 && read_u16(at + 1) == 6 && read_u8(at + 4) == 1)?;
    // ExtOp OpRegion, name of 4, space 1 (I/O), a word.
    let region = (interrupt..end - 16)
        .find(|&at| read_u16(at) == 0x805b && read_u8(at + 6) == 1 && read_u8(at + 7) == 0x0b)?;
    Some((read_u8(interrupt + 5), read_u16(region + 8)))
}
