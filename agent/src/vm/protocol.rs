//! What agent and machine process say to each other: JSON in the packets of a SEQPACKET socket.
//!
//! The process outlives the agent that started it, so a newer agent meets older processes: [`VERSION`]
//! is exchanged in the first packet, golden packets of every version are kept in `tests/golden`, and
//! fields are only added. [`Launch`] alone is between one binary and itself.

use std::time::Duration;

use fractus_agent_api::device::{DeviceId, DeviceKind};
use fractus_agent_api::machine::{ServerId, StopReason};
use fractus_agent_api::migration::{self, Lacks, MigrationId, Policy};
use fractus_agent_api::size::Size;
use fractus_vmm::config::{DiskConfig, MachineConfig, NetConfig};
use fractus_vmm::machine::Compression;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Raised when the meaning of a message changes.
pub const VERSION: u32 = 1;

/// Most bytes of a packet; a reason with registers in it is the longest.
pub const MOST: usize = 64 << 10;

/// A guest's watchdog, panics and resets are taken down this often at most.
pub const QUIET: Duration = Duration::from_secs(10);

/// What a guest takes of the vCPUs and the memory that it is offered is told this often at most.
pub const PAUSE: Duration = Duration::from_millis(200);

/// Bytes kept of the serial line, and of the process's own log.
pub const SERIAL_LOG: u64 = 1 << 20;
pub const LOG: u64 = 64 << 10;

/// What a connection to the control socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Messages of this module. The newest such connection is the one that counts.
    Control,
    /// After the `Hello`: raw bytes of the serial line, both ways.
    Console,
    /// After the `Hello`: raw bytes of the guest agent's port, both ways. The newest such connection
    /// is the one that counts; without one what the guest says there is lost.
    GuestAgent,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum ToMachine {
    /// First on every connection to the control socket. `Control` is answered by `Status`.
    Hello {
        version: u32,
        role: Role,
    },
    /// The record names this process now: start the guest. A process whose agent goes away before
    /// that ends, so that none runs without a record.
    Go,
    Status,
    Pause {
        request_id: Option<String>,
    },
    Resume {
        request_id: Option<String>,
    },
    PressPowerButton {
        request_id: Option<String>,
    },
    /// End the machine and the process.
    Stop {
        request_id: Option<String>,
    },
    /// Give the guest a disk, whose open file comes with this packet. Answered by `Status`, also where
    /// it has been done already, or by `DeviceRefused`. Only to processes that tell their `devices`.
    AttachDisk {
        request_id: Option<String>,
        id: DeviceId,
        config: DiskConfig,
    },
    /// The same with a network, whose queues' taps come with this packet.
    AttachNet {
        request_id: Option<String>,
        id: DeviceId,
        config: NetConfig,
    },
    /// Offer the guest so many vCPUs, and so much memory besides what it began with (bytes), as far as the
    /// machine was made for it. Answered by `Status`, or by `ResizeRefused`. Only to processes that tell
    /// their `size`.
    Resize {
        request_id: Option<String>,
        vcpus: u8,
        hot_memory: u64,
    },
    /// Stop the guest where it is and write all that it is to the file that comes with this packet. Answered
    /// by `Suspended`; the guest stands still then, and may be told anything. Only to processes that say in
    /// their `Status` that they can. One that knows nothing of compression writes as it ever did.
    Suspend {
        request_id: Option<String>,
        attempt: Uuid,
        #[serde(default, skip_serializing_if = "Compression::is_none")]
        compression: Compression,
    },
    /// Send the guest to where the stream socket leads that comes with this packet, disks and all; without one:
    /// go by another policy. Once more with one, of a guest that was offered and whose memory is to follow it: that goes
    /// on by this connection. What becomes of it is told by `Moving`, and in each `Status`. Only to processes that
    /// say that they can.
    Send {
        request_id: Option<String>,
        migration: MigrationId,
        policy: Policy,
        /// The socket says by what connections the process speaks itself ([`super::seal::borrow`]); only to processes that
        /// say that they do.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        lent: bool,
    },
    /// Hand the guest over to the process of this host to which the stream socket leads that comes with this packet: all
    /// that the machine has goes, and nothing is copied. What becomes of it is told as of `Send`. Only to processes that say
    /// that they can.
    HandOver {
        request_id: Option<String>,
        migration: MigrationId,
    },
    /// The guest is not to be sent any more; one that was offered goes on. Answered by `Status`.
    Stay {
        request_id: Option<String>,
    },
    /// Copy the root disk, as it is at one moment, to the file that comes with this packet, whose content goes; an
    /// attempt of before is given up. Answered by `Copied`. Only to processes that say that they can.
    Copy {
        request_id: Option<String>,
        attempt: Uuid,
    },
    /// Copy nothing any more.
    NoCopy {
        request_id: Option<String>,
    },
    /// Ask the guest to let a device go, again if it was asked before. Answered likewise; another
    /// `Status` follows when it has gone.
    Detach {
        request_id: Option<String>,
        id: DeviceId,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum FromMachine {
    /// Jailed and built; waits for `Go`.
    Ready {
        version: u32,
        /// Some of the guest's memory is still to come.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        lacks: bool,
    },
    Status {
        version: u32,
        id: ServerId,
        state: State,
        /// None from processes that do not keep it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<GuestSaid>,
        /// What has come, or could go, while the machine runs. None from processes in which nothing
        /// can.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        devices: Option<Vec<Has>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<Size>,
        /// Whether it knows `Suspend`.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        suspends: bool,
        /// Whether it knows `Send`.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        sends: bool,
        /// Whether it knows `Copy`.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        copies: bool,
        /// Whether it knows `HandOver`.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        hands: bool,
        /// Whether memory can follow the guest that it sends.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        follows: bool,
        /// Whether it speaks TLS itself by a connection that is lent to it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        seals: bool,
        /// Whether it takes more than one, for the guest's memory.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        lanes: bool,
        /// What became of the last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        moving: Option<Moving>,
        /// Some of the memory of the guest that came is still to come.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lacks: Option<Lacks>,
    },
    /// How far the guest is that is being sent, now and then, and at once what became of it.
    Moving(Moving),
    /// The guest's memory is in the file that came with this attempt, and on its disk; or it is not, and the
    /// machine is as before.
    Suspended {
        attempt: Uuid,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The copy of the root disk is whole in the file that came with this attempt, and on its disk; or there is none.
    /// The guest does what it did.
    Copied {
        attempt: Uuid,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The machine may have taken a part of it.
    ResizeRefused {
        detail: String,
    },
    /// The machine is as before.
    DeviceRefused {
        id: DeviceId,
        detail: String,
    },
    Event {
        event: MachineEvent,
    },
    /// The guest that another process handed over runs here, and has stood still for so long.
    TookOver {
        blackout_us: u64,
    },
    /// The last command could not be carried out; the machine is as before.
    Refused {
        detail: String,
    },
    /// The machine could not be made; the process ends.
    Failed {
        detail: String,
    },
}

/// To the socket of [`FileRole::Lines`]: memory is to come by the stream socket that comes with this packet. Answered by
/// [`LineTaken`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnotherLine {
    pub version: u32,
}

/// Whether it does, or why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineTaken {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A guest on its way out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moving {
    pub migration: MigrationId,
    /// Copying, offered or failed.
    pub state: migration::State,
    #[serde(default)]
    pub progress: migration::Progress,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ready,
    Running,
    Paused,
    Stopped,
}

/// A device that a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Has {
    pub id: DeviceId,
    #[serde(default)]
    pub kind: DeviceKind,
    /// The guest has been asked to let it go.
    #[serde(default)]
    pub asked: bool,
}

/// What the guest's devices have said since the process began. Events that find no agent are lost; this
/// is not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSaid {
    /// Its kernel panicked, and the guest has not been reset since.
    #[serde(default)]
    pub panicked: bool,
    /// How often it let its watchdog run out, counted once in [`QUIET`] at most.
    #[serde(default)]
    pub watchdog_fired: u64,
    /// How often its watchdog ran out where that pauses it, each one counted: an agent tells by it
    /// whether it has heard of the last.
    #[serde(default)]
    pub holds: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum MachineEvent {
    Running,
    Paused,
    Stopped { reason: StopReason },
    GuestReset,
    Panicked,
    WatchdogFired,
}

/// Written to a file of the machine's folder just before the process ends, for an agent that was not
/// there to hear it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastWords {
    pub version: u32,
    pub reason: StopReason,
}

/// The first packet that a new process gets; the descriptors come with it, in the order of `files`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Launch {
    pub id: ServerId,
    pub config: MachineConfig,
    /// `None` only for trying things out by hand.
    pub jail: Option<JailConfig>,
    pub files: Vec<FileRole>,
    /// Names of `config.disks`, in their order; none: it stays for the machine's life.
    #[serde(default)]
    pub disks: Vec<Option<DeviceId>>,
    /// The same for `config.nets`.
    #[serde(default)]
    pub nets: Vec<Option<DeviceId>>,
    /// With an `Arrival`: bytes that each of `config.disks` may have at most.
    #[serde(default)]
    pub most: Vec<u64>,
    pub request_id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailConfig {
    /// User and group of the process.
    pub user: u32,
    /// The largest file that it may write (RLIMIT_FSIZE), bytes.
    pub file_size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileRole {
    Kvm,
    Kernel,
    Initrd,
    /// With a machine that boots a disk: for one that only Linux reads.
    FallbackKernel,
    FallbackInitrd,
    /// In the order of `config.disks`.
    Disk,
    /// A queue of a tap: those of `config.nets` one after the other.
    Tap,
    /// An open /dev/vhost-net for each `Tap` of a network without a rate limit, or none at all.
    Vhost,
    /// With `config.vsock`: a listening stream socket.
    Vsock,
    SerialLog,
    Log,
    LastWords,
    /// A bound SEQPACKET socket, on which the process listens itself so that its credentials show.
    Control,
    /// Only when run by hand: where the serial line also comes from and goes to.
    TerminalInput,
    TerminalOutput,
    /// What another process wrote when it was told to suspend its guest: that guest goes on in this one, whose
    /// `config` says no more than what files come.
    Kept,
    /// The same, of which several guests go on: its memory is mapped, not read, and each is told that it is another.
    /// Nobody writes to it, nor truncates it, while one of them lives.
    Template,
    /// A stream socket by which a guest comes that another process sends; `config` likewise, with the size that
    /// was agreed. Its disks are overwritten.
    Arrival,
    /// With an `Arrival`: a bound SEQPACKET socket, to which an agent brings another line while memory is to come.
    Lines,
    /// A stream socket to the process of this host that hands its guest over, and with it all that its machine has: kernel,
    /// disks, taps, sockets, lines do not come from the agent then.
    Predecessor,
    /// With a jail: what its root is copied from.
    MountNamespace,
    /// With a jail: this machine's own.
    NetworkNamespace,
}

#[cfg(test)]
mod tests;
