//! The `openstack` client, unmodified from PyPI, drives a whole cloud.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use fractus_tests::harness::{Cli, Cloud, Options};
use serde_json::Value;

fn names(list: &Value) -> Vec<&str> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|row| row["Name"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn cloud_identity_by_the_openstack_client() {
    let cloud = Cloud::start(Options {
        agents: 0,
        ..Options::default()
    })
    .await
    .unwrap();
    let openstack = Cli::openstack(&cloud);
    let token = openstack.json("token issue");
    assert!(
        token["id"].as_str().is_some_and(|id| id.len() > 20),
        "{token}"
    );
    let catalog = openstack.json("catalog list");
    for service in ["identity", "image", "compute"] {
        let found = catalog
            .as_array()
            .unwrap()
            .iter()
            .any(|entry| entry["Type"] == service);
        assert!(found, "{service} is not in {catalog}");
    }
    let project = openstack.json("project create --description d blue");
    assert_eq!(project["name"], "blue");
    assert!(names(&openstack.json("project list")).contains(&"blue"));
    let user = openstack.json("user create --project blue --password pw ann");
    assert_eq!(user["default_project_id"], project["id"]);
    assert!(names(&openstack.json("user list")).contains(&"ann"));
    openstack.json("role create painter");
    assert!(names(&openstack.json("role list")).contains(&"painter"));
    openstack.done("role add --project blue --user ann painter");
    openstack.done("role add --project blue --user ann member");
    let roles = openstack.json("role assignment list --user ann --project blue --names");
    assert_eq!(roles.as_array().unwrap().len(), 2, "{roles}");
    let hers = "--os-username ann --os-password pw --os-project-name blue token issue";
    assert_eq!(openstack.json(hers)["project_id"], project["id"]);
    let wrong = openstack.run("--os-password wrong token issue");
    assert!(!wrong.status.success());
    assert!(
        String::from_utf8_lossy(&wrong.stderr).contains("401"),
        "{wrong:?}"
    );
}

#[tokio::test]
async fn cloud_images_and_flavors_by_the_openstack_client() {
    let cloud = Cloud::start(Options {
        agents: 0,
        ..Options::default()
    })
    .await
    .unwrap();
    let openstack = Cli::openstack(&cloud);
    let folder = tempfile::tempdir().unwrap();
    let (data, saved) = (folder.path().join("data"), folder.path().join("saved"));
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&data, &bytes).unwrap();
    let made = openstack.json(&format!(
        "image create --disk-format raw --container-format bare --property colour=red --file {} disk",
        data.display()
    ));
    let id = made["id"].as_str().unwrap();
    let shown = openstack.json("image show disk");
    assert_eq!(
        (&shown["status"], &shown["size"]),
        (&"active".into(), &bytes.len().into())
    );
    assert_eq!(shown["properties"]["colour"], "red", "{shown}");
    openstack.done(&format!("image save --file {} {id}", saved.display()));
    assert_eq!(std::fs::read(&saved).unwrap(), bytes);
    openstack.done("image delete disk");
    assert!(!openstack.run("image show disk").status.success());

    let flavor = openstack.json("flavor create --ram 64 --vcpus 1 --disk 0 tiny");
    assert_eq!(flavor["ram"], 64);
    assert!(names(&openstack.json("flavor list")).contains(&"tiny"));
    let key = folder.path().join("key.pub");
    let text =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHFbqgQGqQ7OZk9m0hgF4TzJrGZ3b8xk5W8e0x5xq1Ez a@b\n";
    std::fs::write(&key, text).unwrap();
    openstack.json(&format!(
        "keypair create --public-key {} mine",
        key.display()
    ));
    assert!(names(&openstack.json("keypair list")).contains(&"mine"));
    openstack.done("keypair delete mine");
}

#[tokio::test]
async fn cloud_servers_by_the_openstack_client() {
    let cloud = Cloud::start(Options::default()).await.unwrap();
    let openstack = Cli::openstack(&cloud);
    let admin = cloud.admin().await.unwrap().at(96);
    cloud.probe_image(&admin, "tick_ms=100").await.unwrap();
    openstack.json("flavor create --ram 64 --vcpus 1 --disk 0 tiny");
    let made = openstack.json("server create --image probe --flavor tiny --nic none --wait one");
    let id = made["id"].as_str().unwrap().to_owned();
    assert_eq!(made["status"], "ACTIVE", "{made}");
    assert_eq!(names(&openstack.json("server list")), ["one"]);
    assert_eq!(openstack.json("server show one")["id"], id.as_str());
    let log = admin.until_logged(&id, "tick 2 ").await.unwrap();
    assert!(
        openstack
            .done("console log show one")
            .contains("boot nonce="),
        "{log}"
    );
    for (command, status) in [
        ("server pause one", "PAUSED"),
        ("server unpause one", "ACTIVE"),
        ("server suspend one", "SUSPENDED"),
        ("server resume one", "ACTIVE"),
        ("server stop one", "SHUTOFF"),
        ("server start one", "ACTIVE"),
        ("server reboot --hard one", "ACTIVE"),
        ("server rebuild --image probe one", "ACTIVE"),
    ] {
        openstack.done(command);
        admin
            .until_status(&id, status)
            .await
            .unwrap_or_else(|error| {
                panic!("{command}: {error:#}\n{}", cloud.logs());
            });
    }
    openstack.done("server delete --wait one");
    assert_eq!(names(&openstack.json("server list")), [""; 0]);
    assert_eq!(cloud.machine_processes(), []);
}
