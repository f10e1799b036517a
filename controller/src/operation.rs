//! Operations: what it takes to make an intent true, as a persisted list of steps.
//!
//! A request writes its intent and an operation in one transaction ([`Prepared::insert`]) and wakes
//! the engine ([`Engine::wake`]); the engine runs the operation's steps, one after the other, and
//! records each in the database. After a crash the next start goes on with the step that was not
//! recorded as done: the same code path as without a crash. When a step fails for good, that step
//! and all before it are undone, last first.
//!
//! A service describes an operation as a [`Kind`] with a list of [`Step`]s:
//!
//! ```text
//!   run(k)  effects outside of the database; may be repeated any number of times; may say "not yet"
//!   commit(k)  what step k changes in the database, in the transaction that records k as done
//!   undo(k), undo_commit(k)  the same, for taking k back; also run if k was only half done, or not at all
//!   finish  after the last step, in the same transaction as its commit: the outcome for the user
//!   ended  after that transaction: the outcome for the log, and whoever waited for it
//! ```
//!
//! So a step without waiting costs one transaction, a step that only waits costs none until it is
//! over, and the last one carries the outcome.
//!
//! Rules:
//! - Operations of one subject (a server) run one after the other, in the order of their requests.
//! - `run` and `undo` are idempotent and tell a late repetition from a new wish by ids and counters
//!   kept in the operation's state, never by what they find.
//! - A step that cannot go on now but will ([`StepError::Retry`]) is repeated with growing pauses, for
//!   ever unless the step itself decides, by [`Operation::step_entered_at_us`], that it has been
//!   long enough. One that never will is [`StepError::Fail`].
//! - A list of steps is part of a kind's version: who changes it raises the version, and keeps the old
//!   kind registered for a release. An operation of an unknown version is undone by its recorded
//!   steps where all of them are known by name in some version, else parked with a clear error.
//!
//! Owns the table `operation`. Must never know what its steps do.

mod engine;
mod store;
mod turn;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sea_orm::{DatabaseTransaction, DbErr};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

pub use engine::{Advance, Engine};
pub use store::{Prepared, cancel, row, under_way, unfinished};

use crate::event::Origin;

/// An operation's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperationId(pub Uuid);

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Which way an operation goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Undo,
}

/// An operation under way, as its steps see it.
#[derive(Debug, Clone)]
pub struct Operation {
    pub id: OperationId,
    pub kind: String,
    pub version: i32,
    /// What it is about: a server's id.
    pub subject: String,
    pub origin: Origin,
    pub direction: Direction,
    /// How often the current step has been tried and was to be repeated.
    pub attempts: i32,
    /// Why it is being undone, or what the last try said.
    pub error: Option<String>,
    /// When the current step was first begun (by the database, so also over restarts).
    pub step_entered_at_us: i64,
    pub created_at_us: i64,
    state: serde_json::Value,
}

impl Operation {
    /// The state that the operation was made with, as changed by its steps' commits.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T, StepError> {
        serde_json::from_value(self.state.clone()).map_err(|error| {
            StepError::fail(format!(
                "the state of {} {} is not understood: {error}",
                self.kind, self.id
            ))
        })
    }

    /// Replaces the state; kept only from within `commit` and `undo_commit`.
    pub fn set_state<T: Serialize>(&mut self, state: &T) -> Result<(), StepError> {
        self.state = serde_json::to_value(state).map_err(|error| {
            StepError::fail(format!(
                "the state of {} cannot be written: {error}",
                self.kind
            ))
        })?;
        Ok(())
    }
}

/// What a step's `run` or `undo` says when nothing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Its commit may follow.
    Done,
    /// Not yet: run again when the subject is woken ([`Engine::wake`]), or after this time, whichever
    /// is first. Nothing is written.
    Wait(Duration),
}

/// Why a step did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Will work later: the same step is run again after a pause that grows, or after `after`.
    #[error("{reason}")]
    Retry {
        reason: String,
        after: Option<Duration>,
    },
    /// Will never work. Forward: the operation is undone, with this as the reason that the user
    /// sees. While undoing: the operation is parked for an operator.
    #[error("{reason}")]
    Fail { reason: String },
    /// Like `Retry`.
    #[error("the database")]
    Database(#[from] DbErr),
}

impl StepError {
    pub fn retry(reason: impl Into<String>) -> Self {
        Self::Retry {
            reason: reason.into(),
            after: None,
        }
    }

    pub fn fail(reason: impl Into<String>) -> Self {
        Self::Fail {
            reason: reason.into(),
        }
    }

    /// What would be tried again is not, if it is `late`.
    pub fn given_up_if(self, late: bool) -> Self {
        match self {
            Self::Retry { reason, .. } if late => Self::Fail { reason },
            other => other,
        }
    }
}

/// One step. All four default to nothing to do.
#[async_trait]
pub trait Step: Send + Sync + 'static {
    /// Persisted; unique within the kind.
    fn name(&self) -> &'static str;

    /// Effects outside of the database. Idempotent.
    async fn run(&self, _operation: &Operation) -> Result<Progress, StepError> {
        Ok(Progress::Done)
    }

    /// What the step changes in the database; has no other effect. Not a [`StepError::Retry`] of its own
    /// accord where `run` could have told.
    async fn commit(
        &self,
        _operation: &mut Operation,
        _tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        Ok(())
    }

    /// Takes back the effects of `run`, done, half done or never begun. Idempotent.
    async fn undo(&self, _operation: &Operation) -> Result<Progress, StepError> {
        Ok(Progress::Done)
    }

    /// Takes back what `commit` changed, if it did.
    async fn undo_commit(
        &self,
        _operation: &mut Operation,
        _tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        Ok(())
    }
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// All that it did was taken back.
    Undone {
        reason: String,
    },
    /// It could be neither carried on nor undone; what it did is still there.
    Parked {
        reason: String,
    },
}

/// A kind of operation, at one version.
#[async_trait]
pub trait Kind: Send + Sync + 'static {
    /// Persisted, and the `action` of its events: `server_create`.
    fn name(&self) -> &'static str;
    fn version(&self) -> i32;
    fn steps(&self) -> Vec<Arc<dyn Step>>;

    /// In the transaction that ends the operation: what the user is to see of it.
    async fn finish(
        &self,
        _operation: &Operation,
        _outcome: &Outcome,
        _tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        Ok(())
    }

    /// After that transaction, once at most: not where the controller ends in between. Answers whose operations may
    /// have waited for this, and look again.
    async fn ended(&self, _operation: &Operation, _outcome: &Outcome) -> Vec<String> {
        Vec::new()
    }
}

/// The kinds that this build knows; filled by the services before the engine starts.
#[derive(Default, Clone)]
pub struct Kinds {
    by_name: BTreeMap<(&'static str, i32), Arc<dyn Kind>>,
}

impl Kinds {
    /// Adds a kind; the same name and version again replaces it.
    pub fn register(&mut self, kind: Arc<dyn Kind>) {
        self.by_name.insert((kind.name(), kind.version()), kind);
    }

    /// All that are registered, by name, then version.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Kind>> {
        self.by_name.values()
    }

    fn exact(&self, name: &str, version: i32) -> Option<&Arc<dyn Kind>> {
        self.versions(name).find(|kind| kind.version() == version)
    }

    fn newest(&self, name: &str) -> Option<&Arc<dyn Kind>> {
        self.versions(name).last()
    }

    fn versions(&self, name: &str) -> impl Iterator<Item = &Arc<dyn Kind>> {
        self.by_name
            .values()
            .filter(move |kind| kind.name() == name)
    }

    /// A step by its recorded name: of the version that wrote it, else of any.
    fn step(&self, kind: &str, version: i32, step: &str) -> Option<Arc<dyn Step>> {
        let exact = self.exact(kind, version).into_iter();
        let others = self.versions(kind);
        exact
            .chain(others)
            .flat_map(|kind| kind.steps())
            .find(|known| known.name() == step)
    }
}
