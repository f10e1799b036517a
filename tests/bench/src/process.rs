//! Processes under measurement: started, watched on their standard output, ended.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::interrupt;

/// Nothing measured here takes nearly as long; beyond it something hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// But the firmware of a peer, and much I/O on a busy machine.
const LONG_PATIENCE: Duration = Duration::from_secs(180);

/// A child, and the machine that it may have put into a process of its own. Both are gone when it has
/// been dropped.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    began: Instant,
    /// Nothing is waited for longer.
    by: Instant,
}

impl Running {
    /// Starts `command` with its standard output in a pipe. The clock starts before the fork.
    pub fn start(command: &mut Command) -> anyhow::Result<Self> {
        Self::start_with(command, Stdio::null(), Stdio::null(), PATIENCE)
    }

    /// Starts a machine whose starter says on standard error when it starts it (`--stamp`).
    pub fn start_stamped(command: &mut Command) -> anyhow::Result<Self> {
        Self::start_with(command, Stdio::null(), Stdio::piped(), PATIENCE)
    }

    /// Starts a guest that [`Running::ask`] is to talk to.
    pub fn start_talking(command: &mut Command) -> anyhow::Result<Self> {
        Self::start_with(command, Stdio::piped(), Stdio::null(), LONG_PATIENCE)
    }

    /// Starts a process of ours with this as its standard input; what it says of itself is for who runs the bench.
    pub fn start_on(command: &mut Command, input: OwnedFd) -> anyhow::Result<Self> {
        Self::start_with(command, input.into(), Stdio::inherit(), LONG_PATIENCE)
    }

    fn start_with(
        command: &mut Command,
        input: Stdio,
        errors: Stdio,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        command.stdin(input).stdout(Stdio::piped()).stderr(errors);
        let began = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        let output = child.stdout.take().context("a pipe was asked for")?;
        Ok(Self {
            input: child.stdin.take(),
            child,
            output,
            began,
            by: began + patience,
        })
    }

    /// Has the probe carry out a command: its answer without the `ok`.
    pub fn ask(&mut self, command: &str) -> anyhow::Result<String> {
        let input = self.input.as_mut().context("it does not listen")?;
        writeln!(input, "{command}").context("say something to the guest")?;
        self.by = Instant::now() + LONG_PATIENCE;
        let mut text = String::new();
        loop {
            text.push_str(&String::from_utf8_lossy(&self.read_some()?));
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            for line in whole.lines() {
                if let Some(answer) = line.strip_prefix("ok ") {
                    return Ok(answer.trim_end().to_owned());
                }
                if line.starts_with("err ") {
                    bail!("{command}: the guest says: {line}");
                }
            }
        }
    }

    /// Time from the start to the first byte of output.
    pub fn first_byte(&mut self) -> anyhow::Result<Duration> {
        self.read_some()?;
        Ok(self.began.elapsed())
    }

    /// Time from the stamp of [`Running::start_stamped`] to the first byte of output.
    pub fn first_byte_since_stamp(&mut self) -> anyhow::Result<Duration> {
        self.read_some()?;
        let now = clock_gettime(ClockId::Monotonic);
        let errors = self.child.stderr.take().context("a pipe was asked for")?;
        let mut line = String::new();
        BufReader::new(errors).read_line(&mut line)?;
        let stamp: u64 = line
            .trim_end()
            .parse()
            .with_context(|| format!("no stamp: {line:?}"))?;
        let now = Duration::new(u64::try_from(now.tv_sec)?, u32::try_from(now.tv_nsec)?);
        Ok(now.saturating_sub(Duration::from_nanos(stamp)))
    }

    /// Reads until a line that begins with `prefix`.
    pub fn wait_for_line(&mut self, prefix: &str) -> anyhow::Result<()> {
        let mut text = String::new();
        while !text.lines().any(|line| line.starts_with(prefix)) {
            text.push_str(&String::from_utf8_lossy(&self.read_some()?));
        }
        Ok(())
    }

    /// Reads on, after what is in `text`, until `found` finds something in it.
    pub fn read_until<T>(
        &mut self,
        text: &mut String,
        found: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.by = Instant::now() + LONG_PATIENCE;
        loop {
            if let Some(found) = found(text) {
                return Ok(found);
            }
            text.push_str(&String::from_utf8_lossy(&self.read_some()?));
        }
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
        let left = self.by.saturating_duration_since(Instant::now());
        let bell = interrupt::bell().context("signals are not listened to")?;
        let mut fds = [
            PollFd::new(&self.output, PollFlags::IN),
            PollFd::from_borrowed_fd(bell, PollFlags::IN),
        ];
        if ready(&mut fds, left)? == 0 {
            bail!("nothing came within {:?}", self.began.elapsed());
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
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.machine()?))?;
        Ok(pss_beyond(&smaps, guest))
    }

    /// Of all memory of that process, guest and all, bytes: its proportional share of what it maps, and what no other
    /// process has.
    pub fn shares(&self) -> anyhow::Result<Shares> {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.machine()?))?;
        Ok(Shares::read(&rollup))
    }

    /// The process that runs the machine.
    fn machine(&self) -> anyhow::Result<u32> {
        let mut pid = self.child.id();
        while let Some(child) = last_child(pid)? {
            pid = child;
        }
        Ok(pid)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shares {
    pub proportional: u64,
    pub private: u64,
}

impl Shares {
    fn read(rollup: &str) -> Self {
        let mut found = Self::default();
        for line in rollup.lines() {
            let mut words = line.split_ascii_whitespace();
            let (name, kib) = (words.next(), words.next());
            let bytes = kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
            match name {
                Some("Pss:") => found.proportional += bytes,
                Some("Private_Clean:" | "Private_Dirty:") => found.private += bytes,
                _ => {}
            }
        }
        found
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
pub fn ready(fds: &mut [PollFd<'_>], within: Duration) -> anyhow::Result<usize> {
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
    fn shares_are_added_up() {
        let rollup = "\
55d0-7ffd ---p 00000000 00:00 0 [rollup]
Rss:                9000 kB
Pss:                  40 kB
Pss_Anon:              7 kB
Private_Clean:         4 kB
Private_Dirty:         8 kB
";
        let wanted = Shares {
            proportional: 40 << 10,
            private: 12 << 10,
        };
        assert_eq!(Shares::read(rollup), wanted);
    }

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
