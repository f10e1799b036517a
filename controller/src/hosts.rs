//! The API of what no OpenStack service has: hosts, and how they join (`/fractus/v1`).
//!
//! Administrators only. Owns no table: it shows and changes what [`crate::agents`] owns.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/hosts` | → `{"hosts": [{id, hostname, state, …}]}` |
//! | `GET /v1/hosts/{id}` | → `{"host": …}` |
//! | `DELETE /v1/hosts/{id}` | → 204; 409 while servers are on it, or on their way |
//! | `POST /v1/join-tokens` | `{"join_token": {"ttl_s": 3600}}` → 201 `{"join_token": {token, expires_at, controller}}` |

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use axum::Json;
use axum::extract::{Path, State};
use axum::response::IntoResponse;
use fractus_agent_api::host::HostId;
use fractus_agent_api::identity::JoinToken;
use fractus_agent_api::machine::ServerId;
use http::StatusCode;
use sea_orm::DbErr;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::agents::fleet::{Fleet, Presence};
use crate::agents::{host, join};
use crate::clock::SystemClock;
use crate::database::Database;
use crate::http::schema::Schema;
use crate::http::{ApiError, App, JsonBody, Routes, Rule, Service};
use crate::random::SystemRandom;
use crate::reconcile::{machine, migration};
use crate::secret::MasterKey;
use crate::tls::{Authority, AuthorityError};

/// What the handlers of this API need: part of the App.
#[derive(Clone)]
pub struct Hosts {
    pub fleet: Arc<Fleet>,
    pub authority: Authority,
    /// Where agents reach this controller, `https://ADDRESS:PORT`.
    pub agents_url: String,
    /// When this controller began to listen, microseconds since the epoch.
    pub since_us: i64,
}

impl Hosts {
    /// For tests: those of a cloud that has none yet.
    pub async fn idle(database: &Database) -> Result<Self, AuthorityError> {
        let clock = SystemClock::shared();
        let since_us = clock.now_us();
        let (master, random) = (MasterKey::ephemeral()?, SystemRandom::shared());
        let authority = Authority::open(database.clone(), master, clock, random).await?;
        let fleet = Arc::new(Fleet::default());
        Ok(Self {
            fleet,
            authority,
            agents_url: "https://127.0.0.1:8771".to_owned(),
            since_us,
        })
    }
}

/// Seconds a join token can be asked to be good for.
const LONGEST_TTL_S: i64 = 30 * 24 * 3600;

pub fn routes() -> Routes {
    Routes::new(Service::Fractus)
        .get("/v1/hosts", Rule::admin("fractus:hosts:list"), list)
        .get("/v1/hosts/{id}", Rule::admin("fractus:hosts:show"), show)
        .delete(
            "/v1/hosts/{id}",
            Rule::admin("fractus:hosts:remove"),
            remove,
        )
        .post(
            "/v1/join-tokens",
            Rule::admin("fractus:join_tokens:create"),
            issue,
        )
}

fn view(app: &App, row: &host::row::Model) -> Value {
    let hosts = app.hosts();
    let id = row.host_id();
    let presence = hosts
        .fleet
        .presence(id, row.heard_at_us, hosts.since_us, app.now_us());
    let state = match presence {
        _ if row.forced_down => "forced-down",
        Presence::Up => "up",
        Presence::NotYetHeard => "unknown",
        Presence::Silent => "down",
    };
    let report = hosts.fleet.host_report(id).or_else(|| row.inventory());
    let heard_at_us = hosts.fleet.heard_at_us(id).unwrap_or(row.heard_at_us);
    json!({
        "id": row.id,
        "hostname": row.hostname,
        "endpoint": row.endpoint,
        "state": state,
        "disabled": row.disabled,
        "disabled_reason": row.disabled_reason,
        "cpus": report.as_ref().map(|report| report.cpus),
        "memory_mib": report.as_ref().map(|report| report.memory_mib),
        "disk_gib": report.as_ref().map(|report| report.disk_gib),
        "vcpus_used": row.vcpus_used,
        "memory_mib_used": row.memory_mib_used,
        "disk_gib_used": row.disk_gib_used,
        "agent_version": report.as_ref().map(|report| report.agent_version.clone()),
        "kernel": report.as_ref().map(|report| report.kernel.clone()),
        "cpu": report.as_ref().map(|report| &report.cpu),
        "lacks": report.map(|report| report.lacks).unwrap_or_default(),
        "joined_at": crate::image::model::iso_time(row.joined_at_us),
        "seen_at": crate::image::model::iso_time(heard_at_us),
    })
}

async fn list(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let rows = host::all(app.database().reader()).await?;
    let hosts: Vec<_> = rows.iter().map(|row| view(&app, row)).collect();
    Ok(Json(json!({ "hosts": hosts })))
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Host {id} could not be found."))
}

fn parse(id: &str) -> Result<HostId, ApiError> {
    Uuid::parse_str(id).map(HostId).map_err(|_| not_found(id))
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = host::find(app.database().reader(), parse(&id)?).await?;
    row.map(|row| Json(json!({"host": view(&app, &row)})))
        .ok_or_else(|| not_found(&id))
}

/// Why a host stays.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error(transparent)]
    Database(#[from] DbErr),
    #[error(
        "{0} servers are on host {1}, or on their way from or to it: delete or move them first."
    )]
    Busy(usize, HostId),
    #[error("no such host")]
    Unknown,
}

/// Ends a host's membership, if no server needs it: not one that it owns, nor one that it sends, or is to get.
pub async fn retire(app: &App, host: HostId) -> Result<(), RemoveError> {
    let now_us = app.now_us();
    let write = app.database().write(move |tx| {
        Box::pin(async move {
            // Counted in the transaction that removes it: a server placed meanwhile loses.
            let machines = machine::of_host(tx, host).await?;
            let live = machines.iter().filter(|machine| !machine.is_tombstone());
            let mut busy: BTreeSet<ServerId> = live.map(|machine| machine.server).collect();
            busy.extend(migration::concerning(tx, host).await?);
            if !busy.is_empty() {
                return Err(RemoveError::Busy(busy.len(), host));
            }
            match host::remove(tx, host, now_us).await? {
                true => Ok(()),
                false => Err(RemoveError::Unknown),
            }
        })
    });
    write.await?;
    app.compute().machines.fleet().dismiss(host);
    Ok(())
}

async fn remove(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let host_id = parse(&id)?;
    match retire(&app, host_id).await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(RemoveError::Unknown) => Err(not_found(&id)),
        Err(busy @ RemoveError::Busy(..)) => Err(ApiError::conflict(busy.to_string())),
        Err(RemoveError::Database(error)) => Err(error.into()),
    }
}

static ISSUE: LazyLock<Schema> = LazyLock::new(|| {
    Schema::of(json!({
        "type": "object",
        "properties": {"join_token": {
            "type": "object",
            "properties": {"ttl_s": {"type": "integer", "minimum": 1, "maximum": LONGEST_TTL_S}},
            "additionalProperties": false,
        }},
        "required": ["join_token"],
        "additionalProperties": false,
    }))
});

async fn issue(State(app): State<App>, body: JsonBody) -> Result<impl IntoResponse, ApiError> {
    ISSUE.check(&body.0)?;
    let ttl_s = body.0["join_token"]["ttl_s"].as_i64().unwrap_or(3600);
    let mut bytes = [0; join::SECRET_LEN];
    app.random().fill(&mut bytes);
    // Hex, not base64: a token that begins with `-` is taken for an option on a command line.
    let secret: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let now_us = app.now_us();
    let expires_at_us = now_us.saturating_add(ttl_s.saturating_mul(1_000_000));
    let kept = secret.clone();
    app.database()
        .write(move |tx| {
            let secret = kept.clone();
            Box::pin(async move { join::issue(tx, &secret, now_us, expires_at_us).await })
        })
        .await
        .map_err(|error: DbErr| ApiError::from(error))?;
    let token = JoinToken {
        secret,
        root: app.hosts().authority.fingerprint(),
    };
    let body = json!({"join_token": {
        "token": token.to_string(),
        "expires_at": crate::image::model::iso_time(expires_at_us),
        "controller": app.hosts().agents_url,
    }});
    Ok((StatusCode::CREATED, Json(body)))
}
