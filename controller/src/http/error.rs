//! Errors as users see them.
//!
//! A handler says what went wrong; the frame renders it in the form of the service that was asked:
//! nova and cinder `{"itemNotFound": {"code", "message"}}`, keystone `{"error": {"code", "message",
//! "title"}}`, neutron `{"NeutronError": {...}}`, glance as WebOb does, by the Accept header.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use crate::http::{Service, webob};

/// A status, words for the user, and what else some bodies carry. As a response it stands empty
/// with itself in the extensions until the frame gives it its form.
#[derive(Debug, Clone)]
pub struct ApiError(Box<Parts>);

#[derive(Debug, Clone)]
struct Parts {
    status: StatusCode,
    kind: Option<&'static str>,
    message: String,
    detail: String,
    extra: Map<String, Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
    origin: Origin,
    /// For the log, when the error is shown.
    cause: Option<String>,
}

/// Where in the original an error arises; its form depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The service's own code.
    Handler,
    /// The middleware that looks at tokens.
    Authentication,
    /// The router: no such path.
    Router,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self(Box::new(Parts {
            status,
            kind: None,
            message: message.into(),
            detail: String::new(),
            extra: Map::new(),
            headers: Vec::new(),
            origin: Origin::Handler,
            cause: None,
        }))
    }

    /// With the name of the fault in nova's and cinder's bodies, where the status alone would give
    /// another.
    pub fn of_kind(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::new(status, message);
        error.0.kind = Some(kind);
        error
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// 429: come back in a second.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, message)
            .with_header(header::RETRY_AFTER, HeaderValue::from_static("1"))
    }

    /// Status 500. What happened goes to the log (once the answer is made: a write that lost a race and
    /// is repeated is no news), not to the user.
    pub fn internal(what: impl std::fmt::Display) -> Self {
        let mut error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, UNEXPECTED);
        error.0.cause = Some(what.to_string());
        error
    }

    /// 503: what was asked could not be written, for want of room. What happened goes to the log.
    pub fn full(what: impl std::fmt::Display) -> Self {
        let mut error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "The cloud has no room to write this down. Nothing was changed; its operator has to make \
             room where the controller's database is.",
        );
        error.0.cause = Some(what.to_string());
        error
    }

    /// 401: no token, or one that does not count.
    pub fn unauthorized() -> Self {
        let mut error = Self::new(
            StatusCode::UNAUTHORIZED,
            "The request you have made requires authentication.",
        );
        error.0.origin = Origin::Authentication;
        error
    }

    /// No such path (or method) in this service.
    pub(super) fn unrouted(status: StatusCode) -> Self {
        let message = match status {
            StatusCode::METHOD_NOT_ALLOWED => "The method is not allowed for this resource.",
            _ => "The resource could not be found.",
        };
        let mut error = Self::new(status, message);
        error.0.origin = Origin::Router;
        error
    }

    /// A second sentence, in the forms that have one (glance).
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = detail.into();
        self
    }

    /// A further member of the body's inner object.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.extra.insert(name.to_owned(), value.into());
        self
    }

    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.push((name, value));
        self
    }

    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What happened, of an internal error: for the log.
    pub fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// The answer in the form of `service`.
    pub(super) fn render(
        &self,
        service: Service,
        asked: &HeaderMap,
        identity_url: &str,
    ) -> Response {
        if let Some(cause) = &self.0.cause {
            tracing::error!(%cause, "internal error");
            #[cfg(test)]
            eprintln!("internal error: {cause}");
        }
        let code = self.0.status.as_u16();
        let reason = self.0.status.canonical_reason().unwrap_or("Error");
        let mut answer = match (service, self.0.origin) {
            (Service::Image, _) | (Service::Compute | Service::Volume, Origin::Router) => {
                webob::render(self.0.status, &self.0.message, &self.0.detail, asked)
            }
            (Service::Identity, Origin::Router) => not_in_keystone(self.0.status),
            (Service::Identity | Service::Fractus, _) => {
                let mut inner = Map::new();
                inner.insert("code".to_owned(), code.into());
                inner.extend(self.0.extra.clone());
                inner.insert("message".to_owned(), self.0.message.clone().into());
                inner.insert("title".to_owned(), reason.into());
                Json(json!({ "error": inner })).into_response()
            }
            (_, Origin::Authentication) => {
                Json(json!({"error": {"code": code, "title": reason, "message": self.0.message}}))
                    .into_response()
            }
            (Service::Compute | Service::Volume, Origin::Handler) => {
                let mut inner = Map::new();
                inner.insert("code".to_owned(), code.into());
                inner.insert("message".to_owned(), self.0.message.clone().into());
                inner.extend(self.0.extra.clone());
                let kind = self.0.kind.unwrap_or(fault(self.0.status));
                let mut answer = Json(json!({ kind: inner })).into_response();
                if service == Service::Compute {
                    answer.headers_mut().insert(
                        header::CONTENT_TYPE,
                        HeaderValue::from_static("application/json; charset=UTF-8"),
                    );
                }
                answer
            }
            (Service::Network, _) => Json(json!({"NeutronError": {
                "type": self.0.kind.unwrap_or(reason),
                "message": self.0.message,
                "detail": self.0.detail,
            }}))
            .into_response(),
        };
        *answer.status_mut() = self.0.status;
        if self.0.status == StatusCode::UNAUTHORIZED
            && let Ok(value) = HeaderValue::from_str(&format!("Keystone uri=\"{identity_url}\""))
        {
            answer.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        for (name, value) in &self.0.headers {
            answer.headers_mut().insert(name, value.clone());
        }
        answer
    }
}

const UNEXPECTED: &str = "Unexpected API Error. Look in the controller's log for the request id in this answer's \
     x-openstack-request-id header.";

/// Nova's and cinder's name for a status.
fn fault(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "badRequest",
        401 => "unauthorized",
        403 => "forbidden",
        404 => "itemNotFound",
        405 => "badMethod",
        409 => "conflictingRequest",
        413 | 429 => "overLimit",
        415 => "badMediaType",
        501 => "notImplemented",
        503 => "serviceUnavailable",
        _ => "computeFault",
    }
}

/// What keystone's router (Flask) says.
fn not_in_keystone(status: StatusCode) -> Response {
    if status == StatusCode::METHOD_NOT_ALLOWED {
        return Json(json!({"message": "The method is not allowed for the requested URL."}))
            .into_response();
    }
    axum::response::Html(
        "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n<p>The \
         requested URL was not found on the server. If you entered the URL manually please check \
         your spelling and try again.</p>\n",
    )
    .into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut answer = self.0.status.into_response();
        answer.extensions_mut().insert(self);
        answer
    }
}

impl From<sea_orm::DbErr> for ApiError {
    fn from(error: sea_orm::DbErr) -> Self {
        if crate::database::is_full(&error) {
            return Self::full(error);
        }
        Self::internal(error)
    }
}
