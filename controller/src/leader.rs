//! Which controllers there are, and which one of them leads.
//!
//! Every controller answers users, serves images and writes what is wanted. What carries it out is one
//! controller's at a time, the leader's: the engine of operations, the reconciler, and the view of the
//! hosts that both go by, which is only whole where the agents' reports come together.
//!
//! The leader is who has begun the present *term* ([`Term`], a row, moved by compare-and-set). All
//! raise a count every few seconds; when the leader's stands still for [`LEASE`], by the clock of who
//! looks, another one begins the next term. Time alone would not make that safe: a leader that was
//! frozen and thaws believes that it still leads. So everything that the engine and the reconciler write
//! is written with the term they began in ([`Lead::database`]), and is refused, in the same transaction,
//! when it is not the present one any more. What it tells agents meanwhile is what they were told
//! already, or older, and they refuse what is older.
//!
//! Owns the tables `controller` and `leader`. Must never know what a leader does.

mod calls;
mod seat;
mod store;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use sea_orm::DatabaseConnection;
use tokio::sync::watch;
use uuid::Uuid;

pub use seat::{Seat, Turn};

use crate::database::Database;

/// Pause between two beats.
pub const BEAT: Duration = Duration::from_secs(3);
/// A leader whose beats stand still for so long is succeeded.
pub const LEASE: Duration = Duration::from_secs(15);

/// A time of leadership. Terms are counted from 1 and never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub i64);

/// A controller, of itself.
#[derive(Debug, Clone)]
pub struct Me {
    pub name: String,
    /// Of this life.
    pub incarnation: Uuid,
    pub agents_url: String,
}

/// What a controller knows of leadership at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct View {
    /// The term in which this controller leads.
    term: Option<Term>,
    /// Listeners for agents of all controllers that live, the leader's first.
    controllers: Vec<String>,
}

/// Whether this controller leads, and what it may write when it does. Cheap to clone.
#[derive(Clone)]
pub struct Lead {
    database: Database,
    view: watch::Receiver<View>,
    /// There is no other one: it leads without a term.
    alone: bool,
}

impl Lead {
    /// The only controller of its database.
    pub fn alone(database: Database, agents_url: &str) -> Self {
        let controllers = vec![agents_url.to_owned()];
        // A receiver keeps what it has seen when its sender is gone.
        let (_, view) = watch::channel(View {
            term: None,
            controllers,
        });
        Self {
            database,
            view,
            alone: true,
        }
    }

    /// The database, for what a leader does from here on: its writes are refused once another term
    /// has begun. `None` while another controller leads.
    pub fn database(&self) -> Option<Database> {
        if self.alone {
            return Some(self.database.clone());
        }
        let term = self.view.borrow().term?;
        Some(self.database.fenced(Arc::new(term)))
    }

    pub fn leads(&self) -> bool {
        self.alone || self.view.borrow().term.is_some()
    }

    /// For reading, whoever leads.
    pub fn reader(&self) -> &DatabaseConnection {
        self.database.reader()
    }

    /// Listeners for agents of all controllers, the leader's first: agents try them in this order.
    pub fn controllers(&self) -> Vec<String> {
        self.view.borrow().controllers.clone()
    }
}

impl From<Database> for Lead {
    /// A controller that no agent calls.
    fn from(database: Database) -> Self {
        Self::alone(database, "")
    }
}

impl std::fmt::Debug for Lead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lead")
            .field("alone", &self.alone)
            .field("view", &*self.view.borrow())
            .finish_non_exhaustive()
    }
}
