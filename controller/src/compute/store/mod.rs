//! Compute's rows: entities and queries. Owns the tables `server`, `flavor`, `flavor_access`,
//! `keypair`, `server_action` and `server_action_event`; nothing outside of compute reads or writes
//! them. No decision is made here.

pub mod action;
pub mod flavor;
pub mod keypair;
pub mod placement;
pub mod server;
