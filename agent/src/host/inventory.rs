//! What the host has: processors, memory, disk, load, and what it lacks.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use fractus_agent_api::cpu::Cpu;
use fractus_agent_api::host::{CpuReport, HostReport};
use fractus_vmm::cpu::offered;
use fractus_vmm::kvm::Hypervisor;
use fractus_vmm::memory::Faults;
use rustix::fs::statvfs;

use super::check;
use crate::machine::process::identity::boot_id;

/// What does not change while the agent lives is read once.
#[derive(Debug, Clone)]
pub struct Inventory {
    cpu: CpuReport,
    /// Of guests; none: KVM has not said it yet.
    guest: Arc<Mutex<Option<Box<Cpu>>>>,
    boot_id: uuid::Uuid,
    lacks: Vec<String>,
    /// What was needed and not there at the last look.
    unable: Arc<Mutex<Vec<String>>>,
    post_copy: bool,
    disks: std::path::PathBuf,
}

impl Inventory {
    /// `disks` is the folder that holds machines' disks.
    pub fn new(disks: &Path) -> io::Result<Self> {
        let (unable, lacks): (Vec<_>, Vec<_>) = check::lacks()
            .into_iter()
            .partition(|lack| lack.weight == check::Weight::Needed);
        let words = |lacks: Vec<check::Lack>| lacks.iter().map(ToString::to_string).collect();
        let guest = guest_cpu();
        if guest.is_none() {
            tracing::warn!("KVM does not say yet what CPU its guests have");
        }
        Ok(Self {
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo")?),
            guest: Arc::new(Mutex::new(guest)),
            boot_id: boot_id()?,
            lacks: words(lacks),
            unable: Arc::new(Mutex::new(words(unable))),
            post_copy: Faults::open().is_ok(),
            disks: disks.to_owned(),
        })
    }

    pub fn report(&self) -> HostReport {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let (disk_gib, disk_free_gib) = disk(&self.disks).unwrap_or((0, 0));
        HostReport {
            version: fractus_agent_api::VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            boot_id: self.boot_id,
            cpus: self.cpu.sockets * self.cpu.cores * self.cpu.threads,
            memory_mib: kib(&memory, "MemTotal:") >> 10,
            memory_free_mib: kib(&memory, "MemAvailable:") >> 10,
            disk_gib,
            disk_free_gib,
            cpu: CpuReport {
                guest: self.guest(),
                ..self.cpu.clone()
            },
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            load: loads(&load),
            uptime_s: uptime
                .split('.')
                .next()
                .and_then(|s| s.parse().ok())
                .unwrap_or(0),
            lacks: self.lacks.clone(),
            unable: self.unable(),
            post_copy: self.post_copy,
        }
    }
}

impl Inventory {
    /// Looked at again while there is something: no server comes here to find out that it is mended.
    fn unable(&self) -> Vec<String> {
        let mut unable = self.unable.lock().unwrap_or_else(PoisonError::into_inner);
        if !unable.is_empty() {
            let needed = check::lacks();
            let needed = needed
                .iter()
                .filter(|lack| lack.weight == check::Weight::Needed);
            *unable = needed.map(ToString::to_string).collect();
        }
        unable.clone()
    }

    /// Asked again while there is none: /dev/kvm may come late.
    fn guest(&self) -> Option<Box<Cpu>> {
        let mut guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        if guest.is_none() {
            *guest = guest_cpu();
        }
        guest.clone()
    }
}

/// What KVM gives guests; none where there is no KVM, which is among what the host lacks.
fn guest_cpu() -> Option<Box<Cpu>> {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    let hypervisor = Hypervisor::open(kvm.ok()?.into());
    match hypervisor.and_then(|hypervisor| offered(&hypervisor)) {
        Ok(cpu) => Some(Box::new(cpu)),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::debug!(error, "KVM does not say what CPU its guests have");
            None
        }
    }
}

fn disk(path: &Path) -> io::Result<(u64, u64)> {
    let about = statvfs(path)?;
    Ok((
        (about.f_blocks * about.f_frsize) >> 30,
        (about.f_bavail * about.f_frsize) >> 30,
    ))
}

fn kib(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn loads(loadavg: &str) -> [f64; 3] {
    let mut loads = [0.0; 3];
    for (load, text) in loads.iter_mut().zip(loadavg.split_whitespace()) {
        *load = text.parse().unwrap_or(0.0);
    }
    loads
}

/// From /proc/cpuinfo. `cores` is a socket's, `threads` a core's; sockets × cores × threads is the
/// count of processors.
fn cpu(cpuinfo: &str) -> CpuReport {
    let values = |name: &str| -> Vec<String> {
        let of = |line: &str| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        };
        cpuinfo.lines().filter_map(of).collect()
    };
    let first = |name: &str| values(name).into_iter().next().unwrap_or_default();
    let processors = (values("processor").len() as u32).max(1);
    let sockets = (values("physical id").iter().collect::<BTreeSet<_>>().len() as u32).max(1);
    let cores = first("cpu cores").parse().unwrap_or(1).max(1);
    let cores = if processors.is_multiple_of(sockets * cores) {
        cores
    } else {
        processors / sockets
    };
    CpuReport {
        architecture: std::env::consts::ARCH.to_owned(),
        vendor: first("vendor_id"),
        model: first("model name"),
        sockets,
        cores: cores.max(1),
        threads: (processors / (sockets * cores.max(1))).max(1),
        features: first("flags")
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        guest: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_what_every_host_has() {
        let inventory = Inventory::new(Path::new("/")).unwrap();
        // As where /dev/kvm came late.
        *inventory.guest.lock().unwrap() = None;
        let report = inventory.report();
        let online = std::thread::available_parallelism().unwrap().get() as u32;
        assert!(report.cpus >= online);
        assert!(report.memory_mib > 100 && report.memory_free_mib <= report.memory_mib);
        assert!(report.disk_gib >= report.disk_free_gib);
        assert!(!report.cpu.features.is_empty() && report.uptime_s > 0);
        if Path::new("/dev/kvm").exists() {
            let guest = report.cpu.guest.unwrap();
            assert_eq!(guest.offers.vendor, report.cpu.vendor);
            assert!(guest.offers.physical_bits >= 36 && guest.offers.xcr0 & 0b11 == 0b11);
            assert!(guest.offers.features().contains(&"sse2".to_owned()));
        }
    }

    #[test]
    fn sockets_cores_and_threads_multiply_to_the_processors() {
        let one = |n: u32, socket: u32| {
            format!(
                "processor\t: {n}\nvendor_id\t: X\nphysical id\t: {socket}\ncpu cores\t: 2\nflags\t\t: a b\n\n"
            )
        };
        let text: String = (0..8).map(|n| one(n, n / 4)).collect();
        let cpu = cpu(&text);
        assert_eq!((cpu.sockets, cpu.cores, cpu.threads), (2, 2, 2));
        assert_eq!(cpu.features, ["a", "b"]);
    }
}
