//! Sockets between a booted guest and programs of the host, across pauses, restores and reboots.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::io::{ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use probe_guest::{Guest, PATIENCE, Setup, fields};

const CID: u32 = 42;

/// A guest, and a way to its sockets.
fn guest() -> (Guest, SocketAddr) {
    let name = format!("fractus-probe-vsock-{}", uuid::Uuid::new_v4());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    (Setup::new().vsock(CID, &listener).boot(), address)
}

fn visit(address: &SocketAddr, line: &str) -> UnixStream {
    let mut stream = UnixStream::connect_addr(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "{line}").unwrap();
    stream
}

/// The number that the answer names.
fn answer(stream: &mut UnixStream) -> u32 {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        line.push(char::from(byte[0]));
    }
    let port = line.trim_end().strip_prefix("OK ").expect("OK");
    port.parse().expect("a port")
}

fn echo(stream: &mut UnixStream, data: &[u8]) {
    let mut sender = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || sender.write_all(data).unwrap());
        let mut back = vec![0; data.len()];
        stream.read_exact(&mut back).expect("the echo");
        assert!(back == data, "the echo is damaged");
    });
}

fn is_over(mut stream: UnixStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("it goes on: {other:?}"),
    }
}

fn word(guest: &mut Guest, name: &str) -> u64 {
    let fields = fields(&guest.ok("vsock"));
    fields[name].parse().unwrap()
}

#[test]
fn both_sides_connect_and_bytes_come_back_whole() {
    let (mut guest, address) = guest();
    assert_eq!(word(&mut guest, "cid"), u64::from(CID));
    let data: Vec<u8> = (0..1_000_000u32).map(|at| (at % 251) as u8).collect();

    let mut to_guest = visit(&address, "CONNECT 7");
    answer(&mut to_guest);
    echo(&mut to_guest, &data);

    let mut from_guest = visit(&address, "ACCEPT 5000");
    guest.ok("vsock connect 5000");
    assert_eq!(answer(&mut from_guest), 1024, "the guest's own port");
    echo(&mut from_guest, &data);
    // One does not disturb the other.
    echo(&mut to_guest, b"still here");

    // Half closed: the guest echoes what is left, and ends it.
    to_guest.write_all(b"the end").unwrap();
    to_guest.shutdown(std::net::Shutdown::Write).unwrap();
    let mut left = Vec::new();
    to_guest.read_to_end(&mut left).unwrap();
    assert_eq!(left, b"the end");
    is_over(visit(&address, "CONNECT 8"));
}

#[test]
fn connections_live_through_a_pause_and_end_with_a_restore_or_a_reboot() {
    let (mut guest, address) = guest();
    let mut stream = visit(&address, "CONNECT 7");
    answer(&mut stream);
    guest.machine.pause().unwrap();
    stream.write_all(b"meanwhile").unwrap();
    guest.machine.resume().unwrap();
    let mut back = [0; 9];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"meanwhile");

    let mut guest = guest.through_a_restore(&[]);
    is_over(stream);
    // The guest was told: it has forgotten the connection, and serves new ones.
    let mut stream = visit(&address, "CONNECT 7");
    answer(&mut stream);
    echo(&mut stream, b"hello again");
    assert_eq!(
        (word(&mut guest, "moves"), word(&mut guest, "open")),
        (1, 1)
    );

    guest.send("reboot");
    guest.booted();
    is_over(stream);
    let mut stream = visit(&address, "CONNECT 7");
    answer(&mut stream);
    assert_eq!(word(&mut guest, "moves"), 0);
}
