//! Guests that go from host to host while everything breaks.
//!
//! A guest has a soul: where and when it was started, and for how long it has run. It goes on wherever it goes, and
//! never back; another one begins in its place only if a process that had it was killed. Of two hosts at most one
//! runs it, at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fractus_agent_api::machine::{ServerId, StopReason};
use rand::RngExt;
use rand::seq::IndexedRandom;
use sea_orm::EntityTrait;
use uuid::Uuid;

use super::network::Mail;
use super::world::{Plan, World};
use super::{requests, seeds};
use crate::agents::simulated::stream::{Event, Soul};
use crate::compute::model::state::ServerState;
use crate::compute::store::server;
use crate::random::Random as _;
use crate::reconcile::MIGRATIONS_PER_HOST;
use crate::reconcile::migration::row;

/// What of live migrations is in a storm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migrates {
    Never,
    /// Among all else.
    Too,
    /// With nothing else that would begin a guest anew.
    Only,
}

impl Migrates {
    /// How much of a storm it is.
    pub fn share(self) -> f64 {
        match self {
            Self::Never => 0.0,
            Self::Too => 0.75,
            Self::Only => 0.8,
        }
    }
}

/// What was seen of guests.
#[derive(Debug, Default)]
pub struct Guests {
    last: BTreeMap<ServerId, Soul>,
    /// Processes of them that had, or may have had, the guest were killed.
    pub killed: BTreeSet<ServerId>,
    /// How often one was seen that waited for a place.
    pub waited: u64,
}

impl World {
    /// Always: guests go on.
    pub fn check_guests(&mut self) {
        if self.migrates == Migrates::Never {
            return;
        }
        let seed = self.seed;
        let mut at = BTreeMap::new();
        for host in &self.hosts {
            host.tick();
            self.check_cpus(host);
            for server in host.processes() {
                at.insert(server, (host.id(), host.soul(server).unwrap()));
            }
        }
        for (server, (host, soul)) in at {
            let last = self.guests.last.insert(server, soul);
            let Some(last) = last else {
                continue;
            };
            if last.born == soul.born {
                assert!(
                    soul.ticks >= last.ticks,
                    "seed {seed}: an older {server} runs on {host}"
                );
                continue;
            }
            assert!(
                self.migrates == Migrates::Too || self.guests.killed.contains(&server),
                "seed {seed}: {server} was lost: {last:?}, and now {soul:?} on {host}"
            );
            self.guests.killed.remove(&server);
        }
    }

    /// At rest: none is under way, and each says what became of it.
    pub async fn check_migrations(&self) {
        let seed = self.seed;
        let reader = self.database().reader();
        for migration in row::Entity::find().all(reader).await.unwrap() {
            let waits = migration.status == "finished";
            assert_eq!(
                migration.ended_at_us.is_none(),
                waits,
                "seed {seed}: {migration:?}"
            );
            let why = migration.reason.is_some();
            let ends_well = ["completed", "done", "finished", "confirmed", "reverted"];
            assert_eq!(
                why,
                !ends_well.contains(&migration.status.as_str()),
                "seed {seed}: {migration:?}"
            );
        }
        for id in &self.servers {
            let row = server::find(reader, &id.to_string()).await.unwrap();
            let silent = row.is_some_and(|row| {
                row.state() == ServerState::Error && row.fault_message.is_none()
            });
            assert!(!silent, "seed {seed}: {id} is ERROR without a reason");
        }
        for host in &self.hosts {
            for server in host.all_processes() {
                assert!(
                    host.processes().contains(&server),
                    "seed {seed}: {server} stands still on {}",
                    host.id()
                );
            }
        }
    }

    /// Something of live migrations happens.
    pub async fn migration_event(&mut self) {
        match self.random.random_range(0..40) {
            0..8 => self.ask_for_migration().await,
            8..20 => self.stream_event(),
            20..37 => self.carry_on().await,
            37 => self.change_a_migration().await,
            38 => {
                // A process that ends, whatever it is there for.
                let host = self.any_host();
                if let Some(id) = host.all_processes().choose(&mut self.random).copied() {
                    self.guests.killed.insert(id);
                    let detail = "killed".to_owned();
                    host.end_process(id, StopReason::VmmFault { detail });
                    self.note(format!("process of {id} on {} is killed", host.id()));
                }
            }
            _ => {
                // The agent ends and comes back at once.
                let host = self.any_host();
                host.kill_agent();
                host.start_agent(self.ids.uuid());
                self.note(format!("agent {} restarts", host.id()));
            }
        }
    }

    /// One server's hosts, messages and operation have a turn each, so that migrations get somewhere.
    pub(super) async fn carry_on(&mut self) {
        let subjects = self.open_subjects().await;
        let Some(subject) = subjects.choose(&mut self.random).cloned() else {
            return;
        };
        let server = ServerId(subject.parse().unwrap());
        for host in self.hosts.clone() {
            if self.network.is_frozen(host.id()) {
                continue;
            }
            host.step(server);
            if let Some(changes) = host.push() {
                self.network.post(host.id(), Mail::Changes(changes));
            }
        }
        for _ in 0..self.random.random_range(0..4) {
            self.deliver().await;
        }
        if let Some(engine) = self.controller.as_ref().map(|it| Arc::clone(&it.engine)) {
            for _ in 0..self.random.random_range(1..4) {
                let advance = engine.advance(&subject).await;
                self.note(format!("advance {subject}: {advance:?}"));
            }
        }
    }

    async fn ask_for_migration(&mut self) {
        let Some(app) = self.controller.as_ref().map(|it| it.app.clone()) else {
            return;
        };
        let Some(id) = self.servers.choose(&mut self.random).copied() else {
            return;
        };
        let chosen = self.random.random_bool(0.3);
        let host = chosen.then(|| self.any_host().id());
        let follows = self.random.random_bool(0.5);
        let outcome = requests::migrate(&app, id, host, follows).await;
        self.note(format!("migrate {id} ({follows}): {:?}", outcome.ok()));
    }

    fn stream_event(&mut self) {
        let debts = self.network.hosts.debts();
        if let Some(server) = debts.choose(&mut self.random).copied()
            && self.random.random_bool(0.3)
        {
            let paid = self.network.hosts.pay(server);
            self.note(format!("what {server} lacks: {paid}"));
            return;
        }
        let streams = self.network.hosts.streams();
        let Some(server) = streams.choose(&mut self.random).copied() else {
            return;
        };
        let event = match self.random.random_range(0..10) {
            0..2 => Event::Round,
            2..4 => Event::End,
            4 | 5 => Event::Part,
            6 => Event::Cut,
            7 => Event::AnswerLost,
            8 => Event::PartLost,
            _ => Event::EndLost,
        };
        let streamed = self.network.hosts.stream(server, event);
        self.note(format!("stream of {server}: {event:?} {streamed}"));
    }

    async fn change_a_migration(&mut self) {
        let Some(app) = self.controller.as_ref().map(|it| it.app.clone()) else {
            return;
        };
        let Some(id) = self.servers.choose(&mut self.random).copied() else {
            return;
        };
        let outcome = match self.random.random_bool(0.5) {
            true => requests::abort(&app, id).await,
            false => requests::force_complete(&app, id).await,
        };
        self.note(format!("abort or force {id}: {:?}", outcome.ok()));
    }
}

/// Storms of these seeds, and more if there are to be ([`seeds`]).
async fn storms(seeds: std::ops::Range<u64>, migrates: Migrates) {
    storms_of(seeds, migrates, 3, MIGRATIONS_PER_HOST).await;
}

/// The same of so many servers, of which so few leave or come to a host at once. Answers how often one waited.
async fn storms_of(
    seeds: std::ops::Range<u64>,
    migrates: Migrates,
    servers: usize,
    at_once: u16,
) -> u64 {
    let seeds = seeds::of(seeds);
    let mut ended: BTreeMap<String, u64> = BTreeMap::new();
    let mut waited = 0;
    let count = seeds.len() as u64;
    let least = count / 2;
    for seed in seeds {
        // Among all else that is asked for, fewer of them arrive.
        let events = match migrates {
            Migrates::Too => 600,
            Migrates::Only | Migrates::Never => 200,
        };
        let plan = Plan {
            hosts: 3,
            servers,
            events,
        };
        let mut world = World::new(seed, plan).await;
        if at_once != MIGRATIONS_PER_HOST {
            world.migrations_per_host = at_once;
            world.start_controller().await;
            world.everybody_reports().await;
        }
        for n in 0..plan.servers {
            let id = Uuid::from_u128(n as u128 + 1);
            world.servers.push(id);
            requests::create(&world.app(), id).await.unwrap();
        }
        world.heal().await;
        world.migrates = migrates;
        for _ in 0..2 {
            world.run().await;
            world.heal().await;
            world.check_rest().await;
        }
        waited += world.guests.waited;
        let all = row::Entity::find().all(world.database().reader()).await;
        for migration in all.unwrap() {
            *ended.entry(migration.status).or_default() += 1;
        }
    }
    eprintln!("{ended:?}");
    for status in ["completed", "failed"] {
        assert!(
            ended.get(status).is_some_and(|count| count >= &least),
            "{ended:?} in {count} storms: not enough was tried"
        );
    }
    waited
}

#[tokio::test]
async fn no_storm_of_the_first_fifty_loses_or_doubles_a_guest() {
    storms(1000..1050, Migrates::Only).await;
}

#[tokio::test]
async fn no_storm_of_the_second_fifty_loses_or_doubles_a_guest() {
    storms(1050..1100, Migrates::Only).await;
}

#[tokio::test]
async fn no_storm_of_the_third_fifty_loses_or_doubles_a_guest() {
    storms(2000..2050, Migrates::Too).await;
}

#[tokio::test]
async fn no_storm_of_the_fourth_fifty_loses_or_doubles_a_guest() {
    storms(2050..2100, Migrates::Too).await;
}

#[tokio::test]
async fn no_storm_in_which_guests_wait_for_each_other_loses_one_or_lets_it_wait_for_ever() {
    let waited = storms_of(2100..2120, Migrates::Only, 5, 1).await;
    assert!(waited > 50, "{waited}");
}
