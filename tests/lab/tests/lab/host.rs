//! What happens to a host, and what its servers see of it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fractus_lab::{Host, Kind, Lab, Options, TinyGuest, stripped};
use fractus_tests::harness::{Client, program, until};
use serde_json::json;

use crate::cloud::{create, flavor, lab, logged, said, settled, tiny_image};
use crate::terminal::Terminal;

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn host_a_server_survives_its_agent_and_returns_with_its_host() {
    let mut lab = lab(1).await;
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 1, 256, 1).await;
    let server = json!({"name": "tiny", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    let log = logged(&admin, &server, "tiny: ready hostname=").await;
    let nonce = said(&log, "tiny: boot", "nonce").unwrap().to_owned();

    // kill -9 of the agent: the guest's process is the same afterwards.
    let controller = lab.controller.for_agents();
    let host = &mut lab.hosts[0];
    let process = "ps -o pid,args | grep '[f]ractus-agent vm' | awk '{print $1}'";
    let before = host.done(process).unwrap();
    assert!(!before.trim().is_empty(), "no process of the machine");
    host.kill_agent().unwrap();
    host.start_agent(&controller, "none").unwrap();
    // Through the new agent, which knows the machine by then.
    let servers = [server.clone()];
    let same = nonces(&admin, &servers, "after kill -9").await;
    assert_eq!(same, std::slice::from_ref(&nonce));
    assert_eq!(host.done(process).unwrap(), before);

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
    let log = logged(&admin, &server, "boots=2").await;
    assert_ne!(said(&log, "tiny: boot", "nonce"), Some(&*nonce));
    settled(&admin, &server, "ACTIVE").await;
    assert!(!log.contains("boots=3"), "once is enough: {log}");
}

/// The unit's state and the pid of its process, once it runs.
async fn unit(host: &Host) -> String {
    let running = until("the agent's unit runs", Duration::from_secs(60), || async {
        let show = "systemctl show --property ActiveState,SubState,MainPID fractus-agent.service";
        let text = host.done(show).map_err(|e| format!("{e:#}"))?;
        let pid = text.lines().find_map(|line| line.strip_prefix("MainPID="));
        match pid {
            Some(pid) if text.contains("SubState=running") && pid != "0" => Ok(pid.to_owned()),
            _ => Err(text),
        }
    });
    running.await.unwrap()
}

/// Pids of the machines' processes.
fn machines(host: &Host) -> String {
    let script =
        "ps -eo pid,args | grep '[f]ractus-agent vm' | awk '{print $1}' | sort | tr '\\n' ' '";
    host.done(script).unwrap().trim().to_owned()
}

/// The most memory, bytes, that each machine's control group may use, in the unit that is for machines.
fn limits(host: &Host) -> Vec<u64> {
    let script = "cat /sys/fs/cgroup/system.slice/fractus-machines.service/fractus-*/*/memory.max";
    let text = host.done(script).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// What lives in the memory of each guest, asked of the guests themselves.
async fn nonces(admin: &Client, servers: &[String], when: &str) -> Vec<String> {
    println!("asking the guests {when}");
    let mut nonces = Vec::new();
    for server in servers {
        let mut terminal = Terminal::open(admin, server).await;
        let heard = terminal.run("echo nonce=$(cat /run/nonce)").await;
        nonces.push(said(&heard, "nonce=", "nonce").unwrap().to_owned());
    }
    nonces
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn host_with_systemd_keeps_its_guests_through_all_that_happens_to_its_agent() {
    let began = Instant::now();
    let previous = PathBuf::from(std::env::var_os("FRACTUS_PREVIOUS_AGENT").unwrap());
    let options = Options {
        hosts: 1,
        kind: Kind::Systemd,
        agent: Some(previous),
        ..Options::default()
    };
    let mut lab = Lab::start(options).await.unwrap();
    let joined = began.elapsed().as_secs_f64();
    println!("a host with systemd and the last release's agent joined after {joined:.1} s");
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 1, 256, 1).await;
    let mut servers = Vec::new();
    for name in ["one", "two"] {
        let server = json!({"name": name, "imageRef": image, "flavorRef": flavor});
        servers.push(create(&admin, server).await);
    }
    for server in &servers {
        logged(&admin, server, "tiny: ready hostname=").await;
        settled(&admin, server, "ACTIVE").await;
    }
    let first = nonces(&admin, &servers, "first").await;
    let host = &lab.hosts[0];
    let (guests, agent) = (machines(host), unit(host).await);
    assert_eq!(guests.split(' ').count(), 2, "{guests}");
    let limited = limits(host);
    assert_eq!(limited.len(), 2, "{limited:?}");
    assert!(
        limited.iter().all(|limit| *limit >= 256 << 20),
        "{limited:?}"
    );

    // The last release's agent gives its machines to the present one.
    let present = std::fs::read(stripped(&program("fractus-agent").unwrap()).unwrap()).unwrap();
    host.put("/usr/bin/fractus-agent.new", 0o755, &present)
        .unwrap();
    let upgrade =
        "mv /usr/bin/fractus-agent.new /usr/bin/fractus-agent && systemctl restart fractus-agent";
    host.done(upgrade).unwrap();
    let upgraded = unit(host).await;
    assert_ne!(upgraded, agent);
    assert_eq!(nonces(&admin, &servers, "after the upgrade").await, first);

    host.done("systemctl restart fractus-agent").unwrap();
    let restarted = unit(host).await;
    assert_ne!(restarted, upgraded);
    assert_eq!(nonces(&admin, &servers, "after a restart").await, first);

    // systemd sees to it that there is an agent again.
    host.done(&format!("kill -9 {restarted}")).unwrap();
    let again = until("another agent", Duration::from_secs(60), || async {
        let pid = unit(host).await;
        if pid == restarted { Err(pid) } else { Ok(pid) }
    });
    again.await.unwrap();
    assert_eq!(nonces(&admin, &servers, "after kill -9").await, first);
    assert_eq!(machines(host), guests, "the processes are the same");
    assert_eq!(limits(host), limited, "and as limited as before");

    // An orderly reboot of the host: the guests boot again with it, and find what they had written.
    let began = Instant::now();
    lab.hosts[0].reboot().unwrap();
    for server in &servers {
        let log = logged(&admin, server, "boots=2").await;
        println!(
            "a guest is back {:.1} s after its host's reboot was asked for",
            began.elapsed().as_secs_f64()
        );
        let (first_boot, _) = log.rsplit_once("tiny: boot").unwrap();
        for step in ["tiny: power button", "synced and unmounted, going down"] {
            assert!(first_boot.contains(step), "{step}: {first_boot}");
        }
        settled(&admin, server, "ACTIVE").await;
    }
    let last = nonces(&admin, &servers, "after the reboot").await;
    assert!(
        last.iter().all(|nonce| !first.contains(nonce)),
        "{last:?} after {first:?}"
    );
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn host_that_breaks_can_be_asked_where_it_stands() {
    let mut lab = lab(1).await;
    let host = &mut lab.hosts[0];
    assert!(host.is_running());
    let alive = host.emulator();
    assert!(alive.contains("VM status: running"), "{alive}");
    // No answer: its kernel panics and, told to by `panic=-1`, resets.
    let _ = host.run_within("echo c >/proc/sysrq-trigger", Duration::from_secs(5));
    assert!(!host.is_running());
    let said = host.emulator();
    assert!(said.contains("VM status: paused (shutdown)"), "{said}");
    assert!(said.contains("CR3="), "{said}");
    assert!(host.broken().is_some(), "{}", host.serial_log());
    host.restart().unwrap();
    assert_eq!(host.done("cat /proc/sys/kernel/tainted").unwrap(), "0\n");
}

/// Says every second that it lives, and spins beside that.
const SPINS: &str = r#"#!/bin/sh
while true; do true; done &
turns=0
while true; do
  turns=$((turns + 1))
  echo "spins: turn $turns"
  sleep 1
done &
"#;

/// The last of its turns that a guest has told of.
fn turns(log: &str) -> Option<u64> {
    let (whole, _) = log.rsplit_once('\n')?;
    let mut lines = whole.lines().rev();
    lines.find_map(|line| line.trim_end().strip_prefix("spins: turn ")?.parse().ok())
}

/// Waits until it tells of one after that.
async fn turns_beyond(admin: &Client, server: &str, turn: u64) -> u64 {
    let later = until(
        "the guest says that it lives",
        Duration::from_secs(180),
        || async {
            let log = admin.console_log(server).await?;
            turns(&log).filter(|now| *now > turn).ok_or(log)
        },
    );
    later.await.unwrap()
}

/// A processor that is kicked without an interrupt gives its guest none twice: QEMU does, and the lab's is mended
/// (`mended.rs`). A guest that has it within a lock says nothing more; one that panics begins anew.
#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn host_gives_a_guest_each_interrupt_once_however_often_it_is_kicked() {
    const KICKS: usize = 6000;
    let mut lab = lab(1).await;
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 1, 256, 1).await;
    let server = json!({"name": "spins", "imageRef": image, "flavorRef": flavor,
        "user_data": STANDARD.encode(SPINS)});
    let server = create(&admin, server).await;
    turns_beyond(&admin, &server, 2).await;
    let host = &mut lab.hosts[0];
    for _ in 0..KICKS {
        host.freeze().unwrap();
        host.thaw().unwrap();
        // sleeps because the guest takes its interrupts between two kicks
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // What was on its way when the last of them came is not it.
    let turn = turns(&admin.console_log(&server).await.unwrap()).unwrap();
    turns_beyond(&admin, &server, turn + 3).await;
    let log = admin.console_log(&server).await.unwrap();
    let boots = log.lines().filter(|line| line.starts_with("tiny: boot "));
    assert_eq!(boots.count(), 1, "it has begun anew: {log}");
}
