//! The tables of fixed form: FADT, MADT, MCFG, WDAT.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;

use super::{OEM, OEM_REVISION, OEM_TABLE, encode};
use crate::board::power::{SLEEP_CONTROL, SLEEP_STATUS};
use crate::board::watchdog;
use crate::config::CpuConfig;
use crate::layout::{
    ACPI_PM_PORT, IOAPIC, LOCAL_APIC, PCI_BUSES, PCI_ECAM, RESET_PORT, WATCHDOG_PORT,
};

/// Written to the reset register: reset the CPU, hard.
const RESET_VALUE: u8 = 0x06;
/// IA-PC boot architecture: no VGA, no ASPM control; a CMOS clock is there, an 8042 is not.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4;

fn port(port: u16, size: AccessSize) -> GAS {
    let bits = match size {
        AccessSize::DwordAccess => 32,
        _ => 8,
    };
    GAS::new(AddressSpace::SystemIo, bits, 0, size, port.into())
}

/// ACPI 6.5 §5.2.9.
pub fn fadt(dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless)
        .flag(Flags::Wbinvd);
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.reset_reg = port(RESET_PORT, AccessSize::ByteAccess);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(ACPI_PM_PORT + SLEEP_CONTROL, AccessSize::ByteAccess);
    table.sleep_status_reg = port(ACPI_PM_PORT + SLEEP_STATUS, AccessSize::ByteAccess);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"KVMKVMKV").into();
    encode(&table.finalize())
}

/// ACPI 6.5 §5.2.12. Ids fit into a byte, so the old form serves; x2APIC is found by CPUID. Processors
/// that are not there and may come are online-capable (§5.2.12.2).
pub fn madt(cpus: &CpuConfig) -> Vec<u8> {
    let address = LocalInterruptController::Address(LOCAL_APIC as u32);
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for index in 0..cpus.most() {
        let status = match index < cpus.count {
            true => EnabledStatus::Enabled,
            false => EnabledStatus::DisabledOnlineCapable,
        };
        table.add_structure(ProcessorLocalApic::new(index, index, status));
    }
    // Its id does not meet a processor's: those are below 64.
    table.add_structure(IoApic::new(0xff, IOAPIC.base as u32, 0));
    let mut bytes = encode(&table);
    // The crate says revision 1, which knows no online-capable processors.
    if let Some([revision, checksum]) = bytes.get_mut(8..10) {
        let added = MADT_REVISION.wrapping_sub(*revision);
        *revision = MADT_REVISION;
        *checksum = checksum.wrapping_sub(added);
    }
    bytes
}

/// That of ACPI 6.3 and later (§5.2.12).
const MADT_REVISION: u8 = 5;

/// PCI Firmware Specification 3.3 §4.1.2.
pub fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    table.add_ecam(PCI_ECAM.base, 0, 0, PCI_BUSES - 1);
    encode(&table)
}

/// What the guest's driver does for each action: action, instruction, register, value, mask.
const WATCHDOG_ACTIONS: [(u8, u8, u16, u32, u32); 11] = {
    use watchdog::{CONTROL, COUNTDOWN, FEED, FIRED, RUNNING, STATUS};
    const READ: u8 = 0;
    const READ_COUNT: u8 = 1;
    const WRITE: u8 = 2;
    const WRITE_COUNT: u8 = 3;
    const ALL: u32 = u32::MAX;
    [
        (0x01, WRITE, FEED, 1, ALL),
        (0x04, READ_COUNT, COUNTDOWN, 0, ALL),
        (0x05, READ_COUNT, COUNTDOWN, 0, ALL),
        (0x06, WRITE_COUNT, COUNTDOWN, 0, ALL),
        (0x08, READ, CONTROL, RUNNING, RUNNING),
        (0x09, WRITE, CONTROL, RUNNING, RUNNING),
        (0x0a, READ, CONTROL, 0, RUNNING),
        (0x0b, WRITE, CONTROL, 0, RUNNING),
        // What happens when it fires is the host's choice; the guest reads "reboot".
        (0x10, READ, CONTROL, 0, 0),
        (0x20, READ, STATUS, FIRED, FIRED),
        (0x21, WRITE, STATUS, FIRED, FIRED),
    ]
};

/// Microsoft's watchdog action table.
pub fn wdat() -> Vec<u8> {
    let mut body = Vec::new();
    // Length of this part; no PCI device.
    body.extend(32u32.to_le_bytes());
    body.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]);
    for value in [
        watchdog::PERIOD_MS,
        watchdog::MAX_COUNT,
        watchdog::MIN_COUNT,
    ] {
        body.extend(value.to_le_bytes());
    }
    // Enabled.
    body.extend([1, 0, 0, 0]);
    body.extend((WATCHDOG_ACTIONS.len() as u32).to_le_bytes());
    for (action, instruction, register, value, mask) in WATCHDOG_ACTIONS {
        body.extend([action, instruction, 0, 0]);
        body.extend(encode(&port(
            WATCHDOG_PORT + register,
            AccessSize::DwordAccess,
        )));
        body.extend(value.to_le_bytes());
        body.extend(mask.to_le_bytes());
    }
    let length = 36 + body.len() as u32;
    let mut table = acpi_tables::sdt::Sdt::new(*b"WDAT", length, 1, OEM, OEM_TABLE, OEM_REVISION);
    table.write_bytes(36, &body);
    table.as_slice().to_vec()
}
