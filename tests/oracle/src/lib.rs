//! The oracle: is this answer one that OpenStack would have given?
//!
//! Holds every response to three witnesses, as far as each has something to say:
//!
//! - **recorded**: exchanges with a real cloud, of the same method, path template, action,
//!   microversion and status: which fields, of which types and forms, which headers;
//! - **Tempest**'s response schemas of the compute API, for that microversion;
//! - the **OpenAPI** response schemas which every real answer passes, and the statuses that the
//!   documents name.
//!
//! Owns the reference data (`data/`, derived by `generate.py`) and the comparison. It knows nothing
//! of Fractus, so the controller's own tests use it as well as the harness; it must never be made
//! lenient for one test's sake.

mod exchange;
mod failures;
mod headers;
mod recorded;
mod schemas;
mod template;

use std::sync::LazyLock;

pub use exchange::{Body, Exchange, Service};
pub use recorded::Recorded;

/// Operations that no witness knows; `tests/tests/oracle_coverage.rs` keeps it whole.
const WITHOUT: &str = include_str!("../data/without.txt");

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
        let known = self.recorded.failed_with(exchange) || self.openapi.names(exchange);
        failures::check(exchange, known, &mut violations);
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

    /// The whole judgement: holds an answer to every witness, and a success that none of them knows to
    /// the list of operations without an oracle (`data/without.txt`).
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn hold(&self, exchange: &Exchange) -> Result<(), String> {
        let request = format!(
            "{} /{}{}{} {} at 2.{}",
            exchange.method,
            exchange.service.name(),
            exchange.path,
            exchange
                .action
                .iter()
                .map(|a| format!(" {a}"))
                .collect::<String>(),
            exchange.status,
            exchange.microversion
        );
        match self.check(exchange) {
            Ok(verdict) if verdict.silent() && !self.listed(exchange) => Err(format!(
                "{request}: no witness knows such an answer, and tests/oracle/data/without.txt does \
                 not list the operation"
            )),
            Ok(_) => Ok(()),
            Err(violations) => {
                let said: Vec<String> = violations.iter().map(ToString::to_string).collect();
                Err(format!(
                    "{request} is not what OpenStack says:\n  {}\n{}",
                    said.join("\n  "),
                    exchange.shown()
                ))
            }
        }
    }

    /// Whether the operation stands in the list of those without an oracle.
    fn listed(&self, exchange: &Exchange) -> bool {
        let path = format!("/{}{}", exchange.service.name(), exchange.path);
        WITHOUT.lines().any(|line| {
            let mut words = line.split(' ');
            words.next() == Some(exchange.method.as_str())
                && words
                    .next()
                    .is_some_and(|listed| template::rank(listed, &path).is_some())
                && words.next() == exchange.action.as_deref()
        })
    }

    /// Whether any witness knows a successful answer of this operation. `path` may be a template
    /// with `{…}` for what varies, relative to the service (`/v2.1/servers/{id}`).
    pub fn knows(&self, service: Service, method: &str, path: &str, action: Option<&str>) -> bool {
        self.recorded.knows(service, method, path, action)
            || self.tempest.knows(service, method, path, action)
            || self.openapi.knows(service, method, path)
    }
}
