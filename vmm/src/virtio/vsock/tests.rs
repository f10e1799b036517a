//! Streams between a driver in software and programs of the host, credit, and how connections end.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::connection::BUFFER;
use super::packet::{HEADER, HOST, Header, NO_RECEIVE, NO_SEND, Operation, STREAM};
use super::testing::Entrance;
use super::worker::SOCKETS_MAX;
use super::*;
use crate::device::Device;
use crate::virtio::VirtioPciDevice;
use crate::virtio::testing::{DEADLINE, Driver, Rig, read_part, write_part};

const CID: u32 = 42;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// Of the driver's buffers.
const BUFFERS: u64 = 16;
const BUFFER_AT: u64 = 0x10_0000;
const BUFFER_SIZE: u64 = 0x1000;
const SEND_AT: u64 = 0x40_0000;
/// Bytes that the driver says it can hold.
const ROOM: u32 = 8 << 10;

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "it ended");
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

/// What is left until the end; a reset counts as one.
fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return all,
            Ok(length) => all.extend(&part[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("it does not end: {error}"),
        }
    }
}

/// The guest's side.
struct Peer {
    driver: Driver,
    /// Where the buffer of each head is.
    posted: HashMap<u16, u64>,
}

impl Peer {
    fn new(rig: &Rig, door: &Entrance) -> Self {
        let listener = door.listener.try_clone().unwrap().into();
        let device = Vsock::new(
            "vsock0",
            &VsockConfig { cid: CID },
            listener,
            &rig.board.threads,
        )
        .unwrap();
        let (board, recorder) = rig.with_recorder();
        let device = VirtioPciDevice::new("vsock0", Box::new(device), &board).unwrap();
        let mut peer = Self {
            driver: Driver::start(rig, device, recorder),
            posted: HashMap::new(),
        };
        for number in 0..BUFFERS {
            peer.post(BUFFER_AT + number * BUFFER_SIZE);
        }
        peer.driver.kick(RECEIVE);
        peer
    }

    fn post(&mut self, address: u64) {
        let part = write_part(address, BUFFER_SIZE as u32);
        let head = self.driver.submit(RECEIVE, &[part]);
        self.posted.insert(head, address);
    }

    /// The next packet for the guest; its buffer is posted again.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.used(RECEIVE);
        self.taken(used)
    }

    fn try_packet(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.try_used(RECEIVE)?;
        Some(self.taken(used))
    }

    fn taken(&mut self, (head, length): (u16, u32)) -> (Header, Vec<u8>) {
        let address = self.posted.remove(&head).unwrap();
        let bytes = self.driver.take(address, length as usize);
        let (header, data) = bytes.split_first_chunk::<HEADER>().unwrap();
        let header = Header::from_bytes(header);
        assert_eq!(header.length as usize, data.len());
        assert_eq!(
            (header.source_cid, header.destination_cid),
            (HOST, CID.into())
        );
        let data = data.to_vec();
        self.post(address);
        self.driver.kick(RECEIVE);
        (header, data)
    }

    fn expect(&mut self, operation: Operation) -> Header {
        let (header, _) = self.packet();
        assert_eq!(header.operation, operation as u16, "{header:?}");
        header
    }

    /// As it came from the guest's port to the host's.
    fn header(&self, guest: u32, host: u32, operation: Operation) -> Header {
        Header {
            source_cid: CID.into(),
            destination_cid: HOST,
            source_port: guest,
            destination_port: host,
            kind: STREAM,
            operation: operation as u16,
            buffer: ROOM,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            length: data.len() as u32,
            ..header
        };
        self.send_as_is(&[&header.bytes()[..], data].concat());
    }

    fn send_as_is(&mut self, bytes: &[u8]) {
        self.driver.put(SEND_AT, bytes);
        let part = read_part(SEND_AT, bytes.len() as u32);
        assert_eq!(self.driver.request(TRANSMIT, &[part]), 0);
    }

    /// Answers the host's request: both ports.
    fn accept(&mut self) -> (u32, u32) {
        let request = self.expect(Operation::Request);
        let (guest, host) = (request.destination_port, request.source_port);
        assert_eq!(request.buffer, BUFFER);
        self.send(self.header(guest, host, Operation::Response), &[]);
        (guest, host)
    }

    /// Connects to a port that somebody waits for.
    fn connect(&mut self, guest: u32, host: u32) {
        self.send(self.header(guest, host, Operation::Request), &[]);
        self.expect(Operation::Response);
    }
}

#[test]
fn a_program_of_the_host_reaches_a_port_of_the_guest() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 1234\nearly");
    let (guest, host) = peer.accept();
    assert_eq!(guest, 1234);
    assert_eq!(line(&mut stream), format!("OK {host}\n"));
    let (header, data) = peer.packet();
    assert_eq!(
        (header.operation, &data[..]),
        (Operation::Data as u16, &b"early"[..])
    );
    peer.send(peer.header(guest, host, Operation::Data), b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn a_guest_reaches_who_waits_for_it_and_nobody_else() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    peer.send(peer.header(9, 80, Operation::Request), &[]);
    let refused = peer.expect(Operation::Reset);
    assert_eq!((refused.source_port, refused.destination_port), (80, 9));

    let mut stream = door.visit("ACCEPT 80\n");
    peer.connect(9, 80);
    assert_eq!(line(&mut stream), "OK 9\n");
    stream.write_all(b"hello").unwrap();
    assert_eq!(peer.packet().1, b"hello");
    // One who waits is one connection.
    peer.send(peer.header(10, 80, Operation::Request), &[]);
    assert_eq!(peer.expect(Operation::Reset).destination_port, 10);
}

/// However busy the device is: a program may tell the guest to connect as soon as it has said its line.
#[test]
fn who_came_before_the_guest_asked_is_found_each_time() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    for guest in 1..200 {
        let mut stream = door.visit("ACCEPT 80\n");
        peer.connect(guest, 80);
        assert_eq!(line(&mut stream), format!("OK {guest}\n"));
        peer.send(peer.header(guest, 80, Operation::Reset), &[]);
    }
}

#[test]
fn what_nobody_understands_is_sent_away() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let _peer = Peer::new(&rig, &door);
    for wish in [
        "HELLO 1\n",
        "CONNECT x\n",
        "CONNECT 99999999999\n",
        "ACCEPT\n",
        "CONNECT 00000000000000000000000000000001",
    ] {
        assert_eq!(rest(&mut door.visit(wish)), b"", "{wish:?}");
    }
}

#[test]
fn without_a_driver_nobody_is_connected() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let peer = Peer::new(&rig, &door);
    peer.driver.set(0x14, 0, 1);
    assert_eq!(rest(&mut door.visit("CONNECT 1\n")), b"");
}

#[test]
fn who_waits_before_a_full_house_is_let_in_once_somebody_has_left() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut first = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut first);
    let _others: Vec<_> = (2..SOCKETS_MAX).map(|_| door.visit("ACCEPT 9\n")).collect();
    let mut last = door.visit("ACCEPT 10\n");
    // Whoever came before it is in, too.
    peer.connect(5, 10);
    assert_eq!(line(&mut last), "OK 5\n");
    let _next = door.visit("CONNECT 2\n");
    // The guest ends one, and nothing else happens.
    peer.send(peer.header(guest, host, Operation::Reset), &[]);
    assert_eq!(peer.expect(Operation::Request).destination_port, 2);
}

#[test]
fn a_refused_request_ends_the_programs_stream_without_a_word() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 5\n");
    let request = peer.expect(Operation::Request);
    peer.send(peer.header(5, request.source_port, Operation::Reset), &[]);
    assert_eq!(rest(&mut stream), b"");
}

#[test]
fn the_guest_gets_no_more_than_it_can_hold() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut stream);
    let sent: Vec<u8> = (0..3 * ROOM).map(|at| (at % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    let (mut got, mut asked) = (Vec::new(), 0);
    while got.len() < sent.len() {
        let (header, data) = peer.packet();
        got.extend(data);
        if header.operation == Operation::CreditRequest as u16 {
            asked += 1;
            assert_eq!(got.len() as u32, asked * ROOM, "all that it could hold");
            let update = Header {
                forwarded: got.len() as u32,
                ..peer.header(guest, host, Operation::CreditUpdate)
            };
            peer.send(update, &[]);
        }
    }
    assert!(got == sent, "the stream is damaged");
    assert_eq!(asked, 2);
}

#[test]
fn what_the_host_does_not_take_is_kept_and_no_more_than_was_promised() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut stream);
    // As a driver does: it sends what it may, and hears how much was passed on.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let piece = vec![7; 4 << 10];
    while sent.wrapping_sub(forwarded) + piece.len() as u32 <= BUFFER {
        peer.send(peer.header(guest, host, Operation::Data), &piece);
        sent += piece.len() as u32;
        while let Some((header, _)) = peer.try_packet() {
            assert_eq!(header.operation, Operation::CreditUpdate as u16);
            forwarded = header.forwarded;
        }
        assert!(sent < 64 << 20, "the host's socket takes all of it");
    }
    assert!(forwarded > 0, "its socket took some of it");
    // All of it arrives once the host takes it.
    let mut got = vec![0; sent as usize];
    stream.read_exact(&mut got).unwrap();
    assert!(got.iter().all(|&byte| byte == 7));
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_cut_off() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut stream);
    let piece = vec![7; 32 << 10];
    // Nothing tells it that more may come: its packets are not looked at in between.
    let begin = Instant::now();
    let mut told = 0;
    let mut sent = 0u32;
    loop {
        assert!(begin.elapsed() < DEADLINE, "it was never cut off");
        peer.send(peer.header(guest, host, Operation::Data), &piece);
        sent += piece.len() as u32;
        let end = std::iter::from_fn(|| peer.try_packet())
            .inspect(|(header, _)| told = told.max(header.forwarded))
            .any(|(header, _)| header.operation == Operation::Reset as u16);
        if end {
            break;
        }
    }
    assert!(sent - told > BUFFER, "it had kept to what it may");
    assert!(rest(&mut stream).len() as u32 <= sent);
}

#[test]
fn both_sides_may_end_first() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);

    // The host says all and goes: the guest gets it, then the end, and confirms.
    let mut stream = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut stream);
    stream.write_all(b"last words").unwrap();
    drop(stream);
    assert_eq!(peer.packet().1, b"last words");
    let end = peer.expect(Operation::Shutdown);
    assert_eq!(end.flags, NO_RECEIVE | NO_SEND);
    peer.send(peer.header(guest, host, Operation::Reset), &[]);

    // The host has said all, hears on for a while, and goes.
    let mut stream = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut stream);
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(peer.expect(Operation::Shutdown).flags, NO_SEND);
    drop(stream);
    let end = peer.expect(Operation::Shutdown);
    assert_eq!(end.flags, NO_RECEIVE | NO_SEND);
    peer.send(peer.header(guest, host, Operation::Reset), &[]);

    // The host has said all, and hears on.
    let mut stream = door.visit("CONNECT 1\n");
    let (guest, host) = peer.accept();
    line(&mut stream);
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(peer.expect(Operation::Shutdown).flags, NO_SEND);
    peer.send(peer.header(guest, host, Operation::Data), b"more");
    // The guest has said all too: the device confirms that it is over.
    let end = Header {
        flags: NO_RECEIVE | NO_SEND,
        ..peer.header(guest, host, Operation::Shutdown)
    };
    peer.send(end, &[]);
    peer.expect(Operation::Reset);
    assert_eq!(rest(&mut stream), b"more");
}

#[test]
fn packets_of_no_connection_are_answered_by_resets() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    for operation in [
        Operation::Response,
        Operation::Shutdown,
        Operation::Data,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ] {
        peer.send(peer.header(1, 2, operation), &[]);
        let answer = peer.expect(Operation::Reset);
        assert_eq!((answer.destination_port, answer.source_port), (1, 2));
    }
    // Not a reset itself, and nothing that pretends to come from elsewhere or go there.
    peer.send(peer.header(1, 2, Operation::Reset), &[]);
    let elsewhere = Header {
        source_cid: 7,
        ..peer.header(1, 2, Operation::Data)
    };
    peer.send(elsewhere, &[]);
    let elsewhere = Header {
        destination_cid: 7,
        ..peer.header(1, 2, Operation::Data)
    };
    peer.send(elsewhere, &[]);
    // Another kind of socket, and a length that is a lie.
    let datagram = Header {
        kind: 3,
        ..peer.header(3, 4, Operation::Data)
    };
    peer.send(datagram, &[]);
    assert_eq!(peer.expect(Operation::Reset).destination_port, 3);
    let lie = Header {
        length: 5,
        ..peer.header(5, 6, Operation::Data)
    };
    peer.send_as_is(&lie.bytes());
    assert_eq!(peer.expect(Operation::Reset).destination_port, 5);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    // More packets than it has buffers for the answers, and than the device keeps.
    let packet = peer.header(1, 2, Operation::Data).bytes();
    peer.driver.put(SEND_AT, &packet);
    let size = u64::from(peer.driver.rings[TRANSMIT].size);
    for _ in 0..size {
        peer.driver
            .submit(TRANSMIT, &[read_part(SEND_AT, HEADER as u32)]);
    }
    peer.driver.kick(TRANSMIT);
    // Once it takes them, all are answered.
    for _ in 0..size {
        peer.expect(Operation::Reset);
    }
}

#[test]
fn a_pause_leaves_connections_as_they_are() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 1\n");
    peer.accept();
    line(&mut stream);
    peer.driver.device.pause().unwrap();
    stream.write_all(b"meanwhile").unwrap();
    peer.driver.device.resume().unwrap();
    assert_eq!(peer.packet().1, b"meanwhile");
}

#[test]
fn a_reset_of_the_device_ends_all_connections() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let mut peer = Peer::new(&rig, &door);
    let mut stream = door.visit("CONNECT 1\n");
    peer.accept();
    line(&mut stream);
    peer.driver.set(0x14, 0, 1);
    assert_eq!(rest(&mut stream), b"");
}

/// A guest with a connection, and `buffers` for events at 0x2000, before it was moved; to be resumed. The
/// host's port of that connection.
fn moved(rig: &Rig, door: &Entrance, buffers: u64, patience: Duration) -> (Peer, u32) {
    let mut peer = Peer::new(rig, door);
    for number in 0..buffers {
        let part = write_part(0x2000 + 8 * number, 8);
        peer.driver.submit(EVENT, &[part]);
    }
    let mut stream = door.visit("CONNECT 1234\n");
    let (_, host) = peer.accept();
    line(&mut stream);
    peer.driver.device.pause().unwrap();
    let saved = peer.driver.device.save().unwrap();

    let config = VsockConfig { cid: CID };
    let listener = || door.listener.try_clone().unwrap().into();
    let (board, recorder) = rig.with_recorder();
    let device = VirtioPciDevice::restore(&saved, &board, |state| {
        let (id, threads) = (&state.id, &rig.board.threads);
        let vsock = Vsock::open(id, &config, listener(), Some(patience), threads)?;
        Ok(Box::new(vsock))
    })
    .unwrap();
    let mut driver = Driver::attach(rig, device, recorder);
    driver.rings.clone_from(&peer.driver.rings);
    let posted = std::mem::take(&mut peer.posted);
    drop(peer);
    assert_eq!(rest(&mut stream), b"");
    (Peer { driver, posted }, host)
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn a_guest_that_was_moved_hears_that_its_connections_are_gone_before_all_else() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let (mut peer, host) = moved(&rig, &door, 1, LONG);
    peer.driver.device.resume().unwrap();
    let mut stream = door.visit("CONNECT 1234\n");
    // Of its old connection; once the device has the second, it has had its turn to answer the first.
    for _ in 0..2 {
        peer.send(peer.header(1234, host, Operation::CreditUpdate), &[]);
    }
    assert!(peer.try_packet().is_none());
    assert_eq!(peer.driver.used(EVENT).1, 4);
    assert_eq!(peer.driver.take(0x2000, 4), [0; 4]);
    for _ in 0..2 {
        peer.send(peer.header(1234, host, Operation::CreditUpdate), &[]);
    }
    assert!(peer.try_packet().is_none());

    peer.driver.submit(EVENT, &[write_part(0x2000, 8)]);
    peer.driver.kick_if_asked(EVENT, 1, true);
    for _ in 0..4 {
        peer.expect(Operation::Reset);
    }
    let (_, host) = peer.accept();
    assert_eq!(line(&mut stream), format!("OK {host}\n"));
}

/// Nothing else wakes the device: it has asked for that kick.
#[test]
fn that_a_moved_guest_has_heard_is_seen_at_once() {
    let (rig, door) = (Rig::new(), Entrance::new());
    let (mut peer, host) = moved(&rig, &door, 4, LONG);
    // Of its old connection, and not seen by the device that it was said to.
    let late = peer.header(1234, host, Operation::CreditUpdate).bytes();
    peer.driver.put(SEND_AT, &late);
    let part = read_part(SEND_AT, late.len() as u32);
    peer.driver.submit(TRANSMIT, &[part]);
    peer.driver.device.resume().unwrap();
    assert_eq!(peer.driver.used(EVENT).1, 4);
    peer.driver.submit(EVENT, &[write_part(0x2000, 8)]);
    peer.driver.kick_if_asked(EVENT, 1, true);
    peer.expect(Operation::Reset);
}

#[test]
fn a_guest_that_offers_nothing_more_for_events_is_served_all_the_same() {
    for buffers in [0, 1] {
        let (rig, door) = (Rig::new(), Entrance::new());
        let (mut peer, _) = moved(&rig, &door, buffers, Duration::from_millis(50));
        peer.driver.device.resume().unwrap();
        let mut stream = door.visit("CONNECT 1234\n");
        let (_, host) = peer.accept();
        assert_eq!(line(&mut stream), format!("OK {host}\n"), "{buffers}");
    }
}
