//! The table `machine`. A row is made when a server gets its first owner and is kept for as long as
//! the server's own row: for a deleted server it is the tombstone that ends whatever comes back.
//!
//! Generations are `epoch << 32 | counter`. A database restored from a backup begins a new epoch
//! ([`begin_epoch`]), above every generation that was ever given out.

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{
    Generation, MachineReport, Observed, Power, PutMachine, Revision, ServerId, StopReason, Wanted,
};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{DatabaseTransaction, QueryOrder, QuerySelect, Set};

pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "machine")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub server_id: String,
        /// The owner; none once the machine is known to be gone.
        pub host_id: Option<String>,
        pub generation: i64,
        pub revision: i64,
        /// JSON of `Wanted`.
        pub wanted: String,
        /// Of the request that last changed `wanted`.
        pub request_id: Option<String>,
        /// The owner has reported `revision` as settled.
        pub settled: bool,
        /// False from a restore of the database until a host was heard that holds it.
        pub confirmed: bool,
        /// JSON of the `MachineReport` that was last settled.
        pub report: Option<String>,
        pub updated_at_us: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The table of a few named values.
pub mod setting {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "setting")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub name: String,
        pub value: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

const EPOCH: &str = "epoch";
const EPOCH_BITS: u32 = 32;

/// A row, read.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    pub server: ServerId,
    pub host: Option<HostId>,
    pub generation: Generation,
    pub revision: Revision,
    pub wanted: Wanted,
    pub request_id: Option<String>,
    pub settled: bool,
    pub confirmed: bool,
    /// What was last settled.
    pub report: Option<MachineReport>,
}

impl Machine {
    /// The owner has said that it has what is wanted, which no other need have any more.
    pub fn has_its_own(&self) -> bool {
        self.settled
            && self.report.as_ref().is_some_and(|said| {
                let migration = said.migration.as_ref();
                let lacks = migration.is_some_and(|migration| migration.lacks.is_some());
                !lacks
                    && !matches!(
                        said.observed,
                        Observed::Failed { .. }
                            | Observed::Stopped {
                                reason: StopReason::VmmFault { .. }
                            }
                    )
            })
    }

    /// What the owner is told. One that is to be gone is told nothing of a guest, whatever is kept here for a server
    /// that is shelved. It names no boot of its host: whether it is to start anything after one is not said by the row
    /// alone.
    pub fn put(&self) -> PutMachine {
        let mut wanted = self.wanted.clone();
        if self.is_tombstone() {
            wanted.end();
        }
        PutMachine {
            version: version(&wanted),
            generation: self.generation,
            revision: self.revision,
            wanted,
            request_id: self.request_id.clone(),
            boot_id: Some(Uuid::nil()),
        }
    }

    /// Ownership first, then intent.
    pub fn age(&self) -> (Generation, Revision) {
        (self.generation, self.revision)
    }

    /// The server was deleted, or is shelved and its host has still to let go of it.
    pub fn is_tombstone(&self) -> bool {
        self.wanted.power == Power::Absent
    }

    fn read(row: row::Model) -> Result<Self, DbErr> {
        let unreadable = |what: &str, error: &dyn std::fmt::Display| {
            DbErr::Type(format!(
                "machine {}: {what} cannot be read: {error}",
                row.server_id
            ))
        };
        let id = |text: &str| Uuid::parse_str(text).map_err(|error| unreadable("an id", &error));
        let report = row.report.as_deref().map(serde_json::from_str).transpose();
        Ok(Self {
            server: ServerId(id(&row.server_id)?),
            host: row.host_id.as_deref().map(id).transpose()?.map(HostId),
            generation: Generation(row.generation.unsigned_abs()),
            revision: Revision(row.revision.unsigned_abs()),
            wanted: serde_json::from_str(&row.wanted)
                .map_err(|error| unreadable("what is wanted", &error))?,
            report: report.map_err(|error| unreadable("the report", &error))?,
            request_id: row.request_id,
            settled: row.settled,
            confirmed: row.confirmed,
        })
    }
}

/// The server gets its first owner, at generation 1 of the present epoch, or, if it has had one
/// before that is known to be gone, the next generation. Again for the same host: the row as it is.
///
/// `None` if another host owns it.
pub async fn own(
    tx: &DatabaseTransaction,
    server: ServerId,
    host: HostId,
    wanted: &Wanted,
    request_id: Option<String>,
    now_us: i64,
) -> Result<Option<Machine>, DbErr> {
    if let Some(known) = find(tx, server).await? {
        if known.host == Some(host) {
            return Ok(Some(known));
        }
        if known.host.is_some() {
            return Ok(None);
        }
        let next = row::ActiveModel {
            host_id: Set(Some(host.to_string())),
            generation: Set(signed(known.generation.0) + 1),
            revision: Set(signed(known.revision.0) + 1),
            wanted: Set(json(wanted)?),
            request_id: Set(request_id),
            settled: Set(false),
            // Whoever had it has let go of it.
            confirmed: Set(true),
            report: Set(None),
            updated_at_us: Set(now_us),
            ..Default::default()
        };
        update(tx, &known, next).await?;
        return find(tx, server).await;
    }
    let row = row::ActiveModel {
        server_id: Set(server.to_string()),
        host_id: Set(Some(host.to_string())),
        generation: Set((epoch(tx).await? << EPOCH_BITS) + 1),
        revision: Set(1),
        wanted: Set(json(wanted)?),
        request_id: Set(request_id),
        settled: Set(false),
        confirmed: Set(true),
        report: Set(None),
        updated_at_us: Set(now_us),
    };
    row::Entity::insert(row).exec_without_returning(tx).await?;
    find(tx, server).await
}

/// Of the body that says so: an agent that knows nothing of migrations, or copies, must not take one that speaks of
/// them.
pub(super) fn version(wanted: &Wanted) -> u32 {
    wanted.version()
}

/// Changes what is wanted and raises the revision; `None` if the server has no machine. Reads and
/// writes in the caller's transaction, so no other change can come in between.
pub async fn change(
    tx: &DatabaseTransaction,
    server: ServerId,
    request_id: Option<String>,
    now_us: i64,
    change: impl FnOnce(&mut Wanted),
) -> Result<Option<Machine>, DbErr> {
    change_above(tx, server, Revision(0), request_id, now_us, change).await
}

/// The same, to a revision above `above`: one that a host was told of which the owner was not.
pub async fn change_above(
    tx: &DatabaseTransaction,
    server: ServerId,
    above: Revision,
    request_id: Option<String>,
    now_us: i64,
    change: impl FnOnce(&mut Wanted),
) -> Result<Option<Machine>, DbErr> {
    let Some(known) = find(tx, server).await? else {
        return Ok(None);
    };
    let mut wanted = known.wanted.clone();
    if known.settled {
        // It goes on, or has failed: what is wanted from here on is of the guest that is there.
        wanted.continues = None;
    }
    change(&mut wanted);
    let next = row::ActiveModel {
        revision: Set(signed(Ord::max(known.revision, above).0) + 1),
        wanted: Set(json(&wanted)?),
        request_id: Set(request_id),
        settled: Set(false),
        updated_at_us: Set(now_us),
        ..Default::default()
    };
    update(tx, &known, next).await?;
    find(tx, server).await
}

/// Records that the owner has settled, if the report is of the present owner's generation and
/// revision. False if it is not.
pub async fn settle(
    tx: &DatabaseTransaction,
    report: &MachineReport,
    now_us: i64,
) -> Result<bool, DbErr> {
    let next = row::ActiveModel {
        settled: Set(true),
        confirmed: Set(true),
        report: Set(Some(json(report)?)),
        updated_at_us: Set(now_us),
        ..Default::default()
    };
    let settled = row::Entity::update_many()
        .set(next)
        .filter(row::Column::ServerId.eq(report.id.to_string()))
        .filter(row::Column::Generation.eq(signed(report.generation.0)))
        .filter(row::Column::Revision.eq(signed(report.revision.0)))
        .exec(tx)
        .await?;
    Ok(settled.rows_affected == 1)
}

/// The machine is gone from its owner (reported absent, or never reached it): the row becomes a
/// tombstone without an owner, and what it held of the host is given back. Idempotent.
pub async fn disown(tx: &DatabaseTransaction, server: ServerId, now_us: i64) -> Result<(), DbErr> {
    let Some(known) = find(tx, server).await? else {
        return Ok(());
    };
    let Some(host) = known.host else {
        return Ok(());
    };
    crate::agents::host::release(tx, host, server).await?;
    let next = row::ActiveModel {
        host_id: Set(None),
        settled: Set(true),
        updated_at_us: Set(now_us),
        ..Default::default()
    };
    update(tx, &known, next).await.map(|_| ())
}

/// The machine was to be gone from its owner, and its server is kept elsewhere: nobody owns it until somebody does
/// again ([`own`]). What is wanted of it stays, so that it can be made anew; a generation higher, so that whatever comes back
/// is older. No tombstone: after a restore of the database, a host that holds it may be its owner since.
pub async fn vacate(tx: &DatabaseTransaction, server: ServerId, now_us: i64) -> Result<(), DbErr> {
    let Some(known) = find(tx, server).await? else {
        return Ok(());
    };
    if !known.is_tombstone() {
        return Ok(());
    }
    if let Some(host) = known.host {
        crate::agents::host::release(tx, host, server).await?;
    }
    let mut wanted = known.wanted.clone();
    wanted.power = Power::Stopped;
    (wanted.arrives, wanted.departs, wanted.continues) = (None, None, None);
    wanted.copy = None;
    let next = row::ActiveModel {
        host_id: Set(None),
        generation: Set(signed(known.generation.0) + 1),
        revision: Set(signed(known.revision.0) + 1),
        wanted: Set(json(&wanted)?),
        settled: Set(true),
        report: Set(None),
        updated_at_us: Set(now_us),
        ..Default::default()
    };
    update(tx, &known, next).await
}

/// The compare-and-set that gives the server to another host, one generation and one revision higher. False if
/// the row is not as the caller has read it: somebody else was first.
pub async fn move_owner(
    tx: &DatabaseTransaction,
    known: &Machine,
    to: HostId,
    wanted: &Wanted,
    now_us: i64,
) -> Result<bool, DbErr> {
    let Some(from) = known.host else {
        return Ok(false);
    };
    let next = row::ActiveModel {
        host_id: Set(Some(to.to_string())),
        generation: Set(signed(known.generation.0) + 1),
        revision: Set(signed(known.revision.0) + 1),
        wanted: Set(json(wanted)?),
        settled: Set(false),
        // What the old owner said is no proof that the new one has it.
        report: Set(None),
        updated_at_us: Set(now_us),
        ..Default::default()
    };
    let moved = row::Entity::update_many()
        .set(next)
        .filter(row::Column::ServerId.eq(known.server.to_string()))
        .filter(row::Column::HostId.eq(from.to_string()))
        .filter(row::Column::Generation.eq(signed(known.generation.0)))
        .filter(row::Column::Revision.eq(signed(known.revision.0)))
        .exec(tx)
        .await?;
    Ok(moved.rows_affected == 1)
}

pub async fn find(
    connection: &impl ConnectionTrait,
    server: ServerId,
) -> Result<Option<Machine>, DbErr> {
    let row = row::Entity::find_by_id(server.to_string())
        .one(connection)
        .await?;
    row.map(Machine::read).transpose()
}

/// The ids of all that a host owns; what is wanted of them may be large, and is not read.
pub async fn ids_of_host(
    connection: &impl ConnectionTrait,
    host: HostId,
) -> Result<Vec<ServerId>, DbErr> {
    let ids: Vec<String> = row::Entity::find()
        .filter(row::Column::HostId.eq(host.to_string()))
        .select_only()
        .column(row::Column::ServerId)
        .into_tuple()
        .all(connection)
        .await?;
    let id = |text: String| {
        let id = Uuid::parse_str(&text);
        id.map(ServerId)
            .map_err(|error| DbErr::Type(format!("machine {text}: its id cannot be read: {error}")))
    };
    ids.into_iter().map(id).collect()
}

/// All that a host owns.
pub async fn of_host(
    connection: &impl ConnectionTrait,
    host: HostId,
) -> Result<Vec<Machine>, DbErr> {
    let rows = row::Entity::find()
        .filter(row::Column::HostId.eq(host.to_string()))
        .order_by_asc(row::Column::ServerId)
        .all(connection)
        .await?;
    rows.into_iter().map(Machine::read).collect()
}

/// After a restore from a backup: every generation from now on is above all that were ever given
/// out, and no machine counts as known to its owner before it was heard of. The epoch is the time in
/// seconds, so that two restores of the same backup differ too.
pub async fn begin_epoch(tx: &DatabaseTransaction, now_us: i64) -> Result<(), DbErr> {
    let next = Ord::max(epoch(tx).await? + 1, now_us / 1_000_000);
    let next = Ord::min(next, i64::from(i32::MAX));
    let value = setting::ActiveModel {
        name: Set(EPOCH.to_owned()),
        value: Set(next.to_string()),
    };
    let replace = OnConflict::column(setting::Column::Name)
        .update_column(setting::Column::Value)
        .to_owned();
    setting::Entity::insert(value)
        .on_conflict(replace)
        .exec_without_returning(tx)
        .await?;
    // The counter within the epoch begins anew: all are one above the epoch's base.
    row::Entity::update_many()
        .col_expr(
            row::Column::Generation,
            Expr::value((next << EPOCH_BITS) + 1),
        )
        .col_expr(row::Column::Settled, Expr::value(false))
        .col_expr(row::Column::Confirmed, Expr::value(false))
        .exec(tx)
        .await
        .map(|_| ())
}

/// The owner was heard and holds the machine, so it may be told what is wanted: by the row as it was when that was
/// found.
pub async fn confirm(tx: &DatabaseTransaction, known: &Machine) -> Result<(), DbErr> {
    row::Entity::update_many()
        .col_expr(row::Column::Confirmed, Expr::value(true))
        .filter(row::Column::ServerId.eq(known.server.to_string()))
        .filter(row::Column::Generation.eq(signed(known.generation.0)))
        .filter(row::Column::Revision.eq(signed(known.revision.0)))
        .exec(tx)
        .await
        .map(|_| ())
}

/// Who owns the machine is known by what was found out elsewhere.
pub async fn vouch(tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr> {
    row::Entity::update_many()
        .col_expr(row::Column::Confirmed, Expr::value(true))
        .filter(row::Column::ServerId.eq(server.to_string()))
        .exec(tx)
        .await
        .map(|_| ())
}

/// As after a restore: who holds the machine is not known.
pub async fn doubt(tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr> {
    row::Entity::update_many()
        .col_expr(row::Column::Confirmed, Expr::value(false))
        .filter(row::Column::ServerId.eq(server.to_string()))
        .exec(tx)
        .await
        .map(|_| ())
}

/// What was settled is not any more.
pub async fn unsettle(tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr> {
    row::Entity::update_many()
        .col_expr(row::Column::Settled, Expr::value(false))
        .filter(row::Column::ServerId.eq(server.to_string()))
        .exec(tx)
        .await
        .map(|_| ())
}

/// Of the last restore; 0: there was none.
pub async fn epoch(connection: &impl ConnectionTrait) -> Result<i64, DbErr> {
    let setting = setting::Entity::find_by_id(EPOCH).one(connection).await?;
    Ok(setting
        .and_then(|setting| setting.value.parse().ok())
        .unwrap_or(0))
}

/// Changes the row as it was read; in a serializable transaction it cannot have changed since.
async fn update(
    tx: &DatabaseTransaction,
    known: &Machine,
    next: row::ActiveModel,
) -> Result<(), DbErr> {
    let updated = row::Entity::update_many()
        .set(next)
        .filter(row::Column::ServerId.eq(known.server.to_string()))
        .filter(row::Column::Generation.eq(signed(known.generation.0)))
        .filter(row::Column::Revision.eq(signed(known.revision.0)))
        .exec(tx)
        .await?;
    if updated.rows_affected == 1 {
        Ok(())
    } else {
        Err(DbErr::RecordNotUpdated)
    }
}

fn signed(counter: u64) -> i64 {
    i64::try_from(counter).unwrap_or(i64::MAX)
}

fn json(value: &impl serde::Serialize) -> Result<String, DbErr> {
    serde_json::to_string(value).map_err(|error| DbErr::Custom(error.to_string()))
}
