//! A snapshot's file, written and read.
//!
//! Form 1, *placed*, which can be mapped:
//!
//! ```text
//! 0            head: 4096 bytes, written last
//! 2 MiB        memory: page n of the machine lies at 2 MiB + n * 4096, or is a hole
//! behind it    frames: opening, placed pages, state, what the owner keeps with it, end
//! ```
//!
//! Form 2, *packed*, which has to be read ([`Compression::Zstd`]):
//!
//! ```text
//! 0            head, likewise
//! 4096         blocks: of each the pages that have content, compressed by themselves or as they are, where the frames say
//! behind them  frames: opening, packed blocks, state, what the owner keeps with it, end
//! ```
//!
//! The head, little-endian: magic (8), form (4), flags (4), where memory or blocks begin (8), bytes of memory (8), where the
//! frames begin (8), their bytes (8), CRC-32 of all that (4). Memory begins on 2 MiB so that it can be mapped with
//! huge pages. A file without its head is one that was not finished, whatever else is in it, and one with a flag that a
//! build does not know is not read by it.
//!
//! Flag 1, *unchecked*: the machine's memory had come from a file whose checksums nobody had looked at. Those of this one
//! say that a page is what it was when it was written, and nothing of before.
//!
//! A block's checksum is of its pages as the machine has them, in both forms: what was damaged in a packed one, or would
//! not come out of it as it went in, is seen all the same.

mod head;
mod packing;
mod sink;
#[cfg(test)]
pub(crate) mod slow;
mod table;

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Take, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::frame::{FrameReader, FrameWriter, Kind};
use super::pages::{BLOCK, Mask, PAGE};
use super::{MOST_STATE, Opening, StreamError, Target, Totals, io, malformed, packed, unpacked};
use head::Head;
use packing::Unpacker;
use table::{ENTRY, Table};

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use head::seal;
pub use sink::Sink;
pub use table::Entry;

const UNCHECKED: u32 = 1;
/// Where memory begins in the placed form.
const MEMORY: u64 = 2 << 20;
/// Where blocks begin in the packed form.
const BLOCKS: u64 = PAGE as u64;
/// Entries in a frame.
const ENTRIES: usize = 1 << 15;
/// Bytes of state in a frame.
const PIECE: usize = ENTRY * ENTRIES;
/// Bytes of memory at most: what 32 bits of blocks can number.
const MOST_MEMORY: u64 = (BLOCK as u64) << 32;
/// Bytes that an owner may keep with it, at most.
pub const MOST_OWNER: usize = 64 << 10;

/// How memory lies in a snapshot's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Each page at its place: the file can be mapped, and takes the room of all pages with content.
    #[default]
    None,
    /// Each block compressed by itself, if that makes it smaller: the file can only be read. It costs the processors'
    /// time, also where the guest stands still meanwhile: one that is paused, or whose packets vhost-net moves.
    Zstd,
}

impl Compression {
    pub fn is_none(&self) -> bool {
        *self == Compression::None
    }

    fn form(self) -> u32 {
        match self {
            Compression::None => 1,
            Compression::Zstd => 2,
        }
    }

    /// The form that has this number.
    fn of(form: u32) -> Option<Self> {
        let all = [Compression::None, Compression::Zstd];
        all.into_iter().find(|it| it.form() == form)
    }

    /// Where memory or blocks begin.
    fn begin(self) -> u64 {
        match self {
            Compression::None => MEMORY,
            Compression::Zstd => BLOCKS,
        }
    }
}

/// The largest file that a machine with so many bytes of memory can become, holes and all: of either form, if its guest
/// stands still meanwhile, so that each block is put once.
pub fn most_bytes(memory: u64) -> u64 {
    let entries = memory.div_ceil(BLOCK as u64) * ENTRY as u64;
    let most = MEMORY + MOST_STATE as u64 + (1 << 20);
    // Each frame has a head, which is less than what it holds; and packed entries are twice as long as placed ones.
    memory.saturating_add(2 * entries).saturating_add(most)
}

/// The same where the guest runs, or memory is put again otherwise. A packed block is given room twice at most: where it is
/// put first, and where all that it can become has room.
pub fn most_bytes_of(memory: u64, compression: Compression) -> u64 {
    let most = most_bytes(memory);
    match compression {
        Compression::None => most,
        Compression::Zstd => most.saturating_add(memory),
    }
}

/// Writes a snapshot. Dropped before `finish` it leaves a file that nobody takes for one.
pub struct SnapshotWriter {
    sink: Sink,
    opening: Opening,
    compression: Compression,
    flags: u32,
    /// By number.
    blocks: Vec<Entry>,
    /// Reads back what was packed.
    unpacker: Unpacker,
}

impl SnapshotWriter {
    /// `file` is open for reading and writing; what it had is gone.
    ///
    /// # Errors
    /// The file cannot be written to, or `opening` tells of more memory than there can be.
    pub fn new(
        file: File,
        opening: Opening,
        compression: Compression,
    ) -> Result<Self, StreamError> {
        if opening.memory > MOST_MEMORY {
            return Err(malformed("more memory than any machine has"));
        }
        let length = match compression {
            Compression::None => MEMORY + opening.memory,
            Compression::Zstd => BLOCKS,
        };
        let made = file.set_len(0).and_then(|()| file.set_len(length));
        made.map_err(io("make room for"))?;
        let blocks = opening.memory.div_ceil(BLOCK as u64) as usize;
        let (memory, is_over) = (opening.memory, opening.base.is_some());
        Ok(SnapshotWriter {
            sink: Sink::new(Arc::new(file), memory, is_over, compression),
            opening,
            compression,
            flags: 0,
            blocks: vec![Entry::default(); blocks],
            unpacker: Unpacker::default(),
        })
    }

    pub fn opening(&self) -> &Opening {
        &self.opening
    }

    /// What is put comes, or may come, from a file that nobody has checked.
    pub fn mark_unchecked(&mut self) {
        self.flags |= UNCHECKED;
    }

    /// The content of block `number`, whole; it may come again, and the last time counts.
    pub fn put(&mut self, number: u64, content: &[u8]) -> Result<(), StreamError> {
        let before = self.entry(number)?;
        let entry = self.sink.put(number, before, content)?;
        self.note(number, entry)
    }

    /// By which the thread that has this one puts blocks while others do, each its own; what comes of it is to be
    /// [noted](Self::note).
    pub fn sink(&mut self) -> &mut Sink {
        &mut self.sink
    }

    /// The same for another thread.
    pub fn another_sink(&self) -> Sink {
        self.sink.another()
    }

    /// What is known of block `number`.
    pub fn entry(&self, number: u64) -> Result<Entry, StreamError> {
        let at = usize::try_from(number).unwrap_or(usize::MAX);
        self.blocks.get(at).copied().ok_or_else(no_block)
    }

    pub fn note(&mut self, number: u64, entry: Entry) -> Result<(), StreamError> {
        let at = usize::try_from(number).unwrap_or(usize::MAX);
        let block = self.blocks.get_mut(at).ok_or_else(no_block)?;
        *block = entry;
        Ok(())
    }

    /// Puts the pages of `mask`, of block `number`, which are all that has changed since the block was put, or else since
    /// the base; `content` has them behind each other, each whole.
    pub fn amend(&mut self, number: u64, mask: Mask, content: &[u8]) -> Result<(), StreamError> {
        let start = number.saturating_mul(BLOCK as u64);
        let size = self.opening.memory.saturating_sub(start).min(BLOCK as u64) as usize;
        let before = self.entry(number)?;
        // Pages that are not spoken of stay as they are: those that the base has are zero here and not looked at.
        let mut block = [0; BLOCK];
        let left = before.placed.without(mask);
        let file = &self.sink.file;
        match self.compression {
            Compression::None => {
                let at = MEMORY.saturating_add(start);
                for run in left.runs() {
                    let bytes = block.get_mut(run.start..run.end.min(size));
                    let at = at + run.start as u64;
                    (file.read_exact_at(bytes.unwrap_or_default(), at)).map_err(io("read back"))?;
                }
            }
            Compression::Zstd if left.is_empty() => {}
            Compression::Zstd => {
                let block = block.get_mut(..size).unwrap_or_default();
                self.unpacker.read(file, start, &before, block)?;
            }
        }
        let mut rest = content;
        for run in mask.runs() {
            let target = block
                .get_mut(run.start..run.end.min(size))
                .unwrap_or_default();
            let Some((pages, more)) = rest.split_at_checked(run.len()) else {
                return Err(malformed("fewer pages than were told of"));
            };
            target.copy_from_slice(pages.get(..target.len()).unwrap_or_default());
            rest = more;
        }
        let known = match self.opening.base {
            Some(_) => Mask(before.placed.0 | before.zero.0 | mask.0),
            None => Mask(u16::MAX),
        };
        let content = block.get(..size).unwrap_or_default();
        let entry = self.sink.put_known(number, before, content, known, mask)?;
        self.note(number, entry)
    }

    /// Writes what is to be known of all that, then the head; the file is on its disk when this returns.
    /// `owner` is for who opens it, at most [`MOST_OWNER`] bytes.
    pub fn finish(self, state: &[u8], owner: &[u8]) -> Result<Totals, StreamError> {
        if state.len() > MOST_STATE {
            return Err(malformed("more state than any machine has"));
        }
        if owner.len() > MOST_OWNER {
            return Err(malformed("more of its owner's than there can be"));
        }
        let begin = self.sink.end();
        let tail = Tail {
            file: &self.sink.file,
            at: begin,
        };
        let mut frames = FrameWriter::new(BufWriter::with_capacity(1 << 16, tail));
        frames.write(Kind::Opening, &packed(&self.opening)?)?;
        let mut totals = Totals::default();
        let mut entries = Vec::new();
        for (number, entry) in (0u32..).zip(&self.blocks) {
            if entry.placed.is_empty() && entry.zero.is_empty() {
                continue;
            }
            totals.pages += entry.placed.count();
            totals.zeros += entry.zero.count();
            entry.write(number, self.compression, &mut entries);
            if entries.len() == ENTRIES * self.compression.entry() {
                frames.write(self.compression.kind(), &entries)?;
                entries.clear();
            }
        }
        if !entries.is_empty() {
            frames.write(self.compression.kind(), &entries)?;
        }
        for piece in state.chunks(PIECE) {
            frames.write(Kind::State, piece)?;
        }
        if !owner.is_empty() {
            frames.write(Kind::Owner, owner)?;
        }
        frames.write(Kind::End, &packed(&totals)?)?;
        let tail =
            (frames.finish().into_inner()).map_err(|error| io("write")(error.into_error()))?;
        let head = Head {
            compression: self.compression,
            flags: self.flags,
            memory: self.opening.memory,
            frames: begin,
            length: tail.at - begin,
        };
        // All of it, before the head says that it is there.
        self.sink.file.sync_data().map_err(io("sync"))?;
        let written = self.sink.file.write_all_at(&head.bytes(), 0);
        written
            .and_then(|()| self.sink.file.sync_all())
            .map_err(io("write"))?;
        Ok(totals)
    }
}

fn no_block() -> StreamError {
    malformed("a block that the machine does not have")
}

/// A part of a file, written and read in order.
struct Tail<'a> {
    file: &'a File,
    at: u64,
}

impl Write for Tail<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write_at(bytes, self.at)?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Read for Tail<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read_at(bytes, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// A snapshot that is whole: its frames have been read and fit each other. Its pages are checked as they are read.
pub struct Snapshot {
    file: File,
    opening: Opening,
    compression: Compression,
    flags: u32,
    /// In ascending order.
    blocks: Vec<(u32, Entry)>,
    state: Vec<u8>,
    owner: Vec<u8>,
    totals: Totals,
}

impl Snapshot {
    /// # Errors
    /// The file is no snapshot, not finished, damaged, or of a form that this build does not know.
    pub fn open(file: File) -> Result<Self, StreamError> {
        let head = Head::read(&file)?;
        let mut frames = frames(&file, &head);
        let opening = read_opening(&mut frames)?;
        if opening.memory != head.memory {
            return Err(malformed(
                "its head and its opening tell of different memory",
            ));
        }
        let compression = head.compression;
        let mut table = Table::new(compression, head.memory, compression.begin()..head.frames);
        let (mut state, mut owner) = (Vec::new(), Vec::new());
        let totals: Totals = loop {
            match frames.next_frame()? {
                (kind, payload) if kind == compression.kind() => table.read(payload)?,
                (Kind::State, payload) if state.len() + payload.len() > MOST_STATE => {
                    return Err(malformed("more state than any machine has"));
                }
                (Kind::State, payload) => state.extend_from_slice(payload),
                (Kind::Owner, payload) if !owner.is_empty() || payload.len() > MOST_OWNER => {
                    return Err(malformed("more of its owner's than there can be"));
                }
                (Kind::Owner, payload) => owner.extend_from_slice(payload),
                (Kind::End, payload) => break unpacked(payload)?,
                (Kind::Opening, _) => return Err(malformed("a second opening")),
                _ => return Err(malformed("a frame that no such snapshot has")),
            }
        };
        if !frames.is_at_end()? {
            return Err(malformed("something behind its end"));
        }
        let blocks = table.blocks;
        let sum = |of: fn(&Entry) -> Mask| blocks.iter().map(|(_, entry)| of(entry).count()).sum();
        let found = Totals {
            pages: sum(|entry| entry.placed),
            zeros: sum(|entry| entry.zero),
        };
        if found != totals {
            return Err(malformed("its end counts other pages than it has"));
        }
        Ok(Snapshot {
            file,
            opening,
            compression,
            flags: head.flags,
            blocks,
            state,
            owner,
            totals,
        })
    }

    pub fn opening(&self) -> &Opening {
        &self.opening
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Its pages may have been damaged before they were written to it: [`SnapshotWriter::mark_unchecked`].
    pub fn is_unchecked(&self) -> bool {
        self.flags & UNCHECKED != 0
    }

    /// As it was given to [`SnapshotWriter::finish`].
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// What its owner keeps with it, likewise; empty, if that was.
    pub fn owner(&self) -> &[u8] {
        &self.owner
    }

    /// Copies its pages to `memory`, and clears those that are zero and in the base.
    ///
    /// # Errors
    /// `memory` is of another size, or a page is not what it was; then `memory` is in no state to be used.
    pub fn load(&self, memory: &impl Target) -> Result<(), StreamError> {
        self.load_within(memory, std::slice::from_ref(&(0..u64::MAX)))
    }

    /// The same of some parts of memory, in ascending order. What is not within them is neither read, but for the rest
    /// of a block, nor copied.
    pub fn load_within(
        &self,
        memory: &impl Target,
        parts: &[Range<u64>],
    ) -> Result<(), StreamError> {
        let found = memory.length().map_err(io("look at the memory for"))?;
        if found != self.opening.memory {
            return Err(StreamError::Shape {
                expected: found,
                found: self.opening.memory,
            });
        }
        let (mut content, mut unpacker) = (vec![0; BLOCK], Unpacker::default());
        for (number, entry) in &self.blocks {
            let start = u64::from(*number) * BLOCK as u64;
            if within(parts, start..start + BLOCK as u64).next().is_none() {
                continue;
            }
            let size = self.read_block(*number, entry, &mut content, &mut unpacker)?;
            let runs = |mask: Mask| {
                let run = move |run: Range<usize>| {
                    within(
                        parts,
                        start + run.start as u64..start + run.end.min(size) as u64,
                    )
                };
                mask.runs().flat_map(run)
            };
            for run in runs(entry.placed) {
                let bytes = (run.start - start) as usize..(run.end - start) as usize;
                let bytes = content.get(bytes).unwrap_or_default();
                memory.put(bytes, run.start).map_err(io("load"))?;
            }
            for run in runs(entry.zero) {
                let cleared = memory.clear(run.start, run.end - run.start);
                cleared.map_err(io("load"))?;
            }
        }
        Ok(())
    }

    /// Reads all of its pages, and nothing else: what is to be mapped and not read first can be checked by it, before or
    /// in another thread meanwhile.
    ///
    /// # Errors
    /// A page is not what it was.
    pub fn check(&self) -> Result<(), StreamError> {
        let (mut content, mut unpacker) = (vec![0; BLOCK], Unpacker::default());
        for (number, entry) in &self.blocks {
            self.read_block(*number, entry, &mut content, &mut unpacker)?;
        }
        Ok(())
    }

    /// Reads a block's placed pages to their places in `content`, and checks them; returns how many bytes the block has.
    fn read_block(
        &self,
        number: u32,
        entry: &Entry,
        content: &mut [u8],
        unpacker: &mut Unpacker,
    ) -> Result<usize, StreamError> {
        let start = u64::from(number) * BLOCK as u64;
        let size = (self.opening.memory - start).min(BLOCK as u64) as usize;
        if self.compression == Compression::Zstd {
            let content = content.get_mut(..size).unwrap_or_default();
            unpacker.read(&self.file, start, entry, content)?;
            return Ok(size);
        }
        let mut hasher = crc32fast::Hasher::new();
        for run in entry.placed.runs() {
            let range = run.start..run.end.min(size);
            let bytes = content.get_mut(range).unwrap_or_default();
            let at = MEMORY + start + run.start as u64;
            self.file.read_exact_at(bytes, at).map_err(io("read"))?;
            hasher.update(bytes);
        }
        match hasher.finalize() == entry.checksum {
            true => Ok(size),
            false => Err(StreamError::Checksum {
                what: format!("memory at offset {start:#x}"),
            }),
        }
    }

    /// The file, and where memory begins in it, for who maps it; none: it is packed, and can only be read.
    pub fn placed_in(&self) -> Option<(&File, u64)> {
        self.compression.is_none().then_some((&self.file, MEMORY))
    }

    /// Where memory has content, below an offset in it, and so, in the placed form, the file no holes: whole pages, neighbours together, in
    /// ascending order.
    pub fn placed_below(&self, end: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (number, entry) in &self.blocks {
            let start = u64::from(*number) * BLOCK as u64;
            for run in entry.placed.runs() {
                let run = start + run.start as u64..(start + run.end as u64).min(end);
                match runs.last_mut() {
                    _ if run.is_empty() => {}
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
        }
        runs
    }
}

/// What of a range lies within these parts, which are in ascending order.
fn within(parts: &[Range<u64>], range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let first = parts.partition_point(|part| part.end <= range.start);
    let parts = parts.get(first..).unwrap_or_default().iter();
    let parts = parts.map(move |part| part.start.max(range.start)..part.end.min(range.end));
    parts.take_while(|part| !part.is_empty())
}

type Frames<'a> = FrameReader<BufReader<Take<Tail<'a>>>>;

fn frames<'a>(file: &'a File, head: &Head) -> Frames<'a> {
    let at = head.frames;
    FrameReader::new(BufReader::new(Tail { file, at }.take(head.length)))
}

fn read_opening(frames: &mut Frames<'_>) -> Result<Opening, StreamError> {
    match frames.next_frame()? {
        (Kind::Opening, payload) => unpacked(payload),
        _ => Err(malformed("it does not begin with its opening")),
    }
}

/// Which snapshot the file has; none, if it is no snapshot, or what of one this build cannot read.
pub fn id_in(file: &File) -> Option<uuid::Uuid> {
    let head = Head::read(file).ok()?;
    let opening = read_opening(&mut frames(file, &head)).ok()?;
    Some(opening.id)
}

/// Bytes of memory of the machine that the file has, by its head alone; none, likewise.
pub fn memory_in(file: &File) -> Option<u64> {
    Head::read(file).ok().map(|head| head.memory)
}

#[cfg(test)]
mod tests;
