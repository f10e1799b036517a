//! How many guests go at once: of live migrations that are under way each host has so many at most, from it and to it
//! (`fractus serve --migrations-per-host`). The others wait as *queued*.
//!
//! A place at both hosts is taken by the transaction that chooses the target, and is given back by the one that ends
//! the operation; one that is parked has none. What has a place, and who waits, are the operations themselves, so
//! nothing has to be put right after a restart.
//!
//! Turns are taken in the order in which migrations were asked for. Each that waits is thought to take the places
//! that it could take now, or, where it can take none, those that it waits for, and whoever comes after it has what
//! is left. So nobody is passed over by whom it would then wait for, and nobody waits for a host that those before
//! it have no use for. The first of all waits for guests only that are on their way.

use std::collections::{BTreeMap, BTreeSet};

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::ServerId;
use sea_orm::ConnectionTrait;
use serde::Deserialize;

use super::{KINDS, cpu_of};
use crate::compute::ops::{change, machine_id};
use crate::operation::{self, Direction, Operation, OperationId, StepError};
use crate::reconcile::Machines;
use crate::reconcile::machine::{self, Machine};
use crate::scheduler::{self, HostPresence, HostView, Request};

/// Whether a migration may go now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Turn {
    /// To any host but these, which have as many as they may have. If none can take it, it need not wait for that.
    Now(BTreeSet<HostId>),
    Later,
}

/// What is asked of the scheduler for a guest that leaves its host.
pub(super) fn request(known: &Machine, source: HostId, host: Option<HostId>) -> Request {
    Request {
        server: known.server,
        amounts: change::amounts(&known.wanted.spec),
        host,
        excluded: BTreeSet::new(),
        source: Some(source),
        cpu: cpu_of(&known.wanted.spec),
    }
}

/// Of the operation's state, what counts here.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Way {
    source: HostId,
    /// An administrator's choice.
    host: Option<HostId>,
    /// None: it waits, or has just been asked for.
    #[serde(default)]
    target: Option<HostId>,
}

/// One that is open.
#[derive(Debug, Clone, Copy)]
struct Open {
    id: OperationId,
    server: ServerId,
    way: Way,
}

/// Places that are taken.
#[derive(Debug, Default)]
struct Places {
    of_each: usize,
    taken: BTreeMap<HostId, usize>,
}

impl Places {
    fn take(&mut self, host: HostId) {
        *self.taken.entry(host).or_default() += 1;
    }

    fn is_full(&self, host: HostId) -> bool {
        let taken = self.taken.get(&host).copied();
        taken.unwrap_or_default() >= self.of_each
    }

    fn full(&self) -> BTreeSet<HostId> {
        let all = self.taken.keys().copied();
        all.filter(|host| self.is_full(*host)).collect()
    }

    /// The next that waits: what becomes of it, with which it has what it could take, or what it waits for.
    fn next(&mut self, way: &Way, request: Option<&Request>, hosts: &[HostView]) -> Turn {
        let (turn, target) = self.turn(way, request, hosts);
        self.take(way.source);
        if let Some(target) = target {
            self.take(target);
        }
        turn
    }

    /// With the host that it is about, if that is known.
    fn turn(
        &self,
        way: &Way,
        request: Option<&Request>,
        hosts: &[HostView],
    ) -> (Turn, Option<HostId>) {
        if self.is_full(way.source) || way.host.is_some_and(|host| self.is_full(host)) {
            return (Turn::Later, way.host);
        }
        let is_unheard = |host: &HostView| host.presence == HostPresence::NotYetHeard;
        let unheard = |id: HostId| hosts.iter().any(|host| host.id == id && is_unheard(host));
        if unheard(way.source) || way.host.is_some_and(unheard) {
            return (Turn::Later, way.host);
        }
        let Some(request) = request.filter(|_| way.host.is_none()) else {
            return (Turn::Now(BTreeSet::new()), way.host);
        };
        let mut without = request.clone();
        without.excluded = self.full();
        match scheduler::place(&without, hosts) {
            Ok(target) => (Turn::Now(without.excluded), Some(target)),
            // One that is full could.
            Err(_) if scheduler::place(request, hosts).is_ok() => (Turn::Later, None),
            // A controller that has just begun has heard of none: it hears of them, or that they are silent, in a minute.
            Err(why) if why.wait_for_a_word() => (Turn::Later, None),
            Err(_) => (Turn::Now(BTreeSet::new()), None),
        }
    }
}

/// Whether the operation may take its places.
pub(super) async fn turn(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    operation: &Operation,
) -> Result<Turn, StepError> {
    let mut found = Turn::Later;
    let until = |open: &Open, turn: Turn| {
        let is_its = open.id == operation.id;
        if is_its {
            found = turn;
        }
        is_its
    };
    look(machines, connection, until).await?;
    Ok(found)
}

/// Servers whose guests may go now, and wait.
pub(super) async fn next(
    machines: &Machines,
    connection: &impl ConnectionTrait,
) -> Result<Vec<String>, StepError> {
    let mut next = Vec::new();
    let until = |open: &Open, turn: Turn| {
        if turn != Turn::Later {
            next.push(open.server.to_string());
        }
        false
    };
    look(machines, connection, until).await?;
    Ok(next)
}

/// Shows those that wait, in their order and each with its turn, until `until` has seen enough.
async fn look(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    mut until: impl FnMut(&Open, Turn) -> bool,
) -> Result<(), StepError> {
    let (mut places, waiting) = open(machines, connection).await?;
    let hosts = match waiting.is_empty() {
        true => Vec::new(),
        false => machines.hosts(connection).await?,
    };
    for open in waiting {
        let way = &open.way;
        // Only of those that need the scheduler: a host has few at once that do.
        let known = match way.host.is_none() && !places.is_full(way.source) {
            true => machine::find(connection, open.server).await?,
            false => None,
        };
        let request = known.map(|known| request(&known, way.source, None));
        let turn = places.next(way, request.as_ref(), &hosts);
        if until(&open, turn) {
            break;
        }
    }
    Ok(())
}

/// What is taken, and who waits.
async fn open(
    machines: &Machines,
    connection: &impl ConnectionTrait,
) -> Result<(Places, Vec<Open>), StepError> {
    let mut places = Places {
        of_each: machines.migrations_per_host(),
        ..Places::default()
    };
    let mut waiting = Vec::new();
    for operation in operation::under_way(connection, &KINDS).await? {
        let way = match operation.state::<Way>() {
            Ok(way) => way,
            // Of another release, perhaps: it is its own to fail, and nobody else's.
            Err(error) => {
                tracing::warn!(operation = %operation.id, %error, "a migration that nobody can read has no turn");
                continue;
            }
        };
        match way.target {
            Some(target) => {
                places.take(way.source);
                places.take(target);
            }
            // One that is taken back before it had a place needs none.
            None if operation.direction == Direction::Undo => {}
            None => waiting.push(Open {
                id: operation.id,
                server: machine_id(&operation.subject)?,
                way,
            }),
        }
    }
    Ok((places, waiting))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::scheduler::testing;
    use crate::scheduler::{Amounts, CpuNeed};

    fn host(n: u128) -> HostId {
        HostId(Uuid::from_u128(n))
    }

    /// Of one place at each host, with these taken.
    fn places(taken: &[u128]) -> Places {
        let mut places = Places {
            of_each: 1,
            ..Places::default()
        };
        for n in taken {
            places.take(host(*n));
        }
        places
    }

    /// The next one goes from this host, to any, or to the one that was asked for; there are four.
    fn next(places: &mut Places, source: u128, asked: Option<u128>) -> Turn {
        next_of(places, source, asked, 100)
    }

    fn next_of(places: &mut Places, source: u128, asked: Option<u128>, memory_mib: i64) -> Turn {
        let way = Way {
            source: host(source),
            host: asked.map(host),
            target: None,
        };
        let request = Request {
            server: ServerId(Uuid::from_u128(9)),
            amounts: Amounts {
                vcpus: 1,
                memory_mib,
                disk_gib: 1,
            },
            host: None,
            excluded: BTreeSet::new(),
            source: Some(way.source),
            cpu: CpuNeed::Nothing,
        };
        let hosts: Vec<HostView> = (1..=4).map(testing::host).collect();
        places.next(&way, Some(&request), &hosts)
    }

    /// A controller that has just begun has heard of nobody, and who waits is not to fail for that.
    #[test]
    fn who_waits_waits_for_hosts_that_have_not_been_heard_yet() {
        let request = Request {
            server: ServerId(Uuid::from_u128(9)),
            amounts: Amounts {
                vcpus: 1,
                memory_mib: 100,
                disk_gib: 1,
            },
            host: None,
            excluded: BTreeSet::new(),
            source: Some(host(1)),
            cpu: CpuNeed::Nothing,
        };
        let turn = |unheard: &[u128], silent: &[u128], asked: Option<u128>| {
            let way = Way {
                source: host(1),
                host: asked.map(host),
                target: None,
            };
            let presence = |n: u128| match (unheard.contains(&n), silent.contains(&n)) {
                (true, _) => HostPresence::NotYetHeard,
                (_, true) => HostPresence::Silent,
                _ => HostPresence::Up,
            };
            let hosts: Vec<HostView> = (1..=3)
                .map(|n| HostView {
                    presence: presence(n),
                    ..testing::host(n)
                })
                .collect();
            places(&[]).next(&way, Some(&request), &hosts)
        };
        assert_eq!(turn(&[1, 2, 3], &[], None), Turn::Later);
        assert_eq!(turn(&[2, 3], &[], None), Turn::Later);
        assert_eq!(turn(&[2], &[3], None), Turn::Later);
        assert_eq!(turn(&[2], &[], Some(2)), Turn::Later);
        // One that is there will do; and those that are silent are not waited for.
        assert_eq!(turn(&[2], &[], None), now_but_to(&[]));
        assert_eq!(turn(&[2], &[], Some(3)), now_but_to(&[]));
        assert_eq!(turn(&[], &[2, 3], None), now_but_to(&[]));
    }

    fn now_but_to(full: &[u128]) -> Turn {
        Turn::Now(full.iter().map(|n| host(*n)).collect())
    }

    #[test]
    fn a_guest_goes_where_there_is_a_place_for_it_or_waits() {
        assert_eq!(next(&mut places(&[]), 1, None), now_but_to(&[]));
        assert_eq!(next(&mut places(&[]), 1, Some(2)), now_but_to(&[]));
        // Others take it.
        assert_eq!(next(&mut places(&[2, 3]), 1, None), now_but_to(&[2, 3]));
        assert_eq!(next(&mut places(&[2, 3, 4]), 1, None), Turn::Later);
        assert_eq!(next(&mut places(&[1]), 1, None), Turn::Later);
        assert_eq!(next(&mut places(&[1]), 1, Some(2)), Turn::Later);
        assert_eq!(next(&mut places(&[2]), 1, Some(2)), Turn::Later);
        // As many as a host may have, and no fewer.
        let mut two = places(&[1, 2, 3, 4]);
        two.of_each = 2;
        assert_eq!(next(&mut two, 1, Some(2)), now_but_to(&[]));
        assert_eq!(next(&mut two, 1, Some(3)), Turn::Later);
    }

    #[test]
    fn what_no_host_could_take_waits_for_none() {
        let mut places = places(&[2, 3, 4]);
        assert_eq!(next_of(&mut places, 1, None, 5000), now_but_to(&[]));
    }

    #[test]
    fn nobody_is_passed_over_by_whom_he_would_then_wait_for() {
        // The first waits for the host that it was asked to go to, and keeps its own source for that.
        let mut all = places(&[2]);
        assert_eq!(next(&mut all, 1, Some(2)), Turn::Later);
        assert_eq!(next(&mut all, 1, Some(3)), Turn::Later);
        assert_eq!(next(&mut all, 2, Some(3)), Turn::Later);
        // What is free by now is for whoever was first, wherever that one comes from.
        let mut all = places(&[]);
        assert_eq!(next(&mut all, 1, Some(2)), now_but_to(&[]));
        assert_eq!(next(&mut all, 3, Some(2)), Turn::Later);
        assert_eq!(next(&mut all, 3, Some(4)), Turn::Later);
        // One that could go anywhere has one host, and leaves the other.
        let mut all = places(&[3]);
        assert_eq!(next(&mut all, 1, None), now_but_to(&[3]));
        let free = [2, 4].into_iter().filter(|n| !all.is_full(host(*n)));
        assert_eq!(free.count(), 1);
    }

    #[test]
    fn nobody_waits_for_a_host_that_those_before_have_no_use_for() {
        let mut all = places(&[1]);
        // Its source has no place: its target is another's for now.
        assert_eq!(next(&mut all, 1, None), Turn::Later);
        assert_eq!(next(&mut all, 2, Some(3)), now_but_to(&[]));
        // Of what it was asked to go to it keeps the place.
        let mut all = places(&[1]);
        assert_eq!(next(&mut all, 1, Some(3)), Turn::Later);
        assert_eq!(next(&mut all, 2, Some(3)), Turn::Later);
        assert_eq!(next(&mut all, 4, None), Turn::Later, "2 has one, and 3");
    }
}
