//! The table `operation`. Every change of a row is a compare-and-set on its `revision`, so that a
//! second controller, or a request that cancels, is noticed.

use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{DatabaseTransaction, QueryOrder, QuerySelect, Set};
use uuid::Uuid;

use super::{Direction, Operation, OperationId};
use crate::event::{self, Event, Origin, Phase};

/// The row.
pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "operation")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub kind: String,
        pub version: i32,
        pub subject: String,
        /// JSON, the kind's own.
        pub state: String,
        /// JSON list of the steps' names, as planned when it was made.
        pub steps: String,
        /// Index of the step that is to be run, or undone, next.
        pub step: i32,
        /// `forward` or `undo`.
        pub direction: String,
        pub attempts: i32,
        pub error: Option<String>,
        /// Why nobody can carry it on.
        pub parked: Option<String>,
        pub request_id: Option<String>,
        pub user_id: Option<String>,
        pub project_id: Option<String>,
        /// Raised by every change.
        pub revision: i64,
        pub due_at_us: i64,
        pub step_entered_at_us: i64,
        pub created_at_us: i64,
        pub updated_at_us: i64,
        pub finished_at_us: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) const FORWARD: &str = "forward";
pub(super) const UNDO: &str = "undo";

/// A new operation, ready to be written in the transaction of its intent ([`super::Engine::prepare`]).
#[derive(Debug, Clone)]
pub struct Prepared {
    pub(super) row: row::Model,
    pub(super) event: Event,
}

impl Prepared {
    pub fn id(&self) -> &str {
        &self.row.id
    }

    pub fn subject(&self) -> &str {
        &self.row.subject
    }

    /// Writes the operation and the event that it was requested. After the transaction is committed,
    /// wake the engine.
    pub async fn insert(&self, tx: &DatabaseTransaction) -> Result<(), DbErr> {
        let mut row = self.row.clone();
        // After all that was asked of the subject before, whatever the clocks of several controllers say.
        if let Some(last) = last_created_us(tx, &row.subject).await? {
            row.created_at_us = Ord::max(row.created_at_us, last.saturating_add(1));
        }
        let row: row::ActiveModel = row.into();
        row::Entity::insert(row.reset_all())
            .exec_without_returning(tx)
            .await?;
        event::record(tx, self.event.clone()).await
    }
}

/// When the newest of the subject's unfinished operations was made.
async fn last_created_us(
    connection: &impl ConnectionTrait,
    subject: &str,
) -> Result<Option<i64>, DbErr> {
    row::Entity::find()
        .select_only()
        .column(row::Column::CreatedAtUs)
        .filter(row::Column::Subject.eq(subject))
        .filter(row::Column::FinishedAtUs.is_null())
        .order_by_desc(row::Column::CreatedAtUs)
        .limit(1)
        .into_tuple()
        .one(connection)
        .await
}

/// Turns the unfinished operations of `subject` that are of these kinds to being undone, for `reason`;
/// part of the transaction of what replaces them. Answers how many. Wake the engine afterwards.
pub async fn cancel(
    tx: &DatabaseTransaction,
    subject: &str,
    kinds: &[&str],
    reason: &str,
) -> Result<u64, DbErr> {
    let cancelled = row::Entity::update_many()
        .col_expr(row::Column::Direction, Expr::value(UNDO))
        .col_expr(row::Column::Error, Expr::value(reason))
        .col_expr(row::Column::Attempts, Expr::value(0))
        .col_expr(
            row::Column::Revision,
            Expr::col(row::Column::Revision).add(1),
        )
        .filter(row::Column::Subject.eq(subject))
        .filter(row::Column::Kind.is_in(kinds.iter().copied()))
        .filter(row::Column::Direction.eq(FORWARD))
        .filter(row::Column::FinishedAtUs.is_null())
        .exec(tx)
        .await?;
    Ok(cancelled.rows_affected)
}

/// Operations that are under way or parked, oldest first; of one subject, or of all.
pub async fn unfinished(
    connection: &impl ConnectionTrait,
    subject: Option<&str>,
) -> Result<Vec<row::Model>, DbErr> {
    let mut find = row::Entity::find().filter(row::Column::FinishedAtUs.is_null());
    if let Some(subject) = subject {
        find = find.filter(row::Column::Subject.eq(subject));
    }
    find.order_by_asc(row::Column::CreatedAtUs)
        .order_by_asc(row::Column::Id)
        .all(connection)
        .await
}

/// Operations of these kinds that are under way, oldest first; one that cannot be read is not.
pub async fn under_way(
    connection: &impl ConnectionTrait,
    kinds: &[&str],
) -> Result<Vec<Operation>, DbErr> {
    let rows = row::Entity::find()
        .filter(row::Column::FinishedAtUs.is_null())
        .filter(row::Column::Parked.is_null())
        .filter(row::Column::Kind.is_in(kinds.iter().copied()))
        .order_by_asc(row::Column::CreatedAtUs)
        .order_by_asc(row::Column::Id)
        .all(connection)
        .await?;
    Ok(rows.iter().filter_map(|row| row.operation().ok()).collect())
}

/// Subjects of operations that could have been carried on since `before_us`, each once.
pub(super) async fn overdue(
    connection: &impl ConnectionTrait,
    before_us: i64,
) -> Result<Vec<String>, DbErr> {
    row::Entity::find()
        .select_only()
        .column(row::Column::Subject)
        .distinct()
        .filter(row::Column::FinishedAtUs.is_null())
        .filter(row::Column::Parked.is_null())
        .filter(row::Column::DueAtUs.lte(before_us))
        .into_tuple()
        .all(connection)
        .await
}

/// The operation whose turn it is: the subject's oldest that is neither finished nor parked.
pub(super) async fn next_of(
    connection: &impl ConnectionTrait,
    subject: &str,
) -> Result<Option<row::Model>, DbErr> {
    row::Entity::find()
        .filter(row::Column::Subject.eq(subject))
        .filter(row::Column::FinishedAtUs.is_null())
        .filter(row::Column::Parked.is_null())
        .order_by_asc(row::Column::CreatedAtUs)
        .order_by_asc(row::Column::Id)
        .one(connection)
        .await
}

/// Replaces the row if nobody has changed it since it was read; false if somebody has. The revision
/// of `row` is the one that was read.
pub(super) async fn replace(tx: &DatabaseTransaction, mut row: row::Model) -> Result<bool, DbErr> {
    let read = row.revision;
    row.revision += 1;
    let changes = row::ActiveModel {
        state: Set(row.state),
        step: Set(row.step),
        direction: Set(row.direction),
        attempts: Set(row.attempts),
        error: Set(row.error),
        parked: Set(row.parked),
        revision: Set(row.revision),
        due_at_us: Set(row.due_at_us),
        step_entered_at_us: Set(row.step_entered_at_us),
        updated_at_us: Set(row.updated_at_us),
        finished_at_us: Set(row.finished_at_us),
        ..Default::default()
    };
    let replaced = row::Entity::update_many()
        .set(changes)
        .filter(row::Column::Id.eq(row.id))
        .filter(row::Column::Revision.eq(read))
        .exec(tx)
        .await?;
    Ok(replaced.rows_affected == 1)
}

impl row::Model {
    pub(super) fn origin(&self) -> Origin {
        Origin {
            request_id: self.request_id.clone(),
            user_id: self.user_id.clone(),
            project_id: self.project_id.clone(),
        }
    }

    pub(super) fn direction(&self) -> Direction {
        if self.direction == UNDO {
            Direction::Undo
        } else {
            Direction::Forward
        }
    }

    /// Names of the steps as recorded; an unreadable list is none, and the operation is parked.
    pub(super) fn step_names(&self) -> Vec<String> {
        serde_json::from_str(&self.steps).unwrap_or_default()
    }

    /// As its steps see it.
    pub(super) fn operation(&self) -> Result<Operation, String> {
        let id = Uuid::parse_str(&self.id).map_err(|error| format!("its id: {error}"))?;
        let state =
            serde_json::from_str(&self.state).map_err(|error| format!("its state: {error}"))?;
        Ok(Operation {
            id: OperationId(id),
            kind: self.kind.clone(),
            version: self.version,
            subject: self.subject.clone(),
            origin: self.origin(),
            direction: self.direction(),
            attempts: self.attempts,
            error: self.error.clone(),
            step_entered_at_us: self.step_entered_at_us,
            created_at_us: self.created_at_us,
            state,
        })
    }

    /// The event that this operation has come to `phase`.
    pub(super) fn event(&self, id: Uuid, at_us: i64, phase: Phase) -> Event {
        Event {
            id,
            at_us,
            subject: self.subject.clone(),
            action: self.kind.clone(),
            phase,
            message: None,
            operation_id: Some(self.id.clone()),
            origin: self.origin(),
            host_id: None,
        }
    }
}
