//! Images in the database: entities and queries. Owns the tables `image*`.

use std::collections::HashMap;

use sea_orm::sea_query::{Condition, Expr, Func, NullOrdering, Query as Sql};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DbErr, EntityTrait, IntoActiveModel, Order,
    QueryFilter, QueryOrder, QuerySelect, Set,
};

use super::blob::BlobError;
use super::model::{Image, Status};
use super::snapshot;
use crate::database::{Database, is_full};
use crate::http::{ApiError, Caller, Direction, PageRequest, after};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("reading or writing images in the database")]
    Database(#[from] DbErr),
    #[error("handling the bytes of an image")]
    Blob(#[source] BlobError),
    /// What the user is told.
    #[error("{}", .0.message())]
    Refused(ApiError),
}

impl StoreError {
    /// 413 in glance's words: `size` bytes came, `left` were left to the project.
    pub fn over_quota(size: u64, left: u64) -> Self {
        Self::Refused(ApiError::new(
            http::StatusCode::PAYLOAD_TOO_LARGE,
            format!(
                "Image exceeds the storage quota: The size of the data {size} will exceed the limit. \
                 {left} bytes remaining."
            ),
        ))
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Refused(refused) => refused,
            StoreError::Blob(BlobError::Full) => Self::new(
                http::StatusCode::PAYLOAD_TOO_LARGE,
                "Image storage media is full: There is not enough disk space on the image storage \
                 media.",
            ),
            StoreError::Blob(source) => Self::internal(Chain(&source)),
            StoreError::Database(source) if is_full(&source) => Self::full(Chain(&source)),
            StoreError::Database(source) => Self::internal(Chain(&source)),
        }
    }
}

/// An error with its sources, for the log.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

pub mod image {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "image")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub name: Option<String>,
        pub status: String,
        pub visibility: String,
        pub disk_format: Option<String>,
        pub container_format: Option<String>,
        /// Bytes stored, and bytes a guest would see.
        pub size: Option<i64>,
        pub virtual_size: Option<i64>,
        /// MD5, 32 hex digits.
        pub checksum: Option<String>,
        /// SHA-512, 128 hex digits.
        pub os_hash_value: Option<String>,
        /// 64 hex digits; what agents check.
        pub blake3: Option<String>,
        /// What the bytes are, by their content.
        pub content_format: Option<String>,
        pub protected: bool,
        pub os_hidden: bool,
        /// MiB.
        pub min_ram: i64,
        /// GiB.
        pub min_disk: i64,
        pub owner: String,
        /// Key of the bytes in the blob store: of those that are there, or that come in.
        pub blob: Option<String>,
        pub created_at_us: i64,
        pub updated_at_us: i64,
        pub deleted_at_us: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod property {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "image_property")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub image_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub name: String,
        pub value: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod tag {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "image_tag")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub image_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub tag: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub mod member {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "image_member")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub image_id: String,
        /// A project.
        #[sea_orm(primary_key, auto_increment = false)]
        pub member_id: String,
        pub status: String,
        pub created_at_us: i64,
        pub updated_at_us: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

fn not_found(id: &str) -> StoreError {
    StoreError::Refused(ApiError::not_found(format!("No image found with ID {id}")))
}

/// The image, whoever asks; `None` when it is not there or deleted.
pub async fn find(connection: &impl ConnectionTrait, id: &str) -> Result<Option<Image>, DbErr> {
    let row = image::Entity::find_by_id(id)
        .filter(image::Column::DeletedAtUs.is_null())
        .one(connection)
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(with_parts(connection, vec![row]).await?.pop())
}

/// The image if it exists for the caller, else 404.
pub async fn find_visible(
    connection: &impl ConnectionTrait,
    caller: &Caller,
    id: &str,
) -> Result<Image, StoreError> {
    let image = find(connection, id).await?.ok_or_else(|| not_found(id))?;
    if image.belongs_to(caller) || matches!(image.row.visibility.as_str(), "public" | "community") {
        return Ok(image);
    }
    if image.row.visibility == "shared"
        && let Some(project) = caller.project_id()
        && find_member(connection, id, project).await?.is_some()
    {
        return Ok(image);
    }
    Err(not_found(id))
}

/// The image for a change: 404 when the caller cannot see it, 403 when it is another's.
pub async fn find_own(
    connection: &impl ConnectionTrait,
    caller: &Caller,
    id: &str,
    action: &str,
) -> Result<Image, StoreError> {
    let image = find_visible(connection, caller, id).await?;
    if image.belongs_to(caller) {
        Ok(image)
    } else {
        Err(refused(action))
    }
}

/// 403 in glance's words.
pub fn refused(action: &str) -> StoreError {
    StoreError::Refused(ApiError::forbidden(format!(
        "You are not authorized to complete {action} action."
    )))
}

/// Rows with their properties and tags, in the same order; two queries however many there are.
pub async fn with_parts(
    connection: &impl ConnectionTrait,
    rows: Vec<image::Model>,
) -> Result<Vec<Image>, DbErr> {
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    let mut properties: HashMap<String, Vec<(String, String)>> = HashMap::new();
    let mut tags: HashMap<String, Vec<String>> = HashMap::new();
    if !ids.is_empty() {
        let found = property::Entity::find()
            .filter(property::Column::ImageId.is_in(ids.iter().copied()))
            .order_by_asc(property::Column::Name)
            .all(connection)
            .await?;
        for row in found {
            properties
                .entry(row.image_id)
                .or_default()
                .push((row.name, row.value));
        }
        let found = tag::Entity::find()
            .filter(tag::Column::ImageId.is_in(ids))
            .order_by_asc(tag::Column::Tag)
            .all(connection)
            .await?;
        for row in found {
            tags.entry(row.image_id).or_default().push(row.tag);
        }
    }
    let assemble = |row: image::Model| Image {
        properties: properties.remove(&row.id).unwrap_or_default(),
        tags: tags.remove(&row.id).unwrap_or_default(),
        row,
    };
    Ok(rows.into_iter().map(assemble).collect())
}

/// One page of images that meet `condition`.
pub async fn list(
    connection: &impl ConnectionTrait,
    condition: Condition,
    page: &PageRequest,
    marker: Option<&image::Model>,
) -> Result<Vec<Image>, DbErr> {
    let mut keys: Vec<(image::Column, Direction)> = Vec::new();
    for (name, direction) in &page.sort {
        if let Some(column) = sort_column(name) {
            keys.push((column, *direction));
        }
    }
    let last = keys
        .last()
        .map_or(Direction::Descending, |(_, direction)| *direction);
    keys.push((image::Column::Id, last));
    let mut query = image::Entity::find()
        .filter(image::Column::DeletedAtUs.is_null())
        .filter(condition)
        .limit(page.limit);
    if let Some(marker) = marker {
        let marked = marker.clone().into_active_model();
        let keys: Vec<_> = keys
            .iter()
            .map(|(column, direction)| {
                let value = value_of(&marked, *column);
                (Expr::col(*column), *direction, value)
            })
            .collect();
        query = query.filter(after(&keys));
    }
    for (column, direction) in keys {
        let (order, nulls) = match direction {
            Direction::Ascending => (Order::Asc, NullOrdering::First),
            Direction::Descending => (Order::Desc, NullOrdering::Last),
        };
        query = query.order_by_with_nulls(column, order, nulls);
    }
    let rows = query.all(connection).await?;
    with_parts(connection, rows).await
}

fn value_of(marked: &image::ActiveModel, column: image::Column) -> Option<sea_orm::Value> {
    let value = marked.get(column).into_value()?;
    // A typed NULL is no value to compare with.
    (value != value.as_null()).then_some(value)
}

fn sort_column(name: &str) -> Option<image::Column> {
    Some(match name {
        "name" => image::Column::Name,
        "status" => image::Column::Status,
        "container_format" => image::Column::ContainerFormat,
        "disk_format" => image::Column::DiskFormat,
        "size" => image::Column::Size,
        "id" => image::Column::Id,
        "created_at" => image::Column::CreatedAtUs,
        "updated_at" => image::Column::UpdatedAtUs,
        _ => return None,
    })
}

/// Images that are shared with `project`, with its answer being one of `statuses`.
pub fn shared_with(project: &str, statuses: &[&str]) -> Condition {
    let members = Sql::select()
        .column(member::Column::ImageId)
        .from(member::Entity)
        .and_where(member::Column::MemberId.eq(project))
        .and_where(member::Column::Status.is_in(statuses.iter().copied()))
        .to_owned();
    Condition::all()
        .add(image::Column::Visibility.eq("shared"))
        .add(image::Column::Id.in_subquery(members))
}

pub fn has_tag(name: &str) -> Condition {
    let tagged = Sql::select()
        .column(tag::Column::ImageId)
        .from(tag::Entity)
        .and_where(tag::Column::Tag.eq(name))
        .to_owned();
    Condition::all().add(image::Column::Id.in_subquery(tagged))
}

pub fn has_property(name: &str, value: &str) -> Condition {
    let having = Sql::select()
        .column(property::Column::ImageId)
        .from(property::Entity)
        .and_where(property::Column::Name.eq(name))
        .and_where(property::Column::Value.eq(value))
        .to_owned();
    Condition::all().add(image::Column::Id.in_subquery(having))
}

/// Writes a new image; 409 when the id is taken, also by a deleted one.
pub async fn insert(database: &Database, image: Image) -> Result<(), StoreError> {
    database
        .write(move |tx| {
            let image = image.clone();
            Box::pin(async move { insert_within(tx, image).await })
        })
        .await
}

/// The same in the caller's transaction.
pub async fn insert_within(tx: &impl ConnectionTrait, image: Image) -> Result<(), StoreError> {
    let id = image.row.id.clone();
    if image::Entity::find_by_id(&id).one(tx).await?.is_some() {
        let words = format!("Image ID {id} already exists!");
        return Err(StoreError::Refused(ApiError::conflict(words)));
    }
    image.row.into_active_model().insert(tx).await?;
    insert_parts(tx, &id, image.properties, image.tags).await?;
    Ok(())
}

async fn insert_parts(
    tx: &impl ConnectionTrait,
    id: &str,
    properties: Vec<(String, String)>,
    tags: Vec<String>,
) -> Result<(), DbErr> {
    let image_id = id.to_owned();
    let rows = properties
        .into_iter()
        .map(|(name, value)| property::ActiveModel {
            image_id: Set(image_id.clone()),
            name: Set(name),
            value: Set(value),
        });
    property::Entity::insert_many(rows)
        .exec_without_returning(tx)
        .await?;
    let rows = tags.into_iter().map(|tag| tag::ActiveModel {
        image_id: Set(image_id.clone()),
        tag: Set(tag),
    });
    tag::Entity::insert_many(rows)
        .exec_without_returning(tx)
        .await?;
    Ok(())
}

/// Writes what `change` makes of the image as it is in the transaction: row, properties and tags.
pub async fn change<F>(
    database: &Database,
    caller: &Caller,
    id: &str,
    action: &'static str,
    now_us: i64,
    change: F,
) -> Result<Image, StoreError>
where
    F: Fn(&mut Image) -> Result<(), ApiError> + Send + Sync + Clone + 'static,
{
    let (caller, id) = (caller.clone(), id.to_owned());
    database
        .write(move |tx| {
            let (caller, id, change) = (caller.clone(), id.clone(), change.clone());
            Box::pin(async move {
                let before = find_own(tx, &caller, &id, action).await?;
                let mut after = before.clone();
                change(&mut after).map_err(StoreError::Refused)?;
                if after == before {
                    return Ok(after);
                }
                after.row.updated_at_us = now_us;
                after
                    .row
                    .clone()
                    .into_active_model()
                    .reset_all()
                    .update(tx)
                    .await?;
                property::Entity::delete_many()
                    .filter(property::Column::ImageId.eq(&id))
                    .exec(tx)
                    .await?;
                tag::Entity::delete_many()
                    .filter(tag::Column::ImageId.eq(&id))
                    .exec(tx)
                    .await?;
                after.properties.sort();
                after.tags.sort();
                after.tags.dedup();
                insert_parts(tx, &id, after.properties.clone(), after.tags.clone()).await?;
                Ok(after)
            })
        })
        .await
}

/// Marks the image as deleted and gives the key of its bytes, which are then the caller's to remove.
pub async fn delete(
    database: &Database,
    caller: &Caller,
    id: &str,
    now_us: i64,
) -> Result<Option<String>, StoreError> {
    let (caller, id) = (caller.clone(), id.to_owned());
    database
        .write(move |tx| {
            let (caller, id) = (caller.clone(), id.clone());
            Box::pin(async move {
                let image = find_own(tx, &caller, &id, "delete_image").await?;
                if image.row.protected {
                    return Err(StoreError::Refused(ApiError::forbidden(format!(
                        "Image {id} is protected and cannot be deleted."
                    ))));
                }
                member::Entity::delete_many()
                    .filter(member::Column::ImageId.eq(&id))
                    .exec(tx)
                    .await?;
                let blob = image.row.blob.clone();
                let mut row = image.row.into_active_model();
                row.deleted_at_us = Set(Some(now_us));
                row.updated_at_us = Set(now_us);
                row.blob = Set(None);
                row.update(tx).await?;
                Ok(blob)
            })
        })
        .await
}

/// What an upload found out.
#[derive(Debug, Clone)]
pub struct Uploaded {
    pub size: i64,
    pub virtual_size: Option<i64>,
    pub checksum: String,
    pub os_hash_value: String,
    pub blake3: String,
    pub content_format: String,
}

/// Where bytes go while they come in, and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upload {
    /// `PUT file`: the image is active when all is there.
    Direct,
    /// `PUT stage`: an import makes it active.
    Staged,
}

/// Turns a queued image into one whose bytes come in under `blob`: only one upload can.
pub async fn begin_upload(
    database: &Database,
    caller: &Caller,
    id: &str,
    blob: String,
    kind: Upload,
    now_us: i64,
) -> Result<Image, StoreError> {
    let coming = match kind {
        Upload::Direct => Status::Saving,
        Upload::Staged => Status::Uploading,
    };
    change(database, caller, id, "upload_image", now_us, move |image| {
        if image.status() != Some(Status::Queued) || image.row.blob.is_some() {
            return Err(ApiError::conflict(format!(
                "Image status transition from {} to {} is not allowed",
                image.row.status,
                coming.name()
            )));
        }
        if image.row.disk_format.is_none() || image.row.container_format.is_none() {
            return Err(ApiError::bad_request(
                "Properties disk_format, container_format must be set prior to saving data.",
            ));
        }
        image.row.status = coming.name().to_owned();
        image.row.blob = Some(blob.clone());
        Ok(())
    })
    .await
}

/// An upload that has come to its end.
#[derive(Debug, Clone)]
pub struct Ended {
    /// The image.
    pub id: String,
    /// Where its bytes are.
    pub blob: String,
    pub kind: Upload,
    pub now_us: i64,
}

/// The image if it still is the one that `blob` was coming in for.
async fn coming_in(
    tx: &impl ConnectionTrait,
    id: &str,
    blob: &str,
) -> Result<Option<image::Model>, DbErr> {
    image::Entity::find_by_id(id)
        .filter(image::Column::Blob.eq(blob))
        .filter(image::Column::DeletedAtUs.is_null())
        .one(tx)
        .await
}

/// Makes the bytes the image's, if its project may have as many (`quota`: bytes of all its images).
/// False when the image is no longer the one that they were coming in for; then they are nobody's.
pub async fn end_upload(
    database: &Database,
    ended: Ended,
    found: Uploaded,
    quota: Option<u64>,
) -> Result<bool, StoreError> {
    database
        .write(move |tx| {
            let (ended, found) = (ended.clone(), found.clone());
            Box::pin(async move {
                let Some(image) = coming_in(tx, &ended.id, &ended.blob).await? else {
                    return Ok(false);
                };
                let quota = quota.filter(|_| image.owner != snapshot::NOBODY);
                if let Some(quota) = quota {
                    let (used, _) = usage(tx, &image.owner).await?;
                    let left = quota.saturating_sub(used.unsigned_abs());
                    let size = found.size.unsigned_abs();
                    if size > left {
                        return Err(StoreError::over_quota(size, left));
                    }
                }
                let mut row = image.into_active_model();
                row.updated_at_us = Set(ended.now_us);
                if ended.kind == Upload::Direct {
                    row.status = Set(Status::Active.name().to_owned());
                }
                row.size = Set(Some(found.size));
                row.virtual_size = Set(found.virtual_size);
                row.checksum = Set(Some(found.checksum));
                row.os_hash_value = Set(Some(found.os_hash_value));
                row.blake3 = Set(Some(found.blake3));
                row.content_format = Set(Some(found.content_format));
                row.update(tx).await?;
                Ok(true)
            })
        })
        .await
}

/// What [`abandon_upload`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abandoned {
    /// No image names the bytes.
    Queued,
    /// [`end_upload`] had been committed, though its answer was lost: the bytes are the image's.
    WasWhole,
}

/// Queues the image again, unless its bytes have come in whole or it is another upload's by now.
pub async fn abandon_upload(
    database: &Database,
    id: &str,
    blob: &str,
    now_us: i64,
) -> Result<Abandoned, StoreError> {
    let (id, blob) = (id.to_owned(), blob.to_owned());
    database
        .write(move |tx| {
            let (id, blob) = (id.clone(), blob.clone());
            Box::pin(async move {
                let Some(image) = coming_in(tx, &id, &blob).await? else {
                    return Ok(Abandoned::Queued);
                };
                if image.size.is_some() {
                    return Ok(Abandoned::WasWhole);
                }
                let mut row = image.into_active_model();
                row.updated_at_us = Set(now_us);
                row.status = Set(Status::Queued.name().to_owned());
                row.blob = Set(None);
                row.update(tx).await?;
                Ok(Abandoned::Queued)
            })
        })
        .await
}

/// Queues images again whose upload ended with the controller `holder`.
pub async fn requeue_interrupted(
    database: &Database,
    holder: &str,
    now_us: i64,
) -> Result<(), StoreError> {
    let begins = format!("{holder}.");
    database
        .write(move |tx| {
            let begins = begins.clone();
            Box::pin(async move {
                image::Entity::update_many()
                    .col_expr(image::Column::Status, Expr::value(Status::Queued.name()))
                    .col_expr(image::Column::Blob, Expr::value(None::<String>))
                    .col_expr(image::Column::UpdatedAtUs, Expr::value(now_us))
                    .filter(image::Column::Blob.starts_with(begins))
                    .filter(image::Column::Size.is_null())
                    .exec(tx)
                    .await?;
                Ok::<_, StoreError>(())
            })
        })
        .await
}

/// Whether a row names the bytes under `key`.
pub async fn names_blob(database: &Database, key: &str) -> Result<bool, StoreError> {
    let found = image::Entity::find()
        .filter(image::Column::Blob.eq(key))
        .filter(image::Column::DeletedAtUs.is_null())
        .one(database.reader())
        .await?;
    Ok(found.is_some())
}

/// Bytes that active images of `owner` take, and how many there are.
pub async fn usage(connection: &impl ConnectionTrait, owner: &str) -> Result<(i64, i64), DbErr> {
    let found: Option<(Option<i64>, i64)> = image::Entity::find()
        .filter(image::Column::Owner.eq(owner))
        .filter(image::Column::DeletedAtUs.is_null())
        .select_only()
        .expr(Expr::expr(Func::cast_as(
            Func::sum(Expr::col(image::Column::Size)),
            "bigint",
        )))
        .expr(image::Column::Id.count())
        .into_tuple()
        .one(connection)
        .await?;
    Ok(found.map_or((0, 0), |(bytes, count)| (bytes.unwrap_or(0), count)))
}

pub async fn members(
    connection: &impl ConnectionTrait,
    image: &str,
) -> Result<Vec<member::Model>, DbErr> {
    member::Entity::find()
        .filter(member::Column::ImageId.eq(image))
        .order_by_asc(member::Column::CreatedAtUs)
        .order_by_asc(member::Column::MemberId)
        .all(connection)
        .await
}

pub async fn find_member(
    connection: &impl ConnectionTrait,
    image: &str,
    project: &str,
) -> Result<Option<member::Model>, DbErr> {
    member::Entity::find_by_id((image.to_owned(), project.to_owned()))
        .one(connection)
        .await
}
