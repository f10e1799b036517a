//! What is known of the hosts right now: who was heard when, and what their agents last said of each
//! machine. In memory; after a start it is empty, and full again once the agents' heartbeats were
//! answered with "send a full report". Decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fractus_agent_api::host::{Changes, FullReport, Heartbeat, HostId, HostReport};
use fractus_agent_api::machine::{MachineReport, ServerId};
use sea_orm::DbErr;
use uuid::Uuid;

use crate::database::Database;

/// Seconds between heartbeats that agents are told.
pub const HEARTBEAT_INTERVAL_S: u32 = 10;
/// A host that was not heard for this long is not placed upon, and shown as down.
pub const SILENT_US: i64 = 60_000_000;

/// The live view. Shared by the listener, the reconciler and the scheduler.
#[derive(Debug, Default)]
pub struct Fleet {
    hosts: Mutex<BTreeMap<HostId, Live>>,
    /// When this controller began to be the one that agents tell; 0: from its start.
    since_us: AtomicI64,
}

#[derive(Debug, Default, Clone)]
struct Live {
    endpoint: Option<String>,
    report: Option<HostReport>,
    /// By our clock.
    heard_at_us: Option<i64>,
    pushes: Option<Pushes>,
    machines: BTreeMap<ServerId, MachineReport>,
    /// When we first heard what it says now of each of them, by our clock.
    since: BTreeMap<ServerId, i64>,
}

/// Where in an agent's pushes we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pushes {
    instance: Uuid,
    sequence: u64,
}

/// The agent has said something that we have not heard: a full report is needed (409).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("something the agent pushed before was not received; a full report is needed")]
pub struct Gap;

/// Whether a host is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Up,
    /// Silent for [`SILENT_US`]. It says nothing of the host's machines.
    Silent,
    /// This controller has not been listening long enough to tell.
    NotYetHeard,
}

impl Fleet {
    /// Takes a host in: at the start from the database, and when one joins.
    pub fn admit(&self, host: HostId, endpoint: &str) {
        self.hosts().entry(host).or_default().endpoint = Some(endpoint.to_owned());
    }

    /// Takes in all hosts of the database; called before the first agent is listened to.
    pub async fn admit_all(&self, database: &Database) -> Result<(), DbErr> {
        for row in super::host::all(database.reader()).await? {
            self.admit(row.host_id(), &row.endpoint);
        }
        Ok(())
    }

    /// These are all hosts there are: what joined or went by another controller is known here too, and
    /// when it was last heard by any.
    pub fn meet(&self, rows: &[super::host::row::Model]) {
        let mut hosts = self.hosts();
        hosts.retain(|id, _| rows.iter().any(|row| row.host_id() == *id));
        for row in rows {
            let live = hosts.entry(row.host_id()).or_default();
            let heard_at_us = Some(row.heard_at_us);
            // What was heard here since is newer than the row.
            if live.endpoint.is_none() || heard_at_us >= live.heard_at_us {
                live.endpoint = Some(row.endpoint.clone());
            }
            live.heard_at_us = Ord::max(live.heard_at_us, heard_at_us);
        }
    }

    /// From now on it is this controller that agents tell. What they said before, another has heard the
    /// rest of: nothing of it is gone by before they have said everything anew.
    pub fn begin(&self, now_us: i64) {
        self.since_us.store(now_us, Ordering::Relaxed);
        for live in self.hosts().values_mut() {
            live.pushes = None;
            live.machines.clear();
            live.since.clear();
        }
    }

    /// The host was declared to be off, and gives no answer: what it has said of its machines counts for nothing. It
    /// says all anew if it is not.
    pub fn forget_machines(&self, host: HostId) {
        if let Some(live) = self.hosts().get_mut(&host) {
            live.pushes = None;
            live.machines.clear();
            live.since.clear();
        }
    }

    /// For tests: the host was heard at that time last.
    #[cfg(test)]
    pub fn last_heard(&self, host: HostId, at_us: i64) {
        if let Some(live) = self.hosts().get_mut(&host) {
            live.heard_at_us = Some(at_us);
        }
    }

    /// Forgets a host that was removed.
    pub fn dismiss(&self, host: HostId) {
        self.hosts().remove(&host);
    }

    pub fn endpoint(&self, host: HostId) -> Option<String> {
        self.hosts().get(&host)?.endpoint.clone()
    }

    /// All hosts that are admitted.
    pub fn ids(&self) -> Vec<HostId> {
        self.hosts().keys().copied().collect()
    }

    /// True if a full report is wanted.
    pub fn heartbeat(&self, host: HostId, heartbeat: &Heartbeat, now_us: i64) -> bool {
        let mut hosts = self.hosts();
        let live = hosts.entry(host).or_default();
        live.heard_at_us = Some(now_us);
        live.endpoint = Some(heartbeat.endpoint.clone());
        live.report = Some(heartbeat.host.clone());
        live.pushes
            != Some(Pushes {
                instance: heartbeat.agent_instance,
                sequence: heartbeat.sequence,
            })
    }

    /// Takes what changed. A push that was taken before changes nothing.
    pub fn changes(&self, host: HostId, changes: &Changes, now_us: i64) -> Result<(), Gap> {
        let mut hosts = self.hosts();
        let live = hosts.entry(host).or_default();
        live.heard_at_us = Some(now_us);
        let pushes = live.pushes.as_mut().ok_or(Gap)?;
        if pushes.instance != changes.agent_instance {
            return Err(Gap);
        }
        if changes.sequence <= pushes.sequence {
            return Ok(());
        }
        if changes.sequence != pushes.sequence + 1 {
            return Err(Gap);
        }
        pushes.sequence = changes.sequence;
        for report in &changes.machines {
            live.take(report, Order::Sequenced, now_us);
        }
        Ok(())
    }

    /// Takes a full report: it replaces all that was known of the host's machines. Answers the
    /// machines that were known before and are not in it.
    pub fn full_report(&self, host: HostId, full: &FullReport, now_us: i64) -> Vec<ServerId> {
        let mut hosts = self.hosts();
        let live = hosts.entry(host).or_default();
        live.heard_at_us = Some(now_us);
        let pushes = Pushes {
            instance: full.agent_instance,
            sequence: full.sequence,
        };
        if let Some(known) = live.pushes
            && known.instance == pushes.instance
            && known.sequence > pushes.sequence
        {
            // Overtaken on its way by a later push.
            return Vec::new();
        }
        live.pushes = Some(pushes);
        let before: BTreeSet<ServerId> = live.machines.keys().copied().collect();
        for report in &full.machines {
            live.hear(report, now_us);
        }
        live.machines = full
            .machines
            .iter()
            .map(|report| (report.id, report.clone()))
            .collect();
        let Live {
            machines, since, ..
        } = live;
        since.retain(|id, _| machines.contains_key(id));
        before
            .into_iter()
            .filter(|id| !live.machines.contains_key(id))
            .collect()
    }

    /// Takes the answer of a call, which is not in sequence with the pushes.
    pub fn answered(&self, host: HostId, report: &MachineReport, now_us: i64) {
        let mut hosts = self.hosts();
        let Some(live) = hosts.get_mut(&host) else {
            return;
        };
        live.heard_at_us = Some(now_us);
        live.take(report, Order::Unknown, now_us);
    }

    /// What `host` last said of `server`.
    pub fn machine(&self, host: HostId, server: ServerId) -> Option<MachineReport> {
        self.hosts().get(&host)?.machines.get(&server).cloned()
    }

    /// When we first heard of `host` what it last said of `server`, by the clock of who told us.
    pub fn said_at_us(&self, host: HostId, server: ServerId) -> Option<i64> {
        self.hosts().get(&host)?.since.get(&server).copied()
    }

    /// Every host that speaks of `server`.
    pub fn holders(&self, server: ServerId) -> Vec<(HostId, MachineReport)> {
        let hosts = self.hosts();
        let held = hosts
            .iter()
            .filter_map(|(id, live)| Some((*id, live.machines.get(&server)?)));
        held.map(|(id, report)| (id, report.clone())).collect()
    }

    /// All machines of a host; `None` until its agent has sent a full report to this controller.
    pub fn machines(&self, host: HostId) -> Option<Vec<MachineReport>> {
        let hosts = self.hosts();
        let live = hosts.get(&host)?;
        live.pushes?;
        Some(live.machines.values().cloned().collect())
    }

    pub fn host_report(&self, host: HostId) -> Option<HostReport> {
        self.hosts().get(&host)?.report.clone()
    }

    pub fn heard_at_us(&self, host: HostId) -> Option<i64> {
        self.hosts().get(&host)?.heard_at_us
    }

    /// Whether the host is there. `persisted_us` is when any controller last heard it, by the
    /// database; `since_us` is when this controller began to listen. Only who has listened for long
    /// enough and hears others may call one silent.
    pub fn presence(
        &self,
        host: HostId,
        persisted_us: i64,
        since_us: i64,
        now_us: i64,
    ) -> Presence {
        let hosts = self.hosts();
        let recent = |heard: i64| now_us.saturating_sub(heard) < SILENT_US;
        let own = hosts.get(&host).and_then(|live| live.heard_at_us);
        if own.is_some_and(recent) || recent(persisted_us) {
            return Presence::Up;
        }
        let others_heard = hosts.len() <= 1
            || hosts
                .iter()
                .any(|(id, live)| *id != host && live.heard_at_us.is_some_and(recent));
        let since_us = since_us.max(self.since_us.load(Ordering::Relaxed));
        if recent(since_us) || !others_heard {
            Presence::NotYetHeard
        } else {
            Presence::Silent
        }
    }

    fn hosts(&self) -> MutexGuard<'_, BTreeMap<HostId, Live>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Order {
    /// After all that was taken before.
    Sequenced,
    Unknown,
}

impl Live {
    fn hear(&mut self, report: &MachineReport, now_us: i64) {
        if self.machines.get(&report.id) != Some(report) {
            self.since.insert(report.id, now_us);
        }
    }

    fn take(&mut self, report: &MachineReport, order: Order, now_us: i64) {
        if let Some(known) = self.machines.get(&report.id) {
            let age = |report: &MachineReport| (report.generation, report.revision);
            let stale = match order {
                Order::Sequenced => age(report) < age(known),
                Order::Unknown => {
                    let rank = |report: &MachineReport| {
                        (age(report), report.changed_at_us, report.settled)
                    };
                    rank(report) < rank(known)
                }
            };
            if stale {
                return;
            }
        }
        self.hear(report, now_us);
        self.machines.insert(report.id, report.clone());
    }
}

#[cfg(test)]
mod tests {
    use fractus_agent_api::machine::{Generation, Observed, Revision};

    use super::*;

    const HOST: HostId = HostId(Uuid::from_u128(1));
    const OTHER: HostId = HostId(Uuid::from_u128(2));
    const SERVER: ServerId = ServerId(Uuid::from_u128(9));

    fn report(revision: u64, settled: bool, changed_at_us: i64) -> MachineReport {
        MachineReport {
            id: SERVER,
            generation: Generation(1),
            revision: Revision(revision),
            settled,
            observed: Observed::Running,
            soft_reboots: 0,
            hard_reboots: 0,
            rebuilds: 0,
            starts: 1,
            changed_at_us,
            guest: Default::default(),
            disks: vec![],
            nics: vec![],
            size: None,
            shape: None,
            migration: None,
            parks: None,
            copy: None,
            waits: false,
        }
    }

    fn changes(instance: u128, sequence: u64, report: MachineReport) -> Changes {
        Changes {
            version: 1,
            agent_instance: Uuid::from_u128(instance),
            sequence,
            machines: vec![report],
        }
    }

    fn full(instance: u128, sequence: u64, machines: Vec<MachineReport>) -> FullReport {
        FullReport {
            version: 1,
            agent_instance: Uuid::from_u128(instance),
            sequence,
            machines,
        }
    }

    #[test]
    fn a_gap_or_another_life_of_the_agent_needs_a_full_report() {
        let fleet = Fleet::default();
        assert_eq!(
            fleet.changes(HOST, &changes(7, 1, report(1, false, 1)), 1),
            Err(Gap)
        );
        fleet.full_report(HOST, &full(7, 1, vec![]), 1);
        assert_eq!(
            fleet.changes(HOST, &changes(7, 2, report(1, false, 1)), 1),
            Ok(())
        );
        assert_eq!(
            fleet.changes(HOST, &changes(7, 4, report(2, false, 1)), 1),
            Err(Gap)
        );
        assert_eq!(
            fleet.changes(HOST, &changes(8, 3, report(2, false, 1)), 1),
            Err(Gap)
        );
        assert_eq!(fleet.machine(HOST, SERVER).unwrap().revision, Revision(1));
    }

    #[test]
    fn doubled_and_late_messages_change_nothing() {
        let fleet = Fleet::default();
        fleet.full_report(HOST, &full(7, 0, vec![]), 1);
        let (first, second) = (
            changes(7, 1, report(1, false, 1)),
            changes(7, 2, report(2, true, 5)),
        );
        fleet.changes(HOST, &first, 1).unwrap();
        fleet.changes(HOST, &second, 1).unwrap();
        fleet.changes(HOST, &first, 1).unwrap();
        fleet.full_report(HOST, &full(7, 1, vec![report(1, false, 1)]), 1);
        // An answer to a call, overtaken by the push that told of its completion.
        fleet.answered(HOST, &report(2, false, 4), 1);
        let known = fleet.machine(HOST, SERVER).unwrap();
        assert_eq!((known.revision, known.settled), (Revision(2), true));
    }

    #[test]
    fn what_is_said_again_was_said_when_it_was_said_first() {
        let fleet = Fleet::default();
        let said_at = || fleet.said_at_us(HOST, SERVER);
        fleet.full_report(HOST, &full(7, 0, vec![report(1, false, 1)]), 10);
        assert_eq!(said_at(), Some(10));
        let (again, other) = (report(1, false, 1), report(1, true, 2));
        fleet.changes(HOST, &changes(7, 1, again), 20).unwrap();
        assert_eq!(said_at(), Some(10));
        fleet
            .changes(HOST, &changes(7, 2, other.clone()), 30)
            .unwrap();
        fleet.answered(HOST, &other, 40);
        fleet.full_report(HOST, &full(7, 2, vec![other]), 50);
        assert_eq!(said_at(), Some(30));
        fleet.full_report(HOST, &full(7, 3, vec![]), 60);
        assert_eq!(said_at(), None);
    }

    fn row(host: HostId, endpoint: &str, heard_at_us: i64) -> super::super::host::row::Model {
        super::super::host::row::Model {
            id: host.to_string(),
            hostname: "h".to_owned(),
            endpoint: endpoint.to_owned(),
            report: "{}".to_owned(),
            disabled: false,
            disabled_reason: None,
            forced_down: false,
            vcpus_limit: 0,
            memory_mib_limit: 0,
            disk_gib_limit: 0,
            vcpus_used: 0,
            memory_mib_used: 0,
            disk_gib_used: 0,
            joined_at_us: 0,
            heard_at_us,
            removed_at_us: None,
        }
    }

    #[test]
    fn what_another_controller_has_done_with_hosts_is_known_by_the_table() {
        let fleet = Fleet::default();
        fleet.admit(HOST, "https://old:1");
        fleet.full_report(HOST, &full(7, 0, vec![report(1, true, 1)]), 50);
        fleet.meet(&[
            row(HOST, "https://new:1", 40),
            row(OTHER, "https://o:1", 60),
        ]);
        let known = fleet.endpoint(HOST);
        assert_eq!(known.as_deref(), Some("https://old:1"), "heard here since");
        assert_eq!(fleet.endpoint(OTHER).as_deref(), Some("https://o:1"));
        assert_eq!(fleet.heard_at_us(OTHER), Some(60));
        assert_eq!(fleet.machines(OTHER), None);
        fleet.meet(&[row(HOST, "https://new:1", 70)]);
        assert_eq!(fleet.endpoint(HOST).as_deref(), Some("https://new:1"));
        assert_eq!(fleet.ids(), [HOST], "the other was removed");
        assert!(fleet.machine(HOST, SERVER).is_some());
    }

    #[test]
    fn a_new_leader_goes_by_nothing_that_was_said_to_it_in_an_earlier_term() {
        let fleet = Fleet::default();
        fleet.full_report(HOST, &full(7, 3, vec![report(1, true, 1)]), 1);
        fleet.full_report(OTHER, &full(8, 0, vec![]), 1);
        let now = SILENT_US * 10;
        fleet.begin(now);
        assert_eq!(
            (fleet.machines(HOST), fleet.machine(HOST, SERVER)),
            (None, None)
        );
        let next = changes(7, 4, report(2, true, 2));
        assert_eq!(fleet.changes(HOST, &next, now), Err(Gap));
        // Nor does it call a host silent that it has not been told of.
        let soon = now + SILENT_US - 1;
        assert_eq!(fleet.presence(OTHER, 0, 0, soon), Presence::NotYetHeard);
    }

    #[test]
    fn a_host_is_called_silent_only_by_who_listened_long_enough_and_hears_others() {
        let fleet = Fleet::default();
        fleet.admit(HOST, "https://h:1");
        fleet.admit(OTHER, "https://o:1");
        let later = SILENT_US * 10;
        assert_eq!(
            fleet.presence(HOST, 0, later - 1, later),
            Presence::NotYetHeard
        );
        assert_eq!(
            fleet.presence(HOST, 0, 0, later),
            Presence::NotYetHeard,
            "nobody is heard"
        );
        fleet.full_report(OTHER, &full(7, 0, vec![]), later);
        assert_eq!(fleet.presence(HOST, 0, 0, later), Presence::Silent);
        assert_eq!(
            fleet.presence(HOST, later - 1, 0, later),
            Presence::Up,
            "another heard it"
        );
        assert_eq!(fleet.presence(OTHER, 0, 0, later), Presence::Up);
    }
}
