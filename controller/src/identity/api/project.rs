//! Projects, and what is done to domains ([`domain`]) as to them: both are rows of one table.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder,
};
use serde_json::{Map, Value, json};

use super::list::{Asked, flag};
use super::members::{self, Members, object};
use super::{domain, tag};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, JsonBody, Query, RequestContext, Routes, Rule};
use crate::identity::model::{assignment, project};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get("/v3/projects", Rule::admin("identity:list_projects"), list)
        .post(
            "/v3/projects",
            Rule::admin("identity:create_project"),
            create,
        )
        .get(
            "/v3/projects/{id}",
            Rule::token("identity:get_project"),
            show,
        )
        .patch(
            "/v3/projects/{id}",
            Rule::admin("identity:update_project"),
            update,
        )
        .delete(
            "/v3/projects/{id}",
            Rule::admin("identity:delete_project"),
            delete,
        )
}

/// Of a project or a domain.
pub(super) fn properties() -> Value {
    json!({
        "name": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": r"[\S]+"},
        "description": {"type": ["string", "null"]},
        "enabled": {"type": "boolean"},
        "domain_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "parent_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "is_domain": {"type": "boolean"},
        "tags": {"type": "array", "uniqueItems": true, "maxItems": 80, "items": tag::schema()},
        "options": {"type": "object"},
    })
}

static NEW: LazyLock<Schema> = LazyLock::new(|| members::made("project", properties(), &["name"]));
static CHANGED: LazyLock<Schema> = LazyLock::new(|| members::changed("project", properties()));

/// A project as users see it.
pub fn project_view(ctx: &RequestContext, row: &project::Model) -> Value {
    let mut view = object(&row.extra);
    let domain = (!row.is_domain).then(|| row.domain_id.clone());
    view.insert("id".into(), row.id.clone().into());
    view.insert("name".into(), row.name.clone().into());
    view.insert("domain_id".into(), domain.into());
    view.insert("description".into(), row.description.clone().into());
    view.insert("enabled".into(), row.enabled.into());
    view.insert("parent_id".into(), row.parent_id.clone().into());
    view.insert("is_domain".into(), row.is_domain.into());
    finish(ctx, row, "projects", view)
}

pub(super) fn finish(
    ctx: &RequestContext,
    row: &project::Model,
    plural: &str,
    mut view: Map<String, Value>,
) -> Value {
    view.insert("tags".into(), tags_of(row).into());
    view.insert("options".into(), object(&row.options).into());
    view.insert(
        "links".into(),
        json!({"self": ctx.link(&format!("/v3/{plural}/{}", row.id))}),
    );
    view.into()
}

pub(super) fn tags_of(row: &project::Model) -> Vec<String> {
    serde_json::from_str(&row.tags).unwrap_or_default()
}

pub(super) async fn find(db: &impl ConnectionTrait, id: &str) -> Result<project::Model, ApiError> {
    let row = project::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| ApiError::not_found(format!("Could not find project: {id}.")))
}

async fn list(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let is_domain = asked
        .query
        .get("is_domain")
        .is_some_and(super::list::is_true);
    let mut found = project::Entity::find().filter(project::Column::IsDomain.eq(is_domain));
    if let Some(name) = asked.query.get("name") {
        found = found.filter(project::Column::Name.eq(name));
    }
    let rows = found
        .order_by_asc(project::Column::Id)
        .all(app.database().reader())
        .await?;
    let rows = rows.into_iter().filter(|row| tags_match(row, &asked.query));
    let items = rows.map(|row| project_view(&asked.ctx, &row)).collect();
    let fields = ["name", "domain_id", "enabled", "parent_id", "is_domain"];
    Ok(asked.list("projects", &fields, items))
}

/// `tags` (all), `tags-any`, `not-tags`, `not-tags-any`.
fn tags_match(row: &project::Model, query: &Query) -> bool {
    let has = tags_of(row);
    let asked = |name: &str| {
        query
            .get(name)
            .map(|list| list.split(',').collect::<Vec<_>>())
    };
    let all = |list: &[&str]| list.iter().all(|tag| has.iter().any(|own| own == tag));
    let any = |list: &[&str]| list.iter().any(|tag| has.iter().any(|own| own == tag));
    asked("tags").is_none_or(|list| all(&list))
        && asked("tags-any").is_none_or(|list| any(&list))
        && asked("not-tags").is_none_or(|list| !all(&list))
        && asked("not-tags-any").is_none_or(|list| !any(&list))
}

async fn show(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    Path(id): Path<String>,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let row = readable(&app, &caller, &id, "identity:get_project").await?;
    let mut view = project_view(&ctx, &row);
    let db = app.database().reader();
    let parent = row.parent_id.clone();
    if flag(&query, "parents_as_ids") {
        let mut parents = Value::Null;
        let mut chain = Vec::new();
        let mut next = parent.clone();
        while let Some(id) = next {
            next = project::Entity::find_by_id(&id)
                .one(db)
                .await?
                .and_then(|row| row.parent_id);
            chain.push(id);
        }
        for id in chain.into_iter().rev() {
            parents = json!({ id: parents });
        }
        view["parents"] = parents;
    } else if flag(&query, "parents_as_list") {
        view["parents"] = json!([]);
    }
    if flag(&query, "subtree_as_ids") || flag(&query, "subtree_as_list") {
        let children = project::Entity::find()
            .filter(project::Column::ParentId.eq(&row.id))
            .all(db)
            .await?;
        view["subtree"] = if flag(&query, "subtree_as_list") {
            children
                .iter()
                .map(|row| json!({"project": project_view(&ctx, row)}))
                .collect()
        } else if children.is_empty() {
            Value::Null
        } else {
            let ids = children.into_iter().map(|row| (row.id, Value::Null));
            Value::Object(ids.collect())
        };
    }
    Ok(Json(json!({ "project": view })))
}

/// The project, for an admin and for those who have a role in it.
pub(super) async fn readable(
    app: &App,
    caller: &Caller,
    id: &str,
    action: &str,
) -> Result<project::Model, ApiError> {
    let db = app.database().reader();
    let own = caller.project_id() == Some(id)
        || caller.is_admin()
        || store::targets_of(db, &caller.user_id)
            .await?
            .contains(&crate::identity::model::Target::Project(id.to_owned()));
    if !own {
        return Err(not_allowed(action));
    }
    find(db, id).await
}

pub fn not_allowed(action: &str) -> ApiError {
    ApiError::forbidden(format!(
        "You are not authorized to perform the requested action: {action}."
    ))
}

async fn create(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW.check(&body.0)?;
    let mut row = blank(&app);
    row.domain_id = caller_domain(&caller);
    let mut members = Members::of(body.0, "project")?;
    if let Some(Value::Bool(true)) = members.take("is_domain") {
        row.is_domain = true;
        row.domain_id = String::new();
        members.take("domain_id");
    }
    let named_domain = members
        .take("domain_id")
        .and_then(|id| id.as_str().map(str::to_owned));
    if let Some(domain) = named_domain {
        row.domain_id = domain;
    }
    members.optional("parent_id", &mut row.parent_id);
    apply(members, &mut row);
    let row = store::change(app.database(), move |tx| {
        let row = row.clone();
        Box::pin(async move { insert(tx, row).await })
    })
    .await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"project": project_view(&ctx, &row)})),
    ))
}

/// The domain of what a caller makes without naming one.
pub fn caller_domain(caller: &Caller) -> String {
    let scope = caller
        .project
        .as_ref()
        .map(|project| &project.domain)
        .or(caller.domain.as_ref());
    scope.unwrap_or(&caller.user_domain).id.clone()
}

pub(super) fn blank(app: &App) -> project::Model {
    project::Model {
        id: app.random().uuid().simple().to_string(),
        name: String::new(),
        domain_id: String::new(),
        parent_id: None,
        is_domain: false,
        description: Some(String::new()),
        enabled: true,
        tags: "[]".to_owned(),
        options: "{}".to_owned(),
        extra: "{}".to_owned(),
    }
}

pub(super) fn apply(mut members: Members, row: &mut project::Model) {
    for fixed in ["id", "links", "extra"] {
        members.take(fixed);
    }
    members.string("name", &mut row.name);
    members.optional("description", &mut row.description);
    members.boolean("enabled", &mut row.enabled);
    members.json("tags", &mut row.tags);
    members.json("options", &mut row.options);
    members.rest(&mut row.extra);
}

pub(super) async fn insert(
    tx: &DatabaseTransaction,
    mut row: project::Model,
) -> Result<project::Model, ApiError> {
    if !row.is_domain {
        domain::find(tx, &row.domain_id).await?;
        match &row.parent_id {
            Some(parent) => {
                find(tx, parent).await?;
            }
            None => row.parent_id = Some(row.domain_id.clone()),
        }
    }
    no_duplicate(tx, &row).await?;
    Ok(row.into_active_model().insert(tx).await?)
}

async fn no_duplicate(tx: &DatabaseTransaction, row: &project::Model) -> Result<(), ApiError> {
    let other = store::project_by_name(tx, &row.domain_id, &row.name).await?;
    match other {
        Some(other) if other.id != row.id => Err(ApiError::conflict(if row.is_domain {
            format!(
                "Conflict occurred attempting to store project - it is not permitted to have two \
                 projects acting as domains with the same name: {}.",
                row.name
            )
        } else {
            format!(
                "Conflict occurred attempting to store project - it is not permitted to have two \
                 projects with either the same name or same id in the same domain: name is {}, \
                 project id {}.",
                row.name, row.id
            )
        })),
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
    let row = change(&app, id, body.0, "project").await?;
    let mut view = project_view(&ctx, &row);
    view["extra"] = object(&row.extra).into();
    Ok(Json(json!({ "project": view })))
}

pub(super) async fn change(
    app: &App,
    id: String,
    body: Value,
    kind: &'static str,
) -> Result<project::Model, ApiError> {
    store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.clone());
        Box::pin(async move {
            let row = match kind {
                "domain" => domain::find(tx, &id).await?,
                _ => find(tx, &id).await?,
            };
            let mut members = Members::of(body, kind)?;
            for (fixed, now) in [
                ("domain_id", Some(&row.domain_id)),
                ("parent_id", row.parent_id.as_ref()),
            ] {
                let new = members.take(fixed);
                if new.is_some_and(|new| new.as_str() != now.map(String::as_str) && !new.is_null())
                {
                    return Err(ApiError::bad_request(format!(
                        "Cannot change {fixed} of a {kind}."
                    )));
                }
            }
            members.take("is_domain");
            let mut changed = row;
            apply(members, &mut changed);
            no_duplicate(tx, &changed).await?;
            Ok(changed.into_active_model().reset_all().update(tx).await?)
        })
    })
    .await
}

async fn delete(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            let row = find(tx, &id).await?;
            if row.is_domain && row.enabled {
                return Err(ApiError::forbidden(
                    "Cannot delete a domain that is enabled, please disable it first.",
                ));
            }
            let child = project::Entity::find().filter(project::Column::ParentId.eq(&id));
            if child.one(tx).await?.is_some() {
                return Err(ApiError::forbidden(format!(
                    "Cannot delete project {id} because it has child projects: delete those first."
                )));
            }
            remove(tx, &id).await
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn remove(tx: &DatabaseTransaction, id: &str) -> Result<(), ApiError> {
    assignment::Entity::delete_many()
        .filter(assignment::Column::TargetId.eq(id))
        .exec(tx)
        .await?;
    project::Entity::delete_by_id(id).exec(tx).await?;
    Ok(())
}
