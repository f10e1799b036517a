//! Stock Debian on our own hypervisor, on a real `kvm_amd`. Run by `scripts/lab test`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fractus_lab::{Lab, Options, TinyGuest};
use fractus_tests::harness::{Client, until};
use fractus_tests::tidy::checkout;
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

/// GiB of disk, MiB of memory.
async fn flavor(client: &Client, vcpus: u32, ram: u32, disk: u32) -> String {
    let flavor = json!({"flavor": {"name": format!("{vcpus}-{ram}-{disk}"), "vcpus": vcpus,
        "ram": ram, "disk": disk}});
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
    let flavor = flavor(&admin, 2, 256, 1).await;
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

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_a_server_survives_its_agent_and_returns_with_its_host() {
    let mut lab = Lab::start(Options {
        hosts: 1,
        ..Options::default()
    })
    .await
    .unwrap();
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 1, 256, 1).await;
    let server = admin.create_server("tiny", &image, &flavor).await.unwrap();
    let log = admin
        .until_logged(&server, "tiny: ready hostname=")
        .await
        .unwrap();
    let nonce = said(&log, "tiny: boot", "nonce").unwrap().to_owned();

    // kill -9 of the agent: the guest's process is the same afterwards.
    let controller = lab.controller.for_agents();
    let host = &mut lab.hosts[0];
    let process = "ps -o pid,args | grep '[f]ractus-agent vm' | awk '{print $1}'";
    let before = host.done(process).unwrap();
    assert!(!before.trim().is_empty(), "no process of the machine");
    host.kill_agent().unwrap();
    host.start_agent(&controller, "none").unwrap();
    assert_eq!(host.done(process).unwrap(), before);
    let log = admin.until_logged(&server, "tiny: ready").await.unwrap();
    assert_eq!(said(&log, "tiny: boot", "nonce"), Some(&*nonce));

    // Nothing gets through a cut cable, and everything again once it is mended.
    host.cut_network().unwrap();
    assert!(host.run_within("true", Duration::from_secs(2)).is_err());
    host.mend_network().unwrap();
    assert_eq!(host.done("hostname").unwrap(), "host1\n");

    // The host loses power: the server boots again with it, nobody having asked.
    host.done("sync").unwrap();
    let began = Instant::now();
    host.restart().unwrap();
    host.start_agent(&controller, "none").unwrap();
    println!("host is back after {:.1} s", began.elapsed().as_secs_f64());
    let log = admin.until_logged(&server, "boots=2").await.unwrap();
    assert_ne!(said(&log, "tiny: boot", "nonce"), Some(&*nonce));
    admin.until_status(&server, "ACTIVE").await.unwrap();
}

/// The image that images/debian builds.
fn debian() -> PathBuf {
    let output = Command::new(checkout().join("images/debian/build"))
        .stderr(std::process::Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "images/debian/build failed");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// A distribution boots in software: as long as it takes, within reason.
async fn until_logged_slowly(client: &Client, server: &str, wanted: &str) -> String {
    let what = format!("{wanted:?} in the log of {server}");
    until(&what, Duration::from_secs(900), || async {
        let answer = client.act(server, json!({"os-getConsoleOutput": {}})).await;
        let text = answer.map_err(|e| format!("{e:#}"))?.text("/output");
        if text.contains(wanted) {
            Ok(text)
        } else {
            Err(text)
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_debian_boots_from_its_disk_image() {
    let lab = Lab::start(Options {
        hosts: 1,
        ..Options::default()
    })
    .await
    .unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let debian = debian();
    // Nothing says which kernel: the machine finds it on the disk.
    let image = json!({"name": "debian", "disk_format": "qcow2", "container_format": "bare"});
    let disk = std::fs::read(debian.join("disk.qcow2")).unwrap();
    let image = upload(&admin, image, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let began = Instant::now();
    let server = admin
        .create_server("debian", &image, &flavor)
        .await
        .unwrap();
    let log = until_logged_slowly(&admin, &server, "login:").await;
    println!("login after {:.0} s", began.elapsed().as_secs_f64());
    let log = match log.contains("Cloud-init v") && log.contains("finished at") {
        true => log,
        false => until_logged_slowly(&admin, &server, "finished at").await,
    };
    println!("{log}");
    println!("cloud-init after {:.0} s", began.elapsed().as_secs_f64());
    assert!(!log.contains("Failed to start"), "a unit failed");
    assert!(!log.contains("emergency mode"), "emergency mode");

    let stopped = admin.act(&server, json!({"os-stop": null})).await.unwrap();
    stopped.expect_status(202).unwrap();
    let log = until_logged_slowly(&admin, &server, "reboot: Power down").await;
    assert!(log.contains("Stopped"), "an orderly shutdown: {log}");
    admin.until_status(&server, "SHUTOFF").await.unwrap();
}

/// Boots in all; four at a time.
fn boots() -> usize {
    let asked = std::env::var("FRACTUS_BOOTS");
    asked.ok().and_then(|n| n.parse().ok()).unwrap_or(4)
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_soak_of_boots_four_at_once() {
    let lab = Lab::start(Options {
        hosts: 1,
        ..Options::default()
    })
    .await
    .unwrap();
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 1, 256, 1).await;
    let mut done = 0;
    while done < boots() {
        let mut servers = Vec::new();
        for number in 0..4 {
            let name = format!("soak-{}", done + number);
            servers.push(admin.create_server(&name, &image, &flavor).await.unwrap());
        }
        for server in &servers {
            let log = until_logged_slowly(&admin, server, "tiny: ready hostname=").await;
            assert_eq!(said(&log, "mounted", "boots"), Some("1"), "{log}");
        }
        for server in &servers {
            let path = format!("/compute/v2.1/servers/{server}");
            let deleted = admin.delete(&path).await.unwrap();
            deleted.expect_status(204).unwrap();
            admin.until_gone(server).await.unwrap();
        }
        done += servers.len();
        println!("{done} boots");
    }
}
