//! QEMU inside a host, with the host's KVM: what the same guest does there is what ours is compared with.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::archive::Archive;
use crate::debian::{cache, used};
use crate::host::Host;
use crate::qemu;

/// Where it lies in a host: on the host's own disk, its memory is small.
const FOLDER: &str = "/var/lib/fractus-agent/peer";
/// What the firmware of the machine types that are compared with consists of.
const FIRMWARE: [&str; 7] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/seabios/vgabios-stdvga.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/kvmvapic.bin",
];

/// A QEMU in a host.
#[derive(Debug)]
pub struct Peer {
    /// The beginning of its command line.
    pub command: String,
}

impl Peer {
    /// Brings the program there, with all that it needs.
    pub fn bring(host: &Host) -> Result<Self> {
        let archive = std::fs::read(archive()?)?;
        host.done(&format!("mkdir -p {FOLDER}"))?;
        host.put(&format!("{FOLDER}/archive"), 0o644, &archive)?;
        host.done(&format!(
            "cd {FOLDER} && cpio -idu <archive 2>&1 && rm archive"
        ))?;
        Ok(Self {
            command: format!(
                "{FOLDER}/ld.so --library-path {FOLDER}/lib {FOLDER}/qemu -L {FOLDER}/share \
                 -accel kvm -nodefaults -no-user-config -display none -no-reboot"
            ),
        })
    }
}

/// The program, its libraries, and the firmware.
fn archive() -> Result<PathBuf> {
    let package = qemu::package()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(package.versions()?.as_bytes());
    hasher.update(include_bytes!("peer.rs"));
    let file = cache()?.join(format!("peer-{}", &hasher.finalize().to_hex()[..16]));
    if !file.exists() {
        let new = tempfile::NamedTempFile::new_in(cache()?)?;
        let program = package.path("usr/bin/qemu-system-x86_64");
        let loader = package.loader()?;
        let mut archive = Archive::new(std::io::BufWriter::new(new));
        archive.copy("qemu", 0o755, &program)?;
        archive.copy("ld.so", 0o755, &loader)?;
        for library in libraries()? {
            let name = library.file_name().context("a library's name")?;
            archive.copy(&format!("lib/{}", name.to_string_lossy()), 0o644, &library)?;
        }
        for path in FIRMWARE {
            let from = package.path(path);
            // Which of them there are depends on the version.
            if let (true, Some(name)) = (from.exists(), from.file_name()) {
                archive.copy(&format!("share/{}", name.to_string_lossy()), 0o644, &from)?;
            }
        }
        archive.finish()?.into_inner()?.persist(&file)?;
    }
    used("peer-", &file)?;
    Ok(file)
}

/// As the package's own dynamic linker finds them.
fn libraries() -> Result<BTreeSet<PathBuf>> {
    let package = qemu::package()?;
    let program = package.path("usr/bin/qemu-system-x86_64");
    let output = package
        .command(&program)?
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    let libraries: BTreeSet<_> = paths.map(PathBuf::from).collect();
    anyhow::ensure!(!libraries.is_empty(), "no libraries of QEMU: {text}");
    Ok(libraries)
}
