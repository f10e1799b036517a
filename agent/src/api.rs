//! The agent's listener: HTTPS with mutual TLS, for controllers only. The table is in
//! `fractus_agent_api::host`.

pub mod listener;
pub mod routes;
mod sparse;
