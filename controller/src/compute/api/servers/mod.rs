//! Servers: create, list, show, change, delete, with their metadata and tags.

pub mod create;
mod list;
pub mod metadata;
pub mod schema;
pub mod tags;
pub mod view;

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use sea_orm::ActiveValue::Set;
use serde_json::{Value, json};

use self::schema::Aged;
use self::view::Occasion;
use super::call::Call;
use crate::compute::model::state::{self, Action, Situation};
use crate::compute::ops;
use crate::compute::store::{placement, server};
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

pub fn routes(routes: Routes) -> Routes {
    const ALL: &str = "/v2.1/servers";
    const ONE: &str = "/v2.1/servers/{id}";
    let routes = routes
        .get(ALL, Rule::reader("os_compute_api:servers:index"), index)
        .get(
            "/v2.1/servers/detail",
            Rule::reader("os_compute_api:servers:detail"),
            detail,
        )
        .post(
            ALL,
            Rule::member("os_compute_api:servers:create"),
            create::create,
        )
        .get(ONE, Rule::reader("os_compute_api:servers:show"), show)
        .put(ONE, Rule::member("os_compute_api:servers:update"), update)
        .delete(ONE, Rule::member("os_compute_api:servers:delete"), delete);
    tags::routes(metadata::routes(routes))
}

/// The server, if it exists for the caller; else nova's 404.
pub(super) async fn find(call: &Call, id: &str) -> Result<server::Model, ApiError> {
    let found = server::find(call.reader(), id).await?;
    found
        .filter(|row| call.caller.may_see(&row.project_id))
        .ok_or_else(|| missing(id))
}

pub(super) fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!("Instance {id} could not be found."))
}

/// Refuses an action that the server's state, or its lock, does not allow: 409 in nova's words.
pub(super) async fn admit(
    call: &Call,
    row: &server::Model,
    action: Action,
) -> Result<(), ApiError> {
    let placed = !placement::of_servers(call.reader(), [row.id.clone()])
        .await?
        .is_empty();
    let situation = situation(row, placed, call.caller.is_admin());
    state::admit(action, situation).map_err(|conflict| ApiError::conflict(conflict.to_string()))
}

pub(super) fn situation(row: &server::Model, placed: bool, is_admin: bool) -> Situation<'_> {
    Situation {
        server: &row.id,
        state: row.state(),
        placed,
        launched: row.launched_at_us.is_some(),
        locked: row.locked_by.is_some() && !is_admin,
    }
}

async fn index(call: Call) -> Result<Json<Value>, ApiError> {
    let page = list::page(&call, "servers").await?;
    let servers = page
        .rows
        .iter()
        .map(|row| view::brief(&call, row))
        .collect();
    Ok(Json(list::body(servers, page.next)))
}

async fn detail(call: Call) -> Result<Json<Value>, ApiError> {
    let page = list::page(&call, "servers/detail").await?;
    let servers = view::whole(&call, &page.rows, Occasion::Detail).await?;
    Ok(Json(list::body(servers, page.next)))
}

async fn show(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = find(&call, &id).await?;
    Ok(Json(
        json!({"server": view::single(&call, &row, Occasion::Show).await?}),
    ))
}

async fn update(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    static SCHEMA: LazyLock<Aged> =
        LazyLock::new(|| Aged::new(schema::UPDATE_AGES, schema::update));
    SCHEMA.at(call.ctx.microversion()).check(&body.0)?;
    let row = find(&call, &id).await?;
    let given = &body.0["server"];
    let mut change = server::ActiveModel::default();
    let text = |name: &str| given[name].as_str().map(str::to_owned);
    if let Some(name) = text("name") {
        change.name = Set(name);
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
    if given.get("description").is_some() {
        change.description = Set(text("description"));
    }
    if let Some(hostname) = text("hostname") {
        change.hostname = Set(hostname);
    }
    change.updated_at_us = Set(call.app.now_us());
    write(&call, &row.id, change).await?;
    let row = find(&call, &id).await?;
    Ok(Json(
        json!({"server": view::single(&call, &row, Occasion::Update).await?}),
    ))
}

/// An IPv6 address as it is written today.
pub(super) fn shortest(address: &str) -> String {
    address
        .parse::<std::net::Ipv6Addr>()
        .map_or_else(|_| address.to_owned(), |parsed| parsed.to_string())
}

/// Changes columns of a server.
pub(super) async fn write(
    call: &Call,
    id: &str,
    change: server::ActiveModel,
) -> Result<(), ApiError> {
    let id = id.to_owned();
    call.app
        .database()
        .write(move |tx| {
            let (id, change) = (id.clone(), change.clone());
            Box::pin(async move { Ok(server::update(tx, &id, change).await?) })
        })
        .await
}

async fn delete(call: Call, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let row = find(&call, &id).await?;
    admit(&call, &row, Action::Delete).await?;
    ops::delete::request(&call.app, super::origin(&call), &row.id).await?;
    Ok(StatusCode::NO_CONTENT)
}
