//! Agents over the network: [`fractus_agent_api::client`], one client a host, made anew when the host's
//! address or our certificate changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use fractus_agent_api::client::CallError;
use fractus_agent_api::client::agent::AgentClient;
use fractus_agent_api::copy::{CopyId, Part};
use fractus_agent_api::host::{FullReport, HostId, HostReport};
use fractus_agent_api::machine::{MachineReport, PutMachine, ServerId};
use fractus_agent_api::tls::Credentials;
use futures::{SinkExt, StreamExt, future, stream};
use tokio_tungstenite::tungstenite::Message;

use super::fleet::Fleet;
use super::{Agent, AgentError, Agents, Console, CopyStream};

/// Agents at the addresses that their heartbeats gave.
pub struct HttpAgents {
    fleet: Arc<Fleet>,
    inner: Mutex<Inner>,
}

struct Inner {
    credentials: Credentials,
    clients: HashMap<HostId, Arc<HttpAgent>>,
}

impl HttpAgents {
    /// `credentials` are the controller's own.
    pub fn new(fleet: Arc<Fleet>, credentials: Credentials) -> Self {
        Self {
            fleet,
            inner: Mutex::new(Inner {
                credentials,
                clients: HashMap::new(),
            }),
        }
    }

    /// For all calls from now on.
    pub fn renew(&self, credentials: Credentials) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.credentials = credentials;
        inner.clients.clear();
    }
}

impl Agents for HttpAgents {
    fn agent(&self, host: HostId) -> Result<Arc<dyn Agent>, AgentError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(endpoint) = self.fleet.endpoint(host) else {
            // Its connection goes with it.
            inner.clients.remove(&host);
            return Err(AgentError::NoHost { host });
        };
        if let Some(client) = inner.clients.get(&host)
            && client.endpoint == endpoint
        {
            return Ok(Arc::clone(client) as Arc<dyn Agent>);
        }
        let client = AgentClient::new(host, &endpoint, &inner.credentials).map_err(|error| {
            AgentError::Unreachable {
                host,
                detail: error.to_string(),
            }
        })?;
        let client = Arc::new(HttpAgent {
            host,
            endpoint,
            client,
        });
        inner.clients.insert(host, Arc::clone(&client));
        Ok(client)
    }
}

struct HttpAgent {
    host: HostId,
    /// As given, to be compared with the next heartbeat's.
    endpoint: String,
    client: AgentClient,
}

impl HttpAgent {
    fn error(&self, error: CallError) -> AgentError {
        match error {
            CallError::Refused { refusal, .. } => AgentError::Refused(refusal),
            other => AgentError::Unreachable {
                host: self.host,
                detail: other.to_string(),
            },
        }
    }
}

#[async_trait]
impl Agent for HttpAgent {
    async fn put(&self, id: ServerId, body: &PutMachine) -> Result<MachineReport, AgentError> {
        self.client
            .put(id, body)
            .await
            .map_err(|error| self.error(error))
    }

    async fn get(&self, id: ServerId) -> Result<MachineReport, AgentError> {
        self.client.get(id).await.map_err(|error| self.error(error))
    }

    async fn list(&self) -> Result<FullReport, AgentError> {
        self.client.list().await.map_err(|error| self.error(error))
    }

    async fn host(&self) -> Result<HostReport, AgentError> {
        self.client.host().await.map_err(|error| self.error(error))
    }

    async fn console_log(&self, id: ServerId, lines: Option<u64>) -> Result<Bytes, AgentError> {
        let log = self.client.console_log(id, lines).await;
        log.map(Bytes::from).map_err(|error| self.error(error))
    }

    async fn copy(&self, id: ServerId, copy: CopyId) -> Result<CopyStream, AgentError> {
        let body = self.client.copy(id, copy).await;
        let body = body.map_err(|error| self.error(error))?;
        let host = self.host;
        let parts = stream::unfold(Some(body), move |body| async move {
            let mut body = body?;
            Some(match body.next().await {
                Ok(Ok(pieces)) => {
                    let pieces = pieces.into_iter().map(Part::Piece).map(Ok);
                    (pieces.collect(), Some(body))
                }
                Ok(Err(size)) => (vec![Ok(Part::End(size))], None),
                Err(error) => {
                    let detail = error.to_string();
                    (vec![Err(AgentError::Unreachable { host, detail })], None)
                }
            })
        });
        Ok(parts.flat_map(stream::iter).boxed())
    }

    async fn console(&self, id: ServerId) -> Result<Console, AgentError> {
        let socket = self
            .client
            .console(id)
            .await
            .map_err(|error| self.error(error))?;
        let (sink, stream) = socket.split();
        let host = self.host;
        let lost = move |error: tokio_tungstenite::tungstenite::Error| AgentError::Unreachable {
            host,
            detail: error.to_string(),
        };
        let output = stream.filter_map(move |message| {
            future::ready(match message {
                Ok(Message::Binary(bytes)) => Some(Ok(bytes)),
                Ok(Message::Text(text)) => Some(Ok(text.into())),
                Ok(_) => None,
                Err(error) => Some(Err(lost(error))),
            })
        });
        let input = sink
            .sink_map_err(lost)
            .with(|bytes: Bytes| future::ready(Ok::<_, AgentError>(Message::Binary(bytes))));
        Ok(Console {
            output: output.boxed(),
            input: Box::pin(input),
        })
    }
}
