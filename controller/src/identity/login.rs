//! A login: the request of `POST /v3/auth/tokens`, its checks, and the token.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::StatusCode;
use sea_orm::{ConnectionTrait, EntityTrait};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::schema::Schema;
use crate::http::{ApiError, App, Authenticate, Identity};
use crate::identity::model::user;
use crate::identity::token::{Claims, LIFETIME_US, Scope, timestamp};
use crate::identity::{Realm, store};

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let reference = json!({"type": "object", "properties": {
        "id": {"type": "string"}, "name": {"type": "string"}}});
    let domain = reference.clone();
    Schema::of(json!({"type": "object", "properties": {
        "identity": {"type": "object", "required": ["methods"], "properties": {
            "methods": {"type": "array", "items": {"type": "string"}},
            "password": {"type": "object", "properties": {"user": {"type": "object", "properties": {
                "id": {"type": "string"}, "name": {"type": "string"},
                "password": {"type": "string"}, "domain": domain}}}},
            "token": {"type": "object", "required": ["id"],
                      "properties": {"id": {"type": "string"}}},
        }},
        "scope": {"type": ["object", "string"], "properties": {
            "project": {"type": "object", "properties": {
                "id": {"type": "string"}, "name": {"type": "string"}, "domain": reference}},
            "domain": reference,
            "system": {"type": "object"},
        }},
    }, "required": ["identity"]}))
});

#[derive(Debug, Deserialize)]
struct Auth {
    identity: Proofs,
    #[serde(default)]
    scope: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Proofs {
    methods: Vec<String>,
    #[serde(default)]
    password: Option<PasswordProof>,
    #[serde(default)]
    token: Option<TokenProof>,
}

#[derive(Debug, Deserialize)]
struct PasswordProof {
    #[serde(default)]
    user: Reference,
}

#[derive(Debug, Deserialize)]
struct TokenProof {
    id: String,
}

/// By id, or by name and domain.
#[derive(Debug, Default, Deserialize)]
struct Reference {
    id: Option<String>,
    name: Option<String>,
    password: Option<String>,
    domain: Option<Box<Reference>>,
}

/// Whom the proofs have shown to be there, and what the token that was one of them passes on.
struct Proven {
    user: user::Model,
    methods: Vec<String>,
    chain: Option<String>,
    expires_at_us: i64,
}

/// Checks the proofs and gives the token and what it stands for.
pub async fn log_in(app: &App, body: &Value) -> Result<(String, Identity), ApiError> {
    let Some(auth) = body.get("auth").filter(|auth| auth.is_object()) else {
        return Err(ApiError::bad_request(
            "Expecting to find auth in request body. The server could not comply with the request \
             since it is either malformed or otherwise incorrect. The client is assumed to be in \
             error.",
        ));
    };
    SCHEMA.check(auth)?;
    let auth: Auth = serde_json::from_value(auth.clone())
        .map_err(|error| ApiError::bad_request(error.to_string()))?;
    let realm = app.realm();
    let proven = prove(app, realm, &auth.identity).await?;
    let db = app.database().reader();
    let scope = match &auth.scope {
        Some(asked) => asked_scope(db, asked).await?,
        None => default_scope(db, &proven.user).await?,
    };
    let claims = Claims {
        user_id: proven.user.id,
        scope,
        methods: proven.methods,
        audit_ids: std::iter::once(audit_id(app)).chain(proven.chain).collect(),
        issued_at_us: app.now_us(),
        expires_at_us: proven.expires_at_us,
    };
    // No role in the scope: as little is said as of a wrong password.
    let identity = realm
        .resolve(&claims)
        .await?
        .ok_or_else(ApiError::unauthorized)?;
    let token = realm.keys.seal(&claims).map_err(ApiError::internal)?;
    Ok((token, identity))
}

async fn prove(app: &App, realm: &Realm, proofs: &Proofs) -> Result<Proven, ApiError> {
    let mut proven: Option<Proven> = None;
    // Each way once, however often it is named (as keystone has it): a password costs a hash.
    let mut tried: Vec<&str> = Vec::new();
    for method in &proofs.methods {
        if tried.contains(&method.as_str()) {
            continue;
        }
        tried.push(method);
        let next = match method.as_str() {
            "password" => by_password(app, realm, proofs.password.as_ref()).await?,
            "token" => by_token(app, realm, proofs.token.as_ref()).await?,
            _ => {
                return Err(ApiError::new(
                    StatusCode::UNAUTHORIZED,
                    "Attempted to authenticate with an unsupported method.",
                )
                .with("identity", json!({"methods": ["password", "token"]})));
            }
        };
        proven = match proven {
            None => Some(next),
            Some(first) if first.user.id == next.user.id => Some(Proven {
                methods: first.methods.into_iter().chain(next.methods).collect(),
                chain: first.chain.or(next.chain),
                expires_at_us: first.expires_at_us.min(next.expires_at_us),
                user: first.user,
            }),
            Some(_) => return Err(ApiError::unauthorized()),
        };
    }
    proven.ok_or_else(ApiError::unauthorized)
}

async fn by_password(
    app: &App,
    realm: &Realm,
    proof: Option<&PasswordProof>,
) -> Result<Proven, ApiError> {
    let missing =
        |what: &str| ApiError::bad_request(format!("Expecting to find {what} in password."));
    let asked = &proof.ok_or_else(|| missing("user"))?.user;
    let password = asked
        .password
        .as_deref()
        .ok_or_else(|| missing("password"))?;
    let db = app.database().reader();
    let user = match (&asked.id, &asked.name) {
        (Some(id), _) => user::Entity::find_by_id(id).one(db).await?,
        (None, Some(name)) => {
            let domain = asked.domain.as_deref().ok_or_else(|| missing("domain"))?;
            match domain_id(db, domain).await? {
                Some(domain) => store::user_by_name(db, &domain, name).await?,
                None => None,
            }
        }
        (None, None) => return Err(missing("id or name")),
    };
    let hash = user.as_ref().and_then(|user| user.password_hash.as_deref());
    let right = realm.passwords.verify(password, hash).await?;
    let user = user.filter(|_| right).ok_or_else(ApiError::unauthorized)?;
    let expires_at_us = app.now_us() + LIFETIME_US;
    Ok(Proven {
        user,
        methods: vec!["password".to_owned()],
        chain: None,
        expires_at_us,
    })
}

async fn by_token(
    app: &App,
    realm: &Realm,
    proof: Option<&TokenProof>,
) -> Result<Proven, ApiError> {
    let Some(proof) = proof else {
        return Err(ApiError::bad_request("Expecting to find id in token."));
    };
    let unknown = || ApiError::not_found("Could not recognize the token");
    let identity = realm.authenticate(&proof.id).await.map_err(|_| unknown())?;
    let user = user::Entity::find_by_id(&identity.user_id)
        .one(app.database().reader())
        .await?;
    let mut methods = identity.methods.clone();
    if !methods.iter().any(|method| method == "token") {
        methods.insert(0, "token".to_owned());
    }
    Ok(Proven {
        user: user.ok_or_else(unknown)?,
        methods,
        chain: identity.audit_ids.last().cloned(),
        expires_at_us: identity.expires_at_us,
    })
}

async fn domain_id(
    db: &impl ConnectionTrait,
    domain: &Reference,
) -> Result<Option<String>, ApiError> {
    match (&domain.id, &domain.name) {
        (Some(id), _) => Ok(Some(id.clone())),
        (None, Some(name)) => Ok(store::project_by_name(db, "", name)
            .await?
            .map(|row| row.id)),
        (None, None) => Ok(None),
    }
}

async fn asked_scope(db: &impl ConnectionTrait, asked: &Value) -> Result<Scope, ApiError> {
    let reference = |name: &str| -> Result<Option<Reference>, ApiError> {
        let part = asked.get(name).cloned();
        part.map(serde_json::from_value)
            .transpose()
            .map_err(|error| ApiError::bad_request(error.to_string()))
    };
    if asked == "unscoped" || asked.get("unscoped").is_some() {
        return Ok(Scope::Unscoped);
    }
    if let Some(project) = reference("project")? {
        if let Some(id) = project.id {
            return Ok(Scope::Project(id));
        }
        let domain = match &project.domain {
            Some(domain) => domain_id(db, domain).await?,
            None => None,
        };
        let (Some(name), Some(domain)) = (project.name, domain) else {
            return Err(ApiError::unauthorized());
        };
        let found = store::project_by_name(db, &domain, &name).await?;
        return found
            .map(|row| Scope::Project(row.id))
            .ok_or_else(ApiError::unauthorized);
    }
    if let Some(domain) = reference("domain")? {
        let id = domain_id(db, &domain).await?;
        return id.map(Scope::Domain).ok_or_else(ApiError::unauthorized);
    }
    if asked.get("system").is_some() {
        return Ok(Scope::System);
    }
    Err(ApiError::bad_request(
        "Expecting to find project, domain or system in scope.",
    ))
}

/// The user's default project if there is one with a role in it, else none.
async fn default_scope(db: &impl ConnectionTrait, user: &user::Model) -> Result<Scope, ApiError> {
    let Some(project) = &user.default_project_id else {
        return Ok(Scope::Unscoped);
    };
    let target = crate::identity::model::Target::Project(project.clone());
    let usable = store::enabled_project(db, project).await?.is_some()
        && !store::roles_of(db, &user.id, &target).await?.is_empty();
    Ok(if usable {
        Scope::Project(project.clone())
    } else {
        Scope::Unscoped
    })
}

/// 16 random bytes, as keystone writes them.
fn audit_id(app: &App) -> String {
    let mut bytes = [0; 16];
    app.random().fill(&mut bytes);
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The inner object of a token's body, without the catalogue.
pub fn token_body(identity: &Identity) -> serde_json::Map<String, Value> {
    let domain = |id: &str, name: &str| json!({"id": id, "name": name});
    let user_domain = &identity.user_domain;
    let mut body = serde_json::Map::new();
    body.insert("methods".into(), json!(identity.methods));
    body.insert(
        "user".into(),
        json!({
            "domain": domain(&user_domain.id, &user_domain.name),
            "id": identity.user_id,
            "name": identity.user_name,
            "password_expires_at": null,
        }),
    );
    body.insert("audit_ids".into(), json!(identity.audit_ids));
    body.insert(
        "expires_at".into(),
        timestamp(identity.expires_at_us).into(),
    );
    body.insert("issued_at".into(), timestamp(identity.issued_at_us).into());
    if let Some(project) = &identity.project {
        let of = domain(&project.domain.id, &project.domain.name);
        body.insert(
            "project".into(),
            json!({"domain": of, "id": project.id, "name": project.name}),
        );
        body.insert("is_domain".into(), false.into());
    }
    if let Some(scope) = &identity.domain {
        body.insert("domain".into(), domain(&scope.id, &scope.name));
    }
    if !identity.roles.is_empty() {
        let roles = identity
            .roles
            .iter()
            .map(|role| json!({"id": role.id, "name": role.name}));
        body.insert("roles".into(), roles.collect());
    }
    if identity.system {
        body.insert("system".into(), json!({"all": true}));
    }
    body
}
