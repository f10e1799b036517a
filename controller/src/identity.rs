//! Identity v3: who someone is, what they may do where, and where the services are.
//!
//! Owns users, projects, domains, roles and their assignments, the catalogue, passwords and tokens.
//! It must never write anything for a login, and never answer with a password or its hash.
//!
//! A [`Realm`] turns tokens into callers for the whole controller. What it remembers is good for one
//! revision of identity's rows: each change raises the revision in its own transaction, each
//! validation reads it, so a revocation or a changed role holds at once, on every controller.

mod api;
pub mod boot;
mod login;
mod model;
mod password;
mod realm;
mod store;
mod token;

#[cfg(test)]
mod tests;

pub use api::routes;
pub use password::Passwords;
pub use realm::Realm;
pub use token::{KeyError, timestamp};
