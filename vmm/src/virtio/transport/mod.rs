//! virtio over PCI (virtio 1.2 §4.1), modern only: one BAR with all structures and the MSI-X table.
//!
//! Owns the registers, the eventfds by which the driver notifies, and the device. Never reads a queue:
//! it checks how a queue is set up and gives it to the device.
//!
//! ```text
//! BAR 0, 32 KiB   0x0000 common configuration   0x1000 ISR           0x2000 device configuration
//!                 0x3000 notifications          0x4000 MSI-X table   0x5000 pending bits
//! ```

mod interrupt;
mod registers;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use interrupt::{Interrupt, NO_VECTOR, status};
use registers::{Effect, Registers};

use super::{Activation, VirtioDevice, Virtqueue, feature};
use crate::device::{Board, Device, DeviceError, SavedDevice};
use crate::eventfd::EventFd;
use crate::interrupt::{IoAddress, IoEvents};
use crate::memory::GuestMemory;
use crate::pci::{
    BarSpec, BarWidth, ConfigSpace, ConfigState, Identity, MSIX_CAPABILITY, Msix, MsixLayout,
    MsixState, PciFunction, SharedFunction,
};
use crate::virtio::block::DiskCopy;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: Range<u64> = 0x0000..registers::LENGTH;
const ISR: Range<u64> = 0x1000..0x1001;
const DEVICE: Range<u64> = 0x2000..0x3000;
const NOTIFY: Range<u64> = 0x3000..0x4000;
const TABLE: Range<u64> = 0x4000..0x5000;
const PENDING: Range<u64> = 0x5000..0x6000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u64 = 4;
/// The most queues that a device can have here: as many as vectors fit the table, less one.
const QUEUES_MAX: usize = 255;

const CAPABILITY_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// How long a vCPU waits in a reset for I/O in flight; after that the status goes on reading as not 0
/// until it is done, which a driver waits for anyway (§4.1.4.3.2).
const RESET_WAIT: Duration = Duration::from_millis(200);
/// How long a pause waits for I/O in flight before it fails.
const PAUSE_WAIT: Duration = Duration::from_secs(10);
const STATE_VERSION: u32 = 1;

/// Where a device stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// The driver has not set DRIVER_OK; there are no queues.
    Idle,
    /// The device works on its queues.
    Active,
    /// It would, but the machine is paused.
    Paused,
    /// The driver reset it and I/O is still in flight.
    Resetting,
}

/// What a snapshot holds of a device and its transport.
#[derive(Serialize, Deserialize)]
struct State {
    config: ConfigState,
    msix: MsixState,
    registers: Registers,
    status: u8,
    isr: u8,
    generation: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    active: bool,
    device: SavedDevice,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    id: String,
    config: ConfigSpace,
    /// Where the capability for access through configuration space lies.
    window: u16,
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    msix_control: u8,
    msix: Arc<Msix>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<Arc<EventFd>>,
    memory: GuestMemory,
    io_events: Arc<dyn IoEvents>,
    /// Where BAR 0 answers.
    base: Option<u64>,
    /// Notification addresses that the kernel watches for us.
    watched: Vec<(usize, IoAddress)>,
    phase: Phase,
}

/// The device as the machine sees it; the bus gets [`VirtioPciDevice::function`].
#[derive(Clone)]
pub struct VirtioPciDevice {
    id: String,
    function: Arc<Mutex<VirtioPci>>,
}

impl VirtioPciDevice {
    /// Puts `device` behind a new transport.
    pub fn new(
        id: &str,
        device: Box<dyn VirtioDevice>,
        board: &Board,
    ) -> Result<Self, DeviceError> {
        let vectors = (device.queue_sizes().len() + 1) as u16;
        let msix = Msix::new(vectors, Arc::clone(&board.msi))
            .map_err(|error| DeviceError::new(id, "set up its interrupts", error))?;
        VirtioPci::new(id, device, msix, board).map(|function| Self::wrap(id, function))
    }

    /// Makes the device as it was saved; `make` builds it from the state of the device itself.
    pub fn restore(
        saved: &SavedDevice,
        board: &Board,
        make: impl FnOnce(&SavedDevice) -> Result<Box<dyn VirtioDevice>, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let id = saved.id.as_str();
        let state: State = saved.unpack(STATE_VERSION)?;
        let device = make(&state.device)?;
        let vectors = (device.queue_sizes().len() + 1) as u16;
        let msix = Msix::restore(&state.msix, vectors, Arc::clone(&board.msi))
            .map_err(|error| DeviceError::new(id, "restore its interrupts", error))?;
        let mut function = VirtioPci::new(id, device, msix, board)?;
        function.load(state)?;
        Ok(Self::wrap(id, function))
    }

    pub fn function(&self) -> SharedFunction {
        self.function.clone()
    }

    /// Why the device was last taken out of service, if it was.
    pub fn last_fault(&self) -> Option<String> {
        self.lock().interrupt.last_fault()
    }

    fn wrap(id: &str, function: VirtioPci) -> Self {
        Self {
            id: id.to_owned(),
            function: Arc::new(Mutex::new(function)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, VirtioPci> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for VirtioPciDevice {
    fn id(&self) -> &str {
        &self.id
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.lock().pause(PAUSE_WAIT)
    }

    fn pause_within(&self, longest: Duration) -> Result<(), DeviceError> {
        self.lock().pause(longest.min(PAUSE_WAIT))
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.lock().resume();
        Ok(())
    }

    fn writes_unseen(&self) -> bool {
        self.lock().device.writes_unseen()
    }

    fn write_here(&self, here: bool) {
        self.lock().device.write_here(here);
    }

    fn announce(&self) {
        self.lock().device.announce();
    }

    fn settle(&self) -> Result<(), DeviceError> {
        self.lock().device.settle()
    }

    fn disk(&self) -> Option<DiskCopy> {
        self.lock().device.disk()
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut function = self.lock();
        function.pause(PAUSE_WAIT)?;
        function.finish_reset();
        function.device.power_on();
        function.msix.reset();
        function.config.reset();
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        let function = self.lock();
        SavedDevice::pack(&self.id, STATE_VERSION, &function.state()?)
    }
}

impl VirtioPci {
    fn new(
        id: &str,
        device: Box<dyn VirtioDevice>,
        msix: Msix,
        board: &Board,
    ) -> Result<Self, DeviceError> {
        let sizes = device.queue_sizes();
        if sizes.len() > QUEUES_MAX || sizes.iter().any(|size| !size.is_power_of_two()) {
            let detail = format!("queues of {sizes:?} entries");
            return Err(DeviceError::new(id, "set up its queues", detail));
        }
        let kicks = (sizes.iter())
            .map(|_| EventFd::new().map(Arc::new))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| DeviceError::new(id, "make its notifications", error))?;
        let (config, window, msix_control) = config_space(device.as_ref(), &msix)
            .ok_or_else(|| DeviceError::new(id, "lay out its configuration space", "no room"))?;
        let msix = Arc::new(msix);
        Ok(Self {
            id: id.to_owned(),
            config,
            window,
            msix_control,
            registers: Registers::new(offered(device.as_ref()), sizes),
            interrupt: Arc::new(Interrupt::new(id, Arc::clone(&msix), kicks.len())),
            device,
            msix,
            kicks,
            memory: board.memory.clone(),
            io_events: Arc::clone(&board.io_events),
            base: None,
            watched: Vec::new(),
            phase: Phase::Idle,
        })
    }

    fn load(&mut self, state: State) -> Result<(), DeviceError> {
        let wrong = |detail: &str| DeviceError::new(&self.id, "restore its registers", detail);
        let (features, sizes) = (offered(self.device.as_ref()), self.device.queue_sizes());
        if state.queue_vectors.len() != sizes.len() {
            return Err(wrong("the number of queues differs"));
        }
        self.registers = (state.registers.restore(features, sizes))
            .ok_or_else(|| wrong("the driver uses features or queues that the device lacks"))?;
        self.config.load(&state.config);
        self.interrupt.status.store(state.status, Ordering::Release);
        self.interrupt
            .generation
            .store(state.generation, Ordering::Release);
        self.interrupt.set_isr(state.isr);
        self.interrupt.set_config_vector(state.config_vector);
        for (index, vector) in state.queue_vectors.iter().enumerate() {
            self.interrupt.set_queue_vector(index, *vector);
        }
        self.phase = if state.active {
            Phase::Paused
        } else {
            Phase::Idle
        };
        Ok(())
    }

    fn state(&self) -> Result<State, DeviceError> {
        if matches!(self.phase, Phase::Active | Phase::Resetting) {
            return Err(DeviceError::new(
                &self.id,
                "save its state",
                "it is not at rest",
            ));
        }
        let queues = self.kicks.len();
        Ok(State {
            config: self.config.save(),
            msix: self.msix.save(),
            registers: self.registers.clone(),
            status: self.status(),
            isr: self.interrupt.isr(),
            generation: self.interrupt.generation.load(Ordering::Acquire),
            config_vector: self.interrupt.vector_of_config(),
            queue_vectors: (0..queues)
                .map(|index| self.interrupt.vector_of_queue(index))
                .collect(),
            active: self.phase == Phase::Paused,
            device: self.device.save()?,
        })
    }

    fn status(&self) -> u8 {
        self.interrupt.status.load(Ordering::Acquire)
    }

    fn pause(&mut self, within: Duration) -> Result<(), DeviceError> {
        match self.phase {
            Phase::Active => {
                self.take_queues(within)?;
                self.phase = Phase::Paused;
            }
            Phase::Resetting => {
                self.take_queues(within)?;
                self.finish_reset();
            }
            Phase::Idle | Phase::Paused => {}
        }
        Ok(())
    }

    fn resume(&mut self) {
        if self.phase == Phase::Paused {
            self.start();
        }
    }

    /// Gives the enabled queues to the device; if one cannot be used, the driver hears of it.
    fn start(&mut self) {
        let mut queues = Vec::new();
        for (index, state) in self.registers.queues.iter().enumerate() {
            if !state.enabled {
                continue;
            }
            let queue = Virtqueue::new(
                index as u16,
                state,
                self.registers.max_size(index),
                self.registers.driver_features,
                &self.memory,
                Arc::clone(&self.kicks[index]),
                Arc::clone(&self.interrupt),
            );
            match queue {
                Ok(mut queue) => {
                    if self.device.lends_interrupts() {
                        queue.lend_interrupt();
                    }
                    queues.push(queue);
                }
                Err(fault) => {
                    self.phase = Phase::Idle;
                    self.interrupt
                        .needs_reset(format_args!("queue {index}: {fault}"));
                    return;
                }
            }
        }
        let features = self.registers.driver_features;
        match self.device.activate(Activation { features, queues }) {
            Ok(()) => {
                self.phase = Phase::Active;
                if self.watched.is_empty() {
                    self.watch();
                }
            }
            Err(error) => {
                self.phase = Phase::Idle;
                let source = std::error::Error::source(&error).map(ToString::to_string);
                self.interrupt
                    .needs_reset(format_args!("{error}: {}", source.unwrap_or_default()));
            }
        }
    }

    /// The driver gave a queue another vector: the kernel is to signal that one.
    fn lend_again(&mut self) {
        if self.phase == Phase::Active && self.device.lends_interrupts() {
            match self.pause(RESET_WAIT) {
                Ok(()) => self.resume(),
                Err(error) => tracing::warn!(%error, "a queue keeps its interrupt vector"),
            }
        }
    }

    fn take_queues(&mut self, within: Duration) -> Result<(), DeviceError> {
        for queue in self.device.deactivate(within)? {
            if let Some(state) = self.registers.queues.get_mut(usize::from(queue.index())) {
                (state.next_available, state.next_used) = queue.position();
            }
        }
        Ok(())
    }

    /// The driver wrote 0 to the status.
    fn begin_reset(&mut self, wait: Duration) {
        if matches!(self.phase, Phase::Active | Phase::Resetting) && self.take_queues(wait).is_err()
        {
            self.phase = Phase::Resetting;
            return;
        }
        self.finish_reset();
    }

    fn finish_reset(&mut self) {
        self.unwatch();
        self.device.reset();
        self.registers.reset();
        self.interrupt.reset();
        for kick in &self.kicks {
            kick.take();
        }
        self.phase = Phase::Idle;
    }

    /// Has the kernel turn notifications into signals. Where it refuses, the write comes here.
    fn watch(&mut self) {
        self.unwatch();
        let Some(base) = self.base.filter(|_| self.phase == Phase::Active) else {
            return;
        };
        for index in 0..self.kicks.len() {
            if !self
                .registers
                .queues
                .get(index)
                .is_some_and(|queue| queue.enabled)
            {
                continue;
            }
            let address = IoAddress::Mmio(base + NOTIFY.start + index as u64 * NOTIFY_STEP);
            match self.io_events.bind(address, &self.kicks[index]) {
                Ok(()) => self.watched.push((index, address)),
                Err(error) => tracing::debug!(device = self.id, %error, "notifications will exit"),
            }
        }
    }

    fn unwatch(&mut self) {
        for (index, address) in self.watched.drain(..) {
            if let Err(error) = self.io_events.unbind(address, &self.kicks[index]) {
                tracing::warn!(device = self.id, %error, "a notification address stays watched");
            }
        }
    }

    fn read_structure(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if COMMON.contains(&offset) {
            if self.phase == Phase::Resetting {
                self.begin_reset(Duration::ZERO);
            }
            self.registers
                .read(offset, data, &self.interrupt, self.status());
        } else if ISR.contains(&offset) {
            data[0] = self.interrupt.take_isr();
        } else if DEVICE.contains(&offset) {
            self.device.read_config(offset - DEVICE.start, data);
        } else if TABLE.contains(&offset) {
            self.msix.read_table(offset - TABLE.start, data);
        } else if PENDING.contains(&offset) {
            self.msix.read_pending(offset - PENDING.start, data);
        }
    }

    fn write_structure(&mut self, offset: u64, data: &[u8]) {
        if COMMON.contains(&offset) {
            if self.phase == Phase::Resetting {
                return;
            }
            match self.registers.write(offset, data, &self.interrupt) {
                Effect::None => {}
                Effect::Reset => self.begin_reset(RESET_WAIT),
                Effect::Start => self.start(),
                Effect::Vector => self.lend_again(),
            }
        } else if DEVICE.contains(&offset) {
            self.device.write_config(offset - DEVICE.start, data);
        } else if NOTIFY.contains(&offset) {
            if let Some(kick) = self
                .kicks
                .get(((offset - NOTIFY.start) / NOTIFY_STEP) as usize)
            {
                kick.signal();
            }
        } else if TABLE.contains(&offset) {
            self.msix.write_table(offset - TABLE.start, data);
        }
    }

    /// The access that the window in configuration space asks for, if it is one (§4.1.4.9).
    fn windowed(&self) -> Option<(u64, usize)> {
        let mut capability = [0; 16];
        self.config.read(self.window, &mut capability);
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|step| capability[at + step]));
        let (offset, length) = (u64::from(word(8)), u64::from(word(12)));
        let possible = capability[4] == BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && offset + length <= BAR_SIZE;
        possible.then_some((offset, length as usize))
    }

    fn touches_window(&self, offset: u16, length: usize) -> bool {
        offset < self.window + 20 && usize::from(offset) + length > usize::from(self.window) + 16
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((target, length)) = self.windowed()
        {
            let mut value = [0; 4];
            self.read_structure(target, &mut value[..length]);
            self.config.write(self.window + 16, &value[..length]);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.touches_window(offset, data.len())
            && let Some((target, length)) = self.windowed()
        {
            let mut value = [0; 4];
            self.config.read(self.window + 16, &mut value);
            self.write_structure(target, &value[..length]);
        }
        self.msix.set_control(self.config.word(self.msix_control));
    }

    fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        if !data.is_empty() {
            self.read_structure(offset, data);
        }
    }

    fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        if !data.is_empty() {
            self.write_structure(offset, data);
        }
    }

    fn bar_moved(&mut self, _bar: u8, base: Option<u64>) {
        self.base = base;
        self.watch();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.unwatch();
    }
}

fn offered(device: &dyn VirtioDevice) -> u64 {
    device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC
}

/// The configuration space, with the places of the window capability and of MSI-X's control word.
fn config_space(device: &dyn VirtioDevice, msix: &Msix) -> Option<(ConfigSpace, u16, u8)> {
    let device_type = device.device_type();
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type as u16,
        revision: 1,
        class: device_type.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: DEVICE_BASE + device_type as u16,
    });
    space.add_bar(BarSpec {
        index: BAR,
        width: BarWidth::Bits32,
        prefetchable: false,
        size: BAR_SIZE,
    });
    let multiplier = (NOTIFY_STEP as u32).to_le_bytes();
    let structures = [
        (CFG_COMMON, COMMON, &[][..]),
        (CFG_ISR, ISR, &[][..]),
        (CFG_DEVICE, DEVICE, &[][..]),
        (CFG_NOTIFY, NOTIFY, &multiplier[..]),
    ];
    for (kind, range, extra) in structures {
        let body = capability(kind, &range, extra);
        space.add_capability(CAPABILITY_VENDOR, &body, &[])?;
    }
    let body = capability(CFG_PCI, &(0..0), &[0; 4]);
    let mut writable = [0xff; 18];
    // Length, type, id and padding are fixed; BAR, offset, length and data are the driver's.
    writable[..2].fill(0);
    writable[3..6].fill(0);
    let window = space.add_capability(CAPABILITY_VENDOR, &body, &writable)?;
    let layout = MsixLayout {
        bar: BAR,
        table: TABLE.start as u32,
        pending: PENDING.start as u32,
    };
    let (body, writable) = Msix::capability(msix.vectors(), layout);
    let msix = space.add_capability(MSIX_CAPABILITY, &body, &writable)?;
    Some((space, u16::from(window), msix + 2))
}

/// struct virtio_pci_cap after its first two bytes (§4.1.4).
fn capability(kind: u8, range: &Range<u64>, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + extra.len() as u8, kind, BAR, 0, 0, 0];
    body.extend((range.start as u32).to_le_bytes());
    body.extend(((range.end - range.start) as u32).to_le_bytes());
    body.extend(extra);
    body
}
