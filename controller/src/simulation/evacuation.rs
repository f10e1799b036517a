//! Hosts that lose their power, are declared to be down, and come back at any time; their servers are made anew
//! elsewhere meanwhile. Of all hosts at most one runs a server, at any time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{Observed, ServerId};
use rand::RngExt;
use rand::seq::IndexedRandom;
use sea_orm::EntityTrait;
use uuid::Uuid;

use super::scenarios::{ONE, TWO, active, back_up, fault, holder, restore, state};
use super::world::{Plan, World};
use super::{requests, seeds};
use crate::agents::host;
use crate::agents::simulated::SimulatedHost;
use crate::clock::Clock as _;
use crate::compute::model::state::ServerState;
use crate::compute::ops::change::Change;
use crate::event;
use crate::random::Random as _;
use crate::reconcile::{machine, migration};

impl World {
    /// An operator's word that the host is off, or is not any more.
    pub async fn declare(&self, host: HostId, down: bool) {
        let write = self
            .database()
            .write(move |tx| Box::pin(async move { host::set_forced_down(tx, host, down).await }));
        assert!(write.await.unwrap());
    }

    async fn is_declared(&self, host: HostId) -> bool {
        let row = host::find(self.database().reader(), host).await.unwrap();
        row.is_some_and(|row| row.forced_down)
    }

    /// Something of hosts without power happens. Only those are declared to be down: what an operator does else is his.
    pub async fn evacuation_event(&mut self) {
        match self.random.random_range(0..30) {
            0..3 => {
                let host = self.any_host();
                self.guests.killed.extend(host.all_processes());
                host.power_off();
                self.note(format!("host {} has no power", host.id()));
            }
            3..7 => {
                let host = self.any_host();
                if host.is_off() {
                    self.declare(host.id(), true).await;
                    self.note(format!("host {} is declared to be down", host.id()));
                }
            }
            7..14 => self.ask_for_evacuation().await,
            14..17 => {
                let host = self.any_host();
                if host.is_off() {
                    host.reboot(self.ids.uuid());
                    self.note(format!("host {} has power again", host.id()));
                }
            }
            17..19 => {
                let host = self.any_host();
                if !host.is_off() && self.is_declared(host.id()).await {
                    self.declare(host.id(), false).await;
                    self.note(format!("host {} is declared to be up", host.id()));
                }
            }
            _ => self.carry_on().await,
        }
    }

    async fn ask_for_evacuation(&mut self) {
        let Some(app) = self.controller.as_ref().map(|it| it.app.clone()) else {
            return;
        };
        let Some(id) = self.servers.choose(&mut self.random).copied() else {
            return;
        };
        let chosen = self.random.random_bool(0.3);
        let host = chosen.then(|| self.any_host().id());
        let outcome = requests::evacuate(&app, id, host).await;
        self.note(format!("evacuate {id}: {:?}", outcome.ok()));
    }

    /// Every host has power, and nobody says otherwise. False if it was so before.
    pub async fn power_on(&mut self) -> bool {
        let mut changed = false;
        for host in self.hosts.clone() {
            if host.is_off() {
                host.reboot(self.ids.uuid());
                changed = true;
            }
            if self.is_declared(host.id()).await {
                self.declare(host.id(), false).await;
                changed = true;
            }
        }
        changed
    }
}

impl World {
    /// The host has no power any more, and that was declared, after a while.
    pub(super) async fn loses(&self, host: &SimulatedHost) {
        host.power_off();
        self.clock.advance(Duration::from_secs(30));
        self.declare(host.id(), true).await;
    }
}

/// The server's host has no power any more, and that was declared.
async fn loses_its_host(world: &World, id: Uuid) -> Arc<SimulatedHost> {
    let host = holder(world, id).unwrap();
    world.loses(&host).await;
    host
}

async fn evacuated(world: &mut World, id: Uuid) -> bool {
    let asked = requests::evacuate(&world.app(), id, None).await.unwrap();
    assert!(asked);
    world.settle_down().await;
    let is_there = holder(world, id).is_some();
    if !is_there {
        let events = event::of_subject(world.database().reader(), &id.to_string()).await;
        eprintln!("{:?}", events.unwrap().last());
    }
    is_there
}

#[tokio::test]
async fn a_server_is_made_anew_and_its_old_host_drops_what_it_had_when_it_is_back() {
    let mut world = active(2, &[ONE]).await;
    let old = loses_its_host(&world, ONE).await;
    assert!(evacuated(&mut world, ONE).await);
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    let new = holder(&world, ONE).unwrap();
    assert_ne!(new.id(), old.id());
    assert_eq!(new.disks(ServerId(ONE)), 1);
    assert_eq!(old.remains(), [ServerId(ONE)], "it is off");
    old.reboot(Uuid::from_u128(5));
    // Declared to be down still: it is heard all the same.
    world.settle_down().await;
    assert_eq!(old.remains(), []);
    assert_eq!(old.report(ServerId(ONE)).unwrap().starts, 1);
    world.heal().await;
    world.check_rest().await;
}

#[tokio::test]
async fn after_a_power_cut_of_everything_guests_start_once_a_controller_is_there() {
    let mut world = active(2, &[ONE, TWO]).await;
    let stopped = requests::change(&world.app(), TWO, Change::Stop).await;
    assert!(stopped.unwrap());
    world.heal().await;
    world.controller = None;
    for (n, host) in world.hosts.clone().into_iter().enumerate() {
        host.power_off();
        host.reboot(Uuid::from_u128(40 + n as u128));
        host.settle();
        assert_eq!(host.processes(), []);
    }
    let waits = |host: &Arc<SimulatedHost>| host.report(ServerId(ONE)).is_some_and(|it| it.waits);
    assert_eq!(world.hosts.iter().filter(|host| waits(host)).count(), 1);
    world.start_controller().await;
    world.settle_down().await;
    assert!(holder(&world, ONE).is_some());
    assert!(holder(&world, TWO).is_none());
    world.check_rest().await;
}

/// Whoever sent it knew of the boot before.
#[tokio::test]
async fn what_was_on_its_way_to_a_host_when_it_lost_its_power_starts_nothing() {
    let mut world = active(2, &[ONE]).await;
    let old = holder(&world, ONE).unwrap();
    old.reboot(Uuid::from_u128(6));
    world.heal().await;
    let known = machine::find(world.database().reader(), ServerId(ONE)).await;
    let mut late = known.unwrap().unwrap().put();
    late.boot_id = Some(Uuid::from_u128(6));
    loses_its_host(&world, ONE).await;
    assert!(evacuated(&mut world, ONE).await);
    old.reboot(Uuid::from_u128(7));
    for _ in 0..2 {
        old.take(ServerId(ONE), &late).unwrap();
        old.settle();
        assert_eq!(old.processes(), []);
        late.revision.0 += 1;
    }
    world.heal().await;
    world.check_rest().await;
}

#[tokio::test]
async fn a_host_that_answers_and_runs_the_server_is_not_down() {
    let mut world = active(2, &[ONE]).await;
    let old = holder(&world, ONE).unwrap();
    world.declare(old.id(), true).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    world.settle_down().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    assert_eq!(holder(&world, ONE).unwrap().id(), old.id());
    let events = event::of_subject(world.database().reader(), &ONE.to_string()).await;
    let failed = events
        .unwrap()
        .into_iter()
        .rfind(|event| event.phase == "failed");
    let why = failed.and_then(|event| event.message).unwrap_or_default();
    assert!(
        why.contains("it is not down, whatever was declared"),
        "{why}"
    );
    world.heal().await;
    world.check_rest().await;
}

/// An operator's error: two run it until the old one is heard.
#[tokio::test]
async fn a_host_that_was_never_off_ends_its_guest_on_sight_of_the_higher_generation() {
    let mut world = active(2, &[ONE]).await;
    let old = holder(&world, ONE).unwrap();
    world.network.freeze(old.id());
    world.clock.advance(Duration::from_secs(30));
    world.declare(old.id(), true).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    for _ in 0..5 {
        world.round().await;
    }
    let runs: Vec<_> = world
        .hosts
        .iter()
        .filter(|host| !host.processes().is_empty())
        .collect();
    assert_eq!(runs.len(), 2, "as was declared");
    world.network.thaw(old.id());
    for _ in 0..3 {
        world.round().await;
    }
    assert_eq!((old.processes(), old.remains()), (vec![], vec![]));
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
}

/// While no other has it, what a host has of a server is not done away with, though it is not its own any more.
#[tokio::test]
async fn what_the_old_host_has_stays_until_the_new_one_has_made_its_own() {
    let mut world = active(2, &[ONE]).await;
    let old = loses_its_host(&world, ONE).await;
    let new = world.hosts.iter().find(|host| host.id() != old.id());
    let new = Arc::clone(new.unwrap());
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    // It takes the intent, and fails.
    let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
    while engine.advance(&ONE.to_string()).await == crate::operation::Advance::Advanced {}
    new.fail(ServerId(ONE), "the image could not be had");
    old.reboot(Uuid::from_u128(5));
    world.settle_down().await;
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    assert!(fault(&world, ONE).await.contains("could not be had"));
    assert_eq!(old.remains(), [ServerId(ONE)]);
    assert!(matches!(
        old.report(ServerId(ONE)).unwrap().observed,
        Observed::Starting { .. }
    ));
    // Nor is it made anew there unasked.
    world.loses(&new).await;
    world.declare(old.id(), false).await;
    let asked = requests::evacuate(&world.app(), ONE, Some(old.id())).await;
    assert!(asked.unwrap());
    world.settle_down().await;
    assert_eq!(old.disks(ServerId(ONE)), 1);
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    new.reboot(Uuid::from_u128(6));
    world.declare(new.id(), false).await;
    world.settle_down().await;
    let again = requests::change(&world.app(), ONE, Change::HardReboot).await;
    assert!(again.unwrap());
    world.settle_down().await;
    assert_eq!(holder(&world, ONE).unwrap().id(), new.id());
    assert_eq!(old.remains(), []);
    world.heal().await;
    world.check_rest().await;
}

#[tokio::test]
async fn a_server_that_was_evacuated_after_the_backup_is_not_started_where_it_was() {
    let mut world = active(2, &[ONE]).await;
    let backup = back_up(&world).await;
    let old = loses_its_host(&world, ONE).await;
    assert!(evacuated(&mut world, ONE).await);
    let new = holder(&world, ONE).unwrap();
    restore(&mut world, &backup).await;
    old.reboot(Uuid::from_u128(5));
    // By the restored row it is the old one's, and only that one is heard at first.
    world.network.freeze(new.id());
    for _ in 0..5 {
        world.round().await;
        world.check_processes();
        assert_eq!(old.processes(), []);
    }
    world.network.thaw(new.id());
    for _ in 0..5 {
        world.round().await;
        world.check_processes();
    }
    assert_eq!(holder(&world, ONE).unwrap().id(), new.id());
}

/// It does not run on its old host, so nothing waits there: what the others have is to be heard all the same.
#[tokio::test]
async fn a_server_that_was_off_and_runs_elsewhere_since_the_backup_is_not_taken_for_its_old_hosts()
{
    let mut world = active(2, &[ONE]).await;
    let stopped = requests::change(&world.app(), ONE, Change::Stop).await;
    assert!(stopped.unwrap());
    world.heal().await;
    let backup = back_up(&world).await;
    let known = machine::find(world.database().reader(), ServerId(ONE)).await;
    let old = known.unwrap().unwrap().host.unwrap();
    let old = world.hosts.iter().find(|host| host.id() == old);
    let old = Arc::clone(old.unwrap());
    world.loses(&old).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    world.settle_down().await;
    let started = requests::change(&world.app(), ONE, Change::Start).await;
    assert!(started.unwrap());
    world.settle_down().await;
    let new = holder(&world, ONE).unwrap();
    assert_ne!(new.id(), old.id());
    restore(&mut world, &backup).await;
    old.reboot(Uuid::from_u128(5));
    world.network.freeze(new.id());
    for _ in 0..5 {
        world.round().await;
        let known = machine::find(world.database().reader(), ServerId(ONE)).await;
        assert!(!known.unwrap().unwrap().confirmed);
    }
    world.network.thaw(new.id());
    for _ in 0..5 {
        world.round().await;
        world.check_processes();
    }
    assert_eq!(new.processes(), [ServerId(ONE)]);
    assert_eq!(new.disks(ServerId(ONE)), 1);
}

/// Nobody ever says that the host which died has it.
#[tokio::test]
async fn servers_of_a_host_that_died_with_the_controller_are_evacuated_once_all_others_are_heard() {
    let mut world = active(3, &[ONE]).await;
    let backup = back_up(&world).await;
    let old = holder(&world, ONE).unwrap();
    old.power_off();
    let mut others = world.hosts.iter().filter(|host| host.id() != old.id());
    let other = Arc::clone(others.next().unwrap());
    restore(&mut world, &backup).await;
    world.network.freeze(other.id());
    world.clock.advance(Duration::from_secs(30));
    world.declare(old.id(), true).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    for _ in 0..5 {
        world.round().await;
        assert!(holder(&world, ONE).is_none(), "it may have it");
    }
    world.network.thaw(other.id());
    world.settle_down().await;
    assert!(holder(&world, ONE).is_some());
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.heal().await;
    world.check_rest().await;
}

/// An operator's error, or a host that has come back by itself: its agent is being restarted as it is asked.
#[tokio::test]
async fn a_host_that_was_heard_of_late_is_asked_again_before_anything_is_started_elsewhere() {
    let mut world = active(2, &[ONE]).await;
    let old = holder(&world, ONE).unwrap();
    old.kill_agent();
    world.declare(old.id(), true).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    world.round().await;
    old.start_agent(Uuid::from_u128(5));
    world.settle_down().await;
    assert_eq!(old.processes(), [ServerId(ONE)]);
    assert_eq!(holder(&world, ONE).unwrap().id(), old.id());
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.heal().await;
    world.check_rest().await;
}

/// What it said just before it lost its power is heard after it was fenced: it is off all the same.
#[tokio::test]
async fn a_late_word_of_a_host_without_power_does_not_hold_the_new_one() {
    let mut world = active(2, &[ONE]).await;
    let old = holder(&world, ONE).unwrap();
    let said = old.full_report();
    world.loses(&old).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    let controller = world.controller.as_ref().unwrap();
    let (engine, fleet) = (
        Arc::clone(&controller.engine),
        Arc::clone(&controller.fleet),
    );
    // The fence, and the choice of a host.
    for _ in 0..2 {
        engine.advance(&ONE.to_string()).await;
    }
    fleet.full_report(old.id(), &said, world.clock.now_us());
    fleet.last_heard(old.id(), 0);
    world.settle_down().await;
    let new = holder(&world, ONE).unwrap();
    assert_ne!(new.id(), old.id());
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.heal().await;
    world.check_rest().await;
}

#[tokio::test]
async fn a_target_that_is_lost_too_is_evacuated_in_turn() {
    let mut world = active(3, &[ONE]).await;
    let first = loses_its_host(&world, ONE).await;
    assert!(requests::evacuate(&world.app(), ONE, None).await.unwrap());
    let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
    while engine.advance(&ONE.to_string()).await == crate::operation::Advance::Advanced {}
    let known = machine::find(world.database().reader(), ServerId(ONE)).await;
    let second = known.unwrap().unwrap().host.unwrap();
    let host = world.hosts.iter().find(|host| host.id() == second).unwrap();
    world.loses(host).await;
    assert!(evacuated(&mut world, ONE).await);
    let third = holder(&world, ONE).unwrap().id();
    assert!(![first.id(), second].contains(&third));
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.heal().await;
    world.check_rest().await;
}

/// Storms of these seeds, and more if there are to be ([`seeds`]).
async fn storms(seeds: std::ops::Range<u64>) {
    let seeds = seeds::of(seeds);
    let least = seeds.len() as u64 / 2;
    let mut ended: BTreeMap<String, u64> = BTreeMap::new();
    for seed in seeds {
        let plan = Plan {
            hosts: 4,
            servers: 4,
            events: 250,
        };
        let mut world = World::new(seed, plan).await;
        for n in 0..plan.servers {
            let id = Uuid::from_u128(n as u128 + 1);
            world.servers.push(id);
            requests::create(&world.app(), id).await.unwrap();
        }
        world.heal().await;
        world.evacuates = true;
        for _ in 0..2 {
            world.run().await;
            world.heal().await;
            world.check_rest().await;
        }
        let all = migration::row::Entity::find()
            .all(world.database().reader())
            .await;
        for migration in all.unwrap() {
            *ended.entry(migration.status).or_default() += 1;
        }
    }
    eprintln!("{ended:?}");
    let done = ended.get("done").copied().unwrap_or_default();
    assert!(done >= least, "{ended:?}: not enough was tried");
}

#[tokio::test]
async fn no_storm_of_the_first_fifty_with_hosts_without_power_runs_a_server_twice() {
    storms(3000..3050).await;
}

#[tokio::test]
async fn no_storm_of_the_second_fifty_with_hosts_without_power_runs_a_server_twice() {
    storms(3050..3100).await;
}
