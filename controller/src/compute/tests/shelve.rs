//! Servers that are kept in an image, and run again elsewhere.

use bytes::Bytes;
use fractus_agent_api::machine::{ImageRef, Power, StopReason};
use http::StatusCode;

use super::*;
use crate::agents::host;
use crate::image::model::Image;
use crate::image::store;

async fn at_rest(cloud: &Cloud, id: &str, status: &str) -> Value {
    cloud
        .until("admin", id, |server| server["status"] == status)
        .await
}

async fn shelve(cloud: &Cloud, id: &str) {
    let asked = cloud.act("one", id, "2.1", json!({"shelve": null})).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.json);
    assert_eq!(asked.json, Value::Null);
}

async fn unshelve(cloud: &Cloud, id: &str) {
    let asked = cloud.act("one", id, "2.1", json!({"unshelve": null})).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.json);
}

/// Images of shelved servers that there are.
async fn images(cloud: &Cloud) -> Vec<Image> {
    use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
    let reader = cloud.app.database().reader();
    let rows = store::image::Entity::find()
        .filter(store::image::Column::DeletedAtUs.is_null())
        .filter(store::image::Column::Name.like("%-shelved"))
        .all(reader)
        .await
        .unwrap();
    let mut images = Vec::new();
    for row in rows {
        images.extend(store::find(reader, &row.id).await.unwrap());
    }
    images
}

/// How the server's newest action of this name ended.
async fn failure(cloud: &Cloud, id: &str, action: &str) -> Value {
    let path = format!("/v2.1/servers/{id}/os-instance-actions");
    let actions = cloud.get("admin", &path, "2.96").await.json["instanceActions"].clone();
    let mut newest = actions.as_array().unwrap().iter();
    let newest = newest.find(|it| it["action"] == action).unwrap();
    let request = newest["request_id"].as_str().unwrap();
    let shown = cloud
        .get("admin", &format!("{path}/{request}"), "2.96")
        .await;
    shown.json["instanceAction"]["events"][0]["details"].clone()
}

fn root(wanted: &fractus_agent_api::machine::Wanted) -> ImageRef {
    wanted.spec.root_disk.clone().unwrap().image.unwrap()
}

async fn used(cloud: &Cloud) -> Vec<i64> {
    let rows = host::all(cloud.app.database().reader()).await.unwrap();
    rows.iter().map(|row| row.memory_mib_used).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shelved_server_is_an_image_and_no_hosts_and_runs_again_elsewhere() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let nic = json!({"nics": [{"id": "00000000-0000-0000-0000-0000000000e1", "mac": "02:00:00:00:00:01"}]});
    let path = format!("/fractus/v1/machines/{id}");
    let body = json!({ "machine": nic });
    let changed = cloud.call("admin", Method::PATCH, &path, "", body).await;
    assert_eq!(changed.status, StatusCode::ACCEPTED, "{}", changed.json);
    let before = cloud.until_told(&id, |spec| spec.nics.len() == 1).await;
    let shown = at_rest(&cloud, &id, "ACTIVE").await;

    cloud.frozen.send_replace(true);
    shelve(&cloud, &id).await;
    let path = format!("/v2.1/servers/{id}");
    let now = cloud.get("one", &path, "2.96").await.json["server"].clone();
    assert_eq!(now["status"], "ACTIVE");
    assert_eq!(now["OS-EXT-STS:task_state"], "shelving");
    assert_eq!(images(&cloud).await[0].row.status, "queued");
    cloud.frozen.send_replace(false);

    let offloaded = at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    assert_eq!(offloaded["OS-EXT-STS:vm_state"], "shelved_offloaded");
    assert_eq!(offloaded["OS-EXT-STS:power_state"], 4);
    assert_eq!(offloaded["OS-EXT-SRV-ATTR:host"], Value::Null);
    assert_eq!(offloaded["OS-EXT-AZ:availability_zone"], "");
    assert_eq!(offloaded["hostId"], "");
    for same in ["id", "name", "image", "addresses", "config_drive", "flavor"] {
        assert_eq!(offloaded[same], shown[same], "{same}");
    }
    let kept = images(&cloud).await;
    let row = &kept[0].row;
    assert_eq!(row.name.as_deref(), Some("web-shelved"));
    assert_eq!((row.status.as_str(), row.size), ("active", Some(1 << 20)));
    assert_eq!(
        (row.owner.as_str(), row.visibility.as_str()),
        (ONE, "private")
    );
    assert_eq!(kept[0].property("image_type"), Some("snapshot"));
    assert_eq!(kept[0].property("instance_uuid"), Some(id.as_str()));
    assert_eq!(cloud.host.remains(), vec![]);
    assert_eq!(used(&cloud).await, [0]);

    let other = cloud.join(2).await;
    let to = json!({"unshelve": {"host": "host-2"}});
    let refused = cloud.act("one", &id, "2.91", to.clone()).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    let asked = cloud.act("admin", &id, "2.91", to).await;
    assert_eq!(asked.status, StatusCode::ACCEPTED, "{}", asked.json);
    let runs = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(runs["OS-EXT-SRV-ATTR:host"], "host-2");
    assert_eq!(runs["OS-EXT-AZ:availability_zone"], "nova");
    assert!(runs["OS-SRV-USG:launched_at"].as_str() > shown["OS-SRV-USG:launched_at"].as_str());
    let wanted = other.wanted(machine(&id)).unwrap();
    assert_eq!(root(&wanted).id.to_string(), kept[0].row.id);
    assert_eq!(root(&wanted).blake3, kept[0].row.blake3.clone().unwrap());
    let mut spec = wanted.spec;
    spec.root_disk.clone_from(&before.root_disk);
    assert_eq!(spec, before);
    assert_eq!(images(&cloud).await, vec![]);
    assert_eq!(cloud.host.remains(), vec![]);
    for action in ["shelve", "unshelve"] {
        assert_eq!(failure(&cloud, &id, action).await, Value::Null, "{action}");
    }
    // And once more, to where it was first.
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let back = json!({"unshelve": {"host": "host-1", "availability_zone": "nova"}});
    cloud.act("admin", &id, "2.91", back).await;
    let runs = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(runs["OS-EXT-SRV-ATTR:host"], "host-1");
    assert_eq!(runs["pinned_availability_zone"], "nova");
    assert_eq!((other.remains(), images(&cloud).await), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_shelved_whatever_their_guests_do_and_all_run_afterwards() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    for (action, status) in [
        (json!({"pause": null}), "PAUSED"),
        (json!({"suspend": null}), "SUSPENDED"),
        (json!({"os-stop": null}), "SHUTOFF"),
    ] {
        cloud.act("one", &id, "", action).await;
        at_rest(&cloud, &id, status).await;
        shelve(&cloud, &id).await;
        at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
        assert_eq!(cloud.host.remains(), vec![]);
        unshelve(&cloud, &id).await;
        at_rest(&cloud, &id, "ACTIVE").await;
        assert_eq!(images(&cloud).await, vec![]);
    }
    // What was counted before counts on: the next is done, too.
    let rebuild = json!({"rebuild": {"imageRef": DISK}});
    cloud.act("one", &id, "2.96", rebuild).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    unshelve(&cloud, &id).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    let rebuild = json!({"rebuild": {"imageRef": DISK}});
    cloud.act("one", &id, "2.96", rebuild).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    let report = cloud.host.report(machine(&id)).unwrap();
    // Each unshelving is one, too.
    assert_eq!(report.rebuilds, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_shelved_runs_again_and_has_no_image() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.host.set_full(true);
    shelve(&cloud, &id).await;
    let shown = at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-1");
    assert_eq!(images(&cloud).await, vec![]);
    let why = failure(&cloud, &id, "shelve").await;
    assert_eq!(why, "the host has no room left");
    assert_eq!(
        cloud.host.wanted(machine(&id)).unwrap().power,
        Power::Running
    );
    assert_eq!(cloud.host.processes(), vec![machine(&id)]);
    // One that was off stays so.
    cloud.act("one", &id, "", json!({"os-stop": null})).await;
    at_rest(&cloud, &id, "SHUTOFF").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHUTOFF").await;
    cloud.host.set_full(false);
    assert_eq!(images(&cloud).await, vec![]);
    assert_eq!(cloud.host.copied(machine(&id)), None);
    // Its user deletes the image while it is made.
    cloud.frozen.send_replace(true);
    shelve(&cloud, &id).await;
    let image = images(&cloud).await.remove(0).row.id;
    cloud.app.images().discard(&image, 3).await.unwrap();
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "SHUTOFF").await;
    assert_eq!(cloud.host.machines(), vec![machine(&id)]);
    assert_eq!(cloud.host.disks(machine(&id)), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_be_lost_is_refused() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let disk = json!({"id": "00000000-0000-0000-0000-0000000000d1", "size": 1 << 20});
    let path = format!("/fractus/v1/machines/{id}");
    let body = json!({"machine": {"disks": [disk]}});
    let changed = cloud.call("admin", Method::PATCH, &path, "", body).await;
    assert_eq!(changed.status, StatusCode::ACCEPTED, "{}", changed.json);
    let refused = cloud.act("one", &id, "", json!({"shelve": null})).await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    let words = "has disks besides its root disk";
    assert!(refused.message().contains(words), "{}", refused.message());
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(images(&cloud).await, vec![]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_with_its_server_whenever_that_is_deleted() {
    let cloud = Cloud::new().await;
    // While it is shelved.
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    shelve(&cloud, &id).await;
    delete(&cloud, &id).await;
    // When it is.
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    delete(&cloud, &id).await;
    // While it is started again.
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    cloud.frozen.send_replace(true);
    unshelve(&cloud, &id).await;
    delete(&cloud, &id).await;
    assert_eq!(used(&cloud).await, [0]);
}

async fn delete(cloud: &Cloud, id: &str) {
    let path = format!("/v2.1/servers/{id}");
    let deleted = cloud.call("one", Method::DELETE, &path, "", Value::Null);
    assert_eq!(deleted.await.status, StatusCode::NO_CONTENT);
    cloud.frozen.send_replace(false);
    cloud.until_gone("one", id).await;
    assert_eq!(images(cloud).await, vec![]);
    assert_eq!(cloud.host.remains(), vec![]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_unshelved_is_shelved_still() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let disable = |disabled: bool| {
        let write = cloud.app.database().write(move |tx| {
            Box::pin(async move {
                use sea_orm::EntityTrait;
                use sea_orm::sea_query::Expr;
                host::row::Entity::update_many()
                    .col_expr(host::row::Column::Disabled, Expr::value(disabled))
                    .exec(tx)
                    .await
            })
        });
        async move { write.await.unwrap() }
    };
    disable(true).await;
    unshelve(&cloud, &id).await;
    let shown = at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], Value::Null);
    let why = failure(&cloud, &id, "unshelve").await;
    assert!(
        why.as_str()
            .unwrap()
            .starts_with("No valid host was found."),
        "{why}"
    );
    disable(false).await;
    assert_eq!(images(&cloud).await.len(), 1);

    // An administrator's reset does not make it what it is not.
    let reset = json!({"os-resetState": {"state": "active"}});
    let asked = cloud.act("admin", &id, "", reset).await;
    assert_eq!(status(&asked), 202, "{}", asked.json);
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;

    let image = images(&cloud).await.remove(0).row.id;
    cloud.app.images().remove(&image, 3).await.unwrap();
    unshelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let why = failure(&cloud, &id, "unshelve").await;
    let words = format!("Unshelve attempted but the image {image} cannot be found.");
    assert_eq!(why, words);
    assert_eq!(used(&cloud).await, [0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ends_at_once_is_unshelved_all_the_same() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    cloud.frozen.send_replace(true);
    unshelve(&cloud, &id).await;
    cloud.until_takes(&id, Power::Running).await;
    while cloud.host.processes().is_empty() {
        assert!(cloud.host.step(machine(&id)));
    }
    assert!(
        cloud
            .host
            .end_process(machine(&id), StopReason::GuestPowerOff)
    );
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "SHUTOFF").await;
    assert_eq!(images(&cloud).await, vec![]);
    cloud.act("one", &id, "", json!({"os-start": null})).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(cloud.host.disks(machine(&id)), 2);
}

/// The image counts until a disk was made of it, which its host says.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_make_the_disk_gives_the_server_back_to_its_image() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    cloud.frozen.send_replace(true);
    unshelve(&cloud, &id).await;
    cloud.until_takes(&id, Power::Running).await;
    // One that had it before, and remembers that it has started it.
    cloud.host.fail(machine(&id), "the image could not be had");
    assert!(cloud.host.report(machine(&id)).unwrap().starts > 0);
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let why = failure(&cloud, &id, "unshelve").await;
    assert_eq!(why, "the image could not be had");
    assert_eq!(images(&cloud).await.len(), 1);
    assert_eq!(
        (cloud.host.remains(), used(&cloud).await),
        (vec![], vec![0])
    );
    unshelve(&cloud, &id).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(images(&cloud).await, vec![]);
}

/// It counts until another does, whatever becomes of that one.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_before_goes_when_another_counts() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    cloud.frozen.send_replace(true);
    unshelve(&cloud, &id).await;
    cloud.until_takes(&id, Power::Running).await;
    // The disk is made of it, and the guest cannot be started on it.
    cloud.host.settle();
    cloud.host.fail(machine(&id), "no kernel");
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "ERROR").await;
    let former = images(&cloud).await.remove(0).row.id;
    let hard = json!({"reboot": {"type": "HARD"}});
    cloud.act("one", &id, "", hard).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    cloud.host.set_full(true);
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(images(&cloud).await.remove(0).row.id, former);
    cloud.host.set_full(false);
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let mut left = images(&cloud).await;
    assert_eq!(left.len(), 1);
    assert_ne!(left.remove(0).row.id, former);
}

/// Whatever it has made of it by then.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_host_goes_down_while_it_is_unshelved_is_in_its_image_still() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    cloud.frozen.send_replace(true);
    unshelve(&cloud, &id).await;
    cloud.until_takes(&id, Power::Running).await;
    declare(&cloud, true).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let why = failure(&cloud, &id, "unshelve").await;
    assert_eq!(why, "host host-1 was declared to be down");
    assert_eq!(
        (images(&cloud).await.len(), used(&cloud).await),
        (1, vec![0])
    );
    cloud.frozen.send_replace(false);
    declare(&cloud, false).await;
    unshelve(&cloud, &id).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(cloud.host.processes(), vec![machine(&id)]);
}

/// An operator's word on the first host.
async fn declare(cloud: &Cloud, down: bool) {
    let host = cloud.host.id();
    let write = cloud
        .app
        .database()
        .write(move |tx| Box::pin(async move { host::set_forced_down(tx, host, down).await }));
    assert!(write.await.unwrap());
}

/// Its user may do that, as long as nobody has begun to fill it: it is an image of his.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_uploads_into_the_image_is_not_the_servers_disk() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    shelve(&cloud, &id).await;
    let image = images(&cloud).await.remove(0).row.id;
    let store = cloud.app.images();
    let mut intake = store
        .begin_filling(&image, "c.7", 3)
        .await
        .unwrap()
        .unwrap();
    intake.take(Bytes::from_static(b"no disk")).await.unwrap();
    let found = intake.finish().await.unwrap();
    assert!(store.end_filling(&image, "c.7", found, 3).await.unwrap());
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "ACTIVE").await;
    let why = failure(&cloud, &id, "shelve").await;
    assert_eq!(why, "somebody else has filled the image");
    assert_eq!(images(&cloud).await, vec![]);
    assert_eq!(cloud.host.disks(machine(&id)), 1);
}

/// The image is whole; what that host has of it goes when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_down_is_not_waited_for_to_let_go() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.host.set_stuck(true);
    shelve(&cloud, &id).await;
    let goes = |server: &Value| server["OS-EXT-STS:task_state"] == "shelving_offloading";
    cloud.until_is("one", &id, goes).await;
    declare(&cloud, true).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    assert_eq!(cloud.host.remains(), vec![machine(&id)]);
    let other = cloud.join(2).await;
    unshelve(&cloud, &id).await;
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(other.processes(), vec![machine(&id)]);
    assert_eq!(used(&cloud).await, [0, 256]);
    declare(&cloud, false).await;
    cloud.host.set_stuck(false);
    cloud.host.settle();
    assert_eq!(cloud.host.remains(), vec![]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_said_in_novas_words() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let refused = cloud.act("one", &id, "", json!({"unshelve": null})).await;
    let words = format!("Cannot 'unshelve' instance {id} while it is in vm_state active");
    assert_eq!((status(&refused), refused.message()), (409, words.as_str()));
    let offload = json!({"shelveOffload": null});
    let refused = cloud.act("admin", &id, "2.96", offload.clone()).await;
    let words = format!("Cannot 'shelveOffload' instance {id} while it is in vm_state active");
    assert_eq!((status(&refused), refused.message()), (409, words.as_str()));
    let refused = cloud.act("one", &id, "2.96", offload).await;
    assert_eq!(status(&refused), 403);
    let missing = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa";
    for action in ["shelve", "unshelve"] {
        let refused = cloud.act("one", missing, "", json!({ action: null })).await;
        let words = format!("Instance {missing} could not be found.");
        assert_eq!((status(&refused), refused.message()), (404, words.as_str()));
    }
    shelve(&cloud, &id).await;
    at_rest(&cloud, &id, "SHELVED_OFFLOADED").await;
    let refused = cloud.act("one", &id, "", json!({"shelve": {}})).await;
    let words = format!("Cannot 'shelve' instance {id} while it is in vm_state shelved_offloaded");
    assert_eq!((status(&refused), refused.message()), (409, words.as_str()));
    for (version, body, code) in [
        ("2.77", json!({}), 400),
        ("2.77", json!({"availability_zone": null}), 400),
        (
            "2.77",
            json!({"availability_zone": "nova", "host": "host-1"}),
            400,
        ),
        ("2.77", json!({"availability_zone": "moon"}), 400),
        ("2.91", json!({"availability_zone": "nova", "x": 1}), 400),
    ] {
        let refused = cloud
            .act("admin", &id, version, json!({ "unshelve": body }))
            .await;
        assert_eq!(status(&refused), code, "{version} {body}: {}", refused.json);
    }
    let nowhere = json!({"unshelve": {"host": "nowhere"}});
    let refused = cloud.act("admin", &id, "2.91", nowhere).await;
    let words = "Compute host nowhere could not be found.";
    assert_eq!((status(&refused), refused.message()), (400, words));
    // Before 2.77 nobody looks at what is in it.
    let old = json!({"unshelve": {"availability_zone": "moon"}});
    let asked = cloud.act("one", &id, "2.76", old).await;
    assert_eq!(status(&asked), 202, "{}", asked.json);
    at_rest(&cloud, &id, "ACTIVE").await;
    cloud.act("one", &id, "", json!({"lock": null})).await;
    let refused = cloud.act("one", &id, "", json!({"shelve": null})).await;
    let words = format!("Instance {id} is locked");
    assert_eq!((status(&refused), refused.message()), (409, words.as_str()));
}
