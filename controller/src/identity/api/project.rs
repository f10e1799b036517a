//! Projects, their tags, and domains, which are projects without one.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use http::{StatusCode, Uri};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder,
};
use serde_json::{Map, Value, json};

use super::list::{Asked, flag};
use super::members::{Members, object};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, JsonBody, Query, RequestContext, Routes, Rule};
use crate::identity::model::{assignment, project, role, user};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v3/projects",
            Rule::admin("identity:list_projects"),
            list_projects,
        )
        .post(
            "/v3/projects",
            Rule::admin("identity:create_project"),
            create_project,
        )
        .get(
            "/v3/projects/{id}",
            Rule::token("identity:get_project"),
            show_project,
        )
        .patch(
            "/v3/projects/{id}",
            Rule::admin("identity:update_project"),
            update_project,
        )
        .delete(
            "/v3/projects/{id}",
            Rule::admin("identity:delete_project"),
            delete_project,
        )
        .get(
            "/v3/projects/{id}/tags",
            Rule::token("identity:list_project_tags"),
            list_tags,
        )
        .put(
            "/v3/projects/{id}/tags",
            Rule::admin("identity:update_project_tags"),
            set_tags,
        )
        .delete(
            "/v3/projects/{id}/tags",
            Rule::admin("identity:delete_project_tags"),
            clear_tags,
        )
        .get(
            "/v3/projects/{id}/tags/{tag}",
            Rule::token("identity:get_project_tag"),
            has_tag,
        )
        .put(
            "/v3/projects/{id}/tags/{tag}",
            Rule::admin("identity:create_project_tag"),
            add_tag,
        )
        .delete(
            "/v3/projects/{id}/tags/{tag}",
            Rule::admin("identity:delete_project_tag"),
            drop_tag,
        )
        .get(
            "/v3/domains",
            Rule::admin("identity:list_domains"),
            list_domains,
        )
        .post(
            "/v3/domains",
            Rule::admin("identity:create_domain"),
            create_domain,
        )
        .get(
            "/v3/domains/{id}",
            Rule::token("identity:get_domain"),
            show_domain,
        )
        .patch(
            "/v3/domains/{id}",
            Rule::admin("identity:update_domain"),
            update_domain,
        )
        .delete(
            "/v3/domains/{id}",
            Rule::admin("identity:delete_domain"),
            delete_domain,
        )
}

fn schema(kind: &str, required: bool) -> Schema {
    let mut inner = json!({"type": "object", "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": r"[\S]+"},
        "description": {"type": ["string", "null"]},
        "enabled": {"type": "boolean"},
        "domain_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "parent_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 64},
        "is_domain": {"type": "boolean"},
        "tags": {"type": "array", "uniqueItems": true, "maxItems": 80, "items": tag()},
        "options": {"type": "object"},
    }, "additionalProperties": true});
    if required {
        inner["required"] = json!(["name"]);
    } else {
        inner["minProperties"] = json!(1);
    }
    Schema::of(json!({"type": "object", "properties": {kind: inner}, "required": [kind]}))
}

fn tag() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[^,/]*$"})
}

static NEW_PROJECT: LazyLock<Schema> = LazyLock::new(|| schema("project", true));
static CHANGED_PROJECT: LazyLock<Schema> = LazyLock::new(|| schema("project", false));
static NEW_DOMAIN: LazyLock<Schema> = LazyLock::new(|| schema("domain", true));
static CHANGED_DOMAIN: LazyLock<Schema> = LazyLock::new(|| schema("domain", false));
static TAGS: LazyLock<Schema> = LazyLock::new(|| {
    Schema::of(
        json!({"type": "object", "required": ["tags"], "properties": {
        "tags": {"type": "array", "uniqueItems": true, "maxItems": 80, "items": tag()}}}),
    )
});

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

/// A domain as users see it.
pub fn domain_view(ctx: &RequestContext, row: &project::Model) -> Value {
    let mut view = object(&row.extra);
    view.insert("id".into(), row.id.clone().into());
    view.insert("name".into(), row.name.clone().into());
    view.insert("description".into(), row.description.clone().into());
    view.insert("enabled".into(), row.enabled.into());
    finish(ctx, row, "domains", view)
}

fn finish(
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

fn tags_of(row: &project::Model) -> Vec<String> {
    serde_json::from_str(&row.tags).unwrap_or_default()
}

async fn find(db: &impl ConnectionTrait, id: &str) -> Result<project::Model, ApiError> {
    let row = project::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| ApiError::not_found(format!("Could not find project: {id}.")))
}

async fn find_domain(db: &impl ConnectionTrait, id: &str) -> Result<project::Model, ApiError> {
    let row = project::Entity::find_by_id(id).one(db).await?;
    row.filter(|row| row.is_domain).ok_or_else(|| no_domain(id))
}

pub fn no_domain(id: &str) -> ApiError {
    ApiError::not_found(format!("Could not find domain: {id}."))
}

async fn list_projects(
    State(app): State<App>,
    ctx: RequestContext,
    query: Query,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let is_domain = query.get("is_domain").is_some_and(super::list::is_true);
    let mut found = project::Entity::find().filter(project::Column::IsDomain.eq(is_domain));
    if let Some(name) = query.get("name") {
        found = found.filter(project::Column::Name.eq(name));
    }
    let rows = found
        .order_by_asc(project::Column::Id)
        .all(app.database().reader())
        .await?;
    let rows = rows.into_iter().filter(|row| tags_match(row, &query));
    let items = rows.map(|row| project_view(&ctx, &row)).collect();
    let fields = ["name", "domain_id", "enabled", "parent_id", "is_domain"];
    Ok(Json(
        Asked {
            ctx: &ctx,
            uri: &uri,
            query: &query,
        }
        .list("projects", &fields, items),
    ))
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

async fn show_project(
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
async fn readable(
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

async fn create_project(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW_PROJECT.check(&body.0)?;
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

fn blank(app: &App) -> project::Model {
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

fn apply(mut members: Members, row: &mut project::Model) {
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

async fn insert(
    tx: &DatabaseTransaction,
    mut row: project::Model,
) -> Result<project::Model, ApiError> {
    if !row.is_domain {
        find_domain(tx, &row.domain_id).await?;
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

async fn update_project(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED_PROJECT.check(&body.0)?;
    let row = change(&app, id, body.0, "project").await?;
    let mut view = project_view(&ctx, &row);
    view["extra"] = object(&row.extra).into();
    Ok(Json(json!({ "project": view })))
}

async fn update_domain(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED_DOMAIN.check(&body.0)?;
    let row = change(&app, id, body.0, "domain").await?;
    Ok(Json(json!({"domain": domain_view(&ctx, &row)})))
}

async fn change(
    app: &App,
    id: String,
    body: Value,
    kind: &'static str,
) -> Result<project::Model, ApiError> {
    store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.clone());
        Box::pin(async move {
            let row = match kind {
                "domain" => find_domain(tx, &id).await?,
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

async fn delete_project(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
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

async fn remove(tx: &DatabaseTransaction, id: &str) -> Result<(), ApiError> {
    assignment::Entity::delete_many()
        .filter(assignment::Column::TargetId.eq(id))
        .exec(tx)
        .await?;
    project::Entity::delete_by_id(id).exec(tx).await?;
    Ok(())
}

async fn list_tags(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = readable(&app, &caller, &id, "identity:list_project_tags").await?;
    let mut tags = tags_of(&row);
    tags.sort();
    Ok(Json(
        json!({"links": {"self": ctx.link("/v3")}, "tags": tags}),
    ))
}

async fn has_tag(
    State(app): State<App>,
    caller: Caller,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let row = readable(&app, &caller, &id, "identity:get_project_tag").await?;
    if tags_of(&row).contains(&tag) {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(no_tag(&tag))
}

fn no_tag(tag: &str) -> ApiError {
    ApiError::not_found(format!("Could not find project tag: {tag}."))
}

async fn set_tags(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    TAGS.check(&body.0)?;
    let tags: Vec<String> =
        serde_json::from_value(body.0["tags"].clone()).map_err(ApiError::internal)?;
    let shown = tags.clone();
    edit_tags(&app, id, move |_| Ok(tags.clone())).await?;
    Ok(Json(
        json!({"links": {"self": ctx.link("/v3")}, "tags": shown}),
    ))
}

async fn clear_tags(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    edit_tags(&app, id, |_| Ok(Vec::new())).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn add_tag(
    State(app): State<App>,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    TAGS.check(&json!({ "tags": [tag] }))?;
    edit_tags(&app, id, move |mut tags| {
        if !tags.contains(&tag) {
            tags.push(tag.clone());
        }
        Ok(tags)
    })
    .await?;
    Ok(StatusCode::CREATED)
}

async fn drop_tag(
    State(app): State<App>,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    edit_tags(&app, id, move |mut tags| {
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

async fn edit_tags(
    app: &App,
    id: String,
    edit: impl Fn(Vec<String>) -> Result<Vec<String>, ApiError> + Send + Sync + 'static,
) -> Result<(), ApiError> {
    let edit = std::sync::Arc::new(edit);
    store::change(app.database(), move |tx| {
        let (id, edit) = (id.clone(), std::sync::Arc::clone(&edit));
        Box::pin(async move {
            let mut row = find(tx, &id).await?;
            row.tags = json!(edit(tags_of(&row))?).to_string();
            row.into_active_model().reset_all().update(tx).await?;
            Ok(())
        })
    })
    .await
}

async fn list_domains(
    State(app): State<App>,
    ctx: RequestContext,
    query: Query,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let rows = project::Entity::find()
        .filter(project::Column::IsDomain.eq(true))
        .order_by_asc(project::Column::Id)
        .all(app.database().reader())
        .await?;
    let items = rows.iter().map(|row| domain_view(&ctx, row)).collect();
    let asked = Asked {
        ctx: &ctx,
        uri: &uri,
        query: &query,
    };
    Ok(Json(asked.list("domains", &["name", "enabled"], items)))
}

async fn show_domain(
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
        return Err(not_allowed("identity:get_domain"));
    }
    let row = find_domain(app.database().reader(), &id).await?;
    Ok(Json(json!({"domain": domain_view(&ctx, &row)})))
}

async fn create_domain(
    State(app): State<App>,
    ctx: RequestContext,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW_DOMAIN.check(&body.0)?;
    let mut row = blank(&app);
    row.is_domain = true;
    apply(Members::of(body.0, "domain")?, &mut row);
    let row = store::change(app.database(), move |tx| {
        let row = row.clone();
        Box::pin(async move { insert(tx, row).await })
    })
    .await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"domain": domain_view(&ctx, &row)})),
    ))
}

/// With all that is in it.
async fn delete_domain(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            if find_domain(tx, &id).await?.enabled {
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
            let projects = project::Entity::find()
                .filter(project::Column::DomainId.eq(&id))
                .all(tx)
                .await?;
            for row in projects {
                remove(tx, &row.id).await?;
            }
            let roles = role::Entity::find()
                .filter(role::Column::DomainId.eq(&id))
                .all(tx)
                .await?;
            for row in roles {
                super::role::remove(tx, &row.id).await?;
            }
            remove(tx, &id).await
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
