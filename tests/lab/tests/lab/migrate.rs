//! Linux that goes from one host to another at work, and back.

use fractus_lab::TinyGuest;
use fractus_tests::harness::Client;
use serde_json::json;

use crate::cloud::{GUEST_ACTS, act, create, flavor, lab, logged, said, settled, tiny_image};
use crate::terminal::Terminal;

/// Writes files with sums of them, one after the other, until it is told to stop.
const WORK: &str = "(n=0; while [ ! -e /tmp/stop ]; do n=$(((n+1)%8)); \
    dd if=/dev/urandom of=/disk/$n bs=64k count=8 2>/dev/null; \
    (cd /disk; md5sum $n >/tmp/sum.$n); done; touch /tmp/stopped) & true";

async fn host_of(admin: &Client, server: &str) -> String {
    let path = format!("/compute/v2.1/servers/{server}");
    let shown = admin.get(&path).await.unwrap();
    shown.text("/server/OS-EXT-SRV-ATTR:host")
}

/// Processors at something, a disk that is written to, and memory that is; none of it may be lost on any way.
#[tokio::test]
#[ignore = "takes hosts in software: scripts/lab test"]
async fn guest_goes_to_another_host_and_back_at_work() {
    let lab = lab(2).await;
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap().at(96);
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2, 256, 1).await;
    let server = json!({"name": "traveller", "imageRef": image, "flavorRef": flavor,
        "host": lab.hosts[0].name});
    let server = create(&admin, server).await;
    let log = logged(&admin, &server, "tiny: ready hostname=").await;
    let nonce = said(&log, "tiny: boot", "nonce").unwrap().to_owned();
    let mut terminal = Terminal::shell(&admin, &server).await;
    terminal.run("echo kept in memory >/tmp/word").await;
    terminal.run(WORK).await;
    terminal.run("dmesg -c >/dev/null").await;

    for round in 0..2 {
        let to = &lab.hosts[(round + 1) % 2].name;
        let live = json!({"os-migrateLive": {"host": to, "block_migration": "auto"}});
        act(&admin, &server, live).await;
        let over = admin.until_migration(&server, "completed", GUEST_ACTS);
        let over = over.await.unwrap();
        assert_eq!(over["dest_compute"], *to, "round {round}: {over}");
        settled(&admin, &server, "ACTIVE").await;
        assert_eq!(host_of(&admin, &server).await, *to, "round {round}");
        terminal = Terminal::shell(&admin, &server).await;
        assert!(terminal.run("cat /run/nonce").await.contains(&nonce));
        println!("round {round}: it is on {to}");
    }

    assert!(
        terminal
            .run("cat /tmp/word")
            .await
            .contains("kept in memory")
    );
    terminal.run("touch /tmp/stop").await;
    terminal
        .run("while [ ! -e /tmp/stopped ]; do sleep 1; done")
        .await;
    // From the disk itself.
    terminal
        .run("sync; echo 3 >/proc/sys/vm/drop_caches; cd /disk; cat /tmp/sum.* >/tmp/sums")
        .await;
    let checked = terminal.run("md5sum -c /tmp/sums; wc -l </tmp/sums").await;
    assert!(
        checked.contains("OK") && !checked.contains("FAILED"),
        "{checked}"
    );
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
}
