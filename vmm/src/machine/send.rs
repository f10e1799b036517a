//! A machine sent to another process while its guest runs.
//!
//! [`Sender`] owns the machine; its owner calls [`Sender::advance`] again and again, each time for a megabyte at
//! most, and serves the machine's events in between. When little enough is left ([`decide`]) the guest is stopped,
//! the rest and the machine's state follow, and the other side says that it has a machine: [`Offered`]. Which of the
//! two machines runs from then on is for their owners to say; this one stands still until it is taken back or ended.
//! Whatever fails before that leaves the guest running here ([`Unsent`]). Once all is sent and no answer comes, nobody
//! here knows whether the other side has a machine, and whom it has told: that, too, is an offer.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::snapshot::{WriteLog, present, read_pages};
use super::state::STATE_VERSION;
use super::{BuildError, Machine, MachineError, RunState, SnapshotError};
use crate::config::ConfigError;
use crate::memory::PageSet;
use crate::stream::converge::{AtLimit, Decision, Policy, Standing, decide};
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::live::Batch;
use crate::stream::{Mask, Opening, PAGE, StreamError, Totals, packed};

/// Bytes of state in a frame.
const PIECE: usize = 1 << 20;
/// Pages that are looked at before the owner has its turn, however many of them are zero.
const SCAN_MAX: u64 = 4096;
/// A round of so many pages with content says how fast the connection is; a smaller one may have found room in the
/// buffers of the kernel.
const TELLING: u64 = 256;
/// Bytes of an answer at most: its head and its reason.
const ANSWER_MAX: u64 = 2048;

/// Why a machine was not sent, or did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    #[error(transparent)]
    Machine(#[from] SnapshotError),
    #[error("the machine that arrives is not one of this host's: {0}")]
    Config(#[from] ConfigError),
    #[error("the guest writes to its memory faster than it can be sent")]
    TooBusy,
    #[error("the other side does not take the machine: {reason}")]
    Refused { reason: String },
    #[error("the guest stood still for {longest:?}, and not all had been sent")]
    Late { longest: Duration },
}

macro_rules! through_snapshot_error {
    ($($error:ty),*) => {$(
        impl From<$error> for MigrationError {
            fn from(error: $error) -> Self {
                MigrationError::Machine(error.into())
            }
        }
    )*};
}

through_snapshot_error!(
    StreamError,
    MachineError,
    BuildError,
    crate::memory::MemoryError
);

/// What a migration took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendReport {
    pub id: Uuid,
    pub totals: Totals,
    /// While the guest ran, the first of all memory.
    pub rounds: Vec<SentRound>,
    /// Pages that were sent while it stood still.
    pub last: u64,
    pub pause: Pause,
    pub whole: Duration,
}

/// One copy of what had been written to, and what was decided after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentRound {
    pub pages: u64,
    pub took: Duration,
    /// Bytes that had been written to meanwhile.
    pub left: u64,
    pub decision: Decision,
}

/// How long the guest stood still for what; nothing, if it did anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pause {
    /// vCPUs and devices came to rest.
    pub stop: Duration,
    /// Their state was taken.
    pub state: Duration,
    /// What was left of memory, and the state, went to the other side.
    pub send: Duration,
    /// The other side made a machine of it.
    pub answer: Duration,
}

/// A machine that is being sent.
pub struct Sender<S> {
    machine: Machine,
    out: FrameWriter<S>,
    policy: Policy,
    /// None: nobody knows what is written, or nobody writes.
    log: Option<WriteLog>,
    /// Of this round, the last first.
    pending: Vec<(u64, Mask)>,
    batch: Batch,
    /// Nothing was sent before what is pending: zero is zero there, too.
    fresh: bool,
    began: Instant,
    round: Round,
    report: SendReport,
    /// Why the other side's answer did not come.
    doubt: Option<MigrationError>,
}

struct Round {
    began: Instant,
    pages: u64,
    /// Of these, pages that were not zero.
    content: u64,
    /// Bytes a second, of the last round that could tell.
    rate: Option<u64>,
    /// Bytes that the round before left; none: it is the first.
    left: Option<u64>,
    /// Rounds in a row that left no less than the one before.
    stalled: u32,
}

/// A machine that was not sent. It runs if it ran.
pub struct Unsent {
    pub machine: Box<Machine>,
    pub error: MigrationError,
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
    Offered(Offered),
}

/// A machine that stands still here and, unless there is a [`Offered::doubt`], there. Dropping it ends this one.
pub struct Offered {
    /// It takes a while to end it: not before somebody knows of the offer.
    _log: Option<WriteLog>,
    machine: Machine,
    ran: bool,
    doubt: Option<MigrationError>,
    report: SendReport,
}

impl<S: Read + Write> Sender<S> {
    /// Begins to send `machine` to whoever called [`super::receive`] on the other end of `connection`, whose own
    /// timeouts bound each wait.
    ///
    /// # Errors
    /// The machine neither runs nor is paused, or the connection is broken.
    pub fn begin(machine: Machine, connection: S, policy: Policy) -> Result<Self, Unsent> {
        let mut out = FrameWriter::new(connection);
        match prepare(&machine, &mut out) {
            Ok((id, log, pending)) => {
                let now = Instant::now();
                Ok(Sender {
                    machine,
                    out,
                    policy,
                    log,
                    pending,
                    batch: Batch::default(),
                    fresh: true,
                    began: now,
                    round: Round {
                        began: now,
                        pages: 0,
                        content: 0,
                        rate: None,
                        left: None,
                        stalled: 0,
                    },
                    report: SendReport {
                        id,
                        totals: Totals::default(),
                        rounds: Vec::new(),
                        last: 0,
                        pause: Pause::default(),
                        whole: Duration::ZERO,
                    },
                    doubt: None,
                })
            }
            Err(error) => Err(unsent(machine, error, out.get_mut())),
        }
    }

    /// Whose events are to be served; it may reset, pause and resume itself meanwhile. Its devices stay.
    pub fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// The machine is not to be sent after all; the other side finds its stream cut short.
    pub fn give_up(self) -> Machine {
        self.machine
    }

    /// Sends some more, at most a megabyte while the guest runs.
    ///
    /// # Errors
    /// The guest has ended, the policy gives up, the connection is broken or the other side refuses: the machine is as
    /// it was.
    pub fn advance(mut self) -> Result<Progress<S>, Unsent> {
        match self.step() {
            Ok(None) => Ok(Progress::Copying(self)),
            Ok(Some(ran)) => Ok(Progress::Offered(Offered {
                ran,
                _log: self.log,
                machine: self.machine,
                report: self.report,
                doubt: self.doubt,
            })),
            Err(error) => Err(unsent(self.machine, error, self.out.get_mut())),
        }
    }

    /// Once the other side has it: whether it ran.
    fn step(&mut self) -> Result<Option<bool>, MigrationError> {
        if !matches!(self.machine.state, RunState::Running | RunState::Paused) {
            return Err(SnapshotError::Over.into());
        }
        if !self.pending.is_empty() {
            self.send_some()?;
            return Ok(None);
        }
        let running = self.machine.state == RunState::Running;
        match &self.log {
            Some(log) if running => {
                let written = log.take()?;
                match self.after_round(&written) {
                    Decision::Again => {
                        self.next_round(&written);
                        Ok(None)
                    }
                    Decision::Stop => self.hand_over(written),
                    Decision::GiveUp => Err(MigrationError::TooBusy),
                }
            }
            None if running && self.policy.at_limit == AtLimit::GiveUp => {
                Err(MigrationError::TooBusy)
            }
            _ => self.hand_over(PageSet::new(self.machine.memory.file_bytes()?)),
        }
    }

    fn after_round(&mut self, written: &PageSet) -> Decision {
        let took = self.round.began.elapsed();
        let left = written.count() * PAGE as u64;
        let rate = |pages: u64, took: Duration| {
            let rate = u128::from(pages) * PAGE as u128 * 1_000_000 / took.as_micros().max(1);
            u64::try_from(rate).unwrap_or(u64::MAX)
        };
        if self.round.content >= TELLING {
            self.round.rate = Some(rate(self.round.content, took));
        }
        let on_average = || rate(self.report.totals.pages, self.began.elapsed());
        let rate = self.round.rate.unwrap_or_else(on_average);
        self.round.stalled = match self.round.left {
            Some(before) if left >= before => self.round.stalled + 1,
            _ => 0,
        };
        let decision = decide(
            &self.policy,
            &Standing {
                elapsed: self.began.elapsed(),
                left,
                rate,
                stalled: self.round.stalled,
            },
        );
        self.report.rounds.push(SentRound {
            pages: self.round.pages,
            took,
            left,
            decision,
        });
        self.round.left = Some(left);
        decision
    }

    fn next_round(&mut self, written: &PageSet) {
        self.pending = written.blocks().collect();
        self.pending.reverse();
        self.fresh = false;
        self.round.began = Instant::now();
        self.round.pages = 0;
        self.round.content = 0;
    }

    /// A frame of what is pending.
    fn send_some(&mut self) -> Result<(), MigrationError> {
        let mut scanned = 0;
        while let Some((number, mask)) = self.pending.pop() {
            let content = read_pages(&self.machine.memory, number, mask)?;
            // Memory has at most 2^32 blocks.
            self.batch.add(number as u32, mask, &content, self.fresh);
            scanned += mask.count();
            if self.batch.is_full() || scanned >= SCAN_MAX {
                break;
            }
        }
        if let Some(payload) = self.batch.payload() {
            self.out.write(Kind::Pages, payload)?;
        }
        let totals = self.batch.totals();
        self.round.pages += scanned;
        self.round.content += totals.pages;
        self.report.totals.pages += totals.pages;
        self.report.totals.zeros += totals.zeros;
        self.batch.clear();
        Ok(())
    }

    /// Stops the guest and sends what is left, `written` and what has been written since; whether it ran. None: there
    /// is something to be carried out for the guest first.
    fn hand_over(&mut self, mut written: PageSet) -> Result<Option<bool>, MigrationError> {
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
            false => self.rest_of_it(&mut written, began),
        };
        if ran && (over || outcome.is_err()) {
            if let Err(error) = self.machine.run() {
                self.machine.run_on(&error);
                return Err(error.into());
            }
            self.next_round(&written);
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
        written: &mut PageSet,
        stopped: Instant,
    ) -> Result<(), MigrationError> {
        let began = Instant::now();
        // First: disks are written to the end for it, and write to memory.
        let state = self.machine.packed()?;
        self.report.pause.state = began.elapsed();
        let began = Instant::now();
        match &self.log {
            Some(log) => {
                written.join(&log.take()?);
                self.fresh = false;
            }
            // Nobody knows what has been sent and written to since.
            None => written.join(&present(&self.machine.memory)?),
        }
        self.pending = written.blocks().collect();
        self.pending.reverse();
        self.report.last = written.count();
        let longest = self.policy.longest;
        while !self.pending.is_empty() {
            if stopped.elapsed() > longest {
                return Err(MigrationError::Late { longest });
            }
            self.send_some()?;
        }
        for piece in state.chunks(PIECE) {
            self.out.write(Kind::State, piece)?;
        }
        if stopped.elapsed() > longest {
            return Err(MigrationError::Late { longest });
        }
        self.out.write(Kind::End, &packed(&self.report.totals)?)?;
        // From here on the other side may have all of it.
        let flushed = self.out.get_mut().flush();
        self.report.pause.send = began.elapsed();
        let began = Instant::now();
        let answered = match flushed {
            Ok(()) => answer(self.out.get_mut()),
            Err(source) => Err(StreamError::Io {
                action: "write",
                source,
            }
            .into()),
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

impl Offered {
    pub fn report(&self) -> &SendReport {
        &self.report
    }

    /// Whether the guest ran here, and is to run there.
    pub fn ran(&self) -> bool {
        self.ran
    }

    /// Why nobody knows whether the other side has a machine.
    pub fn doubt(&self) -> Option<&MigrationError> {
        self.doubt.as_ref()
    }

    /// The other machine is the guest's: this one ends.
    pub fn let_go(self) -> SendReport {
        self.report
    }

    /// The other machine is not, and never will be: the guest goes on here, if it ran.
    ///
    /// # Errors
    /// The machine cannot run any more; it has ended.
    pub fn take_back(self) -> Result<Machine, MachineError> {
        let Offered {
            _log: log,
            mut machine,
            ran,
            ..
        } = self;
        drop(log);
        if ran && let Err(error) = machine.run() {
            machine.run_on(&error);
            return Err(error);
        }
        Ok(machine)
    }
}

type Prepared = (Uuid, Option<WriteLog>, Vec<(u64, Mask)>);

fn prepare<S: Write>(
    machine: &Machine,
    out: &mut FrameWriter<S>,
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
    // What nobody logs is sent when nobody writes any more.
    if machine.devices.iter().any(|device| device.writes_unseen()) {
        return Ok((opening.id, None, Vec::new()));
    }
    let log = WriteLog::begin(&machine.vm, &machine.memory)?;
    let mut pending: Vec<_> = present(&machine.memory)?.blocks().collect();
    pending.reverse();
    Ok((opening.id, Some(log), pending))
}

/// Waits for the other side's.
fn answer<S: Read>(connection: S) -> Result<(), MigrationError> {
    let mut frames = FrameReader::new(connection.take(ANSWER_MAX));
    match frames.next_frame()? {
        (Kind::Ready, _) => Ok(()),
        (Kind::Refused, reason) => Err(MigrationError::Refused {
            reason: String::from_utf8_lossy(reason).into_owned(),
        }),
        _ => Err(crate::stream::malformed("an answer that is none").into()),
    }
}

/// With the reason that the other side gave, if it closed the connection and left one.
fn unsent<S: Read>(machine: Machine, error: MigrationError, connection: S) -> Unsent {
    let broken = matches!(
        &error,
        MigrationError::Machine(SnapshotError::Stream(StreamError::Io { action: "write", source }))
            if source.kind() != std::io::ErrorKind::WouldBlock
    );
    let error = match broken.then(|| answer(connection)) {
        Some(Err(refused @ MigrationError::Refused { .. })) => refused,
        _ => error,
    };
    Unsent {
        machine: Box::new(machine),
        error,
    }
}
