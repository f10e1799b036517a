//! Live migrations: the action `os-migrateLive`, and what is done to one that is under way; and `os-migrations`, where all
//! kinds are listed.
//!
//! Disks always travel with the guest. So `block_migration` may be true or `auto`; false asks for storage that both
//! hosts share, of which there is none: 400, in nova's words, at every version (nova tells so later from 2.34 on).
//! `force` is taken with a host, and changes nothing: one that cannot take the server is none.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use fractus_agent_api::host::HostId;
use fractus_agent_api::migration::Progress;
use sea_orm::prelude::Uuid;
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{self, More, boolean, closed, wrapped};
use super::servers::schema::Aged;
use super::servers::{admit, find};
use super::{actions, origin};
use crate::agents::host;
use crate::compute::model::flavor::AUTO_CONVERGE;
use crate::compute::model::state::Action;
use crate::compute::model::time;
use crate::compute::ops::migrate::{self, CANCELLED, Wish};
use crate::compute::store::{placement, server};
use crate::event::{self, Event, Phase};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, JsonBody, Microversion, Routes};
use crate::policy::Rule;
use crate::reconcile::migration::{self, Filter, Model, Sorted, Status};
use crate::scheduler::{self, Request};

const ONE: &str = "/v2.1/servers/{id}/migrations/{number}";
const ACTION: &str = "/v2.1/servers/{id}/migrations/{number}/action";
const FORCE: Rule = Rule::admin("os_compute_api:servers:migrations:force_complete");

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v2.1/os-migrations",
            Rule::admin("os_compute_api:os-migrations:index"),
            all,
        )
        .get(
            "/v2.1/servers/{id}/migrations",
            Rule::admin("os_compute_api:servers:migrations:index"),
            of_server,
        )
        .get(
            ONE,
            Rule::admin("os_compute_api:servers:migrations:show"),
            show,
        )
        .delete(
            ONE,
            Rule::admin("os_compute_api:servers:migrations:delete"),
            abort,
        )
        .post(ACTION, FORCE, act)
        .action(ACTION, "force_complete", FORCE)
}

/// Versions at which the body of `os-migrateLive` changed.
const AGES: &[u16] = &[25, 30, 68];

fn live(version: Microversion) -> Value {
    let host = json!({
        "type": ["string", "null"], "minLength": 1, "maxLength": 255, "pattern": "^[a-zA-Z0-9-._]*$",
    });
    let mut block = boolean();
    let mut properties = json!({"host": host});
    let mut required = vec!["block_migration", "host"];
    if version.at_least(2, 25) {
        if let Some(words) = block["enum"].as_array_mut() {
            words.push(json!("auto"));
        }
    } else {
        properties["disk_over_commit"] = boolean();
        required.push("disk_over_commit");
    }
    properties["block_migration"] = block;
    if version.at_least(2, 30) && !version.at_least(2, 68) {
        properties["force"] = boolean();
    }
    wrapped("os-migrateLive", closed(properties, &required))
}

/// `os-migrateLive`.
pub async fn migrate_live(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Aged> = LazyLock::new(|| Aged::new(AGES, live));
    SCHEMA.at(call.ctx.microversion()).check(body)?;
    let row = find(call, id).await?;
    let given = &body["os-migrateLive"];
    if given["host"].is_null() && given.get("force").is_some_and(schemas::as_bool) {
        return Err(ApiError::bad_request(
            "Can't force to a non-provided destination",
        ));
    }
    let host = match given["host"].as_str() {
        Some(name) => Some(named(call, name).await?),
        None => None,
    };
    admit(call, &row, Action::LiveMigrate).await?;
    let placed = placement::of_servers(call.reader(), [row.id.clone()]).await?;
    let source = placed.get(&row.id);
    let source_name = source
        .map(|placed| placed.hostname.as_str())
        .unwrap_or_default();
    let chosen = host.as_ref();
    if chosen.is_some_and(|chosen| source.is_some_and(|source| source.host_id == chosen.id)) {
        return Err(ApiError::bad_request(format!(
            "Unable to migrate instance ({}) to current host ({source_name}).",
            row.id
        )));
    }
    let shared = given["block_migration"] != "auto" && !schemas::as_bool(&given["block_migration"]);
    if shared {
        return Err(ApiError::bad_request(format!(
            "{source_name} is not on shared storage: Shared storage live-migration requires either shared \
             storage or boot-from-volume with no local disks."
        )));
    }
    if let Some(host) = &host {
        has_its_cpu(call, &row, host).await?;
    }
    let host = host.map(|host| host.host_id());
    if !call.at_least(34)
        && let Some(source) = source
    {
        find_room(call, &row, &source.host_id, host).await?;
    }
    let (flavor, machines) = (row.flavor()?, &call.app.compute().machines);
    let slows = flavor.allows(AUTO_CONVERGE);
    let wish = Wish {
        from: row.state(),
        host,
        follows: migrate::follow::is_allowed(machines, &flavor),
        slows: slows.unwrap_or_else(|| machines.auto_converge()),
    };
    migrate::request(&call.app, origin(call), &row.id, wish).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// A host that was asked for by its name and lacks something of the guest's CPU is refused at once, at every version (nova
/// tells so later from 2.34 on), in nova's words and with the names of what it lacks.
async fn has_its_cpu(
    call: &Call,
    row: &server::Model,
    host: &host::row::Model,
) -> Result<(), ApiError> {
    let Some((_, need)) = migrate::needs(call.reader(), &row.id).await? else {
        return Ok(());
    };
    let cpu = call.app.compute().machines.guest_cpu(host);
    let against = scheduler::against_cpu(&need, cpu.as_deref());
    against.map_or(Ok(()), |reason| {
        let name = &host.hostname;
        Err(ApiError::bad_request(format!(
            "Migration pre-check error: Unacceptable CPU info: CPU doesn't have compatibility. {name}: {reason}"
        )))
    })
}

pub(super) async fn named(call: &Call, name: &str) -> Result<host::row::Model, ApiError> {
    let mut rows = host::all(call.reader()).await?.into_iter();
    rows.find(|row| row.hostname == name)
        .ok_or_else(|| ApiError::bad_request(format!("Compute host {name} could not be found.")))
}

/// Below 2.34 nova finds a host before it answers.
async fn find_room(
    call: &Call,
    row: &server::Model,
    source: &str,
    host: Option<HostId>,
) -> Result<(), ApiError> {
    let (Ok(server), Ok(source)) = (Uuid::parse_str(&row.id), Uuid::parse_str(source)) else {
        return Ok(());
    };
    let machines = &call.app.compute().machines;
    let Some((amounts, cpu)) = migrate::needs(call.reader(), &row.id).await? else {
        return Ok(());
    };
    let request = Request {
        server: fractus_agent_api::machine::ServerId(server),
        amounts,
        host,
        excluded: Default::default(),
        source: Some(HostId(source)),
        cpu,
    };
    let hosts = machines.hosts(call.reader()).await?;
    match scheduler::place(&request, &hosts) {
        Ok(_) => Ok(()),
        Err(why) => Err(ApiError::bad_request(format!(
            "No valid host was found. {why}"
        ))),
    }
}

/// What its source says of it now, if it is under way; what was kept otherwise.
pub fn progress(app: &App, row: &Model) -> Option<Progress> {
    let fleet = app.compute().machines.fleet();
    let live = row.ended_at_us.is_none().then(|| {
        let said = fleet.machine(row.source(), row.server())?.migration?;
        (said.id == row.migration()).then_some(said.progress)
    });
    live.flatten().or_else(|| row.progress())
}

/// Its name; empty before there is one (a text in every answer of nova).
fn target(row: &Model) -> &str {
    row.target.as_deref().unwrap_or_default()
}

/// As a server's migrations show it.
fn of_one(call: &Call, row: &Model) -> Value {
    let progress = progress(&call.app, row);
    let bytes = |which: fn(&Progress) -> u64| progress.as_ref().map(which);
    let mut view = json!({
        "created_at": time::micros(row.created_at_us),
        "dest_compute": target(row),
        "dest_host": null,
        "dest_node": target(row),
        "disk_processed_bytes": bytes(|it| it.disk_sent),
        "disk_remaining_bytes": bytes(|it| it.disk_left),
        "disk_total_bytes": bytes(|it| it.disk_total),
        "id": row.id,
        "memory_processed_bytes": bytes(|it| it.memory_sent),
        "memory_remaining_bytes": bytes(|it| it.memory_left),
        "memory_total_bytes": bytes(|it| it.memory_total),
        "server_uuid": row.server_id,
        "source_compute": row.source,
        "source_node": row.source,
        "status": row.status,
        "updated_at": time::micros(row.updated_at_us),
    });
    if call.at_least(59) {
        view["uuid"] = json!(row.uuid);
    }
    if call.at_least(80) {
        view["user_id"] = json!(row.user_id);
        view["project_id"] = json!(row.project_id);
    }
    view
}

/// As `os-migrations` shows it. (nova links from here to one that is under way; no recording has that.)
fn of_all(call: &Call, row: &Model) -> Value {
    let flavor = number_of(&row.flavor_id);
    let new = row.new_flavor_id.as_deref().map_or(flavor, number_of);
    let mut view = json!({
        "id": row.id,
        "source_compute": row.source,
        "dest_compute": target(row),
        "source_node": row.source,
        "dest_node": target(row),
        "dest_host": null,
        "old_instance_type_id": flavor,
        "new_instance_type_id": new,
        "instance_uuid": row.server_id,
        "status": row.status,
        "created_at": time::micros(row.created_at_us),
        "updated_at": time::micros(row.updated_at_us),
    });
    if call.at_least(23) {
        view["migration_type"] = json!(row.kind);
    }
    if call.at_least(59) {
        view["uuid"] = json!(row.uuid);
    }
    if call.at_least(80) {
        view["user_id"] = json!(row.user_id);
        view["project_id"] = json!(row.project_id);
    }
    view
}

/// A flavor's number, where the API still shows nova's own: made from its id, so it stays.
fn number_of(flavor: &str) -> u32 {
    flavor.parse().unwrap_or_else(|_| {
        let hash = blake3::hash(flavor.as_bytes());
        let first = hash.as_bytes().iter().take(4);
        first.fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)) >> 1
    })
}

static QUERY: LazyLock<[Schema; 4]> = LazyLock::new(|| {
    let text = || json!({"type": "string"});
    let base = || {
        let names = [
            "hidden",
            "host",
            "instance_uuid",
            "source_compute",
            "status",
            "migration_type",
        ];
        names.map(|name| (name, text())).to_vec()
    };
    let moment = || json!({"type": "string", "format": "date-time"});
    let mut paged = base();
    paged.extend([
        ("limit", schemas::limit()),
        ("marker", text()),
        ("changes-since", moment()),
    ]);
    let mut before = paged.clone();
    before.push(("changes-before", moment()));
    let mut owned = before.clone();
    owned.extend([("user_id", text()), ("project_id", text())]);
    [
        Schema::of(schemas::query(&base(), More::Anything)),
        Schema::of(schemas::query(&paged, More::Nothing)),
        Schema::of(schemas::query(&before, More::Nothing)),
        Schema::of(schemas::query(&owned, More::Nothing)),
    ]
});

/// `GET /os-migrations`.
async fn all(call: Call) -> Result<Json<Value>, ApiError> {
    let age = [59, 66, 80].into_iter().filter(|age| call.at_least(*age));
    call.check_query(&QUERY[age.count()])?;
    let text = |name: &str| call.query.last(name).map(str::to_owned);
    let since = |minor: u16, name: &str| text(name).filter(|_| call.at_least(minor));
    let moment = |minor: u16, name: &str| since(minor, name).as_deref().and_then(time::parse);
    let filter = Filter {
        server: text("instance_uuid"),
        status: text("status"),
        kind: text("migration_type"),
        host: text("host"),
        source: text("source_compute"),
        user: since(80, "user_id"),
        project: since(80, "project_id"),
        changed_since_us: moment(59, "changes-since"),
        changed_before_us: moment(66, "changes-before"),
    };
    let paged = call.at_least(59);
    let (sorted, limit, after) = match paged {
        true => {
            let after = after(&call).await?;
            (Sorted::NewestFirst, Some(call.limit()?), after)
        }
        false => (Sorted::OldestFirst, None, None),
    };
    let more = limit.map(|limit| limit + 1);
    let mut rows = migration::list(call.reader(), &filter, sorted, after, more).await?;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    let more = rows.len() > limit;
    rows.truncate(limit);
    let views: Vec<Value> = rows.iter().map(|row| of_all(&call, row)).collect();
    let mut answer = json!({"migrations": views});
    if let Some(last) = rows.last().filter(|_| more) {
        answer["migrations_links"] = call.next("os-migrations", &last.uuid);
    }
    Ok(Json(answer))
}

/// The number of the migration that the page is to follow.
async fn after(call: &Call) -> Result<Option<i64>, ApiError> {
    let Some(marker) = call.marker() else {
        return Ok(None);
    };
    let missing = || ApiError::bad_request(format!("Marker {marker} could not be found."));
    let id = Uuid::parse_str(marker).map_err(|_| missing())?;
    let id = fractus_agent_api::migration::MigrationId(id);
    let found = migration::find(call.reader(), id).await?;
    Ok(Some(found.ok_or_else(missing)?.id))
}

/// `GET /servers/{id}/migrations`: those under way.
async fn of_server(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    call.since(23)?;
    let row = find(&call, &id).await?;
    let filter = Filter {
        server: Some(row.id),
        ..Filter::default()
    };
    let rows = migration::list(call.reader(), &filter, Sorted::OldestFirst, None, None).await?;
    let views: Vec<Value> = rows
        .iter()
        .filter(|row| row.is_live_in_progress())
        .map(|row| of_one(&call, row))
        .collect();
    Ok(Json(json!({"migrations": views})))
}

async fn numbered(call: &Call, server: &str, number: &str) -> Result<Option<Model>, ApiError> {
    Ok(match number.parse() {
        Ok(number) => migration::numbered(call.reader(), server, number).await?,
        Err(_) => None,
    })
}

async fn show(
    call: Call,
    Path((id, number)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    call.since(23)?;
    let server = find(&call, &id).await?;
    let found = numbered(&call, &server.id, &number).await?.ok_or_else(|| {
        ApiError::not_found(format!(
            "In-progress live migration {number} is not found for server {id}."
        ))
    })?;
    if !found.is_live_in_progress() {
        return Err(ApiError::not_found(format!(
            "Live migration {number} for server {id} is not in progress."
        )));
    }
    Ok(Json(json!({"migration": of_one(&call, &found)})))
}

/// It is there, and is as far as it must be.
async fn under_way(
    call: &Call,
    server: &server::Model,
    number: &str,
    (missing, word): (StatusCode, &str),
    allowed: &[Status],
) -> Result<Model, ApiError> {
    let found = numbered(call, &server.id, number).await?;
    let found = found.ok_or_else(|| {
        ApiError::new(
            missing,
            format!("Migration {number} not found for instance {}", server.id),
        )
    })?;
    if !allowed.contains(&found.status()) {
        return Err(refused(&found, word));
    }
    Ok(found)
}

fn refused(migration: &Model, word: &str) -> ApiError {
    ApiError::bad_request(format!(
        "Migration {} state of instance {} is {}. Cannot {word} while the migration is in this state.",
        migration.id, migration.server_id, migration.status
    ))
}

/// `DELETE /servers/{id}/migrations/{number}`.
async fn abort(
    call: Call,
    Path((id, number)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    const WORD: &str = "abort live migration";
    call.since(24)?;
    let server = find(&call, &id).await?;
    let missing = (StatusCode::NOT_FOUND, WORD);
    // nova looks for it after the server's state; one that is not there is none in any state.
    if numbered(&call, &server.id, &number).await?.is_none() {
        under_way(&call, &server, &number, missing, &[]).await?;
    }
    admit(&call, &server, Action::AbortMigration).await?;
    let allowed: &[Status] = match call.at_least(65) {
        true => &[
            Status::Accepted,
            Status::Queued,
            Status::Preparing,
            Status::Running,
        ],
        false => &[Status::Running],
    };
    let found = under_way(&call, &server, &number, missing, allowed).await?;
    let (machine, event) = (found.server(), requested(&call, &id, "abort"));
    let given_up = call.app.database().write(move |tx| {
        let event = event.clone();
        Box::pin(async move {
            let given_up = migrate::give_up(tx, machine, CANCELLED).await?;
            if given_up {
                event::record(tx, event).await?;
            }
            Ok::<_, ApiError>(given_up)
        })
    });
    if !given_up.await? {
        return Err(refused(&found, WORD));
    }
    call.app.compute().engine.wake(&server.id);
    Ok(StatusCode::ACCEPTED)
}

async fn act(
    call: Call,
    Path((id, number)): Path<(String, String)>,
    body: JsonBody,
) -> Result<StatusCode, ApiError> {
    static SCHEMA: LazyLock<Schema> =
        LazyLock::new(|| Schema::of(wrapped("force_complete", json!({"type": "null"}))));
    const WORD: &str = "force complete";
    call.since(22)?;
    let name = actions::name_of(&body.0)?;
    if name != "force_complete" {
        return Err(actions::unknown(&name));
    }
    SCHEMA.check(&body.0)?;
    let server = find(&call, &id).await?;
    let missing = (StatusCode::BAD_REQUEST, WORD);
    if numbered(&call, &server.id, &number).await?.is_none() {
        under_way(&call, &server, &number, missing, &[]).await?;
    }
    admit(&call, &server, Action::ForceComplete).await?;
    let found = under_way(&call, &server, &number, missing, &[Status::Running]).await?;
    let asked = requested(&call, &id, "force_complete");
    let (machine, migration) = (found.server(), found.migration());
    if !migrate::force_complete(&call.app, machine, migration, asked).await? {
        return Err(refused(&found, WORD));
    }
    Ok(StatusCode::ACCEPTED)
}

/// That it was asked for, among the server's actions.
fn requested(call: &Call, server: &str, what: &str) -> Event {
    Event {
        id: call.app.random().uuid(),
        at_us: call.app.now_us(),
        subject: server.to_owned(),
        action: format!("server_live_migration_{what}"),
        phase: Phase::Requested,
        message: None,
        operation_id: None,
        origin: origin(call),
        host_id: None,
    }
}
