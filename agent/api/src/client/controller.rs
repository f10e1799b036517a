//! An agent's view of one controller.

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http::{Method, StatusCode};
use uuid::Uuid;

use super::{CallError, ClientError, Transport, chain};
use crate::host::{
    Changes, FullReport, Heartbeat, HeartbeatAnswer, JoinAnswer, JoinRequest, RenewAnswer,
    RenewRequest,
};
use crate::identity::Fingerprint;
use crate::tls::{self, Credentials, Expected};

/// Calls one controller's agents listener.
#[derive(Debug, Clone)]
pub struct ControllerClient {
    transport: Transport,
}

/// What became of a push of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    Taken,
    /// The controller has missed a push: it wants a [`FullReport`].
    ReportNeeded,
}

/// An image's bytes from an offset on.
pub struct ImageBody<S> {
    /// Where the stream begins: as asked, or 0 from a controller that does not know ranges.
    pub offset: u64,
    pub bytes: S,
}

impl ControllerClient {
    /// `endpoint` is `https://ADDRESS:PORT`. Nothing is connected yet.
    pub fn new(endpoint: &str, credentials: &Credentials) -> Result<Self, ClientError> {
        let tls = tls::client(credentials, Expected::AnyController, b"h2")?;
        Ok(Self {
            transport: Transport::new(endpoint, tls)?,
        })
    }

    /// Before there is a certificate: knows the controller by its root, and can only join.
    pub fn for_join(endpoint: &str, root: Fingerprint) -> Result<Self, ClientError> {
        let tls = tls::client_by_fingerprint(root, b"h2")?;
        Ok(Self {
            transport: Transport::new(endpoint, tls)?,
        })
    }

    pub fn endpoint(&self) -> &str {
        &self.transport.endpoint
    }

    pub async fn join(&self, body: &JoinRequest) -> Result<JoinAnswer, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/join")
            .json(body);
        self.transport.json("POST join", request).await
    }

    pub async fn renew(&self, body: &RenewRequest) -> Result<RenewAnswer, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/renew")
            .json(body);
        self.transport.json("POST renew", request).await
    }

    pub async fn heartbeat(&self, body: &Heartbeat) -> Result<HeartbeatAnswer, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/heartbeat")
            .json(body);
        self.transport.json("POST heartbeat", request).await
    }

    pub async fn changes(&self, body: &Changes) -> Result<Pushed, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/changes")
            .json(body);
        match self.transport.send("POST changes", request).await {
            Ok(_) => Ok(Pushed::Taken),
            Err(e) if e.status() == Some(StatusCode::CONFLICT) => Ok(Pushed::ReportNeeded),
            Err(error) => Err(error),
        }
    }

    pub async fn report(&self, body: &FullReport) -> Result<(), CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/report")
            .json(body);
        self.transport.send("POST report", request).await.map(drop)
    }

    /// Streams an image, from `offset` on where the controller answers 206 to a `Range`. There is no
    /// deadline for the whole of it; the caller limits how long a chunk may take.
    pub async fn image(
        &self,
        id: Uuid,
        offset: u64,
    ) -> Result<ImageBody<impl Stream<Item = Result<Bytes, CallError>> + Send + use<>>, CallError>
    {
        let call = "GET image";
        let url = format!(
            "{}/agent/v1/images/{}",
            self.transport.endpoint,
            id.hyphenated()
        );
        let mut request = self.transport.http.get(url);
        if offset > 0 {
            request = request.header(http::header::RANGE, format!("bytes={offset}-"));
        }
        let response = self.transport.send(call, request).await?;
        let offset = if response.status() == StatusCode::PARTIAL_CONTENT {
            offset
        } else {
            0
        };
        let endpoint = self.transport.endpoint.clone();
        let bytes = response
            .bytes_stream()
            .map_err(move |e| CallError::Unreachable {
                call,
                endpoint: endpoint.clone(),
                detail: chain(&e),
            });
        Ok(ImageBody { offset, bytes })
    }
}
