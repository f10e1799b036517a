//! The actor of one machine.
//!
//! It owns the record and the process. Its loop asks the shared decision for the next step, carries it
//! out, and asks again; at rest it waits for an intent, for a word of the process, or for a deadline.
//! At start it does the same: a crash is nothing special.
//!
//! A start that fails is reported as `Failed` with its reason and is not tried again under the same
//! intent (what can come right by itself, like a controller that does not answer, has been waited for
//! before that); a newer intent, or a new start of the agent, tries anew. A guest that went down by
//! itself stays down until a newer intent.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use fractus_agent_api::decision::{self, Intake, Intent, Process as Life, Seen, Step};
use fractus_agent_api::machine::{MachineReport, Observed, Power, PutMachine, Refusal, StopReason};
use tokio::runtime::RuntimeFlavor;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::make::{Makings, Progress};
use super::process::{Adoption, Command, End, Heard, Launcher, Plan, Process};
use super::record::Record;
use crate::clock::now_us;
use crate::paths::MachinePaths;
use crate::vm::protocol::{MachineEvent, State};
use crate::volume::directory::Old;

/// How long a guest may take to go after its power button was pressed.
pub const SHUTDOWN: Duration = Duration::from_secs(60);
/// How long a process may take from its start to its guest's first instruction.
const START: Duration = Duration::from_secs(120);
/// How long a pause or a resume may take.
const COMMAND: Duration = Duration::from_secs(60);
/// After this time what could not be said is said again.
const AGAIN: Duration = Duration::from_secs(1);

pub type Answer = oneshot::Sender<Result<MachineReport, Refusal>>;

/// Messages of an actor. When all senders are gone it ends; its process lives on.
#[derive(Debug)]
pub enum Message {
    Put(Box<PutMachine>, Answer),
}

/// What an actor is made with.
pub struct Surroundings<L> {
    pub launcher: L,
    pub makings: Arc<dyn Makings>,
    pub shutdown: Duration,
    /// Ids of machines whose report changed.
    pub changed: mpsc::UnboundedSender<fractus_agent_api::machine::ServerId>,
}

/// Where the process stands, in more detail than decisions need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    None,
    /// It has been launched, and its guest has not run yet, as far as we have heard.
    Starting,
    Running,
    Paused,
}

impl Phase {
    fn life(self) -> Life {
        match self {
            Self::None => Life::None,
            Self::Starting | Self::Running => Life::Running,
            Self::Paused => Life::Paused,
        }
    }
}

pub struct Actor<L: Launcher> {
    surroundings: Arc<Surroundings<L>>,
    paths: MachinePaths,
    record: Record,
    process: Option<L::Process>,
    phase: Phase,
    /// The intent that is held could not be carried out.
    failed: Option<String>,
    /// Until when the guest may take to go, once it was asked.
    shutdown_by: Option<Instant>,
    /// When the guest was asked to go: a power-off soon after is its answer, even if it is no longer
    /// wanted.
    pressed_at: Option<Instant>,
    /// The process was started by an earlier agent, which may have died before it said `Go`.
    adopted: bool,
    /// The last that the guest said, so that one that repeats itself does not fill the log.
    said: Option<MachineEvent>,
    /// Until when the guest must have begun.
    start_by: Option<Instant>,
    mailbox: mpsc::Receiver<Message>,
    reports: watch::Sender<MachineReport>,
    /// Of the process, for consoles; 0: none.
    pid: Arc<AtomicI32>,
    /// Whom its process runs as, for the registry, which gives them out; 0: nobody.
    user: Arc<AtomicU32>,
}

/// The mailbox is closed: the agent ends.
struct Over;

/// Why a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    Message,
    Heard,
    Deadline,
}

impl<L: Launcher> Actor<L> {
    /// The record is on the disk already.
    pub fn new(
        surroundings: Arc<Surroundings<L>>,
        paths: MachinePaths,
        record: Record,
        mailbox: mpsc::Receiver<Message>,
        user: Arc<AtomicU32>,
    ) -> (Self, watch::Receiver<MachineReport>, Arc<AtomicI32>) {
        let observed = match (&record.stop, record.is_tombstone(), &record.process) {
            (_, true, _) => Observed::Absent,
            (Some(reason), ..) => Observed::Stopped {
                reason: reason.clone(),
            },
            (None, _, Some(process)) if process.ran => Observed::Running,
            _ => Observed::Starting {
                step: "taken up".to_owned(),
            },
        };
        let (reports, watcher) = watch::channel(report(&record, observed, false));
        let actor = Self {
            surroundings,
            paths,
            record,
            process: None,
            phase: Phase::None,
            failed: None,
            shutdown_by: None,
            pressed_at: None,
            adopted: false,
            said: None,
            start_by: None,
            mailbox,
            reports,
            pid: Arc::default(),
            user,
        };
        let pid = actor.pid.clone();
        (actor, watcher, pid)
    }

    pub async fn run(mut self) {
        if let Err(Over) = self.take_up().await {
            return;
        }
        while let Ok(()) = self.turn().await {}
    }

    /// What the record says was there: is it still?
    /// While that cannot be told, nothing is done.
    async fn take_up(&mut self) -> Result<(), Over> {
        let Some(recorded) = self.record.process else {
            return Ok(());
        };
        let adoption = loop {
            let launcher = &self.surroundings.launcher;
            match launcher.adopt(self.record.id, &recorded).await {
                Ok(adoption) => break adoption,
                Err(error) => {
                    tracing::error!(machine = %self.record.id, pid = recorded.pid, %error, "its process cannot be looked for");
                    // Not settled, for whoever asks meanwhile.
                    self.phase = Phase::Starting;
                    self.wait(Some(Instant::now() + AGAIN)).await?;
                }
            }
        };
        match adoption {
            Adoption::Alive(process) => {
                self.process = Some(process);
                self.adopted = true;
                self.phase = if recorded.ran {
                    Phase::Running
                } else {
                    Phase::Starting
                };
                self.start_by = (!recorded.ran).then(|| Instant::now() + START);
                tracing::info!(machine = %self.record.id, pid = recorded.pid, "found its process");
                // Decisions are made on what it says it is; one that is busy is heard later.
                if let Some(process) = &mut self.process
                    && let Ok(heard) = tokio::time::timeout(AGAIN, process.hear()).await
                {
                    self.heard(heard);
                }
            }
            Adoption::Gone(end) => self.ended(end),
        }
        Ok(())
    }

    async fn turn(&mut self) -> Result<(), Over> {
        let step = self.next();
        tracing::debug!(machine = %self.record.id, ?step, phase = ?self.phase, "step");
        match step {
            Step::Settled => {
                self.publish();
                self.wait_for_start().await
            }
            Step::SkipReboots => {
                self.count_reboots();
                self.persist();
                Ok(())
            }
            Step::MakeDisk | Step::RemakeDisk => self.make_disk(step).await,
            Step::Start => self.start().await,
            Step::Pause | Step::Resume | Step::Shutdown if self.phase == Phase::Starting => {
                self.wait_for_start().await
            }
            Step::Pause => self.command(Command::Pause, Phase::Paused).await,
            Step::Resume => self.command(Command::Resume, Phase::Running).await,
            Step::Shutdown => self.shut_down().await,
            Step::Kill => {
                self.kill().await;
                Ok(())
            }
            Step::Remove => {
                self.remove().await;
                Ok(())
            }
        }
    }

    fn next(&self) -> Step {
        let wanted = &self.record.intent.wanted;
        // One that cannot be looked at is not made anew: opening it will say what is wrong.
        let disk_stands =
            wanted.spec.root_disk.is_none() || self.paths.disk().try_exists().unwrap_or(true);
        let seen = Seen {
            process: self.phase.life(),
            stop: self.record.stop.as_ref(),
            failed: self.failed.is_some(),
            disk: disk_stands,
            remains: !self.record.is_tombstone(),
        };
        if self.failed.is_some() && self.phase == Phase::None && wanted.power == Power::Absent {
            // What could not be removed is tried again with the next intent or agent.
            return Step::Settled;
        }
        decision::next(wanted, &self.record.done, &seen)
    }

    /// At rest, or until the guest has begun.
    async fn wait_for_start(&mut self) -> Result<(), Over> {
        if self.wait(self.start_by).await? == Woken::Deadline {
            self.failed = Some("the guest did not begin to run in time".to_owned());
            self.kill().await;
        }
        Ok(())
    }

    /// Until an intent, a word of the process, or the deadline.
    async fn wait(&mut self, deadline: Option<Instant>) -> Result<Woken, Over> {
        let timer = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let heard = async {
            match &mut self.process {
                Some(process) => process.hear().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = self.mailbox.recv() => {
                self.take(message.ok_or(Over)?);
                Ok(Woken::Message)
            }
            heard = heard => {
                self.heard(heard);
                Ok(Woken::Heard)
            }
            () = timer => Ok(Woken::Deadline),
        }
    }

    fn take(&mut self, Message::Put(put, answer): Message) {
        let _ = answer.send(self.put(*put));
        self.give_user_back();
    }

    /// A tombstone needs none; others may have it.
    fn give_user_back(&self) {
        if self.record.is_tombstone() {
            self.user.store(0, Ordering::Relaxed);
        }
    }

    /// Persists before it answers; acts afterwards.
    fn put(&mut self, put: PutMachine) -> Result<MachineReport, Refusal> {
        if decision::intake(Some(&self.record.intent), &put)? == Intake::New {
            super::process::launch::check(self.record.id, &put.wanted.spec)
                .map_err(|detail| Refusal::Invalid { detail })?;
            let before = self.record.clone();
            if self.record.is_tombstone() && put.wanted.power != Power::Absent {
                // The one that it was may be another's by now.
                self.record.user = match self.user.load(Ordering::Relaxed) {
                    0 => {
                        return Err(Refusal::Unavailable {
                            detail: "no user id is left for a machine".to_owned(),
                        });
                    }
                    user => user,
                };
            }
            self.record.intent = Intent {
                generation: put.generation,
                revision: put.revision,
                wanted: put.wanted,
            };
            self.record.request_id = put.request_id;
            self.record.stop = None;
            if self.record.intent.wanted.power != Power::Absent {
                self.record.gone_at_us = None;
            }
            if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
                self.record = before;
                return Err(Refusal::Unavailable {
                    detail: error.to_string(),
                });
            }
            tracing::info!(
                machine = %self.record.id,
                request_id = self.record.request_id.as_deref().unwrap_or("-"),
                generation = put.generation.0,
                revision = put.revision.0,
                power = ?self.record.intent.wanted.power,
                "intent"
            );
            self.failed = None;
            self.shutdown_by = None;
            self.publish();
        }
        Ok(self.reports.borrow().clone())
    }

    fn heard(&mut self, heard: Heard) {
        tracing::debug!(machine = %self.record.id, ?heard, "heard");
        match heard {
            Heard::State(State::Running) | Heard::Event(MachineEvent::Running) => self.runs(),
            Heard::State(State::Paused) | Heard::Event(MachineEvent::Paused) => {
                self.runs();
                self.phase = Phase::Paused;
            }
            Heard::State(State::Ready | State::Stopped) => {}
            Heard::Event(event) => {
                // A guest may say so as often as it likes.
                if self.said.as_ref() == Some(&event) {
                    tracing::debug!(machine = %self.record.id, ?event, "the guest, again");
                } else {
                    tracing::info!(machine = %self.record.id, ?event, "the guest");
                    self.said = Some(event);
                }
            }
            Heard::Refused(detail) => {
                tracing::warn!(machine = %self.record.id, detail, "its process refused");
                self.failed = Some(detail);
            }
            Heard::Failed(detail) => self.failed = Some(detail),
            Heard::Ended(end) => {
                self.ended(end);
                self.process = None;
            }
        }
        self.publish();
    }

    /// The guest has run: an end from now on is an end.
    fn runs(&mut self) {
        self.phase = Phase::Running;
        self.start_by = None;
        if let Some(process) = &mut self.record.process
            && !process.ran
        {
            process.ran = true;
            if let Err(error) = blocking(|| self.record.note(&self.paths.record())) {
                tracing::error!(machine = %self.record.id, %error, "record");
            }
        }
    }

    /// The process is gone: by our hand, by itself, or unseen.
    fn ended(&mut self, end: End) {
        let recorded = self.record.process.take();
        self.shutdown_by = None;
        let patience = self.surroundings.shutdown * 2;
        let asked = self
            .pressed_at
            .take()
            .is_some_and(|at| at.elapsed() < patience);
        let (ran, boot) = recorded.map_or((false, None), |p| (p.ran, Some(p.boot_id)));
        self.phase = Phase::None;
        self.start_by = None;
        let power = self.record.intent.wanted.power;
        let going = matches!(power, Power::Stopped | Power::Absent);
        let rebooted = boot.is_some_and(|boot| Some(boot) != self.surroundings.makings.boot_id());
        self.record.stop = match end {
            End::Silent { .. } | End::Said(StopReason::Requested) if going => {
                Some(StopReason::Requested)
            }
            End::Said(StopReason::GuestPowerOff) if asked && going => Some(StopReason::Requested),
            // After a host's reboot what should run is started again.
            End::Silent { .. } if rebooted => None,
            // Cut off before its guest ran: as if it had never been started.
            End::Silent { .. } if !ran => None,
            // The first half of a soft reboot.
            End::Said(StopReason::GuestPowerOff) if asked => None,
            End::Said(StopReason::Requested) => None,
            end => Some(end.reason()),
        };
        tracing::info!(machine = %self.record.id, stop = ?self.record.stop, ran, "its process ended");
        if !ran
            && self.failed.is_none()
            && recorded.is_some()
            && !rebooted
            && self.process.is_some()
            && !self.adopted
        {
            self.failed = Some("the machine's process ended before its guest ran".to_owned());
        }
        self.persist();
    }

    async fn make_disk(&mut self, step: Step) -> Result<(), Over> {
        let spec = self.record.intent.wanted.spec.clone();
        let Some(disk) = spec.root_disk else {
            self.count_rebuild();
            return Ok(());
        };
        let makings = self.surroundings.makings.clone();
        let paths = self.paths.clone();
        let old = if step == Step::RemakeDisk {
            Old::Replace
        } else {
            Old::Keep
        };
        let made = self
            .interruptible("making the root disk", |progress| async move {
                makings.disk(&paths, &disk, old, &progress).await
            })
            .await?;
        match made {
            None => {}
            Some(Ok(())) if step == Step::RemakeDisk => self.count_rebuild(),
            Some(Ok(())) => {}
            Some(Err(error)) => self.fail(error.to_string()),
        }
        Ok(())
    }

    fn count_rebuild(&mut self) {
        self.record.done.rebuilds = self.record.intent.wanted.rebuilds;
        self.record.stop = None;
        self.count_reboots();
        self.persist();
    }

    fn count_reboots(&mut self) {
        self.record.done.soft_reboots = self.record.intent.wanted.soft_reboots;
        self.record.done.hard_reboots = self.record.intent.wanted.hard_reboots;
    }

    async fn start(&mut self) -> Result<(), Over> {
        let boot = self.record.intent.wanted.spec.boot.clone();
        let makings = self.surroundings.makings.clone();
        let paths = self.paths.clone();
        let fetched = self
            .interruptible("fetching the kernel", |progress| async move {
                makings.boot(&paths, &boot, &progress).await
            })
            .await?;
        match fetched {
            None => return Ok(()),
            Some(Ok(())) => {}
            Some(Err(error)) => {
                self.fail(error.to_string());
                return Ok(());
            }
        }
        self.observe_starting("starting its process");
        let plan = Plan {
            id: self.record.id,
            spec: self.record.intent.wanted.spec.clone(),
            user: self.record.user,
            request_id: self.record.request_id.clone(),
        };
        let mut process = match self.surroundings.launcher.launch(&plan).await {
            Ok(process) => process,
            Err(error) => {
                self.fail(error.to_string());
                return Ok(());
            }
        };
        // From here on a crash leaves a process that ends by itself (no Go), and a record that says
        // that its guest never ran.
        let before = self.record.clone();
        self.record.process = Some(process.identity());
        self.record.done.starts += 1;
        self.record.stop = None;
        self.count_reboots();
        if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            self.record = before;
            let _ = process.kill().await;
            self.fail(error.to_string());
            return Ok(());
        }
        let told = process.tell(Command::Go, None).await;
        self.process = Some(process);
        self.phase = Phase::Starting;
        (self.adopted, self.pressed_at, self.said) = (false, None, None);
        self.start_by = Some(Instant::now() + START);
        if let Err(error) = told {
            // Its end says more.
            tracing::warn!(machine = %self.record.id, %error, "Go");
        }
        Ok(())
    }

    async fn command(&mut self, command: Command, then: Phase) -> Result<(), Over> {
        if self.failed.is_some() {
            self.publish();
            return self.wait(None).await.map(drop);
        }
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        if let Err(error) = process.tell(command, request_id.as_deref()).await {
            tracing::warn!(machine = %self.record.id, %error, ?command, "not told");
            return self.wait(Some(Instant::now() + AGAIN)).await.map(drop);
        }
        let by = Instant::now() + COMMAND;
        while self.process.is_some() && self.phase != then && self.failed.is_none() {
            if self.wait(Some(by)).await? == Woken::Deadline {
                self.fail(format!(
                    "the machine's process did not carry out {command:?} in time"
                ));
            }
            // A newer intent may want something else.
            if !matches!(self.next(), Step::Pause | Step::Resume) {
                break;
            }
        }
        Ok(())
    }

    async fn shut_down(&mut self) -> Result<(), Over> {
        let by = match self.shutdown_by {
            Some(by) => by,
            None => {
                let by = Instant::now() + self.surroundings.shutdown;
                self.shutdown_by = Some(by);
                self.pressed_at = Some(Instant::now());
                let request_id = self.record.request_id.clone();
                if let Some(process) = &mut self.process
                    && let Err(error) = process
                        .tell(Command::PressPowerButton, request_id.as_deref())
                        .await
                {
                    tracing::warn!(machine = %self.record.id, %error, "power button");
                }
                self.publish();
                by
            }
        };
        if self.wait(Some(by)).await? == Woken::Deadline {
            tracing::info!(machine = %self.record.id, "the guest did not go: ending its process");
            self.kill().await;
        }
        Ok(())
    }

    async fn kill(&mut self) {
        let Some(mut process) = self.process.take() else {
            self.phase = Phase::None;
            self.record.process = None;
            return;
        };
        match process.kill().await {
            Ok(_) => {
                self.phase = Phase::None;
                (self.start_by, self.shutdown_by, self.pressed_at) = (None, None, None);
                self.record.process = None;
                let going = self.record.intent.wanted.power == Power::Stopped;
                self.record.stop = going.then_some(StopReason::Requested);
                tracing::info!(machine = %self.record.id, "ended its process");
                self.persist();
            }
            Err(error) => {
                self.process = Some(process);
                self.fail(error.to_string());
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    async fn remove(&mut self) {
        let id = self.record.id;
        let removed = match self.surroundings.launcher.clear(id).await {
            Ok(()) => {
                let makings = &self.surroundings.makings;
                blocking(|| makings.remove(&self.paths)).map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match removed {
            Ok(()) => {
                self.record.gone_at_us = Some(now_us());
                self.record.stop = None;
                self.count_reboots();
                self.record.done.rebuilds = self.record.intent.wanted.rebuilds;
                self.persist();
                self.give_user_back();
            }
            Err(error) => self.fail(error),
        }
    }

    /// Runs `work` until it is done or a newer intent makes it void (`None`).
    async fn interruptible<F, T>(
        &mut self,
        step: &str,
        work: impl FnOnce(Progress) -> F,
    ) -> Result<Option<T>, Over>
    where
        F: Future<Output = T>,
    {
        let (progress, mut steps) = Progress::new(step);
        let mut work = std::pin::pin!(work(progress));
        self.observe_starting(step);
        loop {
            let age = self.record.intent.age();
            tokio::select! {
                done = &mut work => return Ok(Some(done)),
                Ok(()) = steps.changed() => {
                    let step = steps.borrow_and_update().clone();
                    self.observe_starting(&step);
                }
                message = self.mailbox.recv() => {
                    self.take(message.ok_or(Over)?);
                    if self.record.intent.age() != age {
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn fail(&mut self, reason: String) {
        tracing::warn!(machine = %self.record.id, reason, "failed");
        self.failed = Some(reason);
        self.publish();
    }

    fn persist(&mut self) {
        if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            // What the record says is older than what is: repeated after a crash, which is harmless.
            tracing::error!(machine = %self.record.id, %error, "record");
        }
        self.publish();
    }

    fn observe_starting(&mut self, step: &str) {
        self.send(
            Observed::Starting {
                step: step.to_owned(),
            },
            false,
        );
    }

    fn publish(&mut self) {
        let process = self.process.as_ref();
        self.pid
            .store(process.map_or(0, |p| p.identity().pid), Ordering::Relaxed);
        let settled =
            self.failed.is_some() || self.next() == Step::Settled && self.phase != Phase::Starting;
        let observed = match (&self.failed, self.phase) {
            (Some(reason), _) => Observed::Failed {
                reason: reason.clone(),
            },
            (_, Phase::Running) => Observed::Running,
            (_, Phase::Paused) => Observed::Paused,
            (_, Phase::Starting) => Observed::Starting {
                step: "starting the guest".to_owned(),
            },
            (None, Phase::None) => match (&self.record.stop, self.record.is_tombstone()) {
                (_, true) => Observed::Absent,
                (Some(reason), _) => Observed::Stopped {
                    reason: reason.clone(),
                },
                (None, _) if self.record.intent.wanted.power == Power::Stopped => {
                    Observed::Stopped {
                        reason: StopReason::Requested,
                    }
                }
                (None, _) => Observed::Starting {
                    step: "to be started".to_owned(),
                },
            },
        };
        self.send(observed, settled);
    }

    fn send(&mut self, observed: Observed, settled: bool) {
        let before = self.reports.borrow().clone();
        if observed != before.observed {
            self.record.changed_at_us = now_us();
        }
        let now = report(&self.record, observed, settled);
        if now != before {
            self.reports.send_replace(now);
            let _ = self.surroundings.changed.send(self.record.id);
        }
    }
}

/// Waits for the disk; the other tasks of this thread go on in another one meanwhile.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

fn report(record: &Record, observed: Observed, settled: bool) -> MachineReport {
    MachineReport {
        id: record.id,
        generation: record.intent.generation,
        revision: record.intent.revision,
        settled,
        observed,
        soft_reboots: record.done.soft_reboots,
        hard_reboots: record.done.hard_reboots,
        rebuilds: record.done.rebuilds,
        starts: record.done.starts,
        changed_at_us: record.changed_at_us,
    }
}
