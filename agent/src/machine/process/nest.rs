//! The namespaces that a machine's process moves into, made outside of it.
//!
//! The kernel takes longest over two of them: a network namespace (0.6 ms and more), and a root without
//! the host's mounts (it waits for every processor to let go of them: 0.1 ms on a quiet host, tens on a
//! busy one). So the empty root is made once for an agent, and each machine copies it, which waits for
//! nothing; and a machine's network namespace is made while its process is being started.
//!
//! The copies are mounts of one file system, and so machines have one root folder in common. It is no
//! way from one to the other: it is read-only and has no room for a second inode, and no machine can
//! open it (to lock or to watch it), by Landlock and by seccomp.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::vm::jail;

static NEST: Nest = Nest::new();

/// Where machines' roots are copied from: a mount namespace with an empty, read-only root and nothing
/// else, in which no process is. To be handed over with
/// [`FileRole::MountNamespace`](crate::vm::protocol::FileRole). This process makes it when it is first
/// asked for.
///
/// # Errors
/// It cannot be made now (the host is on its initramfs, or has no mount namespace left): ask again.
pub fn mounts() -> io::Result<BorrowedFd<'static>> {
    NEST.get(|| {
        let furnish = || jail::empty_root().map_err(io::Error::other);
        Making::start(UnshareFlags::NEWNS, "mnt", furnish)?.wait()
    })
}

/// Made once; a failure is not kept.
#[derive(Debug)]
struct Nest {
    made: OnceLock<OwnedFd>,
    making: Mutex<()>,
}

impl Nest {
    const fn new() -> Self {
        Self {
            made: OnceLock::new(),
            making: Mutex::new(()),
        }
    }

    fn get(&self, make: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<BorrowedFd<'_>> {
        if let Some(made) = self.made.get() {
            return Ok(made.as_fd());
        }
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let made = match self.made.get() {
            Some(made) => made,
            None => {
                let new = make()?;
                self.made.get_or_init(|| new)
            }
        };
        Ok(made.as_fd())
    }
}

/// A namespace that a thread of its own is making; that thread ends in it, and no other enters.
#[derive(Debug)]
pub struct Making(JoinHandle<io::Result<OwnedFd>>);

impl Making {
    /// A network namespace with nothing in it, not even a loopback that is up.
    pub fn network() -> io::Result<Self> {
        Self::start(UnshareFlags::NEWNET, "net", || Ok(()))
    }

    fn start(
        flags: UnshareFlags,
        name: &'static str,
        furnish: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let work = move || {
            // SAFETY: it concerns this thread alone, which owns no descriptor or lock that others
            // share, and ends after this.
            unsafe { unshare_unsafe(flags)? };
            // Named before it is furnished: afterwards there may be no /proc.
            let made = File::open(format!("/proc/thread-self/ns/{name}"))?;
            furnish()?;
            Ok(made.into())
        };
        let builder = Builder::new().stack_size(128 << 10);
        Ok(Self(builder.name(name.to_owned()).spawn(work)?))
    }

    pub fn wait(self) -> io::Result<OwnedFd> {
        let panicked = |_| io::Error::other("the thread that made a namespace panicked");
        self.0.join().map_err(panicked)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_root_that_could_not_be_made_is_tried_again_and_made_once() {
        let nest = Nest::new();
        let full = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(nest.get(full).is_err());
        let made = || File::open("/dev/null").map(OwnedFd::from);
        nest.get(made).unwrap();
        nest.get(|| unreachable!("it is there")).unwrap();
    }
}
