//! Hosts, as compute services, hypervisors and availability zones.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use sea_orm::prelude::Uuid;
use serde_json::{Map, Value, json};

use super::call::Call;
use super::schemas::{boolean, closed, string};
use super::servers::create::ZONE;
use crate::agents::host::{self, row::Model};
use crate::compute::model::time;
use crate::hosts::{self, RemoveError};
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;
use crate::scheduler::HostPresence;
use fractus_agent_api::host::HostId;

const BINARY: &str = "nova-compute";

pub fn routes(routes: Routes) -> Routes {
    const SERVICE: &str = "/v2.1/os-services/{id}";
    routes
        .get(
            "/v2.1/os-services",
            Rule::admin("os_compute_api:os-services:list"),
            services,
        )
        .put(
            SERVICE,
            Rule::admin("os_compute_api:os-services:update"),
            update,
        )
        .delete(
            SERVICE,
            Rule::admin("os_compute_api:os-services:delete"),
            delete,
        )
        .get(
            "/v2.1/os-availability-zone",
            Rule::reader("os_compute_api:os-availability-zone:list"),
            zones,
        )
        .get(
            "/v2.1/os-availability-zone/detail",
            Rule::admin("os_compute_api:os-availability-zone:detail"),
            zones_detail,
        )
}

/// A host's number, where the API still wants integers (below 2.53): made from its id, so it stays.
pub fn number(row: &Model) -> u32 {
    let bytes = row.host_id().0.into_bytes();
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) >> 1
}

/// The host's id: an integer below 2.53, a UUID from there on.
pub fn id_of(call: &Call, row: &Model) -> Value {
    if call.at_least(53) {
        json!(row.id)
    } else {
        json!(number(row))
    }
}

pub fn is_up(call: &Call, row: &Model) -> bool {
    call.app.compute().machines.presence(row) == HostPresence::Up
}

pub fn up_or_down(call: &Call, row: &Model) -> &'static str {
    if is_up(call, row) { "up" } else { "down" }
}

pub fn status(row: &Model) -> &'static str {
    if row.disabled { "disabled" } else { "enabled" }
}

fn service(call: &Call, row: &Model) -> Value {
    let mut view = json!({
        "binary": BINARY,
        "host": row.hostname,
        "id": id_of(call, row),
        "zone": ZONE,
        "status": status(row),
        "state": up_or_down(call, row),
        "updated_at": time::micros(row.heard_at_us),
        "disabled_reason": row.disabled_reason,
    });
    if call.at_least(11) {
        view["forced_down"] = json!(row.forced_down);
    }
    view
}

async fn services(call: Call) -> Result<Json<Value>, ApiError> {
    let rows = host::all(call.reader()).await?;
    let binary = call.query.last("binary");
    let named = call.query.last("host");
    let views: Vec<Value> = rows
        .iter()
        .filter(|_| binary.is_none_or(|binary| binary == BINARY))
        .filter(|row| named.is_none_or(|name| row.hostname == name))
        .map(|row| service(&call, row))
        .collect();
    Ok(Json(json!({"services": views})))
}

async fn by_name(call: &Call, name: &str) -> Result<Model, ApiError> {
    let rows = host::all(call.reader()).await?;
    rows.into_iter()
        .find(|row| row.hostname == name)
        .ok_or_else(|| {
            ApiError::not_found(format!("Could not find binary {BINARY} on host {name}."))
        })
}

/// What is to be changed of a host.
#[derive(Debug, Clone, Default)]
struct Change {
    disabled: Option<(bool, Option<String>)>,
    forced_down: Option<bool>,
}

async fn apply(call: &Call, host: HostId, change: Change) -> Result<(), ApiError> {
    call.app
        .database()
        .write(move |tx| {
            let change = change.clone();
            Box::pin(async move {
                if let Some((disabled, reason)) = change.disabled {
                    host::set_disabled(tx, host, disabled, reason).await?;
                }
                if let Some(down) = change.forced_down {
                    host::set_forced_down(tx, host, down).await?;
                }
                Ok::<(), ApiError>(())
            })
        })
        .await
}

/// `PUT /os-services/{id}`: from 2.53 a service's id; before, one of four words.
async fn update(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    if call.at_least(53) {
        by_id(&call, &id, &body.0).await
    } else {
        by_word(&call, &id, &body.0).await
    }
}

async fn by_id(call: &Call, id: &str, body: &Value) -> Result<Json<Value>, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        let mut schema = closed(
            json!({
                "status": {"type": "string", "enum": ["enabled", "disabled"]},
                "disabled_reason": string(1, 255),
                "forced_down": boolean(),
            }),
            &[],
        );
        schema["minProperties"] = json!(1);
        Schema::of(schema)
    });
    SCHEMA.check(body)?;
    let row = find(call, id).await?;
    let reason = body["disabled_reason"].as_str().map(str::to_owned);
    let change = Change {
        disabled: match body["status"].as_str() {
            Some("enabled") if reason.is_some() => {
                return Err(ApiError::bad_request(
                    "Specifying 'disabled_reason' when status is 'enabled' is invalid.",
                ));
            }
            Some(word) => Some((word == "disabled", reason)),
            None if reason.is_some() => Some((row.disabled, reason)),
            None => None,
        },
        forced_down: body.get("forced_down").map(super::schemas::as_bool),
    };
    apply(call, row.host_id(), change).await?;
    let row = find(call, id).await?;
    Ok(Json(json!({"service": service(call, &row)})))
}

async fn find(call: &Call, id: &str) -> Result<Model, ApiError> {
    let missing = || ApiError::not_found(format!("Service {id} could not be found."));
    let uuid =
        Uuid::parse_str(id).map_err(|_| ApiError::bad_request(format!("Invalid uuid {id}")))?;
    host::find(call.reader(), HostId(uuid))
        .await?
        .ok_or_else(missing)
}

async fn by_word(call: &Call, word: &str, body: &Value) -> Result<Json<Value>, ApiError> {
    static SCHEMAS: LazyLock<[Schema; 3]> = LazyLock::new(|| {
        let base = || json!({"host": string(1, 255), "binary": string(1, 255)});
        let mut logged = base();
        logged["disabled_reason"] = string(1, 255);
        let mut down = base();
        down["forced_down"] = boolean();
        [
            Schema::of(closed(base(), &["host", "binary"])),
            Schema::of(closed(logged, &["host", "binary", "disabled_reason"])),
            Schema::of(closed(down, &["host", "binary"])),
        ]
    });
    let schema = match word {
        "enable" | "disable" => 0,
        "disable-log-reason" => 1,
        "force-down" if call.at_least(11) => 2,
        _ => return Err(ApiError::not_found("Unknown action")),
    };
    SCHEMAS[schema].check(body)?;
    let name = body["host"].as_str().unwrap_or_default();
    let row = by_name(call, name).await?;
    let reason = body["disabled_reason"].as_str().map(str::to_owned);
    let mut view = json!({"host": name, "binary": body["binary"]});
    let mut change = Change::default();
    match word {
        "force-down" => {
            let down = body.get("forced_down").is_some_and(super::schemas::as_bool);
            change.forced_down = Some(down);
            view["forced_down"] = json!(down);
        }
        "enable" => {
            change.disabled = Some((false, None));
            view["status"] = json!("enabled");
        }
        _ => {
            view["status"] = json!("disabled");
            if let Some(reason) = &reason {
                view["disabled_reason"] = json!(reason);
            }
            change.disabled = Some((true, reason));
        }
    }
    apply(call, row.host_id(), change).await?;
    Ok(Json(json!({"service": view})))
}

/// Ends a host's membership. Refused while servers are on it: they would have no host.
async fn delete(call: Call, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let row = if call.at_least(53) {
        let missing = || ApiError::not_found(format!("Service {id} not found."));
        let uuid = Uuid::parse_str(&id)
            .map_err(|_| ApiError::bad_request(format!("Invalid uuid {id}")))?;
        host::find(call.reader(), HostId(uuid))
            .await?
            .ok_or_else(missing)?
    } else {
        let rows = host::all(call.reader()).await?;
        rows.into_iter()
            .find(|row| number(row).to_string() == id)
            .ok_or_else(|| ApiError::not_found(format!("Service {id} not found.")))?
    };
    match hosts::retire(&call.app, row.host_id()).await {
        // Gone meanwhile is gone.
        Ok(()) | Err(RemoveError::Unknown) => Ok(StatusCode::NO_CONTENT),
        Err(RemoveError::Busy(..)) => Err(ApiError::conflict(format!(
            "Unable to delete compute service that is hosting instances. Move or delete the servers \
             of {} first.",
            row.hostname
        ))),
        Err(RemoveError::Database(error)) => Err(error.into()),
    }
}

async fn zone(call: &Call, detailed: bool) -> Result<Json<Value>, ApiError> {
    let rows = host::all(call.reader()).await?;
    let available = rows.iter().any(|row| !row.disabled);
    let mut hosts = Value::Null;
    if detailed {
        let mut map = Map::new();
        for row in &rows {
            let agent = json!({BINARY: {
                "available": is_up(call, row),
                "active": !row.disabled,
                "updated_at": time::micros(row.heard_at_us),
            }});
            map.insert(row.hostname.clone(), agent);
        }
        hosts = Value::Object(map);
    }
    Ok(Json(json!({"availabilityZoneInfo": [{
        "zoneName": ZONE,
        "zoneState": {"available": available},
        "hosts": hosts,
    }]})))
}

async fn zones(call: Call) -> Result<Json<Value>, ApiError> {
    zone(&call, false).await
}

async fn zones_detail(call: Call) -> Result<Json<Value>, ApiError> {
    zone(&call, true).await
}
