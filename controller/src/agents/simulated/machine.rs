//! A machine of a simulated host: what its agent keeps on its disk, and its process, as a few fields.

use fractus_agent_api::copy::{self, Copies, CopyId, CopyReport, CopyState, CopyStep};
use fractus_agent_api::cpu::Profile;
use fractus_agent_api::decision::{self, Done, Intent, Process, Seen, Step};
use fractus_agent_api::guest::GuestReport;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, Power, ServerId, StopReason, Wanted};
use fractus_agent_api::migration::{
    Lacks, MigrationId, MigrationReport, Progress, Shape, State, Transit,
};

/// A machine, on disk but for its process.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) intent: Intent,
    pub(super) done: Done,
    pub(super) stop: Option<StopReason>,
    pub(super) failed: Option<String>,
    pub(super) disk: bool,
    /// Which guest is on the disk: raised by each rebuild.
    pub(super) disks: u64,
    pub(super) process: Process,
    /// Which guest runs or ran last, by the start that it began with.
    pub(super) began_with: u64,
    /// The guest whose memory is kept.
    pub(super) kept: Option<u64>,
    /// What the guest's devices have said to the process that is there.
    pub(super) guest: GuestReport,
    /// Its watchdog has paused it.
    pub(super) held: bool,
    pub(super) changed_at_us: i64,
    /// Where its guest is on its way.
    pub(super) transit: Transit,
    /// It ran when it began to be sent, and is to run where it goes on.
    pub(super) ran: bool,
    /// What became of the migration that its intents spoke of last.
    pub(super) migration: Option<MigrationReport>,
    /// Of a guest that came: memory is still to come.
    pub(super) lacks: Option<Lacks>,
    pub(super) soul: Soul,
    /// What the guest began with.
    pub(super) cpu: Option<Box<Profile>>,
    /// Of its disk, on disk itself.
    pub(super) copy: Option<CopyId>,
    /// Which guest is on it.
    copied: Option<u64>,
    /// The disk was made of it, and both are one file.
    is_one: bool,
    pub(super) copy_failed: Option<(CopyId, String)>,
    /// Nobody has said in this boot of the host that it is wanted here.
    pub(super) unheard: bool,
    host: HostId,
}

/// Which guest it is, wherever it runs, and for how long it has run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Soul {
    /// Where it was started, and which start it was there.
    pub born: (HostId, u64),
    pub ticks: u64,
}

/// Bytes of every copy.
pub(super) const COPIED: u64 = 1 << 20;

/// Where every one listens for a guest.
const PORT: u16 = 49_152;

impl Record {
    pub(super) fn new(host: HostId, intent: Intent, now_us: i64) -> Self {
        Self {
            intent,
            done: Done::default(),
            stop: None,
            failed: None,
            disk: false,
            disks: 0,
            process: Process::None,
            began_with: 0,
            kept: None,
            guest: GuestReport::default(),
            held: false,
            changed_at_us: now_us,
            transit: Transit::None,
            ran: false,
            migration: None,
            lacks: None,
            soul: Soul {
                born: (host, 0),
                ticks: 0,
            },
            cpu: None,
            copy: None,
            copied: None,
            is_one: false,
            copy_failed: None,
            unheard: true,
            host,
        }
    }

    /// A newer intent.
    pub(super) fn take(&mut self, intent: Intent) {
        let wanted = &intent.wanted;
        let ids = [
            wanted.arrives.as_ref().map(|arrival| arrival.id),
            wanted.departs.as_ref().map(|departure| departure.id),
            wanted.continues,
        ];
        self.migration = self
            .migration
            .take()
            .filter(|known| ids.contains(&Some(known.id)));
        if !self.intent.wanted.is_for_same_guest(&intent.wanted) {
            self.stop = None;
            self.held = false;
        }
        // What was said before was said of another owner's machine.
        self.unheard |= intent.generation != self.intent.generation;
        self.intent = intent;
        self.copy_failed = None;
        self.failed = None;
    }

    pub(super) fn report(&self, id: ServerId) -> MachineReport {
        let on_its_way = matches!(self.transit, Transit::Arriving(_) | Transit::Copying(_));
        let spec = &self.intent.wanted.spec;
        let shape = Shape {
            vcpus: spec.vcpus,
            max_vcpus: spec.max_vcpus,
            memory_mib: spec.memory_mib,
            max_hot_memory_mib: None,
            root_disk: spec.root_disk.as_ref().map(|disk| disk.size),
        };
        MachineReport {
            id,
            generation: self.intent.generation,
            revision: self.intent.revision,
            settled: self.next() == Step::Settled
                && !on_its_way
                && copy::is_settled(&self.intent.wanted, &self.copies()),
            observed: self.observed(),
            soft_reboots: self.done.soft_reboots,
            hard_reboots: self.done.hard_reboots,
            rebuilds: self.done.rebuilds,
            starts: self.done.starts,
            changed_at_us: self.changed_at_us,
            guest: match self.process {
                Process::None => GuestReport::default(),
                _ => self.guest,
            },
            // Nothing in the cloud wants one yet.
            disks: Vec::new(),
            nics: Vec::new(),
            size: None,
            shape: (self.process != Process::None).then_some(shape),
            migration: self.migration.clone().map(|migration| MigrationReport {
                lacks: self.lacks.clone(),
                ..migration
            }),
            parks: self.intent.wanted.parks,
            copy: self.copy_report(),
            waits: self.next() == Step::Await,
        }
    }

    fn copies(&self) -> Copies {
        Copies {
            made: self.copy,
            begun: None,
            failed: self.copy_failed.as_ref().map(|(id, _)| *id),
        }
    }

    fn copy_report(&self) -> Option<CopyReport> {
        let id = self.intent.wanted.copy?;
        let state = match &self.copy_failed {
            _ if self.copy == Some(id) => CopyState::Made { bytes: COPIED },
            _ if self.intent.wanted.restores == Some(id) => CopyState::Failed {
                reason: "it is not there".to_owned(),
            },
            Some((failed, reason)) if *failed == id => CopyState::Failed {
                reason: reason.clone(),
            },
            _ => CopyState::Copying,
        };
        Some(CopyReport { id, state })
    }

    /// There is to be nothing of it.
    pub(super) fn is_to_go(&self) -> bool {
        self.intent.wanted.power == Power::Absent
    }

    /// What is to be done of copies, once the rest is; `full`: there is no room for any.
    pub(super) fn step_of_copies(&mut self, full: bool) -> bool {
        if self.next() != Step::Settled || self.transit != Transit::None {
            return false;
        }
        match copy::next(&self.intent.wanted, &self.copies()) {
            None => return false,
            Some(CopyStep::Drop) => self.copy = None,
            Some(CopyStep::Make(id)) if full => {
                self.copy_failed = Some((id, "the host has no room left".to_owned()));
            }
            Some(CopyStep::Make(id)) => {
                (self.copy, self.copied) = (Some(id), Some(self.disks));
            }
        }
        true
    }

    /// The process is there, and its guest is not between two hosts.
    pub(super) fn has_guest(&self) -> bool {
        self.process != Process::None && matches!(self.transit, Transit::None | Transit::Copying(_))
    }

    /// The process is gone, and with it what it had of a migration.
    pub(super) fn lose(&mut self) {
        if self.process != Process::None && self.transit != Transit::None {
            self.says(State::Failed {
                reason: "its process has ended".to_owned(),
            });
        }
        (self.process, self.transit) = (Process::None, Transit::None);
        self.lacks = None;
    }

    /// It is offered, and memory is to follow it.
    pub(super) fn owes(&self, of: MigrationId) -> bool {
        let said = self.migration.as_ref().map(|migration| &migration.state);
        self.transit == Transit::Offered(of)
            && matches!(said, Some(State::Offered { owes: true, .. }))
    }

    /// Its process ends by itself.
    pub(super) fn end(&mut self, reason: StopReason) {
        let arriving = matches!(self.transit, Transit::Arriving(_) | Transit::Arrived(_));
        self.lose();
        // Of a guest whose memory is kept, or that never ran here, only a process that was of no use has ended.
        self.stop = (self.kept.is_none() && !arriving).then_some(reason);
    }

    /// A process whose guest has not been let run ends with the agent, and so does a stream, which it carries.
    pub(super) fn agent_ended(&mut self) {
        match self.transit {
            Transit::Arriving(_) | Transit::Arrived(_) => self.lose(),
            Transit::Copying(_) => {
                self.transit = Transit::None;
                self.says(State::Failed {
                    reason: "its agent has ended".to_owned(),
                });
            }
            Transit::None | Transit::Offered(_) => {}
        }
    }

    /// What became of the migration.
    pub(super) fn says(&mut self, state: State) {
        if let Some(migration) = &mut self.migration {
            migration.state = state;
        }
    }

    fn begins(&mut self, id: MigrationId, transit: Transit, state: State) {
        self.transit = transit;
        self.migration = Some(MigrationReport {
            id,
            state,
            progress: Progress::default(),
            lacks: None,
        });
    }

    pub(super) fn remains(&self) -> bool {
        self.disk || self.process != Process::None || self.kept.is_some() || self.copy.is_some()
    }

    pub(super) fn next(&self) -> Step {
        let seen = Seen {
            process: self.process,
            stop: self.stop.as_ref(),
            failed: self.failed.is_some(),
            disk: self.disk || self.intent.wanted.spec.root_disk.is_none(),
            held: self.held,
            kept: self.kept.is_some(),
            transit: self.transit,
            remains: self.remains(),
            unheard: self.unheard,
        };
        match decision::next(&self.intent.wanted, &self.done, &seen) {
            // Its process was told, and does not do it.
            Step::Pause | Step::Resume | Step::Suspend if self.failed.is_some() => Step::Settled,
            step => step,
        }
    }

    pub(super) fn step(&mut self, now_us: i64) -> bool {
        let step = self.next();
        let wanted = &self.intent.wanted.clone();
        match step {
            Step::Settled | Step::Await => return false,
            Step::SkipReboots => {}
            Step::MakeDisk => {
                self.disk = true;
                self.disks += 1;
            }
            Step::RemakeDisk if wanted.restores.is_some() => {
                let copy = wanted.restores.filter(|copy| self.copy == Some(*copy));
                match copy.zip(self.copied) {
                    Some((_, content)) => {
                        // A guest that has run since has written to both.
                        (self.disk, self.disks) = (true, content);
                        self.is_one = true;
                        self.done.rebuilds = wanted.rebuilds;
                    }
                    None => self.failed = Some("there is no such copy".to_owned()),
                }
            }
            Step::RemakeDisk => {
                self.disk = wanted.spec.root_disk.is_some();
                self.disks += 1;
                self.done.rebuilds = wanted.rebuilds;
            }
            Step::Start => {
                if std::mem::take(&mut self.is_one) {
                    self.copied = None;
                }
                self.process = Process::Running;
                self.done.starts += 1;
                let kept = self.kept.take();
                if kept.is_none() {
                    self.soul = Soul {
                        born: (self.host, self.done.starts),
                        ticks: 0,
                    };
                    self.cpu.clone_from(&wanted.spec.cpu);
                }
                self.began_with = kept.unwrap_or(self.done.starts);
                self.guest = GuestReport::default();
                self.stop = None;
            }
            Step::Pause => self.process = Process::Paused,
            Step::Resume => self.process = Process::Running,
            // The process is ended in a step of its own.
            Step::Suspend => {
                self.process = Process::Paused;
                self.kept = Some(self.began_with);
            }
            Step::Forget => self.kept = None,
            Step::Shutdown | Step::Kill => {
                (self.process, self.transit, self.lacks) = (Process::None, Transit::None, None);
            }
            Step::Remove => {
                self.disk = false;
                self.copy = None;
                self.kept = None;
            }
            Step::Arrive | Step::GoOn | Step::Depart | Step::Stay | Step::Lost => {
                self.step_on_its_way(step, wanted);
            }
        }
        let begins = [
            Step::SkipReboots,
            Step::RemakeDisk,
            Step::Start,
            Step::Arrive,
            Step::GoOn,
        ];
        if begins.contains(&step) {
            self.done.soft_reboots = wanted.soft_reboots;
            self.done.hard_reboots = wanted.hard_reboots;
        }
        self.changed_at_us = now_us;
        true
    }

    fn step_on_its_way(&mut self, step: Step, wanted: &Wanted) {
        let process = if self.ran {
            Process::Running
        } else {
            Process::Paused
        };
        match step {
            Step::Arrive => {
                let Some(arrival) = &wanted.arrives else {
                    return;
                };
                self.disk = true;
                self.kept = None;
                self.process = Process::Paused;
                self.guest = GuestReport::default();
                self.done.arrived = Some(arrival.id);
                // What comes has been rebooted and rebuilt as often as was wanted of it.
                self.done.rebuilds = wanted.rebuilds;
                let state = State::Arriving { port: PORT };
                self.begins(arrival.id, Transit::Arriving(arrival.id), state);
            }
            Step::GoOn => {
                self.done.continued = wanted.continues;
                self.done.rebuilds = wanted.rebuilds;
                self.done.starts += 1;
                (self.process, self.transit) = (process, Transit::None);
                self.began_with = self.done.starts;
                self.says(State::Continued);
            }
            Step::Depart => {
                let Some(departure) = &wanted.departs else {
                    return;
                };
                self.done.departed = Some(departure.id);
                self.ran = self.process == Process::Running;
                self.begins(departure.id, Transit::Copying(departure.id), State::Copying);
            }
            Step::Stay => {
                if let Transit::Offered(_) = self.transit {
                    self.process = process;
                }
                self.transit = Transit::None;
                if wanted.continues.is_some() {
                    self.done.continued = wanted.continues;
                    self.says(State::Continued);
                }
            }
            // Lost.
            _ => {
                let reason = "the guest is not here".to_owned();
                self.says(State::Failed {
                    reason: reason.clone(),
                });
                self.failed = Some(reason);
            }
        }
    }

    fn observed(&self) -> Observed {
        if let Some(reason) = self.failed.clone() {
            return Observed::Failed { reason };
        }
        match self.transit {
            Transit::Arriving(_) | Transit::Arrived(_) => return Observed::Arriving,
            Transit::Offered(_) => return Observed::Offered,
            Transit::None | Transit::Copying(_) => {}
        }
        let wanted = self.intent.wanted.power;
        match (self.process, &self.stop) {
            (Process::Running, _) => Observed::Running,
            (Process::Paused, _) => Observed::Paused,
            (Process::None, _) if self.kept.is_some() => Observed::Suspended,
            // However the process ended that it still had when it was to go.
            (Process::None, _) if wanted == Power::Absent && !self.remains() => Observed::Absent,
            (Process::None, Some(reason)) => Observed::Stopped {
                reason: reason.clone(),
            },
            (Process::None, None) if self.next() != Step::Settled => Observed::Starting {
                step: format!("{:?}", self.next()),
            },
            // As wanted; or it was to be suspended, and was gone before.
            (Process::None, None) => Observed::Stopped {
                reason: StopReason::Requested,
            },
        }
    }
}
