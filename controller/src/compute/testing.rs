//! For tests: compute's part of an App.

use std::sync::Arc;

use super::ops::{self, Compute};
use crate::agents::fleet::Fleet;
use crate::agents::simulated::SimulatedAgents;
use crate::clock::SystemClock;
use crate::database::Database;
use crate::operation::{Engine, Kinds};
use crate::random::SystemRandom;
use crate::reconcile::Machines;
use crate::secret::MasterKey;

/// A compute service without hosts, whose engine is not started.
pub fn idle(database: &Database) -> Compute {
    with(
        database,
        Arc::new(SimulatedAgents::default()),
        Arc::new(Fleet::default()),
    )
}

/// A compute service with these agents, whose engine is not started.
pub fn with(database: &Database, agents: Arc<SimulatedAgents>, fleet: Arc<Fleet>) -> Compute {
    let clock = SystemClock::shared();
    let machines = Machines::new(database.clone(), agents, fleet, Arc::clone(&clock));
    let machines = match MasterKey::ephemeral() {
        Ok(key) => machines.with_key(key),
        Err(_) => machines,
    };
    let mut kinds = Kinds::default();
    ops::register(&mut kinds, &machines, &clock);
    let engine = Engine::new(database.clone(), kinds, clock, SystemRandom::shared());
    Compute { engine, machines }
}
