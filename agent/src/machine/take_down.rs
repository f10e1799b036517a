//! Ends the machines of a host that is going down: each guest is asked to power off, and waited for; what is
//! there still then has its plug pulled, as it would have a moment later.
//!
//! Done by a process of its own, after the agent has ended: an agent would start them again.

use std::fs::{File, TryLockError};
use std::time::{Duration, Instant};

use anyhow::Context;
use fractus_agent_api::machine::{ServerId, StopReason};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use uuid::Uuid;

use super::process::identity::{self, Marked};
use crate::paths::Paths;
use crate::vm::protocol::{LastWords, VERSION};

/// For a process that has been told twice.
const LAST: Duration = Duration::from_secs(2);
/// For the kernel to take a killed process apart, however large its guest.
const KILLED: Duration = Duration::from_secs(10);

/// How many machines ended by themselves within that time, and how many had to be killed.
///
/// # Errors
/// An agent runs, /proc or the state folder cannot be read, or a process cannot be killed. A host on which no agent ever
/// ran has no machines.
pub fn take_down(paths: &Paths, within: Duration) -> anyhow::Result<(usize, usize)> {
    let lock = paths.lock();
    let reading = || format!("reading {}", lock.display());
    let file = match File::open(&lock) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
        Err(error) => return Err(error).with_context(reading),
    };
    if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
        anyhow::bail!("an agent runs, and would start the machines again: stop it first");
    }
    let mark = std::io::read_to_string(&file).with_context(reading)?;
    let mark = Uuid::try_parse(mark.trim())
        .with_context(|| format!("{} holds no agent's mark", lock.display()))?;
    let marked = identity::marked(mark).context("looking through /proc")?;
    let mut alive = marked;
    let all = alive.len();
    // A second signal is a process's last: it ends, and can still say why.
    for time in [within, LAST] {
        for process in &alive {
            // One that has ended meanwhile is what is wanted.
            let _ = pidfd_send_signal(&process.pidfd, Signal::TERM);
        }
        wait(&mut alive, time)?;
    }
    let killed = alive.len();
    for process in &alive {
        identity::kill(&process.pidfd).context("killing a machine's process")?;
    }
    let words = LastWords {
        version: VERSION,
        reason: StopReason::HostReboot,
    };
    let words = serde_json::to_vec(&words)?;
    for process in &alive {
        // What it would have said. Without it, its end counts as a fault until the host has rebooted.
        let file = paths.machine(ServerId(process.machine)).last_words();
        std::fs::write(&file, &words).with_context(|| format!("writing {}", file.display()))?;
    }
    wait(&mut alive, KILLED)?;
    anyhow::ensure!(alive.is_empty(), "{} machines outlive SIGKILL", alive.len());
    Ok((all - killed, killed))
}

/// Until all have ended, or for that long; leaves those that have not.
fn wait(alive: &mut Vec<Marked>, within: Duration) -> anyhow::Result<()> {
    let by = Instant::now() + within;
    loop {
        alive.retain(|process| !identity::ended(&process.pidfd));
        let left = by.saturating_duration_since(Instant::now());
        if alive.is_empty() || left.is_zero() {
            return Ok(());
        }
        let mut polled: Vec<PollFd<'_>> = (alive.iter())
            .map(|process| PollFd::new(&process.pidfd, PollFlags::IN))
            .collect();
        let left = Timespec::try_from(left).context("the time")?;
        match poll(&mut polled, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("waiting for machines to end"),
        }
    }
}
