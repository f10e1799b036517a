//! The table `host`: who belongs to the cloud, what each can hold and what of that is taken.
//!
//! Capacity is taken and given back by conditional updates in the transaction of whoever needs it; a
//! row of `reservation` makes both repeatable.

use fractus_agent_api::host::{HostId, HostReport};
use fractus_agent_api::machine::ServerId;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, ExprTrait, OnConflict};
use sea_orm::{DatabaseTransaction, QueryOrder, Set};

use crate::scheduler::Amounts;

pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "host")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub hostname: String,
        pub endpoint: String,
        /// JSON of `HostReport`, as of the last change worth a write.
        pub report: String,
        /// Takes no new servers.
        pub disabled: bool,
        pub disabled_reason: Option<String>,
        /// An operator declared that it is off.
        pub forced_down: bool,
        pub vcpus_limit: i64,
        pub memory_mib_limit: i64,
        pub disk_gib_limit: i64,
        pub vcpus_used: i64,
        pub memory_mib_used: i64,
        pub disk_gib_used: i64,
        pub joined_at_us: i64,
        /// Written at most every third of the time after which it counts as silent.
        pub heard_at_us: i64,
        pub removed_at_us: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod reservation {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "reservation")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub server_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub host_id: String,
        pub vcpus: i64,
        pub memory_mib: i64,
        pub disk_gib: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// vCPUs that share one CPU of the host, memory and disk that the host keeps for itself.
const VCPUS_A_CPU: i64 = 16;
const HOST_MEMORY_MIB: i64 = 512;

/// What a host with this inventory can hold.
pub fn limits(report: &HostReport) -> Amounts {
    let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Amounts {
        vcpus: i64::from(report.cpus).saturating_mul(VCPUS_A_CPU),
        memory_mib: Ord::max(whole(report.memory_mib) - HOST_MEMORY_MIB, 0),
        disk_gib: whole(report.disk_gib),
    }
}

impl row::Model {
    pub fn host_id(&self) -> HostId {
        HostId(Uuid::parse_str(&self.id).unwrap_or_default())
    }

    pub fn limits(&self) -> Amounts {
        Amounts {
            vcpus: self.vcpus_limit,
            memory_mib: self.memory_mib_limit,
            disk_gib: self.disk_gib_limit,
        }
    }

    pub fn used(&self) -> Amounts {
        Amounts {
            vcpus: self.vcpus_used,
            memory_mib: self.memory_mib_used,
            disk_gib: self.disk_gib_used,
        }
    }

    /// The last inventory; `None` if it was written by a release that said it otherwise.
    pub fn inventory(&self) -> Option<HostReport> {
        serde_json::from_str(&self.report).ok()
    }
}

/// A new host, or the same one that joins again with its id.
pub async fn insert(
    tx: &DatabaseTransaction,
    host: HostId,
    endpoint: &str,
    report: &HostReport,
    now_us: i64,
) -> Result<(), DbErr> {
    let limits = limits(report);
    let row = row::ActiveModel {
        id: Set(host.to_string()),
        hostname: Set(report.hostname.clone()),
        endpoint: Set(endpoint.to_owned()),
        report: Set(json(report)?),
        disabled: Set(false),
        disabled_reason: Set(None),
        forced_down: Set(false),
        vcpus_limit: Set(limits.vcpus),
        memory_mib_limit: Set(limits.memory_mib),
        disk_gib_limit: Set(limits.disk_gib),
        vcpus_used: Set(0),
        memory_mib_used: Set(0),
        disk_gib_used: Set(0),
        joined_at_us: Set(now_us),
        heard_at_us: Set(now_us),
        removed_at_us: Set(None),
    };
    row::Entity::insert(row)
        .exec_without_returning(tx)
        .await
        .map(|_| ())
}

/// Writes what a heartbeat said.
pub async fn heard(
    tx: &DatabaseTransaction,
    host: HostId,
    endpoint: &str,
    report: &HostReport,
    now_us: i64,
) -> Result<(), DbErr> {
    let limits = limits(report);
    let changes = row::ActiveModel {
        hostname: Set(report.hostname.clone()),
        endpoint: Set(endpoint.to_owned()),
        report: Set(json(report)?),
        vcpus_limit: Set(limits.vcpus),
        memory_mib_limit: Set(limits.memory_mib),
        disk_gib_limit: Set(limits.disk_gib),
        heard_at_us: Set(now_us),
        ..Default::default()
    };
    row::Entity::update_many()
        .set(changes)
        .filter(row::Column::Id.eq(host.to_string()))
        .filter(row::Column::RemovedAtUs.is_null())
        .exec(tx)
        .await
        .map(|_| ())
}

fn json(report: &HostReport) -> Result<String, DbErr> {
    serde_json::to_string(report).map_err(|error| DbErr::Custom(error.to_string()))
}

/// Hosts that belong to the cloud, by id.
pub async fn all(connection: &impl ConnectionTrait) -> Result<Vec<row::Model>, DbErr> {
    row::Entity::find()
        .filter(row::Column::RemovedAtUs.is_null())
        .order_by_asc(row::Column::Id)
        .all(connection)
        .await
}

/// One host; `None` if it never joined or was removed.
pub async fn find(
    connection: &impl ConnectionTrait,
    host: HostId,
) -> Result<Option<row::Model>, DbErr> {
    row::Entity::find_by_id(host.to_string())
        .filter(row::Column::RemovedAtUs.is_null())
        .one(connection)
        .await
}

/// Ends a host's membership: its certificate is worth nothing from the commit on. False if there was
/// no such host.
pub async fn remove(tx: &DatabaseTransaction, host: HostId, now_us: i64) -> Result<bool, DbErr> {
    let removed = row::Entity::update_many()
        .col_expr(row::Column::RemovedAtUs, Expr::value(now_us))
        .filter(row::Column::Id.eq(host.to_string()))
        .filter(row::Column::RemovedAtUs.is_null())
        .exec(tx)
        .await?;
    Ok(removed.rows_affected == 1)
}

/// Whether new servers may be placed there. False if there is no such host.
pub async fn set_disabled(
    tx: &DatabaseTransaction,
    host: HostId,
    disabled: bool,
    reason: Option<String>,
) -> Result<bool, DbErr> {
    let changed = row::Entity::update_many()
        .col_expr(row::Column::Disabled, Expr::value(disabled))
        .col_expr(row::Column::DisabledReason, Expr::value(reason))
        .filter(row::Column::Id.eq(host.to_string()))
        .filter(row::Column::RemovedAtUs.is_null())
        .exec(tx)
        .await?;
    Ok(changed.rows_affected == 1)
}

/// The operator's word that the host is off. False if there is no such host.
pub async fn set_forced_down(
    tx: &DatabaseTransaction,
    host: HostId,
    forced_down: bool,
) -> Result<bool, DbErr> {
    let changed = row::Entity::update_many()
        .col_expr(row::Column::ForcedDown, Expr::value(forced_down))
        .filter(row::Column::Id.eq(host.to_string()))
        .filter(row::Column::RemovedAtUs.is_null())
        .exec(tx)
        .await?;
    Ok(changed.rows_affected == 1)
}

/// After a restore of the database: which hosts are off was said of another time, and is to be said anew.
pub async fn none_is_off(tx: &DatabaseTransaction) -> Result<(), DbErr> {
    row::Entity::update_many()
        .col_expr(row::Column::ForcedDown, Expr::value(false))
        .exec(tx)
        .await
        .map(|_| ())
}

/// Takes `amounts` of the host for the server, if they are there. Again for the same pair: true
/// without taking more.
pub async fn reserve(
    tx: &DatabaseTransaction,
    host: HostId,
    server: ServerId,
    amounts: Amounts,
) -> Result<bool, DbErr> {
    let reservation = reservation::ActiveModel {
        server_id: Set(server.to_string()),
        host_id: Set(host.to_string()),
        vcpus: Set(amounts.vcpus),
        memory_mib: Set(amounts.memory_mib),
        disk_gib: Set(amounts.disk_gib),
    };
    let key = [reservation::Column::ServerId, reservation::Column::HostId];
    let inserted = reservation::Entity::insert(reservation)
        .on_conflict(OnConflict::columns(key).do_nothing().to_owned())
        .exec_without_returning(tx)
        .await?;
    if inserted == 0 {
        return Ok(true);
    }
    let taken = use_more(host, amounts)
        .filter(row::Column::RemovedAtUs.is_null())
        .filter(fits(
            row::Column::VcpusUsed,
            row::Column::VcpusLimit,
            amounts.vcpus,
        ))
        .filter(fits(
            row::Column::MemoryMibUsed,
            row::Column::MemoryMibLimit,
            amounts.memory_mib,
        ))
        .filter(fits(
            row::Column::DiskGibUsed,
            row::Column::DiskGibLimit,
            amounts.disk_gib,
        ))
        .exec(tx)
        .await?;
    if taken.rows_affected == 0 {
        let key = (server.to_string(), host.to_string());
        reservation::Entity::delete_by_id(key).exec(tx).await?;
        return Ok(false);
    }
    Ok(true)
}

/// The server holds this of the host, of which it held as much before, or more: whether there is room is not asked.
pub async fn keep(
    tx: &DatabaseTransaction,
    host: HostId,
    server: ServerId,
    amounts: Amounts,
) -> Result<(), DbErr> {
    release(tx, host, server).await?;
    let reservation = reservation::ActiveModel {
        server_id: Set(server.to_string()),
        host_id: Set(host.to_string()),
        vcpus: Set(amounts.vcpus),
        memory_mib: Set(amounts.memory_mib),
        disk_gib: Set(amounts.disk_gib),
    };
    reservation::Entity::insert(reservation)
        .exec_without_returning(tx)
        .await?;
    use_more(host, amounts).exec(tx).await.map(|_| ())
}

/// Gives back what the server holds of the host; nothing if it holds nothing.
pub async fn release(
    tx: &DatabaseTransaction,
    host: HostId,
    server: ServerId,
) -> Result<(), DbErr> {
    let key = (server.to_string(), host.to_string());
    let Some(held) = reservation::Entity::find_by_id(key.clone()).one(tx).await? else {
        return Ok(());
    };
    reservation::Entity::delete_by_id(key).exec(tx).await?;
    let back = Amounts {
        vcpus: -held.vcpus,
        memory_mib: -held.memory_mib,
        disk_gib: -held.disk_gib,
    };
    use_more(host, back).exec(tx).await.map(|_| ())
}

fn use_more(host: HostId, amounts: Amounts) -> sea_orm::UpdateMany<row::Entity> {
    let more = |column: row::Column, by: i64| (column, Expr::col(column).add(by));
    let (vcpus, vcpus_used) = more(row::Column::VcpusUsed, amounts.vcpus);
    let (memory, memory_used) = more(row::Column::MemoryMibUsed, amounts.memory_mib);
    let (disk, disk_used) = more(row::Column::DiskGibUsed, amounts.disk_gib);
    row::Entity::update_many()
        .col_expr(vcpus, vcpus_used)
        .col_expr(memory, memory_used)
        .col_expr(disk, disk_used)
        .filter(row::Column::Id.eq(host.to_string()))
}

fn fits(used: row::Column, limit: row::Column, amount: i64) -> sea_orm::sea_query::Expr {
    // As the scheduler: a host that has less than it gave (a smaller disk) still has all of nothing.
    let enough = Expr::col(used).add(amount).lte(Expr::col(limit));
    enough.or(Expr::val(amount).lte(0_i64))
}
