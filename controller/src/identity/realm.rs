//! The realm: validates tokens for the whole controller.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use sea_orm::{DbErr, EntityTrait};

use crate::clock::Clock;
use crate::database::Database;
use crate::http::{Authenticate, Identity, Refused};
use crate::identity::Passwords;
use crate::identity::model::{Target, user};
use crate::identity::store;
use crate::identity::token::{Claims, KeyError, LIFETIME_US, Scope, TokenKeys, Unopened};
use crate::secret::{MasterKey, SecretError};

/// Tokens that are remembered; beyond that all are forgotten and looked up anew.
const REMEMBERED: usize = 10_000;

/// Passwords, token keys and what has been validated lately. Shared by all handlers.
pub struct Realm {
    db: Database,
    clock: Arc<dyn Clock>,
    pub(super) keys: TokenKeys,
    pub(super) passwords: Passwords,
    remembered: RwLock<HashMap<String, Remembered>>,
}

#[derive(Clone)]
struct Remembered {
    revision: i64,
    identity: Arc<Identity>,
}

impl Realm {
    pub async fn open(
        db: Database,
        clock: Arc<dyn Clock>,
        master: MasterKey,
    ) -> Result<Self, KeyError> {
        let keys = TokenKeys::open(&db, master, clock.now_us()).await?;
        Ok(Self {
            passwords: Passwords::new(Arc::clone(&clock)),
            db,
            clock,
            keys,
            remembered: RwLock::default(),
        })
    }

    /// For tests that bring their own callers: a realm with a key of its own.
    pub async fn idle(db: &Database) -> Arc<Self> {
        let opened = match MasterKey::ephemeral() {
            Ok(master) => Self::open(db.clone(), crate::clock::SystemClock::shared(), master).await,
            Err(error) => Err(error.into()),
        };
        match opened {
            Ok(realm) => Arc::new(realm),
            Err(error) => panic!("a realm for a test: {error}"),
        }
    }

    /// Makes and forgets token keys; to be called every few minutes.
    pub async fn refresh_keys(&self) -> Result<(), KeyError> {
        self.keys.refresh(&self.db, self.clock.now_us()).await
    }

    /// A token for a user in a project, without a proof: for the controller's own calls, and tests.
    pub fn token_for(&self, user_id: &str, project_id: &str) -> Result<String, SecretError> {
        let now_us = self.clock.now_us();
        self.keys.seal(&Claims {
            user_id: user_id.to_owned(),
            scope: Scope::Project(project_id.to_owned()),
            methods: vec!["password".to_owned()],
            audit_ids: vec![uuid::Uuid::new_v4().simple().to_string()],
            issued_at_us: now_us,
            expires_at_us: now_us + LIFETIME_US,
        })
    }

    /// What a token claims, if it is one of ours and has not expired.
    pub(super) async fn claims(&self, token: &str) -> Result<Claims, Refused> {
        let now = self.clock.now_us();
        let opened = match self.keys.open_token(token, now) {
            Err(Unopened::NewerKey) => {
                self.refresh_keys()
                    .await
                    .map_err(|error| unavailable(&error))?;
                self.keys.open_token(token, now)
            }
            other => other,
        };
        opened.map_err(|_| Refused::Invalid)
    }

    /// Who a token's claims stand for now: the user, the scope and the current roles.
    pub(super) async fn resolve(&self, claims: &Claims) -> Result<Option<Identity>, DbErr> {
        let db = self.db.reader();
        if let Some(audit_id) = claims.audit_ids.first()
            && store::is_revoked(db, audit_id).await?
        {
            return Ok(None);
        }
        let user = user::Entity::find_by_id(&claims.user_id).one(db).await?;
        let live = |user: &user::Model| user.enabled && user.valid_from_us <= claims.issued_at_us;
        let Some(user) = user.filter(live) else {
            return Ok(None);
        };
        let Some(user_domain) = store::domain(db, &user.domain_id).await? else {
            return Ok(None);
        };
        let mut identity = Identity {
            user_id: user.id,
            user_name: user.name,
            user_domain,
            project: None,
            domain: None,
            system: false,
            roles: Vec::new(),
            methods: claims.methods.clone(),
            audit_ids: claims.audit_ids.clone(),
            issued_at_us: claims.issued_at_us,
            expires_at_us: claims.expires_at_us,
        };
        let target = match &claims.scope {
            Scope::Unscoped => return Ok(Some(identity)),
            Scope::Project(id) => {
                identity.project = store::enabled_project(db, id).await?;
                if identity.project.is_none() {
                    return Ok(None);
                }
                Target::Project(id.clone())
            }
            Scope::Domain(id) => {
                identity.domain = store::domain(db, id).await?;
                if identity.domain.is_none() {
                    return Ok(None);
                }
                Target::Domain(id.clone())
            }
            Scope::System => {
                identity.system = true;
                Target::System
            }
        };
        identity.roles = store::roles_of(db, &identity.user_id, &target).await?;
        Ok((!identity.roles.is_empty()).then_some(identity))
    }

    fn recall(&self, token: &str, revision: i64) -> Option<Arc<Identity>> {
        let remembered = self
            .remembered
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let entry = remembered
            .get(token)
            .filter(|entry| entry.revision == revision)?;
        (entry.identity.expires_at_us > self.clock.now_us()).then(|| Arc::clone(&entry.identity))
    }

    fn remember(&self, token: &str, revision: i64, identity: &Arc<Identity>) {
        let mut remembered = self
            .remembered
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        let entry = Remembered {
            revision,
            identity: Arc::clone(identity),
        };
        remembered.insert(token.to_owned(), entry);
    }
}

#[async_trait]
impl Authenticate for Realm {
    async fn authenticate(&self, token: &str) -> Result<Arc<Identity>, Refused> {
        // Read before the rest: what changes meanwhile makes a newer revision than the remembered.
        let revision = store::current_revision(self.db.reader()).await;
        let revision = revision.map_err(|error| unavailable(&error))?;
        if let Some(identity) = self.recall(token, revision) {
            return Ok(identity);
        }
        let claims = self.claims(token).await?;
        let identity = self
            .resolve(&claims)
            .await
            .map_err(|error| unavailable(&error))?;
        let identity = Arc::new(identity.ok_or(Refused::Invalid)?);
        self.remember(token, revision, &identity);
        Ok(identity)
    }
}

fn unavailable(error: &dyn std::error::Error) -> Refused {
    Refused::Unavailable(error.to_string())
}

impl std::fmt::Debug for Realm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Realm")
    }
}
