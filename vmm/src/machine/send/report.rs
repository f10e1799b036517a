//! What a migration took, and how far it is.

use std::time::Duration;

use uuid::Uuid;

use crate::stream::Totals;
use crate::stream::converge::{Decision, Why};

/// What a migration took so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendReport {
    pub id: Uuid,
    /// Connections by which memory goes beside the stream's own; none: by that.
    pub lanes: usize,
    /// Bytes of memory that there are at most, and of the disks that go.
    pub memory: u64,
    pub disk: u64,
    /// Of memory.
    pub totals: Totals,
    /// Of disks.
    pub disks: Totals,
    /// While the guest ran, the first of all that there was.
    pub rounds: Vec<SentRound>,
    /// Pages of memory that were sent while it stood still, and pages of disks.
    pub last: u64,
    pub last_disk: u64,
    /// Pages of memory that were to follow.
    pub owed: u64,
    /// Bytes that had not gone, of one that was not sent.
    pub memory_left: u64,
    pub disk_left: u64,
    pub pause: Pause,
    pub whole: Duration,
}

/// One copy of what had been written to, and what was decided after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentRound {
    /// Of memory.
    pub pages: u64,
    pub disk_pages: u64,
    pub took: Duration,
    /// Bytes that had been written to meanwhile, and those that it did not come to.
    pub left: u64,
    /// The guest had written to most of what it was to copy, so that the rest was left to the next.
    pub cut: bool,
    /// Bytes a second that go to the other side, as far as was known; 0: nothing had been sent.
    pub rate: u64,
    /// Percent of that time that vCPUs were kept out of the guest.
    pub throttled: u8,
    pub decision: Decision,
    pub why: Why,
}

/// How long the guest stood still for what; nothing, if it did anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pause {
    /// vCPUs and devices came to rest.
    pub stop: Duration,
    /// Their state was taken.
    pub state: Duration,
    /// What was left of memory and disks, and the state, went to the other side.
    pub send: Duration,
    /// The other side made a machine of it.
    pub answer: Duration,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending<'a> {
    /// Bytes of this round that are to be sent yet.
    pub memory_left: u64,
    pub disk_left: u64,
    pub elapsed: Duration,
    /// Percent of the time that vCPUs are kept out of the guest.
    pub throttled: u8,
    pub report: &'a SendReport,
}
