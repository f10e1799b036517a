//! Histories that are rare in the storm and must go right all the same.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::machine::{Power, ServerId, StopReason};
use sea_orm::DatabaseTransaction;
use uuid::Uuid;

use super::requests;
use super::world::{Plan, World};
use crate::agents::host;
use crate::agents::simulated::SimulatedHost;
use crate::compute::model::state::ServerState;
use crate::compute::ops;
use crate::compute::ops::change::Change;
use crate::compute::store::server;
use crate::database::Database;
use crate::event;
use crate::operation::{self, Advance, Kind, Kinds, Operation, Outcome, Step, StepError};
use crate::reconcile::machine;

/// A cloud of `hosts` in which these servers are active.
pub(super) async fn active(hosts: usize, servers: &[Uuid]) -> World {
    let mut world = World::new(
        3,
        Plan {
            hosts,
            servers: servers.len(),
            events: 0,
        },
    )
    .await;
    for id in servers {
        world.servers.push(*id);
        requests::create(&world.controller.as_ref().unwrap().app, *id)
            .await
            .unwrap();
    }
    world.heal().await;
    for id in servers {
        assert_eq!(state(&world, *id).await, ServerState::Active);
    }
    world
}

pub(super) async fn state(world: &World, id: Uuid) -> ServerState {
    let row = server::find_any(world.database().reader(), &id.to_string())
        .await
        .unwrap();
    row.unwrap().state()
}

/// The host on which a process of the server runs.
pub(super) fn holder(world: &World, id: Uuid) -> Option<Arc<SimulatedHost>> {
    world
        .hosts
        .iter()
        .find(|host| host.processes().contains(&ServerId(id)))
        .cloned()
}

/// Copies the database; answers where to.
pub(super) async fn back_up(world: &World) -> String {
    world.test.copy().await
}

/// Goes on with the copy, and a controller that knows that it is one.
pub(super) async fn restore(world: &mut World, backup: &str) {
    world.controller = None;
    world.test.database = Database::connect(backup).await.unwrap();
    let begin = world.database().write(|tx| {
        Box::pin(async move {
            let now_us = 1_800_000_001_000_000;
            ops::restored(tx, now_us).await
        })
    });
    begin.await.unwrap();
    world.start_controller().await;
}

pub(super) async fn fault(world: &World, id: Uuid) -> String {
    let row = server::find(world.database().reader(), &id.to_string()).await;
    row.unwrap().unwrap().fault_message.unwrap_or_default()
}

pub(super) const ONE: Uuid = Uuid::from_u128(0x11);
pub(super) const TWO: Uuid = Uuid::from_u128(0x22);

#[tokio::test]
async fn a_create_takes_at_most_four_syncs() {
    let mut world = World::new(
        5,
        Plan {
            hosts: 2,
            servers: 1,
            events: 0,
        },
    )
    .await;
    world.servers.push(ONE);
    let (app, engine) = {
        let controller = world.controller.as_ref().unwrap();
        (controller.app.clone(), Arc::clone(&controller.engine))
    };
    let before = world.database().syncs();
    requests::create(&app, ONE).await.unwrap();
    while engine.advance(&ONE.to_string()).await == Advance::Advanced {}
    for host in &world.hosts {
        host.settle();
    }
    world.everybody_reports().await;
    while engine.advance(&ONE.to_string()).await == Advance::Advanced {}
    let syncs = world.database().syncs() - before;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    assert!(syncs <= 4, "{syncs} syncs from the request to ACTIVE");
}

#[tokio::test]
async fn a_guest_that_powers_itself_off_is_shut_off_and_stays_so_over_a_reboot_of_its_host() {
    let mut world = active(2, &[ONE]).await;
    let host = holder(&world, ONE).unwrap();
    host.end_process(ServerId(ONE), StopReason::GuestPowerOff);
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Stopped);
    host.reboot(Uuid::from_u128(5));
    world.heal().await;
    assert!(holder(&world, ONE).is_none());
    world.check_rest().await;
}

#[tokio::test]
async fn what_should_run_is_started_again_after_a_reboot_of_its_host() {
    let mut world = active(2, &[ONE]).await;
    let host = holder(&world, ONE).unwrap();
    host.reboot(Uuid::from_u128(5));
    world.heal().await;
    assert_eq!(holder(&world, ONE).unwrap().id(), host.id());
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.check_rest().await;
}

async fn suspended(world: &mut World, id: Uuid) {
    let asked = requests::change(&world.app(), id, Change::Suspend).await;
    assert!(asked.unwrap());
    world.heal().await;
    assert_eq!(state(world, id).await, ServerState::Suspended);
}

async fn resumed(world: &mut World, id: Uuid) {
    let asked = requests::change(&world.app(), id, Change::Resume).await;
    assert!(asked.unwrap());
    world.heal().await;
    assert_eq!(state(world, id).await, ServerState::Active);
    world.check_rest().await;
}

#[tokio::test]
async fn a_suspended_guest_goes_on_after_a_reboot_of_its_host() {
    let mut world = active(2, &[ONE]).await;
    let host = holder(&world, ONE).unwrap();
    suspended(&mut world, ONE).await;
    host.reboot(Uuid::from_u128(5));
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Suspended);
    assert!(holder(&world, ONE).is_none());
    world.check_rest().await;
    resumed(&mut world, ONE).await;
    assert_eq!(host.guest(ServerId(ONE)), Some(1));
}

/// The server's operation has told its host, which then cannot do it.
async fn fails_on_its_host(world: &mut World, id: Uuid, change: Change) {
    let (app, engine) = {
        let controller = world.controller.as_ref().unwrap();
        (controller.app.clone(), Arc::clone(&controller.engine))
    };
    assert!(requests::change(&app, id, change).await.unwrap());
    while engine.advance(&id.to_string()).await == Advance::Advanced {}
    world.hosts[0].fail(ServerId(id), "no space is left");
    world.heal().await;
    let events = event::of_subject(world.database().reader(), &id.to_string()).await;
    let failed = events
        .unwrap()
        .into_iter()
        .rfind(|event| event.phase == "failed");
    let message = failed.and_then(|event| event.message);
    assert_eq!(message.as_deref(), Some("no space is left"));
}

#[tokio::test]
async fn a_guest_that_its_host_cannot_suspend_runs_on() {
    let mut world = active(1, &[ONE]).await;
    fails_on_its_host(&mut world, ONE, Change::Suspend).await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.check_rest().await;
    suspended(&mut world, ONE).await;
    assert_eq!(world.hosts[0].kept(ServerId(ONE)), Some(1));
}

#[tokio::test]
async fn a_guest_that_its_host_cannot_resume_is_suspended_still() {
    let mut world = active(1, &[ONE]).await;
    suspended(&mut world, ONE).await;
    fails_on_its_host(&mut world, ONE, Change::Resume).await;
    assert_eq!(state(&world, ONE).await, ServerState::Suspended);
    world.check_rest().await;
    resumed(&mut world, ONE).await;
    assert_eq!(world.hosts[0].guest(ServerId(ONE)), Some(1));
}

/// As when an operation has failed after its request, or not seen its own end: the intent stands, and
/// the host is told by the reconciler.
async fn want(world: &World, id: Uuid, power: Power) {
    let change = world.database().write(move |tx| {
        Box::pin(async move {
            machine::change(tx, ServerId(id), None, 1, |wanted| wanted.power = power).await
        })
    });
    assert!(change.await.unwrap().is_some());
    world.controller.as_ref().unwrap().reconciler.sweep().await;
}

#[tokio::test]
async fn a_server_that_no_operation_looks_after_is_suspended_and_resumed_as_its_host_says() {
    let mut world = active(1, &[ONE]).await;
    want(&world, ONE, Power::Suspended).await;
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Suspended);
    world.hosts[0].fail(ServerId(ONE), "the disk cannot be read");
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    // The next agent finds it well.
    world.hosts[0].kill_agent();
    world.hosts[0].start_agent(Uuid::from_u128(6));
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Suspended);
    want(&world, ONE, Power::Running).await;
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    assert_eq!(world.hosts[0].guest(ServerId(ONE)), Some(1));
    world.check_rest().await;
}

#[tokio::test]
async fn a_guest_that_ends_before_the_reconciler_has_it_suspended_is_shut_off() {
    let mut world = active(1, &[ONE]).await;
    want(&world, ONE, Power::Suspended).await;
    assert!(world.hosts[0].end_process(ServerId(ONE), StopReason::GuestPowerOff));
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Stopped);
    world.check_rest().await;
}

#[tokio::test]
async fn machines_newer_than_a_restored_database_are_kept_and_the_others_obey_the_new_epoch() {
    let mut world = active(2, &[ONE]).await;
    let backup = back_up(&world).await;
    // What the backup does not know: a second server, and that the first one was stopped.
    let app = world.controller.as_ref().unwrap().app.clone();
    requests::create(&app, TWO).await.unwrap();
    assert!(requests::change(&app, ONE, Change::Stop).await.unwrap());
    world.heal().await;
    assert!(holder(&world, ONE).is_none());
    let newest = holder(&world, TWO).unwrap();

    restore(&mut world, &backup).await;
    // Nobody was heard yet: nothing is started, and nothing is ended.
    world.controller.as_ref().unwrap().reconciler.sweep().await;
    assert!(holder(&world, ONE).is_none());
    world.heal().await;
    assert_eq!(
        holder(&world, TWO).unwrap().id(),
        newest.id(),
        "unclaimed, and left alone"
    );
    assert!(holder(&world, ONE).is_some(), "as the restored intent says");
}

#[tokio::test]
async fn a_host_that_lost_its_records_does_not_get_an_empty_machine_in_place_of_the_server() {
    let mut world = active(1, &[ONE]).await;
    world.hosts[0].wipe();
    world.heal().await;
    assert!(holder(&world, ONE).is_none());
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    let row = server::find(world.database().reader(), &ONE.to_string())
        .await
        .unwrap()
        .unwrap();
    assert!(row.fault_message.unwrap().contains("no record"));
}

#[tokio::test]
async fn a_new_owner_waits_until_the_old_one_has_dropped_the_machine() {
    let mut world = active(2, &[ONE]).await;
    let old = holder(&world, ONE).unwrap();
    let new = world
        .hosts
        .iter()
        .find(|host| host.id() != old.id())
        .unwrap()
        .clone();
    world.network.freeze(old.id());
    let known = machine::find(world.database().reader(), ServerId(ONE))
        .await
        .unwrap()
        .unwrap();
    let to = new.id();
    let moved = world.database().write(move |tx| {
        let known = known.clone();
        Box::pin(async move {
            let first = machine::move_owner(tx, &known, to, &known.wanted, 1).await?;
            let second = machine::move_owner(tx, &known, to, &known.wanted, 1).await?;
            Ok::<_, sea_orm::DbErr>((first, second))
        })
    });
    assert_eq!(
        moved.await.unwrap(),
        (true, false),
        "the first compare-and-set wins"
    );
    for _ in 0..10 {
        world.round().await;
        world.check_processes();
        assert!(new.processes().is_empty(), "the old owner still runs it");
    }
    world.heal().await;
    assert_eq!(holder(&world, ONE).unwrap().id(), new.id());
    assert!(old.remains().is_empty());
}

#[tokio::test]
async fn a_server_of_a_host_that_was_removed_can_be_deleted() {
    let mut world = active(1, &[ONE]).await;
    let gone = world.hosts.remove(0).id();
    world.network.hosts.remove(gone);
    let remove = world
        .database()
        .write(move |tx| Box::pin(async move { host::remove(tx, gone, 1).await }));
    assert!(remove.await.unwrap());
    let app = world.controller.as_ref().unwrap().app.clone();
    requests::delete(&app, ONE).await.unwrap();
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Deleted);
    let open = crate::operation::unfinished(world.database().reader(), None)
        .await
        .unwrap();
    assert!(open.is_empty(), "{open:?}");
}

#[tokio::test]
async fn a_server_that_was_deleted_after_the_backup_does_not_come_back_empty() {
    let mut world = active(2, &[ONE, TWO]).await;
    let backup = back_up(&world).await;
    let app = world.controller.as_ref().unwrap().app.clone();
    requests::delete(&app, ONE).await.unwrap();
    world.heal().await;
    assert!(holder(&world, ONE).is_none());

    restore(&mut world, &backup).await;
    world.heal().await;
    assert!(holder(&world, ONE).is_none(), "its disk is gone");
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    assert!(fault(&world, ONE).await.contains("no record"));
    assert_eq!(state(&world, TWO).await, ServerState::Active);
    // Nor by an operation; it can be deleted once more.
    let app = world.controller.as_ref().unwrap().app.clone();
    let asked = requests::change(&app, ONE, Change::HardReboot).await;
    assert!(asked.unwrap());
    world.heal().await;
    assert!(holder(&world, ONE).is_none());
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    requests::delete(&app, ONE).await.unwrap();
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Deleted);
    world.check_rest().await;
}

#[tokio::test]
async fn a_server_that_nobody_has_any_more_after_a_restore_is_an_error() {
    let mut world = active(1, &[ONE]).await;
    let backup = back_up(&world).await;
    restore(&mut world, &backup).await;
    world.hosts[0].wipe();
    world.heal().await;
    assert!(holder(&world, ONE).is_none());
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    assert!(fault(&world, ONE).await.contains("no record"));
}

#[tokio::test]
async fn an_operation_goes_on_after_a_restore_once_the_owner_was_heard() {
    let mut world = active(1, &[ONE]).await;
    let app = world.controller.as_ref().unwrap().app.clone();
    assert!(
        requests::change(&app, ONE, Change::HardReboot)
            .await
            .unwrap()
    );
    let backup = back_up(&world).await;
    restore(&mut world, &backup).await;
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.check_rest().await;
}

#[tokio::test]
async fn a_host_that_this_controller_has_not_met_is_not_taken_for_removed() {
    let mut world = active(1, &[ONE]).await;
    let host = Arc::clone(&world.hosts[0]);
    let (app, engine, fleet) = {
        let controller = world.controller.as_ref().unwrap();
        let fleet = Arc::clone(&controller.fleet);
        (
            controller.app.clone(),
            Arc::clone(&controller.engine),
            fleet,
        )
    };
    // As when another controller has let it join.
    world.network.hosts.remove(host.id());
    fleet.dismiss(host.id());
    requests::delete(&app, ONE).await.unwrap();
    while engine.advance(&ONE.to_string()).await == Advance::Advanced {}
    assert!(matches!(state(&world, ONE).await, ServerState::Deleting(_)));
    assert_eq!(fleet.ids(), [host.id()], "taken in by the table");
    world.network.hosts.add(host);
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Deleted);
    world.check_rest().await;
}

#[tokio::test]
async fn a_hard_reboot_does_not_make_an_empty_machine_where_the_host_lost_the_server() {
    let mut world = active(1, &[ONE]).await;
    world.hosts[0].wipe();
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    let app = world.controller.as_ref().unwrap().app.clone();
    let asked = requests::change(&app, ONE, Change::HardReboot).await;
    assert!(asked.unwrap());
    world.heal().await;
    assert!(holder(&world, ONE).is_none());
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    assert!(fault(&world, ONE).await.contains("no record"));
    requests::delete(&app, ONE).await.unwrap();
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Deleted);
}

/// `server_delete`, but it does not wait for the host.
struct Hasty(Arc<dyn Kind>);

struct HastyStep(Arc<dyn Step>);

#[async_trait]
impl Step for HastyStep {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.0.commit(operation, tx).await
    }
}

#[async_trait]
impl Kind for Hasty {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn version(&self) -> i32 {
        self.0.version()
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let hasty = |step| Arc::new(HastyStep(step)) as Arc<dyn Step>;
        self.0.steps().into_iter().map(hasty).collect()
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.0.finish(operation, outcome, tx).await
    }
}

/// Proof that the checks can fail.
#[tokio::test]
#[should_panic(expected = "is owned by None")]
async fn a_delete_that_does_not_wait_for_the_host_is_found_out() {
    let mut world = active(1, &[ONE]).await;
    world.kinds = Box::new(|kinds: Kinds| {
        let mut wrapped = Kinds::default();
        for known in kinds.iter() {
            match known.name() {
                "server_delete" => wrapped.register(Arc::new(Hasty(Arc::clone(known)))),
                _ => wrapped.register(Arc::clone(known)),
            }
        }
        wrapped
    });
    world.start_controller().await;
    let (app, engine) = {
        let controller = world.controller.as_ref().unwrap();
        (controller.app.clone(), Arc::clone(&controller.engine))
    };
    requests::delete(&app, ONE).await.unwrap();
    while engine.advance(&ONE.to_string()).await == Advance::Advanced {}
    world.check_records().await;
}

#[tokio::test]
async fn a_server_that_was_unshelved_since_the_backup_is_left_alone_where_it_runs() {
    let mut world = active(2, &[ONE]).await;
    requests::shelve_or_unshelve(&world.app(), ONE)
        .await
        .unwrap();
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::ShelvedOffloaded);
    let backup = back_up(&world).await;
    requests::shelve_or_unshelve(&world.app(), ONE)
        .await
        .unwrap();
    world.heal().await;
    let holder = holder(&world, ONE).unwrap();
    restore(&mut world, &backup).await;
    // Asked for before the holder was heard, and again when it is known.
    for _ in 0..2 {
        let asked = requests::shelve_or_unshelve(&world.app(), ONE).await;
        assert!(asked.unwrap());
        world.heal().await;
        assert_eq!(state(&world, ONE).await, ServerState::ShelvedOffloaded);
        assert!(
            holder.processes().contains(&ServerId(ONE)),
            "it is the only one"
        );
    }
}

/// The backup is of the moment in which its first host was about to make its disk.
#[tokio::test]
async fn a_server_that_was_unshelved_and_has_moved_since_the_backup_is_left_alone_where_it_runs() {
    let mut world = active(2, &[ONE]).await;
    let app = world.app();
    requests::shelve_or_unshelve(&app, ONE).await.unwrap();
    world.heal().await;
    requests::shelve_or_unshelve(&app, ONE).await.unwrap();
    let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
    let owner = loop {
        let known = machine::find(world.database().reader(), ServerId(ONE)).await;
        if let Some(owner) = known.unwrap().unwrap().host {
            break owner;
        }
        engine.advance(&ONE.to_string()).await;
    };
    let backup = back_up(&world).await;
    world.heal().await;
    let other = world
        .hosts
        .iter()
        .map(|host| host.id())
        .find(|id| *id != owner);
    assert!(requests::migrate(&app, ONE, other, false).await.unwrap());
    world.heal().await;
    let holder = holder(&world, ONE).unwrap();
    assert_eq!(Some(holder.id()), other);
    restore(&mut world, &backup).await;
    for _ in 0..3 {
        world.heal().await;
        assert_eq!(state(&world, ONE).await, ServerState::ShelvedOffloaded);
        assert!(
            holder.processes().contains(&ServerId(ONE)),
            "it is the only one"
        );
    }
}

/// The backup is of the moment in which its first host was to be told, and it is deleted before that host is heard.
#[tokio::test]
async fn a_server_whose_unshelving_nobody_knows_of_is_in_its_image_or_goes_when_it_is_deleted() {
    for is_deleted in [false, true] {
        let mut world = active(2, &[ONE]).await;
        let app = world.app();
        requests::shelve_or_unshelve(&app, ONE).await.unwrap();
        world.heal().await;
        requests::shelve_or_unshelve(&app, ONE).await.unwrap();
        let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
        let owner = loop {
            let known = machine::find(world.database().reader(), ServerId(ONE)).await;
            if let Some(owner) = known.unwrap().unwrap().host {
                break owner;
            }
            engine.advance(&ONE.to_string()).await;
        };
        let backup = back_up(&world).await;
        restore(&mut world, &backup).await;
        if is_deleted {
            world.network.freeze(owner);
            requests::delete(&world.app(), ONE).await.unwrap();
            world.round().await;
            world.round().await;
        }
        world.heal().await;
        let open = operation::unfinished(world.database().reader(), None).await;
        assert_eq!(open.unwrap(), vec![]);
        if is_deleted {
            world.check_rest().await;
            continue;
        }
        assert_eq!(state(&world, ONE).await, ServerState::ShelvedOffloaded);
    }
}

/// Its source keeps a disk of before, and does not say that the server is its own.
#[tokio::test]
async fn a_server_that_was_migrated_since_the_backup_is_left_alone_where_it_runs() {
    for source_is_heard_first in [true, false] {
        let mut world = active(2, &[ONE]).await;
        let backup = back_up(&world).await;
        let app = world.app();
        assert!(requests::resize(&app, ONE, false).await.unwrap());
        world.heal().await;
        assert!(matches!(state(&world, ONE).await, ServerState::Resized(_)));
        let runs = holder(&world, ONE).unwrap();
        let keeps = world.hosts.iter().find(|host| host.id() != runs.id());
        let keeps = Arc::clone(keeps.unwrap());
        assert_eq!(keeps.remains(), [ServerId(ONE)]);
        restore(&mut world, &backup).await;
        let silent = match source_is_heard_first {
            true => runs.id(),
            false => keeps.id(),
        };
        world.network.freeze(silent);
        for _ in 0..4 {
            world.round().await;
            world.check_processes();
        }
        for _ in 0..3 {
            world.heal().await;
            assert!(
                runs.processes().contains(&ServerId(ONE)),
                "it is the only one"
            );
            assert_eq!(keeps.processes(), []);
        }
    }
}
