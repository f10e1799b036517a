//! `kill -9` of controller, agent and machine at random moments, with real processes and the probe:
//! nothing is left without a record, stuck, doubled or leaked.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fractus_tests::harness::{Client, Cloud, Options, until};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

#[derive(Debug, Clone, Copy)]
enum Victim {
    Controller,
    Agent,
    Machine,
}

#[derive(Debug, Clone, Copy)]
enum Deed {
    Create,
    Reboot,
    Rebuild,
    Delete,
}

struct Trial {
    cloud: Cloud,
    admin: Client,
    image: String,
    flavor: String,
    servers: Vec<String>,
    random: StdRng,
}

/// Rounds to run; each kills one process.
fn rounds() -> u32 {
    std::env::var("FRACTUS_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(50)
}

fn seed() -> u64 {
    std::env::var("FRACTUS_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2026)
}

#[tokio::test]
async fn cloud_survives_kills_at_random_moments() {
    let mut trial = Trial::start(seed()).await;
    for round in 0..rounds() {
        let victim = [Victim::Controller, Victim::Agent, Victim::Machine]
            [trial.random.random_range(0..3_usize)];
        let deed = trial.choose_deed();
        let delay = Duration::from_micros(trial.random.random_range(0..150_000));
        let said = format!(
            "seed {} round {round}: {victim:?} killed {delay:?} into {deed:?}",
            seed()
        );
        println!("{said}");
        trial.round(deed, victim, delay).await;
        if let Err(error) = trial.settled().await {
            panic!("{said}: {error}\n{}", trial.cloud.logs());
        }
    }
    trial.end().await;
}

impl Trial {
    async fn start(seed: u64) -> Self {
        let cloud = Cloud::start(Options::default()).await.unwrap();
        let admin = cloud.admin().await.unwrap().at(96);
        let image = cloud.probe_image(&admin, "tick_ms=1000").await.unwrap();
        let body = json!({"flavor": {"name": "tiny", "ram": 32, "vcpus": 1, "disk": 0}});
        let flavor = admin
            .post("/compute/v2.1/flavors", body)
            .await
            .unwrap()
            .text("/flavor/id");
        let random = StdRng::seed_from_u64(seed);
        Self {
            cloud,
            admin,
            image,
            flavor,
            servers: Vec::new(),
            random,
        }
    }

    fn choose_deed(&mut self) -> Deed {
        match self.servers.len() {
            0 => Deed::Create,
            1..5 => [Deed::Create, Deed::Reboot, Deed::Rebuild, Deed::Delete]
                [self.random.random_range(0..4_usize)],
            _ => Deed::Delete,
        }
    }

    /// Starts the deed, kills the victim a moment later, and starts it again.
    async fn round(&mut self, deed: Deed, victim: Victim, delay: Duration) {
        let target = match self.servers.len() {
            0 => String::new(),
            count => self.servers[self.random.random_range(0..count)].clone(),
        };
        let (admin, image, flavor) = (self.admin.clone(), self.image.clone(), self.flavor.clone());
        // Its answer may be lost with the controller: what counts is what the cloud says afterwards.
        let asked = tokio::spawn(async move {
            let action = match deed {
                Deed::Create => {
                    return admin.create_server("s", &image, &flavor).await.map(drop);
                }
                Deed::Delete => {
                    let path = format!("/compute/v2.1/servers/{target}");
                    return admin.delete(&path).await.map(drop);
                }
                Deed::Reboot => json!({"reboot": {"type": "HARD"}}),
                Deed::Rebuild => json!({"rebuild": {"imageRef": image}}),
            };
            admin.act(&target, action).await.map(drop)
        });
        // sleeps because the moment of the kill is what is random
        tokio::time::sleep(delay).await;
        match victim {
            Victim::Controller => {
                self.cloud.kill_controller();
                self.cloud.start_controller().await.unwrap();
            }
            Victim::Agent => {
                self.cloud.kill_agent(0);
                self.cloud.start_agent(0).unwrap();
            }
            Victim::Machine => {
                let processes = self.cloud.machine_processes();
                if !processes.is_empty() {
                    let pid = processes[self.random.random_range(0..processes.len())].pid;
                    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
        }
        let _ = asked.await.unwrap();
    }

    /// Waits until no server has anything under way and processes are what the servers say.
    async fn settled(&mut self) -> Result<(), String> {
        let seen = until("the cloud settles", Duration::from_secs(90), || async {
            let answer = self.admin.get("/compute/v2.1/servers/detail").await;
            let answer = answer.map_err(|error| format!("{error:#}"))?;
            let servers = answer.body["servers"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let busy: Vec<&Value> = servers
                .iter()
                .filter(|server| {
                    !server["OS-EXT-STS:task_state"].is_null() || server["status"] == "BUILD"
                })
                .collect();
            if !busy.is_empty() {
                return Err(format!("under way: {busy:?}"));
            }
            self.consistent(&servers)?;
            Ok(servers)
        });
        let servers = seen.await.map_err(|error| format!("{error:#}"))?;
        self.servers = servers
            .iter()
            .filter_map(|server| server["id"].as_str().map(str::to_owned))
            .collect();
        Ok(())
    }

    /// Processes, folders and sockets are those of the servers that there are, one each.
    fn consistent(&self, servers: &[Value]) -> Result<(), String> {
        let running = servers
            .iter()
            .filter(|server| server["status"] == "ACTIVE" || server["status"] == "PAUSED")
            .count();
        let processes = self.cloud.machine_processes();
        let mut by_user: BTreeMap<u32, usize> = BTreeMap::new();
        for process in &processes {
            *by_user.entry(process.user).or_default() += 1;
        }
        if by_user.values().any(|count| *count > 1) {
            return Err(format!("two processes of one machine: {processes:?}"));
        }
        if processes.len() != running {
            return Err(format!(
                "{running} servers run, in {} processes: {processes:?}",
                processes.len()
            ));
        }
        let ids: Vec<&str> = servers
            .iter()
            .filter_map(|server| server["id"].as_str())
            .collect();
        let sockets = self.cloud.machine_sockets(0);
        match sockets
            .iter()
            .find(|name| !ids.iter().any(|id| name.starts_with(id)))
        {
            Some(stray) => Err(format!(
                "the socket {stray} belongs to no server of {ids:?}"
            )),
            None => Ok(()),
        }
    }

    /// Deletes all, and looks for what is left.
    async fn end(mut self) {
        for server in std::mem::take(&mut self.servers) {
            let path = format!("/compute/v2.1/servers/{server}");
            self.admin
                .delete(&path)
                .await
                .unwrap()
                .expect_status(204)
                .unwrap();
        }
        self.settled().await.unwrap();
        assert_eq!(self.servers, [""; 0]);
        assert_eq!(self.cloud.machine_processes(), []);
        assert_eq!(self.cloud.machine_sockets(0), [""; 0]);
        assert_eq!(self.cloud.machine_leftovers(0), [""; 0]);
        let none: [PathBuf; 0] = [];
        assert_eq!(self.cloud.machine_groups(0), none);
        // The last agent was killed or is about to be: its own group is for the harness to remove.
        let groups = self.cloud.control_groups(0);
        drop(self.cloud);
        let left: Vec<_> = groups.into_iter().filter(|group| group.exists()).collect();
        assert_eq!(left, none);
    }
}
