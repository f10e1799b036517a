//! A machine sent to another process while its guest runs.
//!
//! [`Sender`] owns the machine; its owner calls [`Sender::advance`] again and again, each time for a megabyte at
//! most, and serves the machine's events in between. When little enough is left ([`decide`]) the guest is stopped,
//! the rest and the machine's state follow, and the other side says that it has a machine: [`Offered`]. Which of the
//! two machines runs from then on is for their owners to say; this one stands still until it is taken back or ended.
//! Whatever fails before that leaves the guest running here ([`Unsent`]). Once all is sent and no answer comes, nobody
//! here knows whether the other side has a machine, and whom it has told: that, too, is an offer.
//!
//! Disks go the same way as memory, if they go: a first round of all that is there, then what was written since.
//!
//! A guest whose memory is to follow it ([`AtLimit::PostCopy`]) is stopped when its policy says so, and the other side is
//! told which pages it does not have ([`Offered::owes`]). They are sent by [`Offered::pay`] from then on; the machine here
//! has to stay until all are there, for as long as the guest runs on the other side.

mod debt;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
mod journal;
mod lanes;
mod offered;
mod report;
mod round;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use uuid::Uuid;

use self::debt::{Answers, Debt};
pub use self::debt::{Paid, Paying};
pub use self::error::MigrationError;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) use self::fuzz::answers as fuzz_answers;
use self::journal::{Journal, Left, Part, Pending, Piece};
use self::lanes::Lanes;
pub use self::offered::Offered;
pub use self::report::{Pause, SendReport, Sending, SentRound};
use self::round::{MORE_ROUNDS, Round};
use super::clocks::Mark;
use super::snapshot::read_pages;
use super::state::STATE_VERSION;
use super::{Machine, MachineError, RunState, SnapshotError};
use crate::stream::converge::{AtLimit, Decision, Policy};
use crate::stream::frame::{FrameWriter, Kind};
use crate::stream::live::{Batch, Ending};
use crate::stream::{Opening, PAGE, StreamError, Totals, malformed, packed};

/// Bytes of state in a frame.
const PIECE: usize = 1 << 20;
/// Pages that are looked at before the owner has its turn, however many of them are zero.
const SCAN_MAX: u64 = 4096;
/// The same of a disk, which is read from its storage.
const DISK_SCAN_MAX: u64 = 512;
/// Bytes of an answer at most: its head and its reason.
const ANSWER_MAX: u64 = 2048;

/// What goes with a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Luggage {
    /// What its owner keeps with it; the other side's is asked for files by it.
    pub owner: Vec<u8>,
    /// The content of its disks goes, too: else the other side has the same.
    pub disks: bool,
}

/// A machine that is being sent.
pub struct Sender<S> {
    /// By which memory goes, if there are any; they end before the machine does.
    lanes: Lanes,
    machine: Machine,
    out: FrameWriter<S>,
    policy: Policy,
    /// What the owner keeps with it, if that is something else than what was sent.
    owner: Option<Vec<u8>>,
    journal: Journal,
    /// Of this round.
    pending: Pending,
    batch: Batch,
    /// What `batch` is of.
    of: Part,
    began: Instant,
    /// When memory had its turn, behind disks, and when all that there was had gone for the first time.
    memory_since: Option<Instant>,
    whole_since: Option<Instant>,
    round: Round,
    report: SendReport,
    /// What the other side does not have when it runs.
    debt: Option<Debt>,
    /// What the guest wrote while some of a round had not gone yet, if its memory is to follow it.
    recent: Option<Left>,
    /// How often what cannot follow is sent once more.
    more_rounds: u32,
    /// Frames that the other side has sent.
    answers: u32,
    /// Since when it has been asked, by a stream with lanes, to make disks durable, and has not said that they are.
    unsettled: Option<Instant>,
    /// Why the other side's answer did not come.
    doubt: Option<MigrationError>,
}

/// A machine that was not sent. It runs if it ran.
pub struct Unsent {
    pub machine: Box<Machine>,
    pub error: MigrationError,
    /// What that took, if it was begun.
    pub report: Option<Box<SendReport>>,
}

impl std::fmt::Debug for Unsent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

/// How far a machine has come.
#[expect(
    clippy::large_enum_variant,
    reason = "it is moved once a megabyte; a box would be made as often"
)]
pub enum Progress<S> {
    Copying(Sender<S>),
    Offered(Offered<S>),
}

impl<S: Read + Write> Sender<S> {
    /// Begins to send `machine` to whoever called [`super::receive`] on the other end of `connection`, whose own
    /// timeouts bound each wait.
    ///
    /// # Errors
    /// The machine neither runs nor is paused, a disk that is to go cannot, or the connection is broken.
    pub fn begin(
        machine: Machine,
        connection: S,
        policy: Policy,
        luggage: Luggage,
    ) -> Result<Self, Unsent> {
        Self::begin_with(machine, connection, policy, luggage, |_, _, _| {
            Ok(Lanes::default())
        })
    }

    fn begin_with(
        mut machine: Machine,
        connection: S,
        policy: Policy,
        luggage: Luggage,
        lanes: impl FnOnce(&Machine, &S, Uuid) -> Result<Lanes, MigrationError>,
    ) -> Result<Self, Unsent> {
        let mut out = FrameWriter::new(connection);
        if !machine.is_whole() {
            let answers = Answers::behind(out.get_mut(), 0);
            return Err(unsent(machine, MigrationError::Arriving, answers));
        }
        // Its log is this one's from here on, and there is one only.
        machine.stop_tracking();
        machine.write_here(true);
        let prepared = prepare(&machine, &mut out, &luggage);
        let prepared = prepared.and_then(|prepared| {
            let lanes = lanes(&machine, out.get_ref(), prepared.0.id)?;
            Ok((lanes, prepared))
        });
        match prepared {
            Ok((lanes, (mut report, journal, pending))) => {
                let now = Instant::now();
                let round = Round::first(now, &pending);
                let memory_since = (pending.count().1 == 0).then_some(now);
                report.lanes = lanes.count();
                Ok(Sender {
                    machine,
                    lanes,
                    out,
                    policy,
                    owner: None,
                    journal,
                    pending,
                    batch: Batch::default(),
                    of: Part::Memory,
                    began: now,
                    memory_since,
                    whole_since: None,
                    round,
                    report,
                    debt: None,
                    recent: None,
                    more_rounds: MORE_ROUNDS,
                    answers: 0,
                    unsettled: None,
                    doubt: None,
                })
            }
            Err(error) => Err(unsent(machine, error, Answers::behind(out.get_mut(), 0))),
        }
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Whose events are to be served; it may reset, pause and resume itself meanwhile. Its devices stay.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Goes by another policy from now on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
        let most = policy.throttle.map_or(0, |throttle| throttle.most);
        let now = self.machine.vcpus.throttled();
        self.machine.vcpus.throttle(now.min(most));
    }

    /// Has something else go with it than what it began with.
    pub fn set_owner(&mut self, owner: Vec<u8>) {
        self.owner = Some(owner);
    }

    pub fn progress(&self) -> Sending<'_> {
        let (memory_left, disk_left) = self.pending.count();
        let memory_left = memory_left + self.lanes.left();
        Sending {
            memory_left: memory_left * PAGE as u64,
            disk_left: disk_left * PAGE as u64,
            elapsed: self.began.elapsed(),
            throttled: self.machine.vcpus.throttled(),
            report: &self.report,
        }
    }

    /// What it is sent by.
    pub fn connection(&mut self) -> &mut S {
        self.out.get_mut()
    }

    /// The machine is not to be sent after all; the other side finds its stream cut short.
    pub fn give_up(self) -> Machine {
        drop(self.lanes);
        self.machine.vcpus.throttle(0);
        self.machine.write_here(false);
        self.machine
    }

    /// Sends some more, at most a megabyte while the guest runs.
    ///
    /// # Errors
    /// The guest has ended, the policy gives up, the connection is broken or the other side refuses: the machine is as
    /// it was.
    pub fn advance(mut self) -> Result<Progress<S>, Unsent> {
        let outcome = self.step();
        if !matches!(outcome, Ok(None)) {
            // Wherever it goes on, it does so as fast as ever.
            self.machine.vcpus.throttle(0);
        }
        match outcome {
            Ok(None) => Ok(Progress::Copying(self)),
            Ok(Some(ran)) => Ok(Progress::Offered(Offered {
                ran,
                journal: self.journal,
                machine: self.machine,
                out: self.out,
                answers: self.answers,
                debt: self.debt,
                report: self.report,
                doubt: self.doubt,
            })),
            Err(error) => {
                let left = self.progress();
                let left = (left.memory_left, left.disk_left);
                (self.report.memory_left, self.report.disk_left) = left;
                let refused = self.lanes.were_refused(&error);
                drop(self.lanes);
                let mut answers = Answers::behind(self.out.get_mut(), self.answers);
                let said = refused.then(|| reason_in(&mut answers)).flatten();
                self.report.whole = self.began.elapsed();
                Err(Unsent {
                    report: Some(Box::new(self.report)),
                    ..unsent(self.machine, said.unwrap_or(error), answers)
                })
            }
        }
    }

    /// Once the other side has it: whether it ran.
    fn step(&mut self) -> Result<Option<bool>, MigrationError> {
        if !matches!(self.machine.state, RunState::Running | RunState::Paused) {
            return Err(SnapshotError::Over.into());
        }
        let running = self.machine.state == RunState::Running;
        if running && !self.journal.logs_memory() && self.policy.at_limit == AtLimit::GiveUp {
            return Err(MigrationError::TooBusy);
        }
        if running && self.is_to_follow_now() {
            self.sync()?;
            if !self.disks_are_settled()? {
                return Ok(None);
            }
            let mut left = self.pending.rest();
            let written = self.take_written()?;
            left.join(&written);
            if self.wants_a_round(&left) {
                // Some of it was there before, and what is zero by now was not then.
                self.journal.has_gone();
                self.pending = Pending::new(left);
                return Ok(None);
            }
            self.settle_disks()?;
            self.recent = Some(written);
            return self.hand_over(left, true);
        }
        if running {
            self.look()?;
        }
        if !self.pending.is_empty() {
            self.send_some()?;
            return Ok(None);
        }
        if !self.lanes_are_dry()? {
            return Ok(None);
        }
        self.sync()?;
        if !self.disks_are_settled()? {
            return Ok(None);
        }
        if !running || !self.journal.has_rounds() {
            let seen = self.take_seen();
            let follows = running && self.policy.at_limit == AtLimit::PostCopy;
            return self.hand_over(seen, follows);
        }
        let written = self.take_written()?;
        match self.after_round(&written)? {
            Decision::Again | Decision::Throttle { .. } => {
                self.next_round(written);
                Ok(None)
            }
            Decision::PostCopy if self.wants_a_round(&written) => {
                self.next_round(written);
                Ok(None)
            }
            decision @ (Decision::Stop | Decision::PostCopy) => {
                self.settle_disks()?;
                self.hand_over(written, decision == Decision::PostCopy)
            }
            Decision::GiveUp => Err(MigrationError::TooBusy),
        }
    }

    /// What has come of the disks is made durable there while the guest runs.
    fn sync(&mut self) -> Result<(), MigrationError> {
        if self.round.disk_content > 0 {
            self.out.write(Kind::Sync, b"")?;
            // What is little may wait at the connection for more.
            self.out.get_mut().flush().map_err(unwritten)?;
            self.round.disk_content = 0;
            self.unsettled = (self.lanes.count() > 0).then(Instant::now);
        }
        Ok(())
    }

    /// Its memory is to follow it, and nobody waits any longer for a first copy of all.
    fn is_to_follow_now(&self) -> bool {
        let (memory, disk) = self.pending.count();
        let asked = self.policy.at_limit == AtLimit::PostCopy;
        let limit = self.policy.limit;
        let late = |since: Instant| since.elapsed() >= limit;
        let late = limit.is_zero() || self.memory_since.is_some_and(late);
        asked && late && memory > 0 && disk == 0 && self.journal.logs_memory()
    }

    /// Whatever has not been written to the storage yet is, where disks go: it is the last occasion to hear that it
    /// could not be, and what the guest was told is durable has to be so there.
    fn settle_disks(&self) -> Result<(), MigrationError> {
        if self.journal.has_disks() {
            for device in &self.machine.devices {
                device.settle().map_err(MachineError::from)?;
            }
        }
        Ok(())
    }

    /// Says what time it is here.
    fn mark(&mut self, read: Option<Duration>) -> Result<(), MigrationError> {
        let mark = packed(&Mark::now(read))?;
        Ok(self.out.write(Kind::Mark, &mark)?)
    }

    /// A frame of what is pending.
    fn send_some(&mut self) -> Result<(), MigrationError> {
        if self.lanes.count() > 0 && self.pending.count().1 == 0 {
            return self.give_some();
        }
        let mut scanned = 0;
        let mut only = None;
        while let Some(Piece { part, number, mask }) = self.pending.next(only) {
            only = Some(part);
            if part != self.of {
                self.of = part;
                self.batch = match part {
                    Part::Memory => Batch::default(),
                    Part::Disk(index) => Batch::of_disk(index as u32),
                };
            }
            let content = match part {
                Part::Memory => read_pages(&self.machine.memory, number, mask)?,
                Part::Disk(index) => self.journal.read(index, number, mask)?,
            };
            // Memory has at most 2^32 blocks, and a disk no more.
            let fresh = self.journal.is_fresh(part);
            self.batch.add(number as u32, mask, &content, fresh);
            scanned += mask.count();
            let most = match part {
                Part::Memory => SCAN_MAX,
                Part::Disk(_) => DISK_SCAN_MAX,
            };
            if self.batch.is_full() || scanned >= most {
                break;
            }
        }
        let kind = match self.of {
            Part::Memory => Kind::Pages,
            Part::Disk(_) => Kind::Blocks,
        };
        if let Some(payload) = self.batch.payload() {
            self.out.write(kind, payload)?;
        }
        let totals = self.batch.totals();
        self.round.content += totals.pages;
        let sum = match self.of {
            Part::Memory => {
                self.round.pages += scanned;
                &mut self.report.totals
            }
            Part::Disk(_) => {
                self.round.disk_pages += scanned;
                self.round.disk_content += totals.pages + totals.zeros;
                &mut self.report.disks
            }
        };
        sum.pages += totals.pages;
        sum.zeros += totals.zeros;
        self.batch.clear();
        Ok(())
    }

    /// Stops the guest and sends what is left, `written` and what has been written since, or says of memory what follows;
    /// whether it ran. None: there is something to be carried out for the guest first.
    fn hand_over(
        &mut self,
        mut written: Left,
        follows: bool,
    ) -> Result<Option<bool>, MigrationError> {
        let began = Instant::now();
        let ran = self.machine.state == RunState::Running;
        if ran {
            if let Err(error) = self.machine.rest() {
                self.machine.run_on(&error);
                return Err(error.into());
            }
            self.machine.state = RunState::Paused;
        }
        let stop = began.elapsed();
        let over = self.machine.owes() || !self.machine.announced.is_empty();
        let outcome = match over {
            true => Ok(()),
            false => self.rest_of_it(&mut written, began, ran, follows),
        };
        if ran && outcome.is_err() {
            // What it has stood still for in vain.
            let pause = &mut self.report.pause;
            (pause.stop, pause.send) = (stop, began.elapsed().saturating_sub(stop + pause.state));
        }
        if over || outcome.is_err() {
            self.debt = None;
            if ran && let Err(error) = self.machine.run() {
                self.machine.run_on(&error);
                return Err(error.into());
            }
            // Also of one that stood still: nobody else knows what it had written before.
            self.next_round(written);
        }
        outcome?;
        match ran {
            true => self.report.pause.stop = stop,
            false => self.report.pause = Pause::default(),
        }
        self.report.whole = self.began.elapsed();
        Ok((!over).then_some(ran))
    }

    fn rest_of_it(
        &mut self,
        written: &mut Left,
        stopped: Instant,
        ran: bool,
        follows: bool,
    ) -> Result<(), MigrationError> {
        let began = Instant::now();
        // First: whatever a device still does for it is in what is taken next.
        let (read, state) = self.machine.packed_at()?;
        self.report.pause.state = began.elapsed();
        let began = Instant::now();
        let last = self.journal.take_last(&self.machine)?;
        written.join(&last);
        let mut recent = self.recent.take().unwrap_or_else(|| self.journal.nothing());
        recent.join(&last);
        let mut rest = written.clone();
        if follows {
            // Of what is hot there is another mapping, which comes only with its device.
            let end = self.machine.memory.bytes();
            let recent = recent.take_memory_before(end);
            self.debt = Some(Debt::new(rest.take_memory_before(end), recent));
        }
        self.pending = Pending::new(rest);
        self.journal.has_gone();
        (self.report.last, self.report.last_disk) = self.pending.count();
        let longest = self.policy.longest;
        while !self.pending.is_empty() {
            if stopped.elapsed() > longest {
                return Err(MigrationError::Late { longest });
            }
            self.send_some()?;
        }
        if let Some(debt) = &self.debt {
            self.report.owed = debt.left() / PAGE as u64;
            for payload in debt.names() {
                self.out.write(Kind::Owed, &payload)?;
            }
        }
        if let Some(owner) = self.owner.take() {
            self.out.write(Kind::Owner, &owner)?;
        }
        for piece in state.chunks(PIECE) {
            self.out.write(Kind::State, piece)?;
        }
        self.end_lanes(stopped)?;
        if stopped.elapsed() > longest {
            return Err(MigrationError::Late { longest });
        }
        let ending = Ending {
            memory: self.report.totals,
            disks: self.report.disks,
            ran,
        };
        self.mark(Some(read))?;
        self.out.write(Kind::End, &packed(&ending)?)?;
        // From here on the other side may have all of it.
        let flushed = self.out.get_mut().flush();
        self.report.pause.send = began.elapsed();
        let began = Instant::now();
        let answered = match flushed {
            Ok(()) => self.await_answer(),
            Err(source) => Err(unwritten(source).into()),
        };
        match answered {
            Ok(()) => {}
            Err(refused @ MigrationError::Refused { .. }) => return Err(refused),
            Err(error) => self.doubt = Some(error),
        }
        self.report.pause.answer = began.elapsed();
        Ok(())
    }
}

impl<S: Read + Write> Sender<S> {
    /// The other side's, which may want some of what it does not have until then: to make a machine it may have to touch
    /// its memory.
    fn await_answer(&mut self) -> Result<(), MigrationError> {
        let mut broken = None;
        loop {
            let mut answers = Answers::behind(self.out.get_mut(), self.answers);
            match (answers.next(), &mut self.debt) {
                (Ok((Kind::Ready, _)), _) => {
                    self.answers = answers.frames();
                    return Ok(());
                }
                (Ok((Kind::Refused, reason)), _) => return Err(refused(reason)),
                (Ok((kind, payload)), Some(debt)) => debt.hear(kind, payload)?,
                (Ok(_), None) => return Err(no_answer()),
                (Err(error), _) => return Err(broken.unwrap_or(error.into())),
            }
            self.answers = answers.frames();
            if let Some(debt) = &mut self.debt
                && let Err(error) = debt.pay(&self.machine.memory, &mut self.out)
            {
                // It may have said why.
                broken = Some(error);
            }
        }
    }
}

type Prepared = (SendReport, Journal, Pending);

fn prepare<S: Write>(
    machine: &Machine,
    out: &mut FrameWriter<S>,
    luggage: &Luggage,
) -> Result<Prepared, MigrationError> {
    if machine.state != RunState::Paused {
        machine.expect(RunState::Running, "sent")?;
    }
    let opening = Opening {
        id: Uuid::new_v4(),
        base: None,
        memory: machine.memory.file_bytes()?,
        made_by: concat!("fractus-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    out.write(Kind::Opening, &packed(&opening)?)?;
    let mut config = STATE_VERSION.to_le_bytes().to_vec();
    config.extend(packed(&machine.config)?);
    out.write(Kind::Config, &config)?;
    out.write(Kind::Owner, &luggage.owner)?;
    let (journal, all) = Journal::begin(machine, luggage.disks)?;
    let sizes = journal.sizes();
    if luggage.disks {
        out.write(Kind::Disks, &packed(&sizes)?)?;
    }
    out.write(Kind::Mark, &packed(&Mark::now(None))?)?;
    // The other side makes room for it meanwhile.
    out.get_mut().flush().map_err(unwritten)?;
    let report = SendReport {
        id: opening.id,
        lanes: 0,
        memory: opening.memory,
        disk: sizes.iter().sum(),
        totals: Totals::default(),
        disks: Totals::default(),
        rounds: Vec::new(),
        last: 0,
        last_disk: 0,
        owed: 0,
        memory_left: 0,
        disk_left: 0,
        pause: Pause::default(),
        whole: Duration::ZERO,
    };
    Ok((report, journal, Pending::new(all)))
}

/// Waits for the other side's, which has said nothing before.
pub(super) fn answer<S: Read>(connection: S) -> Result<(), MigrationError> {
    match Answers::behind(connection, 0).next()? {
        (Kind::Ready, _) => Ok(()),
        (Kind::Refused, reason) => Err(refused(reason)),
        _ => Err(no_answer()),
    }
}

/// Why it was refused, if that is what was said.
fn reason_in<S: Read>(answers: &mut Answers<S>) -> Option<MigrationError> {
    loop {
        match answers.next() {
            Ok((Kind::Refused, reason)) => return Some(refused(reason)),
            Ok((Kind::Wanted | Kind::Got, _)) => {}
            _ => return None,
        }
    }
}

pub(super) fn late_at(action: &'static str) -> StreamError {
    let source = std::io::ErrorKind::TimedOut.into();
    StreamError::Io { action, source }
}

fn unwritten(source: std::io::Error) -> StreamError {
    let action = "write";
    StreamError::Io { action, source }
}

fn no_answer() -> MigrationError {
    malformed("an answer that is none").into()
}

fn refused(reason: &[u8]) -> MigrationError {
    let reason = String::from_utf8_lossy(reason).into_owned();
    MigrationError::Refused { reason }
}

/// With the reason that the other side gave, if it closed the connection and left one.
fn unsent<S: Read>(machine: Machine, error: MigrationError, mut answers: Answers<S>) -> Unsent {
    machine.write_here(false);
    let broken = matches!(
        &error,
        MigrationError::Machine(SnapshotError::Stream(StreamError::Io { action: "write", source }))
            if source.kind() != std::io::ErrorKind::WouldBlock
    );
    let error = match broken.then(|| reason_in(&mut answers)) {
        Some(Some(refused)) => refused,
        _ => error,
    };
    Unsent {
        machine: Box::new(machine),
        error,
        report: None,
    }
}
