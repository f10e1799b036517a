//! virtio-net (virtio 1.2 §5.1): a network device on a tap.
//!
//! Owns the device's configuration and a thread for each pair of queues ([`worker`]): packets go
//! straight between guest memory and the tap ([`receive`], [`transmit`], [`frame`]), or the host's kernel
//! moves them without us ([`vhost`]); what the driver wants to receive it says on the control queue
//! ([`control`]), which the kernel does not heed: a filter is a wish (§5.1.6.5.1). When the guest has come here from
//! another host it is said where its address is ([`announce`]). The kernel does checksums
//! and segmentation for both sides, as far as was negotiated. Who may send what from which address is not
//! decided here, but by whoever made the tap.

mod announce;
pub mod backend;
mod control;
mod frame;
mod limit;
mod receive;
mod tap;
mod transmit;
pub mod vhost;
mod worker;

use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{channel, sync_channel};
use std::time::{Duration, Instant};

pub use backend::{NetBackend, Offloads, Wire};
pub use frame::Frame;
pub use tap::Tap;

use self::announce::Announcement;
use self::control::{
    Control, F_CSUM, F_CTRL_GUEST_OFFLOADS, F_CTRL_MAC_ADDR, F_CTRL_RX, F_CTRL_RX_EXTRA, F_CTRL_VQ,
    F_GUEST_ANNOUNCE, F_HOST_ECN, F_HOST_TSO4, F_HOST_TSO6, F_MAC, F_MQ, F_MRG_RXBUF, F_MTU,
    F_STATUS, RECEIVE_OFFLOADS,
};
use self::limit::Limiter;
use self::vhost::{Vhost, VhostError};
use self::worker::{Command, Link, Shared, Worker};
use super::queue::Virtqueue;
use super::{Activation, DeviceType, VirtioDevice};
use crate::config::{NetConfig, NetFiles};
use crate::device::{DeviceError, SavedDevice};
use crate::eventfd::EventFd;
use crate::thread::Threads;
use crate::work::{Running, Work};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
const STATE_VERSION: u32 = 1;
/// Bits of the status in the configuration (§5.1.4).
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
/// Bytes of struct virtio_net_config as far as our features go (§5.1.4).
const CONFIG_LENGTH: usize = 12;

/// The device.
pub struct Net {
    id: String,
    config: NetConfig,
    shared: Arc<Shared>,
    links: Vec<Link>,
    threads: Vec<Running>,
    /// The host's kernel moves the packets.
    in_kernel: bool,
    /// It does not for now: this process does.
    here: bool,
}

impl Net {
    /// A device on what `files` hold, which it duplicates.
    pub fn open(
        id: &str,
        config: &NetConfig,
        files: &NetFiles,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        let mut backends = Vec::new();
        for tap in &files.taps {
            let tap = tap
                .try_clone()
                .map_err(|error| DeviceError::new(id, "duplicate its descriptor", error))?;
            let backend = backend::open(tap, config.queues)
                .map_err(|error| DeviceError::new(id, "use its tap", error))?;
            backends.push(backend);
        }
        // The kernel keeps no rate of ours.
        let fits = config.limit.is_none() && backends.iter().all(|one| one.suits_vhost());
        let kernels = if fits {
            own(id, &files.vhost)
        } else {
            Vec::new()
        };
        Self::with_kernels(id, config, backends, kernels, threads)
    }

    /// A device on any backends, one a pair of queues.
    pub fn new(
        id: &str,
        config: &NetConfig,
        backends: Vec<Box<dyn NetBackend>>,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        Self::with_kernels(id, config, backends, Vec::new(), threads)
    }

    /// The same, whose packets the host's kernel moves: one `Vhost` a pair, or none.
    pub fn with_kernels(
        id: &str,
        config: &NetConfig,
        backends: Vec<Box<dyn NetBackend>>,
        kernels: Vec<Vhost>,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        if backends.is_empty() || backends.len() != usize::from(config.queues) {
            let detail = format!("{} for {} pairs", backends.len(), config.queues);
            return Err(DeviceError::new(id, "match backends and queues", detail));
        }
        let failed = |error| DeviceError::new(id, "start its threads", error);
        let limiter = || Limiter::new(config.limit.as_ref(), Instant::now());
        let shared = Shared::new(Control::new(config.mac), limiter(), limiter());
        let mut net = Self {
            id: id.to_owned(),
            config: config.clone(),
            shared: Arc::new(shared),
            links: Vec::new(),
            threads: Vec::new(),
            in_kernel: !kernels.is_empty(),
            here: false,
        };
        let mut workers = Vec::new();
        let mut kernels = kernels.into_iter();
        for (index, backend) in backends.into_iter().enumerate() {
            let (commands, receiver) = channel();
            let bell = EventFd::new().map_err(failed)?;
            let heard = bell.try_clone().map_err(failed)?;
            let shared = Arc::clone(&net.shared);
            let worker = Worker::new(
                index as u16,
                backend,
                kernels.next(),
                shared,
                receiver,
                heard,
            )
            .map_err(|error| failed(error.into()))?;
            workers.push(worker);
            net.links.push(Link { commands, bell });
        }
        let others = (net.links.iter().skip(1))
            .map(|link| {
                Ok(Link {
                    commands: link.commands.clone(),
                    bell: link.bell.try_clone()?,
                })
            })
            .collect::<Result<Vec<_>, std::io::Error>>()
            .map_err(failed)?;
        if let Some(first) = workers.first_mut() {
            first.lead(others);
        }
        for (index, worker) in workers.into_iter().enumerate() {
            let name = match index {
                0 => id.to_owned(),
                _ => format!("{id}-{index}"),
            };
            let thread = threads.work(Work::Net, &name, move || worker, Worker::run);
            net.threads.push(thread.map_err(failed)?);
        }
        Ok(net)
    }

    /// Makes the device as it was saved, on what `open` or `new` made of this host's backends.
    pub fn restore(saved: &SavedDevice, net: Self) -> Result<Self, DeviceError> {
        let control: Control = saved.unpack(STATE_VERSION)?;
        if !(1..=net.config.queues).contains(&control.pairs) {
            let detail = format!("{} pairs of queues were in use", control.pairs);
            return Err(DeviceError::new(&saved.id, "restore its queues", detail));
        }
        net.shared.set_control(control);
        Ok(net)
    }

    fn config_space(&self) -> [u8; CONFIG_LENGTH] {
        let mut space = [0; CONFIG_LENGTH];
        space[..6].copy_from_slice(&self.shared.control().mac);
        let asked = if self.shared.asks() { ANNOUNCE } else { 0 };
        space[6..8].copy_from_slice(&(LINK_UP | asked).to_le_bytes());
        space[8..10].copy_from_slice(&self.config.queues.to_le_bytes());
        space[10..].copy_from_slice(&self.config.mtu.unwrap_or(0).to_le_bytes());
        space
    }

    fn send(&self, pair: usize, command: Command) -> Result<(), DeviceError> {
        let sent = (self.links.get(pair)).is_some_and(|link| link.send(command));
        let ended = || DeviceError::new(&self.id, "speak to its thread", "it has ended");
        sent.then_some(()).ok_or_else(ended)
    }
}

/// Owns each /dev/vhost-net; none at all if one is refused: then this process moves the packets.
fn own(id: &str, devices: &[File]) -> Vec<Vhost> {
    let open = |device: &File| Vhost::open(device.try_clone().map_err(VhostError::Descriptor)?);
    let owned: Result<Vec<_>, _> = devices.iter().map(open).collect();
    owned.unwrap_or_else(|error: VhostError| {
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        tracing::warn!(device = id, %error, cause, "this process moves the packets");
        Vec::new()
    })
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let sending = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;
        let receiving = RECEIVE_OFFLOADS | F_CTRL_GUEST_OFFLOADS | F_MRG_RXBUF;
        let filter = F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR;
        let mtu = self.config.mtu.map_or(0, |_| F_MTU);
        let several = if self.config.queues > 1 { F_MQ } else { 0 };
        F_MAC | F_STATUS | F_GUEST_ANNOUNCE | sending | receiving | filter | mtu | several
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.config.queues)];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64) as usize;
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }

    fn lends_interrupts(&self) -> bool {
        self.in_kernel
    }

    fn writes_unseen(&self) -> bool {
        self.in_kernel && !self.here
    }

    fn write_here(&mut self, here: bool) {
        if !self.in_kernel || self.here == here {
            return;
        }
        self.here = here;
        for pair in 0..self.links.len() {
            let (done, wait) = sync_channel(1);
            // One that has ended writes nothing any more.
            if self.send(pair, Command::Here(here, done)).is_ok() {
                let _ = wait.recv();
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        let has = |feature| features & feature != 0;
        // Without VIRTIO_NET_F_MQ the control queue follows the first pair (§5.1.2).
        let pairs = if has(F_MQ) { self.links.len() } else { 1 };
        let mut queues: Vec<Option<Virtqueue>> = Vec::new();
        queues.resize_with(2 * pairs + 1, || None);
        for queue in activation.queues {
            let index = usize::from(queue.index());
            // A queue that the driver has no use for is left alone.
            if let Some(place) = queues.get_mut(index) {
                *place = Some(queue);
            }
        }
        let mut control = queues.pop().flatten().filter(|_| has(F_CTRL_VQ));
        let mut queues = queues.into_iter();
        // The pairs that have no queues hear of it too: the kernel should give them no packets.
        for pair in 0..self.links.len() {
            let command = Command::Activate {
                receive: queues.next().flatten(),
                transmit: queues.next().flatten(),
                control: control.take(),
                features,
            };
            self.send(pair, command)?;
        }
        Ok(())
    }

    fn deactivate(&mut self, _within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        // Nothing is ever in flight: each thread answers at its next turn.
        let mut queues = Vec::new();
        for pair in 0..self.links.len() {
            let (reply, answer) = sync_channel(1);
            self.send(pair, Command::GiveBack(reply))?;
            let given = answer
                .recv()
                .map_err(|error| DeviceError::new(&self.id, "give back its queues", error))?;
            queues.extend(given);
        }
        Ok(queues)
    }

    fn announce(&self) {
        let NetConfig { addresses, mtu, .. } = &self.config;
        let announcement = Announcement::new(addresses, *mtu, Instant::now());
        if let Err(error) = self.send(0, Command::Announce(announcement)) {
            tracing::warn!(device = self.id, %error, "nobody is told where it is");
        }
    }

    fn reset(&mut self) {
        self.shared.set_control(Control::new(self.config.mac));
        self.shared.ask(false);
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(&self.id, STATE_VERSION, &*self.shared.control())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for link in &self.links {
            link.send(Command::Stop);
        }
        for thread in self.threads.drain(..) {
            thread.join();
        }
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
