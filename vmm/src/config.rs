//! What a machine is: [`MachineConfig`] (plain data, travels with the machine when it migrates) and
//! [`MachineFiles`] (open descriptors, belong to one process).
//!
//! Owns validation: a config that passed [`MachineConfig::validate`] can be built on any host that has
//! the resources. It must never name a host path.

use std::fs::File;
use std::os::fd::OwnedFd;

use fractus_cpuid::{Leaf, Level, Profile};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::layout::COMMAND_LINE_MAX;

mod net;

pub use net::{MAX_ADDRESSES, MIN_MTU, NetConfig, NetFiles, NetLimit};

pub const MAX_VCPUS: u8 = 64;
/// Least and most RAM of a machine, bytes.
pub const MIN_MEMORY: u64 = 2 << 20;
pub const MAX_MEMORY: u64 = 4 << 40;
pub const MAX_DISKS: usize = 16;
/// virtio-console ports of a machine, besides the serial line.
pub const MAX_CONSOLE_PORTS: usize = 16;
/// virtio-blk's serial number field (virtio 1.2 §5.2.6: VIRTIO_BLK_T_GET_ID), bytes.
pub const MAX_SERIAL_NUMBER: usize = 20;
pub const MAX_QUEUES: u16 = 16;
pub const MAX_NETS: usize = 8;
/// Pairs of queues of networks that come while the machine runs.
pub const MAX_HOT_NETS: u8 = 16;
/// What hot memory comes and goes in, bytes.
pub const HOT_BLOCK: u64 = 2 << 20;
/// Least context id of a guest: 0 to 2 are reserved (virtio 1.2 §5.10.4), as is the last one (any).
pub const MIN_CID: u32 = 3;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Shown to the guest (VMGENID and SMBIOS when they exist) and part of every saved state.
    pub uuid: Uuid,
    pub cpus: CpuConfig,
    pub memory: MemoryConfig,
    /// Where kernel and initrd come from.
    #[serde(default)]
    pub boot: BootSource,
    /// Kernel command line, handed to the kernel as it is; no NUL bytes. With a boot from a disk it
    /// is put behind the one that is found there.
    #[serde(default)]
    pub command_line: String,
    /// In the order of `MachineFiles::disks`.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// How many disks more than these may come while the machine runs, at a time.
    #[serde(default)]
    pub hot_disks: u8,
    /// Ports of one virtio-console, in the order of `MachineFiles::console_ports`; none: no device.
    #[serde(default)]
    pub console_ports: Vec<ConsolePortConfig>,
    #[serde(default)]
    pub rng: Option<RngConfig>,
    /// In the order of `MachineFiles::nets`.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// How many pairs of network queues more than these may come while the machine runs, at a time.
    /// A network of two pairs takes two.
    #[serde(default)]
    pub hot_nets: u8,
    /// Memory that comes and goes while the machine runs, besides `memory`.
    #[serde(default)]
    pub hot_memory: Option<HotMemoryConfig>,
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Sockets between the guest and programs of the host, by `MachineFiles::vsock`.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    #[serde(default)]
    pub watchdog: Option<WatchdogConfig>,
    /// The pvpanic port, by which a guest's kernel reports that it panicked.
    #[serde(default = "yes")]
    pub pvpanic: bool,
}

fn yes() -> bool {
    true
}

/// Where kernel and initrd come from, at the start and at every reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootSource {
    /// From the descriptors in [`MachineFiles`].
    #[default]
    Files,
    /// From what the boot configuration on this disk (from 0) says.
    Disk(usize),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CpuConfig {
    /// 1 to [`MAX_VCPUS`]. What is wanted: changes while the machine runs, and counts from its next
    /// reset on in any case.
    pub count: u8,
    /// The most that there can ever be (at least `count`): the machine has threads and KVM vCPUs for as
    /// many from its start, and vCPUs can come and go. `None`: `count`, and none do.
    #[serde(default)]
    pub max: Option<u8>,
    #[serde(default)]
    pub profile: CpuProfile,
    /// Host CPUs to pin to: vCPU n runs on `host_cpus[n % len]`; empty: anywhere.
    #[serde(default)]
    pub host_cpus: Vec<u32>,
}

/// What the guest's CPU is. A machine keeps it for its life.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuProfile {
    /// All that KVM supports on this host, and on the next one what that supports.
    #[default]
    Host,
    /// x86-64-v2 of the psABI (SSE4.2, POPCNT, CMPXCHG16B), on any host of the last 12 years.
    X86_64V2,
    /// x86-64-v3 of the psABI (AVX2, BMI, FMA, MOVBE).
    X86_64V3,
    /// Of a machine that starts: what the host has of this, without which it does not start.
    Custom(Box<Profile>),
    /// What such a machine has from then on, on whatever host.
    Kept(Box<KeptCpu>),
}

/// A guest's CPUID, but for what tells its vCPUs apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptCpu {
    pub leaves: Vec<Leaf>,
    /// None: its first host had no steady one.
    pub tsc_khz: Option<u32>,
}

impl CpuProfile {
    /// `host`, `x86-64-v2`, `x86-64-v3`, as the agent's wire type names them.
    pub fn by_name(name: &str) -> Option<CpuProfile> {
        match Level::by_name(name) {
            Some(Level::V2) => Some(CpuProfile::X86_64V2),
            Some(Level::V3) => Some(CpuProfile::X86_64V3),
            None => (name == "host").then_some(CpuProfile::Host),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Bytes; a multiple of the page size and at least [`MIN_MEMORY`].
    pub bytes: u64,
    #[serde(default)]
    pub pages: PageSize,
    /// Host NUMA nodes to bind to; empty: anywhere.
    #[serde(default)]
    pub host_nodes: Vec<u32>,
}

impl CpuConfig {
    /// How many vCPUs there can be.
    pub fn most(&self) -> u8 {
        self.max.unwrap_or(self.count)
    }
}

/// Memory that comes and goes by virtio-mem, in blocks of [`HOT_BLOCK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotMemoryConfig {
    /// The most that there can be, bytes; whole blocks. What is not plugged costs address space only.
    pub max: u64,
    /// What the host wishes plugged, bytes, at most `max`; whole blocks.
    #[serde(default)]
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 4 KiB, with huge pages where the kernel finds them (the host must allow `advise` or `always`
    /// in /sys/kernel/mm/transparent_hugepage/shmem_enabled to have any effect).
    #[default]
    Transparent,
    Huge2MiB,
    Huge1GiB,
}

impl PageSize {
    /// Bytes of the pages that memory is handed out in, and so the unit of tracking.
    pub const fn bytes(self) -> u64 {
        match self {
            PageSize::Small | PageSize::Transparent => 4 << 10,
            PageSize::Huge2MiB => 2 << 20,
            PageSize::Huge1GiB => 1 << 30,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskConfig {
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as the disk's serial number; printable ASCII, at most
    /// [`MAX_SERIAL_NUMBER`] bytes.
    #[serde(default)]
    pub serial_number: String,
    /// The descriptor was opened O_DIRECT.
    #[serde(default)]
    pub direct: bool,
    #[serde(default)]
    pub limit: Option<DiskLimit>,
    /// virtqueues, 1 to [`MAX_QUEUES`].
    #[serde(default = "one")]
    pub queues: u16,
}

fn one() -> u16 {
    1
}

/// Rate limit of a disk; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskLimit {
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    #[serde(default)]
    pub operations_per_second: Option<u64>,
    /// What may pass at once after a quiet time, as seconds of the rate, in thousandths.
    #[serde(default)]
    pub burst_ms: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConsolePortConfig {
    /// Shows up as /sys/class/virtio-ports/*/name in the guest, `org.qemu.guest_agent.0` for one.
    pub name: String,
    /// The guest should make it a console (hvc0), not a plain port.
    #[serde(default)]
    pub console: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RngConfig {
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

/// A balloon, by which the guest gives memory back: what the host wishes, and whatever is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// What the host wishes in it from the start, less than the machine's memory.
    #[serde(default)]
    pub bytes: u64,
    /// The guest may take pages out of it rather than end a process for want of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context id, from [`MIN_CID`]; nobody else on the host need know it.
    pub cid: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogConfig {
    pub action: WatchdogAction,
}

/// What happens, besides `Event::WatchdogFired`, when the guest stops to feed its watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogAction {
    #[default]
    Reset,
    PowerOff,
    Pause,
    /// Only the event.
    None,
}

/// Open descriptors of a machine. Kept for its life: a reset loads the kernel again from them.
#[derive(Debug)]
pub struct MachineFiles {
    /// /dev/kvm, read-write.
    pub kvm: OwnedFd,
    /// ELF with a PVH note, or a bzImage; read with pread. `None` for a machine that boots a disk.
    pub kernel: Option<File>,
    pub initrd: Option<File>,
    /// For a machine that boots a disk; `None`: one that only Linux reads cannot be booted.
    pub fallback: Option<FallbackFiles>,
    /// In the order of `MachineConfig::disks`.
    pub disks: Vec<File>,
    pub serial: ConsoleFiles,
    /// In the order of `MachineConfig::console_ports`.
    pub console_ports: Vec<ConsoleFiles>,
    /// In the order of `MachineConfig::nets`.
    pub nets: Vec<NetFiles>,
    /// With `MachineConfig::vsock`: a listening stream socket, to which programs of the host connect
    /// that want to speak with the guest; it is made non-blocking.
    pub vsock: Option<OwnedFd>,
}

/// A kernel that boots, from within the guest, disks that only Linux reads. They belong to the host, and
/// are read only if such a disk is found.
#[derive(Debug)]
pub struct FallbackFiles {
    pub kernel: File,
    pub initrd: File,
}

/// The host's end of a serial line or console port. Pipes and sockets are made non-blocking; what the
/// reader does not take in time is dropped, oldest first, and the guest is never held up. Both may be
/// duplicates of one socket.
#[derive(Debug, Default)]
pub struct ConsoleFiles {
    /// What the guest writes goes here; `None`: nowhere.
    pub output: Option<OwnedFd>,
    /// What comes from here the guest reads.
    pub input: Option<OwnedFd>,
}

/// Why a config or the files with it cannot be a machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("{count} vCPUs: a machine has 1 to {MAX_VCPUS}")]
    VcpuCount { count: u8 },
    #[error("a TSC of 0 kHz would stand still")]
    ZeroTsc,
    #[error("{bytes} bytes of memory: a machine has {MIN_MEMORY} to {MAX_MEMORY}")]
    MemorySize { bytes: u64 },
    #[error("{bytes} bytes of memory are no multiple of the page size {page}")]
    MemoryAlignment { bytes: u64, page: u64 },
    #[error("host NUMA node {node}: nodes are 0 to 63")]
    HostNode { node: u32 },
    #[error("the command line has {length} bytes, or a NUL; at most {} are possible", COMMAND_LINE_MAX - 1)]
    CommandLine { length: usize },
    #[error("{count} disks: at most {MAX_DISKS}")]
    DiskCount { count: usize },
    #[error("boot from disk {index}: there are {count}")]
    BootDisk { index: usize, count: usize },
    #[error(
        "disk {index}: serial number {serial:?} is not at most {MAX_SERIAL_NUMBER} printable ASCII characters"
    )]
    SerialNumber { index: usize, serial: String },
    #[error("disk {index}: {queues} queues: a disk has 1 to {MAX_QUEUES}")]
    Queues { index: usize, queues: u16 },
    #[error("disk {index}: a rate limit of 0 would stop it for ever")]
    ZeroLimit { index: usize },
    #[error("{count} console ports: at most {MAX_CONSOLE_PORTS}")]
    ConsolePortCount { count: usize },
    #[error("console port {index}: name {name:?} is empty, longer than 64 bytes, or used twice")]
    ConsolePortName { index: usize, name: String },
    #[error("a balloon of {bytes} bytes in a machine of {memory}: it must be smaller")]
    BalloonSize { bytes: u64, memory: u64 },
    #[error("{count} network devices: at most {MAX_NETS}")]
    NetCount { count: usize },
    #[error("network device {index}: {what}")]
    Net { index: usize, what: &'static str },
    #[error("threads for {count} pairs of queues of later networks: at most {MAX_HOT_NETS}")]
    HotNetCount { count: u8 },
    #[error("{count} vCPUs: this machine has 1 to {max}")]
    VcpuMax { count: u8, max: u8 },
    #[error(
        "at most {max} bytes of hot memory: it must be whole blocks of {HOT_BLOCK}, not none, and with \
         the rest at most {MAX_MEMORY}"
    )]
    HotMemoryMax { max: u64 },
    #[error("{bytes} bytes of hot memory: this machine has up to {max}, in blocks of {HOT_BLOCK}")]
    HotMemorySize { bytes: u64, max: u64 },
    #[error("hot memory of pages larger than {HOT_BLOCK} bytes is not possible")]
    HotMemoryPages,
    #[error("context id {cid}: a guest's are from {MIN_CID} to {}", u32::MAX - 1)]
    ContextId { cid: u32 },
    #[error("{given} descriptors for {what}, but {wanted} in the config")]
    FileCount {
        what: &'static str,
        given: usize,
        wanted: usize,
    },
}

impl MachineConfig {
    /// A machine of one vCPU and `bytes` of memory with nothing on it but the serial line.
    pub fn minimal(bytes: u64) -> MachineConfig {
        MachineConfig {
            uuid: Uuid::nil(),
            cpus: CpuConfig {
                count: 1,
                max: None,
                profile: CpuProfile::Host,
                host_cpus: Vec::new(),
            },
            memory: MemoryConfig {
                bytes,
                pages: PageSize::Transparent,
                host_nodes: Vec::new(),
            },
            boot: BootSource::Files,
            command_line: String::new(),
            disks: Vec::new(),
            hot_disks: 0,
            hot_nets: 0,
            hot_memory: None,
            console_ports: Vec::new(),
            rng: None,
            balloon: None,
            nets: Vec::new(),
            vsock: None,
            watchdog: None,
            pvpanic: true,
        }
    }

    /// Checks all that does not depend on the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.cpus.validate()?;
        self.memory.validate()?;
        if let Some(hot) = &self.hot_memory {
            hot.validate(&self.memory)?;
        }
        self.check_balloon(self.balloon.map_or(0, |balloon| balloon.bytes))?;
        let length = self.command_line.len();
        if length >= COMMAND_LINE_MAX || self.command_line.contains('\0') {
            return Err(ConfigError::CommandLine { length });
        }
        let count = self.disks.len().max(self.hot_disks.into());
        if count > MAX_DISKS {
            return Err(ConfigError::DiskCount { count });
        }
        if let BootSource::Disk(index) = self.boot
            && index >= self.disks.len()
        {
            let count = self.disks.len();
            return Err(ConfigError::BootDisk { index, count });
        }
        for (index, disk) in self.disks.iter().enumerate() {
            disk.validate(index)?;
        }
        if self.nets.len() > MAX_NETS {
            return Err(ConfigError::NetCount {
                count: self.nets.len(),
            });
        }
        for (index, net) in self.nets.iter().enumerate() {
            net.validate(index)?;
        }
        if self.hot_nets > MAX_HOT_NETS {
            let count = self.hot_nets;
            return Err(ConfigError::HotNetCount { count });
        }
        if let Some(VsockConfig { cid }) = self.vsock
            && !(MIN_CID..u32::MAX).contains(&cid)
        {
            return Err(ConfigError::ContextId { cid });
        }
        if self.console_ports.len() > MAX_CONSOLE_PORTS {
            return Err(ConfigError::ConsolePortCount {
                count: self.console_ports.len(),
            });
        }
        for (index, port) in self.console_ports.iter().enumerate() {
            let used = self
                .console_ports
                .iter()
                .take(index)
                .any(|other| other.name == port.name);
            if port.name.is_empty() || port.name.len() > 64 || used {
                return Err(ConfigError::ConsolePortName {
                    index,
                    name: port.name.clone(),
                });
            }
        }
        Ok(())
    }

    /// Whether a balloon may be that large.
    pub fn check_balloon(&self, bytes: u64) -> Result<(), ConfigError> {
        let memory = self.memory.bytes;
        match bytes < memory {
            true => Ok(()),
            false => Err(ConfigError::BalloonSize { bytes, memory }),
        }
    }

    /// Checks that `files` are for this config.
    pub fn validate_files(&self, files: &MachineFiles) -> Result<(), ConfigError> {
        let kernels = usize::from(self.boot == BootSource::Files);
        let counts = [
            ("kernels", usize::from(files.kernel.is_some()), kernels),
            ("disks", files.disks.len(), self.disks.len()),
            (
                "console ports",
                files.console_ports.len(),
                self.console_ports.len(),
            ),
            ("network devices", files.nets.len(), self.nets.len()),
            (
                "vsock",
                usize::from(files.vsock.is_some()),
                usize::from(self.vsock.is_some()),
            ),
        ];
        for (what, given, wanted) in counts {
            if given != wanted {
                return Err(ConfigError::FileCount {
                    what,
                    given,
                    wanted,
                });
            }
        }
        let mut nets = self.nets.iter().zip(&files.nets);
        nets.try_for_each(|(net, files)| net.validate_files(files))
    }
}

impl CpuConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let (count, max) = (self.count, self.most());
        if !(1..=MAX_VCPUS).contains(&max) {
            return Err(ConfigError::VcpuCount { count: max });
        }
        let tsc_khz = match &self.profile {
            CpuProfile::Custom(custom) => custom.tsc_khz,
            CpuProfile::Kept(kept) => kept.tsc_khz,
            CpuProfile::Host | CpuProfile::X86_64V2 | CpuProfile::X86_64V3 => None,
        };
        if tsc_khz == Some(0) {
            return Err(ConfigError::ZeroTsc);
        }
        self.check_count(count)
    }

    /// Whether there may be so many vCPUs.
    pub fn check_count(&self, count: u8) -> Result<(), ConfigError> {
        let max = self.most();
        match (1..=max).contains(&count) {
            true => Ok(()),
            false => Err(ConfigError::VcpuMax { count, max }),
        }
    }
}

impl HotMemoryConfig {
    fn validate(&self, memory: &MemoryConfig) -> Result<(), ConfigError> {
        let max = self.max;
        let fits = max <= MAX_MEMORY - memory.bytes.min(MAX_MEMORY);
        if max == 0 || !max.is_multiple_of(HOT_BLOCK) || !fits {
            return Err(ConfigError::HotMemoryMax { max });
        }
        if memory.pages.bytes() > HOT_BLOCK {
            return Err(ConfigError::HotMemoryPages);
        }
        self.check_bytes(self.bytes)
    }

    /// Whether so much may be plugged.
    pub fn check_bytes(&self, bytes: u64) -> Result<(), ConfigError> {
        let max = self.max;
        match bytes <= max && bytes.is_multiple_of(HOT_BLOCK) {
            true => Ok(()),
            false => Err(ConfigError::HotMemorySize { bytes, max }),
        }
    }
}

impl MemoryConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let bytes = self.bytes;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
            return Err(ConfigError::MemorySize { bytes });
        }
        let page = self.pages.bytes();
        if !bytes.is_multiple_of(page) {
            return Err(ConfigError::MemoryAlignment { bytes, page });
        }
        match self.host_nodes.iter().find(|node| **node > 63) {
            Some(&node) => Err(ConfigError::HostNode { node }),
            None => Ok(()),
        }
    }
}

impl MachineConfig {
    /// Where on the host it may be is as there, and so are the IP addresses of networks with the same MAC address.
    pub fn take_place(&mut self, here: &MachineConfig) {
        (self.cpus.host_cpus).clone_from(&here.cpus.host_cpus);
        (self.memory.host_nodes).clone_from(&here.memory.host_nodes);
        for net in &mut self.nets {
            let same = here.nets.iter().find(|other| other.mac == net.mac);
            net.addresses = same.map_or(Vec::new(), |other| other.addresses.clone());
        }
    }
}

impl DiskConfig {
    /// `index` is for the error.
    pub fn validate(&self, index: usize) -> Result<(), ConfigError> {
        let serial = &self.serial_number;
        let printable = serial
            .bytes()
            .all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if serial.len() > MAX_SERIAL_NUMBER || !printable {
            return Err(ConfigError::SerialNumber {
                index,
                serial: serial.clone(),
            });
        }
        if self.queues == 0 || self.queues > MAX_QUEUES {
            return Err(ConfigError::Queues {
                index,
                queues: self.queues,
            });
        }
        if let Some(limit) = self.limit
            && [limit.bytes_per_second, limit.operations_per_second].contains(&Some(0))
        {
            return Err(ConfigError::ZeroLimit { index });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_a_machine_are_refused_with_their_own_error() {
        let good = MachineConfig::minimal(256 << 20);
        assert_eq!(good.validate(), Ok(()));

        let mut config = good.clone();
        config.cpus.count = 65;
        assert_eq!(config.validate(), Err(ConfigError::VcpuCount { count: 65 }));

        let mut config = good.clone();
        config.cpus.profile = CpuProfile::Kept(Box::new(KeptCpu {
            leaves: Vec::new(),
            tsc_khz: Some(0),
        }));
        assert_eq!(config.validate(), Err(ConfigError::ZeroTsc));

        let mut config = good.clone();
        config.memory.bytes = (256 << 20) + 1;
        assert!(matches!(
            config.validate(),
            Err(ConfigError::MemoryAlignment { .. })
        ));

        let mut config = good.clone();
        config.command_line = "a\0b".to_owned();
        assert!(matches!(
            config.validate(),
            Err(ConfigError::CommandLine { .. })
        ));

        let mut config = good.clone();
        config.vsock = Some(VsockConfig { cid: 2 });
        assert_eq!(config.validate(), Err(ConfigError::ContextId { cid: 2 }));

        let disk = DiskConfig {
            read_only: false,
            serial_number: "x".repeat(21),
            direct: false,
            limit: None,
            queues: 1,
        };
        let mut config = good.clone();
        config.disks = vec![disk];
        assert!(matches!(
            config.validate(),
            Err(ConfigError::SerialNumber { .. })
        ));

        let port = ConsolePortConfig {
            name: "a".to_owned(),
            console: false,
        };
        let mut config = good;
        config.console_ports = vec![port.clone(), port];
        assert!(matches!(
            config.validate(),
            Err(ConfigError::ConsolePortName { index: 1, .. })
        ));
    }

    #[test]
    fn profiles_have_the_names_of_the_wire() {
        assert_eq!(CpuProfile::by_name("host"), Some(CpuProfile::Host));
        assert_eq!(CpuProfile::by_name("x86-64-v3"), Some(CpuProfile::X86_64V3));
        assert_eq!(CpuProfile::by_name("z80"), None);
    }
}
