//! Ends what a test left, however the test ended.
//!
//! Machines' processes outlive their agent by design, so the kernel's parent-death signal does not
//! reach them. The guardian is a shell that waits for the end of a pipe which only the test holds;
//! then it kills every process in the control groups of this test's agents and under the user ids that
//! they gave to machines (a process is in its group before it has its user, and a host may have no
//! groups), takes the groups away, and removes the folder.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

const SCRIPT: &str = r#"
trap '' INT TERM HUP
first=$1 last=$2 folder=$3
cat >/dev/null
# The mark of each agent names its groups.
groups=()
for lock in "$folder"/*/state/lock; do
  read -r mark <"$lock" || [ -n "$mark" ] || continue
  while read -r group; do groups+=("$group"); done \
    < <(find /sys/fs/cgroup -depth -type d -path "*/fractus-${mark//-/}*" 2>/dev/null)
done
for turn in 1 2 3; do
  for group in "${groups[@]}"; do
    while read -r pid; do kill -9 "$pid" 2>/dev/null; done 2>/dev/null <"$group/cgroup.procs"
  done
  for status in /proc/[0-9]*/status; do
    uid=
    while read -r name real _; do [ "$name" = Uid: ] && uid=$real && break; done 2>/dev/null <"$status"
    [ -n "$uid" ] && [ "$uid" -ge "$first" ] && [ "$uid" -lt "$last" ] || continue
    pid=${status#/proc/}
    kill -9 "${pid%/status}" 2>/dev/null
  done
done
for group in "${groups[@]}"; do
  # The kernel lets go of an ended process a moment after its death.
  for turn in {1..250}; do rmdir "$group" 2>/dev/null; [ -d "$group" ] || break; sleep 0.02; done
done
[ -z "$KEEP" ] && rm -rf "$folder"
exit 0
"#;

/// Alive as long as the test is.
#[derive(Debug)]
pub struct Guardian(Child);

impl Guardian {
    pub fn start(users: &std::ops::Range<u32>, folder: &Path) -> Result<Self> {
        Command::new("bash")
            .args(["-c", SCRIPT, "guardian"])
            .args([users.start.to_string(), users.end.to_string()])
            .arg(folder)
            .env("KEEP", std::env::var_os("FRACTUS_KEEP").unwrap_or_default())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map(Self)
            .context("starting the guardian")
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
