//! virtio-mem (virtio 1.2 §5.15): memory that the guest plugs and unplugs in blocks, as much as the host
//! wishes.
//!
//! Owns what the host wishes (`requested_size`) and where blocks may be plugged (`usable_region_size`);
//! which are plugged, and what is behind them, is [`HotMemory`]'s. It never plugs or unplugs by itself but
//! at a reset of the machine, after which nothing is plugged until the driver asks. A block that is not
//! plugged can be read, as zeros, so that older drivers, which do, need not be refused.
//!
//! Lives on the machine's reactor; a request is carried out in pieces of [`BLOCKS_A_TURN`].

mod work;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::work::Work;
use super::{Activation, DeviceType, VirtioDevice, Virtqueue};
use crate::config::{HOT_BLOCK, HotMemoryConfig};
use crate::device::{Board, DeviceError, SavedDevice};
use crate::memory::{Blocks, HotMemory};
use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};
use crate::request::{Request, RequestSender};

const QUEUE_SIZE: u16 = 64;
const STATE_VERSION: u32 = 1;
/// Each may be a call to the kernel that takes milliseconds, and others wait for the reactor.
const BLOCKS_A_TURN: u64 = 128;
const CHAINS_A_TURN: usize = 16;
/// Beyond what is requested, so that a driver which adds memory in large pieces finds whole ones.
const USABLE_EXTENT: u64 = 2 << 30;

/// struct virtio_mem_config (§5.15.4), bytes.
const CONFIG_LENGTH: usize = 56;

/// The device.
pub struct Mem {
    id: String,
    reactor: Reactor,
    shared: Arc<Shared>,
    registration: Option<Registration>,
}

/// The host's hand on it. Cheap to clone.
#[derive(Clone)]
pub struct MemControl {
    shared: Arc<Shared>,
}

struct Shared {
    memory: Arc<HotMemory>,
    work: Mutex<Work>,
    requests: RequestSender,
}

#[derive(Serialize, Deserialize)]
struct State {
    requested: u64,
    usable: u64,
    plugged: Vec<Blocks>,
}

impl Mem {
    pub fn new(id: &str, config: &HotMemoryConfig, board: &Board) -> Result<Self, DeviceError> {
        Self::with(id, board, |memory| {
            Work::new(config.bytes, usable(config.bytes, memory))
        })
    }

    /// Makes the device from its saved state; its memory has the content that it had.
    pub fn restore(saved: &SavedDevice, board: &Board) -> Result<Self, DeviceError> {
        let state: State = saved.unpack(STATE_VERSION)?;
        let device = Self::with(&saved.id, board, |memory| {
            Work::new(state.requested, state.usable.min(memory.window().size))
        })?;
        (device.shared.memory.plug_again(&state.plugged))
            .map_err(|error| DeviceError::new(&saved.id, "plug what was plugged", error))?;
        device.shared.lock().plugged = device.shared.memory.plugged_bytes();
        Ok(device)
    }

    fn with(
        id: &str,
        board: &Board,
        work: impl FnOnce(&HotMemory) -> Work,
    ) -> Result<Self, DeviceError> {
        let memory = board.memory.hot().cloned();
        let memory =
            memory.ok_or_else(|| DeviceError::new(id, "find its region", "there is none"))?;
        let work = Mutex::new(work(&memory));
        Ok(Self {
            id: id.to_owned(),
            reactor: board.reactor.clone(),
            shared: Arc::new(Shared {
                memory,
                work,
                requests: board.requests.clone(),
            }),
            registration: None,
        })
    }

    pub fn control(&self) -> MemControl {
        MemControl {
            shared: self.shared.clone(),
        }
    }
}

impl MemControl {
    /// Wishes so many bytes plugged: whole blocks, no more than there can be.
    pub fn set_requested(&self, bytes: u64) {
        let usable = usable(bytes, &self.shared.memory);
        self.shared.lock().set_requested(bytes, usable);
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.shared.memory.plugged_bytes()
    }

    /// The same, for who was told that it has changed.
    pub fn take_changed(&self) -> u64 {
        self.shared.lock().told = false;
        self.plugged()
    }
}

/// Where a driver may plug blocks when so much is requested.
fn usable(requested: u64, memory: &HotMemory) -> u64 {
    match requested {
        0 => 0,
        bytes => bytes
            .saturating_add(USABLE_EXTENT)
            .min(memory.window().size),
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    /// None: no host node is told (VIRTIO_MEM_F_ACPI_PXM), and what is unplugged can be read.
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.shared.config_space();
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64) as usize;
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Some(queue) = activation.queues.into_iter().next() else {
            return Ok(());
        };
        let registration = (self.reactor)
            .register(queue.kick(), Interest::READ, self.shared.clone(), 0)
            .map_err(|error| DeviceError::new(&self.id, "listen for requests", error))?;
        self.registration = Some(registration);
        // What waits in it the reactor looks at: this is a vCPU's thread.
        queue.kick_again();
        self.shared.lock().begin(queue);
        Ok(())
    }

    fn deactivate(&mut self, _within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        self.registration = None;
        let mut work = self.shared.lock();
        let queue = work.end(&self.shared.memory);
        self.shared.tell(&mut work);
        Ok(queue.into_iter().collect())
    }

    /// A reset by the driver leaves plugged what is plugged (§5.15.5): this one is of the machine.
    fn power_on(&mut self) {
        let shared = &self.shared;
        let mut work = shared.lock();
        if let Err(error) = shared.memory.unplug(shared.memory.all()) {
            // The guest finds it plugged, and asks for it to be unplugged.
            tracing::warn!(%error, "hot memory stays plugged over a reset");
        }
        let usable = usable(work.requested, &shared.memory);
        work.shrink(usable);
        shared.tell(&mut work);
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        let work = self.shared.lock();
        let state = State {
            requested: work.requested,
            usable: work.usable,
            plugged: self.shared.memory.plugged(),
        };
        SavedDevice::pack(&self.id, STATE_VERSION, &state)
    }
}

impl Subscriber for Shared {
    fn ready(&self, _tag: u32, _ready: Ready) {
        let mut work = self.lock();
        work.clear_kick();
        self.serve(&mut work);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, work: &mut Work) {
        work.serve(&self.memory);
        self.tell(work);
    }

    /// Tells the owner, once until it looks, that what is plugged has changed.
    fn tell(&self, work: &mut Work) {
        let plugged = self.memory.plugged_bytes();
        let changed = std::mem::replace(&mut work.plugged, plugged) != plugged;
        if changed && !std::mem::replace(&mut work.told, true) {
            self.requests.send(Request::HotMemoryChanged);
        }
    }

    fn config_space(&self) -> [u8; CONFIG_LENGTH] {
        let work = self.lock();
        let window = self.memory.window();
        let fields = [
            (0, HOT_BLOCK),
            (16, window.base),
            (24, window.size),
            (32, work.usable),
            (40, work.plugged),
            (48, work.requested),
        ];
        let mut space = [0; CONFIG_LENGTH];
        for (at, value) in fields {
            space[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        space
    }
}

#[cfg(test)]
mod tests;
