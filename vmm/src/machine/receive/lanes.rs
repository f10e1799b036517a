//! Lanes of a machine that arrives: connections by which its memory comes, each with a thread that reads, checks and puts.
//!
//! They are made when there is memory, and have ended before there is a machine. What one of them cannot take ends the
//! whole arrival: it closes the others, and the stream itself to who reads it, who has the last word to the other side.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use uuid::Uuid;

use crate::machine::SnapshotError;
use crate::machine::send::{MigrationError, late_at};
use crate::memory::GuestMemory;
use crate::stream::frame::{FrameReader, Kind};
use crate::stream::lane::{Hello, MOST_LANES, Share};
use crate::stream::{StreamError, Target, Totals, live, malformed, unpacked};
use crate::thread::Threads;
use crate::work::{Running, Work};

/// How long they may take to their ends behind the stream's: what was sent has been sent by then.
pub const LATE: Duration = Duration::from_secs(60);

/// All of a stream's. Dropping them ends them.
#[derive(Default)]
pub struct Lanes {
    shared: Arc<Shared>,
    running: Vec<Running>,
}

#[derive(Default)]
struct Shared {
    came: Mutex<Came>,
    /// A lane has, however it did.
    ended: Condvar,
    /// The lanes' and, as the last one, the stream's own.
    sockets: Vec<OwnedFd>,
}

#[derive(Default)]
struct Came {
    /// Of lanes that have come to their ends.
    totals: Totals,
    over: usize,
    /// Of them all the first.
    failed: Option<(usize, SnapshotError)>,
    stopped: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Came> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever waits for the other side does not any more; what is to be said to it can be.
    fn stop(&self) {
        self.lock().stopped = true;
        if let Some((main, lanes)) = self.sockets.split_last() {
            for lane in lanes {
                let _ = shutdown(lane, Shutdown::Both);
            }
            let _ = shutdown(main, Shutdown::Read);
        }
    }
}

impl Lanes {
    /// By these connections, whose own timeouts bound each wait, of the stream of this id that comes by `main`.
    pub fn begin<S: Read + AsFd + Send + 'static>(
        connections: Vec<S>,
        main: OwnedFd,
        stream: Uuid,
        memory: &GuestMemory,
        threads: &Threads,
    ) -> Result<Self, MigrationError> {
        let failed = |source| StreamError::Io {
            action: "make lanes of",
            source,
        };
        let count = connections.len();
        if count > MOST_LANES {
            return Err(malformed("more lanes than a stream may have").into());
        }
        let duplicate = |connection: &S| connection.as_fd().try_clone_to_owned();
        let sockets: Result<Vec<_>, _> = connections.iter().map(duplicate).collect();
        let mut sockets = sockets.map_err(failed)?;
        sockets.push(main);
        let length = memory.length().map_err(failed)?;
        let mut lanes = Lanes {
            shared: Arc::new(Shared {
                came: Mutex::default(),
                ended: Condvar::new(),
                sockets,
            }),
            running: Vec::new(),
        };
        for (lane, connection) in connections.into_iter().enumerate() {
            let shared = Arc::clone(&lanes.shared);
            // At most MOST_LANES.
            let hello = Hello {
                stream,
                lane: lane as u16,
                lanes: count as u16,
            };
            let memory = memory.clone();
            let body = move |()| {
                let mut ending = Ending {
                    shared: &shared,
                    lane,
                    came: Err(SnapshotError::Over),
                };
                ending.came = take(connection, hello, &memory, length).map_err(SnapshotError::from);
            };
            let running = threads.work(Work::Lane, &format!("lane-{lane}"), || (), body);
            lanes.running.push(running.map_err(failed)?);
        }
        Ok(lanes)
    }

    pub fn are_none(&self) -> bool {
        self.running.is_empty()
    }

    /// What came by the stream, which is closed where one of them has failed.
    pub fn unless_failed<T>(&self, came: Result<T, StreamError>) -> Result<T, MigrationError> {
        self.check()?;
        Ok(came?)
    }

    /// # Errors
    /// One of them has failed.
    fn check(&self) -> Result<(), MigrationError> {
        match self.shared.lock().failed.take() {
            Some((lane, source)) => Err(MigrationError::Lane { lane, source }),
            None => Ok(()),
        }
    }

    /// Waits until all of them have come to their ends, and adds what there was in them.
    ///
    /// # Errors
    /// One of them has failed, or they take longer than `most`.
    pub fn join(&mut self, most: Duration, totals: &mut Totals) -> Result<(), MigrationError> {
        let count = self.running.len();
        let on_their_way = |came: &mut Came| came.failed.is_none() && came.over < count;
        let (came, late) = (self.shared.ended)
            .wait_timeout_while(self.shared.lock(), most, on_their_way)
            .unwrap_or_else(PoisonError::into_inner);
        drop(came);
        if late.timed_out() {
            self.shared.stop();
        }
        self.running.drain(..).for_each(Running::join);
        self.check()?;
        if late.timed_out() {
            return Err(late_at("wait for the lanes of").into());
        }
        let came = self.shared.lock();
        totals.pages += came.totals.pages;
        totals.zeros += came.totals.zeros;
        match came.over == count {
            true => Ok(()),
            false => Err(SnapshotError::Over.into()),
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        if !self.running.is_empty() {
            self.shared.stop();
            self.running.drain(..).for_each(Running::join);
        }
    }
}

/// What became of a lane, also of one whose thread panics.
struct Ending<'a> {
    shared: &'a Shared,
    lane: usize,
    came: Result<Totals, SnapshotError>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut came = self.shared.lock();
        match std::mem::replace(&mut self.came, Err(SnapshotError::Over)) {
            Ok(totals) => {
                came.totals.pages += totals.pages;
                came.totals.zeros += totals.zeros;
                came.over += 1;
            }
            Err(error) => {
                if !came.stopped {
                    came.failed.get_or_insert((self.lane, error));
                }
                drop(came);
                self.shared.stop();
            }
        }
        self.shared.ended.notify_all();
    }
}

/// Reads a lane to its end, into memory of so many bytes; what there was in it.
fn take(
    connection: impl Read,
    hello: Hello,
    memory: &impl Target,
    length: u64,
) -> Result<Totals, StreamError> {
    let memory = Share {
        memory,
        lane: hello.lane.into(),
        lanes: hello.lanes.into(),
    };
    let mut frames = FrameReader::new(connection);
    hello.check(frames.next_frame()?)?;
    let mut totals = Totals::default();
    loop {
        match frames.next_frame()? {
            (Kind::Pages, []) => return Err(malformed("a frame of nothing")),
            (Kind::Pages, payload) => {
                let more = live::put(payload, &memory, length)?;
                totals.pages += more.pages;
                totals.zeros += more.zeros;
            }
            (Kind::End, payload) if unpacked::<Totals>(payload)? == totals => return Ok(totals),
            (Kind::End, _) => return Err(malformed("a lane's end counts other pages than it has")),
            _ => return Err(malformed("a frame where none of its kind should be")),
        }
    }
}

#[cfg(test)]
mod tests;
