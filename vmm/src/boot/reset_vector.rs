//! What a PC's firmware has where a processor begins: here, a reset of the machine.
//!
//! Linux jumps there to reset a machine of reduced ACPI hardware that it did not boot by EFI: it wants the
//! EFI's reset, there is none, and the firmware's comes next; neither the FADT's reset register nor the
//! keyboard controller is tried before (arch/x86/kernel/reboot.c).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::FIRMWARE;
use crate::memory::GuestMemory;

/// f000:fff0, in the last 16 bytes below 1 MiB.
const VECTOR: u64 = FIRMWARE.end() - 16;
/// Pulses the keyboard controller's reset line; the same instructions in a mode of 16 and of 32 bits.
/// mov al, 0xfe; out 0x64, al; 1: hlt; jmp 1b
const CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

pub fn write_reset_vector(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_slice(&CODE, GuestAddress(VECTOR))
}
