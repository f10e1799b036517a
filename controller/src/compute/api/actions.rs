//! `POST /servers/{id}/action`: the one key of the body says what is to be done.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sea_orm::ActiveValue::Set;
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{closed, string, wrapped};
use super::servers::schema::{self, Aged};
use super::servers::view::{self, Occasion};
use super::servers::{admit, create, find, metadata, shortest};
use super::{consoles, evacuate, images, migrations, origin, resize, shelve};
use crate::compute::model::state::Action;
use crate::compute::ops;
use crate::compute::ops::change::{Change, Wish};
use crate::compute::store::{keypair, server};
use crate::event::{self, Event, Phase};
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

const PATH: &str = "/v2.1/servers/{id}/action";

/// Every action that is served, and who may do it.
const ACTIONS: [(&str, Rule); 26] = [
    ("os-start", Rule::member("os_compute_api:servers:start")),
    ("os-stop", Rule::member("os_compute_api:servers:stop")),
    ("reboot", Rule::member("os_compute_api:servers:reboot")),
    (
        "pause",
        Rule::member("os_compute_api:os-pause-server:pause"),
    ),
    (
        "unpause",
        Rule::member("os_compute_api:os-pause-server:unpause"),
    ),
    (
        "suspend",
        Rule::member("os_compute_api:os-suspend-server:suspend"),
    ),
    (
        "resume",
        Rule::member("os_compute_api:os-suspend-server:resume"),
    ),
    ("lock", Rule::member("os_compute_api:os-lock-server:lock")),
    (
        "unlock",
        Rule::member("os_compute_api:os-lock-server:unlock"),
    ),
    ("rebuild", Rule::member("os_compute_api:servers:rebuild")),
    (
        "createImage",
        Rule::member("os_compute_api:servers:create_image"),
    ),
    ("shelve", Rule::member("os_compute_api:os-shelve:shelve")),
    (
        "shelveOffload",
        Rule::admin("os_compute_api:os-shelve:shelve_offload"),
    ),
    (
        "unshelve",
        Rule::member("os_compute_api:os-shelve:unshelve"),
    ),
    ("resize", Rule::member("os_compute_api:servers:resize")),
    (
        "confirmResize",
        Rule::member("os_compute_api:servers:confirm_resize"),
    ),
    (
        "revertResize",
        Rule::member("os_compute_api:servers:revert_resize"),
    ),
    (
        "migrate",
        Rule::admin("os_compute_api:os-migrate-server:migrate"),
    ),
    (
        "forceDelete",
        Rule::member("os_compute_api:os-deferred-delete:force"),
    ),
    (
        "os-resetState",
        Rule::admin("os_compute_api:os-admin-actions:reset_state"),
    ),
    (
        "os-migrateLive",
        Rule::admin("os_compute_api:os-migrate-server:migrate_live"),
    ),
    ("evacuate", Rule::admin("os_compute_api:os-evacuate")),
    (
        "os-getConsoleOutput",
        Rule::member("os_compute_api:os-console-output"),
    ),
    (
        "os-getSerialConsole",
        Rule::member("os_compute_api:os-remote-consoles"),
    ),
    (
        "os-getVNCConsole",
        Rule::member("os_compute_api:os-remote-consoles"),
    ),
    (
        "os-getSPICEConsole",
        Rule::member("os_compute_api:os-remote-consoles"),
    ),
];

pub fn routes(routes: Routes) -> Routes {
    let routes = routes.post(PATH, Rule::reader("os_compute_api:servers:action"), act);
    ACTIONS.iter().fold(routes, |routes, (name, rule)| {
        routes.action(PATH, name, *rule)
    })
}

/// The one key of an action's body.
pub fn name_of(body: &Value) -> Result<String, ApiError> {
    let malformed = || ApiError::bad_request("Malformed request body");
    let map = body.as_object().ok_or_else(malformed)?;
    let mut names = map.keys();
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name.clone()),
        _ => Err(malformed()),
    }
}

pub fn unknown(name: &str) -> ApiError {
    ApiError::bad_request(format!("There is no such action: {name}"))
}

async fn act(call: Call, Path(id): Path<String>, body: JsonBody) -> Result<Response, ApiError> {
    let name = name_of(&body.0)?;
    if name == "resetNetwork" {
        return Err(ApiError::new(
            StatusCode::GONE,
            "This resource is no longer available. No forwarding address is given.",
        ));
    }
    let (name, rule) = ACTIONS
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| unknown(&name))?;
    call.require(*rule)?;
    match *name {
        "os-start" => simple(&call, &id, Action::Start, Change::Start).await,
        "os-stop" => simple(&call, &id, Action::Stop, Change::Stop).await,
        "pause" => simple(&call, &id, Action::Pause, Change::Pause).await,
        "unpause" => simple(&call, &id, Action::Unpause, Change::Unpause).await,
        "suspend" => simple(&call, &id, Action::Suspend, Change::Suspend).await,
        "resume" => simple(&call, &id, Action::Resume, Change::Resume).await,
        "reboot" => reboot(&call, &id, &body.0).await,
        "lock" => lock(&call, &id, &body.0).await,
        "unlock" => unlock(&call, &id).await,
        "rebuild" => rebuild(&call, &id, &body.0).await,
        "createImage" => images::create(&call, &id, &body.0).await,
        "shelve" => shelve::shelve(&call, &id).await,
        "shelveOffload" => shelve::offload(&call, &id).await,
        "unshelve" => shelve::unshelve(&call, &id, &body.0).await,
        "resize" => resize::resize(&call, &id, &body.0).await,
        "migrate" => resize::migrate(&call, &id, &body.0).await,
        "confirmResize" => resize::confirm(&call, &id).await,
        "revertResize" => resize::revert(&call, &id).await,
        "forceDelete" => force_delete(&call, &id).await,
        "os-resetState" => reset_state(&call, &id, &body.0).await,
        "os-migrateLive" => migrations::migrate_live(&call, &id, &body.0).await,
        "evacuate" => evacuate::evacuate(&call, &id, &body.0).await,
        "os-getConsoleOutput" => consoles::output(&call, &id, &body.0).await,
        other => consoles::of_old(&call, &id, other, &body.0).await,
    }
}

pub fn accepted() -> Response {
    StatusCode::ACCEPTED.into_response()
}

async fn simple(
    call: &Call,
    id: &str,
    action: Action,
    change: Change,
) -> Result<Response, ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, action).await?;
    wish(call, &row, change, server::ActiveModel::default(), None).await?;
    Ok(accepted())
}

async fn wish(
    call: &Call,
    row: &server::Model,
    change: Change,
    columns: server::ActiveModel,
    spec: Option<fractus_agent_api::machine::MachineSpec>,
) -> Result<server::Model, ApiError> {
    let wish = Wish {
        change,
        from: row.state(),
        columns,
        spec,
    };
    Ok(ops::change::request(&call.app, origin(call), &row.id, wish).await?)
}

async fn reboot(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        let kinds = ["HARD", "Hard", "hard", "SOFT", "Soft", "soft"];
        let properties = json!({"type": {"type": "string", "enum": kinds}});
        Schema::of(wrapped("reboot", closed(properties, &["type"])))
    });
    SCHEMA.check(body)?;
    let hard = body["reboot"]["type"]
        .as_str()
        .is_some_and(|kind| kind.eq_ignore_ascii_case("hard"));
    let (action, change) = if hard {
        (Action::HardReboot, Change::HardReboot)
    } else {
        (Action::SoftReboot, Change::SoftReboot)
    };
    simple(call, id, action, change).await
}

async fn lock(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        let mut reason = closed(json!({"locked_reason": string(1, 255)}), &[]);
        reason["type"] = json!(["object", "null"]);
        Schema::of(wrapped("lock", reason))
    });
    if call.at_least(73) {
        SCHEMA.check(body)?;
    }
    let row = find(call, id).await?;
    let owner = call.caller.project_id() == Some(row.project_id.as_str());
    // From within its project a lock is left as it is, whoever set it.
    if row.locked_by.is_some() && owner {
        return Ok(accepted());
    }
    let mut change = server::ActiveModel {
        locked_by: Set(Some(if owner { "owner" } else { "admin" }.to_owned())),
        updated_at_us: Set(call.app.now_us()),
        ..Default::default()
    };
    if let Some(reason) = body["lock"]["locked_reason"]
        .as_str()
        .filter(|_| call.at_least(73))
    {
        change.locked_reason = Set(Some(reason.to_owned()));
    }
    record(call, &row.id, "server_lock", change).await
}

async fn unlock(call: &Call, id: &str) -> Result<Response, ApiError> {
    let row = find(call, id).await?;
    if row.locked_by.as_deref() == Some("admin") && !call.caller.is_admin() {
        call.require(Rule::admin(
            "os_compute_api:os-lock-server:unlock:unlock_override",
        ))?;
    }
    let change = server::ActiveModel {
        locked_by: Set(None),
        locked_reason: Set(None),
        updated_at_us: Set(call.app.now_us()),
        ..Default::default()
    };
    record(call, &row.id, "server_unlock", change).await
}

/// A change that is done with the request, and its event.
async fn record(
    call: &Call,
    id: &str,
    action: &str,
    change: server::ActiveModel,
) -> Result<Response, ApiError> {
    let event = Event {
        id: call.app.random().uuid(),
        at_us: call.app.now_us(),
        subject: id.to_owned(),
        action: action.to_owned(),
        phase: Phase::Requested,
        message: None,
        operation_id: None,
        origin: origin(call),
        host_id: None,
    };
    let id = id.to_owned();
    call.app
        .database()
        .write(move |tx| {
            let (id, change, event) = (id.clone(), change.clone(), event.clone());
            Box::pin(async move {
                server::update(tx, &id, change).await?;
                Ok::<(), ApiError>(event::record(tx, event).await?)
            })
        })
        .await?;
    Ok(accepted())
}

async fn force_delete(call: &Call, id: &str) -> Result<Response, ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, Action::ForceDelete).await?;
    ops::delete::request(&call.app, origin(call), &row.id).await?;
    Ok(accepted())
}

async fn reset_state(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        let state = json!({"type": "string", "enum": ["active", "error"]});
        Schema::of(wrapped(
            "os-resetState",
            closed(json!({"state": state}), &["state"]),
        ))
    });
    SCHEMA.check(body)?;
    let row = find(call, id).await?;
    let is_well = body["os-resetState"]["state"] == "active";
    ops::reset::reset(&call.app, &row.id, is_well).await?;
    Ok(accepted())
}

async fn rebuild(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Aged> =
        LazyLock::new(|| Aged::new(schema::REBUILD_AGES, schema::rebuild));
    SCHEMA.at(call.ctx.microversion()).check(body)?;
    let row = find(call, id).await?;
    let given = &body["rebuild"];
    admit(call, &row, Action::Rebuild).await?;
    let image_id = given["imageRef"].as_str().unwrap_or_default();
    let flavor = row.flavor()?;
    if !ops::boot::is_there(call.reader(), &call.caller, image_id).await? {
        return Err(ApiError::bad_request("Cannot find image for rebuild"));
    }
    let plan = ops::boot::plan(call.reader(), &call.caller, image_id, &flavor).await?;
    let mut spec = create::spec(&flavor, &plan)?;
    let columns = rebuilt(call, &row, given, &plan).await?;
    let password = match given["adminPass"].as_str() {
        Some(password) => password.to_owned(),
        None => create::password(call),
    };
    if row.config_drive == ops::instance::DRIVE {
        let mut data = ops::instance::data(&row, None)?;
        data.admin_pass = call.app.compute().machines.seal_password(&password);
        spec.guest.instance = Some(Box::new(data));
    }
    let row = wish(call, &row, Change::Rebuild, columns, Some(spec)).await?;
    let mut server = view::single(call, &row, Occasion::Rebuild).await?;
    server["adminPass"] = json!(password);
    let location = call.ctx.link(&format!("/v2.1/servers/{id}"));
    let answer = Json(json!({"server": server}));
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], answer).into_response())
}

/// The columns that a rebuild changes.
async fn rebuilt(
    call: &Call,
    row: &server::Model,
    given: &Value,
    plan: &crate::compute::model::server::BootPlan,
) -> Result<server::ActiveModel, ApiError> {
    let text = |name: &str| given[name].as_str().map(str::to_owned);
    let image_id = text("imageRef").unwrap_or_default();
    let kernel = plan.kernel.as_ref().map(|image| image.id.to_string());
    let kernel = kernel.unwrap_or_default();
    let mut change = server::ActiveModel {
        kernel_id: Set(if kernel == image_id {
            String::new()
        } else {
            kernel
        }),
        ramdisk_id: Set(plan
            .initrd
            .as_ref()
            .map(|image| image.id.to_string())
            .unwrap_or_default()),
        image_id: Set(image_id),
        boot: Set(serde_json::to_string(plan).map_err(ApiError::internal)?),
        ..Default::default()
    };
    if let Some(name) = text("name") {
        change.name = Set(name);
    }
    if let Some(hostname) = text("hostname") {
        change.hostname = Set(hostname);
    }
    if given.get("metadata").is_some() {
        let metadata = metadata::read(&given["metadata"]);
        metadata::within_quota(&metadata)?;
        change.metadata = Set(json!(metadata).to_string());
    }
    if given.get("description").is_some() {
        change.description = Set(text("description"));
    }
    if given.get("user_data").is_some() {
        change.user_data = Set(text("user_data"));
    }
    if let Some(files) = given.get("personality") {
        create::personality(given)?;
        change.personality = Set(files.to_string());
    }
    if given.get("key_name").is_some() {
        let key = text("key_name");
        if let Some(name) = &key
            && keypair::find(call.reader(), &row.user_id, name)
                .await?
                .is_none()
        {
            return Err(ApiError::bad_request("Invalid key_name provided."));
        }
        change.key_name = Set(key);
    }
    if let Some(mode) = text("OS-DCF:diskConfig") {
        change.disk_config = Set(mode);
    }
    if let Some(address) = text("accessIPv4") {
        change.access_ip_v4 = Set(address);
    }
    if let Some(address) = text("accessIPv6") {
        change.access_ip_v6 = Set(shortest(&address));
    }
    if let Some(list) = given.get("trusted_image_certificates") {
        change.trusted_certificates = Set(list.as_array().map(|list| json!(list).to_string()));
    }
    Ok(change)
}
