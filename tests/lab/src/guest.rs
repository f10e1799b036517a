//! The tiny variant of images/debian: Debian's stock cloud kernel, and an initial file system of
//! busybox, the kernel's modules and the scripts in `images/debian/tiny`. For tests that need Linux
//! but no distribution.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::archive::Archive;
use crate::debian::{cache, tree, used};
use crate::image::add_busybox;
use crate::modules;

const SCRIPTS: [(&str, u32, &[u8]); 5] = [
    (
        "init",
        0o755,
        include_bytes!("../../../images/debian/tiny/init"),
    ),
    (
        "etc/inittab",
        0o644,
        include_bytes!("../../../images/debian/tiny/inittab"),
    ),
    (
        "etc/acpi/PWRF/00000080",
        0o755,
        include_bytes!("../../../images/debian/tiny/power"),
    ),
    (
        "lib/tiny/shutdown",
        0o755,
        include_bytes!("../../../images/debian/tiny/shutdown"),
    ),
    (
        "lib/tiny/dhcp",
        0o755,
        include_bytes!("../../../images/debian/tiny/dhcp"),
    ),
];
/// Changes when these files make something else of the same packages and scripts.
const FORM: [&[u8]; 3] = [
    include_bytes!("guest.rs"),
    include_bytes!("image.rs"),
    include_bytes!("modules.rs"),
];

/// What a tiny guest boots.
#[derive(Debug, Clone)]
pub struct TinyGuest {
    /// A bzImage.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// As `uname -r` says it.
    pub release: String,
}

impl TinyGuest {
    /// Makes it, if it was not made before.
    pub fn make() -> Result<Self> {
        let debian = tree(&["--alone", "linux-image-cloud-amd64", "busybox-static"])?;
        let (release, kernel) = debian.kernel()?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(debian.versions()?.as_bytes());
        for part in SCRIPTS.iter().map(|(_, _, text)| *text).chain(FORM) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let name = format!("tiny-{}", &hasher.finalize().to_hex()[..16]);
        let initrd = cache()?.join(name);
        if !initrd.exists() {
            let new = tempfile::NamedTempFile::new_in(cache()?)?;
            let modules = debian.path("lib/modules").join(&release);
            write(
                new.reopen()?,
                &debian.path("bin/busybox"),
                &release,
                &modules,
            )?;
            new.persist(&initrd)?;
        }
        used("tiny-", &initrd)?;
        Ok(Self {
            kernel,
            initrd,
            release,
        })
    }
}

fn write(to: File, busybox: &Path, release: &str, modules: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(to));
    for folder in [
        "dev", "etc", "proc", "run", "sys", "tmp", "root", "var/log", "var/run",
    ] {
        archive.folder(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    add_busybox(&mut archive, "", busybox)?;
    for (name, mode, text) in SCRIPTS {
        archive.file(name, mode, text)?;
    }
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\n")?;
    modules::add(&mut archive, "", modules::TINY, busybox, release, modules)?;
    archive.finish()?;
    Ok(())
}
