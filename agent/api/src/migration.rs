//! A guest that goes to another host while it runs: what both agents are told, and what they say of it.
//!
//! The owner's row in the controller's database is the only decision, and intents follow from it:
//!
//! | who | intent | what it does, and says |
//! |---|---|---|
//! | target | the owner's generation, a revision of its own, `arrives` | makes room, listens ([`State::Arriving`]), has the guest ([`State::Arrived`]) |
//! | source | a newer revision, `departs` | sends its guest ([`State::Copying`]), which then stands still ([`State::Offered`]) |
//! | target | the next generation, `continues` | lets the guest run: it is the owner's |
//! | source | the next generation, absent | ends what it has |
//!
//! An abort is an intent of the source's without `departs`: its guest runs on, if it stood still. Until it has
//! one of the two, a source that has offered its guest lets it stand still, however long that takes. A target whose
//! process has ended before its guest ran says that it has failed; then the row may go back to the source, with
//! `continues`: that guest stands still there as it was. One whose process was told to go on, and has ended without
//! a word, says so as well if that is known not to have been read; or else neither that nor [`State::Continued`]: its guest
//! may have run.
//!
//! With [`AtLimit::PostCopy`] a guest may go on at the target before all of its memory is there. The source's process
//! stays for as long as it is told nothing else, and what it owes goes on its way by itself: a connection that breaks is
//! made anew by the two agents, without a controller. Until then the guest needs both; if either process ends it is lost,
//! and its disks are the target's.
//!
//! Nobody starts a guest anew who is told that it `continues`: he has it, or he has failed. A stop, a rebuild or a
//! hard reboot that is wanted besides makes an end of that.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::machine::Wanted;

/// `PutMachine::version` of an intent that speaks of a migration: an agent that knows nothing of them would start
/// a guest that is to arrive.
pub const PUT_VERSION: u32 = 2;

/// One attempt to bring a guest elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(pub Uuid);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Part of the source's intent: the guest is to be sent. Tried once; what became of it is reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Departure {
    pub id: MigrationId,
    /// `ADDRESS:PORT`, where the target listens for it.
    pub to: String,
    pub key: StreamKey,
    /// May be another later on.
    pub policy: Policy,
    /// The machine's process may speak with the other one itself: memory will not follow.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// Connections by which memory goes besides the stream's own ([`crate::tls::stream::Place`]), where the processes speak
    /// themselves and both sides can; as many as [`MOST_LANES`] at most. 0: it goes by that one.
    #[serde(default, skip_serializing_if = "is_none")]
    pub lanes: u8,
}

/// Connections by which memory goes at once at most.
pub const MOST_LANES: u8 = 8;

/// Part of the target's intent: a guest is to come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arrival {
    pub id: MigrationId,
    pub key: StreamKey,
    /// Of the process that has the guest now.
    pub shape: Shape,
    /// As of the [`Departure`]; each side decides for itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
}

/// A certificate that signs itself, and its key, made for one migration: each side shows it and believes no
/// other.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamKey {
    /// PEM.
    pub certificate: String,
    /// PEM, PKCS#8.
    pub key: String,
}

impl fmt::Debug for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamKey").finish_non_exhaustive()
    }
}

/// What a machine's process was made for, and keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// What the guest is offered now.
    pub vcpus: u8,
    /// None: they stay as many as they are.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// What it began with.
    pub memory_mib: u64,
    /// Besides; none: there can be none.
    #[serde(default)]
    pub max_hot_memory_mib: Option<u64>,
    /// Bytes of its root disk; none: it has none.
    #[serde(default)]
    pub root_disk: Option<u64>,
}

/// How long copying may take, and the guest may stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The guest is stopped once the rest is thought to take no longer.
    pub downtime_ms: u64,
    /// One that has stood still for so long, with not all sent, runs on where it was.
    pub longest_ms: u64,
    /// Copying may take so long once all that there was has been copied for the first time, which takes as long as it takes.
    pub limit_ms: u64,
    /// What becomes of a guest that writes faster than it is copied.
    pub at_limit: AtLimit,
    /// Before that it may be slowed down: percent of the time that its vCPUs are kept out of it at most, 1 to 99. None:
    /// it is not; nor is it by an agent that does not know this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<u8>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            downtime_ms: 10,
            longest_ms: 30_000,
            limit_ms: 600_000,
            at_limit: AtLimit::Stop,
            throttle: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtLimit {
    /// It is stopped for as long as the rest takes.
    Stop,
    /// It stays where it is.
    GiveUp,
    /// It goes on at the target, and what is left of its memory follows. Only between two hosts that say that they can
    /// ([`crate::host::HostReport::post_copy`]); a process of an agent that could not goes by `Stop`.
    PostCopy,
}

/// What became of the migration that an intent spoke of last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    pub id: MigrationId,
    pub state: State,
    /// Of the source.
    #[serde(default)]
    pub progress: Progress,
    /// Of the target: some of the guest's memory has not come yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lacks: Option<Lacks>,
}

/// Memory that is still to come to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Lacks {
    /// It does not come at the moment, and this is why: the guest stands wherever it needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starving: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum State {
    /// On the target: it listens on this port of its host.
    Arriving { port: u16 },
    /// On the target: the guest is there, and stands still.
    Arrived,
    /// On the source: the guest runs, or does what else it did.
    Copying,
    /// On the source: the guest stands still, and is the target's if the owner's row says so.
    Offered {
        /// It ran here, and is to run there.
        ran: bool,
        /// The target's answer was lost, and this is why: it may have the guest or not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        doubt: Option<String>,
        /// Memory is to follow it: without this process it cannot live there.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        owes: bool,
    },
    /// On either side: it did not come about. On the source the guest is as before.
    Failed { reason: String },
    /// The guest goes on here.
    Continued,
}

/// How far a migration is, and what it took.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Bytes that there are at most.
    pub memory_total: u64,
    pub memory_sent: u64,
    /// What is to be sent yet, as far as is known.
    pub memory_left: u64,
    pub disk_total: u64,
    pub disk_sent: u64,
    pub disk_left: u64,
    /// Since it began, microseconds.
    pub elapsed_us: u64,
    /// Percent of the time that vCPUs are kept out of the guest now.
    #[serde(skip_serializing_if = "is_none")]
    pub throttled: u8,
    /// Connections by which its memory goes besides the stream's own.
    #[serde(skip_serializing_if = "is_none")]
    pub lanes: u8,
    /// While the guest ran, the first of all that there was.
    pub rounds: Vec<Round>,
    /// How long the guest stood still on the source, for what.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
    /// Of memory that followed the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub followed: Option<Followed>,
    /// The connection by which it follows is broken, and this is why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// What has followed a guest so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Followed {
    pub bytes: u64,
    /// Times that the guest waited for a part of it.
    pub waits: u64,
    /// Microseconds until all was there; 0: it is not yet.
    pub took_us: u64,
}

fn is_none(number: &u8) -> bool {
    *number == 0
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One copy of what had been written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    pub memory_bytes: u64,
    #[serde(default)]
    pub disk_bytes: u64,
    pub took_us: u64,
    /// Bytes that were written to meanwhile, and those that it did not come to.
    pub left: u64,
    /// Bytes a second that go to the target, as far as was known after it; 0: nothing was known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rate: u64,
    /// Percent of its time that vCPUs were kept out of the guest.
    #[serde(default, skip_serializing_if = "is_none")]
    pub throttled: u8,
    /// The guest had written to most of what it was to copy: the rest was left to the next.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
    pub decision: Decision,
    /// Why that was decided, for people; none: an agent of before does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// What was written is copied while the guest runs on.
    Again,
    /// The guest is stopped for what is left.
    Stop,
    /// The guest runs on, and nothing more is copied.
    GiveUp,
    /// The guest is stopped, and what is left of its memory follows when it runs on the target.
    PostCopy,
}

/// Microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pause {
    /// vCPUs and devices came to rest.
    pub stop_us: u64,
    /// Their state was taken.
    pub state_us: u64,
    /// What was left, and the state, went to the target.
    pub send_us: u64,
    /// The target made a machine of it.
    pub answer_us: u64,
}

/// Where the guest of a process is on its way, as decisions see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transit {
    /// It is not on its way.
    #[default]
    None,
    Arriving(MigrationId),
    Arrived(MigrationId),
    Copying(MigrationId),
    Offered(MigrationId),
}

impl Wanted {
    /// The one after the other says something of a migration or a copy, and nothing else: a guest that has ended
    /// meanwhile is not wanted back for that.
    pub fn is_for_same_guest(&self, next: &Wanted) -> bool {
        let plain = |wanted: &Wanted| {
            let mut wanted = wanted.clone();
            (wanted.arrives, wanted.departs, wanted.continues) = (None, None, None);
            (wanted.copy, wanted.copies) = (None, 0);
            // Of a disk that was made: the rebuilds say so.
            (wanted.restores, wanted.parks) = (None, None);
            wanted
        };
        // A copy that was withdrawn before it was heard of has left its count.
        let copies = (self.copy, self.copies) != (next.copy, next.copies);
        let says = self.migrates() || next.migrates() || copies;
        says && plain(self) == plain(next)
    }

    /// Whether it says anything of a migration.
    pub fn migrates(&self) -> bool {
        self.arrives.is_some() || self.departs.is_some() || self.continues.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What agents of before write and read.
    #[test]
    fn a_policy_of_before_slows_nobody_down_and_is_written_as_ever() {
        let before = r#"{"downtime_ms":10,"longest_ms":30000,"limit_ms":600000,"at_limit":"stop"}"#;
        let policy: Policy = serde_json::from_str(before).unwrap();
        assert_eq!(policy, Policy::default());
        assert_eq!(policy.throttle, None);
        assert_eq!(serde_json::to_string(&policy).unwrap(), before);
        let slower = Policy {
            throttle: Some(80),
            ..policy
        };
        let text = serde_json::to_string(&slower).unwrap();
        assert!(text.ends_with(r#","throttle":80}"#), "{text}");
        assert_eq!(serde_json::from_str::<Policy>(&text).unwrap(), slower);
        let progress = serde_json::to_value(Progress::default()).unwrap();
        assert_eq!(progress.get("throttled"), None);
    }
}
