//! For tests: compute's part of an App.

use std::sync::Arc;

use super::ops::{self, Compute};
use crate::agents::fleet::Fleet;
use crate::agents::simulated::SimulatedAgents;
use crate::clock::SystemClock;
use crate::database::Database;
use crate::image::Images;
use crate::image::blob::FileStore;
use crate::operation::{Engine, Kinds};
use crate::random::SystemRandom;
use crate::reconcile::Machines;
use crate::secret::MasterKey;

/// A compute service without hosts, whose engine is not started.
pub fn idle(database: &Database) -> Compute {
    let blobs = FileStore::at(std::env::temp_dir(), "idle");
    let images = Images::new(database.clone(), Arc::new(blobs));
    with(
        database,
        &images,
        Arc::new(SimulatedAgents::default()),
        Arc::new(Fleet::default()),
    )
}

/// A compute service with these agents, whose engine is not started.
pub fn with(
    database: &Database,
    images: &Images,
    agents: Arc<SimulatedAgents>,
    fleet: Arc<Fleet>,
) -> Compute {
    let clock = SystemClock::shared();
    let machines = Machines::new(database.clone(), agents, fleet, Arc::clone(&clock));
    let machines = match MasterKey::ephemeral() {
        Ok(key) => machines.with_key(key),
        Err(_) => machines,
    };
    let mut kinds = Kinds::default();
    let random = SystemRandom::shared();
    ops::register(&mut kinds, &machines, images, &clock, &random);
    let engine = Engine::new(database.clone(), kinds, clock, random);
    Compute { engine, machines }
}
