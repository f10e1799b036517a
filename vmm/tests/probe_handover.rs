//! A guest that another machine takes over with its memory and descriptors, and all that can come between.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fault fails the test"
)]

mod probe_guest;
mod tap;

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use fractus_vmm::config::{NetConfig, NetFiles};
use fractus_vmm::machine::{self, MigrationError, Pause, RunState, SnapshotError};
use fractus_vmm::stream::StreamError;
use probe_guest::{Guest, PATIENCE, Setup, fields};
use rstest::rstest;

fn disk(bytes: u64) -> File {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(bytes).unwrap();
    disk
}

fn nonce(guest: &mut Guest) -> String {
    fields(&guest.ok("info"))["nonce"].clone()
}

/// Microseconds since its boot, as it counts them.
fn clock(guest: &mut Guest) -> u64 {
    fields(&guest.ok("time"))["uptime_us"].parse().unwrap()
}

/// A datagram that comes back; a lost one is no fault.
fn echo(socket: &UdpSocket) {
    let mut back = [0; 16];
    for round in 0..15u8 {
        let data = [round; 7];
        socket.send_to(&data, (tap::GUEST, 7)).unwrap();
        if let Ok(length) = socket.recv(&mut back) {
            assert_eq!(length, data.len());
            return;
        }
    }
    panic!("no datagram came back");
}

/// Has the guest's port 7 echo.
fn vsock_echoes(address: &SocketAddr) {
    let mut stream = UnixStream::connect_addr(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT 7").unwrap();
    let mut said = [0; 3];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"OK ");
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte).unwrap();
    }
    stream.write_all(b"here").unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"here");
}

/// A tap whose second queue the guest does not use has come to rest in one process before another has it.
#[rstest]
fn it_goes_from_machine_to_machine_with_all_that_it_has(#[values(1, 2)] queues: u16) {
    tap::enter_namespace();
    let name = format!("fractus-probe-handover-{}", uuid::Uuid::new_v4());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let disk = disk(8 << 20);
    let net = NetConfig {
        mac: [2, 0xf0, 0, 0, 0, 1],
        queues,
        mtu: None,
        limit: None,
        addresses: Vec::new(),
    };
    let files = NetFiles {
        taps: tap::tap("guest", queues),
        vhost: Vec::new(),
    };
    let line = format!("tick_ms=0 net_ip={}/24", tap::GUEST);
    let mut guest = Setup::new()
        .cpus(2)
        .command_line(&line)
        .disk(&disk, |_| {})
        .net(net, files)
        .vsock(42, &listener)
        .boot();
    let socket = UdpSocket::bind((tap::HOST, 0)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let booted = nonce(&mut guest);
    guest.ok("touch 40");
    guest.ok("disk-write 0 0 1048576 11");
    for round in 1..=5 {
        // It writes all over its memory meanwhile, and finds a page itself that is not as it was.
        guest.send("loudly weave 20");
        guest.line("begun weave");
        (guest, _) = guest.handed_over();
        guest.send("");
        guest.line("ok weave");
        assert_eq!(nonce(&mut guest), booted);
        guest.ok(&format!("disk-check 0 0 1048576 {}", 10 + round));
        guest.ok(&format!("disk-write 0 0 1048576 {}", 11 + round));
        echo(&socket);
        vsock_echoes(&address);
        assert_eq!(guest.ask("spin 1 1"), "ok spin");
    }
    guest.send("reboot");
    guest.booted();
    guest.ok("disk-check 0 0 1048576 16");
}

#[test]
fn its_clock_never_goes_back() {
    let mut guest = Setup::new().boot();
    let mut last = clock(&mut guest);
    for _ in 0..20 {
        (guest, _) = guest.handed_over();
        let now = clock(&mut guest);
        assert!(now > last, "{last} us, then {now} us");
        last = now;
    }
}

#[test]
fn devices_that_came_later_go_along_and_go_from_there() {
    let (first, second) = (disk(1 << 20), disk(2 << 20));
    let mut setup = Setup::new().disk(&first, |_| {});
    setup.config.hot_disks = 2;
    let mut guest = setup.boot();
    let config = guest.machine.config().disks[0].clone();
    let id = guest.machine.attach_disk(config, second).unwrap();
    let slot = |guest: &mut Guest, register: &str| {
        let bits = u32::from_str_radix(&fields(&guest.ok("slots"))[register], 16).unwrap();
        bits.trailing_zeros()
    };
    slot(&mut guest, "up");
    guest.ok("disk-write 1 0 65536 5");
    (guest, _) = guest.handed_over();
    guest.ok("disk-check 1 0 65536 5");
    guest.machine.detach(&id).unwrap();
    let asked = slot(&mut guest, "down");
    guest.ok(&format!("eject {asked}"));
    guest.event(|event| matches!(event, machine::Event::DeviceGone { .. }));
    // It has one less to take along.
    let (mut guest, _) = guest.handed_over();
    guest.ok("disk-write 0 0 65536 6");
}

#[test]
fn one_that_stands_still_does_so_there_and_is_as_it_was_when_it_is_taken_back() {
    let mut guest = Setup::new().command_line("tick_ms=5").boot();
    guest.machine.pause().unwrap();
    while guest.machine.next_event().is_some() {}
    let (near, far) = UnixStream::pair().unwrap();
    let handed = guest.handed_over_to(near, far, |far, host| machine::take_over(far, host, None));
    let there = handed.there.unwrap();
    assert!(!there.ran && there.machine.state() == RunState::Paused);
    let here = handed.here.unwrap();
    assert_eq!(here.pause(), Pause::default());
    drop(there);
    let mut guest = (handed.guest)(here.take_back().unwrap());
    assert_eq!(guest.machine.state(), RunState::Paused);
    guest.machine.resume().unwrap();
    guest.line("tick ");
}

#[test]
fn one_that_was_handed_over_goes_on_when_it_is_taken_back() {
    let disk = disk(1 << 20);
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    let booted = nonce(&mut guest);
    let (near, far) = UnixStream::pair().unwrap();
    let handed = guest.handed_over_to(near, far, |far, host| machine::take_over(far, host, None));
    drop(handed.there.unwrap());
    let mut guest = (handed.guest)(handed.here.unwrap().take_back().unwrap());
    guest.ok("disk-write 0 0 65536 3");
    let (mut guest, _) = guest.handed_over();
    guest.ok("disk-check 0 0 65536 3");
    assert_eq!(nonce(&mut guest), booted);
}

/// The other side goes before it has anything, once it has all descriptors, and once it is to have the state.
#[rstest]
fn whoever_does_not_take_it_leaves_it_running(#[values(0, 1, 2)] step: u8) {
    let mut guest = Setup::new().boot();
    let booted = nonce(&mut guest);
    let (near, far) = UnixStream::pair().unwrap();
    let takes = move |mut far: UnixStream, host| {
        match step {
            0 => drop(far),
            1 => {
                far.read_exact(&mut [0; 12]).unwrap();
            }
            _ => {
                let mut limited = Limited { far, left: 2000 };
                return machine::take_over(&mut limited, host, None);
            }
        }
        Err(MigrationError::TooBusy)
    };
    let handed = guest.handed_over_to(near, far, takes);
    assert!(handed.there.is_err());
    let unsent = handed.here.err().unwrap();
    println!("{unsent:?}");
    let mut guest = (handed.guest)(*unsent.machine);
    assert_eq!(nonce(&mut guest), booted);
    let (mut guest, _) = guest.handed_over();
    assert_eq!(nonce(&mut guest), booted);
}

/// Has an end after so many bytes.
struct Limited {
    far: UnixStream,
    left: usize,
}

impl Read for &mut Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = buffer.len().min(self.left);
        let read = self.far.read(&mut buffer[..most])?;
        self.left -= read;
        Ok(read)
    }
}

impl Write for &mut Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.far.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl std::os::fd::AsFd for &mut Limited {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.far.as_fd()
    }
}

#[test]
fn one_of_another_form_is_refused_by_its_number() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut guest = Setup::new().boot();
    near.write_all(&[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    let handed = guest.handed_over_to(near, far, |far, host| machine::take_over(far, host, None));
    let error = handed.there.err().unwrap();
    let form = SnapshotError::Stream(StreamError::Format { found: 9 });
    assert_eq!(error.to_string(), MigrationError::Machine(form).to_string());
    let unsent = handed.here.err().unwrap();
    assert!(matches!(unsent.error, MigrationError::Refused { .. }));
    guest = (handed.guest)(*unsent.machine);
    guest.ok("echo alive");
}

#[test]
fn that_its_memory_was_checked_by_nobody_is_known_there() {
    let guest = Setup::new().boot();
    assert!(!guest.machine.memory().is_unchecked());
    guest.machine.memory().mark_unchecked();
    let (guest, _) = guest.handed_over();
    assert!(guest.machine.memory().is_unchecked());
}
