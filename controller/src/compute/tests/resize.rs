//! Servers that get another size, or another host while their guest is stopped, and stay so, or go back.

use sea_orm::EntityTrait;

use super::*;
use crate::agents::host;
use crate::compute::ops::resize::verdict;
use crate::image::{snapshot, store};
use crate::reconcile::machine as rows;

pub(super) async fn at_rest(cloud: &Cloud, id: &str, status: &str) -> Value {
    let rests =
        |server: &Value| server["status"] == status && server["OS-EXT-STS:task_state"].is_null();
    cloud.until("admin", id, rests).await
}

/// With a flavor `2` that has twice of everything.
pub(super) async fn furnished() -> Cloud {
    let cloud = Cloud::new().await;
    let larger =
        json!({"flavor": {"name": "larger", "id": "2", "ram": 512, "vcpus": 2, "disk": 2}});
    let made = cloud
        .call("admin", Method::POST, "/v2.1/flavors", "", larger)
        .await;
    assert_eq!(status(&made), 200, "{}", made.json);
    cloud
}

pub(super) async fn asks(cloud: &Cloud, who: &str, id: &str, body: Value) -> u16 {
    status(&cloud.act(who, id, "2.96", body).await)
}

pub(super) fn resize() -> Value {
    json!({"resize": {"flavorRef": "2"}})
}

/// Memory and disk that each host has given away.
pub(super) async fn used(cloud: &Cloud) -> Vec<(i64, i64)> {
    let all = host::all(cloud.app.database().reader()).await.unwrap();
    let used = all.iter();
    used.map(|row| (row.memory_mib_used, row.disk_gib_used))
        .collect()
}

async fn cores(cloud: &Cloud) -> (Value, Value) {
    let limits = cloud.get("one", "/v2.1/limits", "2.96").await.json;
    let limits = &limits["limits"]["absolute"];
    (
        limits["totalCoresUsed"].clone(),
        limits["totalRAMUsed"].clone(),
    )
}

/// Nothing of a copy, or of an image that it came by, is left.
pub(super) async fn nothing_of_it_is_left(cloud: &Cloud, id: &str) {
    let images = store::image::Entity::find().all(cloud.app.database().reader());
    let left = images.await.unwrap().into_iter();
    let left: Vec<_> = left
        .filter(|row| row.owner == snapshot::NOBODY && row.deleted_at_us.is_none())
        .collect();
    assert_eq!(left, vec![]);
    let known = rows::find(cloud.app.database().reader(), machine(id)).await;
    if let Some(known) = known.unwrap() {
        assert_eq!((known.wanted.copy, known.wanted.restores), (None, None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_gets_another_size_where_it_is_and_keeps_it() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let before = at_rest(&cloud, &id, "ACTIVE").await;
    cloud.frozen.send_replace(true);
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    let path = format!("/v2.1/servers/{id}");
    let now = cloud.get("admin", &path, "2.96").await.json["server"].clone();
    assert_eq!(now["status"], "RESIZE");
    assert_eq!(now["OS-EXT-STS:vm_state"], "active");
    assert_eq!(now["progress"], 0);
    assert_eq!(cores(&cloud).await, (json!(2), json!(512)));
    cloud.frozen.send_replace(false);

    let resized = at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    assert_eq!(resized["OS-EXT-STS:vm_state"], "resized");
    assert_eq!(resized["OS-EXT-STS:power_state"], 1);
    assert_eq!(resized["flavor"]["original_name"], "larger");
    assert_eq!(
        resized["OS-EXT-SRV-ATTR:host"],
        before["OS-EXT-SRV-ATTR:host"]
    );
    let report = cloud.host.report(machine(&id)).unwrap();
    assert_eq!((report.starts, report.rebuilds), (2, 0), "on the same disk");
    let wanted = cloud.host.wanted(machine(&id)).unwrap();
    let size = wanted.spec.root_disk.as_ref().unwrap().size;
    assert_eq!(
        (wanted.spec.vcpus, wanted.spec.memory_mib, size),
        (2, 512, 2 << 30)
    );
    assert!(cloud.host.copied(machine(&id)).is_some());
    // Both, and the copy.
    assert_eq!(used(&cloud).await, [(512, 3)]);
    let migration = cloud.until_migration(&id, "finished").await;
    assert_eq!(migration["migration_type"], "resize");
    assert_eq!(migration["old_instance_type_id"], 1);
    assert_eq!(migration["new_instance_type_id"], 2);
    assert_eq!(migration["dest_compute"], migration["source_compute"]);
    // It is none that is under way.
    let path = format!("{path}/migrations");
    let shown = cloud.get("admin", &path, "2.96").await;
    assert_eq!(shown.json, json!({"migrations": []}));

    let confirm = json!({"confirmResize": null});
    assert_eq!(asks(&cloud, "one", &id, confirm).await, 204);
    at_rest(&cloud, &id, "ACTIVE").await;
    cloud.until_migration(&id, "confirmed").await;
    cloud.host.settle();
    assert_eq!(cloud.host.copied(machine(&id)), None);
    assert_eq!(cloud.host.report(machine(&id)).unwrap().starts, 2);
    assert_eq!(used(&cloud).await, [(512, 2)]);
    assert_eq!(cores(&cloud).await, (json!(2), json!(512)));
    nothing_of_it_is_left(&cloud, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_resized_where_it_is_goes_back_to_its_disk_of_before() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let before = cloud.host.wanted(machine(&id)).unwrap().spec;
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    cloud.frozen.send_replace(true);
    let revert = json!({"revertResize": null});
    assert_eq!(asks(&cloud, "one", &id, revert).await, 202);
    let path = format!("/v2.1/servers/{id}");
    let now = cloud.get("admin", &path, "2.96").await.json["server"].clone();
    assert_eq!(now["status"], "REVERT_RESIZE");
    assert_eq!(now["OS-EXT-STS:task_state"], "resize_reverting");
    assert_eq!(now["OS-EXT-STS:vm_state"], "resized");
    cloud.frozen.send_replace(false);
    let back = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(back["flavor"]["original_name"], "tiny");
    cloud.until_migration(&id, "reverted").await;
    cloud.host.settle();
    let report = cloud.host.report(machine(&id)).unwrap();
    assert_eq!((report.starts, report.rebuilds), (3, 1));
    assert_eq!(cloud.host.wanted(machine(&id)).unwrap().spec, before);
    assert_eq!(cloud.host.disks(machine(&id)), 1, "no other was made");
    assert_eq!(cloud.host.copied(machine(&id)), None);
    assert_eq!(used(&cloud).await, [(256, 1)]);
    assert_eq!(cores(&cloud).await, (json!(1), json!(256)));
    nothing_of_it_is_left(&cloud, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_migrated_with_its_disk_and_stays_or_goes_back() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    let migrate = json!({"migrate": null});
    assert_eq!(asks(&cloud, "one", &id, migrate.clone()).await, 403);
    assert_eq!(asks(&cloud, "admin", &id, migrate).await, 202);
    let there = at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    assert_eq!(there["OS-EXT-SRV-ATTR:host"], "host-2");
    assert_eq!(there["flavor"]["original_name"], "tiny");
    assert_eq!(other.processes(), vec![machine(&id)]);
    // It keeps the disk, and no copy.
    assert_eq!(cloud.host.remains(), vec![machine(&id)]);
    assert_eq!(cloud.host.processes(), vec![]);
    assert_eq!(cloud.host.copied(machine(&id)), None);
    // Nobody takes it for what is to go.
    cloud.reconciler.look(machine(&id)).await.unwrap();
    cloud.host.settle();
    assert_eq!(cloud.host.remains(), vec![machine(&id)]);
    assert_eq!(used(&cloud).await, [(256, 1), (256, 1)]);
    let migration = cloud.until_migration(&id, "finished").await;
    assert_eq!(migration["migration_type"], "migration");
    assert_eq!(migration["dest_compute"], "host-2");
    nothing_of_it_is_left(&cloud, &id).await;

    let revert = json!({"revertResize": null});
    assert_eq!(asks(&cloud, "one", &id, revert).await, 202);
    let back = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(back["OS-EXT-SRV-ATTR:host"], "host-1");
    cloud.until_migration(&id, "reverted").await;
    let report = cloud.host.report(machine(&id)).unwrap();
    assert_eq!((report.starts, report.rebuilds), (2, 0));
    assert_eq!(cloud.host.disks(machine(&id)), 1, "it is the one of before");
    assert_eq!(other.remains(), vec![]);
    assert_eq!(used(&cloud).await, [(256, 1), (0, 0)]);

    // And again, to stay, to a host that has had it before.
    let there = json!({"migrate": {"host": "host-2"}});
    assert_eq!(asks(&cloud, "admin", &id, there).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    let confirm = json!({"confirmResize": {}});
    assert_eq!(asks(&cloud, "one", &id, confirm).await, 204);
    let stays = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(stays["OS-EXT-SRV-ATTR:host"], "host-2");
    assert_eq!(cloud.host.remains(), vec![]);
    assert_eq!(other.processes(), vec![machine(&id)]);
    assert_eq!(used(&cloud).await, [(0, 0), (256, 1)]);
    nothing_of_it_is_left(&cloud, &id).await;
}

/// Its own host takes nobody, so it gets its size elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_gets_another_size_elsewhere_and_stays_stopped() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    assert_eq!(
        asks(&cloud, "one", &id, json!({"os-stop": null})).await,
        202
    );
    at_rest(&cloud, &id, "SHUTOFF").await;
    let other = cloud.join(2).await;
    let host = cloud.host.id();
    let disable = cloud
        .app
        .database()
        .write(move |tx| Box::pin(async move { host::set_disabled(tx, host, true, None).await }));
    assert!(disable.await.unwrap());
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    let resized = at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    assert_eq!(resized["OS-EXT-SRV-ATTR:host"], "host-2");
    assert_eq!(resized["OS-EXT-STS:power_state"], 4);
    assert_eq!((other.processes(), other.remains().len()), (vec![], 1));
    let confirm = json!({"confirmResize": null});
    assert_eq!(asks(&cloud, "one", &id, confirm).await, 204);
    at_rest(&cloud, &id, "SHUTOFF").await;
    assert_eq!(cloud.host.remains(), vec![]);
    assert_eq!(
        asks(&cloud, "one", &id, json!({"os-start": null})).await,
        202
    );
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(other.wanted(machine(&id)).unwrap().spec.memory_mib, 512);
    assert_eq!(used(&cloud).await, [(0, 0), (512, 2)]);
}

/// Where all hosts are frozen: nothing but the target's start is left, which has been told.
async fn is_moved(cloud: &Cloud, target: &crate::agents::simulated::SimulatedHost, id: &str) {
    while target.wanted(machine(id)).is_none() {
        cloud.pump(&cloud.host);
        // sleeps because nobody tells of it: the host is frozen
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_new_host_cannot_make_its_disk_is_where_it_was() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    cloud.frozen.send_replace(true);
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    is_moved(&cloud, &other, &id).await;
    other.fail(machine(&id), "the image could not be had");
    cloud.frozen.send_replace(false);
    let shown = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-1");
    assert_eq!(cloud.host.processes(), vec![machine(&id)]);
    assert_eq!(cloud.host.disks(machine(&id)), 1);
    assert_eq!(other.remains(), vec![]);
    assert_eq!(used(&cloud).await, [(256, 1), (0, 0)]);
    cloud.until_migration(&id, "error").await;
    nothing_of_it_is_left(&cloud, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_deleted_before_it_is_confirmed_leaves_nothing_on_either_host() {
    let cloud = furnished().await;
    let other = cloud.join(2).await;
    for action in [json!({"migrate": null}), resize()] {
        let id = cloud.running("one", "web").await;
        assert_eq!(asks(&cloud, "admin", &id, action).await, 202);
        at_rest(&cloud, &id, "VERIFY_RESIZE").await;
        let path = format!("/v2.1/servers/{id}");
        let gone = cloud.call("one", Method::DELETE, &path, "", Value::Null);
        assert_eq!(status(&gone.await), 204);
        cloud.until_gone("one", &id).await;
        // As nova does: what was not taken back stays.
        cloud.until_migration(&id, "confirmed").await;
        for host in [&cloud.host, &other] {
            while !host.remains().is_empty() {
                cloud.reconciler.heard([machine(&id)]);
                // sleeps because it is the reconciler's to drop
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        assert_eq!(used(&cloud).await, [(0, 0), (0, 0)]);
        nothing_of_it_is_left(&cloud, &id).await;
    }
}

/// What an administrator says it is, it stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_state_is_reset_is_what_it_has_become() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    let reset = json!({"os-resetState": {"state": "active"}});
    assert_eq!(asks(&cloud, "admin", &id, reset).await, 202);
    let shown = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(shown["flavor"]["original_name"], "larger");
    cloud.until_migration(&id, "error").await;
    assert_eq!(used(&cloud).await, [(512, 2)]);
    nothing_of_it_is_left(&cloud, &id).await;
    let hard = json!({"reboot": {"type": "HARD"}});
    assert_eq!(asks(&cloud, "one", &id, hard).await, 202);
    at_rest(&cloud, &id, "ACTIVE").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_is_resized_still() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    let reason = fractus_agent_api::machine::StopReason::GuestPowerOff;
    assert!(cloud.host.end_process(machine(&id), reason));
    let off = |server: &Value| server["OS-EXT-STS:power_state"] == 4;
    let shown = cloud.until("admin", &id, off).await;
    assert_eq!(shown["status"], "VERIFY_RESIZE");
    // It is confirmed only as its host says that it is: wanted off by now.
    let settled = async || {
        let known = rows::find(cloud.app.database().reader(), machine(&id)).await;
        known.unwrap().unwrap().settled
    };
    while !settled().await {
        // sleeps because the row tells nobody that it has changed
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let confirm = json!({"confirmResize": null});
    assert_eq!(asks(&cloud, "one", &id, confirm).await, 204);
    at_rest(&cloud, &id, "SHUTOFF").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_in_novas_words() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let refused = async |who: &str, body: Value| {
        let refused = cloud.act(who, &id, "2.96", body).await;
        (status(&refused), refused.message().to_owned())
    };
    let flavor = |id: &str| json!({"resize": {"flavorRef": id}});
    for (body, code, words) in [
        (
            flavor("nosuch"),
            400,
            "Flavor nosuch could not be found.".to_owned(),
        ),
        (
            flavor("1"),
            400,
            "When resizing, instances must change flavor!".to_owned(),
        ),
        (
            flavor(""),
            400,
            "Invalid input for field/attribute flavorRef. Value: . '' should be non-empty"
                .to_owned(),
        ),
        (
            json!({"confirmResize": null}),
            409,
            format!("Cannot 'confirmResize' instance {id} while it is in vm_state active"),
        ),
        (
            json!({"revertResize": null}),
            409,
            format!("Cannot 'revertResize' instance {id} while it is in vm_state active"),
        ),
    ] {
        assert_eq!(refused("one", body).await, (code, words));
    }
    let host = |name: &str| json!({"migrate": {"host": name}});
    let words = format!("Unable to migrate instance ({id}) to current host (host-1).");
    assert_eq!(refused("admin", host("host-1")).await, (400, words));
    let words = "Compute host moon could not be found.".to_owned();
    assert_eq!(refused("admin", host("moon")).await, (400, words));
    // Nowhere else: it is as it was.
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    cloud.until_migration(&id, "error").await;
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(cloud.host.report(machine(&id)).unwrap().starts, 1);

    for (name, ram, vcpus, disk) in [("huge", 100_000, 1, 1), ("zero", 256, 2, 0)] {
        let flavor =
            json!({"flavor": {"name": name, "id": name, "ram": ram, "vcpus": vcpus, "disk": disk}});
        cloud
            .call("admin", Method::POST, "/v2.1/flavors", "", flavor)
            .await;
    }
    let words = "Quota exceeded for ram: Requested 99744, but already used 256 of 51200 ram";
    assert_eq!(
        refused("one", flavor("huge")).await,
        (403, words.to_owned())
    );
    let because = "Server disk was unable to be resized because: ";
    let words = format!("{because}Resize to zero disk flavor is not allowed.");
    assert_eq!(refused("one", flavor("zero")).await, (400, words));
    assert_eq!(asks(&cloud, "one", &id, flavor("2")).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    let words = format!("Cannot 'resize' instance {id} while it is in vm_state resized");
    assert_eq!(refused("one", flavor("1")).await, (409, words));
    let confirm = json!({"confirmResize": null});
    assert_eq!(asks(&cloud, "one", &id, confirm).await, 204);
    at_rest(&cloud, &id, "ACTIVE").await;
    let words = format!("{because}Unable to resize disk down.");
    assert_eq!(refused("one", flavor("1")).await, (400, words));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_has_waited_long_enough_is_confirmed() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    assert_eq!(asks(&cloud, "one", &id, resize()).await, 202);
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    let overdue = async |seconds| {
        let window = std::time::Duration::from_secs(seconds);
        verdict::confirm_overdue(&cloud.app, window).await.unwrap();
    };
    overdue(3600).await;
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    overdue(0).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    cloud.until_migration(&id, "confirmed").await;
}

/// An operator's word on a host.
pub(super) async fn declare(
    cloud: &Cloud,
    host: &crate::agents::simulated::SimulatedHost,
    down: bool,
) {
    let id = host.id();
    let write = cloud
        .app
        .database()
        .write(move |tx| Box::pin(async move { host::set_forced_down(tx, id, down).await }));
    assert!(write.await.unwrap());
}

/// What it said last, it said before that.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_back_from_a_host_that_is_down_and_is_not_confirmed_there() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    other.power_off();
    cloud.was_heard_last_minute(&other).await;
    declare(&cloud, &other, true).await;
    let refused = cloud
        .act("one", &id, "2.96", json!({"confirmResize": null}))
        .await;
    assert_eq!(status(&refused), 409, "{}", refused.json);
    assert!(
        refused.message().contains("is not there"),
        "{}",
        refused.json
    );
    let window = std::time::Duration::ZERO;
    verdict::confirm_overdue(&cloud.app, window).await.unwrap();
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    let revert = json!({"revertResize": null});
    assert_eq!(asks(&cloud, "one", &id, revert).await, 202);
    let back = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(back["OS-EXT-SRV-ATTR:host"], "host-1");
    assert_eq!(cloud.host.processes(), vec![machine(&id)]);
    assert_eq!(cloud.host.disks(machine(&id)), 1);
    cloud.until_migration(&id, "reverted").await;
    // What it has goes when it is back.
    other.reboot(Uuid::from_u128(0xb7));
    cloud.pump(&other);
    declare(&cloud, &other, false).await;
    while !other.remains().is_empty() {
        cloud.reconciler.look(machine(&id)).await.unwrap();
        other.settle();
    }
    assert_eq!(used(&cloud).await, [(256, 1), (0, 0)]);
}

/// By an administrator, in the middle: it stays where it is, and is nobody's to take back any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_reset_while_it_goes_back_stays_what_it_is() {
    let cloud = furnished().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
    cloud.frozen.send_replace(true);
    let revert = json!({"revertResize": null});
    assert_eq!(asks(&cloud, "one", &id, revert).await, 202);
    let reset = json!({"os-resetState": {"state": "active"}});
    assert_eq!(asks(&cloud, "admin", &id, reset).await, 202);
    cloud.frozen.send_replace(false);
    cloud.until_migration(&id, "error").await;
    let shown = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-2");
    let hard = json!({"reboot": {"type": "HARD"}});
    assert_eq!(asks(&cloud, "one", &id, hard).await, 202);
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(other.processes(), vec![machine(&id)]);
    while !cloud.host.remains().is_empty() {
        cloud.reconciler.look(machine(&id)).await.unwrap();
        cloud.host.settle();
    }
    assert_eq!(used(&cloud).await, [(0, 0), (256, 1)]);
    // And can be moved again.
    assert_eq!(
        asks(&cloud, "admin", &id, json!({"migrate": null})).await,
        202
    );
    at_rest(&cloud, &id, "VERIFY_RESIZE").await;
}
