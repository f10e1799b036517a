//! The cloud: the controller (`fractus serve`) and the client, as a library.
//!
//! One module a service and the parts beside them; the map is in ARCHITECTURE.md. Must never touch
//! KVM, and has no `unsafe`.

#![forbid(unsafe_code)]

pub mod clock;
pub mod database;
pub mod random;
