//! A guest that may do anything to a whole board: ports, memory-mapped registers, configuration space,
//! rings and doorbells, read from bytes.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::rig::{Devices, HOT_MEMORY, MEMORY, Rig};
use crate::cpu::EndOfInterrupt;
use crate::layout;
use crate::pci::MSIX_CAPABILITY;
use crate::request::Request;

/// Bytes of one step: what, where (device or width), place, value.
const STEP: usize = 12;
/// More steps teach nothing that fewer do not.
const STEPS_MAX: usize = 400;
/// The most devices behind PCI.
const DEVICES: usize = 5;
const QUEUES: u64 = 8;
/// Where a driver that knows its work has its rings; what is below is for buffers.
const RINGS: u64 = 8 << 20;
const RING: u64 = 0x4000;
const DEADLINE: Duration = Duration::from_secs(20);

/// Ports that something answers at, and a neighbour that nothing does.
const PORTS: [(u16, u16); 9] = [
    (layout::PCI_CONFIG_PORT, 8),
    (layout::SERIAL_PORT, 8),
    (layout::KEYBOARD_PORT, 5),
    (layout::ACPI_PM_PORT, 8),
    (layout::WATCHDOG_PORT, 16),
    (layout::SLOTS_PORT, 12),
    (layout::PVPANIC_PORT, 2),
    (layout::RTC_PORT, 2),
    (0x80, 4),
];

/// Reads `input` as what a guest does to the devices of a machine, one step after the other.
///
/// # Panics
/// If a device does, loses count of its interrupts, does not come to rest, cannot be saved, or does not
/// serve after a reset: a bug.
pub fn board(input: &[u8]) {
    devices(Devices::Local, input);
}

/// The same of a machine's network and sockets, to which others speak from outside meanwhile.
///
/// # Panics
/// As [`board`] does.
pub fn network(input: &[u8]) {
    devices(Devices::Network, input);
}

fn devices(kind: Devices, input: &[u8]) {
    let rig = match Rig::new(kind) {
        Ok(rig) => rig,
        // A host that is out of something teaches the fuzzer nothing; a test would pass by it.
        Err(error) if cfg!(test) => panic!("there is no board: {error}"),
        Err(_) => return,
    };
    let mut guest = Guest {
        rig,
        kind,
        available: [0; DEVICES * QUEUES as usize],
    };
    for step in input.chunks_exact(STEP).take(STEPS_MAX) {
        if let Ok(step) = <&[u8; STEP]>::try_from(step) {
            guest.step(step);
        }
    }
    guest.rest();
    for device in &guest.rig.devices {
        assert!(device.reset().is_ok(), "{} is not reset", device.id());
        assert!(device.resume().is_ok(), "{} does not resume", device.id());
    }
    guest.expect_service();
    guest.rest();
    guest.check_requests();
}

struct Guest {
    rig: Rig,
    kind: Devices,
    /// The available index of each ring, as our driver counts it.
    available: [u16; DEVICES * QUEUES as usize],
}

impl Guest {
    fn step(&mut self, step: &[u8; STEP]) {
        let [kind, what, low, high, value @ ..] = *step;
        let place = u16::from_le_bytes([low, high]);
        let device = self.kind.meant(kind, what);
        let width = 1usize << (what / 4 % 4);
        let number = u64::from_le_bytes(value);
        let queue = u64::from(what / 4) % QUEUES;
        match kind % 16 {
            0..3 => self.bar_write(device, structure(place), &value[..width]),
            3 => drop(self.bar_read(device, structure(place), width)),
            4 => self.config_write(what % 8, place & 0xfff, &value[..width.min(4)]),
            5 => {
                let port = port(place);
                self.rig.pio.write(port, &value[..width.min(4)]);
            }
            6 => {
                self.rig.pio.read(port(place), &mut [0; 4][..width.min(4)]);
            }
            7 => self.memory_mapped(what, place, &value[..width]),
            8 => self.initialise(device, number),
            9 | 10 => self.descriptor(device, queue, place, number),
            11 => self.offer(device, queue, place, number),
            12 => self.kick(device, queue),
            13 => {
                let address = u64::from(place) * 8;
                let _ = self.rig.memory.write_slice(&value, GuestAddress(address));
            }
            14 => {
                let address = ring(device, queue) + u64::from(place) % RING;
                let _ = self.rig.memory.write_slice(&value, GuestAddress(address));
            }
            _ => self.host(what, place),
        }
    }

    /// What happens to a machine from outside while its guest misbehaves.
    fn host(&mut self, what: u8, place: u16) {
        match what % 4 {
            0 => {
                self.rest();
                for device in &self.rig.devices {
                    assert!(device.resume().is_ok(), "{} does not resume", device.id());
                }
            }
            1 => self.rig.ioapic.end_of_interrupt(place as u8),
            2 => self.check_requests(),
            _ => {
                self.rig.outside.act(what / 4, place);
                std::thread::yield_now();
            }
        }
    }

    /// Pauses and saves everything.
    fn rest(&self) {
        for device in &self.rig.devices {
            let paused = device.pause();
            assert!(paused.is_ok(), "{} does not come to rest", device.id());
        }
        for device in &self.rig.devices {
            assert!(device.save().is_ok(), "{} cannot be saved", device.id());
        }
    }

    fn check_requests(&self) {
        while let Some(request) = self.rig.requests.try_next() {
            let broken = matches!(
                request,
                Request::ThreadPanicked { .. } | Request::DeviceFault { .. }
            );
            assert!(!broken, "{request:?}");
        }
    }

    /// BAR 0 of a device, where it is now, also if it does not answer there.
    fn base(&self, device: u8) -> u64 {
        let mut base = [0; 4];
        self.rig.mmio.read(function(device + 1) + 0x10, &mut base);
        u64::from(u32::from_le_bytes(base) & !0xf)
    }

    fn bar_write(&self, device: u8, offset: u64, data: &[u8]) {
        self.rig.mmio.write(self.base(device) + offset, data);
    }

    fn bar_read(&self, device: u8, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        let address = self.base(device) + offset;
        self.rig.mmio.read(address, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn config_write(&self, slot: u8, register: u16, data: &[u8]) {
        let address = function(slot) + u64::from(register);
        self.rig.mmio.write(address, data);
    }

    fn memory_mapped(&self, what: u8, place: u16, data: &[u8]) {
        let (window, shift) = match what % 4 {
            0 => (layout::IOAPIC.base, 0),
            1 => (layout::PCI_ECAM.base, 4),
            2 => (layout::PCI_MMIO32.base, 3),
            _ => (
                layout::Layout::with_hot(MEMORY, HOT_MEMORY).pci_mmio64.base,
                12,
            ),
        };
        let address = window + (u64::from(place) << shift);
        self.rig.mmio.write(address, data);
        self.rig.mmio.read(address, &mut [0; 8][..data.len()]);
    }

    /// Does what a good driver does (virtio 1.2 §3.1.1), with the features that `choice` leaves.
    fn initialise(&mut self, device: u8, choice: u64) {
        self.config_write(device + 1, 0x04, &[6, 0]);
        self.bar_write(device, 0x14, &[0]);
        let begin = Instant::now();
        while self.bar_read(device, 0x14, 1) & 0xff != 0 && begin.elapsed() < DEADLINE {
            if !self.answers(device) {
                return;
            }
            std::thread::yield_now();
        }
        self.bar_write(device, 0x14, &[3]);
        for half in 0..2u32 {
            self.bar_write(device, 0x00, &half.to_le_bytes());
            let offered = self.bar_read(device, 0x04, 4) as u32;
            let kept = if half == 0 {
                !(choice as u32)
            } else {
                u32::MAX
            };
            self.bar_write(device, 0x08, &half.to_le_bytes());
            self.bar_write(device, 0x0c, &(offered & kept).to_le_bytes());
        }
        self.bar_write(device, 0x14, &[0xb]);
        self.enable_interrupts(device);
        let count = self.bar_read(device, 0x12, 2).min(QUEUES);
        for queue in 0..count {
            self.set_up_ring(device, queue);
        }
        self.bar_write(device, 0x14, &[0xf]);
    }

    /// Whether the device's BAR is where it says.
    fn answers(&self, device: u8) -> bool {
        self.bar_read(device, 0x12, 2) != 0xffff
    }

    fn set_up_ring(&mut self, device: u8, queue: u64) {
        let base = ring(device, queue);
        let _ = self
            .rig
            .memory
            .write_slice(&[0; RING as usize], GuestAddress(base));
        self.available[index(device, queue)] = 0;
        self.bar_write(device, 0x16, &(queue as u16).to_le_bytes());
        for (register, address) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
            self.bar_write(device, register, &address.to_le_bytes());
        }
        self.bar_write(device, 0x1a, &(queue as u16 + 1).to_le_bytes());
        self.bar_write(device, 0x1c, &[1, 0]);
    }

    fn enable_interrupts(&self, device: u8) {
        for vector in 0..4u64 {
            let message = (0xfee0_0000u64, 0x40 + vector);
            self.bar_write(device, 0x4000 + vector * 16, &message.0.to_le_bytes());
            self.bar_write(device, 0x4008 + vector * 16, &message.1.to_le_bytes());
        }
        let (function, mut at) = (function(device + 1), 0x34);
        for _ in 0..16 {
            let mut link = [0; 1];
            self.rig.mmio.read(function + at, &mut link);
            let mut header = [0; 2];
            at = u64::from(link[0]);
            self.rig.mmio.read(function + at, &mut header);
            if header[0] == MSIX_CAPABILITY {
                self.rig.mmio.write(function + at + 2, &[0, 0x80]);
                return;
            }
            at += 1;
        }
    }

    /// A descriptor: 24 bits of address (the last are far away), 16 of length, 8 of flags, 16 of next.
    fn descriptor(&self, device: u8, queue: u64, at: u16, packed: u64) {
        let [a, b, c, length_low, length_high, flags, next @ ..] = packed.to_le_bytes();
        let address = match (a, b, c) {
            (_, 0xff, 0xff) => u64::MAX - u64::from(a),
            (_, 0xfe, 0xff) => MEMORY - 128 + u64::from(a),
            _ => u64::from(u32::from_le_bytes([a, b, c, 0])),
        };
        let length = match u16::from_le_bytes([length_low, length_high]) {
            0xffff => u32::MAX,
            length => length.into(),
        };
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12] = flags;
        raw[14..].copy_from_slice(&next);
        let address = ring(device, queue) + 16 * u64::from(at % 256);
        let _ = self.rig.memory.write_slice(&raw, GuestAddress(address));
    }

    /// Makes a chain available, counted once or as often as the guest pleases.
    fn offer(&mut self, device: u8, queue: u64, head: u16, jump: u64) {
        let size = self.kind.queue_sizes()[usize::from(device)];
        let count = &mut self.available[index(device, queue)];
        let driver = ring(device, queue) + 0x1000;
        let slot = driver + 4 + 2 * u64::from(*count % size);
        *count = count.wrapping_add(if jump & 0xffff == 0 { 1 } else { jump as u16 });
        let (head, count) = (head.to_le_bytes(), count.to_le_bytes());
        let _ = self.rig.memory.write_slice(&head, GuestAddress(slot));
        let _ = self
            .rig
            .memory
            .write_slice(&count, GuestAddress(driver + 2));
    }

    fn kick(&self, device: u8, queue: u64) {
        let address = self.base(device) + 0x3000 + 4 * queue;
        if !self.rig.doorbells.ring(address) {
            self.rig.mmio.write(address, &(queue as u16).to_le_bytes());
        }
    }

    /// After a reset all is as if nothing had been: the device gives random numbers.
    fn expect_service(&mut self) {
        let rng = self.kind.rng();
        self.initialise(rng, 0);
        let size = self.bar_read(rng, 0x18, 2) as u16;
        assert!(size.is_power_of_two(), "a queue of {size} after a reset");
        // 16 bytes, writable, at address 0.
        self.descriptor(rng, 0, 0, 16 << 24 | 2 << 40);
        let driver = ring(rng, 0) + 0x1000;
        let _ = (self.rig.memory).write_slice(&[0, 0, 1, 0, 0, 0], GuestAddress(driver));
        self.kick(rng, 0);
        let begin = Instant::now();
        let mut used = [0; 2];
        while used == [0, 0] {
            assert!(begin.elapsed() < DEADLINE, "no service after a reset");
            std::thread::yield_now();
            let place = GuestAddress(ring(rng, 0) + 0x2000 + 2);
            let _ = self.rig.memory.read_slice(&mut used, place);
        }
    }
}

fn ring(device: u8, queue: u64) -> u64 {
    RINGS + index(device, queue) as u64 * RING
}

fn index(device: u8, queue: u64) -> usize {
    usize::from(device) * QUEUES as usize + queue as usize
}

/// A slot's configuration space.
fn function(slot: u8) -> u64 {
    layout::PCI_ECAM.base + (u64::from(slot) << 15)
}

/// The start of one of the BAR's structures, or anywhere in it.
fn structure(place: u16) -> u64 {
    let far = place & 0x1000 != 0;
    u64::from(place >> 13) * 0x1000 + u64::from(place & if far { 0xfff } else { 0x3f })
}

fn port(place: u16) -> u64 {
    let (base, length) = match place >> 8 {
        // They came last, as the device above.
        0xee => (layout::PROCESSORS_PORT, 28),
        number => PORTS[usize::from(number) % PORTS.len()],
    };
    u64::from(base + (place & 0xff) % length)
}
