//! How a host becomes a member: one-time tokens, of which the database keeps only hashes.

use fractus_agent_api::host::{HostId, JoinRequest};
use fractus_agent_api::identity::JoinToken;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::Expr;
use sea_orm::{DatabaseTransaction, Set};

use super::host;

pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "join_token")]
    pub struct Model {
        /// BLAKE3 of the secret, 64 hex digits.
        #[sea_orm(primary_key, auto_increment = false)]
        pub hash: String,
        pub created_at_us: i64,
        pub expires_at_us: i64,
        pub used_at_us: Option<i64>,
        /// The host that used it, and BLAKE3 of its public key.
        pub host_id: Option<String>,
        pub key_hash: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Why a host may not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("the join token is not valid: make a new one with `fractus host join-token`")]
    Token,
    #[error("the join token was used before: make a new one with `fractus host join-token`")]
    Used,
    #[error("the database")]
    Database(#[from] DbErr),
}

/// Bytes of a token's secret, before base64.
pub const SECRET_LEN: usize = 24;

/// Writes a token that is good until `expires_at_us`.
pub async fn issue(
    tx: &DatabaseTransaction,
    secret: &str,
    now_us: i64,
    expires_at_us: i64,
) -> Result<(), DbErr> {
    let row = row::ActiveModel {
        hash: Set(hash(secret)),
        created_at_us: Set(now_us),
        expires_at_us: Set(expires_at_us),
        used_at_us: Set(None),
        host_id: Set(None),
        key_hash: Set(None),
    };
    row::Entity::insert(row)
        .exec_without_returning(tx)
        .await
        .map(|_| ())
}

/// Takes a host in. The same key with the same token again, because the answer was lost, is the same
/// host again for as long as the token would be good.
pub async fn join(
    tx: &DatabaseTransaction,
    new_host: HostId,
    request: &JoinRequest,
    key_hash: &str,
    now_us: i64,
) -> Result<HostId, JoinError> {
    let token: JoinToken = request.token.parse().map_err(|_| JoinError::Token)?;
    let hash = hash(&token.secret);
    let found = row::Entity::find_by_id(hash.clone()).one(tx).await?;
    let known = found
        .filter(|row| now_us < row.expires_at_us)
        .ok_or(JoinError::Token)?;
    if let Some(joined) = known.host_id {
        let same_key = known.key_hash.as_deref() == Some(key_hash);
        let id = Uuid::parse_str(&joined)
            .map(HostId)
            .map_err(|_| JoinError::Used)?;
        let member = host::find(tx, id).await?.is_some();
        return if same_key && member {
            Ok(id)
        } else {
            Err(JoinError::Used)
        };
    }
    row::Entity::update_many()
        .col_expr(row::Column::UsedAtUs, Expr::value(now_us))
        .col_expr(row::Column::HostId, Expr::value(new_host.to_string()))
        .col_expr(row::Column::KeyHash, Expr::value(key_hash))
        .filter(row::Column::Hash.eq(hash))
        .exec(tx)
        .await?;
    host::insert(tx, new_host, &request.endpoint, &request.host, now_us).await?;
    Ok(new_host)
}

fn hash(secret: &str) -> String {
    blake3::hash(secret.as_bytes()).to_hex().to_string()
}
