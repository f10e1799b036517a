//! What all handlers share.

use std::fmt;
use std::sync::Arc;

use crate::clock::Clock;
use crate::compute::Compute;
use crate::database::Database;
use crate::hosts::Hosts;
use crate::http::{Authenticate, PublicUrl};
use crate::identity::Realm;
use crate::image::Images;
use crate::random::Random;

/// The composition, made once by `serve` (or by a test) and handed to every handler as state.
#[derive(Clone)]
pub struct App(Arc<AppParts>);

/// Parts of an [`App`]. A module that handlers need is a field here and an accessor below.
pub struct AppParts {
    pub public_url: PublicUrl,
    pub database: Database,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub authenticator: Arc<dyn Authenticate>,
    pub images: Images,
    pub compute: Compute,
    pub realm: Arc<Realm>,
    pub hosts: Hosts,
}

impl App {
    pub fn new(parts: AppParts) -> Self {
        Self(Arc::new(parts))
    }

    pub fn public_url(&self) -> &PublicUrl {
        &self.0.public_url
    }

    pub fn database(&self) -> &Database {
        &self.0.database
    }

    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    /// Microseconds since the epoch.
    pub fn now_us(&self) -> i64 {
        self.0.clock.now_us()
    }

    pub fn random(&self) -> &Arc<dyn Random> {
        &self.0.random
    }

    /// Compute's operations and machines.
    pub fn compute(&self) -> &Compute {
        &self.0.compute
    }

    /// What is known of hosts, and how they join.
    pub fn hosts(&self) -> &Hosts {
        &self.0.hosts
    }

    pub fn images(&self) -> &Images {
        &self.0.images
    }

    /// Validates tokens.
    pub fn authenticator(&self) -> &dyn Authenticate {
        &*self.0.authenticator
    }

    /// Passwords and token keys.
    pub fn realm(&self) -> &Realm {
        &self.0.realm
    }
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("public_url", &self.0.public_url)
            .finish_non_exhaustive()
    }
}
