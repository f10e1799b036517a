//! Many times the same. `FRACTUS_FULL` asks for the numbers that were promised; else a few, to see that
//! the tests work. What fails is counted and shown, not tried again.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fractus_lab::{Count, Host, TinyGuest};
use fractus_tests::harness::Client;
use futures::FutureExt;
use serde_json::json;

use crate::cloud::{
    act, create, debian_disk, debian_image, delete, flavor, lab, logged, prompted, said, settled,
    times, tiny_image,
};
use crate::terminal::Terminal;

/// What an attempt did not bring about, as the panic says it that ended it.
async fn attempt(what: impl Future<Output = ()>) -> Result<Duration, String> {
    let began = Instant::now();
    let ended = AssertUnwindSafe(what).catch_unwind().await;
    ended.map(|()| began.elapsed()).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| Some((*panic.downcast_ref::<&str>()?).to_owned()))
            .unwrap_or_else(|| "a panic without words".to_owned())
    })
}

fn record(count: &mut Count, host: &Host, ended: Result<Duration, String>) {
    match ended {
        Ok(took) => count.succeeded(took),
        Err(why) => {
            count.failed(&why);
            // Nothing of it answers then.
            match host.broken() {
                Some(_) => println!("{}", host.serial_log()),
                None => println!("{:?}\n{:?}", host.traced(), host.agent_log()),
            }
        }
    }
}

fn conclude(count: Count) {
    let failures = count.finish().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn soak_boots_of_the_tiny_guest_four_at_once() {
    let lab = lab(1).await;
    lab.hosts[0].trace().unwrap();
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 1, 256, 1).await;
    let kernel = &tiny.release;
    let mut count = Count::new(&format!("Boots of the tiny guest, four at once ({kernel})"));
    // What a failed attempt leaves would be in the others' way.
    while count.attempted() < times(4, 100) && !count.has_failed() {
        let boots = (1..=4).map(|number| {
            let name = format!("soak-{}", count.attempted() + number);
            attempt(boot_tiny(&admin, name, &image, &flavor))
        });
        for ended in futures::future::join_all(boots).await {
            record(&mut count, &lab.hosts[0], ended);
        }
    }
    conclude(count);
}

async fn boot_tiny(admin: &Client, name: String, image: &str, flavor: &str) {
    let server = json!({"name": name, "imageRef": image, "flavorRef": flavor});
    let server = create(admin, server).await;
    let log = logged(admin, &server, "tiny: ready hostname=").await;
    assert_eq!(said(&log, "mounted", "boots"), Some("1"), "{log}");
    delete(admin, &server).await;
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn soak_reboots_of_one_guest() {
    let lab = lab(1).await;
    lab.hosts[0].trace().unwrap();
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2, 256, 1).await;
    let server = json!({"name": "again", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    logged(&admin, &server, "tiny: ready hostname=").await;
    let title = "Reboots of one tiny guest with 2 vCPUs: by itself, asked to, by a pulled plug";
    let mut count = Count::new(title);
    for number in 0..times(3, 20) {
        let ended = attempt(reboot_tiny(&admin, &server, number)).await;
        let go_on = ended.is_ok();
        record(&mut count, &lab.hosts[0], ended);
        // Another one would be of a guest of which nothing is known.
        if !go_on {
            break;
        }
    }
    conclude(count);
}

/// The reboot of this number, from 0.
async fn reboot_tiny(admin: &Client, server: &str, number: usize) {
    match number % 3 {
        0 => {
            let mut terminal = Terminal::shell(admin, server).await;
            terminal.send("reboot").await;
            // Hung up with something unread, the line would be lost on its way.
            terminal.until("reboot").await;
        }
        1 => act(admin, server, json!({"reboot": {"type": "SOFT"}})).await,
        _ => act(admin, server, json!({"reboot": {"type": "HARD"}})).await,
    }
    let log = logged(admin, server, &format!("boots={}\r\n", number + 2)).await;
    assert!(!log.contains("cannot be mounted"), "{log}");
    settled(admin, server, "ACTIVE").await;
    Terminal::shell(admin, server).await.run("true").await;
}

/// Fills and frees memory, and makes processes, for as long as the guest lives.
const LOAD: &str = r#"#!/bin/sh
mkdir -p /mnt
mount -t tmpfs -o size=350m load /mnt
while true; do ls /bin; uname; done >/dev/null &
fills=0
while true; do
  head -c 250m /dev/zero >/mnt/bytes
  rm /mnt/bytes
  fills=$((fills + 1))
  echo "load: fill $fills"
  sleep 2
done &
"#;

/// Also what a host of the lab is accepted by: one of two processors broke its guests in some of these.
#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn soak_of_two_guests_under_load() {
    let lab = lab(1).await;
    lab.hosts[0].trace().unwrap();
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2, 512, 1).await;
    let mut servers = Vec::new();
    for name in ["busy-1", "busy-2"] {
        let server = json!({"name": name, "imageRef": image, "flavorRef": flavor,
            "user_data": STANDARD.encode(LOAD)});
        servers.push(create(&admin, server).await);
    }
    let title = "Fills of 250 MiB, in each of two guests of 2 vCPUs that make processes meanwhile";
    let mut count = Count::new(title);
    for fill in 1..=times(2, 60) {
        let ended = attempt(async {
            for server in &servers {
                logged(&admin, server, &format!("load: fill {fill}\r\n")).await;
                settled(&admin, server, "ACTIVE").await;
            }
        });
        let ended = ended.await;
        let go_on = ended.is_ok();
        record(&mut count, &lab.hosts[0], ended);
        if !go_on {
            break;
        }
    }
    conclude(count);
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn soak_boots_of_debian() {
    let disk = debian_disk();
    let lab = lab(1).await;
    lab.hosts[0].trace().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = debian_image(&admin, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let mut count = Count::new("Boots of the whole Debian image, 2 vCPUs, with its shutdown");
    while count.attempted() < times(1, 10) && !count.has_failed() {
        let name = format!("debian-{}", count.attempted() + 1);
        let ended = attempt(boot_debian(&admin, &name, &image, &flavor)).await;
        record(&mut count, &lab.hosts[0], ended);
    }
    conclude(count);
}

async fn boot_debian(admin: &Client, name: &str, image: &str, flavor: &str) {
    let server = json!({"name": name, "imageRef": image, "flavorRef": flavor});
    let server = create(admin, server).await;
    prompted(admin, &server, &format!("{name} login:")).await;
    let log = logged(admin, &server, "finished at").await;
    assert!(!log.contains("Failed to start"), "a unit failed: {log}");
    act(admin, &server, json!({"os-stop": null})).await;
    logged(admin, &server, "reboot: Power down").await;
    settled(admin, &server, "SHUTOFF").await;
    delete(admin, &server).await;
}
