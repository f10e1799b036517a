//! JSON request bodies: limits, content type, and the errors that each service has for bad ones.

use std::time::Duration;

use axum::extract::{FromRequest, Request};
use http::{StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::http::schema::Schema;
use crate::http::{ApiError, RequestContext, Service};

/// Bytes of a JSON body that are read at most (oslo.middleware's max_request_body_size).
pub const BODY_LIMIT: usize = 114_688;

/// How long a JSON body may take to arrive.
const PATIENCE: Duration = Duration::from_secs(30);

const MALFORMED: &str = "The server could not comply with the request since it is either malformed \
                         or otherwise incorrect.";

/// A JSON body, read within [`BODY_LIMIT`] and serde_json's limit of depth (128), unchecked but for
/// NUL characters: not every database can keep them, so none gets them.
#[derive(Debug, Clone)]
pub struct JsonBody(pub Value);

impl JsonBody {
    /// The body as `T`, after `schema` has agreed to it. What the schema lets through but `T` does
    /// not take is 400 as well.
    pub fn checked<T: DeserializeOwned>(self, schema: &Schema) -> Result<T, ApiError> {
        schema.check(&self.0)?;
        self.parse()
    }

    /// The body as `T`, without a schema.
    pub fn parse<T: DeserializeOwned>(self) -> Result<T, ApiError> {
        serde_json::from_value(self.0).map_err(|error| ApiError::bad_request(error.to_string()))
    }
}

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let service = request
            .extensions()
            .get::<RequestContext>()
            .map(RequestContext::service);
        let service = service.unwrap_or(Service::Compute);
        let content_type = request
            .headers()
            .get(header::CONTENT_TYPE)
            .map(|value| value.to_str().unwrap_or("").to_ascii_lowercase());
        let bytes = read(request, PATIENCE).await?;
        let is_json = content_type.as_deref().is_none_or(|kind| {
            let essence = kind.split(';').next().unwrap_or("").trim();
            essence == "application/json"
                || essence.ends_with("+json")
                || essence.ends_with("-json-patch")
        });
        if !is_json && !bytes.is_empty() {
            return Err(not_json(service));
        }
        let body: Value = serde_json::from_slice(&bytes).map_err(|_| malformed(service))?;
        if has_nul(&body) {
            return Err(nul());
        }
        Ok(Self(body))
    }
}

/// What is said of a request with a NUL character.
pub(super) fn nul() -> ApiError {
    ApiError::bad_request("The request has a NUL character; leave it out.")
}

/// Whether any text in it, names included, has a NUL. As deep as the parser lets a body be.
fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(list) => list.iter().any(has_nul),
        Value::Object(map) => map
            .iter()
            .any(|(name, value)| name.contains('\0') || has_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

async fn read(request: Request, patience: Duration) -> Result<bytes::Bytes, ApiError> {
    let too_large = || ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "Request is too large.");
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > BODY_LIMIT as u64) {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), BODY_LIMIT).collect();
    let Ok(body) = tokio::time::timeout(patience, body).await else {
        return Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "The request's body did not arrive in time.",
        ));
    };
    match body {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => {
            tracing::debug!(%error, "a request body was cut off");
            Err(ApiError::bad_request("The request's body was cut off."))
        }
    }
}

fn not_json(service: Service) -> ApiError {
    match service {
        Service::Identity => ApiError::bad_request(format!(
            "Expecting to find application/json in Content-Type header. {MALFORMED} The client is \
             assumed to be in error."
        )),
        _ => ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "Unsupported Content-Type",
        ),
    }
}

fn malformed(service: Service) -> ApiError {
    ApiError::bad_request(match service {
        Service::Identity => format!(
            "Expecting to find valid JSON in request body. {MALFORMED} The client is assumed to be \
             in error."
        ),
        Service::Image => "Malformed JSON in request body.".to_owned(),
        Service::Network => "Unable to parse JSON".to_owned(),
        Service::Compute | Service::Volume | Service::Fractus => {
            "Malformed request body".to_owned()
        }
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn a_body_that_does_not_arrive_is_not_waited_for() {
        let never = futures::stream::pending::<Result<bytes::Bytes, std::io::Error>>();
        let request = Request::new(Body::from_stream(never));
        let error = read(request, Duration::ZERO).await.unwrap_err();
        assert_eq!(error.status(), StatusCode::REQUEST_TIMEOUT);
    }

    #[test]
    fn a_nul_is_found_wherever_it_is() {
        assert!(!has_nul(&json!({"a": ["b", 0, null, {"c": "\\0"}]})));
        assert!(has_nul(&json!({"a": ["b", {"c": "d\0"}]})));
        assert!(has_nul(&json!({"a": [{"b\0": 1}]})));
    }
}
