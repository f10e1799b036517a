//! Servers that go from one host to another while their guests run, by the clients that a user has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::{Duration, Instant};

use fractus_tests::harness::{Cli, Client, Cloud, Options, Typed, asks, in_a_segment, until};
use serde_json::{Value, json};

async fn two_hosts() -> Cloud {
    let options = Options {
        agents: 2,
        ..Options::default()
    };
    Cloud::start(options).await.unwrap()
}

/// The last number that the guest has counted to, by its console's log.
fn ticks(log: &str) -> Option<u64> {
    // The last line may be half of one.
    let (whole, _) = log.rsplit_once('\n')?;
    let mut lines = whole.lines().rev();
    let number = lines.find_map(|line| line.trim().strip_prefix("tick ")?.split(' ').next())?;
    number.parse().ok()
}

/// Waits until it has counted beyond that.
async fn counts_beyond(admin: &Client, server: &str, tick: u64) -> u64 {
    let counted = until("the guest counts on", Duration::from_secs(60), || async {
        let log = admin.console_log(server).await?;
        ticks(&log).filter(|now| *now > tick).ok_or(log)
    });
    counted.await.unwrap()
}

async fn host_of(admin: &Client, server: &str) -> String {
    let path = format!("/compute/v2.1/servers/{server}");
    let shown = admin.get(&path).await.unwrap();
    shown.text("/server/OS-EXT-SRV-ATTR:host")
}

/// Waits until the newest migration of the server is that; gives it.
async fn migration(admin: &Client, server: &str, status: &str) -> Value {
    let seen = admin.until_migration(server, status, Duration::from_secs(60));
    seen.await.unwrap()
}

/// What its old host had of a server goes once it runs on the new one.
async fn one_process(cloud: &Cloud) {
    let one = until("one process is left", Duration::from_secs(30), || async {
        match cloud.machine_processes() {
            all if all.len() == 1 => Ok(()),
            all => Err(format!("{all:?}")),
        }
    });
    one.await.unwrap();
}

#[test]
fn cloud_a_server_goes_to_another_host_and_back_by_the_openstack_client() {
    in_a_segment(
        "cloud_a_server_goes_to_another_host_and_back_by_the_openstack_client",
        there_and_back,
    );
}

async fn there_and_back() {
    let options = Options {
        agents: 2,
        networks: true,
        serve: &["--migration-connections=2"],
        ..Options::default()
    };
    let cloud = Cloud::start(options).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 1 tiny");
    let made = openstack.json("server create --image probe --flavor tiny --nic none --wait one");
    let id = made["id"].as_str().unwrap().to_owned();
    let mut tick = counts_beyond(&admin, &id, 3).await;
    let first = host_of(&admin, &id).await;
    for round in 0..2 {
        let from = host_of(&admin, &id).await;
        // The first time its host is chosen for it.
        let line = match round {
            0 => "server migrate --live-migration --wait one".to_owned(),
            _ => format!(
                "--os-compute-api-version 2.30 server migrate --live-migration --host {first} --wait one"
            ),
        };
        let output = openstack.run(&line);
        assert!(
            output.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            cloud.logs()
        );
        admin.until_status(&id, "ACTIVE").await.unwrap();
        let to = host_of(&admin, &id).await;
        assert_ne!(from, to);
        tick = counts_beyond(&admin, &id, tick).await;
        let log = admin.console_log(&id).await.unwrap();
        assert!(!log.contains("boot nonce="), "it is another boot: {log}");
        let migration = migration(&admin, &id, "completed").await;
        assert_eq!(migration["migration_type"], "live-migration");
        assert_eq!(
            (&migration["source_compute"], &migration["dest_compute"]),
            (&json!(from), &json!(to))
        );
        let uuid = migration["uuid"].as_str().unwrap();
        let shown = admin.get(&format!("/fractus/v1/migrations/{uuid}")).await;
        let shown = shown.unwrap().body;
        assert_eq!(shown["migration"]["progress"]["lanes"], 2, "{shown}");
        one_process(&cloud).await;
    }
    assert_eq!(host_of(&admin, &id).await, first);
    let list = openstack.json("--os-compute-api-version 2.80 server migration list --server one");
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
    openstack.done("server delete --wait one");
    assert_eq!(cloud.machine_processes(), []);
    for agent in 0..2 {
        let left = until("nothing is left", Duration::from_secs(30), || async {
            let left = cloud.machine_leftovers(agent);
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
        left.await.unwrap();
    }
}

#[tokio::test]
async fn cloud_a_paused_server_goes_and_one_whose_target_dies_stays() {
    let mut cloud = two_hosts().await;
    let admin = cloud.admin().await.unwrap().at(96);
    let image = cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    let flavor = json!({"flavor": {"name": "tiny", "vcpus": 1, "ram": 64, "disk": 1}});
    let flavor = admin.post("/compute/v2.1/flavors", flavor).await.unwrap();
    let flavor = flavor.expect_status(200).unwrap().text("/flavor/id");
    let id = admin.create_server("one", &image, &flavor).await.unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    let tick = counts_beyond(&admin, &id, 3).await;
    let first = host_of(&admin, &id).await;
    admin.act(&id, json!({"pause": null})).await.unwrap();
    admin.until_status(&id, "PAUSED").await.unwrap();
    let live = json!({"os-migrateLive": {"host": null, "block_migration": "auto"}});
    let answer = admin.act(&id, live.clone()).await.unwrap();
    answer.expect_status(202).unwrap();
    migration(&admin, &id, "completed").await;
    admin.until_status(&id, "PAUSED").await.unwrap();
    let second = host_of(&admin, &id).await;
    assert_ne!(first, second);
    admin.act(&id, json!({"unpause": null})).await.unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    let tick = counts_beyond(&admin, &id, tick).await;

    // The only other host does not answer: it is not chosen, or the migration comes to nothing.
    let index = usize::from(first == "agent-1");
    cloud.kill_agent(index);
    let answer = admin.act(&id, live).await.unwrap();
    if answer.status == 202 {
        cloud.start_agent(index).unwrap();
    }
    admin.until_status(&id, "ACTIVE").await.unwrap();
    counts_beyond(&admin, &id, tick).await;
    one_process(&cloud).await;
}

/// As soon as its guest is being sent, unless that is over by then.
async fn complete_by_force(admin: &Client, server: &str) {
    let path = format!("/compute/v2.1/servers/{server}/migrations");
    let sent = until("its guest is sent", Duration::from_secs(60), || async {
        let shown = admin.get(&path).await.map_err(|error| error.to_string())?;
        let all = shown.body["migrations"].clone();
        match (all[0]["status"].as_str(), all[0]["id"].as_i64()) {
            (Some("running" | "post-migrating"), id) => Ok(id),
            (None, _) => Ok(None),
            (status, _) => Err(format!("{status:?}")),
        }
    });
    if let Some(number) = sent.await.unwrap() {
        let action = format!("{path}/{number}/action");
        let forced = admin
            .post(&action, json!({"force_complete": null}))
            .await
            .unwrap();
        assert!([202, 400].contains(&forced.status), "{}", forced.body);
    }
}

/// A guest that writes, and is not waited for, goes on there, and its memory follows it.
#[tokio::test]
async fn cloud_memory_follows_a_guest_whose_flavor_allows_it() {
    let cloud = two_hosts().await;
    let admin = cloud.admin().await.unwrap().at(96);
    let image = cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    let flavor = json!({"flavor": {"name": "tiny", "vcpus": 1, "ram": 128, "disk": 1}});
    let flavor = admin.post("/compute/v2.1/flavors", flavor).await.unwrap();
    let flavor = flavor.expect_status(200).unwrap().text("/flavor/id");
    let specs = format!("/compute/v2.1/flavors/{flavor}/os-extra_specs");
    let wrong = json!({"extra_specs": {"hw:live_migration_post_copy": "perhaps"}});
    let wrong = admin.post(&specs, wrong).await.unwrap();
    wrong.expect_status(400).unwrap();
    let right = json!({"extra_specs": {"hw:live_migration_post_copy": "true"}});
    let right = admin.post(&specs, right).await.unwrap();
    right.expect_status(200).unwrap();
    let id = admin.create_server("one", &image, &flavor).await.unwrap();
    admin.until_status(&id, "ACTIVE").await.unwrap();
    counts_beyond(&admin, &id, 0).await;
    asks(&admin, &id, "touch 60").await;
    let live = json!({"os-migrateLive": {"host": null, "block_migration": "auto"}});
    let by = Instant::now() + Duration::from_secs(120);
    loop {
        let mut typed = Typed::open(&admin, &id).await.unwrap();
        let begun = typed.until("loudly weave 60", &["begun weave"]).await;
        begun.unwrap();
        let answer = admin.act(&id, live.clone()).await.unwrap();
        answer.expect_status(202).unwrap();
        complete_by_force(&admin, &id).await;
        let migration = migration(&admin, &id, "completed").await;
        admin.until_status(&id, "ACTIVE").await.unwrap();
        // It looks at all that it has written.
        let mut typed = Typed::open(&admin, &id).await.unwrap();
        typed.until("", &["ok weave"]).await.unwrap();
        let path = format!(
            "/fractus/v1/migrations/{}",
            migration["uuid"].as_str().unwrap()
        );
        let shown = admin.get(&path).await.unwrap();
        let progress = shown.body["migration"]["progress"].clone();
        println!("{progress}");
        one_process(&cloud).await;
        let followed = progress["followed"]["bytes"].as_u64();
        if followed.is_some_and(|bytes| bytes > 0) {
            // None where it was forced before the first was over.
            let last = progress["rounds"].as_array().unwrap().last();
            assert!(last.is_none_or(|last| last["decision"] == "post_copy"));
            assert!(progress["followed"]["took_us"].as_u64().unwrap() > 0);
            break;
        }
        // On a busy host it may get no processor for a whole round, and have written nothing.
        assert!(Instant::now() < by, "it writes too slowly: {progress}");
    }
}
