//! Keypairs of users. Private keys are never stored.

use sea_orm::entity::prelude::*;
use sea_orm::{ActiveValue::NotSet, ConnectionTrait, IntoActiveModel, QueryOrder, QuerySelect};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "keypair")]
pub struct Model {
    #[sea_orm(primary_key)]
    pub id: i64,
    #[sea_orm(column_type = "Text")]
    pub user_id: String,
    #[sea_orm(column_type = "Text")]
    pub name: String,
    /// `ssh` or `x509`.
    #[sea_orm(column_type = "Text")]
    pub kind: String,
    #[sea_orm(column_type = "Text")]
    pub fingerprint: String,
    #[sea_orm(column_type = "Text")]
    pub public_key: String,
    pub created_at_us: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// A user's keypairs by name, after the one named `marker`.
pub async fn list(
    connection: &impl ConnectionTrait,
    user: &str,
    marker: Option<&str>,
    limit: u64,
) -> Result<Vec<Model>, DbErr> {
    let mut query = Entity::find()
        .filter(Column::UserId.eq(user))
        .order_by_asc(Column::Name)
        .limit(limit);
    if let Some(marker) = marker {
        query = query.filter(Column::Name.gt(marker));
    }
    query.all(connection).await
}

pub async fn find(
    connection: &impl ConnectionTrait,
    user: &str,
    name: &str,
) -> Result<Option<Model>, DbErr> {
    Entity::find()
        .filter(Column::UserId.eq(user))
        .filter(Column::Name.eq(name))
        .one(connection)
        .await
}

pub async fn count(connection: &impl ConnectionTrait, user: &str) -> Result<u64, DbErr> {
    Entity::find()
        .filter(Column::UserId.eq(user))
        .count(connection)
        .await
}

/// Inserts a row; its `id` is given by the database.
pub async fn insert(connection: &impl ConnectionTrait, row: Model) -> Result<(), DbErr> {
    let row = ActiveModel {
        id: NotSet,
        ..row.into_active_model()
    };
    Entity::insert(row)
        .exec_without_returning(connection)
        .await
        .map(|_| ())
}

/// True if there was one to delete.
pub async fn delete(
    connection: &impl ConnectionTrait,
    user: &str,
    name: &str,
) -> Result<bool, DbErr> {
    let gone = Entity::delete_many()
        .filter(Column::UserId.eq(user))
        .filter(Column::Name.eq(name))
        .exec(connection)
        .await?;
    Ok(gone.rows_affected > 0)
}
