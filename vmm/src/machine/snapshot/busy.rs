//! Snapshots of a guest that writes faster than its file takes it.
//!
//! The file writes to memory itself before each block that is put to it, as much as the guest would: by the share of the
//! time in which its vCPUs are let in. So it does not matter how fast this host is. The guest itself answers bytes.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::super::tests::{answers, common, echo};
use super::*;
use crate::config::MachineConfig;
use crate::request::Request;
use crate::stream::snapshot::slow;
use common::Rig;

/// What is written to, over and over: more than fits the pause.
const BUSY: u64 = (100 << 20) / PAGE as u64;
/// Where that begins.
const FROM: u64 = (16 << 20) / PAGE as u64;

/// How much is written to before a block is put.
#[derive(Clone, Copy)]
enum Writes {
    /// So many pages, of a guest that runs all the time.
    ByShare(u64),
    /// So many, however slow it is.
    Always(u64),
}

/// A guest that runs, and a file that writes to its memory; before the block of this number it does something else.
fn busy(
    writes: Writes,
    at: u64,
    instead: impl Fn() -> io::Result<()> + Send + Sync + 'static,
) -> Rig {
    let mut rig = Rig::build(MachineConfig::minimal(128 << 20), &echo());
    let (memory, share) = (rig.machine.memory.clone(), rig.machine.vcpus.share());
    let write = move |page: u64| {
        let at = GuestAddress((FROM + page % BUSY) * PAGE as u64);
        memory.write_obj(page + 1, at).unwrap();
    };
    (0..BUSY).for_each(&write);
    rig.machine.start().unwrap();
    let (put, written) = (AtomicU64::new(0), AtomicU64::new(0));
    slow::set(Arc::new(move || {
        if put.fetch_add(1, Ordering::Relaxed) == at {
            instead()?;
        }
        let hundredths = match writes {
            Writes::ByShare(pages) => pages * u64::from(100 - share.get()),
            Writes::Always(pages) => pages * 100,
        };
        let before = written.fetch_add(hundredths, Ordering::Relaxed);
        (before / 100..(before + hundredths) / 100).for_each(&write);
        Ok(())
    }));
    rig
}

fn snapshot(rig: &mut Rig, long_pause: bool) -> (File, Result<SnapshotReport, SnapshotError>) {
    let file = tempfile::tempfile().unwrap();
    let options = SnapshotOptions {
        long_pause,
        ..Scope::Tracked.into()
    };
    let to = file.try_clone().unwrap();
    let written = rig.machine.snapshot_of(options, to, b"");
    assert_eq!(rig.machine.throttled(), 0);
    (file, written)
}

const NEVER: u64 = u64::MAX;

fn nothing() -> io::Result<()> {
    Ok(())
}

#[test]
fn a_guest_that_writes_faster_is_slowed_down_until_what_is_left_fits_the_pause() {
    let mut rig = busy(Writes::ByShare(64), NEVER, nothing);
    let (file, written) = snapshot(&mut rig, false);
    let report = written.unwrap();
    let shares: Vec<u8> = report.rounds.iter().map(|round| round.throttled).collect();
    assert_eq!(shares, [0, 0, 0, 0, 75, 94], "{report:?}");
    assert!(report.last > 0 && report.last <= MOST_KEPT, "{report:?}");
    let (took, most) = report.slowed();
    assert!(most == 94 && took > Duration::ZERO && took < report.whole);
    Snapshot::open(file).unwrap().check().unwrap();
    answers(&mut rig, "it runs on");
}

#[test]
fn one_that_can_be_caught_up_with_runs_as_fast_as_ever() {
    let mut rig = busy(Writes::ByShare(7), NEVER, nothing);
    let (_, written) = snapshot(&mut rig, false);
    let report = written.unwrap();
    assert_eq!(report.slowed(), (Duration::ZERO, 0), "{report:?}");
    assert!(report.last <= MOST_KEPT, "{report:?}");
}

/// What was written since the last one is in the next one all the same.
#[test]
fn one_that_is_too_fast_even_so_runs_on_and_there_is_no_snapshot() {
    let mut rig = busy(Writes::Always(40), NEVER, nothing);
    let writes = slow::hook().unwrap();
    slow::set(Arc::new(nothing));
    snapshot(&mut rig, false).1.unwrap();
    for page in FROM - 1..FROM + BUSY {
        let at = GuestAddress(page * PAGE as u64);
        rig.machine.memory.write_obj(1u64, at).unwrap();
    }
    slow::set(writes);
    let file = tempfile::tempfile().unwrap();
    let to = file.try_clone().unwrap();
    let error = rig.machine.snapshot_of(Scope::Since, to, b"").unwrap_err();
    assert!(matches!(error, SnapshotError::TooBusy), "{error}");
    assert!(Snapshot::open(file).is_err());
    assert_eq!(rig.machine.throttled(), 0);
    assert_eq!(rig.machine.state(), RunState::Running);
    answers(&mut rig, "it runs on");

    slow::set(Arc::new(nothing));
    let file = tempfile::tempfile().unwrap();
    let to = file.try_clone().unwrap();
    rig.machine.snapshot_of(Scope::Since, to, b"").unwrap();
    let placed = Snapshot::open(file).unwrap().placed_below(u64::MAX);
    let has = |at: u64| placed.iter().any(|run| run.contains(&at));
    assert!(has((FROM - 1) * PAGE as u64) && has((FROM + BUSY / 2) * PAGE as u64));
}

#[test]
fn it_stands_still_for_longer_where_that_is_asked_for() {
    let mut rig = busy(Writes::Always(40), NEVER, nothing);
    let (file, written) = snapshot(&mut rig, true);
    let report = written.unwrap();
    assert_eq!(report.slowed().1, 99, "{report:?}");
    assert!(report.last >= BUSY, "{report:?}");
    Snapshot::open(file).unwrap().check().unwrap();
    answers(&mut rig, "it runs on");
}

/// In the first round of those in which it is slow; blocks of a round are those of the busy pages, and some.
const WHEN_SLOW: u64 = BUSY / 16 * 9 / 2;

#[test]
fn a_disk_that_is_full_while_the_guest_is_slow_leaves_it_fast_and_no_snapshot() {
    let full = || Err(rustix::io::Errno::NOSPC.into());
    let mut rig = busy(Writes::ByShare(64), WHEN_SLOW, full);
    let share = rig.machine.vcpus.share();
    let (file, written) = snapshot(&mut rig, false);
    let Err(SnapshotError::Stream(StreamError::Io { source, .. })) = written else {
        panic!("{written:?}");
    };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    assert!(Snapshot::open(file).is_err());
    assert_eq!((share.get(), rig.machine.state()), (0, RunState::Running));
    answers(&mut rig, "it runs on");
}

#[test]
fn a_guest_that_ends_while_it_is_slow_is_not_written() {
    let requests = Arc::new(std::sync::OnceLock::new());
    let later: Arc<std::sync::OnceLock<crate::request::RequestSender>> = Arc::clone(&requests);
    let mut rig = busy(Writes::ByShare(64), WHEN_SLOW, move || {
        later.get().unwrap().send(Request::PowerOff);
        Ok(())
    });
    let _ = requests.set(rig.machine.board.requests.clone());
    let (file, written) = snapshot(&mut rig, true);
    assert!(matches!(written, Err(SnapshotError::Over)), "{written:?}");
    assert!(Snapshot::open(file).is_err());
}

#[test]
fn a_second_thread_that_panics_while_the_guest_is_slow_leaves_it_no_slower() {
    let own = std::thread::current().id();
    let other = Arc::new(AtomicU64::new(0));
    let mut rig = busy(Writes::Always(40), NEVER, nothing);
    let (share, panicked) = (rig.machine.vcpus.share(), Arc::clone(&other));
    let before = slow::hook().unwrap();
    let by = Instant::now() + Duration::from_secs(30);
    slow::set(Arc::new(move || {
        let is_slow = share.get() > 0;
        if is_slow && std::thread::current().id() != own {
            panicked.fetch_add(1, Ordering::Relaxed);
            panic!("as it was told to");
        }
        // Who is first must not put all of them.
        while is_slow && panicked.load(Ordering::Relaxed) == 0 && Instant::now() < by {
            std::thread::yield_now();
        }
        before()
    }));
    let (file, written) = snapshot(&mut rig, true);
    assert!(other.load(Ordering::Relaxed) > 0);
    assert!(matches!(written, Err(SnapshotError::Over)), "{written:?}");
    assert!(Snapshot::open(file).is_err());
}
