//! What CI runs of the lab, but for the devices of `hotplug`: the tiny guest on two hosts, and one boot of a
//! whole Debian.

use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fractus_lab::{Host, TinyGuest};
use fractus_tests::harness::Client;
use serde_json::json;

use crate::cloud::{
    act, create, debian_disk, debian_image, delete, flavor, lab, logged, prompted, said, settled,
    tiny_image,
};
use crate::terminal::Terminal;

/// At its third boot the guest powers itself off.
const USER_DATA: &str = "#!/bin/sh
echo user data: on $(hostname), boot $(cat /disk/boots)
[ $(cat /disk/boots) != 3 ] || { echo user data: power off; sync; poweroff -f; }
";

#[tokio::test]
#[ignore = "takes hosts in software: scripts/lab test"]
async fn scenario_servers_with_stock_kernels_live_on_two_hosts() {
    let began = Instant::now();
    let lab = lab(2).await;
    let joined = began.elapsed().as_secs_f64();
    println!("two hosts joined after {joined:.1} s");
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2, 256, 1).await;
    let mut servers = Vec::new();
    for host in &lab.hosts {
        let server = json!({"name": format!("on-{}", host.name), "imageRef": image,
            "flavorRef": flavor, "host": host.name, "user_data": STANDARD.encode(USER_DATA)});
        servers.push(create(&admin, server).await);
    }
    let mut nonces = Vec::new();
    for (server, host) in servers.iter().zip(&lab.hosts) {
        nonces.push(first_boot(&admin, server, &host.name, &tiny.release).await);
    }
    for host in &lab.hosts {
        let huge = huge_pages(host);
        assert!(huge >= 32 << 10, "{huge} KiB on {}", host.name);
    }

    stopped_and_started(&admin, &servers[0], &nonces[0]).await;
    let controller = lab.controller.for_agents();
    let host = &lab.hosts[1];
    host.kill_agent().unwrap();
    host.start_agent(&controller, "none").unwrap();
    let mut terminal = Terminal::shell(&admin, &servers[1]).await;
    let heard = terminal.run("cat /run/nonce").await;
    assert!(heard.contains(&nonces[1]), "it is another boot: {heard}");

    // Twice more, and it goes by itself.
    act(&admin, &servers[1], json!({"reboot": {"type": "SOFT"}})).await;
    logged(&admin, &servers[1], "user data: on on-host2, boot 2").await;
    settled(&admin, &servers[1], "ACTIVE").await;
    act(&admin, &servers[1], json!({"reboot": {"type": "HARD"}})).await;
    logged(&admin, &servers[1], "user data: power off").await;
    settled(&admin, &servers[1], "SHUTOFF").await;

    for (server, host) in servers.iter().zip(&lab.hosts) {
        delete(&admin, server).await;
        let left = host.done("ps -o args | grep '[f]ractus-agent vm' || true");
        assert_eq!(left.unwrap(), "", "processes are left on {}", host.name);
    }
    println!("all of it: {:.1} s", began.elapsed().as_secs_f64());
}

/// KiB of the guest's memory on the host that are huge pages; there is one machine.
fn huge_pages(host: &Host) -> u64 {
    let script = "pid=$(ps -o pid,args | grep '[f]ractus-agent vm' | awk '{print $1}' | tail -n 1); \
        awk '/^ShmemPmdMapped:/ {print $2}' /proc/$pid/smaps_rollup";
    let text = host.done(script).unwrap();
    text.trim().parse().unwrap_or_else(|_| panic!("{text}"))
}

/// What the machine is to the guest; gives what lives in its memory only.
async fn first_boot(admin: &Client, server: &str, host: &str, release: &str) -> String {
    let log = logged(admin, server, "tiny: ready hostname=").await;
    assert_eq!(said(&log, "tiny: boot", "kernel"), Some(release));
    assert_eq!(said(&log, "tiny: boot", "cpus"), Some("2"));
    assert_eq!(said(&log, "mounted", "boots"), Some("1"));
    assert_eq!(said(&log, "mounted", "bytes"), Some("1073741824"));
    let name = format!("on-{host}");
    assert_eq!(said(&log, "tiny: ready", "hostname"), Some(&*name));
    assert!(
        log.contains(&format!("user data: on {name}, boot 1")),
        "{log}"
    );
    let shown = settled(admin, server, "ACTIVE").await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], host);
    said(&log, "tiny: boot", "nonce").unwrap().to_owned()
}

/// Gracefully, as its own log says; what it had written is there afterwards.
async fn stopped_and_started(admin: &Client, server: &str, nonce: &str) {
    act(admin, server, json!({"os-stop": null})).await;
    settled(admin, server, "SHUTOFF").await;
    let log = logged(admin, server, "going down").await;
    assert!(log.contains("tiny: power button"), "{log}");
    act(admin, server, json!({"os-start": null})).await;
    let log = logged(admin, server, "boots=2").await;
    let second = said(&log, "tiny: boot", "nonce").unwrap();
    assert_ne!(second, nonce, "a boot, not a resume");
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn scenario_debian_boots_from_its_disk_image() {
    let disk = debian_disk();
    let lab = lab(1).await;
    let admin = lab.controller.admin().await.unwrap();
    let image = debian_image(&admin, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let began = Instant::now();
    let server = json!({"name": "debian", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    prompted(&admin, &server, "login:").await;
    println!("login after {:.0} s", began.elapsed().as_secs_f64());
    let log = logged(&admin, &server, "finished at").await;
    println!("{log}");
    println!("cloud-init after {:.0} s", began.elapsed().as_secs_f64());
    println!("{}", lab.hosts[0].exits().unwrap());
    assert!(!log.contains("Failed to start"), "a unit failed");
    assert!(!log.contains("emergency mode"), "emergency mode");
    assert!(log.contains("debian login:"), "it has its server's name");

    act(&admin, &server, json!({"os-stop": null})).await;
    let log = logged(&admin, &server, "reboot: Power down").await;
    let (_, shutdown) = log.split_once("finished at").unwrap();
    assert!(shutdown.contains("Stopped"), "an orderly shutdown: {log}");
    settled(&admin, &server, "SHUTOFF").await;
}
