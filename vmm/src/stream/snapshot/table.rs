//! What a snapshot's frames say of its blocks: which pages each has, what they sum up to, and, of packed ones, where
//! they lie.

use std::ops::Range;

use super::Compression;
use crate::stream::frame::Kind;
use crate::stream::pages::{BLOCK, Mask, PAGE};
use crate::stream::{StreamError, malformed};

/// Bytes of an entry of a placed frame: number of the block (4), pages that lie in the file (2), pages that are zero
/// and perhaps not in the base (2), CRC-32 of the former (4).
pub const ENTRY: usize = 12;
/// The same of a packed frame; then bytes that the pages take in the file (4), and where these lie (8). As many bytes as
/// the pages have: they lie there as they are; fewer: compressed; none: there are no such pages.
pub const PACKED_ENTRY: usize = ENTRY + 12;

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    pub(super) placed: Mask,
    pub(super) zero: Mask,
    /// Of the pages that are placed, behind each other, as the machine has them.
    pub(super) checksum: u32,
    pub(super) slot: Slot,
}

/// Where a packed block lies; nowhere in the placed form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slot {
    pub at: u64,
    /// Bytes that it takes.
    pub length: u32,
    /// Bytes that it may take there, known while it is written.
    pub room: u32,
}

impl Compression {
    pub(super) fn kind(self) -> Kind {
        match self {
            Compression::None => Kind::Placed,
            Compression::Zstd => Kind::Packed,
        }
    }

    /// Bytes of an entry.
    pub(super) fn entry(self) -> usize {
        match self {
            Compression::None => ENTRY,
            Compression::Zstd => PACKED_ENTRY,
        }
    }
}

/// Of the pages of `mask`, in a block that has `size` bytes.
pub fn bytes_of(mask: Mask, size: usize) -> usize {
    let bytes = |run: Range<usize>| run.end.min(size).saturating_sub(run.start);
    mask.runs().map(bytes).sum()
}

impl Entry {
    /// Of block `number`, behind what `out` has.
    pub fn write(&self, number: u32, compression: Compression, out: &mut Vec<u8>) {
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(&self.placed.0.to_le_bytes());
        out.extend_from_slice(&self.zero.0.to_le_bytes());
        out.extend_from_slice(&self.checksum.to_le_bytes());
        if compression == Compression::Zstd {
            let Slot { at, length, .. } = self.slot;
            let at = if length == 0 { 0 } else { at };
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(&at.to_le_bytes());
        }
    }
}

/// All entries of a file, as they are read.
pub struct Table {
    compression: Compression,
    /// Bytes.
    memory: u64,
    /// Where packed blocks may lie.
    place: Range<u64>,
    /// Bytes of it that none of them has claimed.
    left: u64,
    /// In ascending order.
    pub blocks: Vec<(u32, Entry)>,
}

impl Table {
    /// Of so many bytes of memory; packed blocks lie within `place`.
    pub fn new(compression: Compression, memory: u64, place: Range<u64>) -> Self {
        Table {
            compression,
            memory,
            left: place.end.saturating_sub(place.start),
            place,
            blocks: Vec::new(),
        }
    }

    /// What a frame has of it.
    ///
    /// # Errors
    /// A part of an entry; or one that is out of order, or tells of pages or places that there cannot be.
    pub fn read(&mut self, payload: &[u8]) -> Result<(), StreamError> {
        let entries = payload.chunks_exact(self.compression.entry());
        if !entries.remainder().is_empty() {
            return Err(malformed("a part of an entry"));
        }
        entries.into_iter().try_for_each(|entry| self.take(entry))
    }

    fn take(&mut self, entry: &[u8]) -> Result<(), StreamError> {
        let Some(([a, b, c, d, e, f, g, h, i, j, k, l], rest)) = entry.split_first_chunk() else {
            return Err(malformed("a part of an entry"));
        };
        let number = u32::from_le_bytes([*a, *b, *c, *d]);
        let entry = Entry {
            placed: Mask(u16::from_le_bytes([*e, *f])),
            zero: Mask(u16::from_le_bytes([*g, *h])),
            checksum: u32::from_le_bytes([*i, *j, *k, *l]),
            slot: Slot::default(),
        };
        let start = u64::from(number) * BLOCK as u64;
        let size = self.memory.saturating_sub(start).min(BLOCK as u64) as usize;
        let all = u16::MAX.checked_shr(16 - size.div_ceil(PAGE) as u32);
        let all = all.unwrap_or(0);
        let (either, both) = (entry.placed.0 | entry.zero.0, entry.placed.0 & entry.zero.0);
        if either == 0 || either & !all != 0 || both != 0 {
            return Err(malformed(
                "no pages, twice, or pages that the machine does not have",
            ));
        }
        if self.blocks.last().is_some_and(|(last, _)| *last >= number) {
            return Err(malformed("its blocks are not in order"));
        }
        let slot = match self.compression {
            Compression::None => Slot::default(),
            Compression::Zstd => self.slot(rest, bytes_of(entry.placed, size))?,
        };
        self.blocks.push((number, Entry { slot, ..entry }));
        Ok(())
    }

    /// Of pages that have so many bytes. What it claims is never more than those, nor beside the blocks' place: nobody
    /// allocates or reads by a length that is not so.
    fn slot(&mut self, entry: &[u8], pages: usize) -> Result<Slot, StreamError> {
        let Some((length, at)) = entry.split_first_chunk() else {
            return Err(malformed("a part of an entry"));
        };
        let length = u32::from_le_bytes(*length);
        let at = u64::from_le_bytes(at.try_into().unwrap_or_default());
        if length as usize > pages || (length == 0) != (pages == 0) {
            return Err(malformed("a block of another length than its pages have"));
        }
        let end = at.checked_add(length.into());
        let lies_there = at >= self.place.start && end.is_some_and(|end| end <= self.place.end);
        if length > 0 && !lies_there || length == 0 && at != 0 {
            return Err(malformed("a block that lies elsewhere than blocks do"));
        }
        let left = self.left.checked_sub(length.into());
        self.left = left.ok_or_else(|| malformed("more in its blocks than there is room for"))?;
        Ok(Slot {
            at,
            length,
            room: length,
        })
    }
}
