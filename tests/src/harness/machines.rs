//! The machines' processes and control groups of a cloud, as the kernel sees them.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A process that runs under one of the user ids of this cloud's machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineProcess {
    pub pid: u32,
    pub user: u32,
    pub command: String,
}

/// All of them; zombies, which run nothing any more, are left out.
pub fn processes(users: &Range<u32>) -> Vec<MachineProcess> {
    let Ok(all) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    all.flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name))?;
                line.split_whitespace().nth(1).map(str::to_owned)
            };
            let user: u32 = field("Uid:")?.parse().ok()?;
            if !users.contains(&user) || field("State:")? == "Z" {
                return None;
            }
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            Some(MachineProcess { pid, user, command })
        })
        .collect()
}

/// Control groups of the agent with this state folder: its own, and those of its machines.
pub fn control_groups(state: &Path) -> Vec<PathBuf> {
    let mark = fs::read_to_string(state.join("lock")).unwrap_or_default();
    if mark.is_empty() {
        return Vec::new();
    }
    let name = format!("fractus-{}", mark.trim().replace('-', ""));
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
        if folder.iter().any(|part| part == name.as_str()) {
            found.push(folder);
        }
    }
    found
}
