//! A network device: what it is, and the host's end of it.

use std::fs::File;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, MAX_QUEUES};

/// Least MTU of a network device (virtio 1.2 §5.1.4: at least 68; IPv6 wants 1280, which is up to the guest).
pub const MIN_MTU: u16 = 68;
/// IP addresses of a network device.
pub const MAX_ADDRESSES: usize = 64;

/// A network device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address at the start: of one station, not of a group.
    pub mac: [u8; 6],
    /// Pairs of virtqueues, 1 to [`MAX_QUEUES`]; the driver begins with one of them.
    #[serde(default = "super::one")]
    pub queues: u16,
    /// What the driver is told; `None`: nothing, so that it takes its own default (1500).
    #[serde(default)]
    pub mtu: Option<u16>,
    #[serde(default)]
    pub limit: Option<NetLimit>,
    /// IP addresses that the guest has there, as far as whoever made its network knows: at most [`MAX_ADDRESSES`]. Those
    /// who send to them are told when the guest has come here; nothing else is done with them. They are in no stream
    /// and no snapshot: whoever takes a machine in knows its network.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        with = "not_in_streams"
    )]
    pub addresses: Vec<IpAddr>,
}

/// For people and for JSON; in a form that names no fields there is nothing of it.
mod not_in_streams {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<T: Serialize, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => value.serialize(serializer),
            false => ().serialize(serializer),
        }
    }

    pub fn deserialize<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        match deserializer.is_human_readable() {
            true => T::deserialize(deserializer),
            false => <()>::deserialize(deserializer).map(|()| T::default()),
        }
    }
}

/// Rate limit of a network device, for each direction by itself; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetLimit {
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    /// A segment that the guest leaves for the host to cut counts as one.
    #[serde(default)]
    pub packets_per_second: Option<u64>,
    /// What may pass at once after a quiet time, as thousandths of a second of the rate.
    #[serde(default)]
    pub burst_ms: u32,
}

/// The host's end of a network device.
#[derive(Debug, Default)]
pub struct NetFiles {
    /// One a pair of queues: queues of one tap (opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and
    /// IFF_MULTI_QUEUE if there are several), or sockets that keep the bounds of packets, each of which
    /// begins with the 12 bytes of virtio_net_hdr.
    pub taps: Vec<File>,
    /// Open /dev/vhost-net, one a pair of queues, each opened for itself and used by nobody yet: the host's
    /// kernel moves the packets of a tap. None at all: this process does, as it does where there is a rate
    /// limit. A network that comes while the machine runs has none: a locked-down process may own no more.
    pub vhost: Vec<File>,
}

impl NetConfig {
    /// `index` is for the error.
    pub fn validate(&self, index: usize) -> Result<(), ConfigError> {
        self.check()
            .map_err(|what| ConfigError::Net { index, what })
    }

    /// Checks that `files` are for this network.
    pub fn validate_files(&self, files: &NetFiles) -> Result<(), ConfigError> {
        let wanted = usize::from(self.queues);
        let wrong = |what, given| ConfigError::FileCount {
            what,
            given,
            wanted,
        };
        match (files.taps.len(), files.vhost.len()) {
            (taps, _) if taps != wanted => Err(wrong("queues of a network device", taps)),
            (_, vhost) if vhost != 0 && vhost != wanted => {
                Err(wrong("vhost-net of a network device", vhost))
            }
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let limits = self
            .limit
            .map(|limit| [limit.bytes_per_second, limit.packets_per_second]);
        if self.mac == [0; 6] || self.mac[0] & 1 != 0 {
            Err("its MAC address is none of a single station")
        } else if !(1..=MAX_QUEUES).contains(&self.queues) {
            Err("1 to 16 pairs of queues are possible")
        } else if self.mtu.is_some_and(|mtu| mtu < MIN_MTU) {
            Err("an MTU is at least 68")
        } else if limits.is_some_and(|limits| limits.contains(&Some(0))) {
            Err("a rate limit of 0 would stop it for ever")
        } else if self.addresses.len() > MAX_ADDRESSES {
            Err("at most 64 IP addresses are announced")
        } else if self.addresses.iter().any(is_of_several) {
            Err("its IP addresses are not all of a single station")
        } else {
            Ok(())
        }
    }
}

/// It is no station's own.
fn is_of_several(address: &IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    broadcast || address.is_unspecified() || address.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;

    #[test]
    fn addresses_are_in_no_stream_and_those_of_whoever_takes_a_machine_in() {
        let mut net = NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            queues: 1,
            mtu: None,
            limit: None,
            addresses: Vec::new(),
        };
        let packed = postcard::to_stdvec(&net).unwrap();
        net.addresses = vec!["10.0.0.1".parse().unwrap(), "fe80::1".parse().unwrap()];
        assert_eq!(postcard::to_stdvec(&net).unwrap(), packed);
        let mut there = MachineConfig::minimal(256 << 20);
        there.nets = vec![postcard::from_bytes(&packed).unwrap()];
        let mut here = there.clone();
        here.nets[0] = net.clone();
        there.take_place(&here);
        assert_eq!(there.nets[0], net);
        here.nets[0].mac[5] = 2;
        there.take_place(&here);
        assert_eq!(there.nets[0].addresses, Vec::<IpAddr>::new());
        for several in ["255.255.255.255", "0.0.0.0", "224.0.0.1", "::", "ff02::1"] {
            net.addresses = vec![several.parse().unwrap()];
            assert!(net.validate(0).is_err(), "{several}");
        }
    }
}
