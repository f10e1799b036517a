//! Linux whose memory is kept while nothing runs it, and that goes on as if nothing had been.

use fractus_lab::TinyGuest;
use serde_json::json;

use crate::cloud::{act, create, flavor, lab, logged, said, settled, tiny_image};
use crate::terminal::Terminal;

/// The host loses its power while the guest is suspended; and again after the guest has gone on, which then
/// boots: what was kept is of no use any more.
#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn suspended_guest_goes_on_after_its_host_was_off() {
    let mut lab = lab(1).await;
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2, 256, 1).await;
    let server = json!({"name": "sleeper", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    let log = logged(&admin, &server, "tiny: ready hostname=").await;
    let nonce = said(&log, "tiny: boot", "nonce").unwrap().to_owned();
    let mut terminal = Terminal::shell(&admin, &server).await;
    terminal.run("echo kept in memory >/tmp/word").await;
    // A guest that works: its processors are at something when they are stopped.
    let work = "(while true; do dd if=/dev/urandom of=/tmp/work bs=64k count=16 2>/dev/null; \
                md5sum /tmp/work >/tmp/sum; done) & true";
    terminal.run(work).await;
    // What it complained of as it booted is another test's.
    terminal.run("dmesg -c >/dev/null").await;

    act(&admin, &server, json!({"suspend": null})).await;
    settled(&admin, &server, "SUSPENDED").await;
    let controller = lab.controller.for_agents();
    let host = &mut lab.hosts[0];
    assert_eq!(
        host.done("ps -o args | grep -c '[f]ractus-agent vm' || true")
            .unwrap()
            .trim(),
        "0"
    );
    host.restart().unwrap();
    host.start_agent(&controller, "none").unwrap();
    act(&admin, &server, json!({"resume": null})).await;
    settled(&admin, &server, "ACTIVE").await;

    let mut terminal = Terminal::shell(&admin, &server).await;
    assert!(
        terminal
            .run("cat /tmp/word")
            .await
            .contains("kept in memory")
    );
    assert!(
        terminal
            .run("kill $!; wait; md5sum /tmp/work")
            .await
            .contains("/tmp/work")
    );
    assert!(
        terminal
            .run("grep -c ^processor /proc/cpuinfo")
            .await
            .contains("2")
    );
    // No complaint of a kernel that finds itself somewhere else.
    let complaints = terminal
        .run("dmesg | grep -iE 'stall|lockup|unstable|bug:|warn' || true")
        .await;
    for word in ["stall", "lockup", "unstable", "BUG", "WARN"] {
        let said = complaints.lines().filter(|line| !line.contains("grep"));
        assert_eq!(
            said.filter(|line| line.contains(word)).count(),
            0,
            "{complaints}"
        );
    }
    // The guest itself: what its console had said went with its host's power, where it was not on the disk.
    assert!(terminal.run("cat /run/nonce").await.contains(&nonce));
    let log = admin.console_log(&server).await.unwrap();
    assert!(!log.contains("boots=2"), "it booted: {log}");

    let host = &mut lab.hosts[0];
    host.restart().unwrap();
    host.start_agent(&controller, "none").unwrap();
    logged(&admin, &server, "boots=2").await;
    settled(&admin, &server, "ACTIVE").await;
}
