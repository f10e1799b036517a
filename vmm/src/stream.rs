//! The host's end of a serial line or console port: output that never holds the guest up.
//!
//! Owns a duplicate of the descriptor and a bounded backlog. What the reader does not take in time is
//! dropped, oldest first, and counted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};

use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};

/// Bytes kept for a reader that is behind.
const BACKLOG: usize = 64 << 10;

/// Pipes and sockets are made non-blocking (that is a property of the open file, shared with whoever
/// has it too); terminals and files stay as they are.
pub fn make_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Fifo | FileType::Socket => {
            Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
        }
        _ => Ok(()),
    }
}

/// Where a guest's output goes. Cheap to clone.
#[derive(Clone)]
pub struct Output(Arc<Sink>);

struct Sink {
    fd: OwnedFd,
    reactor: Reactor,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    backlog: VecDeque<u8>,
    /// Bytes dropped so far.
    lost: u64,
    /// Nobody reads any more: all that comes is lost.
    closed: bool,
    /// There while the backlog waits to be written.
    waiting: Option<Registration>,
}

impl Output {
    /// Duplicates `fd`.
    pub fn open(fd: BorrowedFd<'_>, reactor: &Reactor) -> io::Result<Output> {
        let fd = fd.try_clone_to_owned()?;
        make_nonblocking(fd.as_fd())?;
        Ok(Output(Arc::new(Sink {
            fd,
            reactor: reactor.clone(),
            state: Mutex::default(),
        })))
    }

    /// Never blocks on a pipe or socket, never fails.
    pub fn write(&self, bytes: &[u8]) {
        let sink = &self.0;
        let mut state = sink.lock();
        if state.closed {
            state.lost += bytes.len() as u64;
            return;
        }
        let written = if state.backlog.is_empty() {
            sink.push(&mut state, bytes)
        } else {
            0
        };
        let rest = bytes.get(written..).unwrap_or_default();
        if rest.is_empty() || state.closed {
            return;
        }
        state.backlog.extend(rest);
        let over = state.backlog.len().saturating_sub(BACKLOG);
        state.backlog.drain(..over);
        state.lost += over as u64;
        if state.waiting.is_none() {
            let subscriber = Arc::clone(sink) as Arc<dyn Subscriber>;
            match sink
                .reactor
                .register(sink.fd.as_fd(), Interest::WRITE, subscriber, 0)
            {
                Ok(registration) => state.waiting = Some(registration),
                Err(error) => tracing::warn!(%error, "a console's output cannot be waited for"),
            }
        }
    }

    /// Bytes that no reader took in time.
    pub fn lost(&self) -> u64 {
        self.0.lock().lost
    }
}

impl Sink {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what the descriptor takes now.
    fn push(&self, state: &mut State, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.fd, rest) {
                Ok(written) => done += written,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    state.closed = true;
                    state.lost += rest.len() as u64;
                    break;
                }
            }
        }
        done
    }
}

impl Subscriber for Sink {
    fn ready(&self, _tag: u32, ready: Ready) {
        let mut state = self.lock();
        let mut backlog = std::mem::take(&mut state.backlog);
        let written = self.push(&mut state, backlog.make_contiguous());
        backlog.drain(..written);
        if ready.closed {
            state.closed = true;
        }
        if backlog.is_empty() || state.closed {
            state.waiting = None;
        } else {
            state.backlog = backlog;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::request::channel;
    use crate::thread::Threads;

    #[test]
    fn a_slow_reader_gets_the_newest_output_and_the_writer_never_waits() {
        let (requests, _receiver) = channel().unwrap();
        let reactor = Reactor::new().unwrap();
        let _thread = reactor.run(&Threads::new(None, requests)).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let output = Output::open(writer.as_fd(), &reactor).unwrap();
        // A pipe holds 64 KiB, the backlog as much: of 256 KiB a half is lost.
        for _ in 0..256 {
            output.write(&[b'a'; 1024]);
        }
        output.write(b"the end");
        assert!(output.lost() >= 64 << 10);
        drop(writer);
        let mut reader = std::fs::File::from(reader);
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.ends_with(b"the end") {
            let read = reader.read(&mut buffer).unwrap();
            assert!(read > 0, "closed before the end came");
            seen.extend_from_slice(&buffer[..read]);
        }
    }
}
