//! Interrupts that come through the IOAPIC: the serial console (IRQ 4, edge) and ACPI's SCI (level).

use crate::acpi::Acpi;
use crate::cpu::{self, VECTOR_SCI, VECTOR_SERIAL};
use crate::memory::Registers;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const REDIRECTION: u32 = 0x10;
const SERIAL_PIN: u32 = 4;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

/// Routes both to the boot processor; without an IOAPIC the console is polled.
pub fn route(acpi: &Acpi) {
    if !cpu::has_interrupts() {
        return;
    }
    let Some(ioapic) = acpi.ioapic.and_then(|address| Registers::at(address, 32)) else {
        return;
    };
    let id = cpu::cpuid(1, 0)[1] >> 24;
    let route = |pin: u32, low: u32| {
        for (register, value) in [(0, MASKED), (1, id << 24), (0, low)] {
            ioapic.write32(SELECT, u64::from(REDIRECTION + 2 * pin + register) as u32);
            ioapic.write32(WINDOW, value);
        }
    };
    route(SERIAL_PIN, u32::from(VECTOR_SERIAL));
    if acpi.listen_to_button() {
        // Edge: the count is all that is looked at, and a level would storm until it is.
        let _ = LEVEL;
        route(u32::from(acpi.sci), u32::from(VECTOR_SCI));
    }
}
