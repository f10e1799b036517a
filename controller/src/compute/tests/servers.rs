//! Servers: their life, their views, what is refused.

use fractus_agent_api::machine::{Power, StopReason};
use uuid::Uuid;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_created_runs_and_is_deleted() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let server = cloud
        .get("one", &format!("/v2.1/servers/{id}"), "2.96")
        .await
        .json;
    let server = &server["server"];
    assert_eq!(server["OS-EXT-STS:power_state"], 1);
    assert_eq!(server["OS-EXT-AZ:availability_zone"], "nova");
    assert_eq!(server["hostId"].as_str().unwrap().len(), 56);
    assert!(server["OS-SRV-USG:launched_at"].is_string());
    assert_eq!(cloud.host.processes(), [machine(&id)]);

    let path = format!("/v2.1/servers/{id}");
    let deleted = cloud
        .call("one", Method::DELETE, &path, "", Value::Null)
        .await;
    assert_eq!(status(&deleted), 204);
    cloud.until_gone("one", &id).await;
    assert!(cloud.host.remains().is_empty());
    let hosts = crate::agents::host::all(cloud.app.database().reader())
        .await
        .unwrap();
    assert_eq!((hosts[0].vcpus_used, hosts[0].memory_mib_used), (0, 0));
    let usage = cloud.get("one", "/v2.1/limits", "").await.json;
    assert_eq!(usage["limits"]["absolute"]["totalInstancesUsed"], 0);
    // Its actions can still be looked up, from 2.21.
    let actions = format!("/v2.1/servers/{id}/os-instance-actions");
    assert_eq!(status(&cloud.get("one", &actions, "2.20").await), 404);
    let actions = cloud.get("one", &actions, "2.58").await.json;
    let names: Vec<&str> = actions["instanceActions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|action| action["action"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["delete", "create"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_machine_is_what_image_and_flavor_say() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let row = crate::reconcile::machine::find(cloud.app.database().reader(), machine(&id)).await;
    let machine = row.unwrap().unwrap();
    let spec = &machine.wanted.spec;
    assert_eq!((spec.vcpus, spec.memory_mib), (1, 256));
    assert_eq!(spec.boot.kernel.as_ref().unwrap().id.to_string(), KERNEL);
    assert_eq!(spec.boot.command_line, "console=ttyS0 x=1");
    let disk = spec.root_disk.as_ref().unwrap();
    assert_eq!(
        (disk.size, disk.image.as_ref().unwrap().id.to_string()),
        (1 << 30, DISK.to_owned())
    );
    assert!(machine.request_id.unwrap().starts_with("req-"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_kernel_boots_what_is_on_its_disk() {
    let cloud = Cloud::new().await;
    let bare = "0a11ce00-0000-4000-8000-000000000003";
    cloud
        .image(bare, "raw", &[("os_command_line", "quiet")])
        .await;
    let body = json!({"server": {"name": "x", "imageRef": bare, "flavorRef": "1"}});
    let made = cloud
        .call("one", Method::POST, "/v2.1/servers", "", body)
        .await;
    let id = made.json["server"]["id"].as_str().unwrap();
    cloud
        .until("one", id, |server| server["status"] == "ACTIVE")
        .await;
    let row = crate::reconcile::machine::find(cloud.app.database().reader(), machine(id)).await;
    let spec = row.unwrap().unwrap().wanted.spec;
    assert_eq!((spec.boot.kernel, spec.boot.initrd), (None, None));
    assert_eq!(spec.boot.command_line, "quiet");
    let image = spec.root_disk.unwrap().image.unwrap();
    assert_eq!(image.id.to_string(), bare);
}

/// Asks for a server that would be made but for `change`.
async fn post_changed(cloud: &Cloud, version: &str, change: Value) -> Answer {
    let mut server = json!({"name": "n", "imageRef": DISK, "flavorRef": "1"});
    for (name, value) in change.as_object().unwrap() {
        server[name] = value.clone();
    }
    let body = json!({"server": server});
    cloud
        .call("one", Method::POST, "/v2.1/servers", version, body)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_in_novas_words() {
    let cloud = Cloud::new().await;
    let post = async |version, change| post_changed(&cloud, version, change).await;
    for (version, change, words) in [
        (
            "",
            json!({"flavorRef": "99"}),
            "Flavor 99 could not be found.",
        ),
        (
            "",
            json!({"flavorRef": -1}),
            "Flavor -1 could not be found.",
        ),
        (
            "",
            json!({"imageRef": "0a11ce00-0000-4000-8000-00000000ffff"}),
            "Can not find requested image",
        ),
        (
            "",
            json!({"key_name": "none"}),
            "Invalid key_name provided.",
        ),
        (
            "",
            json!({"min_count": 2, "max_count": 1}),
            "min_count must be <= max_count",
        ),
        (
            "",
            json!({"max_count": 0}),
            "Invalid input for field/attribute max_count. Value: 0. 0 is less than the minimum of 1",
        ),
        (
            "",
            json!({"name": ""}),
            "Invalid input for field/attribute name. Value: . '' should be non-empty",
        ),
        (
            "",
            json!({"imageRef": -1}),
            "Invalid input for field/attribute imageRef. Value: -1. -1 is not valid under any of \
             the given schemas",
        ),
        (
            "",
            json!({"networks": [{"uuid": "a-b-c"}]}),
            "Bad networks format: network uuid is not in proper format (a-b-c)",
        ),
        (
            "",
            json!({"security_groups": [{"name": "does_not_exist"}]}),
            "Unable to find security_group with name or id 'does_not_exist'",
        ),
        (
            "",
            json!({"accessIPv4": "1.1.1.1.1"}),
            "Invalid input for field/attribute accessIPv4. Value: 1.1.1.1.1. '1.1.1.1.1' is not a \
             'ipv4'",
        ),
        (
            "",
            json!({"metadata": {"": "data1"}}),
            "Invalid input for field/attribute metadata. Value: {'': 'data1'}. '' does not match \
             any of the regexes: '^[a-zA-Z0-9-_:. ]{1,255}$'",
        ),
        (
            "",
            json!({"availability_zone": "moon"}),
            "The requested availability zone is not available",
        ),
    ] {
        let refused = post(version, change.clone()).await;
        assert_eq!(
            (status(&refused), refused.message()),
            (400, words),
            "{change}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_server_may_say_depends_on_the_microversion() {
    let cloud = Cloud::new().await;
    let post = async |version, change| post_changed(&cloud, version, change).await;
    // From 2.37 networks must be said; from 2.52 tags may, from 2.57 files may not.
    assert_eq!(status(&post("2.37", json!({})).await), 400);
    assert_eq!(
        status(&post("2.51", json!({"networks": "none", "tags": ["a"]})).await),
        400
    );
    assert_eq!(
        status(&post("2.52", json!({"networks": "none", "tags": ["a"]})).await),
        202
    );
    let files = json!({"networks": "none", "personality": []});
    assert_eq!(status(&post("2.56", files.clone()).await), 202);
    assert_eq!(status(&post("2.57", files).await), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_servers_than_the_quota_has_are_refused_together() {
    let cloud = Cloud::new().await;
    let body =
        json!({"server": {"name": "n", "imageRef": DISK, "flavorRef": "1", "max_count": 9999}});
    let refused = cloud
        .call("one", Method::POST, "/v2.1/servers", "", body)
        .await;
    assert_eq!(
        (status(&refused), refused.message()),
        (
            403,
            "Quota exceeded for cores: Requested 9999, but already used 0 of 20 cores"
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_being_built_can_be_deleted() {
    let cloud = Cloud::new().await;
    cloud.frozen.send_replace(true);
    let id = cloud.create("one", "web").await;
    let path = format!("/v2.1/servers/{id}");
    assert_eq!(
        status(
            &cloud
                .call("one", Method::DELETE, &path, "", Value::Null)
                .await
        ),
        204
    );
    assert_eq!(
        status(
            &cloud
                .call("one", Method::DELETE, &path, "", Value::Null)
                .await
        ),
        204
    );
    cloud.frozen.send_replace(false);
    cloud.until_gone("one", &id).await;
    assert!(cloud.host.remains().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fits_nowhere_is_an_error_that_says_why() {
    let cloud = Cloud::new().await;
    let flavor =
        json!({"flavor": {"name": "huge", "id": "9", "ram": 40000, "vcpus": 2, "disk": 5000}});
    cloud
        .call("admin", Method::POST, "/v2.1/flavors", "", flavor)
        .await;
    let body = json!({"server": {"name": "x", "imageRef": DISK, "flavorRef": "9"}});
    let made = cloud
        .call("one", Method::POST, "/v2.1/servers", "", body)
        .await;
    let id = made.json["server"]["id"].as_str().unwrap();
    let server = cloud
        .until("one", id, |server| server["status"] == "ERROR")
        .await;
    assert_eq!(server["fault"]["code"], 500);
    let message = server["fault"]["message"].as_str().unwrap();
    assert!(message.starts_with("No valid host was found."), "{message}");
    assert!(
        message.contains("host-1: 5000 GiB of disk needed, 1000 free"),
        "{message}"
    );
    assert!(server["fault"].get("details").is_none());
    let path = format!("/v2.1/servers/{id}");
    cloud
        .call("one", Method::DELETE, &path, "", Value::Null)
        .await;
    cloud.until_gone("one", id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_own_end_is_seen() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud
        .host
        .end_process(machine(&id), StopReason::GuestPowerOff);
    let server = cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    assert_eq!(server["OS-EXT-STS:power_state"], 4);
    cloud.act("one", &id, "", json!({"os-start": null})).await;
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    let crash = StopReason::InternalError {
        detail: "rip=0xdead".to_owned(),
    };
    cloud.host.end_process(machine(&id), crash);
    let server = cloud
        .until("admin", &id, |server| server["status"] == "ERROR")
        .await;
    assert_eq!(server["fault"]["details"], "rip=0xdead");
    cloud
        .act("one", &id, "", json!({"reboot": {"type": "HARD"}}))
        .await;
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
}

/// Its agent died after it had said that the machine cannot be started; the next one tries anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_in_error_whose_machine_is_started_after_all_is_active() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    cloud.act("one", &id, "", json!({"os-stop": null})).await;
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    cloud.frozen.send_replace(true);
    cloud.act("one", &id, "", json!({"os-start": null})).await;
    let wanted = || cloud.host.wanted(machine(&id)).map(|wanted| wanted.power);
    while wanted() != Some(Power::Running) {
        tokio::task::yield_now().await;
    }
    cloud.host.fail(machine(&id), "no memory is left");
    cloud.frozen.send_replace(false);
    let server = cloud
        .until("one", &id, |server| server["status"] == "ERROR")
        .await;
    assert_eq!(server["fault"]["message"], "no memory is left");
    assert_eq!(cloud.host.processes(), []);

    cloud.host.kill_agent();
    cloud.host.start_agent(Uuid::from_u128(8));
    cloud.frozen.send_replace(false);
    let server = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(cloud.host.processes(), [machine(&id)]);
    assert_eq!(server.get("fault"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_networks_a_server_has_no_addresses() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let path = format!("/v2.1/servers/{id}/ips");
    assert_eq!(
        cloud.get("one", &path, "").await.json,
        json!({"addresses": {}})
    );
    let one = cloud.get("one", &format!("{path}/net"), "").await;
    assert_eq!(
        (status(&one), one.message()),
        (404, "Instance is not a member of specified network")
    );
    let stranger = cloud.get("two", &path, "").await;
    assert_eq!(
        stranger.message(),
        format!("Instance {id} could not be found.")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_format_that_machines_do_not_take_is_refused() {
    let cloud = Cloud::new().await;
    let vmdk = "0a11ce00-0000-4000-8000-000000000005";
    cloud.image(vmdk, "vmdk", &[("kernel_id", KERNEL)]).await;
    let body = json!({"server": {"name": "x", "imageRef": vmdk, "flavorRef": "1"}});
    let refused = cloud
        .call("one", Method::POST, "/v2.1/servers", "", body)
        .await;
    assert_eq!(status(&refused), 400);
    assert!(refused.message().contains("vmdk"), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_image_boots_by_itself_with_an_empty_disk() {
    let cloud = Cloud::new().await;
    let body = json!({"server": {"name": "probe", "imageRef": KERNEL, "flavorRef": "1"}});
    let made = cloud
        .call("one", Method::POST, "/v2.1/servers", "", body)
        .await;
    let id = made.json["server"]["id"].as_str().unwrap();
    cloud
        .until("one", id, |server| server["status"] == "ACTIVE")
        .await;
    let row = crate::reconcile::machine::find(cloud.app.database().reader(), machine(id)).await;
    let spec = row.unwrap().unwrap().wanted.spec;
    assert_eq!(spec.boot.kernel.as_ref().unwrap().id.to_string(), KERNEL);
    let disk = spec.root_disk.unwrap();
    assert_eq!((disk.image, disk.size), (None, 1 << 30));
}
