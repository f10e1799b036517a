//! Domains: projects that are in none.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder};
use serde_json::{Value, json};

use super::list::Asked;
use super::members::{self, Members, object};
use super::project;
use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, JsonBody, RequestContext, Routes, Rule};
use crate::identity::model::{project as row, role, user};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get("/v3/domains", Rule::admin("identity:list_domains"), list)
        .post("/v3/domains", Rule::admin("identity:create_domain"), create)
        .get("/v3/domains/{id}", Rule::token("identity:get_domain"), show)
        .patch(
            "/v3/domains/{id}",
            Rule::admin("identity:update_domain"),
            update,
        )
        .delete(
            "/v3/domains/{id}",
            Rule::admin("identity:delete_domain"),
            delete,
        )
}

static NEW: LazyLock<Schema> =
    LazyLock::new(|| members::made("domain", project::properties(), &["name"]));
static CHANGED: LazyLock<Schema> =
    LazyLock::new(|| members::changed("domain", project::properties()));

/// A domain as users see it.
pub fn view(ctx: &RequestContext, row: &row::Model) -> Value {
    let mut view = object(&row.extra);
    view.insert("id".into(), row.id.clone().into());
    view.insert("name".into(), row.name.clone().into());
    view.insert("description".into(), row.description.clone().into());
    view.insert("enabled".into(), row.enabled.into());
    project::finish(ctx, row, "domains", view)
}

pub async fn find(db: &impl ConnectionTrait, id: &str) -> Result<row::Model, ApiError> {
    let row = row::Entity::find_by_id(id).one(db).await?;
    row.filter(|row| row.is_domain).ok_or_else(|| missing(id))
}

pub fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!("Could not find domain: {id}."))
}

async fn list(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let rows = row::Entity::find()
        .filter(row::Column::IsDomain.eq(true))
        .order_by_asc(row::Column::Id)
        .all(app.database().reader())
        .await?;
    let items = rows.iter().map(|row| view(&asked.ctx, row)).collect();
    Ok(asked.list("domains", &["name", "enabled"], items))
}

async fn show(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let own = caller
        .project
        .as_ref()
        .is_some_and(|project| project.domain.id == id)
        || caller.domain.as_ref().is_some_and(|domain| domain.id == id);
    if !own && !caller.is_admin() {
        return Err(project::not_allowed("identity:get_domain"));
    }
    let row = find(app.database().reader(), &id).await?;
    Ok(Json(json!({"domain": view(&ctx, &row)})))
}

async fn create(
    State(app): State<App>,
    ctx: RequestContext,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW.check(&body.0)?;
    let mut row = project::blank(&app);
    row.is_domain = true;
    project::apply(Members::of(body.0, "domain")?, &mut row);
    let row = store::change(app.database(), move |tx| {
        let row = row.clone();
        Box::pin(async move { project::insert(tx, row).await })
    })
    .await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"domain": view(&ctx, &row)})),
    ))
}

async fn update(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED.check(&body.0)?;
    let row = project::change(&app, id, body.0, "domain").await?;
    Ok(Json(json!({"domain": view(&ctx, &row)})))
}

/// With all that is in it.
async fn delete(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            if find(tx, &id).await?.enabled {
                return Err(ApiError::forbidden(
                    "Cannot delete a domain that is enabled, please disable it first.",
                ));
            }
            let users = user::Entity::find()
                .filter(user::Column::DomainId.eq(&id))
                .all(tx)
                .await?;
            for row in users {
                super::user::remove(tx, &row.id).await?;
            }
            let projects = row::Entity::find()
                .filter(row::Column::DomainId.eq(&id))
                .all(tx)
                .await?;
            for row in projects {
                project::remove(tx, &row.id).await?;
            }
            let roles = role::Entity::find()
                .filter(role::Column::DomainId.eq(&id))
                .all(tx)
                .await?;
            for row in roles {
                super::role::remove(tx, &row.id).await?;
            }
            project::remove(tx, &id).await
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
