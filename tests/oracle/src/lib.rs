//! The oracle: is this answer one that OpenStack would have given?
//!
//! Holds every response to three witnesses, as far as each has something to say:
//!
//! - **recorded**: exchanges with a real cloud, of the same method, path template, action,
//!   microversion and status: which fields, of which types and forms, which headers;
//! - **Tempest**'s response schemas of the compute API, for that microversion;
//! - the **OpenAPI** response schemas which every real answer passes.
//!
//! Owns the reference data (`data/`, derived by `generate.py`) and the comparison. It knows nothing
//! of Fractus, so the controller's own tests use it as well as the harness; it must never be made
//! lenient for one test's sake.

mod exchange;
mod recorded;
mod schemas;
mod template;

use std::sync::LazyLock;

pub use exchange::{Body, Exchange, Service};
pub use recorded::Recorded;

/// What an answer was held to. [`Verdict::silent`] when nothing had anything to say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub recorded: Recorded,
    pub tempest: bool,
    pub openapi: bool,
}

impl Verdict {
    /// No witness knows an answer of this operation with this status.
    pub fn silent(&self) -> bool {
        self.recorded == Recorded::Nothing && !self.tempest && !self.openapi
    }
}

/// How an answer differs from what OpenStack says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{witness}: {place}: {what}")]
pub struct Violation {
    /// `recorded`, `tempest` or `openapi`.
    pub witness: &'static str,
    /// Where in the answer: `body.server.id`, `header x-openstack-request-id`, `status`.
    pub place: String,
    pub what: String,
}

/// The reference data, loaded once a process.
#[derive(Debug)]
pub struct Oracle {
    recorded: recorded::Recordings,
    tempest: schemas::Tempest,
    openapi: schemas::OpenApi,
}

impl Oracle {
    /// The oracle with the data that was built in.
    pub fn get() -> &'static Self {
        static ORACLE: LazyLock<Oracle> = LazyLock::new(|| Oracle {
            recorded: recorded::Recordings::load(),
            tempest: schemas::Tempest::load(),
            openapi: schemas::OpenApi::load(),
        });
        &ORACLE
    }

    /// Holds one answer to every witness.
    ///
    /// # Errors
    /// Everything in which the answer differs from what OpenStack says.
    pub fn check(&self, exchange: &Exchange) -> Result<Verdict, Vec<Violation>> {
        let mut violations = Vec::new();
        let recorded = self.recorded.check(exchange, &mut violations);
        let tempest = self.tempest.check(exchange, &mut violations);
        let openapi = self.openapi.check(exchange, &mut violations);
        if violations.is_empty() {
            Ok(Verdict {
                recorded,
                tempest,
                openapi,
            })
        } else {
            Err(violations)
        }
    }

    /// Whether any witness knows a successful answer of this operation. `path` may be a template
    /// with `{…}` for what varies, relative to the service (`/v2.1/servers/{id}`).
    pub fn knows(&self, service: Service, method: &str, path: &str, action: Option<&str>) -> bool {
        self.recorded.knows(service, method, path, action)
            || self.tempest.knows(service, method, path, action)
            || self.openapi.knows(service, method, path)
    }
}
