//! What an agent decides, as pure functions: whether it takes an intent, and which step comes next.
//!
//! The real agent and the controller's simulated one share this file, so that the simulation proves
//! the decisions that hosts run. Nothing here reads a clock, a disk or a process: the caller says what
//! it sees ([`Seen`]), carries out the one [`Step`] that comes back, and asks again. Every step may be
//! repeated, so a crash between any two is followed by the same path as no crash.

pub mod devices;
pub mod size;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::copy;
use crate::device::{MOST_DISKS, MOST_NICS};
use crate::guest;
use crate::machine::{
    Generation, MachineSpec, Power, PutMachine, Refusal, Revision, StopReason, Wanted,
};
use crate::migration::{MigrationId, Transit};

/// What an agent has persisted of a machine's intent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Intent {
    pub generation: Generation,
    pub revision: Revision,
    pub wanted: Wanted,
}

impl Intent {
    /// Ownership first, then intent.
    pub fn age(&self) -> (Generation, Revision) {
        (self.generation, self.revision)
    }
}

/// Counters carried out so far; see [`Wanted`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Done {
    #[serde(default)]
    pub soft_reboots: u64,
    #[serde(default)]
    pub hard_reboots: u64,
    #[serde(default)]
    pub rebuilds: u64,
    /// Processes started, for whatever reason.
    #[serde(default)]
    pub starts: u64,
    /// The last arrival for which a process was started, and the last departure and continuation that were begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived: Option<MigrationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub departed: Option<MigrationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued: Option<MigrationId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intake {
    /// Newer than what is held: persist it, then answer, then act.
    New,
    /// The pair that is held already: answer as before.
    Same,
}

/// Of `PutMachine::version`.
const NEWEST_PUT: u32 = copy::RESTORE_VERSION;

/// Whether `put` is taken by an agent that holds `held`.
///
/// # Errors
/// [`Refusal::Stale`] when it is older, [`Refusal::Invalid`] when it cannot be carried out by any
/// agent of this version.
pub fn intake(held: Option<&Intent>, put: &PutMachine) -> Result<Intake, Refusal> {
    let invalid = |detail: String| Err(Refusal::Invalid { detail });
    if put.version == 0 || put.version > NEWEST_PUT {
        return invalid(format!(
            "version {} of the body; this agent knows up to {NEWEST_PUT}",
            put.version
        ));
    }
    let takes = put.wanted.version();
    if put.version < takes {
        let what = match (put.wanted.restores, put.wanted.copy) {
            _ if put.wanted.parks.is_some() => "a way back",
            (Some(_), _) => "a disk that is made of a copy",
            (None, Some(_)) => "a copy",
            (None, None) => "a migration",
        };
        return invalid(format!(
            "{what} in a body of version {}; it takes {takes}",
            put.version
        ));
    }
    if let Some(held) = held {
        let asked = (put.generation, put.revision);
        if asked < held.age() {
            let (generation, revision) = held.age();
            return Err(Refusal::Stale {
                generation,
                revision,
            });
        }
        if asked == held.age() {
            return Ok(Intake::Same);
        }
    }
    match impossible(&put.wanted.spec) {
        Some(detail) => invalid(detail),
        None => Ok(Intake::New),
    }
}

/// Whether `put`, which was taken, says that the machine is wanted on this host as it is now: in the boot `now`. Who
/// says so knew of this boot before it looked whose the machine is; so a host that was declared to be off since, and
/// has booted again, hears nothing by what was on its way to it.
pub fn is_word(put: &PutMachine, now: Option<Uuid>) -> bool {
    put.boot_id.is_none() || now.is_none() || put.boot_id == now
}

/// Why no agent of this version could make it.
pub fn impossible(spec: &MachineSpec) -> Option<String> {
    if !(1..=64).contains(&spec.vcpus) {
        return Some(format!("{} vCPUs; 1 to 64 are possible", spec.vcpus));
    }
    if spec.memory_mib == 0 || spec.memory_mib > 1 << 24 {
        return Some(format!(
            "{} MiB of memory; 1 to 2^24 are possible",
            spec.memory_mib
        ));
    }
    if let Some(max) = spec.max_vcpus
        && !(spec.vcpus..=64).contains(&max)
    {
        return Some(format!("at most {max} vCPUs, and {} now", spec.vcpus));
    }
    if let Some(max) = spec.max_memory_mib
        && !(spec.memory_mib..=1 << 24).contains(&max)
    {
        return Some(format!(
            "at most {max} MiB of memory, and {} now",
            spec.memory_mib
        ));
    }
    if spec.boot.command_line.len() > 2047 || spec.boot.command_line.contains('\0') {
        return Some("a kernel command line has at most 2047 bytes, none of them 0".to_owned());
    }
    if spec
        .root_disk
        .as_ref()
        .is_some_and(|disk| disk.size > 1 << 46)
    {
        return Some("a root disk has at most 64 TiB".to_owned());
    }
    if spec.boot.kernel.is_none() && spec.root_disk.is_none() {
        return Some("neither a kernel nor a disk to boot".to_owned());
    }
    if let Some(instance) = &spec.guest.instance {
        if instance.weight() > guest::MOST {
            return Some(format!("instance data has at most {} bytes", guest::MOST));
        }
        if let Err(error) = instance.layout("") {
            return Some(error.to_string());
        }
    }
    let images = [spec.boot.kernel.as_ref(), spec.boot.initrd.as_ref()]
        .into_iter()
        .chain([spec.root_disk.as_ref().and_then(|disk| disk.image.as_ref())])
        .flatten();
    for image in images {
        if !is_hash(&image.blake3) {
            return Some(format!("{:?} is no BLAKE3 hash", image.blake3));
        }
    }
    impossible_devices(spec)
}

fn impossible_devices(spec: &MachineSpec) -> Option<String> {
    let (disks, nics) = (spec.disks.len(), spec.nics.len());
    if disks > MOST_DISKS {
        return Some(format!("{disks} disks; at most {MOST_DISKS} are possible"));
    }
    if nics > MOST_NICS {
        return Some(format!(
            "{nics} network devices; at most {MOST_NICS} are possible"
        ));
    }
    let mut ids = BTreeSet::new();
    let all = spec.disks.iter().map(|disk| disk.id);
    let mut all = all.chain(spec.nics.iter().map(|nic| nic.id));
    if let Some(twice) = all.find(|id| !ids.insert(*id)) {
        return Some(format!("device {twice} is named twice"));
    }
    let mut macs = BTreeSet::new();
    if let Some(twice) = spec.nics.iter().find(|nic| !macs.insert(nic.mac)) {
        return Some(format!("MAC address {} is given twice", twice.mac));
    }
    let mut disks = spec.disks.iter().filter_map(|disk| disk.invalid());
    let mut nics = spec.nics.iter().filter_map(|nic| nic.invalid());
    disks.next().or_else(|| nics.next())
}

/// 64 hexadecimal digits in lower case: it becomes the name of a file.
fn is_hash(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The machine's process, as far as the agent knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    None,
    Running,
    Paused,
}

/// What is there. A process that was asked to run but died before it could is `None` without `stop`.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen<'a> {
    pub process: Process,
    /// Why the last process ended by itself, if it did so under the intent that is held. A host's
    /// reboot is no such reason: what should run is started again.
    pub stop: Option<&'a StopReason>,
    /// The intent that is held could not be carried out; a new one is tried again.
    pub failed: bool,
    /// The root disk exists whole, or none is wanted.
    pub disk: bool,
    /// The guest was paused by its own watchdog: it stays so until a new intent.
    pub held: bool,
    /// The guest's memory is in a file, and no guest has run since it was written: a process that is there all
    /// the same stands still, and is of no use any more.
    pub kept: bool,
    /// Where the guest of that process is on its way.
    pub transit: Transit,
    /// Process, disks, logs, control group and socket: is anything of them left?
    pub remains: bool,
    /// Nobody has said in this boot of the host that the machine is wanted here ([`is_word`]): it may be another's.
    pub unheard: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The machine is what is wanted, or will not become so under this intent.
    Settled,
    /// Reboots are void for a machine that does not run: count them as done, then ask again.
    SkipReboots,
    /// Make the root disk where there is none.
    MakeDisk,
    /// Make the root disk anew, then count the rebuilds as done, and the reboots with them.
    RemakeDisk,
    /// Start a process, and count the reboots as done with it. Where memory is kept the guest goes on from
    /// it, and it is kept no more from just before that.
    Start,
    Pause,
    Resume,
    /// Stop the guest where it is and write its memory to a file, which is kept from then on.
    Suspend,
    /// Memory that is kept is for nothing any more: remove it.
    Forget,
    /// Make empty disks and start a process that a guest comes to. Count the arrival as begun with it, and the reboots
    /// and rebuilds of its intent as done: they were, where it comes from.
    Arrive,
    /// Count the continuation and the start as done, and then let the guest that has arrived run.
    GoOn,
    /// Begin to send the guest, and count the departure as begun before that.
    Depart,
    /// The guest is not to be sent any more. One that stands still for it goes on; a continuation is counted as done.
    Stay,
    /// The guest that is to go on, or was being sent, is not here: say so. No other is started in its place under
    /// this intent.
    Lost,
    /// Press the power button, wait for the guest to go, end the process after a deadline.
    Shutdown,
    /// End the process now.
    Kill,
    /// Remove all that is left but the tombstone.
    Remove,
    /// Nothing, until somebody has said that the machine is still wanted here.
    Await,
}

/// The next step from what is there to what is wanted. After a reboot of the host it begins nothing, neither guest nor
/// disk, by what was wanted before: the server may have been started elsewhere meanwhile.
pub fn next(wanted: &Wanted, done: &Done, seen: &Seen<'_>) -> Step {
    match next_if_heard(wanted, done, seen) {
        Step::Start | Step::MakeDisk | Step::RemakeDisk if seen.unheard => Step::Await,
        step => step,
    }
}

fn next_if_heard(wanted: &Wanted, done: &Done, seen: &Seen<'_>) -> Step {
    let alive = seen.process != Process::None;
    if wanted.power == Power::Absent {
        return match (alive, seen.remains) {
            (true, _) => Step::Kill,
            (false, true) => Step::Remove,
            (false, false) => Step::Settled,
        };
    }
    if let Some(step) = in_transit(wanted, done, seen) {
        return step;
    }
    if seen.failed && !alive {
        return Step::Settled;
    }
    let rebuild = wanted.rebuilds > done.rebuilds;
    let hard = wanted.hard_reboots > done.hard_reboots;
    let soft = wanted.soft_reboots > done.soft_reboots;
    if seen.kept {
        let void = rebuild || hard || soft || wanted.power == Power::Stopped;
        return match wanted.power {
            _ if alive => Step::Kill,
            _ if void => Step::Forget,
            Power::Suspended => Step::Settled,
            _ => Step::Start,
        };
    }
    if rebuild {
        return if alive { Step::Kill } else { Step::RemakeDisk };
    }
    match (wanted.power, seen.process) {
        (Power::Absent, _) => Step::Settled,
        (Power::Stopped, Process::Running) => Step::Shutdown,
        // A paused guest cannot hear the button.
        (Power::Stopped, Process::Paused) => Step::Kill,
        (Power::Stopped, Process::None) if hard || soft => Step::SkipReboots,
        // A stopped server has its disk all the same, so that it can be looked at and moved.
        (Power::Stopped, Process::None) if !seen.disk => Step::MakeDisk,
        (Power::Stopped, Process::None) => Step::Settled,
        (_, Process::Running | Process::Paused) if hard => Step::Kill,
        (_, Process::Running) if soft => Step::Shutdown,
        (_, Process::Paused) if soft => Step::Kill,
        (_, Process::None) if seen.stop.is_some() && !hard && !soft => Step::Settled,
        // Nobody is started only to be suspended: the guest that was to be is gone.
        (Power::Suspended, Process::None) if !hard && !soft => Step::Settled,
        (_, Process::None) if !seen.disk => Step::MakeDisk,
        (_, Process::None) => Step::Start,
        (Power::Running, Process::Paused) if seen.held => Step::Settled,
        (Power::Running, Process::Paused) => Step::Resume,
        (Power::Paused, Process::Running) => Step::Pause,
        (Power::Suspended, Process::Running | Process::Paused) => Step::Suspend,
        (Power::Running, Process::Running) | (Power::Paused, Process::Paused) => Step::Settled,
    }
}

/// The next step of one whose guest comes or goes; none: it does neither.
fn in_transit(wanted: &Wanted, done: &Done, seen: &Seen<'_>) -> Option<Step> {
    let alive = seen.process != Process::None;
    if let Some(arrival) = &wanted.arrives {
        let comes =
            [Transit::Arriving(arrival.id), Transit::Arrived(arrival.id)].contains(&seen.transit);
        return Some(match alive {
            true if comes && !seen.failed => Step::Settled,
            true => Step::Kill,
            false if seen.failed => Step::Settled,
            // It was begun, and what came of it is gone.
            false if done.arrived == Some(arrival.id) => Step::Lost,
            false => Step::Arrive,
        });
    }
    let departs = wanted.departs.as_ref().map(|departure| departure.id);
    match seen.transit {
        Transit::Arrived(id) if wanted.continues == Some(id) && done.continued != Some(id) => {
            return Some(Step::GoOn);
        }
        // Nobody wants it here.
        Transit::Arriving(_) | Transit::Arrived(_) => return Some(Step::Kill),
        Transit::Copying(id) | Transit::Offered(id) => {
            return Some(match departs == Some(id) {
                true => Step::Settled,
                false => Step::Stay,
            });
        }
        Transit::None => {}
    }
    if !alive && !seen.kept && seen.stop.is_none() {
        let void = wanted.power == Power::Stopped
            || wanted.rebuilds > done.rebuilds
            || wanted.hard_reboots > done.hard_reboots;
        let awaited = wanted
            .continues
            .is_some_and(|id| done.continued != Some(id));
        // The other host may have it, and run it: that is for the row to say.
        let sent = departs.is_some() && departs == done.departed;
        return match (sent || awaited && !void, seen.failed) {
            (false, _) => None,
            (true, true) => Some(Step::Settled),
            (true, false) => Some(Step::Lost),
        };
    }
    (alive && departs.is_some_and(|id| done.departed != Some(id))).then_some(Step::Depart)
}

#[cfg(test)]
mod migration_tests;

#[cfg(test)]
pub(crate) mod tests;
