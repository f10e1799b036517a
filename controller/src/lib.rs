//! The cloud: the controller (`fractus serve`) and the client, as a library.
//!
//! One module a service (`identity`, `image`, `compute`, ...), each of the same parts: `api` (routes,
//! bodies), `model`, `store`, `ops`; and the parts beside them. The map is in ARCHITECTURE.md. Must
//! never touch KVM, and has no `unsafe`.

#![forbid(unsafe_code)]

pub mod agents;
pub mod cli;
pub mod clock;
pub mod compute;
pub mod database;
pub mod event;
pub mod hosts;
pub mod http;
pub mod identity;
pub mod image;
pub mod leader;
pub mod machines;
pub mod migrations;
pub mod operation;
pub mod policy;
pub mod random;
pub mod reconcile;
pub mod scheduler;
pub mod secret;
pub mod serve;
#[cfg(test)]
mod simulation;
pub mod testing;
pub mod tls;

#[cfg(test)]
mod malformed;
#[cfg(test)]
mod rights;
#[cfg(test)]
mod small_disk;
