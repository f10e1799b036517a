//! Clones of a guest whose file is on a disk and in no cache (in the folder of what was built): from exec until the guest
//! has written to 100 MiB of its memory, all over. With what the first of them touched read ahead for the next, and
//! without; and where the page cache has the file.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fractus_vmm::config::MachineConfig;
use rustix::fs::{Advice, fadvise};

use super::{Guest, MIB, PATIENCE, Rows, ms};
use crate::process::{Running, built, probe};

const GUEST_MIB: u64 = 512;
const WOVEN_MIB: u64 = 100;

pub(super) fn clones(rounds: usize, rows: &mut Rows) -> anyhow::Result<()> {
    let agent = built("fractus-agent")?;
    let disk = agent.parent().context("it is in a folder")?;
    let folder = tempfile::Builder::new()
        .prefix("fractus-bench")
        .tempdir_in(disk)?;
    let at = |name: &str| folder.path().join(name);
    let (path, config, set) = (at("snapshot"), at("config"), at("set"));
    let machine = serde_json::json!({
        "machine": MachineConfig::minimal(GUEST_MIB * MIB),
        "kernel": probe()?,
    });
    std::fs::write(&config, machine.to_string())?;
    let mut guest = Guest::start(GUEST_MIB, "tick_ms=0")?;
    let weave = format!("loudly weave {WOVEN_MIB}\n");
    guest.serial.write_all(weave.as_bytes())?;
    guest.read_until(|said| said.contains("begun weave").then_some(()))?;
    guest.write(&path)?;
    drop(guest);

    let plain = || {
        let mut command = Command::new(&agent);
        command.args(["vm", "--config"]).arg(&config);
        command.arg("--no-jail").arg("--clone").arg(&path);
        command
    };
    let ahead = || {
        let mut command = plain();
        command.arg("--working-set").arg(&set);
        command
    };
    record(&mut ahead(), &set)?;
    let mut found = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        let cached = woven(&mut plain())?.0;
        forget(&path)?;
        let cold = woven(&mut plain())?.0;
        forget(&path)?;
        let fetched = woven(&mut ahead())?.0;
        for (found, value) in found.iter_mut().zip([cached, cold, fetched]) {
            found.push(ms(value));
        }
    }
    let names = ["woven-cached", "woven-cold", "woven-cold-ahead"];
    for (name, values) in names.into_iter().zip(found) {
        rows.add(format!("clone-{name}"), "ms", values, None);
    }
    Ok(())
}

/// How long it takes until the guest has written all over.
fn woven(command: &mut Command) -> anyhow::Result<(Duration, Running)> {
    let began = Instant::now();
    let mut running = Running::start_talking(command)?;
    running.ask("")?;
    Ok((began.elapsed(), running))
}

/// Has the first of them say what it touched.
fn record(command: &mut Command, set: &Path) -> anyhow::Result<()> {
    let _running = woven(command)?;
    let by = Instant::now() + PATIENCE;
    while !set.exists() {
        if Instant::now() > by {
            bail!("no working set was recorded");
        }
        // sleeps because it is recorded in a while, by a process that says nothing of it
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Nothing of the file is in the page cache.
fn forget(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}
