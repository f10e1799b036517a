//! The ACPI tables (ACPI 6.5, hardware-reduced): what is where, how to power off, which processors.
//!
//! Owns the bytes from RSDP to DSDT. They say what `layout` and the devices are; nothing here has a
//! number of its own.

mod dsdt;
mod fixed;
mod processors;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::config::MachineConfig;
use crate::layout::{ACPI_TABLES, Layout};
use crate::memory::GuestMemory;

const OEM: [u8; 6] = *b"FRACTU";
const OEM_TABLE: [u8; 8] = *b"FRACTUS ";
const OEM_REVISION: u32 = 1;

/// Guest address of the root pointer: the first thing in the range where a guest looks for it.
pub const RSDP: u64 = ACPI_TABLES.base;
/// Tables begin here, each at a multiple of 16.
const FIRST_TABLE: u64 = RSDP + 64;

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables of {bytes} bytes are larger than their place")]
    TooLarge { bytes: u64 },
    #[error("write the ACPI tables to guest memory")]
    Write(#[from] GuestMemoryError),
}

/// Puts the tables into guest memory.
pub fn write(
    config: &MachineConfig,
    layout: &Layout,
    memory: &GuestMemory,
) -> Result<(), AcpiError> {
    let bytes = tables(config, layout);
    let size = bytes.len() as u64;
    if size > ACPI_TABLES.size {
        return Err(AcpiError::TooLarge { bytes: size });
    }
    Ok(memory.write_slice(&bytes, GuestAddress(RSDP))?)
}

/// All tables as they stand in memory from [`RSDP`] on.
fn tables(config: &MachineConfig, layout: &Layout) -> Vec<u8> {
    let mut bytes = vec![0; (FIRST_TABLE - RSDP) as usize];
    let mut append = |table: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let address = RSDP + bytes.len() as u64;
        bytes.extend_from_slice(table);
        address
    };
    let dsdt = append(&dsdt::dsdt(config, layout));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(append(&fixed::fadt(dsdt)));
    xsdt.add_entry(append(&fixed::madt(&config.cpus)));
    xsdt.add_entry(append(&fixed::mcfg()));
    if config.watchdog.is_some() {
        xsdt.add_entry(append(&fixed::wdat()));
    }
    let xsdt = append(&encode(&xsdt));
    let rsdp = encode(&Rsdp::new(OEM, xsdt));
    for (to, from) in bytes.iter_mut().zip(rsdp) {
        *to = from;
    }
    bytes
}

fn encode(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WatchdogConfig;

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> usize {
        (u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap()) - RSDP) as usize
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_its_sum_is_zero() {
        let mut config = MachineConfig::minimal(256 << 20);
        config.cpus.count = 64;
        config.watchdog = Some(WatchdogConfig {
            action: Default::default(),
        });
        let bytes = tables(&config, &Layout::new(config.memory.bytes));
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let table = |at: usize| &bytes[at..at + u32_at(&bytes, at + 4) as usize];
        let xsdt = table(u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
        let mut names = Vec::new();
        for at in (36..xsdt.len()).step_by(8) {
            let found = table(u64_at(xsdt, at));
            assert_eq!(sum(found), 0);
            names.push(String::from_utf8_lossy(&found[..4]).into_owned());
            if &found[..4] == b"FACP" {
                let dsdt = table(u64_at(found, 140));
                assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG", "WDAT"]);
        assert!(
            (bytes.len() as u64) < ACPI_TABLES.size,
            "{} bytes",
            bytes.len()
        );
    }
}
