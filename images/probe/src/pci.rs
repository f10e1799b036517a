//! PCI: configuration space (ECAM, else ports 0xcf8), what is there, BARs, MSI-X.

use crate::cpu;
use crate::memory::Registers;

pub const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;
/// Memory space, bus master, no INTx.
const COMMAND: u16 = 0x0406;
const MAX_FUNCTIONS: usize = 40;

#[derive(Clone, Copy)]
enum Access {
    Ecam(Registers),
    Ports,
}

/// One function of bus 0.
#[derive(Clone, Copy)]
pub struct Function {
    access: Access,
    /// device << 3 | function
    pub devfn: u8,
    pub vendor: u16,
    pub device: u16,
}

impl Function {
    pub fn read32(&self, offset: u16) -> u32 {
        match self.access {
            Access::Ecam(ecam) => ecam.read32(u64::from(self.devfn) << 12 | u64::from(offset)),
            Access::Ports => {
                cpu::outl(0xcf8, self.port_address(offset));
                cpu::inl(0xcfc)
            }
        }
    }

    pub fn write32(&self, offset: u16, value: u32) {
        match self.access {
            Access::Ecam(ecam) => {
                ecam.write32(u64::from(self.devfn) << 12 | u64::from(offset), value);
            }
            Access::Ports => {
                cpu::outl(0xcf8, self.port_address(offset));
                cpu::outl(0xcfc, value);
            }
        }
    }

    fn port_address(&self, offset: u16) -> u32 {
        1 << 31 | u32::from(self.devfn) << 8 | u32::from(offset & 0xfc)
    }

    pub fn read16(&self, offset: u16) -> u16 {
        (self.read32(offset & !3) >> (8 * (offset & 2))) as u16
    }

    pub fn read8(&self, offset: u16) -> u8 {
        (self.read32(offset & !3) >> (8 * (offset & 3))) as u8
    }

    /// Address of a memory BAR; `None` if it is an I/O BAR or has none.
    pub fn bar(&self, index: u8) -> Option<u64> {
        if index > 5 {
            return None;
        }
        let at = 0x10 + 4 * u16::from(index);
        let low = self.read32(at);
        if low & 1 != 0 {
            return None;
        }
        let high = if low & 6 == 4 && index < 5 {
            u64::from(self.read32(at + 4))
        } else {
            0
        };
        let address = high << 32 | u64::from(low & !0xf);
        (address != 0).then_some(address)
    }

    /// Lets the device decode memory and reach ours.
    pub fn enable(&self) {
        let status_kept = self.read32(4) & 0xffff;
        self.write32(4, status_kept | u32::from(COMMAND));
    }

    /// Offsets of the capabilities with this id. A list that loops ends.
    pub fn capabilities(&self, id: u8) -> impl Iterator<Item = u16> + '_ {
        let has_list = self.read32(4) >> 16 & 1 << 4 != 0;
        let mut next = if has_list { self.read8(0x34) & !3 } else { 0 };
        let mut left = 48;
        core::iter::from_fn(move || {
            while next != 0 && left > 0 {
                left -= 1;
                let at = u16::from(next);
                let header = self.read32(at);
                next = (header >> 8) as u8 & !3;
                if header as u8 == id {
                    return Some(at);
                }
            }
            None
        })
    }

    pub fn msix(&self) -> Option<Msix> {
        let capability = self.capabilities(CAPABILITY_MSIX).next()?;
        let control = self.read16(capability + 2);
        let table = self.read32(capability + 4);
        let entries = (control & 0x7ff) + 1;
        let address = self.bar((table & 7) as u8)? + u64::from(table & !7);
        Some(Msix {
            function: *self,
            capability,
            entries,
            table: Registers::at(address, u64::from(entries) * 16)?,
        })
    }
}

/// The MSI-X capability of a function and its table.
pub struct Msix {
    function: Function,
    capability: u16,
    pub entries: u16,
    table: Registers,
}

impl Msix {
    /// Table entry `entry` interrupts the CPU with `apic_id` at `vector`.
    pub fn route(&self, entry: u16, apic_id: u32, vector: u8) {
        let at = u64::from(entry) * 16;
        self.table.write32(at, 0xfee0_0000 | apic_id << 12);
        self.table.write32(at + 4, 0);
        self.table.write32(at + 8, u32::from(vector));
        self.table.write32(at + 12, 0);
    }

    /// Four words of a table entry, whatever they mean.
    pub fn write_raw(&self, entry: u16, words: [u32; 4]) {
        for (i, word) in words.into_iter().enumerate() {
            self.table
                .write32(u64::from(entry) * 16 + 4 * i as u64, word);
        }
    }

    pub fn enable(&self) {
        let header = self.function.read32(self.capability);
        let control = (header >> 16) as u16 & !MSIX_MASK_ALL | MSIX_ENABLE;
        self.function
            .write32(self.capability, header & 0xffff | u32::from(control) << 16);
    }
}

/// What is on bus 0.
pub struct Bus {
    functions: [Option<Function>; MAX_FUNCTIONS],
}

impl Bus {
    pub fn scan(ecam: Option<u64>) -> Self {
        let access = match ecam.and_then(|address| Registers::at(address, 1 << 20)) {
            Some(ecam) => Access::Ecam(ecam),
            None => Access::Ports,
        };
        let mut bus = Self {
            functions: [None; MAX_FUNCTIONS],
        };
        let mut free = bus.functions.iter_mut();
        for slot in 0..32u8 {
            let mut multi = false;
            for number in 0..8u8 {
                if number > 0 && !multi {
                    break;
                }
                let mut function = Function {
                    access,
                    devfn: slot << 3 | number,
                    vendor: 0,
                    device: 0,
                };
                let id = function.read32(0);
                if id as u16 == 0xffff || id == 0 {
                    continue;
                }
                function.vendor = id as u16;
                function.device = (id >> 16) as u16;
                multi |= number == 0 && function.read8(0x0e) & 0x80 != 0;
                if let Some(place) = free.next() {
                    *place = Some(function);
                }
            }
        }
        bus
    }

    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().flatten()
    }
}
