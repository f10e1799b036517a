//! `resize`, `migrate`, `confirmResize`, `revertResize`: a server gets another size, or another host while its guest is
//! stopped, and stays so, or goes back.
//!
//! A server that is resized keeps its host where there is room (nova's `allow_resize_to_same_host`). What cannot come
//! about is refused at once: nova takes a smaller disk, and fails later.

use std::sync::LazyLock;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use fractus_agent_api::machine::RootDisk;
use serde_json::{Value, json};

use super::call::Call;
use super::migrations::named;
use super::schemas::{closed, wrapped};
use super::servers::schema::{Aged, disk_config};
use super::servers::{admit, create, find};
use super::{actions, origin};
use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::model::server::BootPlan;
use crate::compute::model::state::Action;
use crate::compute::ops::boot::{self, GIB};
use crate::compute::ops::resize::verdict::{self, Verdict};
use crate::compute::ops::resize::{self as ops, Size, Wish};
use crate::compute::store::{flavor, placement, server};
use crate::http::schema::Schema;
use crate::http::{ApiError, Microversion};
use crate::image::store;

fn resize_body() -> Value {
    let properties = json!({
        "flavorRef": {"type": ["string", "integer"], "minLength": 1},
        "OS-DCF:diskConfig": disk_config(),
    });
    wrapped("resize", closed(properties, &["flavorRef"]))
}

/// Versions at which the body of `migrate` changed.
const AGES: &[u16] = &[56];

fn migrate_body(version: Microversion) -> Value {
    if !version.at_least(2, 56) {
        return wrapped("migrate", json!({}));
    }
    let host = json!({
        "type": ["string", "null"], "minLength": 1, "maxLength": 255, "pattern": "^[a-zA-Z0-9-._]*$",
    });
    let mut inner = closed(json!({"host": host}), &[]);
    inner["type"] = json!(["object", "null"]);
    wrapped("migrate", inner)
}

/// The server's boot plan with a disk as large as the flavor says.
fn planned(
    row: &server::Model,
    (old, new): (&FlavorSnapshot, &FlavorSnapshot),
) -> Result<BootPlan, ApiError> {
    let cannot = |why: &str| {
        ApiError::bad_request(format!(
            "Server disk was unable to be resized because: {why}"
        ))
    };
    let mut plan = row.boot()?;
    if new.disk == 0 {
        return match old.disk {
            0 => Ok(plan),
            _ => Err(cannot("Resize to zero disk flavor is not allowed.")),
        };
    }
    let size = new.disk.saturating_mul(GIB);
    match &mut plan.root_disk {
        Some(disk) if size < disk.size => return Err(cannot("Unable to resize disk down.")),
        Some(disk) => disk.size = size,
        // One that is its image's kernel, and has had none.
        None => plan.root_disk = Some(RootDisk { image: None, size }),
    }
    Ok(plan)
}

/// `resize`.
pub async fn resize(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| Schema::of(resize_body()));
    SCHEMA.check(body)?;
    let row = find(call, id).await?;
    let given = &body["resize"];
    admit(call, &row, Action::Resize).await?;
    let flavor_id = create::flavor_id(&given["flavorRef"]);
    let project = (!call.caller.is_admin()).then(|| call.caller.project_id().unwrap_or_default());
    let missing = || ApiError::bad_request(format!("Flavor {flavor_id} could not be found."));
    let new = flavor::find(call.reader(), &flavor_id, project)
        .await?
        .ok_or_else(missing)?;
    if new.disabled {
        return Err(missing());
    }
    let new = new.snapshot();
    if new.id == row.flavor_id {
        return Err(ApiError::bad_request(
            "When resizing, instances must change flavor!",
        ));
    }
    let mut plan = planned(&row, (&row.flavor()?, &new))?;
    // As that image is now; one that was deleted demands nothing any more.
    if let Some(image) = store::find(call.reader(), &row.image_id).await? {
        plan.guest = boot::suited(&image, &new)?;
    }
    let size = Size {
        flavor: serde_json::to_string(&new).map_err(ApiError::internal)?,
        flavor_id: new.id.clone(),
        boot: serde_json::to_string(&plan).map_err(ApiError::internal)?,
        vcpus: i32::try_from(new.vcpus).unwrap_or(i32::MAX),
        ram: i64::try_from(new.ram).unwrap_or(i64::MAX),
        spec: create::spec(&new, &plan)?,
        disk_config: given["OS-DCF:diskConfig"].as_str().map(str::to_owned),
    };
    let wish = Wish {
        from: row.state(),
        size: Some(size),
        host: None,
    };
    ops::request(&call.app, origin(call), &row.id, wish).await?;
    Ok(actions::accepted())
}

/// `migrate`.
pub async fn migrate(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Aged> = LazyLock::new(|| Aged::new(AGES, migrate_body));
    SCHEMA.at(call.ctx.microversion()).check(body)?;
    let row = find(call, id).await?;
    let host = body["migrate"]["host"].as_str();
    let host = match host.filter(|_| call.at_least(56)) {
        Some(name) => Some(named(call, name).await?),
        None => None,
    };
    admit(call, &row, Action::ColdMigrate).await?;
    let placed = placement::of_servers(call.reader(), [row.id.clone()]).await?;
    if let (Some(host), Some(placed)) = (&host, placed.get(&row.id))
        && placed.host_id == host.id
    {
        return Err(ApiError::bad_request(format!(
            "Unable to migrate instance ({}) to current host ({}).",
            row.id, placed.hostname
        )));
    }
    let wish = Wish {
        from: row.state(),
        size: None,
        host: host.map(|host| host.host_id()),
    };
    ops::request(&call.app, origin(call), &row.id, wish).await?;
    Ok(actions::accepted())
}

/// `confirmResize`.
pub async fn confirm(call: &Call, id: &str) -> Result<Response, ApiError> {
    decide(call, id, (Action::ConfirmResize, Verdict::Confirm)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `revertResize`.
pub async fn revert(call: &Call, id: &str) -> Result<Response, ApiError> {
    decide(call, id, (Action::RevertResize, Verdict::Revert)).await?;
    Ok(actions::accepted())
}

async fn decide(
    call: &Call,
    id: &str,
    (action, wanted): (Action, Verdict),
) -> Result<(), ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, action).await?;
    let decided = (wanted, row.state());
    Ok(verdict::request(&call.app, origin(call), &row.id, decided).await?)
}
