//! The source tree is tidy: see `fractus_tests::tidy` for what that means.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use fractus_tests::tidy;

#[test]
fn the_source_tree_is_tidy() {
    let top = tidy::checkout();
    for (path, lines) in tidy::uncomfortable(&top).unwrap() {
        println!("hint: {path} has {lines} lines; it may be two modules");
    }
    let findings = tidy::findings(&top).unwrap();
    let said: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(
        said.is_empty(),
        "{} findings:\n{}",
        said.len(),
        said.join("\n")
    );
}

#[test]
fn the_checks_see_the_whole_tree() {
    let files = tidy::files(&tidy::checkout()).unwrap();
    for name in [
        "vmm/src/lib.rs",
        "controller/src/main.rs",
        "tests/src/tidy/mod.rs",
    ] {
        assert!(
            files.iter().any(|file| file == name),
            "{name} is not among the files checked"
        );
    }
}
