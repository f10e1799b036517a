//! Servers that get another size, or another host with their guest stopped, by the client that a user has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use fractus_tests::harness::{Cli, Client, Cloud, Options, asks, in_a_segment, until};
use serde_json::Value;

/// Which boot of the guest its console's log tells of.
async fn boot(admin: &Client, server: &str) -> String {
    let log = admin.until_logged(server, "tick 3").await.unwrap();
    let (_, after) = log.rsplit_once("boot nonce=").unwrap();
    after.split_whitespace().next().unwrap().to_owned()
}

/// A boot that none of `before` was; the log of the same host goes on.
async fn another_boot(admin: &Client, server: &str, before: &[String]) -> String {
    let another = until("another boot", Duration::from_secs(60), || async {
        let now = boot(admin, server).await;
        match before.contains(&now) {
            true => Err(now),
            false => Ok(now),
        }
    });
    another.await.unwrap()
}

struct Told<'a> {
    cloud: &'a Cloud,
    admin: Client,
    openstack: Cli,
    id: String,
}

impl Told<'_> {
    async fn is(&self, status: &str) -> Value {
        let shown = self.admin.until_status(&self.id, status).await;
        shown.unwrap_or_else(|error| panic!("{error:#}\n{}", self.cloud.logs()))
    }

    async fn host(&self) -> String {
        let path = format!("/compute/v2.1/servers/{}", self.id);
        let shown = self.admin.get(&path).await.unwrap();
        shown.text("/server/OS-EXT-SRV-ATTR:host")
    }

    async fn asks(&self, what: &str) {
        asks(&self.admin, &self.id, what).await;
    }

    /// How many hosts have anything of the server.
    fn holders(&self) -> usize {
        let has = |agent: &usize| !self.cloud.machine_leftovers(*agent).is_empty();
        (0..2).filter(has).count()
    }

    async fn is_on_one_host(&self) {
        let left = until("one host has it", Duration::from_secs(30), || async {
            match self.holders() {
                1 => Ok(()),
                more => Err(format!("{more} hosts have it")),
            }
        });
        left.await.unwrap();
        assert_eq!(self.cloud.machine_processes().len(), 1);
    }
}

/// It stays so; and once more, to go back to the disk as it was then.
async fn resized_where_it_is(told: &Told<'_>, boots: &mut Vec<String>) {
    let first = told.host().await;
    // Where it is, and it stays so.
    told.openstack
        .done("server resize --flavor larger --wait one");
    let resized = told.is("VERIFY_RESIZE").await;
    assert_eq!(resized["flavor"]["original_name"], "larger");
    assert_eq!(told.host().await, first);
    boots.push(another_boot(&told.admin, &told.id, boots).await);
    told.asks("disk-check 0 65536 65536 7").await;
    told.openstack.done("server resize confirm one");
    told.is("ACTIVE").await;

    // And back, by a second thought: to the disk as it was then.
    told.openstack
        .done("server resize --flavor tiny --wait one");
    told.is("VERIFY_RESIZE").await;
    boots.push(another_boot(&told.admin, &told.id, boots).await);
    told.asks("disk-write 0 65536 65536 8").await;
    told.openstack.done("server resize revert one");
    let back = told.is("ACTIVE").await;
    assert_eq!(back["flavor"]["original_name"], "larger");
    boots.push(another_boot(&told.admin, &told.id, boots).await);
    told.asks("disk-check 0 65536 65536 7").await;
    told.is_on_one_host().await;
}

/// To another host, to stay there; and once more, to go back.
async fn migrated_and_back(told: &Told<'_>, boots: &mut Vec<String>) {
    let first = told.host().await;
    // To another host, and it stays there.
    told.openstack.done("server migrate --wait one");
    told.is("VERIFY_RESIZE").await;
    let second = told.host().await;
    assert_ne!(second, first);
    assert_eq!(told.holders(), 2, "it can go back");
    boots.push(another_boot(&told.admin, &told.id, boots).await);
    told.asks("disk-check 0 65536 65536 7").await;
    told.asks("disk-write 0 65536 65536 9").await;
    told.openstack.done("server migration confirm one");
    told.is("ACTIVE").await;
    told.is_on_one_host().await;

    // Once more, and back.
    told.openstack.done("server migrate --wait one");
    told.is("VERIFY_RESIZE").await;
    assert_eq!(told.host().await, first);
    told.asks("disk-check 0 65536 65536 9").await;
    told.asks("disk-write 0 65536 65536 1").await;
    told.openstack.done("server migration revert one");
    told.is("ACTIVE").await;
    assert_eq!(told.host().await, second);
    boots.push(another_boot(&told.admin, &told.id, boots).await);
    told.asks("disk-check 0 65536 65536 9").await;
    told.is_on_one_host().await;
}

#[test]
fn cloud_a_server_is_resized_and_migrated_and_stays_or_goes_back_with_its_disk() {
    in_a_segment(
        "cloud_a_server_is_resized_and_migrated_and_stays_or_goes_back_with_its_disk",
        resized_and_migrated,
    );
}

async fn resized_and_migrated() {
    let options = Options {
        agents: 2,
        networks: true,
        ..Options::default()
    };
    let cloud = Cloud::start(options).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin: Client = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 0 tiny");
    openstack.json("flavor create --ram 128 --vcpus 2 --disk 0 larger");
    let made = openstack.json("server create --image probe --flavor tiny --nic none --wait one");
    let id = made["id"].as_str().unwrap().to_owned();
    let told = Told {
        cloud: &cloud,
        admin,
        openstack,
        id,
    };
    let mut boots = vec![boot(&told.admin, &told.id).await];
    let first = told.host().await;
    told.asks("disk-write 0 65536 65536 7").await;

    resized_where_it_is(&told, &mut boots).await;
    migrated_and_back(&told, &mut boots).await;

    // One that is shut off stays so.
    told.openstack.done("server stop one");
    told.is("SHUTOFF").await;
    told.openstack.done("server migrate --wait one");
    told.is("VERIFY_RESIZE").await;
    told.openstack.done("server migration confirm one");
    told.is("SHUTOFF").await;
    assert_eq!(told.host().await, first);
    told.openstack.done("server start one");
    told.is("ACTIVE").await;
    boots.push(another_boot(&told.admin, &told.id, &boots).await);
    told.asks("disk-check 0 65536 65536 9").await;
    let listed = told.openstack.json("server migration list --server one");
    let column = |name: &str| -> Vec<&str> {
        let rows = listed.as_array().unwrap().iter();
        rows.map(|row| row[name].as_str().unwrap()).collect()
    };
    assert_eq!(
        column("Status"),
        [
            "confirmed",
            "reverted",
            "confirmed",
            "reverted",
            "confirmed"
        ]
    );
    assert_eq!(
        column("Type"),
        ["migration", "migration", "migration", "resize", "resize"]
    );
    // Deleted while it could go back, it leaves nothing anywhere.
    told.openstack.done("server migrate --wait one");
    told.is("VERIFY_RESIZE").await;
    told.openstack.done("server delete --wait one");
    let gone = until("nothing is left", Duration::from_secs(30), || async {
        match told.holders() {
            0 => Ok(()),
            left => Err(format!("{left} hosts have something of it")),
        }
    });
    gone.await.unwrap();
    assert_eq!(cloud.machine_processes(), []);
}

#[test]
fn cloud_a_server_that_was_resized_stays_so_by_itself_after_a_while() {
    in_a_segment(
        "cloud_a_server_that_was_resized_stays_so_by_itself_after_a_while",
        confirmed_by_nobody,
    );
}

async fn confirmed_by_nobody() {
    let options = Options {
        agents: 2,
        networks: true,
        serve: &["--resize-confirm-window", "1"],
        ..Options::default()
    };
    let cloud = Cloud::start(options).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin: Client = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 0 tiny");
    openstack.json("flavor create --ram 128 --vcpus 2 --disk 0 larger");
    let made = openstack.json("server create --image probe --flavor tiny --nic none --wait one");
    let id = made["id"].as_str().unwrap().to_owned();
    openstack.done("server resize --flavor larger one");
    let path = format!("/compute/v2.1/os-migrations?instance_uuid={id}");
    let stays = until("it stays so", Duration::from_secs(60), || async {
        let listed = admin.get(&path).await.unwrap();
        match listed.text("/migrations/0/status").as_str() {
            "confirmed" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    let stays = stays.await;
    stays.unwrap_or_else(|error| panic!("{error:#}\n{}", cloud.logs()));
    let shown = admin.until_status(&id, "ACTIVE").await.unwrap();
    assert_eq!(shown["flavor"]["original_name"], "larger");
    openstack.done("server delete --wait one");
}
