//! The VMM alone: how soon a guest runs, and what a machine costs beyond the guest's memory; bare, and
//! jailed as the agent does it. The peer is Debian's QEMU, machine type microvm, with all that can be
//! left out left out.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempPath;

use crate::figure::{Figure, median};
use crate::process::{Running, built, probe};

const MIB: u64 = 1 << 20;
const GUEST_MIB: u64 = 256;
const PEER: &str = "QEMU microvm";

/// What both of ours need on disk: the machine as `fractus-agent vm` reads it.
struct Bed {
    probe: PathBuf,
    config: TempPath,
}

impl Bed {
    fn make() -> anyhow::Result<Self> {
        let probe = probe()?;
        let machine = serde_json::json!({
            "machine": {
                "uuid": "00000000-0000-0000-0000-000000000000",
                "cpus": {"count": 1},
                "memory": {"bytes": GUEST_MIB * MIB},
                "command_line": "tick_ms=0",
            },
            "kernel": probe,
        });
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(machine.to_string().as_bytes())?;
        Ok(Self {
            probe,
            config: file.into_temp_path(),
        })
    }

    fn bare(&self) -> anyhow::Result<Command> {
        let mut command = self.jailed()?;
        command.arg("--no-jail");
        Ok(command)
    }

    fn jailed(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(built("fractus-agent")?);
        command.args(["vm", "--config"]).arg(&self.config);
        Ok(command)
    }
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

/// Milliseconds from exec of the machine's process to the first byte of the probe's first line. A jailed
/// one is started by another process, as by an agent: its own time counts, and with that of its starter
/// (one more exec, an empty root that an agent makes once) it is a figure of its own.
pub fn start(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let bed = Bed::make()?;
    let whole = |command: &mut Command| Running::start(command)?.first_byte();
    let mut found = [const { Vec::new() }; 4];
    for round in 0..=rounds {
        let mut jailed = bed.jailed()?;
        jailed.arg("--stamp");
        let values = [
            whole(&mut bed.bare()?)?,
            Running::start_stamped(&mut jailed)?.first_byte_since_stamp()?,
            whole(&mut bed.jailed()?)?,
            whole(&mut theirs(&bed.probe))?,
        ];
        // The first reads the programs from disk.
        if round > 0 {
            for (found, value) in found.iter_mut().zip(values) {
                found.push(value.as_secs_f64() * 1e3);
            }
        }
    }
    let [bare, jailed, started, peer] = found.map(|values| median(values).unwrap_or(f64::NAN));
    let figure = |name: &str, ours, limit| Figure {
        name: name.to_owned(),
        unit: "ms",
        ours,
        peer: Some((PEER, peer)),
        rounds,
        limit,
        ratio_limit: None,
    };
    let mut figures = vec![
        figure("vmm-start", bare, Some(5.0)),
        figure("vmm-start-jailed", jailed, Some(8.0)),
        figure("vmm-start-jailed-by-hand", started, None),
    ];
    figures[0].ratio_limit = Some(0.15);
    Ok(figures)
}

/// How long after the boot memory is looked at: a machine of ours lets go of what only its start needed.
const REST: Duration = Duration::from_millis(750);

/// MB of PSS beyond guest memory a moment after the probe has booted.
pub fn memory(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let bed = Bed::make()?;
    let [bare, jailed, peer] = in_turn(
        rounds,
        |command| {
            let mut running = Running::start(command)?;
            running.wait_for_line("boot nonce=")?;
            // sleeps because its memory after a rest is what is measured
            std::thread::sleep(REST);
            Ok(running.pss_beyond(GUEST_MIB * MIB)? as f64 / 1e6)
        },
        &bed,
    )?;
    let figure = |name: &str, ours| Figure {
        name: name.to_owned(),
        unit: "MB",
        ours,
        peer: Some((PEER, peer)),
        rounds,
        limit: Some(3.0),
        ratio_limit: None,
    };
    Ok(vec![
        figure("vmm-memory", bare),
        figure("vmm-memory-jailed", jailed),
    ])
}

/// Medians of bare, jailed and peer, measured one after the other in each round. One round is not
/// counted: it reads the programs from disk.
fn in_turn(
    rounds: usize,
    measure: impl Fn(&mut Command) -> anyhow::Result<f64>,
    bed: &Bed,
) -> anyhow::Result<[f64; 3]> {
    let mut found = [const { Vec::new() }; 3];
    for round in 0..=rounds {
        let commands = [bed.bare()?, bed.jailed()?, theirs(&bed.probe)];
        for (values, mut command) in found.iter_mut().zip(commands) {
            let value = measure(&mut command)?;
            if round > 0 {
                values.push(value);
            }
        }
    }
    Ok(found.map(|values| median(values).unwrap_or(f64::NAN)))
}
