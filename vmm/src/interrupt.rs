//! How devices interrupt the guest and how the guest notifies devices without leaving the kernel.
//!
//! Traits only; KVM's implementation stands in [`crate::kvm`], tests bring their own.

use crate::eventfd::EventFd;
use serde::{Deserialize, Serialize};

/// A pin of the IOAPIC.
pub trait InterruptLine: Send + Sync {
    /// Drives the line. Edge pins fire on the change to high.
    fn set(&self, high: bool);

    /// High and low again: one edge.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A message-signalled interrupt as the guest programmed it (Intel SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// A route from an eventfd to a message; from 24 on, below are the IOAPIC's pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

pub trait MsiController: Send + Sync {
    /// Delivers `message` now, from this thread: one ioctl, no route needed.
    fn send(&self, message: MsiMessage) -> Result<(), InterruptError>;

    /// Takes a free route, for use with an eventfd (irqfd).
    fn allocate(&self) -> Result<Gsi, InterruptError>;

    /// Gives a route back; its eventfd must be unbound.
    fn free(&self, gsi: Gsi);

    /// Points routes at messages; `None` masks: what is signalled meanwhile is lost, so the caller
    /// keeps its own pending bit. Changing many at once costs as much as changing one.
    fn route(&self, routes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError>;

    /// From now on a write to `fd` sends the route's message, without this process.
    fn bind(&self, gsi: Gsi, fd: &EventFd) -> Result<(), InterruptError>;

    fn unbind(&self, gsi: Gsi, fd: &EventFd) -> Result<(), InterruptError>;
}

/// Where the guest writes to notify a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoAddress {
    Port(u16),
    Mmio(u64),
}

/// The kernel turns a guest's write into a write to an eventfd (ioeventfd).
pub trait IoEvents: Send + Sync {
    /// Any write of any width to `address`, whatever its value.
    fn bind(&self, address: IoAddress, fd: &EventFd) -> Result<(), InterruptError>;

    fn unbind(&self, address: IoAddress, fd: &EventFd) -> Result<(), InterruptError>;
}

#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    #[error("no free interrupt route ({limit} in use)")]
    NoFreeRoute { limit: u32 },
    #[error("KVM refused to {action}")]
    Kvm {
        action: &'static str,
        source: std::io::Error,
    },
}
