//! The SMBIOS 3 tables (DMTF DSP0134 3.7): whose machine this is, for guests that ask.
//!
//! Owns the bytes at `layout::SMBIOS`, the range in which a guest without EFI looks for the entry point.
//! cloud-init takes a machine for one of an OpenStack cloud, with a metadata service, by its product name
//! ("OpenStack Nova" or "OpenStack Compute") and for no other reason, so that is what ours is called.

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::SMBIOS;
use crate::memory::GuestMemory;

const MANUFACTURER: &str = "Fractus";
const PRODUCT: &str = "OpenStack Nova";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const FAMILY: &str = "Virtual Machine";

const ENTRY: usize = 24;
/// The tables follow the entry point, aligned.
const TABLES: usize = 32;

/// Puts entry point and tables into guest memory.
pub fn write(uuid: Uuid, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_slice(&image(uuid), GuestAddress(SMBIOS.base))
}

fn image(uuid: Uuid) -> Vec<u8> {
    let mut tables = Tables::default();
    tables.firmware();
    tables.system(uuid);
    tables.chassis();
    tables.end();
    let mut bytes = entry_point(tables.0.len() as u32).to_vec();
    bytes.resize(TABLES, 0);
    bytes.extend(tables.0);
    bytes
}

/// §5.2.2
fn entry_point(length: u32) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[..5].copy_from_slice(b"_SM3_");
    // Length; version 3.0.0; revision of the entry point.
    entry[6..11].copy_from_slice(&[ENTRY as u8, 3, 0, 0, 1]);
    entry[12..16].copy_from_slice(&length.to_le_bytes());
    entry[16..].copy_from_slice(&(SMBIOS.base + TABLES as u64).to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry
}

#[derive(Default)]
struct Tables(Vec<u8>);

impl Tables {
    /// A structure: type, length, handle; its fields; its strings, which fields count from 1 (§6.1).
    fn add(&mut self, kind: u8, fields: &[u8], strings: &[&str]) {
        self.0.extend([kind, 4 + fields.len() as u8]);
        // Each type is there once: it makes a handle.
        self.0.extend(u16::from(kind).to_le_bytes());
        self.0.extend(fields);
        for string in strings {
            self.0.extend(string.bytes());
            self.0.push(0);
        }
        if strings.is_empty() {
            self.0.push(0);
        }
        self.0.push(0);
    }

    /// Type 0 (§7.1): there is none, and this is a virtual machine.
    fn firmware(&mut self) {
        let mut fields = [0; 20];
        // Vendor, version; no segment; date.
        fields[..5].copy_from_slice(&[1, 2, 0, 0, 3]);
        // Characteristics are not supported (bit 3); virtual machine (second extension, bit 4).
        fields[6] = 1 << 3;
        fields[15] = 1 << 4;
        // No release numbers of BIOS and controller.
        fields[16..].fill(0xff);
        self.add(0, &fields, &[MANUFACTURER, VERSION, "01/01/2026"]);
    }

    /// Type 1 (§7.2): also the serial number is the UUID, as nova's is.
    fn system(&mut self, uuid: Uuid) {
        let mut fields = vec![1, 2, 3, 4];
        // The first three parts are little endian (§7.2.1).
        fields.extend(uuid.to_bytes_le());
        // Woken by the power switch; no SKU; family.
        fields.extend([6, 0, 5]);
        let serial = uuid.to_string();
        self.add(
            1,
            &fields,
            &[MANUFACTURER, PRODUCT, VERSION, &serial, FAMILY],
        );
    }

    /// Type 3 (§7.4): of the kind "other"; all states safe.
    fn chassis(&mut self) {
        let fields = [1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        self.add(3, &fields, &[MANUFACTURER]);
    }

    fn end(&mut self) {
        self.add(127, &[], &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every structure: its type, its formatted part, its strings.
    fn parse(mut rest: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, length, ..] = *rest {
            let (fields, after) = rest.split_at(length.into());
            let end = after.windows(2).position(|two| two == [0, 0]).unwrap();
            let strings = after[..end].split(|byte| *byte == 0);
            let strings = strings.map(|text| String::from_utf8(text.to_vec()).unwrap());
            found.push((kind, fields.to_vec(), strings.collect()));
            rest = &after[end + 2..];
        }
        found
    }

    #[test]
    fn a_guest_finds_who_it_is() {
        let uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let bytes = image(uuid);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((&bytes[..5], sum(&bytes[..24])), (&b"_SM3_"[..], 0));
        assert_eq!(SMBIOS.base % 16, 0);
        let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let address = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        let start = (address - SMBIOS.base) as usize;
        let tables = parse(&bytes[start..start + length]);
        let kinds: Vec<u8> = tables.iter().map(|table| table.0).collect();
        assert_eq!(kinds, [0, 1, 3, 127]);

        let (_, system, strings) = &tables[1];
        let string = |at: usize| strings[usize::from(system[at]) - 1].as_str();
        assert_eq!((string(4), string(5)), ("Fractus", "OpenStack Nova"));
        assert_eq!(string(7), "00112233-4455-6677-8899-aabbccddeeff");
        let shown = [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99];
        assert_eq!((system.len(), &system[8..18]), (27, &shown[..]));
        assert_eq!(string(26), "Virtual Machine");
        assert_eq!((tables[0].1.len(), tables[2].1.len()), (24, 22));
    }
}
