//! `fractus-agent run`: the parts put together, for the life of the agent.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::api::listener;
use crate::api::routes::{Api, router};
use crate::console::live::Consoles;
use crate::host::cgroup::Cgroups;
use crate::host::credentials::Identity;
use crate::host::inventory::Inventory;
use crate::host::makings::HostMakings;
use crate::host::push::{Cloud, Push};
use crate::host::renew;
use crate::image::Cache;
use crate::machine::Machines;
use crate::machine::actor::Surroundings;
use crate::machine::process::launch::HostLauncher;
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
    /// No KVM: guests are stand-ins, for trying out everything else.
    pub stand_ins: bool,
}

/// Locks the state folder for this life of the agent: two agents would fight over its machines. The
/// file also holds the mark that tells this agent's processes from another's.
struct Lock {
    _file: std::fs::File,
    mark: Uuid,
}

/// How long an agent that was killed may seem to hold its lock: a process that it was just starting has
/// copies of all its descriptors until its exec.
const HANDOVER: Duration = Duration::from_secs(10);

fn lock(paths: &Paths, patience: Duration) -> anyhow::Result<Lock> {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    for folder in [&paths.state, &paths.runtime, &paths.sockets()] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("making {}", folder.display()))?;
    }
    let path = paths.state.join("lock");
    let mut options = std::fs::File::options();
    let mut file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let by = Instant::now() + patience;
    while let Err(error) = file.try_lock() {
        if !matches!(error, std::fs::TryLockError::WouldBlock) || Instant::now() > by {
            return Err(error).with_context(|| {
                format!(
                    "{} is locked: another agent runs with this state folder",
                    path.display()
                )
            });
        }
        // Nothing else of this agent runs yet that could be held up.
        std::thread::sleep(Duration::from_millis(10));
    }
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

/// Until SIGTERM or SIGINT. Machines run on.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let paths = Paths::new(&config.state, &config.runtime);
    let lock = lock(&paths, HANDOVER)?;
    let identity = Identity::load(&paths.identity())?;
    let listening = listener::bind(config.listen).await?;
    let cloud = Cloud::new(paths.clone(), identity)?;
    let inventory = Inventory::new(&config.state).context("reading what the host has")?;
    let name = lock.mark.simple().to_string();
    let cgroups = Cgroups::of_this_process(&name).unwrap_or_else(|error| {
        tracing::warn!(%error, "no control groups for machines");
        None
    });
    let launcher = HostLauncher::new(paths.clone(), lock.mark, cgroups.clone(), config.stand_ins)
        .context("preparing to start machines")?;
    let boot_id = launcher.boot_id;
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
            makings: Arc::new(HostMakings { cache, boot_id }),
            shutdown: config.shutdown,
            changed: changed_sender,
        },
        config.users,
        lock.mark,
    )?;
    let instance = Uuid::new_v4();
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

    #[test]
    fn two_agents_do_not_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(&paths(folder.path()), Duration::ZERO).unwrap();
        let second = lock(&paths(folder.path()), Duration::from_millis(50));
        assert!(second.is_err());
        drop(first);
        lock(&paths(folder.path()), Duration::ZERO).unwrap();
    }

    /// As by a process that a killed agent was starting, which holds copies until its exec.
    #[test]
    fn a_lock_that_is_let_go_of_late_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        let killed = lock(&paths, Duration::ZERO).unwrap();
        let (mark, copy) = (killed.mark, killed._file.try_clone().unwrap());
        drop(killed);
        assert!(lock(&paths, Duration::ZERO).is_err(), "the copy holds it");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| lock(&paths, HANDOVER));
            drop(copy);
            assert_eq!(next.join().unwrap().unwrap().mark, mark);
        });
    }
}
