//! Who has which role where.

use std::collections::HashMap;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter,
    QueryOrder,
};
use serde_json::{Map, Value, json};

use super::domain;
use super::list::{Asked, flag};
use super::{role as roles, user as users};
use crate::http::{ApiError, App, RequestContext, Routes, Rule};
use crate::identity::model::{Target, assignment, project, role, user};
use crate::identity::store::{self, Implied};

const PROJECT: &str = "/v3/projects/{project}/users/{user}/roles";
const PROJECT_ROLE: &str = "/v3/projects/{project}/users/{user}/roles/{role}";
const DOMAIN: &str = "/v3/domains/{domain}/users/{user}/roles";
const DOMAIN_ROLE: &str = "/v3/domains/{domain}/users/{user}/roles/{role}";
const SYSTEM: &str = "/v3/system/users/{user}/roles";
const SYSTEM_ROLE: &str = "/v3/system/users/{user}/roles/{role}";

pub fn routes(mut routes: Routes) -> Routes {
    for path in [PROJECT, DOMAIN, SYSTEM] {
        routes = routes.get(path, Rule::admin("identity:list_grants"), list);
    }
    for path in [PROJECT_ROLE, DOMAIN_ROLE, SYSTEM_ROLE] {
        routes = routes
            .get(path, Rule::admin("identity:check_grant"), check)
            .put(path, Rule::admin("identity:create_grant"), add)
            .delete(path, Rule::admin("identity:revoke_grant"), drop_role);
    }
    routes.get(
        "/v3/role_assignments",
        Rule::admin("identity:list_role_assignments"),
        assignments,
    )
}

/// The names in the path: a user on a target, and for most requests a role.
struct Grant {
    user_id: String,
    target: Target,
    role_id: String,
}

impl Grant {
    fn of(mut names: HashMap<String, String>) -> Self {
        let mut take = |name: &str| names.remove(name);
        let target = match (take("project"), take("domain")) {
            (Some(project), _) => Target::Project(project),
            (None, Some(domain)) => Target::Domain(domain),
            (None, None) => Target::System,
        };
        Self {
            target,
            user_id: take("user").unwrap_or_default(),
            role_id: take("role").unwrap_or_default(),
        }
    }

    fn key(&self) -> (String, String, String, String) {
        let (kind, id) = self.target.columns();
        (
            self.user_id.clone(),
            kind.to_owned(),
            id.to_owned(),
            self.role_id.clone(),
        )
    }

    /// 404 unless user and target exist, and the role where one is named.
    async fn exists(&self, db: &impl ConnectionTrait) -> Result<(), ApiError> {
        match &self.target {
            Target::Project(id) => {
                let row = project::Entity::find_by_id(id).one(db).await?;
                row.ok_or_else(|| ApiError::not_found(format!("Could not find project: {id}.")))?;
            }
            Target::Domain(id) => {
                let row = project::Entity::find_by_id(id).one(db).await?;
                row.filter(|row| row.is_domain)
                    .ok_or_else(|| domain::missing(id))?;
            }
            Target::System => {}
        }
        users::find(db, &self.user_id).await?;
        if !self.role_id.is_empty() {
            roles::find(db, &self.role_id).await?;
        }
        Ok(())
    }

    fn none(&self) -> ApiError {
        let (_, target) = self.target.columns();
        ApiError::not_found(format!(
            "Could not find role assignment with role: {}, user or group: {}, project, domain, or \
             system: {target}.",
            self.role_id, self.user_id
        ))
    }
}

type Names = Path<HashMap<String, String>>;

async fn list(
    State(app): State<App>,
    Path(names): Names,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let grant = Grant::of(names);
    let db = app.database().reader();
    grant.exists(db).await?;
    let (kind, id) = grant.target.columns();
    let rows = assignment::Entity::find()
        .filter(assignment::Column::TargetId.eq(id))
        .filter(assignment::Column::TargetKind.eq(kind))
        .filter(assignment::Column::ActorId.eq(&grant.user_id))
        .all(db)
        .await?;
    let ids = rows.into_iter().map(|row| row.role_id);
    let found = role::Entity::find().filter(role::Column::Id.is_in(ids));
    let rows = found.order_by_asc(role::Column::Id).all(db).await?;
    let items = rows
        .iter()
        .map(|row| roles::view(&asked.ctx, row))
        .collect();
    Ok(asked.list("roles", &["name"], items))
}

async fn check(State(app): State<App>, Path(names): Names) -> Result<StatusCode, ApiError> {
    let grant = Grant::of(names);
    let db = app.database().reader();
    grant.exists(db).await?;
    let row = assignment::Entity::find_by_id(grant.key()).one(db).await?;
    row.map(|_| StatusCode::NO_CONTENT)
        .ok_or_else(|| grant.none())
}

async fn add(State(app): State<App>, Path(names): Names) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let grant = Grant::of(names.clone());
        Box::pin(async move {
            grant.exists(tx).await?;
            if assignment::Entity::find_by_id(grant.key())
                .one(tx)
                .await?
                .is_none()
            {
                let (actor_id, target_kind, target_id, role_id) = grant.key();
                let row = assignment::Model {
                    actor_id,
                    target_kind,
                    target_id,
                    role_id,
                };
                row.into_active_model().insert(tx).await?;
            }
            Ok(StatusCode::NO_CONTENT)
        })
    })
    .await
}

async fn drop_role(State(app): State<App>, Path(names): Names) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let grant = Grant::of(names.clone());
        Box::pin(async move {
            grant.exists(tx).await?;
            let gone = assignment::Entity::delete_by_id(grant.key())
                .exec(tx)
                .await?;
            if gone.rows_affected == 0 {
                return Err(grant.none());
            }
            Ok(StatusCode::NO_CONTENT)
        })
    })
    .await
}

/// Everything that names are shown from.
struct Known {
    users: HashMap<String, user::Model>,
    projects: HashMap<String, project::Model>,
    roles: HashMap<String, role::Model>,
}

async fn assignments(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let db = app.database().reader();
    let effective = flag(&asked.query, "effective");
    let mut found = assignment::Entity::find();
    if let Some(user) = asked.query.get("user.id") {
        found = found.filter(assignment::Column::ActorId.eq(user));
    }
    for (name, kind) in [
        ("scope.project.id", "project"),
        ("scope.domain.id", "domain"),
    ] {
        if let Some(id) = asked.query.get(name) {
            found = found
                .filter(assignment::Column::TargetKind.eq(kind))
                .filter(assignment::Column::TargetId.eq(id));
        }
    }
    if flag(&asked.query, "scope.system") {
        found = found.filter(assignment::Column::TargetKind.eq("system"));
    }
    let rows = if asked.query.contains("group.id") {
        Vec::new()
    } else {
        found.all(db).await?
    };
    let rows = if effective {
        expanded(db, rows).await?
    } else {
        direct(rows)
    };
    let rows = rows.into_iter().filter(|row| {
        asked
            .query
            .get("role.id")
            .is_none_or(|id| row.role_id == id)
    });
    let names = if flag(&asked.query, "include_names") {
        Some(read_names(db).await?)
    } else {
        None
    };
    let items: Vec<Value> = rows
        .map(|row| shown(&asked.ctx, &row, names.as_ref()))
        .collect();
    let links = asked.links(None);
    Ok(Json(json!({"role_assignments": items, "links": links})))
}

/// An assignment, with the role that it follows from if that is another.
struct Shown {
    row: assignment::Model,
    role_id: String,
}

fn direct(rows: Vec<assignment::Model>) -> Vec<Shown> {
    rows.into_iter()
        .map(|row| Shown {
            role_id: row.role_id.clone(),
            row,
        })
        .collect()
}

async fn expanded(
    db: &impl ConnectionTrait,
    rows: Vec<assignment::Model>,
) -> Result<Vec<Shown>, ApiError> {
    let implied = Implied::read(db).await?;
    let mut all = Vec::new();
    for row in rows {
        for role_id in implied.closure(std::iter::once(row.role_id.clone())) {
            all.push(Shown {
                role_id,
                row: row.clone(),
            });
        }
    }
    Ok(all)
}

async fn read_names(db: &impl ConnectionTrait) -> Result<Known, ApiError> {
    let users = user::Entity::find().all(db).await?;
    let projects = project::Entity::find().all(db).await?;
    let roles = role::Entity::find().all(db).await?;
    Ok(Known {
        users: users.into_iter().map(|row| (row.id.clone(), row)).collect(),
        projects: projects
            .into_iter()
            .map(|row| (row.id.clone(), row))
            .collect(),
        roles: roles.into_iter().map(|row| (row.id.clone(), row)).collect(),
    })
}

fn shown(ctx: &RequestContext, shown: &Shown, names: Option<&Known>) -> Value {
    let row = &shown.row;
    let at = match row.target_kind.as_str() {
        "project" => format!("projects/{}", row.target_id),
        "domain" => format!("domains/{}", row.target_id),
        _ => "system".to_owned(),
    };
    let link = format!("/v3/{at}/users/{}/roles/{}", row.actor_id, row.role_id);
    let mut links = Map::new();
    links.insert("assignment".into(), ctx.link(&link).into());
    if shown.role_id != row.role_id {
        let prior = ctx.link(&format!(
            "/v3/prior_roles/{}/implies/{}",
            row.role_id, shown.role_id
        ));
        links.insert("prior_role".into(), prior.into());
    }
    let domain = |id: &str| {
        let name = names
            .and_then(|names| names.projects.get(id))
            .map(|row| row.name.clone());
        json!({"id": id, "name": name})
    };
    let mut user = json!({"id": row.actor_id});
    let mut role = json!({"id": shown.role_id});
    let mut target = json!({"id": row.target_id});
    if let Some(names) = names {
        if let Some(known) = names.users.get(&row.actor_id) {
            user["name"] = known.name.clone().into();
            user["domain"] = domain(&known.domain_id);
        }
        if let Some(known) = names.roles.get(&shown.role_id) {
            role["name"] = known.name.clone().into();
        }
        if let Some(known) = names.projects.get(&row.target_id) {
            target["name"] = known.name.clone().into();
            if !known.is_domain {
                target["domain"] = domain(&known.domain_id);
            }
        }
    }
    let scope = match row.target_kind.as_str() {
        "system" => json!({"system": {"all": true}}),
        kind => json!({ kind: target }),
    };
    json!({"links": links, "scope": scope, "user": user, "role": role})
}
