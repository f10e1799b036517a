//! What is wanted against what agents report.
//!
//! Owns the table `machine` (and [`migration`]): of every server, its owner `{host, generation}`, the intent
//! `{revision, wanted}` and what was last settled. That row is the only commit point of ownership, and
//! is only ever changed by compare-and-set or from within the one write transaction ([`machine`]).
//!
//! [`Machines`] is what operations use: place a server, own it, change what is wanted, and
//! [`Machines::converge`] upon it. [`Reconciler`] looks after all that no operation is looking after:
//! guests that end by themselves, agents that missed an intent, hosts that return with machines that
//! are not theirs any more.
//!
//! What must never happen here: that time alone moves or ends a machine; that a machine is destroyed
//! which the database does not say is gone; that a server is started on its host while another host
//! speaks of a process of it.

mod converge;
pub mod machine;
pub mod migration;
mod reconciler;
mod transit;
mod turns;

pub use converge::{
    ASK_AGAIN, Converged, Lost, MIGRATIONS_PER_HOST, Machines, NoHost, Whose, runs,
};
pub use reconciler::{Life, Observer, Reconciler};
pub use transit::{Dropped, state_of};
