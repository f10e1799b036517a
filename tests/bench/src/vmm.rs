//! The VMM alone: how soon a guest runs, and what a machine costs beyond the guest's memory. The peer
//! is Debian's QEMU, machine type microvm, with all that can be left out left out.

use std::path::Path;
use std::process::Command;

use crate::figure::{Figure, median};
use crate::process::{Running, built, probe};

const MIB: u64 = 1 << 20;
const GUEST_MIB: u64 = 256;
const PEER: &str = "QEMU microvm";

fn ours(probe: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(built("examples/boot")?);
    command
        .arg(probe)
        .args(["--memory", &GUEST_MIB.to_string()])
        .args(["--append", "tick_ms=0"]);
    Ok(command)
}

fn theirs(probe: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "microvm,pit=off,pic=off,rtc=off", "-accel", "kvm"])
        .args([
            "-cpu",
            "max,-arch-capabilities",
            "-m",
            &GUEST_MIB.to_string(),
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .args(["-no-reboot", "-append", "tick_ms=0", "-kernel"])
        .arg(probe);
    command
}

/// Milliseconds to the first byte of the probe's first line.
pub fn start(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let probe = probe()?;
    let (mut mine, mut peers) = (Vec::new(), Vec::new());
    // One round unmeasured: the first run reads both programs from disk.
    for round in 0..=rounds {
        let our_time = Running::start(&mut ours(&probe)?)?.first_byte()?;
        let their_time = Running::start(&mut theirs(&probe))?.first_byte()?;
        if round > 0 {
            mine.push(our_time.as_secs_f64() * 1e3);
            peers.push(their_time.as_secs_f64() * 1e3);
        }
    }
    Ok(vec![Figure {
        name: "vmm-start".to_owned(),
        unit: "ms",
        ours: median(mine).unwrap_or(f64::NAN),
        peer: median(peers).map(|value| (PEER, value)),
        rounds,
        limit: Some(5.0),
        ratio_limit: Some(0.15),
    }])
}

/// MB of PSS beyond guest memory once the probe has booted.
pub fn memory(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let probe = probe()?;
    let (mut mine, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        mine.push(settled(&mut ours(&probe)?)?);
        peers.push(settled(&mut theirs(&probe))?);
    }
    Ok(vec![Figure {
        name: "vmm-memory".to_owned(),
        unit: "MB",
        ours: median(mine).unwrap_or(f64::NAN),
        peer: median(peers).map(|value| (PEER, value)),
        rounds,
        limit: Some(3.0),
        ratio_limit: None,
    }])
}

fn settled(command: &mut Command) -> anyhow::Result<f64> {
    let mut running = Running::start(command)?;
    running.wait_for_line("boot nonce=")?;
    Ok(running.pss_beyond(GUEST_MIB * MIB)? as f64 / 1e6)
}
