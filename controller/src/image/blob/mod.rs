//! Where images' bytes are kept.
//!
//! A blob is written once, under a key of its own, and is there only after [`Incoming::finish`]; one
//! that is dropped before leaves nothing behind.

mod file;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub use file::FileStore;

#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("the store is full")]
    Full,
    #[error("no blob has the key {0}")]
    Missing(String),
    #[error("{doing} {path}", path = path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A backend.
#[async_trait]
pub trait BlobStore: Send + Sync + fmt::Debug {
    /// Who writes here: keys made by this controller begin with it, and only those are its to clean up.
    fn holder(&self) -> &str;

    /// Begins a blob under a new key.
    async fn begin(&self, key: &str) -> Result<Box<dyn Incoming>, BlobError>;

    /// The bytes of `range`, in order. The range lies within the blob.
    async fn open(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, BlobError>;

    /// Removes a blob; one that is not there is removed already.
    async fn remove(&self, key: &str) -> Result<(), BlobError>;

    /// A finished blob is kept under a name that is no key's, for an operator to look at: that name. One that was never
    /// finished, or is not there, is removed.
    async fn set_aside(&self, key: &str) -> Result<Option<String>, BlobError>;

    /// Bytes that can still be written; `None` from a backend that has no such bound.
    async fn free(&self) -> Result<Option<u64>, BlobError>;

    /// Keys of this holder, also of blobs that were never finished.
    async fn keys(&self) -> Result<Vec<String>, BlobError>;
}

/// A blob that is being written. Dropping it discards it.
#[async_trait]
pub trait Incoming: Send {
    async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError>;

    /// So many zeroes, which need not take any room.
    async fn skip(&mut self, length: u64) -> Result<(), BlobError>;

    /// Makes it durable and visible.
    async fn finish(self: Box<Self>) -> Result<(), BlobError>;
}
