//! Disk I/O by io_uring.
//!
//! A ring obeys no seccomp filter, so it is made here before its thread is locked down: disabled, its
//! one file registered, restricted to reading, writing, syncing and allocating in that file, then
//! enabled. Guest memory is not registered (that would touch all of it).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types::Fixed, types::FsyncFlags};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::backend::{Completion, DiskBackend, Geometry, Io, Operation};
use super::buffer::Buffer;
use super::file::{DiskFile, zero_modes};

/// Submission entries of a ring; twice as many may be in flight.
const ENTRIES: u32 = 128;
/// Threads of the kernel that work for a ring.
const WORKERS_MAX: u32 = 4;
const IN_FLIGHT_MAX: usize = 2 * ENTRIES as usize;
/// How long to wait at the end for I/O that is still in flight.
const LAST_WAIT: Duration = Duration::from_secs(2);
const DISK: Fixed = Fixed(0);

/// A disk's file behind a ring.
pub struct Uring {
    ring: IoUring,
    disk: DiskFile,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// I/O that is to be given to the ring (again): it did not fit, or it did only a part.
    waiting: Vec<u32>,
    unsubmitted: bool,
}

struct Slot {
    io: Io,
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
            waiting: Vec::new(),
            unsubmitted: false,
        })
    }

    fn in_flight(&self) -> usize {
        IN_FLIGHT_MAX - self.free.len()
    }

    /// Gives what waits to the ring, as far as it has room.
    fn push_waiting(&mut self) {
        while let Some(&index) = self.waiting.last() {
            let Some(Some(slot)) = self.slots.get(index as usize) else {
                self.waiting.pop();
                continue;
            };
            let entry = entry(slot).user_data(index.into());
            // SAFETY: the slot owns the buffer that the entry points to, and stays where it is until the
            // completion of this entry, or for ever (see `drop`). Its pieces are on the heap.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.waiting.pop();
            self.unsubmitted = true;
        }
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
    fn finish(&mut self, index: u32, result: i32) -> Option<Completion> {
        let slot = self.slots.get_mut(index as usize)?.as_mut()?;
        let outcome = match (slot.io.operation, result) {
            (_, result) if result == -libc::EAGAIN || result == -libc::EINTR => None,
            (Operation::WriteZeroes { .. }, result) if result == -libc::EOPNOTSUPP => {
                slot.attempts += 1;
                if slot.attempts == zero_modes(false).len() {
                    match Buffer::zeroes(slot.io.length) {
                        Some(zeroes) => slot.io.buffer = zeroes,
                        None => return self.complete(index, Err(Errno::OPNOTSUPP)),
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
                slot.io.buffer.advance(result as u64);
                slot.io.buffer.pieces().is_empty().then_some(Ok(()))
            }
        };
        match outcome {
            Some(result) => self.complete(index, result),
            None => {
                self.waiting.push(index);
                None
            }
        }
    }

    fn complete(&mut self, index: u32, result: Result<(), Errno>) -> Option<Completion> {
        let slot = self.slots.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(Completion {
            io: slot.io,
            result,
        })
    }
}

impl Slot {
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
    let pieces = io.buffer.pieces();
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

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        let Some(index) = self.free.pop() else {
            return Err(io);
        };
        self.slots[index as usize] = Some(Slot {
            io,
            done: 0,
            attempts: 0,
        });
        self.waiting.push(index);
        Ok(())
    }

    fn commit(&mut self) {
        loop {
            self.push_waiting();
            self.enter();
            // Either all is in, or the ring is full and a completion will bring us back.
            if self.waiting.is_empty() || self.unsubmitted {
                return;
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let results: Vec<_> = self
            .ring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (index, result) in results {
            done.extend(self.finish(index as u32, result));
        }
        if !self.waiting.is_empty() {
            self.commit();
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
