//! Two controllers on one database. One leads, and dies or stands still at any of its effects, before
//! or after it; the other one carries on; the first one thaws, and knows nothing of it. Every operation
//! is carried out once.

use std::collections::BTreeMap;
use std::sync::Arc;

use sea_orm::EntityTrait;
use uuid::Uuid;

use super::faults::{all_kinds, ask, scenario};
use super::world::{Controller, World};
use crate::event;
use crate::leader::{LEASE, Term, Turn};
use crate::operation::{Advance, row};

/// What becomes of the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Dies,
    Freezes,
}

/// The world's controller leads, the answered one follows.
async fn two(world: &mut World) -> Controller {
    world.keeps_controller = true;
    let mut first = world.life(Some("first")).await;
    let mut second = world.life(Some("second")).await;
    assert_eq!(beat(&mut first).await, Turn::Begins(Term(1)));
    assert_eq!(beat(&mut second).await, Turn::Follows);
    assert_eq!(beat(&mut first).await, Turn::Leads);
    world.controller = Some(first);
    world.everybody_reports().await;
    second
}

async fn beat(controller: &mut Controller) -> Turn {
    controller.seat.as_mut().unwrap().beat().await.unwrap()
}

/// The lease of who led has passed: `next` leads, and is who is spoken to. Answers who led.
async fn succeed(world: &mut World, mut next: Controller) -> Controller {
    assert_eq!(beat(&mut next).await, Turn::Follows);
    world.clock.advance(LEASE / 2);
    assert_eq!(beat(&mut next).await, Turn::Follows, "it may still live");
    world.clock.advance(LEASE / 2);
    assert_eq!(beat(&mut next).await, Turn::Begins(Term(2)));
    world.controller.replace(next).unwrap()
}

/// Has the leader do an operation of `kind`, until it stands still or is dead, or there is no more to do:
/// then it has lived through it. Answers what of it is still under way.
async fn lead(
    world: &mut World,
    kind: &'static str,
    id: Uuid,
) -> Option<tokio::task::JoinHandle<()>> {
    let (app, engine, doom) = {
        let controller = world.controller.as_ref().unwrap();
        let (engine, doom) = (&controller.engine, &controller.doom);
        (controller.app.clone(), Arc::clone(engine), Arc::clone(doom))
    };
    let mut turn = tokio::spawn(async move { ask(&app, kind, id).await });
    for _ in 0..20 {
        tokio::select! {
            biased;
            () = doom.frozen() => return Some(turn),
            ended = &mut turn => ended.unwrap(),
        }
        if doom.is_dead() || open(world).await == 0 {
            return None;
        }
        world.hosts_work();
        world.everybody_reports().await;
        let engine = Arc::clone(&engine);
        turn = tokio::spawn(async move {
            engine.advance(&id.to_string()).await;
        });
    }
    panic!("{kind} has no end");
}

async fn open(world: &World) -> usize {
    world.open_subjects().await.len()
}

/// Each operation has begun once and ended once.
async fn check_once(world: &World, id: Uuid, what: &str) {
    let reader = world.database().reader();
    let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for event in event::of_subject(reader, &id.to_string()).await.unwrap() {
        if let Some(operation) = event.operation_id {
            told.entry(operation).or_default().push(event.phase);
        }
    }
    let operations = row::Entity::find().all(reader).await.unwrap();
    assert_eq!(operations.len(), told.len(), "{what}");
    for phases in told.values() {
        assert_eq!(phases, &["requested", "done"], "{what}: {told:?}");
    }
}

/// Machines started, and disks made.
fn done(world: &World, id: Uuid) -> (u64, u64) {
    let server = fractus_agent_api::machine::ServerId(id);
    let disks = world.hosts.iter().map(|host| host.disks(server)).sum();
    (world.starts(), disks)
}

/// What an operation of `kind` comes to when nothing goes wrong.
async fn undisturbed(kind: &'static str) -> (u64, u64) {
    let (mut world, id) = scenario(kind).await;
    two(&mut world).await;
    assert!(lead(&mut world, kind, id).await.is_none());
    world.heal().await;
    world.check_rest().await;
    check_once(&world, id, kind).await;
    done(&world, id)
}

/// The leader meets its fate at each of its effects of an operation of each kind.
async fn at_every_effect(fate: Fate) {
    for (kind, _) in all_kinds().await {
        let expected = undisturbed(kind).await;
        let mut effects = 0;
        loop {
            let what = format!("{kind}, {fate:?} at effect {effects}");
            let (mut world, id) = scenario(kind).await;
            let second = two(&mut world).await;
            let doom = Arc::clone(&world.controller.as_ref().unwrap().doom);
            match fate {
                Fate::Dies => doom.arm(effects),
                Fate::Freezes => doom.freeze_at(effects),
            }
            let under_way = lead(&mut world, kind, id).await;
            let lived = !doom.is_dead() && !doom.is_frozen();
            if !lived {
                let first = succeed(&mut world, second).await;
                world.heal().await;
                thaw(&mut world, first, under_way, id, &what).await;
            } else {
                // What is left where a guest was is the reconciler's to have dropped.
                world.heal().await;
            }
            world.check_rest().await;
            // A request that was cut off by its controller's death may never have been made.
            let asked = event::of_subject(world.database().reader(), &id.to_string()).await;
            let asked = asked.unwrap();
            // Its host is up again by the time that it is asked for.
            let is_refused =
                kind == "server_evacuate" && !asked.iter().any(|event| event.action == kind);
            if !is_refused && (fate == Fate::Freezes || !asked.is_empty() && effects > 0) {
                check_once(&world, id, &what).await;
                assert_eq!(done(&world, id), expected, "{what}");
            }
            if lived {
                assert!(effects >= 4, "{what}: a request, a call and an end");
                break;
            }
            effects += 1;
            assert!(effects < 100, "{kind} has no end");
        }
    }
}

/// Who led goes on where it stood still, in its own belief the leader.
async fn thaw(
    world: &mut World,
    mut first: Controller,
    under_way: Option<tokio::task::JoinHandle<()>>,
    id: Uuid,
    what: &str,
) {
    let Some(under_way) = under_way else {
        return;
    };
    let before = world.fingerprint().await;
    let was_asked = open(world).await;
    first.doom.thaw();
    under_way.await.unwrap();
    if open(world).await == was_asked {
        assert_eq!(world.fingerprint().await, before, "{what}");
    }
    // It has not looked at its seat yet.
    let subject = id.to_string();
    assert_ne!(
        first.engine.advance(&subject).await,
        Advance::Advanced,
        "{what}"
    );
    first.reconciler.sweep().await;
    world.heal().await;
    assert_eq!(beat(&mut first).await, Turn::Follows, "{what}");
    assert_eq!(
        first.engine.advance(&subject).await,
        Advance::Idle,
        "{what}"
    );
}

#[tokio::test]
async fn the_leader_may_die_at_every_effect_of_every_kind() {
    at_every_effect(Fate::Dies).await;
}

#[tokio::test]
async fn the_leader_may_stand_still_at_every_effect_of_every_kind() {
    at_every_effect(Fate::Freezes).await;
}

#[tokio::test]
async fn a_former_leader_records_nothing_before_it_knows_that_it_is_one() {
    let (mut world, id) = scenario("server_stop").await;
    let second = two(&mut world).await;
    // It has not beaten for a lease, and does not know.
    let first = succeed(&mut world, second).await;
    ask(&world.app(), "server_stop", id).await;
    let subject = id.to_string();
    let operations = async |world: &World| {
        let all = row::Entity::find().all(world.database().reader()).await;
        format!("{:?}", all.unwrap())
    };
    let asked = operations(&world).await;
    // What it tells the host is what the host is to be told.
    assert!(matches!(
        first.engine.advance(&subject).await,
        Advance::Wait(_)
    ));
    for host in &world.hosts {
        host.settle();
    }
    // The step is done, and may not be recorded by it.
    assert_eq!(first.engine.advance(&subject).await, Advance::Idle);
    first.reconciler.sweep().await;
    assert_eq!(operations(&world).await, asked);
    world.heal().await;
    world.check_rest().await;
    check_once(&world, id, "by the second").await;
}
