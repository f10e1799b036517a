//! The guest's physical address map and port map: every fixed address stands here and nowhere else.
//!
//! ```text
//! 0x0000_0000_0000  RAM (boot data below 1 MiB, kernel from 1 MiB)
//! 0x0000_c000_0000  PCI 32-bit window, 512 MiB          <- end of low RAM
//! 0x0000_e000_0000  PCI ECAM, one bus, 1 MiB (256 MiB kept free for more)
//! 0x0000_fec0_0000  IOAPIC
//! 0x0000_fee0_0000  local APICs, MSI
//! 0x0000_fffb_c000  pages that KVM on VMX wants (identity map, TSS)
//! 0x0001_0000_0000  RAM above 4 GiB
//! aligned, after it memory that comes and goes
//! aligned, after it PCI 64-bit window
//! ```

use serde::{Deserialize, Serialize};

/// First byte of the hole below 4 GiB; RAM ends here at the latest.
pub const HOLE_START: u64 = 0xc000_0000;
/// RAM goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// 32-bit window for PCI BARs.
pub const PCI_MMIO32: Window = Window {
    base: 0xc000_0000,
    size: 0x2000_0000,
};
/// PCI Express configuration space (ECAM), bus 0 only.
pub const PCI_ECAM: Window = Window {
    base: 0xe000_0000,
    size: 0x10_0000,
};
/// Buses that the ECAM window describes.
pub const PCI_BUSES: u8 = 1;
/// Ports for PCI I/O BARs (none of our devices has one; the host bridge announces the range).
pub const PCI_IO: Window = Window {
    base: 0xc000,
    size: 0x4000,
};
/// Legacy configuration mechanism #1: address at +0, data at +4.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;

pub const IOAPIC: Window = Window {
    base: 0xfec0_0000,
    size: 0x1000,
};
/// Pins of the IOAPIC; GSIs from here on are MSI routes.
pub const IOAPIC_PINS: u8 = 24;
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page for the identity map and three for the TSS, wanted by KVM on VMX.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_IRQ: u8 = 4;
pub const RTC_PORT: u16 = 0x70;
pub const RTC_IRQ: u8 = 8;
/// Keyboard controller's command port: 0xfe written to it resets the machine.
pub const KEYBOARD_PORT: u16 = 0x60;
/// Reset control register (also the FADT's reset register): 0x06 or 0x0e resets.
pub const RESET_PORT: u16 = 0xcf9;
pub const PVPANIC_PORT: u16 = 0x505;
/// Hardware-reduced ACPI: sleep control (+0), sleep status (+1), event register (+4, a byte that
/// reading clears; bit 0 is the power button).
pub const ACPI_PM_PORT: u16 = 0x600;
/// Interrupt of the generic event device: an edge.
pub const ACPI_SCI: u8 = 9;
/// Watchdog registers (16 bytes).
pub const WATCHDOG_PORT: u16 = 0x620;

/// PCI slots that are filled and emptied while the guest runs (12 bytes).
pub const SLOTS_PORT: u16 = 0x640;
/// vCPUs that come and go (28 bytes).
pub const PROCESSORS_PORT: u16 = 0x660;

/// By which a fallback kernel says how its search ended (1 byte; images/fallback knows it too).
pub const VERDICT_PORT: u16 = 0x6c0;

/// Boot data, all below 640 KiB.
pub const BOOT_GDT: u64 = 0x500;
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
pub const PVH_START_INFO: u64 = 0x6000;
pub const ZERO_PAGE: u64 = 0x7000;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes, with the terminating zero.
pub const COMMAND_LINE_MAX: usize = 0x1_0000;
/// End of conventional memory.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// What firmware would have left, up to 1 MiB: reserved in the guest's memory map.
pub const FIRMWARE: Window = Window {
    base: 0xe_0000,
    size: 0x2_0000,
};
/// Part of it, as the next two.
pub const ACPI_TABLES: Window = Window {
    base: FIRMWARE.base,
    size: 0xf000,
};
/// The generation id has a page of its own.
pub const GENERATION: Window = Window {
    base: ACPI_TABLES.end(),
    size: 0x1000,
};
/// Where guests without EFI look for the tables.
pub const SMBIOS: Window = Window {
    base: GENERATION.end(),
    size: 0x1_0000,
};
/// Kernels are loaded from here.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// A range of guest physical addresses or ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

impl Window {
    /// First address after the window.
    pub const fn end(&self) -> u64 {
        self.base + self.size
    }

    pub const fn contains(&self, address: u64) -> bool {
        address >= self.base && address - self.base < self.size
    }
}

/// What of the map depends on the size of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// RAM from address 0.
    pub low: Window,
    /// RAM from 4 GiB, when there is more than fits below the hole.
    pub high: Option<Window>,
    /// Memory that comes and goes: no RAM at the start, and in no map of it.
    pub hot: Option<Window>,
    /// 64-bit window for PCI BARs, above all RAM.
    pub pci_mmio64: Window,
}

impl Layout {
    /// The map for `bytes` of RAM.
    pub const fn new(bytes: u64) -> Layout {
        Layout::with_hot(bytes, 0)
    }

    /// The map for `bytes` of RAM and up to `hot` more.
    pub const fn with_hot(bytes: u64, hot: u64) -> Layout {
        const WINDOW: u64 = 16 << 30;
        // What Linux adds memory in, at most (memory_block_size_bytes on x86).
        const HOT: u64 = 2 << 30;
        let (low, high) = if bytes > HOLE_START {
            let high = Window {
                base: HOLE_END,
                size: bytes - HOLE_START,
            };
            (HOLE_START, Some(high))
        } else {
            (bytes, None)
        };
        let top = match high {
            Some(high) => high.end(),
            None => HOLE_END,
        };
        let hot = match hot {
            0 => None,
            size => Some(Window {
                base: top.next_multiple_of(HOT),
                size,
            }),
        };
        let top = match hot {
            Some(hot) => hot.end(),
            None => top,
        };
        Layout {
            low: Window { base: 0, size: low },
            high,
            hot,
            pci_mmio64: Window {
                base: top.next_multiple_of(WINDOW),
                size: WINDOW,
            },
        }
    }

    /// RAM ranges in ascending order.
    pub fn ram(&self) -> impl Iterator<Item = Window> {
        [Some(self.low), self.high].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_splits_at_the_hole_and_keeps_its_size() {
        for bytes in [1 << 20, HOLE_START, HOLE_START + 4096, 64 << 30] {
            let layout = Layout::new(bytes);
            assert_eq!(layout.ram().map(|window| window.size).sum::<u64>(), bytes);
            assert!(layout.low.end() <= HOLE_START);
            assert!(layout.ram().all(|ram| ram.end() <= layout.pci_mmio64.base));
        }
        assert_eq!(Layout::new(HOLE_START).high, None);
    }

    #[test]
    fn hot_memory_lies_between_ram_and_windows() {
        for bytes in [64 << 20, HOLE_START + 4096, 64 << 30] {
            let layout = Layout::with_hot(bytes, 3 << 30);
            let hot = layout.hot.unwrap();
            assert!(hot.base.is_multiple_of(2 << 30) && hot.size == 3 << 30);
            assert!(hot.base >= HOLE_END && layout.ram().all(|ram| ram.end() <= hot.base));
            assert!(hot.end() <= layout.pci_mmio64.base);
            assert_eq!(layout.ram().map(|window| window.size).sum::<u64>(), bytes);
        }
    }
}
