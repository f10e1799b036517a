//! What is under test, on a disk that a host unpacks when it gets its identity: the agent, and the
//! libraries that it needs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::archive::Archive;
use crate::debian::{cache, used};

/// For hosts with systemd.
const UNITS: [(&str, &[u8]); 2] = [
    (
        "opt/units/fractus-agent.service",
        include_bytes!("../../../agent/fractus-agent.service"),
    ),
    (
        "opt/units/fractus-machines.service",
        include_bytes!("../../../agent/fractus-machines.service"),
    ),
];

/// Makes the disk for this agent, if it was not made before.
pub fn make(agent: &Path) -> Result<PathBuf> {
    let bytes = std::fs::read(agent).with_context(|| {
        format!(
            "{}: build it first, cargo build --workspace --bins",
            agent.display()
        )
    })?;
    let mut hasher = blake3::Hasher::new();
    for (name, unit) in UNITS {
        hasher.update(name.as_bytes());
        hasher.update(unit);
    }
    hasher.update(&bytes);
    let hash = hasher.finalize().to_hex();
    let disk = cache()?.join(format!("payload-{}", &hash[..16]));
    if !disk.exists() {
        let new = tempfile::NamedTempFile::new_in(cache()?)?;
        let mut archive = Archive::new(BufWriter::new(new));
        let stripped = stripped(agent)?;
        archive.copy("opt/fractus-agent", 0o755, &stripped)?;
        for (name, unit) in UNITS {
            archive.file(name, 0o644, unit)?;
        }
        for library in libraries(agent)? {
            let name = library.display().to_string();
            archive.copy(name.trim_start_matches('/'), 0o755, &library)?;
        }
        let new = archive.finish()?.into_inner()?;
        fill(new.as_file())?;
        new.persist(&disk)?;
    }
    used("payload-", &disk)?;
    Ok(disk)
}

/// A copy without debug information: development builds are mostly names and line numbers, and the host's
/// memory is small.
pub fn stripped(agent: &Path) -> Result<tempfile::TempPath> {
    let to = tempfile::NamedTempFile::new()?.into_temp_path();
    let done = Command::new("strip").arg("-o").arg(&to).arg(agent).status();
    if !done.is_ok_and(|status| status.success()) {
        std::fs::copy(agent, &to)?;
    }
    Ok(to)
}

/// As the dynamic linker finds them here.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8(output.stdout)?;
    let words = text.split_whitespace();
    let paths: Vec<_> = words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect();
    if paths.is_empty() {
        bail!("ldd {}: {text}", program.display());
    }
    Ok(paths)
}

/// A disk has whole sectors.
fn fill(mut disk: &File) -> Result<()> {
    let size = disk.metadata()?.len();
    let more = size.next_multiple_of(1 << 20) - size;
    disk.write_all(&vec![0; usize::try_from(more)?])?;
    Ok(())
}
