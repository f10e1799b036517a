//! The API of live migrations (`/fractus/v1/migrations`): what each took, which no OpenStack answer has.
//!
//! | call | answer |
//! |---|---|
//! | `GET /v1/migrations/{uuid or number}` | `{"migration": {kind, status, reason, progress: {memory_total, …, rounds, pause}, …}}` |
//!
//! `handover`, of a live migration that is over: for how long the guest stood still for the move of its owner, after what
//! `pause` tells of, in microseconds by the controller's clock. `decide_us`: from when the source's offer was heard until
//! the owner's row was on the disk; `tell_us`: until the target had said that what it was told is on its own;
//! `run_us`: until it had said that the guest goes on, which it does before that is heard. null where the controller was
//! restarted meanwhile, or another one has taken over. How long these words were on their way is in none of them.
//!
//! Administrators only. While it is under way the progress is what its source last said. `starving` says why memory that
//! follows a guest does not come to it at the moment.

use axum::Json;
use axum::extract::{Path, State};
use fractus_agent_api::host::HostId;
use fractus_agent_api::migration::MigrationId;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::compute::api::migrations::progress;
use crate::compute::model::time;
use crate::http::{ApiError, App, Routes, Rule};
use crate::reconcile::migration;

/// Adds them to those of hosts: a service has one table.
pub fn routes(hosts: Routes) -> Routes {
    hosts.get(
        "/v1/migrations/{id}",
        Rule::admin("fractus:migrations:show"),
        show,
    )
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let missing = || ApiError::not_found(format!("Migration {id} could not be found."));
    let reader = app.database().reader();
    let found = match (id.parse(), Uuid::parse_str(&id)) {
        (Ok(number), _) => migration::of_number(reader, number).await?,
        (_, Ok(uuid)) => migration::find(reader, MigrationId(uuid)).await?,
        _ => None,
    };
    let found = found.ok_or_else(missing)?;
    Ok(Json(json!({"migration": {
        "id": found.uuid,
        "number": found.id,
        "kind": found.kind,
        "server_id": found.server_id,
        "source_id": found.source_id,
        "source": found.source,
        "target_id": found.target_id,
        "target": found.target,
        "status": found.status,
        "reason": found.reason,
        "created_at": time::micros(found.created_at_us),
        "updated_at": time::micros(found.updated_at_us),
        "ended_at": found.ended_at_us.map(time::micros),
        "progress": progress(&app, &found),
        "starving": starving(&app, &found),
        "handover": found.handover(),
    }})))
}

fn starving(app: &App, row: &migration::Model) -> Option<String> {
    let target = Uuid::parse_str(row.target_id.as_deref()?).ok()?;
    let fleet = app.compute().machines.fleet();
    let said = fleet.machine(HostId(target), row.server())?.migration?;
    (said.id == row.migration()).then_some(said.lacks?.starving)?
}
