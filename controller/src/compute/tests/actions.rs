//! What is done to servers, and what of it is told: actions, consoles, instance actions.

use fractus_agent_api::machine::{Power, StopReason};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn power_pause_and_reboot_change_the_machine() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let starts = async || cloud.host.report(machine(&id)).unwrap().starts;
    for (body, wanted) in [
        (json!({"pause": null}), "PAUSED"),
        (json!({"unpause": null}), "ACTIVE"),
        (json!({"os-stop": null}), "SHUTOFF"),
        (json!({"os-start": null}), "ACTIVE"),
        (json!({"reboot": {"type": "SOFT"}}), "ACTIVE"),
        (json!({"reboot": {"type": "HARD"}}), "ACTIVE"),
    ] {
        let answer = cloud.act("one", &id, "2.96", body.clone()).await;
        assert_eq!(status(&answer), 202, "{body}: {}", answer.json);
        cloud
            .until("one", &id, |server| server["status"] == wanted)
            .await;
    }
    assert!(
        starts().await >= 3,
        "started, started again, and rebooted hard"
    );
    let refused = cloud.act("one", &id, "", json!({"unpause": null})).await;
    assert_eq!(status(&refused), 409);
    assert_eq!(
        refused.message(),
        format!("Cannot 'unpause' instance {id} while it is in vm_state active")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hard_reboot_is_the_way_out_of_what_hangs() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    assert_eq!(
        status(&cloud.act("one", &id, "", json!({"pause": null})).await),
        202
    );
    let soft = cloud
        .act("one", &id, "", json!({"reboot": {"type": "SOFT"}}))
        .await;
    assert_eq!(
        soft.message(),
        format!("Cannot 'reboot' instance {id} while it is in task_state pausing")
    );
    let hard = cloud
        .act("one", &id, "", json!({"reboot": {"type": "HARD"}}))
        .await;
    assert_eq!(status(&hard), 202);
    cloud.frozen.send_replace(false);
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
}

/// One action, and the server once it has this status.
async fn change(cloud: &Cloud, id: &str, body: Value, wanted: &str) -> Value {
    let answer = cloud.act("one", id, "2.96", body.clone()).await;
    assert_eq!(status(&answer), 202, "{body}: {}", answer.json);
    cloud
        .until("one", id, |server| server["status"] == wanted)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_server_goes_on_as_the_same_guest_and_one_that_is_rebooted_hard_does_not() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let guest = || {
        let (guest, kept) = (
            cloud.host.guest(machine(&id)),
            cloud.host.kept(machine(&id)),
        );
        (guest, kept, cloud.host.processes().len())
    };
    assert_eq!(guest(), (Some(1), None, 1));
    let shown = change(&cloud, &id, json!({"suspend": null}), "SUSPENDED").await;
    assert_eq!(shown["OS-EXT-STS:vm_state"], "suspended");
    assert_eq!(shown["OS-EXT-STS:power_state"], 4);
    assert_eq!(guest(), (Some(1), Some(1), 0));
    change(&cloud, &id, json!({"resume": null}), "ACTIVE").await;
    assert_eq!(guest(), (Some(1), None, 1));

    // As Tempest asks.
    change(&cloud, &id, json!({"suspend": {}}), "SUSPENDED").await;
    let hard = json!({"reboot": {"type": "HARD"}});
    change(&cloud, &id, hard, "ACTIVE").await;
    assert_eq!(guest(), (Some(3), None, 1));

    let path = format!("/v2.1/servers/{id}/os-instance-actions");
    let actions = cloud.get("admin", &path, "").await.json;
    let mut told = Vec::new();
    for action in actions["instanceActions"].as_array().unwrap() {
        let path = format!("{path}/{}", action["request_id"].as_str().unwrap());
        let action = cloud.get("admin", &path, "").await.json["instanceAction"].clone();
        let event = &action["events"][0];
        assert_eq!(event["result"], "Success");
        told.push((action["action"].clone(), event["event"].clone()));
    }
    let suspend = (json!("suspend"), json!("compute_suspend_instance"));
    let resume = (json!("resume"), json!("compute_resume_instance"));
    let reboot = (json!("reboot"), json!("compute_reboot_instance"));
    assert_eq!(told[..4], [reboot, suspend.clone(), resume, suspend]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_suspended_server_that_is_deleted_no_memory_is_left() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    change(&cloud, &id, json!({"suspend": null}), "SUSPENDED").await;
    let path = format!("/v2.1/servers/{id}");
    let delete = cloud
        .call("one", Method::DELETE, &path, "", Value::Null)
        .await;
    assert_eq!(status(&delete), 204);
    cloud.until_gone("one", &id).await;
    assert_eq!(cloud.host.kept(machine(&id)), None);
    assert!(cloud.host.remains().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_suspended_or_resumed_is_refused_in_novas_words() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let refused = async |body: Value, action: &str, stands: &str| {
        let answer = cloud.act("one", &id, "", body).await;
        let message = format!("Cannot '{action}' instance {id} while it is in {stands}");
        assert_eq!((status(&answer), answer.message()), (409, message.as_str()));
    };
    refused(json!({"resume": {}}), "resume", "vm_state active").await;
    change(&cloud, &id, json!({"suspend": null}), "SUSPENDED").await;
    refused(json!({"suspend": {}}), "suspend", "vm_state suspended").await;
    refused(json!({"os-start": null}), "start", "vm_state suspended").await;
    refused(json!({"os-stop": null}), "stop", "vm_state suspended").await;
    change(&cloud, &id, json!({"resume": null}), "ACTIVE").await;
    change(&cloud, &id, json!({"os-stop": null}), "SHUTOFF").await;
    refused(json!({"suspend": null}), "suspend", "vm_state stopped").await;
    change(&cloud, &id, json!({"os-start": null}), "ACTIVE").await;

    cloud.frozen.send_replace(true);
    let suspend = cloud.act("one", &id, "", json!({"suspend": null})).await;
    assert_eq!(status(&suspend), 202);
    refused(json!({"suspend": null}), "suspend", "task_state suspending").await;
    // But a hard reboot is the way out.
    let hard = json!({"reboot": {"type": "HARD"}});
    assert_eq!(status(&cloud.act("one", &id, "", hard).await), 202);
    cloud.frozen.send_replace(false);
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(cloud.host.kept(machine(&id)), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ends_before_it_is_suspended_is_shut_off() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    let suspend = cloud.act("one", &id, "", json!({"suspend": null})).await;
    assert_eq!(status(&suspend), 202);
    let power = || cloud.host.wanted(machine(&id)).map(|wanted| wanted.power);
    while power() != Some(Power::Suspended) {
        tokio::task::yield_now().await;
    }
    let off = StopReason::GuestPowerOff;
    assert!(cloud.host.end_process(machine(&id), off));
    cloud.frozen.send_replace(false);
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    let known = crate::reconcile::machine::find(cloud.app.database().reader(), machine(&id)).await;
    let known = known.unwrap().unwrap();
    assert_eq!(known.wanted.power, Power::Stopped, "and stays so");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_hard_reboot_takes_the_place_of_the_first() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    let hard = json!({"reboot": {"type": "HARD"}});
    for _ in 0..3 {
        assert_eq!(status(&cloud.act("one", &id, "", hard.clone()).await), 202);
    }
    cloud.frozen.send_replace(false);
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_brings_back_a_server_whose_delete_waits_for_its_host() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.frozen.send_replace(true);
    let path = format!("/v2.1/servers/{id}");
    let delete = cloud
        .call("one", Method::DELETE, &path, "", Value::Null)
        .await;
    assert_eq!(status(&delete), 204);
    let reset = json!({"os-resetState": {"state": "active"}});
    assert_eq!(status(&cloud.act("admin", &id, "", reset).await), 202);
    let hard = json!({"reboot": {"type": "HARD"}});
    assert_eq!(status(&cloud.act("one", &id, "", hard).await), 409);
    let known = crate::reconcile::machine::find(cloud.app.database().reader(), machine(&id)).await;
    assert!(known.unwrap().unwrap().is_tombstone());
    cloud.frozen.send_replace(false);
    cloud.until_gone("one", &id).await;
    assert!(cloud.host.remains().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_takes_of_the_host_what_the_new_image_needs() {
    let cloud = Cloud::new().await;
    let flavor =
        json!({"flavor": {"name": "by-image", "id": "0", "ram": 64, "vcpus": 1, "disk": 0}});
    let made = cloud
        .call("admin", Method::POST, "/v2.1/flavors", "", flavor)
        .await;
    assert_eq!(status(&made), 200, "{}", made.json);
    let (large, huge) = (
        "0a11ce00-0000-4000-8000-000000000006",
        "0a11ce00-0000-4000-8000-000000000007",
    );
    let kernel = [("kernel_id", KERNEL)];
    cloud.image_of(large, "raw", &kernel, 5 << 30).await;
    cloud.image_of(huge, "raw", &kernel, 1 << 60).await;
    let body = json!({"server": {"name": "x", "imageRef": DISK, "flavorRef": "0"}});
    let made = cloud
        .call("admin", Method::POST, "/v2.1/servers", "", body)
        .await;
    let id = made.json["server"]["id"].as_str().unwrap();
    let active = |server: &Value| server["status"] == "ACTIVE";
    cloud.until("admin", id, active).await;
    let used = async || {
        let hosts = crate::agents::host::all(cloud.app.database().reader()).await;
        hosts.unwrap()[0].used()
    };
    let before = used().await;
    assert_eq!(before.disk_gib, 1);

    let rebuild = |image| cloud.act("admin", id, "", json!({"rebuild": {"imageRef": image}}));
    let refused = rebuild(huge).await;
    assert_eq!(status(&refused), 409, "{}", refused.json);
    assert_eq!(used().await, before);
    assert_eq!(status(&rebuild(large).await), 202);
    cloud.until("admin", id, active).await;
    assert_eq!(used().await.disk_gib, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_makes_the_disk_anew_and_shows_what_its_microversion_has() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let other = "0a11ce00-0000-4000-8000-000000000004";
    cloud.image(other, "raw", &[("kernel_id", KERNEL)]).await;
    let disks = cloud.host.disks(machine(&id));
    let body = json!({"rebuild": {"imageRef": other, "name": "new", "metadata": {"a": "b"}}});
    let old = cloud.act("one", &id, "2.54", body.clone()).await;
    assert_eq!(status(&old), 202, "{}", old.json);
    assert_eq!(
        keys(&old.json["server"]),
        [
            "OS-DCF:diskConfig",
            "accessIPv4",
            "accessIPv6",
            "addresses",
            "adminPass",
            "created",
            "description",
            "flavor",
            "hostId",
            "id",
            "image",
            "key_name",
            "links",
            "locked",
            "metadata",
            "name",
            "progress",
            "status",
            "tags",
            "tenant_id",
            "updated",
            "user_id",
        ]
    );
    assert_eq!(old.json["server"]["status"], "REBUILD");
    let server = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(server["name"], "new");
    assert_eq!(server["image"]["id"], other);
    assert!(cloud.host.disks(machine(&id)) > disks);
    let new = cloud.act("one", &id, "2.75", body).await.json;
    assert!(new["server"].get("OS-EXT-STS:vm_state").is_some());
    assert!(new["server"].get("user_data").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_stops_users_and_not_administrators() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let lock = json!({"lock": {"locked_reason": "careful"}});
    assert_eq!(status(&cloud.act("one", &id, "2.73", lock).await), 202);
    let path = format!("/v2.1/servers/{id}");
    let server = cloud.get("one", &path, "2.73").await.json["server"].clone();
    assert_eq!(
        (&server["locked"], &server["locked_reason"]),
        (&json!(true), &json!("careful"))
    );
    let stop = cloud.act("one", &id, "", json!({"os-stop": null})).await;
    assert_eq!(
        (status(&stop), stop.message()),
        (409, format!("Instance {id} is locked").as_str())
    );
    assert_eq!(
        status(
            &cloud
                .call("one", Method::DELETE, &path, "", Value::Null)
                .await
        ),
        409
    );
    assert_eq!(
        status(&cloud.act("admin", &id, "", json!({"os-stop": null})).await),
        202
    );
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    assert_eq!(
        status(&cloud.act("one", &id, "", json!({"unlock": null})).await),
        202
    );
    assert_eq!(
        cloud.get("one", &path, "2.9").await.json["server"]["locked"],
        false
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_actions_are_refused() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    for (body, words) in [
        (json!({"nosuch": null}), "There is no such action: nosuch"),
        (json!({}), "Malformed request body"),
        (
            json!({"forceDelete": null, "x": 1}),
            "Malformed request body",
        ),
        (
            json!({"reboot": {}}),
            "Invalid input for field/attribute reboot. Value: {}. 'type' is a required property",
        ),
        (
            json!({"reboot": {"type": "BAD"}}),
            "Invalid input for field/attribute type. Value: BAD. 'BAD' is not one of ['HARD', \
             'Hard', 'hard', 'SOFT', 'Soft', 'soft']",
        ),
    ] {
        let refused = cloud.act("one", &id, "2.96", body).await;
        assert_eq!((status(&refused), refused.message()), (400, words));
    }
    let reader = cloud.act("reader", &id, "", json!({"os-stop": null})).await;
    assert_eq!(status(&reader), 403);
    let reset = cloud
        .act("one", &id, "", json!({"os-resetState": {"state": "error"}}))
        .await;
    assert_eq!(status(&reset), 403);
    let stranger = cloud.act("two", &id, "", json!({"os-stop": null})).await;
    assert_eq!(
        (status(&stranger), stranger.message()),
        (404, format!("Instance {id} could not be found.").as_str())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn consoles_are_read_and_opened_by_a_token() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let log = cloud
        .act(
            "one",
            &id,
            "",
            json!({"os-getConsoleOutput": {"length": 1}}),
        )
        .await;
    assert_eq!(log.json, json!({"output": "start 1\n"}));
    let path = format!("/v2.1/servers/{id}/remote-consoles");
    let serial = json!({"remote_console": {"protocol": "serial", "type": "serial"}});
    let made = cloud
        .call("one", Method::POST, &path, "2.6", serial.clone())
        .await;
    let url = made.json["remote_console"]["url"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        url.starts_with("ws://cloud:5000/compute/console?token="),
        "{url}"
    );
    let vnc = json!({"remote_console": {"protocol": "vnc", "type": "novnc"}});
    let vnc = cloud.call("one", Method::POST, &path, "2.6", vnc).await;
    assert_eq!(
        (status(&vnc), vnc.message()),
        (400, "Unavailable console type novnc.")
    );
    let plain = url.strip_prefix("ws://cloud:5000/compute").unwrap();
    let plain = cloud.get("nobody", plain, "").await;
    assert_eq!(
        (status(&plain), plain.message()),
        (400, "A console is opened as a WebSocket.")
    );
    let forged = cloud.get("nobody", "/console?token=x", "").await;
    assert_eq!(status(&forged), 403);
    let old = cloud
        .act(
            "one",
            &id,
            "2.5",
            json!({"os-getSerialConsole": {"type": "serial"}}),
        )
        .await;
    assert!(
        old.json["console"]["url"]
            .as_str()
            .unwrap()
            .starts_with("ws://")
    );
    assert_eq!(
        status(
            &cloud
                .act(
                    "one",
                    &id,
                    "2.6",
                    json!({"os-getSerialConsole": {"type": "serial"}})
                )
                .await
        ),
        404
    );
    cloud.act("one", &id, "", json!({"os-stop": null})).await;
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    let off = cloud.call("one", Method::POST, &path, "2.6", serial).await;
    assert_eq!(
        (status(&off), off.message()),
        (409, format!("Instance {id} is not ready").as_str())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_tells_its_events() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let stop = cloud.act("one", &id, "", json!({"os-stop": null})).await;
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    let request = stop.headers["x-openstack-request-id"].to_str().unwrap();
    let path = format!("/v2.1/servers/{id}/os-instance-actions/{request}");
    let action = cloud.get("admin", &path, "2.84").await.json["instanceAction"].clone();
    assert_eq!(action["action"], "stop");
    assert_eq!(action["project_id"], ONE);
    let event = &action["events"][0];
    assert_eq!(event["event"], "compute_stop_instance");
    assert_eq!(event["result"], "Success");
    assert_eq!(
        keys(event),
        [
            "details",
            "event",
            "finish_time",
            "host",
            "hostId",
            "result",
            "start_time",
            "traceback",
        ]
    );
    assert!(
        cloud.get("one", &path, "2.50").await.json["instanceAction"]
            .get("events")
            .is_none()
    );
    let missing = cloud
        .get(
            "one",
            &format!("/v2.1/servers/{id}/os-instance-actions/999"),
            "",
        )
        .await;
    assert_eq!(
        (status(&missing), missing.message()),
        (404, "Action 999 not found")
    );
}
