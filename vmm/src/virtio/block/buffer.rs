//! Buffers of disk I/O: addresses that the kernel reads or writes while others run.
//!
//! The only place where guest memory leaves the checked world of `vm-memory`. A [`Buffer`] keeps alive
//! what its addresses point to.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMap;
use crate::virtio::queue::Segment;

/// The most pieces that the kernel takes at once (UIO_MAXIOV).
pub const PIECES_MAX: usize = 1024;
const ZEROES_LENGTH: usize = 64 << 10;
/// What zeroes are written from where the file system cannot make them. Never written to.
static ZEROES: Zeroes = Zeroes([0; ZEROES_LENGTH]);

/// Aligned as any storage may want it.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LENGTH]);
/// The most that one buffer of zeroes can cover.
pub const ZEROES_MAX: u64 = (PIECES_MAX * ZEROES_LENGTH) as u64;

/// Addresses and lengths for the kernel, and what they point into.
pub struct Buffer {
    pieces: Vec<libc::iovec>,
    /// Pieces before this one are done with.
    first: usize,
    owner: Owner,
}

enum Owner {
    Nothing,
    /// Not read: held, so that the mapping stays.
    Guest(#[expect(dead_code, reason = "keeps the mapping alive")] Arc<GuestMap>),
    Bounce(Bounce),
}

// SAFETY: the addresses point into memory that the buffer itself keeps alive (a shared mapping, an
// allocation of its own, or a static), none of which belongs to a thread.
unsafe impl Send for Buffer {}

impl Buffer {
    /// For I/O without data.
    pub fn none() -> Self {
        Self {
            pieces: Vec::new(),
            first: 0,
            owner: Owner::Nothing,
        }
    }

    /// The segments of guest memory themselves. `None` if they are not all inside it, or too many.
    pub fn guest(memory: &Arc<GuestMap>, segments: &[Segment]) -> Option<Self> {
        if segments.len() > PIECES_MAX {
            return None;
        }
        let piece = |segment: &Segment| {
            let length = segment.length as usize;
            let slice = memory
                .get_slice(GuestAddress(segment.address), length)
                .ok()?;
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            Some(libc::iovec {
                iov_base,
                iov_len: length,
            })
        };
        let pieces = segments.iter().map(piece).collect::<Option<_>>()?;
        Some(Self {
            pieces,
            first: 0,
            owner: Owner::Guest(Arc::clone(memory)),
        })
    }

    /// Zeroed memory of the host's own, for when the guest's is not aligned. `length` is at least 1,
    /// `alignment` a power of two.
    pub fn bounce(length: usize, alignment: usize) -> Option<Self> {
        let bounce = Bounce::new(length, alignment)?;
        let piece = libc::iovec {
            iov_base: bounce.start.as_ptr().cast(),
            iov_len: length,
        };
        Some(Self {
            pieces: vec![piece],
            first: 0,
            owner: Owner::Bounce(bounce),
        })
    }

    /// Zeroes to be written, at most [`ZEROES_MAX`].
    pub fn zeroes(length: u64) -> Option<Self> {
        if length > ZEROES_MAX {
            return None;
        }
        let mut rest = length as usize;
        let mut pieces = Vec::new();
        while rest > 0 {
            let iov_len = rest.min(ZEROES_LENGTH);
            // Only ever read through: it is given to writes.
            pieces.push(libc::iovec {
                iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
                iov_len,
            });
            rest -= iov_len;
        }
        Some(Self {
            pieces,
            first: 0,
            owner: Owner::Nothing,
        })
    }

    /// The bytes of a bounce buffer. The kernel does not have them: a buffer in flight is inside the
    /// [`super::backend::Io`] that the backend holds.
    pub fn bounced(&mut self) -> Option<&mut [u8]> {
        match &mut self.owner {
            Owner::Bounce(bounce) => Some(bounce.bytes()),
            Owner::Nothing | Owner::Guest(_) => None,
        }
    }

    /// Adds the pieces of another, which whoever holds this one keeps alive.
    pub(super) fn borrow(&mut self, other: &Buffer) {
        self.pieces.extend_from_slice(other.pieces());
    }

    /// What is still to be transferred.
    pub(super) fn pieces(&self) -> &[libc::iovec] {
        &self.pieces[self.first..]
    }

    /// Takes note that the next `length` bytes are transferred.
    pub(super) fn advance(&mut self, length: u64) {
        let mut rest = length as usize;
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if rest < piece.iov_len {
                // Stays inside the piece: `rest` is less than its length.
                piece.iov_base = piece.iov_base.wrapping_byte_add(rest);
                piece.iov_len -= rest;
                return;
            }
            rest -= piece.iov_len;
            self.first += 1;
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer")
            .field("pieces", &self.pieces().len())
            .finish()
    }
}

/// An aligned allocation.
struct Bounce {
    start: NonNull<u8>,
    layout: Layout,
}

impl Bounce {
    fn new(length: usize, alignment: usize) -> Option<Self> {
        let layout = Layout::from_size_align(length, alignment)
            .ok()
            .filter(|_| length > 0)?;
        // SAFETY: the size of the layout is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Some(Self { start, layout })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has this size, is initialised, and is borrowed like `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_left_after_any_steps_is_the_rest(steps in prop::collection::vec(0u64..100_000, 0..20)) {
            let length = 300_000u64;
            let mut buffer = Buffer::zeroes(length).unwrap();
            let mut left = length;
            for step in steps {
                let step = step.min(left);
                buffer.advance(step);
                left -= step;
                let sum: usize = buffer.pieces().iter().map(|piece| piece.iov_len).sum();
                prop_assert_eq!(sum as u64, left);
            }
        }
    }

    #[test]
    fn a_bounce_buffer_is_aligned_and_zeroed() {
        let mut buffer = Buffer::bounce(5000, 4096).unwrap();
        assert!(buffer.pieces()[0].iov_base.addr().is_multiple_of(4096));
        assert!(buffer.bounced().unwrap().iter().all(|byte| *byte == 0));
        assert!(Buffer::bounce(0, 512).is_none());
    }
}
