//! Two hosts with networks of their own, and all that brings servers from one to the other, by the two clients that an
//! operator has: watched, ended, forced, drained; and the rest of what becomes of a server on its way.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use fractus_tests::harness::{
    Cli, Client, Cloud, Options, Typed, asks, has_lost, in_a_segment, until,
};
use serde_json::Value;

/// MiB of memory that have a content of their own, and megabits a second that the way to a host has while somebody looks.
/// Nothing waits for what goes by it to be there, so it may take as long as clients on a busy machine could.
const MEMORY: u64 = 48;
const SLOW: u32 = 4;
const LONG: Duration = Duration::from_secs(60);

/// The server of this test, and who it is looked at by.
struct Stage {
    cloud: Cloud,
    admin: Client,
    openstack: Cli,
    fractus: Cli,
    id: String,
}

impl Stage {
    async fn begin() -> Self {
        let options = Options {
            agents: 2,
            networks: true,
            ..Options::default()
        };
        let cloud = Cloud::start(options).await.unwrap();
        let (openstack, fractus) = (Cli::openstack(&cloud), Cli::fractus(&cloud));
        let admin = cloud.admin().await.unwrap().at(96);
        cloud.probe_image(&admin, "tick_ms=20").await.unwrap();
        openstack.json("flavor create --ram 96 --vcpus 1 --disk 0 tiny");
        openstack.json("flavor create --ram 128 --vcpus 2 --disk 0 larger");
        let made = openstack.json(
            "--os-compute-api-version 2.74 server create --image probe --flavor tiny --nic none --host agent-0 --wait one",
        );
        let id = made["id"].as_str().unwrap().to_owned();
        Self {
            cloud,
            admin,
            openstack,
            fractus,
            id,
        }
    }

    async fn host(&self) -> String {
        let path = format!("/compute/v2.1/servers/{}", self.id);
        let shown = self.admin.get(&path).await.unwrap();
        shown.text("/server/OS-EXT-SRV-ATTR:host")
    }

    async fn asks(&self, command: &str) -> String {
        let mut typed = Typed::open(&self.admin, &self.id).await.unwrap();
        typed.answer(command).await.unwrap()
    }

    /// Which boot of the guest runs.
    async fn boot(&self) -> String {
        self.admin.until_logged(&self.id, "tick ").await.unwrap();
        let info = self.asks("info").await;
        let mut words = info.split(' ');
        let nonce = words.find_map(|word| word.strip_prefix("nonce="));
        nonce.unwrap().trim().to_owned()
    }

    /// It is the boot that it was, with its memory.
    async fn is_as_it_was(&self, boot: &str) {
        self.admin.until_status(&self.id, "ACTIVE").await.unwrap();
        assert_eq!(self.boot().await, boot);
        self.asks(&format!("filled {MEMORY} 5")).await;
    }

    /// The newest migration, once it is that.
    async fn migration(&self, status: &str) -> Value {
        let seen = self.admin.until_migration(&self.id, status, LONG);
        seen.await
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.cloud.logs()))
    }

    /// That its guest is being sent: its number.
    async fn sent(&self) -> i64 {
        let path = format!("/compute/v2.1/servers/{}/migrations", self.id);
        let sent = until("its guest is being sent", LONG, || async {
            let shown = self.admin.get(&path).await.map_err(|e| format!("{e:#}"))?;
            let newest = &shown.body["migrations"][0];
            let sent = newest["memory_processed_bytes"].as_u64();
            match (newest["status"].as_str(), newest["id"].as_i64()) {
                (Some("running"), Some(id)) if sent > Some(0) => Ok(id),
                _ => Err(shown.body.to_string()),
            }
        });
        sent.await.unwrap()
    }

    /// The way to this host is slow.
    fn slowly(&self, host: usize) {
        self.cloud.network(host).unwrap().slow_down(SLOW).unwrap();
    }

    fn fast(&self, host: usize) {
        self.cloud.network(host).unwrap().speed_up().unwrap();
    }

    /// Also where a guest has left by now, whose host is told a moment later.
    async fn nothing_runs(&self) {
        let nothing = until("no machine has a process", LONG, || async {
            match self.cloud.machine_processes() {
                none if none.is_empty() => Ok(()),
                some => Err(format!("{some:?}")),
            }
        });
        nothing.await.unwrap();
    }

    fn is_refused(&self, line: &str, because: &str) {
        let refused = self.fractus.run(line);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(
            !refused.status.success() && said.contains(because),
            "{line}: {said}"
        );
    }

    /// By the client from PyPI.
    async fn is_watched_and_ended_by_openstack(&self, boot: &str) {
        self.slowly(1);
        self.openstack.done("server migrate --live-migration one");
        let number = self.sent().await;
        let listed = self.openstack.json("server migration list --server one");
        assert_eq!(listed[0]["Id"], number, "{listed}");
        assert_eq!(listed[0]["Status"], "running", "{listed}");
        // By its UUID: with a number the client asks for migration "one" of server 1.
        let uuid = self.migration("running").await["uuid"].clone();
        let shown = self.openstack.json(&format!(
            "--os-compute-api-version 2.59 server migration show one {}",
            uuid.as_str().unwrap()
        ));
        assert_eq!(shown["Status"], "running", "{shown}");
        let bytes = |name: &str| shown[name].as_u64().unwrap();
        let total = bytes("Memory Total Bytes");
        assert!(total >= MEMORY << 20, "{shown}");
        assert!(bytes("Memory Remaining Bytes") <= total, "{shown}");
        self.openstack.done(&format!(
            "--os-compute-api-version 2.24 server migration abort one {number}"
        ));
        assert_eq!(self.migration("cancelled").await["id"], number);
        self.is_as_it_was(boot).await;
        assert_eq!(self.host().await, "agent-0");

        self.openstack.done("server migrate --live-migration one");
        let number = self.sent().await;
        self.openstack.done(&format!(
            "--os-compute-api-version 2.22 server migration force complete one {number}"
        ));
        self.fast(1);
        assert_eq!(self.migration("completed").await["id"], number);
        self.is_as_it_was(boot).await;
        assert_eq!(self.host().await, "agent-1");
    }

    /// By our own.
    async fn is_watched_and_ended_by_fractus(&self, boot: &str) {
        self.slowly(0);
        self.fractus.done("server migrate one");
        let number = self.sent().await;
        let listed = self.fractus.json("server migration list --server one");
        assert_eq!(listed[0]["Number"], number, "{listed}");
        assert_eq!(listed[0]["Status"], "running", "{listed}");
        let shown = self
            .fractus
            .json(&format!("server migration show {number}"));
        assert_eq!(shown["status"], "running", "{shown}");
        assert!(
            shown["memory_total"].as_u64() >= Some(MEMORY << 20),
            "{shown}"
        );
        self.fractus
            .done(&format!("server migration abort {number}"));
        let ended = self.migration("cancelled").await;
        assert_eq!(ended["id"], number);
        self.is_refused(&format!("server migration abort {number}"), "invalid");
        self.is_as_it_was(boot).await;
        assert_eq!(self.host().await, "agent-1");

        self.fractus.done("server migrate one");
        let number = self.sent().await;
        self.fractus
            .done(&format!("server migration force-complete {number}"));
        self.fast(0);
        self.migration("completed").await;
        // Perhaps in no whole round.
        self.is_explained(number);
        self.is_as_it_was(boot).await;
        assert_eq!(self.host().await, "agent-0");
    }

    /// A migration that is over: its rounds, each with what was decided, and the pause in parts.
    fn is_explained(&self, number: i64) -> Vec<Value> {
        let shown = self
            .fractus
            .json(&format!("server migration show {number}"));
        assert_eq!(shown["status"], "completed", "{shown}");
        assert!(
            shown["pause"].is_object() && shown["handover"].is_object(),
            "{shown}"
        );
        let rounds = shown["rounds"].as_array().unwrap().clone();
        assert!(
            rounds.iter().all(|round| round["decision"].is_string()),
            "{shown}"
        );
        rounds
    }

    async fn is_drained(&self, boot: &str) {
        let drained = self.fractus.run("host drain agent-0");
        let said = String::from_utf8_lossy(&drained.stderr);
        assert!(drained.status.success(), "{said}");
        assert!(
            said.contains("1 of 1") && said.contains("went to agent-1"),
            "{said}"
        );
        self.is_as_it_was(boot).await;
        assert_eq!(self.host().await, "agent-1");
        let number = self.migration("completed").await["id"].as_i64().unwrap();
        let rounds = self.is_explained(number);
        assert!(!rounds.is_empty(), "nobody has forced it");
        let hosts = self.openstack.json("compute service list --host agent-0");
        assert_eq!(hosts[0]["Status"], "disabled", "{hosts}");
        self.is_refused("server migrate one --wait", "agent-0: it is disabled");
        self.openstack
            .done("compute service set --enable agent-0 nova-compute");
        self.is_as_it_was(boot).await;
    }

    /// Its memory is kept, or its disk.
    async fn rests(&self, boot: &str) {
        self.fractus.done("server suspend one --wait");
        self.nothing_runs().await;
        self.fractus.done("server resume one --wait");
        self.is_as_it_was(boot).await;
        self.asks("disk-write 0 65536 65536 7").await;
        self.fractus
            .done("server image create one --name picture --wait");
        self.is_as_it_was(boot).await;
        let picture = self.openstack.json("image show picture");
        assert_eq!(picture["status"], "active", "{picture}");
        self.fractus.done("server shelve one --wait");
        self.nothing_runs().await;
        self.fractus
            .done("server unshelve one --host agent-0 --wait");
        assert_eq!(self.host().await, "agent-0");
        self.asks("disk-check 0 65536 65536 7").await;
    }

    /// Its guest is stopped for it, and begins anew with its disk.
    async fn is_changed(&self) {
        let mut boots = vec![self.boot().await];
        for (action, answer, host, flavor) in [
            ("migrate --cold", "confirm", "agent-1", "tiny"),
            ("resize --flavor larger", "confirm", "agent-1", "larger"),
            ("resize --flavor tiny", "revert", "agent-1", "larger"),
            ("migrate --cold", "revert", "agent-1", "larger"),
        ] {
            self.fractus.done(&format!("server {action} one --wait"));
            self.admin
                .until_status(&self.id, "VERIFY_RESIZE")
                .await
                .unwrap();
            self.fractus.done(&format!("server {answer} one --wait"));
            let shown = self.admin.until_status(&self.id, "ACTIVE").await.unwrap();
            assert_eq!(
                shown["flavor"]["original_name"], flavor,
                "{action}, {answer}"
            );
            assert_eq!(self.host().await, host, "{action}, {answer}");
            let boot = self.boot().await;
            assert!(!boots.contains(&boot), "{action}, {answer}: no new boot");
            boots.push(boot);
            self.asks("disk-check 0 65536 65536 7").await;
        }
    }

    async fn ends(&self) {
        self.openstack.done("server delete --wait one");
        self.nothing_runs().await;
    }

    async fn is_evacuated(&mut self) {
        let boot = self.boot().await;
        self.cloud.power_off(1).await.unwrap();
        self.is_refused("server evacuate one", "still in use");
        self.fractus.done("host evacuate agent-1 --is-off --start");
        self.admin.until_status(&self.id, "ACTIVE").await.unwrap();
        assert_eq!(self.host().await, "agent-0");
        assert_ne!(self.boot().await, boot);
        // Its disk was its old host's, and was made anew.
        has_lost(&self.admin, &self.id, "0 65536 65536 7").await;
        asks(&self.admin, &self.id, "disk-write 0 65536 65536 8").await;
    }
}

#[test]
fn cloud_operators_watch_end_and_force_migrations_and_drain_a_host() {
    let name = "cloud_operators_watch_end_and_force_migrations_and_drain_a_host";
    in_a_segment(name, || async {
        let stage = Stage::begin().await;
        stage.asks(&format!("fill {MEMORY} 5")).await;
        let boot = stage.boot().await;
        stage.is_watched_and_ended_by_openstack(&boot).await;
        stage.is_watched_and_ended_by_fractus(&boot).await;
        stage.is_drained(&boot).await;
        stage.ends().await;
    });
}

#[test]
fn cloud_operators_suspend_shelve_change_and_evacuate_a_server() {
    let name = "cloud_operators_suspend_shelve_change_and_evacuate_a_server";
    in_a_segment(name, || async {
        let mut stage = Stage::begin().await;
        stage.asks(&format!("fill {MEMORY} 5")).await;
        let boot = stage.boot().await;
        stage.fractus.done("server migrate one --wait");
        assert_eq!(stage.host().await, "agent-1");
        stage.rests(&boot).await;
        stage.is_changed().await;
        stage.is_evacuated().await;
        stage.ends().await;
    });
}
