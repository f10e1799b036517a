//! Guests that go on from a snapshot whose memory was not read first.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fractus_vmm::config::{BalloonConfig, HotMemoryConfig};
use fractus_vmm::machine::{Event, Loading, Machine, RunState, Scope, SnapshotError};
use fractus_vmm::stream::converge::{AtLimit, Policy};
use fractus_vmm::stream::snapshot::Snapshot;
use probe_guest::{Guest, Setup, fields};
use rstest::rstest;
use vm_memory::{Bytes, GuestAddress};

const PATIENCE: Duration = Duration::from_secs(30);

fn file() -> File {
    tempfile::tempfile().unwrap()
}

/// As an agent hands it over: nobody writes to it by this descriptor.
fn read_only(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

fn written(guest: &mut Guest) -> File {
    let file = file();
    let report = guest.machine.snapshot(file.try_clone().unwrap(), b"");
    println!("{:?}", report.unwrap());
    read_only(&file)
}

fn lazily(guest: &Guest, file: &File, disks: &[&File]) -> Guest {
    let other = guest.cloned_as(Loading::Lazy, file.try_clone().unwrap(), disks);
    assert!(!other.machine.memory().is_settled());
    other
}

/// Pages between 8 and 40 MiB that begin with something; a guest that touched 40 MiB has most of them.
fn filled(guest: &Guest) -> usize {
    let memory = guest.machine.memory();
    let pages = (8 << 20..40 << 20).step_by(4096);
    let word = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    pages.filter(|at| word(*at) != 0).count()
}

/// KiB of the guest's memory that are this machine's alone, changed or not.
fn private(guest: &Guest) -> u64 {
    let slot = guest.machine.memory().slots()[0];
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let start = first.split_once('-').map(|(start, _)| start);
        match start.map(|start| u64::from_str_radix(start, 16)) {
            Some(Ok(start)) => inside = (slot.host..slot.host + slot.size).contains(&start),
            _ if inside && matches!(first, "Private_Dirty:" | "Private_Clean:") => {
                sum += second.parse::<u64>().unwrap();
            }
            _ => {}
        }
    }
    sum
}

/// A guest that writes all over its memory is written to a file, goes on from that, is written again meanwhile, and goes
/// on from that, too: a page that was lost, or is of another moment, is found by the guest itself, in each of them.
#[rstest]
#[case(1)]
#[case(40)]
fn no_page_is_lost_from_one_file_to_the_next(#[case] mib: u64) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 40");
    guest.send(&format!("loudly weave {mib}"));
    guest.line("begun weave");
    let first = written(&mut guest);
    let mut second = lazily(&guest, &first, &[]);
    let again = written(&mut second);
    let third = lazily(&second, &again, &[]);
    let fourth = second.cloned_from(again, &[]);
    // Another of the first, which has been written to by nobody meanwhile.
    let twin = lazily(&guest, &first, &[]);
    for mut each in [guest, second, third, fourth, twin] {
        each.send("");
        each.line("ok weave");
        assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
    }
}

#[test]
fn it_goes_on_with_disk_and_vcpus_and_starts_anew_without_its_file() {
    let disk = file();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().cpus(2).disk(&disk, |_| {}).boot();
    guest.ok("touch 20");
    guest.ok("disk-write 0 0 1048576 11");
    let file = file();
    (guest.machine)
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    let mut other = lazily(&guest, &read_only(&file), &[&disk]);
    drop(guest);
    other.ok("disk-check 0 0 1048576 11");
    assert_eq!(other.ask("spin 1 1"), "ok spin");
    other.send("reboot");
    other.booted();
    // Of the file nothing is left in it.
    assert!(other.machine.memory().is_settled());
    file.set_len(0).unwrap();
    other.ok("touch 20");
    other.ok("disk-check 0 0 1048576 11");
    assert_eq!(other.ask("spin 1 1"), "ok spin");
}

/// What the guest had there stands in the file still.
#[test]
fn memory_that_it_gives_back_is_zero_and_costs_nothing() {
    let mut setup = Setup::new();
    setup.config.balloon = Some(BalloonConfig::default());
    let mut guest = setup.boot();
    guest.ok("touch 40");
    let first = written(&mut guest);
    let mut other = lazily(&guest, &first, &[]);
    let all = filled(&guest);
    assert!(all > 7000, "{all}");
    assert_eq!(filled(&other), all);
    // Some are no free memory, but the guest's own.
    let few = 16;
    // Some of it is its own, some the file's.
    other.ok("touch 20");
    let before = private(&other);
    other.ok("balloon free 40");
    let report = other.machine.balloon_stats().unwrap();
    assert_eq!(report.given_back, 40 << 20);
    let after = private(&other);
    println!("{before} KiB, then {after}");
    assert!(before - after > 15 << 10, "{before} KiB, then {after}");
    assert!(filled(&other) < few);
    // Also in the next file, which is as small as it can be.
    let second = file();
    let report = (other.machine)
        .snapshot(second.try_clone().unwrap(), b"")
        .unwrap();
    assert!(report.totals.pages < 10 << 8, "{report:?}");
    let mut third = lazily(&other, &read_only(&second), &[]);
    assert!(filled(&third) < few);
    for each in [&mut third, &mut other] {
        each.ok("touch 40");
        assert_eq!(filled(each), all);
    }
    assert_eq!(filled(&guest), all);
}

/// Its balloon asks for a moment at rest then.
#[test]
fn a_guest_that_cuts_its_memory_to_pieces_goes_on_giving_back() {
    let mut setup = Setup::new().memory_mib(192);
    setup.config.balloon = Some(BalloonConfig::default());
    let mut guest = setup.boot();
    guest.ok("touch 150");
    let first = written(&mut guest);
    let mut other = lazily(&guest, &first, &[]);
    // As a guest could, page by page, until there is no room for more.
    let memory = other.machine.memory().clone();
    let mut pages = (64 << 20..192 << 20).step_by(2 * 4096);
    let kept = pages.find(|page| memory.give_back(*page, 4096).unwrap() == 0);
    let kept = kept.expect("there is to be an end of it");
    assert_eq!(memory.give_back(kept, 4096).unwrap(), 0);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(kept)).unwrap(), 0);
    // Whatever it gives back next, its balloon asks; and is heard before the guest's next answer.
    other.ok("balloon free 1");
    other.ok("touch 1");
    assert_eq!(memory.give_back(kept, 4096).unwrap(), 4096);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(kept)).unwrap(), 0);
    for page in pages.take(16) {
        assert_ne!(
            memory.read_obj::<u64>(GuestAddress(page + 4096)).unwrap(),
            0
        );
    }
    let third = written(&mut other);
    let mut third = lazily(&other, &third, &[]);
    for each in [&mut guest, &mut other, &mut third] {
        each.ok("touch 150");
        assert_eq!(each.ok("echo alive"), "alive");
    }
}

#[test]
fn many_of_one_file_share_what_they_do_not_write_to() {
    let mut guest = Setup::new().command_line("tick_ms=5").start();
    guest.booted();
    guest.ok("touch 40");
    let first = written(&mut guest);
    let mut others: Vec<Guest> = (0..4).map(|_| lazily(&guest, &first, &[])).collect();
    for other in &mut others {
        other.machine.pause().unwrap();
        other.machine.change_generation().unwrap();
        other.machine.resume().unwrap();
        other.line("tick ");
        assert_eq!(other.ok("echo alive"), "alive");
    }
    for other in &others {
        let private = private(other);
        println!("{private} KiB");
        assert!(private < 2 << 10, "{private} KiB of 40 MiB are its own");
    }
    let one = &mut others[0];
    one.ok("touch 30");
    assert!(private(one) >= 30 << 10);
}

#[test]
fn it_is_not_written_to_the_file_that_it_is_made_of() {
    let mut guest = Setup::new().boot();
    guest.ok("touch 10");
    let file = file();
    (guest.machine)
        .snapshot(file.try_clone().unwrap(), b"kept")
        .unwrap();
    let mut other = lazily(&guest, &read_only(&file), &[]);
    let onto = |guest: &mut Guest| guest.machine.snapshot(file.try_clone().unwrap(), b"");
    let error = onto(&mut other).unwrap_err();
    assert!(matches!(error, SnapshotError::Onto), "{error}");
    assert_eq!(other.machine.state(), RunState::Running);
    let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(snapshot.owner(), b"kept");
    snapshot.check().unwrap();
    assert_eq!(other.ok("echo alive"), "alive");
    // Once nothing of it is left in it, it may.
    other.machine.pause().unwrap();
    other.machine.memory().settle().unwrap();
    onto(&mut other).unwrap();
    other.machine.resume().unwrap();
    assert_eq!(other.ok("echo alive"), "alive");
}

/// The descriptor is all of its memory then, whatever becomes of the file.
#[test]
fn it_is_saved_and_handed_over_whole() {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 40");
    let file = file();
    (guest.machine)
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    let all = filled(&guest);
    assert!(all > 7000, "{all}");
    let other = lazily(&guest, &read_only(&file), &[]);
    let mut other = other.through_a_restore(&[]);
    file.set_len(0).unwrap();
    assert_eq!(fields(&other.ok("info"))["nonce"], nonce);
    assert_eq!(filled(&other), all);
}

const POLICY: Policy = Policy {
    downtime: Duration::from_millis(20),
    longest: PATIENCE,
    limit: Duration::from_secs(5),
    at_limit: AtLimit::Stop,
    throttle: None,
};

/// The two ends of a stream.
fn ends() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    for end in [&near, &far] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (near, far)
}

/// To another machine, while it writes.
#[test]
fn it_is_sent_with_what_is_the_files_still() {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 40");
    guest.send("loudly weave 20");
    guest.line("begun weave");
    let first = written(&mut guest);
    let other = lazily(&guest, &first, &[]);
    let (near, far) = ends();
    let sent = other.sent(POLICY, &[], near, far);
    let report = sent.offer.unwrap().let_go();
    assert!(report.totals.pages > 35 << 8, "{report:?}");
    let there = (sent.there)(sent.arrival.unwrap().machine);
    assert!(there.machine.memory().is_settled());
    for mut each in [there, guest] {
        each.send("");
        each.line("ok weave");
        assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
    }
}

#[test]
fn hot_memory_is_there_comes_and_goes() {
    let mut setup = Setup::new();
    setup.config.hot_memory = Some(HotMemoryConfig {
        max: 32 << 20,
        bytes: 16 << 20,
    });
    let mut guest = setup.boot();
    for (first, count, word) in [(0, 2, 77), (5, 3, 78)] {
        let plug = format!("memory plug {first} {count}");
        assert_eq!(guest.ok(&plug), "answer=0");
        guest.ok(&format!("memory fill {first} {count} {word}"));
    }
    let first = written(&mut guest);
    let mut other = lazily(&guest, &first, &[]);
    for each in [&mut other, &mut guest] {
        each.ok("memory check 0 2 77");
        each.ok("memory check 2 3 0");
        each.ok("memory check 5 3 78");
    }
    assert_eq!(other.ok("memory unplug 5 2"), "answer=0");
    assert_eq!(other.ok("memory plug 5 1"), "answer=0");
    let second = written(&mut other);
    let mut third = lazily(&other, &second, &[]);
    for each in [&mut third, &mut other] {
        each.ok("memory check 0 2 77");
        each.ok("memory check 5 1 0");
        each.ok("memory check 7 1 78");
    }
    third.send("reboot");
    third.booted();
    let plugged = 0;
    third.event(|event| *event == Event::HotMemory { plugged });
    third.ok("memory check 0 16 0");
}

/// Each has what was written since the one before, while it goes on; the last is the guest of its moment.
#[rstest]
#[case(Loading::Eager)]
#[case(Loading::Lazy)]
fn snapshots_laid_over_each_other_are_the_guest(#[case] loading: Loading) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 30");
    let early = guest.machine.snapshot_of(Scope::Since, file(), b"");
    assert!(matches!(early, Err(SnapshotError::Untracked)));
    let write = |guest: &mut Guest, scope| {
        let file = file();
        let copy = file.try_clone().unwrap();
        let report = guest.machine.snapshot_of(scope, copy, b"").unwrap();
        println!("{report:?}");
        (read_only(&file), report)
    };
    let mut chain = vec![write(&mut guest, Scope::Tracked).0];
    guest.send("loudly weave 2");
    guest.line("begun weave");
    for round in 0..3 {
        let (file, report) = write(&mut guest, Scope::Since);
        // The guest writes to 2 MiB, and to a few pages of its own.
        assert!(report.totals.pages < 3 << 8, "{report:?}");
        chain.push(file);
        if round == 0 {
            // One that fails, and a whole one between, take nothing from the next.
            let closed = read_only(&chain[0]);
            assert!(
                guest
                    .machine
                    .snapshot_of(Scope::Since, closed, b"")
                    .is_err()
            );
            write(&mut guest, Scope::Whole);
        }
    }
    let copies = |chain: &[File]| chain.iter().map(|file| file.try_clone().unwrap()).collect();
    // Over another than its own it is nothing.
    let odd = [0, 2].map(|at: usize| Snapshot::open(chain[at].try_clone().unwrap()).unwrap());
    let (files, _serial) = guest.files_again(&[]);
    let here = guest.machine.config();
    let refused = Machine::from_snapshots(&[&odd[0], &odd[1]], here, files, loading, None);
    assert!(matches!(refused, Err(SnapshotError::Base { .. })));
    let last = guest.cloned_of(loading, copies(&chain), &[]);
    let second = guest.cloned_of(loading, copies(&chain[..2]), &[]);
    for mut each in [guest, last, second] {
        each.send("");
        each.line("ok weave");
        assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
    }
}

/// To read the log of writes is to empty it: what a snapshot took, the stream would not have.
#[test]
fn while_it_is_sent_nobody_else_reads_what_it_writes() {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 20");
    let write = |machine: &mut Machine, scope| machine.snapshot_of(scope, file(), b"");
    write(&mut guest.machine, Scope::Tracked).unwrap();
    guest.send("loudly weave 10");
    guest.line("begun weave");
    let (near, far) = ends();
    let mut refused = 0;
    let sent = guest.sent_with(POLICY, &[], near, far, |_, machine| {
        let since = write(machine, Scope::Since);
        assert!(matches!(since, Err(SnapshotError::Untracked)), "{since:?}");
        for scope in [Scope::Whole, Scope::Tracked] {
            let error = write(machine, scope).unwrap_err();
            assert!(matches!(error, SnapshotError::Logged), "{error}");
            assert_eq!(machine.state(), RunState::Running);
            refused += 1;
        }
    });
    assert!(refused > 2, "more than one round was to be disturbed");
    // Taken back, it has its log again.
    let mut here = (sent.here)(sent.offer.unwrap().take_back().unwrap());
    for scope in [Scope::Tracked, Scope::Since] {
        write(&mut here.machine, scope).unwrap();
    }
    let there = (sent.there)(sent.arrival.unwrap().machine);
    for mut each in [here, there] {
        each.send("");
        each.line("ok weave");
        assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
    }
}

/// All of them are needed to read the last.
#[test]
fn one_that_is_laid_over_others_is_written_to_none_of_their_files() {
    let mut guest = Setup::new().boot();
    guest.ok("touch 20");
    let mut onto = |scope, file: &File| {
        let file = file.try_clone().unwrap();
        guest.machine.snapshot_of(scope, file, b"").map(drop)
    };
    let files = [(); 3].map(|()| file());
    onto(Scope::Tracked, &files[0]).unwrap();
    onto(Scope::Since, &files[1]).unwrap();
    for file in &files[..2] {
        let there = || Snapshot::open(file.try_clone().unwrap()).unwrap();
        let id = there().opening().id;
        let error = onto(Scope::Since, file).unwrap_err();
        assert!(matches!(error, SnapshotError::OntoBase { base } if base == id));
        assert_eq!(there().opening().id, id);
        there().check().unwrap();
    }
    // Another's file is nobody's base.
    onto(Scope::Whole, &files[2]).unwrap();
    onto(Scope::Since, &files[2]).unwrap();
    // A whole one may have the file of the first; then there is no more that the next could be laid over.
    onto(Scope::Whole, &files[0]).unwrap();
    let untracked = onto(Scope::Since, &files[1]);
    assert!(matches!(untracked, Err(SnapshotError::Untracked)));
    onto(Scope::Tracked, &files[0]).unwrap();
    onto(Scope::Tracked, &files[0]).unwrap();
    onto(Scope::Since, &files[1]).unwrap();
    let copies = |files: &[File]| files.iter().map(|file| file.try_clone().unwrap()).collect();
    let mut other = guest.cloned_of(Loading::Eager, copies(&files[..2]), &[]);
    assert_eq!(other.ok("echo alive"), "alive");
}

/// A reset, a balloon and a pause in between.
#[test]
fn what_is_zero_since_is_zero_in_the_next() {
    let mut setup = Setup::new();
    setup.config.balloon = Some(BalloonConfig::default());
    let mut guest = setup.boot();
    guest.ok("touch 40");
    let write = |guest: &mut Guest, scope| {
        let file = file();
        let copy = file.try_clone().unwrap();
        let report = guest.machine.snapshot_of(scope, copy, b"").unwrap();
        (read_only(&file), report.totals)
    };
    let (first, _) = write(&mut guest, Scope::Tracked);
    guest.ok("balloon free 40");
    guest.machine.pause().unwrap();
    let (second, totals) = write(&mut guest, Scope::Since);
    assert!(totals.zeros > 35 << 8, "{totals:?}");
    guest.machine.resume().unwrap();
    let few = 16;
    let both = || vec![first.try_clone().unwrap(), second.try_clone().unwrap()];
    let other = guest.cloned_of(Loading::Lazy, both(), &[]);
    assert!(filled(&other) < few);
    guest.ok("touch 40");
    let all = filled(&guest);
    guest.send("reboot");
    guest.booted();
    let (third, _) = write(&mut guest, Scope::Since);
    let mut chain = both();
    chain.push(third);
    let mut other = guest.cloned_of(Loading::Lazy, chain, &[]);
    assert!(filled(&other) < few && all > 7000);
    assert_eq!(other.ok("echo alive"), "alive");
    guest.machine.stop_tracking();
    let refused = guest.machine.snapshot_of(Scope::Since, file(), b"");
    assert!(matches!(refused, Err(SnapshotError::Untracked)));
}
