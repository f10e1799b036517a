//! Headers of an answer: which ones, and what they say.
//!
//! A value is compared by its form: ids, numbers and addresses are replaced by their kind, as
//! `generate.py` does with the recorded ones (`header_form`).

use std::collections::BTreeSet;

use crate::Violation;
use crate::exchange::{Body, Exchange, Service};

/// Headers that were in every recording of an answer are in ours.
pub fn names(exchange: &Exchange, wanted: &[String], violations: &mut Vec<Violation>) {
    for name in wanted {
        // A body that we do not have needs no type.
        if name == "content-type" && exchange.body == Body::None {
            continue;
        }
        if exchange.header(name).is_none() {
            violations.push(violation(name, "is missing".to_owned()));
        }
    }
}

/// A header has one of the forms that are known of it; of one that was never recorded nothing is known.
pub fn value(
    exchange: &Exchange,
    name: &str,
    value: &str,
    known: &BTreeSet<&String>,
    violations: &mut Vec<Violation>,
) {
    if known.is_empty() || name == "content-type" && exchange.body == Body::None {
        return;
    }
    let Some(form) = form(exchange.service, name, value) else {
        let what = format!("{value:?} leads to no place of this service");
        violations.push(violation(name, what));
        return;
    };
    if !known.iter().any(|known| fits(known, &form)) {
        violations.push(violation(
            name,
            format!("{value:?} where {known:?} was recorded"),
        ));
    }
}

/// What is said twice is said alike.
pub fn agree(exchange: &Exchange, violations: &mut Vec<Violation>) {
    if exchange.service != Service::Compute {
        return;
    }
    let said = |name| exchange.header(name).unwrap_or_default();
    let (id, again) = (said("x-openstack-request-id"), said("x-compute-request-id"));
    if id != again {
        let what = format!("{again:?} beside x-openstack-request-id {id:?}");
        violations.push(violation("x-compute-request-id", what));
    }
    let (new, old) = (
        said("openstack-api-version"),
        said("x-openstack-nova-api-version"),
    );
    if new.strip_prefix("compute ").unwrap_or_default() != old {
        let what = format!("{old:?} beside openstack-api-version {new:?}");
        violations.push(violation("x-openstack-nova-api-version", what));
    }
}

fn violation(name: &str, what: String) -> Violation {
    Violation {
        witness: "recorded",
        place: format!("header {name}"),
        what,
    }
}

/// As `header_form` of `generate.py`; `None` for a Location outside of the service.
fn form(service: Service, name: &str, value: &str) -> Option<String> {
    let value = match name {
        "location" => {
            let (_, rest) = value.split_once("://")?;
            let path = rest.find('/').map_or("", |slash| &rest[slash..]);
            let path = path.strip_prefix('/')?;
            // An image that is made of a server is of the other service.
            let image = path
                .strip_prefix(Service::Image.name())
                .filter(|rest| service == Service::Compute && rest.starts_with("/images/"));
            path.strip_prefix(service.name()).or(image)?
        }
        "www-authenticate" => {
            let uri = value.strip_prefix("Keystone uri=\"")?.strip_suffix('"')?;
            let url = ["http://", "https://"].iter().any(|s| uri.starts_with(s));
            return url.then(|| "Keystone uri=\"{url}\"".to_owned());
        }
        "openstack-api-version" | "x-openstack-nova-api-version" => {
            let (before, minor) = value.rsplit_once("2.")?;
            let number = !minor.is_empty() && minor.bytes().all(|byte| byte.is_ascii_digit());
            return Some(format!("{before}2.{}", if number { "{n}" } else { minor }));
        }
        "content-range" => return Some(numbers(value)),
        _ => value,
    };
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    let kinds = value.split_inclusive(word).map(|part| {
        let (text, end) = match part.char_indices().next_back() {
            Some((at, last)) if word(last) => part.split_at(at),
            _ => (part, ""),
        };
        format!("{}{end}", kind(text))
    });
    Some(kinds.collect())
}

/// A word, or what kind of id it is.
fn kind(text: &str) -> &str {
    let hex = |part: &str| {
        part.bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let uuid = |text: &str| {
        let parts: Vec<&str> = text.split('-').collect();
        let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
        lengths == [8, 4, 4, 4, 12] && parts.iter().all(|part| hex(part))
    };
    match text.strip_prefix("req-") {
        Some(id) if uuid(id) => "req-{uuid}",
        None if uuid(text) => "{uuid}",
        None if text.len() == 32 && hex(text) => "{hex32}",
        _ => text,
    }
}

fn numbers(value: &str) -> String {
    let mut form = String::new();
    for letter in value.chars() {
        match letter {
            '0'..='9' if form.ends_with("{n}") => {}
            '0'..='9' => form.push_str("{n}"),
            other => form.push(other),
        }
    }
    form
}

/// `{name}` stands for any one part of a path.
fn fits(known: &str, form: &str) -> bool {
    let (known, form) = (known.split('/'), form.split('/'));
    known.clone().count() == form.clone().count()
        && known
            .zip(form)
            .all(|(known, form)| known == "{name}" && !form.is_empty() || known == form)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_varies_is_replaced_by_its_kind() {
        let uuid = "0a11ce00-0000-4000-8000-000000000001";
        let form = |name, value: &str| form(Service::Compute, name, value).unwrap_or_default();
        assert_eq!(
            form("x-openstack-request-id", &format!("req-{uuid}")),
            "req-{uuid}"
        );
        assert_eq!(form("x-openstack-request-id", "req-1"), "req-1");
        let there = format!("https://cloud:8443/compute/v2.1/servers/{uuid}/tags/a");
        assert_eq!(form("location", &there), "/v2.1/servers/{uuid}/tags/a");
        assert_eq!(form("location", "/v2.1/servers/1"), "", "not absolute");
        assert_eq!(
            form("location", "https://cloud/image/v2/x"),
            "",
            "elsewhere"
        );
        let image = format!("https://cloud/image/images/{uuid}");
        assert_eq!(form("location", &image), "/images/{uuid}");
        assert_eq!(
            form("openstack-api-version", "compute 2.96"),
            "compute 2.{n}"
        );
        assert_eq!(form("content-range", "bytes 0-19/300"), "bytes {n}-{n}/{n}");
        assert_eq!(
            form("content-type", "application/json; charset=UTF-8"),
            "application/json; charset=UTF-8"
        );
    }

    #[test]
    fn a_name_in_a_path_is_any_name() {
        assert!(fits(
            "/v2.1/servers/{uuid}/tags/{name}",
            "/v2.1/servers/{uuid}/tags/x"
        ));
        assert!(!fits(
            "/v2.1/servers/{uuid}/tags/{name}",
            "/v2.1/servers/{uuid}/tags/"
        ));
        assert!(!fits("/v2.1/servers/{uuid}", "/v2.1/servers/{uuid}/tags"));
    }
}
