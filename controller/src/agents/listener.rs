//! The listener that agents call: join, renew, heartbeat, changes, reports, images.
//!
//! Mutual TLS with the cloud's own authority; only `join` is answered without a certificate. Who calls
//! is the certificate's `fractus://` name, and a host that was removed is nobody, whatever its
//! certificate says. Decides nothing about machines: it tells the fleet and wakes the reconciler. Of
//! several controllers only the leader listens to what agents say of machines: the others answer a
//! heartbeat with the list of controllers, the leader first, and refuse the rest, upon which an agent
//! goes on to the next of its list.

mod handlers;
mod pieces;
mod server;

use std::fmt;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use bytes::Bytes;
use futures::stream::BoxStream;
use uuid::Uuid;

use super::fleet::Fleet;
use crate::clock::Clock;
use crate::database::Database;
use crate::leader::Lead;
use crate::random::Random;
use crate::reconcile::Reconciler;
use crate::tls::Authority;

pub use server::{ListenError, Listener};

/// Where images' bytes come from; the image service's store.
#[async_trait]
pub trait BlobSource: Send + Sync + 'static {
    /// The stored bytes of an image from `offset` on; `None` if there is no such image or it has no
    /// bytes.
    async fn open(&self, image: Uuid, offset: u64) -> io::Result<Option<Blob>>;
}

/// Bytes of an image.
pub struct Blob {
    /// Of the whole image.
    pub size: u64,
    pub bytes: BoxStream<'static, io::Result<Bytes>>,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// What the listener needs.
#[derive(Clone)]
pub struct Parts {
    pub database: Database,
    pub authority: Authority,
    pub fleet: Arc<Fleet>,
    pub reconciler: Arc<Reconciler>,
    pub blobs: Arc<dyn BlobSource>,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    /// Who leads is told of machines; the others send agents there.
    pub lead: Lead,
}

/// Most bytes of a body: a full report of some ten thousand machines.
const BODY_LIMIT: usize = 64 << 20;
/// Most bytes of a body of who is nobody yet: a host's inventory and a certificate request.
const JOIN_BODY_LIMIT: usize = 64 << 10;

/// The routes; every request must carry a [`server::Caller`].
fn routes(parts: Parts) -> Router {
    let join = post(handlers::join).layer(DefaultBodyLimit::max(JOIN_BODY_LIMIT));
    Router::new()
        .route("/agent/v1/renew", post(handlers::renew))
        .route("/agent/v1/heartbeat", post(handlers::heartbeat))
        .route("/agent/v1/changes", post(handlers::changes))
        .route("/agent/v1/report", post(handlers::report))
        .route("/agent/v1/images/{id}", get(handlers::image))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        // After the layer, which is for members only.
        .route("/agent/v1/join", join)
        .with_state(parts)
}

#[cfg(test)]
mod tests;
