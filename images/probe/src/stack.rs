//! What the probe says over its network: it answers ARP and ping, echoes UDP and TCP on port 7, takes
//! whatever TCP brings on port 9 (discard) and sends without end on port 19 (chargen).

use core::fmt::Write as _;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

use crate::net::{FRAME_MAX, Net, Received, Receiver, Transmitter};
use crate::serial::Line;
use crate::{clock, memory};

const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const CHARGEN: u16 = 19;
/// Connections of each service at a time.
const CONNECTIONS: usize = 2;
const SOCKETS: usize = 1 + 3 * CONNECTIONS;
const BIG: usize = 256 << 10;
const SMALL: usize = 16 << 10;
const DATAGRAMS: usize = 32;

/// Bytes of an ARP packet with its Ethernet header; the protocol, and what a request for an IPv4 address begins with.
const ARP_FRAME: usize = 42;
const ARP_REQUEST: [u8; 10] = [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1];

/// What chargen sends: so that a receiver can check it, byte n of a connection is n modulo 251.
const PATTERN: usize = 251;

pub struct Stack {
    net: &'static mut Net,
    interface: Interface,
    sockets: SocketSet<'static>,
    datagrams: SocketHandle,
    echoes: [SocketHandle; CONNECTIONS],
    sinks: [SocketHandle; CONNECTIONS],
    sources: [SocketHandle; CONNECTIONS],
    /// Bytes that each source has sent of its connection, and each sink has taken in all.
    sent: [usize; CONNECTIONS],
    taken: u64,
}

impl Stack {
    /// None if the address is none, or there is no memory for buffers.
    #[inline(never)]
    pub fn new(net: &'static mut Net, address: &str) -> Option<&'static mut Self> {
        let address: Ipv4Cidr = address.parse().ok()?;
        let hardware = HardwareAddress::Ethernet(EthernetAddress(net.mac));
        let mut interface = Interface::new(Config::new(hardware), net, now());
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::Ipv4(address));
        });
        let storage: &'static mut [SocketStorage<'static>] = storage()?;
        let mut sockets = SocketSet::new(storage);
        let datagrams = sockets.add(datagram_socket()?);
        let mut add = |port, receive, send| {
            let mut handles = [datagrams; CONNECTIONS];
            for handle in &mut handles {
                let receive = tcp::SocketBuffer::new(bytes(receive)?);
                let mut socket = tcp::Socket::new(receive, tcp::SocketBuffer::new(bytes(send)?));
                socket.set_nagle_enabled(false);
                socket.listen(port).ok()?;
                *handle = sockets.add(socket);
            }
            Some(handles)
        };
        memory::keep(Self {
            echoes: add(ECHO, SMALL, SMALL)?,
            sinks: add(DISCARD, BIG, 4096)?,
            sources: add(CHARGEN, 4096, BIG)?,
            datagrams,
            net,
            interface,
            sockets,
            sent: [0; CONNECTIONS],
            taken: 0,
        })
    }

    /// Does what there is to do; true if there may be more at once.
    pub fn turn(&mut self) -> bool {
        if self.net.is_asked() {
            self.announce();
        }
        let (net, sockets) = (&mut *self.net, &mut self.sockets);
        self.interface.poll(now(), net, sockets);
        let moved = self.serve();
        if moved {
            let (net, sockets) = (&mut *self.net, &mut self.sockets);
            self.interface.poll(now(), net, sockets);
        }
        self.net.flush();
        moved || self.net.receiver.has_packet()
    }

    /// Says where our address is, by a request for it of our own (RFC 5227 §3).
    fn announce(&mut self) {
        if let Some(address) = self.interface.ipv4_addr()
            && self.net.transmitter.has_room()
        {
            let (mac, address) = (self.net.mac, address.octets());
            self.net.transmitter.send(ARP_FRAME, |frame| {
                frame.fill(0);
                frame[..6].fill(0xff);
                frame[6..12].copy_from_slice(&mac);
                frame[12..22].copy_from_slice(&ARP_REQUEST);
                frame[22..28].copy_from_slice(&mac);
                frame[28..32].copy_from_slice(&address);
                frame[38..42].copy_from_slice(&address);
            });
            self.net.flush();
        }
        self.net.acknowledge();
    }

    /// The TSC at which the stack wants its turn even if nothing comes in.
    pub fn due(&mut self) -> u64 {
        match self.interface.poll_delay(now(), &self.sockets) {
            Some(delay) => crate::cpu::tsc() + clock::tsc_of_us(delay.total_micros().max(100)),
            None => clock::FOREVER,
        }
    }

    pub fn tell(&self, out: &mut Line) {
        tell(self.net, out);
        if let Some(address) = self.interface.ipv4_addr() {
            let _ = write!(out, " ip={address}");
        }
        let _ = write!(
            out,
            " taken={} announced={}",
            self.taken, self.net.announced
        );
    }

    fn serve(&mut self) -> bool {
        let mut moved = false;
        let socket = self.sockets.get_mut::<udp::Socket>(self.datagrams);
        while socket.can_recv() && socket.can_send() {
            let mut copy = [0; FRAME_MAX];
            let Ok((length, from)) = socket.recv_slice(&mut copy) else {
                break;
            };
            let _ = socket.send_slice(&copy[..length], from.endpoint);
            moved = true;
        }
        for handle in self.echoes {
            let socket = self.sockets.get_mut::<tcp::Socket>(handle);
            let mut copy = [0; 4096];
            while socket.can_recv() && socket.can_send() {
                let room = socket.send_capacity() - socket.send_queue();
                let length = room.min(copy.len());
                let got = socket.recv_slice(&mut copy[..length]).unwrap_or(0);
                let _ = socket.send_slice(&copy[..got]);
                moved = true;
            }
            moved |= revive(socket, ECHO);
        }
        for handle in self.sinks {
            let socket = self.sockets.get_mut::<tcp::Socket>(handle);
            while socket.can_recv() {
                let got = socket.recv(|data| (data.len(), data.len())).unwrap_or(0);
                self.taken += got as u64;
                moved = true;
            }
            moved |= revive(socket, DISCARD);
        }
        for (handle, sent) in self.sources.into_iter().zip(&mut self.sent) {
            let socket = self.sockets.get_mut::<tcp::Socket>(handle);
            if !socket.is_active() {
                *sent = 0;
            }
            while socket.can_send() {
                let phase = *sent % PATTERN;
                let filled = socket.send(|room| {
                    fill(room, phase);
                    (room.len(), room.len())
                });
                *sent += filled.unwrap_or(0);
                moved = true;
            }
            moved |= revive(socket, CHARGEN);
        }
        moved
    }
}

pub fn tell(net: &Net, out: &mut Line) {
    let [a, b, c, d, e, f] = net.mac;
    let _ = write!(
        out,
        " mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} features={:x} in={} out={}",
        net.features(),
        net.receiver.packets,
        net.transmitter.packets
    );
}

/// Closes when the other side did, and listens again when all is over.
fn revive(socket: &mut tcp::Socket<'static>, port: u16) -> bool {
    if !socket.is_open() {
        return socket.listen(port).is_ok();
    }
    if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
        socket.close();
        return true;
    }
    false
}

/// Bytes of the pattern, from `phase` on.
fn fill(room: &mut [u8], phase: usize) {
    const TWICE: [u8; 2 * PATTERN] = {
        let mut bytes = [0; 2 * PATTERN];
        let mut at = 0;
        while at < bytes.len() {
            bytes[at] = (at % PATTERN) as u8;
            at += 1;
        }
        bytes
    };
    for part in room.chunks_mut(PATTERN) {
        part.copy_from_slice(&TWICE[phase..phase + part.len()]);
    }
}

fn now() -> Instant {
    Instant::from_micros(clock::since_boot_us() as i64)
}

fn bytes(count: usize) -> Option<&'static mut [u8]> {
    memory::dma_pages(count.div_ceil(4096))
}

fn datagram_socket() -> Option<udp::Socket<'static>> {
    use smoltcp::storage::PacketMetadata;
    static mut META: [[udp::PacketMetadata; DATAGRAMS]; 2] =
        [[PacketMetadata::EMPTY; DATAGRAMS]; 2];
    // SAFETY: called once, by `Stack::new`, of which there is one: the only reference to it.
    let [receive, send] = unsafe { &mut *(&raw mut META) };
    let receive = udp::PacketBuffer::new(&mut receive[..], bytes(64 << 10)?);
    let send = udp::PacketBuffer::new(&mut send[..], bytes(64 << 10)?);
    let mut socket = udp::Socket::new(receive, send);
    socket.bind(ECHO).ok()?;
    Some(socket)
}

fn storage() -> Option<&'static mut [SocketStorage<'static>]> {
    static mut STORAGE: [SocketStorage<'static>; SOCKETS] = [SocketStorage::EMPTY; SOCKETS];
    // SAFETY: called once, by `Stack::new`, of which there is one: the only reference to it.
    Some(unsafe { &mut *(&raw mut STORAGE) })
}

/// A packet that came in; given back to the device once it was looked at.
pub struct Incoming<'a> {
    receiver: &'a mut Receiver,
    received: Received,
}

pub struct Outgoing<'a>(&'a mut Transmitter);

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(self.receiver.frame(self.received));
        self.receiver.done(self.received);
        result
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        self.0.send(length, f)
    }
}

impl Device for Net {
    type RxToken<'a> = Incoming<'a>;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        if !self.transmitter.has_room() {
            return None;
        }
        let receiver = &mut self.receiver;
        let received = receiver.receive()?;
        let incoming = Incoming { receiver, received };
        Some((incoming, Outgoing(&mut self.transmitter)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        let transmitter = &mut self.transmitter;
        transmitter.has_room().then_some(Outgoing(transmitter))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_MAX;
        if self.checksums_left() {
            capabilities.checksum.tcp = Checksum::None;
            capabilities.checksum.udp = Checksum::None;
        }
        capabilities
    }
}
