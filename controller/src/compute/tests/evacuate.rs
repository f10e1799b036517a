//! Servers whose host was declared to be down, and that are made anew on another.

use std::sync::Arc;

use fractus_agent_api::machine::{Observed, Power};

use super::*;
use crate::agents::host;
use crate::agents::simulated::SimulatedHost;
use crate::event;
use crate::image::store::image;
use crate::reconcile::machine as machines;

/// As `openstack compute service set --down` says it.
async fn declare(cloud: &Cloud, host: &SimulatedHost, down: bool) {
    let path = format!("/v2.1/os-services/{}", host.id());
    let body = json!({ "forced_down": down });
    let set = cloud.call("admin", Method::PUT, &path, "2.96", body).await;
    assert_eq!(status(&set), 200, "{}", set.json);
}

async fn evacuate(cloud: &Cloud, id: &str, version: &str, given: Value) -> Answer {
    let body = json!({ "evacuate": given });
    cloud.act("admin", id, version, body).await
}

async fn used(cloud: &Cloud) -> Vec<i64> {
    let rows = host::all(cloud.app.database().reader()).await.unwrap();
    rows.iter().map(|row| row.memory_mib_used).collect()
}

/// A server on host-1, which has lost its power, and another host.
async fn lost(name: &str) -> (Cloud, String, Arc<SimulatedHost>) {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", name).await;
    let other = cloud.join(2).await;
    cloud.host.power_off();
    cloud.was_heard_last_minute(&cloud.host).await;
    (cloud, id, other)
}

/// The host's agent says something; what is pumped otherwise after a change.
fn speaks(cloud: &Cloud) {
    cloud.frozen.send_replace(false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_made_anew_with_all_but_what_was_on_its_disk() {
    let (cloud, id, other) = lost("web").await;
    let before = cloud.host.wanted(machine(&id)).unwrap();
    declare(&cloud, &cloud.host, true).await;
    let shown = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    cloud.frozen.send_replace(true);
    let asked = evacuate(&cloud, &id, "2.94", json!({})).await;
    assert_eq!((status(&asked), &asked.json), (200, &Value::Null));
    let path = format!("/v2.1/servers/{id}");
    let now = cloud.get("admin", &path, "2.96").await.json["server"].clone();
    assert_eq!(now["status"], "REBUILD");
    assert_eq!(now["OS-EXT-STS:task_state"], "rebuilding");
    assert_eq!(now["OS-EXT-STS:vm_state"], "active");
    cloud.frozen.send_replace(false);
    let now = cloud
        .until("admin", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(now["OS-EXT-SRV-ATTR:host"], "host-2");
    for same in ["id", "name", "image", "metadata", "config_drive", "flavor"] {
        assert_eq!(now[same], shown[same], "{same}");
    }
    assert_eq!(other.processes(), [machine(&id)]);
    assert_eq!(other.disks(machine(&id)), 1);
    let wanted = other.wanted(machine(&id)).unwrap();
    assert_eq!(wanted.rebuilds, before.rebuilds + 1);
    assert_eq!(wanted.spec, before.spec, "password and all");
    assert_eq!(used(&cloud).await, [0, 256]);
    let migration = cloud.until_migration(&id, "done").await;
    assert_eq!(migration["source_compute"], "host-1");
    assert_eq!(migration["dest_compute"], "host-2");
    let path = format!("/v2.1/servers/{id}/os-instance-actions");
    let actions = cloud.get("admin", &path, "2.96").await.json;
    assert_eq!(actions["instanceActions"][0]["action"], "evacuate");
    let path = format!("/v2.1/servers/{id}/migrations");
    let none = cloud.get("admin", &path, "2.96").await.json;
    assert_eq!(none, json!({"migrations": []}));

    // The old host has power again; it starts nothing, and drops what it has.
    cloud.host.reboot(Uuid::from_u128(0xb2));
    let waits = cloud.host.report(machine(&id)).unwrap();
    assert!(waits.waits, "{waits:?}");
    speaks(&cloud);
    is_gone(&cloud, &id).await;
    assert_eq!(cloud.host.report(machine(&id)).unwrap().starts, 1);
    assert_eq!(other.processes(), [machine(&id)]);
}

async fn is_gone(cloud: &Cloud, id: &str) {
    let patience = std::time::Duration::from_secs(30);
    let waited = tokio::time::timeout(patience, async {
        while !cloud.host.remains().is_empty() {
            // sleeps because a host tells nobody that it has removed a machine which it does not own.
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{:?}", cloud.host.report(machine(id)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_off_stays_off_and_from_2_95_on_all_do() {
    let (cloud, id, other) = lost("web").await;
    declare(&cloud, &cloud.host, true).await;
    let asked = evacuate(&cloud, &id, "2.95", json!({"host": "host-2"})).await;
    assert_eq!(status(&asked), 200, "{}", asked.json);
    let off = |server: &Value| server["status"] == "SHUTOFF";
    cloud.until("one", &id, off).await;
    let report = other.report(machine(&id)).unwrap();
    assert!(matches!(report.observed, Observed::Stopped { .. }));
    assert_eq!(
        (report.rebuilds, report.starts, other.disks(machine(&id))),
        (1, 0, 1)
    );
    // And back again, as it is.
    other.power_off();
    cloud.was_heard_last_minute(&other).await;
    declare(&cloud, &other, true).await;
    cloud.host.reboot(Uuid::from_u128(0xb2));
    declare(&cloud, &cloud.host, false).await;
    speaks(&cloud);
    let asked = evacuate(&cloud, &id, "2.94", json!({"host": "host-1"})).await;
    assert_eq!(status(&asked), 200, "{}", asked.json);
    let back = |server: &Value| off(server) && server["OS-EXT-SRV-ATTR:host"] == "host-1";
    cloud.until("admin", &id, back).await;
    assert_eq!(cloud.host.processes(), []);
    assert_eq!(
        cloud.host.disks(machine(&id)),
        2,
        "made anew, for all that it had one"
    );
    assert_eq!(used(&cloud).await, [256, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn before_2_14_there_is_a_new_password_and_the_answer_says_which() {
    let (cloud, id, other) = lost("web").await;
    declare(&cloud, &cloud.host, true).await;
    let told = |host: &SimulatedHost| {
        let wanted = host.wanted(machine(&id)).unwrap();
        wanted.spec.guest.instance.unwrap().admin_pass
    };
    let before = told(&cloud.host);
    let given = json!({"onSharedStorage": false, "host": "host-2"});
    let asked = evacuate(&cloud, &id, "2.13", given).await;
    let password = asked.json["adminPass"].as_str().unwrap_or_default();
    assert_eq!(
        (status(&asked), password.len()),
        (200, 12),
        "{}",
        asked.json
    );
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_ne!(told(&other), before);
    assert_eq!(told(&other).as_deref(), Some(password));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_under_way_is_given_up() {
    for body in [
        json!({"createImage": {"name": "of-it"}}),
        json!({"shelve": null}),
        json!({"os-stop": null}),
        json!({"reboot": {"type": "SOFT"}}),
        json!({"suspend": null}),
        json!({"rebuild": {"imageRef": DISK}}),
    ] {
        let cloud = Cloud::new().await;
        let id = cloud.running("one", "web").await;
        let other = cloud.join(2).await;
        cloud.frozen.send_replace(true);
        let begun = cloud.act("one", &id, "", body.clone()).await;
        assert_eq!(status(&begun), 202, "{}", begun.json);
        cloud.host.power_off();
        cloud.was_heard_last_minute(&cloud.host).await;
        declare(&cloud, &cloud.host, true).await;
        let mut asked = evacuate(&cloud, &id, "2.94", json!({})).await;
        // What is under way may write between the look and the write, which the answer says.
        for _ in 0..9 {
            let text = asked.json["conflictingRequest"]["message"].as_str();
            if text.is_some_and(|text| text.contains("at the same time")) {
                asked = evacuate(&cloud, &id, "2.94", json!({})).await;
            }
        }
        assert_eq!(status(&asked), 200, "{body}: {}", asked.json);
        cloud.frozen.send_replace(false);
        let wanted = if body.get("os-stop").is_some() {
            "SHUTOFF"
        } else {
            "ACTIVE"
        };
        // What was to be shelved was to be stopped for it.
        let wanted = if body.get("shelve").is_some() {
            "ACTIVE"
        } else {
            wanted
        };
        let there = |server: &Value| {
            server["status"] == wanted && server["OS-EXT-SRV-ATTR:host"] == "host-2"
        };
        cloud.until("admin", &id, there).await;
        let told = other.wanted(machine(&id)).unwrap();
        assert_eq!(
            (told.copy, told.power == Power::Stopped),
            (None, wanted == "SHUTOFF"),
            "{body}"
        );
        use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
        let left = image::Entity::find()
            .filter(image::Column::DeletedAtUs.is_null())
            .filter(image::Column::Name.is_in(["of-it", "web-shelved"]))
            .all(cloud.app.database().reader());
        assert_eq!(left.await.unwrap(), [], "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_administrators_word_that_the_host_is_down_moves_a_server() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.join(2).await;
    let refused = evacuate(&cloud, &id, "2.96", json!({})).await;
    let words = "Compute service of host-1 is still in use.";
    assert_eq!((status(&refused), refused.message()), (400, words));
    let body = json!({"evacuate": {}});
    let refused = cloud.act("one", &id, "2.96", body).await;
    assert_eq!(status(&refused), 403);
    // One that nobody has heard for long.
    let silent = host::row::Model {
        heard_at_us: 0,
        ..host::find(cloud.app.database().reader(), cloud.host.id())
            .await
            .unwrap()
            .unwrap()
    };
    let silent = host::row::Model {
        id: Uuid::from_u128(9).to_string(),
        hostname: "host-9".to_owned(),
        ..silent
    };
    let server = machine(&id);
    let write = cloud.app.database().write(move |tx| {
        let silent = silent.clone();
        Box::pin(async move {
            use sea_orm::{ActiveModelTrait, EntityTrait, IntoActiveModel};
            let to = silent.host_id();
            host::row::Entity::insert(silent.into_active_model().reset_all())
                .exec_without_returning(tx)
                .await?;
            let known = machines::find(tx, server).await?.unwrap();
            machines::move_owner(tx, &known, to, &known.wanted, 1).await
        })
    });
    assert!(write.await.unwrap());
    let refused = evacuate(&cloud, &id, "2.96", json!({})).await;
    let words = "may still be in use: its servers may run";
    assert_eq!(status(&refused), 400);
    assert!(refused.message().contains(words), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_said_in_novas_words() {
    let (cloud, id, _) = lost("web").await;
    declare(&cloud, &cloud.host, true).await;
    let shared = "admin password can't be changed on existing disk";
    for (version, given, code, words) in [
        (
            "2.96",
            json!({"host": "host-1"}),
            400,
            "The target host can't be the same one.",
        ),
        (
            "2.96",
            json!({"host": "nowhere"}),
            404,
            "Compute host nowhere not found.",
        ),
        (
            "2.29",
            json!({"force": true}),
            400,
            "Can't force to a non-provided destination",
        ),
        (
            "2.13",
            json!({"onSharedStorage": true, "adminPass": "x"}),
            400,
            shared,
        ),
    ] {
        let refused = evacuate(&cloud, &id, version, given.clone()).await;
        assert_eq!(
            (status(&refused), refused.message()),
            (code, words),
            "{given}"
        );
    }
    for (version, given) in [
        ("2.13", json!({})),
        ("2.14", json!({"onSharedStorage": false})),
        ("2.28", json!({"force": false})),
        ("2.68", json!({"host": "host-2", "force": false})),
        ("2.96", json!({"host": ""})),
        ("2.96", json!({"host": null})),
        ("2.13", json!({"onSharedStorage": true})),
    ] {
        let refused = evacuate(&cloud, &id, version, given.clone()).await;
        assert_eq!(status(&refused), 400, "{version} {given}: {}", refused.json);
    }
    let missing = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa";
    let refused = evacuate(&cloud, missing, "2.96", json!({})).await;
    let words = format!("Instance {missing} could not be found.");
    assert_eq!((status(&refused), refused.message()), (404, words.as_str()));
    // The image that it would be made of is gone.
    cloud.app.images().remove(DISK, 3).await.unwrap();
    let refused = evacuate(&cloud, &id, "2.96", json!({})).await;
    let words = format!("Image {DISK} could not be found.");
    assert_eq!((status(&refused), refused.message()), (400, words.as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_host_has_room_the_server_is_as_it_was_and_says_why() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.host.power_off();
    cloud.was_heard_last_minute(&cloud.host).await;
    declare(&cloud, &cloud.host, true).await;
    let asked = evacuate(&cloud, &id, "2.94", json!({})).await;
    assert_eq!(status(&asked), 200, "{}", asked.json);
    cloud.until_migration(&id, "error").await;
    let shown = cloud
        .until("admin", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-1");
    let events = event::of_subject(cloud.app.database().reader(), &id).await;
    let failed = events
        .unwrap()
        .into_iter()
        .rfind(|event| event.phase == "failed");
    let why = failed.and_then(|event| event.message).unwrap_or_default();
    assert!(why.starts_with("No valid host was found."), "{why}");
    assert_eq!(used(&cloud).await, [256]);
    // Its host has power again after all.
    declare(&cloud, &cloud.host, false).await;
    cloud.host.reboot(Uuid::from_u128(0xb2));
    speaks(&cloud);
    let patience = std::time::Duration::from_secs(30);
    let waited = tokio::time::timeout(patience, async {
        while cloud.host.processes().is_empty() {
            // sleeps because the row says nothing of it: the server was ACTIVE, and is.
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    assert!(
        waited.await.is_ok(),
        "{:?}",
        cloud.host.report(machine(&id))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_back_starts_its_guests_once_it_is_declared_to_be_up() {
    let (cloud, id, _) = lost("web").await;
    declare(&cloud, &cloud.host, true).await;
    cloud.host.reboot(Uuid::from_u128(0xb2));
    speaks(&cloud);
    // It is heard, and nobody says that the server is still its own.
    let known = |cloud: &Cloud| {
        let fleet = cloud.app.compute().machines.fleet();
        fleet
            .machine(cloud.host.id(), machine(&id))
            .is_some_and(|said| said.waits)
    };
    let patience = std::time::Duration::from_secs(30);
    let waited = tokio::time::timeout(patience, async {
        while !known(&cloud) {
            // sleeps because what is heard is in memory only.
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok());
    cloud.look(&id).await;
    assert_eq!(cloud.host.processes(), []);
    declare(&cloud, &cloud.host, false).await;
    cloud.look(&id).await;
    assert!(!cloud.host.report(machine(&id)).unwrap().waits);
}

/// The image that brought its disk is gone: it is made of the one that the server was made of.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_unshelved_or_migrated_is_made_of_its_own_image() {
    for way in ["shelve", "migrate"] {
        let cloud = Cloud::new().await;
        let id = cloud.running("one", "web").await;
        let other = cloud.join(2).await;
        let act = async |who: &str, body: Value| {
            let answer = cloud.act(who, &id, "2.96", body).await;
            assert!((200..300).contains(&status(&answer)), "{}", answer.json);
        };
        let rests = async |wanted: &str| {
            let rests = |server: &Value| {
                server["status"] == wanted && server["OS-EXT-STS:task_state"].is_null()
            };
            cloud.until("admin", &id, rests).await
        };
        let now = if way == "shelve" {
            act("one", json!({"shelve": null})).await;
            rests("SHELVED_OFFLOADED").await;
            act("admin", json!({"unshelve": {"host": "host-2"}})).await;
            rests("ACTIVE").await
        } else {
            act("admin", json!({"migrate": {"host": "host-2"}})).await;
            rests("VERIFY_RESIZE").await;
            act("one", json!({"confirmResize": null})).await;
            rests("ACTIVE").await
        };
        assert_eq!(now["OS-EXT-SRV-ATTR:host"], "host-2");
        other.power_off();
        cloud.was_heard_last_minute(&other).await;
        declare(&cloud, &other, true).await;
        let asked = evacuate(&cloud, &id, "2.94", json!({})).await;
        assert_eq!(status(&asked), 200, "{way}: {}", asked.json);
        let there = |server: &Value| {
            server["status"] == "ACTIVE" && server["OS-EXT-SRV-ATTR:host"] == "host-1"
        };
        cloud.until("admin", &id, there).await;
        let told = cloud.host.wanted(machine(&id)).unwrap();
        let image = told.spec.root_disk.unwrap().image.unwrap();
        assert_eq!(image.id.to_string(), DISK, "{way}");
    }
}

/// What a resize could go back to is not lost unasked.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_could_go_back_is_not_made_anew() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    let migrated = cloud
        .act("admin", &id, "2.96", json!({"migrate": null}))
        .await;
    assert_eq!(status(&migrated), 202);
    let waits = |server: &Value| server["status"] == "VERIFY_RESIZE";
    cloud.until("admin", &id, waits).await;
    other.power_off();
    cloud.was_heard_last_minute(&other).await;
    declare(&cloud, &other, true).await;
    let refused = evacuate(&cloud, &id, "2.96", json!({})).await;
    let words = format!("Cannot 'evacuate' instance {id} while it is in vm_state resized");
    assert_eq!((status(&refused), refused.message()), (409, words.as_str()));
    // An administrator's reset does not part with it either, while its owner is away.
    for state in ["error", "active"] {
        let reset = json!({"os-resetState": {"state": state}});
        assert_eq!(status(&cloud.act("admin", &id, "2.96", reset).await), 202);
        if state == "error" {
            let refused = evacuate(&cloud, &id, "2.96", json!({})).await;
            assert_eq!(status(&refused), 409, "{}", refused.json);
            assert!(
                refused.message().contains("may be had back"),
                "{}",
                refused.json
            );
        }
    }
    cloud.until("admin", &id, waits).await;
    let back = cloud
        .act("one", &id, "2.96", json!({"revertResize": null}))
        .await;
    assert_eq!(status(&back), 202, "{}", back.json);
    let there =
        |server: &Value| server["status"] == "ACTIVE" && server["OS-EXT-SRV-ATTR:host"] == "host-1";
    cloud.until("admin", &id, there).await;
    assert_eq!(cloud.host.disks(machine(&id)), 1);
}

/// It was resized where it is, and its host is lost with all that it could go back to.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_resized_on_a_host_that_is_lost_is_made_anew_in_its_new_size() {
    let cloud = super::resize::furnished().await;
    let id = cloud.running("one", "web").await;
    let resized = cloud.act("one", &id, "2.96", super::resize::resize()).await;
    assert_eq!(status(&resized), 202, "{}", resized.json);
    let waits = |server: &Value| server["status"] == "VERIFY_RESIZE";
    cloud.until("admin", &id, waits).await;
    let other = cloud.join(2).await;
    cloud.host.power_off();
    cloud.was_heard_last_minute(&cloud.host).await;
    declare(&cloud, &cloud.host, true).await;
    for verdict in ["confirmResize", "revertResize"] {
        let refused = cloud
            .act("one", &id, "2.96", json!({ verdict: null }))
            .await;
        assert_eq!(status(&refused), 409, "{}", refused.json);
    }
    let reset = json!({"os-resetState": {"state": "error"}});
    assert_eq!(status(&cloud.act("admin", &id, "2.96", reset).await), 202);
    let asked = evacuate(&cloud, &id, "2.94", json!({})).await;
    assert_eq!(status(&asked), 200, "{}", asked.json);
    let there =
        |server: &Value| server["status"] == "ACTIVE" && server["OS-EXT-SRV-ATTR:host"] == "host-2";
    let shown = cloud.until("admin", &id, there).await;
    assert_eq!(shown["flavor"]["original_name"], "larger");
    let wanted = other.wanted(machine(&id)).unwrap();
    assert_eq!(
        (wanted.spec.memory_mib, wanted.copy, wanted.restores),
        (512, None, None)
    );
    assert_eq!(used(&cloud).await, [0, 512]);
    cloud.until_migration(&id, "done").await;
}
