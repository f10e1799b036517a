//! virtio-balloon (virtio 1.2 §5.5): memory that the guest can do without goes back to the host.
//!
//! Pages that the driver puts into the balloon and free pages that it reports are punched out of the
//! machine's memory; both read as zero ever after. Owns the size that the host wishes, and what the
//! driver says of itself. It never takes a page by itself, and never touches one that the driver did
//! not name.
//!
//! Lives on the machine's reactor. A chain's work is bounded (a page of numbers, a queue's worth of
//! ranges), and a turn's by [`CHAINS_A_TURN`].

mod statistics;
mod work;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use statistics::BalloonStatistics;
use work::Work;

use super::{Activation, DeviceType, VirtioDevice, Virtqueue};
use crate::config::BalloonConfig;
use crate::device::{Board, DeviceError, SavedDevice};
use crate::memory::GuestMemory;
use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};
use crate::request::{Request, RequestSender};

const QUEUE_SIZE: u16 = 128;
/// Inflate, deflate, statistics, free page hints (never asked for), reporting.
const QUEUES: usize = 5;
/// What the device counts in, whatever memory is made of (§5.5.6).
const PAGE: u64 = 4096;
/// Each may be a call to the kernel for every page that it names, and others wait for the reactor.
const CHAINS_A_TURN: usize = 4;
const STATE_VERSION: u32 = 1;

/// §5.5.3
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const PAGE_POISON: u64 = 1 << 4;
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// What the guest sees and sets: struct virtio_balloon_config (§5.5.4) without free page hints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    /// Pages that the host wishes in the balloon.
    target: u32,
    /// Pages that the driver says are in it.
    actual: u32,
    /// What the driver fills free pages with.
    poison: u32,
}

/// The device.
pub struct Balloon {
    id: String,
    deflate_on_oom: bool,
    reactor: Reactor,
    shared: Arc<Shared>,
    registrations: Vec<Registration>,
}

/// The host's hand on the balloon. Cheap to clone.
#[derive(Clone)]
pub struct BalloonControl {
    shared: Arc<Shared>,
}

/// What is known of a balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonReport {
    /// Bytes that the host wishes in it.
    pub target: u64,
    /// Bytes that the guest says are in it.
    pub actual: u64,
    /// Bytes that the guest has given back, inflating and reporting, since this process began; what it
    /// took again meanwhile included.
    pub given_back: u64,
    /// What the guest last said of its memory; `None` until it has, and where it does not.
    pub statistics: Option<BalloonStatistics>,
}

struct Shared {
    memory: GuestMemory,
    requests: RequestSender,
    work: Mutex<Work>,
}

impl Balloon {
    pub fn new(id: &str, config: &BalloonConfig, board: &Board) -> Self {
        let registers = Registers {
            target: pages(config.bytes),
            ..Registers::default()
        };
        Self::with(id, config, board, registers)
    }

    /// Makes the device from its saved state: its size goes on, its statistics are asked for anew.
    pub fn restore(
        saved: &SavedDevice,
        config: &BalloonConfig,
        board: &Board,
    ) -> Result<Self, DeviceError> {
        let registers = saved.unpack(STATE_VERSION)?;
        Ok(Self::with(&saved.id, config, board, registers))
    }

    fn with(id: &str, config: &BalloonConfig, board: &Board, registers: Registers) -> Self {
        Self {
            id: id.to_owned(),
            deflate_on_oom: config.deflate_on_oom,
            reactor: board.reactor.clone(),
            shared: Arc::new(Shared {
                memory: board.memory.clone(),
                requests: board.requests.clone(),
                work: Mutex::new(Work::new(registers)),
            }),
            registrations: Vec::new(),
        }
    }

    pub fn control(&self) -> BalloonControl {
        BalloonControl {
            shared: self.shared.clone(),
        }
    }
}

impl BalloonControl {
    /// Asks the guest to put `bytes` (whole pages of them) into the balloon, or to take back what is
    /// more. It does so when and as far as it can.
    pub fn set_target(&self, bytes: u64) {
        self.shared.lock().set_target(pages(bytes));
    }

    /// What is known now; asks the guest for fresh statistics, which the next call tells.
    pub fn report(&self) -> BalloonReport {
        let mut work = self.shared.lock();
        work.ask_statistics();
        work.report()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        use feature::{DEFLATE_ON_OOM, PAGE_POISON, PAGE_REPORTING, STATS_VQ};
        let base = STATS_VQ | PAGE_POISON | PAGE_REPORTING;
        base | if self.deflate_on_oom {
            DEFLATE_ON_OOM
        } else {
            0
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.shared.lock().registers.encode();
        for (place, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().map(|start| start + place);
            *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut work = self.shared.lock();
        let mut bytes = work.registers.encode();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(place) = start
            .checked_add(data.len())
            .and_then(|end| bytes.get_mut(start..end))
        {
            place.copy_from_slice(data);
            work.registers.take_driver_fields(&bytes);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { features, queues } = activation;
        let mut work = self.shared.lock();
        for queue in queues {
            let tag = u32::from(queue.index());
            let subscriber = self.shared.clone();
            let registration = (self.reactor)
                .register(queue.kick(), Interest::READ, subscriber, tag)
                .map_err(|error| DeviceError::new(&self.id, "listen for pages", error))?;
            self.registrations.push(registration);
            work.add(queue);
        }
        work.begin(features);
        for index in 0..QUEUES {
            self.shared.serve(&mut work, index);
        }
        Ok(())
    }

    fn deactivate(&mut self, _within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        self.registrations.clear();
        Ok(self.shared.lock().end())
    }

    /// The wish is the host's and stays.
    fn reset(&mut self) {
        self.shared.lock().forget_driver();
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(&self.id, STATE_VERSION, &self.shared.lock().registers)
    }
}

impl Subscriber for Shared {
    fn ready(&self, tag: u32, _ready: Ready) {
        let mut work = self.lock();
        let index = tag as usize;
        work.clear_kick(index);
        self.serve(&mut work, index);
    }
}

impl Shared {
    fn serve(&self, work: &mut Work, index: usize) {
        work.serve(index, &self.memory);
        if self.memory.wants_room() {
            self.requests.send(Request::MemoryWantsRoom);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    /// num_pages, actual, free_page_hint_cmd_id (stop), poison_val.
    fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.target.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.actual.to_le_bytes());
        bytes[12..].copy_from_slice(&self.poison.to_le_bytes());
        bytes
    }

    fn take_driver_fields(&mut self, bytes: &[u8; 16]) {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|step| bytes[at + step]));
        (self.actual, self.poison) = (word(4), word(12));
    }

    /// Reported pages are lost, which a driver that fills its free pages with something else than
    /// zeros must not be made to notice (§5.5.6.7.2).
    fn may_lose_reported(&self, features: u64) -> bool {
        features & feature::PAGE_REPORTING != 0 && !reports_poison(features, self.poison)
    }
}

fn reports_poison(features: u64, poison: u32) -> bool {
    features & feature::PAGE_POISON != 0 && poison != 0
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
