//! The network device between a guest that speaks IP and a tap of the host's kernel.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;
mod tap;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fractus_vmm::config::{NetConfig, NetFiles, NetLimit};
use fractus_vmm::machine::Event;
use fractus_vmm::stream::converge::{AtLimit, Policy};
use probe_guest::{Guest, PATIENCE, Setup, fields};
use rstest::rstest;
use rustix::net::{AddressFamily, SocketType, ipproto, socket};

const MAC: [u8; 6] = [2, 0xf0, 0, 0, 0, 1];
const PATTERN: usize = 251;

fn config(queues: u16) -> NetConfig {
    NetConfig {
        mac: MAC,
        queues,
        mtu: Some(1500),
        limit: None,
        addresses: Vec::new(),
    }
}

/// A guest with an address on a tap; the calling thread is in the tap's namespace.
fn guest_with(config: NetConfig, options: &str) -> Guest {
    tap::enter_namespace();
    let taps = tap::tap("guest", config.queues);
    let address = tap::GUEST;
    let line = format!("tick_ms=0 net_ip={address}/24 {options}");
    let setup = Setup::new().command_line(&line);
    let vhost = Vec::new();
    setup.net(config, NetFiles { taps, vhost }).boot()
}

fn guest(options: &str) -> Guest {
    guest_with(config(1), options)
}

fn service(port: u16) -> SocketAddr {
    (tap::GUEST, port).into()
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect_timeout(&service(port), PATIENCE).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a datagram until it comes back: a lost one is no fault.
fn datagram_echo(socket: &UdpSocket, data: &[u8]) {
    socket
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let mut back = vec![0; data.len() + 1];
    for _ in 0..15 {
        socket.send_to(data, service(7)).unwrap();
        if let Ok((length, from)) = socket.recv_from(&mut back) {
            assert_eq!((&back[..length], from), (data, service(7)));
            return;
        }
    }
    panic!("no datagram came back");
}

fn datagrams() -> UdpSocket {
    UdpSocket::bind((tap::HOST, 0)).expect("bind")
}

/// An echo request, until its reply comes.
fn ping() {
    let raw = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).expect("socket");
    let second = Some(Duration::from_secs(2));
    rustix::net::sockopt::set_socket_timeout(&raw, rustix::net::sockopt::Timeout::Recv, second)
        .unwrap();
    // Type, code, checksum, identifier, number, data: all of it adds up to ffff.
    let mut request = [8, 0, 0, 0, 0x12, 0x34, 0, 1, b'f', b'r'];
    let words = request
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    request[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    for _ in 0..15 {
        rustix::net::sendto(&raw, &request, rustix::net::SendFlags::empty(), &service(0)).unwrap();
        let mut reply = [0u8; 128];
        let flags = rustix::net::RecvFlags::empty();
        while let Ok((length, _)) = rustix::net::recv(&raw, &mut reply, flags) {
            let body = &reply[20..length.max(20)];
            if body.first() == Some(&0) && body.get(4..) == Some(&request[4..]) {
                return;
            }
        }
    }
    panic!("no reply to a ping");
}

fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length)
        .map(|at| (at % PATTERN) as u8)
        .collect()
}

/// Takes that much of the guest's endless stream and checks it.
fn take(stream: &mut TcpStream, length: usize) {
    let mut data = vec![0; length];
    stream.read_exact(&mut data).expect("the guest's stream");
    assert!(data == pattern(0, length), "the stream is damaged");
}

fn taken(guest: &mut Guest) -> u64 {
    fields(&guest.ok("net"))["taken"].parse().unwrap()
}

#[rstest]
#[case::offloads("")]
#[case::no_offloads("net_offloads=0")]
fn a_guest_answers_pings_datagrams_and_connections(#[case] options: &str) {
    let mut guest = guest(options);
    let told = fields(&guest.ok("net"));
    assert_eq!(told["mac"], "02:f0:00:00:00:01");
    ping();
    let socket = datagrams();
    for length in [1, 100, 1472] {
        datagram_echo(&socket, &pattern(length, length));
    }
    let mut stream = connect(7);
    for round in 1..20 {
        let data = pattern(round, 37 * round);
        stream.write_all(&data).unwrap();
        let mut back = vec![0; data.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == data, "round {round}");
    }
}

#[rstest]
#[case::offloads("")]
#[case::no_offloads("net_offloads=0")]
fn bulk_passes_both_ways_whole(#[case] options: &str) {
    const LENGTH: usize = 8 << 20;
    let mut guest = guest(options);
    take(&mut connect(19), LENGTH);
    let mut sink = connect(9);
    sink.write_all(&pattern(0, LENGTH)).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    // The guest closes once it has taken all.
    assert_eq!(sink.read(&mut [0]).unwrap(), 0);
    assert_eq!(taken(&mut guest), LENGTH as u64);
}

#[test]
fn segments_that_the_host_leaves_to_the_guest_arrive_as_one() {
    const LENGTH: usize = 4 << 20;
    let packets = |guest: &mut Guest| -> u64 { fields(&guest.ok("net"))["in"].parse().unwrap() };
    let mut guest = guest("");
    let before = packets(&mut guest);
    let mut sink = connect(9);
    sink.write_all(&pattern(0, LENGTH)).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    assert_eq!(sink.read(&mut [0]).unwrap(), 0);
    let used = packets(&mut guest) - before;
    assert!(used < (LENGTH / 1460 / 2) as u64, "{used} packets");
}

#[test]
fn a_guest_that_drives_one_pair_of_several_hears_everything() {
    let _guest = guest_with(config(4), "");
    // Different flows, which the kernel would spread over all queues.
    for _ in 0..16 {
        datagram_echo(&datagrams(), b"flow");
    }
    take(&mut connect(19), 1 << 20);
}

#[test]
fn pauses_under_traffic_damage_nothing() {
    const LENGTH: usize = 16 << 20;
    let mut guest = guest("");
    let mut stream = connect(19);
    let reader = std::thread::spawn(move || take(&mut stream, LENGTH));
    for _ in 0..20 {
        guest.machine.pause().unwrap();
        guest.machine.resume().unwrap();
        guest.ok("echo");
    }
    reader.join().unwrap();
    datagram_echo(&datagrams(), b"alive");
}

#[test]
fn a_connection_survives_a_restore() {
    let guest = guest("");
    let mut stream = connect(7);
    stream.write_all(b"before").unwrap();
    let mut back = [0; 6];
    stream.read_exact(&mut back).unwrap();
    let _guest = guest.through_a_restore(&[]);
    stream.write_all(b"after!").unwrap();
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"after!");
}

#[test]
fn a_rebooted_guest_is_there_again() {
    let mut guest = guest("");
    ping();
    guest.send("reboot");
    guest.booted();
    ping();
    take(&mut connect(19), 1 << 20);
}

/// A guest without a network that may get one.
fn guest_to_be() -> Guest {
    let mut setup = Setup::new();
    setup.config.hot_nets = 1;
    let line = format!("tick_ms=0 net_ip={}/24", tap::GUEST);
    setup.command_line(&line).boot()
}

fn one_tap() -> NetFiles {
    NetFiles {
        taps: tap::tap("guest", 1),
        vhost: Vec::new(),
    }
}

/// The slot that the register names, as the probe tells it.
fn slot(guest: &mut Guest, register: &str) -> u32 {
    let answer = fields(&guest.ok("slots"));
    let bits = u32::from_str_radix(&answer[register], 16).unwrap();
    assert_eq!(bits.count_ones(), 1, "{answer:?}");
    bits.trailing_zeros()
}

fn gone(guest: &mut Guest) {
    let event = Event::DeviceGone {
        id: "net0".to_owned(),
    };
    guest.event(|seen| *seen == event);
}

#[test]
fn a_network_is_attached_used_detached_and_its_place_taken_by_another() {
    tap::enter_namespace();
    let mut guest = guest_to_be();
    assert_eq!(guest.ask("net"), "err net no such device");
    let refused = guest.machine.attach_net(config(2), one_tap()).unwrap_err();
    assert!(refused.to_string().contains("descriptors"), "{refused}");
    let id = guest.machine.attach_net(config(1), one_tap()).unwrap();
    assert_eq!(id, "net0");
    let came = slot(&mut guest, "up");
    ping();
    take(&mut connect(19), 1 << 20);
    let second = NetFiles {
        taps: tap::tap("second", 1),
        vhost: Vec::new(),
    };
    let refused = guest.machine.attach_net(config(1), second).unwrap_err();
    let refused = format!("{:#}", anyhow::Error::from(refused));
    assert!(refused.contains("in use"), "{refused}");
    datagram_echo(&datagrams(), b"still there");

    guest.machine.detach(&id).unwrap();
    assert_eq!(slot(&mut guest, "down"), came);
    guest.ok(&format!("eject {came}"));
    gone(&mut guest);
    assert_eq!(guest.machine.config().nets, []);
    // The name is free again, so nobody has a descriptor of the tap; and so is the thread.
    let mut other = config(1);
    other.mac[5] = 9;
    let again = guest.machine.attach_net(other, one_tap()).unwrap();
    assert_eq!((again, slot(&mut guest, "up")), (id, came));
    assert_eq!(fields(&guest.ok("net"))["mac"], "02:f0:00:00:00:09");
}

#[test]
fn an_attached_network_is_there_after_a_restore_and_a_reset_until_it_is_asked_for() {
    tap::enter_namespace();
    let mut guest = guest_to_be();
    let id = guest.attach_net(config(1), one_tap());
    let came = slot(&mut guest, "up");
    let mut stream = connect(7);
    let mut echo = |data: &[u8; 6]| {
        let mut back = [0; 6];
        stream.write_all(data).unwrap();
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, data);
    };
    echo(b"before");
    let mut guest = guest.through_a_restore(&[]);
    echo(b"after!");
    guest.send("reboot");
    guest.booted();
    ping();
    guest.machine.detach(&id).unwrap();
    assert_eq!(slot(&mut guest, "down"), came);
    guest.send("reboot");
    guest.booted();
    gone(&mut guest);
    assert_eq!(guest.ask("net"), "err net no such device");
}

#[test]
fn a_limit_of_bytes_holds() {
    let mut limited = config(1);
    limited.limit = Some(NetLimit {
        bytes_per_second: Some(1 << 20),
        packets_per_second: None,
        burst_ms: 100,
    });
    let _guest = guest_with(limited, "");
    let begin = std::time::Instant::now();
    take(&mut connect(19), 1 << 20);
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(800), "{took:?}");
}

/// By whom a frame says that it was sent, of which protocol it is.
fn is_of(kind: [u8; 2]) -> impl Fn(&[u8]) -> bool {
    move |frame| frame.len() >= 42 && frame[6..12] == MAC && frame[12..14] == kind
}

const RARP: [u8; 2] = [0x80, 0x35];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];

fn says_where_it_is(frame: &[u8]) -> bool {
    let own = tap::GUEST.octets();
    is_of(ARP)(frame) && frame[28..32] == own && frame[38..42] == own
}

fn nothing_was_announced(watch: &tap::Watch) {
    while let Some(frame) = watch.seen() {
        let announced = is_of(RARP)(&frame) || says_where_it_is(&frame);
        assert!(!announced, "{frame:x?}");
    }
}

/// Of the machine that has come here, and of its guest, which is asked and has answered.
fn it_is_announced(watch: &tap::Watch, guest: &mut Guest) {
    let frame = watch.expect(PATIENCE, is_of(RARP));
    assert_eq!(frame[..6], [0xff; 6]);
    // A reverse request; the station in both places.
    assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&frame[22..28], &frame[32..38]), (&MAC[..], &MAC[..]));
    watch.expect(PATIENCE, says_where_it_is);
    let deadline = std::time::Instant::now() + PATIENCE;
    while fields(&guest.ok("net"))["announced"] == "0" {
        assert!(std::time::Instant::now() < deadline, "it has not answered");
    }
}

#[rstest]
#[case::one_pair(1)]
#[case::several(4)]
fn a_guest_that_has_come_from_another_machine_is_announced_once_it_runs(#[case] queues: u16) {
    let policy = Policy {
        downtime: Duration::from_millis(20),
        longest: PATIENCE,
        limit: Duration::from_secs(5),
        at_limit: AtLimit::Stop,
        throttle: None,
    };
    let mut named = config(queues);
    named.addresses = vec!["fe80::f0:ff:fe00:1".parse().unwrap()];
    let mut guest = guest_with(named, "");
    ping();
    assert_eq!(fields(&guest.ok("net"))["announced"], "0");
    let watch = tap::Watch::new("guest");
    let (near, far) = UnixStream::pair().unwrap();
    let sent = guest.sent(policy, &[], near, far);
    let arrived = sent.arrival.unwrap();
    sent.offer.unwrap().let_go();
    nothing_was_announced(&watch);
    let mut guest = (sent.there)(arrived.machine);
    it_is_announced(&watch, &mut guest);
    let frame = watch.expect(PATIENCE, |frame| is_of(IPV6)(frame) && frame[54] == 136);
    assert_eq!(frame[62..64], [0xfe, 0x80]);
    ping();
}

#[test]
fn a_guest_that_goes_on_from_a_file_is_announced_and_one_that_stayed_is_not() {
    let mut guest = guest("");
    let watch = tap::Watch::new("guest");
    guest.machine.pause().unwrap();
    guest.machine.resume().unwrap();
    let (mut guest, _) = guest.handed_over();
    ping();
    let file = tempfile::tempfile().unwrap();
    guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    guest.ok("echo alive");
    nothing_was_announced(&watch);
    guest.machine.pause().unwrap();
    let mut other = guest.cloned_from(file, &[]);
    it_is_announced(&watch, &mut other);
}
