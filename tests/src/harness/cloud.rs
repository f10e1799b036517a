//! A controller and its agents.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::client::Client;
use super::guardian::Guardian;
use super::machines::{self, MachineProcess};
use super::network::{HostNetwork, Segment};
use super::process::{Process, probe, program};
use super::wait::until;

/// Longest wait for a program to be ready, on a machine that does much else.
const READY: Duration = Duration::from_secs(60);

/// What cloud is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    pub agents: usize,
    /// `None`: SQLite in the state folder.
    pub database: Option<String>,
    /// The agents' program; `None`: the one that was built with this test.
    pub agent_program: Option<PathBuf>,
    /// Controller and agents know each other by [`Ways`] where nobody listens: the test does, and carries what they say.
    pub apart: bool,
    /// Each agent has a network of its own, as a host has: of a test that runs [`in_a_segment`](super::in_a_segment).
    pub networks: bool,
    /// What else the controller is told.
    pub serve: &'static [&'static str],
}

impl Default for Options {
    fn default() -> Self {
        Self {
            agents: 1,
            database: None,
            agent_program: None,
            apart: false,
            networks: false,
            serve: &[],
        }
    }
}

/// How one of a cloud's listeners is reached.
#[derive(Debug, Clone, Copy)]
pub struct Ways {
    /// Where it listens.
    pub listens: SocketAddr,
    /// Where others go to: the same, unless they are apart.
    pub known: SocketAddr,
}

/// A running cloud. Dropping it ends it, with everything that it made.
#[derive(Debug)]
pub struct Cloud {
    pub url: String,
    pub password: String,
    options: Options,
    folder: PathBuf,
    addresses: Addresses,
    controller: Option<Process>,
    agents: Vec<Agent>,
    /// To which agents' networks lead.
    segment: Option<Segment>,
    /// Ids of the users that machines run as, of all agents.
    users: Range<u32>,
    // Last: what is above is ended before it cleans up.
    _guardian: Guardian,
}

#[derive(Debug)]
struct Agent {
    name: String,
    ways: Ways,
    users: Range<u32>,
    process: Option<Process>,
    network: Option<HostNetwork>,
    /// A file with the id of its host's boot, if that is another than this machine's.
    boot: Option<PathBuf>,
}

/// Where a cloud listens: at an address of the loopback that no other test has, at ports that no outgoing
/// connection is given. A port that is free now, and chosen for that, is another's before it is bound.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    ip: Ipv4Addr,
    /// Where controller and agents are known to each other.
    known: Ipv4Addr,
    /// Of agents with networks of their own: the first one's.
    hosts: Option<Ipv4Addr>,
    first_port: u16,
}

/// The controller's in a test's own segment, for documentation (RFC 5737), and the first host's.
const SEGMENT: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 10)];

impl Addresses {
    /// For this process's one cloud.
    fn own(options: &Options) -> Result<Self> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        if TAKEN.swap(true, Ordering::Relaxed) {
            bail!(
                "one cloud a process, whose addresses and users they are: cargo nextest runs tests so"
            );
        }
        if options.networks {
            let [ip, hosts] = SEGMENT;
            return Ok(Self {
                ip,
                known: ip,
                hosts: Some(hosts),
                first_port: 27_100,
            });
        }
        // A pid has 22 bits, and is nobody else's while we live.
        let [_, high, middle, low] = std::process::id().to_be_bytes();
        let ip = Ipv4Addr::new(127, 64 + high, middle, low);
        Ok(Self {
            ip,
            known: match options.apart {
                true => Ipv4Addr::new(127, 128 + high, middle, low),
                false => ip,
            },
            hosts: None,
            first_port: 27_100,
        })
    }

    /// Without TLS, and so on the loopback only.
    fn public(&self) -> SocketAddr {
        let ip = match self.hosts {
            Some(_) => Ipv4Addr::LOCALHOST,
            None => self.ip,
        };
        (ip, self.first_port).into()
    }

    fn ways(&self, port: u16) -> Ways {
        Ways {
            listens: (self.ip, port).into(),
            known: (self.known, port).into(),
        }
    }

    fn agents(&self) -> Ways {
        self.ways(self.first_port + 1)
    }

    fn metrics(&self) -> SocketAddr {
        (self.ip, self.first_port + 2).into()
    }

    fn agent(&self, index: usize) -> Result<Ways> {
        let port = self.first_port + 10 + u16::try_from(index)?;
        let ways = self.ways(port);
        Ok(match self.host(index)? {
            None => ways,
            Some(ip) => Ways {
                listens: (ip, port).into(),
                known: (ip, port).into(),
            },
        })
    }

    /// Of an agent that has a network of its own.
    fn host(&self, index: usize) -> Result<Option<Ipv4Addr>> {
        let index = u32::try_from(index)?;
        let of = |first: Ipv4Addr| Ipv4Addr::from_bits(first.to_bits() + index);
        Ok(self.hosts.map(of))
    }
}

/// User ids for one agent's machines.
const USERS_EACH: u32 = 1000;

impl Cloud {
    /// Starts everything and waits until every agent has been heard.
    pub async fn start(options: Options) -> Result<Self> {
        let mut cloud = Self::without_agents(options).await?;
        cloud.start_agents().await?;
        Ok(cloud)
    }

    /// Starts the controller alone.
    pub async fn without_agents(options: Options) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("fractus-test-")
            .tempdir()?
            .keep();
        let count = u32::try_from(options.agents)?;
        // Tests run beside each other, and a pid is nobody else's while we live.
        let first = 100_000_000 + std::process::id() % 100_000 * 10_000;
        let users = first..first + count.max(1) * USERS_EACH;
        let guardian = Guardian::start(&users, &folder)?;
        let addresses = Addresses::own(&options)?;
        let segment = options
            .networks
            .then(|| Segment::lay(&addresses.ip.to_string()));
        let segment = segment.transpose()?;
        let mut cloud = Self {
            url: format!("http://{}", addresses.public()),
            password: String::new(),
            options,
            folder,
            addresses,
            controller: None,
            agents: Vec::new(),
            segment,
            users,
            _guardian: guardian,
        };
        cloud.start_controller().await?;
        Ok(cloud)
    }

    /// Has the agents join that are wanted, and waits until each has been heard.
    pub async fn start_agents(&mut self) -> Result<()> {
        for index in self.agents.len()..self.options.agents {
            self.join(index).await?;
            self.start_agent(index)?;
        }
        self.until_hosts_up().await
    }

    /// Starts `fractus serve`, also again after it was killed.
    pub async fn start_controller(&mut self) -> Result<()> {
        let state = self.folder.join("controller");
        let mut arguments = vec![
            "serve".to_owned(),
            "--plain-http".to_owned(),
            "--state-dir".to_owned(),
            state.display().to_string(),
            "--listen".to_owned(),
            self.addresses.public().to_string(),
            "--agents-listen".to_owned(),
            self.addresses.agents().listens.to_string(),
            "--agents-url".to_owned(),
            format!("https://{}", self.addresses.agents().known),
            "--metrics-listen".to_owned(),
            self.addresses.metrics().to_string(),
        ];
        if let Some(url) = &self.options.database {
            arguments.extend(["--database".to_owned(), url.clone()]);
        }
        arguments.extend(self.options.serve.iter().map(ToString::to_string));
        let log = self.folder.join("controller.log");
        let process = Process::start("controller", &program("fractus")?, &arguments, &[], &log)?;
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .build()?;
        let url = format!("{}/identity/v3", self.url);
        let process = std::sync::Mutex::new(process);
        let ready = until("the controller answers", READY, || async {
            if let Some(status) = lock(&process).ended() {
                return Err(format!("ended: {status}"));
            }
            client
                .get(&url)
                .send()
                .await
                .map(drop)
                .map_err(|error| error.to_string())
        });
        if let Err(error) = ready.await {
            bail!("{error}\n{}", lock(&process).tail());
        }
        self.controller = process.into_inner().ok();
        self.password = fs::read_to_string(state.join("admin-password"))
            .context("the first admin's password")?
            .trim()
            .to_owned();
        Ok(())
    }

    async fn join(&mut self, index: usize) -> Result<()> {
        let name = format!("agent-{index}");
        let ways = self.addresses.agent(index)?;
        let first = self.users.start + u32::try_from(index)? * USERS_EACH;
        let network = match (&self.segment, self.addresses.host(index)?) {
            (Some(segment), Some(ip)) => {
                let log = self.folder.join(format!("{name}.network.log"));
                Some(segment.host(&name, &ip.to_string(), &log).await?)
            }
            _ => None,
        };
        let agent = Agent {
            name,
            ways,
            users: first..first + USERS_EACH,
            process: None,
            network,
            boot: None,
        };
        let token = self.join_token().await?;
        let mut arguments = vec!["join".to_owned()];
        arguments.extend(self.folders(&agent));
        // What it is told of controllers then is how they are known.
        let controller = format!("https://{}", self.addresses.agents().listens);
        let endpoint = format!("https://{}", ways.known);
        for (flag, value) in [
            ("--controller", controller),
            ("--token", token),
            ("--endpoint", endpoint),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        let (program, first) = self.as_a_host(&agent)?;
        let output = tokio::process::Command::new(program)
            .args(first.iter().chain(&arguments))
            .kill_on_drop(true)
            .output()
            .await?;
        if !output.status.success() {
            bail!("joining: {}", String::from_utf8_lossy(&output.stderr));
        }
        self.agents.push(agent);
        Ok(())
    }

    fn folders(&self, agent: &Agent) -> [String; 4] {
        let folder = |kind: &str| {
            self.folder
                .join(&agent.name)
                .join(kind)
                .display()
                .to_string()
        };
        [
            "--state-dir".to_owned(),
            folder("state"),
            "--runtime-dir".to_owned(),
            folder("run"),
        ]
    }

    /// A one-time token, as `fractus host join-token` gets it.
    async fn join_token(&self) -> Result<String> {
        let admin = self.admin().await?;
        let body = json!({"join_token": {"ttl_s": 600}});
        let answer = admin
            .post("/fractus/v1/join-tokens", body)
            .await?
            .expect_status(201)?;
        Ok(answer.text("/join_token/token"))
    }

    /// Starts an agent that has joined, also again after it was killed.
    pub fn start_agent(&mut self, index: usize) -> Result<()> {
        let agent = &self.agents[index];
        let (program, mut arguments) = self.as_a_host(agent)?;
        arguments.push("run".to_owned());
        arguments.extend(self.folders(agent));
        for (flag, value) in [
            ("--listen", agent.ways.listens.to_string()),
            ("--first-user", agent.users.start.to_string()),
            ("--users", USERS_EACH.to_string()),
            ("--shutdown-seconds", "5".to_owned()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        let log = self.folder.join(format!("{}.log", agent.name));
        let environment = [("FRACTUS_LEAVE_HOST_SETTINGS", "true".to_owned())];
        let process = Process::start(&agent.name, &program, &arguments, &environment, &log)?;
        self.agents[index].process = Some(process);
        Ok(())
    }

    /// The agents' program, and what stands before its arguments: several are hosts of different names, with networks of
    /// their own where they have them, and of boots of their own once they have lost their power.
    fn as_a_host(&self, agent: &Agent) -> Result<(PathBuf, Vec<String>)> {
        let (name, boot) = (&agent.name, agent.boot.as_deref());
        let program = self.agent_program()?;
        if self.options.agents < 2 && boot.is_none() {
            return Ok((program, Vec::new()));
        }
        let named = "hostname \"$1\" && shift && exec \"$@\"";
        let booted =
            format!("mount --bind \"$1\" /proc/sys/kernel/random/boot_id && shift && {named}");
        let program = program.display().to_string();
        let network = agent.network.as_ref().map(HostNetwork::prefix);
        let mut words = network.unwrap_or_default();
        words.extend(["unshare", "--uts"].map(str::to_owned));
        match boot {
            None => words.extend(["sh", "-c", named, "sh"].map(str::to_owned)),
            Some(boot) => {
                words.extend(["--mount", "sh", "-c", &booted, "sh"].map(str::to_owned));
                words.push(boot.display().to_string());
            }
        }
        words.extend([name.to_owned(), program]);
        let first = words.remove(0);
        Ok((PathBuf::from(first), words))
    }

    fn agent_program(&self) -> Result<PathBuf> {
        match &self.options.agent_program {
            Some(program) => Ok(program.clone()),
            None => program("fractus-agent"),
        }
    }

    /// `fractus-agent upgrade-machines --all` on a host of one agent: what it says.
    pub fn upgrade_machines(&self, index: usize) -> Result<String> {
        let output = Command::new(self.agent_program()?)
            .args(["upgrade-machines", "--all"])
            .args(self.folders(&self.agents[index]))
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(said),
            false => bail!("{said}{}", String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// Agents that are started from now on are of this program.
    pub fn upgrade_agents(&mut self, program: Option<PathBuf>) {
        self.options.agent_program = program;
    }

    async fn until_hosts_up(&self) -> Result<()> {
        let wanted = self.agents.len();
        if wanted == 0 {
            return Ok(());
        }
        let admin = self.admin().await?;
        let seen = until("every host is up", READY, || async {
            let answer = admin
                .get("/fractus/v1/hosts")
                .await
                .map_err(|e| e.to_string())?;
            let hosts = answer.body["hosts"].as_array().cloned().unwrap_or_default();
            let up = hosts.iter().filter(|host| host["state"] == "up").count();
            if up == wanted {
                Ok(())
            } else {
                Err(format!("{up} of {wanted} up: {}", answer.body))
            }
        });
        seen.await.with_context(|| self.logs())
    }

    /// A client that is the first admin, in the project admin.
    pub async fn admin(&self) -> Result<Client> {
        Client::new(&self.url)?
            .log_in("admin", &self.password, "admin")
            .await
    }

    /// The OS_* variables of its first admin.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("OS_AUTH_URL", format!("{}/identity/v3", self.url)),
            ("OS_USERNAME", "admin".to_owned()),
            ("OS_PASSWORD", self.password.clone()),
            ("OS_PROJECT_NAME", "admin".to_owned()),
            ("OS_USER_DOMAIN_ID", "default".to_owned()),
            ("OS_PROJECT_DOMAIN_ID", "default".to_owned()),
            ("OS_REGION_NAME", "RegionOne".to_owned()),
            ("OS_IDENTITY_API_VERSION", "3".to_owned()),
        ]
    }

    /// Uploads the probe as an image that boots, with this command line, and waits until it is active.
    pub async fn probe_image(&self, client: &Client, command_line: &str) -> Result<String> {
        let kernel = fs::read(probe()?)?;
        let image =
            json!({"name": "probe-kernel", "disk_format": "raw", "container_format": "bare"});
        let kernel_id = self.image(client, image, kernel).await?;
        let image = json!({"name": "probe", "disk_format": "raw", "container_format": "bare",
            "kernel_id": kernel_id, "os_command_line": command_line});
        self.image(client, image, vec![0; 1 << 20]).await
    }

    async fn image(&self, client: &Client, image: Value, data: Vec<u8>) -> Result<String> {
        let made = client
            .post("/image/v2/images", image)
            .await?
            .expect_status(201)?;
        let id = made.text("/id");
        client
            .upload(&format!("/image/v2/images/{id}/file"), data)
            .await?
            .expect_status(204)?;
        Ok(id)
    }

    pub fn kill_controller(&mut self) {
        self.controller = None;
    }

    pub fn kill_agent(&mut self, index: usize) {
        self.agents[index].process = None;
    }

    /// The host loses its power: agent and machines end, and none has a last word.
    pub async fn power_off(&mut self, index: usize) -> Result<()> {
        self.kill_agent(index);
        let users = self.agents[index].users.clone();
        let ended = until("its machines have ended", READY, || async {
            let left = machines::processes(&users);
            for process in &left {
                let pid = i32::try_from(process.pid).unwrap_or_default();
                if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            match left.is_empty() {
                true => Ok(()),
                false => Err(format!("{left:?}")),
            }
        });
        ended.await
    }

    /// It has power again: its agent starts, in another boot of the host.
    pub fn power_on(&mut self, index: usize) -> Result<()> {
        let boot = self
            .folder
            .join(format!("{}.boot", self.agents[index].name));
        fs::write(&boot, format!("{}\n", uuid::Uuid::new_v4().hyphenated()))?;
        self.agents[index].boot = Some(boot);
        self.start_agent(index)
    }

    /// The network of an agent that has one of its own.
    pub fn network(&self, index: usize) -> Option<&HostNetwork> {
        self.agents.get(index)?.network.as_ref()
    }

    /// The agent's process, while it runs.
    pub fn agent(&mut self, index: usize) -> Option<&mut Process> {
        self.agents.get_mut(index)?.process.as_mut()
    }

    pub fn controller(&mut self) -> Option<&mut Process> {
        self.controller.as_mut()
    }

    /// How agents reach the controller.
    pub fn controller_ways(&self) -> Ways {
        self.addresses.agents()
    }

    /// How the controller reaches an agent, which may not have joined yet, and other agents the ports of its host.
    pub fn agent_ways(&self, index: usize) -> Result<Ways> {
        self.addresses.agent(index)
    }

    /// State folder of an agent, which may not have joined yet.
    pub fn agent_state(&self, index: usize) -> PathBuf {
        self.folder.join(format!("agent-{index}")).join("state")
    }

    /// The processes of one agent's machines.
    pub fn machine_processes_of(&self, index: usize) -> Vec<MachineProcess> {
        machines::processes(&self.agents[index].users)
    }

    /// The processes of machines, of all agents.
    pub fn machine_processes(&self) -> Vec<MachineProcess> {
        machines::processes(&self.users)
    }

    /// Ids of the machines that an agent has a folder of, tombstones left out.
    pub fn machine_folders(&self, index: usize) -> Vec<String> {
        list(
            &self
                .folder
                .join(&self.agents[index].name)
                .join("state/machines"),
        )
    }

    /// What is left of machines in an agent's folder beside records, which are kept as tombstones.
    pub fn machine_leftovers(&self, index: usize) -> Vec<String> {
        let machines = self
            .folder
            .join(&self.agents[index].name)
            .join("state/machines");
        let of = |id: &String| {
            let files = list(&machines.join(id)).into_iter();
            files
                .filter(|name| name != "record.json")
                .map(|name| format!("{id}/{name}"))
                .collect()
        };
        list(&machines)
            .iter()
            .flat_map(|id| -> Vec<String> { of(id) })
            .collect()
    }

    /// Names of the sockets of an agent's machines.
    pub fn machine_sockets(&self, index: usize) -> Vec<String> {
        list(
            &self
                .folder
                .join(&self.agents[index].name)
                .join("run/machines"),
        )
    }

    /// Control groups of an agent's machines: paths, without the agent's own.
    pub fn machine_groups(&self, index: usize) -> Vec<PathBuf> {
        let mut groups = self.control_groups(index);
        groups.retain(|group| {
            let name = group.file_name().unwrap_or_default().to_string_lossy();
            !name.starts_with("fractus-")
        });
        groups
    }

    /// Control groups of an agent, its own with those of its machines.
    pub fn control_groups(&self, index: usize) -> Vec<PathBuf> {
        machines::control_groups(&self.folder.join(&self.agents[index].name).join("state"))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The ends of all logs, for a test that failed.
    pub fn logs(&self) -> String {
        let processes = self
            .controller
            .iter()
            .chain(self.agents.iter().filter_map(|a| a.process.as_ref()));
        processes.map(Process::tail).collect::<Vec<_>>().join("\n")
    }
}

fn list(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn lock(process: &std::sync::Mutex<Process>) -> std::sync::MutexGuard<'_, Process> {
    process
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
