//! A packet's place: pieces of guest memory that the kernel reads or writes in one call, without a copy.
//!
//! The only place of the network device where guest memory leaves the checked world of `vm-memory`.
//! Owns the list of pieces and, behind them, room of the host's own for what did not fit.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMap;
use crate::virtio::queue::Segment;

/// The most pieces that the kernel takes at once (UIO_MAXIOV), less the one for the rest.
const PIECES_MAX: usize = 1023;
/// No packet is longer: 64 KiB of IP, Ethernet and VLAN, and the header before it.
pub const PACKET_MAX: usize = (64 << 10) + 64;

/// Filled anew for each packet; keeps its room.
pub struct Frame {
    /// Kept, so that the pieces stay mapped.
    memory: Option<Arc<GuestMap>>,
    pieces: Vec<libc::iovec>,
    /// Bytes of guest memory in `pieces`.
    room: usize,
    rest: Box<[u8]>,
}

// SAFETY: the addresses point into the shared mapping that `memory` keeps alive, or into `rest`;
// neither belongs to a thread.
unsafe impl Send for Frame {}

impl Default for Frame {
    fn default() -> Self {
        Self {
            memory: None,
            pieces: Vec::new(),
            room: 0,
            rest: vec![0; PACKET_MAX].into_boxed_slice(),
        }
    }
}

impl Frame {
    /// Begins with no pieces, on `memory`.
    pub fn begin(&mut self, memory: &Arc<GuestMap>) {
        self.pieces.clear();
        self.room = 0;
        let same = |old: &Arc<GuestMap>| Arc::ptr_eq(old, memory);
        if !self.memory.as_ref().is_some_and(same) {
            self.memory = Some(Arc::clone(memory));
        }
    }

    /// Adds a segment; false if it is not in memory, or one too many.
    pub fn add(&mut self, segment: &Segment) -> bool {
        let length = segment.length as usize;
        let slice = (self.memory.as_ref())
            .filter(|_| self.pieces.len() < PIECES_MAX)
            .and_then(|memory| memory.get_slice(GuestAddress(segment.address), length).ok());
        let Some(slice) = slice else { return false };
        self.pieces.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: length,
        });
        self.room += length;
        true
    }

    /// Bytes of guest memory in it.
    pub fn room(&self) -> usize {
        self.room
    }

    /// What of the packet that was read last lies behind the guest's memory.
    pub fn rest(&self, length: usize) -> &[u8] {
        let over = length.saturating_sub(self.room).min(self.rest.len());
        &self.rest[..over]
    }

    /// Reads one packet: first into the guest's pieces, then into the host's own room. Bytes in all.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.pieces.push(libc::iovec {
            iov_base: self.rest.as_mut_ptr().cast(),
            iov_len: self.rest.len(),
        });
        let (pieces, count) = (self.pieces.as_ptr(), self.pieces.len() as libc::c_int);
        // SAFETY: each piece is writable memory of its length: of the guest, kept mapped by `memory`
        // (the guest and we may see it change, nothing is borrowed from it), or `rest`, borrowed by us.
        let read = unsafe { libc::readv(fd.as_raw_fd(), pieces, count) };
        self.pieces.pop();
        outcome(read)
    }

    /// Writes the guest's pieces as one packet.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> Result<usize, Errno> {
        let (pieces, count) = (self.pieces.as_ptr(), self.pieces.len() as libc::c_int);
        // SAFETY: each piece is readable memory of its length, kept mapped by `memory`.
        outcome(unsafe { libc::writev(fd.as_raw_fd(), pieces, count) })
    }
}

fn outcome(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}
