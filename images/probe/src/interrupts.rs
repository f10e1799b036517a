//! Interrupts that come through the IOAPIC: the serial console (IRQ 4, edge) and ACPI's SCI (level).

use crate::acpi::Acpi;
use crate::cpu::{self, VECTOR_SCI, VECTOR_SERIAL};
use crate::memory::Registers;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const REDIRECTION: u32 = 0x10;
const VERSION: u32 = 0x01;
/// Where it is if no table says so.
const USUAL_ADDRESS: u64 = 0xfec0_0000;
const SERIAL_PIN: u32 = 4;
const MASKED: u32 = 1 << 16;

/// Routes both to the boot processor; without an IOAPIC the console is polled.
pub fn route(acpi: &Acpi) {
    if !cpu::has_interrupts() {
        return;
    }
    let address = acpi.ioapic.unwrap_or(USUAL_ADDRESS);
    let Some(ioapic) = Registers::at(address, 32) else {
        return;
    };
    ioapic.write32(SELECT, VERSION);
    // Nobody there: all ones, or nothing.
    if matches!(ioapic.read32(WINDOW), 0 | u32::MAX) {
        return;
    }
    let id = cpu::cpuid(1, 0)[1] >> 24;
    let route = |pin: u32, low: u32| {
        for (register, value) in [(0, MASKED), (1, id << 24), (0, low)] {
            ioapic.write32(SELECT, REDIRECTION + 2 * pin + register);
            ioapic.write32(WINDOW, value);
        }
    };
    route(SERIAL_PIN, u32::from(VECTOR_SERIAL));
    if acpi.listen_to_button() {
        // Edge: the count is all that is looked at, and a level would storm until it is.
        route(u32::from(acpi.sci), u32::from(VECTOR_SCI));
    }
}
