//! The machine: one owner, one state machine.
//!
//! [`Machine`] is owned by value, so nobody else can touch it while its owner pauses, saves or ends
//! it. Devices and vCPUs send requests ([`crate::request`]); the owner calls [`Machine::next_event`]
//! whenever [`Machine::event_fd`] is readable, which carries them out and says what happened.

//! ```text
//! Machine::build(MachineConfig, MachineFiles, Option<ThreadHook>) -> Result<Machine, BuildError>
//!     all threads exist afterwards (each has run the hook), all descriptors and rings are open
//! start(&mut self)   pause(&mut self)   resume(&mut self)   -> Result<(), MachineError>
//! pause_guard(&mut self) -> Result<PauseGuard<'_>, MachineError>     resumes on drop
//! press_power_button(&self)       stop(&mut self)       state(&self) -> RunState
//! event_fd(&self) -> BorrowedFd<'_>   next_event(&mut self) -> Option<Event>
//! wait_event(&mut self, timeout: Duration) -> Option<Event>
//! ```
//!
//! It calls `virtio::attach(&MachineConfig, &MachineFiles, &Board) ->
//! Result<Vec<Arc<dyn Device>>, DeviceError>` for all that stands behind PCI, duplicating what it
//! keeps of the files: a reset does not attach again but calls `Device::reset`.

mod event;

pub use event::{Event, Registers, RunState, StopReason};
