//! What a machine should be (`PUT /v1/machines/{id}`) and what it is (reports).

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::copy::{self, CopyId, CopyReport};
use crate::cpu::Profile;
use crate::device::{DeviceReport, Disk, Nic};
use crate::guest::{GuestOptions, GuestReport};
use crate::migration::{self, Arrival, Departure, MigrationId, MigrationReport, Shape};
use crate::size::SizeReport;

/// A server of the cloud; the machine that runs it has the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServerId(pub Uuid);

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Counter of ownership. Raised only by a compare-and-set of the owner row in the controller's
/// database; whoever holds a higher one is right.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// Counter of intent within a generation. Raised with every change of [`Wanted`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// Body of `PUT /v1/machines/{id}`. The agent persists it before it acts and refuses (409,
/// [`Refusal::Stale`]) whatever is older than what it has: `(generation, revision)` in that order.
/// The same pair again is answered like the first time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PutMachine {
    pub version: u32,
    pub generation: Generation,
    pub revision: Revision,
    pub wanted: Wanted,
    /// `x-openstack-request-id` of the request that wanted it, for the logs.
    #[serde(default)]
    pub request_id: Option<String>,
    /// The boot of the agent's host in which this is said: the sender knew of it before it looked whose the machine
    /// is. Of another one, or nil: what is wanted is taken, and nothing is started by it after a reboot
    /// ([`crate::decision::is_word`]). None: a controller of before, which moves no machine from a host that is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<Uuid>,
}

/// What the machine should be. Reboots and rebuilds are counters: the agent carries one out for each
/// raise that it has not yet recorded as done (several raises at once are one).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    pub power: Power,
    /// Raised by a soft reboot: the power button is asked first.
    #[serde(default)]
    pub soft_reboots: u64,
    /// Raised by a hard reboot: the process is ended and started anew.
    #[serde(default)]
    pub hard_reboots: u64,
    /// Raised by a rebuild: the root disk is made anew from `spec.root_disk`.
    #[serde(default)]
    pub rebuilds: u64,
    /// A guest is to come from another host, to this one that does not own it yet ([`crate::migration`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrives: Option<Arrival>,
    /// The guest is to be sent to another host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub departs: Option<Departure>,
    /// The guest is the one that stands still here, after this migration, and no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continues: Option<MigrationId>,
    /// A copy of the root disk is to be had ([`crate::copy`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyId>,
    /// Copies that have been wanted so far: who has not heard of one knows by this that there was one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub copies: u64,
    /// A rebuild makes the root disk of this copy, which the host has, and not of the disk's image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restores: Option<CopyId>,
    /// The server may be another host's by now, after this migration: what is here is kept for its way back. It changes
    /// nothing; but it is persisted, and reported, so that whoever has an older row does not take it for the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parks: Option<MigrationId>,
    pub spec: MachineSpec,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Wanted {
    /// The machine is to be gone, and nobody needs to know any more what its guest was told (a
    /// tombstone would keep its password and user data).
    pub fn end(&mut self) {
        self.power = Power::Absent;
        (self.arrives, self.departs, self.continues) = (None, None, None);
        (self.copy, self.restores, self.parks) = (None, None, None);
        self.spec.guest.instance = None;
    }

    /// A copy of the root disk is to be had, in place of any of before.
    pub fn have_copy(&mut self, copy: CopyId) {
        self.copy = Some(copy);
        self.copies += 1;
    }

    /// `PutMachine::version` of a body that says this: an agent that does not know what it speaks of refuses it.
    pub fn version(&self) -> u32 {
        match (self.copy.is_some(), self.migrates()) {
            _ if self.restores.is_some() || self.parks.is_some() => copy::RESTORE_VERSION,
            (true, _) => copy::PUT_VERSION,
            (false, true) => migration::PUT_VERSION,
            (false, false) => crate::VERSION,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    Running,
    Paused,
    /// The guest's memory is in a file of the host, from which it goes on later; no process is there.
    Suspended,
    Stopped,
    /// The machine and its disks are to be gone. The agent keeps a tombstone of the two counters, so
    /// that a late message cannot bring it back.
    Absent,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// 1 to 64.
    pub vcpus: u8,
    /// How many there can be while the machine runs, at least `vcpus`: with a maximum, `vcpus` may be
    /// another number without a new start. It is itself taken in at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u8>,
    pub memory_mib: u64,
    /// The same for memory, which comes and goes in blocks of [`crate::size::HOT_BLOCK_MIB`]: never less
    /// than the machine was started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u64>,
    #[serde(default)]
    pub pages: Pages,
    /// Host NUMA nodes the memory is bound to and host CPUs the vCPUs are pinned to; empty: anywhere.
    #[serde(default)]
    pub numa_nodes: Vec<u32>,
    #[serde(default)]
    pub cpus: Vec<u32>,
    /// Name of the guest's CPU where nothing more is said: `host` is the host's own, `x86-64-v2` and `x86-64-v3` are levels.
    #[serde(default = "host_profile")]
    pub cpu_profile: String,
    /// What the guest's CPU is, from its start to its end. An agent that does not know this goes by the name: whoever says
    /// it knows of the host that it does ([`crate::host::CpuReport::guest`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Box<Profile>>,
    pub boot: Boot,
    /// The root disk, made from an image (or empty) when it does not exist yet.
    #[serde(default)]
    pub root_disk: Option<RootDisk>,
    /// More disks, at most [`crate::device::MOST_DISKS`]. They may be others while the machine runs: it
    /// gets and loses them without a new start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// At most [`crate::device::MOST_NICS`]; likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    #[serde(default)]
    pub guest: GuestOptions,
}

fn host_profile() -> String {
    "host".to_owned()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pages {
    /// 4 KiB pages.
    Small,
    /// Transparent huge pages where the kernel finds them.
    #[default]
    Transparent,
    Huge2MiB,
    Huge1GiB,
}

/// What is booted: a kernel that is given, or what the root disk's own boot configuration says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Boot {
    /// `None`: from the root disk, read anew at every start and reset.
    #[serde(default)]
    pub kernel: Option<ImageRef>,
    #[serde(default)]
    pub initrd: Option<ImageRef>,
    /// With a boot from disk: put behind the command line that is found there.
    #[serde(default)]
    pub command_line: String,
}

/// An image in the controller's store. The agent fetches it from `GET /agent/v1/images/{id}` (only
/// images of its own machines are given out) and checks the hash.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageRef {
    pub id: Uuid,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of the stored bytes, 64 hex digits.
    pub blake3: String,
    pub format: ImageFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    Raw,
    Qcow2,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RootDisk {
    /// `None`: an empty disk.
    #[serde(default)]
    pub image: Option<ImageRef>,
    /// Bytes; the disk is the larger of this and the image's virtual size.
    pub size: u64,
}

/// What the agent says of one machine: answer to `PUT` and `GET`, and part of every push.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineReport {
    pub id: ServerId,
    pub generation: Generation,
    /// The newest intent that the agent has persisted.
    pub revision: Revision,
    /// True once the machine is what `revision` wants; false while the agent works on it.
    pub settled: bool,
    pub observed: Observed,
    /// Counters carried out, to be compared with [`Wanted`].
    #[serde(default)]
    pub soft_reboots: u64,
    #[serde(default)]
    pub hard_reboots: u64,
    #[serde(default)]
    pub rebuilds: u64,
    /// How often the machine's process was started; a guest that is alive keeps it.
    #[serde(default)]
    pub starts: u64,
    /// Microseconds since the epoch at which `observed` last changed.
    #[serde(default)]
    pub changed_at_us: i64,
    #[serde(default)]
    pub guest: GuestReport,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DeviceReport>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<DeviceReport>,
    /// None: there is no process, or it is of a version that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<SizeReport>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationReport>,
    /// As `revision` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parks: Option<MigrationId>,
    /// Of the copy that `revision` wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyReport>,
    /// Its host has rebooted, and it is not started before somebody has said, in this boot, that it is wanted here
    /// still: the same intent again will do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waits: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Observed {
    /// Being made: image fetched, disks made, process started.
    Starting {
        step: String,
    },
    /// Every vCPU has entered KVM_RUN.
    Running,
    Paused,
    Suspended,
    /// A guest is to come from another host, or has, and nobody has said yet that it is to run here.
    Arriving,
    /// The guest has been offered to another host, and stands still until its owner's row has said where it runs.
    Offered,
    Stopped {
        reason: StopReason,
    },
    /// It could not be made what is wanted; what is there is left whole.
    Failed {
        reason: String,
    },
    /// Neither process nor disks.
    Absent,
}

/// Why a machine is not running.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StopReason {
    /// As wanted.
    Requested,
    /// The guest powered itself off. The controller turns `wanted` to stopped by compare-and-set on
    /// the revision.
    GuestPowerOff,
    /// Registers in the text, as far as the host's KVM still has them; an agent of before says nothing.
    TripleFault {
        #[serde(default)]
        detail: String,
    },
    /// The guest let its watchdog run out, which is to end it.
    Watchdog,
    /// KVM could not go on (KVM_EXIT_INTERNAL_ERROR, failed entry); registers in the text.
    InternalError { detail: String },
    /// The guest reset itself, and there was nothing (more) on its disk that could be booted.
    NotBootable { detail: String },
    /// The VMM failed or was killed.
    VmmFault { detail: String },
    /// The host ended it (SIGTERM): it is started again.
    HostReboot,
}

/// Body of a refusal (status 409 unless said otherwise).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum Refusal {
    #[error("older than what the agent has: generation {}, revision {}", generation.0, revision.0)]
    Stale {
        generation: Generation,
        revision: Revision,
    },
    /// 404.
    #[error("no such machine")]
    Unknown,
    /// 400: the agent's version of this protocol cannot do what is asked.
    #[error("not understood: {detail}")]
    Invalid { detail: String },
    #[error("the machine is {state}")]
    WrongState { state: String },
    /// 503.
    #[error("the host cannot do that now: {detail}")]
    Unavailable { detail: String },
}
