//! Histories of guests between two hosts, each of which must go right.

use std::sync::Arc;

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{Observed, ServerId, StopReason};
use fractus_agent_api::migration::{AtLimit, State};
use sea_orm::EntityTrait;
use uuid::Uuid;

use super::migration::Migrates;
use super::requests;
use super::scenarios::{ONE, active, fault, holder, state};
use super::world::World;
use crate::agents::host;
use crate::agents::simulated::SimulatedHost;
use crate::agents::simulated::stream::Event;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::ops::change::Change;
use crate::compute::store::server;
use crate::operation::Advance;
use crate::reconcile::machine;
use crate::reconcile::migration::row;

fn server_one() -> ServerId {
    ServerId(ONE)
}

/// Of two hosts, with a server that is asked to go from the first to the second.
async fn begun(follows: bool) -> (World, Arc<SimulatedHost>, Arc<SimulatedHost>) {
    let mut world = active(2, &[ONE]).await;
    world.migrates = Migrates::Only;
    let source = holder(&world, ONE).unwrap();
    let mut others = world.hosts.iter().filter(|host| host.id() != source.id());
    let target = Arc::clone(others.next().unwrap());
    world.check_guests();
    let app = world.app();
    assert!(requests::migrate(&app, ONE, None, follows).await.unwrap());
    assert_eq!(
        state(&world, ONE).await,
        ServerState::Migrating(Standing::Active)
    );
    (world, source, target)
}

/// All do what they can, but for the stream itself.
async fn quietly(world: &mut World) {
    for _ in 0..6 {
        for host in &world.hosts {
            if !world.network.is_frozen(host.id()) {
                host.settle();
            }
        }
        world.everybody_reports().await;
        let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
        for subject in world.open_subjects().await {
            while engine.advance(&subject).await == Advance::Advanced {}
        }
        let reconciler = Arc::clone(&world.controller.as_ref().unwrap().reconciler);
        reconciler.sweep().await;
        world.check_processes();
        world.check_guests();
    }
}

/// Until the source sends.
async fn sending() -> (World, Arc<SimulatedHost>, Arc<SimulatedHost>) {
    sending_by(false).await
}

async fn sending_by(follows: bool) -> (World, Arc<SimulatedHost>, Arc<SimulatedHost>) {
    let (mut world, source, target) = begun(follows).await;
    quietly(&mut world).await;
    assert_eq!(world.network.hosts.streams(), [server_one()]);
    (world, source, target)
}

async fn only_migration(world: &World) -> row::Model {
    let mut all = row::Entity::find()
        .all(world.database().reader())
        .await
        .unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn stream(world: &World, event: Event) {
    assert!(world.network.hosts.stream(server_one(), event));
}

async fn owner(world: &World) -> Option<HostId> {
    let row = machine::find(world.database().reader(), server_one()).await;
    row.unwrap().unwrap().host
}

#[tokio::test]
async fn a_guest_goes_on_elsewhere_and_nothing_is_left_where_it_was() {
    let (mut world, source, target) = sending().await;
    let before = source.soul(server_one()).unwrap();
    stream(&world, Event::Round);
    quietly(&mut world).await;
    assert_eq!(only_migration(&world).await.status, "running");
    stream(&world, Event::End);
    quietly(&mut world).await;
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    assert_eq!(target.soul(server_one()).unwrap().born, before.born);
    assert!(source.remains().is_empty());
    let migration = only_migration(&world).await;
    assert_eq!(migration.status, "completed");
    assert_eq!(migration.progress().unwrap().rounds.len(), 1);
    // What comes after it says nothing of migrations any more.
    let app = world.app();
    assert!(requests::change(&app, ONE, Change::Pause).await.unwrap());
    world.heal().await;
    assert!(!target.wanted(server_one()).unwrap().migrates());
    // And back, paused.
    assert!(
        requests::migrate(&app, ONE, Some(source.id()), false)
            .await
            .unwrap()
    );
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Paused);
    assert_eq!(source.soul(server_one()).unwrap().born, before.born);
    assert_eq!(
        source.report(server_one()).unwrap().observed,
        Observed::Paused
    );
}

#[tokio::test]
async fn an_answer_that_was_lost_is_settled_by_the_targets_word() {
    for (event, moves) in [(Event::AnswerLost, true), (Event::EndLost, false)] {
        let (mut world, source, target) = sending().await;
        stream(&world, event);
        quietly(&mut world).await;
        world.heal().await;
        world.check_rest().await;
        assert_eq!(target.soul(server_one()).is_some(), moves, "{event:?}");
        assert_eq!(source.soul(server_one()).is_some(), !moves, "{event:?}");
        let status = if moves { "completed" } else { "failed" };
        assert_eq!(only_migration(&world).await.status, status);
    }
}

#[tokio::test]
async fn a_guest_whose_source_is_killed_when_its_target_has_all_of_it_goes_on_there() {
    for event in [Event::End, Event::AnswerLost] {
        let (mut world, source, target) = sending().await;
        let before = source.soul(server_one()).unwrap();
        stream(&world, event);
        // Before anybody has heard of the offer.
        let detail = "killed".to_owned();
        assert!(source.end_process(server_one(), StopReason::VmmFault { detail }));
        quietly(&mut world).await;
        world.heal().await;
        world.check_rest().await;
        let after = target.soul(server_one()).unwrap();
        assert_eq!(after.born, before.born, "{event:?}");
        assert_eq!(only_migration(&world).await.status, "completed");
        assert_eq!(state(&world, ONE).await, ServerState::Active);
    }
}

#[tokio::test]
async fn an_offer_whose_target_cannot_be_asked_waits_for_it_or_for_an_operators_word() {
    for declared in [false, true] {
        let (mut world, source, target) = sending().await;
        world.network.freeze(target.id());
        stream(&world, Event::AnswerLost);
        quietly(&mut world).await;
        world.clock.advance(std::time::Duration::from_secs(86_400));
        quietly(&mut world).await;
        assert_eq!(source.soul(server_one()), None, "it stands still");
        assert!(target.processes().is_empty());
        if declared {
            let down = target.id();
            let write = world.database().write(move |tx| {
                Box::pin(async move { host::set_forced_down(tx, down, true).await })
            });
            assert!(write.await.unwrap());
            quietly(&mut world).await;
            assert!(source.soul(server_one()).is_some(), "it goes on");
        }
        world.heal().await;
        world.check_rest().await;
        assert_eq!(target.soul(server_one()).is_some(), !declared);
    }
}

#[tokio::test]
async fn a_guest_that_its_target_loses_before_it_ran_goes_on_where_it_was() {
    let (mut world, source, target) = sending().await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    // The row moves, and the target is not told yet.
    world.network.freeze(target.id());
    quietly(&mut world).await;
    assert_eq!(owner(&world).await, Some(target.id()));
    target.kill_agent();
    target.start_agent(Uuid::from_u128(9));
    world.network.thaw(target.id());
    world.heal().await;
    world.check_rest().await;
    assert_eq!(owner(&world).await, Some(source.id()));
    assert!(source.soul(server_one()).is_some());
    assert_eq!(only_migration(&world).await.status, "failed");
    assert_eq!(state(&world, ONE).await, ServerState::Active);
}

/// Its counters are what was wanted of it before it went, and no wish of its new host's.
#[tokio::test]
async fn a_guest_that_was_rebooted_and_rebuilt_before_is_not_begun_anew_where_it_was_lost() {
    let mut world = active(2, &[ONE]).await;
    for change in [Change::HardReboot, Change::Rebuild, Change::SoftReboot] {
        assert!(requests::change(&world.app(), ONE, change).await.unwrap());
        world.heal().await;
    }
    world.migrates = Migrates::Only;
    let source = holder(&world, ONE).unwrap();
    let mut others = world.hosts.iter().filter(|host| host.id() != source.id());
    let target = Arc::clone(others.next().unwrap());
    let before = source.soul(server_one()).unwrap();
    assert!(
        requests::migrate(&world.app(), ONE, None, false)
            .await
            .unwrap()
    );
    quietly(&mut world).await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    world.network.freeze(target.id());
    quietly(&mut world).await;
    assert_eq!(owner(&world).await, Some(target.id()));
    target.kill_agent();
    target.start_agent(Uuid::from_u128(9));
    world.network.thaw(target.id());
    world.heal().await;
    world.check_rest().await;
    assert_eq!(owner(&world).await, Some(source.id()));
    assert_eq!(source.soul(server_one()).unwrap().born, before.born);
}

#[tokio::test]
async fn a_guest_that_both_have_lost_is_an_error_with_whole_disks() {
    let (mut world, source, target) = sending().await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    world.network.freeze(target.id());
    world.network.freeze(source.id());
    quietly(&mut world).await;
    assert_eq!(owner(&world).await, Some(target.id()));
    for host in [&source, &target] {
        world.guests.killed.insert(server_one());
        let detail = "killed".to_owned();
        assert!(host.end_process(server_one(), StopReason::VmmFault { detail }));
    }
    world.heal().await;
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    assert!(fault(&world, ONE).await.contains("its disks are whole"));
    assert!(
        holder(&world, ONE).is_none(),
        "no other is begun in its place"
    );
    assert_eq!(owner(&world).await, Some(source.id()));
    assert_eq!(source.disks(server_one()), 1);
    // Its user begins it anew.
    let app = world.app();
    let asked = requests::change(&app, ONE, Change::HardReboot).await;
    assert!(asked.unwrap());
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    assert_eq!(source.disks(server_one()), 1);
}

#[tokio::test]
async fn a_source_that_offers_keeps_its_guest_until_the_new_owner_has_said_that_it_has_it() {
    let (mut world, source, target) = sending().await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    world.network.freeze(target.id());
    quietly(&mut world).await;
    assert_eq!(owner(&world).await, Some(target.id()));
    for _ in 0..5 {
        world.round().await;
        let said = source.report(server_one()).unwrap();
        assert_eq!(said.observed, Observed::Offered);
    }
    world.heal().await;
    world.check_rest().await;
    assert!(source.remains().is_empty());
    assert!(target.soul(server_one()).is_some());
}

#[tokio::test]
async fn a_migration_is_cancelled_until_the_row_has_moved_and_not_after() {
    let (mut world, source, _) = sending().await;
    let app = world.app();
    assert!(requests::abort(&app, ONE).await.unwrap());
    world.heal().await;
    world.check_rest().await;
    assert_eq!(only_migration(&world).await.status, "cancelled");
    assert!(source.soul(server_one()).is_some());

    let (mut world, _, target) = sending().await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    world.network.freeze(target.id());
    quietly(&mut world).await;
    let app = world.app();
    assert!(!requests::abort(&app, ONE).await.unwrap());
    world.heal().await;
    world.check_rest().await;
    assert_eq!(only_migration(&world).await.status, "completed");
}

#[tokio::test]
async fn a_server_that_is_deleted_on_its_way_is_gone_from_both_hosts() {
    for committed in [false, true] {
        let (mut world, source, target) = sending().await;
        if committed {
            stream(&world, Event::End);
            world.everybody_reports().await;
            world.network.freeze(target.id());
            quietly(&mut world).await;
            assert_eq!(owner(&world).await, Some(target.id()));
        }
        let app = world.app();
        requests::delete(&app, ONE).await.unwrap();
        world.heal().await;
        world.check_rest().await;
        assert_eq!(state(&world, ONE).await, ServerState::Deleted);
        assert!(source.remains().is_empty() && target.remains().is_empty());
    }
}

#[tokio::test]
async fn a_guest_that_powers_itself_off_while_it_is_sent_stays_off() {
    let (mut world, source, target) = sending().await;
    world.guests.killed.insert(server_one());
    assert!(source.end_process(server_one(), StopReason::GuestPowerOff));
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Stopped);
    assert!(target.remains().is_empty());
    assert_eq!(owner(&world).await, Some(source.id()));
}

#[tokio::test]
async fn a_host_that_reboots_with_a_guest_that_it_was_sending_starts_it_again() {
    let (mut world, source, _) = sending().await;
    world.guests.killed.insert(server_one());
    source.reboot(Uuid::from_u128(5));
    quietly(&mut world).await;
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    assert!(source.soul(server_one()).is_some());
    assert_eq!(only_migration(&world).await.status, "failed");
}

#[tokio::test]
async fn what_no_host_can_take_stays_where_it_is() {
    let mut world = active(1, &[ONE]).await;
    let app = world.app();
    assert!(requests::migrate(&app, ONE, None, false).await.unwrap());
    world.heal().await;
    world.check_rest().await;
    let migration = only_migration(&world).await;
    assert_eq!(migration.status, "error");
    let reason = migration.reason.unwrap();
    assert!(
        reason.contains("host0: the server is there already"),
        "{reason}"
    );
    assert_eq!(state(&world, ONE).await, ServerState::Active);
}

#[tokio::test]
async fn a_key_is_sealed_wherever_it_is_kept_and_open_only_on_its_way() {
    let (world, source, _) = sending().await;
    let told = source.wanted(server_one()).unwrap().departs.unwrap();
    assert!(told.key.key.starts_with("-----BEGIN PRIVATE KEY-----"));
    assert!(told.key.certificate.contains("BEGIN CERTIFICATE"));
    assert_eq!(told.to, "simulated:49152");
    let known = machine::find(world.database().reader(), server_one()).await;
    let departs = known.unwrap().unwrap().wanted.departs.unwrap();
    assert_eq!(departs.key.certificate, told.key.certificate);
    let open = crate::operation::unfinished(world.database().reader(), None).await;
    let kept = format!("{departs:?} {} {}", departs.key.key, open.unwrap()[0].state);
    assert!(!kept.contains("PRIVATE KEY"));
    let said = source.report(server_one()).unwrap().migration.unwrap();
    assert_eq!(said.state, State::Copying);
}

#[tokio::test]
async fn a_host_that_kept_an_old_disk_of_a_shelved_server_makes_it_anew_from_the_image() {
    let (mut world, source, _) = sending().await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    // The guest stands still there, and nobody can tell it that it runs elsewhere.
    world.network.freeze(source.id());
    quietly(&mut world).await;
    assert_eq!(state(&world, ONE).await, ServerState::Active);
    world.migrates = Migrates::Too;
    let app = world.app();
    assert!(requests::shelve_or_unshelve(&app, ONE).await.unwrap());
    quietly(&mut world).await;
    assert_eq!(state(&world, ONE).await, ServerState::ShelvedOffloaded);
    assert_eq!(source.disks(server_one()), 1);
    assert!(!source.remains().is_empty());

    world.network.thaw(source.id());
    world.everybody_reports().await;
    let row = server::find(world.database().reader(), &ONE.to_string()).await;
    let row = row.unwrap().unwrap();
    requests::unshelve(&app, &row, Some(source.id()))
        .await
        .unwrap();
    world.heal().await;
    world.check_rest().await;
    assert_eq!(owner(&world).await, Some(source.id()));
    assert_eq!(source.disks(server_one()), 2);
}

#[tokio::test]
async fn a_guest_that_stood_still_for_a_shelved_server_goes() {
    let (mut world, source, _) = sending().await;
    stream(&world, Event::End);
    world.everybody_reports().await;
    world.network.freeze(source.id());
    quietly(&mut world).await;
    world.migrates = Migrates::Too;
    assert!(
        requests::shelve_or_unshelve(&world.app(), ONE)
            .await
            .unwrap()
    );
    quietly(&mut world).await;
    assert_eq!(state(&world, ONE).await, ServerState::ShelvedOffloaded);
    world.heal().await;
    world.check_rest().await;
    assert!(source.remains().is_empty());
}

/// Of two hosts, with a guest that goes on at the second before all of its memory is there.
async fn parted(event: Event) -> (World, Arc<SimulatedHost>, Arc<SimulatedHost>) {
    let (mut world, source, target) = sending_by(true).await;
    stream(&world, event);
    quietly(&mut world).await;
    assert_eq!(world.network.hosts.debts(), [server_one()]);
    assert_eq!(owner(&world).await, Some(target.id()));
    assert!(target.soul(server_one()).is_some(), "it goes on");
    (world, source, target)
}

#[tokio::test]
async fn a_guest_whose_memory_follows_is_not_parted_from_its_source() {
    for event in [Event::Part, Event::PartLost] {
        let (mut world, source, target) = parted(event).await;
        let born = target.soul(server_one()).unwrap().born;
        world.clock.advance(std::time::Duration::from_secs(86_400));
        quietly(&mut world).await;
        // However long that takes, and also by another controller.
        let observed = |host: &SimulatedHost| host.report(server_one()).unwrap().observed;
        assert_eq!(observed(&source), Observed::Offered);
        assert_eq!(only_migration(&world).await.status, "post-migrating");
        assert_eq!(
            state(&world, ONE).await,
            ServerState::Migrating(Standing::Active)
        );
        assert!(world.network.hosts.pay(server_one()));
        quietly(&mut world).await;
        world.heal().await;
        world.check_rest().await;
        assert_eq!(only_migration(&world).await.status, "completed");
        assert_eq!(state(&world, ONE).await, ServerState::Active);
        assert_eq!(target.soul(server_one()).unwrap().born, born);
        assert!(source.remains().is_empty());
    }
}

#[tokio::test]
async fn a_guest_that_loses_the_source_of_its_memory_is_an_error_that_says_so() {
    for declared in [false, true] {
        let (mut world, source, target) = parted(Event::Part).await;
        world.guests.killed.insert(server_one());
        if declared {
            source.power_off();
            let down = source.id();
            let write = world.database().write(move |tx| {
                Box::pin(async move { host::set_forced_down(tx, down, true).await })
            });
            assert!(write.await.unwrap());
        } else {
            let detail = "killed".to_owned();
            source.end_process(server_one(), StopReason::VmmFault { detail });
            quietly(&mut world).await;
            // Whether all had come by then is for the target to say.
            assert_eq!(only_migration(&world).await.status, "post-migrating");
        }
        assert!(world.network.hosts.pay(server_one()));
        quietly(&mut world).await;
        assert_eq!(state(&world, ONE).await, ServerState::Error, "{declared}");
        assert!(fault(&world, ONE).await.contains("still coming"));
        let migration = only_migration(&world).await;
        assert_eq!(migration.status, "error");
        assert!(migration.ended_at_us.is_some());
        let reason = migration.reason.unwrap();
        assert!(reason.contains("on its old host"), "{reason}");
        assert_eq!(target.soul(server_one()), None, "what was left has ended");
        // Its disk is whole: it begins anew there.
        let app = world.app();
        assert!(
            requests::change(&app, ONE, Change::HardReboot)
                .await
                .unwrap()
        );
        quietly(&mut world).await;
        assert!(target.soul(server_one()).is_some());
        world.heal().await;
        world.check_rest().await;
        assert_eq!(state(&world, ONE).await, ServerState::Active);
        assert!(source.remains().is_empty());
    }
}

#[tokio::test]
async fn a_guest_that_its_target_loses_does_not_come_back_from_what_its_source_still_has() {
    let (mut world, source, target) = parted(Event::Part).await;
    world.guests.killed.insert(server_one());
    let detail = "killed".to_owned();
    target.end_process(server_one(), StopReason::VmmFault { detail });
    quietly(&mut world).await;
    assert_eq!(owner(&world).await, Some(target.id()));
    assert_eq!(source.soul(server_one()), None);
    world.heal().await;
    world.check_rest().await;
    assert_eq!(state(&world, ONE).await, ServerState::Error);
    assert!(source.remains().is_empty());
}

#[tokio::test]
async fn a_forced_completion_lets_the_guest_go_on_where_that_is_allowed() {
    let (world, source, _) = sending_by(true).await;
    let app = world.app();
    assert!(requests::force_complete(&app, ONE).await.unwrap());
    let wanted = machine::find(world.database().reader(), server_one()).await;
    let departs = wanted.unwrap().unwrap().wanted.departs.unwrap();
    assert_eq!(departs.policy.at_limit, AtLimit::PostCopy);
    assert_eq!(departs.policy.limit_ms, 0);
    assert!(source.soul(server_one()).is_some());
}

#[tokio::test]
async fn a_guest_whose_new_host_is_off_before_it_was_whole_is_its_evacuations_to_begin_anew() {
    for forgotten in [false, true] {
        let (mut world, source, target) = parted(Event::Part).await;
        world.guests.killed.insert(server_one());
        if forgotten {
            // Nobody has heard that it ran there.
            world.controller = None;
        }
        target.power_off();
        if forgotten {
            world.start_controller().await;
        }
        let down = target.id();
        let write = world
            .database()
            .write(move |tx| Box::pin(async move { host::set_forced_down(tx, down, true).await }));
        assert!(write.await.unwrap());
        quietly(&mut world).await;
        assert_eq!(owner(&world).await, Some(target.id()), "{forgotten}");
        assert_eq!(source.soul(server_one()), None, "what it has is older");
        let migration = only_migration(&world).await;
        assert_eq!(migration.status, "error", "{migration:?}");
        assert!(migration.ended_at_us.is_some());
    }
}

#[tokio::test]
async fn a_server_that_is_deleted_while_its_memory_follows_is_gone() {
    let (mut world, source, target) = parted(Event::Part).await;
    let detail = "killed".to_owned();
    source.end_process(server_one(), StopReason::VmmFault { detail });
    assert!(world.network.hosts.pay(server_one()));
    let app = world.app();
    requests::delete(&app, ONE).await.unwrap();
    quietly(&mut world).await;
    world.heal().await;
    world.check_rest().await;
    assert!(source.remains().is_empty() && target.remains().is_empty());
}

#[tokio::test]
async fn what_its_owners_move_took_is_kept_however_long_a_guests_memory_follows() {
    let (mut world, _, _) = parted(Event::Part).await;
    let took = only_migration(&world).await.handover();
    assert!(took.is_some());
    // Nobody remembers it any more.
    world.start_controller().await;
    world.everybody_reports().await;
    world.heal().await;
    world.check_rest().await;
    let migration = only_migration(&world).await;
    assert_eq!(migration.status, "completed");
    assert!(migration.progress().unwrap().pause.is_some());
    assert_eq!(migration.handover(), took);
}
