//! Identity's rows: the questions that logins and validations ask, and the one way to change them.

use std::collections::{BTreeSet, HashMap};

use futures::future::BoxFuture;
use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter};

use crate::database::Database;
use crate::http::{ApiError, Domain, Project, Role};
use crate::identity::model::{
    Target, assignment, implied_role, project, revision, revocation, role, user,
};

/// Changes identity's rows in one transaction that raises the revision too.
pub async fn change<T, F>(db: &Database, body: F) -> Result<T, ApiError>
where
    F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, ApiError>>
        + Send
        + Sync
        + 'static,
    T: Send + 'static,
{
    let body = std::sync::Arc::new(body);
    db.write(move |tx| {
        let body = std::sync::Arc::clone(&body);
        Box::pin(async move {
            let done = body(tx).await?;
            raise_revision(tx).await?;
            Ok(done)
        })
    })
    .await
}

async fn raise_revision(tx: &DatabaseTransaction) -> Result<(), DbErr> {
    let raised = revision::Entity::update_many()
        .col_expr(
            revision::Column::Revision,
            Expr::col(revision::Column::Revision).add(1),
        )
        .filter(revision::Column::Id.eq(1))
        .exec(tx)
        .await?;
    if raised.rows_affected == 0 {
        let first = revision::ActiveModel {
            id: sea_orm::Set(1),
            revision: sea_orm::Set(1),
        };
        revision::Entity::insert(first).exec(tx).await?;
    }
    Ok(())
}

/// The revision of identity's rows; 0 before the first boot.
pub async fn current_revision(db: &impl ConnectionTrait) -> Result<i64, DbErr> {
    let row = revision::Entity::find_by_id(1).one(db).await?;
    Ok(row.map_or(0, |row| row.revision))
}

pub async fn is_revoked(db: &impl ConnectionTrait, audit_id: &str) -> Result<bool, DbErr> {
    Ok(revocation::Entity::find_by_id(audit_id)
        .one(db)
        .await?
        .is_some())
}

pub async fn user_by_name(
    db: &impl ConnectionTrait,
    domain_id: &str,
    name: &str,
) -> Result<Option<user::Model>, DbErr> {
    let found = user::Entity::find()
        .filter(user::Column::DomainId.eq(domain_id))
        .filter(user::Column::Name.eq(name));
    found.one(db).await
}

pub async fn project_by_name(
    db: &impl ConnectionTrait,
    domain_id: &str,
    name: &str,
) -> Result<Option<project::Model>, DbErr> {
    let found = project::Entity::find()
        .filter(project::Column::DomainId.eq(domain_id))
        .filter(project::Column::Name.eq(name));
    found.one(db).await
}

/// The domain of that id, as long as it is a domain and enabled.
pub async fn domain(db: &impl ConnectionTrait, id: &str) -> Result<Option<Domain>, DbErr> {
    let row = project::Entity::find_by_id(id).one(db).await?;
    let row = row.filter(|row| row.is_domain && row.enabled);
    Ok(row.map(|row| Domain {
        id: row.id,
        name: row.name,
    }))
}

/// The project of that id with its domain, as long as both are enabled.
pub async fn enabled_project(
    db: &impl ConnectionTrait,
    id: &str,
) -> Result<Option<Project>, DbErr> {
    let row = project::Entity::find_by_id(id).one(db).await?;
    let Some(row) = row.filter(|row| row.enabled && !row.is_domain) else {
        return Ok(None);
    };
    let domain = domain(db, &row.domain_id).await?;
    Ok(domain.map(|domain| Project {
        id: row.id,
        name: row.name,
        domain,
    }))
}

/// The roles of a user on a target, with those that they imply, by name.
pub async fn roles_of(
    db: &impl ConnectionTrait,
    user_id: &str,
    target: &Target,
) -> Result<Vec<Role>, DbErr> {
    let (kind, id) = target.columns();
    let assigned = assignment::Entity::find()
        .filter(assignment::Column::TargetId.eq(id))
        .filter(assignment::Column::TargetKind.eq(kind))
        .filter(assignment::Column::ActorId.eq(user_id))
        .all(db)
        .await?;
    if assigned.is_empty() {
        return Ok(Vec::new());
    }
    let implied = Implied::read(db).await?;
    let ids = implied.closure(assigned.into_iter().map(|row| row.role_id));
    let found = role::Entity::find()
        .filter(role::Column::Id.is_in(ids))
        .all(db)
        .await?;
    let mut roles: Vec<_> = found
        .into_iter()
        .map(|role| Role {
            id: role.id,
            name: role.name,
        })
        .collect();
    roles.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(roles)
}

/// Which roles bring which others.
#[derive(Debug, Default)]
pub struct Implied(HashMap<String, Vec<String>>);

impl Implied {
    pub async fn read(db: &impl ConnectionTrait) -> Result<Self, DbErr> {
        let mut implied: HashMap<String, Vec<String>> = HashMap::new();
        for row in implied_role::Entity::find().all(db).await? {
            implied
                .entry(row.prior_role_id)
                .or_default()
                .push(row.implied_role_id);
        }
        Ok(Self(implied))
    }

    /// The roles and all that they imply, to any depth.
    pub fn closure(&self, roles: impl Iterator<Item = String>) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let mut todo: Vec<String> = roles.collect();
        while let Some(role) = todo.pop() {
            if all.insert(role.clone()) {
                todo.extend(self.0.get(&role).into_iter().flatten().cloned());
            }
        }
        all
    }
}

/// The targets that a user has any role on.
pub async fn targets_of(db: &impl ConnectionTrait, user_id: &str) -> Result<Vec<Target>, DbErr> {
    let rows = assignment::Entity::find()
        .filter(assignment::Column::ActorId.eq(user_id))
        .all(db)
        .await?;
    let mut targets: Vec<_> = rows
        .into_iter()
        .filter_map(|row| match row.target_kind.as_str() {
            "project" => Some(Target::Project(row.target_id)),
            "domain" => Some(Target::Domain(row.target_id)),
            "system" => Some(Target::System),
            _ => None,
        })
        .collect();
    targets.dedup();
    Ok(targets)
}
