//! How many guests leave a host, or come to it, at once: never more than it may have, and each in its turn.

use std::collections::BTreeMap;
use std::sync::Arc;

use fractus_agent_api::machine::ServerId;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder};
use uuid::Uuid;

use super::migration::Migrates;
use super::requests;
use super::scenarios::{active, state};
use super::world::World;
use crate::agents::simulated::stream::Event;
use crate::compute::model::state::ServerState;
use crate::operation::Advance;
use crate::reconcile::migration::row;

/// Live migrations that have not ended, in their order; those that are parked have none.
async fn under_way(world: &World) -> Vec<row::Model> {
    row::Entity::find()
        .filter(row::Column::Kind.eq("live-migration"))
        .filter(row::Column::EndedAtUs.is_null())
        .filter(row::Column::Status.ne("error"))
        .order_by_asc(row::Column::Id)
        .all(world.database().reader())
        .await
        .unwrap()
}

impl World {
    /// Always: no host has more than it may have.
    pub async fn check_places(&mut self) {
        if self.migrates == Migrates::Never {
            return;
        }
        let all = under_way(self).await;
        let mut taken: BTreeMap<&str, u16> = BTreeMap::new();
        for migration in &all {
            if let Some(target) = &migration.target_id {
                *taken.entry(target).or_default() += 1;
                *taken.entry(&migration.source_id).or_default() += 1;
                assert_ne!(migration.status, "queued");
            }
        }
        for (host, taken) in &taken {
            assert!(
                *taken <= self.migrations_per_host,
                "seed {}: {taken} at once on {host}: {all:?}",
                self.seed
            );
        }
        let queued = all.iter().filter(|migration| migration.status == "queued");
        let full = queued.filter(|migration| {
            let taken = taken.get(migration.source_id.as_str());
            taken == Some(&self.migrations_per_host)
        });
        self.guests.waited += full.count() as u64;
    }
}

fn servers(count: u128) -> Vec<Uuid> {
    (1..=count).map(Uuid::from_u128).collect()
}

/// Two hosts between which all of these guests are to go, two at once.
async fn asked(count: u128) -> (World, Vec<Uuid>) {
    let servers = servers(count);
    let mut world = active(2, &servers).await;
    world.migrates = Migrates::Only;
    let app = world.app();
    for server in &servers {
        let asked = requests::migrate(&app, *server, None, false).await;
        assert!(asked.unwrap());
    }
    (world, servers)
}

/// All do what they can, but for the streams.
async fn quietly(world: &mut World) {
    for _ in 0..6 {
        for host in &world.hosts {
            host.settle();
        }
        world.everybody_reports().await;
        let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
        // In any order: their turns are not by that.
        let mut subjects = world.open_subjects().await;
        subjects.reverse();
        for subject in subjects {
            while engine.advance(&subject).await == Advance::Advanced {}
        }
        let reconciler = Arc::clone(&world.controller.as_ref().unwrap().reconciler);
        reconciler.sweep().await;
        world.check_processes();
        world.check_places().await;
    }
}

/// Whose guests are on their way.
fn streams(world: &World) -> Vec<u128> {
    let streams = world.network.hosts.streams().into_iter();
    let mut streams: Vec<_> = streams.map(|server| server.0.as_u128()).collect();
    streams.sort_unstable();
    streams
}

fn ends(world: &World, server: u128, event: Event) {
    let server = ServerId(Uuid::from_u128(server));
    assert!(world.network.hosts.stream(server, event));
}

#[tokio::test]
async fn guests_take_turns_in_the_order_in_which_they_were_asked_for_also_over_a_restart() {
    let (mut world, servers) = asked(5).await;
    quietly(&mut world).await;
    assert_eq!(streams(&world), [1, 2]);
    let waiting = || async {
        let all = under_way(&world).await.into_iter();
        let queued = all.filter(|row| row.status == "queued" && row.target_id.is_none());
        queued.count()
    };
    assert_eq!(waiting().await, 3);
    // One comes, the other stays.
    ends(&world, 2, Event::End);
    quietly(&mut world).await;
    assert_eq!(streams(&world), [1, 3]);
    world.start_controller().await;
    world.everybody_reports().await;
    quietly(&mut world).await;
    assert_eq!(streams(&world), [1, 3]);
    ends(&world, 1, Event::Cut);
    quietly(&mut world).await;
    assert_eq!(streams(&world), [3, 4]);
    world.heal().await;
    world.check_rest().await;
    let all = row::Entity::find().order_by_asc(row::Column::Id);
    let all = all.all(world.database().reader()).await.unwrap();
    let statuses: Vec<_> = all.iter().map(|row| row.status.as_str()).collect();
    assert_eq!(
        statuses,
        ["failed", "completed", "completed", "completed", "completed"]
    );
    for server in servers {
        assert_eq!(state(&world, server).await, ServerState::Active);
    }
}

#[tokio::test]
async fn one_that_is_cancelled_or_deleted_waits_no_more_and_gives_its_place_back() {
    let (mut world, servers) = asked(6).await;
    quietly(&mut world).await;
    assert_eq!(streams(&world), [1, 2]);
    let app = world.app();
    // Of those that wait.
    assert!(requests::abort(&app, servers[2]).await.unwrap());
    requests::delete(&app, servers[3]).await.unwrap();
    quietly(&mut world).await;
    assert_eq!(streams(&world), [1, 2]);
    assert_eq!(state(&world, servers[2]).await, ServerState::Active);
    // Of those that are on their way.
    assert!(requests::abort(&app, servers[0]).await.unwrap());
    quietly(&mut world).await;
    assert_eq!(streams(&world), [2, 5]);
    requests::delete(&app, servers[1]).await.unwrap();
    quietly(&mut world).await;
    assert_eq!(streams(&world), [5, 6]);
    world.heal().await;
    world.check_rest().await;
}

#[tokio::test]
async fn a_guest_that_ends_while_it_waits_waits_no_more() {
    let (mut world, servers) = asked(4).await;
    quietly(&mut world).await;
    assert_eq!(streams(&world), [1, 2]);
    let server = ServerId(servers[2]);
    let host = world
        .hosts
        .iter()
        .find(|host| host.processes().contains(&server));
    let reason = fractus_agent_api::machine::StopReason::GuestPowerOff;
    assert!(host.unwrap().end_process(server, reason));
    quietly(&mut world).await;
    assert_eq!(state(&world, servers[2]).await, ServerState::Stopped);
    ends(&world, 1, Event::End);
    quietly(&mut world).await;
    assert_eq!(streams(&world), [2, 4]);
    world.heal().await;
    world.check_rest().await;
}
