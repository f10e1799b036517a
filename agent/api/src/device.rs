//! Devices of a machine that come and go while it runs: what is wanted of them, and where they stand.
//!
//! A device is named by its id for the machine's life. What is said of one that is attached already
//! (its size, its limit …) holds from the next time that it is attached.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A device of a machine; no two of one machine have the same, of whatever kind they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(pub Uuid);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    #[default]
    Disk,
    Nic,
}

/// Disks of a machine at most, besides its root disk and its config drive.
pub const MOST_DISKS: usize = 14;
/// What virtio-blk has room for, bytes.
pub const MOST_SERIAL_NUMBER: usize = 20;

/// A disk besides root disk and config drive. Part of [`crate::machine::MachineSpec`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    pub id: DeviceId,
    /// Bytes. One that stands there smaller is made larger when it is attached, never smaller.
    pub size: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// What the guest reads as its serial number: printable ASCII, at most [`MOST_SERIAL_NUMBER`]
    /// bytes. None: as much of its id as there is room for, which is how guests of OpenStack find a
    /// volume (`/dev/disk/by-id/virtio-…`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<DiskLimit>,
    #[serde(default)]
    pub source: DiskSource,
    #[serde(default)]
    pub presence: Presence,
}

impl Disk {
    /// What its guest reads.
    pub fn serial_number(&self) -> String {
        let mut id = self.id.to_string();
        id.truncate(MOST_SERIAL_NUMBER);
        self.serial_number.clone().unwrap_or(id)
    }

    /// Why no agent could attach it.
    pub(crate) fn invalid(&self) -> Option<String> {
        let odd = |byte: u8| !(byte.is_ascii_graphic() || byte == b' ');
        let why = if self.size == 0 || self.size > 1 << 46 {
            "a size of 1 byte to 64 TiB is possible"
        } else if self.serial_number().len() > MOST_SERIAL_NUMBER
            || self.serial_number().bytes().any(odd)
        {
            "a serial number has at most 20 printable ASCII characters"
        } else if self.limit.is_some_and(|limit| limit.is_zero()) {
            "a rate limit of 0 would stop it for ever"
        } else {
            return None;
        };
        Some(format!("disk {}: {why}", self.id))
    }
}

/// What is to become of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// The guest has it, from now on or from its next start.
    #[default]
    Attached,
    /// The guest lets it go; its content stays. The same is wanted of a disk that the list does not
    /// name (any more): a list that was made in ignorance of it costs nobody a byte.
    Detached,
    /// The guest lets it go, and then its content goes. Besides the end of its machine there is no
    /// other way to lose it.
    Deleted,
}

/// Where a disk's content is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DiskSource {
    /// In a file of its own in the machine's folder: made, empty, where there is none.
    #[default]
    Local,
}

/// Rate limit of a disk; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskLimit {
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    #[serde(default)]
    pub operations_per_second: Option<u64>,
    /// What may pass at once after a quiet time, as thousandths of a second of the rate.
    #[serde(default)]
    pub burst_ms: u32,
}

impl DiskLimit {
    fn is_zero(self) -> bool {
        [self.bytes_per_second, self.operations_per_second].contains(&Some(0))
    }
}

/// Network devices of a machine at most.
pub const MOST_NICS: usize = 8;
/// Pairs of queues of one at most.
pub const MOST_QUEUES: u16 = 16;
/// Least MTU (virtio 1.2 §5.1.4).
pub const LEAST_MTU: u16 = 68;

/// A network device. Part of [`crate::machine::MachineSpec`]: one that the list does not name (any more)
/// is taken away; there is nothing in it to lose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Nic {
    pub id: DeviceId,
    pub mac: Mac,
    /// What the guest is told, and its host's end is set to; none: 1500, of which the guest is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`MOST_QUEUES`]; the guest begins with one of them.
    #[serde(default = "one_queue")]
    pub queues: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<NicLimit>,
}

fn one_queue() -> u16 {
    1
}

impl Nic {
    /// Why no agent could attach it.
    pub(crate) fn invalid(&self) -> Option<String> {
        let why = if !self.mac.is_of_one_station() {
            "its MAC address is none of a single station"
        } else if self.mtu.is_some_and(|mtu| mtu < LEAST_MTU) {
            "an MTU is at least 68"
        } else if !(1..=MOST_QUEUES).contains(&self.queues) {
            "1 to 16 pairs of queues are possible"
        } else if self.limit.is_some_and(|limit| limit.is_zero()) {
            "a rate limit of 0 would stop it for ever"
        } else {
            return None;
        };
        Some(format!("network device {}: {why}", self.id))
    }
}

/// Rate limit of a network device, for each direction by itself; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NicLimit {
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    #[serde(default)]
    pub packets_per_second: Option<u64>,
    /// What may pass at once after a quiet time, as thousandths of a second of the rate.
    #[serde(default)]
    pub burst_ms: u32,
}

impl NicLimit {
    fn is_zero(self) -> bool {
        [self.bytes_per_second, self.packets_per_second].contains(&Some(0))
    }
}

/// An address of Ethernet, written `02:00:00:00:00:01`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Neither nobody's nor a group's.
    fn is_of_one_station(self) -> bool {
        let [first, ..] = self.0;
        self.0 != [0; 6] && first & 1 == 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no MAC address: six pairs of hexadecimal digits with colons are")]
pub struct NoMac(String);

impl TryFrom<String> for Mac {
    type Error = NoMac;

    fn try_from(text: String) -> Result<Self, NoMac> {
        let pair = |pair: &str| {
            let hex = pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
            hex.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        };
        let pairs: Option<Vec<u8>> = text.split(':').map(pair).collect();
        let pairs = pairs.and_then(|pairs| pairs.try_into().ok());
        pairs.map(Mac).ok_or(NoMac(text))
    }
}

/// Where a device stands. Part of [`crate::machine::MachineReport`]: of those that are wanted, and of
/// those that the machine has besides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub id: DeviceId,
    #[serde(flatten)]
    pub state: DeviceState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum DeviceState {
    /// The agent is at it.
    Attaching,
    /// The machine has it; whether its guest uses it is the guest's affair.
    Attached,
    /// The guest is to let it go, and has not yet. It is asked again and again; that it never does
    /// keeps the machine from nothing else, and from being settled least of all. A reset of the guest
    /// takes it away.
    Detaching,
    /// The machine has it no more; its content is there.
    Detached,
    /// Nor is its content.
    Deleted,
    /// The machine has it when it is started the next time, and why not now.
    AtNextStart { reason: String },
    /// It could not be attached, or deleted, and is not tried again before a newer intent.
    Failed { reason: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_is_written_as_it_is_read_and_nothing_else_is_one() {
        let mac: Mac = serde_json::from_str(r#""02:F0:00:00:00:0a""#).unwrap();
        assert_eq!(mac, Mac([2, 0xf0, 0, 0, 0, 10]));
        assert_eq!(
            serde_json::to_string(&mac).unwrap(),
            r#""02:f0:00:00:00:0a""#
        );
        for wrong in [
            "",
            "02:f0:00:00:00",
            "02:f0:00:00:00:0a:0b",
            "2:f0:0:0:0:0",
            "+2:f0:00:00:00:0a",
            "ä:f0:00:00:00:0a",
        ] {
            assert!(Mac::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn without_a_serial_number_a_disk_has_as_much_of_its_id_as_there_is_room_for() {
        let text = r#"{"id": "8d2b0a5e-1c2d-4e3f-9a0b-000000000001", "size": 1}"#;
        let disk: Disk = serde_json::from_str(text).unwrap();
        assert_eq!(disk.serial_number(), "8d2b0a5e-1c2d-4e3f-9");
        assert_eq!((disk.presence, disk.invalid()), (Presence::Attached, None));
    }
}
