//! A host that was booted once and saved while it waits for its identity; each test restores it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::debian::{cache, used};
use crate::host::Running;
use crate::image::HostImage;
use crate::mended;
use crate::monitor::Monitor;
use crate::qemu::{self, Files};
use crate::segment::Segment;

/// Longest wait for a boot, on a machine that does much else.
const BOOTS: Duration = Duration::from_secs(120);
const SAVES: Duration = Duration::from_secs(60);
/// No host has this number.
const NUMBER: u8 = 240;

/// The file with the host's state; made if it is not there. `image` and command line are in its name.
pub fn ensure(image: &HostImage, segment: &Segment) -> Result<PathBuf> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(image.hash.as_bytes());
    hasher.update(mended::hash(&qemu::package()?)?.as_bytes());
    for argument in qemu::shape(image)? {
        hasher.update(argument.as_bytes());
    }
    let name = format!("saved-{}", &hasher.finalize().to_hex()[..16]);
    let file = cache()?.join(&name);
    // One test makes it, others wait for it.
    let lock = File::create(cache()?.join("saving.lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    if !file.exists() {
        let new = cache()?.join(format!("{name}.new"));
        save(image, segment, &new).context("booting and saving a host")?;
        std::fs::rename(&new, &file)?;
    }
    used("saved-", &file)?;
    Ok(file)
}

fn save(image: &HostImage, segment: &Segment, to: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    // Disks that nobody looks at.
    let files = Files {
        folder: folder.path().to_path_buf(),
        payload: folder.path().join("payload"),
        state: folder.path().join("state"),
    };
    for disk in [&files.payload, &files.state] {
        File::create(disk)?.set_len(1 << 20)?;
    }
    let ports = segment.ports(NUMBER)?;
    let mut running = Running::start(image, &files, &ports, None)?;
    running.until_ready(BOOTS)?;
    let _ = std::fs::remove_file(to);
    let monitor = &mut running.monitor;
    monitor.execute("stop", json!({}))?;
    set_capabilities(monitor)?;
    let uri = format!("file:{}", to.display());
    monitor.execute("migrate", json!({"uri": uri}))?;
    monitor.migration_ends(SAVES)
}

/// Restores into a QEMU that was started with `-incoming defer`; its processors stand still after.
pub fn restore(monitor: &mut Monitor, from: &Path) -> Result<()> {
    set_capabilities(monitor)?;
    let uri = format!("file:{}", from.display());
    monitor.execute("migrate-incoming", json!({"uri": uri}))?;
    monitor.migration_ends(SAVES)
}

fn set_capabilities(monitor: &mut Monitor) -> Result<()> {
    let on = |name| json!({"capability": name, "state": true});
    let capabilities = json!({"capabilities": [on("mapped-ram"), on("events")]});
    monitor.execute("migrate-set-capabilities", capabilities)?;
    Ok(())
}
