//! Where a network device's address is, said to whoever forwards packets to it.
//!
//! A guest that goes on at another host is heard of there first when it sends something; until then switches
//! and neighbours send to where it was. So it is said for it, some times, since a frame may be lost and a port of a
//! switch may not forward at once: by RARP (RFC 903), which every switch learns from and no station heeds, as QEMU
//! does, and, where the device's IP addresses are known, by an ARP announcement (RFC 5227 §3) or an unsolicited neighbour
//! advertisement (RFC 4861 §7.2.6) of each, by which neighbours learn too. The guest is asked to do the same, of
//! what only it knows (virtio 1.2 §5.1.6.5.4). When that is done is decided here, and what the frames are; the
//! pair's thread sends them ([`super::worker`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::control::HEADER;

/// Waits before each time but the first, which has none: those of QEMU (migrate-set-parameters, announce-*).
const WAITS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];

const BROADCAST: [u8; 6] = [0xff; 6];
/// Where IPv6 packets to all nodes of a link go (RFC 2464 §7).
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const IPV6: u16 = 0x86dd;
/// Operations of both (RFC 826, RFC 903).
const REQUEST: u16 = 1;
const REQUEST_REVERSE: u16 = 3;

const ETHERNET: usize = 14;
/// No frame is shorter (IEEE 802.3 §4A.4.2), its checksum left out.
const LEAST: usize = 60;

const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// What was known of the address counts no more.
const OVERRIDE: u8 = 1 << 5;
/// Option: the link-layer address of the target, in units of 8 bytes.
const TARGET_ADDRESS: [u8; 2] = [2, 1];

/// An announcement that is under way.
#[derive(Debug)]
pub(super) struct Announcement {
    addresses: Vec<IpAddr>,
    /// Bytes of a packet behind its Ethernet header; `None`: an ordinary link's.
    mtu: Option<u16>,
    waits: std::slice::Iter<'static, Duration>,
    due: Instant,
}

impl Announcement {
    /// Due at once.
    pub(super) fn new(addresses: &[IpAddr], mtu: Option<u16>, now: Instant) -> Self {
        Self {
            addresses: addresses.to_vec(),
            mtu,
            waits: WAITS.iter(),
            due: now,
        }
    }

    /// How long until the next time.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now)
    }

    /// It was made once more; false if that was the last time.
    pub(super) fn was_made(&mut self, now: Instant) -> bool {
        let Some(wait) = self.waits.next() else {
            return false;
        };
        self.due = now + *wait;
        true
    }

    /// What is sent each time, with virtio_net_hdr before each frame; of a link that takes so long ones.
    pub(super) fn frames(&self, mac: [u8; 6]) -> impl Iterator<Item = Vec<u8>> {
        let longest = ETHERNET + usize::from(self.mtu.unwrap_or(1500));
        let of_address = move |address: &IpAddr| match address {
            IpAddr::V4(address) => arp(mac, *address),
            IpAddr::V6(address) => advertisement(mac, *address),
        };
        std::iter::once(rarp(mac))
            .chain(self.addresses.iter().map(of_address))
            .filter(move |frame| frame.len() <= longest)
            .map(|mut frame| {
                frame.resize(frame.len().max(LEAST), 0);
                // No checksum and no segment is left to anybody.
                [vec![0; HEADER], frame].concat()
            })
    }
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes()].concat()
}

/// Both protocols' packet for IPv4 on Ethernet.
fn resolution(operation: u16, sender: ([u8; 6], [u8; 4]), target: ([u8; 6], [u8; 4])) -> Vec<u8> {
    // Ethernet, IPv4, and the bytes of an address of each.
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    for (hardware, protocol) in [sender, target] {
        packet.extend(hardware);
        packet.extend(protocol);
    }
    packet
}

/// "Who am I": from the station that asks, of itself, with no address of IP at all.
fn rarp(mac: [u8; 6]) -> Vec<u8> {
    let own = (mac, [0; 4]);
    let packet = resolution(REQUEST_REVERSE, own, own);
    [ethernet(BROADCAST, mac, RARP), packet].concat()
}

/// A request for one's own address.
fn arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let address = address.octets();
    let packet = resolution(REQUEST, (mac, address), ([0; 6], address));
    [ethernet(BROADCAST, mac, ARP), packet].concat()
}

fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend(TARGET_ADDRESS);
    message.extend(mac);
    let sum = checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = ethernet(ALL_NODES_MAC, mac, IPV6);
    packet.extend([0x60, 0, 0, 0]);
    packet.extend((message.len() as u16).to_be_bytes());
    // From this link, or it is not heeded (RFC 4861 §7.1.2).
    packet.extend([ICMPV6, 255]);
    packet.extend(address.octets());
    packet.extend(ALL_NODES.octets());
    packet.extend(message);
    packet
}

/// Of ICMPv6: over the pseudo header (RFC 8200 §8.1) and the message, whose own checksum is 0.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let length = (message.len() as u32).to_be_bytes();
    let header = [
        &from.octets()[..],
        &to.octets(),
        &length,
        &[0, 0, 0, ICMPV6],
    ];
    let bytes = [header.concat(), message.to_vec()].concat();
    let words = bytes.chunks(2).map(|word| {
        let low = word.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([word[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0xf0, 0, 0, 0, 1];

    fn frames(addresses: &[&str], mtu: Option<u16>) -> Vec<Vec<u8>> {
        let addresses: Vec<IpAddr> = addresses.iter().map(|one| one.parse().unwrap()).collect();
        let announcement = Announcement::new(&addresses, mtu, Instant::now());
        let strip = |frame: Vec<u8>| {
            let (header, frame) = frame.split_at(HEADER);
            assert_eq!(header, [0; HEADER]);
            assert!(frame.len() >= LEAST);
            frame.to_vec()
        };
        announcement.frames(MAC).map(strip).collect()
    }

    /// RFC 903: the layout of RFC 826, with operation 3, and the station that asks in both places.
    #[test]
    fn a_reverse_request_names_the_station_and_no_address() {
        let frames = frames(&[], None);
        assert_eq!(frames.len(), 1);
        let mut wanted = vec![0xff; 6];
        wanted.extend(MAC);
        wanted.extend([0x80, 0x35]);
        wanted.extend([0, 1, 8, 0, 6, 4, 0, 3]);
        for _ in 0..2 {
            wanted.extend(MAC);
            wanted.extend([0, 0, 0, 0]);
        }
        wanted.resize(60, 0);
        assert_eq!(frames[0], wanted);
    }

    /// RFC 5227 §3: sender and target are the address that is announced; who has it is not asked.
    #[test]
    fn an_arp_announcement_names_the_address_twice() {
        let frames = frames(&["10.77.0.2"], Some(68));
        assert_eq!(frames.len(), 2);
        let mut wanted = vec![0xff; 6];
        wanted.extend(MAC);
        wanted.extend([8, 6]);
        wanted.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        wanted.extend(MAC);
        wanted.extend([10, 77, 0, 2]);
        wanted.extend([0; 6]);
        wanted.extend([10, 77, 0, 2]);
        wanted.resize(60, 0);
        assert_eq!(frames[1], wanted);
    }

    /// RFC 4861 §4.4 and §7.2.6, in an IPv6 packet of RFC 8200.
    #[test]
    fn a_neighbour_advertisement_overrides_and_sums_up() {
        let frames = frames(&["fe80::f0:ff:fe00:1"], None);
        let frame = &frames[1];
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(frame[6..12], MAC);
        assert_eq!(frame[12..14], [0x86, 0xdd]);
        // Version 6, 32 bytes of ICMPv6, not from beyond this link.
        assert_eq!(frame[14..22], [0x60, 0, 0, 0, 0, 32, 58, 255]);
        let address: Ipv6Addr = "fe80::f0:ff:fe00:1".parse().unwrap();
        assert_eq!(frame[22..38], address.octets());
        assert_eq!(
            frame[38..54],
            [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
        );
        // Not a router, nobody asked, and it counts.
        assert_eq!((frame[54], frame[55]), (136, 0));
        assert_eq!(frame[58..62], [0x20, 0, 0, 0]);
        assert_eq!(frame[62..78], address.octets());
        assert_eq!(frame[78..80], [2, 1]);
        assert_eq!(frame[80..86], MAC);
        // A sum over all of it, its own checksum included, is all ones.
        let sum = |words: &[u8]| -> u32 {
            let words = words.chunks_exact(2);
            words
                .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
                .sum()
        };
        let mut all = sum(&frame[22..54]) + 32 + 58 + sum(&frame[54..86]);
        while all > 0xffff {
            all = (all & 0xffff) + (all >> 16);
        }
        assert_eq!(all, 0xffff);
    }

    #[test]
    fn a_checksum_covers_addresses_length_protocol_and_message() {
        // An echo request from ::1 to ::1, identifier 1, number 1, without data.
        let message = [128, 0, 0, 0, 0, 1, 0, 1];
        let words = 1 + 1 + 8 + 58 + 0x8000 + 1 + 1;
        let sum = checksum(Ipv6Addr::LOCALHOST, Ipv6Addr::LOCALHOST, &message);
        assert_eq!(u32::from(sum), 0xffff - words);
    }

    #[test]
    fn a_link_of_short_packets_gets_none_that_is_longer() {
        let addresses = ["fe80::1", "10.0.0.1"];
        assert_eq!(frames(&addresses, Some(72)).len(), 3);
        assert_eq!(frames(&addresses, Some(71)).len(), 2);
    }

    #[test]
    fn it_is_made_five_times_in_growing_waits() {
        let begin = Instant::now();
        let mut announcement = Announcement::new(&[], None, begin);
        let (mut now, mut waits) = (begin, Vec::new());
        loop {
            let wait = announcement.wait(now);
            waits.push(wait.as_millis());
            now += wait;
            if !announcement.was_made(now) {
                break;
            }
        }
        assert_eq!(waits, [0, 50, 150, 250, 350]);
        assert_eq!((now - begin).as_millis(), 800);
    }
}
