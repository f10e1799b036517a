//! Machines of this host: one actor each, the only writer of its record and the only owner of its
//! process.
//!
//! [`Machines`] finds the actor of a machine and makes new ones; [`actor`] carries intents out by the
//! decisions of `fractus_agent_api::decision`; [`record`] is what survives; [`process`] is the process.
//! Nothing here decides that a machine should move or be destroyed: only an intent does.

pub mod actor;
pub mod guest_agent;
pub mod line;
pub mod make;
pub mod process;
pub mod record;
pub mod registry;
pub mod take_down;
pub mod unheard;
pub mod upgrade;

pub use registry::{Machines, MachinesError};
