//! The host's end of a serial line or console port: output that never holds the guest up.
//!
//! Owns a duplicate of the descriptor and a bounded backlog. What the reader does not take in time is
//! dropped, oldest first, and counted. A serial port says one byte at a time: those of a burst go on
//! together, because each that went alone would wake its reader.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};

/// Bytes kept for a reader that is behind.
const BACKLOG: usize = 64 << 10;
/// The bytes of a burst go on when there are so many,
const BURST: usize = 1024;
/// or after so long at the latest.
const PATIENCE: Duration = Duration::from_millis(4);
/// What the reactor calls for.
const ROOM: u32 = 0;
const TIMER: u32 = 1;

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
    /// For the reactor, which must own whom it calls.
    me: Weak<Sink>,
    fd: OwnedFd,
    reactor: Reactor,
    timer: OwnedFd,
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
    /// Bytes of a burst, at most `BURST`.
    burst: Vec<u8>,
    /// The timer runs: what comes until then is of one burst.
    in_burst: bool,
    /// Of the timer; there from the first burst on.
    watch: Option<Registration>,
}

impl Output {
    /// Duplicates `fd`.
    pub fn open(fd: BorrowedFd<'_>, reactor: &Reactor) -> io::Result<Output> {
        let fd = fd.try_clone_to_owned()?;
        make_nonblocking(fd.as_fd())?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Output(Arc::new_cyclic(|me| Sink {
            me: Weak::clone(me),
            fd,
            reactor: reactor.clone(),
            timer,
            state: Mutex::default(),
        })))
    }

    /// Never blocks on a pipe or socket, never fails.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.0.lock();
        self.0.flush(&mut state);
        self.0.write(&mut state, bytes);
    }

    /// As `write`, for who says one byte at a time: a byte after silence goes on at once, one of a burst
    /// within 4 ms or at the next `flush`.
    pub fn put(&self, byte: u8) {
        let mut state = self.0.lock();
        if state.in_burst {
            state.burst.push(byte);
            if state.burst.len() >= BURST {
                self.0.flush(&mut state);
            }
        } else {
            self.0.write(&mut state, &[byte]);
            state.in_burst = self.0.begin_burst(&mut state);
        }
    }

    /// Writes what waits of a burst now: who has come to rest is read at once.
    pub fn flush(&self) {
        self.0.flush(&mut self.0.lock());
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

    fn write(&self, state: &mut State, bytes: &[u8]) {
        if state.closed {
            state.lost += bytes.len() as u64;
            return;
        }
        let written = if state.backlog.is_empty() {
            self.push(state, bytes)
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
            match self.register(self.fd.as_fd(), Interest::WRITE, ROOM) {
                Ok(registration) => state.waiting = Some(registration),
                Err(error) => tracing::warn!(%error, "a console's output cannot be waited for"),
            }
        }
    }

    fn register(
        &self,
        fd: BorrowedFd<'_>,
        interest: Interest,
        tag: u32,
    ) -> io::Result<Registration> {
        let subscriber = self.me.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        self.reactor.register(fd, interest, subscriber, tag)
    }

    /// False: there is no timer, each byte goes alone.
    fn begin_burst(&self, state: &mut State) -> bool {
        if state.watch.is_none() {
            match self.register(self.timer.as_fd(), Interest::READ, TIMER) {
                Ok(watch) => state.watch = Some(watch),
                Err(error) => tracing::warn!(%error, "a console's timer cannot be waited for"),
            }
        }
        state.watch.is_some() && self.start_timer()
    }

    fn start_timer(&self) -> bool {
        let Ok(it_value) = Timespec::try_from(PATIENCE) else {
            return false;
        };
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok()
    }

    fn flush(&self, state: &mut State) {
        if !state.burst.is_empty() {
            let mut burst = std::mem::take(&mut state.burst);
            self.write(state, &burst);
            burst.clear();
            state.burst = burst;
        }
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

    fn burst_over(&self) {
        let mut state = self.lock();
        if rustix::io::read(&self.timer, &mut [0; 8]).is_err() {
            return;
        }
        // As long as bytes come, the next of them need not go alone.
        state.in_burst = !state.burst.is_empty() && self.start_timer();
        self.flush(&mut state);
    }

    fn has_room(&self, ready: Ready) {
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

impl Subscriber for Sink {
    fn ready(&self, tag: u32, ready: Ready) {
        match tag {
            TIMER => self.burst_over(),
            _ => self.has_room(ready),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::request::channel;
    use crate::thread::Threads;

    /// The two ends of a socket that keeps apart what was written apart.
    fn packets() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn next(socket: &OwnedFd) -> Vec<u8> {
        let mut buffer = [0; 4096];
        let read = rustix::io::read(socket, &mut buffer).unwrap();
        buffer[..read].to_vec()
    }

    #[test]
    fn bytes_of_a_burst_go_on_together_and_without_more_to_come() {
        let (requests, _receiver) = channel().unwrap();
        let reactor = Reactor::new().unwrap();
        let _thread = reactor.run(&Threads::new(None, requests)).unwrap();
        let (reader, writer) = packets();
        let output = Output::open(writer.as_fd(), &reactor).unwrap();
        // So few that each would find room, if it went alone.
        let text: Vec<u8> = (0..200).collect();
        for byte in &text {
            output.put(*byte);
        }
        assert_eq!(next(&reader), text[..1], "the first does not wait");
        let (mut seen, mut count) = (text[..1].to_vec(), 1);
        while seen.len() < text.len() {
            seen.extend(next(&reader));
            count += 1;
        }
        assert_eq!(seen, text);
        assert!(count < 100, "{count} packets");
        // Silence ends the burst: the next byte is the first of another.
        while output.0.lock().in_burst {
            std::thread::yield_now();
        }
        output.put(b'a');
        assert!(output.0.lock().burst.is_empty());
        assert_eq!(next(&reader), b"a");
    }

    #[test]
    fn a_flush_or_many_bring_what_waits_and_nothing_overtakes_it() {
        let (reader, writer) = packets();
        // It never runs: no timer is heard.
        let still = Reactor::new().unwrap();
        let output = Output::open(writer.as_fd(), &still).unwrap();
        for byte in *b"abc" {
            output.put(byte);
        }
        output.flush();
        output.put(b'd');
        output.write(b"ef");
        output.flush();
        for _ in 0..=BURST {
            output.put(b'g');
        }
        let found: Vec<_> = (0..5).map(|_| next(&reader)).collect();
        let many = [b'g'; BURST];
        assert_eq!(found, [&b"a"[..], b"bc", b"d", b"ef", &many]);
        assert_eq!(output.0.lock().burst, b"g");
    }

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
