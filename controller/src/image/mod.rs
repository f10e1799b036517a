//! The image service (OpenStack Image API v2).
//!
//! Owns images: their rows, tags, properties and members, and their bytes through a [`BlobStore`].
//! What an image claims to be is compared with what its bytes are ([`format`]); bytes are streamed,
//! never held whole in memory. It must never change an image's bytes once they are active.

mod api;
pub mod blob;
mod coming;
mod data;
mod filter;
pub mod format;
#[cfg(test)]
mod format_fuzz;
mod intake;
mod member;
pub mod model;
mod patch;
mod schema;
pub mod snapshot;
pub mod store;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fractus_agent_api::machine::{ImageFormat, ImageRef};
use futures::stream::BoxStream;
use uuid::Uuid;

pub use api::routes;
pub use blob::BlobStore;
pub use intake::Intake;
pub use model::{Image, Row, Status};
pub use patch::MOST_PROPERTIES;

use self::coming::Coming;
use crate::database::Database;
use crate::http::{ApiError, Caller};
use crate::image::store::StoreError;

/// Why an image cannot be given to a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("Image {0} is not active.")]
    NotActive(String),
    #[error("Image {id} has the format {format}; machines take raw and qcow2.")]
    Format { id: String, format: String },
    #[error("Image {id} claims to be {claimed}, and its content is not.")]
    Claim { id: String, claimed: String },
}

/// How much uploads may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one image (glance's `image_size_cap`).
    pub image: u64,
    /// Bytes of all images of a project together (glance's `user_storage_quota`); `None`: no limit.
    pub project: Option<u64>,
    /// Bytes that uploads leave free where the images are: the database may lie beside them.
    pub reserve: u64,
    /// How long an upload may bring nothing before it counts as cut off (glance's
    /// `client_socket_timeout`): a client that has lost its power says no farewell.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            image: 1 << 40,
            project: None,
            reserve: 1 << 30,
            stall: Duration::from_secs(900),
        }
    }
}

/// What handlers of this service share.
#[derive(Debug, Clone)]
pub struct Images {
    pub(crate) database: Database,
    pub(crate) blobs: Arc<dyn BlobStore>,
    limits: Limits,
    coming: Coming,
}

/// What is done with bytes that no image names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    Remove,
    SetAside,
}

impl Images {
    pub fn new(database: Database, blobs: Arc<dyn BlobStore>) -> Self {
        Self {
            database,
            blobs,
            limits: Limits::default(),
            coming: Coming::default(),
        }
    }

    /// With limits other than the usual ones.
    #[must_use]
    pub fn within(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The image if it exists for the caller, else 404 in glance's words.
    pub async fn find(&self, caller: &Caller, id: &str) -> Result<Image, ApiError> {
        Ok(store::find_visible(self.database.reader(), caller, id).await?)
    }

    /// The bytes of an image for an agent, whoever owns it: that a machine of the host uses it is the
    /// caller's to check. `None` when there are none (any more).
    pub async fn open(
        &self,
        id: Uuid,
    ) -> Result<Option<(u64, BoxStream<'static, io::Result<Bytes>>)>, StoreError> {
        let found = store::find(self.database.reader(), &id.to_string()).await?;
        let Some(image) = found else { return Ok(None) };
        let (Some(blob), Some(size)) = (&image.row.blob, image.row.size) else {
            return Ok(None);
        };
        let size = size.unsigned_abs();
        let stream = self
            .blobs
            .open(blob, 0..size)
            .await
            .map_err(StoreError::Blob)?;
        Ok(Some((size, stream)))
    }

    /// Mends what an earlier life of this controller left half-done: uploads that were cut off are
    /// queued again, and bytes that no image names are removed. Called before the first request.
    ///
    /// Of a database that was restored it is not known whose they were: a server may have been shelved since the backup,
    /// and they are its disk then. So they are set aside.
    pub async fn recover(&self, now_us: i64, sweep: Sweep) -> Result<(), StoreError> {
        store::requeue_interrupted(&self.database, self.blobs.holder(), now_us).await?;
        for key in self.blobs.keys().await.map_err(StoreError::Blob)? {
            if store::names_blob(&self.database, &key).await? {
                continue;
            }
            match sweep {
                Sweep::Remove => {
                    tracing::info!(%key, "removing bytes that no image names");
                    self.blobs.remove(&key).await.map_err(StoreError::Blob)?;
                }
                Sweep::SetAside => {
                    let kept = self.blobs.set_aside(&key).await;
                    if let Some(name) = kept.map_err(StoreError::Blob)? {
                        tracing::warn!(
                            %name,
                            "bytes of an image that the restored database does not know of are kept under this name"
                        );
                    }
                }
            }
        }
        Ok(())
    }
}

impl Image {
    /// What an agent needs to fetch the image and make a disk of it, or load it as a kernel.
    pub fn to_ref(&self) -> Result<ImageRef, Unusable> {
        let row = &self.row;
        let not_active = || Unusable::NotActive(row.id.clone());
        if self.status() != Some(Status::Active) {
            return Err(not_active());
        }
        let claimed = row.disk_format.as_deref().unwrap_or("raw");
        let content = row.content_format.as_deref().unwrap_or("raw");
        let format = match (claimed, content) {
            ("qcow2", "qcow2") => ImageFormat::Qcow2,
            ("raw" | "iso" | "ami" | "aki" | "ari", "raw" | "iso") => ImageFormat::Raw,
            ("qcow2", _) => {
                return Err(Unusable::Claim {
                    id: row.id.clone(),
                    claimed: claimed.to_owned(),
                });
            }
            _ => {
                return Err(Unusable::Format {
                    id: row.id.clone(),
                    format: claimed.to_owned(),
                });
            }
        };
        let id = Uuid::parse_str(&row.id).map_err(|_| not_active())?;
        let (size, blake3) = row.size.zip(row.blake3.clone()).ok_or_else(not_active)?;
        Ok(ImageRef {
            id,
            size: size.unsigned_abs(),
            blake3,
            format,
        })
    }
}
