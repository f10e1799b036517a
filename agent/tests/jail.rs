//! What a machine's process tries from inside of its jail is refused, by system call and by io_uring.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

use fractus_agent::vm::jail_test::names;

fn try_in_jail(act: &str, kind: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fractus-agent"))
        .args(["vm", "--jail-test", act, kind])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said.trim().to_owned()
}

/// For want of a right, or because there is nothing there; not for a mistake in the attempt.
fn is_refused(said: &str, act: &str, kind: &str) -> bool {
    [
        libc::EPERM,
        libc::EACCES,
        libc::ENOENT,
        libc::EROFS,
        libc::ESRCH,
    ]
    .iter()
    .any(|errno| said == format!("{act} {kind}: refused {errno}"))
}

#[test]
fn seccomp_ends_a_thread_of_any_kind_that_makes_a_forbidden_call() {
    let (all, _) = names();
    for act in all.into_iter().filter(|act| *act != "ring-openat") {
        for kind in ["main", "vcpu", "block", "net", "console"] {
            let killed = format!("{act} {kind}: forbidden system call (signal 31)");
            let said = try_in_jail(act, kind);
            assert_eq!(said, killed);
        }
    }
}

#[test]
fn the_jail_refuses_by_itself_what_seccomp_would_forbid() {
    let (_, jail) = names();
    for act in jail {
        let said = try_in_jail(act, "none");
        assert!(is_refused(&said, act, "none"), "{said}");
    }
}

#[test]
fn a_ring_opens_nothing_past_seccomp() {
    for kind in ["main", "block"] {
        let said = try_in_jail("ring-openat", kind);
        assert!(is_refused(&said, "ring-openat", kind), "{said}");
    }
    for kind in ["vcpu", "console"] {
        let said = try_in_jail("ring-openat", kind);
        assert!(said.contains("signal 31"), "{said}");
    }
}
