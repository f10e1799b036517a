//! What administrators have set: limits of projects, and of the class `default`.

use std::collections::BTreeMap;

use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ConnectionTrait, IntoActiveModel};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "compute_quota")]
pub struct Model {
    /// Empty: the defaults of all projects.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub project_id: String,
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub resource: String,
    /// -1: no limit.
    pub most: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// What is set for `project`, by resource (the empty project: for all).
pub async fn of_project(
    connection: &impl ConnectionTrait,
    project: &str,
) -> Result<BTreeMap<String, i64>, DbErr> {
    let rows = Entity::find()
        .filter(Column::ProjectId.eq(project))
        .all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.resource, row.most))
        .collect())
}

pub async fn set(connection: &impl ConnectionTrait, row: Model) -> Result<(), DbErr> {
    let replace = OnConflict::columns([Column::ProjectId, Column::Resource])
        .update_column(Column::Most)
        .to_owned();
    Entity::insert(row.into_active_model())
        .on_conflict(replace)
        .exec_without_returning(connection)
        .await
        .map(|_| ())
}

/// The project has the defaults again.
pub async fn clear(connection: &impl ConnectionTrait, project: &str) -> Result<(), DbErr> {
    Entity::delete_many()
        .filter(Column::ProjectId.eq(project))
        .exec(connection)
        .await
        .map(|_| ())
}
