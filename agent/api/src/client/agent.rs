//! A controller's view of one agent.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::{CONNECT, CallError, ClientError, Transport, address};
use crate::copy::{CopyId, Piece, Unpacker};
use crate::host::{FullReport, HostId, HostReport};
use crate::machine::{MachineReport, PutMachine, ServerId};
use crate::tls::{self, Credentials, Expected};

/// The serial line of a machine: binary messages both ways. The stream closes when the machine ends
/// or the agent does.
pub type Console = WebSocketStream<TlsStream<TcpStream>>;

/// How long an agent may send nothing of what it is asked for.
const STALL: Duration = Duration::from_secs(60);

/// A copy that comes in.
#[derive(Debug)]
pub struct CopyBody {
    client: AgentClient,
    response: reqwest::Response,
    unpacker: Unpacker,
}

impl CopyBody {
    /// What has come next, perhaps none; the size of the whole once all has.
    pub async fn next(&mut self) -> Result<Result<Vec<Piece>, u64>, CallError> {
        let call = "GET copy";
        let damaged = |error: crate::copy::CopyError| CallError::Body {
            call,
            endpoint: self.client.transport.endpoint.clone(),
            detail: error.to_string(),
        };
        let chunk = tokio::time::timeout(STALL, self.response.chunk()).await;
        let chunk = chunk.map_err(|_| self.client.stalled(call))?;
        let chunk = chunk.map_err(|error| self.client.transport.lost(call, &error))?;
        match chunk {
            Some(bytes) => self.unpacker.push(&bytes).map(Ok).map_err(damaged),
            None => self.unpacker.finish().map(Err).map_err(damaged),
        }
    }
}

/// Calls one agent, whose certificate must be that of `host`.
#[derive(Debug, Clone)]
pub struct AgentClient {
    transport: Transport,
    websocket: Arc<rustls::ClientConfig>,
}

impl AgentClient {
    /// `endpoint` is `https://ADDRESS:PORT`, as the host gave it in its heartbeat. Nothing is
    /// connected yet.
    pub fn new(
        host: HostId,
        endpoint: &str,
        credentials: &Credentials,
    ) -> Result<Self, ClientError> {
        let expected = Expected::Host(host);
        let http2 = tls::client(credentials, expected.clone(), b"h2")?;
        let websocket = Arc::new(tls::client(credentials, expected, b"http/1.1")?);
        Ok(Self {
            transport: Transport::new(endpoint, http2)?,
            websocket,
        })
    }

    pub fn endpoint(&self) -> &str {
        &self.transport.endpoint
    }

    /// Answered once the agent has persisted the intent, not when it is carried out.
    /// `Refusal::Stale` is no failure of the agent: something newer has been asked before.
    pub async fn put(&self, id: ServerId, body: &PutMachine) -> Result<MachineReport, CallError> {
        let request = self
            .transport
            .request(Method::PUT, &format!("/v1/machines/{id}"))
            .json(body);
        self.transport.json("PUT machine", request).await
    }

    /// `Refusal::Unknown` when the agent has neither record nor tombstone.
    pub async fn get(&self, id: ServerId) -> Result<MachineReport, CallError> {
        let request = self
            .transport
            .request(Method::GET, &format!("/v1/machines/{id}"));
        self.transport.json("GET machine", request).await
    }

    pub async fn list(&self) -> Result<FullReport, CallError> {
        let request = self.transport.request(Method::GET, "/v1/machines");
        self.transport.json("GET machines", request).await
    }

    pub async fn host(&self) -> Result<HostReport, CallError> {
        self.transport
            .json("GET host", self.transport.request(Method::GET, "/v1/host"))
            .await
    }

    /// The last `length` lines of the serial log (`None`: all that is kept).
    pub async fn console_log(
        &self,
        id: ServerId,
        length: Option<u64>,
    ) -> Result<Vec<u8>, CallError> {
        let mut path = format!("/v1/machines/{id}/console-log");
        if let Some(length) = length {
            path = format!("{path}?length={length}");
        }
        let call = "GET console-log";
        let request = self.transport.request(Method::GET, &path);
        let mut response = self.transport.send(call, request).await?;
        self.transport.read(call, &mut response).await
    }

    /// The bytes of a copy that the agent says it has. A minute without any is the end of it.
    pub async fn copy(&self, id: ServerId, copy: CopyId) -> Result<CopyBody, CallError> {
        let call = "GET copy";
        let url = format!("{}/v1/machines/{id}/copies/{copy}", self.transport.endpoint);
        // As long as it takes: each wait has its own limit.
        let request = self.transport.http.get(url);
        let sent = tokio::time::timeout(STALL, self.transport.send(call, request)).await;
        let response = sent.map_err(|_| self.stalled(call))??;
        Ok(CopyBody {
            client: self.clone(),
            response,
            unpacker: Unpacker::default(),
        })
    }

    fn stalled(&self, call: &'static str) -> CallError {
        CallError::Deadline {
            call,
            endpoint: self.transport.endpoint.clone(),
            limit: STALL,
        }
    }

    /// Attaches to the serial line. Several watchers see the same output.
    pub async fn console(&self, id: ServerId) -> Result<Console, CallError> {
        let call = "GET console";
        let endpoint = self.transport.endpoint.clone();
        let limit = CONNECT * 2;
        let attempt = tokio::time::timeout(limit, self.attach(id)).await;
        attempt.map_err(|_| CallError::Deadline {
            call,
            endpoint,
            limit,
        })?
    }

    async fn attach(&self, id: ServerId) -> Result<Console, CallError> {
        let call = "GET console";
        let endpoint = &self.transport.endpoint;
        let unreachable = |detail: String| CallError::Unreachable {
            call,
            endpoint: endpoint.clone(),
            detail,
        };
        let address = address(endpoint).ok_or_else(|| unreachable("not an address".to_owned()))?;
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        let _ = tcp.set_nodelay(true);
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
            .map_err(|e| unreachable(e.to_string()))?;
        let stream = TlsConnector::from(self.websocket.clone())
            .connect(name, tcp)
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        let request = format!("wss://{address}/v1/machines/{id}/console")
            .into_client_request()
            .map_err(|e| unreachable(e.to_string()))?;
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((console, _)) => Ok(console),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
                let status = response.status();
                let body = response.body().clone().unwrap_or_default();
                Err(match serde_json::from_slice(&body) {
                    Ok(refusal) => CallError::Refused {
                        call,
                        endpoint: endpoint.clone(),
                        status,
                        refusal,
                    },
                    Err(_) => CallError::Status {
                        call,
                        endpoint: endpoint.clone(),
                        status,
                        body: String::from_utf8_lossy(&body).chars().take(500).collect(),
                    },
                })
            }
            Err(error) => Err(unreachable(error.to_string())),
        }
    }
}
