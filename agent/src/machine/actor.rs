//! The actor of one machine.
//!
//! It owns the record and the process. Its loop asks the shared decision for the next step, carries it
//! out, and asks again; at rest it waits for an intent, for a word of the process, or for a deadline.
//! At start it does the same: a crash is nothing special. [`steps`] carries out, [`guest`]
//! takes down what the guest does, [`report`](mod@report) says what is; here it is decided, heard and waited.
//!
//! A start that fails is reported as `Failed` with its reason and is not tried again under the same
//! intent (what can come right by itself, like a controller that does not answer, has been waited for
//! before that); a newer intent, or a new start of the agent, tries anew. A guest that went down by
//! itself stays down until a newer intent.
//!
//! After a reboot of the host nothing is begun before somebody has said in this boot that the machine is wanted here
//! ([`decision::is_word`]): its server may have been started elsewhere meanwhile. The record says in which boot that
//! was said last, so a restart of the agent asks for nothing.

mod copy;
mod devices;
mod follow;
mod guest;
mod hear;
mod migrate;
mod report;
mod size;
mod steps;
mod suspend;
mod upgrade;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use fractus_agent_api::decision::{self, Intake, Intent, Process as Life, Seen, Step};
use fractus_agent_api::machine::{MachineReport, Observed, Power, PutMachine, Refusal, StopReason};
use fractus_vmm::machine::Compression;
use futures::FutureExt;
use tokio::runtime::RuntimeFlavor;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::unconstrained;
use tokio::time::Instant;
use uuid::Uuid;

use self::copy::Copying;
use self::devices::Devices;
use self::follow::Follow;
use self::guest::Guest;
use self::migrate::Travel;
use self::report::report;
use self::size::Sizes;
use self::steps::START;
pub use self::suspend::memory_takes;
use self::upgrade::Wish;
use super::make::Makings;
use super::process::{Adoption, Command, End, Heard, Launcher, Process};
use super::record::Record;
use super::upgrade::Fate;
use crate::paths::MachinePaths;
use crate::vm::protocol::{MachineEvent, State};

/// How long a guest may take to go after its power button was pressed.
pub const SHUTDOWN: Duration = Duration::from_secs(60);
/// After this time what could not be said is said again.
const AGAIN: Duration = Duration::from_secs(1);
/// So many words of the process are heard before an intent is taken: a guest that talks without end
/// must not keep it away.
const CAUGHT_UP: usize = 16;

pub type Answer = oneshot::Sender<Result<MachineReport, Refusal>>;

/// Messages of an actor. When all senders are gone it ends; its process lives on.
#[derive(Debug)]
pub enum Message {
    Put(Box<PutMachine>, Answer),
    /// An operator's word that the machine is wanted here, where there is no controller to say so.
    Hear,
    /// Its guest is to go on in a process of this agent's program, also (true) if it is in one.
    Upgrade(bool, oneshot::Sender<Fate>),
}

/// What an actor is made with.
pub struct Surroundings<L> {
    pub launcher: L,
    pub makings: Arc<dyn Makings>,
    pub shutdown: Duration,
    /// Where guests are awaited that come from other hosts.
    pub listen: IpAddr,
    /// How long memory of so many MiB may take to be written or read: [`memory_takes`].
    pub memory_takes: fn(u64) -> Duration,
    /// Of memory that is kept of guests that are suspended.
    pub suspend_compression: Compression,
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
    guest: Guest,
    devices: Devices,
    sizes: Sizes,
    /// What the process said of which attempt to suspend its guest.
    suspended: Option<(Uuid, Result<(), String>)>,
    /// Its disk is copied.
    copying: Copying,
    /// Its guest comes or goes.
    travel: Travel,
    /// Its guest is to be handed over to a process of this agent's program.
    upgrade: Option<Wish>,
    /// What the process to which it was handed over has said, if that is all: for how long it stood still, if it ran.
    took_over: Option<Option<u64>>,
    /// Its guest is on its way from one process to the next.
    handing: bool,
    /// The process is built, and waits for its `Go`.
    ready: bool,
    /// The guest ran when it was first to be suspended under this intent.
    interrupted: bool,
    /// How often the process was met on a new connection: what it said on an older one may be lost.
    meetings: u64,
    /// Its guest goes on from what was kept of it, and does not know what time it is.
    late: bool,
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
            (_, _, None) if record.kept.is_some() => Observed::Suspended,
            (Some(reason), ..) => Observed::Stopped {
                reason: reason.clone(),
            },
            (None, _, Some(process))
                if process.ran && Some(process.boot_id) == surroundings.makings.boot_id() =>
            {
                Observed::Running
            }
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
            guest: Guest::default(),
            devices: Devices::default(),
            sizes: Sizes::default(),
            suspended: None,
            copying: Copying::default(),
            travel: Travel::default(),
            upgrade: None,
            took_over: None,
            handing: false,
            ready: false,
            interrupted: false,
            meetings: 0,
            late: false,
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
        self.find_copy();
        let Some(recorded) = self.record.process else {
            self.remove_memory();
            return Ok(());
        };
        if Some(recorded.boot_id) == self.surroundings.makings.boot_id() {
            // An agent of before does not say so, and has started it in this boot.
            self.record.heard = Some(recorded.boot_id);
        }
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
                // Perhaps one that goes on, and does not know the time.
                self.late = !recorded.ran;
                tracing::info!(machine = %self.record.id, pid = recorded.pid, "found its process");
                self.travel.unheard = self.record.done.departed.is_some();
                if self.record.awaits_memory() {
                    self.travel.follow = Follow::found();
                    self.start_by = None;
                }
                if self.awaits_guest() {
                    // It ends by itself: nobody but the agent that started it can have its guest go on.
                    self.kill().await;
                    return Ok(());
                }
                // Decisions are made on what it says it is; one that is busy is heard later.
                if let Some(process) = &mut self.process
                    && let Ok(heard) = tokio::time::timeout(AGAIN, process.hear()).await
                {
                    self.heard(heard);
                }
            }
            Adoption::Gone(end) => self.ended(end),
        }
        // Written by a process of an earlier agent, and never believed.
        self.remove_memory();
        Ok(())
    }

    async fn turn(&mut self) -> Result<(), Over> {
        if let Some(wish) = self.upgrade.take() {
            return self.upgrade(wish).await;
        }
        // Whatever else is wanted of a guest that waits for its memory waits for that.
        if self.has_to_follow() {
            return self.follow().await;
        }
        let step = self.next();
        tracing::debug!(machine = %self.record.id, ?step, phase = ?self.phase, "step");
        match step {
            Step::Settled => {
                if let Some((id, next)) = self.next_move() {
                    return self.carry(id, next).await;
                }
                if let Some(to) = self.next_size() {
                    return self.resize(to).await;
                }
                if self.policy_is_new() {
                    return self.say_policy().await;
                }
                if let Some(step) = self.next_copy() {
                    return self.carry_copy(step).await;
                }
                if self.strays() {
                    self.end_stray().await;
                    return Ok(());
                }
                self.publish();
                self.rest().await
            }
            Step::Await => {
                self.publish();
                self.rest().await
            }
            Step::SkipReboots => {
                self.count_reboots();
                self.persist();
                Ok(())
            }
            Step::MakeDisk | Step::RemakeDisk => self.make_disk(step).await,
            Step::Start => self.start().await,
            // It hears nothing.
            Step::Shutdown if self.starves() => {
                self.kill().await;
                Ok(())
            }
            Step::Pause | Step::Resume | Step::Suspend | Step::Shutdown | Step::Depart
                if self.phase == Phase::Starting =>
            {
                self.rest().await
            }
            Step::Pause => self.command(Command::Pause, Phase::Paused).await,
            Step::Resume => self.command(Command::Resume, Phase::Running).await,
            Step::Suspend => self.suspend().await,
            Step::Forget => {
                self.forget_kept();
                Ok(())
            }
            Step::Arrive => self.arrive().await,
            Step::GoOn => self.go_on().await,
            Step::Depart => self.depart().await,
            Step::Stay => self.stay().await,
            Step::Lost => {
                self.lost();
                Ok(())
            }
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
            held: self.record.process.is_some_and(|process| process.held),
            kept: self.record.kept.is_some(),
            transit: self.travel.transit,
            remains: !self.record.is_tombstone(),
            unheard: self.is_unheard(),
        };
        if self.failed.is_some() && self.phase == Phase::None && wanted.power == Power::Absent {
            // What could not be removed is tried again with the next intent or agent.
            return Step::Settled;
        }
        decision::next(wanted, self.done(), &seen)
    }

    /// A process was started for a guest that has not been told to go on.
    fn awaits_guest(&self) -> bool {
        let (wanted, done) = (&self.record.intent.wanted, &self.record.done);
        let continues = wanted.continues.is_some() && wanted.continues != done.continued;
        let ran = self.record.process.is_some_and(|process| process.ran);
        !ran && (wanted.arrives.is_some() || continues)
    }

    /// At rest, or until the guest has begun.
    async fn rest(&mut self) -> Result<(), Over> {
        self.rest_until(None).await
    }

    /// The same, and until then at most.
    async fn rest_until(&mut self, most: Option<Instant>) -> Result<(), Over> {
        let devices_by = self.devices.deadline().filter(|_| self.process.is_some());
        let size_by = self.sizes.deadline(self.size_is_untold());
        let tend_by = devices_by.into_iter().chain(size_by);
        let more = self.start_by.into_iter().chain(self.follow_by());
        let by = tend_by.chain(more).chain(most).min();
        if self.wait(by).await? != Woken::Deadline {
            return Ok(());
        }
        if self.start_by.is_some_and(|by| by <= Instant::now()) {
            self.failed = Some("the guest did not begin to run in time".to_owned());
            self.kill_late().await;
        }
        self.tend_size();
        self.tend_devices().await;
        Ok(())
    }

    /// Until an intent, a word of the process, or the deadline.
    async fn wait(&mut self, deadline: Option<Instant>) -> Result<Woken, Over> {
        let timer = sleep_until(deadline);
        let quiet = sleep_until(self.guest.tell_by());
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
            coming = follow::next(&mut self.travel.follow.others) => {
                self.travel.follow.happened(coming);
                self.hang_up();
                self.publish();
                Ok(Woken::Heard)
            }
            () = quiet => {
                self.tell_panic();
                self.publish();
                Ok(Woken::Heard)
            }
            () = timer => Ok(Woken::Deadline),
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Put(put, answer) => {
                // Whoever hands the guest over hears what its process says of that.
                if !self.handing {
                    self.catch_up();
                }
                let _ = answer.send(self.put(*put));
                self.give_user_back();
            }
            Message::Hear => self.hear(),
            Message::Upgrade(all, answer) => self.is_to_be_upgraded(all, answer),
        }
    }

    /// What the process has said by now is of the intent that is still held: its end, above all, is
    /// not to be laid to a newer one, under which it never ran.
    fn catch_up(&mut self) {
        for _ in 0..CAUGHT_UP {
            let Some(process) = &mut self.process else {
                return;
            };
            let Some(heard) = unconstrained(process.hear()).now_or_never() else {
                return;
            };
            self.heard(heard);
        }
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
            let same_guest = self.record.intent.wanted.is_for_same_guest(&put.wanted);
            self.hears(&put);
            self.record.intent = Intent {
                generation: put.generation,
                revision: put.revision,
                wanted: put.wanted,
            };
            self.record.forget_guest();
            self.record.request_id = put.request_id;
            // That a guest is to go elsewhere, or not, is no wish that it be started.
            if !same_guest {
                self.record.stop = None;
            }
            if let Some(process) = &mut self.record.process
                && !same_guest
            {
                process.held = false;
            }
            if self.record.intent.wanted.power != Power::Absent {
                self.record.gone_at_us = None;
            }
            // A guest that is to go on stands still until then.
            let hurries =
                self.record.intent.wanted.continues.is_some() && self.has_a_guest_that_waits();
            let counted = self.count_ahead();
            let path = self.paths.record();
            let written = blocking(|| match hurries {
                true => self.record.write_fast(&path),
                false => self.record.write(&path),
            });
            if let Err(error) = written {
                // What was refused may stand in a slot: it stays older than what is written next.
                let serial = self.record.serial;
                self.record = Record { serial, ..before };
                return Err(Refusal::Unavailable {
                    detail: error.to_string(),
                });
            }
            self.is_counted(counted);
            tracing::info!(
                machine = %self.record.id,
                request_id = self.record.request_id.as_deref().unwrap_or("-"),
                generation = put.generation.0,
                revision = put.revision.0,
                power = ?self.record.intent.wanted.power,
                "intent"
            );
            self.failed = None;
            self.interrupted = false;
            self.copying.try_anew();
            self.devices.try_anew();
            self.sizes.try_anew();
            self.shutdown_by = None;
            self.publish();
        } else if self.is_word(&put) {
            self.hear();
        }
        Ok(self.reports.borrow().clone())
    }

    fn heard(&mut self, heard: Heard) {
        tracing::debug!(machine = %self.record.id, ?heard, "heard");
        match heard {
            Heard::Ready { lacks } => {
                self.ready = true;
                self.has_arrived(lacks);
            }
            Heard::Moving(moving) => self.moved(Some(moving)),
            Heard::TookOver(blackout_us) => self.took_over = Some(Some(blackout_us)),
            Heard::Suspended(attempt, what) => self.suspended = Some((attempt, what)),
            Heard::Copied(attempt, what) => self.copied(attempt, what),
            Heard::Status(status) => {
                self.took_over.get_or_insert(None);
                if let Some(said) = status.guest {
                    self.guest_has_said(&said);
                }
                self.meetings += u64::from(status.fresh);
                if status.fresh {
                    self.lose_copy();
                    if self.adopted || self.copying.is_untold() {
                        self.copying.may_stray();
                    }
                }
                self.devices.told(status.devices, status.fresh);
                self.sized(status.size, status.fresh);
                self.lacks(status.lacks);
                self.moved(status.moving);
                match status.state {
                    State::Running => self.is(Phase::Running),
                    State::Paused => self.is(Phase::Paused),
                    State::Ready | State::Stopped => {}
                }
            }
            Heard::Event(MachineEvent::Running) => self.is(Phase::Running),
            Heard::Event(MachineEvent::Paused) => self.is(Phase::Paused),
            Heard::Event(event) => self.guest_says(&event),
            Heard::DeviceRefused(id, detail) => {
                tracing::warn!(machine = %self.record.id, device = %id, detail, "not taken");
                self.devices.refused(id, detail);
            }
            Heard::ResizeRefused(detail) => {
                tracing::warn!(machine = %self.record.id, detail, "its size stays");
                self.sizes.refused(detail);
            }
            Heard::Refused(detail) => {
                tracing::warn!(machine = %self.record.id, detail, "its process refused");
                self.failed = Some(detail);
            }
            Heard::Failed(detail) => self.failed = Some(detail),
            Heard::GoUnread => self.did_not_go_on(),
            Heard::Ended(end) => {
                self.ended(end);
                self.process = None;
            }
        }
        self.publish();
    }

    /// Running or paused. Its guest has run: an end from now on is an end.
    fn is(&mut self, phase: Phase) {
        let late = phase == Phase::Running && std::mem::take(&mut self.late);
        let resumed = late || (self.phase, phase) == (Phase::Paused, Phase::Running);
        self.phase = phase;
        self.start_by = None;
        self.has_gone_on();
        if let Some(process) = &mut self.record.process
            && !process.ran
        {
            process.ran = true;
            self.note();
        }
        let wanted = &self.record.intent.wanted;
        let reached = matches!(
            (phase, wanted.power),
            (Phase::Running, Power::Running) | (Phase::Paused, Power::Paused)
        );
        // Late is not never.
        if reached && let Some(failure) = self.failed.take() {
            tracing::info!(machine = %self.record.id, ?phase, failure, "after all");
        }
        if resumed
            && wanted.spec.guest.agent
            && let Some(process) = &self.process
        {
            process.set_guest_time();
        }
    }

    /// The process is gone: by our hand, by itself, or unseen.
    fn ended(&mut self, end: End) {
        self.discount();
        let may_have_gone_on = self.may_have_gone_on();
        let recorded = self.record.process.take();
        self.shutdown_by = None;
        let patience = self.patience() * 2;
        let asked = self
            .pressed_at
            .take()
            .is_some_and(|at| at.elapsed() < patience);
        let (ran, boot) = recorded.map_or((false, None), |p| (p.ran, Some(p.boot_id)));
        self.phase = Phase::None;
        self.lose_copy();
        self.travel.end();
        self.forget_arrival();
        self.start_by = None;
        let power = self.record.intent.wanted.power;
        let going = matches!(power, Power::Stopped | Power::Absent);
        let rebooted = boot.is_some_and(|boot| Some(boot) != self.surroundings.makings.boot_id());
        self.record.stop = match end {
            // It was of no use any more.
            _ if self.record.kept.is_some() => None,
            End::Silent { .. } | End::Said(StopReason::Requested | StopReason::HostReboot)
                if going =>
            {
                Some(StopReason::Requested)
            }
            End::Said(StopReason::GuestPowerOff) if asked && going => Some(StopReason::Requested),
            // Perhaps its guest has not run here: another in its place would cost what it had. An operator must
            // look.
            end @ End::Silent { .. } if may_have_gone_on => Some(end.reason()),
            // Nobody is started only to be suspended.
            End::Silent { .. } if rebooted && power == Power::Suspended => {
                Some(StopReason::HostReboot)
            }
            End::Said(StopReason::HostReboot) if power == Power::Suspended => {
                Some(StopReason::HostReboot)
            }
            // After a host's reboot what should run is started again.
            End::Silent { .. } if rebooted => None,
            End::Said(StopReason::HostReboot) => None,
            // Cut off before its guest ran: as if it had never been started.
            End::Silent { .. } if !ran => None,
            // The first half of a soft reboot.
            End::Said(StopReason::GuestPowerOff) if asked => None,
            End::Said(StopReason::Requested) => None,
            end => Some(end.reason()),
        };
        if ran && power == Power::Suspended {
            // That it was not suspended is no news of one that is gone.
            self.failed = None;
        }
        tracing::info!(machine = %self.record.id, stop = ?self.record.stop, ran, "its process ended");
        if !ran
            && self.failed.is_none()
            && recorded.is_some()
            && !rebooted
            && self.process.is_some()
            && !self.adopted
        {
            let reason = match may_have_gone_on {
                true => migrate::MAY_HAVE_RUN,
                false => "the machine's process ended before its guest ran",
            };
            self.failed = Some(reason.to_owned());
        }
        self.persist();
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Waits for the disk; the other tasks of this thread go on in another one meanwhile.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod copy_tests;
#[cfg(test)]
mod devices_tests;
#[cfg(test)]
mod migrate_tests;
#[cfg(test)]
mod size_tests;
#[cfg(test)]
mod suspend_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod upgrade_tests;
