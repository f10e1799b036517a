//! Live migration as the guest feels it: one vCPU that writes to its memory as fast as it can and looks at its time
//! stamp counter after every page (`churn` in images/probe). Ours goes through controller and agents, from one to
//! another on this machine, by TCP with TLS, its disk with it. The peer is Debian's QEMU by its own migration, by TCP
//! without TLS, without a disk, at the same downtime. While one is measured the other stands still.
//!
//! A gap is the longest time between two looks in the seconds that the migration took. It holds the whole pause where
//! the guest's counter is the host's, as on kvm-pvm; elsewhere the counter stands still from when it is saved until it
//! is loaded, with either of them. `lost` is how much of the guest's work was not done, as time at its usual pace;
//! `total` is what the sender took until all had been sent, as each of them says, `whole` the time from the request
//! until it was seen to be over.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::api::{Makings, in_a_cloud_of};
use crate::cloud::Cloud;
use crate::figure::{Figure, median};
use crate::process::{Running, probe};

const GUEST_MIB: u64 = 1024;
const PEER: &str = "QEMU tcp";
/// How long the guest may stand still, as both are told (ours by default).
const DOWNTIME_MS: u64 = 10;
/// Seconds that are compared with those of the migration.
const BEFORE: u64 = 3;
/// Between two looks at what a guest has said.
const LOOK: Duration = Duration::from_millis(200);
/// The same at a migration.
const ENDS: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(60);

/// What the guest does, and what is promised.
struct Case {
    name: &'static str,
    /// Before it writes to so much memory over and over.
    touched_mib: u64,
    churned_mib: u64,
    gap_ms: f64,
    total_ms: Option<f64>,
}

const CASES: [Case; 3] = [
    Case {
        name: "idle",
        touched_mib: 900,
        churned_mib: 0,
        gap_ms: 10.0,
        total_ms: None,
    },
    Case {
        name: "128",
        touched_mib: 0,
        churned_mib: 128,
        gap_ms: 20.0,
        total_ms: None,
    },
    Case {
        name: "512",
        touched_mib: 0,
        churned_mib: 512,
        gap_ms: 40.0,
        total_ms: Some(700.0),
    },
];

impl Case {
    fn command_line(&self) -> String {
        let (touch, churn) = (self.touched_mib, self.churned_mib);
        format!("tick_ms=0 run=\"touch {touch}; churn {churn}\"")
    }
}

/// A line of the guest's: what it did in each of the last seconds, the latest first.
#[derive(Clone)]
pub struct Line {
    pub second: u64,
    turns: Vec<f64>,
    gaps_us: Vec<f64>,
}

impl Line {
    /// The last whole one.
    pub fn last(said: &str) -> Option<Line> {
        let (whole, _) = said.rsplit_once('\n')?;
        whole.lines().rev().find_map(Line::of)
    }

    fn of(line: &str) -> Option<Line> {
        let rest = line.trim_end().strip_prefix("churn second=")?;
        let (second, rest) = rest.split_once(" turns=")?;
        let (turns, gaps) = rest.split_once(" gaps_us=")?;
        let numbers = |text: &str| -> Option<Vec<f64>> {
            text.split(',').map(|number| number.parse().ok()).collect()
        };
        Some(Line {
            second: second.parse().ok()?,
            turns: numbers(turns)?,
            gaps_us: numbers(gaps)?,
        })
    }

    /// Of seconds `from` to `to`: the longest gap, in ms, and turns a second.
    pub fn seconds(&self, from: u64, to: u64) -> anyhow::Result<(f64, f64)> {
        let index = |second| usize::try_from(self.second.saturating_sub(second));
        let (first, last) = (index(to)?, index(from)?);
        let of = |numbers: &[f64]| numbers.get(first..=last).map(<[f64]>::to_vec);
        let both = of(&self.gaps_us).zip(of(&self.turns));
        let (gaps, turns) = both.context("it took more seconds than the guest tells of")?;
        let gap = gaps.into_iter().fold(0.0, f64::max) / 1e3;
        Ok((gap, turns.iter().sum::<f64>() / turns.len() as f64))
    }
}

/// What one migration was to its guest.
struct Felt {
    gap_ms: f64,
    /// The longest gap of the seconds before.
    before_ms: f64,
    /// What was not done meanwhile, as time in which the guest does as much.
    lost_ms: f64,
    total_ms: f64,
    whole_ms: f64,
    /// Rounds, and the parts of the pause that the source tells of, in ms; none of the peer.
    rounds: f64,
    parts: [f64; PARTS.len()],
}

/// What the pause is for, as the report has it: first by the source's clock, then the owner's move by the controller's.
/// What is missing of the gap are the ways of the source's word and the intent, and the guest's first steps on its new host;
/// it runs before its target's word that it does is heard, which ends `run`.
const PARTS: [&str; 7] = ["stop", "state", "send", "answer", "decide", "tell", "run"];

impl Felt {
    /// `before`: the last line before it; `after`: one that was begun when it had ended.
    fn by(before: &Line, after: &Line, total_ms: f64, whole: Duration) -> anyhow::Result<Self> {
        let began = before.second;
        let (before_ms, usual) = after.seconds(began - BEFORE + 1, began)?;
        let (gap_ms, turns) = after.seconds(began + 1, after.second)?;
        let seconds = (after.second - began) as f64;
        Ok(Self {
            gap_ms,
            before_ms,
            lost_ms: (1.0 - turns / usual) * seconds * 1e3,
            total_ms,
            whole_ms: whole.as_secs_f64() * 1e3,
            rounds: 0.0,
            parts: [0.0; PARTS.len()],
        })
    }
}

/// Ours, paused but when it is its turn.
pub struct Ours<'a> {
    pub cloud: &'a Cloud,
    pub id: String,
}

impl Ours<'_> {
    pub async fn line_after(&self, second: u64) -> anyhow::Result<Line> {
        let began = Instant::now();
        loop {
            let said = self.cloud.console(&self.id).await?;
            if let Some(line) = Line::last(&said).filter(|line| line.second > second) {
                return Ok(line);
            }
            if began.elapsed() > PATIENCE {
                bail!("the guest does not say that it lives: {said}");
            }
            // sleeps because the API has no other way to wait
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn measure(&self) -> anyhow::Result<Felt> {
        let (cloud, id) = (self.cloud, &self.id);
        cloud.act(id, json!({"unpause": null})).await?;
        cloud.until(id, "ACTIVE").await?;
        let now = self.line_after(0).await?.second;
        let before = self.line_after(now + BEFORE).await?;
        let began = Instant::now();
        let report = cloud.migrate(id, ENDS).await?;
        let whole = began.elapsed();
        let total = report["progress"]["elapsed_us"].as_f64();
        let total = total.with_context(|| format!("no time in {report}"))?;
        let during = self.line_after(before.second).await?.second;
        let after = self.line_after(during).await?;
        cloud.act(id, json!({"pause": null})).await?;
        cloud.until(id, "PAUSED").await?;
        let felt = Felt::by(&before, &after, total / 1e3, whole)?;
        let progress = &report["progress"];
        let part = |name: &str| {
            let name = format!("{name}_us");
            let by_source = progress["pause"][&name].as_f64();
            by_source.or_else(|| report["handover"][&name].as_f64())
        };
        Ok(Felt {
            rounds: progress["rounds"].as_array().map_or(0, Vec::len) as f64,
            parts: PARTS.map(|name| part(name).unwrap_or(f64::NAN) / 1e3),
            ..felt
        })
    }
}

/// A QEMU with a guest of so many MiB.
pub fn qemu(mib: u64, command_line: &str) -> anyhow::Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-accel", "kvm"])
        .args(["-cpu", "max,-arch-capabilities"])
        .args(["-m", &mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot"])
        .args(["-append", command_line, "-kernel"])
        .arg(probe()?);
    Ok(command)
}

/// A QEMU and its monitor.
pub struct Peer {
    pub guest: Running,
    monitor: BufReader<UnixStream>,
    said: String,
}

impl Peer {
    fn start(folder: &Path, case: &Case, incoming: Option<&str>) -> anyhow::Result<Self> {
        let socket: PathBuf = folder.join(if incoming.is_some() { "there" } else { "here" });
        let mut command = qemu(GUEST_MIB, &case.command_line())?;
        if let Some(address) = incoming {
            command.args(["-incoming", address]);
        }
        Self::monitored(command, &socket)
    }

    /// Its monitor listens at `socket`.
    pub fn monitored(mut command: Command, socket: &Path) -> anyhow::Result<Self> {
        let _ = std::fs::remove_file(socket);
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        let guest = Running::start_talking(&mut command)?;
        let began = Instant::now();
        let monitor = loop {
            match UnixStream::connect(socket) {
                Ok(monitor) => break monitor,
                Err(error) if began.elapsed() > PATIENCE => return Err(error.into()),
                // sleeps because QEMU does not say when it listens
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        monitor.set_read_timeout(Some(PATIENCE))?;
        let mut peer = Self {
            guest,
            monitor: BufReader::new(monitor),
            said: String::new(),
        };
        peer.tell("qmp_capabilities", json!({}))?;
        Ok(peer)
    }

    pub fn tell(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let said = json!({"execute": command, "arguments": arguments});
        writeln!(self.monitor.get_mut(), "{said}")?;
        loop {
            let mut line = String::new();
            self.monitor.read_line(&mut line)?;
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU: {command}: {error}");
            }
        }
    }

    pub fn line_after(&mut self, second: u64) -> anyhow::Result<Line> {
        let later = |said: &str| Line::last(said).filter(|line| line.second > second);
        self.guest.read_until(&mut self.said, later)
    }

    /// Of one whose guest is to come (`-incoming defer`): the port on which it waits from here on.
    pub fn awaits(&mut self) -> anyhow::Result<String> {
        self.tell("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}))?;
        let info = self.tell("query-migrate", json!({}))?;
        let port = info["socket-address"][0]["port"].as_str();
        Ok(port
            .with_context(|| format!("no port in {info}"))?
            .to_owned())
    }

    /// Has its guest go, and asks now and then whether it has; how it went.
    pub fn migrate(&mut self, address: &str, look: Duration) -> anyhow::Result<Value> {
        self.tell("migrate", json!({"uri": address}))?;
        let began = Instant::now();
        loop {
            let info = self.tell("query-migrate", json!({}))?;
            match info["status"].as_str() {
                Some("completed") => return Ok(info),
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {info}"),
                _ if began.elapsed() > PATIENCE => bail!("QEMU's migration has no end: {info}"),
                // sleeps because QEMU is asked about it
                _ => std::thread::sleep(look),
            }
        }
    }

    /// Goes to another process, which is returned, standing still.
    fn measure(mut self, folder: &Path, case: &Case) -> anyhow::Result<(Felt, Self)> {
        let mut there = Self::start(folder, case, Some("defer"))?;
        let port = there.awaits()?;
        let address = format!("tcp:127.0.0.1:{port}");
        let most = json!({"downtime-limit": DOWNTIME_MS, "max-bandwidth": 1_u64 << 40});
        self.tell("migrate-set-parameters", most)?;
        self.tell("cont", json!({}))?;
        let now = self.line_after(0)?.second;
        let before = self.line_after(now + BEFORE)?;
        let began = Instant::now();
        let total = self.migrate(&address, ENDS)?["total-time"].as_f64();
        let whole = began.elapsed();
        drop(self);
        let during = there.line_after(before.second)?.second;
        let after = there.line_after(during)?;
        there.tell("stop", json!({}))?;
        there.said.clear();
        std::fs::rename(folder.join("there"), folder.join("here"))?;
        let total = total.context("no total time")?;
        let felt = Felt::by(&before, &after, total, whole)?;
        Ok((felt, there))
    }
}

/// Through controller and agents, and QEMU's, in turn.
pub fn migrations(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    in_a_cloud_of(2, async |cloud, _| {
        let mut figures = Vec::new();
        for case in &CASES {
            let makings = Makings::with(cloud, &case.command_line(), GUEST_MIB).await?;
            let (id, _) = makings.create(cloud, case.name).await?;
            cloud.act(&id, json!({"pause": null})).await?;
            cloud.until(&id, "PAUSED").await?;
            let ours = Ours { cloud, id };
            let mut peer = Peer::start(folder, case, None)?;
            peer.line_after(0)?;
            peer.tell("stop", json!({}))?;
            let (mut our, mut their) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                our.push(ours.measure().await?);
                let (felt, there) = peer.measure(folder, case)?;
                their.push(felt);
                peer = there;
            }
            drop(peer);
            cloud.delete(&ours.id).await?;
            makings.forget(cloud).await?;
            figures.extend(figures_of(case, &our, &their));
        }
        Ok(figures)
    })
}

fn figures_of(case: &Case, our: &[Felt], their: &[Felt]) -> Vec<Figure> {
    let middle = |felt: &[Felt], of: fn(&Felt) -> f64| {
        median(felt.iter().map(of).collect()).unwrap_or(f64::NAN)
    };
    let figure = |what: &str, unit, of: fn(&Felt) -> f64, limit| Figure {
        name: format!("migrate-{}-{what}", case.name),
        unit,
        ours: middle(our, of),
        peer: Some((PEER, middle(their, of))),
        rounds: our.len(),
        limit,
        ratio_limit: None,
    };
    let ours_alone = |what: &str, unit, of: &dyn Fn(&Felt) -> f64| Figure {
        name: format!("migrate-{}-{what}", case.name),
        unit,
        ours: median(our.iter().map(of).collect()).unwrap_or(f64::NAN),
        peer: None,
        rounds: our.len(),
        limit: None,
        ratio_limit: None,
    };
    let mut figures = vec![
        figure("gap", "ms", |felt| felt.gap_ms, Some(case.gap_ms)),
        figure("gap-before", "ms", |felt| felt.before_ms, None),
        figure("lost", "ms", |felt| felt.lost_ms, None),
        figure("total", "ms", |felt| felt.total_ms, case.total_ms),
        figure("whole", "ms", |felt| felt.whole_ms, None),
        ours_alone("rounds", "", &|felt| felt.rounds),
    ];
    for (index, name) in PARTS.iter().enumerate() {
        let of = |felt: &Felt| felt.parts.get(index).copied().unwrap_or(f64::NAN);
        figures.push(ours_alone(&format!("pause-{name}"), "ms", &of));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_of_the_seconds_that_are_asked_for() {
        let said =
            "noise\r\nchurn second=7 turns=5,1,9,9 gaps_us=10,4000,20,30\r\nchurn second=8 tu";
        let line = Line::last(said).unwrap();
        assert_eq!(line.second, 7);
        assert_eq!(line.seconds(6, 7).unwrap(), (4.0, 3.0));
        assert_eq!(line.seconds(4, 5).unwrap(), (0.03, 9.0));
        assert!(line.seconds(1, 7).is_err());
    }
}
