//! The machine's socket, and who of those that wait there is let in.
//!
//! A process that is out of descriptors or memory lets nobody in, and the kernel does not say when it could
//! again: then it is tried anew after a while. Those who wait lose nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

/// After which it is tried again.
const PAUSE: Duration = Duration::from_millis(100);

pub struct Door {
    listener: OwnedFd,
    /// Somebody may wait.
    knocked: bool,
    /// Not before then: it has just failed.
    again: Option<Instant>,
}

impl Door {
    /// `listener`: a listening stream socket; it is made non-blocking.
    pub fn new(listener: OwnedFd) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        Ok(Self {
            listener,
            knocked: true,
            again: None,
        })
    }

    /// Somebody has come since the last that was let in.
    pub fn knock(&mut self) {
        self.knocked = true;
    }

    /// When somebody who waits is to be let in; none: nobody waits, as far as is known.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.knocked.then(|| self.again.unwrap_or(now))
    }

    /// The next who waits, if it is time.
    pub fn admit(&mut self, now: Instant) -> Option<OwnedFd> {
        self.admit_by(now, |listener| {
            accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        })
    }

    fn admit_by(
        &mut self,
        now: Instant,
        accept: impl Fn(&OwnedFd) -> Result<OwnedFd, Errno>,
    ) -> Option<OwnedFd> {
        while self.due(now)? <= now {
            match accept(&self.listener) {
                Ok(socket) => {
                    self.again = None;
                    return Some(socket);
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => {
                    self.knocked = false;
                    self.again = None;
                }
                Err(error) => {
                    if self.again.is_none() {
                        tracing::warn!(%error, "nobody can be let in to the guest's sockets");
                    }
                    self.again = Some(now + PAUSE);
                }
            }
        }
        None
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::testing;
    use super::*;

    #[test]
    fn who_waits_is_let_in_once_there_are_descriptors_again_and_not_asked_for_in_between() {
        let entrance = testing::Entrance::new();
        let mut door = Door::new(entrance.listener.try_clone().unwrap().into()).unwrap();
        let _visitor = entrance.visit("CONNECT 1\n");
        let (tries, out_of) = (Cell::new(0), Cell::new(true));
        let accept = |listener: &OwnedFd| {
            tries.set(tries.get() + 1);
            match out_of.get() {
                true => Err(Errno::MFILE),
                false => accept_with(listener, SocketFlags::NONBLOCK),
            }
        };
        let begin = Instant::now();
        for _ in 0..3 {
            assert!(door.admit_by(begin, accept).is_none());
        }
        assert_eq!(tries.get(), 1, "a loop without a descriptor spins");
        assert_eq!(door.due(begin), Some(begin + PAUSE));
        assert!(door.admit_by(begin + PAUSE, accept).is_none());
        assert_eq!(tries.get(), 2);
        out_of.set(false);
        // Nobody has knocked again.
        assert!(door.admit_by(begin + 2 * PAUSE, accept).is_some());
        assert!(door.admit_by(begin + 2 * PAUSE, accept).is_none());
        assert_eq!(door.due(begin + 2 * PAUSE), None, "nobody waits");
    }
}
