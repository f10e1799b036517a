//! How a device reaches its driver: queue and configuration interrupts, and DEVICE_NEEDS_RESET.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::pci::{Lent, Msix};

/// "No vector" (virtio 1.2 §4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Bits of the status register (§2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Shared by the transport and the threads of its device.
pub struct Interrupt {
    id: String,
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    pub(super) status: AtomicU8,
    pub(super) generation: AtomicU8,
    faults: AtomicU32,
    last_fault: Mutex<Option<String>>,
}

impl Interrupt {
    pub(in crate::virtio) fn new(id: &str, msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            id: id.to_owned(),
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            faults: AtomicU32::new(0),
            last_fault: Mutex::new(None),
        }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn queue(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.raise(vector.load(Ordering::Acquire), ISR_QUEUE);
        }
    }

    /// A queue's vector, for the host's kernel to signal; none if the queue has no vector.
    pub(in crate::virtio) fn lend(&self, index: u16) -> Option<Lent> {
        self.msix.lend(self.vector_of_queue(index.into()))
    }

    /// Tells the driver that the device's configuration changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    /// Takes the device out of service until the driver resets it, with a reason for the log. A guest
    /// can do this as often as it likes: only every power of two is logged.
    pub fn needs_reset(&self, reason: fmt::Arguments<'_>) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        let faults = self.faults.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if faults.is_power_of_two() {
            tracing::warn!(device = self.id, faults, %reason, "the guest misused a device");
        }
        *self
            .last_fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(reason.to_string());
        if before & status::DRIVER_OK != 0 {
            self.config_changed();
        }
    }

    /// Why the device was last taken out of service.
    pub fn last_fault(&self) -> Option<String> {
        self.last_fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn vector_of_config(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn vector_of_queue(&self, index: usize) -> u16 {
        self.queue_vectors
            .get(index)
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// A vector that does not exist becomes [`NO_VECTOR`], which tells the driver (§4.1.5.1.2.1).
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.existing(vector), Ordering::Release);
    }

    pub(super) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(index) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    pub(super) fn set_isr(&self, isr: u8) {
        self.isr.store(isr, Ordering::Release);
    }

    /// As after power-on; the count of faults stays.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn raise(&self, vector: u16, isr: u8) {
        if !self.msix.trigger(vector) {
            // No MSI-X: a driver without interrupts polls this.
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }
}
