//! Which operations nobody can say how they should answer: listed in a file, so that a new one is
//! seen when it comes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeSet;

use fractus_controller::{compute, http, identity, image};
use fractus_oracle::{Oracle, Service};
use fractus_tests::tidy::checkout;

const LIST: &str = "tests/oracle/data/without.txt";

/// Every endpoint of the services that OpenStack has.
fn endpoints() -> Vec<http::Endpoint> {
    [identity::routes(), compute::routes(), image::routes()]
        .iter()
        .flat_map(|routes| routes.endpoints().to_vec())
        .collect()
}

fn service(endpoint: &http::Endpoint) -> Option<Service> {
    Service::ALL
        .into_iter()
        .find(|service| service.name() == endpoint.service.prefix())
}

#[test]
fn operations_without_any_oracle_are_listed() {
    let mut without = BTreeSet::new();
    let mut actions: BTreeSet<&str> = BTreeSet::new();
    let endpoints = endpoints();
    actions.extend(
        endpoints
            .iter()
            .filter(|e| e.action.is_some())
            .map(|e| e.path),
    );
    for endpoint in &endpoints {
        // A path whose body names an action is known by its actions.
        if endpoint.action.is_none() && actions.contains(endpoint.path) {
            continue;
        }
        let Some(service) = service(endpoint) else {
            continue;
        };
        let method = endpoint.method.as_str();
        if !Oracle::get().knows(service, method, endpoint.path, endpoint.action) {
            let action = endpoint
                .action
                .map(|action| format!(" {action}"))
                .unwrap_or_default();
            without.insert(format!(
                "{method} /{}{}{action}",
                service.name(),
                endpoint.path
            ));
        }
    }
    let listed = checkout().join(LIST);
    let head = "# Operations of which neither a recording, nor Tempest, nor OpenAPI knows a successful answer.\n\
                # Compared by tests/tests/oracle_coverage.rs; FRACTUS_BLESS=1 writes it anew.\n";
    let lines: String = without.iter().map(|line| format!("{line}\n")).collect();
    let wanted = format!("{head}{lines}");
    if std::env::var_os("FRACTUS_BLESS").is_some() {
        std::fs::write(&listed, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&listed).unwrap_or_default();
    assert_eq!(found, wanted, "{LIST} is not what the oracle does not know");
}
