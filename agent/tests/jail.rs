//! What a machine's process tries from inside of its jail is refused, by system call and by io_uring; and
//! what the host sees of one that runs.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::process::Command;

use common::{Result, block_on, running, with_stand_ins};

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
        for kind in KINDS {
            let said = try_in_jail(act, kind);
            if (act, kind) == ("clone3", "spawner") {
                // So that the C library uses `clone`.
                let refused = format!("{act} {kind}: refused {}", libc::ENOSYS);
                assert_eq!(said, refused);
                continue;
            }
            let killed = format!("{act} {kind}: forbidden system call (signal 31)");
            assert_eq!(said, killed);
        }
    }
    for kind in KINDS {
        assert_eq!(try_in_jail("yield", kind), format!("yield {kind}: DONE"));
    }
}

const KINDS: [&str; 9] = [
    "main",
    "vcpu",
    "block",
    "net",
    "vsock",
    "console",
    "spawner",
    "spawned-block",
    "spawned-net",
];

#[test]
fn the_jail_refuses_by_itself_what_seccomp_would_forbid() {
    let (_, jail) = names();
    for act in jail {
        let said = try_in_jail(act, "none");
        assert!(is_refused(&said, act, "none"), "{said}");
    }
}

/// By its user and its namespaces alone, as on a kernel that has no Landlock.
#[test]
fn without_landlock_there_is_nothing_to_open_and_nobody_to_reach() {
    let refused = [
        ("open", libc::ENOENT),
        ("create", libc::EROFS),
        ("execve", libc::ENOENT),
        ("connect", libc::ENETUNREACH),
        ("kill", libc::ESRCH),
        ("ptrace", libc::ESRCH),
        ("mount", libc::EPERM),
        ("chroot", libc::EPERM),
        ("setuid", libc::EPERM),
        ("unshare", libc::EPERM),
    ];
    for (act, errno) in refused {
        let said = try_in_jail(act, "no-landlock");
        assert_eq!(said, format!("{act} no-landlock: refused {errno}"));
    }
}

#[test]
fn a_jail_that_was_given_the_hosts_mounts_is_not_entered() {
    let said = try_in_jail("open", "host-root");
    assert!(said.contains("the root is not the empty"), "{said}");
}

#[test]
fn each_machine_is_in_namespaces_of_its_own_with_an_empty_root_and_a_lone_loopback() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let mut pids = vec![agent.pid().unwrap().try_into()?];
        for _ in 0..2 {
            let id = running(&agent, &kernel).await?;
            pids.push(agent.processes(id)[0]);
        }
        for kind in ["mnt", "net", "pid", "ipc", "uts"] {
            let is = |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            let mut all: Vec<_> = pids.iter().map(is).collect();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), pids.len(), "{kind}: {all:?}");
        }
        for pid in &pids[1..] {
            let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
            let fields: Vec<&str> = mounts.split_whitespace().collect();
            assert_eq!(mounts.lines().count(), 1, "{mounts}");
            assert_eq!(fields[3..5], ["/", "/"], "{mounts}");
            assert!(fields[5].starts_with("ro,nosuid,nodev,noexec"), "{mounts}");
            assert!(mounts.contains(" - tmpfs jail "), "{mounts}");
            let net = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
            let devices: Vec<_> = net
                .lines()
                .filter_map(|line| line.split_once(':'))
                .collect();
            assert!(
                matches!(devices[..], [(name, _)] if name.trim() == "lo"),
                "{net}"
            );
            for held in fs::read_dir(format!("/proc/{pid}/fd"))? {
                let held = fs::read_link(held?.path())?.display().to_string();
                assert!(
                    !held.starts_with("mnt:") && !held.starts_with("net:"),
                    "{held}"
                );
            }
        }
        Ok(())
    })
}

/// The agent's unit spares it when memory is out; here it is the other way about, which asks for no
/// privilege.
#[test]
fn a_machine_does_not_inherit_how_likely_its_agent_is_to_be_killed() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let score = |pid: i32| format!("/proc/{pid}/oom_score_adj");
        fs::write(score(agent.pid().unwrap().try_into()?), "500")?;
        let id = running(&agent, &kernel).await?;
        let pid = agent.processes(id)[0];
        assert_eq!(fs::read_to_string(score(pid))?.trim(), "0");
        Ok(())
    })
}

#[test]
fn a_ring_opens_nothing_past_seccomp() {
    for kind in ["main", "block"] {
        let said = try_in_jail("ring-openat", kind);
        assert!(is_refused(&said, "ring-openat", kind), "{said}");
    }
    for kind in ["vcpu", "vsock", "console"] {
        let said = try_in_jail("ring-openat", kind);
        assert!(said.contains("signal 31"), "{said}");
    }
}
