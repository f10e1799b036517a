//! Starts real processes: opens what a machine needs and hands it over.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::guest::{GuestReport, Watchdog};
use fractus_agent_api::machine::{MachineSpec, Pages, ServerId};
use fractus_agent_api::migration::Shape;
use fractus_agent_api::size::Size;
use fractus_vmm::config::{
    BalloonConfig, BootSource, ConsolePortConfig, CpuConfig, CpuProfile, HOT_BLOCK,
    HotMemoryConfig, MachineConfig, MemoryConfig, PageSize, RngConfig, VsockConfig, WatchdogAction,
    WatchdogConfig,
};
use fractus_vmm::stream::snapshot;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use uuid::Uuid;

use super::control::{Control, watched};
use super::devices::{self, Files, HOT_DISKS, HOT_NETS};
use super::nest::{self, Making};
use super::spawn::{Inherited, spawn};
use super::{Adoption, End, HostProcess, Launcher, Plan, ProcessError};
use super::{identity, last_words, sockets};
use crate::host::cgroup::Cgroups;
use crate::machine::guest_agent;
use crate::machine::record::ProcessRecord;
use crate::network::vhost;
use crate::paths::{MachinePaths, Paths};
use crate::vm::SUBCOMMAND;
use crate::vm::packet;
use crate::vm::protocol::{FileRole, JailConfig, Launch};

/// Opened at start, so that a newer binary in its place changes nothing for this agent's machines.
pub struct HostLauncher {
    pub binary: OwnedFd,
    pub null: OwnedFd,
    pub paths: Paths,
    /// Marks this agent's processes in /proc.
    pub mark: Uuid,
    pub boot_id: Uuid,
    pub cgroups: Option<Cgroups>,
    /// No KVM: guests are stand-ins.
    pub stand_ins: bool,
}

pub(super) fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> ProcessError {
    let what = what.into();
    move |source| ProcessError::System { what, source }
}

/// What a process gets once it has been started.
struct Handover {
    launch: Launch,
    files: Vec<OwnedFd>,
    network: Making,
}

impl HostLauncher {
    /// For this process's own binary.
    pub fn new(
        paths: Paths,
        mark: Uuid,
        cgroups: Option<Cgroups>,
        stand_ins: bool,
    ) -> io::Result<Self> {
        let binary = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open("/proc/self/exe")?;
        let null = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        let boot_id = identity::boot_id()?;
        let (binary, null) = (binary.into(), null.into());
        Ok(Self {
            binary,
            null,
            paths,
            mark,
            boot_id,
            cgroups,
            stand_ins,
        })
    }

    fn start(&self, mut plan: Plan) -> Result<(ProcessRecord, OwnedFd, OwnedFd), ProcessError> {
        let paths = self.paths.machine(plan.id);
        let network = Making::network().map_err(failed("a network namespace"))?;
        let (config, files) = self.open(&mut plan, &paths)?;
        let most = match plan.arrives {
            Some(_) => files.most,
            None => Vec::new(),
        };
        let largest = most.iter().copied().max().unwrap_or(0);
        let largest = match &plan.takes_over {
            // It has the same files, and may have been let write larger ones since.
            Some(from) => identity::may_write(&from.from).map_err(failed("its limit of files"))?,
            None => largest,
        };
        let launch = Launch {
            id: plan.id,
            most,
            jail: Some(JailConfig {
                user: plan.user,
                file_size: file_size(plan.most_mib, files.largest.max(largest)),
            }),
            config,
            files: files.roles,
            disks: files.disks,
            nets: files.nets,
            request_id: plan.request_id.clone(),
        };
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|e| failed("a socket for the process")(e.into()))?;
        let arguments = [
            "fractus-agent".to_owned(),
            SUBCOMMAND.to_owned(),
            plan.id.to_string(),
            self.mark.hyphenated().to_string(),
        ]
        .map(CString::new)
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed("the process's arguments")(e.into()))?;
        let null = self.null.as_fd();
        let spawned = spawn(&Inherited {
            binary: self.binary.as_fd(),
            arguments: &arguments,
            socket: theirs.as_fd(),
            standard: [null, null, null],
        })
        .map_err(failed("starting the machine's process"))?;
        drop(theirs);
        let handover = Handover {
            launch,
            files: files.files,
            network,
        };
        match self.hand_over(&plan, spawned.pid, &ours, handover) {
            Ok(identity) => Ok((identity, spawned.pidfd, ours)),
            Err(error) => {
                let _ = identity::kill(&spawned.pidfd);
                identity::reap(&spawned.pidfd);
                Err(error)
            }
        }
    }

    /// Gives a process that was just started its place and its launch.
    fn hand_over(
        &self,
        plan: &Plan,
        pid: i32,
        socket: &OwnedFd,
        handover: Handover,
    ) -> Result<ProcessRecord, ProcessError> {
        let Handover {
            mut launch,
            files,
            network,
        } = handover;
        if let Some(cgroups) = &self.cgroups {
            // Before the process has its launch, and so before it uses anything worth counting.
            let mut spec = plan.spec.clone();
            // What it goes on with may be more than what is wanted by now; it says how much, and is held to it.
            if plan.goes_on || plan.arrives.is_some() || plan.takes_over.is_some() {
                spec.memory_mib = spec.memory_mib.max(plan.most_mib);
            }
            cgroups
                .enter(plan.id, pid, &spec)
                .map_err(failed("the machine's control group"))?;
        }
        be_like_any(pid).map_err(failed("the process's place among those to be killed"))?;
        let mounts = nest::mounts().map_err(failed("an empty root for the machine"))?;
        let network = network.wait().map_err(failed("a network namespace"))?;
        let namespaces = [FileRole::MountNamespace, FileRole::NetworkNamespace];
        launch.files.extend(namespaces);
        let mut borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        borrowed.extend([mounts, network.as_fd()]);
        packet::send(socket, &launch, &borrowed)?;
        Ok(ProcessRecord {
            pid,
            start_ticks: identity::start_ticks(pid).map_err(failed("the process's start time"))?,
            boot_id: self.boot_id,
            ran: false,
            came: None,
            guest: GuestReport::default(),
            held: false,
            holds: 0,
        })
    }

    /// Where there is none, the machine itself says that its disk asks for one.
    fn open_fallback(&self, files: &mut Files) -> Result<(), ProcessError> {
        for paths in self.paths.fallbacks() {
            let kernel = match File::open(&paths.kernel) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened,
            };
            let at = |path: &Path| failed(format!("opening {}", path.display()));
            files.push(FileRole::FallbackKernel, kernel.map_err(at(&paths.kernel))?);
            let initrd = File::open(&paths.initrd).map_err(at(&paths.initrd))?;
            files.push(FileRole::FallbackInitrd, initrd);
            break;
        }
        Ok(())
    }

    fn open(
        &self,
        plan: &mut Plan,
        paths: &MachinePaths,
    ) -> Result<(MachineConfig, Files), ProcessError> {
        let at = |path: &Path| failed(format!("opening {}", path.display()));
        let mut files = Files::default();
        let mut config = machine_config(plan.id, &plan.spec)?;
        if plan.takes_over.is_some() {
            self.open_for_heir(plan, paths, &mut files)?;
            return Ok((config, files));
        }
        if let Some(arriving) = &plan.arrives {
            be_shaped(&mut config, &arriving.shape);
        }
        if !self.stand_ins {
            files.push(FileRole::Kvm, open_kvm()?);
            let boot = &plan.spec.boot;
            for (role, image) in [
                (FileRole::Kernel, &boot.kernel),
                (FileRole::Initrd, &boot.initrd),
            ] {
                if let Some(image) = image {
                    let image = paths.image(image);
                    files.push(role, File::open(&image).map_err(at(&image))?);
                }
            }
            let path = paths.vsock();
            let socket = sockets::vsock(&path).map_err(failed(path.display().to_string()))?;
            files.push(FileRole::Vsock, socket);
            // No other machine of the host has it, and this one keeps it.
            config.vsock = Some(VsockConfig { cid: plan.user });
        }
        devices::open(plan, paths, &mut config, &mut files)?;
        if let BootSource::Disk(_) = config.boot {
            self.open_fallback(&mut files)?;
        }
        open_logs(paths, &mut files)?;
        if plan.goes_on {
            let memory = paths.memory();
            files.push(FileRole::Kept, File::open(&memory).map_err(at(&memory))?);
        }
        if let Some(arriving) = &plan.arrives {
            let line = arriving.line.try_clone();
            files.push(FileRole::Arrival, line.map_err(failed("the guest's line"))?);
            let lines = paths.lines_socket();
            let socket = sockets::control(&lines).map_err(at(&lines))?;
            files.push(FileRole::Lines, socket);
        }
        open_words(paths, true, &mut files)?;
        files.push(
            FileRole::Control,
            sockets::control(&paths.socket).map_err(at(&paths.socket))?,
        );
        Ok((config, files))
    }

    /// All else comes from the process that has the guest, which may go on with what it shares: its log, its last words
    /// and its socket's name.
    fn open_for_heir(
        &self,
        plan: &mut Plan,
        paths: &MachinePaths,
        files: &mut Files,
    ) -> Result<(), ProcessError> {
        files.push(FileRole::Kvm, open_kvm()?);
        let free = plan.spec.nics.iter().filter(|nic| nic.limit.is_none());
        let pairs = free.map(|nic| usize::from(nic.queues)).sum();
        for device in vhost::open_all(pairs) {
            files.push(FileRole::Vhost, device);
        }
        open_logs(paths, files)?;
        open_words(paths, false, files)?;
        if let Some(from) = &plan.takes_over {
            let line = from.line.try_clone();
            let line = line.map_err(failed("the line to the process before"))?;
            files.push(FileRole::Predecessor, line);
        }
        let path = paths.next_socket();
        let socket = sockets::control(&path);
        let socket = socket.map_err(failed(format!("opening {}", path.display())))?;
        files.push(FileRole::Control, socket);
        Ok(())
    }
}

fn open_kvm() -> Result<File, ProcessError> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    kvm.map_err(failed("opening /dev/kvm"))
}

fn open_logs(paths: &MachinePaths, files: &mut Files) -> Result<(), ProcessError> {
    for (role, path) in [
        (FileRole::SerialLog, paths.serial_log()),
        (FileRole::Log, paths.log()),
    ] {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let file = options.open(&path);
        let file = file.map_err(failed(format!("opening {}", path.display())))?;
        files.push(role, file);
    }
    Ok(())
}

fn open_words(paths: &MachinePaths, anew: bool, files: &mut Files) -> Result<(), ProcessError> {
    let path = paths.last_words();
    let mut options = File::options();
    options.write(true).create(true).truncate(anew).mode(0o600);
    let file = options.open(&path);
    let file = file.map_err(failed(format!("opening {}", path.display())))?;
    files.push(FileRole::LastWords, file);
    Ok(())
}

/// The agent's unit protects it from a host that is out of memory (`OOMScoreAdjust`), which a machine
/// would inherit, and be spared for programs that hold less.
fn be_like_any(pid: i32) -> io::Result<()> {
    match std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
        // What is protected less than that needs a privilege to be more.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        done => done,
    }
}

/// As the process is made that has the guest now.
fn be_shaped(config: &mut MachineConfig, shape: &Shape) {
    (config.cpus.count, config.cpus.max) = (shape.vcpus, shape.max_vcpus);
    config.memory.bytes = shape.memory_mib << 20;
    config.hot_memory = shape.max_hot_memory_mib.map(|max| HotMemoryConfig {
        max: max << 20,
        bytes: 0,
    });
}

/// Memory that it may have at most, MiB.
pub fn most_memory(spec: &MachineSpec) -> u64 {
    spec.memory_mib.max(spec.max_memory_mib.unwrap_or(0))
}

/// The largest file that a suspended guest with so many MiB can become.
pub fn most_kept(most_mib: u64) -> u64 {
    // Hot memory begins at a whole block of it.
    snapshot::most_bytes((most_mib << 20) + HOT_BLOCK)
}

/// A machine may write its disks, its rings and what it becomes when it is suspended, and no file beyond
/// their size.
fn file_size(most_mib: u64, largest_disk: u64) -> u64 {
    // That is more than its memory, which is a file too (memfd).
    largest_disk
        .max(most_kept(most_mib))
        .max(crate::vm::protocol::SERIAL_LOG + (64 << 10))
}

fn machine_config(id: ServerId, spec: &MachineSpec) -> Result<MachineConfig, ProcessError> {
    let profile = match &spec.cpu {
        Some(profile) => CpuProfile::Custom(profile.clone()),
        None => CpuProfile::by_name(&spec.cpu_profile)
            .ok_or_else(|| ProcessError::Config(format!("CPU profile {:?}", spec.cpu_profile)))?,
    };
    let size = Size::at_start(spec);
    let config = MachineConfig {
        uuid: id.0,
        cpus: CpuConfig {
            count: spec.vcpus,
            max: size.max_vcpus,
            profile,
            host_cpus: spec.cpus.clone(),
        },
        memory: MemoryConfig {
            bytes: spec.memory_mib << 20,
            pages: match spec.pages {
                Pages::Small => PageSize::Small,
                Pages::Transparent => PageSize::Transparent,
                Pages::Huge2MiB => PageSize::Huge2MiB,
                Pages::Huge1GiB => PageSize::Huge1GiB,
            },
            host_nodes: spec.numa_nodes.clone(),
        },
        boot: BootSource::Files,
        command_line: spec.boot.command_line.clone(),
        disks: Vec::new(),
        hot_disks: HOT_DISKS,
        hot_nets: HOT_NETS,
        hot_memory: size.max_hot_memory_mib.map(|max| HotMemoryConfig {
            max: max << 20,
            bytes: 0,
        }),
        console_ports: match spec.guest.agent {
            true => vec![ConsolePortConfig {
                name: guest_agent::PORT.to_owned(),
                console: false,
            }],
            false => Vec::new(),
        },
        rng: Some(RngConfig::default()),
        nets: Vec::new(),
        vsock: None,
        balloon: Some(BalloonConfig {
            bytes: 0,
            deflate_on_oom: true,
        }),
        watchdog: spec.guest.watchdog.map(|watchdog| WatchdogConfig {
            action: match watchdog {
                Watchdog::Reset => WatchdogAction::Reset,
                Watchdog::PowerOff => WatchdogAction::PowerOff,
                Watchdog::Pause => WatchdogAction::Pause,
                Watchdog::Report => WatchdogAction::None,
            },
        }),
        pvpanic: true,
    };
    config
        .validate()
        .map_err(|e| ProcessError::Config(e.to_string()))?;
    Ok(config)
}

/// Whether every agent of this version could build it; asked before an intent is taken.
pub fn check(id: ServerId, spec: &MachineSpec) -> Result<(), String> {
    machine_config(id, spec)
        .map(drop)
        .map_err(|e| e.to_string())
}

#[async_trait]
impl Launcher for Arc<HostLauncher> {
    type Process = HostProcess;

    async fn launch(&self, plan: Plan) -> Result<HostProcess, ProcessError> {
        let (launcher, paths) = (self.clone(), self.paths.machine(plan.id));
        let started = tokio::task::spawn_blocking(move || launcher.start(plan)).await;
        let (identity, pidfd, socket) =
            started.map_err(|e| failed("starting the process")(io::Error::other(e)))??;
        let pidfd = watched(pidfd).map_err(failed("watching the process"))?;
        let control = Control::new(socket).map_err(failed("watching the process"))?;
        let control = Some(control);
        Ok(HostProcess {
            identity,
            pidfd,
            control,
            paths,
            failure: None,
            goes: false,
            unread: false,
            greeting: None,
            suspends: Some(true),
            sends: Some(true),
            copies: Some(true),
            hands: Some(true),
            follows: true,
            seals: true,
            lanes: true,
        })
    }

    async fn adopt(
        &self,
        id: ServerId,
        recorded: &ProcessRecord,
    ) -> io::Result<Adoption<HostProcess>> {
        let paths = self.paths.machine(id);
        if let Some(pidfd) = identity::find(recorded, self.boot_id)? {
            let pidfd = watched(pidfd)?;
            let mut process = HostProcess {
                identity: *recorded,
                pidfd,
                control: None,
                paths,
                failure: None,
                goes: false,
                unread: false,
                greeting: None,
                suspends: None,
                sends: None,
                copies: None,
                hands: None,
                follows: false,
                seals: false,
                lanes: false,
            };
            // One that does not answer is alive all the same; it is asked again when it is heard.
            process.greeting = process.connect().await.ok();
            return Ok(Adoption::Alive(process));
        }
        let end = match last_words(&paths.last_words()) {
            Some(reason) => End::Said(reason),
            None => End::Silent {
                detail: "the machine's process was gone when the agent came back".to_owned(),
            },
        };
        Ok(Adoption::Gone(end))
    }

    fn is_current(&self, process: &ProcessRecord) -> io::Result<bool> {
        Ok(identity::program(process.pid)? == identity::program_of(&self.binary)?)
    }

    fn settle(&self, id: ServerId) -> io::Result<()> {
        sockets::settle(&self.paths.machine(id))
    }

    fn limit(&self, id: ServerId, vcpus: u8, memory_mib: u64) -> io::Result<()> {
        match &self.cgroups {
            Some(cgroups) => cgroups.limit(id, vcpus, memory_mib),
            None => Ok(()),
        }
    }

    async fn clear(&self, id: ServerId) -> Result<(), ProcessError> {
        let paths = self.paths.machine(id);
        for socket in [paths.next_socket(), paths.lines_socket(), paths.socket] {
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(format!("removing {}", socket.display()))(error));
                }
                _ => {}
            }
        }
        match &self.cgroups {
            Some(cgroups) => cgroups
                .remove(id)
                .await
                .map_err(failed("removing the control group")),
            None => Ok(()),
        }
    }
}
