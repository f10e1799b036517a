//! The harness ends what it started, whatever happens to the test.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::path::Path;
use std::time::Duration;

use fractus_tests::harness::{Guardian, Process, machine_processes, until};

/// A range of user ids that no other test has.
fn users() -> std::ops::Range<u32> {
    let first = 1_200_000_000 + std::process::id() % 100_000 * 10_000;
    first..first + 10
}

#[tokio::test]
async fn the_guardian_ends_machines_that_outlived_their_agent() {
    let users = users();
    let folder = tempfile::tempdir().unwrap().keep();
    let guardian = Guardian::start(&users, &folder).unwrap();
    let user = users.start.to_string();
    let mut orphan = std::process::Command::new("setpriv")
        .args(["--reuid", &user, "--clear-groups", "sleep", "1000"])
        .spawn()
        .unwrap();
    let there = until(
        "the process has its user",
        Duration::from_secs(10),
        || async {
            match machine_processes(&users).as_slice() {
                [one] if one.command.contains("1000") => Ok(()),
                others => Err(format!("{others:?}")),
            }
        },
    );
    there.await.unwrap();
    drop(guardian);
    assert!(!orphan.wait().unwrap().success());
    assert!(!folder.exists());
}

/// A machine that has not changed its user yet, as when everything was killed while it started.
#[test]
fn the_guardian_empties_and_removes_the_control_groups_of_agents() {
    let Some(top) = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(Path::new)
        .into_iter()
        .find(|path| {
            path.join("cgroup.procs").exists() && path.join("cgroup.controllers").exists()
        })
    else {
        println!("no control groups of version 2: nothing was tested");
        return;
    };
    let folder = tempfile::tempdir().unwrap().keep();
    let guardian = Guardian::start(&users(), &folder).unwrap();
    let mark = format!("00000000-0000-4000-8000-{:012}", std::process::id());
    let state = folder.join("agent-0/state");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(state.join("lock"), &mark).unwrap();
    let own = top.join(format!("fractus-{}", mark.replace('-', "")));
    let machine = own.join("machine");
    std::fs::create_dir_all(&machine).unwrap();
    let mut orphan = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    std::fs::write(machine.join("cgroup.procs"), orphan.id().to_string()).unwrap();
    let reaper = std::thread::spawn(move || orphan.wait().unwrap());
    drop(guardian);
    assert!(!reaper.join().unwrap().success());
    assert!(!own.exists());
    assert!(!folder.exists());
}

#[test]
fn a_dropped_process_is_dead() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let arguments = ["1000".to_owned()];
    let process = Process::start("sleeper", Path::new("sleep"), &arguments, &[], &log).unwrap();
    let proc = format!("/proc/{}", process.pid());
    assert!(Path::new(&proc).exists());
    drop(process);
    assert!(!Path::new(&proc).exists());
}
