//! The namespaces that a machine's process moves into, made outside of it.
//!
//! The kernel takes longest over two of them: a network namespace (0.6 ms and more), and a root without
//! the host's mounts (it waits for every processor to let go of them: 0.1 ms on a quiet host, tens on a
//! busy one). So the empty root is made once for an agent, and each machine copies it, which waits for
//! nothing; and a machine's network namespace is made while its process is being started.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::{Builder, JoinHandle};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::vm::jail;

/// Where machines' roots are copied from: a mount namespace with an empty, read-only root and nothing
/// else, in which no process is.
#[derive(Debug)]
pub struct Nest(OwnedFd);

impl Nest {
    pub fn new() -> io::Result<Self> {
        let made = Making::start(UnshareFlags::NEWNS, "mnt", || {
            jail::empty_root().map_err(io::Error::other)
        })?;
        made.wait().map(Self)
    }

    /// To be handed over with [`FileRole::MountNamespace`](crate::vm::protocol::FileRole).
    pub fn mounts(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
