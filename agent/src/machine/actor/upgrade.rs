//! A guest that goes on in a process of this agent's program, which takes it over from the one that has it.
//!
//! | step | older process | newer process | the next agent, after a crash there |
//! |---|---|---|---|
//! | launched | runs the guest | waits | ends the newer |
//! | handed over | stands still | stands still | ends the newer, has the older go on |
//! | recorded: the commit | stands still | stands still | ends the older, has the newer go on |
//! | `Go` | stands still | runs the guest | ends the older |
//! | ended | | runs the guest | |
//!
//! The commit is a rename of a record that was synced before the guest was stopped. It is not waited for until it is on
//! the disk: a crash of the host ends both processes, whichever the record names then. Whatever fails before it leaves
//! the guest to the older process, which is told to go on only once the newer one has ended.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fractus_agent_api::decision::Step;
use fractus_agent_api::machine::{Generation, Revision};
use fractus_agent_api::migration::{MigrationId, State as Journey};
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::{AGAIN, Actor, Over, Phase, Woken, blocking, sleep_until};
use crate::machine::process::{
    Command, End, Heard, Launcher, Plan, Process, ProcessError, TakingOver,
};
use crate::machine::record::{Prepared, ProcessRecord, Record};
use crate::machine::upgrade::Fate;
use crate::vm::protocol::Moving;

/// How long a guest may take from one process to the other, most of which it runs.
const HANDED: Duration = Duration::from_secs(60);
/// How long the newer process may take to say that the guest runs.
const BEGUN: Duration = Duration::from_secs(30);

/// Somebody wants it, and waits to hear what became of it.
pub(super) struct Wish {
    all: bool,
    answer: oneshot::Sender<Fate>,
}

/// Why a guest was not handed over.
enum Hitch {
    /// Nothing is wrong.
    NotNow(String),
    Failed(String),
    /// The agent ends.
    Over,
}

/// What is heard while it is handed over.
enum Word {
    Intent,
    Old(Heard),
    New(Heard),
    Late,
}

impl<L: Launcher> Actor<L> {
    pub(super) fn is_to_be_upgraded(&mut self, all: bool, answer: oneshot::Sender<Fate>) {
        let asked = self.upgrade.is_some() || self.handing;
        let asked = asked.then(|| "another command has asked for it".to_owned());
        match asked.or_else(|| self.unready()) {
            Some(reason) => {
                let _ = answer.send(Fate::Skipped { reason });
            }
            None => self.upgrade = Some(Wish { all, answer }),
        }
    }

    /// Why its guest is not handed over now.
    fn unready(&self) -> Option<String> {
        let text = match self.phase {
            Phase::None if self.record.kept.is_some() => "it is suspended",
            Phase::None => "it does not run",
            Phase::Starting => "it is being started",
            Phase::Running | Phase::Paused if !self.is_here() => "its guest is on its way",
            Phase::Running | Phase::Paused => {
                if let Some(failure) = &self.failed {
                    return Some(format!("it has failed: {failure}"));
                }
                let changes = self.next() != Step::Settled
                    || self.devices_are_pending()
                    || self.sizes.is_pending()
                    || self.next_size().is_some()
                    || !self.copy_is_settled();
                return changes.then(|| "it is being changed".to_owned());
            }
        };
        Some(text.to_owned())
    }

    pub(super) async fn upgrade(&mut self, Wish { all, answer }: Wish) -> Result<(), Over> {
        let fate = self.fate(all).await?;
        match &fate {
            Fate::Failed { reason } => {
                tracing::warn!(machine = %self.record.id, reason, "its process was not upgraded");
            }
            fate => tracing::info!(machine = %self.record.id, ?fate, "upgrade of its process"),
        }
        let _ = answer.send(fate);
        self.publish();
        Ok(())
    }

    async fn fate(&mut self, all: bool) -> Result<Fate, Over> {
        if let Some(reason) = self.unready() {
            return Ok(Fate::Skipped { reason });
        }
        let Some(process) = &self.process else {
            let reason = "it does not run".to_owned();
            return Ok(Fate::Skipped { reason });
        };
        let from = process.identity();
        match self.surroundings.launcher.is_current(&from) {
            Ok(true) if !all => return Ok(Fate::Current),
            Ok(_) => {}
            Err(error) => {
                let reason = format!("its program cannot be looked at: {error}");
                return Ok(Fate::Failed { reason });
            }
        }
        if let Err(error) = process.can_hand_over() {
            return Ok(match error {
                ProcessError::NotNow(reason) => Fate::Skipped { reason },
                error => Fate::Failed {
                    reason: error.to_string(),
                },
            });
        }
        let launched = match self.heir_of(from) {
            Ok((plan, line)) => {
                let launched = self.surroundings.launcher.launch(plan).await;
                launched.map(|heir| (heir, line))
            }
            Err(error) => Err(error),
        };
        let (mut heir, line) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                let reason = error.to_string();
                return Ok(Fate::Failed { reason });
            }
        };
        let id = MigrationId(Uuid::new_v4());
        self.handing = true;
        let stands = self.stand_still(&mut heir, id, line).await;
        self.handing = false;
        match stands {
            Ok(prepared) => self.commit(heir, id, prepared).await,
            Err(hitch) => self.give_up(heir, id, hitch).await,
        }
    }

    /// What the newer process is made of, and the older one's end of the line between the two.
    fn heir_of(&self, from: ProcessRecord) -> Result<(Plan, OwnedFd), ProcessError> {
        let failed = |source| ProcessError::System {
            what: "a line between the processes".to_owned(),
            source,
        };
        let (old, new) = UnixStream::pair().map_err(failed)?;
        old.set_nonblocking(true).map_err(failed)?;
        let line = new.into();
        let plan = Plan {
            id: self.record.id,
            spec: self.record.intent.wanted.spec.clone(),
            devices: Vec::new(),
            user: self.record.user,
            goes_on: false,
            arrives: None,
            takes_over: Some(TakingOver { line, from }),
            most_mib: self.most_mib(),
            request_id: self.record.request_id.clone(),
        };
        Ok((plan, old.into()))
    }

    /// The record that names the newer process.
    fn succeeded_by(&self, heir: ProcessRecord) -> Record {
        let mut record = self.record.clone();
        record.process = record.process.map(|process| ProcessRecord {
            pid: heir.pid,
            start_ticks: heir.start_ticks,
            boot_id: heir.boot_id,
            ..process
        });
        record
    }

    /// Until the guest stands still on both sides.
    async fn stand_still(
        &mut self,
        heir: &mut L::Process,
        id: MigrationId,
        line: OwnedFd,
    ) -> Result<Prepared, Hitch> {
        let age = self.record.intent.age();
        let prepared = self.succeeded_by(heir.identity());
        let prepared = blocking(|| prepared.prepare(&self.paths.record()));
        let prepared = prepared.map_err(|error| Hitch::Failed(error.to_string()))?;
        let request_id = self.record.request_id.clone();
        let gone = || Hitch::Failed("its process has ended".to_owned());
        let process = self.process.as_mut().ok_or_else(gone)?;
        let told = process.hand_over(id, line, request_id.as_deref()).await;
        told.map_err(|error| Hitch::Failed(error.to_string()))?;
        let mut end = None;
        let handed = self.until_handed(heir, id, &mut end, age).await;
        if let (Err(_), Some(end)) = (&handed, end) {
            // Neither has it any more.
            self.ended(end);
        }
        handed.map(|()| prepared)
    }

    async fn until_handed(
        &mut self,
        heir: &mut L::Process,
        id: MigrationId,
        end: &mut Option<End>,
        age: (Generation, Revision),
    ) -> Result<(), Hitch> {
        let by = Instant::now() + HANDED;
        let (mut offered, mut ready) = (false, false);
        while !(offered && ready) {
            match self.listen(heir, by).await? {
                // It has not run since it stood still: whoever has its state by now may go on with it.
                Word::Old(Heard::Ended(how)) if offered => {
                    self.process = None;
                    *end = Some(how);
                }
                Word::Intent if self.record.intent.age() != age => {
                    return Err(Hitch::NotNow("it is being changed".to_owned()));
                }
                Word::Intent => {}
                Word::Old(heard) => offered |= self.old_says(heard, id)?,
                Word::New(Heard::Ready { .. }) => ready = true,
                Word::New(Heard::Failed(reason)) => return Err(Hitch::Failed(reason)),
                Word::New(Heard::Ended(end)) => {
                    let reason = format!("the new process ended: {:?}", end.reason());
                    return Err(Hitch::Failed(reason));
                }
                Word::New(_) => {}
                Word::Late => {
                    let reason = "the guest was not handed over in time".to_owned();
                    return Err(Hitch::Failed(reason));
                }
            }
        }
        Ok(())
    }

    async fn listen(&mut self, heir: &mut L::Process, by: Instant) -> Result<Word, Hitch> {
        let old = async {
            match &mut self.process {
                Some(process) => process.hear().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = self.mailbox.recv() => {
                self.take(message.ok_or(Hitch::Over)?);
                Ok(Word::Intent)
            }
            heard = old => Ok(Word::Old(heard)),
            heard = heir.hear() => Ok(Word::New(heard)),
            () = sleep_until(Some(by)) => Ok(Word::Late),
        }
    }

    /// Whether it stands still.
    fn old_says(&mut self, heard: Heard, id: MigrationId) -> Result<bool, Hitch> {
        let moving = match heard {
            Heard::Moving(moving) => Some(moving),
            Heard::Status(mut status) => {
                // On its way within this host: nobody else is to hear of it.
                let moving = status.moving.take_if(|moving| moving.migration == id);
                let lost = status.fresh && moving.is_none();
                self.heard(Heard::Status(status));
                if lost {
                    let reason = "its process was not told: its connection broke".to_owned();
                    return Err(Hitch::Failed(reason));
                }
                moving
            }
            Heard::Refused(reason) => return Err(Hitch::Failed(reason)),
            heard => {
                self.heard(heard);
                None
            }
        };
        if self.process.is_none() {
            return Err(Hitch::Failed("its process has ended".to_owned()));
        }
        match moving {
            Some(Moving {
                migration, state, ..
            }) if migration == id => match state {
                Journey::Offered { .. } => Ok(true),
                Journey::Failed { reason } => Err(Hitch::Failed(reason)),
                _ => Ok(false),
            },
            _ => Ok(false),
        }
    }

    /// The newer process is ended, and then the older one goes on.
    async fn give_up(
        &mut self,
        mut heir: L::Process,
        id: MigrationId,
        hitch: Hitch,
    ) -> Result<Fate, Over> {
        if let Err(error) = heir.kill().await {
            // It gets no `Go`, and the next agent ends it.
            tracing::error!(machine = %self.record.id, %error, "a process that was to take it over is left");
        }
        if let Hitch::Over = hitch {
            if let Some(process) = &mut self.process
                && let Err(error) = process.stay(None).await
            {
                tracing::warn!(machine = %self.record.id, %error, "its guest goes on with the next agent");
            }
            return Err(Over);
        }
        if self.process.is_some() {
            self.is_to_stay(id);
            self.stay().await?;
        }
        Ok(match hitch {
            Hitch::NotNow(reason) => Fate::Skipped { reason },
            Hitch::Failed(reason) => Fate::Failed { reason },
            Hitch::Over => return Err(Over),
        })
    }

    /// The guest is the newer process's from here on.
    async fn commit(
        &mut self,
        heir: L::Process,
        id: MigrationId,
        prepared: Prepared,
    ) -> Result<Fate, Over> {
        let next = self.succeeded_by(heir.identity());
        if next.process.is_none() {
            let hitch = Hitch::Failed("its process has ended".to_owned());
            return self.give_up(heir, id, hitch).await;
        }
        if let Err(error) = blocking(|| prepared.commit(&next, &self.paths.record())) {
            // It may be there all the same.
            self.is_recorded().await?;
            let hitch = Hitch::Failed(error.to_string());
            return self.give_up(heir, id, hitch).await;
        }
        let before = std::mem::replace(&mut self.record, next);
        let mut heir = heir;
        if let Err(error) = heir.tell(Command::Go, None).await {
            // It was not sent, and so the guest cannot have run there.
            self.record.process = before.process;
            self.is_recorded().await?;
            let reason = error.to_string();
            if self.process.is_none() {
                let detail = reason.clone();
                self.ended(End::Silent { detail });
            }
            return self.give_up(heir, id, Hitch::Failed(reason)).await;
        }
        self.took_over = None;
        let old = self.process.replace(heir);
        let machine = self.record.id;
        if let Err(error) = blocking(|| self.surroundings.launcher.settle(machine)) {
            // It is found by the other name, too.
            tracing::warn!(%machine, %error, "the socket of its new process");
        }
        let begun = self.until_begun().await;
        if let Some(mut old) = old
            && let Err(error) = old.kill().await
        {
            // It stands still, and the next agent ends it.
            tracing::error!(%machine, %error, "the process that it was handed over by is left");
        }
        let begun = begun?;
        self.persist();
        // What the older one has said of its end is not the newer one's.
        if let Err(error) = blocking(|| std::fs::write(self.paths.last_words(), b"")) {
            tracing::warn!(%machine, %error, "the last words of its process before");
        }
        Ok(begun)
    }

    /// Until the record names the process that is to have the guest: the next agent would end it else.
    async fn is_recorded(&mut self) -> Result<(), Over> {
        while let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            tracing::error!(machine = %self.record.id, %error, "record");
            self.wait(Some(Instant::now() + AGAIN)).await?;
        }
        Ok(())
    }

    /// The newer process has its guest run, or stand as it stood.
    async fn until_begun(&mut self) -> Result<Fate, Over> {
        let by = Instant::now() + BEGUN;
        loop {
            if self.process.is_none() {
                let reason = "the new process ended with its guest".to_owned();
                return Ok(Fate::Failed { reason });
            }
            if let Some(blackout_us) = self.took_over.take() {
                return Ok(Fate::HandedOver { blackout_us });
            }
            if self.wait(Some(by)).await? == Woken::Deadline {
                let reason = "the new process does not say that the guest goes on".to_owned();
                return Ok(Fate::Failed { reason });
            }
        }
    }
}
