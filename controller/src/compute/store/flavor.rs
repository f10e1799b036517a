//! Flavors and who may use the private ones.

use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Condition, Expr, ExprTrait, Query};
use sea_orm::{ActiveValue::Set, ConnectionTrait, IntoActiveModel, Order, QueryOrder, QuerySelect};

use crate::compute::model::flavor::{ExtraSpecs, FlavorSnapshot};

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "flavor")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub id: String,
    #[sea_orm(column_type = "Text")]
    pub name: String,
    pub vcpus: i32,
    /// MiB.
    pub ram: i64,
    /// GiB.
    pub disk: i64,
    pub ephemeral: i64,
    /// MiB.
    pub swap: i64,
    pub rxtx_factor: f64,
    pub is_public: bool,
    pub disabled: bool,
    #[sea_orm(column_type = "Text", nullable)]
    pub description: Option<String>,
    /// JSON object of strings.
    #[sea_orm(column_type = "Text")]
    pub extra_specs: String,
    pub created_at_us: i64,
    pub updated_at_us: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    pub fn extra_specs(&self) -> ExtraSpecs {
        serde_json::from_str(&self.extra_specs).unwrap_or_default()
    }

    pub fn snapshot(&self) -> FlavorSnapshot {
        FlavorSnapshot {
            id: self.id.clone(),
            name: self.name.clone(),
            vcpus: u32::try_from(self.vcpus).unwrap_or_default(),
            ram: u64::try_from(self.ram).unwrap_or_default(),
            disk: u64::try_from(self.disk).unwrap_or_default(),
            ephemeral: u64::try_from(self.ephemeral).unwrap_or_default(),
            swap: u64::try_from(self.swap).unwrap_or_default(),
            extra_specs: self.extra_specs(),
        }
    }
}

pub mod access {
    //! A project that may use a private flavor.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "flavor_access")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
        pub flavor_id: String,
        #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
        pub project_id: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Which flavors a list shows.
#[derive(Debug, Clone)]
pub enum Visible {
    All,
    /// Public ones only.
    Public,
    /// Private ones only.
    Private,
    /// Public ones, and those that this project was given.
    To(String),
}

#[derive(Debug, Clone)]
pub struct Filter {
    pub visible: Visible,
    pub least_ram: i64,
    pub least_disk: i64,
}

/// What flavors can be sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SortKey {
    Id,
    Name,
    Ram,
    Vcpus,
    Disk,
    Swap,
    Ephemeral,
    Created,
    Updated,
}

impl SortKey {
    /// By the column's name in nova.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "flavorid" | "id" => Self::Id,
            "name" => Self::Name,
            "memory_mb" => Self::Ram,
            "vcpus" => Self::Vcpus,
            "root_gb" => Self::Disk,
            "swap" => Self::Swap,
            "ephemeral_gb" => Self::Ephemeral,
            "created_at" => Self::Created,
            "updated_at" => Self::Updated,
            "disabled" | "is_public" | "rxtx_factor" | "vcpu_weight" => Self::Id,
            _ => return None,
        })
    }

    fn column(self) -> Column {
        match self {
            Self::Id => Column::Id,
            Self::Name => Column::Name,
            Self::Ram => Column::Ram,
            Self::Vcpus => Column::Vcpus,
            Self::Disk => Column::Disk,
            Self::Swap => Column::Swap,
            Self::Ephemeral => Column::Ephemeral,
            Self::Created => Column::CreatedAtUs,
            Self::Updated => Column::UpdatedAtUs,
        }
    }
}

fn visible(visible: &Visible) -> Condition {
    match visible {
        Visible::All => Condition::all(),
        Visible::Public => Condition::all().add(Column::IsPublic.eq(true)),
        Visible::Private => Condition::all().add(Column::IsPublic.eq(false)),
        Visible::To(project) => Condition::any().add(Column::IsPublic.eq(true)).add(
            Column::Id.in_subquery(
                Query::select()
                    .column(access::Column::FlavorId)
                    .from(access::Entity)
                    .and_where(access::Column::ProjectId.eq(project.clone()))
                    .to_owned(),
            ),
        ),
    }
}

/// A page of flavors after `marker`, one more than `limit` when there are more.
pub async fn list(
    connection: &impl ConnectionTrait,
    filter: &Filter,
    sort: SortKey,
    descending: bool,
    marker: Option<&Model>,
    limit: u64,
) -> Result<Vec<Model>, DbErr> {
    let order = if descending { Order::Desc } else { Order::Asc };
    let column = sort.column();
    let mut query = Entity::find()
        .filter(visible(&filter.visible))
        .filter(Column::Disabled.eq(false))
        .filter(Column::Ram.gte(filter.least_ram))
        .filter(Column::Disk.gte(filter.least_disk))
        .order_by(column, order.clone())
        .order_by(Column::Id, order)
        .limit(limit);
    if let Some(marker) = marker {
        let value = marker.get(column);
        let (beyond, tie) = if descending {
            (
                Expr::col(column).lt(value.clone()),
                Column::Id.lt(marker.id.clone()),
            )
        } else {
            (
                Expr::col(column).gt(value.clone()),
                Column::Id.gt(marker.id.clone()),
            )
        };
        query = query.filter(
            Condition::any()
                .add(beyond)
                .add(Condition::all().add(Expr::col(column).eq(value)).add(tie)),
        );
    }
    query.all(connection).await
}

/// A flavor that `project` may see (`None`: any).
pub async fn find(
    connection: &impl ConnectionTrait,
    id: &str,
    project: Option<&str>,
) -> Result<Option<Model>, DbErr> {
    let seen = match project {
        Some(project) => visible(&Visible::To(project.to_owned())),
        None => Condition::all(),
    };
    Entity::find_by_id(id.to_owned())
        .filter(seen)
        .one(connection)
        .await
}

pub async fn by_name(
    connection: &impl ConnectionTrait,
    name: &str,
) -> Result<Option<Model>, DbErr> {
    Entity::find()
        .filter(Column::Name.eq(name))
        .one(connection)
        .await
}

pub async fn insert(connection: &impl ConnectionTrait, row: Model) -> Result<(), DbErr> {
    Entity::insert(row.into_active_model())
        .exec_without_returning(connection)
        .await
        .map(|_| ())
}

pub async fn delete(connection: &impl ConnectionTrait, id: &str) -> Result<(), DbErr> {
    access::Entity::delete_many()
        .filter(access::Column::FlavorId.eq(id))
        .exec(connection)
        .await?;
    Entity::delete_by_id(id.to_owned())
        .exec(connection)
        .await
        .map(|_| ())
}

pub async fn set_description(
    connection: &impl ConnectionTrait,
    id: &str,
    description: Option<String>,
    now_us: i64,
) -> Result<(), DbErr> {
    let change = ActiveModel {
        description: Set(description),
        updated_at_us: Set(Some(now_us)),
        ..Default::default()
    };
    Entity::update_many()
        .set(change)
        .filter(Column::Id.eq(id))
        .exec(connection)
        .await
        .map(|_| ())
}

pub async fn set_extra_specs(
    connection: &impl ConnectionTrait,
    id: &str,
    specs: &ExtraSpecs,
) -> Result<(), DbErr> {
    let text = serde_json::to_string(specs).map_err(|error| DbErr::Custom(error.to_string()))?;
    let change = ActiveModel {
        extra_specs: Set(text),
        ..Default::default()
    };
    Entity::update_many()
        .set(change)
        .filter(Column::Id.eq(id))
        .exec(connection)
        .await
        .map(|_| ())
}

/// Projects with access to a private flavor.
pub async fn projects(connection: &impl ConnectionTrait, id: &str) -> Result<Vec<String>, DbErr> {
    let rows = access::Entity::find()
        .filter(access::Column::FlavorId.eq(id))
        .order_by_asc(access::Column::ProjectId)
        .all(connection)
        .await?;
    Ok(rows.into_iter().map(|row| row.project_id).collect())
}

pub async fn grant(
    connection: &impl ConnectionTrait,
    id: &str,
    project: &str,
) -> Result<(), DbErr> {
    let row = access::Model {
        flavor_id: id.to_owned(),
        project_id: project.to_owned(),
    };
    access::Entity::insert(row.into_active_model())
        .exec_without_returning(connection)
        .await
        .map(|_| ())
}

/// True if there was an access to take away.
pub async fn revoke(
    connection: &impl ConnectionTrait,
    id: &str,
    project: &str,
) -> Result<bool, DbErr> {
    let gone = access::Entity::delete_by_id((id.to_owned(), project.to_owned()))
        .exec(connection)
        .await?;
    Ok(gone.rows_affected > 0)
}
