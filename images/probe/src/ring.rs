//! A split virtqueue (virtio 1.2 §2.7) for many requests in flight, as the drivers of real guests work
//! it: event indices in both directions, one notification a batch. Each request has a slot, whose
//! descriptors are always the same ones.
//!
//! Owns the rings, not the buffers. (The queues of `virtio-drivers` take one request at a time here,
//! and lose notifications of batches at the wrap of the indices.)

use core::sync::atomic::{Ordering, fence};

use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, Result};

use crate::memory::{self, Registers};
use crate::virtio::PciTransport;

/// Feature bit of event indices (§2.7.7.1).
pub const EVENT_INDEX: u64 = 1 << 29;

const SIZE: u16 = 128;
/// Descriptors of a slot.
const CHAIN: u16 = 3;
/// The most requests in flight.
pub const SLOTS: u16 = SIZE / CHAIN;
const PAGES: usize = 2;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where the rings lie from the descriptors on: behind them, and on a page of its own.
const AVAILABLE: u64 = 16 * SIZE as u64;
const USED: u64 = 4096;
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * SIZE as u64;
const AVAILABLE_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

/// A part of a request: address, bytes, whether the device writes it.
pub type Part = (u64, u32, bool);

/// Memory for rings: taken once, used anew by each driver.
#[derive(Clone, Copy)]
pub struct RingMemory(u64);

impl RingMemory {
    pub fn take() -> Result<Self> {
        let pages = memory::dma_pages(PAGES).ok_or(Error::DmaError)?;
        Ok(Self(pages.as_mut_ptr() as u64))
    }
}

pub struct Ring {
    index: u16,
    memory: Registers,
    event_index: bool,
    available: u16,
    /// Of what the device was last told.
    told: u16,
    used: u16,
    pub kicks: u64,
}

impl Ring {
    /// Sets up queue `index` of a device that was just reset and negotiated with.
    pub fn new(
        transport: &mut PciTransport,
        index: u16,
        place: RingMemory,
        event_index: bool,
    ) -> Result<Self> {
        if transport.max_queue_size(index) < u32::from(SIZE) {
            return Err(Error::InvalidParam);
        }
        let base = place.0;
        let length = (PAGES * virtio_drivers::PAGE_SIZE) as u64;
        let memory = Registers::at(base, length).ok_or(Error::DmaError)?;
        for at in (0..length).step_by(4) {
            memory.write32(at, 0);
        }
        transport.queue_set(index, u32::from(SIZE), base, base + AVAILABLE, base + USED);
        Ok(Self {
            index,
            memory,
            event_index,
            available: 0,
            told: 0,
            used: 0,
            kicks: 0,
        })
    }

    /// Makes a request available; the device is told by [`Ring::kick`].
    pub fn submit(&mut self, slot: u16, parts: [Part; CHAIN as usize]) {
        let head = slot * CHAIN;
        for (step, (address, length, write)) in parts.into_iter().enumerate() {
            let number = head + step as u16;
            let at = u64::from(number) * 16;
            let more = if step + 1 < usize::from(CHAIN) {
                NEXT
            } else {
                0
            };
            self.memory.write64(at, address);
            self.memory.write32(at + 8, length);
            let flags = more | if write { WRITE } else { 0 };
            self.memory.write16(at + 12, flags);
            self.memory.write16(at + 14, number + 1);
        }
        let place = u64::from(self.available % SIZE);
        self.memory.write16(AVAILABLE + 4 + 2 * place, head);
        fence(Ordering::Release);
        self.available = self.available.wrapping_add(1);
        self.memory.write16(AVAILABLE + 2, self.available);
    }

    /// Tells the device about what was submitted since the last time, if it wants that.
    pub fn kick(&mut self, transport: &mut PciTransport) {
        if self.available == self.told {
            return;
        }
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.memory.read16(AVAILABLE_EVENT);
            // vring_need_event (§2.7.10.1).
            self.available.wrapping_sub(event).wrapping_sub(1)
                < self.available.wrapping_sub(self.told)
        } else {
            self.memory.read16(USED) & 1 == 0
        };
        self.told = self.available;
        if wanted {
            self.kicks += 1;
            transport.notify(self.index);
        }
    }

    /// The slot of a request that the device is done with.
    pub fn take(&mut self) -> Option<u16> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let place = u64::from(self.used % SIZE);
        let head = self.memory.read32(USED + 4 + 8 * place);
        self.used = self.used.wrapping_add(1);
        Some(head as u16 / CHAIN)
    }

    pub fn has_used(&self) -> bool {
        self.memory.read16(USED + 2) != self.used
    }

    /// Asks for an interrupt with the next request that is done; true if one is done already.
    pub fn listen(&self) -> bool {
        if self.event_index {
            self.memory.write16(USED_EVENT, self.used);
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts, for a driver that polls.
    pub fn mute(&self) {
        if self.event_index {
            // As far from now as it gets: half way round, and moved before anything comes there.
            let far = self.used.wrapping_add(0x8000);
            self.memory.write16(USED_EVENT, far);
        } else {
            self.memory.write16(AVAILABLE, 1);
        }
    }
}
