//! One machine without an agent: `fractus-agent vm --config FILE [--no-jail] [--tap NAME] [--stamp] [--resume FILE |
//! --clone FILE [--working-set FILE]]`, for benchmarks, tests and trying things out.
//!
//! FILE is JSON:
//! ```json
//! { "machine": { "uuid": "…", "cpus": {"count": 1}, "memory": {"bytes": 268435456},
//!                "command_line": "tick_ms=0" },
//!   "kernel": "/path/to/vmlinux", "initrd": null,
//!   "disks": ["/path/to/disk.raw"], "taps": ["tap0"],
//!   "vhost": false, "vsock": "/path/to/socket", "user": 1899999 }
//! ```
//! `machine` is a [`MachineConfig`] (its `disks` and `nets` may be left out: one writable disk is
//! assumed for each path, and a device of one queue for each tap); the file of a disk that is `direct`
//! is opened so. `"fallback": "FOLDER"` is what `images/fallback/build` made. With `vhost` the host's kernel
//! moves the packets of the taps. The socket of `vsock` is made; the guest's context id is 3 unless `machine`
//! says another. The serial line is standard input and output. The machine runs in a process of its own,
//! started and jailed exactly as the agent does it, and ends when this one does; with `--no-jail` it runs in
//! this very process, without jail and seccomp. A tap is made if it is not there; `--tap` adds one to those of
//! FILE. With `--stamp` the first line on standard error is CLOCK_MONOTONIC, in nanoseconds, of the moment
//! before the machine's process is cloned. With `--resume` the guest goes on from a snapshot, which is read first; with
//! `--clone` it is one of several that do, and what it does not write to is theirs together: the snapshot is mapped, and
//! has to stay as it is; one that is compressed cannot be mapped. What `--working-set` says that other clones touched of
//! it is read ahead ([`super::working_set`]); where that file is not there, what this one touches in its first seconds is
//! recorded in it. Of `machine` counts then which of the host's CPUs it may use. The exit status is 0 when the guest
//! powered off or was stopped, else 1 with the reason on standard error.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use fractus_agent_api::machine::{ServerId, StopReason};
use fractus_vmm::config::{DiskConfig, MAX_MEMORY, MIN_CID, MachineConfig, NetConfig, VsockConfig};
use fractus_vmm::stream::snapshot;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

use super::protocol::{FileRole, FromMachine, JailConfig, Launch, MachineEvent, ToMachine};
use super::working_set::{self, Recorder};
use super::{VmError, packet, system};
use crate::machine::process::nest::{self, Making};
use crate::machine::process::sockets;
use crate::machine::process::spawn::{Inherited, spawn};
use crate::network::{tap, vhost};
use crate::paths::FallbackPaths;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ByHand {
    machine: MachineConfig,
    /// Left out: `machine.boot` says which disk is booted, `{"disk": 0}`.
    #[serde(default)]
    kernel: Option<PathBuf>,
    #[serde(default)]
    initrd: Option<PathBuf>,
    /// A folder with the kernel for disks that only Linux reads.
    #[serde(default)]
    fallback: Option<PathBuf>,
    #[serde(default)]
    disks: Vec<PathBuf>,
    /// Names of interfaces.
    #[serde(default)]
    taps: Vec<String>,
    #[serde(default)]
    vhost: bool,
    /// Where programs come that want to speak with the guest.
    #[serde(default)]
    vsock: Option<PathBuf>,
    #[serde(default = "nobody")]
    user: u32,
}

fn nobody() -> u32 {
    1_899_999
}

/// The arguments after `vm`.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.collect();
    if let [flag, rest @ ..] = arguments.as_slice()
        && flag == "--jail-test"
    {
        return report(super::jail_test::outside(rest));
    }
    match run(arguments) {
        Ok(StopReason::GuestPowerOff | StopReason::Requested) => ExitCode::SUCCESS,
        Ok(reason) => {
            eprintln!("fractus-agent vm: the machine ended: {reason:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("fractus-agent vm: {error}");
            ExitCode::FAILURE
        }
    }
}

pub(super) fn report(outcome: Result<ExitCode, VmError>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("fractus-agent vm: {error}");
        ExitCode::FAILURE
    })
}

fn run(arguments: Vec<OsString>) -> Result<StopReason, VmError> {
    let usage = || VmError::ByHand {
        path: "vm".to_owned(),
        detail: "usage: fractus-agent vm --config FILE [--no-jail] [--tap NAME] [--stamp] \
                 [--resume FILE | --clone FILE [--working-set FILE]]"
            .to_owned(),
    };
    let [flag, path, rest @ ..] = arguments.as_slice() else {
        return Err(usage());
    };
    let (mut jailed, mut stamped, mut taps) = (true, false, Vec::new());
    let (mut snapshot, mut set) = (None, None);
    let mut rest = rest.iter();
    while let Some(word) = rest.next() {
        match word.to_str() {
            Some("--no-jail") => jailed = false,
            Some("--stamp") => stamped = true,
            Some(word @ ("--resume" | "--clone")) if snapshot.is_none() => {
                let role = match word {
                    "--resume" => FileRole::Kept,
                    _ => FileRole::Template,
                };
                let path = rest.next().ok_or_else(usage)?;
                snapshot = Some((role, PathBuf::from(path)));
            }
            Some("--working-set") if set.is_none() => {
                set = Some(PathBuf::from(rest.next().ok_or_else(usage)?));
            }
            Some("--tap") => {
                let name = rest.next().and_then(|name| name.to_str());
                taps.push(name.ok_or_else(usage)?.to_owned());
            }
            _ => return Err(usage()),
        }
    }
    if flag != "--config" {
        return Err(usage());
    }
    let recorder = match (set, &snapshot) {
        (Some(set), Some((FileRole::Template, path))) => working_set::begin(set, path.clone()),
        (Some(_), _) => return Err(usage()),
        (None, _) => None,
    };
    let io = |what| move |source| VmError::System { what, source };
    // An agent has it from its start; here it is made beside the rest.
    let nest = jailed.then(|| std::thread::spawn(nest::mounts));
    let network = jailed.then(Making::network).transpose();
    let network = network.map_err(io("a network namespace"))?;
    let text = std::fs::read_to_string(path).map_err(|e| named(path.display(), &e))?;
    let mut by_hand: ByHand = serde_json::from_str(&text).map_err(|e| named(path.display(), &e))?;
    by_hand.taps.append(&mut taps);
    let (mut launch, mut files) = open(by_hand, jailed)?;
    if let Some((role, path)) = snapshot {
        launch.files.push(role);
        files.push(open_snapshot(&path, &mut launch)?);
    }
    if let (Some(nest), Some(network)) = (nest, network) {
        // As an agent has it long before a machine is started.
        let panicked = |_| Err(std::io::Error::other("its thread panicked"));
        let mounts = nest.join().unwrap_or_else(panicked);
        let mounts = mounts.map_err(io("an empty root"))?;
        return apart(launch, files, mounts, network, stamped, recorder);
    }
    let mut parts = super::assemble(launch, files)?;
    parts
        .guest
        .start()
        .map_err(|e| VmError::Build(e.to_string()))?;
    if let Some(recorder) = recorder {
        recorder.record(std::process::id());
    }
    Ok(parts.run())
}

/// Of a guest whose memory, a file too, may be larger than FILE says.
fn open_snapshot(path: &Path, launch: &mut Launch) -> Result<OwnedFd, VmError> {
    let failed = |e: std::io::Error| named(path.display(), &e);
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    // One that is compressed may be smaller than the memory that it becomes; and what it says of that is not checked yet.
    let memory = snapshot::memory_in(&file).unwrap_or_default();
    let memory = memory.min(MAX_MEMORY);
    if let Some(jail) = &mut launch.jail {
        jail.file_size = jail.file_size.max(length).max(memory);
    }
    Ok(file.into())
}

fn named(path: impl std::fmt::Display, detail: &dyn std::fmt::Display) -> VmError {
    VmError::ByHand {
        path: path.to_string(),
        detail: detail.to_string(),
    }
}

fn open(by_hand: ByHand, jailed: bool) -> Result<(Launch, Vec<OwnedFd>), VmError> {
    let ByHand {
        machine: mut config,
        kernel,
        initrd,
        fallback,
        disks,
        taps,
        vhost: in_kernel,
        vsock,
        user,
    } = by_hand;
    let (mut roles, mut files) = (Vec::new(), Vec::<OwnedFd>::new());
    let mut add = |role, path: &PathBuf, writable, flags| {
        let file = File::options()
            .read(true)
            .write(writable)
            .custom_flags(flags)
            .open(path);
        roles.push(role);
        files.push(file.map_err(|e| named(path.display(), &e))?.into());
        Ok::<(), VmError>(())
    };
    add(FileRole::Kvm, &PathBuf::from("/dev/kvm"), true, 0)?;
    if let Some(kernel) = &kernel {
        add(FileRole::Kernel, kernel, false, 0)?;
    }
    if let Some(initrd) = &initrd {
        add(FileRole::Initrd, initrd, false, 0)?;
    }
    if let Some(folder) = &fallback {
        let paths = FallbackPaths::within(folder);
        add(FileRole::FallbackKernel, &paths.kernel, false, 0)?;
        add(FileRole::FallbackInitrd, &paths.initrd, false, 0)?;
    }
    let mut largest = config.memory.bytes;
    let assumed = config.disks.is_empty();
    for (index, disk) in disks.iter().enumerate() {
        let direct = config.disks.get(index).is_some_and(|disk| disk.direct);
        let flags = if direct { libc::O_DIRECT } else { 0 };
        add(FileRole::Disk, disk, true, flags)?;
        largest = largest.max(std::fs::metadata(disk).map_or(0, |disk| disk.len()));
        if assumed {
            config.disks.push(DiskConfig {
                read_only: false,
                serial_number: String::new(),
                direct: false,
                limit: None,
                queues: 1,
            });
        }
    }
    let assumed = config.nets.is_empty();
    for (index, name) in taps.iter().enumerate() {
        if assumed {
            config.nets.push(NetConfig {
                mac: [2, 0xf0, 0, 0, 0, index as u8 + 1],
                queues: 1,
                mtu: None,
                limit: None,
                addresses: Vec::new(),
            });
        }
        for (role, file) in open_tap(name, config.nets.get(index), in_kernel)? {
            roles.push(role);
            files.push(file);
        }
    }
    if let Some(path) = &vsock {
        config.vsock.get_or_insert(VsockConfig { cid: MIN_CID });
        let listener = sockets::vsock(path).map_err(|e| named(path.display(), &e))?;
        roles.push(FileRole::Vsock);
        files.push(listener);
    }
    for (role, stream) in terminal()? {
        roles.push(role);
        files.push(stream);
    }
    let jail = jailed.then_some(JailConfig {
        user,
        file_size: largest.max(1 << 30),
    });
    let id = ServerId(config.uuid);
    Ok((
        Launch {
            id,
            config,
            jail,
            files: roles,
            disks: Vec::new(),
            nets: Vec::new(),
            most: Vec::new(),
            request_id: None,
        },
        files,
    ))
}

fn terminal() -> Result<[(FileRole, OwnedFd); 2], VmError> {
    let what = "the terminal";
    let failed = |source| VmError::System { what, source };
    let (input, output) = (std::io::stdin(), std::io::stdout());
    let input = input.as_fd().try_clone_to_owned().map_err(failed)?;
    let output = output.as_fd().try_clone_to_owned().map_err(failed)?;
    Ok([
        (FileRole::TerminalInput, input),
        (FileRole::TerminalOutput, output),
    ])
}

/// The queues of a tap, and vhost-net for each if wanted and there is no rate to keep.
fn open_tap(
    name: &str,
    net: Option<&NetConfig>,
    in_kernel: bool,
) -> Result<Vec<(FileRole, OwnedFd)>, VmError> {
    let queues = tap::open(name, net.map_or(1, |net| net.queues)).map_err(|e| named(name, &e))?;
    let mut files = Vec::new();
    for queue in queues {
        files.push((FileRole::Tap, queue));
        if in_kernel && net.is_none_or(|net| net.limit.is_none()) {
            let device = vhost::open().map_err(|e| named(vhost::DEVICE, &e))?;
            files.push((FileRole::Vhost, device.into()));
        }
    }
    Ok(files)
}

/// In a process of its own, as the agent would.
fn apart(
    mut launch: Launch,
    files: Vec<OwnedFd>,
    mounts: BorrowedFd<'static>,
    network: Making,
    stamped: bool,
    mut recorder: Option<Recorder>,
) -> Result<StopReason, VmError> {
    let io = |what| move |source| VmError::System { what, source };
    let binary = File::open("/proc/self/exe").map_err(io("opening our binary"))?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(system("a socket for the process"))?;
    let arguments = [c"fractus-agent", c"vm", c"by-hand"].map(CString::from);
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    if stamped {
        let now = clock_gettime(ClockId::Monotonic);
        eprintln!("{}", now.tv_sec * 1_000_000_000 + now.tv_nsec);
    }
    let spawned = spawn(&Inherited {
        binary: binary.as_fd(),
        arguments: &arguments,
        socket: theirs.as_fd(),
        standard: [input.as_fd(), output.as_fd(), error.as_fd()],
    })
    .map_err(io("starting the process"))?;
    drop(theirs);
    let network = network.wait().map_err(io("a network namespace"))?;
    let namespaces = [FileRole::MountNamespace, FileRole::NetworkNamespace];
    launch.files.extend(namespaces);
    let mut borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    borrowed.extend([mounts, network.as_fd()]);
    packet::send(&ours, &launch, &borrowed)?;
    // What the machine alone should hold is not held here too.
    drop((files, network));
    packet::send(&ours, &ToMachine::Go, &[])?;
    let mut outcome = Err(VmError::Build(
        "the process ended without a word".to_owned(),
    ));
    loop {
        match packet::receive::<FromMachine>(&ours) {
            Ok((
                FromMachine::Event {
                    event: MachineEvent::Stopped { reason },
                },
                _,
            )) => {
                outcome = Ok(reason);
            }
            Ok((
                FromMachine::Event {
                    event: MachineEvent::Running,
                },
                _,
            )) => {
                if let Some(recorder) = recorder.take() {
                    recorder.record(spawned.pid.unsigned_abs());
                }
            }
            Ok((FromMachine::Failed { detail }, _)) => outcome = Err(VmError::Build(detail)),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    let status = crate::machine::process::identity::reap(&spawned.pidfd);
    if let (Err(VmError::Build(detail)), Some(status)) = (&mut outcome, status) {
        detail.push_str(": ");
        detail.push_str(&status);
    }
    outcome
}
