//! virtio-blk (virtio 1.2 §5.2): a disk on a raw file or block device.
//!
//! Owns the device's configuration and its thread; requests are read in [`request`], run in the worker,
//! pass the filters ([`filter`]) and end in a [`DiskBackend`] ([`uring`], or [`pool`] where the host has
//! no io_uring).

pub mod backend;
mod buffer;
mod copier;
mod copy;
mod file;
pub mod filter;
mod pool;
mod request;
mod uring;
mod worker;

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use backend::{DiskBackend, Geometry};
pub use buffer::Buffer;
pub use copier::{DiskCopier, Finish};
pub use copy::{DiskCopy, DiskLog, DiskTarget};
pub use file::{DiskFile, DiskFileError};
pub use pool::Pool;
pub use uring::Uring;

use self::backend::SECTOR;
use self::copy::Written;
use self::filter::{BlockFilter, Limit, Stack};
use self::request::{DISCARD_SECTORS_MAX, ZEROES_SECTORS_MAX};
use self::worker::{AtRest, Command, Worker};
use super::queue::Virtqueue;
use super::{Activation, DeviceType, VirtioDevice};
use crate::config::DiskConfig;
use crate::device::{DeviceError, SavedDevice};
use crate::eventfd::EventFd;
use crate::thread::Threads;
use crate::work::{Running, Work};

/// Threads that a disk without a ring takes.
pub const THREADS: usize = 1 + pool::THREADS;
const QUEUE_SIZE: u16 = 256;
const STATE_VERSION: u32 = 1;
/// How long a snapshot waits for the disk to become durable.
const SETTLE_WAIT: Duration = Duration::from_secs(30);
/// How much later than its deadline the thread may answer.
const GRACE: Duration = Duration::from_millis(250);
/// How long the end of a disk waits for its thread, which hanging storage may hold for ever.
const END_WAIT: Duration = Duration::from_secs(4);

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Offset of the field `writeback`.
const WRITEBACK: u64 = 32;
/// Bytes of struct virtio_blk_config as far as our features go (§5.2.4).
const CONFIG_LENGTH: usize = 60;

#[derive(Serialize, Deserialize)]
struct State {
    writeback: bool,
}

/// The device.
pub struct Block {
    id: String,
    geometry: Geometry,
    /// What is copied of it; none: it is on storage of another kind.
    file: Option<DiskFile>,
    written: Arc<Written>,
    queues: u16,
    writeback: Arc<AtomicBool>,
    commands: Sender<Command>,
    control: EventFd,
    thread: Option<Running>,
    /// Hangs up when the thread has ended.
    ended: Mutex<Receiver<()>>,
}

impl Block {
    /// A disk on `file`, which was opened as `config` says, by io_uring if the host has it.
    pub fn open(
        id: &str,
        config: &DiskConfig,
        file: File,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        let disk = DiskFile::new(file, config.read_only)
            .map_err(|error| DeviceError::new(id, "use the disk's file", error))?;
        let backend: Box<dyn DiskBackend> = match Uring::new(disk.clone()) {
            Ok(ring) => Box::new(ring),
            Err(error) => {
                tracing::info!(disk = id, %error, "no io_uring: disk I/O goes by threads");
                let pool = Pool::new(disk.clone(), id, threads)
                    .map_err(|error| DeviceError::new(id, "start its threads", error))?;
                Box::new(pool)
            }
        };
        Ok(Self::new(id, config, backend, threads)?.on(disk))
    }

    /// The same by threads, for a disk that comes when no ring can be made any more.
    pub fn open_with_threads(
        id: &str,
        config: &DiskConfig,
        file: File,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        let disk = DiskFile::new(file, config.read_only)
            .map_err(|error| DeviceError::new(id, "use the disk's file", error))?;
        let pool = Pool::new(disk.clone(), id, threads)
            .map_err(|error| DeviceError::new(id, "start its threads", error))?;
        Ok(Self::new(id, config, Box::new(pool), threads)?.on(disk))
    }

    fn on(mut self, disk: DiskFile) -> Self {
        self.file = Some(disk);
        self
    }

    /// A disk on any storage.
    pub fn new(
        id: &str,
        config: &DiskConfig,
        mut backend: Box<dyn DiskBackend>,
        threads: &Threads,
    ) -> Result<Self, DeviceError> {
        let failed = |error| DeviceError::new(id, "start its thread", error);
        let geometry = backend.geometry();
        backend.commit();
        let mut stack = Stack::new(backend);
        if let Some(limit) = &config.limit {
            stack.insert(Box::new(Limit::new(limit, Instant::now())));
        }
        let (commands, receiver) = channel();
        let (ending, ended) = channel::<()>();
        let control = EventFd::new().map_err(failed)?;
        let writeback = Arc::new(AtomicBool::new(true));
        let (heard, shared) = (control.try_clone().map_err(failed)?, Arc::clone(&writeback));
        let written = Arc::<Written>::default();
        let worker = Worker::new(
            stack,
            serial(&config.serial_number),
            receiver,
            heard,
            shared,
            Arc::clone(&written),
        )
        .map_err(|error| failed(error.into()))?;
        let thread = threads
            .work(
                Work::Block,
                id,
                move || (worker, ending),
                |(worker, _ending)| worker.run(),
            )
            .map_err(failed)?;
        Ok(Self {
            id: id.to_owned(),
            geometry,
            file: None,
            written,
            queues: config.queues.max(1),
            writeback,
            commands,
            control,
            thread: Some(thread),
            ended: Mutex::new(ended),
        })
    }

    /// Makes the disk as it was saved, on what `open` or `new` made of this host's storage.
    pub fn restore(saved: &SavedDevice, block: Self) -> Result<Self, DeviceError> {
        let state: State = saved.unpack(STATE_VERSION)?;
        block.writeback.store(state.writeback, Ordering::Release);
        Ok(block)
    }

    /// Puts a filter on top of the others, at a point where nothing is in flight; fails if there is no
    /// such point `within` that time.
    pub fn insert_filter(
        &self,
        filter: Box<dyn BlockFilter>,
        within: Duration,
    ) -> Result<(), DeviceError> {
        self.at_rest("insert a filter", within, |reply| {
            AtRest::Insert(filter, reply)
        })
    }

    /// Takes a filter out again; false if there is none of that name.
    pub fn remove_filter(&self, name: &str, within: Duration) -> Result<bool, DeviceError> {
        self.at_rest("remove a filter", within, |reply| {
            AtRest::Remove(name.to_owned(), reply)
        })
    }

    /// Has the thread come to rest and do something there.
    fn at_rest<T>(
        &self,
        action: &'static str,
        within: Duration,
        make: impl FnOnce(SyncSender<Option<T>>) -> AtRest,
    ) -> Result<T, DeviceError> {
        // No room in between: an answer that nobody waits for any more comes back to the thread.
        let (reply, answer) = sync_channel(0);
        let deadline = Instant::now() + within;
        self.send(
            Command::AtRest {
                deadline,
                action: make(reply),
            },
            action,
        )?;
        // The thread gives up in time, unless the storage holds it in a system call.
        match answer.recv_timeout(within + GRACE) {
            Ok(Some(value)) => Ok(value),
            Ok(None) | Err(RecvTimeoutError::Timeout) => {
                let detail = format!("I/O was still in flight after {within:?}");
                Err(DeviceError::new(&self.id, action, detail))
            }
            Err(error) => Err(DeviceError::new(&self.id, action, error)),
        }
    }

    fn send(&self, command: Command, action: &'static str) -> Result<(), DeviceError> {
        let sent = self.commands.send(command);
        sent.map_err(|_| DeviceError::new(&self.id, action, "its thread has ended"))?;
        self.control.signal();
        Ok(())
    }

    fn config(&self) -> [u8; CONFIG_LENGTH] {
        let mut config = [0; CONFIG_LENGTH];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let physical = self
            .geometry
            .physical_block
            .next_power_of_two()
            .max(SECTOR as u32);
        let blocks = physical / SECTOR as u32;
        put(0, &(self.geometry.capacity / SECTOR).to_le_bytes());
        // Header and status take a descriptor each.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[blocks.trailing_zeros() as u8, 0]);
        put(26, &(blocks as u16).to_le_bytes());
        put(
            WRITEBACK as usize,
            &[u8::from(self.writeback.load(Ordering::Acquire))],
        );
        put(34, &self.queues.to_le_bytes());
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &blocks.to_le_bytes());
        put(48, &ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE;
        let access = if self.geometry.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        common | access | if self.queues > 1 { F_MQ } else { 0 }
    }

    fn settle(&self) -> Result<(), DeviceError> {
        self.at_rest("make the disk durable", SETTLE_WAIT, AtRest::Settle)?
            .map_err(|error| DeviceError::new(&self.id, "make the disk durable", error))
    }

    fn disk(&self) -> Option<DiskCopy> {
        let file = self.file.clone()?;
        Some(DiskCopy::new(file, Arc::clone(&self.written)))
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64) as usize;
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [writeback]) = (offset, data) {
            self.writeback.store(*writeback != 0, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // A driver that does not know flushes believes that what is written is durable (§5.2.6.2).
        let write_through = activation.features & F_FLUSH == 0;
        let queues = activation.queues;
        self.send(
            Command::Activate {
                queues,
                write_through,
            },
            "start on its queues",
        )
    }

    fn deactivate(&mut self, within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        self.at_rest("finish its I/O", within, AtRest::GiveBack)
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Release);
    }

    /// Also makes the disk durable and empties the host's cache of it, so that another host can go on
    /// from what the storage holds; not one that is copied, whose copy is made durable instead.
    fn save(&self) -> Result<SavedDevice, DeviceError> {
        if !self.written.is_kept() {
            self.settle()?;
        }
        let state = State {
            writeback: self.writeback.load(Ordering::Acquire),
        };
        SavedDevice::pack(&self.id, STATE_VERSION, &state)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop, "stop");
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let ended = ended.recv_timeout(END_WAIT);
        if let (Some(thread), Err(RecvTimeoutError::Disconnected)) = (self.thread.take(), ended) {
            thread.join();
        }
    }
}

/// The serial number as the guest reads it: zero-padded (§5.2.6).
fn serial(text: &str) -> [u8; 20] {
    let mut serial = [0; 20];
    for (slot, byte) in serial.iter_mut().zip(text.bytes()) {
        *slot = byte;
    }
    serial
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod measure;
