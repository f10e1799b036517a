//! A machine's process: `fractus-agent vm`.
//!
//! Started by the agent from a descriptor of its own binary, with one inherited socket. It takes its
//! [`protocol::Launch`] and every descriptor from there, goes into its jail, builds the machine, says
//! `Ready`, and starts the guest at `Go`, which the agent sends once its record names this process. It
//! ends with the machine. It must stay lean (no runtime, no argument parser) and must never open a
//! path, except when run by hand ([`by_hand`]).

pub mod by_hand;
mod copying;
mod devices;
mod feeding;
pub mod guest;
mod handover;
pub mod jail;
pub mod jail_test;
mod kept;
mod lean;
mod leave;
mod log;
mod moving;
mod pace;
mod paced;
pub mod packet;
pub mod protocol;
mod rounds;
mod said;
pub mod seal;
pub mod seccomp;
mod stand_in;
pub mod supervise;
mod traveller;
mod working_set;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;

use fractus_vmm::config::{ConsoleFiles, FallbackFiles, MachineFiles, NetFiles, WatchdogAction};
use fractus_vmm::cpu;
use fractus_vmm::kvm::Hypervisor;
use fractus_vmm::machine::{self, Feeder, Landing, Loading, Machine};
use fractus_vmm::memory::Faults;
use fractus_vmm::stream::lane::Connections;
use fractus_vmm::stream::snapshot::Snapshot;
use fractus_vmm::thread::{ThreadHook, ThreadKind};
use rustix::net::{AddressFamily, SocketFlags, SocketType, listen, socketpair};

use self::devices::Devices;
use self::guest::{Guest, GuestError};
use self::handover::Taken;
use self::jail::Namespaces;
use self::kept::{Kept, Note};
use self::lean::Lean;
use self::leave::Leave;
use self::pace::Pace;
use self::protocol::{FileRole, FromMachine, Launch, SERIAL_LOG, ToMachine, VERSION};
use self::said::Said;
use self::seal::{Leashed, Sealed};
use self::supervise::{Supervisor, Terminal};
use self::traveller::Traveller;
use crate::console::ring::RingWriter;

/// Where the inherited socket is.
pub const SOCKET: i32 = 3;

/// First argument of a machine's process, and how it is told from others in /proc.
pub const SUBCOMMAND: &str = "vm";

#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("the agent: {0}")]
    Agent(#[from] packet::PacketError),
    #[error("{given} descriptors came for {wanted} roles")]
    Files { given: usize, wanted: usize },
    #[error("no descriptor for {0:?} came")]
    Missing(FileRole),
    #[error("the jail: {0}")]
    Jail(#[from] jail::JailError),
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccomp::FilterError),
    #[error("the machine cannot be built: {0}")]
    Build(String),
    #[error("{path}: {detail}")]
    ByHand { path: String, detail: String },
}

fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> VmError {
    move |errno| VmError::System {
        what,
        source: errno.into(),
    }
}

/// Heaps of the C library's allocator. Said, because it would else count this host's processors when a
/// thread is made that needs one more, and open a file for it, which a locked-down thread may not.
const HEAPS: i32 = 8;

/// Bytes at the end of such a heap that have to be free before the allocator makes it smaller: never. It would first read
/// from a file whether memory may be overcommitted. What is large it maps by itself, and gives back at once.
const TRIM: i32 = i32::MAX;

/// Has the allocator open no files.
fn limit_allocator() -> bool {
    [(libc::M_ARENA_MAX, HEAPS), (libc::M_TRIM_THRESHOLD, TRIM)]
        .into_iter()
        // SAFETY: sets a number of the allocator, before there is a second thread.
        .all(|(what, number)| unsafe { libc::mallopt(what, number) } != 0)
}

/// `fractus-agent vm ID MARK`, started by the agent.
pub fn main() -> ExitCode {
    if !limit_allocator() {
        eprintln!("fractus-agent vm: the allocator's heaps cannot be limited");
        return ExitCode::FAILURE;
    }
    let mut arguments = std::env::args_os().skip(2).peekable();
    if arguments
        .peek()
        .is_none_or(|first| first.as_encoded_bytes().starts_with(b"-"))
    {
        return by_hand::main(arguments);
    }
    // SAFETY: the agent puts this process's socket there before exec, and nothing else in this
    // process has touched descriptors yet.
    let socket = unsafe { OwnedFd::from_raw_fd(SOCKET) };
    if arguments.peek().is_some_and(|first| first == "jail-test") {
        let arguments: Vec<_> = arguments.skip(1).collect();
        return by_hand::report(jail_test::inside(&arguments, socket));
    }
    let (launch, files) = match packet::receive::<Launch>(&socket) {
        Ok(received) => received,
        Err(error) => {
            eprintln!("fractus-agent vm: {error}; this command is for the agent itself");
            return ExitCode::from(2);
        }
    };
    match assemble(launch, files) {
        Ok(parts) => live(parts, socket),
        Err(error) => {
            log::line(format_args!("failed: {error}"));
            let failed = FromMachine::Failed {
                detail: error.to_string(),
            };
            let _ = packet::send(&socket, &failed, &[]);
            ExitCode::FAILURE
        }
    }
}

/// Waits for `Go`, then runs the guest to its end.
fn live(mut parts: Supervisor, socket: OwnedFd) -> ExitCode {
    let ready = FromMachine::Ready {
        version: VERSION,
        lacks: parts.guest.lacks().is_some(),
    };
    let ready = packet::send(&socket, &ready, &[]);
    let go = ready.and_then(|()| packet::receive::<ToMachine>(&socket));
    match go {
        Ok((ToMachine::Go, _)) => {}
        Err(error) if parts.taken.is_some() => {
            // The record may name this process by now: the next agent tells it to go on then, or else ends it.
            log::line(format_args!(
                "no Go came: {error}; waiting for the next agent"
            ));
            parts.run();
            return ExitCode::SUCCESS;
        }
        Ok((other, _)) => {
            log::line(format_args!("{other:?} came instead of Go"));
            return ExitCode::FAILURE;
        }
        Err(error) => {
            log::line(format_args!("no Go came: {error}"));
            return ExitCode::FAILURE;
        }
    }
    // From here on an agent that does not read must not hold the machine's loop.
    if let Err(error) = rustix::io::ioctl_fionbio(&socket, true) {
        log::line(format_args!("the agent's socket: {error}"));
        return ExitCode::FAILURE;
    }
    parts.agent = Some(socket);
    if let Err(error) = parts.guest.start() {
        log::line(format_args!("failed: {error}"));
        if let GuestError::NotBootable(detail) = &error {
            parts.say(detail);
        }
        if let Some(agent) = &parts.agent {
            let failed = FromMachine::Failed {
                detail: error.to_string(),
            };
            let _ = packet::send(agent, &failed, &[]);
        }
        return ExitCode::FAILURE;
    }
    if parts.guest.state() == protocol::State::Paused {
        // It stood still where it comes from, and nothing will happen that says so.
        parts.tell(&parts.status());
    }
    parts.run();
    ExitCode::SUCCESS
}

/// Descriptors by role.
struct Files {
    by_role: Vec<(FileRole, Option<OwnedFd>)>,
    /// What tells of touches of memory that has not come: only a process that has not given up its rights can make it.
    faults: Option<Faults>,
}

impl Files {
    fn new(roles: &[FileRole], files: Vec<OwnedFd>) -> Result<Self, VmError> {
        if roles.len() != files.len() {
            return Err(VmError::Files {
                given: files.len(),
                wanted: roles.len(),
            });
        }
        let by_role = roles.iter().copied().zip(files.into_iter().map(Some));
        Ok(Self {
            by_role: by_role.collect(),
            faults: None,
        })
    }

    /// Before the jail, where a guest is to come.
    fn prepare_for_memory(&mut self, roles: &[FileRole]) {
        if roles.contains(&FileRole::Lines) {
            match Faults::open() {
                Ok(faults) => self.faults = Some(faults),
                Err(error) => log::line(format_args!("no memory can follow its guest: {error}")),
            }
        }
    }

    fn take(&mut self, role: FileRole) -> Option<OwnedFd> {
        self.by_role
            .iter_mut()
            .find(|(is, file)| *is == role && file.is_some())?
            .1
            .take()
    }

    fn file(&mut self, role: FileRole) -> Option<File> {
        self.take(role).map(File::from)
    }
}

/// From a launch to a machine that is jailed, built and locked down, and has not run.
fn assemble(launch: Launch, files: Vec<OwnedFd>) -> Result<Supervisor, VmError> {
    let mut files = Files::new(&launch.files, files)?;
    log::open(files.file(FileRole::Log)).map_err(|source| VmError::System {
        what: "opening the log",
        source,
    })?;
    log::request(launch.request_id.clone());
    log::line(format_args!(
        "machine {}, version {}",
        launch.id,
        env!("CARGO_PKG_VERSION")
    ));
    files.prepare_for_memory(&launch.files);
    if let Some(config) = launch.jail {
        let mut namespace = |role| files.take(role).ok_or(VmError::Missing(role));
        let namespaces = Namespaces {
            mounts: namespace(FileRole::MountNamespace)?,
            network: namespace(FileRole::NetworkNamespace)?,
        };
        jail::enter(config, namespaces)?;
    }
    let listener = files.take(FileRole::Control);
    if let Some(listener) = &listener {
        listen(listener, 8).map_err(system("listening for the agent"))?;
    }
    let serial_log = files.file(FileRole::SerialLog);
    let last_words = files.file(FileRole::LastWords);
    // By hand it ends as any program does.
    let leave = launch.jail.map(|_| Leave::prepare());
    let leave = leave.transpose().map_err(|source| VmError::System {
        what: "waiting for SIGTERM",
        source,
    })?;
    let filters = launch
        .jail
        .map(|_| seccomp::Filters::compile())
        .transpose()?;
    let terminal = files.take(FileRole::TerminalOutput).map(|output| Terminal {
        input: files.take(FileRole::TerminalInput),
        output,
    });
    let lock = Lock(filters.clone());
    let Built {
        guest,
        note,
        serial,
        port,
        pauses,
        taken,
    } = match files.take(FileRole::Predecessor) {
        Some(line) => handover::take_over(line, &mut files, lock)?,
        None => anew(&launch, &mut files, lock)?,
    };
    // A process before it, if there was one, has written its last there by now.
    let serial_log = serial_log.map(|file| RingWriter::new(file, SERIAL_LOG));
    let serial_log = serial_log.transpose().map_err(|source| VmError::System {
        what: "opening the serial log",
        source,
    })?;
    if let Some(filters) = filters {
        filters.apply(seccomp::Kind::Main)?;
    }
    let to_tell = note.is_some();
    let (devices, said) = match note {
        Some(note) => (
            note.devices(&guest.names()),
            Said::going_on(pauses, note.said()),
        ),
        None => (Devices::new(&launch.disks, &launch.nets), Said::new(pauses)),
    };
    Ok(Supervisor {
        id: launch.id,
        guest,
        devices,
        pace: Pace::default(),
        lean: Lean::default(),
        leave,
        listener,
        agent: None,
        serial,
        port,
        serial_log,
        terminal,
        last_words,
        said,
        unheard: false,
        to_tell,
        suspend: None,
        copying: None,
        sent: Default::default(),
        handing: None,
        lent: Vec::new(),
        taken,
        broken: None,
        abandoned: false,
    })
}

/// A guest in its machine, and our ends of its lines.
struct Built {
    guest: Box<dyn Guest>,
    /// Of one that goes on.
    note: Option<Note>,
    serial: OwnedFd,
    port: Option<OwnedFd>,
    /// Its watchdog pauses it.
    pauses: bool,
    /// Another process of this host had it.
    taken: Option<Taken>,
}

/// What each of the machine's threads does before it goes on.
#[derive(Clone)]
struct Lock(Option<seccomp::Filters>);

impl Lock {
    fn down(&self, kind: seccomp::Kind) {
        if let Some(filters) = &self.0
            && let Err(error) = filters.apply(kind)
        {
            // A thread that cannot be locked down must not go on.
            log::line(format_args!("seccomp: {error}"));
            std::process::abort();
        }
    }
}

/// By its launch.
fn anew(launch: &Launch, files: &mut Files, lock: Lock) -> Result<Built, VmError> {
    let (serial, theirs) = streams().map_err(system("the serial line"))?;
    let (port, guests_port) = match launch.config.console_ports.is_empty() {
        true => (None, None),
        false => {
            let (ours, theirs) = streams().map_err(system("the guest agent's port"))?;
            (Some(ours), Some(theirs))
        }
    };
    let watchdog = launch.config.watchdog.as_ref();
    let pauses = watchdog.is_some_and(|watchdog| watchdog.action == WatchdogAction::Pause);
    let lines = Lines {
        serial: theirs,
        port: guests_port,
    };
    let (guest, note) = build(launch, files, lines, lock)?;
    Ok(Built {
        guest,
        note,
        serial,
        port,
        pauses,
        taken: None,
    })
}

/// The guest's ends of its lines to the outside.
struct Lines {
    serial: OwnedFd,
    /// Of the one console port that machines have, the guest agent's.
    port: Option<OwnedFd>,
}

fn streams() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    socketpair(family, kind, SocketFlags::CLOEXEC, None)
}

/// Both ways over one socket.
fn both_ways(line: OwnedFd, what: &'static str) -> Result<ConsoleFiles, VmError> {
    let output = line.try_clone();
    let output = output.map_err(|source| VmError::System { what, source })?;
    Ok(ConsoleFiles {
        output: Some(output),
        input: Some(line),
    })
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// With what is known of one that goes on.
fn build(
    launch: &Launch,
    files: &mut Files,
    lines: Lines,
    lock: Lock,
) -> Result<(Box<dyn Guest>, Option<Note>), VmError> {
    let mut disks = Vec::new();
    while let Some(disk) = files.file(FileRole::Disk) {
        disks.push(disk);
    }
    let nets: Vec<NetFiles> = (launch.config.nets.iter())
        .map(|net| {
            let mut take = |role, count| (0..count).map_while(|_| files.file(role)).collect();
            let in_kernel = if net.limit.is_none() { net.queues } else { 0 };
            NetFiles {
                taps: take(FileRole::Tap, net.queues),
                vhost: take(FileRole::Vhost, in_kernel),
            }
        })
        .collect();
    let kvm = files.take(FileRole::Kvm);
    let kept = files.file(FileRole::Kept);
    let kept = match (kept, files.file(FileRole::Template)) {
        (Some(file), _) => Some(Kept::open(file, kvm.is_some())?),
        (None, template) => template.map(Kept::template).transpose()?,
    };
    let (disks, nets) = match &kept {
        Some(kept) => kept.order(launch, disks, nets)?,
        None => (disks, nets),
    };
    let note = kept.as_ref().and_then(Kept::note).cloned();
    let arrival = files.take(FileRole::Arrival);
    let Some(kvm) = kvm else {
        let hook = move || lock.down(seccomp::Kind::Console);
        if let Some(end) = arrival {
            let stream = comes_by(end)?.main;
            return stand_in::arrive(stream, launch, lines.serial, disks, nets, hook);
        }
        let guest = stand_in::StandIn::new(lines.serial, &launch.config, disks, nets, hook)
            .map_err(|source| VmError::System {
                what: "the stand-in",
                source,
            })?;
        return Ok(match kept {
            Some(Kept::StandIn(kept, _)) => (Box::new(guest.going_on(kept)), note),
            _ => (Box::new(guest), note),
        });
    };
    let fallback = files.file(FileRole::FallbackKernel);
    let fallback = fallback.zip(files.file(FileRole::FallbackInitrd));
    let machine = MachineFiles {
        kvm,
        kernel: files.file(FileRole::Kernel),
        initrd: files.file(FileRole::Initrd),
        fallback: fallback.map(|(kernel, initrd)| FallbackFiles { kernel, initrd }),
        disks,
        serial: both_ways(lines.serial, "the serial line")?,
        console_ports: match lines.port {
            Some(port) => vec![both_ways(port, "the guest agent's port")?],
            None => Vec::new(),
        },
        nets,
        vsock: files.take(FileRole::Vsock),
    };
    let line = files.take(FileRole::Lines);
    let comes = Comes {
        faults: files.faults.take(),
        lines: line.map(|line| (line, lock.clone())),
    };
    let hook: ThreadHook = Arc::new(move |kind: ThreadKind| lock.down(kind.into()));
    if let Some(end) = arrival {
        return arrive(end, launch, machine, comes, hook);
    }
    let machine = match kept {
        Some(Kept::Machine(snapshot, _)) => {
            going_on(&snapshot, launch, machine, Loading::Eager, hook)?
        }
        Some(Kept::Template(snapshot, _)) => {
            let mut machine = going_on(&snapshot, launch, machine, Loading::Lazy, hook)?;
            let told = machine.change_generation();
            told.map_err(|e| VmError::Build(chain(&e)))?;
            machine
        }
        Some(Kept::StandIn(..)) | None => {
            Machine::build(launch.config.clone(), machine, Some(hook))
                .map_err(|e| VmError::Build(chain(&e)))?
        }
    };
    Ok((Box::new(traveller(machine)?), note))
}

fn going_on(
    snapshot: &Snapshot,
    launch: &Launch,
    files: MachineFiles,
    loading: Loading,
    hook: ThreadHook,
) -> Result<Machine, VmError> {
    Machine::from_snapshot(snapshot, &launch.config, files, loading, Some(hook))
        .map_err(|e| VmError::Build(chain(&e)))
}

fn traveller(machine: Machine) -> Result<Traveller, VmError> {
    Traveller::new(machine).map_err(|source| VmError::System {
        what: "the machine's events",
        source,
    })
}

/// Before anything is sent: the stream's own word is looked at once it has come.
fn can_be_here(launch: &Launch, files: &MachineFiles) -> Result<(), VmError> {
    let refused = |error: &dyn std::error::Error| VmError::Build(chain(error));
    let kvm = files.kvm.try_clone();
    let kvm = kvm.map_err(|source| VmError::System {
        what: "the descriptor of KVM",
        source,
    })?;
    let hypervisor = Hypervisor::open(kvm).map_err(|error| refused(&error))?;
    let checked = cpu::check(&hypervisor, &launch.config.cpus.profile);
    let checked = checked.map_err(|error| refused(&error))?;
    checked.map_err(|lacks| refused(&lacks))
}

/// The connections by which a guest comes, once somebody has come that sends it.
fn comes_by(end: OwnedFd) -> Result<Connections<Sealed<Leashed>>, VmError> {
    let connected = seal::borrow(UnixStream::from(end)).and_then(seal::arrival);
    connected.map_err(|source| VmError::System {
        what: "the connection by which the guest comes",
        source,
    })
}

/// For memory that comes after its guest.
struct Comes {
    faults: Option<Faults>,
    lines: Option<(OwnedFd, Lock)>,
}

/// A machine that another process sends, with the files that it needs here.
fn arrive(
    end: OwnedFd,
    launch: &Launch,
    mut files: MachineFiles,
    comes: Comes,
    hook: ThreadHook,
) -> Result<(Box<dyn Guest>, Option<Note>), VmError> {
    can_be_here(launch, &files)?;
    let stream = comes_by(end)?;
    let Comes { mut faults, lines } = comes;
    if stream.main.is_sealed() {
        // By a connection of its own no memory follows a guest.
        faults = None;
    }
    let land = |owner: &[u8]| -> Result<Landing, VmError> {
        let note = Note::read(owner)?;
        let disks = std::mem::take(&mut files.disks);
        let most = launch.most.iter().copied().chain(std::iter::repeat(0));
        let (disks, nets) = (
            disks.into_iter().zip(most).collect(),
            std::mem::take(&mut files.nets),
        );
        let (disks, nets) = note.order(launch, disks, nets)?;
        let (disks, most) = disks.into_iter().unzip();
        (files.disks, files.nets) = (disks, nets);
        Ok(Landing {
            files,
            most,
            faults: faults.take(),
        })
    };
    let land = |owner: &[u8]| land(owner).map_err(|error| error.to_string());
    let arrived = machine::receive_by(stream, &launch.config, land, Some(hook))
        .map_err(|error| VmError::Build(chain(&error)))?;
    log::line(format_args!("arrived: {:?}", arrived.report));
    let note = Note::read(&arrived.owner)?;
    let serve = |feeder: Feeder| {
        let (listener, lock) = lines?;
        let hook = move || lock.down(seccomp::Kind::Lines);
        Some(feeding::Lines::serve(listener, feeder, hook))
    };
    let lines = arrived.machine.feeder().and_then(serve).transpose();
    let lines = lines.map_err(|source| VmError::System {
        what: "the thread for other lines",
        source,
    })?;
    let guest = Traveller::arrived(arrived.machine, arrived.ran, lines);
    let guest = guest.map_err(|source| VmError::System {
        what: "the machine's events",
        source,
    })?;
    Ok((Box::new(guest), Some(note)))
}
