//! With which statuses an operation may fail: those that were recorded of it, those that the API
//! reference names, what the frame of each service answers whatever the operation ([`general`]), and the
//! list `data/failures.txt`, which gives a reason for each line.

use crate::Violation;
use crate::exchange::{Exchange, Service};
use crate::template;

/// `METHOD PATH [ACTION] STATUS: REASON`
const LISTED: &str = include_str!("../data/failures.txt");

/// `known`: a recording or the API reference has it.
pub fn check(exchange: &Exchange, known: bool, violations: &mut Vec<Violation>) {
    if exchange.status < 400 || known || general(exchange) || listed(exchange) {
        return;
    }
    violations.push(Violation {
        witness: "failures",
        place: "status".to_owned(),
        what: format!(
            "{}: neither a recording nor the API reference has this failure of the operation, and \
             tests/oracle/data/failures.txt does not give a reason for it",
            exchange.status
        ),
    });
}

/// What stands before every operation.
fn general(exchange: &Exchange) -> bool {
    let writes = ["POST", "PUT", "PATCH"].contains(&exchange.method.as_str());
    match exchange.status {
        // No token, or one that is not good any more: keystonemiddleware.
        401 => true,
        // Not allowed to this caller, or over a quota; a thing in the path that is not there, or not for
        // this caller; a path or a microversion that has no such operation.
        403 | 404 => true,
        // A body that is no JSON, or that the operation's schema refuses.
        400 => writes,
        // The routers of keystone and glance know the path and not the method.
        405 => exchange.service != Service::Compute,
        // A microversion that there is not.
        406 => exchange.service == Service::Compute,
        // oslo.middleware's limit of a body.
        413 => writes,
        // A body that is no JSON by its type.
        415 => writes && exchange.service != Service::Identity,
        // The disk is full: there is no such answer in OpenStack, whose database is elsewhere.
        503 => writes || exchange.method == "DELETE",
        _ => false,
    }
}

fn listed(exchange: &Exchange) -> bool {
    let path = format!("/{}{}", exchange.service.name(), exchange.path);
    let lines = LISTED.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once(": "))
        .any(|(operation, reason)| {
            let words: Vec<&str> = operation.split(' ').collect();
            let (method, listed, action, status) = match words[..] {
                [method, listed, status] => (method, listed, None, status),
                [method, listed, action, status] => (method, listed, Some(action), status),
                _ => return false,
            };
            method == exchange.method
                && template::rank(listed, &path).is_some()
                && action == exchange.action.as_deref()
                && status == exchange.status.to_string()
                && !reason.is_empty()
        })
}
