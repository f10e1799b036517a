//! A guest that goes from one machine to another while it runs, and all that can come between.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fractus_vmm::config::{MachineConfig, MachineFiles};
use fractus_vmm::machine::{self, Landing, MigrationError, RunState, SnapshotError};
use fractus_vmm::stream::converge::{AtLimit, Decision, Policy, Throttle, Why};
use fractus_vmm::stream::lane::Connections;
use probe_guest::wire::Slow;
use probe_guest::{Disks, Guest, Setup, fields};
use rstest::rstest;
use vm_memory::{Bytes, GuestAddress};

const POLICY: Policy = Policy {
    downtime: Duration::from_millis(20),
    longest: PATIENCE,
    limit: Duration::from_secs(5),
    at_limit: AtLimit::Stop,
    throttle: None,
};

/// Generous: a loaded machine is no failure.
const PATIENCE: Duration = Duration::from_secs(30);

fn wire() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    for end in [&near, &far] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (near, far)
}

/// The guest on its new machine; the old one has ended.
fn moved(guest: Guest, disks: &[&File]) -> Guest {
    let (near, far) = wire();
    let sent = guest.sent(POLICY, disks, near, far);
    let offer = sent.offer.unwrap();
    assert!(offer.doubt().is_none());
    println!("{:?}", offer.let_go());
    (sent.there)(sent.arrival.unwrap().machine)
}

/// It writes all over its memory meanwhile: the guest itself finds a page that was lost.
#[rstest]
#[case(1)]
#[case(40)]
fn no_page_is_lost_while_the_guest_writes(#[case] mib: u64) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 40");
    let (mut written, mut times) = (0, 0);
    let by = Instant::now() + PATIENCE;
    // On a busy host the guest may get no processor just then, and write nothing.
    while times < 3 || written == 0 {
        assert!(Instant::now() < by, "it wrote nothing meanwhile");
        times += 1;
        guest.send(&format!("loudly weave {mib}"));
        guest.line("begun weave");
        let (near, far) = wire();
        let sent = guest.sent(POLICY, &[], near, far);
        let report = sent.offer.unwrap().let_go();
        println!("{report:?}");
        written += report.last;
        assert!(!report.rounds.is_empty());
        assert_eq!(report.rounds.last().unwrap().decision, Decision::Stop);
        guest = (sent.there)(sent.arrival.unwrap().machine);
        guest.send("");
        guest.line("ok weave");
        assert_eq!(fields(&guest.ok("info"))["nonce"], nonce);
    }
}

#[test]
fn it_goes_on_with_disk_and_vcpus_and_starts_anew_there() {
    let disk = disk(8 << 20);
    let mut guest = Setup::new().cpus(2).disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 11");
    // There and back again.
    for _ in 0..2 {
        guest = moved(guest, &[&disk]);
        guest.ok("disk-check 0 0 1048576 11");
        assert_eq!(guest.ask("spin 1 1"), "ok spin");
    }
    guest.send("reboot");
    guest.booted();
}

/// Pages that a device fills are in no log of KVM's.
#[test]
fn what_a_disk_reads_meanwhile_is_there() {
    let disk = disk(8 << 20);
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 4194304 11");
    for _ in 0..3 {
        guest.send("loudly disk-check 0 0 4194304 11 again");
        guest.line("begun disk-check");
        guest = moved(guest, &[&disk]);
        guest.send("");
        assert_eq!(guest.line(""), "ok disk-check");
    }
}

/// A disk of so many bytes, empty.
fn disk(bytes: u64) -> File {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(bytes).unwrap();
    disk
}

/// By io_uring, through the cache and past it.
#[rstest]
fn what_the_guest_writes_to_its_disks_meanwhile_goes_with_it(#[values(false, true)] direct: bool) {
    const BYTES: u64 = (24 << 20) + 512;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let made = |name: &str| {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        if direct {
            options.custom_flags(libc::O_DIRECT);
        }
        options.open(folder.path().join(name)).unwrap()
    };
    let (first, second) = (made("first"), made("second"));
    for disk in [&first, &second] {
        disk.set_len(BYTES).unwrap();
    }
    let mut guest = Setup::new()
        .disk(&first, |disk| disk.direct = direct)
        .disk(&second, |disk| disk.direct = direct)
        .boot();
    guest.ok("disk-write 0 8388608 4194304 11");
    guest.ok(&format!("disk-write 0 {} 512 13", BYTES - 512));
    guest.ok("disk-write 1 0 65536 12");
    let (mut written, mut round) = (0, 0);
    let by = Instant::now() + PATIENCE;
    while round < 2 || written == 0 {
        assert!(Instant::now() < by, "it wrote nothing meanwhile");
        round += 1;
        guest.send("loudly disk-write 0 1048576 1048576 20 again");
        guest.line("begun disk-write");
        let names = [0, 1].map(|disk| format!("{disk} on machine {round}"));
        let there = names.each_ref().map(|name| made(name));
        // What lies there already is nobody's.
        there[1].set_len(BYTES * 2).unwrap();
        let (near, far) = wire();
        let files: Vec<&File> = there.iter().collect();
        let sent = guest.sent_to(POLICY, Disks::Go(&files, BYTES), near, far, |_, _| ());
        let report = sent.offer.unwrap().let_go();
        println!("{report:?}");
        written += report.last_disk
            + report
                .rounds
                .iter()
                .skip(1)
                .map(|it| it.disk_pages)
                .sum::<u64>();
        assert_eq!(report.disk, 2 * BYTES);
        let holes = report.disks.pages * 4096;
        assert!(
            holes < BYTES / 2 + written * 4096,
            "{holes} bytes of disks were sent"
        );
        guest = (sent.there)(sent.arrival.unwrap().machine);
        guest.send("");
        let said = guest.line("ok disk-write");
        let seed = fields(&said)["seed"].clone();
        guest.ok(&format!("disk-check 0 1048576 1048576 {seed}"));
        guest.ok("disk-check 0 8388608 4194304 11");
        guest.ok(&format!("disk-check 0 {} 512 13", BYTES - 512));
        guest.ok("disk-check 1 0 65536 12");
        assert_eq!(there[1].metadata().unwrap().len(), BYTES);
    }
}

#[test]
fn a_disk_that_is_larger_than_was_agreed_is_refused() {
    let (here, there) = (disk(8 << 20), disk(1 << 20));
    let guest = Setup::new().disk(&here, |_| {}).boot();
    let (near, far) = wire();
    let sent = guest.sent_to(
        POLICY,
        Disks::Go(&[&there], (8 << 20) - 1),
        near,
        far,
        |_, _| (),
    );
    assert!(sent.arrival.is_err());
    assert_eq!(there.metadata().unwrap().len(), 1 << 20);
    let unsent = sent.offer.err().unwrap();
    let mut guest = (sent.here)(*unsent.machine);
    guest.ok("disk-write 0 0 4096 1");
}

#[test]
fn a_paused_guest_arrives_paused_and_is_as_it_was_when_it_is_taken_back() {
    let mut guest = Setup::new().command_line("tick_ms=5").boot();
    guest.machine.pause().unwrap();
    let (near, far) = wire();
    let sent = guest.sent(POLICY, &[], near, far);
    let arrived = sent.arrival.unwrap();
    assert_eq!(arrived.machine.state(), RunState::Paused);
    assert!(!arrived.ran);
    let offer = sent.offer.unwrap();
    assert_eq!(offer.report().pause, machine::Pause::default());
    assert!(offer.report().rounds.is_empty());
    drop(arrived);
    let mut guest = (sent.here)(offer.take_back().unwrap());
    assert_eq!(guest.machine.state(), RunState::Paused);
    guest.machine.resume().unwrap();
    guest.line("tick ");
}

#[test]
fn a_guest_that_was_offered_goes_on_when_it_is_taken_back() {
    let guest = Setup::new().boot();
    let (near, far) = wire();
    let sent = guest.sent(POLICY, &[], near, far);
    drop(sent.arrival.unwrap());
    let mut guest = (sent.here)(sent.offer.unwrap().take_back().unwrap());
    assert_eq!(guest.ok("echo alive"), "alive");
    let mut guest = moved(guest, &[]);
    assert_eq!(guest.ok("echo there"), "there");
}

fn landing(files: MachineFiles) -> Landing {
    let most = Vec::new();
    Landing {
        files,
        most,
        faults: None,
    }
}

/// Kinds of frames, as they are numbered.
#[derive(Debug, Clone, Copy)]
enum Frame {
    Opening = 1,
    State = 3,
    End = 4,
    Config = 6,
    Pages = 7,
}

/// An end of a connection that breaks when so many bytes have gone out, or come in, by it; and keeps what it reads.
struct Breaking {
    end: UnixStream,
    /// From the first frame of that kind on: the bytes that still go out.
    at: Option<(Frame, u64)>,
    out: u64,
    into: u64,
    read: Arc<Mutex<Vec<u8>>>,
}

impl Breaking {
    fn new(end: UnixStream) -> Self {
        Breaking {
            end,
            at: None,
            out: u64::MAX,
            into: u64::MAX,
            read: Arc::default(),
        }
    }

    fn part(left: u64, length: usize) -> io::Result<usize> {
        match length.min(usize::try_from(left).unwrap_or(usize::MAX)) {
            0 if length > 0 => Err(io::ErrorKind::ConnectionReset.into()),
            part => Ok(part),
        }
    }
}

impl Read for Breaking {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // What was sent to it is lost, and nobody hears of that.
        let part = Self::part(self.into, buffer.len())?;
        let read = self.end.read(&mut buffer[..part])?;
        self.into -= read as u64;
        self.read.lock().unwrap().extend(&buffer[..read]);
        Ok(read)
    }
}

impl Write for Breaking {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // Heads come by themselves.
        if let (Some((kind, out)), [low, high, 0, 0, ..]) = (self.at, buffer)
            && buffer.len() == 16
            && kind as u16 == u16::from_le_bytes([*low, *high])
        {
            (self.at, self.out) = (None, out);
        }
        let part = Self::part(self.out, buffer.len());
        if part.is_err() {
            self.end.shutdown(std::net::Shutdown::Both)?;
        }
        let part = part?;
        let written = self.end.write(&buffer[..part])?;
        self.out -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.end.flush()
    }
}

/// The stream of a small guest, and it on its new machine.
fn recorded() -> (Vec<u8>, Guest) {
    let guest = Setup::new().boot();
    let (near, far) = wire();
    let far = Breaking::new(far);
    let read = Arc::clone(&far.read);
    let sent = guest.sent(POLICY, &[], near, far);
    drop(sent.offer.unwrap());
    let guest = (sent.there)(sent.arrival.unwrap().machine);
    let stream = std::mem::take(&mut *read.lock().unwrap());
    (stream, guest)
}

/// Wherever the connection breaks, one machine has the guest: the old one, which goes on, or, when all was sent,
/// nobody before somebody says so.
#[test]
fn a_connection_that_breaks_costs_the_guest_nothing() {
    let mut guest = Setup::new().boot();
    let kinds = [
        Frame::Opening,
        Frame::Config,
        Frame::Pages,
        Frame::State,
        Frame::End,
    ];
    for (kind, part) in kinds
        .into_iter()
        .flat_map(|kind| [0, 7, 16, 17].map(|part| (kind, part)))
    {
        let (near, far) = wire();
        let near = Breaking {
            at: Some((kind, part)),
            ..Breaking::new(near)
        };
        let sent = guest.sent(POLICY, &[], near, far);
        assert!(sent.arrival.is_err(), "{kind:?}, {part} bytes");
        let unsent = sent.offer.err().unwrap();
        println!("{kind:?}, {part} bytes: {}", unsent.error);
        guest = (sent.here)(*unsent.machine);
        assert_eq!(guest.machine.state(), RunState::Running);
        assert_eq!(guest.ok("echo alive"), "alive");
    }
    // The answer does not come, or not whole.
    for cut in [0, 1, 15] {
        let (near, far) = wire();
        // The other side does not hear that it was lost.
        let _open = near.try_clone().unwrap();
        let near = Breaking {
            into: cut,
            ..Breaking::new(near)
        };
        let sent = guest.sent(POLICY, &[], near, far);
        let arrived = sent.arrival.unwrap();
        assert_eq!(arrived.machine.state(), RunState::Paused);
        let offer = sent.offer.unwrap();
        assert!(offer.doubt().is_some());
        guest = match cut {
            1 => (sent.there)(arrived.machine),
            _ => (sent.here)(offer.take_back().unwrap()),
        };
        assert_eq!(guest.ok("echo alive"), "alive");
    }
}

impl AsFd for Breaking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

/// Of no connection.
impl AsFd for Recording<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        rustix::stdio::stdin()
    }
}

/// What is read, and nobody to be answered.
struct Recording<'a>(&'a [u8]);

impl Read for Recording<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Recording<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stream_that_is_not_what_was_sent_is_refused() {
    let (stream, guest) = recorded();
    let arrive = |stream: &[u8]| {
        let (files, _end) = guest.files_again(&[]);
        let landing = |_: &[u8]| Ok(landing(files));
        machine::receive(Recording(stream), guest.machine.config(), landing, None)
    };
    assert_eq!(arrive(&stream).unwrap().machine.state(), RunState::Paused);
    for part in [0, 1, 15, 16, 100, stream.len() / 2, stream.len() - 1] {
        assert!(arrive(&stream[..part]).is_err(), "{part} bytes");
    }
    for step in 0..24usize {
        let mut damaged = stream.clone();
        let at = (step * 7919 * 131) % stream.len();
        damaged[at] ^= 1 << (step % 8);
        assert!(arrive(&damaged).is_err(), "a bit at {at}");
    }
}

#[test]
fn a_host_that_cannot_have_it_says_why() {
    let disk = disk(8 << 20);
    let guest = Setup::new().disk(&disk, |_| {}).boot();
    let (near, far) = wire();
    // It has no disk there.
    let sent = guest.sent(POLICY, &[], near, far);
    assert!(sent.arrival.is_err());
    let unsent = sent.offer.err().unwrap();
    let MigrationError::Refused { reason } = &unsent.error else {
        panic!("{:?}", unsent.error);
    };
    assert!(reason.contains("disks"), "{reason}");
    let mut guest = (sent.here)(*unsent.machine);
    assert_eq!(guest.ok("echo alive"), "alive");
}

#[test]
fn a_guest_that_resets_itself_meanwhile_starts_anew_on_one_of_them() {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    for _ in 0..4 {
        guest.send("reboot");
        guest.wait_for_request();
        guest = moved(guest, &[]);
        let now = fields(&guest.ok("info"))["nonce"].clone();
        assert_ne!(now, nonce);
    }
}

/// A page that was sent and is zero by the end, of a guest that is paused before a round is over.
#[test]
fn what_is_zero_again_in_the_end_is_zero_there() {
    let mut guest = Setup::new().boot();
    guest.ok("touch 4");
    let memory = guest.machine.memory().clone();
    let (first, second) = (0x2_0000, 0x2_1000);
    memory
        .write_slice(&[7; 0x2000], GuestAddress(first))
        .unwrap();
    let (near, far) = wire();
    let sent = guest.sent_with(POLICY, &[], near, far, |step, machine| {
        // The first megabyte is on its way.
        if step == 1 {
            memory.give_back(second, 0x1000).unwrap();
            machine.pause().unwrap();
        }
    });
    let offer = sent.offer.unwrap();
    assert!(offer.report().rounds.is_empty() && !offer.ran());
    let arrived = sent.arrival.unwrap();
    let byte = |at| {
        let memory = arrived.machine.memory();
        memory.read_obj::<u8>(GuestAddress(at)).unwrap()
    };
    assert_eq!([byte(first), byte(second)], [7, 0]);
}

/// Nobody looks at what is written while it is paused: its disk goes, and some of its memory, and then it runs.
#[test]
fn what_is_zero_again_of_a_guest_that_was_paused_while_its_disk_went_is_zero_there() {
    let (from, to) = (disk(1 << 20), disk(0));
    let mut guest = Setup::new().disk(&from, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 11");
    guest.ok("touch 40");
    let memory = guest.machine.memory().clone();
    let (first, second) = (0x2_0000, 0x2_1000);
    memory
        .write_slice(&[7; 0x2000], GuestAddress(first))
        .unwrap();
    guest.machine.pause().unwrap();
    let (near, far) = wire();
    let goes = Disks::Go(&[&to], 1 << 20);
    let mut gone = 0;
    let sent = guest.sent_to(POLICY, goes, near, far, |step, machine| {
        // The disk, and the first megabyte.
        if step == 2 {
            memory.give_back(second, 0x1000).unwrap();
            machine.resume().unwrap();
        }
        gone = step;
    });
    assert!(gone > 10, "it was resumed in the middle");
    let offer = sent.offer.unwrap();
    assert!(offer.ran());
    let arrived = sent.arrival.unwrap();
    let byte = |at| {
        let memory = arrived.machine.memory();
        memory.read_obj::<u8>(GuestAddress(at)).unwrap()
    };
    assert_eq!([byte(first), byte(second)], [7, 0]);
}

#[test]
fn a_guest_that_stands_still_for_too_long_goes_on_here() {
    let guest = Setup::new().boot();
    let (near, far) = wire();
    let policy = Policy {
        longest: Duration::ZERO,
        ..POLICY
    };
    let sent = guest.sent(policy, &[], near, far);
    assert!(sent.arrival.is_err());
    let unsent = sent.offer.err().unwrap();
    assert!(matches!(unsent.error, MigrationError::Late { .. }));
    let mut guest = (sent.here)(*unsent.machine);
    assert_eq!(guest.ok("echo alive"), "alive");
}

#[test]
fn a_machine_that_is_larger_than_was_agreed_is_refused() {
    let (stream, guest) = recorded();
    let mut here = guest.machine.config().clone();
    for change in [
        (|here| here.memory.bytes /= 2) as fn(&mut MachineConfig),
        |here| here.cpus.count += 1,
    ] {
        let before = here.clone();
        change(&mut here);
        let (files, _end) = guest.files_again(&[]);
        let landing = |_: &[u8]| Ok(landing(files));
        assert!(machine::receive(Recording(&stream), &here, landing, None).is_err());
        here = before;
    }
}

#[test]
fn a_guest_that_powers_off_meanwhile_has_ended_here() {
    let mut guest = Setup::new().boot();
    guest.send("poweroff");
    guest.wait_for_request();
    let (near, far) = wire();
    let sent = guest.sent(POLICY, &[], near, far);
    assert!(sent.arrival.is_err());
    let unsent = sent.offer.err().unwrap();
    let over = matches!(unsent.error, MigrationError::Machine(SnapshotError::Over));
    assert!(over, "{:?}", unsent.error);
    (sent.here)(*unsent.machine).stopped();
}

#[test]
fn a_guest_that_writes_too_fast_is_left_where_it_is() {
    let mut guest = Setup::new().boot();
    guest.ok("touch 40");
    guest.send("loudly weave 40");
    guest.line("begun weave");
    let policy = Policy {
        downtime: Duration::ZERO,
        limit: Duration::from_millis(300),
        at_limit: AtLimit::GiveUp,
        ..POLICY
    };
    let by = Instant::now() + PATIENCE;
    loop {
        let (near, far) = wire();
        let sent = guest.sent(policy, &[], near, far);
        match sent.offer {
            Err(unsent) => {
                assert!(matches!(unsent.error, MigrationError::TooBusy));
                // What came to nothing is explained like what did not.
                let report = unsent.report.as_ref().unwrap();
                let last = report.rounds.last().unwrap();
                assert_eq!(last.decision, Decision::GiveUp);
                assert!(matches!(last.why, Why::Late { .. }), "{last:?}");
                assert!(sent.arrival.is_err());
                guest = (sent.here)(*unsent.machine);
                break;
            }
            // On a busy host the guest may get no processor for a whole round.
            Ok(offer) => guest = (sent.here)(offer.take_back().unwrap()),
        }
        assert!(Instant::now() < by, "it writes nothing");
    }
    guest.send("");
    guest.line("ok weave");
}

/// Of a guest that writes to all of 8 MiB in less than a round of these takes.
const SLOW: u64 = 32 << 20;

fn slow_wire() -> (Slow, UnixStream) {
    let (end, far) = wire();
    (Slow { end, rate: SLOW }, far)
}

/// It is told in the middle of it to pause, which does not wait for a vCPU that is kept out, and goes on.
#[test]
fn a_guest_that_writes_too_fast_is_caught_up_with_once_it_is_slowed_down() {
    let throttled = Policy {
        downtime: Duration::from_millis(20),
        limit: PATIENCE * 4,
        at_limit: AtLimit::GiveUp,
        throttle: Some(Throttle {
            most: Throttle::MOST,
        }),
        ..POLICY
    };
    let plain = Policy {
        limit: Duration::from_secs(3),
        throttle: None,
        ..throttled
    };
    let mut guest = Setup::new().boot();
    guest.send("loudly weave 8");
    guest.line("begun weave");
    let by = Instant::now() + PATIENCE;
    loop {
        let (near, far) = slow_wire();
        let sent = guest.sent(plain, &[], near, far);
        match sent.offer {
            Err(unsent) => {
                assert!(matches!(unsent.error, MigrationError::TooBusy));
                guest = (sent.here)(*unsent.machine);
                break;
            }
            // On a busy host the guest may get no processor for a whole round.
            Ok(offer) => guest = (sent.here)(offer.take_back().unwrap()),
        }
        assert!(Instant::now() < by, "it writes nothing");
    }
    let by = Instant::now() + PATIENCE;
    loop {
        let (near, far) = slow_wire();
        let mut shares = Vec::new();
        let sent = guest.sent_with(throttled, &[], near, far, |_, machine| {
            let share = machine.throttled();
            if shares.last() != Some(&share) {
                shares.push(share);
                machine.pause().unwrap();
                machine.resume().unwrap();
            }
        });
        let offer = sent.offer.unwrap();
        let report = offer.report().clone();
        println!("{shares:?} {report:?}");
        assert_eq!(offer.machine().throttled(), 0);
        let (last, before) = report.rounds.split_last().unwrap();
        assert_eq!(last.decision, Decision::Stop);
        // As it was decided, so it was done.
        let mut now = 0;
        for round in &report.rounds {
            assert_eq!(round.throttled, now);
            if let Decision::Throttle { percent } = round.decision {
                assert!(percent > now);
                now = percent;
            }
        }
        if now > 0 {
            assert!(shares.contains(&now) && last.left < before[0].left);
            guest = (sent.there)(sent.arrival.unwrap().machine);
            break;
        }
        guest = (sent.here)(offer.take_back().unwrap());
        assert!(Instant::now() < by, "it writes nothing");
    }
    assert_eq!(guest.machine.throttled(), 0);
    guest.send("");
    guest.line("ok weave");
}

/// It has written to most of it before much of it has gone. What it writes is compared by itself.
#[rstest]
fn a_copy_that_is_in_vain_is_cut_short_and_nothing_is_lost(#[values(0, 2)] lanes: usize) {
    const WRITTEN: u64 = 40 << 20;
    let policy = Policy {
        limit: PATIENCE * 4,
        at_limit: AtLimit::GiveUp,
        throttle: Some(Throttle {
            most: Throttle::MOST,
        }),
        ..POLICY
    };
    let mut guest = Setup::new().boot();
    guest.send(&format!("loudly weave {}", WRITTEN >> 20));
    guest.line("begun weave");
    let by = Instant::now() + PATIENCE;
    loop {
        let (main, far) = slow_wire();
        let (lanes, far_lanes) = (0..lanes).map(|_| slow_wire()).unzip();
        let near = Connections { main, lanes };
        let far = Connections {
            main: far,
            lanes: far_lanes,
        };
        let sent = guest.sent_by(policy, Disks::Shared(&[]), near, far, |_, _| {});
        let offer = sent.offer.unwrap();
        println!("{:?}", offer.report());
        if let Some(round) = offer.report().rounds.iter().find(|round| round.cut) {
            assert!(round.pages * 4096 < WRITTEN && round.left >= WRITTEN / 2);
            assert!(matches!(round.decision, Decision::Throttle { .. }));
            let rounds: u64 = offer.report().rounds.iter().map(|round| round.pages).sum();
            let totals = offer.report().totals;
            assert!(totals.pages + totals.zeros <= rounds + offer.report().last);
            guest = (sent.there)(sent.arrival.unwrap().machine);
            break;
        }
        // On a busy host the guest may get no processor for a while.
        guest = (sent.here)(offer.take_back().unwrap());
        assert!(Instant::now() < by, "it writes nothing");
    }
    guest.send("");
    guest.line("ok weave");
}

#[test]
fn a_guest_is_as_fast_as_ever_however_a_migration_ends_that_slowed_it_down() {
    let policy = Policy {
        downtime: Duration::ZERO,
        limit: PATIENCE * 4,
        at_limit: AtLimit::GiveUp,
        throttle: Some(Throttle { most: 60 }),
        ..POLICY
    };
    let mut guest = Setup::new().boot();
    guest.send("loudly weave 8");
    guest.line("begun weave");
    let by = Instant::now() + PATIENCE * 4;
    let mut left = vec!["stopped", "broken"];
    while let Some(ends) = left.last().copied() {
        let (near, far) = slow_wire();
        let cut = near.end.try_clone().unwrap();
        let mut reached = false;
        let sent = guest.sent_with(policy, &[], near, far, |_, machine| {
            if machine.throttled() >= 20 && !std::mem::replace(&mut reached, true) {
                match ends {
                    "broken" => cut.shutdown(std::net::Shutdown::Both).unwrap(),
                    // What is paused needs no more rounds.
                    _ => machine.pause().unwrap(),
                }
            }
        });
        if reached {
            left.pop();
        }
        // On a busy host it may get no processor for a whole round, and have written nothing.
        assert!(Instant::now() < by, "{ends}: it is never slowed down");
        guest = match sent.offer {
            Ok(offer) => (sent.here)(offer.take_back().unwrap()),
            Err(unsent) => (sent.here)(*unsent.machine),
        };
        assert_eq!(guest.machine.throttled(), 0, "{ends}");
    }
    guest.machine.resume().unwrap();
    guest.send("");
    guest.line("ok weave");
}
