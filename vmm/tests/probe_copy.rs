//! A guest's disk copied to a file while the guest writes to it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use fractus_vmm::machine::{
    DiskCopyError, DiskCopyPolicy, DiskCopyReport, Loading, Machine, RunState, Scope, SnapshotError,
};
use fractus_vmm::stream::converge::{AtLimit, Policy};
use fractus_vmm::stream::snapshot::Snapshot;
use probe_guest::{Guest, Setup, fields, pattern};
use rstest::rstest;
use vm_memory::{Bytes, GuestAddress};

const POLICY: DiskCopyPolicy = DiskCopyPolicy {
    converge: Policy {
        downtime: Duration::from_millis(20),
        // Generous: a loaded machine is no failure.
        longest: Duration::from_secs(30),
        limit: Duration::from_secs(5),
        at_limit: AtLimit::Stop,
        throttle: None,
    },
    reserve: 0,
};

const BYTES: u64 = (24 << 20) + 512;

fn file(direct: bool) -> File {
    let mut options = File::options();
    options.read(true).write(true);
    let direct = if direct { libc::O_DIRECT } else { 0 };
    options.custom_flags(libc::O_TMPFILE | direct);
    options.open(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn copied(guest: &mut Guest, to: &File) -> Result<DiskCopyReport, DiskCopyError> {
    copied_by(guest, to, POLICY)
}

fn copied_by(
    guest: &mut Guest,
    to: &File,
    policy: DiskCopyPolicy,
) -> Result<DiskCopyReport, DiskCopyError> {
    copied_while(guest, to, policy, |_| {})
}

/// `meanwhile` happens before each turn, which it is told the number of.
fn copied_while(
    guest: &mut Guest,
    to: &File,
    policy: DiskCopyPolicy,
    meanwhile: impl Fn(u64),
) -> Result<DiskCopyReport, DiskCopyError> {
    let mut copying = guest.machine.copy_disk(0, to, policy)?;
    for turn in 0.. {
        meanwhile(turn);
        if let Some(report) = copying.advance(&mut guest.machine)? {
            println!("{report:?}");
            return Ok(report);
        }
    }
    unreachable!("there are more turns than anybody takes");
}

/// Waits until a guest that writes the same place over and over has written there once more, however busy this machine
/// is.
fn once_more(disk: &File, at: u64) {
    let (before, began) = (read(disk, at, 512), Instant::now());
    while read(disk, at, 512) == before {
        assert!(began.elapsed() < Duration::from_secs(60), "it has ended");
        std::thread::yield_now();
    }
}

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    // Past the cache it wants to be aligned; what is read here is in it.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let mut bytes = vec![0; length];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// It writes 4 MiB over and over, each time with another seed: at one moment there are two seeds at most, and they
/// follow each other.
#[rstest]
fn the_copy_of_a_disk_that_is_written_to_is_of_one_moment(#[values(false, true)] direct: bool) {
    const AT: u64 = 1 << 20;
    const LENGTH: usize = 4 << 20;
    let disk = file(direct);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |disk| disk.direct = direct).boot();
    guest.ok("disk-write 0 8388608 1048576 11");
    guest.ok(&format!("disk-write 0 {} 512 13", BYTES - 512));
    guest.ok(&format!("disk-write 0 {AT} {LENGTH} 19"));
    let mut seen = 0;
    for _ in 0..3 {
        guest.send(&format!("loudly disk-write 0 {AT} {LENGTH} 20 again"));
        guest.line("begun disk-write");
        let to = file(direct);
        let writes = |turn| {
            if turn == 0 {
                once_more(&disk, AT);
            }
        };
        let report = copied_while(&mut guest, &to, POLICY, writes).unwrap();
        assert_eq!(guest.machine.state(), RunState::Running);
        guest.send("");
        let said = guest.line("ok disk-write");
        let last: u64 = fields(&said)["seed"].parse().unwrap();
        seen += report.last + report.rounds.iter().skip(1).map(|it| it.pages).sum::<u64>();

        assert_eq!(to.metadata().unwrap().len(), BYTES);
        assert!(to.metadata().unwrap().blocks() * 512 < 12 << 20);
        assert!(read(&to, 8 << 20, 1 << 20) == pattern(11, 8 << 20, 1 << 20));
        assert!(read(&to, BYTES - 512, 512) == pattern(13, BYTES - 512, 512));
        let there = read(&to, AT, LENGTH);
        let written: Vec<Vec<u8>> = (19..=last).map(|seed| pattern(seed, AT, LENGTH)).collect();
        let mut seeds = BTreeSet::new();
        for at in (0..LENGTH).step_by(512) {
            let is = |pattern: &Vec<u8>| pattern[at..at + 512] == there[at..at + 512];
            let Some(seed) = written.iter().position(is) else {
                panic!("what lies at {at} was never written");
            };
            seeds.insert(seed);
        }
        let (first, newest) = (seeds.first().unwrap(), seeds.last().unwrap());
        assert!(newest - first <= 1, "{seeds:?}");
        guest.ok(&format!("disk-write 0 {AT} {LENGTH} 19"));
    }
    assert!(seen > 0, "it wrote nothing meanwhile");
}

#[test]
fn a_paused_guest_stays_paused_and_one_that_ends_has_no_copy() {
    let disk = file(false);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 65536 3");
    guest.machine.pause().unwrap();
    let to = file(false);
    let report = copied(&mut guest, &to).unwrap();
    assert_eq!((report.pause, report.last), (Duration::ZERO, 0));
    assert_eq!(guest.machine.state(), RunState::Paused);
    assert!(read(&to, 0, 65536) == pattern(3, 0, 65536));
    guest.machine.resume().unwrap();
    guest.ok("echo alive");

    let nothing = guest.machine.copy_disk(1, &to, POLICY);
    assert!(matches!(nothing, Err(DiskCopyError::NoDisk { index: 1 })));
    let mut copying = guest.machine.copy_disk(0, &to, POLICY).unwrap();
    guest.machine.stop();
    while guest.machine.state() != RunState::Stopped {
        guest.machine.wait_event(Duration::from_secs(30));
    }
    let over = copying.advance(&mut guest.machine);
    assert!(matches!(over, Err(DiskCopyError::Over)), "{over:?}");
}

/// What it is to be copied to has no room: the guest notices nothing.
#[test]
fn a_copy_that_fails_costs_the_guest_nothing() {
    let disk = file(false);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 3");
    // In the middle of it nothing can be written there any more.
    let sealable = rustix::fs::MemfdFlags::ALLOW_SEALING;
    let full = File::from(rustix::fs::memfd_create("full", sealable).unwrap());
    let mut copying = guest.machine.copy_disk(0, &full, POLICY).unwrap();
    rustix::fs::fcntl_add_seals(&full, rustix::fs::SealFlags::WRITE).unwrap();
    let failed = loop {
        match copying.advance(&mut guest.machine) {
            Ok(None) => {}
            other => break other,
        }
    };
    assert!(matches!(failed, Err(DiskCopyError::Copy(_))), "{failed:?}");
    drop(copying);
    assert_eq!(guest.machine.state(), RunState::Running);
    guest.ok("disk-write 0 0 1048576 4");
    copied(&mut guest, &file(false)).unwrap();
    guest.ok("disk-check 0 0 1048576 4");
}

/// It writes all the time, and nobody may stop it: there is no copy, and it has not stood still.
#[test]
fn a_guest_that_writes_too_fast_is_not_stopped_for_its_copy() {
    let disk = file(false);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 1048576 4194304 19");
    guest.send("loudly disk-write 0 1048576 4194304 20 again");
    guest.line("begun disk-write");
    let mut policy = POLICY;
    policy.converge.downtime = Duration::ZERO;
    policy.converge.at_limit = AtLimit::GiveUp;
    let writes = |_| once_more(&disk, 1 << 20);
    let late = copied_while(&mut guest, &file(false), policy, writes);
    assert!(matches!(late, Err(DiskCopyError::Late { .. })), "{late:?}");
    assert_eq!(guest.machine.state(), RunState::Running);
    guest.send("");
    guest.line("ok disk-write");

    let mut policy = POLICY;
    policy.reserve = u64::MAX;
    let full = copied_by(&mut guest, &file(false), policy);
    assert!(
        matches!(full, Err(DiskCopyError::NoRoom { .. })),
        "{full:?}"
    );
    guest.ok("echo alive");
}

/// The newest seed of what lies in these blocks of 512 bytes; none: there is nothing of any of them.
fn newest(
    bytes: &[u8],
    seeds: std::ops::RangeInclusive<u64>,
    at: u64,
    length: usize,
) -> Option<u64> {
    let blocks = seeds.flat_map(|seed| {
        let all = pattern(seed, at, length);
        let blocks: Vec<[u8; 512]> = all.as_chunks().0.to_vec();
        blocks.into_iter().map(move |block| (block, seed))
    });
    let seeds: HashMap<[u8; 512], u64> = blocks.collect();
    let found = bytes
        .as_chunks()
        .0
        .iter()
        .filter_map(|block| seeds.get(block));
    found.max().copied()
}

/// A guest that writes one place over and over, each time with the next seed: what it has in memory to be written is of the
/// pass that is the newest on its disk, or of the next.
#[rstest]
fn a_snapshot_and_its_disks_are_of_one_moment(#[values(false, true)] direct: bool) {
    const AT: u64 = 1 << 20;
    const LENGTH: usize = 64 << 10;
    let disk = file(direct);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |disk| disk.direct = direct).boot();
    guest.ok("touch 20");
    let mut first = 1;
    for _ in 0..3 {
        guest.send(&format!("loudly disk-write 0 {AT} {LENGTH} {first} again"));
        guest.line("begun disk-write");
        once_more(&disk, AT);
        let (to, kept) = (file(direct), tempfile::tempfile().unwrap());
        let copying = guest.machine.copy_disk(0, &to, POLICY).unwrap();
        let (scope, into) = (Scope::Whole.into(), kept.try_clone().unwrap());
        let taken = guest
            .machine
            .snapshot_with_disks(scope, into, b"", &mut [copying]);
        let report = taken.unwrap();
        println!("{report:?}");
        assert_eq!(guest.machine.state(), RunState::Running);
        assert_eq!(report.disks.len(), 1);
        guest.send("");
        let said = guest.line("ok disk-write");
        let last: u64 = fields(&said)["seed"].parse().unwrap();

        let on_disk = newest(&read(&to, AT, LENGTH), first..=last, AT, LENGTH).unwrap();
        let snapshot = Snapshot::open(kept.try_clone().unwrap()).unwrap();
        let (files, _serial) = guest.files_again(&[&to]);
        let here = guest.machine.config();
        let other = Machine::from_snapshot(&snapshot, here, files, Loading::Eager, None).unwrap();
        let mut memory = vec![0; other.memory().bytes() as usize];
        (other.memory().read_slice(&mut memory, GuestAddress(0))).unwrap();
        drop(other);
        let in_memory = newest(&memory, first..=last, AT, LENGTH).unwrap();
        assert!(
            in_memory == on_disk || in_memory == on_disk + 1,
            "{in_memory} in memory, {on_disk} on the disk, {last} in the end"
        );

        let mut other = guest.cloned_from(kept, &[&to]);
        other.send("");
        let said = other.line("ok disk-write");
        let there: u64 = fields(&said)["seed"].parse().unwrap();
        assert!(there >= on_disk, "{there}");
        other.ok(&format!("disk-check 0 {AT} {LENGTH} {there}"));
        first = last + 1;
    }
}

#[test]
fn a_snapshot_whose_disk_cannot_be_copied_is_none_and_the_guest_runs_on() {
    let disk = file(false);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 3");
    let (to, kept) = (file(false), tempfile::tempfile().unwrap());
    let never = DiskCopyPolicy {
        reserve: u64::MAX,
        ..POLICY
    };
    let copying = guest.machine.copy_disk(0, &to, never).unwrap();
    let into = kept.try_clone().unwrap();
    let taken = guest
        .machine
        .snapshot_with_disks(Scope::Whole.into(), into, b"", &mut [copying]);
    match taken {
        // Where files share their blocks it takes no room.
        Ok(report) if report.disks.iter().all(|disk| disk.shared) => return,
        Err(SnapshotError::Disk { index: 0, source }) => {
            assert!(matches!(*source, DiskCopyError::NoRoom { .. }), "{source}");
        }
        other => panic!("{other:?}"),
    }
    assert!(Snapshot::open(kept).is_err());
    assert_eq!(guest.machine.state(), RunState::Running);
    guest.ok("disk-check 0 0 1048576 3");
}

#[test]
fn of_a_paused_guest_a_snapshot_and_its_disk_are_taken_however_long_that_takes() {
    let disk = file(false);
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 8388608 3");
    guest.machine.pause().unwrap();
    let at_once = DiskCopyPolicy {
        converge: Policy {
            longest: Duration::ZERO,
            ..POLICY.converge
        },
        ..POLICY
    };
    let (to, kept) = (file(false), tempfile::tempfile().unwrap());
    let copying = guest.machine.copy_disk(0, &to, at_once).unwrap();
    let into = kept.try_clone().unwrap();
    let taken = guest
        .machine
        .snapshot_with_disks(Scope::Whole.into(), into, b"", &mut [copying]);
    println!("{:?}", taken.unwrap());
    assert_eq!(guest.machine.state(), RunState::Paused);
    let mut other = guest.cloned_from(kept, &[&to]);
    other.ok("disk-check 0 0 8388608 3");
}
