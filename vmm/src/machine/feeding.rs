//! A machine that runs while its memory is still coming ([`super::Sender`], post-copy): two threads, one of which asks
//! for what somebody waits for, and one that takes in what comes.
//!
//! Both are made before the process is locked down. A connection that breaks is told to the owner, and waited for: the
//! guest stands where it touches what has not come. Neither thread ever waits for the other side to read.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::send::MigrationError;
use super::{MachineError, in_full};
use crate::eventfd::EventFd;
use crate::memory::{Faults, GuestMemory, Owed, PageSet};
use crate::request::{Request, RequestSender};
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::{StreamError, live, malformed};
use crate::thread::{ThreadKind, Threads};

/// Memory that is coming. Dropping it ends its threads.
pub(super) struct Feeding {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// By which the owner of a machine whose memory is coming has it come by another connection, also while the thread that
/// has the machine waits for some of it itself.
#[derive(Clone)]
pub struct Feeder(Arc<Shared>);

struct Shared {
    owed: Arc<Owed>,
    memory: GuestMemory,
    bytes: u64,
    line: Mutex<Line>,
    /// Something of `line` is new to who takes in.
    news: EventFd,
    /// Nobody waits for anything any more.
    paid: EventFd,
    /// The machine ends.
    stop: EventFd,
    requests: RequestSender,
}

/// To the other side.
struct Line {
    /// None while there is no connection.
    out: Option<Outbox>,
    /// The next one.
    next: Option<File>,
    /// Which is being begun with.
    begins: bool,
    /// Blocks that are waited for, and have not come.
    wanted: BTreeSet<u64>,
    /// All has come.
    whole: bool,
}

/// What is said, as far as the other side does not take it yet.
struct Outbox {
    socket: File,
    frames: FrameWriter<Vec<u8>>,
}

impl Outbox {
    /// Behind so many frames that were said by it.
    fn behind(socket: File, frames: u32) -> Self {
        Outbox {
            socket,
            frames: FrameWriter::behind(Vec::new(), frames),
        }
    }

    fn say(&mut self, kind: Kind, payload: &[u8]) -> Result<(), StreamError> {
        self.frames.write(kind, payload)?;
        self.flush()
    }

    /// As much as is taken at once.
    fn flush(&mut self) -> Result<(), StreamError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let left = self.frames.get_mut();
        while !left.is_empty() {
            match send(&self.socket, left, flags) {
                Ok(sent) => drop(left.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => {
                    let (action, source) = ("write", errno.into());
                    return Err(StreamError::Io { action, source });
                }
            }
        }
        Ok(())
    }

    fn is_full(&mut self) -> bool {
        !self.frames.get_mut().is_empty()
    }
}

impl Feeding {
    /// `pages` come by the connection from here on, behind so many frames that came and so many that were said. Whoever
    /// touches one of them waits.
    pub fn begin(
        pages: PageSet,
        faults: Faults,
        memory: &GuestMemory,
        (threads, requests): (&Threads, &RequestSender),
        connection: &impl AsFd,
        [frames, answers]: [u32; 2],
    ) -> Result<Self, MigrationError> {
        let bytes = memory.file_bytes()?;
        let owed = memory.owe(faults, pages)?;
        let end = || connection.as_fd().try_clone_to_owned().map(File::from);
        let (reads, writes) = (end().map_err(unconnected)?, end().map_err(unconnected)?);
        let event = || EventFd::new().map_err(unconnected);
        let shared = Arc::new(Shared {
            owed,
            memory: memory.clone(),
            bytes,
            line: Mutex::new(Line {
                out: Some(Outbox::behind(writes, answers)),
                next: None,
                begins: false,
                wanted: BTreeSet::new(),
                whole: false,
            }),
            news: event()?,
            paid: event()?,
            stop: event()?,
            requests: requests.clone(),
        });
        let mut feeding = Feeding {
            shared,
            threads: Vec::new(),
        };
        let asks = Arc::clone(&feeding.shared);
        let asking = move |()| asks.ask();
        let asking = threads.spawn(ThreadKind::Pages, "faults", || (), asking);
        feeding.threads.push(asking.map_err(unconnected)?);
        let takes = Arc::clone(&feeding.shared);
        let taking = move |()| takes.take_in(reads, frames);
        let taking = threads.spawn(ThreadKind::Pages, "pages", || (), taking);
        feeding.threads.push(taking.map_err(unconnected)?);
        Ok(feeding)
    }

    /// Says to the other side that the machine is there.
    pub fn say_ready(&self) -> Result<(), StreamError> {
        self.shared.say(Kind::Ready, b"")
    }

    /// Says that it is not, and why.
    pub fn say_refused(&self, reason: &[u8]) {
        // Who sent it may be gone.
        let _ = self.shared.say(Kind::Refused, reason);
    }

    pub fn feeder(&self) -> Feeder {
        Feeder(Arc::clone(&self.shared))
    }
}

impl Feeder {
    /// Whether there is a connection by which it comes, as far as is known, or nothing is to come.
    pub fn is_fed(&self) -> bool {
        let line = self.0.line();
        line.whole || line.out.is_some() || line.next.is_some() || line.begins
    }

    /// Has what of memory has not come come by this connection, to the machine that it comes from, of which
    /// [`super::Offered::go_on_by`] is called. [`super::Event::Whole`] or [`super::Event::Starving`] follows, unless all
    /// was here, which the other side is told.
    ///
    /// # Errors
    /// It is here, and this connection is broken, too.
    pub fn go_on_by(&self, connection: OwnedFd) -> Result<(), MachineError> {
        let connection = File::from(connection);
        let mut line = self.0.line();
        if line.whole {
            let mut out = Outbox::behind(connection, 0);
            let said = out.say(Kind::Ready, b"");
            return said
                .and_then(|()| out.say(Kind::Whole, b""))
                .map_err(|_| MachineError::Fed);
        }
        line.next = Some(connection);
        drop(line);
        self.0.news.signal();
        Ok(())
    }
}

/// Before anything else of a machine ends: what waits for memory that has not come would never end, if nobody sends it.
/// A thread of ours that waits ends the process then, by SIGSEGV: it is ending anyway, and what such a thread would write to
/// a disk is not what the guest has told it to.
#[derive(Default)]
pub(super) struct AtEnd(pub Option<Arc<Feeding>>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        if let Some(feeding) = &self.0
            && !feeding.shared.line().whole
        {
            feeding.shared.stop.signal();
            // Who waits for it is to fail, not to go on with something else.
            if let Err(error) = feeding.shared.owed.abandon() {
                tracing::error!(%error, "what waits for memory that does not come waits on");
            }
        }
    }
}

impl Drop for Feeding {
    fn drop(&mut self) {
        self.shared.stop.signal();
        // Whoever reads in the middle of a frame looks at nothing else.
        if let Some(out) = &self.shared.line().out {
            let _ = shutdown(&out.socket, Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        *self.shared.line() = Line {
            out: None,
            next: None,
            begins: false,
            wanted: BTreeSet::new(),
            whole: true,
        };
    }
}

/// Why nothing is read any more.
enum Interrupted {
    /// The machine ends.
    Ended,
    /// There is nothing that could come.
    Paid,
    Broken(MigrationError),
}

impl From<MigrationError> for Interrupted {
    fn from(error: MigrationError) -> Self {
        Interrupted::Broken(error)
    }
}

impl From<StreamError> for Interrupted {
    fn from(error: StreamError) -> Self {
        Interrupted::Broken(error.into())
    }
}

impl Shared {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until all has come, or the machine ends.
    fn ask(&self) {
        loop {
            let ready = ready([
                (self.owed.as_fd(), PollFlags::IN),
                (self.paid.as_fd(), PollFlags::IN),
                (self.stop.as_fd(), PollFlags::IN),
            ]);
            match ready {
                Ok([_, false, false]) => {}
                Ok(_) => return,
                Err(error) => return self.fail(&format!("wait for faults: {error}")),
            }
            loop {
                match self.owed.next_wanted() {
                    Ok(Some(number)) => self.want(number),
                    Ok(None) => break,
                    // Nothing is registered any more, or will not be in a moment, and whoever waited looks again.
                    Err(_) if self.owed.count() == 0 => return,
                    Err(error) => return self.fail(&format!("answer a fault: {error}")),
                }
            }
        }
    }

    fn want(&self, number: u64) {
        let mut line = self.line();
        let Line { out, wanted, .. } = &mut *line;
        if wanted.insert(number)
            && let Some(out) = out
        {
            // One that is broken is found so by who reads, and what is wanted is said to the next.
            let _ = out.say(Kind::Wanted, &number.to_le_bytes());
            if out.is_full() {
                self.news.signal();
            }
        }
    }

    /// No guest can go on whose touches nobody answers.
    fn fail(&self, detail: &str) {
        self.requests.send(Request::DeviceFault {
            device: "memory".to_owned(),
            detail: detail.to_owned(),
        });
    }

    fn take_in(&self, connection: File, frames: u32) {
        let mut frames = FrameReader::behind(connection, frames);
        loop {
            match self.take_from(&mut frames) {
                Ok(()) | Err(Interrupted::Paid) => return self.take_leave(&mut frames),
                Err(Interrupted::Ended) => return,
                Err(Interrupted::Broken(error)) => self.starve(&error),
            }
            frames = loop {
                match self.another() {
                    Ok(connection) => match self.begin_anew(connection) {
                        Ok(frames) => break frames,
                        Err(error) => self.starve(&error),
                    },
                    Err(Interrupted::Paid) => return self.is_whole(),
                    Err(_) => return,
                }
            };
        }
    }

    fn starve(&self, error: &MigrationError) {
        let mut line = self.line();
        (line.out, line.begins) = (None, false);
        drop(line);
        let reason = in_full(error);
        self.requests.send(Request::Starving { reason });
    }

    /// Until all is there.
    fn take_from(&self, frames: &mut FrameReader<File>) -> Result<(), Interrupted> {
        while self.owed.count() > 0 {
            self.wait_for(frames)?;
            match frames.next_frame()? {
                (Kind::Pages, payload) => {
                    live::put(payload, &*self.owed, self.bytes)?;
                    let waited = |number: &u64| self.owed.has(*number);
                    self.line().wanted.retain(waited);
                    self.say(Kind::Got, b"")?;
                }
                (Kind::Whole, _) => return Err(malformed("an end before all has come").into()),
                _ => return Err(malformed("a frame where none of its kind should be").into()),
            }
        }
        Ok(())
    }

    /// Until there is something to be read; what was said goes out meanwhile.
    fn wait_for(&self, frames: &mut FrameReader<File>) -> Result<(), Interrupted> {
        loop {
            let out = match &mut self.line().out {
                Some(out) => {
                    out.flush()?;
                    out.is_full()
                }
                None => return Err(malformed("its connection is broken").into()),
            };
            let wanted = match out {
                true => PollFlags::IN | PollFlags::OUT,
                false => PollFlags::IN,
            };
            let socket = frames.get_mut();
            let mut fds = [
                PollFd::from_borrowed_fd(socket.as_fd(), wanted),
                PollFd::from_borrowed_fd(self.news.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.owed.empty().as_fd(), PollFlags::IN),
            ];
            wait(&mut fds).map_err(unconnected)?;
            let [socket, news, stop, empty] = fds.map(|fd| fd.revents());
            if !stop.is_empty() {
                return Err(Interrupted::Ended);
            }
            if !empty.is_empty() {
                return Err(Interrupted::Paid);
            }
            if !news.is_empty() {
                self.news.take();
            }
            if self.line().next.is_some() {
                return Err(malformed("another connection is to be used").into());
            }
            if !(socket - PollFlags::OUT).is_empty() {
                return Ok(());
            }
        }
    }

    /// The next connection.
    fn another(&self) -> Result<File, Interrupted> {
        loop {
            let mut line = self.line();
            if let Some(next) = line.next.take() {
                line.begins = true;
                return Ok(next);
            }
            drop(line);
            let ready = ready([
                (self.news.as_fd(), PollFlags::IN),
                (self.stop.as_fd(), PollFlags::IN),
                (self.owed.empty().as_fd(), PollFlags::IN),
            ]);
            match ready.map_err(unconnected)? {
                [_, true, _] => return Err(Interrupted::Ended),
                [_, _, true] => return Err(Interrupted::Paid),
                _ => drop(self.news.take()),
            }
        }
    }

    fn say(&self, kind: Kind, payload: &[u8]) -> Result<(), StreamError> {
        match &mut self.line().out {
            Some(out) => out.say(kind, payload),
            None => Err(malformed("its connection is broken")),
        }
    }

    /// Says what is lacking, and what is waited for.
    fn begin_anew(&self, connection: File) -> Result<FrameReader<File>, MigrationError> {
        let mut out = Outbox::behind(connection.try_clone().map_err(unconnected)?, 0);
        let mut line = self.line();
        for payload in live::owed(&self.owed.pages()) {
            out.say(Kind::Owed, &payload)?;
        }
        out.say(Kind::Ready, b"")?;
        for number in &line.wanted {
            out.say(Kind::Wanted, &number.to_le_bytes())?;
        }
        (line.out, line.begins) = (Some(out), false);
        Ok(FrameReader::new(connection))
    }

    /// The other side hears that all is there, and says that it has heard it: whoever closed a connection before that
    /// might take the word back that is still on its way.
    fn take_leave(&self, frames: &mut FrameReader<File>) {
        self.is_whole();
        let mut goes_on = self.say(Kind::Whole, b"").is_ok();
        while goes_on {
            let heard = wait_or(frames.get_mut().as_fd(), &self.stop);
            goes_on = heard && !matches!(frames.next_frame(), Ok((Kind::Whole, _)) | Err(_));
        }
        self.line().out = None;
    }

    fn is_whole(&self) {
        self.paid.signal();
        self.line().whole = true;
        match self.memory.owe_nothing() {
            Ok(()) => self.requests.send(Request::Whole),
            // Nobody answers those who still fault.
            Err(error) => self.fail(&in_full(&error)),
        }
    }
}

/// Waits; which of them are ready.
fn ready<const N: usize>(fds: [(BorrowedFd<'_>, PollFlags); N]) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
    wait(&mut fds)?;
    Ok(fds.map(|fd| !fd.revents().is_empty()))
}

fn wait(fds: &mut [PollFd<'_>]) -> io::Result<()> {
    match poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Until the one can be read, or, and that is no, the other.
fn wait_or(one: BorrowedFd<'_>, other: &EventFd) -> bool {
    matches!(
        ready([(one, PollFlags::IN), (other.as_fd(), PollFlags::IN)]),
        Ok([true, false])
    )
}

fn unconnected(source: io::Error) -> MigrationError {
    StreamError::Io {
        action: "go on with",
        source,
    }
    .into()
}
