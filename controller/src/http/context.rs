//! What the frame knows of a request, for handlers and for the forms of answers.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use http::request::Parts;

use crate::http::{ApiError, Microversion, Service};

/// Cheap to clone; every handler can take it.
#[derive(Debug, Clone)]
pub struct RequestContext(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    request_id: String,
    service: Service,
    microversion: Option<Microversion>,
    base: String,
}

impl RequestContext {
    pub(super) fn new(
        request_id: String,
        service: Service,
        microversion: Option<Microversion>,
        base: String,
    ) -> Self {
        Self(Arc::new(Inner {
            request_id,
            service,
            microversion,
            base,
        }))
    }

    /// `req-` and a UUID: in the answer's headers, in operations, and in the logs down to the VMM.
    pub fn request_id(&self) -> &str {
        &self.0.request_id
    }

    pub fn service(&self) -> Service {
        self.0.service
    }

    /// The microversion negotiated; 0.0 in a service that has none.
    pub fn microversion(&self) -> Microversion {
        self.0.microversion.unwrap_or(Microversion::new(0, 0))
    }

    pub fn at_least(&self, major: u16, minor: u16) -> bool {
        self.microversion().at_least(major, minor)
    }

    /// The absolute URL of a path of this service: `ctx.link("/v2.1/servers/ID")`.
    pub fn link(&self, path: &str) -> String {
        format!("{}{path}", self.0.base)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for RequestContext {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| {
            ApiError::internal("a handler is reached without the frame of its service")
        })
    }
}
