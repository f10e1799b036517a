//! Roles and which of them bring which others.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder,
};
use serde_json::{Value, json};

use super::list::Asked;
use super::members::{self, Members, object};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, JsonBody, RequestContext, Routes, Rule};
use crate::identity::model::{assignment, implied_role, role};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    let implied = "/v3/roles/{id}/implies/{other}";
    routes
        .get("/v3/roles", Rule::admin("identity:list_roles"), list)
        .post("/v3/roles", Rule::admin("identity:create_role"), create)
        .get("/v3/roles/{id}", Rule::admin("identity:get_role"), show)
        .patch(
            "/v3/roles/{id}",
            Rule::admin("identity:update_role"),
            update,
        )
        .delete(
            "/v3/roles/{id}",
            Rule::admin("identity:delete_role"),
            delete,
        )
        .get(
            "/v3/role_inferences",
            Rule::admin("identity:list_role_inference_rules"),
            inferences,
        )
        .get(
            "/v3/roles/{id}/implies",
            Rule::admin("identity:list_implied_roles"),
            list_implied,
        )
        .head(
            implied,
            Rule::admin("identity:check_implied_role"),
            check_implied,
        )
        .get(
            implied,
            Rule::admin("identity:get_implied_role"),
            show_implied,
        )
        .put(implied, Rule::admin("identity:create_implied_role"), imply)
        .delete(
            implied,
            Rule::admin("identity:delete_implied_role"),
            unimply,
        )
}

fn properties() -> Value {
    json!({
        "name": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"[\S]+"},
        "domain_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "description": {"type": ["string", "null"]},
        "options": {"type": "object"},
    })
}

static NEW: LazyLock<Schema> = LazyLock::new(|| members::made("role", properties(), &["name"]));
static CHANGED: LazyLock<Schema> = LazyLock::new(|| members::changed("role", properties()));

pub fn view(ctx: &RequestContext, row: &role::Model) -> Value {
    let domain = (!row.domain_id.is_empty()).then_some(&row.domain_id);
    let mut view = object(&row.extra);
    view.insert("id".into(), row.id.clone().into());
    view.insert("name".into(), row.name.clone().into());
    view.insert("domain_id".into(), json!(domain));
    view.insert("description".into(), row.description.clone().into());
    view.insert("options".into(), object(&row.options).into());
    view.insert(
        "links".into(),
        json!({"self": ctx.link(&format!("/v3/roles/{}", row.id))}),
    );
    view.into()
}

pub async fn find(db: &impl ConnectionTrait, id: &str) -> Result<role::Model, ApiError> {
    let row = role::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| ApiError::not_found(format!("Could not find role: {id}.")))
}

/// Roles of the whole cloud, or of the domain that the query names.
async fn list(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let domain = asked
        .query
        .get("domain_id")
        .filter(|id| *id != "null")
        .unwrap_or("");
    let rows = role::Entity::find()
        .filter(role::Column::DomainId.eq(domain))
        .order_by_asc(role::Column::Id)
        .all(app.database().reader())
        .await?;
    let items = rows.iter().map(|row| view(&asked.ctx, row)).collect();
    Ok(asked.list("roles", &["name"], items))
}

async fn show(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = find(app.database().reader(), &id).await?;
    Ok(Json(json!({"role": view(&ctx, &row)})))
}

async fn create(
    State(app): State<App>,
    ctx: RequestContext,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW.check(&body.0)?;
    let mut row = role::Model {
        id: app.random().uuid().simple().to_string(),
        name: String::new(),
        domain_id: String::new(),
        description: None,
        options: "{}".to_owned(),
        extra: "{}".to_owned(),
    };
    let mut members = Members::of(body.0, "role")?;
    members.string("domain_id", &mut row.domain_id);
    apply(members, &mut row);
    let row = store::change(app.database(), move |tx| {
        let row = row.clone();
        Box::pin(async move {
            no_duplicate(tx, &row).await?;
            Ok(row.into_active_model().insert(tx).await?)
        })
    })
    .await?;
    Ok((StatusCode::CREATED, Json(json!({"role": view(&ctx, &row)}))))
}

fn apply(mut members: Members, row: &mut role::Model) {
    for fixed in ["id", "links", "domain_id"] {
        members.take(fixed);
    }
    members.string("name", &mut row.name);
    members.optional("description", &mut row.description);
    members.json("options", &mut row.options);
    members.rest(&mut row.extra);
}

async fn no_duplicate(tx: &DatabaseTransaction, row: &role::Model) -> Result<(), ApiError> {
    let other = role::Entity::find()
        .filter(role::Column::DomainId.eq(&row.domain_id))
        .filter(role::Column::Name.eq(&row.name))
        .filter(role::Column::Id.ne(&row.id));
    if other.one(tx).await?.is_some() {
        return Err(ApiError::conflict(format!(
            "Conflict occurred attempting to store role - Duplicate entry found with name {}.",
            row.name
        )));
    }
    Ok(())
}

/// The cloud's own roles cannot be changed, unless the change is of that very option.
fn mutable(row: &role::Model, verb: &str) -> Result<(), ApiError> {
    if object(&row.options).get("immutable") == Some(&Value::Bool(true)) {
        return Err(ApiError::forbidden(format!(
            "Cannot {verb} immutable role resources. Set resource option 'immutable' to false first."
        )));
    }
    Ok(())
}

async fn update(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED.check(&body.0)?;
    let frees = body.0["role"]["options"]["immutable"] == Value::Bool(false);
    let row = store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.0.clone());
        Box::pin(async move {
            let mut row = find(tx, &id).await?;
            if !frees {
                mutable(&row, "modify")?;
            }
            apply(Members::of(body, "role")?, &mut row);
            no_duplicate(tx, &row).await?;
            Ok(row.into_active_model().reset_all().update(tx).await?)
        })
    })
    .await?;
    Ok(Json(json!({"role": view(&ctx, &row)})))
}

async fn delete(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            mutable(&find(tx, &id).await?, "delete")?;
            remove(tx, &id).await
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The role, with its assignments and what it brings.
pub async fn remove(tx: &DatabaseTransaction, id: &str) -> Result<(), ApiError> {
    assignment::Entity::delete_many()
        .filter(assignment::Column::RoleId.eq(id))
        .exec(tx)
        .await?;
    implied_role::Entity::delete_many()
        .filter(
            sea_orm::Condition::any()
                .add(implied_role::Column::PriorRoleId.eq(id))
                .add(implied_role::Column::ImpliedRoleId.eq(id)),
        )
        .exec(tx)
        .await?;
    role::Entity::delete_by_id(id).exec(tx).await?;
    Ok(())
}

fn brief(ctx: &RequestContext, row: &role::Model) -> Value {
    let link = ctx.link(&format!("/v3/roles/{}", row.id));
    json!({"id": row.id, "links": {"self": link}, "name": row.name})
}

async fn inferences(State(app): State<App>, ctx: RequestContext) -> Result<Json<Value>, ApiError> {
    let db = app.database().reader();
    let roles = role::Entity::find()
        .order_by_asc(role::Column::Id)
        .all(db)
        .await?;
    let pairs = implied_role::Entity::find().all(db).await?;
    let mut rules = Vec::new();
    for prior in &roles {
        let implies: Vec<Value> = roles
            .iter()
            .filter(|role| {
                pairs
                    .iter()
                    .any(|pair| pair.prior_role_id == prior.id && pair.implied_role_id == role.id)
            })
            .map(|role| brief(&ctx, role))
            .collect();
        if !implies.is_empty() {
            rules.push(json!({"prior_role": brief(&ctx, prior), "implies": implies}));
        }
    }
    Ok(Json(json!({"role_inferences": rules})))
}

async fn list_implied(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let db = app.database().reader();
    let prior = find(db, &id).await?;
    let mut implies = Vec::new();
    for pair in of(db, &id).await? {
        implies.push(brief(&ctx, &find(db, &pair.implied_role_id).await?));
    }
    Ok(Json(json!({
        "role_inference": {"prior_role": brief(&ctx, &prior), "implies": implies},
        "links": {"self": ctx.link(&format!("/v3/roles/{id}/implies"))},
    })))
}

async fn of(db: &impl ConnectionTrait, id: &str) -> Result<Vec<implied_role::Model>, ApiError> {
    let found = implied_role::Entity::find().filter(implied_role::Column::PriorRoleId.eq(id));
    Ok(found.all(db).await?)
}

async fn rule(
    db: &impl ConnectionTrait,
    ctx: &RequestContext,
    id: &str,
    other: &str,
) -> Result<Value, ApiError> {
    let (prior, implied) = (find(db, id).await?, find(db, other).await?);
    let pair = (id.to_owned(), other.to_owned());
    if implied_role::Entity::find_by_id(pair)
        .one(db)
        .await?
        .is_none()
    {
        return Err(ApiError::not_found(format!("{id} does not imply {other}.")));
    }
    Ok(json!({
        "role_inference": {"prior_role": brief(ctx, &prior), "implies": brief(ctx, &implied)},
        "links": {"self": ctx.link(&format!("/v3/roles/{id}/implies/{other}"))},
    }))
}

async fn show_implied(
    State(app): State<App>,
    ctx: RequestContext,
    Path((id, other)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(
        rule(app.database().reader(), &ctx, &id, &other).await?,
    ))
}

async fn check_implied(
    State(app): State<App>,
    ctx: RequestContext,
    Path((id, other)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    rule(app.database().reader(), &ctx, &id, &other).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn imply(
    State(app): State<App>,
    ctx: RequestContext,
    Path((id, other)): Path<(String, String)>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let shown = ctx.clone();
    let body = store::change(app.database(), move |tx| {
        let (ctx, id, other) = (shown.clone(), id.clone(), other.clone());
        Box::pin(async move {
            find(tx, &id).await?;
            // Whoever may give a role away must not give admin away with it.
            if find(tx, &other).await?.name == "admin" {
                return Err(ApiError::forbidden(format!(
                    "{other} cannot be an implied roles."
                )));
            }
            let there = implied_role::Entity::find_by_id((id.clone(), other.clone())).one(tx);
            if there.await?.is_some() {
                return Err(ApiError::conflict(
                    "Conflict occurred attempting to store implied_role - Duplicate entry.",
                ));
            }
            let row = implied_role::Model {
                prior_role_id: id.clone(),
                implied_role_id: other.clone(),
            };
            row.into_active_model().insert(tx).await?;
            rule(tx, &ctx, &id, &other).await
        })
    })
    .await?;
    Ok((StatusCode::CREATED, Json(body)))
}

async fn unimply(
    State(app): State<App>,
    ctx: RequestContext,
    Path((id, other)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let (ctx, id, other) = (ctx.clone(), id.clone(), other.clone());
        Box::pin(async move {
            rule(tx, &ctx, &id, &other).await?;
            implied_role::Entity::delete_by_id((id, other))
                .exec(tx)
                .await?;
            Ok(())
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
