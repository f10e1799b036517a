//! One turn of an operation: the current step is run, and what it came to is recorded.
//!
//! A turn reads and writes through one handle of the database from its beginning to its end. Of
//! several controllers that is the leader's, of the term in which the turn began
//! ([`Lead`](crate::leader::Lead)).

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use sea_orm::{DbErr, TransactionTrait};

use super::engine::Advance;
use super::store::{self, UNDO, row};
use super::{Direction, Kind, Kinds, Operation, Outcome, Progress, Step, StepError};
use crate::clock::Clock;
use crate::database::{self, Database};
use crate::event::{self, Event, Phase};
use crate::random::Random;

/// Pause before the first repetition; doubled with each, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Pause after the database itself failed.
const DATABASE_PAUSE: Duration = Duration::from_secs(1);

/// Why a turn's transaction was not committed.
#[derive(Debug, thiserror::Error)]
enum TurnError {
    #[error("somebody else changed the operation")]
    Lost,
    #[error(transparent)]
    Step(#[from] StepError),
}

impl From<DbErr> for TurnError {
    fn from(error: DbErr) -> Self {
        Self::Step(StepError::Database(error))
    }
}

/// What a turn is made with.
pub(super) struct Turn<'a> {
    pub database: Database,
    pub kinds: &'a Kinds,
    pub clock: &'a dyn Clock,
    pub random: &'a dyn Random,
    /// Who waits looks again.
    pub rouse: &'a (dyn Fn(&str) + Send + Sync),
}

impl Turn<'_> {
    /// Of the subject's first operation.
    pub(super) async fn of(&self, subject: &str) -> Advance {
        let turn = async {
            match store::next_of(self.database.reader(), subject).await? {
                Some(row) => self.take(row).await,
                None => Ok(Advance::Idle),
            }
        };
        match turn.await {
            Ok(advance) => advance,
            Err(TurnError::Lost) => Advance::Advanced,
            Err(TurnError::Step(StepError::Database(error))) if database::is_fenced_off(&error) => {
                tracing::warn!(subject, "another controller leads, and carries this on");
                Advance::Idle
            }
            Err(TurnError::Step(error)) => {
                tracing::error!(subject, error = %describe(&error), "an operation cannot be recorded");
                Advance::Wait(DATABASE_PAUSE)
            }
        }
    }

    async fn take(&self, row: row::Model) -> Result<Advance, TurnError> {
        let operation = match row.operation() {
            Ok(operation) => operation,
            Err(unreadable) => {
                return self
                    .park(row, format!("it cannot be read: {unreadable}"))
                    .await;
            }
        };
        let names = row.step_names();
        let index = usize::try_from(row.step).unwrap_or(usize::MAX);
        let Some(name) = names.get(index) else {
            return self
                .park(row, "its list of steps cannot be read".to_owned())
                .await;
        };
        let known = self.kinds.exact(&row.kind, row.version);
        if row.direction() == Direction::Forward && known.is_none() {
            let reason = format!(
                "version {} of {} is not known to this release",
                row.version, row.kind
            );
            let undoable = names[..=index]
                .iter()
                .all(|name| self.kinds.step(&row.kind, row.version, name).is_some());
            return if undoable {
                self.begin_undo(row, reason).await
            } else {
                self.park(row, reason).await
            };
        }
        let Some(step) = self.kinds.step(&row.kind, row.version, name) else {
            let reason = format!("step {name} of {} is not known to this release", row.kind);
            return self.park(row, reason).await;
        };
        let progress = run(&*step, &operation).await;
        match (progress, row.direction()) {
            (Ok(Progress::Wait(pause)), _) => Ok(Advance::Wait(pause)),
            (Ok(Progress::Done), direction) => {
                let last = match direction {
                    Direction::Forward => index + 1 == names.len(),
                    Direction::Undo => index == 0,
                };
                let committed = self.record_step(&row, operation, step, last).await;
                match committed {
                    Ok(()) => Ok(Advance::Advanced),
                    Err(TurnError::Lost) => Err(TurnError::Lost),
                    Err(TurnError::Step(error)) => self.failed(row, error).await,
                }
            }
            (Err(error), _) => self.failed(row, error).await,
        }
    }

    /// The step's own changes, the operation's progress and, at the end, the outcome: one transaction.
    async fn record_step(
        &self,
        row: &row::Model,
        operation: Operation,
        step: Arc<dyn Step>,
        last: bool,
    ) -> Result<(), TurnError> {
        let now = self.clock.now_us();
        let mut next = row.clone();
        next.attempts = 0;
        next.updated_at_us = now;
        next.due_at_us = now;
        next.step_entered_at_us = now;
        let outcome = match row.direction() {
            Direction::Forward => {
                next.error = None;
                Outcome::Done
            }
            Direction::Undo => Outcome::Undone {
                reason: row.error.clone().unwrap_or_default(),
            },
        };
        if last {
            next.finished_at_us = Some(now);
        } else {
            next.step += if row.direction() == Direction::Forward {
                1
            } else {
                -1
            };
        }
        let ended = last.then(|| self.ended(row, outcome, now));
        let (written, over) = (operation.clone(), ended.clone());
        self.database
            .write(move |tx| {
                let (mut next, step) = (next.clone(), Arc::clone(&step));
                let (mut operation, ended) = (operation.clone(), ended.clone());
                Box::pin(async move {
                    match operation.direction {
                        Direction::Forward => step.commit(&mut operation, tx).await?,
                        Direction::Undo => step.undo_commit(&mut operation, tx).await?,
                    }
                    next.state = operation.state.to_string();
                    if let Some(ended) = ended {
                        ended.write(&operation, tx).await?;
                    }
                    if store::replace(tx, next).await? {
                        Ok(())
                    } else {
                        Err(TurnError::Lost)
                    }
                })
            })
            .await?;
        if let Some(over) = over {
            self.over(&over, &written).await;
        }
        Ok(())
    }

    /// The end is written.
    async fn over(&self, ended: &Ended, operation: &Operation) {
        let Some(kind) = &ended.kind else {
            return;
        };
        for subject in kind.ended(operation, &ended.outcome).await {
            (self.rouse)(&subject);
        }
    }

    fn ended(&self, row: &row::Model, outcome: Outcome, now: i64) -> Ended {
        let (phase, message) = match &outcome {
            Outcome::Done => (Phase::Done, None),
            Outcome::Undone { reason } | Outcome::Parked { reason } => {
                (Phase::Failed, Some(reason.clone()))
            }
        };
        // Events are read in order of their time: the end is after the beginning.
        let at_us = now.max(row.created_at_us.saturating_add(1));
        let mut event = row.event(self.random.uuid(), at_us, phase);
        event.message = message;
        let kind = self
            .kinds
            .exact(&row.kind, row.version)
            .or_else(|| self.kinds.newest(&row.kind));
        Ended {
            kind: kind.cloned(),
            outcome,
            event,
        }
    }

    async fn failed(&self, row: row::Model, error: StepError) -> Result<Advance, TurnError> {
        match error {
            StepError::Fail { reason } => match row.direction() {
                Direction::Forward => self.begin_undo(row, reason).await,
                Direction::Undo => self.park(row, reason).await,
            },
            StepError::Retry { reason, after } => self.repeat(row, reason, after).await,
            StepError::Database(error) => Err(error.into()),
        }
    }

    async fn repeat(
        &self,
        mut row: row::Model,
        reason: String,
        after: Option<Duration>,
    ) -> Result<Advance, TurnError> {
        let doublings = u32::try_from(row.attempts).unwrap_or(0).min(16);
        let pause =
            after.unwrap_or_else(|| (FIRST_PAUSE * 2_u32.pow(doublings)).min(LONGEST_PAUSE));
        tracing::warn!(
            operation = row.id, kind = row.kind, subject = row.subject, step = row.step,
            attempt = row.attempts, request_id = row.request_id, %reason, "to be repeated"
        );
        let now = self.clock.now_us();
        row.attempts = row.attempts.saturating_add(1);
        // While undoing, the row keeps why it is undone.
        if row.direction() == Direction::Forward {
            row.error = Some(reason);
        }
        row.updated_at_us = now;
        row.due_at_us = now.saturating_add(i64::try_from(pause.as_micros()).unwrap_or(i64::MAX));
        self.replace(row, None).await?;
        Ok(Advance::Wait(pause))
    }

    async fn begin_undo(&self, mut row: row::Model, reason: String) -> Result<Advance, TurnError> {
        tracing::warn!(
            operation = row.id,
            kind = row.kind,
            subject = row.subject,
            step = row.step,
            request_id = row.request_id,
            reason,
            "failed; is being undone"
        );
        let now = self.clock.now_us();
        row.direction = UNDO.to_owned();
        row.error = Some(reason);
        row.attempts = 0;
        row.updated_at_us = now;
        row.step_entered_at_us = now;
        self.replace(row, None).await?;
        Ok(Advance::Advanced)
    }

    async fn park(&self, mut row: row::Model, reason: String) -> Result<Advance, TurnError> {
        tracing::error!(
            operation = row.id,
            kind = row.kind,
            subject = row.subject,
            step = row.step,
            request_id = row.request_id,
            reason,
            "can be neither carried on nor undone; parked"
        );
        metrics::counter!("fractus_operations_parked_total").increment(1);
        let now = self.clock.now_us();
        row.parked = Some(reason.clone());
        row.updated_at_us = now;
        let ended = self.ended(&row, Outcome::Parked { reason }, now);
        self.replace(row, Some(ended)).await?;
        Ok(Advance::Advanced)
    }

    async fn replace(&self, row: row::Model, ended: Option<Ended>) -> Result<(), TurnError> {
        let over = ended.clone().zip(row.operation().ok());
        self.database
            .write(move |tx| {
                let (row, ended) = (row.clone(), ended.clone());
                Box::pin(async move {
                    if let Some(ended) = ended {
                        // An unreadable row has no operation to show to its kind.
                        match row.operation() {
                            Ok(operation) => ended.write(&operation, tx).await?,
                            Err(_) => event::record(tx, ended.event).await?,
                        }
                    }
                    if store::replace(tx, row).await? {
                        Ok(())
                    } else {
                        Err(TurnError::Lost)
                    }
                })
            })
            .await?;
        if let Some((ended, operation)) = over {
            self.over(&ended, &operation).await;
        }
        Ok(())
    }
}

/// The end of an operation, to be written with its last step.
#[derive(Clone)]
struct Ended {
    kind: Option<Arc<dyn Kind>>,
    outcome: Outcome,
    event: Event,
}

impl Ended {
    async fn write(
        &self,
        operation: &Operation,
        tx: &sea_orm::DatabaseTransaction,
    ) -> Result<(), StepError> {
        if let Some(kind) = &self.kind {
            match self.outcome {
                Outcome::Parked { .. } => self.finish_parked(&**kind, operation, tx).await?,
                _ => kind.finish(operation, &self.outcome, tx).await?,
            }
        }
        Ok(event::record(tx, self.event.clone()).await?)
    }

    /// Parking must not fail by what it is parked for: it would be tried for ever, and nothing else of
    /// the subject would run. What the kind cannot say is left unsaid, all of it.
    async fn finish_parked(
        &self,
        kind: &dyn Kind,
        operation: &Operation,
        tx: &sea_orm::DatabaseTransaction,
    ) -> Result<(), StepError> {
        let savepoint = tx.begin().await?;
        match kind.finish(operation, &self.outcome, &savepoint).await {
            Ok(()) => savepoint.commit().await?,
            // The database's own trouble is over some time, and then it is tried again.
            Err(StepError::Database(error)) if is_passing(&error) => return Err(error.into()),
            Err(error) => {
                tracing::error!(
                    operation = %operation.id, kind = operation.kind, subject = operation.subject,
                    error = %describe(&error), "parked, and its kind could not say so"
                );
                savepoint.rollback().await?;
            }
        }
        Ok(())
    }
}

/// A step that panics has failed; the engine goes on.
async fn run(step: &dyn Step, operation: &Operation) -> Result<Progress, StepError> {
    let run = async {
        match operation.direction {
            Direction::Forward => step.run(operation).await,
            Direction::Undo => step.undo(operation).await,
        }
    };
    match AssertUnwindSafe(run).catch_unwind().await {
        Ok(progress) => progress,
        Err(_) => Err(StepError::fail(format!("step {} panicked", step.name()))),
    }
}

/// Whether the same may work later: the database did not do it, rather than that a row says nonsense.
fn is_passing(error: &DbErr) -> bool {
    matches!(
        error,
        DbErr::Conn(_) | DbErr::ConnectionAcquire(_) | DbErr::Exec(_) | DbErr::Query(_)
    )
}

/// With its sources, for the log.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
