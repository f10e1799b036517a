//! Debian packages, unpacked into the cache by `scripts/debian-tree`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use fractus_tests::tidy::checkout;

use crate::segment::outside;

/// Packages that were unpacked.
#[derive(Debug, Clone)]
pub struct Tree {
    folder: PathBuf,
}

/// Unpacks packages, if that was not done before. `arguments` are those of `scripts/debian-tree`.
///
/// # Errors
/// With what apt said.
pub fn tree(arguments: &[&str]) -> Result<Tree> {
    let folder = script("scripts/debian-tree", arguments)?;
    Ok(Tree { folder })
}

/// A system that `images/debian/build` builds, if that was not done before: the folder of that variant.
pub fn variant(name: &str) -> Result<PathBuf> {
    script("images/debian/build", &[name])
}

/// Runs a script of the checkout; gives the path that it prints.
fn script(path: &str, arguments: &[&str]) -> Result<PathBuf> {
    let script = checkout().join(path);
    let output = outside(&script)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    if !output.status.success() {
        bail!(
            "{} {}: {}",
            script.display(),
            arguments.join(" "),
            output.status
        );
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Where the lab keeps what is dear to make: beside what the scripts keep.
pub fn cache() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let folder = from("FRACTUS_CACHE")
        .or_else(|| Some(from("XDG_CACHE_HOME")?.join("fractus")))
        .or_else(|| Some(from("HOME")?.join(".cache/fractus")))
        .unwrap_or_else(|| PathBuf::from("/root/.cache/fractus"))
        .join("lab");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}

/// What was made here some builds ago is not wanted again; a few of each kind are kept.
const KEPT: usize = 4;

/// To be called with each use of a thing in the cache whose name begins with `kind`: forgets those that
/// were not used for longest. What a running lab has open stays as long as it has it open.
pub fn used(kind: &str, thing: &Path) -> Result<()> {
    File::open(thing)?.set_modified(SystemTime::now())?;
    let entries = std::fs::read_dir(cache()?)?.flatten();
    let mut all: Vec<_> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(kind))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    all.sort();
    for (_, path) in all.iter().rev().skip(KEPT) {
        // Another test may do the same.
        let _ = std::fs::remove_file(path);
        let _ = std::fs::remove_dir_all(path);
    }
    Ok(())
}

impl Tree {
    pub fn path(&self, inside: &str) -> PathBuf {
        self.folder.join("tree").join(inside)
    }

    /// Names and versions of the packages, a line each.
    pub fn versions(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder.join("versions"))?)
    }

    /// The one kernel in it: release and file.
    pub fn kernel(&self) -> Result<(String, PathBuf)> {
        let boot = self.path("boot");
        let kernels = std::fs::read_dir(&boot)?.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name.strip_prefix("vmlinuz-")?.to_owned(), entry.path()))
        });
        let mut kernels: Vec<_> = kernels.collect();
        match kernels.pop() {
            Some(kernel) if kernels.is_empty() => Ok(kernel),
            _ => bail!("{}: not one kernel", boot.display()),
        }
    }

    /// Where a tree's libraries are.
    fn libraries(&self) -> [PathBuf; 3] {
        let folders = [
            "lib/x86_64-linux-gnu",
            "usr/lib/x86_64-linux-gnu",
            "usr/lib/x86_64-linux-gnu/pulseaudio",
        ];
        folders.map(|folder| self.path(folder))
    }

    /// The program that starts the tree's programs. Debian 12 has it in `/lib`, those after it in `/usr/lib`.
    ///
    /// # Errors
    /// There is none.
    pub fn loader(&self) -> Result<PathBuf> {
        let loaders = self
            .libraries()
            .map(|folder| folder.join("ld-linux-x86-64.so.2"));
        let found = loaders.into_iter().find(|loader| loader.exists());
        found.with_context(|| format!("{}: no ld-linux-x86-64.so.2", self.folder.display()))
    }

    /// Runs a program of the tree by the tree's own libraries.
    ///
    /// # Errors
    /// As [`Tree::loader`].
    pub fn command(&self, program: &Path) -> Result<Command> {
        let libraries = self.libraries().map(|folder| folder.display().to_string());
        let mut command = Command::new(self.loader()?);
        command
            .arg("--library-path")
            .arg(libraries.join(":"))
            .arg(program);
        Ok(command)
    }
}
