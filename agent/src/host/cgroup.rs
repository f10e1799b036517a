//! Control groups (v2) of machines: one a machine.
//!
//! Under systemd they are below those of a unit of their own, `fractus-machines.service`, which is delegated
//! and whose own process does nothing: below the agent's unit they would keep it from starting again, since
//! systemd puts a new process into its unit's own group, which the kernel refuses (EBUSY) while groups below
//! it have controllers. Elsewhere they are below the agent's group, and have the controllers that its parents
//! hand down, which is none as a rule. Where a host has no version 2 hierarchy the agent does without.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fractus_agent_api::machine::{MachineSpec, ServerId};

#[derive(Debug, Clone)]
pub struct Cgroups {
    /// Machines' groups are made in here.
    top: PathBuf,
    /// Of systemd's unit for machines.
    unit: Option<PathBuf>,
}

/// systemd's unit for machines, in the same slice as the agent's.
const MACHINES: &str = "fractus-machines.service";

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
        let group = mount.join(own);
        let unit = unit_of_machines(&group);
        let top = unit
            .as_ref()
            .unwrap_or(&group)
            .join(format!("fractus-{name}"));
        let groups = Self { top, unit };
        match groups.make() {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(None),
            made => made.map(|()| Some(groups)),
        }
    }

    fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.top)?;
        if let Some(unit) = &self.unit {
            vacate(unit)?;
            hand_down(unit);
        }
        // The agent's own group hands nothing down: with a process in it, threaded controllers would make
        // the groups below invalid (EOPNOTSUPP), the others be refused.
        hand_down(&self.top);
        Ok(())
    }

    /// Controllers that machines' groups do not have: those limits do not hold.
    pub fn absent(&self) -> Vec<&'static str> {
        let text = fs::read_to_string(self.top.join("cgroup.subtree_control")).unwrap_or_default();
        let given: Vec<&str> = text.split_whitespace().collect();
        CONTROLLERS
            .into_iter()
            .filter(|wanted| !given.contains(wanted))
            .collect()
    }

    pub fn path(&self, id: ServerId) -> PathBuf {
        self.top.join(id.to_string())
    }

    /// Makes the machine's group and puts the process in. Limits hold where the controller is.
    pub fn enter(&self, id: ServerId, pid: i32, spec: &MachineSpec) -> io::Result<()> {
        if !self.top.is_dir() {
            // systemd removes the group of a unit that ended, once nothing is in it.
            self.make()?;
        }
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

/// The group of systemd's unit for machines, beside that of the agent's own unit.
fn unit_of_machines(own: &Path) -> Option<PathBuf> {
    let unit = own.with_file_name(MACHINES);
    (own.extension()? == "service" && unit.is_dir()).then_some(unit)
}

/// Moves the unit's process out of the unit's own group, which must be empty to hand controllers down.
fn vacate(unit: &Path) -> io::Result<()> {
    let keeper = unit.join("keeper");
    fs::create_dir_all(&keeper)?;
    for pid in fs::read_to_string(unit.join("cgroup.procs"))?.split_whitespace() {
        match fs::write(keeper.join("cgroup.procs"), pid) {
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Gives the groups below this one the controllers that it has itself.
fn hand_down(group: &Path) {
    for controller in CONTROLLERS {
        // Some may be absent: what is, is told.
        let _ = fs::write(
            group.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
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

/// The most threads of a machine's group: its vCPUs, up to five a disk, one a pair of queues and one of
/// vhost-net's, those of devices that come later, and the process's own; twice, since another process may take the
/// machine over.
fn threads(spec: &MachineSpec) -> u64 {
    let vcpus = spec.max_vcpus.unwrap_or(0).max(spec.vcpus);
    let queues: u64 = spec.nics.iter().map(|nic| u64::from(nic.queues)).sum();
    2 * (u64::from(vcpus) + 5 * spec.disks.len() as u64 + 2 * queues + 64)
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
    fn machines_are_in_a_unit_of_their_own_where_there_is_one() {
        let slice = tempfile::tempdir().unwrap();
        let agent = slice.path().join("fractus-agent.service");
        assert_eq!(unit_of_machines(&agent), None);
        let machines = slice.path().join(MACHINES);
        std::fs::create_dir(&machines).unwrap();
        assert_eq!(unit_of_machines(&agent), Some(machines));
        // Somebody's shell, in the slice by chance.
        let session = slice.path().join("session-1.scope");
        assert_eq!(unit_of_machines(&session), None);
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

    /// A process that waits, ended with the test.
    struct Waits(std::process::Child);

    impl Drop for Waits {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn groups_that_systemd_removed_are_made_again() {
        let id = ServerId(uuid::Uuid::new_v4());
        let Some(groups) = Cgroups::of_this_process(&format!("test-{id}")).unwrap() else {
            println!("no control groups of version 2 here: not tested");
            return;
        };
        fs::remove_dir(&groups.top).unwrap();
        let spec = serde_json::json!({"vcpus": 2, "memory_mib": 64, "boot": {"command_line": ""}});
        let spec: MachineSpec = serde_json::from_value(spec).unwrap();
        let mut waits = std::process::Command::new("sleep");
        let waits = Waits(waits.arg("600").spawn().unwrap());
        groups.enter(id, waits.0.id().cast_signed(), &spec).unwrap();
        let group = fs::read_to_string(format!("/proc/{}/cgroup", waits.0.id())).unwrap();
        let ours = format!("/fractus-test-{id}/{id}");
        assert!(group.lines().any(|line| line.ends_with(&ours)), "{group}");
        drop(waits);
        groups.remove(id).await.unwrap();
        groups.close().unwrap();
        assert!(!groups.top.exists());
    }
}
