//! virtio-vsock (virtio 1.2 §5.10): streams between the guest and programs of the host.
//!
//! The host's end is one listening Unix socket, handed over as a descriptor. Who connects to it says
//! whether he wants a port of the guest or waits for the guest to connect ([`visitor`]); the guest sees
//! context id 2, and reaches nobody who has not come by himself. Owns the device's configuration and one
//! thread ([`worker`]), which lets them in ([`door`]) and holds the connections ([`connection`]).
//!
//! Connections do not travel: a guest that is restored elsewhere is told that they are gone
//! (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET). A pause leaves them as they are.

mod connection;
mod door;
mod packet;
mod visitor;
mod worker;

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use self::worker::{Command, Worker};
use super::queue::Virtqueue;
use super::{Activation, DeviceType, VirtioDevice};
use crate::config::VsockConfig;
use crate::device::{DeviceError, SavedDevice};
use crate::eventfd::EventFd;
use crate::thread::{ThreadKind, Threads};

const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 3;
const STATE_VERSION: u32 = 1;
/// How long a guest that goes on elsewhere may take to hear that its connections are gone, before it gets
/// packets of others.
const NEWS_PATIENCE: Duration = Duration::from_secs(2);

/// The device.
pub struct Vsock {
    id: String,
    cid: u32,
    commands: Sender<Command>,
    bell: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Vsock {
    /// A device whose host programs come to `listener`, a listening stream socket.
    pub fn new(
        id: &str,
        config: &VsockConfig,
        listener: OwnedFd,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        Self::open(id, config, listener, None, threads)
    }

    /// Makes the device for a guest that had one elsewhere, of which nothing is kept.
    pub fn restore(
        saved: &SavedDevice,
        config: &VsockConfig,
        listener: OwnedFd,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        saved.unpack::<()>(STATE_VERSION)?;
        Self::open(&saved.id, config, listener, Some(NEWS_PATIENCE), threads)
    }

    fn open(
        id: &str,
        config: &VsockConfig,
        listener: OwnedFd,
        moved: Option<Duration>,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        let failed = |error| DeviceError::new(id, "start its thread", error);
        let (commands, receiver) = channel();
        let bell = EventFd::new().map_err(failed)?;
        let heard = bell.try_clone().map_err(failed)?;
        let worker = Worker::new(config.cid, listener, moved, receiver, heard)
            .map_err(|error| DeviceError::new(id, "listen at its socket", error))?;
        let thread = threads.spawn(ThreadKind::Vsock, id, move || worker, Worker::run);
        Ok(Self {
            id: id.to_owned(),
            cid: config.cid,
            commands,
            bell,
            thread: Some(thread.map_err(failed)?),
        })
    }

    fn send(&self, command: Command) -> Result<(), DeviceError> {
        let sent = self.commands.send(command);
        self.bell.signal();
        sent.map_err(|_| DeviceError::new(&self.id, "speak to its thread", "it has ended"))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let cid = u64::from(self.cid).to_le_bytes();
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64) as usize;
            *byte = cid.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.send(Command::Activate(activation.queues))
    }

    fn deactivate(&mut self, _within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        // Nothing is ever in flight: the thread answers at its next turn.
        let (reply, answer) = sync_channel(1);
        self.send(Command::GiveBack(reply))?;
        (answer.recv()).map_err(|error| DeviceError::new(&self.id, "give back its queues", error))
    }

    fn reset(&mut self) {
        // That it has ended the machine has heard.
        let _ = self.send(Command::Reset);
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(&self.id, STATE_VERSION, &())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
