//! Images of servers, by the client that a user has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use fractus_tests::harness::{Cli, Client, Cloud, Options, asks, until};

/// Nothing of copies is left on the host.
async fn no_copies(cloud: &Cloud) {
    let gone = until("copies are gone", Duration::from_secs(30), || async {
        let left = cloud.machine_leftovers(0);
        let copies: Vec<_> = left.iter().filter(|name| name.contains("copy-")).collect();
        match copies.is_empty() {
            true => Ok(()),
            false => Err(format!("{left:?}")),
        }
    });
    gone.await.unwrap();
}

#[tokio::test]
async fn cloud_a_server_is_made_of_another_ones_disk_while_that_runs() {
    let cloud = Cloud::start(Options::default()).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin: Client = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 1 tiny");
    let made = openstack.json("server create --image probe --flavor tiny --nic none --wait one");
    let one = made["id"].as_str().unwrap().to_owned();
    admin.until_logged(&one, "tick 3").await.unwrap();
    asks(&admin, &one, "disk-write 0 1048576 1048576 7").await;

    let image =
        openstack.json("server image create --name shot --property purpose=test --wait one");
    assert_eq!(image["status"], "active", "{image}\n{}", cloud.logs());
    assert_eq!(image["disk_format"], "raw");
    assert_eq!(image["min_disk"], 1);
    assert_eq!(image["size"], 1_073_741_824);
    let properties = &image["properties"];
    assert_eq!(properties["image_type"], "snapshot");
    assert_eq!(properties["instance_uuid"], one.as_str());
    assert_eq!(properties["purpose"], "test");
    admin.until_status(&one, "ACTIVE").await.unwrap();
    no_copies(&cloud).await;
    // The first one's is another disk, by now.
    asks(&admin, &one, "disk-write 0 1048576 1048576 8").await;
    let log = admin.console_log(&one).await.unwrap();
    assert_eq!(log.matches("boot nonce=").count(), 1, "{log}");

    let made = openstack.json("server create --image shot --flavor tiny --nic none --wait two");
    let two = made["id"].as_str().unwrap().to_owned();
    admin.until_logged(&two, "tick 3").await.unwrap();
    asks(&admin, &two, "disk-check 0 1048576 1048576 7").await;

    // Of one that is stopped, by a client of before 2.45, which reads the address.
    openstack.done("server stop two");
    admin.until_status(&two, "SHUTOFF").await.unwrap();
    let again =
        openstack.json("--os-compute-api-version 2.1 server image create --name again --wait two");
    assert_eq!(again["status"], "active", "{again}\n{}", cloud.logs());
    assert_eq!(again["os_hash_value"], image["os_hash_value"]);
    admin.until_status(&two, "SHUTOFF").await.unwrap();
    openstack.done("server delete --wait one two");
    openstack.done("image delete shot again");
}
