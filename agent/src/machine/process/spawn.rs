//! Starts a machine's process: a clone into namespaces of its own (those that cost nothing; the others
//! come from [`nest`](super::nest)), and exec of our own binary by its descriptor.
//!
//! The clone shares our memory until the exec (as posix_spawn does), so that a start does not copy the
//! agent's page tables; between the two, only raw system calls are made.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::vm::SOCKET;

/// A process that was just started.
#[derive(Debug)]
pub struct Spawned {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// What the child inherits.
pub struct Inherited<'a> {
    /// Our binary, opened O_PATH.
    pub binary: BorrowedFd<'a>,
    pub arguments: &'a [CString],
    /// Becomes descriptor [`SOCKET`].
    pub socket: BorrowedFd<'a>,
    /// Become descriptors 0, 1 and 2.
    pub standard: [BorrowedFd<'a>; 3],
}

/// The child's view of [`Inherited`]: numbers and pointers only.
struct Child {
    binary: RawFd,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    socket: RawFd,
    standard: [RawFd; 3],
    signals: libc::sigset_t,
    /// Written by a child that could not exec.
    errno: c_int,
}

const STACK: usize = 64 << 10;

pub fn spawn(inherited: &Inherited<'_>) -> io::Result<Spawned> {
    let mut arguments: Vec<*const c_char> = inherited
        .arguments
        .iter()
        .map(|argument| argument.as_ptr())
        .collect();
    arguments.push(std::ptr::null());
    // The binary finds nothing in the environment that it needs.
    let environment = [std::ptr::null()];
    // SAFETY: a sigset_t is plain data, filled in below.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours.
    unsafe { libc::sigemptyset(&mut signals) };
    let mut child = Child {
        binary: inherited.binary.as_raw_fd(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        socket: inherited.socket.as_raw_fd(),
        standard: inherited.standard.map(|fd| fd.as_raw_fd()),
        signals,
        errno: 0,
    };
    let mut stack = vec![0u8; STACK];
    let top = stack.as_mut_ptr_range().end;
    let top = top.wrapping_sub(top as usize % 16);
    let flags = libc::CLONE_VM
        | libc::CLONE_VFORK
        | libc::CLONE_PIDFD
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::SIGCHLD;
    let mut pidfd: c_int = -1;
    let blocked = Signals::block()?;
    // SAFETY: CLONE_VFORK holds this thread until the child has exec'd or ended, so `child`, `stack`
    // and `pidfd` outlive its use of them; the child runs on its own stack, with every signal blocked
    // so that no handler of ours runs in it, and makes system calls only.
    let pid = unsafe {
        libc::clone(
            run,
            top.cast::<c_void>(),
            flags,
            (&raw mut child).cast(),
            &raw mut pidfd,
        )
    };
    let error = io::Error::last_os_error();
    drop(blocked);
    drop(stack);
    if pid < 0 {
        return Err(error);
    }
    // SAFETY: the kernel has made this descriptor for us, and nobody else knows of it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    if child.errno != 0 {
        super::identity::reap(&pidfd);
        return Err(io::Error::from_raw_os_error(child.errno));
    }
    Ok(Spawned { pid, pidfd })
}

/// Every signal is blocked while this lives.
struct Signals(libc::sigset_t);

impl Signals {
    fn block() -> io::Result<Self> {
        // SAFETY: both sets are ours and filled in by the calls.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut old: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old) {
                0 => Ok(Self(old)),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the set is the one that the kernel gave us.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Runs in the child. Returns only when it could not exec.
extern "C" fn run(argument: *mut c_void) -> c_int {
    // SAFETY: it is the `Child` of `spawn`, which waits for us.
    let child = unsafe { &mut *argument.cast::<Child>() };
    // SAFETY: system calls on numbers and on memory that `spawn` keeps; none of them allocates.
    unsafe {
        libc::setsid();
        // Out of the way of the numbers that are about to be used, which also clears their
        // close-on-exec flag in the copies.
        let socket = libc::fcntl(child.socket, libc::F_DUPFD, 10);
        let binary = libc::fcntl(child.binary, libc::F_DUPFD_CLOEXEC, 10);
        let mut done = socket >= 0 && binary >= 0;
        let standard = child
            .standard
            .map(|fd| libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10));
        for (number, fd) in standard.iter().enumerate() {
            done &= libc::dup2(*fd, number as c_int) >= 0;
        }
        done &= libc::dup2(socket, SOCKET) >= 0;
        // All others are close-on-exec already; this is for those of a library that forgot.
        let flags = libc::CLOSE_RANGE_CLOEXEC as c_int;
        done &= libc::close_range(SOCKET as u32 + 1, u32::MAX, flags) == 0;
        if done {
            libc::sigprocmask(libc::SIG_SETMASK, &child.signals, std::ptr::null_mut());
            libc::syscall(
                libc::SYS_execveat,
                binary,
                c"".as_ptr(),
                child.arguments,
                child.environment,
                libc::AT_EMPTY_PATH,
            );
        }
        child.errno = *libc::__errno_location();
        libc::_exit(127)
    }
}
