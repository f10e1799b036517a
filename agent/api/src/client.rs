//! The client of both tables in [`crate::host`]: HTTP/2 with mutual TLS, typed answers, deadlines.
//!
//! [`agent::AgentClient`] is what a controller holds for one host, [`controller::ControllerClient`]
//! what an agent holds for one controller. Each keeps one connection and is cheap to clone. A call
//! never retries by itself: `PUT` may be repeated by its caller, who knows whether it still wants it.

pub mod agent;
pub mod controller;

use std::time::Duration;

use http::StatusCode;
use serde::de::DeserializeOwned;

use crate::machine::Refusal;
use crate::tls::TlsError;

/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// For a whole call that answers from memory or after one sync to disk.
const CALL: Duration = Duration::from_secs(15);
/// Most that is read of an answer of JSON: a full report of some ten thousand machines.
const MOST: usize = 64 << 20;

/// Why a call has no answer of the expected kind.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing was answered; whether the other side acted is not known.
    #[error("{call} {endpoint}: no answer: {detail}")]
    Unreachable {
        call: &'static str,
        endpoint: String,
        detail: String,
    },
    #[error("{call} {endpoint}: no answer within {} s", limit.as_secs())]
    Deadline {
        call: &'static str,
        endpoint: String,
        limit: Duration,
    },
    /// The other side understood and said no.
    #[error("{call} {endpoint}: refused: {refusal}")]
    Refused {
        call: &'static str,
        endpoint: String,
        status: StatusCode,
        refusal: Refusal,
    },
    /// A status that the protocol does not use for this call.
    #[error("{call} {endpoint}: status {status}: {body}")]
    Status {
        call: &'static str,
        endpoint: String,
        status: StatusCode,
        body: String,
    },
    #[error("{call} {endpoint}: the answer cannot be read: {detail}")]
    Body {
        call: &'static str,
        endpoint: String,
        detail: String,
    },
}

impl CallError {
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(refusal),
            _ => None,
        }
    }

    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } | Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{endpoint:?} is not of the form https://ADDRESS:PORT")]
    Endpoint { endpoint: String },
    #[error("the HTTP client cannot be made: {detail}")]
    Http { detail: String },
}

/// One peer: its address and a connection that is made when needed.
#[derive(Debug, Clone)]
struct Transport {
    http: reqwest::Client,
    /// `https://ADDRESS:PORT`, without a slash at the end.
    endpoint: String,
}

impl Transport {
    fn new(endpoint: &str, tls: rustls::ClientConfig) -> Result<Self, ClientError> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") || address(&endpoint).is_none() {
            return Err(ClientError::Endpoint { endpoint });
        }
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .http2_prior_knowledge()
            .http2_keep_alive_interval(Duration::from_secs(10))
            .http2_keep_alive_timeout(Duration::from_secs(10))
            // A guest may stand still for the next call: the connection is kept, and one that is dead is noticed before.
            .http2_keep_alive_while_idle(true)
            .pool_idle_timeout(None)
            .tcp_nodelay(true)
            .build()
            .map_err(|e| ClientError::Http { detail: chain(&e) })?;
        Ok(Self { http, endpoint })
    }

    fn request(&self, method: http::Method, path: &str) -> reqwest::RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.endpoint))
            .timeout(CALL)
    }

    /// Sends, and turns whatever is not a success into an error.
    async fn send(
        &self,
        call: &'static str,
        request: reqwest::RequestBuilder,
    ) -> Result<reqwest::Response, CallError> {
        let endpoint = || self.endpoint.clone();
        let mut response = request.send().await.map_err(|e| self.lost(call, &e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.read(call, &mut response).await.unwrap_or_default();
        match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => Err(CallError::Refused {
                call,
                endpoint: endpoint(),
                status,
                refusal,
            }),
            Err(_) => {
                let body = String::from_utf8_lossy(&body).chars().take(500).collect();
                Err(CallError::Status {
                    call,
                    endpoint: endpoint(),
                    status,
                    body,
                })
            }
        }
    }

    async fn json<T: DeserializeOwned>(
        &self,
        call: &'static str,
        request: reqwest::RequestBuilder,
    ) -> Result<T, CallError> {
        let mut response = self.send(call, request).await?;
        let body = self.read(call, &mut response).await?;
        serde_json::from_slice(&body).map_err(|e| CallError::Body {
            call,
            endpoint: self.endpoint.clone(),
            detail: e.to_string(),
        })
    }

    async fn read(
        &self,
        call: &'static str,
        response: &mut reqwest::Response,
    ) -> Result<Vec<u8>, CallError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.lost(call, &e))? {
            if body.len() + chunk.len() > MOST {
                let detail = format!("more than {MOST} bytes");
                return Err(CallError::Body {
                    call,
                    endpoint: self.endpoint.clone(),
                    detail,
                });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    fn lost(&self, call: &'static str, error: &reqwest::Error) -> CallError {
        let endpoint = self.endpoint.clone();
        if error.is_timeout() {
            CallError::Deadline {
                call,
                endpoint,
                limit: CALL,
            }
        } else {
            CallError::Unreachable {
                call,
                endpoint,
                detail: chain(error),
            }
        }
    }
}

/// `ADDRESS:PORT` of `https://ADDRESS:PORT`; the port is required.
fn address(endpoint: &str) -> Option<&str> {
    let rest = endpoint.strip_prefix("https://")?;
    let (host, port) = rest.rsplit_once(':')?;
    (!host.is_empty() && port.parse::<u16>().is_ok()).then_some(rest)
}

/// An error with its causes, which reqwest leaves out of its own message.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_needs_scheme_address_and_port() {
        assert_eq!(address("https://10.0.0.1:9443"), Some("10.0.0.1:9443"));
        assert_eq!(address("https://[::1]:9443"), Some("[::1]:9443"));
        assert_eq!(address("http://10.0.0.1:9443"), None);
        assert_eq!(address("https://10.0.0.1"), None);
        assert_eq!(address("https://:1"), None);
    }
}
