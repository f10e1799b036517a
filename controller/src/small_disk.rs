//! For tests: a disk of 8 MiB.
//!
//! The disk is a small tmpfs. Only a process with mounts of its own may have one and leave nothing
//! behind, so a test starts itself again in a namespace, with that tmpfs as its folder for all that is
//! temporary.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

/// Set in the process that has the small disk.
const INSIDE: &str = "FRACTUS_TEST_SMALL_DISK";

/// True in the process with the small disk; elsewhere runs the test of this name and module
/// (`module_path!()`) there, and fails when it does.
pub fn on_a_small_disk(module: &str, test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let (_, below) = module.split_once("::").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=8m,mode=700 tmpfs \"$TMPDIR\" && exec \"$0\" \"$@\"";
    let ran = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{below}::{test}"), "--nocapture"])
        .env("TMPDIR", folder.path())
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = [ran.stdout, ran.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(ran.status.success(), "{said}");
    assert!(
        said.contains("1 passed"),
        "no test of that name ran: {said}"
    );
    false
}

/// Takes all room that the disk has; gives it back when dropped.
pub struct Filler(PathBuf);

impl Filler {
    pub fn new() -> Self {
        let path = std::env::temp_dir().join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        for size in [1 << 16, 1] {
            let error = loop {
                if let Err(error) = file.write_all(&vec![1; size]) {
                    break error;
                }
            };
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        }
        Self(path)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // A test that fails already has said why.
        let _ = std::fs::remove_file(&self.0);
    }
}
