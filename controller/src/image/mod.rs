//! The image service (OpenStack Image API v2).
//!
//! Owns images: their rows, tags, properties and members, and their bytes through a [`BlobStore`].
//! What an image claims to be is compared with what its bytes are ([`format`]); bytes are streamed,
//! never held whole in memory. It must never change an image's bytes once they are active.

mod api;
pub mod blob;
mod data;
mod filter;
pub mod format;
mod member;
pub mod model;
mod patch;
mod schema;
pub mod store;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use api::routes;
pub use blob::BlobStore;

use crate::database::Database;
use crate::image::store::StoreError;

/// What handlers of this service share.
#[derive(Debug, Clone)]
pub struct Images {
    pub(crate) database: Database,
    pub(crate) blobs: Arc<dyn BlobStore>,
}

impl Images {
    pub fn new(database: Database, blobs: Arc<dyn BlobStore>) -> Self {
        Self { database, blobs }
    }

    /// Mends what an earlier life of this controller left half-done: uploads that were cut off are
    /// queued again, and bytes that no image names are removed. Called before the first request.
    pub async fn recover(&self, now_us: i64) -> Result<(), StoreError> {
        store::requeue_interrupted(&self.database, self.blobs.holder(), now_us).await?;
        for key in self.blobs.keys().await.map_err(StoreError::Blob)? {
            if !store::names_blob(&self.database, &key).await? {
                tracing::info!(%key, "removing bytes that no image names");
                self.blobs.remove(&key).await.map_err(StoreError::Blob)?;
            }
        }
        Ok(())
    }
}
