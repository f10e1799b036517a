//! What becomes of servers whose image is deleted, and of images that are made of servers.

use std::sync::Arc;

use fractus_agent_api::copy::CopyId;
use fractus_agent_api::machine::{StopReason, Wanted};
use futures::TryStreamExt;
use http::StatusCode;
use sea_orm::prelude::Uuid;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, DbErr, EntityTrait, QueryFilter, Set};
use serde_json::{Value, json};

use super::cloud::{Answer, Cloud, DISK, KERNEL, ONE, USER};
use super::machine;
use crate::clock::SystemClock;
use crate::compute::model::state::ServerState;
use crate::compute::ops::ServerObserver;
use crate::compute::store::server;
use crate::image::model::Image;
use crate::image::store::{self, image, property};
use crate::reconcile::{self, Observer};

/// As `DELETE /v2/images/{id}` leaves it.
async fn delete(cloud: &Cloud, ids: &'static [&'static str]) {
    let gone = cloud.app.database().write(move |tx| {
        Box::pin(async move {
            image::Entity::update_many()
                .col_expr(image::Column::DeletedAtUs, Expr::value(2_i64))
                .filter(image::Column::Id.is_in(ids.iter().copied()))
                .exec(tx)
                .await
        })
    });
    assert_eq!(gone.await.unwrap().rows_affected, ids.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_runs_on_without_its_image_and_cannot_be_made_anew_from_it() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    delete(&cloud, &[DISK, KERNEL]).await;
    for (action, status) in [
        (json!({"os-stop": null}), "SHUTOFF"),
        (json!({"os-start": null}), "ACTIVE"),
        (json!({"reboot": {"type": "HARD"}}), "ACTIVE"),
    ] {
        let done = cloud.act("one", &id, "2.96", action).await;
        assert_eq!(done.status, StatusCode::ACCEPTED, "{}", done.json);
        let server = cloud
            .until("one", &id, |server| server["status"] == status)
            .await;
        // Nova shows the image's id also when it is gone.
        assert_eq!(server["image"]["id"], DISK);
    }
    let rebuild = json!({"rebuild": {"imageRef": DISK}});
    let refused = cloud.act("one", &id, "2.96", rebuild).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.json);
    assert_eq!(refused.message(), "Cannot find image for rebuild");
    let server = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(server["image"]["id"], DISK);
}

fn taken(name: &str) -> Value {
    json!({"createImage": {"name": name, "metadata": {"purpose": "test"}}})
}

fn image_id(answer: &Answer) -> String {
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.json);
    answer.json["image_id"].as_str().unwrap().to_owned()
}

async fn find(cloud: &Cloud, id: &str) -> Option<Image> {
    store::find(cloud.app.database().reader(), id)
        .await
        .unwrap()
}

/// Until nothing is under way with the server; what it is then.
async fn at_rest(cloud: &Cloud, id: &str, status: &str) -> Value {
    cloud
        .until("one", id, |server| server["status"] == status)
        .await
}

/// Whether the server's last action of this name has failed.
async fn has_failed(cloud: &Cloud, id: &str) -> bool {
    let path = format!("/v2.1/servers/{id}/os-instance-actions");
    let actions = cloud.get("one", &path, "2.96").await.json["instanceActions"].clone();
    let actions = actions.as_array().unwrap().clone();
    let newest = actions.iter().find(|it| it["action"] == "createImage");
    newest.unwrap()["message"] == "Error"
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_server_is_there_at_once_and_has_its_disk_in_the_end() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    let answer = cloud.act("one", &id, "2.45", taken("shot")).await;
    let made = image_id(&answer);
    assert!(!answer.headers.contains_key("location"));
    let image = find(&cloud, &made).await.unwrap();
    assert_eq!(image.row.status, "queued");
    let path = format!("/v2.1/servers/{id}");
    let server = cloud.get("one", &path, "2.96").await.json["server"].clone();
    assert_eq!(server["status"], "ACTIVE");
    let task = server["OS-EXT-STS:task_state"].as_str().unwrap();
    assert!(task.starts_with("image_snapshot"), "{task}");
    // One at a time, and nothing else meanwhile.
    let again = cloud.act("one", &id, "2.45", taken("again")).await;
    assert_eq!(again.status, StatusCode::CONFLICT);
    let words = format!("Cannot 'createImage' instance {id} while it is in task_state image_");
    assert!(again.message().starts_with(&words), "{}", again.message());
    cloud.frozen.send_replace(false);

    at_rest(&cloud, &id, "ACTIVE").await;
    assert!(!has_failed(&cloud, &id).await);
    let image = find(&cloud, &made).await.unwrap();
    let row = &image.row;
    assert_eq!((row.status.as_str(), row.size), ("active", Some(1 << 20)));
    assert_eq!(row.name.as_deref(), Some("shot"));
    assert_eq!(row.disk_format.as_deref(), Some("raw"));
    assert_eq!(row.container_format.as_deref(), Some("bare"));
    assert_eq!((row.min_disk, row.visibility.as_str()), (1, "private"));
    assert_eq!(row.owner, ONE);
    for (name, value) in [
        ("base_image_ref", DISK),
        ("instance_uuid", &id),
        ("image_type", "snapshot"),
        ("user_id", USER),
        ("purpose", "test"),
        ("kernel_id", KERNEL),
    ] {
        assert_eq!(image.property(name), Some(value), "{name}");
    }
    let (size, bytes) = cloud
        .app
        .images()
        .open(made.parse().unwrap())
        .await
        .unwrap()
        .unwrap();
    let bytes: Vec<bytes::Bytes> = bytes.try_collect().await.unwrap();
    let bytes = bytes.concat();
    assert_eq!((size, bytes.len()), (1 << 20, 1 << 20));
    let content = format!("disk 1 of {id}");
    assert_eq!(&bytes[4096..4096 + content.len()], content.as_bytes());
    assert!(bytes[..4096].iter().all(|byte| *byte == 0));
    let hash = blake3::hash(&bytes).to_hex().to_string();
    assert_eq!(row.blake3.as_deref(), Some(hash.as_str()));
    assert_eq!(cloud.host.copied(machine(&id)), None);
    // And another server can be made of it.
    let body = json!({"server": {
        "name": "two", "imageRef": made, "flavorRef": "1", "networks": "none",
    }});
    let other = cloud
        .call("one", http::Method::POST, "/v2.1/servers", "2.96", body)
        .await;
    assert_eq!(other.status, StatusCode::ACCEPTED, "{}", other.json);
}

#[tokio::test(flavor = "multi_thread")]
async fn before_2_45_its_address_is_told_instead() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    for (action, status) in [
        (json!({"os-stop": null}), "SHUTOFF"),
        (json!({"os-start": null}), "ACTIVE"),
        (json!({"suspend": null}), "SUSPENDED"),
    ] {
        cloud.act("one", &id, "", action).await;
        at_rest(&cloud, &id, status).await;
        let answer = cloud.act("one", &id, "", taken("shot")).await;
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.json);
        assert_eq!(answer.json, Value::Null);
        let location = answer.headers["location"].to_str().unwrap();
        let (at, made) = location.rsplit_once('/').unwrap();
        assert_eq!(at, "http://cloud:5000/image/images");
        at_rest(&cloud, &id, status).await;
        let image = find(&cloud, made).await.unwrap();
        assert_eq!(image.row.status, "active");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_made_is_gone_and_the_server_is_as_before() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.host.set_full(true);
    let made = image_id(&cloud.act("one", &id, "2.96", taken("shot")).await);
    at_rest(&cloud, &id, "ACTIVE").await;
    assert!(has_failed(&cloud, &id).await);
    assert_eq!(find(&cloud, &made).await, None);
    cloud.host.set_full(false);

    // Its user deletes the image meanwhile.
    cloud.frozen.send_replace(true);
    let made = image_id(&cloud.act("one", &id, "2.96", taken("shot")).await);
    let gone = made.clone();
    let images = cloud.app.images().clone();
    images.discard(&gone, 3).await.unwrap();
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "ACTIVE").await;
    assert!(has_failed(&cloud, &id).await);
    assert_eq!(cloud.host.copied(machine(&id)), None);

    // It goes with a server that is deleted meanwhile.
    cloud.frozen.send_replace(true);
    let made = image_id(&cloud.act("one", &id, "2.96", taken("shot")).await);
    let deleted = cloud
        .act("one", &id, "", json!({"forceDelete": null}))
        .await;
    assert_eq!(deleted.status, StatusCode::ACCEPTED);
    cloud.frozen.send_replace(false);
    cloud.until_gone("one", &id).await;
    assert_eq!(find(&cloud, &made).await, None);
    assert_eq!(cloud.host.remains(), vec![]);
    assert_eq!(cloud.host.copied(machine(&id)), None::<CopyId>);
}

/// As the server's row and its machine's stand.
async fn write_machine(cloud: &Cloud, id: &str, state: Option<ServerState>, copy: Option<CopyId>) {
    let id = id.to_owned();
    let written = cloud.app.database().write(move |tx| {
        let id = id.clone();
        Box::pin(async move {
            if let Some(state) = state {
                let change = server::ActiveModel {
                    state: Set(state.key()),
                    ..Default::default()
                };
                server::update(tx, &id, change).await?;
            }
            if let Some(copy) = copy {
                let change = |wanted: &mut Wanted| wanted.have_copy(copy);
                reconcile::machine::change(tx, machine(&id), None, 1, change).await?;
            }
            Ok::<_, DbErr>(())
        })
    });
    written.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_at_a_time_whatever_the_servers_state_says() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let copy = CopyId(Uuid::from_u128(7));
    write_machine(&cloud, &id, None, Some(copy)).await;
    let again = cloud.act("one", &id, "2.45", taken("again")).await;
    assert_eq!(again.status, StatusCode::CONFLICT);
    let words = "an image of the server is being made";
    assert!(again.message().contains(words), "{}", again.message());
    // What is left of one that got stuck goes with a hard reboot.
    let reboot = json!({"reboot": {"type": "HARD"}});
    let rebooted = cloud.act("one", &id, "", reboot).await;
    assert_eq!(rebooted.status, StatusCode::ACCEPTED, "{}", rebooted.json);
    at_rest(&cloud, &id, "ACTIVE").await;
    let wanted = cloud.host.wanted(machine(&id)).unwrap();
    assert_eq!((wanted.copy, wanted.copies), (None, 1));
    assert_eq!(cloud.host.copied(machine(&id)), None);
    image_id(&cloud.act("one", &id, "2.45", taken("again")).await);
    at_rest(&cloud, &id, "ACTIVE").await;
    assert!(!has_failed(&cloud, &id).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_server_that_is_rebuilt_meanwhile_there_is_no_image() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    let made = image_id(&cloud.act("one", &id, "2.45", taken("shot")).await);
    // Whatever has brought that about.
    write_machine(&cloud, &id, Some(ServerState::Active), None).await;
    let rebuild = json!({"rebuild": {"imageRef": DISK}});
    let rebuilt = cloud.act("one", &id, "2.96", rebuild).await;
    assert_eq!(rebuilt.status, StatusCode::ACCEPTED, "{}", rebuilt.json);
    cloud.frozen.send_replace(false);
    at_rest(&cloud, &id, "ACTIVE").await;
    assert_eq!(find(&cloud, &made).await, None);
    assert_eq!(cloud.host.wanted(machine(&id)).unwrap().copy, None);
    assert_eq!(cloud.host.copied(machine(&id)), None);
    assert!(has_failed(&cloud, &id).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_guest_does_meanwhile_is_what_the_server_is_in_the_end() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let detail = "rip".to_owned();
    for (reason, status) in [
        (StopReason::GuestPowerOff, "SHUTOFF"),
        (StopReason::TripleFault { detail }, "ERROR"),
    ] {
        cloud.frozen.send_replace(true);
        let made = image_id(&cloud.act("one", &id, "2.45", taken("shot")).await);
        // The reconciler may hear of it first: an image is made all the same.
        let observer = ServerObserver::new(SystemClock::shared());
        let (observer, said) = (Arc::new(observer), reason.clone());
        let server = machine(&id);
        let seen = cloud.app.database().write(move |tx| {
            let (observer, said) = (Arc::clone(&observer), said.clone());
            Box::pin(async move { observer.stopped(tx, server, &said).await })
        });
        seen.await.unwrap();
        let path = format!("/v2.1/servers/{id}");
        let shown = cloud.get("one", &path, "2.96").await.json["server"].clone();
        assert_eq!(shown["status"], status);
        let task = shown["OS-EXT-STS:task_state"].as_str().unwrap();
        assert!(task.starts_with("image_"), "{task}");
        assert!(cloud.host.end_process(server, reason));
        cloud.frozen.send_replace(false);
        let shown = at_rest(&cloud, &id, status).await;
        assert_eq!(shown["fault"].is_object(), status == "ERROR");
        assert_eq!(find(&cloud, &made).await.unwrap().row.status, "active");
        let reboot = json!({"reboot": {"type": "HARD"}});
        cloud.act("one", &id, "", reboot).await;
        at_rest(&cloud, &id, "ACTIVE").await;
    }

    cloud.frozen.send_replace(true);
    image_id(&cloud.act("one", &id, "2.45", taken("shot")).await);
    assert!(cloud.host.pause_by_watchdog(machine(&id)));
    cloud.frozen.send_replace(false);
    // The first state that it comes to rest in.
    let shown = cloud.until("one", &id, |_| true).await;
    assert_eq!(shown["status"], "PAUSED");
}

async fn set_property(cloud: &Cloud, image: &str, name: &str, value: &str) {
    let row = property::ActiveModel {
        image_id: Set(image.to_owned()),
        name: Set(name.to_owned()),
        value: Set(value.to_owned()),
    };
    let written = cloud.app.database().write(move |tx| {
        let row = row.clone();
        Box::pin(async move {
            property::Entity::insert(row)
                .exec_without_returning(tx)
                .await
        })
    });
    written.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn how_it_boots_is_what_the_server_says_and_not_what_its_image_says_since() {
    const PLAIN: &str = "0a11ce00-0000-4000-8000-0000000000f1";
    let cloud = Cloud::new().await;
    cloud.image(PLAIN, "raw", &[("os_distro", "debian")]).await;
    let body = json!({"server": {
        "name": "web", "imageRef": PLAIN, "flavorRef": "1", "networks": "none",
    }});
    let path = "/v2.1/servers";
    let made = cloud.call("one", http::Method::POST, path, "2.96", body);
    let made = made.await;
    let id = made.json["server"]["id"].as_str().unwrap().to_owned();
    at_rest(&cloud, &id, "ACTIVE").await;
    for name in ["kernel_id", "ramdisk_id", "os_command_line"] {
        set_property(&cloud, PLAIN, name, KERNEL).await;
    }
    let made = image_id(&cloud.act("one", &id, "2.96", taken("shot")).await);
    let image = find(&cloud, &made).await.unwrap();
    assert_eq!(image.property("os_distro"), Some("debian"));
    for name in ["kernel_id", "ramdisk_id", "os_command_line"] {
        assert_eq!(image.property(name), None, "{name}");
    }
    at_rest(&cloud, &id, "ACTIVE").await;
    // With its own it would have too many.
    for n in 0..124 {
        set_property(&cloud, PLAIN, &format!("k{n}"), "v").await;
    }
    let refused = cloud.act("one", &id, "2.96", taken("shot")).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN, "{}", refused.json);
    assert_eq!(refused.message(), "Image metadata limit exceeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_another_projects_server_is_shared_with_that_project() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let made = image_id(&cloud.act("admin", &id, "2.96", taken("shot")).await);
    let image = find(&cloud, &made).await.unwrap();
    assert_eq!(image.row.visibility, "shared");
    assert_ne!(image.row.owner, ONE);
    assert_eq!(image.property("instance_owner"), None);
    let member = store::find_member(cloud.app.database().reader(), &made, ONE).await;
    assert_eq!(member.unwrap().unwrap().status, "pending");
    at_rest(&cloud, &id, "ACTIVE").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_said_in_novas_words() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let pairs: serde_json::Map<String, Value> =
        (0..129).map(|n| (format!("k{n}"), json!("v"))).collect();
    for (given, status, words) in [
        (json!({}), 400, "'name' is a required property"),
        (json!({"name": ""}), 400, "name"),
        (json!({"name": "x", "rotation": 1}), 400, "rotation"),
        (
            json!({"name": "x", "metadata": {"": ""}}),
            400,
            "Invalid input for field/attribute metadata. Value: {'': ''}. '' does not match any of the regexes: \
             '^[a-zA-Z0-9-_:. ]{1,255}$'",
        ),
        (json!({"name": "x", "metadata": {"size": "1"}}), 400, "size"),
        (
            json!({"name": "x", "metadata": {"min_disk": "1"}}),
            400,
            "min_disk",
        ),
        (
            json!({"name": "x", "metadata": pairs}),
            403,
            "Image metadata limit exceeded",
        ),
    ] {
        let refused = cloud
            .act("one", &id, "2.96", json!({"createImage": given}))
            .await;
        assert_eq!(refused.status.as_u16(), status, "{}", refused.json);
        assert!(refused.message().contains(words), "{}", refused.message());
    }
    let missing = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    let refused = cloud.act("one", missing, "", taken("x")).await;
    assert_eq!(refused.status, StatusCode::NOT_FOUND);
    let words = format!("Instance {missing} could not be found.");
    assert_eq!(refused.message(), words);
    // A lock is no reason: the server is not changed.
    cloud.act("one", &id, "", json!({"lock": null})).await;
    image_id(&cloud.act("one", &id, "2.96", taken("locked")).await);
    at_rest(&cloud, &id, "ACTIVE").await;
}
