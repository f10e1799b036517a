//! Events: what was asked for, by whom, and what became of it. A row is written in the transaction
//! that makes it true, is never changed, and feeds the actions of servers, the audit and live views.
//! Owns the table `event`.

use sea_orm::entity::prelude::*;
use sea_orm::{DatabaseTransaction, QueryOrder, Set};
use uuid::Uuid;

/// Who asked, in which request. All empty for what the controller does by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// `req-UUID`.
    pub request_id: Option<String>,
    pub user_id: Option<String>,
    pub project_id: Option<String>,
}

/// The action of an event: a guest let its watchdog run out.
pub const WATCHDOG_FIRED: &str = "watchdog_fired";

/// Where in its course an action is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Requested,
    Done,
    /// It failed, and what it had done was undone.
    Failed,
    /// Seen rather than asked for: a guest that powered itself off.
    Observed,
}

impl Phase {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Observed => "observed",
        }
    }
}

/// One event, to be recorded.
#[derive(Debug, Clone)]
pub struct Event {
    pub id: Uuid,
    pub at_us: i64,
    /// What it happened to: a server's id.
    pub subject: String,
    /// Kind of the operation, or a word for what was observed.
    pub action: String,
    pub phase: Phase,
    pub message: Option<String>,
    pub operation_id: Option<String>,
    pub origin: Origin,
    pub host_id: Option<String>,
}

/// The row.
pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "event")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub at_us: i64,
        pub subject: String,
        pub action: String,
        pub phase: String,
        pub message: Option<String>,
        pub operation_id: Option<String>,
        pub request_id: Option<String>,
        pub user_id: Option<String>,
        pub project_id: Option<String>,
        pub host_id: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Writes the event; part of the transaction that makes it true.
pub async fn record(tx: &DatabaseTransaction, event: Event) -> Result<(), DbErr> {
    let row = row::ActiveModel {
        id: Set(event.id.to_string()),
        at_us: Set(event.at_us),
        subject: Set(event.subject),
        action: Set(event.action),
        phase: Set(event.phase.as_str().to_owned()),
        message: Set(event.message),
        operation_id: Set(event.operation_id),
        request_id: Set(event.origin.request_id),
        user_id: Set(event.origin.user_id),
        project_id: Set(event.origin.project_id),
        host_id: Set(event.host_id),
    };
    row::Entity::insert(row)
        .exec_without_returning(tx)
        .await
        .map(|_| ())
}

/// All events of a subject, oldest first.
pub async fn of_subject(
    connection: &impl ConnectionTrait,
    subject: &str,
) -> Result<Vec<row::Model>, DbErr> {
    row::Entity::find()
        .filter(row::Column::Subject.eq(subject))
        .order_by_asc(row::Column::AtUs)
        .order_by_asc(row::Column::Id)
        .all(connection)
        .await
}
