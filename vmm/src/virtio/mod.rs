//! virtio 1.2 devices over PCI, modern only.
//!
//! Owns the transport ([`transport`]), the virtqueues ([`queue`]) and the devices ([`block`], [`console`], [`net`],
//! [`rng`], [`balloon`], [`vsock`]). A guest's memory is read as one reads a stranger's: every ring,
//! descriptor and length is checked before use, work and memory for one request are bounded by the queue's size, and a queue
//! that lies takes its device to DEVICE_NEEDS_RESET with a reason (virtio 1.2 §2.1.1), nothing more.
//!
//! A device holds its queues between [`VirtioDevice::activate`] and [`VirtioDevice::deactivate`], which
//! drains it and gives them back. Pause, reset and save are all made of these two.

mod attach;
pub mod balloon;
pub mod block;
mod bucket;
pub mod console;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
#[cfg(test)]
mod hostile;
pub mod mem;
pub mod net;
mod polling;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod transport;
pub mod vsock;

pub use attach::{Attached, HotDevice, Placement, Places, attach, attach_disk, attach_net};
pub use device::{Activation, DeviceType, VirtioDevice};
#[cfg(any(test, feature = "fuzzing"))]
pub use fuzz::fuzz_queue;
pub use queue::{Chain, QueueFault, Segment, Virtqueue};
pub use transport::{VirtioPci, VirtioPciDevice};

/// Feature bits of the transport and the rings (virtio 1.2 §6).
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}
