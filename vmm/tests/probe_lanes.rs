//! A guest that goes from one machine to another by several connections at once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fractus_vmm::machine::{Event, Machine, MigrationError, Paying, RunState};
use fractus_vmm::stream::converge::{AtLimit, Policy};
use fractus_vmm::stream::lane::{Connections, MOST_LANES};
use probe_guest::wire::Slow;
use probe_guest::{Disks, Guest, PATIENCE, Sent, Setup, fields};
use rstest::rstest;

const POLICY: Policy = Policy {
    downtime: Duration::from_millis(20),
    longest: PATIENCE,
    limit: Duration::from_secs(5),
    at_limit: AtLimit::Stop,
    throttle: None,
};

/// For as long as somebody does something about it.
const WITHOUT_END: Policy = Policy {
    downtime: Duration::ZERO,
    limit: Duration::from_secs(600),
    at_limit: AtLimit::GiveUp,
    ..POLICY
};

fn wire() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    for end in [&near, &far] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (near, far)
}

fn wires(lanes: usize) -> (Connections<UnixStream>, Connections<UnixStream>) {
    let (near, far) = wire();
    let (here, there) = (0..lanes).map(|_| wire()).unzip();
    let of = |main, lanes| Connections { main, lanes };
    (of(near, here), of(far, there))
}

fn sent(guest: Guest, policy: Policy, lanes: usize) -> Sent<UnixStream> {
    let (near, far) = wires(lanes);
    guest.sent_by(policy, Disks::Shared(&[]), near, far, |_, _| ())
}

/// Where the two are not the same; both stand still.
fn other_pages(one: &Machine, other: &Machine) -> Vec<u64> {
    const PAGE: usize = 4096;
    let bytes = one.config().memory.bytes;
    let read = |machine: &Machine, at: u64| {
        let mut page = [0; PAGE];
        assert_eq!(machine.memory().read_at(&mut page, at).unwrap(), PAGE);
        page
    };
    let pages = (0..bytes).step_by(PAGE);
    pages
        .filter(|at| read(one, *at) != read(other, *at))
        .collect()
}

/// It writes all over its memory meanwhile, several times in what one lane holds.
#[rstest]
fn every_page_is_there_in_the_end(#[values(0, 1, 3)] lanes: usize) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 40");
    let (mut written, mut times) = (0, 0);
    let by = Instant::now() + PATIENCE;
    // On a busy host the guest may get no processor just then, and write nothing.
    while times < 3 || written == 0 {
        assert!(Instant::now() < by, "it wrote nothing meanwhile");
        times += 1;
        guest.send("loudly weave 40");
        guest.line("begun weave");
        let sent = sent(guest, POLICY, lanes);
        let (offer, arrived) = (sent.offer.unwrap(), sent.arrival.unwrap());
        println!("{:?}", offer.report());
        assert_eq!(
            other_pages(offer.machine(), &arrived.machine),
            Vec::<u64>::new()
        );
        let report = offer.let_go();
        assert_eq!(
            (report.lanes, report.totals),
            (lanes, arrived.report.totals)
        );
        written += report.last;
        assert!(report.totals.pages > (40 << 20) / 4096 && !report.rounds.is_empty());
        guest = (sent.there)(arrived.machine);
        guest.send("");
        guest.line("ok weave");
        assert_eq!(fields(&guest.ok("info"))["nonce"], nonce);
    }
}

#[test]
fn its_disks_go_by_the_stream_and_its_memory_by_as_many_lanes_as_there_may_be() {
    const BYTES: u64 = 8 << 20;
    let disk = || -> File {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(BYTES).unwrap();
        disk
    };
    let (here, there) = (disk(), disk());
    let mut guest = Setup::new().cpus(2).disk(&here, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 11");
    let (near, far) = wires(MOST_LANES);
    let disks = Disks::Go(&[&there], BYTES);
    let sent = guest.sent_by(POLICY, disks, near, far, |_, _| ());
    let report = sent.offer.unwrap().let_go();
    assert!(report.disks.pages >= (1 << 20) / 4096, "{report:?}");
    let mut guest = (sent.there)(sent.arrival.unwrap().machine);
    guest.ok("disk-check 0 0 1048576 11");
    // What it sends from here on is made by threads that come when others have ended.
    guest.send("reboot");
    guest.booted();
}

/// A machine has threads for it each time, and one that was paused needs no rounds.
#[test]
fn it_goes_again_and_again_paused_or_taken_back() {
    let mut guest = Setup::new().boot();
    for _ in 0..3 {
        let sent = sent(guest, POLICY, MOST_LANES);
        drop(sent.arrival.unwrap());
        guest = (sent.here)(sent.offer.unwrap().take_back().unwrap());
        assert_eq!(guest.ok("echo alive"), "alive");
    }
    guest.machine.pause().unwrap();
    let sent = sent(guest, POLICY, 2);
    let (offer, arrived) = (sent.offer.unwrap(), sent.arrival.unwrap());
    assert!(offer.report().rounds.is_empty() && !arrived.ran);
    assert_eq!(
        other_pages(offer.machine(), &arrived.machine),
        Vec::<u64>::new()
    );
    let mut guest = (sent.there)(arrived.machine);
    assert_eq!(guest.ok("echo there"), "there");
}

/// Whichever connection breaks on whichever side: the guest goes on here.
#[rstest]
fn a_connection_that_breaks_costs_the_guest_nothing(
    #[values(None, Some(0), Some(2))] lane: Option<usize>,
    #[values(false, true)] far_one: bool,
) {
    let mut guest = Setup::new().boot();
    guest.ok("touch 40");
    guest.send("loudly weave 40");
    guest.line("begun weave");
    let (near, far) = wires(3);
    let side = if far_one { &far } else { &near };
    let end = lane.map_or(&side.main, |lane| &side.lanes[lane]);
    let end = end.try_clone().unwrap();
    let disks = Disks::Shared(&[]);
    let sent = guest.sent_by(WITHOUT_END, disks, near, far, |step, _| {
        if step == 20 {
            end.shutdown(Shutdown::Both).unwrap();
        }
    });
    let there = sent.arrival.err().unwrap();
    let unsent = sent.offer.err().unwrap();
    println!("here: {}; there: {there}", unsent.error);
    let mut guest = (sent.here)(*unsent.machine);
    assert_eq!(guest.machine.state(), RunState::Running);
    guest.send("");
    guest.line("ok weave");
    let sent = self::sent(guest, POLICY, 3);
    drop(sent.offer.unwrap());
    let mut guest = (sent.there)(sent.arrival.unwrap().machine);
    assert_eq!(guest.ok("echo there"), "there");
}

#[test]
fn lanes_that_are_mixed_up_are_refused_and_why_is_said() {
    let guest = Setup::new().boot();
    let (near, mut far) = wires(3);
    far.lanes.rotate_left(1);
    let sent = guest.sent_by(WITHOUT_END, Disks::Shared(&[]), near, far, |_, _| ());
    assert!(sent.arrival.is_err());
    let unsent = sent.offer.err().unwrap();
    let MigrationError::Refused { reason } = &unsent.error else {
        panic!("{:?}", unsent.error);
    };
    assert!(reason.contains("a lane of another stream"), "{reason}");
    let mut guest = (sent.here)(*unsent.machine);
    assert_eq!(guest.ok("echo alive"), "alive");
}

/// What a lane had been given goes before, and what follows comes by the stream, behind its word that disks are durable.
#[rstest]
fn memory_that_follows_its_guest_does_so_by_the_stream(#[values(false, true)] goes: bool) {
    const BYTES: u64 = 4 << 20;
    let [here, there] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    here.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&here, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 11");
    guest.ok("touch 40");
    guest.send("loudly weave 40");
    guest.line("begun weave");
    let policy = Policy {
        downtime: Duration::ZERO,
        // Where the disk goes first, all of memory follows.
        limit: Duration::from_millis(if goes { 0 } else { 20 }),
        at_limit: AtLimit::PostCopy,
        ..POLICY
    };
    let (near, far) = wires(2);
    let (own, others) = ([&here], [&there]);
    let disks = match goes {
        true => Disks::Go(&others, BYTES),
        false => Disks::Shared(&own),
    };
    let sent = guest.sent_by(policy, disks, near, far, |_, _| ());
    let mut offer = sent.offer.unwrap();
    println!("{:?}", offer.report());
    let report = offer.report();
    assert!(offer.owes() && (goes || report.totals.pages > 0));
    assert_eq!(report.disks.pages > 0, goes);
    let pays = std::thread::spawn(move || {
        let by = Instant::now() + PATIENCE;
        while offer.pay().unwrap() != Paying::Paid {
            assert!(Instant::now() < by, "the debt is not paid");
        }
        offer.paid()
    });
    let mut guest = (sent.there)(sent.arrival.unwrap().machine);
    println!("{:?}", pays.join().unwrap());
    guest.event(|event| *event == Event::Whole);
    guest.send("");
    guest.line("ok weave");
    guest.ok("disk-check 0 0 1048576 11");
}

#[test]
fn a_guest_that_stands_still_for_too_long_goes_on_here() {
    let guest = Setup::new().boot();
    let policy = Policy {
        longest: Duration::ZERO,
        ..POLICY
    };
    let sent = sent(guest, policy, 2);
    assert!(sent.arrival.is_err());
    let unsent = sent.offer.err().unwrap();
    assert!(matches!(unsent.error, MigrationError::Late { .. }));
    let mut guest = (sent.here)(*unsent.machine);
    assert_eq!(guest.ok("echo alive"), "alive");
}

/// A megabyte of one lane takes a quarter of a second, and its guest is served many times in that.
#[test]
fn one_slow_lane_keeps_nobody_from_the_guest() {
    const SLOW: u64 = 4 << 20;
    let mut guest = Setup::new().boot();
    guest.ok("touch 20");
    let (near, far) = wires(3);
    let slow = |end, rate| Slow { end, rate };
    let mut rates = [SLOW, u64::MAX, u64::MAX].into_iter();
    let near = Connections {
        main: slow(near.main, u64::MAX),
        lanes: (near.lanes.into_iter())
            .map(|end| slow(end, rates.next().unwrap()))
            .collect(),
    };
    let began = Instant::now();
    let mut turns = 0;
    let sent = guest.sent_by(POLICY, Disks::Shared(&[]), near, far, |turn, _| {
        turns = turn
    });
    let took = began.elapsed();
    let report = sent.offer.unwrap().let_go();
    println!("{turns} turns in {took:?}: {report:?}");
    assert!(took > Duration::from_secs(1), "it was slow");
    // A tenth of what it would have on a host that is not busy.
    assert!(turns as u128 > took.as_millis() / 100);
    // What was in the slow one's queue when the round was judged counts for how long it took.
    let rate = report.rounds[0].pages * 4096 * 1_000_000 / report.rounds[0].took.as_micros() as u64;
    assert!(rate < 8 * SLOW, "{rate}");
    let mut guest = (sent.there)(sent.arrival.unwrap().machine);
    assert_eq!(guest.ok("echo there"), "there");
}

/// Told to stay in the middle of it, to somebody who reads nothing any more: at once.
#[test]
fn a_guest_that_is_to_stay_does_not_wait_for_its_lanes() {
    use fractus_vmm::machine::{Luggage, Progress, Sender};
    let mut guest = Setup::new().boot();
    guest.ok("touch 40");
    let (near, far) = wires(3);
    let Guest { machine, .. } = guest;
    let mut sender = Sender::begin_by(machine, near, WITHOUT_END, Luggage::default()).unwrap();
    for _ in 0..50 {
        match sender.advance().unwrap() {
            Progress::Copying(more) => sender = more,
            Progress::Offered(_) => panic!("nobody has taken it"),
        }
    }
    assert!(sender.progress().memory_left > 0);
    let began = Instant::now();
    let machine = sender.give_up();
    assert!(began.elapsed() < PATIENCE / 2);
    assert_eq!(machine.state(), RunState::Running);
    drop((machine, far));
}
