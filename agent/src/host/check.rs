//! `fractus-agent check`: what this host lacks for machines, and how to get it.

use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use super::huge_pages;
use crate::machine::process::nest;
use crate::paths::FallbackPaths;

/// How much a lack matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// No machine can run.
    Needed,
    /// Machines run, with less.
    Wanted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    pub weight: Weight,
    pub what: String,
    /// What an operator can do about it.
    pub remedy: &'static str,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.remedy)
    }
}

/// One thing that is looked at.
struct Check {
    name: &'static str,
    weight: Weight,
    remedy: &'static str,
    look: fn() -> Result<(), String>,
}

const CHECKS: &[Check] = &[
    Check {
        name: "root",
        weight: Weight::Needed,
        remedy: "run the agent as root; it gives each machine a user of its own",
        look: || match rustix::process::geteuid().is_root() {
            true => Ok(()),
            false => Err("not root".to_owned()),
        },
    },
    Check {
        name: "/dev/kvm",
        weight: Weight::Needed,
        remedy: "switch on VT-x or AMD-V in the firmware (or nested virtualisation), then `modprobe kvm_intel` or `modprobe kvm_amd`",
        look: || open_read_write("/dev/kvm"),
    },
    Check {
        name: "namespaces",
        weight: Weight::Needed,
        remedy: "use a kernel with CONFIG_PID_NS, CONFIG_NET_NS, CONFIG_IPC_NS and CONFIG_UTS_NS",
        look: || {
            let kinds = ["mnt", "pid", "net", "ipc", "uts"];
            let absent = kinds
                .into_iter()
                .find(|kind| !Path::new("/proc/self/ns").join(kind).exists());
            absent.map_or(Ok(()), |kind| Err(format!("no {kind} namespaces")))
        },
    },
    Check {
        name: "an empty root",
        weight: Weight::Needed,
        remedy: "run the agent from a root that is a mount of its own (no initramfs, no chroot), with room in user.max_mnt_namespaces",
        look: || nest::mounts().map(drop).map_err(|e| e.to_string()),
    },
    Check {
        name: "seccomp",
        weight: Weight::Needed,
        remedy: "use a kernel with CONFIG_SECCOMP_FILTER",
        look: || exists("/proc/sys/kernel/seccomp/actions_avail"),
    },
    Check {
        name: "Landlock",
        weight: Weight::Wanted,
        remedy: "add landlock to the kernel's lsm= list (CONFIG_SECURITY_LANDLOCK)",
        look: landlock,
    },
    Check {
        name: "control groups, version 2",
        weight: Weight::Wanted,
        remedy: "boot with systemd.unified_cgroup_hierarchy=1; without it machines have no limits of CPU and I/O",
        look: cgroup,
    },
    Check {
        name: "io_uring",
        weight: Weight::Wanted,
        remedy: "`sysctl kernel.io_uring_disabled=0`; without it disks use a slower way",
        look: || {
            rings_are_for_all(fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok())?;
            io_uring::IoUring::new(1)
                .map(drop)
                .map_err(|e| e.to_string())
        },
    },
    Check {
        name: "/dev/userfaultfd",
        weight: Weight::Wanted,
        remedy: "use Linux 6.1 or newer with CONFIG_USERFAULTFD; without it there is no lazy restore and no post-copy",
        look: || open_read_write("/dev/userfaultfd"),
    },
    Check {
        name: "huge pages",
        weight: Weight::Wanted,
        remedy: "`sysctl vm.nr_hugepages=N`; without them flavors that ask for huge pages cannot start",
        look: || match fs::read_to_string("/proc/sys/vm/nr_hugepages") {
            Ok(text) if text.trim() != "0" => Ok(()),
            _ => Err("none reserved".to_owned()),
        },
    },
    Check {
        name: "huge pages for shared memory",
        weight: Weight::Wanted,
        remedy: "`echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled`, which the agent does when it starts unless it is told --leave-host-settings; without it guests have pages of 4 KiB and many more page faults",
        look: || huge_pages::look(Path::new(huge_pages::SHMEM_ENABLED)),
    },
    Check {
        name: "a kernel for disks that only Linux reads",
        weight: Weight::Wanted,
        remedy: "`images/fallback/build`, and put what it prints into /usr/share/fractus/fallback; without it servers whose /boot is on XFS, btrfs or LVM cannot start from their image alone",
        look: || {
            let paths = [FallbackPaths::packaged(), FallbackPaths::of_default_state()];
            match paths
                .iter()
                .any(|paths| paths.kernel.exists() && paths.initrd.exists())
            {
                true => Ok(()),
                false => Err("not there".to_owned()),
            }
        },
    },
    Check {
        name: "/dev/vhost-net",
        weight: Weight::Wanted,
        remedy: "`modprobe vhost_net`; without it networks cost more CPU",
        look: || exists("/dev/vhost-net"),
    },
];

fn exists(path: &str) -> Result<(), String> {
    if Path::new(path).exists() {
        Ok(())
    } else {
        Err("not there".to_owned())
    }
}

fn open_read_write(path: &str) -> Result<(), String> {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
        .map_err(|e| e.to_string())
}

/// Also for a machine's user, as who we are not here: 1 is for root only. The switch came with Linux
/// 6.6; rings are older.
fn rings_are_for_all(switch: Option<String>) -> Result<(), String> {
    match switch.as_deref().map(str::trim) {
        None | Some("0") => Ok(()),
        Some(switch) => Err(format!("kernel.io_uring_disabled is {switch}")),
    }
}

/// Asks the kernel for the version of Landlock that it has switched on.
fn landlock() -> Result<(), String> {
    use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .map(drop)
        .map_err(|e| e.to_string())
}

fn cgroup() -> Result<(), String> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .map_err(|_| "version 1, or none, is mounted".to_owned())?;
    let absent = ["cpu", "memory", "io", "pids"].into_iter().find(|wanted| {
        !controllers
            .split_whitespace()
            .any(|controller| controller == *wanted)
    });
    absent.map_or(Ok(()), |controller| {
        Err(format!("no controller {controller}"))
    })
}

/// What is not there, the gravest first.
pub fn lacks() -> Vec<Lack> {
    let mut lacks: Vec<Lack> = results()
        .into_iter()
        .filter_map(|(_, result)| result.err())
        .collect();
    lacks.sort_by_key(|lack| lack.weight);
    lacks
}

fn results() -> Vec<(&'static str, Result<(), Lack>)> {
    let look = |check: &Check| {
        let lack = |detail| Lack {
            weight: check.weight,
            what: format!("{} ({detail})", check.name),
            remedy: check.remedy,
        };
        (check.name, (check.look)().map_err(lack))
    };
    CHECKS.iter().map(look).collect()
}

/// For people. Says whether machines can run here.
pub fn print(mut out: impl std::io::Write) -> std::io::Result<bool> {
    let mut able = true;
    for (name, result) in results() {
        match result {
            Ok(()) => writeln!(out, "  ok       {name}")?,
            Err(lack) => {
                let word = match lack.weight {
                    Weight::Needed => "MISSING",
                    Weight::Wanted => "lacks",
                };
                able &= lack.weight != Weight::Needed;
                writeln!(
                    out,
                    "  {word:<8} {}\n           -> {}",
                    lack.what, lack.remedy
                )?;
            }
        }
    }
    writeln!(
        out,
        "{}",
        if able {
            "machines can run here"
        } else {
            "no machine can run here"
        }
    )?;
    Ok(able)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_that_only_root_may_make_are_none_for_machines() {
        let switch = |text: &str| rings_are_for_all(Some(text.to_owned()));
        assert!(
            switch("1\n")
                .unwrap_err()
                .contains("io_uring_disabled is 1")
        );
        assert!(switch("2\n").is_err());
        assert!(switch("0\n").is_ok() && rings_are_for_all(None).is_ok());
    }

    #[test]
    fn every_lack_says_what_to_do() {
        for lack in lacks() {
            assert!(lack.remedy.len() > 10, "{lack}");
        }
        let mut text = Vec::new();
        print(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(CHECKS.iter().all(|check| text.contains(check.name)));
    }
}
