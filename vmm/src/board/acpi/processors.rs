//! The processors in the DSDT. Where they come and go, each says whether it is there and can be ejected
//! (ACPI 6.5 §6.3), and a method tells of changes.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, BufferData, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, Notify, OpRegion, OpRegionSpace, Path, Return, Store, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::dsdt::{PRESENT, Raw, device, name};
use super::encode;
use crate::board::processors;
use crate::config::CpuConfig;
use crate::layout::PROCESSORS_PORT;

/// The method that looks at the registers and tells what they say, for the generic event device.
pub const SCAN: &str = "\\_SB_.CSCN";
/// Lower and upper words of the registers, in their order.
const FIELDS: [[u8; 4]; 7] = [
    *b"CPPL", *b"CPPH", *b"CPUL", *b"CPUH", *b"CPDL", *b"CPDH", *b"CPEJ",
];

/// Into the scope of the system bus.
pub fn processors(into: &mut Vec<u8>, cpus: &CpuConfig) {
    if cpus.max.is_none() {
        for index in 0..cpus.count {
            device(
                into,
                &path(index),
                identity(index).iter().map(aml).collect(),
            );
        }
        return;
    }
    const {
        use processors::{DOWN, EJECT, PRESENT, UP};
        assert!(PRESENT == 0 && UP == 8 && DOWN == 16 && EJECT == 24);
    }
    let region = OpRegion::new(
        Path::new("CPUR"),
        OpRegionSpace::SystemIO,
        &PROCESSORS_PORT,
        &(processors::SIZE as u8),
    );
    into.extend(encode(&region));
    into.extend(encode(&Field::new(
        Path::new("CPUR"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        FIELDS.map(|name| FieldEntry::Named(name, 32)).into(),
    )));
    for index in 0..cpus.most() {
        hot_processor(into, index);
    }
    scan(into, cpus.most());
}

fn aml(name: &Name) -> &dyn Aml {
    name
}

fn path(index: u8) -> String {
    format!("C{index:03}")
}

fn identity(index: u8) -> [Name; 2] {
    [name("_HID", &"ACPI0007"), name("_UID", &index)]
}

/// The field of two that has the processor's bit, and that bit.
fn place(index: u8, lower: &'static str, upper: &'static str) -> (Path, u32) {
    let field = if index < 32 { lower } else { upper };
    (Path::new(field), 1 << (index % 32))
}

fn hot_processor(into: &mut Vec<u8>, index: u8) {
    let (field, bit) = place(index, "CPPL", "CPPH");
    let look = And::new(&Local(0), &field, &bit);
    let yes = Return::new(&PRESENT);
    let there = If::new(&Local(0), vec![&yes]);
    let absent = Return::new(&ZERO);
    let status = Method::new(Path::new("_STA"), 0, true, vec![&look, &there, &absent]);
    // As the MADT would have it if it had been there at the start: what is asked for is there.
    let apic = ProcessorLocalApic::new(index, index, EnabledStatus::Enabled);
    let apic = name("_MAT", &BufferData::new(encode(&apic)));
    let number = u32::from(index);
    let field = Path::new("CPEJ");
    let eject = Store::new(&field, &number);
    let eject = Method::new(Path::new("_EJ0"), 1, true, vec![&eject]);
    let [id, unique] = identity(index);
    let mut children: Vec<&dyn Aml> = vec![&id, &unique, &status, &apic];
    if index > 0 {
        children.push(&eject);
    }
    device(into, &path(index), children);
}

/// 1: look at it; 3: let it go (ACPI 6.5 §5.6.6); the last ones first.
fn scan(into: &mut Vec<u8>, most: u8) {
    let mut body = Vec::new();
    for (local, field) in ["CPUL", "CPUH", "CPDL", "CPDH"].into_iter().enumerate() {
        body.extend(encode(&Store::new(&Local(local as u8), &Path::new(field))));
    }
    let mut tell = |index: u8, first: u8, event: u8| {
        let local = Local(first + index / 32);
        let bit = 1u32 << (index % 32);
        body.extend(encode(&And::new(&Local(4), &local, &bit)));
        let notify = Raw::of(&Notify::new(&Path::new(&path(index)), &event));
        body.extend(encode(&If::new(&Local(4), vec![&notify])));
    };
    (0..most).for_each(|index| tell(index, 0, 1));
    (1..most).rev().for_each(|index| tell(index, 2, 3));
    let body = Raw(body);
    into.extend(encode(&Method::new(
        Path::new("CSCN"),
        0,
        true,
        vec![&body],
    )));
}
