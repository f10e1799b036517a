//! A server's tags (2.26): up to 50 short words.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use sea_orm::ActiveValue::Set;
use serde_json::{Value, json};

use super::{admit, find};
use crate::compute::api::call::Call;
use crate::compute::api::schemas;
use crate::compute::model::state::Action;
use crate::compute::store::server;
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

const MOST: usize = 50;

pub fn routes(routes: Routes) -> Routes {
    const ALL: &str = "/v2.1/servers/{id}/tags";
    const ONE: &str = "/v2.1/servers/{id}/tags/{tag}";
    routes
        .get(
            ALL,
            Rule::reader("os_compute_api:os-server-tags:index"),
            index,
        )
        .put(
            ALL,
            Rule::member("os_compute_api:os-server-tags:update_all"),
            replace,
        )
        .delete(
            ALL,
            Rule::member("os_compute_api:os-server-tags:delete_all"),
            clear,
        )
        .get(
            ONE,
            Rule::reader("os_compute_api:os-server-tags:show"),
            show,
        )
        .put(
            ONE,
            Rule::member("os_compute_api:os-server-tags:update"),
            put,
        )
        .delete(
            ONE,
            Rule::member("os_compute_api:os-server-tags:delete"),
            delete,
        )
}

static ALL: LazyLock<Schema> =
    LazyLock::new(|| Schema::of(schemas::wrapped("tags", schemas::tags())));
static ONE: LazyLock<Schema> = LazyLock::new(|| Schema::of(schemas::tag()));

async fn index(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    call.since(26)?;
    let row = find(&call, &id).await?;
    Ok(Json(json!({"tags": row.tags()})))
}

async fn show(call: Call, Path((id, tag)): Path<(String, String)>) -> Result<StatusCode, ApiError> {
    call.since(26)?;
    let row = find(&call, &id).await?;
    if row.tags().contains(&tag) {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(unknown(&id, &tag))
    }
}

fn unknown(id: &str, tag: &str) -> ApiError {
    ApiError::not_found(format!("Server {id} has no tag '{tag}'"))
}

async fn replace(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    call.since(26)?;
    ALL.check(&body.0)?;
    let tags: BTreeSet<String> = read(&body.0["tags"]);
    let answer = json!({"tags": tags});
    change(&call, &id, Action::UpdateTags, |_| Ok(tags)).await?;
    Ok(Json(answer))
}

/// Tags of an array that the schema agreed to, each once.
pub fn read(given: &Value) -> BTreeSet<String> {
    given
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

async fn clear(call: Call, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    call.since(26)?;
    change(&call, &id, Action::DeleteTags, |_| Ok(BTreeSet::new())).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn put(call: Call, Path((id, tag)): Path<(String, String)>) -> Result<Response, ApiError> {
    call.since(26)?;
    let row = find(&call, &id).await?;
    admit(&call, &row, Action::UpdateTag).await?;
    ONE.check(&json!(tag)).map_err(|_| {
        ApiError::bad_request(format!(
            "Tag '{tag}' is invalid. It must be a non empty string without characters '/' and \
             ','. Maximum allowed length of a tag is 60 characters."
        ))
    })?;
    let known = row.tags();
    // Also of one that is there already, as nova says.
    if known.len() >= MOST {
        return Err(ApiError::bad_request(format!(
            "The number of tags exceeded the per-server limit {MOST}"
        )));
    }
    if known.contains(&tag) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let location = call.ctx.link(&format!("/v2.1/servers/{id}/tags/{tag}"));
    change(&call, &id, Action::UpdateTag, |mut known| {
        known.insert(tag);
        Ok(known)
    })
    .await?;
    Ok((StatusCode::CREATED, [(header::LOCATION, location)]).into_response())
}

async fn delete(
    call: Call,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    call.since(26)?;
    change(&call, &id, Action::DeleteTag, |mut known| {
        if known.remove(&tag) {
            Ok(known)
        } else {
            Err(unknown(&id, &tag))
        }
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn change(
    call: &Call,
    id: &str,
    action: Action,
    edit: impl FnOnce(BTreeSet<String>) -> Result<BTreeSet<String>, ApiError>,
) -> Result<(), ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, action).await?;
    let tags = edit(row.tags().into_iter().collect())?;
    let change = server::ActiveModel {
        tags: Set(serde_json::to_string(&tags).map_err(ApiError::internal)?),
        updated_at_us: Set(call.app.now_us()),
        ..Default::default()
    };
    super::write(call, &row.id, change).await
}
