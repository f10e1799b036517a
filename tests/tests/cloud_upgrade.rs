//! Upgrades: a controller speaks to agents one release older, and a new agent takes over the machines
//! of the old one without disturbing a guest (invariants 2 and 11).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use fractus_tests::harness::{Client, Cloud, Options, until};
use fractus_tests::tidy::checkout;
use serde_json::{Value, json};

/// The agent of the last release: built beforehand by scripts/test, or now.
fn previous_agent() -> PathBuf {
    if let Some(path) = std::env::var_os("FRACTUS_PREVIOUS_AGENT") {
        return path.into();
    }
    let output = Command::new(checkout().join("scripts/previous-agent"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

fn nonce(log: &str) -> &str {
    let (_, rest) = log.rsplit_once("boot nonce=").unwrap();
    rest.split_whitespace().next().unwrap()
}

/// What a guest has logged that is at work, and is not the one that booted with `before`: the log tells of both.
async fn booted_since(admin: &Client, id: &str, before: &str) -> String {
    let another = until("another boot", Duration::from_secs(60), || async {
        let log = admin.until_logged(id, "tick 5 ").await;
        let log = log.map_err(|error| format!("{error:#}"))?;
        match nonce(&log) == before {
            true => Err(log),
            false => Ok(log),
        }
    });
    another.await.unwrap()
}

async fn act(cloud: &Cloud, admin: &Client, id: &str, action: Value, wanted: &str) {
    let answer = admin.act(id, action.clone()).await.unwrap();
    answer.expect_status(202).unwrap();
    if let Err(error) = admin.until_status(id, wanted).await {
        panic!("{action}: {error:#}\n{}", cloud.logs());
    }
}

#[tokio::test]
async fn cloud_the_previous_agent_serves_a_new_controller_and_hands_its_guests_to_a_new_agent() {
    let previous = previous_agent();
    let options = Options {
        agent_program: Some(previous),
        ..Options::default()
    };
    let mut cloud = Cloud::start(options).await.unwrap();
    let admin = cloud.admin().await.unwrap().at(96);
    let image = cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    let flavor = json!({"flavor": {"name": "tiny", "ram": 64, "vcpus": 1, "disk": 0}});
    let made = admin.post("/compute/v2.1/flavors", flavor).await.unwrap();
    let flavor = made.expect_status(200).unwrap().text("/flavor/id");
    let id = admin.create_server("one", &image, &flavor).await.unwrap();
    if let Err(error) = admin.until_status(&id, "ACTIVE").await {
        panic!("{error:#}\n{}", cloud.logs());
    }
    let boot = admin.until_logged(&id, "tick 3 ").await.unwrap();
    act(
        &cloud,
        &admin,
        &id,
        json!({"reboot": {"type": "HARD"}}),
        "ACTIVE",
    )
    .await;
    act(&cloud, &admin, &id, json!({"pause": null}), "PAUSED").await;
    act(&cloud, &admin, &id, json!({"unpause": null}), "ACTIVE").await;
    let before = booted_since(&admin, &id, nonce(&boot)).await;
    let (first, processes) = (nonce(&before).to_owned(), cloud.machine_processes());
    assert_eq!(processes.len(), 1);

    cloud.kill_agent(0);
    cloud.upgrade_agents(None);
    cloud.start_agent(0).unwrap();
    let log = admin.until_logged(&id, "tick 200 ").await.unwrap();
    assert_eq!(nonce(&log), first, "the guest was disturbed");
    assert_eq!(cloud.machine_processes(), processes);
    act(&cloud, &admin, &id, json!({"pause": null}), "PAUSED").await;
    act(&cloud, &admin, &id, json!({"unpause": null}), "ACTIVE").await;
    assert_eq!(cloud.machine_processes(), processes);

    let path = format!("/compute/v2.1/servers/{id}");
    admin
        .delete(&path)
        .await
        .unwrap()
        .expect_status(204)
        .unwrap();
    admin.until_gone(&id).await.unwrap();
    assert_eq!(cloud.machine_processes(), []);
    assert_eq!(cloud.machine_leftovers(0), [""; 0]);
    assert!(cloud.machine_groups(0).is_empty());
}
