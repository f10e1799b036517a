//! The private Ethernet segment: a network namespace with two bridges, which exists as long as the
//! lab's thread and what it started do. The machine's own network is not touched.
//!
//! `control` joins controller and agents; `guests` is for the networks of servers.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use rustix::thread::UnshareFlags;

/// The controller's address, and its network's.
pub const CONTROLLER: &str = "10.77.0.1";
const CONTROL: &str = "control";
const GUESTS: &str = "guests";

/// The machine's own network, once a thread of this process has left it.
static OUTSIDE: OnceLock<File> = OnceLock::new();

/// A program that runs in the machine's own network, also when the calling thread is in a segment: what
/// a lab needs is fetched when it is first asked for.
pub fn outside(program: impl AsRef<OsStr>) -> Command {
    let Some(network) = OUTSIDE.get() else {
        return Command::new(program);
    };
    let network = format!("/proc/{}/fd/{}", std::process::id(), network.as_raw_fd());
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={network}"))
        .arg("--")
        .arg(program);
    command
}

/// The calling thread, and every process that it starts from now on, is in the segment.
#[derive(Debug)]
pub struct Segment(());

/// A host's two places in it.
#[derive(Debug, Clone)]
pub struct Ports {
    pub control: String,
    pub guests: String,
}

impl Segment {
    /// Takes this thread out of the machine's network for good.
    pub fn enter() -> Result<Self> {
        if OUTSIDE.get().is_none() {
            let network =
                File::open("/proc/thread-self/ns/net").context("the machine's network")?;
            OUTSIDE.get_or_init(|| network);
        }
        #[expect(
            deprecated,
            reason = "its successor is unsafe because of a flag that is not used here"
        )]
        rustix::thread::unshare(UnshareFlags::NEWNET)
            .context("making a network namespace (the lab needs root)")?;
        ip("link set lo up")?;
        for bridge in [CONTROL, GUESTS] {
            ip(&format!(
                "link add {bridge} type bridge forward_delay 0 mcast_snooping 0"
            ))?;
            ip(&format!("link set {bridge} up"))?;
        }
        ip(&format!("address add {CONTROLLER}/24 dev {CONTROL}"))?;
        Ok(Self(()))
    }

    /// Makes the ports of host `number`, from 1.
    pub fn ports(&self, number: u8) -> Result<Ports> {
        let ports = Ports {
            control: format!("control{number}"),
            guests: format!("guests{number}"),
        };
        for port in [&ports.control, &ports.guests] {
            ip(&format!("tuntap add {port} mode tap vnet_hdr"))?;
            ip(&format!("link set {port} up"))?;
        }
        ports.mend()?;
        Ok(ports)
    }
}

impl Ports {
    /// Nothing goes in or out any more; the host sees its links up still, as behind a dead switch.
    pub fn cut(&self) -> Result<()> {
        ip(&format!("link set {} nomaster", self.control))?;
        ip(&format!("link set {} nomaster", self.guests))
    }

    pub fn mend(&self) -> Result<()> {
        ip(&format!("link set {} master {CONTROL}", self.control))?;
        ip(&format!("link set {} master {GUESTS}", self.guests))
    }
}

/// The address of host `number` on `control`.
pub fn address(number: u8) -> String {
    format!("10.77.0.{}", 10 + number)
}

/// Locally administered; `place` is 1 on `control` and 2 on `guests`.
pub fn ethernet_address(number: u8, place: u8) -> String {
    format!("52:54:00:77:{place:02x}:{number:02x}")
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .context("running ip (package iproute2)")?;
    if !output.status.success() {
        bail!(
            "ip {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
