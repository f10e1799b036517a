//! One host of the lab, from the outside.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::debian::variant;
use crate::image::{HostImage, Kind};
use crate::monitor::Monitor;
use crate::qemu::{self, Files};
use crate::saved;
use crate::segment::{self, Ports};
use crate::shell::{self, Output};
use crate::wire::Lines;

/// Longest wait for a boot or for a host to take its identity, on a machine that does much else.
const BOOTS: Duration = Duration::from_secs(120);
/// Longest wait for a command, unless the caller says otherwise.
const RUNS: Duration = Duration::from_secs(60);
/// Bytes of a host's own disk; a sparse file.
const STATE_BYTES: u64 = 16 << 30;
const AGENT_PORT: u16 = 9443;

/// How a host comes up.
#[derive(Debug, Clone)]
pub enum Start {
    /// As any machine, in some seconds.
    Boot,
    /// From this file ([`crate::Lab`] knows it), in about one.
    Restore(PathBuf),
}

/// A QEMU that runs a host; killed when dropped.
#[derive(Debug)]
pub struct Running {
    qemu: Child,
    pub monitor: Monitor,
    identity: Lines,
    log: PathBuf,
}

impl Running {
    /// `restore`: from that file, with its processors standing still.
    pub fn start(
        image: &HostImage,
        files: &Files,
        ports: &Ports,
        restore: Option<&Path>,
    ) -> Result<Self> {
        let mut qemu = qemu::start(image, files, ports, restore.is_some())?;
        let connected = (|| {
            let alive = || matches!(qemu.try_wait(), Ok(None));
            let mut monitor = Monitor::connect(&files.monitor(), alive)?;
            // Before the guest runs: a serial line drops what nobody listens to.
            let identity = Lines::connect(&files.identity(), BOOTS, || true)?;
            if let Some(from) = restore {
                saved::restore(&mut monitor, from)?;
            }
            Ok((monitor, identity))
        })();
        match connected {
            Ok((monitor, identity)) => Ok(Self {
                qemu,
                monitor,
                identity,
                log: files.qemu_log(),
            }),
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                let error: anyhow::Error = error;
                let log = std::fs::read_to_string(files.qemu_log()).unwrap_or_default();
                Err(error.context(format!("QEMU said: {log}")))
            }
        }
    }

    /// Waits until a booting host asks for its identity.
    pub fn until_ready(&mut self, limit: Duration) -> Result<()> {
        let ready = |line: &str| (line == "ready").then_some(());
        self.identity.until("ready", limit, ready)
    }

    /// Waits until the host has powered off or reset itself.
    fn until_ended(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !self.monitor.has_shut_down()? {
            if Instant::now() >= end {
                bail!("it still runs after {limit:?}");
            }
            // sleeps because the monitor's event may have come before
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Of the emulator, when its machine does not answer: whether it lives, what it said, where its processor
    /// stands twice, a second apart, and where its threads do.
    fn emulator(&mut self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut text = match self.qemu.try_wait() {
            Ok(None) => format!("QEMU lives; its log:\n{log}\n"),
            ended => return format!("QEMU has ended: {ended:?}; its log:\n{log}"),
        };
        for command in ["info status", "info registers", "info lapic", "info pic"] {
            let said = self.monitor.ask(command);
            text += &format!("{command}: {}\n", said.unwrap_or_else(|e| format!("{e:#}")));
        }
        text += &format!("events: {:?}\n", self.monitor.events());
        for _ in 0..2 {
            text += &threads(self.qemu.id());
            // sleeps because two looks with time between tell what moves
            std::thread::sleep(Duration::from_secs(1));
        }
        let registers = self.monitor.ask("info registers");
        text + &registers.unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Tells it which host it is, and waits until it is that.
    fn become_host(&mut self, number: u8, name: &str) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let rest = 1_000_000 - now.subsec_micros();
        let line = format!(
            "{} {rest} {name} {} {} {}",
            now.as_secs(),
            segment::ethernet_address(number, 1),
            segment::ethernet_address(number, 2),
            segment::address(number),
        );
        self.identity.say(&line)?;
        let up = |line: &str| (line == "up").then_some(());
        self.identity
            .until("up", BOOTS, up)
            .with_context(|| format!("QEMU's log: {}", self.log.display()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A host: its disk and its place in the segment stay while it is off.
#[derive(Debug)]
pub struct Host {
    pub name: String,
    number: u8,
    image: HostImage,
    files: Files,
    ports: Ports,
    running: Option<Running>,
}

impl Host {
    /// A host that is off. `number` from 1; `folder` is its own.
    pub fn new(
        image: &HostImage,
        segment: &segment::Segment,
        number: u8,
        folder: &Path,
        payload: &Path,
        kind: Kind,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let state = folder.join("state");
        match kind {
            _ if state.exists() => {}
            Kind::Busybox => format_disk(&state)?,
            Kind::Systemd => copy_root(&state)?,
        }
        // The cache may forget it while this host is to be started again.
        let own = folder.join("payload");
        let _ = std::fs::remove_file(&own);
        if std::fs::hard_link(payload, &own).is_err() {
            std::fs::copy(payload, &own)?;
        }
        Ok(Self {
            name: format!("host{number}"),
            number,
            image: image.clone(),
            files: Files {
                folder: folder.to_path_buf(),
                payload: own,
                state,
            },
            ports: segment.ports(number)?,
            running: None,
        })
    }

    /// Powers it on; returns when it takes commands.
    pub fn start(&mut self, how: &Start) -> Result<()> {
        self.running = None;
        let restore = match how {
            Start::Boot => None,
            Start::Restore(file) => Some(file.as_path()),
        };
        let mut running = Running::start(&self.image, &self.files, &self.ports, restore)?;
        if restore.is_some() {
            running.monitor.execute("cont", json!({}))?;
        } else {
            running.until_ready(BOOTS)?;
        }
        running
            .become_host(self.number, &self.name)
            .with_context(|| self.serial_log())?;
        self.running = Some(running);
        Ok(())
    }

    /// Has it reboot in an orderly way, and waits until it takes commands again.
    pub fn reboot(&mut self) -> Result<()> {
        // It may be gone before it has answered.
        let _ = self.run("reboot");
        let running = self.running.as_mut();
        let running = running.with_context(|| format!("{} is off", self.name))?;
        running.until_ended(BOOTS)?;
        self.start(&Start::Boot)
    }

    /// Pulls its plug. What it had not synced is lost, as far as its own kernel is concerned.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Pulls its plug and boots it; its disk is as it was left.
    pub fn restart(&mut self) -> Result<()> {
        self.start(&Start::Boot)
    }

    pub fn is_running(&mut self) -> bool {
        let running = self.running.as_mut();
        running.is_some_and(|running| matches!(running.monitor.has_shut_down(), Ok(false)))
    }

    /// Stops its processors, as a hypervisor below it would; nothing of it answers.
    pub fn freeze(&mut self) -> Result<()> {
        self.monitor()?.execute("stop", json!({})).map(drop)
    }

    pub fn thaw(&mut self) -> Result<()> {
        self.monitor()?.execute("cont", json!({})).map(drop)
    }

    fn monitor(&mut self) -> Result<&mut Monitor> {
        let name = &self.name;
        let running = self.running.as_mut();
        Ok(&mut running.with_context(|| format!("{name} is off"))?.monitor)
    }

    pub fn cut_network(&self) -> Result<()> {
        self.ports.cut()
    }

    pub fn mend_network(&self) -> Result<()> {
        self.ports.mend()
    }

    pub fn address(&self) -> String {
        segment::address(self.number)
    }

    /// Where controllers reach its agent.
    pub fn endpoint(&self) -> String {
        format!("https://{}:{AGENT_PORT}", self.address())
    }

    /// Runs a script by its shell.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.run_within(script, RUNS)
    }

    pub fn run_within(&self, script: &str, limit: Duration) -> Result<Output> {
        let at: SocketAddr = format!("{}:80", self.address()).parse()?;
        shell::run(at, script, limit).map_err(|error| match self.broken() {
            Some(line) => error.context(format!(
                "{}: its own kernel broke ({line}): look at the emulator first",
                self.name
            )),
            None => error,
        })
    }

    /// What its own kernel said as it broke, if it did. No machine and no agent can bring that about: it is
    /// the emulator's fault, and nothing that a test sees afterwards says anything of what is under test.
    pub fn broken(&self) -> Option<String> {
        broken(&self.serial_log())
    }

    /// Runs a script that must succeed; gives what it said.
    pub fn done(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        if output.status != 0 {
            bail!(
                "{}: {script}: exit {}\n{}",
                self.name,
                output.status,
                output.text
            );
        }
        Ok(output.text)
    }

    /// Puts a file there; its parent folder is there already.
    pub fn put(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let at: SocketAddr = format!("{}:80", self.address()).parse()?;
        let output = shell::post(at, &format!("put?{path}"), bytes, RUNS)?;
        if output.status != 0 {
            bail!("{}: putting {path}: {}", self.name, output.text);
        }
        self.done(&format!("chmod {mode:o} {path}")).map(drop)
    }

    /// Starts the agent; it joins by the token if this host has not joined before.
    pub fn start_agent(&self, controller: &str, token: &str) -> Result<()> {
        let endpoint = self.endpoint();
        self.done(&format!("/lab/agent {controller} {token} {endpoint}"))?;
        Ok(())
    }

    /// `kill -9` of the agent; its machines go on.
    pub fn kill_agent(&self) -> Result<()> {
        self.done("kill -9 $(cat /run/agent.pid)").map(drop)
    }

    pub fn agent_log(&self) -> Result<String> {
        self.done(
            "cat /var/lib/fractus-agent/agent.log 2>/dev/null ||
             journalctl --no-pager --output cat --unit fractus-agent",
        )
    }

    /// What its KVM counted of the machines that run now: exits by kind, as `NAME COUNT` lines.
    pub fn exits(&self) -> Result<String> {
        self.done(
            "cd /sys/kernel/debug/kvm 2>/dev/null || { mount -t debugfs debugfs /sys/kernel/debug; \
             cd /sys/kernel/debug/kvm; }
             for file in *exits insn_emulation hypercalls; do echo $file $(cat $file); done",
        )
    }

    /// From now on its kernel keeps what its machines last did (the tracepoints of KVM).
    pub fn trace(&self) -> Result<()> {
        self.done(
            "cd /sys/kernel/tracing && { [ -e events ] || mount -t tracefs tracefs .; }
             cd /sys/kernel/tracing && echo 512 >buffer_size_kb
             for event in kvm_exit kvm_inj_exception kvm_inj_virq kvm_page_fault kvm_cr; do
               echo 1 >events/kvm/$event/enable
             done",
        )
        .map(drop)
    }

    /// The last of it.
    pub fn traced(&self) -> Result<String> {
        self.done("tail -n 120 /sys/kernel/tracing/trace")
    }

    /// What its emulator says of it: for a host that does not answer. Takes two seconds.
    pub fn emulator(&mut self) -> String {
        self.running
            .as_mut()
            .map_or_else(|| "off".to_owned(), Running::emulator)
    }

    /// All that it ever wrote to its serial line.
    pub fn serial_log(&self) -> String {
        let bytes = std::fs::read(self.files.serial_log()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The socket of its serial line.
    pub fn console(&self) -> PathBuf {
        self.files.console()
    }
}

/// A test that fails says what its hosts and their machines did then: a guest that hung has told nobody why.
impl Drop for Host {
    fn drop(&mut self) {
        if !std::thread::panicking() || self.running.is_none() {
            return;
        }
        let said = self.trace().and_then(|()| self.run(LAST_LOOK));
        match said {
            Ok(output) => println!("--- {} at the end\n{}", self.name, output.text),
            Err(error) => {
                let emulator = self.emulator();
                println!("--- {} does not answer: {error:#}", self.name);
                println!("{}\n{emulator}", self.serial_log());
            }
        }
    }
}

/// Of each thread of a process its name, state, processor time (ticks) and where in the kernel it waits.
fn threads(process: u32) -> String {
    let mut text = String::new();
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let fields: Vec<&str> = stat
            .rsplit(") ")
            .next()
            .unwrap_or_default()
            .split(' ')
            .collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or_default();
        let (name, stack) = (read("comm"), read("stack"));
        text += &format!(
            "{} {} {} {}\n{stack}",
            name.trim(),
            field(0),
            field(11),
            field(12)
        );
    }
    text
}

/// What the host is short of and complains of; of each thread of a machine its state, what it has used of the
/// processor and where in the kernel it waits; what KVM did in the last two seconds, and the agent's log.
const LAST_LOOK: &str = "sleep 2
uptime; free -m; dmesg | tail -n 20
for pid in $( (ps -eo pid,args 2>/dev/null || ps -o pid,args) | awk '/[f]ractus-agent vm/ { print $1 }'); do
  for task in /proc/$pid/task/*; do
    echo \"$task $(cut -d' ' -f2,3,14,15 $task/stat)\"; cat $task/stack
  done
done 2>&1
grep -v '^#' /sys/kernel/tracing/trace | tail -n 300
tail -n 60 /var/lib/fractus-agent/agent.log 2>/dev/null ||
  journalctl --no-pager --output cat --unit fractus-agent --lines 60";

/// The first line by which a kernel says that it broke.
fn broken(log: &str) -> Option<String> {
    const MARKS: [&str; 4] = [
        "BUG: ",
        "Kernel panic",
        "Oops: ",
        "general protection fault",
    ];
    let is_mark = |line: &&str| MARKS.iter().any(|mark| line.contains(mark));
    log.lines().find(is_mark).map(|line| line.trim().to_owned())
}

/// The disk of a host with systemd.
fn copy_root(path: &Path) -> Result<()> {
    let root = variant("host")?.join("root.ext4");
    let status = Command::new("cp")
        .arg("--sparse=always")
        .args([&root, path])
        .status()?;
    if !status.success() {
        bail!("copying {}: {status}", root.display());
    }
    Ok(())
}

fn format_disk(path: &Path) -> Result<()> {
    std::fs::File::create_new(path)?.set_len(STATE_BYTES)?;
    let options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard";
    let status = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-E", options, "-m", "0"])
        .arg(path)
        .status()
        .context("running mkfs.ext4 (package e2fsprogs)")?;
    if !status.success() {
        bail!("mkfs.ext4 {}: {status}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_whose_kernel_broke_is_told_from_one_that_only_complains() {
        let complains = "[   19.3] kvm [162]: vcpu0, Unhandled WRMSR(0xc0010007) = 0xffff\n";
        assert_eq!(broken(complains), None);
        let stack = "[  539.8] BUG: TASK stack guard page was hit at 0000";
        let log = format!("{complains}{stack}\r\n[  557.2] Kernel panic - not syncing\n");
        assert_eq!(broken(&log).as_deref(), Some(stack));
    }
}
