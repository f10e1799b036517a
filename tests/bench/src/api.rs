//! The cloud as its users feel it: servers, listings, tokens, and what the two programs weigh.
//!
//! Needs a running cloud (scripts/bench starts one of its own), named by the OS_* variables, and the
//! process ids of its programs in FRACTUS_CONTROLLER_PID and FRACTUS_AGENT_PID.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::stream::{self, StreamExt, TryStreamExt};
use serde_json::json;

use crate::cloud::Cloud;
use crate::figure::{Figure, median};
use crate::process::{built, probe};

const CROWD: usize = 64;
const AT_A_TIME: usize = 8;
const LISTED: usize = 10;
const LOGINS: usize = 100;
/// Requests of a round for what takes about a millisecond.
const REQUESTS: usize = 20;

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    // The workspace builds rustls without a default provider.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

fn ms(time: Duration) -> f64 {
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
struct Makings {
    images: [String; 2],
    flavor: String,
}

impl Makings {
    async fn upload(cloud: &Cloud) -> anyhow::Result<Self> {
        let kernel = cloud
            .upload("bench-probe", json!({}), std::fs::read(probe()?)?)
            .await?;
        let properties = json!({"kernel_id": kernel, "os_command_line": "tick_ms=0"});
        let root = cloud
            .upload("bench-root", properties, vec![0; 1 << 20])
            .await?;
        let flavor = cloud
            .flavor(&format!("bench-{}", std::process::id()))
            .await?;
        Ok(Self {
            images: [root, kernel],
            flavor,
        })
    }

    async fn create(&self, cloud: &Cloud, name: &str) -> anyhow::Result<(String, Duration)> {
        cloud.create(name, &self.images[0], &self.flavor).await
    }

    async fn forget(self, cloud: &Cloud) -> anyhow::Result<()> {
        cloud.forget_flavor(&self.flavor).await?;
        for image in &self.images {
            cloud.forget_image(image).await?;
        }
        Ok(())
    }
}

/// One server after the other, then many at once.
pub fn servers(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    block_on(async {
        let cloud = Cloud::login().await?;
        let makings = Makings::upload(&cloud).await?;
        let mut active = Vec::new();
        // One round unmeasured: it fetches the image to the host.
        for round in 0..=rounds {
            let (id, time) = makings.create(&cloud, "bench").await?;
            cloud.delete(&id).await?;
            if round > 0 {
                active.push(ms(time));
            }
        }
        let began = Instant::now();
        stream::iter(0..CROWD)
            .map(|n| {
                let (cloud, makings) = (&cloud, &makings);
                async move {
                    let (id, _) = makings.create(cloud, &format!("bench-{n}")).await?;
                    cloud.delete(&id).await
                }
            })
            .buffer_unordered(AT_A_TIME)
            .try_collect::<Vec<()>>()
            .await?;
        let crowd = began.elapsed().as_secs_f64();
        makings.forget(&cloud).await?;
        Ok(vec![
            beside_openstack(figure("server-active", "ms", active, Some(50.0)), 1140.0),
            figure("servers-64", "s", vec![crowd], Some(5.0)),
        ])
    })
}

/// `GET /servers/detail` of ten servers.
pub fn listing(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    block_on(async {
        let cloud = Cloud::login().await?;
        let makings = Makings::upload(&cloud).await?;
        let mut ids = Vec::new();
        for n in 0..LISTED {
            ids.push(makings.create(&cloud, &format!("bench-{n}")).await?.0);
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
        makings.forget(&cloud).await?;
        Ok(vec![beside_openstack(
            figure("servers-detail-10", "ms", times, Some(2.0)),
            160.0,
        )])
    })
}

/// Validation; logins a second and memory while a hundred come at once; the command-line client.
pub fn tokens(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let mut figures = block_on(async {
        let cloud = Cloud::login().await?;
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
        let (peak, granted, time) = crowd_of_logins(&cloud).await?;
        Ok(vec![
            beside_openstack(figure("token-validate", "ms", validations, Some(1.0)), 8.0),
            beside_openstack(figure("token-by-password", "ms", logins, None), 481.0),
            figure(
                "logins-per-second",
                "1/s",
                vec![granted as f64 / time.as_secs_f64()],
                None,
            ),
            figure("logins-100-peak-rss", "MB", vec![peak], None),
        ])
    })?;
    let password = figures[1].ours;
    let mut beside_hash = Vec::new();
    for _ in 0..rounds {
        beside_hash.push(ms(token_issue()?) - password);
    }
    figures.push(figure("token-issue-cli", "ms", beside_hash, Some(50.0)));
    Ok(figures)
}

/// Peak RSS of the controller in MB, logins granted (others are told to wait: 429), time.
async fn crowd_of_logins(cloud: &Cloud) -> anyhow::Result<(f64, usize, Duration)> {
    let controller = process("FRACTUS_CONTROLLER_PID")?;
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

fn token_issue() -> anyhow::Result<Duration> {
    let mut command = Command::new(built("fractus")?);
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
    let rss = |variable| memory(process(variable)?, "VmRSS:");
    Ok(vec![
        figure(
            "controller-rss",
            "MB",
            vec![rss("FRACTUS_CONTROLLER_PID")?],
            Some(64.0),
        ),
        figure(
            "agent-rss",
            "MB",
            vec![rss("FRACTUS_AGENT_PID")?],
            Some(20.0),
        ),
    ])
}

fn process(variable: &str) -> anyhow::Result<u32> {
    let text = std::env::var(variable).with_context(|| format!("{variable} is not set"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{variable} is no process id"))
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
