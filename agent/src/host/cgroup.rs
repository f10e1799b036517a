//! Control groups (v2) of machines: one a machine, below the agent's own.
//!
//! Under systemd the agent's group is delegated to it (`Delegate=yes`); a leaf `agent` takes the agent
//! itself, so that the controllers can be handed down. Where a host has no version 2 hierarchy the
//! agent does without and says so in its inventory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fractus_agent_api::machine::{MachineSpec, ServerId};

#[derive(Debug, Clone)]
pub struct Cgroups {
    /// Machines' groups are made in here.
    top: PathBuf,
}

/// Controllers wanted for machines; the hierarchy works for holding and killing without them.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];

impl Cgroups {
    /// The group of this process in the v2 hierarchy, made ready; `None` when there is none.
    /// `name` keeps agents of one host apart.
    pub fn of_this_process(name: &str) -> io::Result<Option<Self>> {
        let Some(mount) = mount(&fs::read_to_string("/proc/self/mountinfo")?) else {
            return Ok(None);
        };
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
            return Ok(None);
        };
        // After an agent's restart in the same unit it is in its leaf already.
        let own = own.strip_suffix("/agent").unwrap_or(own);
        let group = mount.join(own);
        let top = group.join(format!("fractus-{name}"));
        match fs::create_dir_all(&top) {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => return Ok(None),
            other => other?,
        }
        if own.ends_with(".service") {
            let leaf = group.join("agent");
            fs::create_dir_all(&leaf)?;
            fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())?;
        }
        for folder in [&group, &top] {
            for controller in CONTROLLERS {
                // Some may be absent, or the group may hold processes of others: do without.
                let _ = fs::write(
                    folder.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
        }
        Ok(Some(Self { top }))
    }

    /// Controllers that machines' groups do have.
    pub fn controllers(&self) -> Vec<String> {
        let text = fs::read_to_string(self.top.join("cgroup.controllers")).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    pub fn path(&self, id: ServerId) -> PathBuf {
        self.top.join(id.to_string())
    }

    /// Makes the machine's group and puts the process in. Limits hold where the controller is.
    pub fn enter(&self, id: ServerId, pid: i32, spec: &MachineSpec) -> io::Result<()> {
        let group = self.path(id);
        fs::create_dir_all(&group)?;
        set(&group, "pids.max", threads(spec))?;
        self.limit(id, spec.vcpus, spec.memory_mib)?;
        fs::write(group.join("cgroup.procs"), pid.to_string())
    }

    /// What a machine of that size may use. Waits while the kernel takes back what is over it.
    pub fn limit(&self, id: ServerId, vcpus: u8, memory_mib: u64) -> io::Result<()> {
        let group = self.path(id);
        set(&group, "memory.max", memory(memory_mib))?;
        set(&group, "cpu.weight", (u64::from(vcpus) * 100).min(10_000))
    }

    /// Removes the machine's group; its process has ended.
    pub async fn remove(&self, id: ServerId) -> io::Result<()> {
        let group = self.path(id);
        for _ in 0..50 {
            match fs::remove_dir(&group) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                // The kernel lets go of an ended process a moment after it was reaped.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error),
            }
        }
        fs::remove_dir(&group)
    }

    /// Removes the groups in which no process is, and the agent's part of the hierarchy if that was all.
    pub fn close(&self) -> io::Result<()> {
        for group in fs::read_dir(&self.top)?.flatten() {
            // Files are no groups, and a group with a process in it is busy: both stay.
            let _ = fs::remove_dir(group.path());
        }
        fs::remove_dir(&self.top)
    }
}

/// Where the controller is.
fn set(group: &Path, file: &str, limit: u64) -> io::Result<()> {
    let file = group.join(file);
    match file.exists() {
        true => fs::write(file, limit.to_string()),
        false => Ok(()),
    }
}

/// The most threads of a machine's group: its vCPUs, up to five a disk, one a pair of queues, those of
/// devices that come later, and the process's own.
fn threads(spec: &MachineSpec) -> u64 {
    let vcpus = spec.max_vcpus.unwrap_or(0).max(spec.vcpus);
    let queues: u64 = spec.nics.iter().map(|nic| u64::from(nic.queues)).sum();
    u64::from(vcpus) + 5 * spec.disks.len() as u64 + queues + 64
}

/// The most that a machine's group may use, bytes: the guest's memory, the tables that grow with it
/// (8 bytes a page of 4 KiB on each of the guest's and the process's side, and KVM's own), and room
/// for the process and its page cache.
fn memory(mib: u64) -> u64 {
    let guest = mib << 20;
    guest + guest / 64 + (512 << 20)
}

/// Where the v2 hierarchy is mounted, writable.
fn mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let path = mount.split(' ').nth(4)?;
        file_system
            .starts_with("cgroup2 ")
            .then(|| Path::new(path).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_of_any_size_has_room_for_the_tables_of_its_memory() {
        for memory_mib in [64, 4 << 10, 1 << 20] {
            let guest = memory_mib << 20;
            // Page tables of the process and of KVM, and room for the process itself and its disks' cache.
            let least = guest + guest / 4096 * 16 + (256 << 20);
            let most = guest + guest / 32 + (1 << 30);
            let given = super::memory(memory_mib);
            assert!((least..most).contains(&given), "{memory_mib} MiB: {given}");
        }
    }

    #[test]
    fn the_second_version_is_found_beside_the_first() {
        let text = "30 20 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    31 20 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n";
        assert_eq!(mount(text).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(
            mount("30 20 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"),
            None
        );
    }
}
