//! Whole clouds for tests: the real `fractus serve`, real agents, real machines, all on this host.
//!
//! Owns every process and file that it makes: state folders in a temporary folder, free ports on
//! loopback, a range of user ids for the machines. All of it ends with the test, also when the test
//! panics or is killed (`guardian`). Must never touch a process that it did not start.

mod cli;
pub mod client;
mod cloud;
mod guardian;
mod machines;
mod network;
mod process;
mod typed;
mod wait;

pub use cli::Cli;
pub use client::{Answer, Client};
pub use cloud::{Cloud, Options, Ways};
pub use guardian::Guardian;
pub use machines::{MachineProcess, processes as machine_processes};
pub use network::{HostNetwork, in_a_segment};
pub use process::{Process, program};
pub use typed::{Typed, asks, has_lost};
pub use wait::until;
