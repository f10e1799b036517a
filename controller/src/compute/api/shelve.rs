//! `shelve`, `shelveOffload`, `unshelve`: a server's disk becomes an image, no host has anything of it, and back.
//!
//! As nova with `shelved_offload_time` 0: a server is offloaded as soon as it is shelved. So `shelveOffload` finds little
//! to do; of a server whose host is at it already it is taken and changes nothing (nova refuses it then, and clients
//! that have just seen SHELVED ask for it).

use std::sync::LazyLock;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use fractus_agent_api::host::HostId;
use sea_orm::ActiveValue::Set;
use sea_orm::prelude::Uuid;
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{fqdn, name, wrapped};
use super::servers::create::ZONE;
use super::servers::metadata::Metadata;
use super::servers::schema::Aged;
use super::servers::{admit, find};
use super::{images, origin};
use crate::compute::model::state::{Action, ServerState, Standing};
use crate::compute::ops::{shelve as ops, unshelve};
use crate::compute::store::{placement, server};
use crate::http::{ApiError, Microversion};
use crate::policy::Rule;

const TO_HOST: Rule = Rule::admin("os_compute_api:os-shelve:unshelve_to_host");

/// Versions at which the body of `unshelve` changed.
const AGES: &[u16] = &[77, 91];

fn unshelve_body(version: Microversion) -> Value {
    let inner = if version.at_least(2, 91) {
        let zone = json!({"oneOf": [{"type": "null"}, name()]});
        json!({
            "type": ["object", "null"],
            "properties": {"availability_zone": zone, "host": fqdn()},
            "additionalProperties": false,
        })
    } else if version.at_least(2, 77) {
        json!({
            "type": ["object", "null"],
            "properties": {"availability_zone": name()},
            "required": ["availability_zone"],
            "additionalProperties": false,
        })
    } else {
        json!({})
    };
    wrapped("unshelve", inner)
}

/// Of the image's name, after the server's.
const SUFFIX: &str = "-shelved";

fn accepted() -> Response {
    StatusCode::ACCEPTED.into_response()
}

/// `shelve`.
pub async fn shelve(call: &Call, id: &str) -> Result<Response, ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, Action::Shelve).await?;
    let plan = row.boot()?;
    let Some(disk) = plan.root_disk else {
        return Err(ApiError::bad_request(format!(
            "Instance {id} has no disk of its own to keep in an image."
        )));
    };
    // No longer than an image's name may be.
    let begin: String = row.name.chars().take(255 - SUFFIX.len()).collect();
    let name = format!("{begin}{SUFFIX}");
    let project = row.project_id.clone();
    let image = images::new_image(call, project, &row, &name, Metadata::new()).await?;
    images::may_have(call, &image, disk.size).await?;
    let wish = ops::Wish {
        from: row.state(),
        image,
        former: row.shelved_image_id.clone(),
    };
    ops::request(&call.app, origin(call), &row.id, wish).await?;
    Ok(accepted())
}

/// `shelveOffload`.
pub async fn offload(call: &Call, id: &str) -> Result<Response, ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, Action::ShelveOffload).await?;
    if row.state() != ServerState::Offloading {
        ops::offload(&call.app, origin(call), &row.id, row.state()).await?;
    }
    Ok(accepted())
}

/// `unshelve`.
pub async fn unshelve(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Aged> = LazyLock::new(|| Aged::new(AGES, unshelve_body));
    SCHEMA.at(call.ctx.microversion()).check(body)?;
    let row = find(call, id).await?;
    let given = &body["unshelve"];
    let zone = given.get("availability_zone").filter(|_| call.at_least(77));
    let host = given["host"].as_str().filter(|_| call.at_least(91));
    if host.is_some() {
        call.require(TO_HOST)?;
    }
    admit(call, &row, Action::Unshelve).await?;
    if (zone.is_some() || host.is_some()) && row.state().standing() == Some(Standing::Shelved) {
        return Err(ApiError::conflict(format!(
            "Specifying an availability zone or a host when unshelving server {id} with status \"shelved\" is not \
             supported. The server status must be SHELVED_OFFLOADED."
        )));
    }
    let mut columns = server::ActiveModel::default();
    if let Some(zone) = zone {
        let zone = zone.as_str();
        if zone.is_some_and(|zone| zone != ZONE) {
            return Err(ApiError::bad_request(
                "The requested availability zone is not available",
            ));
        }
        columns.pinned_zone = Set(zone.map(str::to_owned));
    }
    let host = match host {
        Some(name) => Some(named(call, name).await?),
        None => None,
    };
    let wish = unshelve::Wish {
        from: row.state(),
        host,
        columns,
    };
    unshelve::request(&call.app, origin(call), &row.id, wish).await?;
    Ok(accepted())
}

async fn named(call: &Call, name: &str) -> Result<HostId, ApiError> {
    let known = placement::host_id(call.reader(), name).await?;
    let id = known
        .ok_or_else(|| ApiError::bad_request(format!("Compute host {name} could not be found.")))?;
    Ok(HostId(Uuid::parse_str(&id).map_err(ApiError::internal)?))
}
