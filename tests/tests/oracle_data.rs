//! The oracle's data is what its sources say: the OpenAPI documents that the crate `openstack_types`
//! ships, and the recordings where they stand beside the checkout.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use fractus_tests::tidy::checkout;
use serde_json::Value;

/// Where cargo keeps the crate; it is never built, only fetched.
fn documents() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let told = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(checkout())
        .output()
        .unwrap();
    assert!(
        told.status.success(),
        "{}",
        String::from_utf8_lossy(&told.stderr)
    );
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    let packages = told["packages"].as_array().unwrap();
    let package = packages
        .iter()
        .find(|package| package["name"] == "openstack_types")
        .unwrap();
    let notice = std::fs::read_to_string(checkout().join("tests/oracle/data/NOTICE")).unwrap();
    let version = package["version"].as_str().unwrap();
    assert!(
        notice.contains(version),
        "data/NOTICE does not name openstack_types {version}"
    );
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("data")
}

fn read(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|fault| panic!("{}: {fault}", path.display()));
    serde_json::from_slice(&bytes).unwrap()
}

/// `#/components/schemas/x` in `document`.
fn resolve<'d>(document: &'d Value, target: &str) -> &'d Value {
    document.pointer(target.strip_prefix('#').unwrap()).unwrap()
}

/// The answers of a document, as `METHOD PATH STATUS` with their schema.
fn answers(document: &Value) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in ["get", "post", "put", "patch", "delete"] {
            let Some(responses) = item[method]["responses"].as_object() else {
                continue;
            };
            for (status, response) in responses {
                if status.bytes().all(|byte| byte.is_ascii_digit()) {
                    let response = match response["$ref"].as_str() {
                        Some(target) => resolve(document, target),
                        None => response,
                    };
                    let name = format!("{} {path} {status}", method.to_uppercase());
                    found.push((
                        name,
                        response["content"]["application/json"]["schema"].clone(),
                    ));
                }
            }
        }
    }
    found
}

#[test]
fn the_openapi_data_is_what_the_crate_ships() {
    let shipped = documents();
    for service in ["identity", "image", "compute"] {
        let ours = read(&checkout().join(format!("tests/oracle/data/openapi/{service}.json")));
        let name = ours["document"].as_str().unwrap();
        let text = std::fs::read_to_string(shipped.join(name)).unwrap();
        let document: Value = serde_yaml_ng::from_str(&text).unwrap();
        let shipped = answers(&document);
        let mut held = 0;
        let mut known = BTreeSet::new();
        for answer in ours["operations"].as_array().unwrap() {
            let part = |part: &str| answer[part].as_str().unwrap();
            let name = format!("{} {} {}", part("method"), part("path"), answer["status"]);
            let theirs = shipped.iter().find(|(known, _)| *known == name);
            let (_, schema) = theirs.unwrap_or_else(|| panic!("{service}: no {name} in the crate"));
            if !answer["schema"].is_null() {
                assert_eq!(&answer["schema"], schema, "{service}: {name}");
                held += 1;
            }
            known.insert(name);
        }
        let missing: Vec<&String> = shipped
            .iter()
            .map(|(name, _)| name)
            .filter(|name| !known.contains(*name))
            .collect();
        assert!(
            missing.is_empty(),
            "{service}: the data lacks {missing:?}; run generate.py"
        );
        assert_eq!(ours["usable"], held, "{service}");
        assert!(held > 20, "{service}: only {held} schemas");
        for (section, things) in ours["components"].as_object().unwrap() {
            for (thing, ours) in things.as_object().unwrap() {
                assert_eq!(
                    ours, &document["components"][section][thing],
                    "{section} {thing}"
                );
            }
        }
    }
}

/// `FRACTUS_SHARED`, or shared/ beside the checkout or one of the folders that it is in.
fn recordings() -> Option<PathBuf> {
    let named = std::env::var_os("FRACTUS_SHARED").map(PathBuf::from);
    let root = checkout();
    let beside = root.ancestors().map(|at| at.join("shared"));
    let mut folders = named
        .into_iter()
        .chain(beside)
        .map(|at| at.join("openstack"));
    folders.find(|at| at.is_dir())
}

#[test]
fn the_recorded_data_is_what_the_recordings_say() {
    let Some(recordings) = recordings() else {
        println!("skipped: no shared/openstack beside this checkout");
        return;
    };
    let into = tempfile::tempdir().unwrap();
    let made = Command::new("python3")
        .arg(checkout().join("tests/oracle/generate.py"))
        .args(["--only", "recorded", "--into"])
        .arg(into.path())
        .arg(&recordings)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    for file in [
        "recorded/identity.json",
        "recorded/image.json",
        "recorded/compute.json",
        "examples.json",
    ] {
        let (ours, theirs) = (
            checkout().join("tests/oracle/data").join(file),
            into.path().join(file),
        );
        let same = std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap();
        assert!(
            same,
            "data/{file} is not what generate.py makes of {}",
            recordings.display()
        );
    }
}
