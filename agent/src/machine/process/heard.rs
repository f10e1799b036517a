//! What a machine's process says, and how it ended.

use fractus_agent_api::device::DeviceId;
use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::Lacks;
use fractus_agent_api::size::Size;
use uuid::Uuid;

use crate::vm::protocol::{GuestSaid, Has, MachineEvent, Moving, State};

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// It said why.
    Said(StopReason),
    /// It was killed, or fell.
    Silent { detail: String },
}

impl End {
    pub fn reason(self) -> StopReason {
        match self {
            Self::Said(reason) => reason,
            Self::Silent { detail } => StopReason::VmmFault { detail },
        }
    }
}

/// What a process says that it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    pub state: State,
    /// What its guest has said, where it keeps that.
    pub guest: Option<GuestSaid>,
    /// The devices that it lets come and go, if it is one that does.
    pub devices: Option<Vec<Has>>,
    /// None from processes whose size stays.
    pub size: Option<Size>,
    /// The last guest that it was told to send.
    pub moving: Option<Moving>,
    /// Some of the memory of the guest that came is still to come.
    pub lacks: Option<Lacks>,
    /// The first on a connection: what was said on an earlier one and has not been answered never is.
    pub fresh: bool,
}

/// What is heard of a process.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// Jailed and built; some of its guest's memory may be still to come.
    Ready {
        lacks: bool,
    },
    Status(Status),
    Event(MachineEvent),
    DeviceRefused(DeviceId, String),
    ResizeRefused(String),
    /// What became of this attempt to copy its root disk.
    Copied(Uuid, Result<(), String>),
    /// What became of this attempt to suspend its guest.
    Suspended(Uuid, Result<(), String>),
    /// How far its guest is that is being sent.
    Moving(Moving),
    /// The guest that was handed to it runs, and has stood still for so many microseconds.
    TookOver(u64),
    /// The last command was not carried out.
    Refused(String),
    /// The machine could not be made; the end follows.
    Failed(String),
    /// It has ended without having read the [`Command::Go`](super::Command::Go) that it was told last. The end follows.
    GoUnread,
    Ended(End),
}
