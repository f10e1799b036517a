//! Memory by several connections at once: a live stream has one, and may have *lanes* beside it.
//!
//! Each lane is a stream of frames of its own: [`Kind::Lane`] first, which says of what it is a lane, then pages
//! ([`super::live`]), then an end with its totals. All else of a machine goes by the stream itself. A block of memory
//! always goes by the same lane ([`lane_of`]), so that what it holds later is never overtaken by what it held before.

use std::io;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::frame::Kind;
use super::{BLOCK, StreamError, Target, malformed, packed, unpacked};

/// Lanes of a stream at most: each is a thread on either side.
pub const MOST_LANES: usize = 8;
/// Blocks that follow each other and go by the same lane: as many as a frame has room for.
pub const GROUP: u64 = 16;

/// By which of so many lanes a block goes; there is one at least.
pub fn lane_of(block: u64, lanes: usize) -> usize {
    // Less than `lanes`.
    (block / GROUP % lanes.max(1) as u64) as usize
}

/// What a machine goes by.
#[derive(Debug)]
pub struct Connections<S> {
    /// By which all goes for which there is no other.
    pub main: S,
    /// By which its memory goes, if there are any: in the same order on both sides.
    pub lanes: Vec<S>,
}

/// What a lane says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Of the stream's opening.
    pub stream: Uuid,
    /// Which of how many lanes it is.
    pub lane: u16,
    pub lanes: u16,
}

impl Hello {
    pub(crate) fn packed(&self) -> Result<Vec<u8>, StreamError> {
        packed(self)
    }

    /// Whether that is what was said.
    pub(crate) fn check(&self, (kind, payload): (Kind, &[u8])) -> Result<(), StreamError> {
        match kind {
            Kind::Lane if unpacked::<Hello>(payload)? == *self => Ok(()),
            Kind::Lane => Err(malformed("a lane of another stream, or another one of it")),
            _ => Err(malformed("a lane that does not say of what it is one")),
        }
    }
}

/// What of memory may come by a lane.
pub(crate) struct Share<'a, T> {
    pub memory: &'a T,
    pub lane: usize,
    pub lanes: usize,
}

impl<T> Share<'_, T> {
    fn check(&self, offset: u64) -> io::Result<()> {
        match lane_of(offset / BLOCK as u64, self.lanes) == self.lane {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it goes by another lane",
            )),
        }
    }
}

impl<T: Target> Target for Share<'_, T> {
    fn length(&self) -> io::Result<u64> {
        self.memory.length()
    }

    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset)?;
        self.memory.put(bytes, offset)
    }

    fn clear(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset)?;
        self.memory.clear(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_of_a_group_go_by_one_lane_and_groups_by_each_in_turn(
            block in 0..u64::from(u32::MAX),
            lanes in 1..=MOST_LANES,
        ) {
            let (first, lane) = (block / GROUP * GROUP, lane_of(block, lanes));
            prop_assert!(lane < lanes);
            prop_assert!((first..first + GROUP).all(|other| lane_of(other, lanes) == lane));
            prop_assert_eq!(lane_of(first + GROUP, lanes), (lane + 1) % lanes);
        }
    }
}
