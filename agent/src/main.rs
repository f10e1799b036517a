//! `fractus-agent`: the agent of a host.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand};
use fractus_agent::daemon;
use fractus_agent::host::inventory::Inventory;
use fractus_agent::host::join::{Join, join};
use fractus_agent::host::{check, credentials::Identity};
use fractus_agent::machine::take_down::take_down;
use fractus_agent::machine::unheard;
use fractus_agent::machine::upgrade::{self, Fate};
use fractus_agent::paths::Paths;
use fractus_agent_api::identity::{Fingerprint, JoinToken};
use fractus_agent_api::machine::ServerId;
use fractus_vmm::config::MIN_CID;
use fractus_vmm::machine::Compression;

#[derive(Parser)]
#[command(
    name = "fractus-agent",
    version,
    about = "Runs the virtual machines of one host"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent
    Run(Run),
    /// Make this host part of a cloud
    Join(JoinArguments),
    /// Say what this host lacks for machines, and how to get it
    Check,
    /// Have the host's guests power off, and wait for it: for a host that is going down, once its agent
    /// has ended
    TakeDown(TakeDown),
    /// After a reboot of the host: start guests without a controller's word. Only where none will ever give it: a
    /// server that was evacuated meanwhile would run twice
    StartUnheard(StartUnheard),
    /// After an upgrade of the agent: hand the host's guests over to processes of its program, while they run
    UpgradeMachines(UpgradeMachines),
    /// Say the version
    Version,
}

#[derive(Args)]
struct Folders {
    /// Records, disks, images and identity; survives a reboot
    #[arg(
        long,
        env = "FRACTUS_STATE_DIR",
        default_value = fractus_agent::paths::DEFAULT_STATE
    )]
    state_dir: PathBuf,
    /// Sockets
    #[arg(
        long,
        env = "FRACTUS_RUNTIME_DIR",
        default_value = "/run/fractus-agent"
    )]
    runtime_dir: PathBuf,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    folders: Folders,
    /// Where controllers reach this agent
    #[arg(long, env = "FRACTUS_LISTEN", default_value = "0.0.0.0:9443")]
    listen: SocketAddr,
    /// First user id that machines run as; one each
    #[arg(long, env = "FRACTUS_FIRST_USER", default_value_t = 1_900_000)]
    first_user: u32,
    /// How many there are
    #[arg(long, env = "FRACTUS_USERS", default_value_t = 1_000_000)]
    users: u32,
    /// GiB of images to keep beside those in use
    #[arg(long, env = "FRACTUS_IMAGE_CACHE_GIB", default_value_t = 20)]
    image_cache_gib: u64,
    /// Seconds that a guest may take to power off
    #[arg(long, env = "FRACTUS_SHUTDOWN_SECONDS", default_value_t = 60)]
    shutdown_seconds: u64,
    /// How the memory of suspended guests is written: as it is, or compressed, which takes less of the disk and more of the
    /// processors. Those that are suspended go on from either; agents of before read what is compressed not at all
    #[arg(
        long,
        env = "FRACTUS_SUSPEND_COMPRESSION",
        value_enum,
        default_value = "none"
    )]
    suspend_compression: SuspendCompression,
    /// Bridge of this host that machines' network devices are put on; without one they are up, and
    /// connected to nothing
    #[arg(long, env = "FRACTUS_BRIDGE")]
    bridge: Option<String>,
    /// Change no setting of the host's kernel; without this, shared memory may have huge pages where it asks
    /// for them (transparent_hugepage/shmem_enabled becomes advise where it is never)
    #[arg(long, env = "FRACTUS_LEAVE_HOST_SETTINGS", value_parser = BoolishValueParser::new())]
    leave_host_settings: bool,
    /// Run stand-ins instead of guests, where there is no KVM
    #[arg(long, env = "FRACTUS_STAND_INS", hide = true)]
    stand_ins: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum SuspendCompression {
    None,
    Zstd,
}

impl From<SuspendCompression> for Compression {
    fn from(compression: SuspendCompression) -> Self {
        match compression {
            SuspendCompression::None => Self::None,
            SuspendCompression::Zstd => Self::Zstd,
        }
    }
}

#[derive(Args)]
struct TakeDown {
    #[command(flatten)]
    folders: Folders,
    /// Seconds to wait before those that are left are killed; less than TimeoutStopSec of
    /// fractus-machines.service by some
    #[arg(long, env = "FRACTUS_TAKE_DOWN_SECONDS", default_value_t = 75)]
    within: u64,
}

#[derive(Args)]
struct StartUnheard {
    #[command(flatten)]
    folders: Folders,
    /// Those of these servers that wait; without any, and without --all, they are only listed
    #[arg(value_name = "SERVER")]
    servers: Vec<uuid::Uuid>,
    /// All that wait
    #[arg(long, conflicts_with = "servers")]
    all: bool,
}

#[derive(Args)]
struct UpgradeMachines {
    #[command(flatten)]
    folders: Folders,
    /// Those of these servers; all of the host's, if none is named
    #[arg(value_name = "SERVER")]
    servers: Vec<uuid::Uuid>,
    /// Also those whose process runs the agent's program already
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
struct JoinArguments {
    #[command(flatten)]
    folders: Folders,
    /// A controller's listener for agents, https://ADDRESS:PORT
    #[arg(long, env = "FRACTUS_CONTROLLER")]
    controller: String,
    /// What `fractus host join-token` printed
    #[arg(long, env = "FRACTUS_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// SHA-256 of the cloud's root certificate; the token carries it too
    #[arg(long, env = "FRACTUS_CA_FINGERPRINT")]
    ca_fingerprint: Option<String>,
    /// Where controllers will reach this host, https://ADDRESS:PORT
    #[arg(long, env = "FRACTUS_ENDPOINT")]
    endpoint: String,
    /// Succeed when this host has joined before
    #[arg(long)]
    if_needed: bool,
}

fn main() -> ExitCode {
    // Before all else, and without the rest: a machine's process starts as fast as it can.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == fractus_agent::vm::SUBCOMMAND)
    {
        return fractus_agent::vm::main();
    }
    match start(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fractus-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Run(arguments) => {
            log()?;
            raise_descriptors();
            runtime()?.block_on(daemon::run(config(arguments)?))?;
        }
        Command::Join(arguments) => runtime()?.block_on(join_cloud(arguments))?,
        Command::TakeDown(TakeDown { folders, within }) => {
            let paths = Paths::new(folders.state_dir, folders.runtime_dir);
            let (ended, killed) = take_down(&paths, Duration::from_secs(within))?;
            println!("{ended} machines ended, {killed} were killed");
        }
        Command::StartUnheard(arguments) => start_unheard(arguments)?,
        Command::UpgradeMachines(arguments) => {
            if !upgrade_machines(arguments)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Check => {
            if !check::print(std::io::stdout().lock())? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Version => println!("fractus-agent {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(ExitCode::SUCCESS)
}

fn start_unheard(arguments: StartUnheard) -> anyhow::Result<()> {
    let paths = Paths::new(arguments.folders.state_dir, arguments.folders.runtime_dir);
    let waiting = unheard::waiting(&paths)?;
    let servers: Vec<ServerId> = arguments.servers.into_iter().map(ServerId).collect();
    if let Some(other) = servers.iter().find(|id| !waiting.contains(id)) {
        anyhow::bail!("{other} does not wait for a controller's word on this host");
    }
    if !arguments.all && servers.is_empty() {
        for id in waiting {
            println!("{id}");
        }
        return Ok(());
    }
    let servers = match arguments.all {
        true => waiting,
        false => servers,
    };
    let count = servers.len();
    unheard::say(&paths, &servers)?;
    println!("{count} servers are started by this host's agent, within seconds where it runs");
    Ok(())
}

/// Whether none failed.
fn upgrade_machines(arguments: UpgradeMachines) -> anyhow::Result<bool> {
    let paths = Paths::new(arguments.folders.state_dir, arguments.folders.runtime_dir);
    let wanted = upgrade::Wanted {
        machines: arguments.servers.into_iter().map(ServerId).collect(),
        all: arguments.all,
        program: None,
    };
    let mut well = true;
    upgrade::ask(&paths, &wanted, |id, fate| match fate {
        Fate::HandedOver {
            blackout_us: Some(us),
        } => {
            let (ms, rest) = (us / 1000, us % 1000 / 10);
            println!("{id} handed over, {ms}.{rest:02} ms");
        }
        Fate::HandedOver { blackout_us: None } => println!("{id} handed over, paused"),
        Fate::Current => println!("{id} current"),
        Fate::Skipped { reason } => println!("{id} skipped: {reason}"),
        Fate::Failed { reason } => {
            well = false;
            println!("{id} failed: {reason}");
        }
    })?;
    Ok(well)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .max_blocking_threads(16)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .context("starting the runtime")
}

/// Some descriptors a machine and a connection each: the soft limit is for programs that use `select`.
fn raise_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of descriptors could not be raised");
    }
}

fn log() -> anyhow::Result<()> {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("FRACTUS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init()
        .map_err(|e| anyhow::anyhow!("starting the log: {e}"))
}

fn config(run: Run) -> anyhow::Result<daemon::Config> {
    let last = run
        .first_user
        .checked_add(run.users)
        .context("too many users")?;
    // A machine's context id is its user's number.
    anyhow::ensure!(
        run.first_user >= MIN_CID,
        "--first-user {}: machines run as users from {MIN_CID} on, none as root",
        run.first_user
    );
    Ok(daemon::Config {
        state: run.folders.state_dir,
        runtime: run.folders.runtime_dir,
        listen: run.listen,
        users: run.first_user..last,
        image_cache: run.image_cache_gib << 30,
        shutdown: Duration::from_secs(run.shutdown_seconds),
        suspend_compression: run.suspend_compression.into(),
        bridge: run.bridge,
        leave_host_settings: run.leave_host_settings,
        stand_ins: run.stand_ins,
    })
}

async fn join_cloud(arguments: JoinArguments) -> anyhow::Result<()> {
    let paths = Paths::new(arguments.folders.state_dir, arguments.folders.runtime_dir);
    if arguments.if_needed
        && let Ok(identity) = Identity::load(&paths.identity())
    {
        println!("{}", identity.membership.host_id);
        return Ok(());
    }
    let in_token = arguments.token.parse::<JoinToken>().map(|token| token.root);
    let root: Fingerprint = match &arguments.ca_fingerprint {
        Some(text) => text.parse()?,
        None => in_token?,
    };
    std::fs::create_dir_all(&paths.state)
        .with_context(|| format!("making {}", paths.state.display()))?;
    let host = Inventory::new(&paths.state)?.report();
    let identity = join(
        &paths,
        Join {
            controller: arguments.controller,
            token: arguments.token,
            root,
            endpoint: arguments.endpoint,
        },
        host,
    )
    .await?;
    println!("{}", identity.membership.host_id);
    Ok(())
}
