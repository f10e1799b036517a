//! Tries from inside of a jail what a machine's process must not be able to do:
//! `fractus-agent vm --jail-test ACT KIND`.
//!
//! KIND is `main`, `vcpu`, `block`, `net`, `vsock`, `console` or `spawner` for that thread's seccomp filter,
//! `spawned-block` or `spawned-net` for a thread that a spawner made, or `none`, which
//! shows that namespaces, user and Landlock refuse by themselves, or `no-landlock`, which shows the same
//! of namespaces and user; `host-root` is a jail that was given the host's mounts, and must not be entered.
//! The outcome is printed as `ACT KIND: refused ERRNO`, `ACT KIND: DONE`, or
//! `ACT KIND: forbidden system call (signal 31)`.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use io_uring::{IoUring, opcode, types};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::jail::Namespaces;
use super::protocol::JailConfig;
use super::seccomp::{Filters, Kind};
use super::{VmError, jail, packet, system};
use crate::machine::process::identity::reap;
use crate::machine::process::nest::{self, Making};
use crate::machine::process::spawn::{Inherited, spawn};

/// Name, and the attempt: what the system call returned, or less than 0 with errno set.
type Act = (&'static str, fn() -> i64);

const HOST_ROOT: &str = "host-root";
const NO_LANDLOCK: &str = "no-landlock";

/// Prepared before the lock-down: an unrestricted ring, as no machine has one.
static RING: std::sync::Mutex<Option<IoUring>> = std::sync::Mutex::new(None);

const ACTS: &[Act] = &[
    ("open", || {
        call(
            libc::SYS_openat,
            [libc::AT_FDCWD as i64, address(c"/etc/passwd"), 0, 0],
        )
    }),
    ("open-root", || {
        call(
            libc::SYS_openat,
            [libc::AT_FDCWD as i64, address(c"/"), 0, 0],
        )
    }),
    ("create", || {
        let flags = i64::from(libc::O_CREAT | libc::O_WRONLY);
        call(
            libc::SYS_openat,
            [libc::AT_FDCWD as i64, address(c"/new"), flags, 0o600],
        )
    }),
    ("connect", connect),
    ("ptrace", || {
        call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), 2, 0, 0])
    }),
    ("mount", || {
        let none = address(c"none");
        call(libc::SYS_mount, [none, address(c"/"), address(c"tmpfs"), 0])
    }),
    ("execve", || {
        call(libc::SYS_execve, [address(c"/bin/sh"), 0, 0, 0])
    }),
    ("kill", || {
        call(libc::SYS_kill, [2, i64::from(libc::SIGKILL), 0, 0])
    }),
    ("setuid", || call(libc::SYS_setuid, [0, 0, 0, 0])),
    ("unshare", || {
        call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWNS), 0, 0, 0])
    }),
    ("chroot", || {
        call(libc::SYS_chroot, [address(c"/"), 0, 0, 0])
    }),
    ("ring-openat", ring_openat),
];

/// Acts that only seccomp forbids: harmless in a jail, but nothing a machine needs.
const FOR_SECCOMP: &[Act] = &[
    ("bpf", || call(libc::SYS_bpf, [0, 0, 0, 0])),
    ("process_vm_readv", || {
        call(libc::SYS_process_vm_readv, [2, 0, 0, 0])
    }),
    ("open_by_handle_at", || {
        call(libc::SYS_open_by_handle_at, [0, 0, 0, 0])
    }),
    ("socket", || call(libc::SYS_socket, [2, 1, 0, 0])),
    ("fork", || call(libc::SYS_fork, [0, 0, 0, 0])),
    ("clone-a-process", || {
        call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0])
    }),
    ("clone-into-a-namespace", || {
        let thread = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
        let flags = i64::from(thread | libc::CLONE_NEWNET);
        call(libc::SYS_clone, [flags, 0, 0, 0])
    }),
    ("clone3", || call(libc::SYS_clone3, [0, 0, 0, 0])),
    ("filter-with-flags", || {
        let add = i64::from(libc::SECCOMP_SET_MODE_FILTER);
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as i64;
        call(libc::SYS_seccomp, [add, flags, 0, 0])
    }),
    ("make-dumpable", || {
        let command = i64::from(libc::PR_SET_DUMPABLE);
        call(libc::SYS_prctl, [command, 1, 0, 0])
    }),
    ("io_uring_setup", || {
        call(libc::SYS_io_uring_setup, [1, 0, 0, 0])
    }),
    ("memfd_create", || {
        call(libc::SYS_memfd_create, [address(c"x"), 0, 0, 0])
    }),
    ("executable-memory", || {
        let access = i64::from(libc::PROT_READ | libc::PROT_EXEC);
        call(
            libc::SYS_mmap,
            [
                0,
                4096,
                access,
                i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            ],
        )
    }),
    ("create-a-vm", || call(libc::SYS_ioctl, [0, 0xae01, 0, 0])),
];

/// What any thread may do: a jail in which nothing is done at all would refuse everything.
const ALLOWED: Act = ("yield", || call(libc::SYS_sched_yield, [0, 0, 0, 0]));

/// Names for tests: of all acts, and of those that the jail refuses without seccomp.
pub fn names() -> (Vec<&'static str>, Vec<&'static str>) {
    let jail: Vec<_> = ACTS.iter().map(|(name, _)| *name).collect();
    let all = ACTS
        .iter()
        .chain(FOR_SECCOMP)
        .map(|(name, _)| *name)
        .collect();
    (all, jail)
}

fn address(text: &std::ffi::CStr) -> i64 {
    text.as_ptr() as i64
}

fn call(number: i64, [a, b, c, d]: [i64; 4]) -> i64 {
    // SAFETY: the arguments are numbers or point to text that lives for ever; none of the calls
    // writes to our memory.
    unsafe { libc::syscall(number, a, b, c, d, 0i64, 0i64) }
}

/// To whatever of the host listens on its loopback: any answer from there would be a leak.
fn connect() -> i64 {
    match std::net::TcpStream::connect("127.0.0.1:22") {
        Ok(_) => 0,
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => 0,
        Err(_) => -1,
    }
}

fn ring_openat() -> i64 {
    let mut ring = RING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(ring) = ring.as_mut() else { return 0 };
    let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
    // SAFETY: the path lives for ever.
    if unsafe { ring.submission().push(&entry) }.is_err() || ring.submit_and_wait(1).is_err() {
        return -1;
    }
    match ring.completion().next().map(|entry| entry.result()) {
        Some(result) if result < 0 => {
            // SAFETY: errno is this thread's own.
            unsafe { *libc::__errno_location() = -result };
            -1
        }
        _ => 0,
    }
}

/// Outside: starts a process for the jail and says what became of it.
pub fn outside(arguments: &[OsString]) -> Result<ExitCode, VmError> {
    let io = |what| move |source| VmError::System { what, source };
    let binary = File::open("/proc/self/exe").map_err(io("opening our binary"))?;
    let null = File::open("/dev/null").map_err(io("/dev/null"))?;
    let (mut ours, theirs) = std::io::pipe().map_err(io("a pipe"))?;
    let mounts = match arguments {
        [_, kind] if kind == HOST_ROOT => File::open("/proc/self/ns/mnt").map(OwnedFd::from),
        _ => nest::mounts().and_then(|mounts| mounts.try_clone_to_owned()),
    }
    .map_err(io("an empty root"))?;
    let network = Making::network().and_then(Making::wait);
    let network = network.map_err(io("a network namespace"))?;
    let (socket, their_socket) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(system("a socket for the process"))?;
    let mut inner = vec![c"fractus-agent".into(), c"vm".into(), c"jail-test".into()];
    for argument in arguments {
        let text = CString::new(argument.as_encoded_bytes());
        inner.push(text.map_err(|e| VmError::System {
            what: "arguments",
            source: e.into(),
        })?);
    }
    let spawned = spawn(&Inherited {
        binary: binary.as_fd(),
        arguments: &inner,
        socket: their_socket.as_fd(),
        standard: [null.as_fd(), theirs.as_fd(), theirs.as_fd()],
    })
    .map_err(io("starting the process"))?;
    drop((theirs, their_socket));
    let config = JailConfig {
        user: 1_899_999,
        file_size: 1 << 20,
    };
    packet::send(&socket, &config, &[mounts.as_fd(), network.as_fd()])?;
    let mut said = String::new();
    ours.read_to_string(&mut said)
        .map_err(io("reading from the process"))?;
    let status = reap(&spawned.pidfd).unwrap_or_default();
    let what: Vec<_> = arguments.iter().map(|a| a.to_string_lossy()).collect();
    match said.trim() {
        "" => println!("{}: {status}", what.join(" ")),
        said => println!("{}: {said}", what.join(" ")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Inside: goes into the jail and tries.
pub fn inside(arguments: &[OsString], socket: OwnedFd) -> Result<ExitCode, VmError> {
    let wrong = || VmError::ByHand {
        path: "jail-test".into(),
        detail: "ACT KIND".into(),
    };
    let [act, kind] = arguments else {
        return Err(wrong());
    };
    let (_, attempt) = ACTS
        .iter()
        .chain(FOR_SECCOMP)
        .chain([&ALLOWED])
        .find(|(name, _)| act == name)
        .ok_or_else(wrong)?;
    let name = kind.to_str();
    let kind = match name {
        Some("main") => Some(Kind::Main),
        Some("vcpu") => Some(Kind::Vcpu),
        Some("block") => Some(Kind::Block),
        Some("net") => Some(Kind::Net),
        Some("vsock") => Some(Kind::Vsock),
        Some("console") => Some(Kind::Console),
        Some("spawner") => Some(Kind::Spawner),
        Some("spawned-block") => Some(Kind::Block),
        Some("spawned-net") => Some(Kind::Net),
        Some("none" | HOST_ROOT | NO_LANDLOCK) => None,
        _ => return Err(wrong()),
    };
    let (config, files) = packet::receive::<JailConfig>(&socket)?;
    let given = files.len();
    let [mounts, network] = files
        .try_into()
        .map_err(|_| VmError::Files { given, wanted: 2 })?;
    drop(socket);
    let namespaces = Namespaces { mounts, network };
    match name {
        Some(NO_LANDLOCK) => jail::enter_but_landlock(config, namespaces)?,
        _ => jail::enter(config, namespaces)?,
    }
    if act == "ring-openat" {
        let ring = IoUring::new(4).map_err(|source| VmError::System {
            what: "a ring",
            source,
        })?;
        *RING
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(ring);
    }
    let filters = Filters::compile()?;
    if name.is_some_and(|name| name.starts_with("spawned-")) {
        filters.apply(Kind::Spawner)?;
        let spawned =
            std::thread::Builder::new().spawn(move || lock_and_try(&filters, kind, *attempt));
        let spawned = spawned.map_err(|source| VmError::System {
            what: "a thread of the spawner",
            source,
        })?;
        return spawned.join().unwrap_or(Ok(ExitCode::FAILURE));
    }
    lock_and_try(&filters, kind, *attempt)
}

fn lock_and_try(
    filters: &Filters,
    kind: Option<Kind>,
    attempt: fn() -> i64,
) -> Result<ExitCode, VmError> {
    if let Some(kind) = kind {
        filters.apply(kind)?;
    }
    let result = attempt();
    let error = std::io::Error::last_os_error();
    let outcome = match result {
        0.. => "DONE".to_owned(),
        _ => format!("refused {}", error.raw_os_error().unwrap_or(0)),
    };
    let _ = rustix::io::write(std::io::stdout(), outcome.as_bytes());
    Ok(ExitCode::SUCCESS)
}
