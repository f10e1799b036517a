//! A server's metadata: up to 128 pairs of short strings.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use sea_orm::ActiveValue::Set;
use serde_json::{Map, Value, json};

use super::{admit, find};
use crate::compute::api::call::Call;
use crate::compute::api::schemas;
use crate::compute::model::state::Action;
use crate::compute::store::server;
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

pub type Metadata = BTreeMap<String, String>;

/// Pairs that a server may have.
pub const MOST: usize = 128;

pub fn routes(routes: Routes) -> Routes {
    const ALL: &str = "/v2.1/servers/{id}/metadata";
    const ONE: &str = "/v2.1/servers/{id}/metadata/{key}";
    routes
        .get(
            ALL,
            Rule::reader("os_compute_api:server-metadata:index"),
            index,
        )
        .post(
            ALL,
            Rule::member("os_compute_api:server-metadata:create"),
            add,
        )
        .put(
            ALL,
            Rule::member("os_compute_api:server-metadata:update_all"),
            replace,
        )
        .get(
            ONE,
            Rule::reader("os_compute_api:server-metadata:show"),
            show,
        )
        .put(
            ONE,
            Rule::member("os_compute_api:server-metadata:update"),
            put,
        )
        .delete(
            ONE,
            Rule::member("os_compute_api:server-metadata:delete"),
            delete,
        )
}

static ALL: LazyLock<Schema> =
    LazyLock::new(|| Schema::of(schemas::wrapped("metadata", schemas::metadata())));
static ONE: LazyLock<Schema> = LazyLock::new(|| {
    let mut meta = schemas::metadata();
    meta["minProperties"] = json!(1);
    meta["maxProperties"] = json!(1);
    Schema::of(schemas::wrapped("meta", meta))
});

/// Reads an object that the schema agreed to.
pub fn read(given: &Value) -> Metadata {
    let pairs = given.as_object().into_iter().flatten();
    pairs
        .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
        .collect()
}

pub fn within_quota(metadata: &Metadata) -> Result<(), ApiError> {
    if metadata.len() <= MOST {
        return Ok(());
    }
    Err(ApiError::forbidden(format!(
        "Maximum number of metadata items exceeds {MOST}"
    )))
}

async fn index(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = find(&call, &id).await?;
    Ok(Json(json!({"metadata": row.metadata()})))
}

async fn add(call: Call, Path(id): Path<String>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    ALL.check(&body.0)?;
    let new = read(&body.0["metadata"]);
    let metadata = change(&call, &id, Action::UpdateMetadata, |mut known| {
        known.extend(new);
        Ok(known)
    })
    .await?;
    Ok(Json(json!({"metadata": metadata})))
}

async fn replace(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    ALL.check(&body.0)?;
    let new = read(&body.0["metadata"]);
    let metadata = change(&call, &id, Action::UpdateMetadata, |_| Ok(new)).await?;
    Ok(Json(json!({"metadata": metadata})))
}

async fn show(
    call: Call,
    Path((id, key)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let row = find(&call, &id).await?;
    let value = row.metadata().remove(&key).ok_or_else(unknown)?;
    Ok(Json(json!({"meta": one(&key, value)})))
}

async fn put(
    call: Call,
    Path((id, key)): Path<(String, String)>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    ONE.check(&body.0)?;
    let new = read(&body.0["meta"]);
    if !new.contains_key(&key) {
        return Err(ApiError::bad_request("Request body and URI mismatch"));
    }
    let answer = json!({"meta": new});
    change(&call, &id, Action::UpdateMetadata, |mut known| {
        known.extend(new);
        Ok(known)
    })
    .await?;
    Ok(Json(answer))
}

async fn delete(
    call: Call,
    Path((id, key)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    change(&call, &id, Action::DeleteMetadata, |mut known| {
        known.remove(&key).ok_or_else(unknown)?;
        Ok(known)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

fn unknown() -> ApiError {
    ApiError::not_found("Metadata item was not found")
}

fn one(key: &str, value: String) -> Value {
    let mut map = Map::new();
    map.insert(key.to_owned(), value.into());
    Value::Object(map)
}

/// Replaces a server's metadata by what `edit` makes of it.
async fn change(
    call: &Call,
    id: &str,
    action: Action,
    edit: impl FnOnce(Metadata) -> Result<Metadata, ApiError>,
) -> Result<Metadata, ApiError> {
    let row = find(call, id).await?;
    let metadata = edit(row.metadata())?;
    admit(call, &row, action).await?;
    within_quota(&metadata)?;
    let change = server::ActiveModel {
        metadata: Set(serde_json::to_string(&metadata).map_err(ApiError::internal)?),
        updated_at_us: Set(call.app.now_us()),
        ..Default::default()
    };
    super::write(call, &row.id, change).await?;
    Ok(metadata)
}
