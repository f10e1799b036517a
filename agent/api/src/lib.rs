//! The language between controller and agent: JSON over HTTP/2 with mutual TLS.
//!
//! Owns the wire types of both directions and the client that speaks them. It must never depend on
//! the agent or the controller. Every body that is persisted or sent carries [`VERSION`]; a newer
//! controller speaks to an agent one release older, so fields are only ever added, with defaults.

pub use fractus_cpuid as cpu;

pub mod client;
pub mod copy;
pub mod decision;
pub mod device;
pub mod guest;
pub mod host;
pub mod identity;
pub mod machine;
pub mod migration;
pub mod size;
pub mod tls;

/// Version of this protocol. Raised when a field's meaning changes, not when one is added.
pub const VERSION: u32 = 1;
