//! Disks: the probe's 4 KiB reads and writes of a raw file, one at a time and 32 at once, through the
//! host's cache and past it. The peer is Debian's QEMU with virtio-blk-pci in an iothread, by io_uring.
//!
//! Both guests run all the while (idle but when it is their turn), each with two disks, the first of
//! them direct, in files of its own. Figures are microseconds a request as the guest's TSC counts them.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use tempfile::TempDir;

use crate::figure::{Figure, median};
use crate::process::{Running, built, probe};

const MIB: u64 = 1 << 20;
const GUEST_MIB: u64 = 256;
const DISK_MIB: u64 = 128;
const PEER: &str = "QEMU io_uring";
/// Cached, direct: the numbers of the guests' disks.
const MODES: [&str; 2] = ["direct", "cached"];

/// What is asked of both guests.
struct Case {
    kind: &'static str,
    order: &'static str,
    depth: u32,
    count: u64,
}

const CASES: [Case; 8] = {
    const fn case(kind: &'static str, order: &'static str, depth: u32) -> Case {
        let count = if depth == 1 { 1000 } else { 6000 };
        Case {
            kind,
            order,
            depth,
            count,
        }
    }
    [
        case("read", "seq", 1),
        case("read", "random", 1),
        case("write", "seq", 1),
        case("write", "random", 1),
        case("read", "seq", 32),
        case("read", "random", 32),
        case("write", "seq", 32),
        case("write", "random", 32),
    ]
};

/// One guest and its disks.
struct Side {
    guest: Running,
    disks: [File; 2],
}

impl Side {
    fn start(
        folder: &Path,
        name: &str,
        command: impl FnOnce(&[String; 2]) -> anyhow::Result<Command>,
    ) -> anyhow::Result<Self> {
        let paths = MODES.map(|mode| folder.join(format!("{name}-{mode}")));
        let make = |path| {
            let mut file = File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(path)?;
            // Written, not merely allocated: what has no block yet is another measurement.
            for number in 0..DISK_MIB {
                file.write_all(&vec![number as u8 | 1; MIB as usize])?;
            }
            file.sync_all()?;
            anyhow::Ok(file)
        };
        let disks = [make(&paths[0])?, make(&paths[1])?];
        let mut command = command(&paths.map(|path| path.display().to_string()))?;
        let mut guest = Running::start_talking(&mut command)?;
        guest.wait_for_line("boot nonce=")?;
        Ok(Self { guest, disks })
    }

    /// Microseconds a request.
    fn measure(&mut self, disk: usize, case: &Case) -> anyhow::Result<f64> {
        let Case {
            kind,
            order,
            depth,
            count,
        } = case;
        let command = format!("blk-bench {disk} {kind} {order} {depth} {count}");
        let answer = self.guest.ask(&command)?;
        let us = answer
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix("us="))
            .with_context(|| format!("no time in: {answer}"))?;
        // What is left in the cache is not the next one's to write.
        self.disks[disk].sync_data()?;
        Ok(us.parse::<f64>()? / *count as f64)
    }
}

fn ours(folder: &Path, disks: &[String; 2]) -> anyhow::Result<Command> {
    let disk = |direct| serde_json::json!({"direct": direct});
    let config = serde_json::json!({
        "machine": {
            "uuid": "00000000-0000-0000-0000-000000000000",
            "cpus": {"count": 1},
            "memory": {"bytes": GUEST_MIB * MIB},
            "command_line": "tick_ms=0",
            "disks": [disk(true), disk(false)],
        },
        "kernel": probe()?,
        "disks": disks,
    });
    let path = folder.join("machine.json");
    std::fs::write(&path, config.to_string())?;
    let mut command = Command::new(built("fractus-agent")?);
    command.args(["vm", "--config"]).arg(path);
    Ok(command)
}

/// Of q35, since only its firmware gives PCI functions their addresses.
fn theirs(disks: &[String; 2]) -> anyhow::Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35", "-accel", "kvm"])
        .args(["-cpu", "max,-arch-capabilities"])
        .args(["-m", &GUEST_MIB.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot", "-append", "tick_ms=0"])
        .arg("-kernel")
        .arg(probe()?);
    for (number, path) in disks.iter().enumerate() {
        let direct = if number == 0 { "on" } else { "off" };
        command
            .args(["-object", &format!("iothread,id=io{number}")])
            .arg("-blockdev")
            .arg(format!(
                "driver=raw,node-name=d{number},cache.direct={direct},file.driver=file,\
                 file.filename={path},file.aio=io_uring,file.cache.direct={direct}"
            ))
            .arg("-device")
            .arg(format!(
                "virtio-blk-pci,drive=d{number},iothread=io{number},addr={}",
                number + 4
            ));
    }
    Ok(command)
}

/// Microseconds a request, for each case and mode.
pub fn requests(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    // Beside what is built: a disk, where the folder for temporary files may be memory.
    let here = std::env::current_exe()?;
    let folder = TempDir::new_in(here.parent().context("a program has a folder")?)?;
    let mut sides = [
        Side::start(folder.path(), "ours", |disks| ours(folder.path(), disks))?,
        Side::start(folder.path(), "theirs", theirs)?,
    ];
    let mut figures = Vec::new();
    for (disk, mode) in MODES.iter().enumerate() {
        for case in &CASES {
            let mut found = [const { Vec::new() }; 2];
            // The first round is not counted: it may fill caches.
            for round in 0..=rounds {
                for (side, values) in sides.iter_mut().zip(&mut found) {
                    let value = side.measure(disk, case)?;
                    if round > 0 {
                        values.push(value);
                    }
                }
            }
            let [ours, peer] = found.map(|values| median(values).unwrap_or(f64::NAN));
            let Case {
                kind, order, depth, ..
            } = case;
            figures.push(Figure {
                name: format!("disk-{mode}-{kind}-{order}-{depth}"),
                unit: "us",
                ours,
                peer: Some((PEER, peer)),
                rounds,
                limit: None,
                ratio_limit: Some(1.0),
            });
        }
    }
    Ok(figures)
}
