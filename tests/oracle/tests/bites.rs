//! The oracle accepts what a real OpenStack said, and refuses it once a field is dropped, mistyped or
//! added. Uses the examples in data/, and all recordings where shared/ stands beside the checkout.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on should stop"
)]

use std::path::{Path, PathBuf};

use fractus_oracle::{Exchange, Oracle, Recorded, Service, Verdict, Violation};
use serde_json::{Value, json};

fn examples() -> Vec<Value> {
    serde_json::from_str(include_str!("../data/examples.json")).unwrap()
}

/// `FRACTUS_SHARED`, or shared/ beside the checkout or one of the folders that it is in.
fn recordings() -> Option<PathBuf> {
    let named = std::env::var_os("FRACTUS_SHARED").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|at| at.join("shared"));
    named
        .into_iter()
        .chain(beside)
        .map(|at| at.join("openstack"))
        .find(|at| at.is_dir())
}

fn exchange(example: &Value) -> Exchange {
    let text = |name: &str| example[name].as_str().unwrap().to_owned();
    let headers: Vec<(String, String)> = example["headers"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
        .map(|(name, value)| match name.as_str() {
            "location" => (name, ours(&text("path"), &value)),
            _ => (name, value),
        })
        .collect();
    let body = match &example["body"] {
        Value::Null => Vec::new(),
        Value::String(text) => text.as_bytes().to_vec(),
        body => serde_json::to_vec(body).unwrap(),
    };
    let status = u16::try_from(example["status"].as_u64().unwrap()).unwrap();
    let request = (!example["request"].is_null()).then(|| &example["request"]);
    Exchange::new(
        &text("method"),
        &text("path"),
        request,
        status,
        headers,
        &body,
    )
    .unwrap()
}

/// Where a recorded Location leads in a cloud that has all its services at one address; one that is there
/// already stays.
fn ours(path: &str, location: &str) -> String {
    let service = path.split('/').nth(1).unwrap_or_default();
    match location.strip_prefix("http://127.0.0.1:") {
        Some(rest) => {
            let (_, below) = rest.split_once('/').unwrap();
            format!("http://cloud/{service}/{below}")
        }
        None => location.to_owned(),
    }
}

fn check(example: &Value) -> Result<Verdict, Vec<Violation>> {
    Oracle::get().check(&exchange(example))
}

/// Every way to a field of the body, as JSON pointers.
fn fields(value: &Value, at: &str, into: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, inner) in object {
                let name = name.replace('~', "~0").replace('/', "~1");
                into.push(format!("{at}/{name}"));
                fields(inner, &format!("{at}/{name}"), into);
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                fields(inner, &format!("{at}/{index}"), into);
            }
        }
        _ => {}
    }
}

fn example(method: &str, path: &str, status: u64) -> Value {
    examples()
        .into_iter()
        .find(|known| {
            known["method"] == method && known["path"] == path && known["status"] == status
        })
        .unwrap_or_else(|| panic!("no example of {method} {path} {status}"))
}

#[test]
fn what_a_real_cloud_said_is_accepted() {
    let examples = examples();
    assert!(examples.len() > 150, "only {} examples", examples.len());
    for example in examples {
        let verdict = check(&example);
        assert!(
            verdict.is_ok(),
            "{} {}: {verdict:#?}",
            example["method"],
            example["path"]
        );
    }
}

#[test]
fn every_recording_is_accepted_where_the_recordings_are() {
    let Some(folder) = recordings() else {
        println!("no shared/openstack beside this checkout: only the examples were tried");
        return;
    };
    let mut refused = Vec::new();
    for service in Service::ALL {
        let path = folder.join(format!("{}.jsonl", service.name()));
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let recorded: Value = serde_json::from_str(line).unwrap();
            let body = &recorded["response_body"];
            if body.to_string().contains("\"$") {
                continue; // cut
            }
            let action = recorded["request_body"].clone();
            let example = json!({
                "method": recorded["method"], "status": recorded["status"], "body": body,
                "path": format!("/{}{}", service.name(), recorded["path"].as_str().unwrap()),
                "request": action, "headers": recorded["response_headers"],
            });
            if let Err(violations) = check(&example) {
                refused.push(format!(
                    "{} {}: {violations:?}",
                    example["method"], example["path"]
                ));
            }
        }
    }
    assert!(
        refused.is_empty(),
        "{} refused:\n{}",
        refused.len(),
        refused.join("\n")
    );
}

#[test]
fn a_dropped_field_fails() {
    for (method, path, status, field) in [
        ("GET", "/compute/v2.1/servers/{id}", 200, "status"),
        (
            "GET",
            "/compute/v2.1/servers/{id}",
            200,
            "OS-EXT-STS:vm_state",
        ),
        ("GET", "/compute/v2.1/flavors/{id}", 200, "vcpus"),
        ("GET", "/identity/v3/users/{id}", 200, "domain_id"),
        ("POST", "/identity/v3/projects", 201, "enabled"),
        ("GET", "/image/v2/images/{id}", 200, "status"),
        ("GET", "/compute/v2.1/servers/{id}", 404, "message"),
    ] {
        let mut spoilt = example(method, path, status);
        let body = spoilt["body"].as_object_mut().unwrap();
        if body.remove(field).is_none() {
            let inner = body.values_mut().next().unwrap().as_object_mut().unwrap();
            inner
                .remove(field)
                .unwrap_or_else(|| panic!("{path} has no {field}"));
        }
        let violations = check(&spoilt).expect_err(&format!("{path} without {field} was accepted"));
        assert!(
            violations
                .iter()
                .any(|violation| violation.to_string().contains(field)
                    || violation.what.contains("message")),
            "{violations:?}"
        );
    }
}

#[test]
fn a_mistyped_field_fails() {
    let (mut tried, mut accepted) = (0, Vec::new());
    for example in examples() {
        if example["status"].as_u64() >= Some(300) {
            continue;
        }
        let mut pointers = Vec::new();
        fields(&example["body"], "", &mut pointers);
        for pointer in pointers {
            let mut spoilt = example.clone();
            let value = spoilt["body"].pointer_mut(&pointer).unwrap();
            if value.is_null() {
                continue; // what else it may be was not always recorded
            }
            *value = if value.is_array() {
                json!({"no": 1})
            } else {
                json!([["no"]])
            };
            tried += 1;
            if check(&spoilt).is_ok() {
                accepted.push(format!(
                    "{} {} {pointer}",
                    example["method"], example["path"]
                ));
            }
        }
    }
    assert!(tried > 1000, "only {tried} fields were tried");
    assert!(
        accepted.is_empty(),
        "{} of {tried} accepted:\n{}",
        accepted.len(),
        accepted.join("\n")
    );
}

#[test]
fn most_dropped_fields_fail_and_none_of_an_image_or_server_goes_unnoticed_but_by_right() {
    let (mut tried, mut refused) = (0, 0);
    for example in examples() {
        if example["status"].as_u64() >= Some(300) {
            continue;
        }
        let mut pointers = Vec::new();
        fields(&example["body"], "", &mut pointers);
        for pointer in pointers {
            let mut spoilt = example.clone();
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            let name = name.replace("~1", "/").replace("~0", "~");
            spoilt["body"]
                .pointer_mut(parent)
                .unwrap()
                .as_object_mut()
                .unwrap()
                .remove(&name);
            tried += 1;
            refused += usize::from(check(&spoilt).is_err());
        }
    }
    // The rest are fields that only administrators see, and keys of maps.
    assert!(refused * 100 > tried * 80, "{refused} of {tried} refused");
}

#[test]
fn an_invented_field_and_a_wrong_status_fail() {
    let mut spoilt = example("GET", "/compute/v2.1/servers/{id}", 200);
    spoilt["body"]["server"]["invented"] = json!("x");
    assert!(check(&spoilt).is_err());
    let mut spoilt = example("GET", "/compute/v2.1/flavors/{id}", 200);
    spoilt["status"] = json!(202);
    assert!(check(&spoilt).is_err());
}

#[test]
fn an_error_of_another_services_form_fails() {
    let mut spoilt = example("GET", "/compute/v2.1/servers/{id}", 404);
    spoilt["body"] = json!({"error": {"code": 404, "message": "no", "title": "Not Found"}});
    assert!(check(&spoilt).is_err());
    let mut spoilt = example("GET", "/identity/v3/users/{id}", 404);
    spoilt["body"]["error"]["code"] = json!(400);
    assert!(check(&spoilt).is_err());
}

#[test]
fn a_missing_request_id_and_a_wrong_time_form_fail() {
    let mut spoilt = example("GET", "/compute/v2.1/servers/{id}", 200);
    spoilt["headers"]
        .as_object_mut()
        .unwrap()
        .remove("x-openstack-request-id");
    assert!(check(&spoilt).is_err());
    let mut spoilt = example("GET", "/compute/v2.1/servers/{id}", 200);
    spoilt["body"]["server"]["created"] = json!("2026-11-22T09:45:58.123456");
    assert!(check(&spoilt).is_err());
}

#[test]
fn a_field_of_a_later_microversion_fails_at_an_earlier_one() {
    let mut early = example("GET", "/compute/v2.1/servers/{id}", 200);
    early["headers"]["openstack-api-version"] = json!("compute 2.1");
    early["body"]["server"]["locked"] = json!(false);
    assert!(check(&early).is_err());
}

#[test]
fn what_nobody_knows_is_said_to_be_unknown() {
    let oracle = Oracle::get();
    assert!(oracle.knows(Service::Compute, "GET", "/v2.1/servers/{server_id}", None));
    assert!(oracle.knows(
        Service::Compute,
        "POST",
        "/v2.1/servers/{id}/action",
        Some("rebuild")
    ));
    assert!(!oracle.knows(Service::Compute, "GET", "/v2.1/unheard-of", None));
    assert!(!oracle.knows(
        Service::Compute,
        "POST",
        "/v2.1/servers/{id}/action",
        Some("dance")
    ));
    let unknown = json!({"method": "GET", "path": "/compute/v2.1/unheard-of", "status": 200,
        "request": null, "headers": {"content-type": "application/json"}, "body": {"a": 1}});
    let verdict = check(&unknown).unwrap();
    assert!(verdict.silent() && verdict.recorded == Recorded::Nothing);
}

/// A header of an example says something else.
fn with_header(example: &Value, name: &str, value: &str) -> Vec<Violation> {
    let mut spoilt = example.clone();
    spoilt["headers"][name] = json!(value);
    check(&spoilt).err().unwrap_or_default()
}

#[test]
fn a_header_that_says_something_else_is_refused() {
    let server = example("GET", "/compute/v2.1/servers/{id}", 200);
    for (name, value) in [
        ("x-openstack-request-id", "req-1"),
        (
            "x-openstack-request-id",
            "0a11ce00-0000-4000-8000-000000000001",
        ),
        // Another one than in x-openstack-request-id.
        (
            "x-compute-request-id",
            "req-0a11ce00-0000-4000-8000-000000000001",
        ),
        ("content-type", "text/html; charset=UTF-8"),
        ("openstack-api-version", "2.96"),
        ("x-openstack-nova-api-version", "2.999"),
        ("vary", "Accept"),
    ] {
        let place = format!("header {name}");
        let found = with_header(&server, name, value);
        let named = found
            .iter()
            .any(|violation| violation.place.starts_with("header "));
        assert!(named, "{place}: {value}: {found:?}");
    }
    let made = example("POST", "/compute/v2.1/servers", 202);
    for value in [
        "/v2.1/servers/0a11ce00-0000-4000-8000-000000000001",
        "http://cloud/compute/v2.1/servers/7",
        "http://cloud/image/v2.1/servers/0a11ce00-0000-4000-8000-000000000001",
        "http://cloud/compute/v2.1/flavors/0a11ce00-0000-4000-8000-000000000001",
    ] {
        let found = with_header(&made, "location", value);
        assert!(
            found.iter().any(|v| v.place == "header location"),
            "{value}: {found:?}"
        );
    }
    let right = "https://cloud:1/compute/v2.1/servers/0a11ce00-0000-4000-8000-000000000001";
    assert_eq!(with_header(&made, "location", right), []);
}

#[test]
fn a_failure_that_the_operation_does_not_have_is_refused() {
    let conflict = json!({"conflictingRequest": {"code": 409, "message": "m"}});
    let failed = |method: &str, path: &str, status: u16, body: &Value| {
        let id = "req-0a11ce00-0000-4000-8000-000000000001";
        let headers = [
            ("content-type", "application/json; charset=UTF-8"),
            ("x-openstack-request-id", id),
            ("x-compute-request-id", id),
        ];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let body = body.to_string();
        let exchange = Exchange::new(method, path, None, status, headers, body.as_bytes());
        let found = Oracle::get()
            .check(&exchange.unwrap())
            .err()
            .unwrap_or_default();
        found
            .iter()
            .any(|violation| violation.witness == "failures")
    };
    let servers = "/compute/v2.1/servers";
    assert!(failed("GET", servers, 409, &conflict));
    assert!(failed("GET", "/compute/v2.1/limits", 410, &conflict));
    let tag = "/compute/v2.1/servers/1/tags/x";
    assert!(!failed("PUT", tag, 409, &conflict), "the reference has it");
    let unauthorized = json!({"error": {"code": 401, "title": "U", "message": "m"}});
    assert!(!failed("GET", servers, 401, &unauthorized), "of the frame");
    let staged = "/image/v2/images/1/stage";
    assert!(
        !failed("PUT", staged, 409, &conflict),
        "listed with its reason"
    );
}
