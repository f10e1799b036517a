//! Two hosts with one server, which goes from the one to the other, and of which something breaks each time.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fractus_tests::harness::{Client, Cloud, MachineProcess, Typed, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::sync::{Barrier, Mutex};

use super::gate::{Fate, Follows, Gate};
use super::middle::Middle;
use super::spot::{End, Fault, How, Sides, Spot};
use super::witness::Witness;

/// All that the pairs share.
pub struct Stage {
    pub cloud: Mutex<Cloud>,
    pub admin: Client,
    pub middle: Middle,
    pub image: String,
    pub flavor: String,
    pub how: How,
}

pub struct Pair {
    stage: Arc<Stage>,
    index: usize,
    gate: Arc<Gate>,
    server: Option<String>,
    /// Of what is written next.
    seed: u64,
}

/// What a server is like when nothing is under way.
#[derive(Debug)]
struct Rest {
    status: String,
    fault: String,
    agent: usize,
    migration: Value,
}

/// Longest wait for all to come to rest: a host that cannot be told is waited for for a minute.
const RESTS: Duration = Duration::from_secs(100);
const SOON: Duration = Duration::from_secs(60);
/// Bytes of the disk that are written.
const DISK: u64 = 256 << 10;

impl Pair {
    pub fn new(stage: &Arc<Stage>, index: usize) -> Self {
        Self {
            stage: Arc::clone(stage),
            index,
            gate: stage.middle.gate(index),
            server: None,
            seed: index as u64 * 1000,
        }
    }

    /// There is a server, so that pairs which are to be somewhere together get there at about the same time.
    pub async fn is_ready(&mut self) -> Result<()> {
        self.server().await.map(drop)
    }

    /// One cell: what became of the server, and how it was said.
    pub async fn tries(
        &mut self,
        spot: Spot,
        fault: Fault,
        all: Option<&Barrier>,
    ) -> Result<(End, String)> {
        let tried = self.migrates(spot, fault, all).await;
        // Whatever waits goes on.
        self.gate.open(Fate::Delivered);
        if tried.is_err()
            && let Some(server) = self.server.take()
        {
            // The next one is another's.
            let path = format!("/compute/v2.1/servers/{server}");
            let _ = self.stage.admin.delete(&path).await;
        }
        tried
    }

    async fn migrates(
        &mut self,
        spot: Spot,
        fault: Fault,
        all: Option<&Barrier>,
    ) -> Result<(End, String)> {
        let began = self.begins(spot).await;
        if let Some(all) = all {
            // All of them are there, and one of them breaks what they share.
            let breaks = all.wait().await.is_leader();
            let begun = if breaks {
                self.restarts_controller().await
            } else {
                Ok(())
            };
            all.wait().await;
            begun?;
        }
        let before = began?;
        let killed = self.breaks(spot, fault, &before).await?;
        let rest = self.rests().await?;
        let end = self.is_right(&before, &rest, killed).await;
        let end = end.with_context(|| format!("{rest:?}"))?;
        if let Some(letter) = self.gate.kept() {
            self.stage.middle.again(&letter).await?;
            let rest = self.rests().await?;
            let again = self.is_right(&before, &rest, killed).await?;
            ensure!(again == end, "after it came once more: {rest:?}");
        }
        let said = says(&rest, end, spot)?;
        if end == End::Error {
            self.begins_anew(&before).await?;
        }
        Ok((end, said))
    }

    /// A guest that has something to lose is on its way, as far as this message.
    async fn begins(&mut self, spot: Spot) -> Result<Before> {
        let server = self.server().await?;
        let source = self.shown(&server).await?.agent;
        let sides = Sides {
            source,
            target: source ^ 1,
        };
        self.seed += 1;
        let seed = self.seed;
        let commands = [
            "info".to_owned(),
            format!("fill {} {seed}", self.stage.how.filled()),
            format!("disk-write 0 0 {DISK} {seed}"),
        ];
        let nonce = nonce(&self.types(&server, &commands).await?)?;
        let cloud = self.stage.cloud.lock().await;
        let path = |agent| {
            let folder = cloud.agent_state(agent).join("machines").join(&server);
            (agent, folder.join("serial.ring"))
        };
        let witness = Witness::of(vec![path(sides.source), path(sides.target)]);
        drop(cloud);
        self.gate.arm(spot, sides);
        let follows = self.stage.how == How::PostCopy;
        self.gate
            .follows(if follows { Follows::Will } else { Follows::Not });
        let to = format!("agent-{}", sides.target);
        let live = json!({"os-migrateLive": {"host": to, "block_migration": "auto"}});
        let asked = self.stage.admin.act(&server, live).await?;
        asked.expect_status(202)?;
        if follows {
            self.is_completed_by_force(&server).await?;
            self.gate.is_told_to_follow().await?;
        }
        self.gate.caught().await?;
        Ok(Before {
            sides,
            server,
            seed,
            nonce,
            witness,
        })
    }

    /// Its memory follows it from where it is, as soon as it is being sent.
    async fn is_completed_by_force(&self, server: &str) -> Result<()> {
        let admin = &self.stage.admin;
        let path = format!("/compute/v2.1/servers/{server}/migrations");
        let sent = until("its guest is sent", SOON, || async {
            let shown = admin.get(&path).await.map_err(|e| format!("{e:#}"))?;
            let newest = &shown.body["migrations"][0];
            match (newest["status"].as_str(), newest["id"].as_i64()) {
                (Some("running"), Some(id)) => Ok(id),
                _ => Err(shown.body.to_string()),
            }
        });
        let action = format!("{path}/{}/action", sent.await?);
        let forced = admin.post(&action, json!({"force_complete": null})).await?;
        forced.expect_status(202)?;
        Ok(())
    }

    /// Breaks it, and lets the message go its way. Whether a machine's process was killed.
    async fn breaks(&self, spot: Spot, fault: Fault, before: &Before) -> Result<bool> {
        let sides = before.sides;
        let mut killed = false;
        let fate = match fault {
            Fault::Cut => Fate::Cut,
            Fault::LostAnswer => Fate::Unanswered,
            Fault::Doubled => Fate::Doubled,
            Fault::Controller => Fate::Delivered,
            Fault::SourceAgent | Fault::TargetAgent => {
                let is_source = fault == Fault::SourceAgent;
                let agent = if is_source {
                    sides.source
                } else {
                    sides.target
                };
                let mut cloud = self.stage.cloud.lock().await;
                cloud.kill_agent(agent);
                cloud.start_agent(agent)?;
                Fate::Delivered
            }
            Fault::TargetProcess if spot == Spot::ToldToContinue => {
                self.kills_deaf(sides.target, &before.server).await?;
                killed = true;
                Fate::Delivered
            }
            Fault::SourceProcess | Fault::TargetProcess => {
                let is_source = fault == Fault::SourceProcess;
                let agent = if is_source {
                    sides.source
                } else {
                    sides.target
                };
                self.kills(agent).await?;
                killed = true;
                Fate::Delivered
            }
        };
        self.gate.open(fate);
        Ok(killed)
    }

    async fn restarts_controller(&self) -> Result<()> {
        let mut cloud = self.stage.cloud.lock().await;
        cloud.kill_controller();
        cloud.start_controller().await
    }

    async fn kills(&self, agent: usize) -> Result<()> {
        let there = self.processes(agent).await;
        let [process] = &there[..] else {
            bail!("not one process to be killed: {there:?}");
        };
        let pid = Pid::from_raw(i32::try_from(process.pid)?).context("a pid")?;
        kill_process(pid, Signal::KILL)?;
        let gone = until("the process is gone", SOON, || async {
            match self.processes(agent).await.contains(process) {
                false => Ok(()),
                true => Err(format!("{process:?}")),
            }
        });
        gone.await
    }

    /// It is told that its guest goes on, and is killed before it has read that: whether its guest ran is not for its
    /// agent to guess.
    async fn kills_deaf(&self, agent: usize, server: &str) -> Result<()> {
        let there = self.processes(agent).await;
        let [process] = &there[..] else {
            bail!("not one process to be stopped: {there:?}");
        };
        let pid = Pid::from_raw(i32::try_from(process.pid)?).context("a pid")?;
        kill_process(pid, Signal::STOP)?;
        self.gate.open(Fate::Delivered);
        // What it has begun by then is in that file once it was told.
        let state = self.stage.cloud.lock().await.agent_state(agent);
        let record = state.join("machines").join(server).join("record.json");
        let told = until("its process is told", SOON, || async {
            let record = std::fs::read(&record).unwrap_or_default();
            let record: Value = serde_json::from_slice(&record).unwrap_or_default();
            let wanted = &record["intent"]["wanted"]["continues"];
            match wanted.is_string() && record["done"]["continued"] == *wanted {
                true => Ok(()),
                false => Err(record.to_string()),
            }
        });
        told.await?;
        self.kills(agent).await
    }

    async fn processes(&self, agent: usize) -> Vec<MachineProcess> {
        self.stage.cloud.lock().await.machine_processes_of(agent)
    }

    /// Waits until nothing is under way, and only one host has anything of the server.
    async fn rests(&self) -> Result<Rest> {
        let server = self.server.clone().context("no server")?;
        let rests = until("all comes to rest", RESTS, || async {
            let rest = self.at_rest(&server).await;
            rest.map_err(|error| format!("{error:#}"))
        });
        rests.await
    }

    async fn at_rest(&self, server: &str) -> Result<Rest> {
        let rest = self.shown(server).await?;
        let over = ["completed", "failed", "error", "cancelled"];
        let migration = rest.migration["status"].as_str().unwrap_or_default();
        ensure!(over.contains(&migration), "{rest:?}");
        let other = rest.agent ^ 1;
        let cloud = self.stage.cloud.lock().await;
        let (left, there) = (
            cloud.machine_leftovers(other),
            cloud.machine_processes_of(other),
        );
        ensure!(
            left.is_empty() && there.is_empty(),
            "on agent-{other} there is {left:?}, {there:?}: {rest:?}"
        );
        let here = cloud.machine_processes_of(rest.agent);
        let wanted = usize::from(rest.status == "ACTIVE");
        ensure!(here.len() == wanted, "{here:?}: {rest:?}");
        Ok(rest)
    }

    async fn shown(&self, server: &str) -> Result<Rest> {
        let path = format!("/compute/v2.1/servers/{server}");
        let shown = self.stage.admin.get(&path).await?.expect_status(200)?;
        let task = &shown.body["server"]["OS-EXT-STS:task_state"];
        let status = shown.text("/server/status");
        ensure!(
            task.is_null() && ["ACTIVE", "ERROR"].contains(&&*status),
            "{status} {task}"
        );
        let host = shown.text("/server/OS-EXT-SRV-ATTR:host");
        let agent = host
            .strip_prefix("agent-")
            .and_then(|number| number.parse().ok());
        let path = format!("/compute/v2.1/os-migrations?instance_uuid={server}");
        let all = self.stage.admin.get(&path).await?.expect_status(200)?;
        let all = all.body["migrations"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let newest = all.into_iter().max_by_key(|it| it["id"].as_i64());
        Ok(Rest {
            status,
            fault: shown.text("/server/fault/message"),
            agent: agent.with_context(|| format!("no host of ours: {host:?}"))?,
            migration: newest.unwrap_or_default(),
        })
    }

    /// At most one ran, exactly one does, and nothing of it is lost; or it is said that it is.
    async fn is_right(&self, before: &Before, rest: &Rest, killed: bool) -> Result<End> {
        before.witness.one_guest(&before.nonce, killed)?;
        if rest.status == "ERROR" {
            ensure!(!rest.fault.is_empty(), "an ERROR without a reason");
            return Ok(End::Error);
        }
        let end = match rest.agent == before.sides.source {
            true => End::Here,
            false => End::There,
        };
        self.has_its_disk(rest.agent, &before.server).await?;
        let commands = [
            "info".to_owned(),
            format!("filled {} {}", self.stage.how.filled(), before.seed),
            format!("disk-check 0 0 {DISK} {}", before.seed),
        ];
        let said = self.types(&before.server, &commands).await?;
        let now = nonce(&said)?;
        ensure!(now == before.nonce, "it is another boot");
        // It counts on, and nobody else does.
        before.witness.one_guest(&before.nonce, killed)?;
        Ok(end)
    }

    /// Who has the disk open is the one process, on the server's host.
    async fn has_its_disk(&self, agent: usize, server: &str) -> Result<()> {
        let cloud = self.stage.cloud.lock().await;
        let name = format!("{server}/root.raw");
        let mut holders = Vec::new();
        for side in [agent, agent ^ 1] {
            for process in cloud.machine_processes_of(side) {
                let files = std::fs::read_dir(format!("/proc/{}/fd", process.pid))?.flatten();
                let targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
                if targets.into_iter().any(|file| file.ends_with(&name)) {
                    holders.push(side);
                }
            }
        }
        ensure!(holders == [agent], "its disk is open on {holders:?}");
        Ok(())
    }

    /// An ERROR server's disk is whole: its user begins it anew.
    async fn begins_anew(&self, before: &Before) -> Result<()> {
        let admin = &self.stage.admin;
        let reboot = admin.act(&before.server, json!({"reboot": {"type": "HARD"}}));
        reboot.await?.expect_status(202)?;
        // For a moment it may be shown as it was, until what its host says of it is sorted.
        let begun = until("it is ACTIVE again", SOON, || async {
            let shown = self.shown(&before.server).await;
            match shown.map_err(|error| format!("{error:#}"))? {
                rest if rest.status == "ACTIVE" => Ok(()),
                rest => Err(format!("{rest:?}")),
            }
        });
        begun.await?;
        admin.until_logged(&before.server, "tick ").await?;
        let check = format!("disk-check 0 0 {DISK} {}", before.seed);
        let said = self
            .types(&before.server, &["info".to_owned(), check])
            .await?;
        ensure!(nonce(&said)? != before.nonce, "it is the same boot");
        Ok(())
    }

    /// A guest that counts.
    async fn server(&mut self) -> Result<String> {
        if let Some(server) = &self.server {
            return Ok(server.clone());
        }
        let admin = &self.stage.admin;
        let body = json!({"name": format!("pair-{}", self.index), "imageRef": self.stage.image,
            "flavorRef": self.stage.flavor, "networks": "none",
            "host": format!("agent-{}", 2 * self.index)});
        let made = admin
            .post("/compute/v2.1/servers", json!({"server": body}))
            .await?;
        let server = made.expect_status(202)?.text("/server/id");
        self.server = Some(server.clone());
        admin.until_status(&server, "ACTIVE").await?;
        admin.until_logged(&server, "tick ").await?;
        Ok(server)
    }

    /// An agent that has just begun may not be in reach yet; what is typed is typed once.
    async fn types(&self, server: &str, commands: &[String]) -> Result<Vec<String>> {
        let opened = until("it has a console", SOON, || async {
            let opened = Typed::open(&self.stage.admin, server).await;
            opened.map_err(|error| format!("{error:#}"))
        });
        let mut typed = opened.await?;
        let mut said = Vec::new();
        for command in commands {
            said.push(typed.answer(command).await?);
        }
        Ok(said)
    }
}

/// What is known of a guest that goes.
struct Before {
    sides: Sides,
    server: String,
    seed: u64,
    nonce: String,
    witness: Witness,
}

/// What the API says agrees with where the guest is.
fn says(rest: &Rest, end: End, spot: Spot) -> Result<String> {
    let status = rest.migration["status"].as_str().unwrap_or_default();
    let right = match end {
        End::There => status == "completed",
        End::Here => status == "failed",
        // One that was lost on its new host had arrived there; one that was on both is no success.
        End::Error => ["failed", "error"].contains(&status) || spot.is_committed(),
    };
    ensure!(right, "{end:?}, and its migration: {rest:?}");
    Ok(match end {
        End::Error => rest.fault.clone(),
        End::Here | End::There => status.to_owned(),
    })
}

fn nonce(said: &[String]) -> Result<String> {
    let words = said
        .first()
        .map(|info| info.split(' '))
        .into_iter()
        .flatten();
    let nonce = words.filter_map(|word| word.strip_prefix("nonce=")).next();
    Ok(nonce
        .context("it does not say which boot it is of")?
        .to_owned())
}
