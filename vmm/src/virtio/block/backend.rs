//! Where a disk's blocks are: the trait, and what passes through it.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::buffer::Buffer;

/// Bytes of a virtio sector (virtio 1.2 §5.2.2), whatever the disk's own block size.
pub const SECTOR: u64 = 512;

/// What is to be done to blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    /// What was completed before is durable afterwards.
    Flush,
    /// The blocks' content does not matter any more.
    Discard,
    /// The blocks read as zero; `unmap`: and they may lose their place on the disk.
    WriteZeroes {
        unmap: bool,
    },
}

/// One piece of I/O. It owns its buffer, so that memory which the kernel may still write to outlives
/// whoever asked for it.
#[derive(Debug)]
pub struct Io {
    /// The asker's own mark, given back with the completion.
    pub tag: u32,
    pub operation: Operation,
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub length: u64,
    pub buffer: Buffer,
}

/// A piece of I/O that is done.
#[derive(Debug)]
pub struct Completion {
    pub io: Io,
    pub result: Result<(), Errno>,
}

/// What buffers and offsets have to be multiples of, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    pub memory: u64,
    pub offset: u64,
}

/// What a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes, a multiple of [`SECTOR`].
    pub capacity: u64,
    /// Bytes that the storage prefers to be written as a whole.
    pub physical_block: u32,
    pub alignment: Alignment,
    pub read_only: bool,
}

/// Storage of one disk. Used by one thread.
pub trait DiskBackend: Send {
    fn geometry(&self) -> Geometry;

    /// Takes a piece of I/O, in any order with the others; gives it back when it has no room.
    fn submit(&mut self, io: Io) -> Result<(), Io>;

    /// Starts what was submitted.
    fn commit(&mut self);

    /// Hands out what is done, without waiting.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Readable (level-triggered) while there is something to reap.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Drops what the host keeps of the disk in its cache. Called after a flush, with nothing in flight.
    fn drop_cache(&mut self) {}
}
