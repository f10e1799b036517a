//! Lanes of a machine that is sent: connections by which its memory goes, each with a thread that reads, packs and writes.
//!
//! The machine's owner gives them the names of pages; a lane looks at a page when its turn comes, and writes in the order
//! in which it was given. A block always goes by the same one, so that what was written of a page last is its newest
//! content, and between rounds nobody has to wait for that. A round is over, though, when all of it has been
//! written: what a round took tells how fast the connections are, and what it left is all that there is to be sent
//! ([`crate::stream::converge`]); without that a round of little would be over at once, and say neither.
//!
//! The owner, who has a guest to serve, waits for a lane for no longer than [`TURN`]. None outlives the [`Lanes`].

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};
use uuid::Uuid;

use super::debt::{Answers, is_readable_within};
use super::journal::Part;
use super::{Luggage, MigrationError, Sender, Unsent, late_at, no_answer, refused};
use crate::machine::snapshot::read_pages;
use crate::machine::{Machine, SnapshotError};
use crate::memory::GuestMemory;
use crate::stream::converge::Policy;
use crate::stream::frame::{FrameWriter, Kind};
use crate::stream::lane::{Connections, GROUP, Hello, MOST_LANES, lane_of};
use crate::stream::live::Batch;
use crate::stream::{Mask, StreamError, Totals, packed};
use crate::thread::Threads;
use crate::work::{Running, Work};

/// How long the owner waits for a lane before it has its turn: as a megabyte takes at 1 Gbit/s.
const TURN: Duration = Duration::from_millis(10);
/// Pages that wait in one lane before no more are given to any: 2 MiB.
const ROOM: u64 = 512;
/// How long the other side may take to say why it has closed a lane.
const WORD: Duration = Duration::from_secs(3);
/// How long it may take to make disks durable; the guest runs meanwhile.
const SETTLED: Duration = Duration::from_secs(600);

/// Pages of a block that are to go.
#[derive(Debug, Clone, Copy)]
pub struct Parcel {
    pub number: u64,
    pub mask: Mask,
    /// Nothing of them was sent before.
    pub fresh: bool,
}

/// All of a stream's. Dropping them ends them, whatever is left.
#[derive(Default)]
pub struct Lanes {
    shared: Arc<Shared>,
    running: Vec<Running>,
    /// By which a lane is called that waits for the other side.
    sockets: Vec<OwnedFd>,
    /// The stream's own connection.
    main: Option<OwnedFd>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is more to be written, or there will not be.
    given: Condvar,
    /// Something was written, or a lane has ended.
    gone: Condvar,
}

#[derive(Default)]
struct State {
    lanes: Vec<Lane>,
    /// Nothing more is given.
    closed: bool,
    /// What was given is not to go any more.
    stopped: bool,
    failed: Option<(usize, SnapshotError)>,
}

#[derive(Default)]
struct Lane {
    given: VecDeque<Parcel>,
    /// Pages that were given, and have not been written.
    left: u64,
    /// What has been written.
    totals: Totals,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, lane: usize, error: SnapshotError) {
        let mut state = self.lock();
        // Of those that fail because others did nobody has to hear.
        if !state.stopped {
            state.failed.get_or_insert((lane, error));
        }
        self.gone.notify_all();
    }
}

impl Lanes {
    /// By these connections, whose own timeouts bound each wait, beside `main` with the stream of this id.
    pub fn begin<S: Write + AsFd + Send + 'static>(
        connections: Vec<S>,
        main: &impl AsFd,
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
            return Err(failed(ErrorKind::InvalidInput.into()).into());
        }
        let mut lanes = Lanes::default();
        lanes.shared.lock().lanes.resize_with(count, Lane::default);
        lanes.main = Some(main.as_fd().try_clone_to_owned().map_err(failed)?);
        for (lane, connection) in connections.into_iter().enumerate() {
            let socket = connection.as_fd().try_clone_to_owned();
            lanes.sockets.push(socket.map_err(failed)?);
            let worker = Worker {
                shared: Arc::clone(&lanes.shared),
                lane,
                // At most MOST_LANES.
                hello: Hello {
                    stream,
                    lane: lane as u16,
                    lanes: count as u16,
                },
                memory: memory.clone(),
                out: FrameWriter::new(connection),
            };
            let name = format!("lane-{lane}");
            let running = threads.work(Work::Lane, &name, || (), move |()| worker.run());
            lanes.running.push(running.map_err(failed)?);
        }
        Ok(lanes)
    }

    pub fn count(&self) -> usize {
        self.running.len()
    }

    /// Each has room for more.
    pub fn have_room(&self) -> Result<bool, MigrationError> {
        self.within_a_turn(|state| state.lanes.iter().all(|lane| lane.left < ROOM))
    }

    /// All that was given has been written.
    pub fn are_dry(&self) -> Result<bool, MigrationError> {
        self.within_a_turn(|state| state.lanes.iter().all(|lane| lane.left == 0))
    }

    /// They have said what there was in them, of those that were closed, and the other side has all of it or will.
    pub fn are_over(&self) -> Result<bool, MigrationError> {
        self.within_a_turn(|state| state.lanes.iter().all(|lane| lane.ended))
    }

    pub fn give(&self, parcels: &[Parcel]) {
        let mut state = self.shared.lock();
        let count = state.lanes.len();
        for parcel in parcels {
            if let Some(lane) = state.lanes.get_mut(lane_of(parcel.number, count)) {
                lane.left += parcel.mask.count();
                lane.given.push_back(*parcel);
            }
        }
        self.shared.given.notify_all();
    }

    /// Nothing more is to be given.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.given.notify_all();
    }

    /// Pages that were given and have not been written.
    pub fn left(&self) -> u64 {
        self.shared.lock().lanes.iter().map(|lane| lane.left).sum()
    }

    /// The other side says something by the stream's own connection, or that is cut, within so long.
    fn are_answered(&self, time: Duration) -> Result<bool, MigrationError> {
        match &self.main {
            Some(main) => is_readable_within(main, time),
            None => Ok(false),
        }
    }

    /// What has been written to the connections.
    pub fn totals(&self) -> Totals {
        let state = self.shared.lock();
        let mut sum = Totals::default();
        for Lane { totals, .. } in &state.lanes {
            sum.pages += totals.pages;
            sum.zeros += totals.zeros;
        }
        sum
    }

    fn within_a_turn(&self, is_so: impl Fn(&State) -> bool) -> Result<bool, MigrationError> {
        let waits = |state: &mut State| state.failed.is_none() && !is_so(state);
        let (mut state, _) = (self.shared.gone)
            .wait_timeout_while(self.shared.lock(), TURN, waits)
            .unwrap_or_else(PoisonError::into_inner);
        match state.failed.take() {
            Some((lane, source)) => Err(MigrationError::Lane { lane, source }),
            None => Ok(is_so(&state)),
        }
    }

    /// A lane failed since the other side has closed it, which says on the stream's own connection why.
    pub fn were_refused(&self, error: &MigrationError) -> bool {
        let closed = |error: &std::io::Error| {
            matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            )
        };
        match error {
            MigrationError::Lane {
                source: SnapshotError::Stream(StreamError::Io { source, .. }),
                ..
            } => closed(source) && matches!(self.are_answered(WORD), Ok(true)),
            _ => false,
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        let over = {
            let mut state = self.shared.lock();
            state.stopped = true;
            state.lanes.iter().all(|lane| lane.ended)
        };
        self.shared.given.notify_all();
        // What has been sent is not taken back.
        for socket in self.sockets.iter().filter(|_| !over) {
            let _ = shutdown(socket, Shutdown::Both);
        }
        for running in self.running.drain(..) {
            running.join();
        }
    }
}

/// Says that a lane has ended, however it did.
struct Ending {
    shared: Arc<Shared>,
    lane: usize,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.fail(self.lane, SnapshotError::Over);
        }
        if let Some(lane) = self.shared.lock().lanes.get_mut(self.lane) {
            lane.ended = true;
        }
        self.shared.gone.notify_all();
    }
}

/// The thread of a lane.
struct Worker<S> {
    shared: Arc<Shared>,
    lane: usize,
    hello: Hello,
    memory: GuestMemory,
    out: FrameWriter<S>,
}

impl<S: Write> Worker<S> {
    fn run(mut self) {
        let (shared, lane) = (Arc::clone(&self.shared), self.lane);
        let _ending = Ending { shared, lane };
        if let Err(error) = self.work() {
            self.shared.fail(self.lane, error);
        }
    }

    fn work(&mut self) -> Result<(), SnapshotError> {
        self.out.write(Kind::Lane, &self.hello.packed()?)?;
        self.flush()?;
        let mut batch = Batch::default();
        let mut totals = Totals::default();
        while let Some(some) = self.next()? {
            let mut pages = 0;
            for Parcel {
                number,
                mask,
                fresh,
            } in some
            {
                let content = read_pages(&self.memory, number, mask)?;
                // Memory has at most 2^32 blocks.
                batch.add(number as u32, mask, &content, fresh);
                pages += mask.count();
            }
            if let Some(payload) = batch.payload() {
                self.out.write(Kind::Pages, payload)?;
            }
            totals.pages += batch.totals().pages;
            totals.zeros += batch.totals().zeros;
            batch.clear();
            self.has_gone(pages, totals);
        }
        if self.shared.lock().stopped {
            return Ok(());
        }
        self.out.write(Kind::End, &packed(&totals)?)?;
        Ok(self.flush()?)
    }

    /// A frame's worth of what was given; none: nothing more will be.
    fn next(&mut self) -> Result<Option<Vec<Parcel>>, StreamError> {
        let is_dry = {
            let state = self.shared.lock();
            let lane = state.lanes.get(self.lane);
            lane.is_none_or(|lane| lane.given.is_empty())
        };
        if is_dry {
            // What is little may wait at the connection for more, and that may be long in coming.
            self.flush()?;
        }
        let mut state = self.shared.lock();
        loop {
            let (stopped, closed) = (state.stopped, state.closed);
            match state.lanes.get_mut(self.lane) {
                Some(lane) if !stopped && !lane.given.is_empty() => {
                    let length = lane.given.len().min(GROUP as usize);
                    return Ok(Some(lane.given.drain(..length).collect()));
                }
                Some(_) if !stopped && !closed => {
                    let waited = self.shared.given.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
                _ => return Ok(None),
            }
        }
    }

    fn has_gone(&self, pages: u64, totals: Totals) {
        if let Some(lane) = self.shared.lock().lanes.get_mut(self.lane) {
            lane.left = lane.left.saturating_sub(pages);
            lane.totals = totals;
        }
        self.shared.gone.notify_all();
    }

    fn flush(&mut self) -> Result<(), StreamError> {
        self.out.get_mut().flush().map_err(super::unwritten)
    }
}

impl<S: Read + Write + AsFd + Send + 'static> Sender<S> {
    /// As [`Sender::begin`]; its memory goes by lanes if there are any, to whoever called [`crate::machine::receive_by`].
    ///
    /// # Errors
    /// Likewise, or there are more lanes than a machine may have.
    pub fn begin_by(
        machine: Machine,
        connections: Connections<S>,
        policy: Policy,
        luggage: Luggage,
    ) -> Result<Self, Unsent> {
        let Connections { main, lanes } = connections;
        if lanes.is_empty() {
            return Self::begin(machine, main, policy, luggage);
        }
        Self::begin_with(machine, main, policy, luggage, |machine, main, stream| {
            let threads = &machine.board.threads;
            Lanes::begin(lanes, main, stream, &machine.memory, threads)
        })
    }
}

impl<S> Sender<S> {
    /// Names some more of memory to the lanes, a megabyte at most, if they have room for it.
    pub(super) fn give_some(&mut self) -> Result<(), MigrationError> {
        if self.lanes.have_room()? {
            let fresh = self.journal.is_fresh(Part::Memory);
            let mut parcels = Vec::new();
            while parcels.len() < GROUP as usize
                && let Some(piece) = self.pending.next(Some(Part::Memory))
            {
                self.round.pages += piece.mask.count();
                parcels.push(Parcel {
                    number: piece.number,
                    mask: piece.mask,
                    fresh,
                });
            }
            self.lanes.give(&parcels);
        }
        self.count_lanes();
        Ok(())
    }

    /// All of the round has gone.
    pub(super) fn lanes_are_dry(&mut self) -> Result<bool, MigrationError> {
        let are_dry = self.lanes.are_dry()?;
        self.count_lanes();
        Ok(are_dry)
    }

    /// Memory goes past a stream whose reader makes disks durable, and what is left behind that would have to wait in the
    /// pause: so the round is over when that has been done.
    pub(super) fn disks_are_settled(&mut self) -> Result<bool, MigrationError>
    where
        S: Read + Write,
    {
        let Some(since) = self.unsettled else {
            return Ok(true);
        };
        if !self.lanes.are_answered(TURN)? {
            return match since.elapsed() < SETTLED {
                true => Ok(false),
                false => Err(late_at("wait for the disks of").into()),
            };
        }
        let mut answers = Answers::behind(self.out.get_mut(), self.answers);
        match answers.next()? {
            (Kind::Got, _) => {}
            (Kind::Refused, reason) => return Err(refused(reason)),
            _ => return Err(no_answer()),
        }
        self.answers = answers.frames();
        self.unsettled = None;
        self.round.settling += since.elapsed();
        Ok(true)
    }

    /// Waits until the other side has all that was given, or will have it.
    pub(super) fn end_lanes(&mut self, stopped: Instant) -> Result<(), MigrationError> {
        let longest = self.policy.longest;
        self.lanes.close();
        while !self.lanes.are_over()? {
            if stopped.elapsed() > longest {
                return Err(MigrationError::Late { longest });
            }
            // Nothing is to be said yet: the other side refuses, or somebody has cut it so that the guest need not wait.
            if self.lanes.are_answered(Duration::ZERO)? {
                return Err(super::unwritten(ErrorKind::BrokenPipe.into()).into());
            }
        }
        self.count_lanes();
        Ok(())
    }

    fn count_lanes(&mut self) {
        if self.lanes.count() > 0 {
            let now = self.lanes.totals();
            self.round.content += now.pages - self.report.totals.pages;
            self.report.totals = now;
        }
    }
}

#[cfg(test)]
mod tests;
