//! Processes under measurement: started, watched on their standard output, ended.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::interrupt;

/// Nothing measured here takes nearly as long; beyond it something hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A child, and the machine that it may have put into a process of its own. Both are gone when it has
/// been dropped.
pub struct Running {
    child: Child,
    output: ChildStdout,
    began: Instant,
}

impl Running {
    /// Starts `command` with its standard output in a pipe. The clock starts before the fork.
    pub fn start(command: &mut Command) -> anyhow::Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let began = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        let output = child.stdout.take().context("a pipe was asked for")?;
        Ok(Self {
            child,
            output,
            began,
        })
    }

    /// Time from the start to the first byte of output.
    pub fn first_byte(&mut self) -> anyhow::Result<Duration> {
        self.read_some()?;
        Ok(self.began.elapsed())
    }

    /// Reads until a line that begins with `prefix`.
    pub fn wait_for_line(&mut self, prefix: &str) -> anyhow::Result<()> {
        let mut text = String::new();
        while !text.lines().any(|line| line.starts_with(prefix)) {
            text.push_str(&String::from_utf8_lossy(&self.read_some()?));
        }
        Ok(())
    }

    /// Reads to the end of the output. A machine in a session of its own ends when its starter does, and
    /// holds the other end of this pipe until then.
    fn drain(&mut self) -> anyhow::Result<()> {
        let by = Instant::now() + PATIENCE;
        loop {
            let left = by.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.output, PollFlags::IN)];
            if ready(&mut fds, left)? == 0 {
                bail!("its output is open after {PATIENCE:?}");
            }
            if self.output.read(&mut [0; 4096])? == 0 {
                return Ok(());
            }
        }
    }

    fn read_some(&mut self) -> anyhow::Result<Vec<u8>> {
        let left = PATIENCE.saturating_sub(self.began.elapsed());
        let bell = interrupt::bell().context("signals are not listened to")?;
        let mut fds = [
            PollFd::new(&self.output, PollFlags::IN),
            PollFd::from_borrowed_fd(bell, PollFlags::IN),
        ];
        if ready(&mut fds, left)? == 0 {
            bail!("nothing came within {PATIENCE:?}");
        }
        if !fds[1].revents().is_empty() {
            return Err(interrupt::error());
        }
        let mut bytes = vec![0; 4096];
        let count = self.output.read(&mut bytes)?;
        if count == 0 {
            bail!("it ended ({})", self.child.wait()?);
        }
        bytes.truncate(count);
        Ok(bytes)
    }

    /// Proportional set size of the process that runs the machine (the last of its descendants: the
    /// others only started it) without the mappings that are guest memory (those of `guest` bytes and
    /// those of a memfd), bytes.
    pub fn pss_beyond(&self, guest: u64) -> anyhow::Result<u64> {
        let mut pid = self.child.id();
        while let Some(child) = last_child(pid)? {
            pid = child;
        }
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        Ok(pss_beyond(&smaps, guest))
    }
}

fn last_child(pid: u32) -> anyhow::Result<Option<u32>> {
    let mut found = None;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let children = fs::read_to_string(task?.path().join("children"))?;
        found = children
            .split_ascii_whitespace()
            .filter_map(|word| word.parse().ok())
            .next_back()
            .or(found);
    }
    Ok(found)
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(error) = self.drain() {
            eprintln!("bench: what was measured runs on: {error:#}");
        }
    }
}

/// How many of them are ready within this time. A signal is told by its own descriptor.
fn ready(fds: &mut [PollFd<'_>], within: Duration) -> anyhow::Result<usize> {
    let timeout = Timespec {
        tv_sec: within.as_secs() as i64,
        tv_nsec: 0,
    };
    loop {
        match poll(fds, Some(&timeout)) {
            Err(Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

fn pss_beyond(smaps: &str, guest: u64) -> u64 {
    let (mut total, mut counted) = (0, true);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match (
            words.next(),
            words.next().and_then(|word| word.parse::<u64>().ok()),
        ) {
            (Some("Size:"), Some(kib)) => counted &= kib * 1024 < guest,
            (Some("Pss:"), Some(kib)) if counted => total += kib * 1024,
            // The head of a mapping: `start-end perms offset dev inode path`.
            (Some(first), None) if first.contains('-') => counted = !line.contains("/memfd:"),
            _ => {}
        }
    }
    total
}

/// A program built beside this one (`fractus-agent`, `examples/boot`).
pub fn built(name: &str) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let path = here.parent().context("a program has a folder")?.join(name);
    if !path.exists() {
        bail!(
            "{} is missing: run scripts/bench, which builds it",
            path.display()
        );
    }
    Ok(path)
}

/// The probe image, as scripts/bench hands it over.
pub fn probe() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("FRACTUS_PROBE").context("FRACTUS_PROBE is not set")?;
    Ok(Path::new(&path).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out_and_the_rest_is_added_up() {
        let smaps = "\
55d0-55e0 r-xp 00000000 08:01 42 /usr/bin/vmm
Size:                 64 kB
Pss:                  40 kB
7f00-7f10 rw-p 00000000 00:00 0
Size:             262144 kB
Pss:               99999 kB
7f10-7f20 rw-s 00000000 00:01 9 /memfd:guest (deleted)
Size:                128 kB
Pss:                 128 kB
7ffc-7ffd rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Pss:                  12 kB
";
        assert_eq!(pss_beyond(smaps, 256 << 20), 52 << 10);
    }
}
