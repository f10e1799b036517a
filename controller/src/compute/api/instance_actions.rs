//! `os-instance-actions`: what was done to a server, by whom, and how it went.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{self, More};
use super::servers::missing;
use crate::compute::model::time;
use crate::compute::store::action::{self, Action};
use crate::compute::store::placement;
use crate::compute::store::server;
use crate::http::schema::Schema;
use crate::http::{ApiError, Routes};
use crate::policy::Rule;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v2.1/servers/{id}/os-instance-actions",
            Rule::reader("os_compute_api:os-instance-actions:list"),
            list,
        )
        .get(
            "/v2.1/servers/{id}/os-instance-actions/{request_id}",
            Rule::reader("os_compute_api:os-instance-actions:show"),
            show,
        )
}

/// The server; from 2.21 on also a deleted one.
async fn find(call: &Call, id: &str) -> Result<server::Model, ApiError> {
    let found = if call.at_least(21) {
        server::find_any(call.reader(), id).await?
    } else {
        server::find(call.reader(), id).await?
    };
    found
        .filter(|row| call.caller.may_see(&row.project_id))
        .ok_or_else(|| missing(id))
}

/// Nova's name of an action, and of its one event.
fn names(kind: &str) -> (&str, &'static str) {
    match kind {
        "server_create" => ("create", "compute__do_build_and_run_instance"),
        "server_delete" => ("delete", "compute_terminate_instance"),
        "server_start" => ("start", "compute_start_instance"),
        "server_stop" => ("stop", "compute_stop_instance"),
        "server_soft_reboot" | "server_hard_reboot" => ("reboot", "compute_reboot_instance"),
        "server_pause" => ("pause", "compute_pause_instance"),
        "server_unpause" => ("unpause", "compute_unpause_instance"),
        "server_suspend" => ("suspend", "compute_suspend_instance"),
        "server_resume" => ("resume", "compute_resume_instance"),
        "server_rebuild" => ("rebuild", "compute_rebuild_instance"),
        "server_create_image" => ("createImage", "compute_snapshot_instance"),
        "server_shelve" => ("shelve", "compute_shelve_instance"),
        "server_shelve_offload" => ("shelveOffload", "compute_shelve_offload_instance"),
        "server_unshelve" => ("unshelve", "compute_unshelve_instance"),
        "server_resize" => ("resize", "compute_finish_resize"),
        "server_migrate" => ("migrate", "compute_finish_resize"),
        "server_confirm_resize" => ("confirmResize", "compute_confirm_resize"),
        "server_revert_resize" => ("revertResize", "compute_finish_revert_resize"),
        "server_evacuate" => ("evacuate", "compute_rebuild_instance"),
        "server_live_migrate" | "server_live_post_copy" => {
            ("live-migration", "compute_live_migration")
        }
        "server_live_migration_abort" => ("live_migration_cancel", "compute_live_migration_abort"),
        "server_live_migration_force_complete" => (
            "live_migration_force_complete",
            "compute_live_migration_force_complete",
        ),
        "server_lock" => ("lock", "api_lock"),
        "server_unlock" => ("unlock", "api_unlock"),
        other => (other, "compute_operation"),
    }
}

fn view(call: &Call, id: &str, action: &Action) -> Value {
    let failed = action
        .ended
        .as_ref()
        .is_some_and(|end| end.failure.is_some());
    let mut view = json!({
        "action": names(&action.kind).0,
        "instance_uuid": id,
        "request_id": action.request_id,
        "user_id": action.user_id,
        "project_id": action.project_id,
        "start_time": time::micros(action.started_at_us),
        "message": failed.then_some("Error"),
    });
    if call.at_least(58) {
        view["updated_at"] = json!(time::micros(action.updated_at_us()));
    }
    view
}

static QUERY: LazyLock<[Schema; 2]> = LazyLock::new(|| {
    let moment = || json!({"type": "string", "format": "date-time"});
    let base = || {
        vec![
            ("limit", schemas::limit()),
            ("marker", json!({"type": "string"})),
            ("changes-since", moment()),
        ]
    };
    let mut later = base();
    later.push(("changes-before", moment()));
    [base(), later].map(|parameters| Schema::of(schemas::query(&parameters, More::Nothing)))
});

async fn list(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let paged = call.at_least(58);
    if paged {
        call.check_query(&QUERY[usize::from(call.at_least(66))])?;
    }
    let row = find(&call, &id).await?;
    let mut actions = action::of_server(call.reader(), &row.id).await?;
    if !paged {
        let views: Vec<Value> = actions
            .iter()
            .map(|action| view(&call, &id, action))
            .collect();
        return Ok(Json(json!({"instanceActions": views})));
    }
    let moment = |name: &str| call.query.last(name).and_then(time::parse);
    if let Some(since) = moment("changes-since") {
        actions.retain(|action| action.updated_at_us() >= since);
    }
    if let Some(before) = moment("changes-before") {
        actions.retain(|action| action.updated_at_us() <= before);
    }
    if let Some(marker) = call.marker() {
        let at = actions
            .iter()
            .position(|action| action.request_id == marker);
        let at = at.ok_or_else(|| ApiError::bad_request(format!("marker [{marker}] not found")))?;
        actions.drain(..=at);
    }
    let limit = usize::try_from(call.limit()?).unwrap_or(usize::MAX);
    let more = actions.len() > limit;
    actions.truncate(limit);
    let views: Vec<Value> = actions
        .iter()
        .map(|action| view(&call, &id, action))
        .collect();
    let mut answer = json!({"instanceActions": views});
    if let Some(last) = actions.last().filter(|_| more) {
        answer["links"] = call.next(
            &format!("servers/{id}/os-instance-actions"),
            &last.request_id,
        );
    }
    Ok(Json(answer))
}

async fn show(
    call: Call,
    Path((id, request_id)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let row = find(&call, &id).await?;
    let actions = action::of_server(call.reader(), &row.id).await?;
    let action = actions
        .iter()
        .find(|action| action.request_id == request_id)
        .ok_or_else(|| ApiError::not_found(format!("Action {request_id} not found")))?;
    let mut view = view(&call, &id, action);
    if call.at_least(51) || call.caller.is_admin() {
        let events: Vec<Value> = if action.operation {
            let host = hostname(&call, &row.id).await?;
            vec![event(&call, &row, action, &host)]
        } else {
            Vec::new()
        };
        view["events"] = json!(events);
    }
    Ok(Json(json!({"instanceAction": view})))
}

/// Where the server is; empty while it is nowhere (a text in every answer of nova).
async fn hostname(call: &Call, server: &str) -> Result<String, ApiError> {
    let mut placed = placement::of_servers(call.reader(), [server.to_owned()]).await?;
    let placed = placed.remove(server);
    Ok(placed.map(|placed| placed.hostname).unwrap_or_default())
}

/// `host` is where the server is now, also of what was done to it elsewhere.
fn event(call: &Call, row: &server::Model, action: &Action, host: &str) -> Value {
    let result = action.ended.as_ref().map(|end| {
        if end.failure.is_some() {
            "Error"
        } else {
            "Success"
        }
    });
    let mut event = json!({
        "event": names(&action.kind).1,
        "start_time": time::micros(action.started_at_us),
        "finish_time": action.ended.as_ref().map(|end| time::micros(end.at_us)),
        "result": result,
    });
    let failure = action.ended.as_ref().and_then(|end| end.failure.clone());
    if call.caller.is_admin() {
        event["traceback"] = Value::Null;
    }
    if call.at_least(62) {
        if call.caller.is_admin() {
            event["host"] = json!(host);
        }
        let digest = || super::servers::view::host_digest(&row.project_id, host);
        let named = (!host.is_empty()).then(digest);
        event["hostId"] = json!(named.unwrap_or_default());
    }
    if call.at_least(84) && call.caller.is_admin() {
        event["details"] = json!(failure);
    }
    event
}
