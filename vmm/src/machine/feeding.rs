//! A machine that runs while its memory is still coming ([`super::Sender`], post-copy): two threads, one of which asks
//! for what somebody waits for, and one that takes in what comes.
//!
//! Both are made before the process is locked down. A connection that breaks is told to the owner, and waited for: the
//! guest stands where it touches what has not come.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use super::send::MigrationError;
use super::{MachineError, in_full};
use crate::device::Board;
use crate::eventfd::EventFd;
use crate::memory::{Faults, GuestMemory, Owed, PageSet};
use crate::request::{Request, RequestSender};
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::{StreamError, live, malformed};
use crate::thread::ThreadKind;

/// Memory that is coming. Dropping it ends its threads.
pub(super) struct Feeding {
    shared: Arc<Shared>,
    /// For the next connection.
    connections: Mutex<Option<Sender<File>>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    owed: Arc<Owed>,
    memory: GuestMemory,
    bytes: u64,
    line: Mutex<Line>,
    stop: EventFd,
    requests: RequestSender,
}

/// To the other side.
struct Line {
    /// None while there is no connection.
    out: Option<FrameWriter<File>>,
    /// Blocks that are waited for, and have not come.
    wanted: BTreeSet<u64>,
}

impl Feeding {
    /// `pages` come by the connection from here on, behind so many frames. Whoever touches one of them waits.
    pub fn begin(
        pages: PageSet,
        faults: Faults,
        memory: &GuestMemory,
        board: &Board,
        connection: &impl AsFd,
        frames: u32,
    ) -> Result<Self, MigrationError> {
        let Board {
            threads, requests, ..
        } = board;
        let bytes = memory.file_bytes()?;
        let owed = memory.owe(faults, pages)?;
        let made = || -> io::Result<(File, File, EventFd)> {
            // How long there is nothing to say is nobody's fault.
            rustix::net::sockopt::set_socket_timeout(
                connection.as_fd(),
                rustix::net::sockopt::Timeout::Recv,
                None,
            )?;
            let end = || connection.as_fd().try_clone_to_owned().map(File::from);
            Ok((end()?, end()?, EventFd::new()?))
        };
        let (reads, writes, stop) = made().map_err(unconnected)?;
        let line = Line {
            out: Some(FrameWriter::new(writes)),
            wanted: BTreeSet::new(),
        };
        let shared = Arc::new(Shared {
            owed,
            memory: memory.clone(),
            bytes,
            line: Mutex::new(line),
            stop,
            requests: requests.clone(),
        });
        let (connections, next) = channel();
        let mut feeding = Feeding {
            shared,
            connections: Mutex::new(Some(connections)),
            threads: Vec::new(),
        };
        let asks = Arc::clone(&feeding.shared);
        let asking = move |()| asks.ask();
        let asking = threads.spawn(ThreadKind::Pages, "faults", || (), asking);
        feeding.threads.push(asking.map_err(unconnected)?);
        let takes = Arc::clone(&feeding.shared);
        let taking = move |()| takes.take_in(FrameReader::behind(reads, frames), &next);
        let taking = threads.spawn(ThreadKind::Pages, "pages", || (), taking);
        feeding.threads.push(taking.map_err(unconnected)?);
        Ok(feeding)
    }

    /// Says to the other side that the machine is there.
    pub fn say_ready(&self) -> Result<(), StreamError> {
        match &mut self.shared.line().out {
            Some(out) => out.write(Kind::Ready, b""),
            None => Err(malformed("its connection broke before it was a machine")),
        }
    }

    /// Says that it is not, and why.
    pub fn say_refused(&self, reason: &[u8]) {
        if let Some(out) = &mut self.shared.line().out {
            // Who sent it may be gone.
            let _ = out.write(Kind::Refused, reason);
        }
    }

    /// There is no connection.
    pub fn is_starving(&self) -> bool {
        self.shared.line().out.is_none()
    }

    /// Of what has come so far, and what has not: by another connection.
    pub fn go_on_by(&self, connection: OwnedFd) -> Result<(), MachineError> {
        let connections = self.connections.lock();
        let connections = connections.unwrap_or_else(PoisonError::into_inner);
        let sent = connections
            .as_ref()
            .map(|it| it.send(File::from(connection)));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(MachineError::Fed),
        }
    }

    /// Who waits for what will not come any more is to fail, not to go on with something else.
    fn abandon(&self) {
        if let Err(error) = self.shared.owed.abandon() {
            tracing::error!(%error, "what waits for memory that does not come waits on");
        }
    }
}

/// Before anything else of a machine ends: what waits for memory that will not come would never end.
#[derive(Default)]
pub(super) struct AtEnd(pub Option<Arc<Feeding>>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        if let Some(feeding) = &self.0
            && feeding.is_starving()
            && !feeding.shared.memory.is_whole()
        {
            feeding.abandon();
        }
    }
}

impl Drop for Feeding {
    fn drop(&mut self) {
        *(self.connections.lock()).unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.stop.signal();
        if let Some(out) = &mut self.shared.line().out {
            let _ = shutdown(&*out.get_mut(), Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until all has come, or nobody waits any more.
    fn ask(&self) {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.owed.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return self.fail(&format!("wait for faults: {errno}")),
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            loop {
                match self.owed.next_wanted() {
                    Ok(Some(number)) => self.want(number),
                    Ok(None) => break,
                    Err(error) => return self.fail(&format!("answer a fault: {error}")),
                }
            }
        }
    }

    fn want(&self, number: u64) {
        let mut line = self.line();
        let Line { out, wanted } = &mut *line;
        if wanted.insert(number)
            && let Some(out) = out
        {
            // One that is broken is found so by who reads.
            let _ = out.write(Kind::Wanted, &number.to_le_bytes());
        }
    }

    /// No guest can go on whose touches nobody answers.
    fn fail(&self, detail: &str) {
        self.requests.send(Request::DeviceFault {
            device: "memory".to_owned(),
            detail: detail.to_owned(),
        });
    }

    fn take_in(&self, mut frames: FrameReader<File>, next: &Receiver<File>) {
        loop {
            let error = match self.take_from(&mut frames) {
                Ok(()) => return self.take_leave(&mut frames),
                Err(error) => error,
            };
            self.line().out = None;
            let reason = in_full(&error);
            self.requests.send(Request::Starving { reason });
            frames = loop {
                let Ok(connection) = next.recv() else { return };
                match self.begin_anew(connection) {
                    Ok(frames) => break frames,
                    Err(error) => {
                        self.line().out = None;
                        let reason = in_full(&error);
                        self.requests.send(Request::Starving { reason });
                    }
                }
            };
        }
    }

    /// Until all is there.
    fn take_from(&self, frames: &mut FrameReader<File>) -> Result<(), MigrationError> {
        while self.owed.count() > 0 {
            match frames.next_frame()? {
                (Kind::Pages, payload) => {
                    live::put(payload, &*self.owed, self.bytes)?;
                    let come = |number: &u64| self.owed.has(*number);
                    self.line().wanted.retain(come);
                    self.say(Kind::Got)?;
                }
                (Kind::Whole, _) => return Err(malformed("an end before all has come").into()),
                _ => return Err(malformed("a frame where none of its kind should be").into()),
            }
        }
        Ok(())
    }

    /// The other side hears that all is there, and says that it has heard it: whoever closed a connection before that
    /// might take the word back that is still on its way.
    fn take_leave(&self, frames: &mut FrameReader<File>) {
        self.stop.signal();
        match self.memory.owe_nothing() {
            Ok(()) => self.requests.send(Request::Whole),
            // Nobody answers those who still fault.
            Err(error) => self.fail(&in_full(&error)),
        }
        let said = self.say(Kind::Whole);
        while said.is_ok() && !matches!(frames.next_frame(), Ok((Kind::Whole, _)) | Err(_)) {}
    }

    fn say(&self, kind: Kind) -> Result<(), StreamError> {
        match &mut self.line().out {
            Some(out) => out.write(kind, b""),
            None => Err(malformed("its connection is broken")),
        }
    }

    /// Says what is lacking, and first of all what is waited for.
    fn begin_anew(&self, connection: File) -> Result<FrameReader<File>, MigrationError> {
        let writes = connection.try_clone().map_err(unconnected)?;
        let mut line = self.line();
        let mut out = FrameWriter::new(writes);
        for payload in live::owed(&self.owed.pages()) {
            out.write(Kind::Owed, &payload)?;
        }
        out.write(Kind::Ready, b"")?;
        for number in &line.wanted {
            out.write(Kind::Wanted, &number.to_le_bytes())?;
        }
        line.out = Some(out);
        Ok(FrameReader::new(connection))
    }
}

fn unconnected(source: io::Error) -> MigrationError {
    StreamError::Io {
        action: "go on with",
        source,
    }
    .into()
}
