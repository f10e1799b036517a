//! Tokens of consoles: who has one may attach to a server's serial line for a few minutes. Kept by
//! their hash.

use sea_orm::entity::prelude::*;
use sea_orm::{ConnectionTrait, IntoActiveModel};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "console_token")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub hash: String,
    #[sea_orm(column_type = "Text")]
    pub server_id: String,
    pub expires_at_us: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

fn hash(token: &str) -> String {
    blake3::hash(token.as_bytes()).to_hex().to_string()
}

/// Keeps a token, and forgets those that have expired.
pub async fn insert(
    connection: &impl ConnectionTrait,
    token: &str,
    server: &str,
    now_us: i64,
    expires_at_us: i64,
) -> Result<(), DbErr> {
    Entity::delete_many()
        .filter(Column::ExpiresAtUs.lt(now_us))
        .exec(connection)
        .await?;
    let row = Model {
        hash: hash(token),
        server_id: server.to_owned(),
        expires_at_us,
    };
    Entity::insert(row.into_active_model())
        .exec_without_returning(connection)
        .await
        .map(|_| ())
}

/// The server that a token opens.
pub async fn server_of(
    connection: &impl ConnectionTrait,
    token: &str,
    now_us: i64,
) -> Result<Option<String>, DbErr> {
    let row = Entity::find_by_id(hash(token)).one(connection).await?;
    Ok(row
        .filter(|row| row.expires_at_us > now_us)
        .map(|row| row.server_id))
}
