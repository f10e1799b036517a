//! Linux that goes from one host to another at work, and back: nothing that it has written is lost, its network answers
//! by the same connection, and its clock is right. Then it is suspended and goes on, and another is made of its disk on
//! the other host, all while it works.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fractus_lab::{Lab, TinyGuest, section};
use fractus_tests::harness::{Client, until};
use serde_json::{Value, json};

use crate::cloud::{
    GUEST_ACTS, act, create, debian_disk, debian_image, delete, flavor, lab, logged, said, settled,
    times, tiny_image_of,
};
use crate::hotplug::change;
use crate::questions::{self, Ahead, Questions};
use crate::terminal::Terminal;

/// The clock may be wrong by so much more than the emulation explains, seconds.
const WRONG: f64 = 0.050;
const MAC: &str = "02:00:00:00:77:02";
const NIC: &str = "5a1f6f0e-6f57-4c43-9f5d-2a54f6f70003";
/// Of the network that the guest is on, which ends in the lab's segment.
const NETWORK: [&str; 2] = ["10.78.0.1", "10.78.0.2"];
const PORT: u16 = 7;
/// Of the tiny guest: what it writes is 8 MiB.
const DISK_MIB: usize = 20;

/// What a leg is like.
#[derive(Debug, Clone, Copy)]
enum How {
    /// Memory and disks are copied while the guest runs, and then the rest.
    PreCopy,
    /// Its disks go before it, and its memory behind it.
    PostCopy,
}

/// The second half of the legs is by post-copy, which the whole cloud allows from then on: of a flavor that allows it
/// always no leg would be by pre-copy, since the guest writes faster than a host in software sends.
fn legs(count: usize) -> impl Iterator<Item = (usize, How)> {
    (0..count).map(move |number| match number < count - count / 2 {
        true => (number, How::PreCopy),
        false => (number, How::PostCopy),
    })
}

/// A leg that is behind it.
struct Leg {
    how: How,
    seconds: f64,
    /// What its clock gained beyond its drift, and how much of that is the lab's, seconds.
    wrong: f64,
    explained: f64,
}

/// For the report.
fn tell(what: &str, legs: &[Leg]) {
    let follows = |leg: &&Leg| matches!(leg.how, How::PostCopy);
    let mut took: Vec<f64> = legs.iter().map(|leg| leg.seconds).collect();
    took.sort_by(f64::total_cmp);
    let most = |of: fn(&Leg) -> f64| legs.iter().map(of).fold(0.0, f64::max);
    let text = format!(
        "{} legs there and back, {} of them by post-copy; then suspended and resumed, and another made of its disk. \
         Nothing was lost.\nEach leg took {:.1} s (median), {:.1} to {:.1} s. Its clock was wrong by {:.0} ms at most after \
         one, of which the lab explains up to {:.0} ms.\n",
        legs.len(),
        legs.iter().filter(follows).count(),
        took[took.len() / 2],
        took[0],
        took[took.len() - 1],
        1000.0 * most(|leg| leg.wrong.abs()),
        1000.0 * most(|leg| leg.explained),
    );
    section(&format!("Legs of {what} at work"), &text).unwrap();
}

/// What differs from guest to guest.
struct Kind {
    /// A folder on its disk.
    disk: &'static str,
    /// One from which programs may be run: Debian's /run is not.
    programs: &'static str,
    /// A program that answers a line with the same line and the time, at [`PORT`], for ever.
    answers: &'static str,
}

const TINY: Kind = Kind {
    disk: "/disk",
    programs: "/run",
    answers: r#"#!/bin/sh
[ $# = 0 ] && exec nc -ll -p 7 -e "$0" one
while read -r line; do echo "$line $EPOCHREALTIME"; done
"#,
};
const DEBIAN: Kind = Kind {
    disk: "/var/lib/work",
    programs: "/usr/local/bin",
    answers: r#"#!/usr/bin/python3
import socket, time
server = socket.create_server(("", 7))
while True:
    lines = server.accept()[0].makefile("rw", buffering=1)
    for line in lines:
        lines.write(f"{line.strip()} {time.time():.6f}\n")
"#,
};

/// A guest at work, wherever it is.
struct Traveller<'a> {
    admin: &'a Client,
    server: String,
    kind: Kind,
    questions: Questions,
    /// Seconds that its clock goes wrong in a second where it stays: the emulation's own doing.
    drift: (f64, f64),
}

/// Host's agents put their guests on a network that ends in the segment.
fn bridged(lab: &Lab) {
    let controller = lab.controller.for_agents();
    for host in &lab.hosts {
        host.kill_agent().unwrap();
        let bridge = "brctl addbr guests && brctl addif guests eth1 && ip link set guests up";
        host.done(bridge).unwrap();
        let endpoint = host.endpoint();
        let agent = format!("FRACTUS_BRIDGE=guests /lab/agent {controller} none {endpoint}");
        host.done(&agent).unwrap();
    }
    let address = format!("{}/24", NETWORK[0]);
    let status = Command::new("ip")
        .args(["address", "add", &address, "dev", "guests"])
        .status();
    assert!(status.unwrap().success());
}

/// A script on one line.
fn written(script: &str, path: &str) -> String {
    let text = STANDARD.encode(script);
    format!("echo {text} | base64 -d >{path} && chmod 755 {path}")
}

impl<'a> Traveller<'a> {
    /// Puts a guest that runs to work, whose shell waits at its console.
    async fn begins(admin: &'a Client, server: String, kind: Kind) -> Self {
        let nics = json!([{"id": NIC, "mac": MAC, "queues": 1}]);
        change(admin, &server, json!({"nics": nics})).await;
        let mut terminal = Terminal::shell(admin, &server).await;
        terminal.run("echo kept in memory >/run/word").await;
        terminal
            .run("cat /proc/sys/kernel/random/uuid >/run/nonce.2")
            .await;
        let address = format!("grep -q {MAC} /sys/class/net/*/address");
        terminal
            .run(&format!("until {address}; do sleep 1; done"))
            .await;
        // What names it has its own time for that.
        terminal.run("udevadm settle 2>/dev/null || true").await;
        let [outside, own] = NETWORK;
        let up = format!(
            "hot=$(grep -l {MAC} /sys/class/net/*/address | cut -d/ -f5); \
            ip address add {own}/24 dev $hot && ip link set $hot up"
        );
        terminal.run(&up).await;
        let (answers, works) = (
            format!("{}/answers", kind.programs),
            format!("{}/work", kind.programs),
        );
        terminal.run(&written(kind.answers, &answers)).await;
        // What it says by itself tells the bridges where it is by now.
        let network =
            format!("({answers} >/run/log.answers 2>&1 &); (ping {outside} >/run/pings 2>&1 &)");
        terminal.run(&network).await;
        // Files with sums of them, one after the other, on the disk at once, until it is told to stop.
        let work = format!(
            "#!/bin/sh\nn=0\nmkdir -p {0}\ncd {0}\nwhile [ ! -e /run/stop ]; do\nn=$(((n+1)%8))\n\
             dd if=/dev/urandom of=$n bs=64k count=8 conv=fsync 2>/dev/null\nmd5sum $n >/run/sum.$n\ndone\n\
             touch /run/stopped\n",
            kind.disk
        );
        terminal.run(&written(&work, &works)).await;
        terminal
            .run(&format!("({works} >/run/log.work 2>&1 &)"))
            .await;
        terminal
            .run("while [ ! -e /run/sum.1 ] && [ ! -s /run/log.work ]; do sleep 1; done")
            .await;
        terminal.run("! grep . /run/log.*").await;
        // What it complained of as it booted is another test's.
        terminal.run("dmesg -c >/dev/null").await;
        let questions = Questions::to(SocketAddr::new(own.parse().unwrap(), PORT)).await;
        let (before, after) = (questions.clock().await, {
            questions.clock().await;
            questions.clock().await
        });
        let ((more, within), seconds) = (after.since(&before), after.seconds_since(&before));
        let drift = (more / seconds, within / seconds);
        println!(
            "where it stays its clock gains {more:+.4} s in {seconds:.0} s, within {within:.4}"
        );
        Self {
            admin,
            server,
            kind,
            questions,
            drift,
        }
    }

    /// To the other host.
    async fn goes(&self, lab: &Lab, number: usize, how: How) -> Leg {
        let to = (number + 1) % 2;
        let host = &lab.hosts[to];
        let (guest, hosts) = self.clocks(lab).await;
        let answers = self.questions.count();
        let began = Instant::now();
        let live = json!({"os-migrateLive": {"host": host.name, "block_migration": "auto"}});
        act(self.admin, &self.server, live).await;
        if let How::PostCopy = how {
            self.is_completed_by_force().await;
        }
        let over = self
            .admin
            .until_migration(&self.server, "completed", GUEST_ACTS);
        let over = over.await.unwrap();
        assert_eq!(over["dest_compute"], *host.name, "leg {number}: {over}");
        let shown = settled(self.admin, &self.server, "ACTIVE").await;
        assert_eq!(shown["OS-EXT-SRV-ATTR:host"], *host.name, "leg {number}");
        let took = began.elapsed().as_secs_f64();
        let (guest_now, hosts_now) = self.clocks(lab).await;
        // It answers by the connection that it had.
        let answers = self.questions.count() - answers;
        println!(
            "leg {number}, {how:?}: on {} after {took:.1} s, {answers} answers",
            host.name
        );
        self.went(&over, how).await;
        let (wrong, explained) =
            self.clock_is_right(number, [guest, guest_now], [hosts, hosts_now], to);
        Leg {
            how,
            seconds: took,
            wrong,
            explained,
        }
    }

    /// As soon as it is being sent.
    async fn is_completed_by_force(&self) {
        let path = format!("/compute/v2.1/servers/{}/migrations", self.server);
        let sent = until("its guest is sent", GUEST_ACTS, || async {
            let shown = self.admin.get(&path).await.map_err(|e| format!("{e:#}"))?;
            let newest = shown.body["migrations"][0].clone();
            match (newest["status"].as_str(), newest["id"].as_i64()) {
                (Some("running"), Some(id)) => Ok(id),
                _ => Err(shown.body.to_string()),
            }
        });
        let action = format!("{path}/{}/action", sent.await.unwrap());
        let forced = self
            .admin
            .post(&action, json!({"force_complete": null}))
            .await;
        forced.unwrap().expect_status(202).unwrap();
    }

    /// It went as it was asked to, and what the hosts say of that.
    async fn went(&self, over: &Value, how: How) {
        let path = format!("/fractus/v1/migrations/{}", over["uuid"].as_str().unwrap());
        let shown = self.admin.get(&path).await.unwrap();
        let migration = &shown.body["migration"];
        let progress = &migration["progress"];
        let rounds = progress["rounds"].as_array().map_or(0, Vec::len);
        println!(
            "{rounds} rounds in {} us; pause {}, handover {}, followed {}",
            progress["elapsed_us"], progress["pause"], migration["handover"], progress["followed"]
        );
        let followed = progress["followed"]["bytes"].as_u64().unwrap_or(0);
        match how {
            How::PreCopy => assert_eq!(followed, 0, "{migration}"),
            // None does where a host's kernel has no userfaultfd.
            How::PostCopy => assert!(followed > 0, "its memory did not follow it: {migration}"),
        }
    }

    async fn clocks(&self, lab: &Lab) -> (Ahead, Vec<Ahead>) {
        let hosts = lab.hosts.iter().map(questions::host).collect();
        (self.questions.clock().await, hosts)
    }

    /// What the hosts' clocks differ by is the lab's doing, and what the guest's gains where it stays is the emulator's. By
    /// how much it is wrong, and how much of that is explained.
    fn clock_is_right(
        &self,
        number: usize,
        guest: [Ahead; 2],
        hosts: [Vec<Ahead>; 2],
        to: usize,
    ) -> (f64, f64) {
        let [before, after] = guest;
        let (gained, within) = after.since(&before);
        let seconds = after.seconds_since(&before);
        let (source, target) = (&hosts[0][1 - to], &hosts[1][to]);
        let (apart, apart_within) = target.since(source);
        let (drift, drift_within) = self.drift;
        let wrong = gained - drift * seconds;
        let explained = apart.abs() + apart_within + within + drift_within * seconds;
        println!(
            "leg {number}: its clock gained {gained:+.4} s in {seconds:.0} s, {wrong:+.4} beyond its drift; hosts are \
             {apart:+.4} apart; in all {explained:.4} is explained"
        );
        assert!(
            wrong.abs() <= WRONG + explained,
            "leg {number}: the clock is wrong by {wrong:+.4} s, of which {explained:.4} is explained"
        );
        (wrong, explained)
    }

    /// It is the same boot, all that it wrote is there, and nothing has surprised it.
    async fn has_lost_nothing(&self) {
        let mut terminal = Terminal::shell(self.admin, &self.server).await;
        let word = terminal.run("cat /run/word").await;
        assert!(word.contains("kept in memory"), "{word}");
        terminal.run("touch /run/stop").await;
        terminal
            .run("while [ ! -e /run/stopped ]; do sleep 1; done")
            .await;
        // From the disk itself.
        let sums = format!(
            "sync; echo 3 >/proc/sys/vm/drop_caches; cd {}; cat /run/sum.* >/run/sums",
            self.kind.disk
        );
        terminal.run(&sums).await;
        let checked = terminal.run("md5sum -c /run/sums; wc -l </run/sums").await;
        assert!(
            checked.contains("OK") && !checked.contains("FAILED"),
            "{checked}"
        );
        let pings = terminal
            .run("kill -INT $(pidof ping); sleep 1; tail -n 3 /run/pings")
            .await;
        println!("{pings}");
        // Lines of the kernel's, not what was typed.
        let complaints = terminal
            .run("dmesg | grep -iE 'stall|lockup|unstable|bug:|warn' || true")
            .await;
        let complaints = complaints
            .lines()
            .filter(|line| line.trim_start().starts_with('['));
        let complaints: Vec<_> = complaints.filter(|line| !line.contains("grep")).collect();
        assert_eq!(complaints, [""; 0]);
    }

    /// Its memory goes to a file on the host where it is by now, and it goes on from that, at its work and on its network.
    async fn sleeps_and_wakes(&self) {
        act(self.admin, &self.server, json!({"suspend": null})).await;
        settled(self.admin, &self.server, "SUSPENDED").await;
        act(self.admin, &self.server, json!({"resume": null})).await;
        settled(self.admin, &self.server, "ACTIVE").await;
        let mut terminal = Terminal::shell(self.admin, &self.server).await;
        let word = terminal.run("cat /run/word").await;
        assert!(word.contains("kept in memory"), "{word}");
        self.questions.clock().await;
    }

    /// Files and their sums are on its disk before an image of that is asked for, and whole in a server that is made of it
    /// on the other host; the guest has worked on meanwhile.
    async fn is_made_again(&self, flavor: &str, on: &str, up: &str) {
        let kept = format!("{}/kept", self.kind.disk);
        let mut terminal = Terminal::shell(self.admin, &self.server).await;
        let keep = format!(
            "mkdir {kept}; for n in 0 1 2 3; do dd if=/dev/urandom of={kept}/$n bs=64k count=16; done; \
             (cd {kept}; md5sum ? >sums); sync"
        );
        terminal.run(&keep).await;
        drop(terminal);
        let began = Instant::now();
        let asked = json!({"createImage": {"name": "kept"}});
        let image = self.admin.act(&self.server, asked).await.unwrap();
        let image = image.expect_status(202).unwrap().text("/image_id");
        let path = format!("/image/v2/images/{image}");
        let made = until("its image is made", GUEST_ACTS, || async {
            let shown = self.admin.get(&path).await.map_err(|e| format!("{e:#}"))?;
            match shown.body["status"].as_str() {
                Some("active") => Ok(()),
                _ => Err(shown.body.to_string()),
            }
        });
        made.await.unwrap();
        settled(self.admin, &self.server, "ACTIVE").await;
        println!("an image after {:.1} s", began.elapsed().as_secs_f64());

        let server = json!({"name": "again", "imageRef": image, "flavorRef": flavor, "host": on});
        let again = create(self.admin, server).await;
        logged(self.admin, &again, up).await;
        let shown = settled(self.admin, &again, "ACTIVE").await;
        assert_eq!(shown["OS-EXT-SRV-ATTR:host"], on);
        let mut terminal = Terminal::shell(self.admin, &again).await;
        let checked = terminal.run(&format!("cd {kept}; md5sum -c sums")).await;
        assert_eq!(checked.matches(": OK").count(), 4, "{checked}");
        println!(
            "a server of it after {:.1} s",
            began.elapsed().as_secs_f64()
        );
        delete(self.admin, &again).await;
    }

    /// There and back at work, and all else that becomes of it meanwhile; `up` is what a guest says that is made of its disk.
    async fn travels(&self, lab: &mut Lab, count: usize, flavor: &str, up: &str) -> Vec<Leg> {
        let (mut allowed, mut behind) = (false, Vec::new());
        for (number, how) in legs(count) {
            if !allowed && matches!(how, How::PostCopy) {
                lab.controller.kill();
                let again = lab.controller.start_again_with(&["--post-copy"]);
                again.await.unwrap();
                lab.controller.until_hosts_up(2).await.unwrap();
                allowed = true;
            }
            behind.push(self.goes(lab, number, how).await);
        }
        self.sleeps_and_wakes().await;
        self.is_made_again(flavor, &lab.hosts[(count + 1) % 2].name, up)
            .await;
        behind
    }
}

/// Processors at something, a disk that is written to, and memory that is; none of it may be lost on any way.
#[tokio::test]
#[ignore = "takes hosts in software: scripts/lab test"]
async fn scenario_guest_goes_from_host_to_host_and_back_at_work() {
    let began = Instant::now();
    let mut lab = lab(2).await;
    bridged(&lab);
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap().at(96);
    let image = tiny_image_of(&admin, &tiny, "console=ttyS0 quiet panic=-1", DISK_MIB).await;
    // With the image's own size, and no more: all of an image goes to a host, at a few megabytes a second.
    let flavor = flavor(&admin, 2, 192, 0).await;
    let server = json!({"name": "traveller", "imageRef": image, "flavorRef": flavor,
        "host": lab.hosts[0].name});
    let server = create(&admin, server).await;
    let log = logged(&admin, &server, "tiny: ready hostname=").await;
    let nonce = said(&log, "tiny: boot", "nonce").unwrap().to_owned();
    let traveller = Traveller::begins(&admin, server, TINY).await;
    let up = "tiny: ready hostname=";
    let legs = traveller.travels(&mut lab, times(3, 20), &flavor, up).await;
    let mut terminal = Terminal::shell(&admin, &traveller.server).await;
    assert!(terminal.run("cat /run/nonce").await.contains(&nonce));
    drop(terminal);
    traveller.has_lost_nothing().await;
    tell("the tiny guest", &legs);
    println!("all of it: {:.0} s", began.elapsed().as_secs_f64());
}

/// The same of a whole Debian, whose root shell waits on the serial line.
#[tokio::test]
#[ignore = "takes hosts in software: scripts/lab test"]
async fn debian_goes_from_host_to_host_and_back_at_work() {
    let disk = debian_disk();
    let mut lab = lab(2).await;
    bridged(&lab);
    let admin = lab.controller.admin().await.unwrap().at(96);
    let image = debian_image(&admin, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let server = json!({"name": "traveller", "imageRef": image, "flavorRef": flavor,
        "host": lab.hosts[0].name, "user_data": STANDARD.encode(crate::debian::USER_DATA)});
    let server = create(&admin, server).await;
    logged(&admin, &server, "lab: boot=1 ").await;
    let traveller = Traveller::begins(&admin, server, DEBIAN).await;
    let up = "lab: boot=2 ";
    let legs = traveller.travels(&mut lab, times(3, 20), &flavor, up).await;
    traveller.has_lost_nothing().await;
    tell("a whole Debian", &legs);
    let log = admin.console_log(&traveller.server).await.unwrap();
    assert!(!log.contains("lab: boot=2 "), "it booted: {log}");
}
