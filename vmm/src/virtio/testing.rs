//! A driver in software, and a board to plug a device into: what the tests of all devices use.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::transport::{VirtioPciDevice, status};
use crate::bus::Bus;
use crate::config::{HotMemoryConfig, MemoryConfig, PageSize};
use crate::device::Board;
use crate::eventfd::EventFd;
use crate::interrupt::{InterruptError, IoAddress, IoEvents};
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::pci::msix_recorder::Recorder;
use crate::reactor::{Reactor, ReactorThread};
use crate::request::{RequestReceiver, channel};
use crate::thread::Threads;

pub(crate) const MEMORY: u64 = 16 << 20;

/// Lets a time up to 128 us pass that differs from number to number, without sleeping: what a device's
/// thread looks for requests, and more.
pub(crate) fn think(number: u32) {
    let pause = Duration::from_micros(u64::from(number.wrapping_mul(2_654_435_761) >> 25));
    let begin = Instant::now();
    while begin.elapsed() < pause {
        std::hint::spin_loop();
    }
}

/// Generous: a loaded machine is no failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
const BASE: u64 = 0xc000_0000;
/// Where the driver keeps its rings; below is free for the tests' buffers.
const RINGS: u64 = 8 << 20;

/// Stands in for the kernel's ioeventfds.
#[derive(Default)]
pub(crate) struct Doorbells(Mutex<HashMap<u64, EventFd>>);

impl IoEvents for Doorbells {
    fn bind(&self, address: IoAddress, fd: &EventFd) -> Result<(), InterruptError> {
        let IoAddress::Mmio(address) = address else {
            panic!("a port")
        };
        let old = self
            .0
            .lock()
            .unwrap()
            .insert(address, fd.try_clone().unwrap());
        assert!(old.is_none(), "bound twice");
        Ok(())
    }
    fn unbind(&self, address: IoAddress, _fd: &EventFd) -> Result<(), InterruptError> {
        let IoAddress::Mmio(address) = address else {
            panic!("a port")
        };
        assert!(
            self.0.lock().unwrap().remove(&address).is_some(),
            "was not bound"
        );
        Ok(())
    }
}

/// A board without KVM.
pub(crate) struct Rig {
    pub(crate) board: Board,
    pub(crate) doorbells: Arc<Doorbells>,
    pub(crate) requests: RequestReceiver,
    _reactor: ReactorThread,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with_hot_memory(None)
    }

    pub(crate) fn with_hot_memory(hot: Option<HotMemoryConfig>) -> Self {
        let (requests, receiver) = channel().unwrap();
        let threads = Threads::new(None, requests.clone());
        let reactor = Reactor::new().unwrap();
        let running = reactor.run(&threads).unwrap();
        let doorbells = Arc::new(Doorbells::default());
        let config = MemoryConfig {
            bytes: MEMORY,
            pages: PageSize::Small,
            host_nodes: Vec::new(),
        };
        let board = Board {
            memory: GuestMemory::create_with(&config, hot.as_ref()).unwrap(),
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            msi: Arc::new(Recorder::default()),
            io_events: doorbells.clone(),
            reactor,
            threads,
            requests,
            layout: Layout::with_hot(MEMORY, hot.map_or(0, |hot| hot.max)),
        };
        Self {
            board,
            doorbells,
            requests: receiver,
            _reactor: running,
        }
    }

    /// Interrupts of the next device only: each recorder counts routes from 0.
    pub(crate) fn with_recorder(&self) -> (Board, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let mut board = self.board.clone();
        board.msi = recorder.clone();
        (board, recorder)
    }
}

/// A buffer of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

pub(crate) fn read_part(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        writable: false,
    }
}

pub(crate) fn write_part(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        writable: true,
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl Ring {
    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }
    pub(crate) fn driver(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }
    pub(crate) fn device(&self) -> u64 {
        (self.driver() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }
}

/// A driver of one device, by its BAR.
pub(crate) struct Driver {
    pub(crate) device: VirtioPciDevice,
    pub(crate) memory: GuestMemory,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) doorbells: Arc<Doorbells>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) event_index: bool,
}

impl Driver {
    /// Takes the device through its whole initialisation with all features that it offers.
    pub(crate) fn start(rig: &Rig, device: VirtioPciDevice, recorder: Arc<Recorder>) -> Self {
        Self::start_with(rig, device, recorder, u64::MAX)
    }

    pub(crate) fn start_with(
        rig: &Rig,
        device: VirtioPciDevice,
        recorder: Arc<Recorder>,
        features: u64,
    ) -> Self {
        let mut driver = Self::attach(rig, device, recorder);
        driver.initialise(features);
        driver
    }

    /// A driver that has only mapped the BAR.
    pub(crate) fn attach(rig: &Rig, device: VirtioPciDevice, recorder: Arc<Recorder>) -> Self {
        device.function().lock().unwrap().bar_moved(0, Some(BASE));
        Self {
            device,
            memory: rig.board.memory.clone(),
            recorder,
            doorbells: rig.doorbells.clone(),
            rings: Vec::new(),
            event_index: false,
        }
    }

    pub(crate) fn initialise(&mut self, features: u64) {
        self.set(0x14, 0, 1);
        let begin = std::time::Instant::now();
        while self.status() != 0 {
            assert!(begin.elapsed() < DEADLINE, "the reset is done in time");
            std::thread::yield_now();
        }
        self.set(0x14, u64::from(status::ACKNOWLEDGE | status::DRIVER), 1);
        let offered = self.offered();
        let wanted = offered & features;
        self.event_index = wanted & super::feature::EVENT_IDX != 0;
        for half in 0..2u64 {
            self.set(0x08, half, 4);
            self.set(0x0c, (wanted >> (32 * half)) & 0xffff_ffff, 4);
        }
        let features_ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set(0x14, features_ok.into(), 1);
        assert_eq!(self.status(), features_ok, "the device agrees");
        self.enable_interrupts();
        self.set(0x10, 0, 2);
        self.set_up_rings();
        self.set(0x14, (features_ok | status::DRIVER_OK).into(), 1);
    }

    pub(crate) fn offered(&self) -> u64 {
        (0..2).fold(0, |features, half| {
            self.set(0x00, half, 4);
            features | (self.get(0x04, 4) << (32 * half))
        })
    }

    fn enable_interrupts(&self) {
        for vector in 0..=self.get(0x12, 2) {
            self.write(0x4000 + vector * 16, &0xfee0_0000u64.to_le_bytes());
            self.write(0x4000 + vector * 16 + 8, &(0x40 + vector).to_le_bytes());
        }
        // MSI-X is the last capability in our configuration spaces.
        let function = self.device.function();
        let mut function = function.lock().unwrap();
        let mut at = 0x34;
        loop {
            let mut header = [0; 2];
            function.read_config(at, &mut header[..1]);
            at = header[0].into();
            function.read_config(at, &mut header);
            if header[0] == crate::pci::MSIX_CAPABILITY {
                return function.write_config(at + 2, &0x8000u16.to_le_bytes());
            }
            at += 1;
        }
    }

    fn set_up_rings(&mut self) {
        self.rings.clear();
        for index in 0..self.get(0x12, 2) {
            self.set(0x16, index, 2);
            let size = self.get(0x18, 2) as u16;
            let base = RINGS + index * 0x8000;
            self.memory
                .write_slice(&vec![0; 0x8000], GuestAddress(base))
                .unwrap();
            let ring = Ring {
                size,
                base,
                next_descriptor: 0,
                available: 0,
                used: 0,
            };
            self.set(0x20, ring.descriptors(), 8);
            self.set(0x28, ring.driver(), 8);
            self.set(0x30, ring.device(), 8);
            self.set(0x1a, index + 1, 2);
            self.set(0x1c, 1, 2);
            self.rings.push(ring);
        }
    }

    /// Writes a register of the common configuration.
    pub(crate) fn set(&self, register: u64, value: u64, length: usize) {
        self.write(register, &value.to_le_bytes()[..length]);
    }

    pub(crate) fn get(&self, register: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.read(register, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn status(&self) -> u8 {
        self.get(0x14, 1) as u8
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        self.device
            .function()
            .lock()
            .unwrap()
            .read_bar(0, offset, data);
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.device
            .function()
            .lock()
            .unwrap()
            .write_bar(0, offset, data);
    }

    pub(crate) fn config(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.read(0x2000 + offset, &mut data);
        data
    }

    /// Puts a raw descriptor into a ring's table.
    pub(crate) fn descriptor(&self, table: u64, at: u16, part: Part, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&part.address.to_le_bytes());
        raw[8..12].copy_from_slice(&part.length.to_le_bytes());
        raw[12..14].copy_from_slice(&(flags | if part.writable { 2 } else { 0 }).to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let _ = self
            .memory
            .write_slice(&raw, GuestAddress(table + 16 * u64::from(at)));
    }

    /// Makes a chain available; returns its head.
    pub(crate) fn submit(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let ring = self.rings[queue];
        let head = ring.next_descriptor;
        for (step, part) in parts.iter().enumerate() {
            let at = (head + step as u16) % ring.size;
            let last = step + 1 == parts.len();
            self.descriptor(ring.base, at, *part, u16::from(!last), (at + 1) % ring.size);
        }
        self.rings[queue].next_descriptor = (head + parts.len() as u16) % ring.size;
        self.make_available(queue, head);
        head
    }

    /// The same by an indirect table at `table`.
    pub(crate) fn submit_indirect(&mut self, queue: usize, table: u64, parts: &[Part]) -> u16 {
        for (step, part) in parts.iter().enumerate() {
            let last = step + 1 == parts.len();
            self.descriptor(table, step as u16, *part, u16::from(!last), step as u16 + 1);
        }
        let head = self.rings[queue].next_descriptor;
        let whole = read_part(table, 16 * parts.len() as u32);
        self.descriptor(self.rings[queue].base, head, whole, 4, 0);
        self.rings[queue].next_descriptor = (head + 1) % self.rings[queue].size;
        self.make_available(queue, head);
        head
    }

    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        self.make_available_by(queue, head, 1);
    }

    /// Puts a head into the ring and moves the index on by any number.
    pub(crate) fn make_available_by(&mut self, queue: usize, head: u16, jump: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.driver() + 4 + 2 * u64::from(ring.available % ring.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.available = ring.available.wrapping_add(jump);
        self.memory
            .write_obj(ring.available, GuestAddress(ring.driver() + 2))
            .unwrap();
    }

    /// Notifies as the guest would: by the eventfd if the kernel watches, else by the register.
    pub(crate) fn kick(&self, queue: usize) {
        let offset = 0x3000 + 4 * queue as u64;
        let bells = self.doorbells.0.lock().unwrap();
        match bells.get(&(BASE + offset)) {
            Some(fd) => fd.signal(),
            None => {
                drop(bells);
                self.write(offset, &(queue as u16).to_le_bytes());
            }
        }
    }

    /// The same, if the device has asked to be told of the last `count` chains; `event_index` as negotiated.
    pub(crate) fn kick_if_asked(&self, queue: usize, count: u16, event_index: bool) {
        // What was made available is to be there before the device's wish is read (§2.7.13.4.1).
        fence(Ordering::SeqCst);
        let ring = self.rings[queue];
        let word = |offset: u64| -> u16 {
            let address = GuestAddress(ring.device() + offset);
            self.memory.load(address, Ordering::Relaxed).unwrap()
        };
        let asked = if event_index {
            let event = word(4 + 8 * u64::from(ring.size));
            ring.available.wrapping_sub(event).wrapping_sub(1) < count
        } else {
            word(0) & 1 == 0
        };
        if asked {
            self.kick(queue);
        }
    }

    /// A chain that the device has used, if there is one: head and length.
    pub(crate) fn try_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(ring.device() + 2))
            .unwrap();
        if index == ring.used {
            return None;
        }
        let slot = ring.device() + 4 + 8 * u64::from(ring.used % ring.size);
        ring.used = ring.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        // used_event: interrupt at the very next one.
        let event = ring.driver() + 4 + 2 * u64::from(ring.size);
        self.memory
            .write_obj(ring.used, GuestAddress(event))
            .unwrap();
        Some((head as u16, length))
    }

    /// Waits for the interrupt and then for what came with it.
    pub(crate) fn used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.try_used(queue) {
                return used;
            }
            let came = self.recorder.wait(queue + 1, DEADLINE);
            assert!(
                came,
                "no interrupt of queue {queue}; fault: {:?}",
                self.device.last_fault()
            );
        }
    }

    /// Submits, kicks and waits.
    pub(crate) fn request(&mut self, queue: usize, parts: &[Part]) -> u32 {
        let head = self.submit(queue, parts);
        self.kick(queue);
        let (used, length) = self.used(queue);
        assert_eq!(used, head);
        length
    }

    /// Waits for the interrupt by which a device says that it needs a reset.
    pub(crate) fn wait_for_needs_reset(&self) {
        while self.status() & status::NEEDS_RESET == 0 {
            assert!(self.recorder.wait(0, DEADLINE), "the device does not mind");
        }
    }

    pub(crate) fn put(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn take(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }
}
