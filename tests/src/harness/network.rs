//! Networks for hosts that have more between them than the loopback: a test that runs in a network namespace of its own
//! (its *segment*), and one for each of its hosts, with a cable to a bridge in the segment.
//!
//! Namespaces are held by processes alone, and so are the interfaces in them: what holds them ends with the test, and
//! nothing has a name under which it could be left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::process::Process;
use super::wait::until;

/// Set where a test runs in a segment of its own: the namespace that it was started in.
const INSIDE: &str = "FRACTUS_TEST_SEGMENT";
const OWN: &str = "/proc/self/ns/net";
/// Where it says that it has run.
const RAN: &str = "/proc/self/fd/0";
/// Of the segment: for documentation (RFC 5737), and nobody's outside.
const PREFIX: u32 = 24;
const BRIDGE: &str = "segment";

/// Runs the test `name`, which is `body`, in a segment of its own: in a process of its own, as other tests of this one's
/// would be in it, too.
pub fn in_a_segment<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F) {
    if is_inside() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(body());
        std::fs::write(RAN, name).unwrap();
        return;
    }
    let mut ran = tempfile::tempfile().unwrap();
    let status = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, std::fs::read_link(OWN).unwrap())
        .stdin(ran.try_clone().unwrap())
        .status();
    let status = status.unwrap();
    assert!(status.success(), "in a segment of its own: {status}");
    let mut said = String::new();
    ran.read_to_string(&mut said).unwrap();
    assert_eq!(said, name, "the name is another test's, or nobody's");
}

/// In a namespace that was made for a test.
fn is_inside() -> bool {
    let outside = std::env::var_os(INSIDE);
    outside.is_some_and(|outside| std::fs::read_link(OWN).unwrap().as_os_str() != outside)
}

/// The end of it that is the controller's and the test's.
#[derive(Debug)]
pub struct Segment;

impl Segment {
    /// # Errors
    /// When this test is in none ([`in_a_segment`]).
    pub fn lay(address: &str) -> Result<Self> {
        if !is_inside() {
            bail!("hosts with networks of their own are for tests that run `in_a_segment`");
        }
        ip("link set lo up")?;
        ip(&format!("link add {BRIDGE} type bridge"))?;
        ip(&format!("address add {address}/{PREFIX} dev {BRIDGE}"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        Ok(Self)
    }

    /// A network for one more host, at this address.
    pub async fn host(&self, name: &str, address: &str, log: &Path) -> Result<HostNetwork> {
        let holder = PathBuf::from("unshare");
        let arguments = ["--net", "--", "sleep", "infinity"].map(str::to_owned);
        let holder = Process::start(name, &holder, &arguments, &[], log)?;
        let its = namespace(&holder);
        let apart = until("its namespace is made", Duration::from_secs(60), || async {
            let read = |path: &str| std::fs::read_link(path).map_err(|error| error.to_string());
            match read(OWN)? == read(&its)? {
                false => Ok(()),
                true => Err("it is this test's still".to_owned()),
            }
        });
        apart.await.with_context(|| holder.tail())?;
        let (cable, pid) = (format!("to-{name}"), holder.pid());
        ip(&format!(
            "link add {cable} type veth peer name eth0 netns {pid}"
        ))?;
        ip(&format!("link set {cable} master {BRIDGE} up"))?;
        let network = HostNetwork { holder, cable };
        network.done("ip link set lo up")?;
        network.done(&format!("ip address add {address}/{PREFIX} dev eth0"))?;
        network.done("ip link set eth0 up")?;
        Ok(network)
    }
}

/// One host's.
#[derive(Debug)]
pub struct HostNetwork {
    holder: Process,
    cable: String,
}

impl HostNetwork {
    /// What stands before a command that is to run in it.
    pub fn prefix(&self) -> Vec<String> {
        let net = format!("--net={}", namespace(&self.holder));
        vec!["nsenter".to_owned(), net, "--".to_owned()]
    }

    /// No more than this goes to the host from now on, megabits a second.
    pub fn slow_down(&self, megabits: u32) -> Result<()> {
        let cable = &self.cable;
        let line = format!(
            "tc qdisc replace dev {cable} root tbf rate {megabits}mbit burst 64k latency 100ms"
        );
        done(&line)
    }

    pub fn speed_up(&self) -> Result<()> {
        done(&format!("tc qdisc del dev {} root", self.cable))
    }

    fn done(&self, line: &str) -> Result<()> {
        done(&format!("{} {line}", self.prefix().join(" ")))
    }
}

fn namespace(holder: &Process) -> String {
    format!("/proc/{}/ns/net", holder.pid())
}

fn ip(arguments: &str) -> Result<()> {
    done(&format!("ip {arguments}"))
}

fn done(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).output();
    let output = output.with_context(|| line.to_owned())?;
    match output.status.success() {
        true => Ok(()),
        false => bail!("{line}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}
