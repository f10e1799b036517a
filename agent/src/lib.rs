//! The agent of a host: runs as root on every KVM host, one process a machine.
//!
//! Reading order: [`daemon`] puts the parts together; [`machine`] is the heart (an actor a machine);
//! [`vm`] is the other side, the machine's own process. [`api`] listens to controllers, [`host`] talks
//! to them. `unsafe` stands only in `vm`, `machine/process` and
//! `network/tap`.

pub mod api;
pub mod clock;
pub mod console;
pub mod daemon;
pub mod host;
pub mod image;
pub mod machine;
pub mod metrics;
pub mod network;
pub mod paths;
pub mod vm;
pub mod volume;
