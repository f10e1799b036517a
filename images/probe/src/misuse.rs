//! Hostile acts: what a guest must be able to do without harm to anyone but itself. Afterwards the
//! device is set up anew and used, which shows that the misuse ended with its reset.

use core::fmt::Write as _;

use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::command::{Probe, Refusal, Words};
use crate::cpu;
use crate::devices::Rng;
use crate::disk::Disk;
use crate::memory;
use crate::pci::Function;
use crate::serial::Line;
use crate::virtio::{self, PciTransport};

/// Acts on a queue, in [`hostile_queue`]'s order.
pub const QUEUE_ACTS: u64 = 14;
pub const PCI_ACTS: u64 = 5;
const QUEUE_SIZE: u16 = 8;
/// How long a device gets to fall for it.
const WHILE_US: u64 = 20_000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NOWHERE: u64 = 0x7fff_ffff_f000;

/// `misuse queue [N] [disk]`, `misuse pci [N]`, `misuse acpi`; without N each act in turn.
pub fn act(probe: &mut Probe, words: &mut Words, out: &mut Line) -> Result<(), Refusal> {
    let what = words
        .word()
        .ok_or(Refusal::Usage("queue|pci|acpi [N] [disk]"))?;
    let which = words.number();
    let on_disk = words.word() == Some("disk");
    let all = |count: u64| which.map_or(0..count, |n| n..n + 1);
    match what {
        "queue" => {
            for n in all(QUEUE_ACTS) {
                let status = match on_disk {
                    true => misuse_disk(probe, n)?,
                    false => misuse_rng(probe, n)?,
                };
                let _ = write!(out, " {n}:{status:02x}");
            }
        }
        "pci" => {
            for n in all(PCI_ACTS) {
                misuse_pci(probe, n);
                let _ = write!(out, " {n}");
            }
            revive(probe)?;
        }
        "acpi" => misuse_ports(),
        _ => return Err(Refusal::Usage("queue|pci|acpi [N] [disk]")),
    }
    Ok(())
}

/// The device's status after act `n`; then it is reset, set up and asked for bytes.
fn misuse_rng(probe: &mut Probe, n: u64) -> Result<u8, Refusal> {
    let mut rng = probe.devices.rng.take().ok_or(Refusal::NoDevice)?;
    let status = hostile_queue(&mut rng.transport, n)?;
    let mut rng = rng.anew()?;
    let got = rng.bytes(8)?.len();
    probe.devices.rng = Some(rng);
    (got > 0)
        .then_some(status)
        .ok_or(Refusal::Failed("no random bytes after the reset"))
}

fn misuse_disk(probe: &mut Probe, n: u64) -> Result<u8, Refusal> {
    let place = &mut probe.devices.disks[0];
    let mut disk = place.take().ok_or(Refusal::NoDevice)?;
    let status = hostile_queue(&mut disk.transport, n)?;
    let disk = place.insert(disk.anew()?);
    disk.hash(0, 512)?;
    Ok(status)
}

/// A queue of the probe's own making, where each field can be wrong.
struct RawQueue {
    page: u64,
}

impl RawQueue {
    const AVAILABLE: u64 = 0x400;
    const USED: u64 = 0x800;

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.page + 16 * index;
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    fn offer(&self, head: u16, index: u16) {
        self.put(self.page + Self::AVAILABLE + 4, &head.to_le_bytes());
        self.put(self.page + Self::AVAILABLE + 2, &index.to_le_bytes());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        for (i, &byte) in bytes.iter().enumerate() {
            memory::write_u8(at + i as u64, byte);
        }
    }
}

/// Sets the first queue up, does act `n` on it, rings the bell, and says the device's status.
fn hostile_queue(transport: &mut PciTransport, n: u64) -> Result<u8, Refusal> {
    let page = memory::scratch_page();
    let queue = RawQueue { page };
    for at in 0..4096 {
        memory::write_u8(page + at, 0);
    }
    transport.set_status(DeviceStatus::empty());
    transport.negotiate(0)?;
    let (size, descriptors) = match n {
        9 => (QUEUE_SIZE, NOWHERE),
        10 => (7, page),
        11 => (0xffff, page),
        _ => (QUEUE_SIZE, page),
    };
    let driver = if n == 13 {
        page
    } else {
        page + RawQueue::AVAILABLE
    };
    let device = if n == 13 { page } else { page + RawQueue::USED };
    transport.queue_set_quietly(0, size, [descriptors, driver, device]);
    if n != 12 {
        transport.finish_init();
    }
    let buffer = page + 0xc00;
    match n {
        0 => queue.descriptor(0, buffer, 16, WRITE | NEXT, 0),
        1 => {
            queue.descriptor(0, buffer, 16, WRITE | NEXT, 1);
            queue.descriptor(1, buffer, 16, WRITE | NEXT, 0);
        }
        2 => queue.descriptor(0, NOWHERE, 4096, WRITE, 0),
        3 => queue.descriptor(0, u64::MAX - 100, u32::MAX, WRITE, 0),
        4 => queue.descriptor(0, buffer, 0, WRITE, 0),
        5 => queue.descriptor(0, buffer, 48, INDIRECT, 0),
        6 => queue.descriptor(0, buffer, 16, WRITE | NEXT, 0xfff0),
        _ => queue.descriptor(0, buffer, 16, WRITE, 0),
    }
    match n {
        7 => queue.offer(0xffff, 1),
        8 => queue.offer(0, 40_000),
        _ => queue.offer(0, 1),
    }
    transport.notify(0);
    // No queue of that number; nor do the status bits exist.
    transport.notify(3);
    crate::wait_for(WHILE_US, || transport.needs_reset());
    let status = transport.get_status().bits() as u8;
    transport.set_status(DeviceStatus::all());
    transport.set_status(DeviceStatus::empty());
    Ok(status)
}

fn misuse_pci(probe: &Probe, n: u64) {
    for function in probe
        .devices
        .bus
        .functions()
        .filter(|f| virtio::kind(f).is_some())
    {
        match n {
            0 => scribble(function, &[0xffff_ffff, 0, 0x5555_5555]),
            1 => wander(function),
            2 => scribble_msix(function),
            3 => reach_through_config(function),
            _ => odd_ports(),
        }
    }
}

/// Every word of the header and the capabilities, then as it was.
fn scribble(function: &Function, values: &[u32]) {
    for offset in (0..0x100).step_by(4) {
        let before = function.read32(offset);
        for &value in values {
            function.write32(offset, value);
        }
        function.write32(offset, before);
    }
}

/// Its BARs over memory, over interrupt controllers and over the end of the address space, while it
/// decodes and while it does not.
fn wander(function: &Function) {
    let command = function.read32(4) & 0xffff;
    for bar in (0x10..0x28).step_by(4) {
        let before = function.read32(bar);
        for place in [
            0,
            0x10_0000,
            0xfec0_0000,
            0xfee0_0000,
            0xe000_0000,
            0xffff_f000,
        ] {
            function.write32(bar, place);
            function.write32(4, command & !2);
            function.write32(4, command);
            function.write32(bar, before);
        }
    }
}

fn scribble_msix(function: &Function) {
    let Some(msix) = function.msix() else { return };
    for entry in 0..msix.entries {
        msix.write_raw(entry, [0xffff_ffff; 4]);
        msix.write_raw(entry, [0x1234, 0xffff_ffff, 0xffff_ffff, 0]);
        msix.write_raw(entry, [0xfee0_0000, 0, 0, 1]);
    }
    msix.enable();
}

/// VIRTIO_PCI_CAP_PCI_CFG (virtio 1.2 §4.1.4.9): a window to the BARs from configuration space.
fn reach_through_config(function: &Function) {
    for at in function.capabilities(crate::pci::CAPABILITY_VENDOR) {
        if function.read32(at) >> 24 != 5 {
            continue;
        }
        for (bar, offset, length) in [
            (0u32, 0xffff_fff0u32, 4u32),
            (5, 0, 4),
            (0xff, 0, 4),
            (0, 1, 4),
            (0, 0, 0xffff),
            (4, 0, 3),
        ] {
            function.write32(at + 4, bar);
            function.write32(at + 8, offset);
            function.write32(at + 12, length);
            function.write32(at + 16, 0xffff_ffff);
            function.read32(at + 16);
        }
    }
}

/// Configuration mechanism #1 with addresses and widths that mean nothing.
fn odd_ports() {
    for address in [
        0x8000_0000u32,
        0xffff_ffff,
        0x80ff_ffff,
        0x8000_0003,
        0x0000_0000,
    ] {
        cpu::outl(0xcf8, address);
        for port in 0xcfc..=0xcff {
            cpu::inb(port);
        }
        cpu::inw(0xcfe);
        cpu::inl(0xcfc);
    }
    cpu::outb(0xcf8, 0xff);
    cpu::outw(0xcfa, 0xffff);
}

/// Every device anew, as after a reset.
fn revive(probe: &mut Probe) -> Result<(), Refusal> {
    if let Some(rng) = probe.devices.rng.take() {
        let fresh: &mut Rng = probe.devices.rng.insert(rng.anew()?);
        fresh.bytes(8)?;
    }
    for place in &mut probe.devices.disks {
        if let Some(disk) = place.take() {
            let fresh: &mut Disk = place.insert(disk.anew()?);
            fresh.hash(0, 512)?;
        }
    }
    Ok(())
}

/// The ports of timers, power management and whatever else is there, read and written in every
/// width. Left out: those that end the machine, and the console's.
fn misuse_ports() {
    const ENDS: [u16; 4] = [0x64, 0x92, 0xcf9, 0x604];
    for port in (0x20..0x100u16)
        .chain(0x500..0x504)
        .chain(0x600..0x640)
        .chain(0xcf8..0xd00)
    {
        cpu::inb(port);
        cpu::inw(port);
        cpu::inl(port);
        let near_end = ENDS.iter().any(|&end| port <= end + 1 && end < port + 4);
        if !near_end && !(0x20..0x22).contains(&port) && !(0xa0..0xa2).contains(&port) {
            cpu::outb(port, 0x5a);
            cpu::outw(port, 0);
        }
    }
}
