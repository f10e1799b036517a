//! The API of machines as their hosts have them (`/fractus/v1/machines`): what is wanted of one and what
//! its host says, and a change of what no OpenStack service asks for yet (disks, networks and the size of
//! a machine that runs, until there are volumes, ports and a live resize).
//!
//! Administrators only. A change is intent like any other: a higher revision in one transaction, told to
//! the owner now and by the reconciler for as long as it takes. Owns no table.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/machines/{id}` | → `{"machine": {wanted: {power, vcpus, …}, report, …}}` |
//! | `PATCH /v1/machines/{id}` | `{"machine": {…}}` with any of `vcpus`, `max_vcpus`, `memory_mib`, `max_memory_mib`, `disks` and `nics` (whole lists) as [`MachineSpec`] has them → 202, as `GET` |
//!
//! What a later rebuild or resize makes of the server's size is its own; disks and networks stay.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use fractus_agent_api::decision;
use fractus_agent_api::device::{MOST_DISKS, MOST_NICS};
use fractus_agent_api::machine::{MachineSpec, ServerId};
use http::StatusCode;
use sea_orm::{DatabaseTransaction, DbErr};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::compute::ops::RequestError;
use crate::compute::ops::change::refit;
use crate::event::{self, Event, Origin, Phase};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, JsonBody, RequestContext, Routes, Rule};
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration;

/// Adds them to those of hosts: a service has one table.
pub fn routes(hosts: Routes) -> Routes {
    crate::migrations::routes(hosts)
        .get(
            "/v1/machines/{id}",
            Rule::admin("fractus:machines:show"),
            show,
        )
        .patch(
            "/v1/machines/{id}",
            Rule::admin("fractus:machines:change"),
            change,
        )
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Machine {id} could not be found."))
}

fn parse(id: &str) -> Result<ServerId, ApiError> {
    let parsed = Uuid::parse_str(id).map(ServerId);
    parsed.map_err(|_| not_found(id))
}

/// Nothing of what its guest is told: that is its user's.
fn view(app: &App, machine: &Machine) -> Value {
    let wanted = &machine.wanted;
    let heard = machine
        .host
        .and_then(|host| app.hosts().fleet.machine(host, machine.server));
    json!({
        "id": machine.server,
        "host_id": machine.host,
        "generation": machine.generation,
        "revision": machine.revision,
        "settled": machine.settled,
        "wanted": {
            "power": wanted.power,
            "vcpus": wanted.spec.vcpus,
            "max_vcpus": wanted.spec.max_vcpus,
            "memory_mib": wanted.spec.memory_mib,
            "max_memory_mib": wanted.spec.max_memory_mib,
            "disks": wanted.spec.disks,
            "nics": wanted.spec.nics,
        },
        "report": heard.as_ref().or(machine.report.as_ref()),
    })
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let found = machine::find(app.database().reader(), parse(&id)?).await?;
    let found = found.ok_or_else(|| not_found(&id))?;
    Ok(Json(json!({"machine": view(&app, &found)})))
}

static CHANGE: LazyLock<Schema> = LazyLock::new(|| {
    let devices = |most| json!({"type": "array", "items": {"type": "object"}, "maxItems": most});
    let vcpus = json!({"type": "integer", "minimum": 1, "maximum": 64});
    let memory = json!({"type": "integer", "minimum": 1, "maximum": 1 << 24});
    Schema::of(json!({
        "type": "object",
        "properties": {"machine": {
            "type": "object",
            "properties": {
                "vcpus": vcpus,
                "max_vcpus": vcpus,
                "memory_mib": memory,
                "max_memory_mib": memory,
                "disks": devices(MOST_DISKS),
                "nics": devices(MOST_NICS),
            },
            "minProperties": 1,
            "additionalProperties": false,
        }},
        "required": ["machine"],
        "additionalProperties": false,
    }))
});

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
enum ChangeError {
    #[error(transparent)]
    Database(#[from] DbErr),
    #[error("no such machine")]
    Unknown,
    #[error("The machine has no host, or is being removed.")]
    NoHost,
    #[error("The server is on its way to another host; try again when it is there.")]
    Migrating,
    #[error("No host can do that: {0}.")]
    Impossible(String),
    #[error(transparent)]
    Room(#[from] RequestError),
}

async fn change(
    State(app): State<App>,
    caller: Caller,
    context: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    CHANGE.check(&body.0)?;
    let server = parse(&id)?;
    let given = body.0["machine"].as_object().cloned().unwrap_or_default();
    let (now_us, event) = (app.now_us(), app.random().uuid());
    let origin = Origin {
        request_id: Some(context.request_id().to_owned()),
        user_id: Some(caller.user_id.to_string()),
        project_id: None,
    };
    let changed = app
        .database()
        .write(move |tx| {
            let (given, origin) = (given.clone(), origin.clone());
            Box::pin(async move {
                let request_id = origin.request_id.clone();
                let changed = write(tx, server, given, request_id, now_us).await?;
                let event = Event {
                    id: event,
                    at_us: now_us,
                    subject: server.to_string(),
                    action: "machine_change".to_owned(),
                    phase: Phase::Done,
                    message: None,
                    operation_id: None,
                    origin,
                    host_id: changed.host.map(|host| host.to_string()),
                };
                event::record(tx, event).await?;
                Ok(changed)
            })
        })
        .await;
    let changed = match changed {
        Ok(changed) => changed,
        Err(ChangeError::Database(error)) => return Err(error.into()),
        Err(ChangeError::Unknown) => return Err(not_found(&id)),
        Err(error @ (ChangeError::NoHost | ChangeError::Migrating)) => {
            return Err(ApiError::conflict(error.to_string()));
        }
        Err(error @ ChangeError::Impossible(_)) => {
            return Err(ApiError::bad_request(error.to_string()));
        }
        Err(ChangeError::Room(RequestError::NoRoom(_))) => {
            let text = "The machine's host has no room for that; nothing was changed.";
            return Err(ApiError::conflict(text));
        }
        Err(ChangeError::Room(error)) => return Err(error.into()),
    };
    let machines = app.compute().machines.clone();
    tokio::spawn(async move {
        // The reconciler says so again, if this fails.
        if let Err(error) = machines.converge(server).await {
            tracing::info!(%server, %error, "its host was not told of a change");
        }
    });
    let answer = json!({"machine": view(&app, &changed)});
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

async fn write(
    tx: &DatabaseTransaction,
    server: ServerId,
    given: Map<String, Value>,
    request_id: Option<String>,
    now_us: i64,
) -> Result<Machine, ChangeError> {
    let known = machine::find(tx, server).await?;
    let known = known.ok_or(ChangeError::Unknown)?;
    if known.host.is_none() || known.is_tombstone() {
        return Err(ChangeError::NoHost);
    }
    if !migration::open(tx, server).await?.is_empty() {
        return Err(ChangeError::Migrating);
    }
    let spec = merged(&known.wanted.spec, given).map_err(ChangeError::Impossible)?;
    refit(tx, &known, &spec).await?;
    let changed = machine::change(tx, server, request_id, now_us, |wanted| wanted.spec = spec);
    changed.await?.ok_or(ChangeError::Unknown)
}

/// The specification with what is given in the place of what it had.
fn merged(spec: &MachineSpec, given: Map<String, Value>) -> Result<MachineSpec, String> {
    let mut whole = serde_json::to_value(spec).map_err(|error| error.to_string())?;
    if let Some(fields) = whole.as_object_mut() {
        fields.extend(given);
    }
    let spec = serde_json::from_value(whole).map_err(|error| error.to_string())?;
    match decision::impossible(&spec) {
        Some(why) => Err(why),
        None => Ok(spec),
    }
}
