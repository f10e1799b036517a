//! The tables `controller` (who lives: a row a life, raised with each beat) and `leader` (one row: the
//! present term, and whose it is).

use async_trait::async_trait;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveValue::Set, DatabaseTransaction, QuerySelect};

use super::Term;
use crate::database::{Fence, fenced_off};

pub mod controller {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "controller")]
    pub struct Model {
        /// One life of a controller.
        #[sea_orm(primary_key, auto_increment = false)]
        pub incarnation: String,
        pub name: String,
        /// Its listener for agents.
        pub agents_url: String,
        /// Raised by each beat; whether it still rises is what others go by, not the time.
        pub beats: i64,
        /// By its own clock; rows that nobody raises any more are removed by it, long after.
        pub seen_at_us: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod leader {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "leader")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i32,
        pub term: i64,
        /// Empty once it has resigned.
        pub incarnation: String,
        pub name: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

const ONLY: i32 = 1;
/// Rows of controllers that were not raised for so long are removed.
const FORGOTTEN_US: i64 = 24 * 3600 * 1_000_000;

/// A controller says that it lives.
pub(super) async fn beat(
    tx: &DatabaseTransaction,
    me: &super::Me,
    now_us: i64,
) -> Result<(), DbErr> {
    let known = controller::Entity::find_by_id(me.incarnation.to_string())
        .one(tx)
        .await?;
    let row = controller::ActiveModel {
        incarnation: Set(me.incarnation.to_string()),
        name: Set(me.name.clone()),
        agents_url: Set(me.agents_url.clone()),
        beats: Set(known.as_ref().map_or(1, |row| row.beats + 1)),
        seen_at_us: Set(now_us),
    };
    match known {
        Some(_) => drop(row.update(tx).await?),
        None => {
            controller::Entity::insert(row)
                .exec_without_returning(tx)
                .await?;
        }
    }
    controller::Entity::delete_many()
        .filter(controller::Column::SeenAtUs.lt(now_us.saturating_sub(FORGOTTEN_US)))
        .exec(tx)
        .await
        .map(drop)
}

pub(super) async fn controllers(
    connection: &impl ConnectionTrait,
) -> Result<Vec<controller::Model>, DbErr> {
    controller::Entity::find().all(connection).await
}

pub(super) async fn present(
    connection: &impl ConnectionTrait,
) -> Result<Option<leader::Model>, DbErr> {
    leader::Entity::find_by_id(ONLY).one(connection).await
}

/// The compare-and-set that begins the term after `last`; false if another has begun it.
pub(super) async fn take_over(
    tx: &DatabaseTransaction,
    last: Term,
    me: &super::Me,
) -> Result<bool, DbErr> {
    let next = leader::ActiveModel {
        id: Set(ONLY),
        term: Set(last.0 + 1),
        incarnation: Set(me.incarnation.to_string()),
        name: Set(me.name.clone()),
    };
    if last == Term(0) {
        let inserted = leader::Entity::insert(next)
            .on_conflict(
                OnConflict::column(leader::Column::Id)
                    .do_nothing()
                    .to_owned(),
            )
            .exec_without_returning(tx)
            .await?;
        return Ok(inserted == 1);
    }
    let taken = leader::Entity::update_many()
        .set(next)
        .filter(leader::Column::Id.eq(ONLY))
        .filter(leader::Column::Term.eq(last.0))
        .exec(tx)
        .await?;
    Ok(taken.rows_affected == 1)
}

/// The controller goes: nobody has to wait for it.
pub(super) async fn resign(tx: &DatabaseTransaction, incarnation: Uuid) -> Result<(), DbErr> {
    let incarnation = incarnation.to_string();
    leader::Entity::update_many()
        .col_expr(
            leader::Column::Incarnation,
            sea_orm::sea_query::Expr::value(""),
        )
        .filter(leader::Column::Incarnation.eq(incarnation.as_str()))
        .exec(tx)
        .await?;
    controller::Entity::delete_by_id(incarnation)
        .exec(tx)
        .await
        .map(drop)
}

/// A write of a term: refused once another one has begun. The row is locked against that until the
/// write's own transaction ends, so what is committed was committed by the leader.
#[async_trait]
impl Fence for Term {
    async fn check(&self, tx: &DatabaseTransaction) -> Result<(), DbErr> {
        let row = leader::Entity::find_by_id(ONLY)
            .lock_shared()
            .one(tx)
            .await?;
        match row {
            Some(row) if row.term == self.0 => Ok(()),
            _ => Err(fenced_off()),
        }
    }
}
