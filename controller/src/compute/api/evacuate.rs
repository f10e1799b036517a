//! `evacuate`: a server whose host was declared to be down is made anew on another one.
//!
//! As nova, with two differences. Its host has to be declared to be down (`os-services` with `forced_down`): one that is
//! merely silent is refused as well, because its guests may run. And without `adminPass` from 2.14 on, where nova makes
//! a password that nobody is told, the guest keeps the one that it has.

use std::sync::LazyLock;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{ImageRef, MachineSpec};
use sea_orm::prelude::Uuid;
use serde_json::{Value, json};

use super::call::Call;
use super::origin;
use super::schemas::{self, boolean, closed, wrapped};
use super::servers::schema::Aged;
use super::servers::{admit, create, find};
use crate::agents::host;
use crate::compute::model::state::Action;
use crate::compute::ops::{self, evacuate as ops_evacuate};
use crate::compute::store::{placement, server};
use crate::http::{ApiError, Microversion};
use crate::image::store;
use crate::reconcile::machine;
use crate::scheduler::HostPresence;

/// Versions at which the body changed.
const AGES: &[u16] = &[14, 29, 68];

fn body_of(version: Microversion) -> Value {
    let host = json!({
        "type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-zA-Z0-9-._]*$",
    });
    let mut properties = json!({"host": host, "adminPass": {"type": "string"}});
    let mut required = vec![];
    if !version.at_least(2, 14) {
        properties["onSharedStorage"] = boolean();
        required.push("onSharedStorage");
    }
    if version.at_least(2, 29) && !version.at_least(2, 68) {
        properties["force"] = boolean();
    }
    wrapped("evacuate", closed(properties, &required))
}

/// `evacuate`.
pub async fn evacuate(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Aged> = LazyLock::new(|| Aged::new(AGES, body_of));
    SCHEMA.at(call.ctx.microversion()).check(body)?;
    let row = find(call, id).await?;
    let given = &body["evacuate"];
    if given["host"].is_null() && given.get("force").is_some_and(schemas::as_bool) {
        return Err(ApiError::bad_request(
            "Can't force to a non-provided destination",
        ));
    }
    let is_shared = given.get("onSharedStorage").is_some_and(schemas::as_bool);
    let password = given["adminPass"].as_str().map(str::to_owned);
    if is_shared && password.is_some() {
        return Err(ApiError::bad_request(
            "admin password can't be changed on existing disk",
        ));
    }
    let to = match given["host"].as_str() {
        Some(name) => Some(named(call, name).await?),
        None => None,
    };
    let server = ops::machine_id(&row.id).map_err(ApiError::internal)?;
    let known = machine::find(call.reader(), server).await?;
    let source = known.as_ref().and_then(|known| known.host);
    if to.is_some() && to == source {
        return Err(ApiError::bad_request(
            "The target host can't be the same one.",
        ));
    }
    admit(call, &row, Action::Evacuate).await?;
    let (Some(known), Some(source)) = (known, source) else {
        return Err(ApiError::conflict(format!("Instance {id} is not ready")));
    };
    let source = is_off(call, source).await?;
    if is_shared {
        return Err(ApiError::bad_request(format!(
            "Invalid state of instance files on shared storage: {source} is not on shared storage, and the server's \
             disks are lost with it."
        )));
    }
    has_images(call, &row, &known.wanted.spec).await?;
    // Before 2.14 there is always a new one, and the answer says which.
    let password = password.or_else(|| (!call.at_least(14)).then(|| create::password(call)));
    let machines = &call.app.compute().machines;
    let wish = ops_evacuate::Wish {
        from: row.state(),
        host: to,
        stop: call.at_least(95),
        admin_pass: password
            .as_deref()
            .and_then(|password| machines.seal_password(password)),
    };
    ops_evacuate::request(&call.app, origin(call), &row.id, wish).await?;
    Ok(match password.filter(|_| !call.at_least(14)) {
        Some(password) => Json(json!({ "adminPass": password })).into_response(),
        None => StatusCode::OK.into_response(),
    })
}

async fn named(call: &Call, name: &str) -> Result<HostId, ApiError> {
    let known = placement::host_id(call.reader(), name).await?;
    let id = known.ok_or_else(|| ApiError::not_found(format!("Compute host {name} not found.")))?;
    Ok(HostId(Uuid::parse_str(&id).map_err(ApiError::internal)?))
}

/// An operator has declared it to be off; its name.
async fn is_off(call: &Call, source: HostId) -> Result<String, ApiError> {
    let Some(row) = host::find(call.reader(), source).await? else {
        return Ok(source.to_string());
    };
    match call.app.compute().machines.presence(&row) {
        HostPresence::ForcedDown => Ok(row.hostname),
        HostPresence::Up => Err(ApiError::bad_request(format!(
            "Compute service of {} is still in use.",
            row.hostname
        ))),
        HostPresence::Silent | HostPresence::NotYetHeard => Err(ApiError::bad_request(format!(
            "Compute service of {0} is not heard, but may still be in use: its servers may run. Once it is off for \
             certain, declare it to be down (openstack compute service set --down {0} nova-compute), and try again.",
            row.hostname
        ))),
    }
}

/// What the new host is to make the server of is there.
async fn has_images(call: &Call, row: &server::Model, spec: &MachineSpec) -> Result<(), ApiError> {
    let id_of = |image: &ImageRef| image.id.to_string();
    let disk = spec.root_disk.as_ref().and_then(|disk| disk.image.as_ref());
    let mut parts: Vec<String> = [&spec.boot.kernel, &spec.boot.initrd]
        .into_iter()
        .flatten()
        .map(id_of)
        .collect();
    if let Some(last) = disk.map(id_of) {
        // One that the disk was only brought in is gone.
        let has_last = store::find(call.reader(), &last).await?.is_some();
        parts.push(if has_last { last } else { row.image_id.clone() });
    }
    for id in parts {
        if store::find(call.reader(), &id).await?.is_none() {
            return Err(ApiError::bad_request(format!(
                "Image {id} could not be found."
            )));
        }
    }
    Ok(())
}
