//! The thread of a disk: takes requests from its queues, sends them through the filters to the storage
//! and gives them back.
//!
//! It waits in one place only, for kicks, completions, commands and the filters' timers, so that a
//! command is served however busy the guest is and however slow the storage.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SendError, SyncSender};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::backend::{Alignment, Completion, Io, Operation};
use super::buffer::Buffer;
use super::copy::Written;
use super::filter::{BlockFilter, Stack};
use super::request::{Request, Rules, Status, Wish, parse};
use crate::eventfd::EventFd;
use crate::virtio::polling::Polling;
use crate::virtio::queue::{QueueFault, Segment, Virtqueue, gather, scatter};

/// Requests of a disk in flight, over all of its queues.
const IN_FLIGHT_MAX: usize = 256;
/// Bytes of bounce buffers in flight; beyond them requests wait.
const BOUNCE_MAX: u64 = 64 << 20;
/// Marks the flush of [`Command::Settle`].
const SETTLE: u32 = u32::MAX;
/// Looks after I/O in flight at least so often: a ring that was too busy is tried again.
const LONGEST_WAIT: Duration = Duration::from_millis(500);

const CONTROL: u64 = u64::MAX;
const STORAGE: u64 = u64::MAX - 1;

/// What the device asks of its thread.
pub(super) enum Command {
    Activate {
        queues: Vec<Virtqueue>,
        write_through: bool,
    },
    /// Come to rest until `deadline`, then do it.
    AtRest {
        deadline: Instant,
        action: AtRest,
    },
    Stop,
}

/// What can be done only with nothing in flight. The answer is `None` if the deadline passed.
pub(super) enum AtRest {
    GiveBack(SyncSender<Option<Vec<Virtqueue>>>),
    Settle(SyncSender<Option<Result<(), Errno>>>),
    Insert(Box<dyn BlockFilter>, SyncSender<Option<()>>),
    Remove(String, SyncSender<Option<bool>>),
}

/// A request in flight.
struct Pending {
    /// Position in `queues`.
    queue: usize,
    head: u16,
    status_at: u64,
    operation: Operation,
    data: Vec<Segment>,
    length: u64,
    bounced: bool,
}

pub(super) struct Worker {
    pub(super) stack: Stack,
    rules: Rules,
    alignment: Alignment,
    serial: [u8; 20],
    commands: Receiver<Command>,
    control: EventFd,
    /// The driver's wish that writes are durable when they are done (changes while running).
    writeback: Arc<AtomicBool>,
    written: Arc<Written>,
    epoll: OwnedFd,
    queues: Vec<Virtqueue>,
    write_through: bool,
    failed: bool,
    pending: Vec<Option<Pending>>,
    free: Vec<u32>,
    bounced: u64,
    /// Found no room below.
    stalled: Vec<Io>,
    resting: Option<(Instant, AtRest)>,
    /// The result of the settling flush, once it is there.
    settled: Option<Result<(), Errno>>,
    settling: bool,
    /// Settling flushes that the storage has, also those that nobody waits for any more: whoever
    /// settles next waits for them first, since one's completion looks like another's.
    flushes: usize,
    polling: Polling,
}

impl Worker {
    pub(super) fn new(
        mut stack: Stack,
        serial: [u8; 20],
        commands: Receiver<Command>,
        control: EventFd,
        writeback: Arc<AtomicBool>,
        written: Arc<Written>,
    ) -> Result<Self, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            control.as_fd(),
            EventData::new_u64(CONTROL),
            EventFlags::IN,
        )?;
        let geometry = stack.backend().geometry();
        let storage = stack.backend().completion_fd();
        epoll::add(&epoll, storage, EventData::new_u64(STORAGE), EventFlags::IN)?;
        Ok(Self {
            rules: geometry.into(),
            alignment: geometry.alignment,
            stack,
            serial,
            commands,
            control,
            writeback,
            written,
            epoll,
            queues: Vec::new(),
            write_through: false,
            failed: false,
            pending: (0..IN_FLIGHT_MAX).map(|_| None).collect(),
            free: (0..IN_FLIGHT_MAX as u32).rev().collect(),
            bounced: 0,
            stalled: Vec::new(),
            resting: None,
            settled: None,
            settling: false,
            flushes: 0,
            polling: Polling::default(),
        })
    }

    pub(super) fn run(mut self) {
        let mut done = Vec::new();
        let mut events: Vec<epoll::Event> = Vec::with_capacity(32);
        loop {
            let told = |event: &epoll::Event| event.data.u64() == CONTROL;
            if events.drain(..).any(|event| told(&event)) {
                self.control.take();
            }
            while let Ok(command) = self.commands.try_recv() {
                if matches!(command, Command::Stop) {
                    return;
                }
                self.command(command);
            }
            self.stack.tick(Instant::now());
            self.reap(&mut done);
            let more = self.pull();
            self.stack.backend().commit();
            // What the host had in its cache is done by now.
            let finished = self.reap(&mut done);
            self.interrupt();
            let rested = self.rest();
            if more || rested || finished > 0 || self.look_out() || self.listen() {
                continue;
            }
            self.wait(&mut events);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Activate {
                queues,
                write_through,
            } => {
                self.watch(&queues);
                self.queues = queues;
                self.write_through = write_through;
                self.failed = false;
            }
            Command::AtRest { deadline, action } => {
                self.refuse();
                self.stack.release();
                self.resting = Some((deadline, action));
            }
            Command::Stop => {}
        }
    }

    fn watch(&self, queues: &[Virtqueue]) {
        for (index, queue) in queues.iter().enumerate() {
            let (data, flags) = (EventData::new_u64(index as u64), EventFlags::IN);
            // Edge-triggered: each kick wakes once, and the count need not be read.
            let added = epoll::add(&self.epoll, queue.kick(), data, flags | EventFlags::ET);
            if let Err(error) = added {
                tracing::error!(%error, "a disk cannot hear its queue");
            }
        }
    }

    /// Whether nothing is in flight: only the driver, or a command, brings something to do.
    fn idle(&self) -> bool {
        self.free.len() == IN_FLIGHT_MAX && self.stalled.is_empty()
    }

    /// Looks for the guest's next request for a moment. True if there is one.
    fn look_out(&mut self) -> bool {
        let busy = !self.idle() || self.resting.is_some();
        if busy || self.failed || self.queues.is_empty() {
            return false;
        }
        self.polling
            .look(|| self.queues.iter().any(Virtqueue::has_more))
    }

    /// Asks to be kicked by all queues that are looked at. True if there are requests already.
    fn listen(&mut self) -> bool {
        let mut more = false;
        // Where there is no room, a completion brings us back.
        if self.failed || self.resting.is_some() || self.full() {
            return false;
        }
        for index in 0..self.queues.len() {
            match self.queues[index].enable_kicks() {
                Ok(came) => more |= came,
                Err(fault) => {
                    self.failed = true;
                    self.queues[index].fail(&fault);
                    return false;
                }
            }
        }
        more
    }

    /// Whether there is no room for another request.
    fn full(&self) -> bool {
        !self.stalled.is_empty() || self.free.is_empty() || self.bounced >= BOUNCE_MAX
    }

    /// Takes requests from the queues, each at most once around. True if there may be more.
    fn pull(&mut self) -> bool {
        while let Some(io) = self.stalled.pop() {
            if !self.submit(io) {
                break;
            }
        }
        let mut more = false;
        for index in 0..self.queues.len() {
            if self.failed || self.resting.is_some() {
                return false;
            }
            match self.pull_queue(index) {
                Ok(again) => more |= again,
                Err(fault) => {
                    self.failed = true;
                    self.queues[index].fail(&fault);
                }
            }
        }
        more
    }

    fn pull_queue(&mut self, index: usize) -> Result<bool, QueueFault> {
        self.queues[index].disable_kicks()?;
        for _ in 0..self.queues[index].size() {
            if self.full() {
                // A completion brings us back.
                return Ok(false);
            }
            let queue = &mut self.queues[index];
            let Some(chain) = queue.pop()? else {
                return Ok(false);
            };
            self.polling.found();
            let request = parse(&chain, queue.memory(), &self.rules)?;
            self.begin(index, request)?;
        }
        Ok(true)
    }

    fn begin(&mut self, queue: usize, request: Request) -> Result<(), QueueFault> {
        let Request {
            head,
            status_at,
            wish,
        } = request;
        match wish {
            Wish::Refuse(status) => self.answer(queue, head, status_at, status, 0),
            Wish::SerialNumber { data } => {
                let written = scatter(self.queues[queue].memory(), &data, &self.serial);
                self.answer(queue, head, status_at, Status::Ok, written as u64)
            }
            Wish::Io {
                operation,
                offset,
                length,
                data,
            } => {
                let Some((buffer, bounced)) = self.buffer(queue, operation, &data, length) else {
                    return self.answer(queue, head, status_at, Status::IoError, 0);
                };
                // There is a free place: `pull_queue` has looked.
                let Some(tag) = self.free.pop() else {
                    return Err(QueueFault::Ring);
                };
                if bounced {
                    self.bounced += length;
                }
                self.pending[tag as usize] = Some(Pending {
                    queue,
                    head,
                    status_at,
                    operation,
                    data,
                    length,
                    bounced,
                });
                let io = Io {
                    tag,
                    operation,
                    offset,
                    length,
                    buffer,
                };
                self.submit(io);
                Ok(())
            }
        }
    }

    /// Sends I/O down; what finds no room is kept. False if so.
    fn submit(&mut self, io: Io) -> bool {
        let refused = self.stack.submit(io).err();
        let taken = refused.is_none();
        self.stalled.extend(refused);
        taken
    }

    /// The guest's own memory where the storage takes it, else a copy.
    fn buffer(
        &self,
        queue: usize,
        operation: Operation,
        data: &[Segment],
        length: u64,
    ) -> Option<(Buffer, bool)> {
        if !matches!(operation, Operation::Read | Operation::Write) {
            return Some((Buffer::none(), false));
        }
        let memory = self.queues[queue].memory();
        let buffer = Buffer::guest(memory, data)?;
        let Alignment {
            memory: align,
            offset,
        } = self.alignment;
        let aligned = buffer.pieces().iter().all(|piece| {
            (piece.iov_base.addr() as u64).is_multiple_of(align)
                && (piece.iov_len as u64).is_multiple_of(offset)
        });
        if aligned {
            return Some((buffer, false));
        }
        let mut copy = Buffer::bounce(length as usize, align.max(offset) as usize)?;
        if operation == Operation::Write && !gather(memory, data, copy.bounced()?) {
            return None;
        }
        Some((copy, true))
    }

    /// Gives back what is done; how much that was.
    fn reap(&mut self, done: &mut Vec<Completion>) -> usize {
        self.stack.reap(done);
        let count = done.len();
        for completion in done.drain(..) {
            if let Err(fault) = self.finish(completion) {
                self.failed = true;
                if let Some(queue) = self.queues.first() {
                    queue.fail(&fault);
                }
            }
        }
        count
    }

    fn finish(&mut self, completion: Completion) -> Result<(), QueueFault> {
        let Completion { mut io, result } = completion;
        if io.tag == SETTLE {
            self.flushes = self.flushes.saturating_sub(1);
            self.settled = self.settling.then_some(result);
            return Ok(());
        }
        let Some(mut pending) = self.pending.get_mut(io.tag as usize).and_then(Option::take) else {
            return Ok(());
        };
        let writes = !matches!(pending.operation, Operation::Read | Operation::Flush);
        if writes {
            // Also where it failed half way.
            self.written.add(io.offset, io.length);
        }
        let lasting = self.write_through || !self.writeback.load(Ordering::Acquire);
        if pending.bounced && pending.operation == Operation::Read && result.is_ok() {
            let memory = self.queues[pending.queue].memory();
            scatter(
                memory,
                &pending.data,
                io.buffer.bounced().unwrap_or_default(),
            );
        } else if pending.operation == Operation::Read {
            // The kernel wrote behind the back of the dirty bitmap, even if it failed half way.
            mark_dirty(&self.queues[pending.queue], &pending.data);
        }
        if pending.bounced {
            self.bounced -= pending.length;
            pending.bounced = false;
        }
        if writes && lasting && result.is_ok() {
            // Without a cache that the driver knows of, a write is done when it is durable.
            pending.operation = Operation::Flush;
            let tag = io.tag;
            self.pending[tag as usize] = Some(pending);
            let io = Io {
                tag,
                operation: Operation::Flush,
                offset: 0,
                length: 0,
                buffer: Buffer::none(),
            };
            self.submit(io);
            return Ok(());
        }
        self.free.push(io.tag);
        let status = match result {
            Ok(()) => Status::Ok,
            Err(Errno::OPNOTSUPP) => Status::Unsupported,
            Err(error) => {
                tracing::warn!(%error, operation = ?io.operation, offset = io.offset, length = io.length, "disk I/O failed");
                Status::IoError
            }
        };
        let written = if io.operation == Operation::Read && result.is_ok() {
            io.length
        } else {
            0
        };
        self.answer(
            pending.queue,
            pending.head,
            pending.status_at,
            status,
            written,
        )
    }

    fn answer(
        &mut self,
        queue: usize,
        head: u16,
        status_at: u64,
        status: Status,
        written: u64,
    ) -> Result<(), QueueFault> {
        let Some(queue) = self.queues.get_mut(queue) else {
            return Ok(());
        };
        let stored = queue
            .memory()
            .write_obj(status as u8, GuestAddress(status_at));
        stored.map_err(|_| QueueFault::Ring)?;
        queue.push(head, written as u32 + 1)
    }

    fn interrupt(&mut self) {
        for queue in &mut self.queues {
            if let Err(fault) = queue.notify() {
                self.failed = true;
                queue.fail(&fault);
            }
        }
    }

    /// Does what waits for nothing to be in flight, or gives it up at its deadline. True if so: the
    /// queues have to be looked at again, since kicks were not asked for meanwhile.
    fn rest(&mut self) -> bool {
        let Some((deadline, action)) = &self.resting else {
            return false;
        };
        let late = Instant::now() >= *deadline;
        // A flush has nothing of the guest's: its queues can go without it.
        let flushed = self.flushes == 0 || self.settling || matches!(action, AtRest::GiveBack(_));
        let idle = self.idle() && flushed;
        let settling = self.settling && self.settled.is_none();
        if idle && (!settling || late) {
            self.act();
        } else if late {
            self.refuse();
        } else {
            return false;
        }
        true
    }

    fn act(&mut self) {
        let Some((deadline, action)) = self.resting.take() else {
            return;
        };
        match action {
            AtRest::GiveBack(reply) => {
                for queue in &self.queues {
                    let _ = epoll::delete(&self.epoll, queue.kick());
                }
                if let Err(SendError(Some(queues))) =
                    reply.send(Some(std::mem::take(&mut self.queues)))
                {
                    // Whoever asked has given up: the device works on.
                    self.watch(&queues);
                    self.queues = queues;
                }
            }
            AtRest::Insert(filter, reply) => {
                self.stack.insert(filter);
                let _ = reply.send(Some(()));
            }
            AtRest::Remove(name, reply) => {
                let _ = reply.send(Some(self.stack.remove(&name).is_some()));
            }
            AtRest::Settle(reply) => match self.settled.take() {
                Some(result) => {
                    self.settling = false;
                    self.stack.backend().drop_cache();
                    let _ = reply.send(Some(result));
                }
                None if self.settling => {
                    self.settling = false;
                    let _ = reply.send(None);
                }
                None => {
                    self.settling = true;
                    let io = Io {
                        tag: SETTLE,
                        operation: Operation::Flush,
                        offset: 0,
                        length: 0,
                        buffer: Buffer::none(),
                    };
                    match self.stack.backend().submit(io) {
                        Ok(()) => self.flushes += 1,
                        Err(_) => self.settled = Some(Err(Errno::BUSY)),
                    }
                    self.stack.backend().commit();
                    self.resting = Some((deadline, AtRest::Settle(reply)));
                }
            },
        }
    }

    /// Gives up what waits for rest: whoever asked hears it by the answer, or its absence.
    fn refuse(&mut self) {
        self.settling = false;
        self.settled = None;
        let Some((_, action)) = self.resting.take() else {
            return;
        };
        match action {
            AtRest::GiveBack(reply) => drop(reply.send(None)),
            AtRest::Settle(reply) => drop(reply.send(None)),
            AtRest::Insert(_, reply) => drop(reply.send(None)),
            AtRest::Remove(_, reply) => drop(reply.send(None)),
        }
    }

    fn wait(&mut self, events: &mut Vec<epoll::Event>) {
        let in_flight = self.free.len() < IN_FLIGHT_MAX || self.flushes > 0;
        let now = Instant::now();
        let longest = in_flight.then(|| now + LONGEST_WAIT);
        let deadline = self.resting.as_ref().map(|resting| resting.0);
        let until = [longest, deadline, self.stack.wake_at()]
            .into_iter()
            .flatten()
            .min();
        let timeout = until.map(|until| {
            let rest = until.saturating_duration_since(now);
            Timespec {
                tv_sec: rest.as_secs() as i64,
                tv_nsec: i64::from(rest.subsec_nanos()),
            }
        });
        let buffer = rustix::buffer::spare_capacity(events);
        // EINTR is how io_uring says that it has something; all sources are looked at anyway.
        let _ = epoll::wait(&self.epoll, buffer, timeout.as_ref());
    }
}

fn mark_dirty(queue: &Virtqueue, segments: &[Segment]) {
    for segment in segments {
        let length = segment.length as usize;
        if let Ok(slice) = queue
            .memory()
            .get_slice(GuestAddress(segment.address), length)
        {
            slice.bitmap().mark_dirty(0, length);
        }
    }
}
