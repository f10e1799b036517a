//! The jail that a machine's process puts itself in, before it builds the machine.
//!
//! Its parent has made it with PID, IPC and UTS namespaces of its own (and put it into a control group),
//! and hands over a network namespace and a mount namespace that are empty. Here it moves into them (an
//! empty read-only tmpfs is its root: it looks), and loses its user, every capability, the way back to
//! any of them, and by Landlock the right to name a file, a port or a process outside. What is left is
//! the descriptors it was given; [`super::seccomp`] then takes the system calls that it does not need.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope,
};
use rustix::fs::{Mode, StatVfsMountFlags, statfs, statvfs};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{Resource, Rlimit, chdir, pivot_root, setrlimit, umask};
use rustix::thread::{
    Gid, LinkNameSpaceType, Uid, UnshareFlags, move_into_link_name_space, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, unshare_unsafe,
};

use super::protocol::JailConfig;

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("{step}: {source}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// Whoever started this process handed over another mount namespace than the empty one.
    #[error("the root is not the empty read-only one")]
    Root,
}

trait During<T> {
    fn during(self, step: &'static str) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, step: &'static str) -> Result<T, JailError> {
        self.map_err(|e| JailError::Step {
            step,
            source: e.into(),
        })
    }
}

/// What the jail is in, made by whoever starts the process.
pub struct Namespaces {
    /// Nothing but an empty root; shared until it is copied.
    pub mounts: OwnedFd,
    /// This process's own.
    pub network: OwnedFd,
}

/// Goes in. There must be one thread only; there is no way out, and after an error the process must
/// end.
pub fn enter(config: JailConfig, namespaces: Namespaces) -> Result<(), JailError> {
    enter_but_landlock(config, namespaces)?;
    landlock()
}

/// What kernels without Landlock give; by itself only for tests of just that.
pub(super) fn enter_but_landlock(
    config: JailConfig,
    namespaces: Namespaces,
) -> Result<(), JailError> {
    umask(Mode::RWXG | Mode::RWXO);
    move_in(namespaces)?;
    limit_resources(config)?;
    drop_privileges(config)?;
    set_no_new_privs(true).during("no_new_privs")
}

fn move_in(Namespaces { mounts, network }: Namespaces) -> Result<(), JailError> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .during("entering the network namespace")?;
    // This also makes the empty root the process's root and working folder: the host's mounts are out
    // of reach from here on.
    move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))
        .during("entering the empty root")?;
    // SAFETY: there is one thread, so nobody holds on to the namespace that is left.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.during("copying the empty root")?;
    match is_empty_root()? {
        true => Ok(()),
        false => Err(JailError::Root),
    }
}

/// Whether what [`empty_root`] makes is the root: all else trusts in it, and nothing else would notice
/// another one. Its one page and one inode tell it from a host that has a read-only tmpfs of its own.
fn is_empty_root() -> Result<bool, JailError> {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const STEP: &str = "looking at the root";
    let kind = statfs(c"/").during(STEP)?.f_type;
    let root = statvfs(c"/").during(STEP)?;
    let closed = StatVfsMountFlags::RDONLY
        | StatVfsMountFlags::NOSUID
        | StatVfsMountFlags::NODEV
        | StatVfsMountFlags::NOEXEC;
    Ok(kind as u64 == TMPFS_MAGIC
        && root.f_flag.contains(closed)
        && (root.f_files, root.f_ffree) == (1, 0))
}

/// Makes an empty root in this thread's own mount namespace.
pub fn empty_root() -> Result<(), JailError> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .during("making the mounts private")?;
    // Any folder that surely exists; nobody else sees this mount.
    let root = c"/dev";
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(
        c"jail",
        root,
        c"tmpfs",
        flags,
        c"size=4k,nr_inodes=1,mode=0555",
    )
    .during("mounting an empty root")?;
    chdir(root).during("entering the empty root")?;
    pivot_root(c".", c".").during("pivot_root")?;
    unmount(c".", UnmountFlags::DETACH).during("leaving the host's mounts")?;
    chdir(c"/").during("entering the empty root")?;
    mount_remount(c"/", flags | MountFlags::RDONLY, c"").during("making the root read-only")?;
    Ok(())
}

/// What a machine's devices need, the same kept for who takes the machine over, vhost-net for its networks, and the
/// sockets of as many programs as may speak with its guest: these leave the others none the fewer.
const DESCRIPTORS: u64 = 512 + 192 + 128 + 256;

/// More than any machine has: 64 vCPUs, 16 disks of 5, 8 networks of some queues each, and vhost-net's.
const THREADS: u64 = 1024;

fn limit_resources(config: JailConfig) -> Result<(), JailError> {
    let limits = [
        (Resource::Core, 0, "RLIMIT_CORE"),
        (Resource::Nofile, DESCRIPTORS, "RLIMIT_NOFILE"),
        // Of its user, and each machine has one of its own.
        (Resource::Nproc, THREADS, "RLIMIT_NPROC"),
        (Resource::Msgqueue, 0, "RLIMIT_MSGQUEUE"),
        (Resource::Fsize, config.file_size, "RLIMIT_FSIZE"),
    ];
    for (resource, most, step) in limits {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit).during(step)?;
    }
    Ok(())
}

fn drop_privileges(config: JailConfig) -> Result<(), JailError> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory of ours.
        let refused = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0;
        if refused {
            let error = io::Error::last_os_error();
            // The first number that this kernel has no capability for.
            if error.raw_os_error() == Some(libc::EINVAL) {
                break;
            }
            return Err(error).during("dropping the bounding set");
        }
    }
    let (user, group) = (Uid::from_raw(config.user), Gid::from_raw(config.user));
    set_thread_groups(&[]).during("dropping the groups")?;
    set_thread_res_gid(group, group, group).during("changing the group")?;
    // From here on the permitted and effective sets are empty: nobody asked to keep them.
    rustix::thread::set_thread_res_uid(user, user, user).during("changing the user")?;
    Ok(())
}

/// No right to anything: no rule is added. What this kernel does not know is left out.
fn landlock() -> Result<(), JailError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(AccessNet::from_all(ABI::V6))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    Ok(())
}
