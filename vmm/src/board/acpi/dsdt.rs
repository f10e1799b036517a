//! The DSDT: the devices that cannot be found by asking.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall,
    Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::processors::{SCAN, processors};
use super::{OEM, OEM_REVISION, OEM_TABLE, encode};
use crate::board::power::{
    EVENT_GENERATION, EVENT_PCI_SLOTS, EVENT_POWER_BUTTON, EVENT_PROCESSORS, EVENTS, S5,
};
use crate::board::slots;
use crate::config::MachineConfig;
use crate::layout::{
    ACPI_PM_PORT, ACPI_SCI, GENERATION, Layout, PCI_BUSES, PCI_CONFIG_PORT, PCI_ECAM, PCI_IO,
    PCI_MMIO32, PVPANIC_PORT, RTC_PORT, SERIAL_IRQ, SERIAL_PORT, SLOTS_PORT,
};
use crate::pci::SLOTS as PCI_SLOTS;

/// Status of a device that is there, enabled, shown and working.
pub(super) const PRESENT: u8 = 0xf;

pub fn dsdt(config: &MachineConfig, layout: &Layout) -> Vec<u8> {
    let mut body = Vec::new();
    let mut devices = Vec::new();
    pci_root(&mut devices, layout);
    serial(&mut devices);
    clock(&mut devices);
    power(&mut devices, config.cpus.max.is_some());
    generation(&mut devices);
    if config.pvpanic {
        panic_port(&mut devices);
    }
    processors(&mut devices, &config.cpus);
    body.extend(Scope::raw(Path::new("\\_SB_"), devices));
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&S5, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

pub(super) fn device(into: &mut Vec<u8>, name: &str, children: Vec<&dyn Aml>) {
    Device::new(Path::new(name), children).to_aml_bytes(into);
}

pub(super) fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// AML that is encoded already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Raw {
    pub(super) fn of(aml: &dyn Aml) -> Raw {
        Raw(encode(aml))
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The host bridge with its windows, and the board's own claim on the configuration space (PCI
/// Firmware Specification 3.3 §4.1.2: not as a resource of the bridge). No _PRT: all our functions
/// interrupt by MSI-X and have no pin.
fn pci_root(into: &mut Vec<u8>, layout: &Layout) {
    let last_bus = u16::from(PCI_BUSES - 1);
    let window64 = layout.pci_mmio64;
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0u16, last_bus),
            &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
            &AddressSpace::new_io(PCI_IO.base as u16, (PCI_IO.end() - 1) as u16, None),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                PCI_MMIO32.base as u32,
                (PCI_MMIO32.end() - 1) as u32,
                None,
            ),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                window64.base,
                window64.end() - 1,
                None,
            ),
        ]),
    );
    device(
        into,
        "PCI0",
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &ZERO),
            &name("_SEG", &ZERO),
            &name("_BBN", &ZERO),
            &resources,
            &hot_slots(),
        ],
    );
    let ecam = Memory32Fixed::new(true, PCI_ECAM.base as u32, PCI_ECAM.size as u32);
    device(
        into,
        "MBRD",
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&ecam])),
        ],
    );
}

/// Every slot but the host bridge's can be filled and emptied: a device each with its eject method, and
/// a method for the generic event device, which tells what the registers say (1: look at it, 3: let it
/// go; ACPI 6.5 §5.6.6).
fn hot_slots() -> Raw {
    let mut body = encode(&OpRegion::new(
        Path::new("HPSR"),
        OpRegionSpace::SystemIO,
        &SLOTS_PORT,
        &(slots::SIZE as u8),
    ));
    // In the order of the registers.
    const { assert!(slots::UP == 0 && slots::DOWN == 4 && slots::EJECT == 8) };
    let fields = [*b"HPUP", *b"HPDN", *b"HPEJ"].map(|name| FieldEntry::Named(name, 32));
    body.extend(encode(&Field::new(
        Path::new("HPSR"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.into(),
    )));
    let mut scan = encode(&Store::new(&Local(0), &Path::new("HPUP")));
    scan.extend(encode(&Store::new(&Local(1), &Path::new("HPDN"))));
    for slot in 1..PCI_SLOTS as u32 {
        let (path, bit) = (format!("S{slot:03}"), 1u32 << slot);
        let address = slot << 16;
        let eject = Raw::of(&Store::new(&Path::new("HPEJ"), &bit));
        device(
            &mut body,
            &path,
            vec![
                &name("_ADR", &address),
                &name("_SUN", &slot),
                &Method::new(Path::new("_EJ0"), 1, true, vec![&eject]),
            ],
        );
        for (local, event) in [(Local(0), 1u8), (Local(1), 3)] {
            scan.extend(encode(&And::new(&Local(2), &local, &bit)));
            let notify = Raw::of(&Notify::new(&Path::new(&path), &event));
            scan.extend(encode(&If::new(&Local(2), vec![&notify])));
        }
    }
    let scan = Raw(scan);
    body.extend(encode(&Method::new(
        Path::new("PCNT"),
        0,
        true,
        vec![&scan],
    )));
    Raw(body)
}

fn serial(into: &mut Vec<u8>) {
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![
            &Interrupt::new(true, true, false, false, SERIAL_IRQ.into()),
            &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8),
        ]),
    );
    device(
        into,
        "COM1",
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &name("_DDN", &"COM1"),
            &resources,
        ],
    );
}

/// Without an interrupt: it tells the time and nothing else.
fn clock(into: &mut Vec<u8>) {
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![&IO::new(RTC_PORT, RTC_PORT, 1, 2)]),
    );
    device(
        into,
        "RTC0",
        vec![&name("_HID", &EISAName::new("PNP0B00")), &resources],
    );
}

/// The power button, and the generic event device (ACPI 6.5 §5.6.9) that reads which event it was
/// from the register that reading clears.
fn power(into: &mut Vec<u8>, hot_processors: bool) {
    device(
        into,
        "PWRB",
        vec![
            &name("_HID", &EISAName::new("PNP0C0C")),
            &name("_UID", &ZERO),
        ],
    );

    let register = ACPI_PM_PORT + EVENTS;
    let field = Field::new(
        Path::new("GEDR"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"GEDB", 8)],
    );
    let mut body = encode(&Store::new(&Local(0), &Path::new("GEDB")));
    let mut when = |event: u8, act: &dyn Aml| {
        body.extend(encode(&And::new(&Local(1), &Local(0), &event)));
        body.extend(encode(&If::new(&Local(1), vec![act])));
    };
    let notify = |device: &str| Raw::of(&Notify::new(&Path::new(device), &0x80u8));
    when(EVENT_POWER_BUTTON, &notify("\\_SB_.PWRB"));
    when(EVENT_GENERATION, &notify("\\_SB_.VGEN"));
    let scan = MethodCall::new(Path::new("\\_SB_.PCI0.PCNT"), Vec::new());
    when(EVENT_PCI_SLOTS, &scan);
    if hot_processors {
        let scan = MethodCall::new(Path::new(SCAN), Vec::new());
        when(EVENT_PROCESSORS, &scan);
    }
    let event = Raw::of(&Method::new(Path::new("_EVT"), 1, true, vec![&Raw(body)]));
    let interrupt = Interrupt::new(true, true, false, false, ACPI_SCI.into());
    device(
        into,
        "GED_",
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new(Path::new("GEDR"), OpRegionSpace::SystemIO, &register, &1u8),
            &field,
            &event,
        ],
    );
}

/// Found by its compatible id; Linux knows the short form, too. ADDR is the place, in two halves.
fn generation(into: &mut Vec<u8>) {
    let (low, high) = (GENERATION.base as u32, (GENERATION.base >> 32) as u32);
    device(
        into,
        "VGEN",
        vec![
            &name("_HID", &"FRCT0001"),
            &name("_CID", &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    );
}

fn panic_port(into: &mut Vec<u8>) {
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1)]),
    );
    device(
        into,
        "PEVT",
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_STA", &PRESENT),
            &resources,
        ],
    );
}
