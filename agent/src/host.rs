//! The host: what it is, who it is, and how it talks to controllers.

pub mod cgroup;
pub mod check;
pub mod credentials;
pub mod huge_pages;
pub mod inventory;
pub mod join;
pub mod makings;
pub mod push;
pub mod renew;
