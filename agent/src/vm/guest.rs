//! What the machine's process owns: the machine itself, or a stand-in where there is no KVM.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::size::Size;
use fractus_vmm::config::{DiskConfig, NetConfig, NetFiles};
use fractus_vmm::machine;

use super::protocol::{MachineEvent, State};

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
    fn write(&mut self, file: File, note: &[u8]) -> Result<(), GuestError>;
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

impl Guest for machine::Machine {
    fn start(&mut self) -> Result<(), GuestError> {
        // One that goes on from a file.
        if Self::state(self) == machine::RunState::Paused {
            return Ok(Self::resume(self)?);
        }
        Ok(Self::start(self)?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(Self::pause(self)?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(Self::resume(self)?)
    }

    fn press_power_button(&mut self) -> Result<(), GuestError> {
        Self::press_power_button(self);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        Self::stop(self);
        Ok(())
    }

    fn attach_disk(&mut self, config: DiskConfig, file: File) -> Result<String, GuestError> {
        Ok(Self::attach_disk(self, config, file)?)
    }

    fn attach_net(&mut self, config: NetConfig, files: NetFiles) -> Result<String, GuestError> {
        Ok(Self::attach_net(self, config, files)?)
    }

    fn detach(&mut self, device: &str) -> Result<(), GuestError> {
        Ok(Self::detach(self, device)?)
    }

    fn size(&self) -> Size {
        let config = self.config();
        let hot = config.hot_memory;
        Size {
            vcpus: config.cpus.count,
            vcpus_used: self.vcpus_used(),
            max_vcpus: config.cpus.max,
            memory_mib: config.memory.bytes >> 20,
            hot_memory_mib: hot.map_or(0, |hot| hot.bytes >> 20),
            hot_plugged_mib: self.hot_memory().unwrap_or(0) >> 20,
            max_hot_memory_mib: hot.map(|hot| hot.max >> 20),
        }
    }

    fn resize(&mut self, vcpus: u8, hot_memory: u64) -> Result<(), GuestError> {
        let config = self.config();
        let (count, hot) = (config.cpus.count, config.hot_memory);
        if vcpus != count {
            Self::set_vcpus(self, vcpus)?;
        }
        if hot_memory != hot.map_or(0, |hot| hot.bytes) {
            Self::set_hot_memory(self, hot_memory)?;
        }
        Ok(())
    }

    fn names(&self) -> (Vec<String>, Vec<String>) {
        (self.disks().to_vec(), self.nets().to_vec())
    }

    fn write(&mut self, file: File, note: &[u8]) -> Result<(), GuestError> {
        let written = self.snapshot(file, note);
        let report = written.map_err(|error| GuestError::Machine(super::chain(&error)))?;
        super::log::line(format_args!("{report:?}"));
        Ok(())
    }

    fn state(&self) -> State {
        match Self::state(self) {
            machine::RunState::Ready => State::Ready,
            machine::RunState::Running => State::Running,
            machine::RunState::Paused => State::Paused,
            machine::RunState::Stopped => State::Stopped,
        }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        Self::event_fd(self)
    }

    fn next_event(&mut self) -> Option<GuestEvent> {
        Self::next_event(self).map(event)
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
fn event(event: machine::Event) -> GuestEvent {
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
    })
}
