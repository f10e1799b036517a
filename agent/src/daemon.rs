//! `fractus-agent run`: the parts put together, for the life of the agent.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use fractus_vmm::machine::Compression;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

use crate::api::listener::{self, ListenError};
use crate::api::routes::{Api, router};
use crate::console::live::Consoles;
use crate::host::cgroup::Cgroups;
use crate::host::credentials::Identity;
use crate::host::huge_pages;
use crate::host::inventory::Inventory;
use crate::host::makings::{COPIES, HostMakings};
use crate::host::push::{Cloud, Push};
use crate::host::renew;
use crate::image::Cache;
use crate::machine::Machines;
use crate::machine::actor::{Surroundings, memory_takes};
use crate::machine::process::identity;
use crate::machine::process::launch::HostLauncher;
use crate::machine::{unheard, upgrade};
use crate::paths::Paths;

#[derive(Debug, Clone)]
pub struct Config {
    pub state: PathBuf,
    pub runtime: PathBuf,
    pub listen: SocketAddr,
    /// Users of machines.
    pub users: Range<u32>,
    /// Bytes of images kept beside those in use.
    pub image_cache: u64,
    /// How long a guest may take to power off.
    pub shutdown: Duration,
    /// Of memory that is kept of guests that are suspended from now on.
    pub suspend_compression: Compression,
    /// Of this host; machines' network devices are put on it. None: they are up, and connected to
    /// nothing.
    pub bridge: Option<String>,
    /// Nothing of the host is set to what machines are best off with.
    pub leave_host_settings: bool,
    /// No KVM: guests are stand-ins, for trying out everything else.
    pub stand_ins: bool,
}

/// Locks the state folder for this life of the agent: two agents would fight over its machines. The
/// file also holds the mark that tells this agent's processes from another's.
struct Lock {
    _file: std::fs::File,
    mark: Uuid,
}

/// What an agent that was killed may seem to hold, its lock and its port: a process that it was just
/// starting has copies of all its descriptors until its exec.
struct Handover<W> {
    /// In all.
    patience: Duration,
    /// Told each time that it is not let go of yet.
    waits: W,
}

impl<W: Fn(&io::Error)> Handover<W> {
    async fn take<T>(&self, mut attempt: impl AsyncFnMut() -> io::Result<T>) -> io::Result<T> {
        use io::ErrorKind::{AddrInUse, WouldBlock};
        let by = Instant::now() + self.patience;
        loop {
            match attempt().await {
                Err(held)
                    if matches!(held.kind(), WouldBlock | AddrInUse) && Instant::now() < by =>
                {
                    (self.waits)(&held);
                }
                done => return done,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn lock<W: Fn(&io::Error)>(paths: &Paths, handover: &Handover<W>) -> anyhow::Result<Lock> {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    for folder in [&paths.state, &paths.runtime, &paths.sockets()] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("making {}", folder.display()))?;
    }
    let path = paths.lock();
    let mut options = std::fs::File::options();
    let mut file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let taken = handover.take(async || Ok(file.try_lock()?)).await;
    taken.with_context(|| {
        format!(
            "{} is locked: another agent runs with this state folder",
            path.display()
        )
    })?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let mark = match Uuid::try_parse(text.trim()) {
        Ok(mark) => mark,
        Err(_) => {
            let mark = Uuid::new_v4();
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(mark.hyphenated().to_string().as_bytes())?;
            file.sync_all()?;
            mark
        }
    };
    Ok(Lock { _file: file, mark })
}

async fn listen<W: Fn(&io::Error)>(
    address: SocketAddr,
    handover: &Handover<W>,
) -> Result<TcpListener, ListenError> {
    let bound = handover.take(async || TcpListener::bind(address).await);
    bound
        .await
        .map_err(|source| ListenError::Bind { address, source })
}

/// For the machines of the agent with this mark; what they lack is said.
fn control_groups(mark: Uuid) -> Option<Cgroups> {
    let name = mark.simple().to_string();
    let cgroups = Cgroups::of_this_process(&name).unwrap_or_else(|error| {
        tracing::warn!(%error, "no control groups for machines");
        None
    });
    if let Some(absent) = cgroups.as_ref().map(Cgroups::absent)
        && !absent.is_empty()
    {
        tracing::warn!(
            ?absent,
            "machines' control groups lack controllers, so those limits do not hold"
        );
    }
    cgroups
}

/// Until SIGTERM or SIGINT. Machines run on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let paths = Paths::new(&config.state, &config.runtime);
    let handover = Handover {
        patience: Duration::from_secs(10),
        waits: |held: &io::Error| tracing::debug!(%held, "waiting for an agent that is ending"),
    };
    let lock = lock(&paths, &handover).await?;
    let identity = Identity::load(&paths.identity())?;
    let listening = listen(config.listen, &handover).await?;
    let cloud = Cloud::new(paths.clone(), identity)?;
    if !(config.leave_host_settings || config.stand_ins) {
        match huge_pages::advise(Path::new(huge_pages::SHMEM_ENABLED)) {
            Ok(true) => tracing::info!("shmem_enabled was never, and is advise now"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "no huge pages for guests' memory"),
        }
    }
    let inventory = Inventory::new(&config.state).context("reading what the host has")?;
    let cgroups = control_groups(lock.mark);
    let launcher = HostLauncher::new(paths.clone(), lock.mark, cgroups.clone(), config.stand_ins)
        .context("preparing to start machines")?;
    let boot_id = launcher.boot_id;
    let program = identity::program_of(&launcher.binary).context("looking at its own program")?;
    let cache = Arc::new(Cache::new(
        paths.images(),
        config.image_cache,
        Arc::new(cloud.clone()),
    )?);
    let (changed_sender, changed) = mpsc::unbounded_channel();
    let machines = Machines::take_up(
        paths.clone(),
        Surroundings {
            launcher: Arc::new(launcher),
            makings: Arc::new(HostMakings {
                cache,
                boot_id,
                bridge: config.bridge.clone(),
                copies: Arc::new(Semaphore::new(COPIES)),
            }),
            shutdown: config.shutdown,
            listen: config.listen.ip(),
            memory_takes,
            suspend_compression: config.suspend_compression,
            changed: changed_sender,
        },
        config.users,
        lock.mark,
    )?;
    let instance = Uuid::new_v4();
    let local = paths.local();
    let local = upgrade::bind(&local).with_context(|| local.display().to_string())?;
    let upgrades = upgrade::listen(machines.clone(), local, program);
    let listens = unheard::listen(machines.clone(), paths.clone(), boot_id);
    let api = Api {
        machines: machines.clone(),
        inventory: inventory.clone(),
        consoles: Consoles::new(paths.clone()),
        paths,
        metrics: crate::metrics::install(),
        instance,
    };
    let push = Push {
        cloud: cloud.clone(),
        machines: machines.clone(),
        inventory,
        changed,
        instance,
        sequence: 0,
    };
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(push.run());
    tasks.spawn(listens);
    tasks.spawn(upgrades);
    tasks.spawn(renew::run(cloud.clone()));
    tasks.spawn(crate::machine::registry::purge_tombstones(machines.clone()));
    let mut ends = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(listen = %config.listen, host = %cloud.link().identity.membership.host_id, "ready");
    let ended = tokio::select! {
        served = listener::serve(listening, cloud, router(api)) => served.map_err(Into::into),
        _ = ends.recv() => Ok(()),
        _ = interrupted.recv() => Ok(()),
    };
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tasks.shutdown().await;
    machines.close().await;
    if let Some(cgroups) = cgroups {
        // Stays while machines are in it.
        let _ = cgroups.close();
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(folder: &std::path::Path) -> Paths {
        Paths::new(folder.join("state"), folder.join("run"))
    }

    fn patient(patience: Duration) -> Handover<impl Fn(&io::Error)> {
        let waits = |_: &io::Error| {};
        Handover { patience, waits }
    }

    #[tokio::test]
    async fn two_agents_do_not_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        let first = lock(&paths, &patient(Duration::ZERO)).await.unwrap();
        let second = lock(&paths, &patient(Duration::from_millis(50))).await;
        assert!(second.is_err());
        drop(first);
        lock(&paths, &patient(Duration::ZERO)).await.unwrap();
    }

    /// Lets go of it once the next agent has found it held.
    fn late<T>(held: T) -> Handover<impl Fn(&io::Error)> {
        let held = std::cell::Cell::new(Some(held));
        let waits = move |_: &io::Error| drop(held.take());
        let patience = Duration::from_secs(60);
        Handover { patience, waits }
    }

    /// As by a process that a killed agent was starting, which holds copies until its exec.
    #[tokio::test]
    async fn a_lock_that_is_let_go_of_late_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        let killed = lock(&paths, &patient(Duration::ZERO)).await.unwrap();
        let (mark, copy) = (killed.mark, killed._file.try_clone().unwrap());
        drop(killed);
        let held = lock(&paths, &patient(Duration::ZERO)).await;
        assert!(held.is_err(), "the copy holds it");
        assert_eq!(lock(&paths, &late(copy)).await.unwrap().mark, mark);
    }

    #[tokio::test]
    async fn a_port_that_is_let_go_of_late_is_waited_for() {
        let killed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = killed.local_addr().unwrap();
        let held = listen(address, &patient(Duration::ZERO)).await;
        assert!(held.is_err());
        let next = listen(address, &late(killed)).await.unwrap();
        assert_eq!(next.local_addr().unwrap(), address);
    }
}
