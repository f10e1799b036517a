//! Where images come from: any of the controllers.

use async_trait::async_trait;
use fractus_agent_api::copy::Part;
use futures::stream::BoxStream;
use uuid::Uuid;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// The bytes of an image from an offset on.
pub struct Body {
    /// Where the stream really begins: as asked, or 0.
    pub offset: u64,
    /// Pieces that follow each other, what is zero left out, and the end.
    pub parts: BoxStream<'static, Result<Part, SourceError>>,
}

#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// Opens image `id` at `offset`, from whichever controller answers.
    async fn open(&self, id: Uuid, offset: u64) -> Result<Body, SourceError>;
}
