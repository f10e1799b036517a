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
