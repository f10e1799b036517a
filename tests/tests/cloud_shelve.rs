//! Servers that are kept in an image and run again on another host, by the client that a user has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use fractus_tests::harness::{Cli, Client, Cloud, Options, asks, in_a_segment, until};

async fn host_of(admin: &Client, server: &str) -> String {
    let path = format!("/compute/v2.1/servers/{server}");
    let shown = admin.get(&path).await.unwrap();
    shown.text("/server/OS-EXT-SRV-ATTR:host")
}

/// Which boot of the guest its console's log tells of; it begins anew with each host.
async fn boot(admin: &Client, server: &str) -> String {
    let log = admin.until_logged(server, "tick 3").await.unwrap();
    let (_, after) = log.rsplit_once("boot nonce=").unwrap();
    after.split_whitespace().next().unwrap().to_owned()
}

/// No host has anything of a server.
async fn nothing_is_left(cloud: &Cloud) {
    assert_eq!(cloud.machine_processes(), []);
    for agent in 0..2 {
        let left = until("nothing is left", Duration::from_secs(30), || async {
            match cloud.machine_leftovers(agent) {
                left if left.is_empty() => Ok(()),
                left => Err(format!("{left:?}")),
            }
        });
        left.await.unwrap();
    }
}

#[test]
fn cloud_a_server_is_shelved_and_runs_again_on_another_host_with_what_was_written() {
    in_a_segment(
        "cloud_a_server_is_shelved_and_runs_again_on_another_host_with_what_was_written",
        shelved_and_unshelved,
    );
}

async fn shelved_and_unshelved() {
    let options = Options {
        agents: 2,
        networks: true,
        ..Options::default()
    };
    let cloud = Cloud::start(options).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin: Client = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    // As large as its image: a GiB takes a debug build its time, three times over.
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 0 tiny");
    let made = openstack.json("server create --image probe --flavor tiny --nic none --wait one");
    let id = made["id"].as_str().unwrap().to_owned();
    let (first, born) = (host_of(&admin, &id).await, boot(&admin, &id).await);
    asks(&admin, &id, "disk-write 0 65536 65536 7").await;

    openstack.done("server shelve --offload --wait one");
    let shown = admin.until_status(&id, "SHELVED_OFFLOADED").await;
    let shown = shown.unwrap_or_else(|error| panic!("{error:#}\n{}", cloud.logs()));
    assert!(shown["OS-EXT-SRV-ATTR:host"].is_null(), "{shown}");
    let image = openstack.json("image show one-shelved");
    assert_eq!(image["status"], "active");
    assert_eq!(image["size"], 1 << 20);
    nothing_is_left(&cloud).await;

    // Elsewhere: its host takes nobody meanwhile.
    openstack.done(&format!(
        "compute service set --disable {first} nova-compute"
    ));
    openstack.done("server unshelve --wait one");
    admin.until_status(&id, "ACTIVE").await.unwrap();
    let second = host_of(&admin, &id).await;
    assert_ne!(second, first);
    let reborn = boot(&admin, &id).await;
    assert_ne!(reborn, born, "it is a new boot");
    asks(&admin, &id, "disk-check 0 65536 65536 7").await;
    let images = openstack.json("image list --name one-shelved");
    assert_eq!(images.as_array().map(Vec::len), Some(0), "{images}");

    // And back, to a host that has had it before.
    asks(&admin, &id, "disk-write 0 65536 65536 8").await;
    openstack.done("server shelve --wait one");
    admin.until_status(&id, "SHELVED_OFFLOADED").await.unwrap();
    openstack.done(&format!(
        "compute service set --enable {first} nova-compute"
    ));
    let back = format!("--os-compute-api-version 2.91 server unshelve --host {first} --wait one");
    openstack.done(&back);
    admin.until_status(&id, "ACTIVE").await.unwrap();
    assert_eq!(host_of(&admin, &id).await, first);
    assert_ne!(boot(&admin, &id).await, reborn);
    asks(&admin, &id, "disk-check 0 65536 65536 8").await;

    // One that is shelved goes with its image.
    openstack.done("server shelve --wait one");
    admin.until_status(&id, "SHELVED_OFFLOADED").await.unwrap();
    openstack.done("server delete --wait one");
    let images = openstack.json("image list --name one-shelved");
    assert_eq!(images.as_array().map(Vec::len), Some(0), "{images}");
    nothing_is_left(&cloud).await;
}
