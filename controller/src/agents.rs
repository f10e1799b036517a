//! The controller's side of the agents: how they are called, what is known of their hosts, how they
//! join.
//!
//! Owns `trait Agent` with its HTTP and its simulated implementation, the live view of the hosts
//! ([`fleet`]), the tables of hosts and join tokens ([`host`], [`join`]) and the listener that agents
//! call ([`listener`]). Must never decide what a machine should be: that is [`crate::reconcile`].

pub mod fleet;
pub mod host;
pub mod http;
pub mod join;
pub mod listener;
pub mod simulated;

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use fractus_agent_api::copy::{CopyId, Part};
use fractus_agent_api::host::{FullReport, HostId, HostReport};
use fractus_agent_api::machine::{MachineReport, PutMachine, Refusal, ServerId};
use futures::Sink;
use futures::stream::BoxStream;

/// One host's agent, as the controller calls it.
#[async_trait]
pub trait Agent: Send + Sync + 'static {
    /// Answered once the intent is on the agent's disk. Idempotent; the same pair of counters again is
    /// answered with the machine's present state.
    async fn put(&self, id: ServerId, body: &PutMachine) -> Result<MachineReport, AgentError>;

    async fn get(&self, id: ServerId) -> Result<MachineReport, AgentError>;

    /// All machines that the agent has a record of.
    async fn list(&self) -> Result<FullReport, AgentError>;

    async fn host(&self) -> Result<HostReport, AgentError>;

    /// The last `lines` of the serial log, or all that is kept.
    async fn console_log(&self, id: ServerId, lines: Option<u64>) -> Result<Bytes, AgentError>;

    /// The bytes of a copy that the agent has said it has.
    async fn copy(&self, id: ServerId, copy: CopyId) -> Result<CopyStream, AgentError>;

    /// Attaches to the serial line.
    async fn console(&self, id: ServerId) -> Result<Console, AgentError>;
}

/// A copy that comes in: its pieces in their order, and its end.
pub type CopyStream = BoxStream<'static, Result<Part, AgentError>>;

/// A live serial line.
pub struct Console {
    pub output: BoxStream<'static, Result<Bytes, AgentError>>,
    pub input: Pin<Box<dyn Sink<Bytes, Error = AgentError> + Send>>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

/// Why a call has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// The agent understood and said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Whether the agent acted is not known.
    #[error("the agent of host {host} gave no answer: {detail}")]
    Unreachable { host: HostId, detail: String },
    #[error("host {host} is not known, or was removed")]
    NoHost { host: HostId },
}

/// Finds the agent of a host.
pub trait Agents: Send + Sync + 'static {
    fn agent(&self, host: HostId) -> Result<Arc<dyn Agent>, AgentError>;
}
