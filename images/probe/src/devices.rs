//! The devices of this machine: found once at boot, then used by commands.

use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{Error, Result};

use crate::balloon::Balloon;
use crate::disk::Disk;
use crate::hot_memory::HotMemory;
use crate::memory::{self, Registers};
use crate::net::Net;
use crate::pci::{Bus, Function};
use crate::say;
use crate::virtio::{self, PciTransport, Queue};
use crate::vsock::Vsock;

const MAX_DISKS: usize = 8;
const PVPANIC_PORT: u16 = 0x505;
/// The guest has panicked (QEMU, docs/specs/pvpanic.rst).
const PVPANIC_PANICKED: u8 = 1;

/// virtio-rng (virtio 1.2 §5.4).
pub struct Rng {
    pub transport: PciTransport,
    queue: Queue<8>,
    buffer: &'static mut [u8],
}

impl Rng {
    fn new(transport: PciTransport) -> Result<Self> {
        let buffer = memory::dma_pages(1).ok_or(Error::DmaError)?;
        Self::with_buffer(transport, buffer)
    }

    /// Resets the device and sets it up again.
    pub fn anew(self) -> Result<Self> {
        Self::with_buffer(self.transport.renewed(), self.buffer)
    }

    fn with_buffer(mut transport: PciTransport, buffer: &'static mut [u8]) -> Result<Self> {
        transport.negotiate(0)?;
        let queue = Queue::new(&mut transport, 0)?;
        transport.finish_init();
        Ok(Self {
            transport,
            queue,
            buffer,
        })
    }

    /// At most a page of random bytes; the device may give fewer than asked for.
    pub fn bytes(&mut self, count: usize) -> Result<&[u8]> {
        let count = count.clamp(1, self.buffer.len());
        let part = &mut self.buffer[..count];
        let got = self.queue.request(&mut self.transport, &[], &mut [part])? as usize;
        Ok(&self.buffer[..got.min(count)])
    }
}

/// virtio-console, its first port (virtio 1.2 §5.3 without MULTIPORT).
pub struct Console {
    transport: PciTransport,
    input: Queue<2>,
    output: Queue<2>,
    buffer: &'static mut [u8],
    waiting: Option<u16>,
}

impl Console {
    fn new(mut transport: PciTransport) -> Result<Self> {
        transport.negotiate(0)?;
        let input = Queue::new(&mut transport, 0)?;
        let output = Queue::new(&mut transport, 1)?;
        transport.finish_init();
        let buffer = memory::dma_pages(1).ok_or(Error::DmaError)?;
        let mut console = Self {
            transport,
            input,
            output,
            buffer,
            waiting: None,
        };
        console.ask()?;
        Ok(console)
    }

    fn ask(&mut self) -> Result {
        // SAFETY: the buffer is a page for good; it is looked at only after `pop_used`.
        self.waiting = Some(unsafe { self.input.ring.add(&[], &mut [self.buffer])? });
        self.transport.notify(0);
        Ok(())
    }

    pub fn has_input(&self) -> bool {
        self.input.ring.can_pop()
    }

    /// Hands what has come in to `each`, byte by byte.
    pub fn read(&mut self, mut each: impl FnMut(u8)) -> Result {
        let Some(token) = self.waiting.filter(|_| self.has_input()) else {
            return Ok(());
        };
        // SAFETY: the token and the buffer of `ask`.
        let got = unsafe { self.input.ring.pop_used(token, &[], &mut [self.buffer])? };
        self.waiting = None;
        self.buffer
            .iter()
            .take(got as usize)
            .for_each(|&byte| each(byte));
        self.ask()
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result {
        if bytes.is_empty() {
            return Ok(());
        }
        self.output
            .request(&mut self.transport, &[bytes], &mut [])
            .map(drop)
    }
}

/// Where a panic is told to.
#[derive(Clone, Copy)]
enum PvPanic {
    Port,
    Registers(Registers),
}

pub struct Devices {
    pub bus: Bus,
    pub disks: [Option<Disk>; MAX_DISKS],
    disk_slots: [u8; MAX_DISKS],
    net_slot: u8,
    offloads: bool,
    pub rng: Option<Rng>,
    pub console: Option<Console>,
    pub balloon: Option<Balloon>,
    pub hot_memory: Option<HotMemory>,
    pub net: Option<&'static mut Net>,
    pub vsock: Option<&'static mut Vsock>,
    pvpanic: PvPanic,
}

impl Devices {
    /// Finds them all and says a line for each.
    pub fn find(bus: Bus, offloads: bool) -> Self {
        let mut found = Self {
            bus,
            disks: [const { None }; MAX_DISKS],
            disk_slots: [0; MAX_DISKS],
            net_slot: 0,
            offloads,
            rng: None,
            console: None,
            balloon: None,
            hot_memory: None,
            net: None,
            vsock: None,
            pvpanic: PvPanic::Port,
        };
        let mut functions = [None; 64];
        for (place, function) in functions.iter_mut().zip(found.bus.functions()) {
            *place = Some(*function);
        }
        for function in functions.iter().flatten() {
            found.drive(function);
        }
        found
    }

    fn drive(&mut self, function: &Function) {
        let (slot, vendor, device) = (function.devfn >> 3, function.vendor, function.device);
        if (vendor, device) == (0x1b36, 0x0011) {
            function.enable();
            if let Some(registers) = function.bar(0).and_then(|bar| Registers::at(bar, 4096)) {
                self.pvpanic = PvPanic::Registers(registers);
            }
        }
        let Some(kind) = virtio::kind(function) else {
            return;
        };
        let outcome = match PciTransport::new(function) {
            Some(transport) => self.add(kind, slot, transport, self.offloads),
            None => Err(Error::ConfigSpaceMissing),
        };
        match outcome {
            Ok(()) => say!("device slot={slot} id={vendor:04x}:{device:04x} kind={kind:?}"),
            Err(error) => {
                say!("device slot={slot} id={vendor:04x}:{device:04x} failed: {error}")
            }
        }
    }

    /// Drives what was put into a slot while we ran.
    pub fn arrived(&mut self, slot: u8) {
        let function = self.bus.functions().find(|f| f.devfn == slot << 3).copied();
        if let Some(function) = function {
            self.drive(&function);
        }
    }

    /// Forgets the disk or network in a slot; true if it was the network, which another may have.
    pub fn left(&mut self, slot: u8) -> bool {
        for (place, disk_slot) in self.disks.iter_mut().zip(&self.disk_slots) {
            if *disk_slot == slot {
                *place = None;
            }
        }
        let network = slot == self.net_slot;
        if network {
            (self.net, self.net_slot) = (None, 0);
        }
        network
    }

    fn add(
        &mut self,
        kind: DeviceType,
        slot: u8,
        transport: PciTransport,
        offloads: bool,
    ) -> Result {
        match kind {
            DeviceType::Block => {
                let free = self.disks.iter().position(|place| place.is_none());
                let free = free.ok_or(Error::Unsupported)?;
                self.disks[free] = Some(Disk::new(transport)?);
                self.disk_slots[free] = slot;
            }
            DeviceType::EntropySource => self.rng = Some(Rng::new(transport)?),
            DeviceType::Console => self.console = Some(Console::new(transport)?),
            DeviceType::MemoryBalloon => self.balloon = Some(Balloon::new(transport)?),
            DeviceType::Memory => self.hot_memory = Some(HotMemory::new(transport)?),
            DeviceType::Network if self.net_slot == 0 => {
                self.net = Some(Net::new(transport, offloads)?);
                self.net_slot = slot;
            }
            DeviceType::Socket if self.vsock.is_none() => {
                self.vsock = Some(Vsock::new(transport)?);
            }
            // No driver.
            _ => return Err(Error::Unsupported),
        }
        Ok(())
    }

    pub fn disk(&mut self, index: usize) -> Option<&mut Disk> {
        self.disks.get_mut(index)?.as_mut()
    }

    pub fn disk_count(&self) -> usize {
        self.disks.iter().flatten().count()
    }

    /// Tells the host that this guest has panicked.
    pub fn panicked(&self) {
        match self.pvpanic {
            PvPanic::Port => crate::cpu::outb(PVPANIC_PORT, PVPANIC_PANICKED),
            PvPanic::Registers(registers) => registers.write8(0, PVPANIC_PANICKED),
        }
    }
}
