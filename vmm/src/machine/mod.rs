//! The machine: one owner, one state machine.
//!
//! [`Machine`] is owned by value, so nobody else can touch it while its owner pauses, saves or ends
//! it. Devices and vCPUs send requests ([`crate::request`]); the owner calls [`Machine::next_event`]
//! whenever [`Machine::event_fd`] is readable, which carries them out and says what happened.
//!
//! It calls `virtio::attach(&MachineConfig, &MachineFiles, &Board) ->
//! Result<Vec<Arc<dyn Device>>, DeviceError>` for all that stands behind PCI, duplicating what it
//! keeps of the files: a reset does not attach again but calls `Device::reset`.

mod build;
mod clocks;
mod disk_copy;
mod event;
mod feeding;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
#[cfg(test)]
mod golden;
mod handover;
mod hotplug;
mod receive;
mod send;
mod snapshot;
mod state;
mod vcpus;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::board::{
    BootVerdict, EVENT_GENERATION, PciSlots, PowerPort, Processors, PvPanic, generation,
};
use crate::boot::disk::BootDisk;
use crate::boot::{BootError, Fallback, Inspected};
use crate::config::{MachineConfig, MachineFiles, WatchdogAction};
use crate::cpu::{VcpuError, VcpuSet, VcpuSetError};
use crate::device::{Board, Device, DeviceError};
use crate::kvm::{KvmError, Vm};
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::reactor::ReactorThread;
use crate::request::{Request, RequestReceiver, VcpuReport};
use crate::thread::ThreadHook;
use crate::virtio::Places;
use crate::virtio::balloon::{BalloonControl, BalloonReport};
use crate::virtio::mem::MemControl;
use crate::work::Spawner;

use vcpus::UsedVcpus;

pub use crate::stream::snapshot::Compression;
pub use build::BuildError;
pub use disk_copy::{DiskCopyError, DiskCopyPolicy, DiskCopyReport, DiskCopying};
pub use event::{Event, Registers, RunState, StopReason};
pub use feeding::Feeder;
#[cfg(any(test, feature = "fuzzing"))]
pub use fuzz::fuzz_receive;
pub use handover::{
    Handed, Handing, HostFiles, Inheritance, Step as HandingStep, now as monotonic, take_over,
};
pub use receive::{Arrived, Landing, ReceiveReport, receive, receive_by};
pub use send::{
    Luggage, MigrationError, Offered, Paid, Pause, Paying, Progress, SendReport, Sender, Sending,
    SentRound, Unsent,
};
pub use snapshot::{Loading, Round, Scope, SnapshotError, SnapshotOptions, SnapshotReport};
pub use state::MachineState;

/// How long a guest stands still that has asked for something which needs that: few programs notice.
const MOMENT: Duration = Duration::from_millis(20);

/// One virtual machine of this process. Dropping it ends it.
pub struct Machine {
    // The order is that of dropping: who runs first, what they use last.
    at_end: feeding::AtEnd,
    vcpus: VcpuSet,
    _reactor: ReactorThread,
    devices: Vec<Arc<dyn Device>>,
    power: Arc<PowerPort>,
    panic: Option<Arc<PvPanic>>,
    verdict: Option<Arc<BootVerdict>>,
    balloon: Option<BalloonControl>,
    hot_memory: Option<MemControl>,
    receiver: RequestReceiver,
    state: RunState,
    /// Requests that were taken from the queue and not carried out yet.
    pending: VecDeque<Request>,
    /// Events that are known and not told yet.
    announced: VecDeque<Event>,
    config: MachineConfig,
    files: MachineFiles,
    kernel: Kernel,
    /// That it runs was said, and nothing else since.
    told_running: bool,
    /// Memory holds what the first vCPU begins with.
    loaded: bool,
    /// Nobody outside knows yet that its guest is here: told when it runs.
    is_new_here: bool,
    memory: GuestMemory,
    layout: Layout,
    _spawner: Option<Spawner>,
    board: Board,
    slots: Arc<PciSlots>,
    /// Of a machine whose vCPUs come and go.
    processors: Option<Arc<Processors>>,
    used: UsedVcpus,
    places: Places,
    /// What was written since a snapshot that another can be laid over.
    ledger: Option<snapshot::Ledger>,
    /// Memory that comes, or came, after the guest.
    feeding: Option<Arc<feeding::Feeding>>,
    /// All of memory is here, and what was postponed until then was begun.
    whole: bool,
    /// What is done then, in this order.
    postponed: VecDeque<Request>,
    vm: Arc<Vm>,
}

/// What a machine boots.
enum Kernel {
    /// The descriptors in its files.
    Files(Inspected),
    Disk {
        disk: BootDisk,
        fallback: Option<Fallback>,
    },
}

/// Why a machine could not be started, paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("the machine is {state:?}: it cannot be {action}")]
    WrongState {
        state: RunState,
        action: &'static str,
    },
    #[error(transparent)]
    Vcpus(#[from] VcpuSetError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("write the SMBIOS tables to guest memory")]
    Identity(#[source] vm_memory::GuestMemoryError),
    #[error(transparent)]
    Generation(#[from] crate::board::generation::GenerationError),
    #[error("this machine has no disk or network {id}")]
    NoSuchDevice { id: String },
    #[error("{id} is the disk that the machine boots from: it stays")]
    BootDisk { id: String },
    #[error("some of the machine's memory is elsewhere still: it cannot be {action}")]
    Arriving { action: &'static str },
    #[error("none of the machine's memory is elsewhere")]
    Fed,
    #[error("this machine has no balloon")]
    NoBalloon,
    #[error(
        "this machine's vCPUs stay as many as they are: it was made without a maximum of its own"
    )]
    FixedVcpus,
    #[error("this machine has no hot memory")]
    NoHotMemory,
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error("duplicate a descriptor of the machine's")]
    Descriptor(#[source] std::io::Error),
}

impl Machine {
    /// Makes a machine, ready to start. Afterwards all its threads exist and have run `hook`, and all
    /// descriptors and rings are open: the process can be locked down.
    pub fn build(
        config: MachineConfig,
        files: MachineFiles,
        hook: Option<ThreadHook>,
    ) -> Result<Machine, BuildError> {
        build::build(config, files, hook)
    }

    /// Makes a machine that goes on, at `resume`, where [`Machine::save`] found another; `memory` is
    /// what the other's memory was (the descriptor itself, or a copy of the same size).
    pub fn restore(
        saved: MachineState,
        memory: File,
        files: MachineFiles,
        hook: Option<ThreadHook>,
    ) -> Result<Machine, BuildError> {
        build::check(&saved)?;
        let (config, hot) = (&saved.config.memory, saved.config.hot_memory.as_ref());
        let memory = GuestMemory::map(memory, config, hot)?;
        build::restore(saved, memory, files, hook)
    }

    /// All that a paused machine is, but its memory and descriptors. Its memory's descriptor is all of that: what was
    /// still a snapshot's file is read now.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        self.expect(RunState::Paused, "saved")?;
        self.expect_whole("saved")?;
        self.memory.settle()?;
        Ok(self.saved()?.1)
    }

    /// The same, with memory as it is; when the guest's clocks were read, by [`clocks::now`].
    fn saved(&self) -> Result<(Duration, MachineState), MachineError> {
        self.expect(RunState::Paused, "saved")?;
        let devices: Result<_, _> = self.devices.iter().map(|device| device.save()).collect();
        let read = clocks::now();
        let clock = self.vm.clock()?;
        let state = MachineState {
            version: state::STATE_VERSION,
            config: self.config.clone(),
            placement: self.places.placement().clone(),
            clock,
            vcpus: self.vcpus.save()?,
            devices: devices?,
        };
        Ok((read, state))
    }

    pub fn state(&self) -> RunState {
        self.state
    }

    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Percent of the time that vCPUs are kept out of the guest, which is being sent or written to a snapshot and was not
    /// caught up with.
    pub fn throttled(&self) -> u8 {
        self.vcpus.throttled()
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Lets the guest run for the first time. A machine that boots from a disk reads it now; if there is
    /// nothing to boot on it, it can be tried again.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.expect(RunState::Ready, "started")?;
        if !self.loaded {
            let loaded = self.load();
            let powered = loaded.and_then(|boot| Ok(self.vcpus.power_on(boot)?));
            if let Err(error) = powered {
                // The next start finds memory as the first one did.
                self.memory.clear()?;
                return Err(error);
            }
            self.loaded = true;
        }
        self.run()
    }

    /// Stops the guest where it is, devices and all; it knows nothing of it but the clock. If it fails
    /// because of a device, the guest runs on; if a vCPU cannot be stopped, the machine ends. While some of its memory
    /// is elsewhere it runs on, too: it may be waiting for that.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.expect(RunState::Running, "paused")?;
        self.expect_whole("paused")?;
        if let Err(error) = self.rest() {
            self.run_on(&error);
            return Err(error);
        }
        self.state = RunState::Paused;
        self.told_running = false;
        self.announce(Event::Paused);
        Ok(())
    }

    /// Goes on after `pause`.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.expect(RunState::Paused, "resumed")?;
        self.run()
    }

    /// Pauses until the guard is dropped.
    pub fn pause_guard(&mut self) -> Result<PauseGuard<'_>, MachineError> {
        self.pause()?;
        Ok(PauseGuard { machine: self })
    }

    /// Asks the guest to power itself off, as far as it listens (ACPI power button).
    pub fn press_power_button(&self) {
        self.power.press_button();
    }

    /// Tells the guest that it is not the one it was: call it on a paused machine that was restored
    /// from a snapshot, before it goes on. A migration is no occasion.
    pub fn change_generation(&mut self) -> Result<(), MachineError> {
        self.expect(RunState::Paused, "given a new generation id")?;
        generation::write(&self.memory)?;
        self.power.raise(EVENT_GENERATION);
        Ok(())
    }

    /// Wishes `bytes` of the guest's memory in its balloon; it gives them as it can. What a machine
    /// that is saved was last told goes on where it is restored.
    pub fn set_balloon(&mut self, bytes: u64) -> Result<(), MachineError> {
        let balloon = self.balloon.as_ref().ok_or(MachineError::NoBalloon)?;
        self.config.check_balloon(bytes)?;
        balloon.set_target(bytes);
        if let Some(config) = &mut self.config.balloon {
            config.bytes = bytes;
        }
        Ok(())
    }

    /// What is known of the balloon and of the guest's own view of its memory; asks the guest for
    /// fresh statistics, which the next call tells. `None`: there is no balloon.
    pub fn balloon_stats(&self) -> Option<BalloonReport> {
        self.balloon.as_ref().map(BalloonControl::report)
    }

    /// Wishes `bytes` of hot memory plugged, in whole blocks of [`crate::config::HOT_BLOCK`]; the guest plugs
    /// and unplugs as it can, which [`Event::HotMemory`] tells.
    pub fn set_hot_memory(&mut self, bytes: u64) -> Result<(), MachineError> {
        let control = self.hot_memory.as_ref();
        let control = control.ok_or(MachineError::NoHotMemory)?;
        if let Some(config) = &mut self.config.hot_memory {
            config.check_bytes(bytes)?;
            config.bytes = bytes;
        }
        control.set_requested(bytes);
        Ok(())
    }

    /// Bytes of hot memory that are plugged; `None`: there can be none.
    pub fn hot_memory(&self) -> Option<u64> {
        self.hot_memory.as_ref().map(MemControl::plugged)
    }

    fn hot_memory_changed(&mut self) {
        if let Some(plugged) = self.hot_memory.as_ref().map(MemControl::take_changed) {
            self.announce(Event::HotMemory { plugged });
        }
    }

    /// Ends the machine; the guest is not asked.
    pub fn stop(&mut self) {
        self.end(StopReason::Requested);
    }

    /// Readable while `next_event` has something to do or to tell.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.receiver.as_fd()
    }

    /// Carries out what guest and devices have asked for, until there is an event to tell. Never
    /// waits for the guest.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.announced.pop_front() {
                return Some(event);
            }
            let request = match self.pending.pop_front() {
                Some(request) => request,
                None => self.receiver.try_next()?,
            };
            self.carry_out(request);
        }
    }

    /// Like `next_event`, but waits for one up to `patience`.
    pub fn wait_event(&mut self, patience: Duration) -> Option<Event> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(event) = self.next_event() {
                return Some(event);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let left = Timespec::try_from(left).ok();
            let mut fds = [PollFd::from_borrowed_fd(
                self.receiver.as_fd(),
                PollFlags::IN,
            )];
            // EINTR: look again.
            let _ = poll(&mut fds, left.as_ref());
        }
    }

    fn expect(&self, wanted: RunState, action: &'static str) -> Result<(), MachineError> {
        match self.state == wanted {
            true => Ok(()),
            false => Err(MachineError::WrongState {
                state: self.state,
                action,
            }),
        }
    }

    fn expect_whole(&self, action: &'static str) -> Result<(), MachineError> {
        match self.whole {
            true => Ok(()),
            false => Err(MachineError::Arriving { action }),
        }
    }

    /// By which memory that comes after the guest has another connection; `None`: none did.
    pub fn feeder(&self) -> Option<Feeder> {
        self.feeding.as_ref().map(|feeding| feeding.feeder())
    }

    /// Whether memory is here that came after the guest, or nothing came after it.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    fn is_fed_by(&mut self, feeding: feeding::Feeding) {
        let feeding = Arc::new(feeding);
        self.at_end = feeding::AtEnd(Some(Arc::clone(&feeding)));
        (self.feeding, self.whole) = (Some(feeding), false);
    }

    /// Whether the guest, or a device, has asked for something that nobody has carried out and that is in no state
    /// of a device.
    fn owes(&self) -> bool {
        let lost = |request: &Request| {
            matches!(request, Request::WatchdogFired | Request::Panicked { .. })
        };
        self.board.requests.halting() || self.pending.iter().any(lost)
    }

    fn run(&mut self) -> Result<(), MachineError> {
        for device in &self.devices {
            device.resume()?;
        }
        self.vcpus.run(&self.vcpus_there())?;
        self.state = RunState::Running;
        if std::mem::take(&mut self.is_new_here) {
            for device in &self.devices {
                device.announce();
            }
        }
        Ok(())
    }

    /// Takes back a `rest` that failed half way, so that no guest is left frozen in a machine that
    /// says it runs.
    fn run_on(&mut self, error: &MachineError) {
        let detail = match error {
            // Whether they run or not nobody knows: there is nothing to take back.
            MachineError::Vcpus(error) => format!("pause: {error}"),
            _ => match self.run() {
                Ok(()) => return,
                Err(again) => format!("pause: {error}; run on: {again}"),
            },
        };
        self.end(StopReason::VmmFault { detail });
    }

    /// Whoever else writes to memory in a device's place leaves that to this process, whose writes are logged; or may
    /// do it again.
    fn write_here(&self, here: bool) {
        for device in &self.devices {
            device.write_here(here);
        }
    }

    /// vCPUs first, then devices: nobody kicks a device that has come to rest.
    fn rest(&mut self) -> Result<(), MachineError> {
        self.park()?;
        for device in &self.devices {
            device.pause()?;
        }
        Ok(())
    }

    /// The same, of devices that must have come to rest by then.
    fn rest_by(&mut self, until: Instant) -> Result<(), MachineError> {
        self.park()?;
        for device in &self.devices {
            device.pause_within(until.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }

    fn park(&mut self) -> Result<(), MachineError> {
        self.vcpus.park()?;
        // That they had entered is no news once they are out again.
        self.keep(|request| *request != Request::AllEntered);
        Ok(())
    }

    /// Drops the waiting requests that `wanted` does not want.
    fn keep(&mut self, wanted: impl Fn(&Request) -> bool) {
        while let Some(request) = self.receiver.try_next() {
            self.pending.push_back(request);
        }
        self.pending.retain(wanted);
        self.receiver.wake();
    }

    fn announce(&mut self, event: Event) {
        self.announced.push_back(event);
        self.receiver.wake();
    }

    fn carry_out(&mut self, request: Request) {
        if self.state == RunState::Stopped {
            return;
        }
        if !self.whole && waits_for_memory(&request) {
            self.postponed.push_back(request);
            return;
        }
        match request {
            // Once for each time that somebody could think it did not run.
            Request::AllEntered if self.told_running => {}
            Request::AllEntered => {
                self.told_running = true;
                self.announce(Event::Running);
            }
            Request::Whole => self.is_whole_now(),
            Request::Starving { reason } => self.announce(Event::Starving { reason }),
            Request::PowerOff => self.guest_ends(StopReason::GuestPowerOff),
            Request::Reset if self.is_searching() => self.search_failed("it reset itself"),
            Request::Reset => self.reset(),
            Request::NotBootable { detail } => self.end(StopReason::NotBootable { detail }),
            Request::Panicked { crash_loaded } => {
                self.announce(Event::Panicked { crash_loaded });
            }
            Request::WatchdogFired => self.watchdog_fired(),
            Request::SlotsEjected => self.slots_ejected(),
            Request::HotMemoryChanged => self.hot_memory_changed(),
            Request::MemoryWantsRoom => self.make_room(),
            Request::VcpusEjected => self.vcpus_ejected(),
            Request::VcpuStarted { index } => self.vcpu_started(index),
            Request::DeviceFault { device, detail } => {
                self.end(StopReason::DeviceFault { device, detail });
            }
            Request::ThreadPanicked { thread, detail } => {
                let detail = format!("thread {thread} panicked: {detail}");
                self.end(StopReason::VmmFault { detail });
            }
            Request::Vcpu {
                index: vcpu,
                report: VcpuReport::TripleFault { registers },
            } => {
                self.guest_ends(StopReason::TripleFault { vcpu, registers });
            }
            Request::Vcpu {
                index: vcpu,
                report: VcpuReport::InternalError { detail },
            } => {
                self.end(StopReason::InternalError { vcpu, detail });
            }
        }
    }

    /// A moment at rest for memory that is still a snapshot's file.
    fn make_room(&mut self) {
        let running = self.state == RunState::Running;
        if running && let Err(error) = self.rest() {
            return self.run_on(&error);
        }
        if let Err(error) = self.memory.make_room(MOMENT) {
            // It is right as it is, and larger than need be.
            tracing::warn!(error = in_full(&error), "what the guest gives back is kept");
        }
        if running && let Err(error) = self.run() {
            self.run_on(&error);
        }
    }

    /// The fallback runs and has not said what it found.
    fn is_searching(&self) -> bool {
        self.verdict.as_ref().is_some_and(|it| it.awaited())
    }

    /// What ends in a guest ends the machine; in the fallback it is no more than a search that failed.
    fn guest_ends(&mut self, reason: StopReason) {
        match self.is_searching() {
            true => self.search_failed(&reason.to_string()),
            false => self.end(reason),
        }
    }

    fn search_failed(&mut self, why: &str) {
        let detail = format!(
            "only Linux can read the disk, and the kernel that was to find what it boots ended before it \
             had found it: {why}; the console may say more"
        );
        self.end(StopReason::NotBootable { detail });
    }

    fn watchdog_fired(&mut self) {
        self.announce(Event::WatchdogFired);
        match self.config.watchdog.map(|watchdog| watchdog.action) {
            Some(WatchdogAction::Reset) => self.reset(),
            Some(WatchdogAction::PowerOff) => self.end(StopReason::Watchdog),
            Some(WatchdogAction::Pause) if self.state == RunState::Running => {
                if let Err(error) = self.pause() {
                    self.end(StopReason::VmmFault {
                        detail: error.to_string(),
                    });
                }
            }
            Some(WatchdogAction::Pause | WatchdogAction::None) | None => {}
        }
    }

    fn is_whole_now(&mut self) {
        self.whole = true;
        self.announce(Event::Whole);
        let postponed = std::mem::take(&mut self.postponed);
        for request in postponed.into_iter().rev() {
            self.pending.push_front(request);
        }
    }

    /// Power-on again, in this process: the same threads, descriptors and rings.
    fn reset(&mut self) {
        match self.restart() {
            Ok(()) => self.announce(Event::GuestReset),
            Err(MachineError::Boot(error)) => {
                let detail = in_full(&error);
                self.end(StopReason::NotBootable { detail });
            }
            Err(error) => {
                let detail = format!("reset: {}", in_full(&error));
                self.end(StopReason::VmmFault { detail });
            }
        }
    }

    fn restart(&mut self) -> Result<(), MachineError> {
        let running = self.state == RunState::Running;
        if running {
            self.rest()?;
        }
        self.told_running = false;
        // What the guest asked in the life that ends here is not for the next one; what failed is.
        self.keep(|request| {
            matches!(
                request,
                Request::DeviceFault { .. }
                    | Request::ThreadPanicked { .. }
                    | Request::HotMemoryChanged
                    | Request::Whole
                    | Request::Starving { .. }
            )
        });
        self.receiver.clear_halt();
        self.remove_asked();
        for device in &self.devices {
            device.reset()?;
        }
        if let Some(panic) = &self.panic {
            panic.reset();
        }
        self.memory.clear()?;
        let boot = self.load()?;
        self.vcpus.power_on(boot)?;
        self.forget_used();
        self.loaded = true;
        if running { self.run() } else { Ok(()) }
    }

    fn end(&mut self, reason: StopReason) {
        if self.state == RunState::Stopped {
            return;
        }
        if let Err(error) = self.rest() {
            tracing::error!(%error, "the machine did not come to rest at its end");
            // Whatever vCPUs do, disks are left alone from here on.
            for device in &self.devices {
                let _ = device.pause_within(MOMENT);
            }
        }
        self.state = RunState::Stopped;
        self.announce(Event::Stopped(reason));
    }
}

/// What needs vCPUs or devices at rest. While some of memory is elsewhere one of them may wait for that, out of which no
/// signal calls a vCPU on every kernel.
fn waits_for_memory(request: &Request) -> bool {
    match request {
        Request::Reset | Request::WatchdogFired => true,
        Request::SlotsEjected | Request::VcpusEjected | Request::MemoryWantsRoom => true,
        Request::PowerOff | Request::NotBootable { .. } | Request::Panicked { .. } => false,
        Request::VcpuStarted { .. } | Request::HotMemoryChanged | Request::AllEntered => false,
        Request::Whole | Request::Starving { .. } => false,
        Request::DeviceFault { .. } | Request::ThreadPanicked { .. } | Request::Vcpu { .. } => {
            false
        }
    }
}

/// An error with its causes.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// A pause that ends itself: whatever goes wrong meanwhile, the guest runs on.
pub struct PauseGuard<'a> {
    machine: &'a mut Machine,
}

impl std::ops::Deref for PauseGuard<'_> {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        self.machine
    }
}

impl Drop for PauseGuard<'_> {
    fn drop(&mut self) {
        if self.machine.state == RunState::Paused
            && let Err(error) = self.machine.resume()
        {
            self.machine.end(StopReason::VmmFault {
                detail: format!("resume: {error}"),
            });
        }
    }
}

#[cfg(test)]
mod tests;
