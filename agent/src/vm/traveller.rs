//! A machine of its own process, wherever its guest is on its way: here, being sent, or offered to another host or process.
//!
//! Whoever asks for what cannot be done meanwhile hears so; one that was offered stands still until it is told to stay
//! or its process is ended.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::{self, Followed, Lacks, Policy, Progress, State as Journey};
use fractus_agent_api::size::Size;
use fractus_vmm::config::{DiskConfig, NetConfig, NetFiles};
use fractus_vmm::machine::{
    self, Compression, DiskCopyPolicy, DiskCopying, Handed, Handing, HandingStep, Luggage, Machine,
    Offered, Paying, RunState, Scope, SendReport, Sender, SnapshotOptions, Unsent,
};
use fractus_vmm::stream::converge;
use rustix::event::{EventfdFlags, eventfd};

use super::feeding::Lines;
use super::guest::{Guest, GuestError, GuestEvent, event};
use super::paced::Paced;
use super::protocol::{MachineEvent, State};
use super::rounds;
use super::seal::{Connection, Sealed};
use crate::volume::room::Room;

/// Rounds that are told of: as many of the first as of the last.
const ROUNDS: usize = 64;
pub(super) const PAGE: u64 = fractus_vmm::stream::PAGE as u64;
/// In which another process of this host makes a machine of what it was handed.
const HANDED_IN: Duration = Duration::from_secs(10);
/// In which the other side says on a new connection what it lacks.
const LACKING: Duration = Duration::from_secs(10);

/// Nobody has asked the guest whether an image is worth standing still for: it is not for more than a second, and one
/// that writes too fast for that has none.
const COPY: converge::Policy = converge::Policy {
    downtime: Duration::from_millis(500),
    longest: Duration::from_secs(1),
    limit: Duration::from_secs(1800),
    at_limit: converge::AtLimit::GiveUp,
    throttle: None,
};

pub struct Traveller {
    stage: Stage,
    /// Of the machine, which is here then.
    copying: Option<DiskCopying>,
    /// Of the machine, wherever it is.
    events: OwnedFd,
    /// Never readable: what one asks for that was offered waits.
    silence: OwnedFd,
    /// It arrived from a host on which it did not run.
    stands: bool,
    /// It was ended while it was another host's, perhaps: nobody has been told.
    let_go: bool,
    /// How what it owes stands, of one that was offered.
    paying: Paying,
    /// The connection by which that goes is broken.
    broken: bool,
    /// By which other connections come for memory that is still to come.
    lines: Option<Lines>,
    /// It did not come by the last of them any more, and this is why.
    starving: Option<String>,
}

#[expect(
    clippy::large_enum_variant,
    reason = "there is one of it in a process, and a Sender is moved for each megabyte"
)]
enum Stage {
    Here(Machine),
    Sent(Sender<Sealed<Paced>>),
    Offered(Offered<Sealed<Paced>>),
    Handing(Handing<Paced>),
    Handed(Handed),
    /// Between two of them, and after what took it along failed.
    Nowhere,
}

impl Traveller {
    pub fn new(machine: Machine) -> io::Result<Self> {
        Ok(Self {
            events: machine.event_fd().try_clone_to_owned()?,
            silence: eventfd(0, EventfdFlags::CLOEXEC)?,
            stage: Stage::Here(machine),
            copying: None,
            stands: false,
            let_go: false,
            paying: Paying::More,
            broken: false,
            lines: None,
            starving: None,
        })
    }

    /// One that has arrived, and ran where it was, or not; `lines` bring what of its memory has not.
    pub fn arrived(machine: Machine, ran: bool, lines: Option<Lines>) -> io::Result<Self> {
        Ok(Self {
            stands: !ran,
            lines,
            ..Self::new(machine)?
        })
    }

    fn machine(&self) -> Option<&Machine> {
        match &self.stage {
            Stage::Here(machine) => Some(machine),
            Stage::Sent(sender) => Some(sender.machine()),
            Stage::Offered(offered) => Some(offered.machine()),
            Stage::Handing(handing) => Some(handing.machine()),
            Stage::Handed(handed) => Some(handed.machine()),
            Stage::Nowhere => None,
        }
    }

    /// The machine, if it may be told anything.
    fn free(&mut self) -> Result<&mut Machine, GuestError> {
        match &mut self.stage {
            Stage::Here(machine) => Ok(machine),
            Stage::Sent(sender) => Ok(sender.machine_mut()),
            Stage::Handing(handing) => Ok(handing.machine_mut()),
            Stage::Offered(_) => Err(travels("has been offered to another host")),
            Stage::Handed(_) => Err(travels("has been handed over to another process")),
            Stage::Nowhere => Err(travels("is gone")),
        }
    }

    /// The machine, if its devices may come and go.
    fn at_home(&mut self) -> Result<&mut Machine, GuestError> {
        match self.stage {
            Stage::Sent(_) => Err(travels("is being sent to another host")),
            Stage::Handing(_) => Err(travels("is being handed over to another process")),
            Stage::Here(_) | Stage::Offered(_) | Stage::Handed(_) | Stage::Nowhere => self.free(),
        }
    }

    /// Some more of the memory that follows.
    fn pay(
        &mut self,
        mut offered: Offered<Sealed<Paced>>,
        tells: bool,
    ) -> Option<(Journey, Option<Progress>)> {
        if !offered.owes() || self.broken {
            self.stage = Stage::Offered(offered);
            return None;
        }
        offered.connection().socket().allow();
        let paid = offered.pay();
        let how = match &paid {
            Ok(paying) => {
                self.paying = *paying;
                None
            }
            Err(error) => {
                self.broken = true;
                Some(super::chain(error))
            }
        };
        let tells = tells || how.is_some() || !offered.owes();
        let progress = tells.then(|| Progress {
            broken: how,
            ..owed(&offered)
        });
        let journey = journey(&offered);
        self.stage = Stage::Offered(offered);
        Some((journey, progress))
    }

    fn not_sent(&mut self, unsent: Unsent) -> String {
        let reason = super::chain(&unsent.error);
        self.stage = Stage::Here(*unsent.machine);
        reason
    }
}

fn travels(what: &str) -> GuestError {
    GuestError::Machine(format!("it {what}"))
}

impl Guest for Traveller {
    fn start(&mut self) -> Result<(), GuestError> {
        let stands = self.stands;
        let machine = self.at_home()?;
        match machine.state() {
            RunState::Paused if stands => Ok(()),
            // One that goes on from a file, or from another host.
            RunState::Paused => Ok(machine.resume()?),
            _ => Ok(machine.start()?),
        }
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(self.free()?.pause()?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(self.free()?.resume()?)
    }

    fn press_power_button(&mut self) -> Result<(), GuestError> {
        self.free()?.press_power_button();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        if let Stage::Offered(_) | Stage::Handed(_) = self.stage {
            // It must not run for that.
            (self.stage, self.let_go) = (Stage::Nowhere, true);
            return Ok(());
        }
        self.free()?.stop();
        Ok(())
    }

    fn attach_disk(&mut self, config: DiskConfig, file: File) -> Result<String, GuestError> {
        Ok(self.at_home()?.attach_disk(config, file)?)
    }

    fn attach_net(&mut self, config: NetConfig, files: NetFiles) -> Result<String, GuestError> {
        Ok(self.at_home()?.attach_net(config, files)?)
    }

    fn detach(&mut self, device: &str) -> Result<(), GuestError> {
        Ok(self.at_home()?.detach(device)?)
    }

    fn size(&self) -> Size {
        let Some(machine) = self.machine() else {
            return Size {
                vcpus: 0,
                vcpus_used: 0,
                max_vcpus: None,
                memory_mib: 0,
                hot_memory_mib: 0,
                hot_plugged_mib: 0,
                max_hot_memory_mib: None,
            };
        };
        let config = machine.config();
        let hot = config.hot_memory;
        Size {
            vcpus: config.cpus.count,
            vcpus_used: machine.vcpus_used(),
            max_vcpus: config.cpus.max,
            memory_mib: config.memory.bytes >> 20,
            hot_memory_mib: hot.map_or(0, |hot| hot.bytes >> 20),
            hot_plugged_mib: machine.hot_memory().unwrap_or(0) >> 20,
            max_hot_memory_mib: hot.map(|hot| hot.max >> 20),
        }
    }

    fn resize(&mut self, vcpus: u8, hot_memory: u64) -> Result<(), GuestError> {
        let machine = self.at_home()?;
        let config = machine.config();
        let (count, hot) = (config.cpus.count, config.hot_memory);
        if vcpus != count {
            machine.set_vcpus(vcpus)?;
        }
        if hot_memory != hot.map_or(0, |hot| hot.bytes) {
            machine.set_hot_memory(hot_memory)?;
        }
        Ok(())
    }

    fn names(&self) -> (Vec<String>, Vec<String>) {
        let names = |machine: &Machine| (machine.disks().to_vec(), machine.nets().to_vec());
        self.machine().map(names).unwrap_or_default()
    }

    fn write(
        &mut self,
        file: File,
        compression: Compression,
        note: &[u8],
    ) -> Result<(), GuestError> {
        let options = SnapshotOptions {
            compression,
            ..Scope::Whole.into()
        };
        let written = self.at_home()?.snapshot_of(options, file, note);
        let report = written.map_err(|error| GuestError::Machine(super::chain(&error)))?;
        super::log::line(format_args!("{report:?}"));
        Ok(())
    }

    fn copy(&mut self, file: File) -> Result<(), GuestError> {
        let reserve = Room::beside(&file)?.reserve();
        let policy = DiskCopyPolicy {
            converge: COPY,
            reserve,
        };
        let copying = self.at_home()?.copy_disk(0, &file, policy);
        let copying = copying.map_err(|error| GuestError::Machine(super::chain(&error)))?;
        self.copying = Some(copying);
        Ok(())
    }

    fn copy_on(&mut self) -> Option<Result<(), GuestError>> {
        let mut copying = self.copying.take()?;
        let machine = match self.at_home() {
            Ok(machine) => machine,
            Err(error) => return Some(Err(error)),
        };
        match copying.advance(machine) {
            Ok(None) => {
                self.copying = Some(copying);
                None
            }
            Ok(Some(report)) => {
                super::log::line(format_args!("{report:?}"));
                Some(Ok(()))
            }
            Err(error) => Some(Err(GuestError::Machine(super::chain(&error)))),
        }
    }

    fn copy_no_more(&mut self) {
        self.copying = None;
    }

    fn send(
        &mut self,
        connection: Connection,
        policy: Policy,
        note: Vec<u8>,
    ) -> Result<(), GuestError> {
        self.at_home()?;
        let connections = connection.sealed(Paced::new)?;
        let policy = by(policy, connections.main.is_sealed());
        let Stage::Here(machine) = std::mem::replace(&mut self.stage, Stage::Nowhere) else {
            return Err(travels("is gone"));
        };
        let luggage = Luggage {
            owner: note,
            disks: true,
        };
        match Sender::begin_by(machine, connections, policy, luggage) {
            Ok(sender) => {
                self.stage = Stage::Sent(sender);
                Ok(())
            }
            Err(unsent) => Err(GuestError::Machine(self.not_sent(unsent))),
        }
    }

    fn hand_over(
        &mut self,
        connection: UnixStream,
        note: Vec<u8>,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), GuestError> {
        self.at_home()?;
        let Stage::Here(machine) = std::mem::replace(&mut self.stage, Stage::Nowhere) else {
            return Err(travels("is gone"));
        };
        let connection = Paced::with_answer_in(connection, HANDED_IN);
        match Handing::begin(machine, connection, &note, files) {
            Ok(handing) => {
                self.stage = Stage::Handing(handing);
                Ok(())
            }
            Err(unsent) => Err(GuestError::Machine(self.not_sent(unsent))),
        }
    }

    fn is_being_sent(&self) -> bool {
        matches!(self.stage, Stage::Sent(_) | Stage::Handing(_))
    }

    fn owes(&self) -> bool {
        matches!(&self.stage, Stage::Offered(offered) if offered.owes())
    }

    fn go_on_by(&mut self, connection: UnixStream) -> Result<(), GuestError> {
        let Stage::Offered(offered) = &mut self.stage else {
            return Err(GuestError::Machine("nothing is to follow it".to_owned()));
        };
        // It has its time to say what it lacks.
        let connection = Paced::with_answer_in(connection, LACKING);
        let gone_on = offered.go_on_by(Sealed::plain(connection));
        (self.broken, self.paying) = (gone_on.is_err(), Paying::More);
        gone_on.map_err(|error| GuestError::Machine(super::chain(&error)))
    }

    fn lacks(&self) -> Option<Lacks> {
        self.machine().filter(|machine| !machine.is_whole())?;
        let comes = self.lines.as_ref().is_some_and(Lines::carry);
        Some(Lacks {
            starving: self.starving.clone().filter(|_| !comes),
        })
    }

    fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Offered(offered) if offered.owes() && self.paying == Paying::Waits => {
                (!self.broken).then(|| offered.line().as_fd())
            }
            Stage::Handing(handing) if !handing.is_awaited() => Some(handing.connection().as_fd()),
            _ => None,
        }
    }

    fn is_handed_over(&self) -> bool {
        matches!(self.stage, Stage::Handed(_))
    }

    fn send_by(&mut self, policy: Option<Policy>, note: Option<Vec<u8>>) {
        if let (Stage::Handing(handing), Some(note)) = (&mut self.stage, &note) {
            handing.set_owner(note.clone());
        }
        if let Stage::Sent(sender) = &mut self.stage {
            if let Some(policy) = policy {
                let policy = by(policy, sender.connection().is_sealed());
                sender.set_policy(policy);
            }
            if let Some(note) = note {
                sender.set_owner(note);
            }
        }
    }

    fn send_on(&mut self, tells: bool) -> Option<(Journey, Option<Progress>)> {
        let mut sender = match std::mem::replace(&mut self.stage, Stage::Nowhere) {
            Stage::Sent(sender) => sender,
            Stage::Handing(handing) => return self.hand_on(handing),
            Stage::Offered(offered) => return self.pay(offered, tells),
            other => {
                self.stage = other;
                return None;
            }
        };
        sender.connection().socket().allow();
        match sender.advance() {
            Ok(machine::Progress::Copying(sender)) => {
                let now = tells.then(|| sender.progress());
                let progress = now.map(|now| Progress {
                    memory_left: now.memory_left,
                    disk_left: now.disk_left,
                    throttled: now.throttled,
                    ..progress(now.report, now.elapsed)
                });
                self.stage = Stage::Sent(sender);
                Some((Journey::Copying, progress))
            }
            Ok(machine::Progress::Offered(offered)) => {
                let (journey, progress) = (journey(&offered), owed(&offered));
                (self.paying, self.broken) = (Paying::More, false);
                self.stage = Stage::Offered(offered);
                Some((journey, Some(progress)))
            }
            Err(mut unsent) => {
                let progress = unsent.report.take().map(|report| in_vain(&report));
                let reason = self.not_sent(unsent);
                Some((Journey::Failed { reason }, progress))
            }
        }
    }

    fn stay(&mut self) -> Result<(), GuestError> {
        match std::mem::replace(&mut self.stage, Stage::Nowhere) {
            Stage::Sent(sender) => {
                self.stage = Stage::Here(sender.give_up());
                Ok(())
            }
            Stage::Handing(handing) => {
                self.stage = Stage::Here(handing.give_up());
                Ok(())
            }
            offered @ (Stage::Offered(_) | Stage::Handed(_)) => {
                self.stage = offered;
                self.take_back()
            }
            other => {
                self.stage = other;
                Ok(())
            }
        }
    }

    fn state(&self) -> State {
        match self.machine().map(Machine::state) {
            Some(RunState::Ready) => State::Ready,
            Some(RunState::Running) => State::Running,
            Some(RunState::Paused) => State::Paused,
            Some(RunState::Stopped) | None => State::Stopped,
        }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        match self.stage {
            Stage::Here(_) | Stage::Sent(_) | Stage::Handing(_) => self.events.as_fd(),
            Stage::Offered(_) | Stage::Handed(_) | Stage::Nowhere => self.silence.as_fd(),
        }
    }

    fn next_event(&mut self) -> Option<GuestEvent> {
        if std::mem::take(&mut self.let_go) {
            let reason = StopReason::Requested;
            return Some(GuestEvent::Machine(MachineEvent::Stopped { reason }));
        }
        let event = self.free().ok()?.next_event().map(event)?;
        match &event {
            GuestEvent::Followed(Ok(())) => (self.lines, self.starving) = (None, None),
            GuestEvent::Followed(Err(reason)) => self.starving = Some(reason.clone()),
            _ => {}
        }
        Some(event)
    }
}

impl Traveller {
    /// As soon as the other process is ready for it.
    fn hand_on(&mut self, handing: Handing<Paced>) -> Option<(Journey, Option<Progress>)> {
        match handing.advance() {
            Ok(HandingStep::Waiting(handing)) => {
                self.stage = Stage::Handing(handing);
                None
            }
            Ok(HandingStep::Over(handed)) => {
                let journey = Journey::Offered {
                    ran: handed.ran(),
                    doubt: None,
                    owes: false,
                };
                let progress = Progress {
                    pause: Some(pause(handed.pause())),
                    ..Progress::default()
                };
                self.stage = Stage::Handed(handed);
                Some((journey, Some(progress)))
            }
            Err(unsent) => {
                let reason = self.not_sent(unsent);
                Some((Journey::Failed { reason }, None))
            }
        }
    }

    fn take_back(&mut self) -> Result<(), GuestError> {
        match std::mem::replace(&mut self.stage, Stage::Nowhere) {
            Stage::Offered(offered) => {
                self.stage = Stage::Here(offered.take_back()?);
                Ok(())
            }
            Stage::Handed(handed) => {
                self.stage = Stage::Here(handed.take_back()?);
                Ok(())
            }
            other => {
                self.stage = other;
                Ok(())
            }
        }
    }
}

fn journey(offered: &Offered<Sealed<Paced>>) -> Journey {
    Journey::Offered {
        ran: offered.ran(),
        doubt: offered.doubt().map(|doubt| super::chain(doubt)),
        owes: offered.owes(),
    }
}

/// How far one is that was not.
fn in_vain(report: &SendReport) -> Progress {
    let stood = report.pause != machine::Pause::default();
    Progress {
        memory_left: report.memory_left,
        disk_left: report.disk_left,
        pause: stood.then(|| pause(report.pause)),
        ..progress(report, report.whole)
    }
}

/// How far one is that was offered, and what follows it.
fn owed(offered: &Offered<Sealed<Paced>>) -> Progress {
    let (report, paid) = (offered.report(), offered.paid());
    let mut progress = progress(report, report.whole);
    progress.pause = Some(pause(report.pause));
    progress.memory_left = offered.left();
    if report.owed > 0 {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bytes = (paid.totals.pages + paid.totals.zeros) * PAGE;
        progress.followed = Some(Followed {
            bytes,
            waits: paid.wanted,
            took_us: us(paid.took),
        });
    }
    progress
}

/// In the words of the stream. By a connection of its own no memory follows a guest.
fn by(policy: Policy, is_sealed: bool) -> converge::Policy {
    converge::Policy {
        downtime: Duration::from_millis(policy.downtime_ms),
        longest: Duration::from_millis(policy.longest_ms),
        limit: Duration::from_millis(policy.limit_ms),
        at_limit: match policy.at_limit {
            migration::AtLimit::Stop => converge::AtLimit::Stop,
            migration::AtLimit::GiveUp => converge::AtLimit::GiveUp,
            migration::AtLimit::PostCopy if is_sealed => converge::AtLimit::Stop,
            migration::AtLimit::PostCopy => converge::AtLimit::PostCopy,
        },
        throttle: policy.throttle.map(|most| converge::Throttle { most }),
    }
}

fn pause(pause: machine::Pause) -> migration::Pause {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    migration::Pause {
        stop_us: us(pause.stop),
        state_us: us(pause.state),
        send_us: us(pause.send),
        answer_us: us(pause.answer),
    }
}

/// In the words of the wire.
fn progress(report: &SendReport, elapsed: Duration) -> Progress {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let all = report.rounds.len();
    let told = |(number, _): &(usize, _)| *number < ROUNDS / 2 || number + ROUNDS / 2 >= all;
    Progress {
        memory_total: report.memory,
        memory_sent: report.totals.pages * PAGE,
        memory_left: 0,
        disk_total: report.disk,
        disk_sent: report.disks.pages * PAGE,
        disk_left: 0,
        elapsed_us: us(elapsed),
        throttled: 0,
        // A handful.
        lanes: report.lanes as u8,
        rounds: (report.rounds.iter().enumerate().filter(told))
            .map(|(_, round)| rounds::round(round))
            .collect(),
        pause: None,
        followed: None,
        broken: None,
    }
}
