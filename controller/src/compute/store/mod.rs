//! Compute's rows: entities and queries. Owns the tables `server`, `flavor`, `flavor_access`,
//! `keypair`, `compute_quota` and `console_token`; nothing outside of compute reads or writes
//! them. No decision is made here.

pub mod action;
pub mod console;
pub mod flavor;
pub mod keypair;
pub mod placement;
pub mod quota;
pub mod server;
