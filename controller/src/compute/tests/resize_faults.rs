//! Resizes and cold migrations whose hosts fail, fall silent or are lost, and whose servers are called something else
//! meanwhile: what the server could go back to is only let go of when something else is known to be there.

use std::sync::Arc;
use std::time::Duration;

use fractus_agent_api::machine::{Power, StopReason};

use super::resize::{asks, at_rest, declare, furnished, nothing_of_it_is_left, resize, used};
use super::*;
use crate::agents::simulated::SimulatedHost;
use crate::compute::ops::resize::verdict;

fn reset() -> Value {
    json!({"os-resetState": {"state": "active"}})
}

fn revert() -> Value {
    json!({"revertResize": null})
}

/// One that was migrated from host-1 to host-2, and waits for its user's word.
async fn migrated() -> (Cloud, String, Arc<SimulatedHost>) {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    (cloud, id, other)
}

/// Its disk is to be made of the copy once more, and that fails: the copy stays until it has been made of it after all.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_could_not_be_made_of_its_copy_is_made_of_it_after_a_reset() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let server = machine(&id);
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    cloud.frozen.send_replace(true);
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    cloud.until_takes(&id, Power::Stopped).await;
    cloud.pump(&cloud.host);
    cloud.until_takes(&id, Power::Running).await;
    cloud.host.fail(server, "input/output error");
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "ERROR").await;
    let copy = cloud.host.copied(server);
    assert!(copy.is_some());

    assert_eq!(asks(&cloud, "admin", &id, reset()).await, 202);
    at_rest(&cloud, &id, "ACTIVE").await;
    let wanted = cloud.host.wanted(server).unwrap();
    assert_eq!((wanted.restores, wanted.copy), (copy, copy));
    let hard = json!({"reboot": {"type": "HARD"}});
    assert_eq!(asks(&cloud, "one", &id, hard).await, 202);
    at_rest(&cloud, &id, "ACTIVE").await;
    cloud.until_migration(&id, "error").await;
    let report = cloud.host.report(server).unwrap();
    assert_eq!(report.rebuilds, 1);
    assert_eq!(cloud.host.disks(server), 1, "of the copy, not of the image");
    nothing_of_it_is_left(&cloud, &id).await;
    assert_eq!(used(&cloud).await, [(256, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_lost_before_it_has_the_server_leaves_it_where_it_was() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    cloud.frozen.send_replace(true);
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    cloud.until_takes(&id, Power::Stopped).await;
    declare(&cloud, &other, true).await;
    cloud.frozen.send_replace(false);
    let shown = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-1");
    cloud.until_migration(&id, "error").await;
    assert_eq!(cloud.host.disks(machine(&id)), 1);
    assert_eq!(other.remains(), vec![]);
    assert_eq!(used(&cloud).await, [(256, 1), (0, 0)]);
    nothing_of_it_is_left(&cloud, &id).await;
}

/// Its guest is not stopped for a way back that there is none of.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_go_back_to_a_host_that_is_not_there() {
    let (cloud, id, other) = migrated().await;
    declare(&cloud, &cloud.host, true).await;
    let refused = cloud.act("one", &id, "2.96", revert()).await;
    assert_eq!(status(&refused), 409, "{}", refused.json);
    assert!(
        refused.message().contains("is not there"),
        "{}",
        refused.json
    );
    assert_eq!(other.report(machine(&id)).unwrap().starts, 1);
    assert_eq!(other.processes(), vec![machine(&id)]);
    // It stays, then.
    let confirm = json!({"confirmResize": null});
    assert_eq!(asks(&cloud, "one", &id, confirm).await, 204);
    at_rest(&cloud, &id, "ACTIVE").await;
}

/// Its source has lost the disk, and says so when it is asked: the guest runs on where it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_former_host_has_lost_its_disk_runs_on() {
    let (cloud, id, other) = migrated().await;
    cloud.host.wipe();
    cloud.host.start_agent(Uuid::from_u128(0xd1));
    cloud.pump(&cloud.host);
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    assert_eq!(other.report(machine(&id)).unwrap().starts, 1);
    assert_eq!(other.processes(), vec![machine(&id)]);
    cloud.until_migration(&id, "finished").await;
}

/// A record that is gone is no proof that the guest is.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_record_is_gone_goes_back_once_its_host_is_off_for_certain() {
    let (cloud, id, other) = migrated().await;
    let server = machine(&id);
    other.wipe();
    other.start_agent(Uuid::from_u128(0xd2));
    cloud.pump(&other);
    cloud.look(&id).await;
    let off = |shown: &Value| shown["OS-EXT-STS:power_state"] == 4;
    let shown = cloud.until("admin", &id, off).await;
    assert_eq!(shown["status"], "VERIFY_RESIZE");
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    assert_eq!(cloud.host.processes(), vec![], "it may run there");
    // Nor does an administrator's reset part with what is left of it.
    assert_eq!(asks(&cloud, "admin", &id, reset()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    cloud.look(&id).await;
    cloud.host.settle();
    assert_eq!(cloud.host.remains(), vec![server]);
    declare(&cloud, &other, true).await;
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(cloud.host.processes(), vec![server]);
    assert_eq!(cloud.host.disks(server), 1);
}

/// Its former host fails to start it, so that what it had become is kept: also when its user then only stops it.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_had_become_is_kept_until_it_runs_again_where_it_came_from() {
    let (cloud, id, other) = migrated().await;
    let server = machine(&id);
    cloud.frozen.send_replace(true);
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    while cloud.host.wanted(server).unwrap().power != Power::Running {
        cloud.pump(&other);
        // sleeps because a frozen host tells nobody what it takes
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    cloud.host.fail(server, "no memory");
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "ERROR").await;
    assert_eq!(
        asks(&cloud, "one", &id, json!({"os-stop": null})).await,
        202
    );
    at_rest(&cloud, &id, "SHUTOFF").await;
    cloud.look(&id).await;
    other.settle();
    assert_eq!(other.remains(), vec![server]);
    assert_eq!(
        asks(&cloud, "one", &id, json!({"os-start": null})).await,
        202
    );
    at_rest(&cloud, &id, "ACTIVE").await;
    while !other.remains().is_empty() {
        cloud.look(&id).await;
        cloud.pump(&other);
    }
    assert_eq!(cloud.host.disks(server), 1);
    assert_eq!(used(&cloud).await, [(256, 1), (0, 0)]);
}

/// Time says nothing of a guest that has ended by a fault.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_guest_has_failed_is_not_confirmed_by_time() {
    let (cloud, id, other) = migrated().await;
    let detail = "its process was killed".to_owned();
    assert!(other.end_process(machine(&id), StopReason::VmmFault { detail }));
    let off = |shown: &Value| shown["OS-EXT-STS:power_state"] == 4;
    let shown = cloud.until("admin", &id, off).await;
    assert_eq!(shown["status"], "VERIFY_RESIZE");
    verdict::confirm_overdue(&cloud.app, Duration::ZERO)
        .await
        .unwrap();
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    assert_eq!(cloud.host.remains(), vec![machine(&id)]);
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    let back = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(back["OS-EXT-SRV-ATTR:host"], "host-1");
}

/// What is asked for after a reset has the last word.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_after_a_reset_is_not_overridden_by_the_revert_that_was_given_up() {
    let (cloud, id, other) = migrated().await;
    cloud.frozen.send_replace(true);
    assert_eq!(asks(&cloud, "one", &id, revert()).await, 202);
    let server = machine(&id);
    while other.wanted(server).unwrap().power != Power::Stopped {
        // sleeps because a frozen host tells nobody what it takes
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(asks(&cloud, "admin", &id, reset()).await, 202);
    assert_eq!(
        asks(&cloud, "one", &id, json!({"os-stop": null})).await,
        202
    );
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "SHUTOFF").await;
    cloud.look(&id).await;
    assert_eq!(other.processes(), vec![]);
    at_rest(&cloud, &id, "SHUTOFF").await;
}
