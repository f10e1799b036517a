//! A guest written to a file while it runs, and the one that is made from the file.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use fractus_vmm::machine::{RunState, SnapshotError};
use fractus_vmm::stream::snapshot::Snapshot;
use probe_guest::{Setup, fields};
use rstest::rstest;

/// It writes all over its memory meanwhile: a page that was lost, or is of another moment than the rest, is found
/// by the guest itself, here and there.
#[rstest]
#[case(1)]
#[case(40)]
fn no_page_is_lost_while_the_guest_writes(#[case] mib: u64) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    // More than is left for the pause, so that it is copied in rounds.
    guest.ok("touch 40");
    let (mut written, mut times) = (0, 0);
    let by = Instant::now() + Duration::from_secs(30);
    // On a busy host the guest may get no processor just then, and write nothing.
    while times < 3 || written == 0 {
        assert!(Instant::now() < by, "it wrote nothing meanwhile");
        times += 1;
        guest.send(&format!("loudly weave {mib}"));
        guest.line("begun weave");
        let file = tempfile::tempfile().unwrap();
        let report = guest
            .machine
            .snapshot(file.try_clone().unwrap(), b"")
            .unwrap();
        println!("{report:?}");
        written += report.last;
        assert!(report.rounds.len() > 1);
        let mut other = guest.cloned_from(file, &[]);
        for each in [&mut other, &mut guest] {
            each.send("");
            each.line("ok weave");
            assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
        }
    }
}

#[test]
fn a_paused_guest_stays_paused_and_goes_on_from_its_file_with_disk_and_vcpus() {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().cpus(2).disk(&disk, |_| {}).boot();
    guest.ok("touch 20");
    guest.ok("disk-write 0 0 1048576 11");
    guest.machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    let report = guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    assert_eq!(guest.machine.state(), RunState::Paused);
    assert_eq!(report.pause, Duration::ZERO);
    assert!(report.totals.pages >= 20 * 256, "{report:?}");
    let mut other = guest.cloned_from(file, &[&disk]);
    drop(guest);
    other.ok("disk-check 0 0 1048576 11");
    assert_eq!(other.ask("spin 1 1"), "ok spin");
    other.send("reboot");
    other.booted();
}

/// Pages that a device filled while the guest ran are in no log of KVM's.
#[test]
fn what_a_disk_reads_meanwhile_is_there() {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 4194304 11");
    for _ in 0..3 {
        guest.send("loudly disk-check 0 0 4194304 11 again");
        guest.line("begun disk-check");
        let file = tempfile::tempfile().unwrap();
        guest
            .machine
            .snapshot(file.try_clone().unwrap(), b"")
            .unwrap();
        let mut other = guest.cloned_from(file, &[&disk]);
        for each in [&mut other, &mut guest] {
            each.send("");
            assert_eq!(each.line(""), "ok disk-check");
        }
    }
}

#[test]
fn a_machine_that_has_ended_is_not_written() {
    let mut guest = Setup::new().boot();
    let file: File = tempfile::tempfile().unwrap();
    guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(snapshot.opening().memory, guest.machine.memory().bytes());
    guest.machine.stop();
    // What was there before stays.
    assert!(
        guest
            .machine
            .snapshot(file.try_clone().unwrap(), b"")
            .is_err()
    );
    Snapshot::open(file).unwrap();
}

/// What it has asked for is not in its state: it would never come.
#[test]
fn a_guest_that_resets_itself_meanwhile_is_not_written_and_comes_back() {
    let mut guest = Setup::new().boot();
    guest.send("reboot");
    // The request waits until somebody asks for events.
    let by = Instant::now() + Duration::from_secs(30);
    let file: File = tempfile::tempfile().unwrap();
    loop {
        match guest.machine.snapshot(file.try_clone().unwrap(), b"") {
            Ok(_) => assert!(Instant::now() < by, "it never resets"),
            Err(error) => {
                assert!(matches!(error, SnapshotError::Over), "{error}");
                break;
            }
        }
    }
    assert!(Snapshot::open(file).is_err());
    guest.booted();
}

/// A new file on a file system of that size, which goes with the file.
fn on_a_small_disk(size: &str) -> File {
    let folder = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program)
            .args(arguments)
            .arg(folder.path())
            .status();
        assert!(status.unwrap().success(), "{program}");
    };
    run(
        "mount",
        &["-t", "tmpfs", "-o", &format!("size={size}"), "small"],
    );
    let file = tempfile::tempfile_in(folder.path());
    run("umount", &["--lazy"]);
    file.unwrap()
}

/// A file that takes nothing more: the guest runs on, and what is there is no snapshot.
#[test]
fn a_full_disk_costs_the_guest_nothing() {
    let mut guest = Setup::new().command_line("tick_ms=5").start();
    guest.booted();
    guest.ok("touch 20");
    let full = on_a_small_disk("8m");
    assert!(
        guest
            .machine
            .snapshot(full.try_clone().unwrap(), b"")
            .is_err()
    );
    assert!(Snapshot::open(full).is_err());
    assert_eq!(guest.machine.state(), RunState::Running);
    guest.line("tick ");
    assert_eq!(guest.ok("echo alive"), "alive");
    // And the next one is whole.
    let file: File = tempfile::tempfile().unwrap();
    guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    assert_eq!(guest.cloned_from(file, &[]).ok("echo here"), "here");
}
