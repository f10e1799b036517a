//! Users and their passwords.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder,
};
use serde_json::{Value, json};

use super::domain;
use super::list::Asked;
use super::members::{self, Members, object};
use super::project::{caller_domain, not_allowed, project_view};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, JsonBody, RequestContext, Routes, Rule};
use crate::identity::model::{Target, assignment, project, user};
use crate::identity::password::LONGEST;
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get("/v3/users", Rule::admin("identity:list_users"), list)
        .post("/v3/users", Rule::admin("identity:create_user"), create)
        .get("/v3/users/{id}", Rule::token("identity:get_user"), show)
        .patch(
            "/v3/users/{id}",
            Rule::admin("identity:update_user"),
            update,
        )
        .delete(
            "/v3/users/{id}",
            Rule::admin("identity:delete_user"),
            delete,
        )
        // The original password is the proof: a user whose token has ended may come, too.
        .post("/v3/users/{id}/password", Rule::open(), change_password)
        .get(
            "/v3/users/{id}/projects",
            Rule::token("identity:list_user_projects"),
            projects,
        )
        .get(
            "/v3/users/{id}/groups",
            Rule::token("identity:list_groups_for_user"),
            groups,
        )
}

fn properties() -> Value {
    json!({
        "name": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"[\S]+"},
        "password": {"type": ["string", "null"], "maxLength": LONGEST},
        "enabled": {"type": "boolean"},
        "domain_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "default_project_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "description": {"type": ["string", "null"]},
        "options": {"type": "object"},
    })
}

static NEW: LazyLock<Schema> = LazyLock::new(|| members::made("user", properties(), &["name"]));
static CHANGED: LazyLock<Schema> = LazyLock::new(|| members::changed("user", properties()));
static PASSWORD: LazyLock<Schema> = LazyLock::new(|| {
    Schema::of(
        json!({"type": "object", "required": ["user"], "properties": {"user": {
            "type": "object",
            "required": ["original_password", "password"],
            "properties": {
                "original_password": {"type": "string"},
                "password": {"type": "string", "maxLength": LONGEST},
            },
            "additionalProperties": false,
        }}}),
    )
});

fn view(ctx: &RequestContext, row: &user::Model) -> Value {
    let mut view = object(&row.extra);
    view.insert("id".into(), row.id.clone().into());
    view.insert("name".into(), row.name.clone().into());
    view.insert("domain_id".into(), row.domain_id.clone().into());
    view.insert("enabled".into(), row.enabled.into());
    if let Some(project) = &row.default_project_id {
        view.insert("default_project_id".into(), project.clone().into());
    }
    view.insert("password_expires_at".into(), Value::Null);
    view.insert("options".into(), object(&row.options).into());
    view.insert(
        "links".into(),
        json!({"self": ctx.link(&format!("/v3/users/{}", row.id))}),
    );
    view.into()
}

pub async fn find(db: &impl ConnectionTrait, id: &str) -> Result<user::Model, ApiError> {
    let row = user::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| ApiError::not_found(format!("Could not find user: {id}.")))
}

async fn list(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let mut found = user::Entity::find();
    if let Some(name) = asked.query.get("name") {
        found = found.filter(user::Column::Name.eq(name));
    }
    let rows = found
        .order_by_asc(user::Column::Id)
        .all(app.database().reader())
        .await?;
    let items = rows.iter().map(|row| view(&asked.ctx, row)).collect();
    let fields = ["name", "domain_id", "enabled", "default_project_id"];
    Ok(asked.list("users", &fields, items))
}

async fn show(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    self_or_admin(&caller, &id, "identity:get_user")?;
    let row = find(app.database().reader(), &id).await?;
    Ok(Json(json!({"user": view(&ctx, &row)})))
}

fn self_or_admin(caller: &Caller, id: &str, action: &str) -> Result<(), ApiError> {
    if caller.is_admin() || caller.user_id == id {
        Ok(())
    } else {
        Err(not_allowed(action))
    }
}

async fn create(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW.check(&body.0)?;
    let mut members = Members::of(body.0, "user")?;
    let mut row = user::Model {
        id: app.random().uuid().simple().to_string(),
        name: String::new(),
        domain_id: caller_domain(&caller),
        enabled: true,
        default_project_id: None,
        password_hash: None,
        valid_from_us: 0,
        created_at_us: app.now_us(),
        options: "{}".to_owned(),
        extra: "{}".to_owned(),
    };
    members.string("domain_id", &mut row.domain_id);
    if let Some(Value::String(password)) = members.take("password") {
        row.password_hash = Some(app.realm().passwords.hash(&password).await?);
    }
    apply(members, &mut row);
    let row = store::change(app.database(), move |tx| {
        let row = row.clone();
        Box::pin(async move {
            let domain = project::Entity::find_by_id(&row.domain_id).one(tx).await?;
            if !domain.is_some_and(|domain| domain.is_domain) {
                return Err(domain::missing(&row.domain_id));
            }
            no_duplicate(tx, &row).await?;
            Ok(row.into_active_model().insert(tx).await?)
        })
    })
    .await?;
    Ok((StatusCode::CREATED, Json(json!({"user": view(&ctx, &row)}))))
}

fn apply(mut members: Members, row: &mut user::Model) {
    for fixed in [
        "id",
        "links",
        "extra",
        "password",
        "password_expires_at",
        "password_hash",
    ] {
        members.take(fixed);
    }
    members.string("name", &mut row.name);
    members.boolean("enabled", &mut row.enabled);
    members.optional("default_project_id", &mut row.default_project_id);
    members.json("options", &mut row.options);
    members.rest(&mut row.extra);
}

async fn no_duplicate(tx: &DatabaseTransaction, row: &user::Model) -> Result<(), ApiError> {
    match store::user_by_name(tx, &row.domain_id, &row.name).await? {
        Some(other) if other.id != row.id => Err(ApiError::conflict(format!(
            "Conflict occurred attempting to store user - Duplicate entry found with name {} at \
             domain ID {}.",
            row.name, row.domain_id
        ))),
        _ => Ok(()),
    }
}

async fn update(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED.check(&body.0)?;
    find(app.database().reader(), &id).await?;
    let password = match body.0["user"].get("password") {
        Some(Value::String(password)) => Some(app.realm().passwords.hash(password).await?),
        _ => None,
    };
    let now_us = app.now_us();
    let row = store::change(app.database(), move |tx| {
        let (id, body, password) = (id.clone(), body.0.clone(), password.clone());
        Box::pin(async move {
            let mut row = find(tx, &id).await?;
            let mut members = Members::of(body, "user")?;
            if members
                .take("domain_id")
                .is_some_and(|new| new != row.domain_id.as_str())
            {
                return Err(ApiError::bad_request("Cannot change Domain ID"));
            }
            apply(members, &mut row);
            if password.is_some() {
                row.password_hash = password;
                row.valid_from_us = now_us;
            }
            if !row.enabled {
                row.valid_from_us = now_us;
            }
            no_duplicate(tx, &row).await?;
            Ok(row.into_active_model().reset_all().update(tx).await?)
        })
    })
    .await?;
    let mut view = view(&ctx, &row);
    view["extra"] = object(&row.extra).into();
    Ok(Json(json!({ "user": view })))
}

async fn delete(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            find(tx, &id).await?;
            remove(tx, &id).await
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The user and its roles.
pub async fn remove(tx: &DatabaseTransaction, id: &str) -> Result<(), ApiError> {
    assignment::Entity::delete_many()
        .filter(assignment::Column::ActorId.eq(id))
        .exec(tx)
        .await?;
    user::Entity::delete_by_id(id).exec(tx).await?;
    Ok(())
}

/// By whoever knows the present password. All tokens of the user end.
async fn change_password(
    State(app): State<App>,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<StatusCode, ApiError> {
    PASSWORD.check(&body.0)?;
    let text = |name: &str| body.0["user"][name].as_str().unwrap_or("").to_owned();
    let row = user::Entity::find_by_id(&id)
        .one(app.database().reader())
        .await?;
    let hash = row
        .as_ref()
        .filter(|row| row.enabled)
        .and_then(|row| row.password_hash.clone());
    let passwords = &app.realm().passwords;
    if !passwords
        .verify(&text("original_password"), hash.as_deref())
        .await?
    {
        return Err(ApiError::unauthorized());
    }
    let new = passwords.hash(&text("password")).await?;
    let now_us = app.now_us();
    store::change(app.database(), move |tx| {
        let (id, new, old) = (id.clone(), new.clone(), hash.clone());
        Box::pin(async move {
            let mut row = find(tx, &id).await?;
            if row.password_hash != old {
                // It was changed meanwhile: the proof was of another password.
                return Err(ApiError::unauthorized());
            }
            row.password_hash = Some(new);
            row.valid_from_us = now_us;
            row.into_active_model().reset_all().update(tx).await?;
            Ok(())
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn projects(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    self_or_admin(&caller, &id, "identity:list_user_projects")?;
    let db = app.database().reader();
    find(db, &id).await?;
    let ids = store::targets_of(db, &id)
        .await?
        .into_iter()
        .filter_map(|target| match target {
            Target::Project(id) => Some(id),
            _ => None,
        });
    let rows = project::Entity::find()
        .filter(project::Column::Id.is_in(ids))
        .all(db)
        .await?;
    let items = rows
        .iter()
        .map(|row| project_view(&asked.ctx, row))
        .collect();
    Ok(asked.list("projects", &["name", "enabled", "domain_id"], items))
}

/// There are no groups yet; clients ask for a user's all the same.
async fn groups(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    self_or_admin(&caller, &id, "identity:list_groups_for_user")?;
    find(app.database().reader(), &id).await?;
    Ok(asked.list("groups", &[], Vec::new()))
}
