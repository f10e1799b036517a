//! What a guest is told of its server, and how image and flavor have it treated.

use fractus_agent_api::guest::{GuestOptions, Watchdog};
use fractus_agent_api::machine::{Power, StopReason};

use sea_orm::EntityTrait;

use super::*;

/// How the guest of a server is to be treated, by what its host is told.
async fn guest(cloud: &Cloud, id: &str) -> GuestOptions {
    let row = crate::reconcile::machine::find(cloud.app.database().reader(), machine(id)).await;
    row.unwrap().unwrap().wanted.spec.guest
}

async fn post(cloud: &Cloud, version: &str, server: Value) -> Answer {
    let body = json!({"server": server});
    let path = "/v2.1/servers";
    cloud.call("one", Method::POST, path, version, body).await
}

fn asked(name: &str) -> Value {
    json!({"name": name, "imageRef": DISK, "flavorRef": "1", "networks": "none"})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_told_its_name_key_user_data_and_metadata() {
    let cloud = Cloud::new().await;
    let public_key =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGaYhl2v0GcPUE2Nd8pQxr7VfQd8e1bGq2dYm4b3kD5c me";
    let key = json!({"keypair": {"name": "mine", "public_key": public_key}});
    let made = cloud
        .call("one", Method::POST, "/v2.1/os-keypairs", "", key)
        .await;
    assert_eq!(status(&made), 200, "{}", made.json);
    let mut server = asked("Web One");
    server["key_name"] = json!("mine");
    server["user_data"] = json!("IyEvYmluL3No");
    server["metadata"] = json!({"role": "web"});
    let made = post(&cloud, "2.96", server).await;
    assert_eq!(status(&made), 202, "{}", made.json);
    let id = made.json["server"]["id"].as_str().unwrap().to_owned();
    let shown = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    // It has a drive though none was asked for, and shows so.
    assert_eq!(shown["config_drive"], "True");

    let instance = guest(&cloud, &id).await.instance.unwrap();
    let told = json!(instance.meta_data);
    assert_eq!(told["uuid"], json!(id));
    assert_eq!(told["hostname"], "web-one.novalocal");
    assert_eq!(told["name"], "Web One");
    assert_eq!(told["project_id"], ONE);
    assert_eq!(told["availability_zone"], "nova");
    assert_eq!(told["meta"], json!({"role": "web"}));
    assert_eq!(told["public_keys"], json!({"mine": public_key}));
    assert_eq!(told["keys"][0]["type"], "ssh");
    assert_eq!(instance.user_data.as_deref(), Some("IyEvYmluL3No"));
    assert_eq!(instance.ec2["public-keys"]["0"]["openssh-key"], public_key);
    assert_eq!(instance.ec2["instance-type"], "tiny");

    // What has changed is told at the next hard reboot; a key that its user has deleted stays.
    let metadata = json!({"metadata": {"role": "db"}});
    let path = format!("/v2.1/servers/{id}/metadata");
    cloud.call("one", Method::PUT, &path, "", metadata).await;
    let gone = cloud.call(
        "one",
        Method::DELETE,
        "/v2.1/os-keypairs/mine",
        "",
        Value::Null,
    );
    assert_eq!(status(&gone.await), 202);
    let instance = guest(&cloud, &id).await.instance.unwrap();
    assert_eq!(instance.meta_data["meta"]["role"], "web");
    let reboot = json!({"reboot": {"type": "HARD"}});
    assert_eq!(status(&cloud.act("one", &id, "", reboot).await), 202);
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    let instance = guest(&cloud, &id).await.instance.unwrap();
    assert_eq!(instance.meta_data["meta"]["role"], "db");
    assert_eq!(instance.meta_data["public_keys"]["mine"], public_key);

    // Nor is its owner locked out of a disk made anew, unless they want no key.
    for (version, asked, keeps) in [
        ("2.96", json!({"imageRef": DISK}), true),
        ("2.96", json!({"imageRef": DISK, "key_name": null}), false),
    ] {
        let rebuilt = cloud.act("one", &id, version, json!({"rebuild": asked}));
        assert_eq!(status(&rebuilt.await), 202);
        cloud
            .until("one", &id, |server| server["status"] == "ACTIVE")
            .await;
        let instance = guest(&cloud, &id).await.instance.unwrap();
        let kept = instance.meta_data.contains_key("public_keys");
        assert_eq!(
            (kept, instance.ec2.get("public-keys").is_some()),
            (keeps, keeps)
        );
    }
}

/// Neither password nor user data outlive the server, in no row and on no host.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_was_told_goes_with_its_server() {
    let cloud = Cloud::new().await;
    let mut server = asked("web");
    server["user_data"] = json!("c2VjcmV0");
    let made = post(&cloud, "2.96", server).await;
    let id = made.json["server"]["id"].as_str().unwrap().to_owned();
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    let reader = cloud.app.database().reader();
    let operations = crate::operation::row::Entity::find()
        .all(reader)
        .await
        .unwrap();
    assert!(!operations.is_empty());
    assert!(
        operations
            .iter()
            .all(|operation| !operation.state.contains("c2VjcmV0"))
    );
    assert!(guest(&cloud, &id).await.instance.is_some());
    let path = format!("/v2.1/servers/{id}");
    cloud
        .call("one", Method::DELETE, &path, "", Value::Null)
        .await;
    cloud.until_gone("one", &id).await;
    assert_eq!(guest(&cloud, &id).await.instance, None);
    let told = cloud.host.wanted(machine(&id)).unwrap();
    assert_eq!(
        (told.power, told.spec.guest.instance),
        (Power::Absent, None)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_password_of_the_answer_is_the_guests_and_lies_sealed_in_the_database() {
    let cloud = Cloud::new().await;
    let mut server = asked("web");
    server["adminPass"] = json!("correct horse");
    let made = post(&cloud, "2.96", server).await;
    assert_eq!(made.json["server"]["adminPass"], "correct horse");
    let id = made.json["server"]["id"].as_str().unwrap().to_owned();
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    let stored = guest(&cloud, &id).await.instance.unwrap().admin_pass;
    assert!(stored.is_some_and(|sealed| !sealed.contains("correct horse")));
    let told = cloud.host.wanted(machine(&id)).unwrap();
    let told = told.spec.guest.instance.unwrap().admin_pass;
    assert_eq!(told.as_deref(), Some("correct horse"));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_put_on_the_drive_up_to_2_56_and_bounded() {
    let cloud = Cloud::new().await;
    let mut server = asked("web");
    server["personality"] = json!([{"path": "/etc/banner", "contents": "aGk="}]);
    let made = post(&cloud, "2.56", server.clone()).await;
    let id = made.json["server"]["id"].as_str().unwrap().to_owned();
    let files = guest_files(&cloud, &id).await;
    assert_eq!(files, [("/etc/banner".to_owned(), "aGk=".to_owned())]);
    assert_eq!(status(&post(&cloud, "2.57", server.clone()).await), 400);
    let other = json!([{"path": "/etc/motd", "contents": "eW8="}]);
    let rebuild = json!({"rebuild": {"imageRef": DISK, "personality": other}});
    assert_eq!(status(&cloud.act("one", &id, "2.56", rebuild).await), 202);
    let files = guest_files(&cloud, &id).await;
    assert_eq!(files, [("/etc/motd".to_owned(), "eW8=".to_owned())]);
    let long = json!([{"path": "/".repeat(256), "contents": ""}]);
    let rebuild = json!({"rebuild": {"imageRef": DISK, "personality": long}});
    assert_eq!(status(&cloud.act("one", &id, "2.56", rebuild).await), 403);
    server["personality"][0]["path"] = json!("/".repeat(256));
    assert_eq!(status(&post(&cloud, "2.56", server).await), 403);
    let mut server = asked("web");
    server["user_data"] = json!("QUFB".repeat(16_384));
    assert_eq!(status(&post(&cloud, "2.96", server).await), 400);
}

async fn guest_files(cloud: &Cloud, id: &str) -> Vec<(String, String)> {
    cloud
        .until("one", id, |server| server["status"] == "ACTIVE")
        .await;
    let instance = guest(cloud, id).await.instance.unwrap();
    let files = instance.files.into_iter();
    files.map(|file| (file.path, file.contents)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn image_and_flavor_say_how_a_guest_is_treated() {
    const TREATED: &str = "0a11ce00-0000-4000-8000-000000000009";
    const WRONG: &str = "0a11ce00-0000-4000-8000-00000000000a";
    let cloud = Cloud::new().await;
    let properties = [
        ("kernel_id", KERNEL),
        ("os_shutdown_timeout", "7"),
        ("hw_watchdog_action", "poweroff"),
        ("hw_qemu_guest_agent", "yes"),
    ];
    cloud.image(TREATED, "raw", &properties).await;
    let wrong = [("kernel_id", KERNEL), ("hw_watchdog_action", "explode")];
    cloud.image(WRONG, "raw", &wrong).await;
    let mut server = asked("web");
    server["imageRef"] = json!(TREATED);
    let made = post(&cloud, "2.96", server.clone()).await;
    let id = made.json["server"]["id"].as_str().unwrap().to_owned();
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    let treated = guest(&cloud, &id).await;
    assert_eq!(treated.shutdown_timeout_s, Some(7));
    assert_eq!(treated.watchdog, Some(Watchdog::PowerOff));
    assert!(treated.agent);
    server["imageRef"] = json!(WRONG);
    let refused = post(&cloud, "2.96", server).await;
    assert_eq!(status(&refused), 400);
    assert_eq!(
        refused.message(),
        "Provided watchdog action (explode) is not supported."
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_panics_is_an_error_with_its_reason_until_it_is_reset() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    assert!(cloud.host.panic(machine(&id), true));
    let shown = cloud
        .until("one", &id, |server| server["status"] == "ERROR")
        .await;
    assert_eq!(shown["OS-EXT-STS:power_state"], 6);
    assert_eq!(shown["OS-EXT-STS:vm_state"], "error");
    let message = shown["fault"]["message"].as_str().unwrap();
    assert!(message.contains("kernel panicked"), "{message}");
    assert_eq!(cloud.host.processes(), [machine(&id)]);
    // Its kernel was told to reboot after a panic.
    assert!(cloud.host.panic(machine(&id), false));
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    // Or its user has to.
    assert!(cloud.host.panic(machine(&id), true));
    cloud
        .until("one", &id, |server| server["status"] == "ERROR")
        .await;
    let reboot = json!({"reboot": {"type": "HARD"}});
    assert_eq!(status(&cloud.act("one", &id, "", reboot).await), 202);
    let shown = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(shown["OS-EXT-STS:power_state"], 1);
    let events = crate::event::of_subject(cloud.app.database().reader(), &id)
        .await
        .unwrap();
    let panics = events
        .iter()
        .filter(|event| event.action == "guest_panicked");
    assert_eq!(panics.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_its_watchdog_paused_is_paused_until_somebody_lets_it_go_on() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    assert!(cloud.host.pause_by_watchdog(machine(&id)));
    cloud
        .until("one", &id, |server| server["status"] == "PAUSED")
        .await;
    let events = crate::event::of_subject(cloud.app.database().reader(), &id)
        .await
        .unwrap();
    let fired = events
        .iter()
        .filter(|event| event.action == "watchdog_fired");
    assert_eq!(fired.count(), 1);
    for (action, then) in [
        ("unpause", "ACTIVE"),
        ("pause", "PAUSED"),
        ("unpause", "ACTIVE"),
    ] {
        let acted = cloud.act("one", &id, "", json!({action: null})).await;
        assert_eq!(status(&acted), 202, "{action}");
        cloud
            .until("one", &id, |server| server["status"] == then)
            .await;
    }
    // The second time is another event, the first is not told again.
    assert!(cloud.host.pause_by_watchdog(machine(&id)));
    cloud
        .until("one", &id, |server| server["status"] == "PAUSED")
        .await;
    let events = crate::event::of_subject(cloud.app.database().reader(), &id)
        .await
        .unwrap();
    let fired = events
        .iter()
        .filter(|event| event.action == "watchdog_fired");
    assert_eq!(fired.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_its_watchdog_paused_before_its_create_had_ended_is_paused() {
    let cloud = Cloud::new().await;
    cloud.frozen.send_replace(true);
    let id = cloud.create("one", "web").await;
    while cloud.host.wanted(machine(&id)).is_none() {
        tokio::task::yield_now().await;
    }
    while cloud.host.step(machine(&id)) {}
    assert!(cloud.host.pause_by_watchdog(machine(&id)));
    cloud.frozen.send_replace(false);
    cloud
        .until("one", &id, |server| server["status"] == "PAUSED")
        .await;
    assert_eq!(cloud.host.processes(), [machine(&id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_its_watchdog_switched_off_is_off() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    assert!(cloud.host.end_process(machine(&id), StopReason::Watchdog));
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
}
