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
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::machine::{Boot, ImageFormat, ImageRef, MachineSpec, Pages, RootDisk};

    pub(crate) fn wanted(power: Power, soft: u64, hard: u64, rebuilds: u64) -> Wanted {
        Wanted {
            power,
            soft_reboots: soft,
            hard_reboots: hard,
            rebuilds,
            arrives: None,
            departs: None,
            continues: None,
            copy: None,
            copies: 0,
            restores: None,
            parks: None,
            spec: MachineSpec {
                vcpus: 1,
                max_vcpus: None,
                memory_mib: 64,
                max_memory_mib: None,
                pages: Pages::Small,
                numa_nodes: vec![],
                cpus: vec![],
                cpu_profile: "host".into(),
                boot: Boot {
                    kernel: Some(ImageRef {
                        id: uuid::Uuid::from_u128(1),
                        size: 1,
                        blake3: "0f".repeat(32),
                        format: ImageFormat::Raw,
                    }),
                    initrd: None,
                    command_line: String::new(),
                },
                root_disk: Some(RootDisk {
                    image: None,
                    size: 1 << 20,
                }),
                disks: vec![],
                nics: vec![],
                guest: Default::default(),
            },
        }
    }

    fn put(generation: u64, revision: u64, wanted: Wanted) -> PutMachine {
        PutMachine {
            version: 1,
            generation: Generation(generation),
            revision: Revision(revision),
            wanted,
            request_id: None,
            boot_id: None,
        }
    }

    /// A host of one machine that does what it is told, and crashes at will.
    #[derive(Default)]
    struct Model {
        intent: Option<Intent>,
        done: Done,
        process: Option<Process>,
        stop: Option<StopReason>,
        disk: bool,
        /// The disk that the running guest was started on: raised by every new one.
        disks: u64,
        /// Which guest runs, by the start that it began with.
        guest: u64,
        /// The guest whose memory is kept.
        kept: Option<u64>,
        boot: u128,
        unheard: bool,
    }

    impl Model {
        fn boot(&self) -> Option<Uuid> {
            Some(Uuid::from_u128(self.boot))
        }

        fn reboot(&mut self) {
            self.boot += 1;
            (self.process, self.unheard) = (None, true);
        }

        fn put(&mut self, put: &PutMachine) -> Result<Intake, Refusal> {
            let intake = intake(self.intent.as_ref(), put)?;
            if intake == Intake::New {
                self.intent = Some(Intent {
                    generation: put.generation,
                    revision: put.revision,
                    wanted: put.wanted.clone(),
                });
                self.stop = None;
            }
            self.unheard &= !is_word(put, self.boot());
            Ok(intake)
        }

        fn step(&mut self) -> Step {
            let Some(intent) = &self.intent else {
                return Step::Settled;
            };
            let wanted = intent.wanted.clone();
            let seen = Seen {
                process: self.process.unwrap_or(Process::None),
                stop: self.stop.as_ref(),
                failed: false,
                disk: self.disk,
                held: false,
                kept: self.kept.is_some(),
                transit: Transit::None,
                remains: self.disk || self.process.is_some() || self.kept.is_some(),
                unheard: self.unheard,
            };
            let step = next(&wanted, &self.done, &seen);
            let reboots = |done: &mut Done| {
                done.soft_reboots = wanted.soft_reboots;
                done.hard_reboots = wanted.hard_reboots;
            };
            match step {
                Step::Settled => {}
                Step::Await => assert!(self.unheard && self.process.is_none()),
                Step::SkipReboots => reboots(&mut self.done),
                Step::MakeDisk | Step::RemakeDisk => {
                    let guest = (self.process, self.kept);
                    assert_eq!(guest, (None, None), "no disk is made under a guest");
                    (self.disk, self.disks) = (true, self.disks + 1);
                    if step == Step::RemakeDisk {
                        self.done.rebuilds = wanted.rebuilds;
                        reboots(&mut self.done);
                    }
                }
                Step::Start => {
                    assert_eq!(self.process, None, "one process a machine");
                    assert!(self.disk);
                    self.process = Some(Process::Running);
                    self.done.starts += 1;
                    self.stop = None;
                    self.guest = self.kept.take().unwrap_or(self.done.starts);
                    reboots(&mut self.done);
                }
                Step::Pause => self.process = Some(Process::Paused),
                Step::Resume => {
                    assert_eq!(self.kept, None, "what runs on is not what was kept");
                    self.process = Some(Process::Running);
                }
                Step::Suspend => {
                    self.process = Some(Process::Paused);
                    self.kept = Some(self.guest);
                }
                Step::Forget => self.kept = None,
                Step::Shutdown | Step::Kill => self.process = None,
                Step::Remove => (self.disk, self.kept) = (false, None),
                Step::Arrive | Step::GoOn | Step::Depart | Step::Stay | Step::Lost => {
                    panic!("{step:?} of a machine that stays where it is");
                }
            }
            step
        }

        fn settle(&mut self) {
            for _ in 0..20 {
                if matches!(self.step(), Step::Settled | Step::Await) {
                    return;
                }
            }
            panic!("no end to the steps: {:?}", self.intent);
        }
    }

    #[test]
    fn a_guest_that_powers_off_stays_off_until_a_newer_intent() {
        let mut model = Model::default();
        model
            .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
            .unwrap();
        model.settle();
        (model.process, model.stop) = (None, Some(StopReason::GuestPowerOff));
        model.settle();
        assert_eq!((model.process, model.done.starts), (None, 1));
        model
            .put(&put(1, 2, wanted(Power::Running, 0, 0, 0)))
            .unwrap();
        model.settle();
        assert_eq!(
            (model.process, model.done.starts),
            (Some(Process::Running), 2)
        );
    }

    #[test]
    fn several_raises_of_a_counter_are_one_reboot() {
        let mut model = Model::default();
        model
            .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
            .unwrap();
        model.settle();
        model
            .put(&put(1, 2, wanted(Power::Running, 2, 3, 0)))
            .unwrap();
        model.settle();
        assert_eq!(
            model.done,
            Done {
                soft_reboots: 2,
                hard_reboots: 3,
                rebuilds: 0,
                starts: 2,
                ..Done::default()
            }
        );
    }

    #[test]
    fn a_rebuild_makes_the_disk_anew_and_starts_on_it() {
        let mut model = Model::default();
        model
            .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
            .unwrap();
        model.settle();
        model
            .put(&put(1, 2, wanted(Power::Running, 0, 0, 1)))
            .unwrap();
        model.settle();
        assert_eq!(
            (model.disks, model.done.starts, model.done.rebuilds),
            (2, 2, 1)
        );
        assert_eq!(model.process, Some(Process::Running));
    }

    #[test]
    fn a_suspended_guest_goes_on_and_one_that_is_rebooted_begins_anew() {
        let mut model = Model::default();
        let mut revision = 0;
        let mut settle = |model: &mut Model, power, hard| {
            revision += 1;
            model
                .put(&put(1, revision, wanted(power, 0, hard, 0)))
                .unwrap();
            model.settle();
            (model.process, model.guest, model.kept)
        };
        let running = Some(Process::Running);
        assert_eq!(settle(&mut model, Power::Running, 0), (running, 1, None));
        assert_eq!(settle(&mut model, Power::Suspended, 0), (None, 1, Some(1)));
        assert_eq!(settle(&mut model, Power::Running, 0), (running, 1, None));
        assert_eq!(model.done.starts, 2);
        assert_eq!(settle(&mut model, Power::Suspended, 0), (None, 1, Some(1)));
        assert_eq!(settle(&mut model, Power::Running, 1), (running, 3, None));
        assert_eq!(settle(&mut model, Power::Suspended, 1), (None, 3, Some(3)));
        assert_eq!(settle(&mut model, Power::Stopped, 1), (None, 3, None));
        // Of one that does not run there is nothing to keep, unless it is rebooted first.
        assert_eq!(settle(&mut model, Power::Suspended, 1), (None, 3, None));
        assert_eq!(settle(&mut model, Power::Suspended, 2), (None, 4, Some(4)));
    }

    #[test]
    fn after_a_reboot_of_its_host_a_machine_waits_for_a_word_of_this_boot() {
        let mut model = Model::default();
        let said = |revision, boot: Option<u128>| PutMachine {
            boot_id: boot.map(Uuid::from_u128),
            ..put(1, revision, wanted(Power::Running, 0, 0, 0))
        };
        model.put(&said(1, Some(0))).unwrap();
        model.settle();
        assert_eq!(model.done.starts, 1);
        model.reboot();
        assert_eq!(model.step(), Step::Await);
        // What was on its way, doubled or newer, before whoever sent it knew of this boot.
        for late in [said(1, Some(0)), said(2, Some(0)), said(2, Some(u128::MAX))] {
            model.put(&late).unwrap();
            assert_eq!(model.step(), Step::Await, "{late:?}");
        }
        assert_eq!(model.put(&said(2, Some(1))), Ok(Intake::Same));
        model.settle();
        assert_eq!(
            (model.process, model.done.starts),
            (Some(Process::Running), 2)
        );
        // A guest that ends in this boot is started again without a word; not so in the next.
        model.process = None;
        model.settle();
        assert_eq!(model.done.starts, 3);
        model.reboot();
        model.put(&said(3, None)).unwrap();
        model.settle();
        assert_eq!(model.done.starts, 4, "a controller of before");
    }

    #[test]
    fn a_machine_that_waits_is_removed_stays_stopped_and_forgets_without_a_word() {
        let mut model = Model::default();
        model
            .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
            .unwrap();
        model.settle();
        model
            .put(&put(1, 2, wanted(Power::Suspended, 0, 0, 0)))
            .unwrap();
        model.settle();
        let unsaid = |revision, wanted| PutMachine {
            boot_id: Some(Uuid::nil()),
            ..put(1, revision, wanted)
        };
        model.reboot();
        assert_eq!(model.step(), Step::Settled, "it is suspended as before");
        model
            .put(&unsaid(3, wanted(Power::Running, 0, 0, 0)))
            .unwrap();
        assert_eq!(model.step(), Step::Await, "nor does one that is kept go on");
        assert_eq!(model.kept, Some(1));
        model
            .put(&unsaid(4, wanted(Power::Stopped, 0, 0, 0)))
            .unwrap();
        model.settle();
        assert_eq!(model.step(), Step::Settled);
        model
            .put(&unsaid(5, wanted(Power::Stopped, 0, 0, 1)))
            .unwrap();
        assert_eq!(model.step(), Step::Await, "its disk may be another's");
        model
            .put(&unsaid(6, wanted(Power::Absent, 0, 0, 1)))
            .unwrap();
        model.settle();
        assert!(!model.disk);
    }

    #[test]
    fn what_no_agent_can_do_is_invalid_and_leaves_the_intent_alone() {
        let mut model = Model::default();
        let mut wrong = put(1, 1, wanted(Power::Running, 0, 0, 0));
        wrong.wanted.spec.vcpus = 65;
        assert!(matches!(model.put(&wrong), Err(Refusal::Invalid { .. })));
        wrong = put(1, 1, wanted(Power::Running, 0, 0, 0));
        wrong.version = NEWEST_PUT + 1;
        assert!(matches!(model.put(&wrong), Err(Refusal::Invalid { .. })));
        assert_eq!(model.intent, None);
    }

    fn power() -> impl Strategy<Value = Power> {
        prop_oneof![
            3 => Just(Power::Running),
            1 => Just(Power::Paused),
            1 => Just(Power::Suspended),
            1 => Just(Power::Stopped),
            1 => Just(Power::Absent)
        ]
    }

    proptest! {
        /// Messages that are late, doubled and out of order end in the newest intent, whatever the
        /// host had done in between.
        #[test]
        fn the_newest_intent_wins_whatever_the_order(
            history in prop::collection::vec((power(), 0..2u64, 0..2u64, 0..2u64, 0..2u64), 1..12),
            order in prop::collection::vec((0..12usize, 0..4usize), 0..40),
        ) {
            let (mut generation, mut soft, mut hard, mut rebuilds) = (1, 0, 0, 0);
            let mut puts = Vec::new();
            for (revision, (power, g, s, h, r)) in history.into_iter().enumerate() {
                generation += g;
                (soft, hard, rebuilds) = (soft + s, hard + h, rebuilds + r);
                let wanted = wanted(power, soft, hard, rebuilds);
                puts.push(put(generation, revision as u64 + 1, wanted));
            }
            let mut model = Model::default();
            let mut newest = (Generation(0), Revision(0));
            for (which, steps) in order {
                let Some(put) = puts.get(which) else { continue };
                let age = (put.generation, put.revision);
                match model.put(put) {
                    Ok(Intake::New) => { prop_assert!(age > newest); newest = age; }
                    Ok(Intake::Same) => prop_assert_eq!(age, newest),
                    Err(Refusal::Stale { generation, revision }) => {
                        prop_assert!(age < newest);
                        prop_assert_eq!((generation, revision), newest);
                    }
                    Err(other) => prop_assert!(false, "{}", other),
                }
                for _ in 0..steps {
                    model.step();
                }
            }
            let last = puts.last().unwrap();
            let _ = model.put(last);
            model.settle();
            let expected = match last.wanted.power {
                Power::Running => Some(Process::Running),
                Power::Paused => Some(Process::Paused),
                Power::Suspended | Power::Stopped | Power::Absent => None,
            };
            prop_assert_eq!(model.process, expected);
            prop_assert!(model.kept.is_none() || last.wanted.power == Power::Suspended);
            match last.wanted.power {
                Power::Absent => prop_assert!(!model.disk),
                // One that never ran may have none yet.
                Power::Suspended => {}
                _ => prop_assert!(model.disk),
            }
            if !matches!(last.wanted.power, Power::Absent | Power::Suspended) {
                prop_assert_eq!(model.done.rebuilds, rebuilds);
                prop_assert_eq!(model.done.hard_reboots, hard);
                prop_assert_eq!(model.done.soft_reboots, soft);
            }
        }
    }
}
