//! Ends the machines of a host that is going down: each guest is asked to power off, and waited for.
//!
//! Done by a process of its own, after the agent has ended: an agent would start them again.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use uuid::Uuid;

use super::process::identity;
use crate::paths::Paths;

/// How many machines there were, and how many of them are left after `within`.
///
/// # Errors
/// /proc or the state folder cannot be read. A host on which no agent ever ran has no machines.
pub fn take_down(paths: &Paths, within: Duration) -> anyhow::Result<(usize, usize)> {
    let by = Instant::now() + within;
    let lock = paths.lock();
    let mark = match std::fs::read_to_string(&lock) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
        Err(error) => return Err(error).with_context(|| format!("reading {}", lock.display())),
    };
    let mark = Uuid::try_parse(mark.trim())
        .with_context(|| format!("{} holds no agent's mark", lock.display()))?;
    let marked = identity::marked(mark).context("looking through /proc")?;
    let mut alive: Vec<OwnedFd> = marked.into_iter().map(|process| process.pidfd).collect();
    let all = alive.len();
    for process in &alive {
        // One that has ended meanwhile is what is wanted.
        let _ = pidfd_send_signal(process, Signal::TERM);
    }
    loop {
        alive.retain(|process| !identity::ended(process));
        let left = by.saturating_duration_since(Instant::now());
        if alive.is_empty() || left.is_zero() {
            return Ok((all, alive.len()));
        }
        let mut polled: Vec<PollFd<'_>> = (alive.iter())
            .map(|process| PollFd::new(process, PollFlags::IN))
            .collect();
        let left = Timespec::try_from(left).context("the time")?;
        match poll(&mut polled, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("waiting for machines to end"),
        }
    }
}
