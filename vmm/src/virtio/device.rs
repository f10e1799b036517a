//! What a virtio device is to its transport.

use std::time::Duration;

use super::block::DiskCopy;
use super::queue::Virtqueue;
use crate::device::{DeviceError, SavedDevice};

/// Device types (virtio 1.2 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Balloon = 5,
    Vsock = 19,
    Memory = 24,
}

impl DeviceType {
    /// PCI base class, subclass and programming interface.
    pub fn pci_class(self) -> [u8; 3] {
        match self {
            DeviceType::Net => [0x02, 0x00, 0],
            DeviceType::Block => [0x01, 0x80, 0],
            DeviceType::Console | DeviceType::Vsock => [0x07, 0x80, 0],
            DeviceType::Entropy | DeviceType::Balloon | DeviceType::Memory => [0xff, 0, 0],
        }
    }
}

/// What a device gets when its driver is ready (DRIVER_OK).
pub struct Activation {
    /// What was negotiated, bits of the transport included.
    pub features: u64,
    /// The queues that the driver enabled; each knows its index.
    pub queues: Vec<Virtqueue>,
}

/// A device behind a transport, which calls it from one thread at a time.
pub trait VirtioDevice: Send {
    fn device_type(&self) -> DeviceType;

    /// Feature bits of the device itself.
    fn features(&self) -> u64;

    /// The greatest size of each queue: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads device configuration; beyond its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Whether the host's kernel works on the queues and interrupts in the device's place: their vectors are
    /// lent then ([`Virtqueue::lent_interrupt`]).
    fn lends_interrupts(&self) -> bool {
        false
    }

    /// As [`crate::device::Device::writes_unseen`].
    fn writes_unseen(&self) -> bool {
        false
    }

    /// As [`crate::device::Device::write_here`].
    fn write_here(&mut self, _here: bool) {}

    /// As [`crate::device::Device::announce`].
    fn announce(&self) {}

    /// As [`crate::device::Device::settle`].
    fn settle(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// For a disk that can be copied while its guest uses it.
    fn disk(&self) -> Option<DiskCopy> {
        None
    }

    /// Starts to work. Whatever waits in the queues is looked at once, kicked or not.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Finishes what is in flight and gives the queues back: afterwards the device touches no guest
    /// memory and interrupts nobody. If that takes longer than `within`, the device works on as before.
    fn deactivate(&mut self, within: Duration) -> Result<Vec<Virtqueue>, DeviceError>;

    /// Forgets what the last driver set. Called without queues.
    fn reset(&mut self) {}

    /// Forgets also what outlives a driver: the machine begins anew. Called without queues, after `reset`.
    fn power_on(&mut self) {}

    /// What the guest could observe beyond queues and transport. Called without queues.
    fn save(&self) -> Result<SavedDevice, DeviceError>;
}
