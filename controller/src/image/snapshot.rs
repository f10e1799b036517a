//! Images of servers' disks: made in the request's transaction, filled by an operation, whole or gone in the end.
//!
//! No user's upload is in the way of one: whoever fills it takes it over under a key of his own, and only the bytes
//! under the key that the row names become the image's.

use sea_orm::{ActiveModelTrait, DatabaseTransaction, EntityTrait, IntoActiveModel, Set};

use super::data;
use super::intake::{self, Intake};
use super::store::{self, Ended, StoreError, Upload, Uploaded};
use super::{Image, Images, Row, Status, member};
use crate::http::ApiError;

/// The owner of what is no project's: of bytes on their way from one host to another. Administrators see them, and no
/// quota counts them.
pub const NOBODY: &str = "nobody";

/// An image that has no bytes yet.
pub fn new(id: String, owner: String, now_us: i64) -> Image {
    let row = Row {
        id,
        name: None,
        status: Status::Queued.name().to_owned(),
        visibility: "shared".to_owned(),
        disk_format: None,
        container_format: None,
        size: None,
        virtual_size: None,
        checksum: None,
        os_hash_value: None,
        blake3: None,
        content_format: None,
        protected: false,
        os_hidden: false,
        min_ram: 0,
        min_disk: 0,
        owner,
        blob: None,
        created_at_us: now_us,
        updated_at_us: now_us,
        deleted_at_us: None,
    };
    Image {
        row,
        properties: Vec::new(),
        tags: Vec::new(),
    }
}

/// How an image stands that is to be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Awaited,
    Whole,
    /// Its user has deleted it.
    Gone,
}

impl Images {
    /// Writes a new image in the caller's transaction, which another project may see too; it answers as any other
    /// member does.
    pub async fn add(
        tx: &DatabaseTransaction,
        image: Image,
        shared_with: Option<String>,
    ) -> Result<(), StoreError> {
        let (id, now_us) = (image.row.id.clone(), image.row.created_at_us);
        store::insert_within(tx, image).await?;
        if let Some(project) = shared_with {
            member::insert(tx, id, project, now_us).await?;
        }
        Ok(())
    }

    /// Whether an image of so many bytes can become its project's, as far as can be told now.
    ///
    /// # Errors
    /// 413 in glance's words.
    pub async fn may_have(&self, owner: &str, bytes: u64) -> Result<(), ApiError> {
        if bytes > self.limits.image {
            return Err(data::too_large(self.limits.image));
        }
        match intake::left(self, owner).await? {
            Some(left) if bytes > left => Err(StoreError::over_quota(bytes, left).into()),
            _ => Ok(()),
        }
    }

    pub async fn stands(&self, id: &str) -> Result<Standing, StoreError> {
        Ok(match store::find(self.database.reader(), id).await? {
            None => Standing::Gone,
            Some(image) if image.row.size.is_some() => Standing::Whole,
            Some(_) => Standing::Awaited,
        })
    }

    /// Begins to fill an image, in place of whoever else was about to; none: it is whole, or gone.
    pub async fn begin_filling(
        &self,
        id: &str,
        key: &str,
        now_us: i64,
    ) -> Result<Option<Intake>, ApiError> {
        let (wanted, blob) = (id.to_owned(), key.to_owned());
        let taken = self.database.write(move |tx| {
            let (id, blob) = (wanted.clone(), blob.clone());
            Box::pin(async move {
                let Some(image) = store::find(tx, &id).await? else {
                    return Ok::<_, StoreError>(None);
                };
                if image.row.size.is_some() {
                    return Ok(None);
                }
                let mut row = image.row.clone().into_active_model();
                row.status = Set(Status::Saving.name().to_owned());
                row.blob = Set(Some(blob));
                row.updated_at_us = Set(now_us);
                row.update(tx).await?;
                Ok(Some(image))
            })
        });
        let Some(image) = taken.await? else {
            return Ok(None);
        };
        // Nobody would find them any more, now that the row names others.
        if let Some(old) = image.row.blob.as_deref().filter(|old| *old != key) {
            let removed = self.blobs.remove(old).await;
            removed.map_err(StoreError::Blob)?;
        }
        Ok(Some(Intake::begin(self, &image, key).await?))
    }

    /// What was filled under this key is the image's. False: it is another's by now, and these bytes are gone.
    pub async fn end_filling(
        &self,
        id: &str,
        key: &str,
        found: Uploaded,
        now_us: i64,
    ) -> Result<bool, ApiError> {
        let ended = Ended {
            id: id.to_owned(),
            blob: key.to_owned(),
            kind: Upload::Direct,
            now_us,
        };
        let quota = self.limits.project;
        let whole = store::end_upload(&self.database, ended, found, quota).await?;
        if !whole {
            let removed = self.blobs.remove(key).await;
            removed.map_err(StoreError::Blob)?;
        }
        Ok(whole)
    }

    /// There is no such image afterwards, protected or not, and nothing of its bytes; but one that is whole by now
    /// stays, whoever has filled it and whether he knows or not. Idempotent.
    pub async fn discard(&self, id: &str, now_us: i64) -> Result<(), StoreError> {
        self.take_away(id, now_us, |row| row.size.is_none()).await
    }

    /// There is no such image afterwards, whole or not, unless its user has protected it. Idempotent.
    pub async fn remove(&self, id: &str, now_us: i64) -> Result<(), StoreError> {
        self.take_away(id, now_us, |row| !row.protected).await
    }

    async fn take_away(
        &self,
        id: &str,
        now_us: i64,
        which: fn(&Row) -> bool,
    ) -> Result<(), StoreError> {
        let wanted = id.to_owned();
        let dropped = self.database.write(move |tx| {
            let id = wanted.clone();
            Box::pin(async move {
                let row = store::image::Entity::find_by_id(&id).one(tx).await?;
                let there = |row: &Row| row.deleted_at_us.is_none() && which(row);
                let Some(row) = row.filter(there) else {
                    return Ok::<_, StoreError>(None);
                };
                let blob = row.blob.clone();
                let mut row = row.into_active_model();
                row.deleted_at_us = Set(Some(now_us));
                row.updated_at_us = Set(now_us);
                row.blob = Set(None);
                row.update(tx).await?;
                Ok(blob)
            })
        });
        if let Some(blob) = dropped.await? {
            self.blobs.remove(&blob).await.map_err(StoreError::Blob)?;
        }
        Ok(())
    }
}
