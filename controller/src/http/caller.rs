//! Who calls: what a token says of a user, and the refusal when there is none.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use async_trait::async_trait;
use axum::extract::FromRequestParts;
use http::request::Parts;
use http::{HeaderMap, StatusCode};

use crate::http::{ApiError, App};

/// A named thing of identity: a domain (and, below, a project with its own).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    pub id: String,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    pub id: String,
    pub name: String,
    pub domain: Domain,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    pub id: String,
    pub name: String,
}

/// What a valid token stands for. Roles are the current ones, implied roles included.
#[derive(Debug, Clone)]
pub struct Identity {
    pub user_id: String,
    pub user_name: String,
    pub user_domain: Domain,
    /// The project that the token is scoped to, if it is.
    pub project: Option<Project>,
    /// The domain that the token is scoped to, if it is.
    pub domain: Option<Domain>,
    /// Scoped to the whole cloud.
    pub system: bool,
    pub roles: Vec<Role>,
    pub methods: Vec<String>,
    /// This token's audit id and, if it came from another token, the first one's.
    pub audit_ids: Vec<String>,
    /// Microseconds since the epoch.
    pub issued_at_us: i64,
    pub expires_at_us: i64,
}

impl Identity {
    pub fn has_role(&self, name: &str) -> bool {
        self.roles.iter().any(|role| role.name == name)
    }

    pub fn is_admin(&self) -> bool {
        self.has_role("admin")
    }

    /// The project that the token is scoped to.
    pub fn project_id(&self) -> Option<&str> {
        self.project.as_ref().map(|project| project.id.as_str())
    }

    /// Whether what belongs to `project` exists for this caller.
    pub fn may_see(&self, project: &str) -> bool {
        self.is_admin() || self.project_id() == Some(project)
    }
}

/// The authenticated caller of a request.
#[derive(Debug, Clone)]
pub struct Caller {
    identity: Arc<Identity>,
    token: Arc<str>,
    service: Option<Arc<Identity>>,
}

impl Caller {
    pub fn new(identity: Arc<Identity>, token: Arc<str>) -> Self {
        Self {
            identity,
            token,
            service: None,
        }
    }

    /// The token as it was sent.
    pub fn token(&self) -> &str {
        &self.token
    }

    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// The service that passed this request on (`X-Service-Token` with the role service).
    pub fn service(&self) -> Option<&Identity> {
        self.service.as_deref()
    }

    /// The project the caller acts in, or 403: an unscoped token owns nothing.
    pub fn scope(&self) -> Result<&Project, ApiError> {
        self.identity.project.as_ref().ok_or_else(|| {
            ApiError::forbidden("This request needs a token that is scoped to a project.")
        })
    }
}

impl Deref for Caller {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.identity
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or_else(ApiError::unauthorized)
    }
}

/// Why a token does not count.
#[derive(Debug)]
pub enum Refused {
    /// Unknown, expired, revoked, or its user, project or roles are gone.
    Invalid,
    /// It could not be looked up.
    Unavailable(String),
}

/// Turns a token into who it stands for. Implemented by identity; tests have their own.
#[async_trait]
pub trait Authenticate: Send + Sync + fmt::Debug {
    async fn authenticate(&self, token: &str) -> Result<Arc<Identity>, Refused>;
}

/// The caller that a request's headers name.
pub(super) async fn identify(app: &App, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let token = header(headers, "x-auth-token").ok_or_else(ApiError::unauthorized)?;
    let identity = look_up(app, token).await?;
    let mut caller = Caller::new(identity, token.into());
    if let Some(token) = header(headers, "x-service-token") {
        let service = look_up(app, token).await?;
        caller.service = service.has_role("service").then_some(service);
    }
    Ok(caller)
}

async fn look_up(app: &App, token: &str) -> Result<Arc<Identity>, ApiError> {
    app.authenticator()
        .authenticate(token)
        .await
        .map_err(|refused| match refused {
            Refused::Invalid => ApiError::unauthorized(),
            Refused::Unavailable(why) => {
                tracing::error!(%why, "a token could not be validated");
                ApiError::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "The identity service cannot be asked now; try again.",
                )
            }
        })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get(name)?
        .to_str()
        .ok()
        .filter(|value| !value.is_empty())
}
