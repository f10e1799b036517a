//! Each check finds what it is for, and lets pass what it should.

use super::*;

fn rust(text: &str) -> Source {
    Source::new("controller/src/compute/api.rs", text)
}

fn lines(findings: &[Finding]) -> Vec<usize> {
    findings.iter().map(|finding| finding.line).collect()
}

#[test]
fn a_stray_file_at_the_top_is_found() {
    let files: Vec<String> = ["Cargo.toml", "vmm/src/lib.rs", "notes.txt", ".ci/run"]
        .map(str::to_owned)
        .into();
    let found = top_level(&files);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].path, "notes.txt");
}

#[test]
fn a_crate_without_the_workspaces_lints_is_found() {
    let bare = "[package]\nname = \"a\"\n\n[dependencies]\n";
    assert_eq!(manifest("a/Cargo.toml", bare).len(), 1);
    assert_eq!(
        manifest("a/Cargo.toml", "[package]\n[lints]\nworkspace = true\n"),
        []
    );
    assert_eq!(manifest("Cargo.toml", "[workspace]\nmembers = []\n"), []);
    assert_eq!(
        manifest("images/probe/Cargo.toml", "[workspace]\n[package]\n").len(),
        1
    );
}

#[test]
fn a_file_without_module_docs_is_found() {
    assert_eq!(module_docs(&rust("use std::fmt;\n//! late\n")).len(), 1);
    assert_eq!(module_docs(&rust("//! placeholder\n")).len(), 1);
    assert_eq!(
        module_docs(&rust("#![forbid(unsafe_code)]\n//! The servers' API.\n")),
        []
    );
}

#[test]
fn unsafe_outside_its_modules_is_found() {
    let text = "//! a\nfn a() {\n    // SAFETY: no.\n    unsafe { b() }\n}\n";
    assert_eq!(lines(&unsafe_outside_its_modules(&rust(text))), [4]);
    assert_eq!(
        unsafe_outside_its_modules(&Source::new("vmm/src/memory/map.rs", text)),
        []
    );
    assert_eq!(
        unsafe_outside_its_modules(&Source::new("vmm/src/memory.rs", text)),
        []
    );
    assert_eq!(
        unsafe_outside_its_modules(&Source::new("vmm/src/memory_plan.rs", text)).len(),
        1
    );
    assert_eq!(
        unsafe_outside_its_modules(&rust("#![forbid(unsafe_code)] // unsafe")),
        []
    );
}

#[test]
fn unsafe_without_a_safety_comment_is_found() {
    let bare = "fn a() {\n    let x = 1;\n    unsafe { b() }\n}\nunsafe impl Send for A {}\n";
    assert_eq!(lines(&unsafe_without_safety(&rust(bare))), [3, 5]);
    let said = "fn a() {\n    // SAFETY: b has no preconditions\n    // on anyone.\n    let x =\n        unsafe { b() };\n}\n";
    assert_eq!(unsafe_without_safety(&rust(said)), []);
    let far = "// SAFETY: for another\nfn z() {}\n\nfn a() {\n    unsafe { b() }\n}\n";
    assert_eq!(lines(&unsafe_without_safety(&rust(far))), [5]);
}

#[test]
fn unfinished_code_is_found_but_not_when_only_spoken_of() {
    let text = "fn a() { todo!() }\nfn b() { dbg!(1); unimplemented!(\"x\") }\n// todo!()\nlet s = \"dbg!\";\n";
    let mut found = lines(&unfinished(&rust(text)));
    found.sort_unstable();
    assert_eq!(found, [1, 2, 2]);
}

#[test]
fn a_function_longer_than_a_screen_is_found() {
    let of = |lines: usize| format!("fn long() {{\n{}}}\n", "    a();\n".repeat(lines - 2));
    assert_eq!(
        lines(&long_functions(&rust(&of(rules::FUNCTION_LINES + 1)))),
        [1]
    );
    assert_eq!(long_functions(&rust(&of(rules::FUNCTION_LINES))), []);
}

#[test]
fn an_overlong_file_is_found() {
    assert_eq!(
        long_file(&rust(&"\n".repeat(rules::FILE_LINES + 1))).len(),
        1
    );
    assert_eq!(long_file(&rust(&"\n".repeat(rules::FILE_LINES))), []);
}

#[test]
fn a_lint_switched_off_without_a_reason_is_found() {
    let text = "#[allow(dead_code)]\nfn a() {}\n#[allow(\n    dead_code,\n    reason = \"read by C\"\n)]\nfn b() {}\n#[expect(unused)]\nfn c() {}\n";
    let mut found = lines(&allow_without_reason(&rust(text)));
    found.sort_unstable();
    assert_eq!(found, [1, 8]);
}

#[test]
fn a_sleeping_test_is_found_but_not_a_sleeping_program() {
    let text = "fn a() { sleep(B); }\n#[cfg(test)]\nmod tests {\n    fn c() { std::thread::sleep(D); }\n}\n";
    assert_eq!(lines(&sleeping_tests(&rust(text))), [4]);
    assert_eq!(
        sleeping_tests(&Source::new(
            "tests/tests/a.rs",
            "simulated_clock.sleep(A);"
        )),
        []
    );
    let said = "// sleeps because the kernel sends no event\nsleep(A);\n";
    assert_eq!(sleeping_tests(&Source::new("tests/tests/a.rs", said)), []);
    assert_eq!(
        sleeping_tests(&Source::new("tests/tests/a.rs", "\n\nsleep(A);")).len(),
        1
    );
}

#[test]
fn a_foreign_notice_is_found() {
    assert_eq!(
        foreign_notice(&rust("// Copyright (c) 2019 Somebody\n")).len(),
        1
    );
    assert_eq!(
        foreign_notice(&rust("// SPDX-License-Identifier: GPL-2.0\n")).len(),
        1
    );
    assert_eq!(
        foreign_notice(&rust("// SPDX-License-Identifier: Apache-2.0\n")),
        []
    );
    assert_eq!(
        foreign_notice(&rust("let a = \"All rights reserved\";\n")),
        []
    );
}

#[test]
fn a_controller_that_does_not_forbid_unsafe_is_found() {
    let root = |text: &str| Source::new("controller/src/lib.rs", text);
    assert_eq!(controller_forbids_unsafe(&root("//! a\n")).len(), 1);
    assert_eq!(
        controller_forbids_unsafe(&root("//! a\n#![forbid(unsafe_code)]\n")),
        []
    );
}
