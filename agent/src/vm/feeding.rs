//! Other connections for memory that follows a guest which runs here, taken by a thread of its own: the process's one loop
//! may be waiting for some of that memory itself.
//!
//! An agent comes to a socket that is for nothing else, and each packet brings an end of a line ([`AnotherLine`]).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fractus_vmm::machine::Feeder;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, listen};

use super::protocol::{AnotherLine, LineTaken};
use super::{log, packet};

/// Who comes has something to say.
const GREETING: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};
/// After this time what could not be accepted is tried again: out of descriptors, most likely.
const AGAIN: Duration = Duration::from_millis(50);

/// The thread ends with it.
pub struct Lines {
    over: Arc<OwnedFd>,
    feeder: Feeder,
}

impl Lines {
    /// `listener` is a bound SEQPACKET socket. `hook` runs at the start of the thread.
    pub fn serve(
        listener: OwnedFd,
        feeder: Feeder,
        hook: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        listen(&listener, 4)?;
        let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let thread = Thread {
            listener,
            feeder: feeder.clone(),
            over: Arc::clone(&over),
        };
        std::thread::Builder::new()
            .name("lines".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                hook();
                thread.run();
            })?;
        Ok(Self { over, feeder })
    }

    /// Whether there is one by which it comes.
    pub fn carry(&self) -> bool {
        self.feeder.is_fed()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.over, &1u64.to_ne_bytes());
    }
}

struct Thread {
    listener: OwnedFd,
    feeder: Feeder,
    over: Arc<OwnedFd>,
}

impl Thread {
    fn run(&self) {
        while self.waits(&self.listener, None) {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.listener, flags) {
                Ok(agent) => {
                    if self.waits(&agent, Some(&GREETING)) {
                        self.take(&agent);
                    }
                }
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                // sleeps because nothing tells when there is room for a descriptor
                Err(_) => std::thread::sleep(AGAIN),
            }
        }
    }

    /// Until there is something to be read; no: it is over, or there is nothing in time.
    fn waits(&self, fd: &OwnedFd, most: Option<&Timespec>) -> bool {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.over.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, most) {
                Err(Errno::INTR) => {}
                Err(_) => return false,
                Ok(_) => {
                    let [ready, over] = fds.map(|fd| !fd.revents().is_empty());
                    return ready && !over;
                }
            }
        }
    }

    fn take(&self, agent: &OwnedFd) {
        let taken = match packet::receive::<AnotherLine>(agent) {
            Ok((AnotherLine { .. }, files)) => match files.into_iter().next() {
                Some(line) => self.feeder.go_on_by(line).map_err(|e| e.to_string()),
                None => Err("no line came".to_owned()),
            },
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &taken {
            log::line(format_args!("another line for its memory: {error}"));
        }
        let answer = LineTaken { error: taken.err() };
        let _ = packet::send(agent, &answer, &[]);
    }
}
