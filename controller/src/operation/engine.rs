//! Runs operations: one task a subject while there is something to do, woken at once by requests and
//! reports. [`Engine::advance`] is one turn of it ([`turn`](super::turn)), and all that the simulation
//! uses. Of several controllers the leader's engine runs them; the others' call it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use sea_orm::DbErr;
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::store::{self, FORWARD, Prepared, row};
use super::turn::Turn;
use super::{Kinds, StepError};
use crate::clock::Clock;
use crate::event::{Origin, Phase};
use crate::leader::Lead;
use crate::random::Random;

/// Pause between two sweeps over what nobody was woken for: a request that was cut off between its
/// transaction and its wake-up, or another controller that died.
const SWEEP: Duration = Duration::from_secs(10);
const SWEEP_US: i64 = 10_000_000;

/// Runs the operations of this controller. One a process, in an [`Arc`].
pub struct Engine {
    lead: Lead,
    kinds: Kinds,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    subjects: Mutex<Subjects>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Default)]
struct Subjects {
    started: bool,
    /// The last `created_at_us` given out: operations of one controller have an order.
    last_created_us: i64,
    /// Subjects with a task.
    driven: HashMap<String, Arc<Notify>>,
}

/// What one turn came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advance {
    /// A step was recorded, or somebody else changed the operation: there may be more to do at once.
    Advanced,
    /// Nothing to do before the subject is woken or this time has passed.
    Wait(Duration),
    /// No operation of this subject can be carried on.
    Idle,
}

impl Engine {
    pub fn new(
        lead: impl Into<Lead>,
        kinds: Kinds,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
    ) -> Arc<Self> {
        Arc::new(Self {
            lead: lead.into(),
            kinds,
            clock,
            random,
            subjects: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// The kinds that it knows.
    pub fn kinds(&self) -> &Kinds {
        &self.kinds
    }

    /// A new operation of the newest version of `kind`. An error is a mistake of the caller: the kind
    /// is not registered, or the state is not JSON.
    pub fn prepare<S: Serialize>(
        &self,
        kind: &str,
        subject: impl Into<String>,
        state: &S,
        origin: Origin,
    ) -> Result<Prepared, StepError> {
        let Some(known) = self.kinds.newest(kind) else {
            return Err(StepError::fail(format!(
                "no operation of kind {kind} is registered"
            )));
        };
        let unwritable = |error| StepError::fail(format!("the state of {kind}: {error}"));
        let state = serde_json::to_string(state).map_err(unwritable)?;
        let steps: Vec<&str> = known.steps().iter().map(|step| step.name()).collect();
        let steps = serde_json::to_string(&steps).map_err(unwritable)?;
        let now = {
            let mut subjects = self.subjects();
            let now = self.clock.now_us().max(subjects.last_created_us + 1);
            subjects.last_created_us = now;
            now
        };
        let row = row::Model {
            id: self.random.uuid().to_string(),
            kind: kind.to_owned(),
            version: known.version(),
            subject: subject.into(),
            state,
            steps,
            step: 0,
            direction: FORWARD.to_owned(),
            attempts: 0,
            error: None,
            parked: None,
            request_id: origin.request_id,
            user_id: origin.user_id,
            project_id: origin.project_id,
            revision: 0,
            due_at_us: now,
            step_entered_at_us: now,
            created_at_us: now,
            updated_at_us: now,
            finished_at_us: None,
        };
        let event = row.event(self.random.uuid(), now, Phase::Requested);
        Ok(Prepared { row, event })
    }

    /// From now on carries on what is woken, and all that the database holds, while this controller
    /// leads.
    pub async fn start(self: &Arc<Self>) -> Result<(), DbErr> {
        self.subjects().started = true;
        self.carry_on().await?;
        let engine = Arc::clone(self);
        self.tasks.spawn(async move { engine.sweep_on().await });
        Ok(())
    }

    /// Carries on all that is unfinished: this controller leads from now on.
    pub async fn carry_on(self: &Arc<Self>) -> Result<(), DbErr> {
        for row in store::unfinished(self.lead.reader(), None).await? {
            self.drive_or(&row.subject, Notify::notify_one);
        }
        Ok(())
    }

    /// Until the stop: carries on what is due for longer than a wake-up takes.
    async fn sweep_on(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.clock.sleep(SWEEP) => {}
                () = self.stop.cancelled() => return,
            }
            let overdue = self.clock.now_us().saturating_sub(SWEEP_US);
            match store::overdue(self.lead.reader(), overdue).await {
                Ok(subjects) => {
                    for subject in subjects {
                        self.drive_or(&subject, |_| {});
                    }
                }
                Err(error) => tracing::error!(%error, "looking for operations that nobody drives"),
            }
        }
    }

    /// There may be something to do for `subject`: an operation was written or cancelled, or what a
    /// step waits for has happened. Never lost: a wake-up during a step repeats it.
    pub fn wake(self: &Arc<Self>, subject: &str) {
        if self.lead.leads() {
            return self.drive_or(subject, Notify::notify_one);
        }
        if self.subjects().started {
            let (lead, subject) = (self.lead.clone(), subject.to_owned());
            self.tasks.spawn(async move { lead.call(&subject).await });
        }
    }

    /// Another controller calls for `subject`: for the leader to hear.
    pub fn called(self: &Arc<Self>, subject: &str) {
        self.drive_or(subject, Notify::notify_one);
    }

    /// Drives the subject; one that is driven already is left to `driven`.
    fn drive_or(self: &Arc<Self>, subject: &str, driven: impl FnOnce(&Notify)) {
        let mut subjects = self.subjects();
        if !subjects.started || !self.lead.leads() {
            return;
        }
        if let Some(notify) = subjects.driven.get(subject) {
            // Under the lock, or its task might end before it hears.
            return driven(notify);
        }
        let notify = Arc::new(Notify::new());
        subjects
            .driven
            .insert(subject.to_owned(), Arc::clone(&notify));
        drop(subjects);
        let engine = Arc::clone(self);
        let subject = subject.to_owned();
        self.tasks
            .spawn(async move { engine.drive(&subject, &notify).await });
    }

    /// One that is driven and waits looks again.
    fn rouse(&self, subject: &str) {
        if let Some(notify) = self.subjects().driven.get(subject) {
            notify.notify_one();
        }
    }

    /// Lets every step under way finish, begins no other, and returns when all is quiet.
    pub async fn stop(&self) {
        self.subjects().started = false;
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn drive(&self, subject: &str, woken: &Notify) {
        while !self.stop.is_cancelled() {
            match self.advance(subject).await {
                Advance::Advanced => {}
                Advance::Wait(pause) => {
                    tokio::select! {
                        () = woken.notified() => {}
                        () = self.clock.sleep(pause) => {}
                        () = self.stop.cancelled() => {}
                    }
                }
                Advance::Idle => {
                    let mut subjects = self.subjects();
                    // Woken since the look into the database: look again.
                    if woken.notified().now_or_never().is_none() {
                        subjects.driven.remove(subject);
                        return;
                    }
                }
            }
        }
    }

    /// One turn of the subject's first operation: runs its current step and records the outcome.
    pub async fn advance(&self, subject: &str) -> Advance {
        // The whole turn is of one term: what it writes is refused once another one has begun.
        let Some(database) = self.lead.database() else {
            return Advance::Idle;
        };
        let turn = Turn {
            database,
            kinds: &self.kinds,
            clock: &*self.clock,
            random: &*self.random,
            rouse: &|subject| self.rouse(subject),
        };
        turn.of(subject).await
    }

    fn subjects(&self) -> MutexGuard<'_, Subjects> {
        self.subjects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
