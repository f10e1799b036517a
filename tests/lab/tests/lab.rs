//! Stock Debian on our own hypervisor, on a real `kvm_amd`. Run by `scripts/lab test`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::path::Path;

use fractus_lab::{Lab, Options, TinyGuest};
use fractus_tests::harness::Client;
use serde_json::{Value, json};

/// Uploads a file; gives the image's id.
async fn upload(client: &Client, image: Value, data: Vec<u8>) -> String {
    let made = client.post("/image/v2/images", image).await.unwrap();
    let id = made.expect_status(201).unwrap().text("/id");
    let path = format!("/image/v2/images/{id}/file");
    let done = client.upload(&path, data).await.unwrap();
    done.expect_status(204).unwrap();
    id
}

async fn upload_file(client: &Client, name: &str, path: &Path) -> String {
    let image = json!({"name": name, "disk_format": "raw", "container_format": "bare"});
    upload(client, image, std::fs::read(path).unwrap()).await
}

/// An image that boots the tiny guest with this command line, its disk empty.
async fn tiny_image(client: &Client, tiny: &TinyGuest, command_line: &str) -> String {
    let kernel = upload_file(client, "tiny-kernel", &tiny.kernel).await;
    let ramdisk = upload_file(client, "tiny-ramdisk", &tiny.initrd).await;
    let image = json!({"name": "tiny", "disk_format": "raw", "container_format": "bare",
        "kernel_id": kernel, "ramdisk_id": ramdisk, "os_command_line": command_line});
    upload(client, image, vec![0; 1 << 20]).await
}

async fn flavor(client: &Client, vcpus: u32) -> String {
    let flavor = json!({"flavor": {"name": format!("tiny-{vcpus}"), "vcpus": vcpus, "ram": 256,
        "disk": 1}});
    let made = client.post("/compute/v2.1/flavors", flavor).await.unwrap();
    made.expect_status(200).unwrap().text("/flavor/id")
}

/// The value of `name=` in the last line that holds `mark`.
fn said<'a>(log: &'a str, mark: &str, name: &str) -> Option<&'a str> {
    let line = log.lines().rev().find(|line| line.contains(mark))?;
    let words = line.split_whitespace();
    let mut values = words.filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    values.next()
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_a_stock_debian_kernel_lives_as_a_server() {
    let lab = Lab::start(Options {
        hosts: 1,
        ..Options::default()
    })
    .await
    .unwrap();
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2).await;
    let server = admin.create_server("tiny", &image, &flavor).await.unwrap();

    let log = admin
        .until_logged(&server, "tiny: ready hostname=")
        .await
        .unwrap();
    println!("{log}");
    assert_eq!(said(&log, "tiny: boot", "kernel"), Some(&*tiny.release));
    assert_eq!(said(&log, "tiny: boot", "cpus"), Some("2"));
    assert_eq!(said(&log, "mounted", "boots"), Some("1"));
    assert_eq!(said(&log, "mounted", "bytes"), Some("1073741824"));
    let first = said(&log, "tiny: boot", "nonce").unwrap().to_owned();
    admin.until_status(&server, "ACTIVE").await.unwrap();

    // A graceful stop: the guest's own log says so.
    let stopped = admin.act(&server, json!({"os-stop": null})).await.unwrap();
    stopped.expect_status(202).unwrap();
    admin.until_status(&server, "SHUTOFF").await.unwrap();
    let log = admin.until_logged(&server, "going down").await.unwrap();
    println!("{log}");
    assert!(log.contains("tiny: power button"), "{log}");

    // Its data is there when it comes back.
    let started = admin.act(&server, json!({"os-start": null})).await.unwrap();
    started.expect_status(202).unwrap();
    let log = admin.until_logged(&server, "boots=2").await.unwrap();
    let second = said(&log, "tiny: boot", "nonce").unwrap();
    assert_ne!(second, first, "a boot, not a resume");
}
