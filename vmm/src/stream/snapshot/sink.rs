//! Where a snapshot's blocks go, each thread by a sink of its own: to their places, or packed behind each other.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

use super::packing::Packer;
use super::table::{Entry, Slot};
use super::{Compression, MEMORY, no_block};
use crate::stream::pages::{BLOCK, Mask, PAGE};
use crate::stream::{StreamError, io};

/// Packed blocks begin on so many bytes.
const ALIGNMENT: u32 = 8;

/// Where blocks go.
pub struct Sink {
    pub(super) file: Arc<File>,
    /// Bytes.
    memory: u64,
    /// It is laid over another.
    is_over: bool,
    /// None: pages go to their places.
    packing: Option<Packing>,
    #[cfg(test)]
    before: Option<super::slow::Hook>,
}

struct Packing {
    packer: Packer,
    /// Where the next block goes that has no room yet: that of all sinks of the file.
    end: Arc<AtomicU64>,
}

impl Sink {
    pub(super) fn new(
        file: Arc<File>,
        memory: u64,
        is_over: bool,
        compression: Compression,
    ) -> Self {
        let packing = match compression {
            Compression::None => None,
            Compression::Zstd => Some(Packing {
                packer: Packer::default(),
                end: Arc::new(AtomicU64::new(compression.begin())),
            }),
        };
        Sink {
            file,
            memory,
            is_over,
            packing,
            #[cfg(test)]
            before: super::slow::hook(),
        }
    }

    /// The same for another thread.
    pub(super) fn another(&self) -> Self {
        let packing = self.packing.as_ref().map(|packing| Packing {
            packer: Packer::default(),
            end: Arc::clone(&packing.end),
        });
        Sink {
            file: Arc::clone(&self.file),
            packing,
            #[cfg(test)]
            before: self.before.clone(),
            ..*self
        }
    }

    /// Behind all blocks.
    pub(super) fn end(&self) -> u64 {
        match &self.packing {
            None => MEMORY + self.memory.next_multiple_of(PAGE as u64),
            Some(packing) => packing.end.load(Ordering::Relaxed),
        }
    }

    /// Puts block `number`, of which so much is known; what is then.
    pub fn put(
        &mut self,
        number: u64,
        before: Entry,
        content: &[u8],
    ) -> Result<Entry, StreamError> {
        self.put_known(number, before, content, Mask(u16::MAX), Mask(u16::MAX))
    }

    /// The same where only the pages of `known` are spoken of, and of these no more than those of `new` are not in the
    /// file yet.
    pub(super) fn put_known(
        &mut self,
        number: u64,
        before: Entry,
        content: &[u8],
        known: Mask,
        new: Mask,
    ) -> Result<Entry, StreamError> {
        #[cfg(test)]
        if let Some(before) = &self.before {
            before().map_err(io("write"))?;
        }
        let start = number.saturating_mul(BLOCK as u64);
        let size = self.memory.saturating_sub(start).min(BLOCK as u64);
        if content.is_empty() || content.len() as u64 != size {
            return Err(no_block());
        }
        let there = Mask::with_content(content);
        let (checksum, slot) = match &mut self.packing {
            None => {
                let gone = before.placed.without(there);
                let checksum = place(&self.file, MEMORY + start, content, [there, new, gone])?;
                (checksum, Slot::default())
            }
            Some(packing) => packing.put(&self.file, before.slot, there, content)?,
        };
        let whole = Mask(u16::MAX >> (16 - content.len().div_ceil(PAGE)));
        Ok(Entry {
            placed: there,
            zero: match self.is_over {
                true => whole.and(known).without(there),
                false => Mask::default(),
            },
            checksum,
            slot,
        })
    }
}

/// The pages that are there, of which no more than the new ones are not in the file yet, go to their places behind `at`;
/// those that are gone leave holes. What the former sum up to.
fn place(
    file: &File,
    at: u64,
    content: &[u8],
    [there, new, gone]: [Mask; 3],
) -> Result<u32, StreamError> {
    let part = |run: Range<usize>| {
        let bytes = content.get(run.start..run.end.min(content.len()));
        (bytes.unwrap_or_default(), at + run.start as u64)
    };
    let mut hasher = crc32fast::Hasher::new();
    for run in there.runs() {
        hasher.update(part(run).0);
    }
    for run in there.and(new).runs() {
        let (bytes, at) = part(run);
        file.write_all_at(bytes, at).map_err(io("write"))?;
    }
    for run in gone.runs() {
        let (bytes, at) = part(run);
        make_zero(file, at, bytes.len() as u64).map_err(io("make a hole in"))?;
    }
    Ok(hasher.finalize())
}

impl Packing {
    fn put(
        &mut self,
        file: &File,
        before: Slot,
        there: Mask,
        content: &[u8],
    ) -> Result<(u32, Slot), StreamError> {
        let (stored, checksum) = self.packer.pack(there, content)?;
        let slot = slot(&self.end, before, stored.len(), content.len());
        file.write_all_at(stored, slot.at).map_err(io("write"))?;
        Ok((checksum, slot))
    }
}

/// Where `length` bytes go of a block of `size`: where it was before, if it has room there, else to the end. There it gets
/// what it takes, and when it has outgrown that as much as it can ever take: so a block is given room twice at most, and
/// all of them together no more than twice the memory's size. What of the room is not written is a hole.
fn slot(end: &AtomicU64, before: Slot, length: usize, size: usize) -> Slot {
    let length = length as u32;
    if length <= before.room {
        return Slot { length, ..before };
    }
    let room = match before.room {
        0 => length,
        _ => size as u32,
    };
    let room = room.next_multiple_of(ALIGNMENT);
    Slot {
        at: end.fetch_add(room.into(), Ordering::Relaxed),
        length,
        room,
    }
}

/// A hole, where the file system has such.
pub(super) fn make_zero(file: &File, at: u64, bytes: u64) -> std::io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, at, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.write_all_at(&vec![0; bytes as usize], at),
        other => Ok(other?),
    }
}
