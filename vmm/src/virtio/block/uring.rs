//! Disk I/O by io_uring.
//!
//! A ring obeys no seccomp filter, so it is made here before its thread is locked down: disabled, its
//! one file registered, restricted to reading, writing, syncing and allocating in that file, then
//! enabled. Guest memory is not registered (that would touch all of it).
//!
//! Reads and writes of a batch that follow each other on the disk go to the kernel as one. Writes to
//! the host's cache are made right here, by the same batches, where the file system cannot make them
//! without waiting (ext4): the ring would hand each of them to a thread of the kernel, one after the
//! other, for a copy of 4 KiB.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types::Fixed, types::FsyncFlags};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::backend::{Completion, DiskBackend, Geometry, Io, Operation};
use super::buffer::{Buffer, PIECES_MAX};
use super::file::{AtOnce, DiskFile, write, write_at_once, zero_modes};

/// Submission entries of a ring; twice as many may be in flight.
const ENTRIES: u32 = 128;
/// Threads of the kernel that work for a ring.
const WORKERS_MAX: u32 = 4;
const IN_FLIGHT_MAX: usize = 2 * ENTRIES as usize;
/// How long to wait at the end for I/O that is still in flight.
const LAST_WAIT: Duration = Duration::from_secs(2);
const DISK: Fixed = Fixed(0);
/// The most bytes that are written here before the rest of the disk's work has its turn; what is longer
/// goes to the ring.
const HERE_MAX: u64 = 4 << 20;
/// The most bytes that are joined into one entry: what disks take at once.
const JOINED_MAX: u64 = 512 << 10;

/// A disk's file behind a ring.
pub struct Uring {
    ring: IoUring,
    disk: DiskFile,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// I/O that is to be given to the ring (again): it did not fit, or it did only a part.
    waiting: VecDeque<u32>,
    /// I/O that failed together with others and is to be tried by itself.
    apart: VecDeque<Io>,
    /// Done without the ring.
    ready: Vec<Completion>,
    cached_writes: CachedWrites,
    /// Bytes that were written here since the last commit.
    written_here: u64,
    unsubmitted: bool,
}

/// How writes to the host's cache are made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CachedWrites {
    /// The first one tells.
    Unknown,
    ByRing,
    Here,
}

struct Slot {
    io: Io,
    /// What follows it on the disk and goes with it.
    followers: Vec<Io>,
    /// The pieces of all of them, if there are followers; the memory is theirs.
    joined: Option<Buffer>,
    /// Not to be joined with others: it was, and failed.
    apart: bool,
    /// Written here, not by the ring.
    here: bool,
    /// Bytes that are transferred.
    done: u64,
    /// How many ways of making zeroes have failed.
    attempts: usize,
}

impl Uring {
    /// Fails where the host has no io_uring, or does not let us have it.
    pub fn new(disk: DiskFile) -> io::Result<Self> {
        let build = |cooperative: bool| {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled().setup_clamp();
            if cooperative {
                // Linux 5.19: completions do not interrupt a thread that will look anyway.
                builder.setup_coop_taskrun();
            }
            builder.build(ENTRIES)
        };
        let ring = build(true).or_else(|_| build(false))?;
        let submitter = ring.submitter();
        submitter.register_files(&[disk.file.as_raw_fd()])?;
        let operations = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let fixed = Flags::FIXED_FILE.bits();
        let mut rules: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
        rules.push(Restriction::sqe_flags_allowed(fixed));
        rules.push(Restriction::sqe_flags_required(fixed));
        // Writes through the cache, syncs and allocations go to the kernel's own workers, which get in
        // each other's way on one file. Kernels before 5.15 cannot limit them.
        let _ = submitter.register_iowq_max_workers(&mut [WORKERS_MAX, WORKERS_MAX]);
        submitter.register_restrictions(&mut rules)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            disk,
            slots: (0..IN_FLIGHT_MAX).map(|_| None).collect(),
            free: (0..IN_FLIGHT_MAX as u32).rev().collect(),
            waiting: VecDeque::new(),
            apart: VecDeque::new(),
            ready: Vec::new(),
            cached_writes: CachedWrites::Unknown,
            written_here: 0,
            unsubmitted: false,
        })
    }

    fn in_flight(&self) -> usize {
        IN_FLIGHT_MAX - self.free.len()
    }

    /// Gives what waits to the ring, as far as it has room, or writes it here.
    fn push_waiting(&mut self) {
        loop {
            self.push_all();
            // Of those that were written here as one and failed, each by itself: no completion of the ring
            // would bring us back to them.
            let stuck = !self.waiting.is_empty() || self.free.is_empty();
            if self.apart.is_empty() || stuck {
                return;
            }
        }
    }

    fn push_all(&mut self) {
        while let Some(io) = self.apart.pop_front() {
            if let Err(io) = self.place(io, true, 0) {
                self.apart.push_front(io);
                break;
            }
        }
        while let Some(&index) = self.waiting.front() {
            self.join(index);
            let Some(Some(slot)) = self.slots.get_mut(index as usize) else {
                self.waiting.pop_front();
                continue;
            };
            if slot.here {
                self.waiting.pop_front();
                let buffer = slot.joined.as_mut().unwrap_or(&mut slot.io.buffer);
                let result = write(&self.disk, buffer, slot.io.offset);
                let mut ready = std::mem::take(&mut self.ready);
                self.complete(index, result, &mut ready);
                self.ready = ready;
                continue;
            }
            let entry = entry(slot).user_data(index.into());
            // SAFETY: the slot owns the buffer that the entry points to, and stays where it is until the
            // completion of this entry, or for ever (see `drop`). Its pieces are on the heap.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.waiting.pop_front();
            self.unsubmitted = true;
        }
    }

    /// Joins what waits behind the first that waits, as far as it goes on where that ends.
    fn join(&mut self, first: u32) {
        let slot_at = |slots: &mut Vec<Option<Slot>>, index: u32| {
            slots.get_mut(index as usize).and_then(Option::take)
        };
        let Some(mut slot) = slot_at(&mut self.slots, first) else {
            return;
        };
        while let Some(&next) = self.waiting.get(1) {
            let Some(follower) = slot_at(&mut self.slots, next) else {
                break;
            };
            match slot.append(follower) {
                Ok(()) => {
                    self.waiting.remove(1);
                    self.free.push(next);
                }
                Err(follower) => {
                    self.slots[next as usize] = Some(follower);
                    break;
                }
            }
        }
        self.slots[first as usize] = Some(slot);
    }

    /// Gives it a slot and has it wait for the ring; back if there is none.
    fn place(&mut self, io: Io, apart: bool, done: u64) -> Result<(), Io> {
        let Some(index) = self.free.pop() else {
            return Err(io);
        };
        let here = self.goes_here(&io);
        self.slots[index as usize] = Some(Slot {
            io,
            followers: Vec::new(),
            joined: None,
            apart,
            here,
            done,
            attempts: 0,
        });
        self.waiting.push_back(index);
        Ok(())
    }

    /// Whether it is a write to the host's cache that the ring cannot make without waiting.
    fn goes_here(&self, io: &Io) -> bool {
        let cached = io.operation == Operation::Write && !self.disk.direct();
        cached && self.cached_writes == CachedWrites::Here && io.length <= HERE_MAX
    }

    /// Finds out by the first write to the host's cache how such are made; bytes of it that are written.
    fn try_cached_write(&mut self, io: &mut Io) -> u64 {
        let (policy, done) = match write_at_once(&self.disk, io) {
            AtOnce::Wrote(done) => (CachedWrites::ByRing, done),
            AtOnce::Never => (CachedWrites::Here, 0),
        };
        self.cached_writes = policy;
        done
    }

    fn enter(&mut self) {
        if !self.unsubmitted {
            return;
        }
        match self.ring.submit() {
            Ok(_) => self.unsubmitted = !self.ring.submission().is_empty(),
            // Tried again at the next commit; completions make room meanwhile.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)
                ) => {}
            Err(error) => tracing::error!(%error, "io_uring took no more disk I/O"),
        }
    }

    /// What became of an entry: done for good, or to be given to the ring again.
    fn finish(&mut self, index: u32, result: i32, done: &mut Vec<Completion>) {
        let Some(Some(slot)) = self.slots.get_mut(index as usize) else {
            return;
        };
        let outcome = match (slot.io.operation, result) {
            (_, result) if result == -libc::EAGAIN || result == -libc::EINTR => None,
            (Operation::WriteZeroes { .. }, result) if result == -libc::EOPNOTSUPP => {
                slot.attempts += 1;
                if slot.attempts == zero_modes(false).len() {
                    match Buffer::zeroes(slot.io.length) {
                        Some(zeroes) => slot.io.buffer = zeroes,
                        None => return self.complete(index, Err(Errno::OPNOTSUPP), done),
                    }
                }
                None
            }
            (_, result) if result < 0 => Some(Err(Errno::from_raw_os_error(-result))),
            _ if !slot.transfers() => Some(Ok(())),
            // Inside its size a disk has no end: it shrank under us.
            (_, 0) => Some(Err(Errno::IO)),
            (_, result) => {
                slot.done += result as u64;
                let buffer = slot.joined.as_mut().unwrap_or(&mut slot.io.buffer);
                buffer.advance(result as u64);
                buffer.pieces().is_empty().then_some(Ok(()))
            }
        };
        match outcome {
            Some(result) => self.complete(index, result, done),
            None => self.waiting.push_back(index),
        }
    }

    fn complete(&mut self, index: u32, result: Result<(), Errno>, done: &mut Vec<Completion>) {
        let Some(slot) = self.slots.get_mut(index as usize).and_then(Option::take) else {
            return;
        };
        self.free.push(index);
        let all = std::iter::once(slot.io).chain(slot.followers);
        if result.is_err() && slot.joined.is_some() {
            // Which of them it was only shows one by one. Their own buffers are as they were.
            self.apart.extend(all);
        } else {
            done.extend(all.map(|io| Completion { io, result }));
        }
    }
}

impl Slot {
    /// Bytes of all that goes together.
    fn length(&self) -> u64 {
        let followers: u64 = self.followers.iter().map(|io| io.length).sum();
        self.io.length + followers
    }

    /// Takes what goes on where this ends; back if it does not, or may not be joined.
    #[expect(
        clippy::result_large_err,
        reason = "what is given back is what was given: a box would allocate for each request"
    )]
    fn append(&mut self, next: Slot) -> Result<(), Slot> {
        let untouched = |slot: &Slot| !slot.apart && slot.done == 0 && slot.io.length > 0;
        let alike = matches!(self.io.operation, Operation::Read | Operation::Write)
            && next.io.operation == self.io.operation
            && next.here == self.here
            && next.joined.is_none()
            && next.io.offset == self.io.offset + self.length();
        let ours = self.joined.as_ref().unwrap_or(&self.io.buffer);
        let pieces = ours.pieces().len() + next.io.buffer.pieces().len();
        let small = self.length() + next.io.length <= JOINED_MAX && pieces <= PIECES_MAX;
        if !(alike && small && untouched(self) && untouched(&next)) {
            return Err(next);
        }
        let joined = self.joined.get_or_insert_with(Buffer::none);
        if self.followers.is_empty() {
            joined.borrow(&self.io.buffer);
        }
        joined.borrow(&next.io.buffer);
        self.followers.push(next.io);
        Ok(())
    }

    /// Whether it moves bytes of a buffer.
    fn transfers(&self) -> bool {
        match self.io.operation {
            Operation::Read | Operation::Write => true,
            Operation::WriteZeroes { .. } => self.attempts >= zero_modes(false).len(),
            Operation::Flush | Operation::Discard => false,
        }
    }
}

fn entry(slot: &Slot) -> Entry {
    let io = &slot.io;
    let offset = io.offset + slot.done;
    let pieces = slot.joined.as_ref().unwrap_or(&io.buffer).pieces();
    let entry = match (io.operation, pieces) {
        (Operation::Read, [one]) => {
            opcode::Read::new(DISK, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build()
        }
        (Operation::Read, many) => opcode::Readv::new(DISK, many.as_ptr(), many.len() as u32)
            .offset(offset)
            .build(),
        (Operation::Write, [one]) => {
            let start = one.iov_base.cast_const().cast();
            opcode::Write::new(DISK, start, one.iov_len as u32)
                .offset(offset)
                .build()
        }
        (Operation::Flush, _) => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        (Operation::Discard, _) => {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            allocate(io, punch)
        }
        (Operation::WriteZeroes { unmap }, _) if !slot.transfers() => {
            allocate(io, zero_modes(unmap)[slot.attempts])
        }
        (Operation::Write | Operation::WriteZeroes { .. }, many) => {
            opcode::Writev::new(DISK, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .build()
        }
    };
    entry.flags(Flags::FIXED_FILE)
}

fn allocate(io: &Io, mode: FallocateFlags) -> Entry {
    opcode::Fallocate::new(DISK, io.length)
        .offset(io.offset)
        .mode(mode.bits() as i32)
        .build()
}

impl DiskBackend for Uring {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn submit(&mut self, mut io: Io) -> Result<(), Io> {
        if self.free.is_empty() {
            return Err(io);
        }
        if io.operation != Operation::Write || self.disk.direct() {
            return self.place(io, false, 0);
        }
        let mut done = 0;
        if self.cached_writes == CachedWrites::Unknown {
            done = self.try_cached_write(&mut io);
            if done == io.length {
                self.ready.push(Completion { io, result: Ok(()) });
                return Ok(());
            }
        }
        if self.goes_here(&io) {
            if self.written_here >= HERE_MAX {
                // What is written here is to be told first: that is when the rest comes back.
                return Err(io);
            }
            self.written_here += io.length;
        }
        self.place(io, false, done)
    }

    fn commit(&mut self) {
        self.written_here = 0;
        loop {
            self.push_waiting();
            self.enter();
            // Either all is in, or there is no room and a completion will bring us back.
            if self.waiting.is_empty() || self.unsubmitted {
                return;
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
        loop {
            let entry = self.ring.completion().next();
            let Some(entry) = entry else { break };
            self.finish(entry.user_data() as u32, entry.result(), done);
        }
        if !(self.waiting.is_empty() && self.apart.is_empty()) {
            self.commit();
            // What that wrote here: nothing else would tell of it.
            done.append(&mut self.ready);
        }
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    fn drop_cache(&mut self) {
        self.disk.drop_cache();
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_WAIT;
        let mut done = Vec::new();
        while self.in_flight() > 0 && Instant::now() < deadline {
            self.commit();
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                self.completion_fd(),
                rustix::event::PollFlags::IN,
            )];
            let moment = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            let _ = rustix::event::poll(&mut fds, Some(&moment));
            self.reap(&mut done);
        }
        // Storage that hangs may still write to these buffers: they are never freed.
        self.slots.drain(..).flatten().for_each(std::mem::forget);
    }
}

#[cfg(test)]
mod tests;
