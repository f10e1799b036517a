//! What we agreed not to do, as checks over the source tree. The build fails on a finding.
//!
//! Every check is a pure function over a [`Source`] (one Rust file) or over names, so that each has a
//! test that it can fail. The lists of what is allowed stand in [`rules`], with reasons. The checks
//! must never look at anything that git does not know: a build's leftovers are nobody's style.

pub mod checks;
pub mod rules;
pub mod source;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

pub use source::Source;

/// One thing that must not be, said so that a reader can go and change it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Relative to the checkout.
    pub path: String,
    /// From 1; 0 when it is about the whole file.
    pub line: usize,
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.what),
            line => write!(f, "{}:{line}: {}", self.path, self.what),
        }
    }
}

/// The top of the checkout that this crate was built in.
pub fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// Files that git tracks or would track, relative to `top`, that exist in the work tree.
pub fn files(top: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .current_dir(top)
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
        ])
        .output()
        .context("running git ls-files")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    }
    let mut names: Vec<String> = String::from_utf8(output.stdout)
        .context("a file name is not UTF-8")?
        .split_terminator('\0')
        .filter(|name| top.join(name).is_file())
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// All findings over the checkout at `top`, sorted.
pub fn findings(top: &Path) -> Result<Vec<Finding>> {
    let files = files(top)?;
    let mut found = checks::top_level(&files);
    for name in &files {
        if !(name.ends_with(".rs") || name.ends_with("Cargo.toml")) {
            continue;
        }
        let text = std::fs::read_to_string(top.join(name)).with_context(|| name.clone())?;
        if name.ends_with("Cargo.toml") {
            found.extend(checks::manifest(name, &text));
        } else {
            found.extend(checks::source(&Source::new(name, text)));
        }
    }
    found.sort();
    Ok(found)
}

/// Files longer than is comfortable, which fail nothing yet: `(path, lines)`.
pub fn uncomfortable(top: &Path) -> Result<Vec<(String, usize)>> {
    let mut long = Vec::new();
    for name in files(top)?.into_iter().filter(|name| name.ends_with(".rs")) {
        let lines = std::fs::read_to_string(top.join(&name))?.lines().count();
        if lines > rules::COMFORTABLE_FILE_LINES {
            long.push((name, lines));
        }
    }
    Ok(long)
}
