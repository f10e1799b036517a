//! A guest that goes on at the other side while its memory is still coming.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fractus_vmm::machine::{
    self, Event, Landing, Luggage, MachineError, MigrationError, Offered, Paying, Progress,
    RunState, Sender,
};
use fractus_vmm::stream::converge::{AtLimit, Decision, Policy};
use probe_guest::{Disks, Guest, Sent, Setup, fields};
use rstest::rstest;

/// Generous: a loaded machine is no failure.
const PATIENCE: Duration = Duration::from_secs(30);

/// Its memory is to follow it, after so long.
fn after(limit: Duration) -> Policy {
    Policy {
        downtime: Duration::ZERO,
        longest: PATIENCE,
        limit,
        at_limit: AtLimit::PostCopy,
        throttle: None,
    }
}

fn wire() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    for end in [&near, &far] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (near, far)
}

type Offer = Offered<UnixStream>;

/// Who sends what is owed, at a pace that a guest outruns.
struct Payer {
    enough: Arc<AtomicBool>,
    thread: JoinHandle<(Offer, Result<Paying, MigrationError>)>,
}

impl Payer {
    /// Until all is there, the connection is broken, or it is to stop.
    fn begin(mut offer: Offer) -> Payer {
        let enough = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&enough);
        let thread = std::thread::spawn(move || {
            let by = Instant::now() + PATIENCE;
            loop {
                assert!(Instant::now() < by, "the debt is not paid");
                match offer.pay() {
                    Ok(Paying::More | Paying::Waits) if !stop.load(Ordering::Acquire) => {
                        // sleeps because the guest is to be there before its memory
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    ended => return (offer, ended),
                }
            }
        });
        Payer { enough, thread }
    }

    /// All of it.
    fn end(self) -> Offer {
        let (offer, ended) = self.thread.join().unwrap();
        assert_eq!(ended.unwrap(), Paying::Paid);
        assert!(!offer.owes());
        offer
    }

    fn stop(self) -> Offer {
        self.enough.store(true, Ordering::Release);
        let (offer, ended) = self.thread.join().unwrap();
        assert_ne!(ended.unwrap(), Paying::Paid);
        assert!(offer.owes());
        offer
    }
}

/// The guest goes on there, and its memory follows.
fn parted(sent: Sent<UnixStream>) -> (Payer, Guest) {
    let offer = sent.offer.unwrap();
    println!("{:?}", offer.report());
    assert!(offer.doubt().is_none() && offer.ran() && offer.owes());
    let payer = Payer::begin(offer);
    (payer, (sent.there)(sent.arrival.unwrap().machine))
}

/// Waits for what the machine says of its memory.
fn heard(guest: &mut Guest) -> Event {
    guest.event(|event| matches!(event, Event::Whole | Event::Starving { .. }))
}

/// The guest itself finds a page that was lost, or is older than it was.
#[rstest]
#[case(1, Duration::ZERO)]
#[case(40, Duration::ZERO)]
#[case(40, Duration::from_millis(50))]
fn no_page_is_lost_of_a_guest_that_writes_on(#[case] mib: u64, #[case] limit: Duration) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 40");
    let mut wanted = 0;
    for _ in 0..3 {
        guest.send(&format!("loudly weave {mib}"));
        guest.line("begun weave");
        let (near, far) = wire();
        let (payer, there) = parted(guest.sent(after(limit), &[], near, far));
        guest = there;
        let offer = payer.end();
        let (owed, paid) = (offer.report().owed, offer.paid());
        println!("{paid:?}");
        wanted += paid.wanted;
        let last = offer.report().rounds.last().map(|round| round.decision);
        assert!(last.is_none_or(|last| last == Decision::PostCopy || last == Decision::Again));
        assert!(owed > 0);
        assert_eq!(paid.totals.pages + paid.totals.zeros, owed);
        drop(offer);
        assert_eq!(heard(&mut guest), Event::Whole);
        assert!(guest.machine.is_whole());
        guest.send("");
        guest.line("ok weave");
        assert_eq!(fields(&guest.ok("info"))["nonce"], nonce);
    }
    assert!(mib < 2 || wanted > 0, "it never waited for any of it");
}

/// What a device reads into memory that has not come, and writes from such.
#[test]
fn disks_work_with_memory_that_has_not_come() {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().cpus(2).disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 4194304 11");
    for _ in 0..3 {
        guest.send("loudly disk-check 0 0 4194304 11 again");
        guest.line("begun disk-check");
        let (near, far) = wire();
        let (payer, there) = parted(guest.sent(after(Duration::ZERO), &[&disk], near, far));
        guest = there;
        guest.send("");
        assert_eq!(guest.line(""), "ok disk-check");
        payer.end();
    }
    guest.send("reboot");
    guest.booted();
}

/// What was sent of a disk and is zero since, of a guest whose memory is to follow it at once.
#[test]
fn what_is_zero_again_of_a_disk_is_zero_there() {
    const BYTES: u64 = 8 << 20;
    const ZERO: u64 = 65536;
    let [disk, there] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    disk.set_len(BYTES).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 4194304 11");
    let first = |disk: &File| {
        let mut page = [0; 4096];
        disk.read_exact_at(&mut page, 0).unwrap();
        page
    };
    assert_ne!(first(&disk), [0; 4096]);
    let mut typing = guest.line_in();
    let (near, far) = wire();
    let disks = [&there];
    let disks = Disks::Go(&disks, BYTES);
    let sent = guest.sent_to(after(Duration::ZERO), disks, near, far, |step, _| {
        // Its first pages are on their way, and some are not.
        if step == 1 {
            let zero = format!("disk-zero 0 0 {ZERO}\n");
            typing.write_all(zero.as_bytes()).unwrap();
            let by = Instant::now() + PATIENCE;
            while first(&disk) != [0; 4096] {
                assert!(Instant::now() < by, "it writes nothing");
                std::thread::yield_now();
            }
        }
    });
    let (payer, mut guest) = parted(sent);
    payer.end();
    assert_eq!(first(&there), [0; 4096]);
    let rest = 4_194_304 - ZERO;
    guest.send(&format!("disk-check 0 {ZERO} {rest} 11"));
    guest.line("ok disk-check");
}

/// Broken, and gone on with, as often as it is.
#[test]
fn a_connection_that_breaks_is_gone_on_with() {
    let mut guest = Setup::new().start();
    guest.booted();
    guest.ok("touch 60");
    guest.send("loudly weave 20");
    guest.line("begun weave");
    let (near, far) = wire();
    let (mut payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[], near, far));
    for _ in 0..3 {
        let mut offer = payer.stop();
        let left = offer.left();
        rustix::net::shutdown(offer.connection(), rustix::net::Shutdown::Both).unwrap();
        assert!(matches!(heard(&mut guest), Event::Starving { .. }));
        assert!(!guest.machine.is_whole());
        let (near, far) = wire();
        let feeder = guest.machine.feeder().unwrap();
        feeder.go_on_by(far.into()).unwrap();
        offer.go_on_by(near).unwrap();
        // What was on its way then was lost.
        assert!(offer.left() >= left);
        payer = Payer::begin(offer);
    }
    let mut offer = payer.end();
    assert_eq!(heard(&mut guest), Event::Whole);
    // Whoever has missed that all is there hears it when he asks.
    let (near, far) = wire();
    let feeder = guest.machine.feeder().unwrap();
    feeder.go_on_by(far.into()).unwrap();
    offer.go_on_by(near).unwrap();
    assert!(offer.owes());
    assert_eq!(offer.pay().unwrap(), Paying::Paid);
    guest.send("");
    guest.line("ok weave");
    // It can go on to yet another.
    let (near, far) = wire();
    let (payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[], near, far));
    payer.end();
    guest.ok("echo there");
}

/// With its memory gone for good it is ended, and that comes to an end, also where nobody says that the connection is
/// broken and its disk is at work. Whatever of its threads waits for what will not come may end the process.
#[rstest]
#[case("a_guest_whose_memory_is_gone")]
#[case("a_guest_that_is_sent_nothing_more")]
fn a_guest_that_lacks_memory_can_be_ended(#[case] child: &str) {
    let mut child = in_a_child(child);
    let by = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > by {
            child.kill().unwrap();
            panic!("it does not end");
        }
        // sleeps because a child's end is told by a signal, which is not ours alone
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut said = String::new();
    child.stdout.unwrap().read_to_string(&mut said).unwrap();
    assert!(said.lines().any(|line| line.ends_with(ENDS)), "{said}");
    assert!(
        status.success() || status.signal() == Some(libc::SIGSEGV),
        "{status}: {said}"
    );
}

const ENDS: &str = "the machine ends";

/// An ignored test of this file, in a process of its own.
fn in_a_child(test: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test, "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "a child of the test above"]
fn a_guest_whose_memory_is_gone() {
    let mut guest = Setup::new().start();
    guest.booted();
    guest.ok("touch 60");
    guest.send("loudly weave 40");
    guest.line("begun weave");
    let (near, far) = wire();
    let (payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[], near, far));
    drop(payer.stop());
    assert!(matches!(heard(&mut guest), Event::Starving { .. }));
    println!("{ENDS}");
    drop(guest);
}

#[test]
#[ignore = "a child of the test above"]
fn a_guest_that_is_sent_nothing_more() {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("touch 50");
    guest.send("loudly disk-write 0 0 4194304 11 again");
    guest.line("begun disk-write");
    let (near, far) = wire();
    let (payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[&disk], near, far));
    let offer = payer.stop();
    guest.overheard(Duration::from_millis(200));
    assert!(!guest.machine.is_whole());
    println!("{ENDS}");
    drop(guest);
    drop(offer);
}

/// One that is killed then ends: the kernel waits for nothing that only the process could give.
#[test]
fn a_process_that_is_killed_while_its_guest_waits_ends() {
    let mut child = in_a_child("a_guest_waits_for_its_memory");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let waits = lines.any(|line| line.unwrap().ends_with(WAITS));
    child.kill().unwrap();
    assert!(waits, "it ended before");
    let by = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < by, "it does not end");
        // sleeps because a child's end is told by a signal, which is not ours alone
        std::thread::sleep(Duration::from_millis(10));
    }
    // Its threads hold what it had until the last of them is gone.
    let task = format!("/proc/{}/task", child.id());
    assert!(!std::fs::exists(task).unwrap());
}

const WAITS: &str = "the guest waits";

#[test]
#[ignore = "a child of the test above"]
fn a_guest_waits_for_its_memory() {
    let mut guest = Setup::new().start();
    guest.booted();
    guest.ok("touch 60");
    guest.send("loudly weave 40");
    guest.line("begun weave");
    let (near, far) = wire();
    let (payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[], near, far));
    drop(payer.stop());
    assert!(matches!(heard(&mut guest), Event::Starving { .. }));
    guest.send("echo never");
    guest.overheard(Duration::from_millis(300));
    println!("{WAITS}");
    loop {
        std::thread::park();
    }
}

/// While some of it is elsewhere it is no one's to copy.
#[test]
fn memory_that_is_coming_is_not_written_or_sent() {
    let mut guest = Setup::new().start();
    guest.booted();
    guest.ok("touch 60");
    let (near, far) = wire();
    let (payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[], near, far));
    let offer = payer.stop();
    let written = guest.machine.snapshot(tempfile::tempfile().unwrap(), b"");
    assert!(written.is_err(), "{written:?}");
    let paused = guest.machine.pause();
    assert!(matches!(paused, Err(MachineError::Arriving { .. })));
    let (near, far) = wire();
    let sent = guest.sent(after(Duration::ZERO), &[], near, far);
    let unsent = sent.offer.err().unwrap();
    assert!(matches!(unsent.error, MigrationError::Arriving));
    let mut guest = (sent.here)(*unsent.machine);
    Payer::begin(offer).end();
    guest.ok("echo whole");
    guest
        .machine
        .snapshot(tempfile::tempfile().unwrap(), b"")
        .unwrap();
}

/// What its devices are to write is there before it begins anew.
#[test]
fn a_guest_that_reboots_meanwhile_does_so_when_all_is_there() {
    let mut guest = Setup::new().start();
    guest.booted();
    guest.ok("touch 60");
    let (near, far) = wire();
    let (payer, mut guest) = parted(guest.sent(after(Duration::ZERO), &[], near, far));
    let offer = payer.stop();
    guest.send("reboot");
    guest.overheard(Duration::from_millis(300));
    let payer = Payer::begin(offer);
    let order = |event: &Event| matches!(event, Event::Whole | Event::GuestReset);
    assert_eq!(guest.event(order), Event::Whole);
    assert_eq!(guest.event(order), Event::GuestReset);
    payer.end();
    guest.booted();
    guest.ok("touch 60");
}

/// One that has no way to wait for its memory says so, and the guest stays.
#[test]
fn one_that_cannot_wait_for_memory_refuses() {
    let guest = Setup::new().boot();
    let (near, far) = wire();
    let (files, _serial) = guest.files_again(&[]);
    let here = guest.machine.config().clone();
    let arrival = std::thread::spawn(move || {
        let landing = Landing {
            files,
            most: Vec::new(),
            faults: None,
        };
        machine::receive(far, &here, |_| Ok(landing), None).err()
    });
    let luggage = Luggage::default();
    let mut sender = Sender::begin(guest.machine, near, after(Duration::ZERO), luggage).unwrap();
    let unsent = loop {
        match sender.advance() {
            Ok(Progress::Copying(more)) => sender = more,
            Ok(Progress::Offered(_)) => panic!("it was taken"),
            Err(unsent) => break unsent,
        }
    };
    assert!(matches!(
        arrival.join().unwrap(),
        Some(MigrationError::NoPostCopy)
    ));
    assert!(matches!(unsent.error, MigrationError::Refused { .. }));
    assert_eq!(unsent.machine.state(), RunState::Running);
}

#[test]
fn one_that_is_taken_back_has_all_its_memory() {
    let mut guest = Setup::new().start();
    guest.booted();
    guest.ok("touch 60");
    guest.send("loudly weave 20");
    guest.line("begun weave");
    let (near, far) = wire();
    let sent = guest.sent(after(Duration::ZERO), &[], near, far);
    let mut offer = sent.offer.unwrap();
    offer.pay().unwrap();
    drop(sent.arrival.unwrap());
    let mut guest = (sent.here)(offer.take_back().unwrap());
    guest.send("");
    guest.line("ok weave");
}
