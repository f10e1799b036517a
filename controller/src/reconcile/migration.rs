//! The table `migration`: every attempt to bring a server to another host, or to another size, with what it took.
//!
//! A row that has not ended keeps the reconciler away from both hosts: what they hold of the server is its
//! operation's to keep or to drop. Which of them owns the server is told by the table `machine` alone.

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::ServerId;
use fractus_agent_api::migration::{MigrationId, Progress};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{Condition, DatabaseTransaction, IntoActiveModel, QueryOrder, QuerySelect};
use serde::{Deserialize, Serialize};

pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "migration")]
    pub struct Model {
        /// The API's integer; given in the transaction that inserts it, one above the last.
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i64,
        /// What agents know it by.
        pub uuid: String,
        pub server_id: String,
        pub source_id: String,
        /// The source's name, also when it is no member any more.
        pub source: String,
        /// None: no host has been chosen.
        pub target_id: Option<String>,
        pub target: Option<String>,
        /// See [`Status`](super::Status).
        pub status: String,
        pub flavor_id: String,
        pub user_id: Option<String>,
        pub project_id: Option<String>,
        /// JSON of `Progress`, as the source last said.
        pub progress: Option<String>,
        /// Why it did not come about.
        pub reason: Option<String>,
        pub created_at_us: i64,
        pub updated_at_us: i64,
        /// None: its operation has not ended, or is parked.
        pub ended_at_us: Option<i64>,
        /// See [`Purpose`](super::Purpose).
        pub kind: String,
        /// None: it keeps the one that it has.
        pub new_flavor_id: Option<String>,
        /// JSON of what the server goes back to, as its operation keeps it.
        pub before: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub use row::{ActiveModel, Model};

/// In a row's progress, beside what the source has said: what its owner's move took.
pub const HANDOVER: &str = "handover";

/// What is done, in nova's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    Live,
    /// A server whose guest is stopped gets another host.
    Cold,
    /// It gets another flavor, and another host if need be.
    Resize,
    /// Its host is off for certain, and another one makes it anew.
    Evacuation,
}

impl Purpose {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Live => "live-migration",
            Self::Cold => "migration",
            Self::Resize => "resize",
            Self::Evacuation => "evacuation",
        }
    }
}

/// How far it is, in nova's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Accepted,
    /// A live one: as many as may are under way at its hosts, or it has not been looked at yet.
    Queued,
    /// A host has been chosen, and makes room.
    Preparing,
    /// The guest is being sent, and runs where it was.
    Running,
    /// The guest is its new host's.
    PostMigrating,
    Completed,
    /// The server's guest is stopped.
    PreMigrating,
    /// Its disk is brought to its new host.
    Migrating,
    /// The server is what it was to be, and can go back.
    Finished,
    Confirming,
    Confirmed,
    Reverting,
    Reverted,
    /// An evacuation: the server is another host's.
    Done,
    /// No host could be chosen, or nobody can say what became of it.
    Error,
    /// The guest stayed where it was.
    Failed,
    Cancelled,
}

impl Status {
    const ALL: [Self; 17] = [
        Self::Accepted,
        Self::Queued,
        Self::Preparing,
        Self::Running,
        Self::PostMigrating,
        Self::Completed,
        Self::PreMigrating,
        Self::Migrating,
        Self::Finished,
        Self::Confirming,
        Self::Confirmed,
        Self::Reverting,
        Self::Reverted,
        Self::Done,
        Self::Error,
        Self::Failed,
        Self::Cancelled,
    ];

    pub const fn word(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::PostMigrating => "post-migrating",
            Self::Completed => "completed",
            Self::PreMigrating => "pre-migrating",
            Self::Migrating => "migrating",
            Self::Finished => "finished",
            Self::Confirming => "confirming",
            Self::Confirmed => "confirmed",
            Self::Reverting => "reverting",
            Self::Reverted => "reverted",
            Self::Done => "done",
            Self::Error => "error",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// What the API shows among a server's migrations.
    const fn in_progress(self) -> bool {
        matches!(
            self,
            Self::Queued | Self::Preparing | Self::Running | Self::PostMigrating
        )
    }
}

impl Model {
    /// An unknown word is an error's.
    pub fn status(&self) -> Status {
        let mut all = Status::ALL.into_iter();
        all.find(|status| status.word() == self.status)
            .unwrap_or(Status::Error)
    }

    /// Its guest is on its way, or waits for its turn, and can be told so.
    pub fn is_live_in_progress(&self) -> bool {
        self.kind == Purpose::Live.word() && self.status().in_progress()
    }

    pub fn migration(&self) -> MigrationId {
        MigrationId(Uuid::parse_str(&self.uuid).unwrap_or_default())
    }

    pub fn server(&self) -> ServerId {
        ServerId(Uuid::parse_str(&self.server_id).unwrap_or_default())
    }

    pub fn source(&self) -> HostId {
        HostId(Uuid::parse_str(&self.source_id).unwrap_or_default())
    }

    /// What was last kept of its progress.
    pub fn progress(&self) -> Option<Progress> {
        serde_json::from_str(self.progress.as_deref()?).ok()
    }

    /// What its owner's move took, of a live one that this controller has carried out.
    pub fn handover(&self) -> Option<serde_json::Value> {
        let kept: serde_json::Value = serde_json::from_str(self.progress.as_deref()?).ok()?;
        kept.get(HANDOVER).cloned()
    }

    /// Source, and target if one was chosen.
    pub fn hosts(&self) -> impl Iterator<Item = HostId> {
        let ids = [Some(&self.source_id), self.target_id.as_ref()];
        let ids = ids.into_iter().flatten();
        ids.filter_map(|id| Uuid::parse_str(id).ok()).map(HostId)
    }
}

/// Writes a new one; its number is the next.
pub async fn insert(tx: &DatabaseTransaction, mut row: Model) -> Result<(), DbErr> {
    let last: Option<i64> = row::Entity::find()
        .select_only()
        .column(row::Column::Id)
        .order_by_desc(row::Column::Id)
        .limit(1)
        .into_tuple()
        .one(tx)
        .await?;
    row.id = last.unwrap_or(0) + 1;
    row::Entity::insert(row.into_active_model().reset_all())
        .exec_without_returning(tx)
        .await
        .map(|_| ())
}

/// Changes the columns that are set, of one that has not ended.
pub async fn update(
    tx: &DatabaseTransaction,
    id: MigrationId,
    change: ActiveModel,
) -> Result<(), DbErr> {
    row::Entity::update_many()
        .set(change)
        .filter(row::Column::Uuid.eq(id.to_string()))
        .filter(row::Column::EndedAtUs.is_null())
        .exec(tx)
        .await
        .map(|_| ())
}

pub async fn find(
    connection: &impl ConnectionTrait,
    id: MigrationId,
) -> Result<Option<Model>, DbErr> {
    row::Entity::find()
        .filter(row::Column::Uuid.eq(id.to_string()))
        .one(connection)
        .await
}

/// One by its number.
pub async fn of_number(
    connection: &impl ConnectionTrait,
    number: i64,
) -> Result<Option<Model>, DbErr> {
    row::Entity::find_by_id(number).one(connection).await
}

/// One of a server by its number.
pub async fn numbered(
    connection: &impl ConnectionTrait,
    server: &str,
    number: i64,
) -> Result<Option<Model>, DbErr> {
    row::Entity::find_by_id(number)
        .filter(row::Column::ServerId.eq(server))
        .one(connection)
        .await
}

/// Those of a server that have not ended.
pub async fn open(
    connection: &impl ConnectionTrait,
    server: ServerId,
) -> Result<Vec<Model>, DbErr> {
    row::Entity::find()
        .filter(row::Column::ServerId.eq(server.to_string()))
        .filter(row::Column::EndedAtUs.is_null())
        .order_by_asc(row::Column::Id)
        .all(connection)
        .await
}

/// Those that could go back, and have waited since `before_us` for whether they are to.
pub async fn unconfirmed(
    connection: &impl ConnectionTrait,
    before_us: i64,
) -> Result<Vec<Model>, DbErr> {
    row::Entity::find()
        .filter(row::Column::Status.eq(Status::Finished.word()))
        .filter(row::Column::EndedAtUs.is_null())
        .filter(row::Column::UpdatedAtUs.lte(before_us))
        .order_by_asc(row::Column::Id)
        .all(connection)
        .await
}

/// Servers whose guest is to come to `host`.
pub async fn to_host(
    connection: &impl ConnectionTrait,
    host: HostId,
) -> Result<Vec<ServerId>, DbErr> {
    let open = row::Entity::find()
        .filter(row::Column::TargetId.eq(host.to_string()))
        .filter(row::Column::EndedAtUs.is_null())
        .all(connection)
        .await?;
    Ok(open.iter().map(Model::server).collect())
}

/// Servers whose guest is on its way from or to `host`, or whose migration is parked.
pub async fn concerning(
    connection: &impl ConnectionTrait,
    host: HostId,
) -> Result<Vec<ServerId>, DbErr> {
    let host = host.to_string();
    let either = Condition::any()
        .add(row::Column::SourceId.eq(host.as_str()))
        .add(row::Column::TargetId.eq(host.as_str()));
    let open = row::Entity::find()
        .filter(either)
        .filter(row::Column::EndedAtUs.is_null())
        .all(connection)
        .await?;
    Ok(open.iter().map(Model::server).collect())
}

/// Whether what `host` holds of the server is a migration's, as far as these say.
pub fn keeps(open: &[Model], host: HostId) -> bool {
    let mut hosts = open.iter().flat_map(Model::hosts);
    hosts.any(|concerned| concerned == host)
}

/// What a list shows; empty: all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub server: Option<String>,
    pub status: Option<String>,
    pub kind: Option<String>,
    /// By name, source or target.
    pub host: Option<String>,
    pub source: Option<String>,
    pub user: Option<String>,
    pub project: Option<String>,
    pub changed_since_us: Option<i64>,
    pub changed_before_us: Option<i64>,
}

/// The order of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sorted {
    OldestFirst,
    NewestFirst,
}

/// A page, after the one numbered `after`.
pub async fn list(
    connection: &impl ConnectionTrait,
    filter: &Filter,
    sorted: Sorted,
    after: Option<i64>,
    limit: Option<u64>,
) -> Result<Vec<Model>, DbErr> {
    let mut query = row::Entity::find().filter(condition(filter));
    query = match sorted {
        Sorted::OldestFirst => query.order_by_asc(row::Column::Id),
        Sorted::NewestFirst => query.order_by_desc(row::Column::Id),
    };
    if let Some(after) = after {
        query = query.filter(match sorted {
            Sorted::OldestFirst => row::Column::Id.gt(after),
            Sorted::NewestFirst => row::Column::Id.lt(after),
        });
    }
    query.limit(limit).all(connection).await
}

fn condition(filter: &Filter) -> Condition {
    let mut all = Condition::all();
    let equal = [
        (row::Column::ServerId, &filter.server),
        (row::Column::Status, &filter.status),
        (row::Column::Kind, &filter.kind),
        (row::Column::Source, &filter.source),
        (row::Column::UserId, &filter.user),
        (row::Column::ProjectId, &filter.project),
    ];
    for (column, value) in equal {
        if let Some(value) = value {
            all = all.add(Expr::col(column).eq(value.as_str()));
        }
    }
    if let Some(host) = &filter.host {
        let either = Condition::any()
            .add(row::Column::Source.eq(host.as_str()))
            .add(row::Column::Target.eq(host.as_str()));
        all = all.add(either);
    }
    if let Some(since) = filter.changed_since_us {
        all = all.add(row::Column::UpdatedAtUs.gte(since));
    }
    if let Some(before) = filter.changed_before_us {
        all = all.add(row::Column::UpdatedAtUs.lte(before));
    }
    all
}
