//! Compute: flavors, keypairs, servers and what is done to them (OpenStack compute API, 2.1 to 2.96).
//!
//! Owns the rows of [`store`], the meaning of a server's state ([`model::state`]) and the operations
//! that carry servers from one to another ([`ops`]). It must never speak to a host by itself: what a
//! host should run is written as intent, and steps of operations put it there.

pub mod api;
pub mod model;
pub mod ops;
pub mod quota;
pub mod store;
pub mod testing;

pub use api::routes;
pub use ops::{Compute, ServerObserver, register};

#[cfg(test)]
mod tests;
