//! What agents say of their hosts, and how a host joins.
//!
//! Who is who: certificates of the internal authority carry one URI each, `fractus://host/UUID` or
//! `fractus://controller/NAME` ([`crate::identity`]); a host's certificate also carries the host part of
//! its endpoint (DNS or IP) and is good for server and client authentication.
//!
//! Agent's listener (controllers call it, with a certificate of a controller):
//!
//! | call | body -> answer |
//! |---|---|
//! | `GET /v1/host` | -> [`HostReport`] |
//! | `GET /v1/machines` | -> [`FullReport`] |
//! | `PUT /v1/machines/{id}` | `PutMachine` -> `MachineReport`, or 409 `Refusal` |
//! | `GET /v1/machines/{id}` | -> `MachineReport`, or 404 `Refusal` |
//! | `GET /v1/machines/{id}/console-log?length=N` | -> the last N lines, `application/octet-stream` |
//! | `GET /v1/machines/{id}/copies/{copy}` | -> its bytes as pieces ([`crate::copy`]), or 404 `Refusal` |
//! | `GET /v1/machines/{id}/console` | WebSocket, binary frames both ways: the serial line |
//! | `GET /metrics` | -> Prometheus text |
//!
//! Controller's agents listener (agents call it, client certificate of a host, but for `join`):
//!
//! | call | body -> answer |
//! |---|---|
//! | `POST /agent/v1/join` | [`JoinRequest`] -> [`JoinAnswer`] |
//! | `POST /agent/v1/renew` | [`RenewRequest`] -> [`RenewAnswer`] |
//! | `POST /agent/v1/heartbeat` | [`Heartbeat`] -> [`HeartbeatAnswer`] |
//! | `POST /agent/v1/changes` | [`Changes`] -> 204, or 409 when a full report is needed |
//! | `POST /agent/v1/report` | [`FullReport`] -> 204 |
//! | `GET /agent/v1/images/{id}` | -> the image's bytes; 403 unless a machine of this host uses it |
//!
//! `GET …/images/{id}` may carry `Range: bytes=N-` (a download resumed); 206 from N on, or 200 with all.
//! With `Accept: `[`crate::copy::PIECES`] the bytes may come as pieces, of that content type: of what is zero nothing goes.
//! Errors of both listeners are a [`crate::machine::Refusal`] where one fits, else plain text. `join`
//! with a wrong or used token is 403. The agents listener sends its root in its chain.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cpu::Cpu;
use crate::machine::MachineReport;

/// A host, as its certificate names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostId(pub Uuid);

impl std::fmt::Display for HostId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Inventory of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    pub version: u32,
    /// Version of the agent's build, `0.1.0`.
    pub agent_version: String,
    pub hostname: String,
    /// `/proc/sys/kernel/random/boot_id` of the host.
    pub boot_id: Uuid,
    pub cpus: u32,
    pub memory_mib: u64,
    /// Free for machines now, and reserved for the host itself.
    pub memory_free_mib: u64,
    /// The file system that holds machines' disks.
    pub disk_gib: u64,
    pub disk_free_gib: u64,
    pub cpu: CpuReport,
    pub kernel: String,
    /// 1, 5 and 15 minutes.
    pub load: [f64; 3],
    pub uptime_s: u64,
    /// What the host lacks, in words for an operator; empty when all is there. Machines run without
    /// it, with less.
    #[serde(default)]
    pub lacks: Vec<String>,
    /// What it lacks without which no machine runs here at all: nothing is placed on such a host.
    #[serde(default)]
    pub unable: Vec<String>,
    /// Guests can go on here while their memory is still coming.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub post_copy: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CpuReport {
    pub architecture: String,
    pub vendor: String,
    pub model: String,
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
    /// Names as in /proc/cpuinfo.
    pub features: Vec<String>,
    /// What KVM gives guests of it; none: an agent of before, or a host without KVM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Box<Cpu>>,
}

/// Every machine the agent has a record of, at sequence number `sequence`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FullReport {
    pub version: u32,
    /// One life of the agent process: a new one starts its sequence at 0.
    pub agent_instance: Uuid,
    pub sequence: u64,
    pub machines: Vec<MachineReport>,
}

/// Changes since the last push; `sequence` is one more than the push before, else the controller
/// answers 409 and the agent sends a [`FullReport`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Changes {
    pub version: u32,
    pub agent_instance: Uuid,
    pub sequence: u64,
    pub machines: Vec<MachineReport>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub version: u32,
    /// The one-time token of `fractus host join-token`.
    pub token: String,
    /// PKCS#10 certificate signing request, PEM. The key never leaves the host.
    pub csr: String,
    /// `https://ADDRESS:PORT` under which controllers reach this agent; its host part is put into the
    /// certificate.
    pub endpoint: String,
    pub host: HostReport,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinAnswer {
    pub host_id: HostId,
    /// The host's certificate with its chain, PEM.
    pub certificate: String,
    /// Roots to trust, PEM; two while they are being replaced.
    pub roots: String,
    /// Agents listeners of all controllers, `https://ADDRESS:PORT`.
    pub controllers: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewRequest {
    pub version: u32,
    pub csr: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewAnswer {
    pub certificate: String,
    pub roots: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub version: u32,
    pub agent_instance: Uuid,
    /// The sequence of the last push; a controller that has seen another asks for a full report.
    pub sequence: u64,
    pub endpoint: String,
    pub host: HostReport,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatAnswer {
    pub controllers: Vec<String>,
    pub roots: String,
    /// Seconds until the next one.
    pub interval_s: u32,
    /// The agent should send a [`FullReport`] now.
    #[serde(default)]
    pub report: bool,
}
