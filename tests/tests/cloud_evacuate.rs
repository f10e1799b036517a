//! A host loses its power, its server is made anew on another, and the host comes back: by the client that operators
//! have.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use fractus_tests::harness::{Cli, Client, Cloud, Options, asks, has_lost, in_a_segment, until};

/// Asked again where its connection was closed while the client before it took its time.
async fn host_of(admin: &Client, server: &str) -> String {
    let path = format!("/compute/v2.1/servers/{server}");
    let asked = until("its host is known", Duration::from_secs(10), || async {
        let shown = admin.get(&path).await;
        shown.map_err(|error| format!("{error:#}"))
    });
    let shown = asked.await.unwrap();
    shown.text("/server/OS-EXT-SRV-ATTR:host")
}

/// `agent-N`, as its host is called.
fn number(host: &str) -> usize {
    host.strip_prefix("agent-").unwrap().parse().unwrap()
}

/// Which boot of the guest its console's log tells of; it begins anew with each host.
async fn boot(admin: &Client, server: &str) -> String {
    let log = admin.until_logged(server, "tick 3").await.unwrap();
    let (_, after) = log.rsplit_once("boot nonce=").unwrap();
    after.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn cloud_a_server_is_evacuated_and_its_host_drops_it_when_it_has_power_again() {
    in_a_segment(
        "cloud_a_server_is_evacuated_and_its_host_drops_it_when_it_has_power_again",
        evacuated,
    );
}

async fn evacuated() {
    let options = Options {
        agents: 2,
        networks: true,
        ..Options::default()
    };
    let mut cloud = Cloud::start(options).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin: Client = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 0 tiny");
    let mut ids = Vec::new();
    for name in ["one", "two", "three"] {
        // All on one host.
        let made = openstack.json(&format!(
            "--os-compute-api-version 2.74 server create --image probe --flavor tiny --nic none --host agent-0 --wait {name}"
        ));
        ids.push(made["id"].as_str().unwrap().to_owned());
    }
    let (one, two, three) = (&ids[0], &ids[1], &ids[2]);
    let first = host_of(&admin, one).await;
    assert_eq!(first, host_of(&admin, two).await);
    let born = boot(&admin, one).await;
    asks(&admin, one, "disk-write 0 65536 65536 7").await;

    let refused = openstack.run("server evacuate one");
    let said = String::from_utf8_lossy(&refused.stderr);
    let words = format!("Compute service of {first} is still in use.");
    assert!(!refused.status.success() && said.contains(&words), "{said}");

    cloud.power_off(number(&first)).await.unwrap();
    assert_eq!(cloud.machine_processes(), []);
    openstack.done(&format!("compute service set --down {first} nova-compute"));
    // Not with --wait: the client compares the status in small letters with ACTIVE, and waits for ever.
    openstack.done("--os-compute-api-version 2.90 server evacuate one");
    let shown = admin.until_status(one, "ACTIVE").await;
    shown.unwrap_or_else(|error| panic!("{error:#}\n{}", cloud.logs()));
    let second = host_of(&admin, one).await;
    assert_ne!(second, first);
    // From 2.95 on it stays off.
    let to = format!("--os-compute-api-version 2.95 server evacuate --host {second} three");
    openstack.done(&to);
    admin.until_status(three, "SHUTOFF").await.unwrap();
    assert_eq!(host_of(&admin, three).await, second);
    assert_ne!(boot(&admin, one).await, born, "it is a new boot");
    // Its disk was on its old host, and was made anew.
    has_lost(&admin, one, "0 65536 65536 7").await;
    let listed = openstack.json("server migration list --server one");
    assert_eq!(listed[0]["Status"], "done", "{listed}");

    // Power again: it starts neither the server that is another's, nor, declared to be down still, its own.
    cloud.power_on(number(&first)).unwrap();
    let left = until("the old host drops it", Duration::from_secs(60), || async {
        let left = cloud.machine_leftovers(number(&first));
        match left.iter().any(|file| file.starts_with(one.as_str())) {
            true => Err(format!("{left:?}")),
            false => Ok(()),
        }
    });
    left.await.unwrap();
    assert_eq!(
        cloud.machine_processes().len(),
        1,
        "{:?}",
        cloud.machine_processes()
    );
    openstack.done(&format!("compute service set --up {first} nova-compute"));
    let runs = until("its own runs again", Duration::from_secs(60), || async {
        match cloud.machine_processes() {
            both if both.len() == 2 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let runs = runs.await;
    runs.unwrap_or_else(|error| panic!("{error:#}\n{}", cloud.logs()));
    assert_eq!(host_of(&admin, two).await, first);
    for name in ["one", "two", "three"] {
        openstack.done(&format!("server delete --wait {name}"));
    }
    assert_eq!(cloud.machine_processes(), []);
}
