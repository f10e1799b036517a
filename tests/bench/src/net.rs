//! The network over a tap: how long a small request takes to the probe and back, and how fast bulk
//! passes each way. The peer is Debian's QEMU, virtio-net-pci on a tap without vhost (as ours, in user
//! space); machine type q35, since microvm's PCI needs a kernel that places the BARs.
//!
//! Every machine runs in a network namespace of its own, made for the round and gone with it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::figure::{Figure, median};
use crate::process::{Running, built, probe};

const PEER: &str = "QEMU q35, virtio-net-pci";
const TAP: &str = "bench0";
const MIB: u64 = 1 << 20;
const BULK: usize = 64 << 20;
const REQUESTS: usize = 5000;
/// Transfers each way, of which the median counts.
const TRANSFERS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(20);
const COMMAND_LINE: &str = "tick_ms=0 net_ip=10.77.0.2/24";

/// One machine: microseconds of a request, milliseconds of [`BULK`] from and to the guest.
type Round = [f64; 3];

/// Medians over rounds; a round is a machine of each kind, in turn.
pub fn run(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    // A machine's figures are medians of many requests already.
    let rounds = rounds.clamp(1, 7);
    let config = config()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut command = Command::new(built("fractus-agent")?);
        command.args(["vm", "--config"]).arg(config.path());
        ours.push(apart(command)?);
        theirs.push(apart(peer()?)?);
    }
    let of = |found: &[Round], which: usize| {
        median(found.iter().map(|round| round[which]).collect()).unwrap_or(f64::NAN)
    };
    let names = [
        ("net-request", "us"),
        ("net-bulk-from-guest", "ms"),
        ("net-bulk-to-guest", "ms"),
    ];
    let figure = |(which, (name, unit)): (usize, (&str, &'static str))| Figure {
        name: name.to_owned(),
        unit,
        ours: of(&ours, which),
        peer: Some((PEER, of(&theirs, which))),
        rounds,
        limit: None,
        ratio_limit: Some(1.0),
    };
    Ok(names.into_iter().enumerate().map(figure).collect())
}

fn config() -> anyhow::Result<tempfile::NamedTempFile> {
    let machine = serde_json::json!({
        "machine": {
            "uuid": "00000000-0000-0000-0000-000000000000",
            "cpus": {"count": 1},
            "memory": {"bytes": 256 * MIB},
            "command_line": COMMAND_LINE,
        },
        "kernel": probe()?,
        "taps": [TAP],
    });
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(machine.to_string().as_bytes())?;
    Ok(file)
}

fn peer() -> anyhow::Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    let netdev = format!("tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off");
    command
        .args(["-M", "q35", "-accel", "kvm", "-m", "256"])
        .args(["-cpu", "max,-arch-capabilities", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-serial", "stdio"])
        .args(["-no-reboot", "-netdev", &netdev])
        .args(["-device", "virtio-net-pci,netdev=n,mac=02:f0:00:00:00:01"])
        .args(["-append", COMMAND_LINE, "-kernel"])
        .arg(probe()?);
    Ok(command)
}

/// Measures a machine in a namespace of its own.
fn apart(mut command: Command) -> anyhow::Result<Round> {
    let work = move || {
        let _namespace = enter_namespace()?;
        let mut running = Running::start(&mut command)?;
        running.wait_for_line("boot nonce=")?;
        ip(&["addr", "add", "10.77.0.1/24", "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok([request()?, repeated(from_guest)?, repeated(to_guest)?])
    };
    let thread = std::thread::spawn(work).join();
    thread.map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
}

/// The namespace is a child's, which ends with its input; threads cannot make one without `unsafe`.
struct Namespace(Child);

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn enter_namespace() -> anyhow::Result<Namespace> {
    let child = Command::new("unshare")
        .args(["--net", "sh", "-c", "echo ready; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("unshare (util-linux)")?;
    let mut namespace = Namespace(child);
    let output = namespace.0.stdout.take().context("its output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line == "ready\n", "no network namespace: is this root?");
    let file = File::open(format!("/proc/{}/ns/net", namespace.0.id()))?;
    move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&file),
        Some(LinkNameSpaceType::Network),
    )?;
    Ok(namespace)
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("ip").args(arguments).status().context("ip")?;
    ensure!(status.success(), "ip {}", arguments.join(" "));
    Ok(())
}

fn guest(port: u16) -> SocketAddr {
    ([10, 77, 0, 2], port).into()
}

/// Microseconds until a datagram of 64 bytes is back, the median.
fn request() -> anyhow::Result<f64> {
    let socket = UdpSocket::bind(("10.77.0.1", 0))?;
    socket.connect(guest(7))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut times = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while times.len() < REQUESTS {
        ensure!(Instant::now() < deadline, "the guest does not answer");
        let begin = Instant::now();
        socket.send(&[7; 64])?;
        // The first ones may be lost while addresses are learned.
        if socket.recv(&mut [0; 128]).is_ok() {
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    median(times).context("no request")
}

fn connect(port: u16) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&guest(port), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The median of some transfers.
fn repeated(transfer: fn() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let times: anyhow::Result<_> = (0..TRANSFERS).map(|_| transfer()).collect();
    median(times?).context("no transfer")
}

fn from_guest() -> anyhow::Result<f64> {
    let mut stream = connect(19)?;
    let mut data = vec![0; 1 << 20];
    let begin = Instant::now();
    let mut rest = BULK;
    while rest > 0 {
        let count = stream.read(&mut data)?;
        ensure!(count > 0, "the guest's stream ended");
        rest = rest.saturating_sub(count);
    }
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

fn to_guest() -> anyhow::Result<f64> {
    let mut stream = connect(9)?;
    let data = vec![0; 1 << 20];
    let begin = Instant::now();
    for _ in 0..BULK / data.len() {
        stream.write_all(&data)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // The guest closes when it has taken all.
    ensure!(stream.read(&mut [0])? == 0, "the guest said something");
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}
