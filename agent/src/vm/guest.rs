//! What the machine's process owns: the machine itself ([`super::traveller`]), or a stand-in where there is no KVM.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::{Lacks, Policy, Progress, State as Journey};
use fractus_agent_api::size::Size;
use fractus_vmm::config::{DiskConfig, NetConfig, NetFiles};
use fractus_vmm::machine::{self, Compression};

use super::protocol::{MachineEvent, State};
use super::seal::Connection;

/// Owned by value by the process's one loop; nobody else can reach it.
pub trait Guest {
    /// For the first time in this process.
    fn start(&mut self) -> Result<(), GuestError>;
    fn pause(&mut self) -> Result<(), GuestError>;
    fn resume(&mut self) -> Result<(), GuestError>;
    fn press_power_button(&mut self) -> Result<(), GuestError>;
    /// An event says when it is done.
    fn stop(&mut self) -> Result<(), GuestError>;
    /// What the disk is called from now on.
    fn attach_disk(&mut self, config: DiskConfig, file: File) -> Result<String, GuestError>;
    fn attach_net(&mut self, config: NetConfig, files: NetFiles) -> Result<String, GuestError>;
    /// Asks for it; an event says when it has gone. May be asked again.
    fn detach(&mut self, device: &str) -> Result<(), GuestError>;
    fn size(&self) -> Size;
    /// Offers vCPUs, and bytes of memory besides what it began with. May be repeated.
    fn resize(&mut self, vcpus: u8, hot_memory: u64) -> Result<(), GuestError>;
    /// Names of its disks, and of its networks, each in the order of its configuration.
    fn names(&self) -> (Vec<String>, Vec<String>);
    /// Writes all that a paused guest is to a file, which is on its disk then, and `note` with it.
    fn write(
        &mut self,
        file: File,
        compression: Compression,
        note: &[u8],
    ) -> Result<(), GuestError>;
    /// Begins to copy its root disk, its first, to a file, whose content goes. Not while it is being sent.
    fn copy(&mut self, file: File) -> Result<(), GuestError>;
    /// Copies some more; once it is over, whether the copy is whole in the file and on its disk. None: there is more to
    /// copy, or nothing.
    fn copy_on(&mut self) -> Option<Result<(), GuestError>>;
    fn copy_no_more(&mut self);
    /// Begins to send it, with `note`, disks and all, by a connection whose own timeouts bound each wait. It is not
    /// to get or lose devices meanwhile.
    fn send(
        &mut self,
        connection: Connection,
        policy: Policy,
        note: Vec<u8>,
    ) -> Result<(), GuestError>;
    /// Begins to hand it over to another process of this host, with `note` and `files`. It is not to get or lose devices
    /// meanwhile.
    fn hand_over(
        &mut self,
        connection: UnixStream,
        note: Vec<u8>,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), GuestError>;
    /// It is being sent or handed over, and was not offered yet.
    fn is_being_sent(&self) -> bool;
    /// It was offered, and memory is to follow it yet: whoever goes on with it needs this process.
    fn owes(&self) -> bool;
    /// The memory that it owes goes by this connection from here on, whose own timeouts bound each wait.
    fn go_on_by(&mut self, connection: UnixStream) -> Result<(), GuestError>;
    /// It came, and some of its memory is still to come.
    fn lacks(&self) -> Option<Lacks>;
    /// What is to be readable before there is more of it to be sent; none: nothing is waited for.
    fn waits_for(&self) -> Option<BorrowedFd<'_>>;
    /// It stands still, and its lines are another process's.
    fn is_handed_over(&self) -> bool;
    /// Goes by another policy, and has another note go with it, if it is being sent.
    fn send_by(&mut self, policy: Option<Policy>, note: Option<Vec<u8>>);
    /// Sends some more of it, or of the memory that follows it; how things stand then, and, if that is asked for or it is
    /// over, how far. None: there is nothing to be sent.
    fn send_on(&mut self, tells: bool) -> Option<(Journey, Option<Progress>)>;
    /// It is not to be sent any more. One that ran and was offered runs on.
    fn stay(&mut self) -> Result<(), GuestError>;
    fn state(&self) -> State;
    /// Readable while there are events.
    fn event_fd(&self) -> BorrowedFd<'_>;
    fn next_event(&mut self) -> Option<GuestEvent>;
}

/// What happened in it.
#[derive(Debug, Clone, PartialEq)]
pub enum GuestEvent {
    /// To be told as it is.
    Machine(MachineEvent),
    /// The machine has this device no more.
    DeviceGone(String),
    /// The guest has taken or left vCPUs or memory.
    Resized,
    /// The memory that followed it is all here, or does not come any more, and why.
    Followed(Result<(), String>),
}

#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("the machine: {0}")]
    Machine(String),
    /// Said on its console, too.
    #[error("{0}")]
    NotBootable(String),
    #[error("the stand-in: {0}")]
    StandIn(#[from] io::Error),
}

impl From<machine::MachineError> for GuestError {
    fn from(error: machine::MachineError) -> Self {
        let text = super::chain(&error);
        match error {
            machine::MachineError::Boot(_) => Self::NotBootable(text),
            _ => Self::Machine(text),
        }
    }
}

/// The machine's reasons in the words of the wire.
pub fn reason(reason: machine::StopReason) -> StopReason {
    use machine::StopReason as Machine;
    let text = reason.to_string();
    match reason {
        Machine::Requested => StopReason::Requested,
        Machine::GuestPowerOff => StopReason::GuestPowerOff,
        Machine::TripleFault { .. } => StopReason::TripleFault { detail: text },
        Machine::InternalError { .. } => StopReason::InternalError { detail: text },
        Machine::NotBootable { detail } => StopReason::NotBootable { detail },
        Machine::Watchdog => StopReason::Watchdog,
        Machine::DeviceFault { .. } | Machine::VmmFault { .. } => {
            StopReason::VmmFault { detail: text }
        }
    }
}

/// In the words of the protocol.
pub fn event(event: machine::Event) -> GuestEvent {
    use machine::Event as Machine;
    GuestEvent::Machine(match event {
        Machine::Running => MachineEvent::Running,
        Machine::Paused => MachineEvent::Paused,
        Machine::Stopped(why) => MachineEvent::Stopped {
            reason: reason(why),
        },
        Machine::GuestReset => MachineEvent::GuestReset,
        Machine::Panicked { .. } => MachineEvent::Panicked,
        Machine::WatchdogFired => MachineEvent::WatchdogFired,
        Machine::DeviceGone { id } => return GuestEvent::DeviceGone(id),
        Machine::VcpusUsed { .. } | Machine::HotMemory { .. } => return GuestEvent::Resized,
        Machine::Whole => return GuestEvent::Followed(Ok(())),
        Machine::Starving { reason } => return GuestEvent::Followed(Err(reason)),
    })
}
