//! Servers' rows: what was asked for, and where it stands. Who owns the machine and what an agent
//! said of it is in `machine` (see [`crate::agents`]).

use std::collections::BTreeMap;

use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Condition, Expr, ExprTrait, SimpleExpr};
use sea_orm::{ConnectionTrait, IntoActiveModel, Order, QueryOrder, QuerySelect};

use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::model::server::BootPlan;
use crate::compute::model::state::ServerState;

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "server")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub id: String,
    #[sea_orm(column_type = "Text")]
    pub project_id: String,
    #[sea_orm(column_type = "Text")]
    pub user_id: String,
    #[sea_orm(column_type = "Text")]
    pub name: String,
    #[sea_orm(column_type = "Text", nullable)]
    pub description: Option<String>,
    #[sea_orm(column_type = "Text")]
    pub hostname: String,
    /// [`ServerState::key`].
    #[sea_orm(column_type = "Text")]
    pub state: String,
    /// JSON of [`FlavorSnapshot`].
    #[sea_orm(column_type = "Text")]
    pub flavor: String,
    #[sea_orm(column_type = "Text")]
    pub flavor_id: String,
    /// Of the flavor, once more: what quotas count.
    pub vcpus: i32,
    /// MiB.
    pub ram: i64,
    #[sea_orm(column_type = "Text")]
    pub image_id: String,
    #[sea_orm(column_type = "Text")]
    pub kernel_id: String,
    #[sea_orm(column_type = "Text")]
    pub ramdisk_id: String,
    /// JSON of [`BootPlan`].
    #[sea_orm(column_type = "Text")]
    pub boot: String,
    /// JSON object of strings.
    #[sea_orm(column_type = "Text")]
    pub metadata: String,
    /// JSON array of strings, sorted.
    #[sea_orm(column_type = "Text")]
    pub tags: String,
    #[sea_orm(column_type = "Text", nullable)]
    pub key_name: Option<String>,
    /// Base64, as it was given.
    #[sea_orm(column_type = "Text", nullable)]
    pub user_data: Option<String>,
    /// JSON array of `{path, contents}`.
    #[sea_orm(column_type = "Text")]
    pub personality: String,
    #[sea_orm(column_type = "Text")]
    pub availability_zone: String,
    /// The zone that was asked for, if one was.
    #[sea_orm(column_type = "Text", nullable)]
    pub pinned_zone: Option<String>,
    /// `True` or empty.
    #[sea_orm(column_type = "Text")]
    pub config_drive: String,
    /// `AUTO` or `MANUAL`.
    #[sea_orm(column_type = "Text")]
    pub disk_config: String,
    #[sea_orm(column_type = "Text")]
    pub access_ip_v4: String,
    #[sea_orm(column_type = "Text")]
    pub access_ip_v6: String,
    #[sea_orm(column_type = "Text")]
    pub reservation_id: String,
    pub launch_index: i32,
    /// `owner` or `admin`.
    #[sea_orm(column_type = "Text", nullable)]
    pub locked_by: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub locked_reason: Option<String>,
    /// JSON array of strings.
    #[sea_orm(column_type = "Text", nullable)]
    pub trusted_certificates: Option<String>,
    /// JSON object.
    #[sea_orm(column_type = "Text")]
    pub scheduler_hints: String,
    /// The image that has its disk while it is shelved.
    #[sea_orm(column_type = "Text", nullable)]
    pub shelved_image_id: Option<String>,
    pub fault_code: Option<i32>,
    #[sea_orm(column_type = "Text", nullable)]
    pub fault_message: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub fault_details: Option<String>,
    pub fault_at_us: Option<i64>,
    pub created_at_us: i64,
    pub updated_at_us: i64,
    pub launched_at_us: Option<i64>,
    pub terminated_at_us: Option<i64>,
    pub deleted_at_us: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    /// A state that this build does not know (written by a newer one) reads as an error.
    pub fn state(&self) -> ServerState {
        ServerState::from_key(&self.state).unwrap_or(ServerState::Error)
    }

    pub fn flavor(&self) -> Result<FlavorSnapshot, DbErr> {
        serde_json::from_str(&self.flavor).map_err(|error| unreadable(&self.id, "flavor", error))
    }

    pub fn boot(&self) -> Result<BootPlan, DbErr> {
        serde_json::from_str(&self.boot).map_err(|error| unreadable(&self.id, "boot", error))
    }

    pub fn metadata(&self) -> BTreeMap<String, String> {
        serde_json::from_str(&self.metadata).unwrap_or_default()
    }

    pub fn tags(&self) -> Vec<String> {
        serde_json::from_str(&self.tags).unwrap_or_default()
    }
}

fn unreadable(id: &str, what: &str, error: serde_json::Error) -> DbErr {
    DbErr::Custom(format!("the {what} of server {id} cannot be read: {error}"))
}

/// Which servers a list shows; every field narrows it.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub project: Option<String>,
    /// Deleted ones instead of those that are there; `None`: both.
    pub deleted: Option<bool>,
    pub states: Option<Vec<ServerState>>,
    /// Owned by this host, by its id; `Some(None)`: by no host that there is.
    pub host: Option<Option<String>>,
    /// Column and value.
    pub equal: Vec<(Column, sea_orm::Value)>,
    /// A column is, or is not, null.
    pub present: Vec<(Column, bool)>,
    /// Column and a `LIKE` pattern (escape `\`).
    pub like: Vec<(Column, String)>,
    pub changed_since_us: Option<i64>,
    pub changed_before_us: Option<i64>,
    pub tags: Vec<String>,
    pub tags_any: Vec<String>,
    pub not_tags: Vec<String>,
    pub not_tags_any: Vec<String>,
    pub metadata: Vec<(String, String)>,
    /// Nothing can match.
    pub nothing: bool,
}

/// One sort key.
#[derive(Debug, Clone, Copy)]
pub struct Sort {
    pub column: Column,
    pub descending: bool,
}

/// A page of servers after `marker` in the order of `sorts`; the last of them must be the id.
pub async fn list(
    connection: &impl ConnectionTrait,
    filter: &Filter,
    sorts: &[Sort],
    marker: Option<&Model>,
    limit: u64,
) -> Result<Vec<Model>, DbErr> {
    if filter.nothing {
        return Ok(Vec::new());
    }
    let mut query = Entity::find().filter(condition(filter)).limit(limit);
    for sort in sorts {
        let order = if sort.descending {
            Order::Desc
        } else {
            Order::Asc
        };
        query = query.order_by(sortable(sort.column), order);
    }
    if let Some(marker) = marker {
        query = query.filter(after(sorts, marker));
    }
    query.all(connection).await
}

/// Null sorts as empty, alike on both engines.
fn sortable(column: Column) -> SimpleExpr {
    let value = Expr::col((Entity, column));
    match column {
        Column::Description | Column::KeyName | Column::LockedBy => Expr::expr(value).if_null(""),
        Column::LaunchedAtUs | Column::TerminatedAtUs => Expr::expr(value).if_null(0_i64),
        _ => value,
    }
}

fn sort_value(column: Column, marker: &Model) -> SimpleExpr {
    let text = |text: &Option<String>| Expr::value(text.clone().unwrap_or_default());
    match column {
        Column::Description => text(&marker.description),
        Column::KeyName => text(&marker.key_name),
        Column::LockedBy => text(&marker.locked_by),
        Column::LaunchedAtUs => Expr::value(marker.launched_at_us.unwrap_or_default()),
        Column::TerminatedAtUs => Expr::value(marker.terminated_at_us.unwrap_or_default()),
        column => Expr::value(marker.get(column)),
    }
}

/// Rows beyond `marker`: beyond in the first key, or alike in it and beyond in the next, and so on.
fn after(sorts: &[Sort], marker: &Model) -> Condition {
    let mut beyond = Condition::any();
    for (at, sort) in sorts.iter().enumerate() {
        let mut case = Condition::all();
        for tied in &sorts[..at] {
            case = case.add(sortable(tied.column).eq(sort_value(tied.column, marker)));
        }
        let (left, right) = (sortable(sort.column), sort_value(sort.column, marker));
        case = case.add(if sort.descending {
            left.lt(right)
        } else {
            left.gt(right)
        });
        beyond = beyond.add(case);
    }
    beyond
}

fn condition(filter: &Filter) -> Condition {
    let mut all = Condition::all();
    if let Some(project) = &filter.project {
        all = all.add(Column::ProjectId.eq(project.clone()));
    }
    if let Some(deleted) = filter.deleted {
        let column = Column::DeletedAtUs;
        all = all.add(if deleted {
            column.is_not_null()
        } else {
            column.is_null()
        });
    }
    if let Some(states) = &filter.states {
        all = all.add(Column::State.is_in(states.iter().map(|state| state.key())));
    }
    if let Some(host) = &filter.host {
        let owned = sea_orm::sea_query::Query::select()
            .column("server_id")
            .from("machine")
            .and_where(Expr::col("host_id").eq(host.clone().unwrap_or_default()))
            .to_owned();
        all = all.add(Column::Id.in_subquery(owned));
    }
    for (column, value) in &filter.equal {
        all = all.add(Expr::col((Entity, *column)).eq(value.clone()));
    }
    for (column, present) in &filter.present {
        all = all.add(if *present {
            column.is_not_null()
        } else {
            column.is_null()
        });
    }
    for (column, pattern) in &filter.like {
        all = all.add(like(*column, pattern.clone()));
    }
    if let Some(since) = filter.changed_since_us {
        all = all.add(Column::UpdatedAtUs.gte(since));
    }
    if let Some(before) = filter.changed_before_us {
        all = all.add(Column::UpdatedAtUs.lte(before));
    }
    let tagged = |tag: &String| like(Column::Tags, element(tag));
    for tag in &filter.tags {
        all = all.add(tagged(tag));
    }
    if !filter.tags_any.is_empty() {
        all = all.add(
            filter
                .tags_any
                .iter()
                .map(tagged)
                .fold(Condition::any(), Condition::add),
        );
    }
    if !filter.not_tags.is_empty() {
        let every = filter
            .not_tags
            .iter()
            .map(tagged)
            .fold(Condition::all(), Condition::add);
        all = all.add(every.not());
    }
    for tag in &filter.not_tags_any {
        all = all.add(tagged(tag).not());
    }
    for (name, value) in &filter.metadata {
        let pair = format!("{}:{}", json_text(name), json_text(value));
        all = all.add(like(Column::Metadata, format!("%{}%", escape_like(&pair))));
    }
    all
}

fn like(column: Column, pattern: String) -> SimpleExpr {
    Expr::col((Entity, column)).like(sea_orm::sea_query::LikeExpr::new(pattern).escape('\\'))
}

/// Matches a JSON array of strings that has `text` in it.
fn element(text: &str) -> String {
    format!("%{}%", escape_like(&json_text(text)))
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Text as a literal part of a `LIKE` pattern.
pub fn escape_like(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if matches!(letter, '\\' | '%' | '_') {
            out.push('\\');
        }
        out.push(letter);
    }
    out
}

/// A server that was not deleted.
pub async fn find(connection: &impl ConnectionTrait, id: &str) -> Result<Option<Model>, DbErr> {
    Entity::find_by_id(id.to_owned())
        .filter(Column::DeletedAtUs.is_null())
        .one(connection)
        .await
}

/// A server, deleted or not.
pub async fn find_any(connection: &impl ConnectionTrait, id: &str) -> Result<Option<Model>, DbErr> {
    Entity::find_by_id(id.to_owned()).one(connection).await
}

pub async fn insert(connection: &impl ConnectionTrait, row: Model) -> Result<(), DbErr> {
    Entity::insert(row.into_active_model())
        .exec_without_returning(connection)
        .await
        .map(|_| ())
}

/// Those whose disk is an image, or was the last time that they were unshelved.
pub async fn kept_in_images(connection: &impl ConnectionTrait) -> Result<Vec<Model>, DbErr> {
    Entity::find()
        .filter(Column::ShelvedImageId.is_not_null())
        .all(connection)
        .await
}

/// Changes the columns that are set.
pub async fn update(
    connection: &impl ConnectionTrait,
    id: &str,
    change: ActiveModel,
) -> Result<(), DbErr> {
    Entity::update_many()
        .set(change)
        .filter(Column::Id.eq(id))
        .exec(connection)
        .await
        .map(|_| ())
}

/// Moves a server from the state it was read in to another; false if it is no longer in that state.
pub async fn turn(
    connection: &impl ConnectionTrait,
    id: &str,
    from: ServerState,
    change: ActiveModel,
) -> Result<bool, DbErr> {
    let turned = Entity::update_many()
        .set(change)
        .filter(Column::Id.eq(id))
        .filter(Column::State.eq(from.key()))
        .exec(connection)
        .await?;
    Ok(turned.rows_affected > 0)
}

/// Servers, deleted or not, that were there at some time between the two moments, by project and id,
/// after `marker`.
pub async fn there_between(
    connection: &impl ConnectionTrait,
    from_us: i64,
    to_us: i64,
    project: Option<&str>,
    marker: Option<&Model>,
    limit: u64,
) -> Result<Vec<Model>, DbErr> {
    let ended_later = Condition::any()
        .add(Column::TerminatedAtUs.is_null())
        .add(Column::TerminatedAtUs.gt(from_us));
    let mut query = Entity::find()
        .filter(Column::LaunchedAtUs.lt(to_us))
        .filter(ended_later)
        .order_by_asc(Column::ProjectId)
        .order_by_asc(Column::Id)
        .limit(limit);
    if let Some(project) = project {
        query = query.filter(Column::ProjectId.eq(project));
    }
    if let Some(marker) = marker {
        let later = Condition::all()
            .add(Column::ProjectId.eq(marker.project_id.as_str()))
            .add(Column::Id.gt(marker.id.as_str()));
        let beyond = Column::ProjectId.gt(marker.project_id.as_str());
        query = query.filter(Condition::any().add(beyond).add(later));
    }
    query.all(connection).await
}
