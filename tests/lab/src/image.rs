//! The image of a host: Debian's stock kernel, and an initial file system with busybox, kernel modules
//! and the scripts in `host/`. What is under test is not in it (see [`crate::payload`]), so that it
//! changes seldom.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::archive::Archive;
use crate::debian::{cache, tree, used};
use crate::{kernel, modules};

const INIT: &[u8] = include_bytes!("../host/init");
const RUN: &[u8] = include_bytes!("../host/run");
const PUT: &[u8] = include_bytes!("../host/put");
const AGENT: &[u8] = include_bytes!("../host/agent");
const SYSTEMD: &[u8] = include_bytes!("../host/systemd");
const INITTAB: &[u8] = include_bytes!("../host/inittab");
/// Changes when this file makes something else of the same packages and scripts.
const FORM: &[u8] = include_bytes!("image.rs");
const MODULES: &[u8] = include_bytes!("modules.rs");

/// What kind of host one is: both boot the same image, and its disk makes the difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Busybox, which runs the agent by hand.
    #[default]
    Busybox,
    /// Debian with systemd, which runs it by our unit.
    Systemd,
}

/// What a host boots.
#[derive(Debug, Clone)]
pub struct HostImage {
    pub vmlinux: PathBuf,
    pub initrd: PathBuf,
    /// Of all that went into it.
    pub hash: String,
}

impl HostImage {
    /// Makes it, if it was not made before.
    pub fn make() -> Result<Self> {
        let debian = tree(&["--alone", "linux-image-amd64", "busybox-static"])?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(debian.versions()?.as_bytes());
        for part in [INIT, RUN, PUT, AGENT, SYSTEMD, INITTAB, FORM, MODULES] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let hash = hasher.finalize().to_hex()[..16].to_owned();
        let folder = cache()?.join(format!("host-{hash}"));
        let image = Self {
            vmlinux: folder.join("vmlinux"),
            initrd: folder.join("initrd"),
            hash,
        };
        if !folder.exists() {
            // Tests do this at once: each its own, the last to finish wins.
            let parent = cache()?;
            let new = tempfile::tempdir_in(&parent)?;
            let busybox = debian.path("bin/busybox");
            let (release, kernel) = debian.kernel()?;
            std::fs::write(new.path().join("vmlinux"), kernel::vmlinux(&kernel)?)?;
            let modules = debian.path("lib/modules").join(&release);
            write_initrd(&new.path().join("initrd"), &busybox, &release, &modules)?;
            if std::fs::rename(new.path(), &folder).is_ok() {
                let _ = new.keep();
            }
        }
        used("host-", &folder)?;
        Ok(image)
    }
}

fn write_initrd(to: &Path, busybox: &Path, release: &str, modules: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(to)?));
    // What leads to the root file system, /host.
    archive.copy("bin/busybox", 0o755, busybox)?;
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, INIT)?;
    // The root file system.
    for folder in ["dev", "proc", "sys", "run", "tmp", "var/lib", "opt", "root"] {
        archive.folder(&format!("host/{folder}"))?;
    }
    archive.character_device("host/dev/console", 5, 1)?;
    add_busybox(&mut archive, "host/", busybox)?;
    archive.link("host/bin/fractus-agent", "/opt/fractus-agent")?;
    archive.file("host/lab/init", 0o755, INIT)?;
    archive.file("host/lab/agent", 0o755, AGENT)?;
    archive.file("host/lab/systemd", 0o644, SYSTEMD)?;
    archive.file("host/lab/web/cgi-bin/run", 0o755, RUN)?;
    archive.file("host/lab/web/cgi-bin/put", 0o755, PUT)?;
    archive.file("host/etc/inittab", 0o644, INITTAB)?;
    archive.file("host/etc/passwd", 0o644, b"root::0:0:root:/:/bin/sh\n")?;
    archive.file("host/etc/group", 0o644, b"root:x:0:\n")?;
    modules::add(
        &mut archive,
        "host/",
        modules::HOST,
        busybox,
        release,
        modules,
    )?;
    archive.finish()?;
    Ok(())
}

/// Busybox, with a link for each thing that it can be.
pub fn add_busybox<W: Write>(archive: &mut Archive<W>, prefix: &str, busybox: &Path) -> Result<()> {
    archive.copy(&format!("{prefix}bin/busybox"), 0o755, busybox)?;
    let output = Command::new(busybox).arg("--list").output()?;
    let list = String::from_utf8(output.stdout)?;
    for applet in list.lines().filter(|name| *name != "busybox") {
        // Where the kernel looks for them.
        let folder = match applet {
            "init" | "modprobe" => "sbin",
            _ => "bin",
        };
        archive.link(&format!("{prefix}{folder}/{applet}"), "/bin/busybox")?;
    }
    Ok(())
}
