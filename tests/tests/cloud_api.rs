//! The API of a whole cloud, each answer held to the oracle by the client.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use fractus_tests::harness::{Client, Cloud, Options, program};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

async fn flavor(admin: &Client) -> String {
    let flavor = json!({"name": "tiny", "ram": 64, "vcpus": 1, "disk": 0});
    let made = admin
        .post("/compute/v2.1/flavors", json!({"flavor": flavor}))
        .await
        .unwrap();
    made.expect_status(200).unwrap().text("/flavor/id")
}

#[tokio::test]
async fn cloud_a_server_lives_its_life_as_openstack_tells_it() {
    let cloud = Cloud::start(Options::default()).await.unwrap();
    let admin = cloud.admin().await.unwrap().at(96);
    let (image, flavor) = (
        cloud.probe_image(&admin, "tick_ms=100").await.unwrap(),
        flavor(&admin).await,
    );
    let id = admin.create_server("one", &image, &flavor).await.unwrap();
    if let Err(error) = admin.until_status(&id, "ACTIVE").await {
        panic!("{error:#}\n{}", cloud.logs());
    }
    // At every version that changes what a server looks like, and the oracle knows what it should.
    for minor in [1, 3, 9, 16, 19, 26, 47, 63, 71, 73, 75, 90, 96] {
        let at = admin.at(minor);
        at.get(&format!("/compute/v2.1/servers/{id}"))
            .await
            .unwrap()
            .expect_status(200)
            .unwrap();
        for list in [
            "servers",
            "servers/detail",
            "flavors/detail",
            "os-hypervisors/detail",
            "limits",
        ] {
            at.get(&format!("/compute/v2.1/{list}"))
                .await
                .unwrap()
                .expect_status(200)
                .unwrap();
        }
    }
    let steps: [(Value, u16, &str); 8] = [
        (json!({"pause": null}), 202, "PAUSED"),
        (json!({"unpause": null}), 202, "ACTIVE"),
        (json!({"suspend": null}), 202, "SUSPENDED"),
        (json!({"resume": null}), 202, "ACTIVE"),
        (json!({"os-stop": null}), 202, "SHUTOFF"),
        (json!({"os-start": null}), 202, "ACTIVE"),
        (json!({"reboot": {"type": "HARD"}}), 202, "ACTIVE"),
        (json!({"rebuild": {"imageRef": image}}), 202, "ACTIVE"),
    ];
    for (action, status, wanted) in steps {
        admin
            .act(&id, action.clone())
            .await
            .unwrap()
            .expect_status(status)
            .unwrap();
        if let Err(error) = admin.until_status(&id, wanted).await {
            panic!("{action}: {error:#}\n{}", cloud.logs());
        }
    }
    // Errors have OpenStack's form as well; the client would not give them back otherwise.
    admin
        .act(&id, json!({"os-start": null}))
        .await
        .unwrap()
        .expect_status(409)
        .unwrap();
    admin
        .act(&id, json!({"dance": null}))
        .await
        .unwrap()
        .expect_status(400)
        .unwrap();
    admin
        .get("/compute/v2.1/servers/nosuch")
        .await
        .unwrap()
        .expect_status(404)
        .unwrap();
    admin
        .get(&format!("/compute/v2.1/servers/{id}/os-instance-actions"))
        .await
        .unwrap();
    admin
        .delete(&format!("/compute/v2.1/servers/{id}"))
        .await
        .unwrap()
        .expect_status(204)
        .unwrap();
    admin.until_gone(&id).await.unwrap();
    assert_eq!(cloud.machine_processes(), []);
    assert_eq!(cloud.machine_sockets(0), [""; 0]);
    assert!(cloud.machine_groups(0).is_empty());
}

/// The nonce that the guest keeps in RAM: another one is another boot.
fn nonce(log: &str) -> &str {
    let (_, rest) = log.rsplit_once("boot nonce=").unwrap();
    rest.split_whitespace().next().unwrap()
}

#[tokio::test]
async fn cloud_a_pause_keeps_the_guest_and_a_reboot_does_not() {
    let cloud = Cloud::start(Options::default()).await.unwrap();
    let admin = cloud.admin().await.unwrap().at(96);
    let (image, flavor) = (
        cloud.probe_image(&admin, "tick_ms=20").await.unwrap(),
        flavor(&admin).await,
    );
    let id = admin.create_server("one", &image, &flavor).await.unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    let first = nonce(&admin.until_logged(&id, "tick 3 ").await.unwrap()).to_owned();
    admin.act(&id, json!({"pause": null})).await.unwrap();
    admin.until_status(&id, "PAUSED").await.unwrap();
    admin.act(&id, json!({"unpause": null})).await.unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    let log = admin.until_logged(&id, "tick 20 ").await.unwrap();
    assert_eq!(nonce(&log), first, "the guest went on where it was");
    admin
        .act(&id, json!({"reboot": {"type": "HARD"}}))
        .await
        .unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    let rebooted = fractus_tests::harness::until(
        "another boot",
        std::time::Duration::from_secs(30),
        || async {
            let log = admin
                .until_logged(&id, "boot nonce=")
                .await
                .map_err(|error| error.to_string())?;
            if nonce(&log) == first {
                Err(log)
            } else {
                Ok(())
            }
        },
    );
    rebooted.await.unwrap();
}

#[tokio::test]
async fn cloud_the_console_goes_both_ways() {
    let cloud = Cloud::start(Options::default()).await.unwrap();
    let admin = cloud.admin().await.unwrap().at(96);
    let (image, flavor) = (
        cloud.probe_image(&admin, "tick_ms=0").await.unwrap(),
        flavor(&admin).await,
    );
    let id = admin.create_server("one", &image, &flavor).await.unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    admin.until_logged(&id, "boot nonce=").await.unwrap();
    let body = json!({"remote_console": {"protocol": "serial", "type": "serial"}});
    let path = format!("/compute/v2.1/servers/{id}/remote-consoles");
    let made = admin
        .post(&path, body)
        .await
        .unwrap()
        .expect_status(200)
        .unwrap();
    let url = made.text("/remote_console/url");
    let mut request = url.as_str().into_client_request().unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", "binary".parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    socket
        .send(Message::binary(b"echo are you there\n".to_vec()))
        .await
        .unwrap();
    let heard = async {
        let mut heard = String::new();
        while let Some(Ok(message)) = socket.next().await {
            heard.push_str(&String::from_utf8_lossy(&message.into_data()));
            if heard.contains("ok echo are you there") {
                return heard;
            }
        }
        panic!("the console closed after {heard:?}");
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), heard)
        .await
        .unwrap();
    // The log has what went over the line, too; and another token opens nothing.
    admin
        .until_logged(&id, "ok echo are you there")
        .await
        .unwrap();
    let (head, _) = url.split_once("token=").unwrap();
    let wrong = format!("{head}token=00000000-0000-0000-0000-000000000000");
    assert!(
        tokio_tungstenite::connect_async(wrong.as_str())
            .await
            .is_err(),
        "{wrong}"
    );
}

#[tokio::test]
async fn cloud_lets_no_second_controller_on_its_sqlite_database() {
    let none = Options {
        agents: 0,
        ..Options::default()
    };
    let mut cloud = Cloud::start(none).await.unwrap();
    let second = tokio::process::Command::new(program("fractus").unwrap())
        .args(["serve", "--plain-http", "--listen", "127.0.0.1:0"])
        .args(["--agents-listen", "127.0.0.1:0", "--metrics-listen", ""])
        .arg("--state-dir")
        .arg(cloud.folder().join("controller"))
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success(), "{said}");
    let first = cloud.controller().unwrap().pid();
    for words in [
        &format!("(process {first})"),
        "SQLite is for one controller",
    ] {
        assert!(said.contains(words), "{said}");
    }
    // The first one never noticed, and its claim goes with it.
    cloud.admin().await.unwrap();
    cloud.kill_controller();
    cloud.start_controller().await.unwrap();
}
