//! The cloud as its users feel it: servers, listings, tokens, and what the two programs weigh.
//!
//! Each benchmark starts a cloud of its own: one controller, one agent, SQLite, on this host.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fractus_tests::harness;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde_json::json;

use crate::cloud::Cloud;
use crate::figure::{Figure, median};
use crate::interrupt;
use crate::process::{built, probe};

const CROWD: usize = 64;
const AT_A_TIME: usize = 8;
const LISTED: usize = 10;
const LOGINS: usize = 100;
/// Requests of a round for what takes about a millisecond.
const REQUESTS: usize = 20;

/// Starts a cloud, logs in and measures.
fn in_a_cloud<T>(
    measure: impl AsyncFnOnce(&Cloud, &mut harness::Cloud) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    in_a_cloud_of(1, measure)
}

/// The same with so many hosts, of this machine all of them.
pub fn in_a_cloud_of<T>(
    agents: usize,
    measure: impl AsyncFnOnce(&Cloud, &mut harness::Cloud) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    // The workspace builds rustls without a default provider. That there is one already is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(interrupt::unless(async {
        let mut harness = harness::Cloud::start(harness::Options {
            agents,
            ..harness::Options::default()
        })
        .await?;
        let cloud = Cloud::login(&harness).await?;
        let outcome = measure(&cloud, &mut harness).await;
        outcome.with_context(|| harness.logs())
    }))
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn figure(name: &str, unit: &'static str, values: Vec<f64>, limit: Option<f64>) -> Figure {
    Figure {
        name: name.to_owned(),
        unit,
        rounds: values.len(),
        ours: median(values).unwrap_or(f64::NAN),
        peer: None,
        limit,
        ratio_limit: None,
    }
}

/// The same figure of OpenStack with its fake driver, measured on a machine of this kind
/// (shared/ground.md); it cannot be measured in turn with ours.
fn beside_openstack(mut figure: Figure, theirs: f64) -> Figure {
    figure.peer = Some(("OpenStack 2026.2", theirs));
    figure
}

/// What servers are made of: an empty root disk, the probe as kernel.
pub struct Makings {
    images: [String; 2],
    flavor: String,
}

impl Makings {
    async fn upload(cloud: &Cloud) -> anyhow::Result<Self> {
        Self::with(cloud, "tick_ms=0", 256).await
    }

    /// Of a guest with that command line and so many MiB.
    pub async fn with(cloud: &Cloud, command_line: &str, mib: u64) -> anyhow::Result<Self> {
        let kernel = cloud
            .upload("bench-probe", json!({}), std::fs::read(probe()?)?)
            .await?;
        let properties = json!({"kernel_id": kernel, "os_command_line": command_line});
        let root = cloud
            .upload("bench-root", properties, vec![0; 1 << 20])
            .await?;
        let flavor = cloud
            .flavor(&format!("bench-{}-{mib}", std::process::id()), mib)
            .await?;
        Ok(Self {
            images: [root, kernel],
            flavor,
        })
    }

    pub async fn create(&self, cloud: &Cloud, name: &str) -> anyhow::Result<(String, Duration)> {
        cloud.create(name, &self.images[0], &self.flavor).await
    }

    pub async fn forget(self, cloud: &Cloud) -> anyhow::Result<()> {
        cloud.forget_flavor(&self.flavor).await?;
        for image in &self.images {
            cloud.forget_image(image).await?;
        }
        Ok(())
    }
}

/// One server after the other, then many at once.
pub fn servers(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    in_a_cloud(async |cloud, _| {
        let makings = Makings::upload(cloud).await?;
        let mut active = Vec::new();
        // One round unmeasured: it fetches the image to the host.
        for round in 0..=rounds {
            let (id, time) = makings.create(cloud, "bench").await?;
            cloud.delete(&id).await?;
            if round > 0 {
                active.push(ms(time));
            }
        }
        let began = Instant::now();
        stream::iter(0..CROWD)
            .map(|n| {
                let makings = &makings;
                async move {
                    let (id, _) = makings.create(cloud, &format!("bench-{n}")).await?;
                    cloud.delete(&id).await
                }
            })
            .buffer_unordered(AT_A_TIME)
            .try_collect::<Vec<()>>()
            .await?;
        let crowd = began.elapsed().as_secs_f64();
        makings.forget(cloud).await?;
        Ok(vec![
            beside_openstack(figure("server-active", "ms", active, Some(50.0)), 1140.0),
            figure("servers-64", "s", vec![crowd], Some(5.0)),
        ])
    })
}

/// `GET /servers/detail` of ten servers.
pub fn listing(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    in_a_cloud(async |cloud, _| {
        let makings = Makings::upload(cloud).await?;
        let mut ids = Vec::new();
        for n in 0..LISTED {
            ids.push(makings.create(cloud, &format!("bench-{n}")).await?.0);
        }
        let mut times = Vec::new();
        for _ in 0..rounds * REQUESTS {
            let began = Instant::now();
            let count = cloud.list_servers().await?;
            times.push(ms(began.elapsed()));
            if count < LISTED {
                bail!("{count} servers are listed of {LISTED}");
            }
        }
        for id in &ids {
            cloud.delete(id).await?;
        }
        makings.forget(cloud).await?;
        Ok(vec![beside_openstack(
            figure("servers-detail-10", "ms", times, Some(2.0)),
            160.0,
        )])
    })
}

/// Validation; logins a second and memory while a hundred come at once; the command-line client.
pub fn tokens(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    in_a_cloud(async |cloud, harness| {
        let (mut validations, mut logins) = (Vec::new(), Vec::new());
        for _ in 0..rounds * REQUESTS {
            let began = Instant::now();
            cloud.validate_token().await?;
            validations.push(ms(began.elapsed()));
        }
        for _ in 0..rounds {
            let began = Instant::now();
            cloud.password().await?;
            logins.push(ms(began.elapsed()));
        }
        let (peak, granted, time) = crowd_of_logins(cloud, controller_pid(harness)?).await?;
        let environment = harness.environment();
        let mut beside_hash = Vec::new();
        for _ in 0..rounds {
            let began = Instant::now();
            cloud.password().await?;
            let login = began.elapsed();
            beside_hash.push(ms(token_issue(&environment)?) - ms(login));
        }
        let per_second = granted as f64 / time.as_secs_f64();
        Ok(vec![
            beside_openstack(figure("token-validate", "ms", validations, Some(1.0)), 8.0),
            beside_openstack(figure("token-by-password", "ms", logins, None), 481.0),
            figure("token-issue-beside-login", "ms", beside_hash, Some(50.0)),
            figure("logins-per-second", "1/s", vec![per_second], None),
            figure("logins-100-peak-rss", "MB", vec![peak], None),
        ])
    })
}

/// Peak RSS of the controller in MB, logins granted (others are told to wait: 429), time.
async fn crowd_of_logins(cloud: &Cloud, controller: u32) -> anyhow::Result<(f64, usize, Duration)> {
    let began = Instant::now();
    let logins = stream::iter(0..LOGINS)
        .map(|_| cloud.password())
        .buffer_unordered(LOGINS);
    let mut logins = std::pin::pin!(logins);
    let (mut peak, mut granted) = (0f64, 0);
    while let Some(login) = logins.next().await {
        granted += usize::from(login.is_ok());
        peak = peak.max(memory(controller, "VmRSS:")?);
    }
    Ok((peak, granted, began.elapsed()))
}

/// `fractus token issue`, from exec to exit: a login by password, and all that the client does.
fn token_issue(environment: &[(&'static str, String)]) -> anyhow::Result<Duration> {
    let mut command = Command::new(built("fractus")?);
    command.envs(environment.iter().cloned());
    command.args(["token", "issue", "--format", "json"]);
    let began = Instant::now();
    let output = command.output()?;
    let time = began.elapsed();
    if !output.status.success() {
        bail!(
            "fractus token issue: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(time)
}

/// Resident memory of both programs at rest.
pub fn memory_at_rest(_: usize) -> anyhow::Result<Vec<Figure>> {
    in_a_cloud(async |_, harness| {
        let controller = controller_pid(harness)?;
        let agent = harness.agent(0).context("no agent")?.pid();
        let rss = |pid| memory(pid, "VmRSS:");
        Ok(vec![
            figure("controller-rss", "MB", vec![rss(controller)?], Some(64.0)),
            figure("agent-rss", "MB", vec![rss(agent)?], Some(20.0)),
        ])
    })
}

fn controller_pid(harness: &mut harness::Cloud) -> anyhow::Result<u32> {
    Ok(harness.controller().context("no controller")?.pid())
}

/// A field of /proc/PID/status, MB.
fn memory(pid: u32, field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with(field));
    let kib = line
        .and_then(|line| line.split_ascii_whitespace().nth(1))
        .context("no such field")?;
    Ok(kib.parse::<f64>()? * 1024.0 / 1e6)
}
