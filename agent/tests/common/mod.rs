//! A cloud for one agent: an authority, a controller that takes what agents say and gives out images,
//! and the real program `fractus-agent` in a process of its own.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod controller;
pub mod machine;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use fractus_agent_api::client::agent::AgentClient;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{
    Boot, Generation, ImageFormat, ImageRef, MachineReport, MachineSpec, Observed, Pages, Power,
    PutMachine, Revision, RootDisk, ServerId, Wanted,
};
use uuid::Uuid;

pub use controller::Cloud;

pub type Result<T = ()> = anyhow::Result<T>;

/// How long anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the future on a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(future)
}

/// The address of the loopback that no other test's process has: a pid has 22 bits.
pub fn own_ip() -> IpAddr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 + high, middle, low).into()
}

/// What no other agent of any test has: an address, whose port no outgoing connection is given, and users
/// from the number on.
fn own_place() -> (SocketAddr, u32) {
    static AGENTS: AtomicU16 = AtomicU16::new(0);
    let number = AGENTS.fetch_add(1, Ordering::Relaxed);
    assert!(
        number < 10,
        "a test a process, as cargo nextest runs them: the next one's users begin there"
    );
    // Below them are those of the clouds of crate fractus-tests.
    let own = 1_200_000_000 + std::process::id() % 100_000 * 10_000;
    let first_user = own + u32::from(number) * 1000;
    ((own_ip(), 27_100 + number).into(), first_user)
}

/// The agent's program with folders of its own. Dropping it ends the agent and every machine of it,
/// and fails when anything stayed behind.
pub struct Agent {
    pub folder: tempfile::TempDir,
    pub address: SocketAddr,
    pub host: HostId,
    pub client: AgentClient,
    /// Its program; another one counts from its next start on.
    pub binary: PathBuf,
    child: Option<Child>,
    stand_ins: bool,
    first_user: u32,
    /// Options for its program, from its next start on.
    pub options: Vec<String>,
    /// What is done, by the shell that then becomes the agent, before it does.
    prelude: String,
    /// All that it keeps is on a file system of its own.
    small: bool,
    /// Its host has booted as often since.
    boots: u32,
}

impl Agent {
    /// Joins the cloud and runs.
    pub async fn start(cloud: &Cloud, stand_ins: bool) -> Result<Self> {
        Self::start_after("", cloud, stand_ins).await
    }

    /// The same, in what the shell commands of `prelude` have made.
    pub async fn start_after(prelude: &str, cloud: &Cloud, stand_ins: bool) -> Result<Self> {
        Self::begin(tempfile::tempdir()?, false, prelude, cloud, stand_ins).await
    }

    /// With a state folder that has no room for more than `size` (as mount(8) has it).
    pub async fn start_on_a_small_disk(size: &str, cloud: &Cloud) -> Result<Self> {
        Self::start_on_a_small_disk_with(size, cloud, true).await
    }

    pub async fn start_on_a_small_disk_with(
        size: &str,
        cloud: &Cloud,
        stand_ins: bool,
    ) -> Result<Self> {
        use rustix::mount::{MountFlags, mount};
        let folder = tempfile::tempdir()?;
        let state = folder.path().join("state");
        std::fs::create_dir(&state)?;
        let size = std::ffi::CString::new(format!("size={size},mode=700"))?;
        mount(c"test", &state, c"tmpfs", MountFlags::empty(), &*size)?;
        Self::begin(folder, true, "", cloud, stand_ins).await
    }

    async fn begin(
        folder: tempfile::TempDir,
        small: bool,
        prelude: &str,
        cloud: &Cloud,
        stand_ins: bool,
    ) -> Result<Self> {
        let (address, first_user) = own_place();
        let endpoint = format!("https://{address}");
        let joined = Command::new(env!("CARGO_BIN_EXE_fractus-agent"))
            .args([
                "join",
                "--controller",
                &cloud.endpoint,
                "--token",
                &cloud.token(),
            ])
            .args(["--endpoint", &endpoint, "--state-dir"])
            .arg(folder.path().join("state"))
            .output()?;
        let said = String::from_utf8_lossy(&joined.stdout).trim().to_owned();
        let error = String::from_utf8_lossy(&joined.stderr).into_owned();
        anyhow::ensure!(joined.status.success(), "join: {error}");
        let host = HostId(Uuid::try_parse(&said)?);
        let client = AgentClient::new(host, &endpoint, &cloud.credentials)?;
        let mut agent = Self {
            folder,
            address,
            host,
            client,
            binary: env!("CARGO_BIN_EXE_fractus-agent").into(),
            child: None,
            stand_ins,
            first_user,
            options: Vec::new(),
            prelude: prelude.to_owned(),
            small,
            boots: 0,
        };
        agent.run().await?;
        Ok(agent)
    }

    /// Starts the program and waits until it answers.
    pub async fn run(&mut self) -> Result {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))?;
        // As under systemd: the soft limit of descriptors is one for programs that use `select`.
        let mut command = Command::new(if self.boots == 0 { "sh" } else { "unshare" });
        let mut booted = String::new();
        if self.boots > 0 {
            let boot = self.boot_id();
            let path = self.folder.path().join("boot");
            std::fs::write(&path, format!("{}\n", boot.hyphenated()))?;
            command.args(["--mount", "sh"]);
            let path = path.display();
            booted = format!("mount --bind {path} /proc/sys/kernel/random/boot_id &&");
        }
        command
            .arg("-c")
            .arg(format!(
                "ulimit -Sn 1024 && {booted} {} exec \"$0\" \"$@\"",
                self.prelude
            ))
            .arg(&self.binary)
            .args([
                "run",
                "--listen",
                &self.address.to_string(),
                "--users",
                "1000",
            ])
            .args(["--first-user", &self.first_user.to_string()])
            .args(["--shutdown-seconds", "3"])
            .arg("--state-dir")
            .arg(self.folder.path().join("state"))
            .arg("--runtime-dir")
            .arg(self.folder.path().join("run"))
            .args(&self.options)
            .env("FRACTUS_LEAVE_HOST_SETTINGS", "true")
            .env(
                "FRACTUS_LOG",
                "debug,h2=info,hyper_util=info,rustls=info,reqwest=info",
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        if self.stand_ins {
            command.arg("--stand-ins");
        }
        self.child = Some(command.spawn()?);
        let by = Instant::now() + PATIENCE;
        while let Err(error) = self.client.host().await {
            anyhow::ensure!(
                Instant::now() < by,
                "the agent does not answer: {error}\n{}",
                self.log()
            );
            let ended = self.child.as_mut().map(Child::try_wait).transpose()?;
            anyhow::ensure!(
                ended.flatten().is_none(),
                "the agent has ended: {error}\n{}",
                self.log()
            );
            // sleeps because a program that is starting cannot say when it listens.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// `kill -9` of the agent alone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Of the agent itself.
    pub fn pid(&self) -> Option<u32> {
        Some(self.child.as_ref()?.id())
    }

    /// Until its log says so.
    pub async fn logs(&self, text: &str) -> Result {
        let by = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            anyhow::ensure!(
                Instant::now() < by,
                "{text:?} is not in its log\n{}",
                self.log()
            );
            // sleeps because a file is read as often as it takes; a deadline ends it.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Installs a newer program, which is another file with the same content.
    pub fn install(&mut self) -> Result {
        let new = self.folder.path().join(format!("agent-{}", Uuid::new_v4()));
        std::fs::copy(&self.binary, &new)?;
        self.binary = new;
        Ok(())
    }

    /// `fractus-agent upgrade-machines`, of the installed program.
    pub fn upgrades_machines(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("upgrade-machines")
            .args(arguments)
            .arg("--state-dir")
            .arg(self.folder.path().join("state"))
            .arg("--runtime-dir")
            .arg(self.folder.path().join("run"));
        command
    }

    /// Of its host, once that has rebooted.
    pub fn boot_id(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.boots))
    }

    /// Its host loses its power, and gets it back: nothing runs any more but the agent, in another boot.
    pub async fn reboot(&mut self) -> Result {
        self.end();
        self.boots += 1;
        self.run().await
    }

    pub async fn restart(&mut self) -> Result {
        self.kill();
        self.run().await
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn machine_folder(&self, id: ServerId) -> PathBuf {
        self.folder
            .path()
            .join("state/machines")
            .join(id.to_string())
    }

    /// Of the machine's process, from /proc: all that carry its id.
    pub fn processes(&self, id: ServerId) -> Vec<i32> {
        processes_with(&id.to_string())
    }

    pub async fn put(&self, id: ServerId, put: &PutMachine) -> Result<MachineReport> {
        Ok(self.client.put(id, put).await?)
    }

    /// Until the machine is settled at this revision, and as asked.
    pub async fn settled(
        &self,
        id: ServerId,
        revision: u64,
        is: impl Fn(&MachineReport) -> bool,
    ) -> Result<MachineReport> {
        let what = |report: &MachineReport| {
            report.settled && report.revision == Revision(revision) && is(report)
        };
        self.until(id, what).await
    }

    pub async fn until(
        &self,
        id: ServerId,
        is: impl Fn(&MachineReport) -> bool,
    ) -> Result<MachineReport> {
        let by = Instant::now() + PATIENCE;
        loop {
            let report = self.client.get(id).await?;
            if is(&report) {
                return Ok(report);
            }
            if Instant::now() > by {
                anyhow::bail!("it stays {report:?}\n{}\n{}", self.log(), self.vm_log(id));
            }
            // sleeps because the agent's interface is asked and does not call; a deadline ends it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Until no process of the machine is left: one that could not go on says so before it ends.
    pub async fn ended(&self, id: ServerId) -> Result {
        let by = Instant::now() + PATIENCE;
        while !self.processes(id).is_empty() {
            anyhow::ensure!(Instant::now() < by, "it has not ended\n{}", self.vm_log(id));
            // sleeps because nobody tells of the end of another's child; a deadline ends it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Until the serial log holds `text`.
    pub async fn console_says(&self, id: ServerId, text: &str) -> Result<String> {
        let by = Instant::now() + PATIENCE;
        loop {
            let log = self.client.console_log(id, None).await?;
            let log = String::from_utf8_lossy(&log).into_owned();
            if log.contains(text) {
                return Ok(log);
            }
            anyhow::ensure!(
                Instant::now() < by,
                "{text:?} is not in {log:?}\n{}",
                self.log()
            );
            // sleeps because the agent's interface is asked and does not call; a deadline ends it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn vm_log(&self, id: ServerId) -> String {
        let log = std::fs::read(self.machine_folder(id).join("vm.ring")).unwrap_or_default();
        String::from_utf8_lossy(log.get(16..).unwrap_or_default())
            .trim_end_matches('\0')
            .to_owned()
    }

    /// All that an ended machine could have left: processes, files, sockets, control groups.
    pub fn leftovers(&self, id: ServerId) -> Vec<String> {
        let mut left: Vec<String> = self
            .processes(id)
            .iter()
            .map(|pid| format!("process {pid}"))
            .collect();
        if let Ok(entries) = std::fs::read_dir(self.machine_folder(id)) {
            left.extend(
                entries
                    .flatten()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .filter(|name| name != "record.json"),
            );
        }
        if self
            .folder
            .path()
            .join(format!("run/machines/{id}.sock"))
            .exists()
        {
            left.push("socket".to_owned());
        }
        left.extend(
            groups()
                .into_iter()
                .filter(|path| path.contains(&id.to_string())),
        );
        left
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
        if self.small {
            use rustix::mount::{UnmountFlags, unmount};
            let unmounted = unmount(self.folder.path().join("state"), UnmountFlags::DETACH);
            assert!(
                unmounted.is_ok() || std::thread::panicking(),
                "{unmounted:?}"
            );
        }
    }
}

impl Agent {
    /// It and every machine of it.
    fn end(&mut self) {
        self.kill();
        let mark = std::fs::read_to_string(self.folder.path().join("state/lock"));
        let mark = mark.unwrap_or_default();
        if mark.len() < 36 {
            return;
        }
        for pid in processes_with(mark.trim()) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let name = format!("fractus-{}", mark.trim().replace('-', ""));
        let by = Instant::now() + PATIENCE;
        loop {
            let mut left = groups();
            left.retain(|path| path.contains(&name));
            for group in left.iter().rev() {
                // Busy until the kernel has let go of the last process.
                let _ = std::fs::remove_dir(group);
            }
            let running = processes_with(mark.trim());
            if left.is_empty() && running.is_empty() {
                return;
            }
            if Instant::now() > by {
                assert!(std::thread::panicking(), "left: {running:?} {left:?}");
                return;
            }
            // sleeps because processes of others end without telling us; a deadline ends it.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A cloud, its one agent, and an image in it that machines boot.
pub async fn start(kernel: &[u8], stand_ins: bool) -> Result<(Cloud, Agent, ImageRef)> {
    let cloud = Cloud::start().await;
    let agent = Agent::start(&cloud, stand_ins).await?;
    let image = image_of(kernel);
    cloud.add_image(&image, kernel);
    Ok((cloud, agent, image))
}

/// The same for tests of all that surrounds a guest.
pub async fn with_stand_ins() -> Result<(Cloud, Agent, ImageRef)> {
    start(b"kernel", true).await
}

/// A new machine, put at revision 1, once it runs.
pub async fn running(agent: &Agent, kernel: &ImageRef) -> Result<ServerId> {
    let id = new_id();
    agent
        .put(id, &put(1, wanted(kernel, Power::Running)))
        .await?;
    agent.settled(id, 1, is_running).await?;
    Ok(id)
}

/// Pids of `fractus-agent vm` processes with this argument.
pub fn processes_with(argument: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut arguments = line.split(|byte| *byte == 0).skip(1);
        arguments.next() == Some(b"vm") && arguments.any(|is| is == argument.as_bytes())
    })
    .collect()
}

/// Control groups of agents, outer ones first.
fn groups() -> Vec<String> {
    let mut found = Vec::new();
    let mut stack = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = stack.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                stack.push(entry.path());
            }
        }
        let path = folder.to_string_lossy();
        if path.contains("/fractus-") {
            found.push(path.into_owned());
        }
    }
    found.sort();
    found
}

pub fn new_id() -> ServerId {
    ServerId(Uuid::new_v4())
}

/// A machine of 1 vCPU and a disk of 1 MiB, that boots `kernel`.
pub fn wanted(kernel: &ImageRef, power: Power) -> Wanted {
    Wanted {
        power,
        soft_reboots: 0,
        hard_reboots: 0,
        rebuilds: 0,
        arrives: None,
        departs: None,
        continues: None,
        copy: None,
        copies: 0,
        restores: None,
        parks: None,
        spec: MachineSpec {
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 64,
            max_memory_mib: None,
            pages: Pages::Small,
            numa_nodes: vec![],
            cpus: vec![],
            cpu_profile: "host".into(),
            cpu: None,
            boot: Boot {
                kernel: Some(kernel.clone()),
                initrd: None,
                command_line: "tick_ms=100".into(),
            },
            root_disk: Some(RootDisk {
                image: None,
                size: 1 << 20,
            }),
            disks: vec![],
            nics: vec![],
            guest: Default::default(),
        },
    }
}

pub fn put(revision: u64, wanted: Wanted) -> PutMachine {
    PutMachine {
        version: wanted.version(),
        generation: Generation(1),
        revision: Revision(revision),
        wanted,
        request_id: Some(format!("req-{revision}")),
        boot_id: None,
    }
}

pub fn is_absent(report: &MachineReport) -> bool {
    report.observed == Observed::Absent
}

pub fn is_running(report: &MachineReport) -> bool {
    report.observed == Observed::Running
}

/// Any bytes as an image.
pub fn image_of(bytes: &[u8]) -> ImageRef {
    ImageRef {
        id: Uuid::new_v4(),
        size: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_hex().to_string(),
        format: ImageFormat::Raw,
    }
}

/// The probe, built on first use; `None` where there is no KVM.
pub fn probe() -> Option<Vec<u8>> {
    if !Path::new("/dev/kvm").exists() {
        return None;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/probe/build.sh");
    let built = Command::new(script)
        .stderr(Stdio::inherit())
        .output()
        .ok()?;
    assert!(built.status.success(), "the probe does not build");
    std::fs::read(String::from_utf8_lossy(&built.stdout).trim()).ok()
}

/// Boot nonces in the serial log, in order. A line may be read while it is written: only whole ones count.
pub fn nonces(log: &str) -> Vec<String> {
    let lines = log.split_inclusive('\n');
    let whole = lines.filter_map(|line| line.strip_suffix('\n'));
    let boots = whole.filter(|line| line.starts_with("boot nonce="));
    boots
        .filter_map(|line| line.split(['=', ' ']).nth(2).map(str::to_owned))
        .collect()
}

pub async fn boots(agent: &Agent, id: ServerId, count: usize) -> Result<Vec<String>> {
    let by = Instant::now() + PATIENCE;
    loop {
        let found = nonces(&agent.console_says(id, "boot nonce=").await?);
        if found.len() >= count {
            return Ok(found);
        }
        anyhow::ensure!(Instant::now() < by, "{found:?}\n{}", agent.vm_log(id));
        // sleeps because a console's log is read as often as it takes; a deadline ends it.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Until the guest has ticked since it booted last: it listens then.
pub async fn ticks(agent: &Agent, id: ServerId) -> Result {
    let by = Instant::now() + PATIENCE;
    loop {
        let log = agent.console_says(id, "boot nonce=").await?;
        let since = log.rsplit("boot nonce=").next().unwrap_or_default();
        if since.contains("tick 1 ") {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < by, "{since}\n{}", agent.vm_log(id));
        // sleeps because a console's log is read as often as it takes; a deadline ends it.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
