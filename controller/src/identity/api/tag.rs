//! The tags of projects.

use std::sync::{Arc, LazyLock};

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{ActiveModelTrait, IntoActiveModel};
use serde_json::{Value, json};

use super::project;
use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, JsonBody, RequestContext, Routes, Rule};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v3/projects/{id}/tags",
            Rule::token("identity:list_project_tags"),
            list,
        )
        .put(
            "/v3/projects/{id}/tags",
            Rule::admin("identity:update_project_tags"),
            set,
        )
        .delete(
            "/v3/projects/{id}/tags",
            Rule::admin("identity:delete_project_tags"),
            clear,
        )
        .get(
            "/v3/projects/{id}/tags/{tag}",
            Rule::token("identity:get_project_tag"),
            has,
        )
        .put(
            "/v3/projects/{id}/tags/{tag}",
            Rule::admin("identity:create_project_tag"),
            add,
        )
        .delete(
            "/v3/projects/{id}/tags/{tag}",
            Rule::admin("identity:delete_project_tag"),
            drop_one,
        )
}

/// Of one tag.
pub(super) fn schema() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[^,/]*$"})
}

static TAGS: LazyLock<Schema> = LazyLock::new(|| {
    Schema::of(
        json!({"type": "object", "required": ["tags"], "properties": {
        "tags": {"type": "array", "uniqueItems": true, "maxItems": 80, "items": schema()}}}),
    )
});

async fn list(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = project::readable(&app, &caller, &id, "identity:list_project_tags").await?;
    let mut tags = project::tags_of(&row);
    tags.sort();
    Ok(Json(
        json!({"links": {"self": ctx.link("/v3")}, "tags": tags}),
    ))
}

async fn has(
    State(app): State<App>,
    caller: Caller,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let row = project::readable(&app, &caller, &id, "identity:get_project_tag").await?;
    if project::tags_of(&row).contains(&tag) {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(no_tag(&tag))
}

fn no_tag(tag: &str) -> ApiError {
    ApiError::not_found(format!("Could not find project tag: {tag}."))
}

async fn set(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    TAGS.check(&body.0)?;
    let tags: Vec<String> =
        serde_json::from_value(body.0["tags"].clone()).map_err(ApiError::internal)?;
    let shown = tags.clone();
    edit(&app, id, move |_| Ok(tags.clone())).await?;
    Ok(Json(
        json!({"links": {"self": ctx.link("/v3")}, "tags": shown}),
    ))
}

async fn clear(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    edit(&app, id, |_| Ok(Vec::new())).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn add(
    State(app): State<App>,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    TAGS.check(&json!({ "tags": [tag] }))?;
    edit(&app, id, move |mut tags| {
        if !tags.contains(&tag) {
            tags.push(tag.clone());
        }
        Ok(tags)
    })
    .await?;
    Ok(StatusCode::CREATED)
}

async fn drop_one(
    State(app): State<App>,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    edit(&app, id, move |mut tags| {
        let before = tags.len();
        tags.retain(|own| own != &tag);
        if tags.len() < before {
            Ok(tags)
        } else {
            Err(no_tag(&tag))
        }
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn edit(
    app: &App,
    id: String,
    edit: impl Fn(Vec<String>) -> Result<Vec<String>, ApiError> + Send + Sync + 'static,
) -> Result<(), ApiError> {
    let edit = Arc::new(edit);
    store::change(app.database(), move |tx| {
        let (id, edit) = (id.clone(), Arc::clone(&edit));
        Box::pin(async move {
            let mut row = project::find(tx, &id).await?;
            row.tags = json!(edit(project::tags_of(&row))?).to_string();
            row.into_active_model().reset_all().update(tx).await?;
            Ok(())
        })
    })
    .await
}
