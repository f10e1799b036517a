//! Sealed tokens: nothing of a login is written anywhere; a token carries what it stands for, sealed
//! by a key that the controllers share.
//!
//! A token is `f1.` and base64url of key id, nonce, ciphertext and tag. Keys are in the database,
//! wrapped by the master key, and change; an old key opens tokens for as long as they can live.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, ColumnTrait, EntityTrait, QueryFilter, QueryOrder};
use serde::{Deserialize, Serialize};

use crate::database::Database;
use crate::identity::model::token_key;
use crate::secret::{MasterKey, Sealer, SecretError, random_key};

/// Microseconds a token lives.
pub const LIFETIME_US: i64 = 3_600_000_000;
/// Microseconds a key seals before the next one does.
const KEY_AGE_US: i64 = 24 * 3_600_000_000;
const PURPOSE: &str = "token key";
const PREFIX: &str = "f1.";
/// A token is a header: longer ones were not made here.
const LONGEST: usize = 2048;

/// What a token says. Names are short: it is sent with every request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    #[serde(rename = "u")]
    pub user_id: String,
    #[serde(rename = "s")]
    pub scope: Scope,
    #[serde(rename = "m")]
    pub methods: Vec<String>,
    /// Of this token, then of the first of its chain.
    #[serde(rename = "a")]
    pub audit_ids: Vec<String>,
    #[serde(rename = "i")]
    pub issued_at_us: i64,
    #[serde(rename = "e")]
    pub expires_at_us: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scope {
    #[serde(rename = "u")]
    Unscoped,
    #[serde(rename = "p")]
    Project(String),
    #[serde(rename = "d")]
    Domain(String),
    #[serde(rename = "s")]
    System,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("reading or writing the token keys")]
    Database(#[from] sea_orm::DbErr),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("a token key in the database is no base64")]
    Encoding,
}

/// The keys that seal and open tokens.
#[derive(Debug, Clone)]
pub struct TokenKeys {
    keys: Arc<RwLock<BTreeMap<i64, Sealer>>>,
    master: MasterKey,
}

impl TokenKeys {
    /// Reads the keys, makes the first or the next one when it is time, and forgets those that no
    /// living token needs.
    pub async fn open(db: &Database, master: MasterKey, now_us: i64) -> Result<Self, KeyError> {
        let keys = Self {
            keys: Arc::default(),
            master,
        };
        keys.refresh(db, now_us).await?;
        Ok(keys)
    }

    /// The same again later; to be called every few minutes, and when a token names an unknown key.
    pub async fn refresh(&self, db: &Database, now_us: i64) -> Result<(), KeyError> {
        let newest = token_key::Entity::find()
            .order_by_desc(token_key::Column::Id)
            .one(db.reader())
            .await?;
        if newest
            .as_ref()
            .is_none_or(|key| key.created_at_us + KEY_AGE_US < now_us)
        {
            let id = newest.map_or(1, |key| key.id + 1);
            self.add(db, id, now_us).await?;
        }
        let mut opened = BTreeMap::new();
        for row in token_key::Entity::find().all(db.reader()).await? {
            let wrapped = URL_SAFE_NO_PAD
                .decode(&row.wrapped)
                .map_err(|_| KeyError::Encoding)?;
            let plain = self.master.unwrap_secret(PURPOSE, &wrapped)?;
            let key = plain
                .as_slice()
                .try_into()
                .map_err(|_| KeyError::Encoding)?;
            opened.insert(row.id, Sealer::new(key)?);
        }
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = opened;
        Ok(())
    }

    /// Adds key `id`, unless another controller was faster, and takes out what is too old.
    async fn add(&self, db: &Database, id: i64, now_us: i64) -> Result<(), KeyError> {
        let wrapped = URL_SAFE_NO_PAD.encode(self.master.wrap(PURPOSE, &*random_key()?)?);
        let oldest = now_us - 2 * KEY_AGE_US - LIFETIME_US;
        db.write(move |tx| {
            let wrapped = wrapped.clone();
            Box::pin(async move {
                if token_key::Entity::find_by_id(id).one(tx).await?.is_none() {
                    let row = token_key::ActiveModel {
                        id: Set(id),
                        wrapped: Set(wrapped),
                        created_at_us: Set(now_us),
                    };
                    row.insert(tx).await?;
                }
                token_key::Entity::delete_many()
                    .filter(token_key::Column::CreatedAtUs.lt(oldest))
                    .exec(tx)
                    .await?;
                Ok::<_, sea_orm::DbErr>(())
            })
        })
        .await?;
        Ok(())
    }

    /// The token for `claims`.
    pub fn seal(&self, claims: &Claims) -> Result<String, SecretError> {
        let failed = || SecretError::Seal {
            purpose: "a token".to_owned(),
        };
        let plain = serde_json::to_vec(claims).map_err(|_| failed())?;
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let (id, sealer) = keys.last_key_value().ok_or_else(failed)?;
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend(sealer.seal("token", &plain)?);
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// What a token says, if one of the keys has sealed it and it has not expired.
    pub fn open_token(&self, token: &str, now_us: i64) -> Result<Claims, Unopened> {
        let text = token
            .strip_prefix(PREFIX)
            .filter(|_| token.len() <= LONGEST);
        let bytes = text.and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        let bytes = bytes.ok_or(Unopened::Foreign)?;
        let (id, sealed) = bytes.split_first_chunk::<8>().ok_or(Unopened::Foreign)?;
        let id = i64::from_be_bytes(*id);
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let Some(sealer) = keys.get(&id) else {
            let next = keys
                .last_key_value()
                .is_some_and(|(newest, _)| id == newest + 1);
            return Err(if next {
                Unopened::NewerKey
            } else {
                Unopened::Foreign
            });
        };
        let plain = sealer
            .open("token", sealed)
            .map_err(|_| Unopened::Foreign)?;
        let claims: Claims = serde_json::from_slice(&plain).map_err(|_| Unopened::Foreign)?;
        if claims.expires_at_us <= now_us {
            return Err(Unopened::Expired);
        }
        Ok(claims)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unopened {
    /// Not one of ours, or altered.
    Foreign,
    Expired,
    /// Sealed by the next key, which another controller may have made: worth a refresh.
    NewerKey,
}

/// Microseconds as keystone shows them: `2026-11-22T10:27:57.000000Z`.
pub fn timestamp(at_us: i64) -> String {
    let at = jiff::Timestamp::from_microsecond(at_us).unwrap_or_default();
    format!("{at:.6}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::testing;

    fn claims() -> Claims {
        Claims {
            user_id: "0123456789abcdef0123456789abcdef".into(),
            scope: Scope::Project("fedcba9876543210fedcba9876543210".into()),
            methods: vec!["password".into()],
            audit_ids: vec!["xWTcRV1OT-6Js2NjrGucfA".into()],
            issued_at_us: 1_000_000,
            expires_at_us: 1_000_000 + LIFETIME_US,
        }
    }

    #[tokio::test]
    async fn tokens_open_on_every_controller_until_they_expire() {
        testing::engines(|db| async move {
            let master = MasterKey::ephemeral().unwrap();
            let one = TokenKeys::open(&db, master.clone(), 1_000_000)
                .await
                .unwrap();
            let other = TokenKeys::open(&db, master, 1_000_000).await.unwrap();
            let token = one.seal(&claims()).unwrap();
            assert!(token.len() < 400, "{} bytes", token.len());
            assert_eq!(other.open_token(&token, 2_000_000).unwrap(), claims());
            let late = 1_000_000 + LIFETIME_US;
            assert_eq!(
                other.open_token(&token, late).unwrap_err(),
                Unopened::Expired
            );
        })
        .await;
    }

    #[tokio::test]
    async fn altered_and_foreign_tokens_do_not_open() {
        let db = testing::database().await;
        let keys = TokenKeys::open(&db.database, MasterKey::ephemeral().unwrap(), 0)
            .await
            .unwrap();
        let token = keys.seal(&claims()).unwrap();
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let altered = String::from_utf8(bytes).unwrap();
            assert!(keys.open_token(&altered, 2).is_err(), "byte {at}");
        }
        for junk in ["", "f1.", "f1.AAAA", "junk", &"A".repeat(5000)] {
            assert_eq!(keys.open_token(junk, 2).unwrap_err(), Unopened::Foreign);
        }
    }

    #[tokio::test]
    async fn keys_change_daily_and_old_tokens_outlive_the_change() {
        let db = testing::database().await;
        let master = MasterKey::ephemeral().unwrap();
        let keys = TokenKeys::open(&db.database, master, 0).await.unwrap();
        let mut old = claims();
        old.expires_at_us = i64::MAX;
        let token = keys.seal(&old).unwrap();
        keys.refresh(&db.database, KEY_AGE_US + 1).await.unwrap();
        assert_ne!(
            token[..14],
            keys.seal(&old).unwrap()[..14],
            "another key seals"
        );
        assert!(keys.open_token(&token, 5).is_ok());
        for day in 2..6 {
            keys.refresh(&db.database, day * (KEY_AGE_US + 1))
                .await
                .unwrap();
        }
        assert_eq!(keys.open_token(&token, 5).unwrap_err(), Unopened::Foreign);
    }

    #[test]
    fn times_are_shown_as_keystone_shows_them() {
        assert_eq!(
            timestamp(1_795_343_277_000_000),
            "2026-11-22T10:27:57.000000Z"
        );
    }
}
