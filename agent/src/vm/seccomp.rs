//! The system calls that each kind of thread of a machine's process may make; any other ends it.
//!
//! A list of what is allowed, never of what is forbidden. No thread may open, create, connect, run or
//! trace anything; memory never becomes executable; `ioctl` is only for KVM's run-time requests;
//! signals go only to the process itself. Filters are compiled before the first thread starts. One
//! thread, the spawner, may make further threads (of this process, within its own filter) and add filters:
//! whoever took it over could have the kernel compile filters of his, which take rights away only.

mod search;
#[cfg(test)]
mod testing;

use std::collections::BTreeMap;
use std::sync::Arc;

use fractus_vmm::thread::ThreadKind;
use fractus_vmm::virtio::net::vhost;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Main,
    Vcpu,
    Block,
    Net,
    Vsock,
    Console,
    Pages,
    /// Guest memory by a connection between two processes.
    Lane,
    /// Takes other connections for memory that follows a guest ([`super::feeding`]).
    Lines,
    Spawner,
}

impl From<ThreadKind> for Kind {
    fn from(kind: ThreadKind) -> Self {
        match kind {
            ThreadKind::Main => Self::Main,
            ThreadKind::Vcpu => Self::Vcpu,
            ThreadKind::Block => Self::Block,
            ThreadKind::Net => Self::Net,
            ThreadKind::Vsock => Self::Vsock,
            ThreadKind::Console => Self::Console,
            ThreadKind::Pages => Self::Pages,
            ThreadKind::Lane => Self::Lane,
            ThreadKind::Spawner => Self::Spawner,
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the filter for {kind:?} threads: {detail}")]
pub struct FilterError {
    kind: Kind,
    detail: String,
}

/// One compiled program a kind, and what the spawner has besides.
#[derive(Clone)]
pub struct Filters(Arc<Programs>);

struct Programs {
    by_kind: [(Kind, BpfProgram); 10],
    no_clone3: BpfProgram,
}

impl Filters {
    pub fn compile() -> Result<Self, FilterError> {
        let by_kind = [
            (Kind::Main, program(Kind::Main)?),
            (Kind::Vcpu, program(Kind::Vcpu)?),
            (Kind::Block, program(Kind::Block)?),
            (Kind::Net, program(Kind::Net)?),
            (Kind::Vsock, program(Kind::Vsock)?),
            (Kind::Console, program(Kind::Console)?),
            (Kind::Pages, program(Kind::Pages)?),
            (Kind::Lane, program(Kind::Lane)?),
            (Kind::Lines, program(Kind::Lines)?),
            (Kind::Spawner, program(Kind::Spawner)?),
        ];
        let no_clone3 = no_clone3().map_err(|e| FilterError {
            kind: Kind::Spawner,
            detail: e.to_string(),
        })?;
        Ok(Self(Arc::new(Programs { by_kind, no_clone3 })))
    }

    /// For the calling thread, for good.
    pub fn apply(&self, kind: Kind) -> Result<(), FilterError> {
        let failed = |detail: String| FilterError { kind, detail };
        let (_, program) = (self.0.by_kind.iter())
            .find(|(is, _)| *is == kind)
            .ok_or_else(|| failed("there is none".to_owned()))?;
        if kind == Kind::Spawner {
            apply_filter(&self.0.no_clone3).map_err(|e| failed(e.to_string()))?;
        }
        apply_filter(program).map_err(|e| failed(e.to_string()))
    }
}

/// What every thread needs to live, to log and to end.
const ALL: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_timerfd_settime,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

const MAIN: &[i64] = &[
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_ftruncate,
    // A reset gives the guest's memory back.
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    // Disks are read when their guest is sent to another host, and copied to a file.
    libc::SYS_preadv,
    libc::SYS_pwritev,
    // Whether there is room for the copy.
    libc::SYS_fstatfs,
    // What a disk or network needs that comes while the machine runs; the spawner makes its threads.
    libc::SYS_statx,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    // Whether a network's descriptor is a socket.
    libc::SYS_getsockopt,
    // Of the connection by which memory comes, when the machine ends before all is there.
    libc::SYS_shutdown,
];

const VCPU: &[i64] = &[
    libc::SYS_sendto,
    // A driver that starts or resets its balloon or hot memory has memory given back on its vCPU.
    libc::SYS_fallocate,
    // The alarm that calls it out of the guest; it has one, and can make no other.
    libc::SYS_timer_settime,
    libc::SYS_timer_delete,
];

const BLOCK: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
    // Says that what was written through the page cache is not needed there.
    libc::SYS_fadvise64,
    libc::SYS_lseek,
];

/// Programs of the host come to the machine's socket; it goes to none.
const VSOCK: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

const CONSOLE: &[i64] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    // The balloon gives the guest's memory back.
    libc::SYS_fallocate,
];

/// Memory that comes after the guest: to its place, or none of it.
const PAGES: &[i64] = &[libc::SYS_fallocate, libc::SYS_sendto];

/// Memory by a connection, from its place or to it, which may be a hole; and the end of all connections when one has failed.
const LANE: &[i64] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_fallocate,
];

/// What brings descriptors, and their first words.
const LINES: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
];

/// Besides what the threads it makes may do, since they inherit its filter and add their own.
/// Making a thread, taking its name and adding that filter are allowed for some arguments only.
const SPAWNER: &[i64] = &[
    // Answered with ENOSYS by a filter of its own, so that the C library falls back to `clone`, whose
    // flags a filter can read.
    libc::SYS_clone3,
];

/// KVM's ioctls (type 0xAE) that a running machine makes; creating a VM, a vCPU or a device is not
/// among them.
const KVM_RUNTIME: &[u64] = &[
    0xae80,      // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x81a0_ae8c, // KVM_GET_FPU
    0x41a0_ae8d, // KVM_SET_FPU
    0x8400_ae8e, // KVM_GET_LAPIC
    0x4400_ae8f, // KVM_SET_LAPIC
    0x4008_ae90, // KVM_SET_CPUID2
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x4040_aea0, // KVM_SET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x4080_aea2, // KVM_SET_DEBUGREGS
    0x9000_aea4, // KVM_GET_XSAVE
    0x5000_aea5, // KVM_SET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0x4188_aea7, // KVM_SET_XCRS
    0xaead,      // KVM_KVMCLOCK_CTRL
    0x4020_aea5, // KVM_SIGNAL_MSI
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x8030_ae7c, // KVM_GET_CLOCK
    0x4030_ae7b, // KVM_SET_CLOCK
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0x4010_ae42, // KVM_GET_DIRTY_LOG
    0xc018_aec0, // KVM_CLEAR_DIRTY_LOG
];

/// What is asked of userfaultfd about memory that is registered: no other is registered.
const UFFD_RUNTIME: &[u64] = &[
    0x8010_aa01, // UFFDIO_UNREGISTER
    0x8010_aa02, // UFFDIO_WAKE
    0xc020_aa04, // UFFDIO_ZEROPAGE
    0xc020_aa07, // UFFDIO_CONTINUE
];

/// What a network device's thread asks of its tap, besides what it asks of vhost-net: no new interface, no
/// other name or address.
const TUN_RUNTIME: &[u64] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d9, // TUNSETQUEUE
];

/// What is asked of a tap that comes while the machine runs: what it is, and that its packets have a
/// header of virtio's length.
const TUN_ATTACH: &[u64] = &[
    0x8004_54d2, // TUNGETIFF
    0x4004_54d8, // TUNSETVNETHDRSZ
];

/// FICLONE, by which a file that came open has the blocks of a disk.
const FICLONE: u64 = 0x4004_9409;

/// FIONBIO, by which the standard library makes a descriptor non-blocking.
const FIONBIO: u64 = 0x5421;

fn program(kind: Kind) -> Result<BpfProgram, FilterError> {
    let failed = |detail: String| FilterError { kind, detail };
    let conditional = conditional(kind).map_err(|e| failed(e.to_string()))?;
    let mut always = calls(kind);
    always.retain(|call| !conditional.contains_key(call));
    let filter = SeccompFilter::new(
        conditional,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .map_err(|e| failed(e.to_string()))?;
    let rest = filter
        .try_into()
        .map_err(|e: seccompiler::BackendError| failed(e.to_string()))?;
    search::first(&always, rest).map_err(failed)
}

/// Calls that are allowed with any argument.
fn calls(kind: Kind) -> Vec<i64> {
    let more = match kind {
        Kind::Main => MAIN.to_vec(),
        Kind::Vcpu => VCPU.to_vec(),
        Kind::Block => BLOCK.to_vec(),
        // It reads and writes; what it asks of its tap is below.
        Kind::Net => Vec::new(),
        Kind::Vsock => VSOCK.to_vec(),
        Kind::Console => CONSOLE.to_vec(),
        Kind::Pages => PAGES.to_vec(),
        Kind::Lane => LANE.to_vec(),
        Kind::Lines => LINES.to_vec(),
        Kind::Spawner => {
            let made = [Kind::Block, Kind::Net, Kind::Lane].map(calls);
            [SPAWNER, &made.concat()].concat()
        }
    };
    [ALL, &more].concat()
}

fn ioctls(kind: Kind) -> Vec<u64> {
    match kind {
        Kind::Block | Kind::Vsock | Kind::Lane | Kind::Lines => Vec::new(),
        Kind::Net => [TUN_RUNTIME, &vhost::RUNTIME].concat(),
        Kind::Main => [KVM_RUNTIME, UFFD_RUNTIME, TUN_ATTACH, &[FIONBIO, FICLONE]].concat(),
        Kind::Vcpu | Kind::Console => [KVM_RUNTIME, UFFD_RUNTIME, &[FIONBIO]].concat(),
        Kind::Pages => [UFFD_RUNTIME, &[FIONBIO]].concat(),
        Kind::Spawner => [ioctls(Kind::Block), ioctls(Kind::Net)].concat(),
    }
}

/// Calls that are allowed for some arguments only.
fn conditional(kind: Kind) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let length = SeccompCmpArgLen::Dword;
    let is = |argument, operator, value| {
        SeccompCondition::new(argument, length.clone(), operator, value)
    };
    let when = |argument, operator, value| SeccompRule::new(vec![is(argument, operator, value)?]);
    let not_executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    let own = u64::from(std::process::id());
    let mut rules = BTreeMap::new();
    rules.insert(libc::SYS_mmap, vec![when(2, not_executable.clone(), 0)?]);
    rules.insert(libc::SYS_mprotect, vec![when(2, not_executable, 0)?]);
    rules.insert(libc::SYS_tgkill, vec![when(0, SeccompCmpOp::Eq, own)?]);
    rules.insert(libc::SYS_kill, vec![when(0, SeccompCmpOp::Eq, own)?]);
    // F_GETFD: the standard library looks at what it closes, in debug builds.
    let commands = [
        libc::F_GETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
    ];
    let commands: Result<Vec<_>, _> = commands
        .into_iter()
        .map(|command| when(1, SeccompCmpOp::Eq, command as u64))
        .collect();
    rules.insert(libc::SYS_fcntl, commands?);
    let ioctls = ioctls(kind);
    if !ioctls.is_empty() {
        let ioctls: Result<Vec<_>, _> = ioctls
            .iter()
            .map(|request| when(1, SeccompCmpOp::Eq, *request))
            .collect();
        rules.insert(libc::SYS_ioctl, ioctls?);
    }
    if kind == Kind::Spawner {
        // A thread of this process, never another process; and in no namespace of its own.
        let thread = libc::CLONE_VM | libc::CLONE_THREAD;
        let flags = thread | NAMESPACES;
        let thread_only = SeccompCmpOp::MaskedEq(flags as u64);
        rules.insert(libc::SYS_clone, vec![when(0, thread_only, thread as u64)?]);
        let both = |first: u64, second: u64| {
            let (first, second) = (
                is(0, SeccompCmpOp::Eq, first)?,
                is(1, SeccompCmpOp::Eq, second)?,
            );
            SeccompRule::new(vec![first, second])
        };
        let name = when(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?;
        let no_new_privileges = both(libc::PR_SET_NO_NEW_PRIVS as u64, 1)?;
        rules.insert(libc::SYS_prctl, vec![name, no_new_privileges]);
        // To add a filter, which can only take more away; without any flag.
        let add = both(u64::from(libc::SECCOMP_SET_MODE_FILTER), 0)?;
        rules.insert(libc::SYS_seccomp, vec![add]);
    }
    Ok(rules)
}

const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// ENOSYS for `clone3`; the strictest answer of all filters counts.
fn no_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use super::testing::answer;
    use super::*;

    const ARCHITECTURE: u32 = 0xc000_003e;

    /// What it was made of says the same, number by number and argument by argument.
    #[test]
    fn a_program_allows_what_is_listed_and_ends_the_process_for_all_else() {
        let filters = Filters::compile().unwrap();
        for (kind, program) in &filters.0.by_kind {
            let (always, some) = (calls(*kind), conditional(*kind).unwrap());
            let says = |number, arguments| answer(program, ARCHITECTURE, number, arguments);
            for number in 0..1000 {
                let call = i64::from(number);
                let expected = match always.contains(&call) && !some.contains_key(&call) {
                    true => libc::SECCOMP_RET_ALLOW,
                    false => libc::SECCOMP_RET_KILL_PROCESS,
                };
                // Arguments that no rule allows.
                assert_eq!(says(number, [u64::MAX; 6]), expected, "{kind:?} {number}");
                let x32 = number | 0x4000_0000;
                assert_eq!(says(x32, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
                let other = answer(program, 0x4000_0003, number, [0; 6]);
                assert_eq!(other, libc::SECCOMP_RET_KILL_PROCESS);
            }
            let requests = [KVM_RUNTIME, UFFD_RUNTIME, TUN_RUNTIME, TUN_ATTACH].concat();
            for request in requests.into_iter().chain([FIONBIO, FICLONE, 0xae01]) {
                let expected = match ioctls(*kind).contains(&request) {
                    true => libc::SECCOMP_RET_ALLOW,
                    false => libc::SECCOMP_RET_KILL_PROCESS,
                };
                let ioctl = libc::SYS_ioctl as u32;
                assert_eq!(
                    says(ioctl, [3, request, 0, 0, 0, 0]),
                    expected,
                    "{kind:?} {request:#x}"
                );
            }
            let protect = libc::SYS_mprotect as u32;
            let read = says(protect, [0, 0, libc::PROT_READ as u64, 0, 0, 0]);
            let run = says(protect, [0, 0, libc::PROT_EXEC as u64, 0, 0, 0]);
            assert_eq!(read, libc::SECCOMP_RET_ALLOW);
            assert_eq!(run, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }

    #[test]
    fn every_kind_of_thread_has_a_program_and_none_may_open_a_file() {
        Filters::compile().unwrap();
        let kinds = [
            Kind::Main,
            Kind::Vcpu,
            Kind::Block,
            Kind::Net,
            Kind::Vsock,
            Kind::Console,
            Kind::Pages,
            Kind::Lane,
            Kind::Spawner,
        ];
        for kind in kinds {
            let list = calls(kind);
            for forbidden in [
                libc::SYS_open,
                libc::SYS_openat,
                libc::SYS_openat2,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_ptrace,
                libc::SYS_mount,
                libc::SYS_clone,
                libc::SYS_io_uring_setup,
                libc::SYS_io_uring_register,
                libc::SYS_unshare,
                libc::SYS_setns,
                libc::SYS_bpf,
                libc::SYS_timer_create,
            ] {
                assert!(!list.contains(&forbidden), "{forbidden}");
            }
            let is_spawner = kind == Kind::Spawner;
            assert_eq!(list.contains(&libc::SYS_clone3), is_spawner);
        }
    }
}
