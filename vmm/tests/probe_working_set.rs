//! What guests touch of the snapshot that they go on from is recorded, and read ahead for the next one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Instant;

use fractus_vmm::machine::{Loading, Machine};
use fractus_vmm::stream::snapshot::Snapshot;
use fractus_vmm::stream::working_set::{WorkingSet, WorkingSetError};
use probe_guest::{Guest, PATIENCE, Setup};
use rustix::fs::{Advice, fadvise};

const PAGE: usize = 4096;

/// On a disk, if this is built on one.
fn file() -> File {
    tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Of a guest, and open for reading only.
fn written(guest: &mut Guest) -> File {
    let file = file();
    let to = file.try_clone().unwrap();
    guest.machine.snapshot(to, b"").unwrap();
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

fn open(file: &File) -> Snapshot {
    Snapshot::open(file.try_clone().unwrap()).unwrap()
}

fn lazily(guest: &Guest, file: &File) -> Guest {
    guest.cloned_as(Loading::Lazy, file.try_clone().unwrap(), &[])
}

fn recorded(snapshot: &Snapshot) -> WorkingSet {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let pages = File::open("/proc/self/pagemap").unwrap();
    WorkingSet::of_process(snapshot, &maps, &pages).unwrap()
}

/// Nothing of it is in the page cache but what somebody has mapped.
fn forget(file: &File) {
    file.sync_all().unwrap();
    fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

#[test]
fn what_a_guest_touched_is_recorded_and_little_else() {
    let mut guest = Setup::new().memory_mib(256).boot();
    guest.ok("fill 100 7");
    let file = written(&mut guest);
    let snapshot = open(&file);
    let mut other = lazily(&guest, &file);
    drop(guest);
    other.ok("echo here");
    let before = recorded(&snapshot);
    // A few pages of its own code and data.
    assert!(
        before.bytes() > 0 && before.bytes() < 16 << 20,
        "{before:?}"
    );
    other.ok("filled 10 7");
    let after = recorded(&snapshot);
    let grown = after.bytes() - before.bytes();
    assert!((9 << 20..12 << 20).contains(&grown), "{grown}");

    let (mut bytes, other_file) = (Vec::new(), written(&mut other));
    after.write(&mut bytes).unwrap();
    assert_eq!(WorkingSet::read(&*bytes, &snapshot).unwrap(), after);
    let foreign = WorkingSet::read(&*bytes, &open(&other_file));
    assert!(matches!(foreign, Err(WorkingSetError::Foreign { .. })));
}

/// MiB of the file that are in the page cache.
fn cached(file: &File) -> u64 {
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let output = Command::new("fincore")
        .args(["--bytes", "--noheadings", "--output", "RES", &path])
        .output()
        .unwrap();
    let bytes: u64 = String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .unwrap();
    bytes >> 20
}

/// Whatever the set says, memory is the snapshot's.
#[test]
fn what_was_recorded_is_read_ahead_and_memory_is_the_snapshots() {
    let mut guest = Setup::new().memory_mib(256).boot();
    guest.ok("fill 100 7");
    let file = written(&mut guest);
    let snapshot = open(&file);
    let mut other = lazily(&guest, &file);
    other.ok("filled 40 7");
    let set = recorded(&snapshot);
    drop(other);
    forget(&file);
    // On tmpfs a file is its page cache.
    let (before, mib) = (cached(&file), set.bytes() >> 20);
    snapshot.fetch(&set).unwrap();
    let by = Instant::now() + PATIENCE;
    while cached(&file) < mib {
        assert!(Instant::now() < by, "{mib} MiB are not read");
    }
    assert!(before > mib || cached(&file) < mib + 30, "{before}");

    let made = |loading| {
        let (files, serial) = guest.files_again(&[]);
        let here = guest.machine.config();
        let made = Machine::from_snapshot(&snapshot, here, files, loading, None);
        (made.unwrap(), serial)
    };
    let ((lazy, _one), (eager, _other)) = (made(Loading::Lazy), made(Loading::Eager));
    let (mut mapped, mut read) = (vec![0; PAGE], vec![0; PAGE]);
    for at in (0..lazy.memory().bytes()).step_by(PAGE) {
        lazy.memory().read_at(&mut mapped, at).unwrap();
        eager.memory().read_at(&mut read, at).unwrap();
        assert!(mapped == read, "page at {at:#x}");
    }
}
