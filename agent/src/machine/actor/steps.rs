//! The steps of an actor, carried out: disks made, processes started, told and ended, remains removed.
//!
//! Each ends with a changed record or phase, or with a failure that is reported; what to do next is
//! never decided here.

use std::time::Duration;

use fractus_agent_api::decision::Step;
use fractus_agent_api::machine::{Power, StopReason};
use tokio::time::Instant;

use super::devices::Devices;
use super::guest::Guest;
use super::migrate::MAY_HAVE_RUN;
use super::size::Sizes;
use super::{AGAIN, Actor, Over, Phase, Woken, blocking};
use crate::clock::now_us;
use crate::machine::make::{OpenDevice, Progress};
use crate::machine::process::launch::most_memory;
use crate::machine::process::{Command, Launcher, Plan, Process};
use crate::machine::record::Kept;
use crate::volume::directory::Old;

/// How long a process may take from its start to its guest's first instruction.
pub(super) const START: Duration = Duration::from_secs(120);
/// The most that an image may ask for a guest's way down.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// How long a pause or a resume may take.
const COMMAND: Duration = Duration::from_secs(60);

impl<L: Launcher> Actor<L> {
    pub(super) async fn make_disk(&mut self, step: Step) -> Result<(), Over> {
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
        let restores = self.record.intent.wanted.restores;
        let copy = restores.filter(|_| step == Step::RemakeDisk);
        let made = self
            .interruptible("making the root disk", |progress| async move {
                match copy {
                    Some(copy) => makings.restore_disk(&paths, copy).await,
                    None => makings.disk(&paths, &disk, old, &progress).await,
                }
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

    pub(super) fn count_reboots(&mut self) {
        self.record.done.soft_reboots = self.record.intent.wanted.soft_reboots;
        self.record.done.hard_reboots = self.record.intent.wanted.hard_reboots;
    }

    pub(super) async fn start(&mut self) -> Result<(), Over> {
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
        let kept = self.record.kept.clone();
        // A guest that goes on has the one that it had.
        if kept.is_none() {
            let instance = self.record.intent.wanted.spec.guest.instance.as_deref();
            let makings = &self.surroundings.makings;
            let root_disk = self.record.intent.wanted.spec.root_disk.as_ref();
            let made = blocking(|| {
                makings.config_drive(&self.paths, instance)?;
                // The server has been resized since the disk was made.
                root_disk.map_or(Ok(()), |disk| makings.grow_disk(&self.paths, disk.size))
            });
            if let Err(error) = made {
                self.fail(error.to_string());
                return Ok(());
            }
            self.remove_memory();
        }
        let Some(open) = self.open_devices(kept.as_ref()).await? else {
            return Ok(());
        };
        self.observe_starting("starting its process");
        let spec = &self.record.intent.wanted.spec;
        let most_mib = most_memory(spec).max(kept.as_ref().map_or(0, |kept| kept.most_mib));
        let (devices, sizes) = match kept {
            Some(_) => (Devices::default(), Sizes::going_on(most_mib)),
            None => (Devices::begun(&open), Sizes::begun(spec)),
        };
        let plan = Plan {
            id: self.record.id,
            spec: self.record.intent.wanted.spec.clone(),
            devices: open,
            user: self.record.user,
            goes_on: kept.is_some(),
            arrives: None,
            takes_over: None,
            most_mib,
            request_id: self.record.request_id.clone(),
        };
        let mut process = match self.surroundings.launcher.launch(plan).await {
            Ok(process) => process,
            Err(error) => {
                self.fail(error.to_string());
                return Ok(());
            }
        };
        // From here on a crash leaves a process that ends by itself (no Go), and a record that says
        // that its guest never ran.
        let before = self.record.clone();
        self.record.process = Some(process.identity().of_a_guest_that_came(false));
        self.record.done.starts += 1;
        self.record.stop = None;
        self.count_reboots();
        if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            self.record = before;
            let _ = process.kill().await;
            self.fail(error.to_string());
            return Ok(());
        }
        self.process = Some(process);
        self.phase = Phase::Starting;
        (self.adopted, self.pressed_at) = (false, None);
        (self.guest, self.devices, self.sizes) = (Guest::default(), devices, sizes);
        (self.ready, self.late) = (false, kept.is_some());
        if kept.is_some() && !self.spend_kept().await? {
            return Ok(());
        }
        self.start_by = Some(Instant::now() + START);
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        let told = process.tell(Command::Go, None).await;
        if let Err(error) = &told {
            // Its end says more.
            tracing::warn!(machine = %self.record.id, %error, "Go");
        }
        match (kept, told) {
            // It was not sent, and so the guest cannot have run.
            (Some(kept), Err(_)) => self.keep_again(kept).await,
            (Some(_), Ok(())) => self.remove_memory(),
            (None, _) => {}
        }
        Ok(())
    }

    /// Those that the machine begins with, or goes on with; none: it does not.
    async fn open_devices(&mut self, kept: Option<&Kept>) -> Result<Option<Vec<OpenDevice>>, Over> {
        let opened = match kept {
            None => {
                let opening = self.open_all();
                self.interruptible("opening its devices", |_| opening)
                    .await?
            }
            Some(kept) => match self.open_kept(kept) {
                Ok(opening) => {
                    self.interruptible("opening its devices", |_| opening)
                        .await?
                }
                Err(reason) => {
                    self.fail(reason);
                    return Ok(None);
                }
            },
        };
        Ok(match opened {
            None => None,
            Some(Ok(opened)) => Some(opened),
            Some(Err(error)) => {
                self.fail(error.to_string());
                None
            }
        })
    }

    pub(super) async fn command(&mut self, command: Command, then: Phase) -> Result<(), Over> {
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

    /// How long the guest may take to go once it was asked.
    pub(super) fn patience(&self) -> Duration {
        let own = self.record.intent.wanted.spec.guest.shutdown_timeout_s;
        own.map_or(self.surroundings.shutdown, |seconds| {
            Duration::from_secs(seconds.into()).min(LONGEST)
        })
    }

    pub(super) async fn shut_down(&mut self) -> Result<(), Over> {
        if self.patience().is_zero() {
            self.kill().await;
            return Ok(());
        }
        let by = match self.shutdown_by {
            Some(by) => by,
            None => {
                let by = Instant::now() + self.patience();
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

    pub(super) async fn kill(&mut self) {
        self.kill_for(None).await;
    }

    /// Its guest should run by now. Where it may have, though nobody has heard so, no other is begun in its place.
    pub(super) async fn kill_late(&mut self) {
        let detail = MAY_HAVE_RUN.to_owned();
        self.kill_for(Some(StopReason::VmmFault { detail })).await;
    }

    async fn kill_for(&mut self, fault: Option<StopReason>) {
        let Some(mut process) = self.process.take() else {
            self.phase = Phase::None;
            self.record.process = None;
            return;
        };
        match process.kill().await {
            Ok(_) => {
                self.phase = Phase::None;
                self.lose_copy();
                self.discount();
                if process.go_unread() {
                    self.did_not_go_on();
                }
                let fault = fault.filter(|_| self.may_have_gone_on());
                if fault.is_some() {
                    self.failed = Some(MAY_HAVE_RUN.to_owned());
                }
                self.travel.end();
                self.forget_arrival();
                (self.start_by, self.shutdown_by, self.pressed_at) = (None, None, None);
                self.record.process = None;
                if self.record.kept.is_some() {
                    // Only that it could not be ended before can have failed.
                    self.failed = None;
                }
                let going = self.record.intent.wanted.power == Power::Stopped;
                self.record.stop = going.then_some(StopReason::Requested).or(fault);
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

    pub(super) async fn remove(&mut self) {
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
                self.forget_copies();
                self.record.kept = None;
                // One that an earlier agent has taken has it still.
                self.record.forget_guest();
                self.record.stop = None;
                self.count_reboots();
                self.record.done.rebuilds = self.record.intent.wanted.rebuilds;
                self.persist();
            }
            Err(error) => self.fail(error),
        }
    }

    /// Runs `work` until it is done or a newer intent makes it void (`None`).
    pub(super) async fn interruptible<F, T>(
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
}
