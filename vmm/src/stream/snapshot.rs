//! A snapshot's file, written and read.
//!
//! ```text
//! 0            head: 4096 bytes, written last
//! 2 MiB        memory: page n of the machine lies at 2 MiB + n * 4096, or is a hole
//! behind it    frames: opening, placed pages, state, what the owner keeps with it, end
//! ```
//!
//! The head, little-endian: magic (8), form (4), flags (4), where memory begins (8), its bytes (8), where the
//! frames begin (8), their bytes (8), CRC-32 of all that (4). Memory begins on 2 MiB so that it can be mapped with
//! huge pages. A file without its head is one that was not finished, whatever else is in it, and one with a flag that a
//! build does not know is not read by it.
//!
//! Flag 1, *unchecked*: the machine's memory had come from a file whose checksums nobody had looked at. Those of this one
//! say that a page is what it was when it was written, and nothing of before.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Take, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};

use super::frame::{FrameReader, FrameWriter, Kind};
use super::pages::{BLOCK, Mask, PAGE};
use super::{
    FORMAT, MOST_STATE, Opening, StreamError, Target, Totals, io, malformed, packed, unpacked,
};

const MAGIC: [u8; 8] = *b"FRACTUSM";
const UNCHECKED: u32 = 1;
/// Bytes of the head that mean something, with their checksum.
const HEAD: usize = 52;
/// Where memory begins.
const MEMORY: u64 = 2 << 20;
/// Bytes of an entry of a placed frame: number of the block (4), pages that lie in the file (2), pages that are zero
/// and perhaps not in the base (2), CRC-32 of the former (4).
const ENTRY: usize = 12;
/// Bytes of entries in a frame, and of state.
const PIECE: usize = ENTRY << 15;
/// Bytes of memory at most: what 32 bits of blocks can number.
const MOST_MEMORY: u64 = (BLOCK as u64) << 32;
/// Bytes that an owner may keep with it, at most.
pub const MOST_OWNER: usize = 64 << 10;

/// The largest file that a machine with so many bytes of memory can become.
pub fn most_bytes(memory: u64) -> u64 {
    let entries = memory.div_ceil(BLOCK as u64) * ENTRY as u64;
    let most = MEMORY + MOST_STATE as u64 + (1 << 20);
    // Each frame has a head, which is less than what it holds.
    memory.saturating_add(2 * entries).saturating_add(most)
}

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    placed: Mask,
    zero: Mask,
    checksum: u32,
}

/// Writes a snapshot. Dropped before `finish` it leaves a file that nobody takes for one.
pub struct SnapshotWriter {
    sink: Sink,
    opening: Opening,
    flags: u32,
    /// By number.
    blocks: Vec<Entry>,
}

impl SnapshotWriter {
    /// `file` is open for reading and writing; what it had is gone.
    ///
    /// # Errors
    /// The file cannot be written to, or `opening` tells of more memory than there can be.
    pub fn new(file: File, opening: Opening) -> Result<Self, StreamError> {
        if opening.memory > MOST_MEMORY {
            return Err(malformed("more memory than any machine has"));
        }
        let made = file
            .set_len(0)
            .and_then(|()| file.set_len(MEMORY + opening.memory));
        made.map_err(io("make room for"))?;
        let blocks = opening.memory.div_ceil(BLOCK as u64) as usize;
        let sink = Sink {
            file: Arc::new(file),
            memory: opening.memory,
            is_over: opening.base.is_some(),
        };
        Ok(SnapshotWriter {
            sink,
            opening,
            flags: 0,
            blocks: vec![Entry::default(); blocks],
        })
    }

    /// What is put comes, or may come, from a file that nobody has checked.
    pub fn mark_unchecked(&mut self) {
        self.flags |= UNCHECKED;
    }

    /// The content of block `number`, whole; it may come again, and the last time counts.
    pub fn put(&mut self, number: u64, content: &[u8]) -> Result<(), StreamError> {
        let before = self.entry(number)?;
        self.note(number, self.sink.put(number, before, content)?)
    }

    /// By which several threads put blocks at once, each its own; what comes of it is to be [noted](Self::note).
    pub fn sink(&self) -> Sink {
        self.sink.clone()
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
        let at = MEMORY.saturating_add(start);
        for run in before.placed.without(mask).runs() {
            let bytes = block.get_mut(run.start..run.end.min(size));
            let at = at + run.start as u64;
            (self.sink.file.read_exact_at(bytes.unwrap_or_default(), at))
                .map_err(io("read back"))?;
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
        let begin = MEMORY + self.opening.memory.next_multiple_of(PAGE as u64);
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
            entries.extend_from_slice(&number.to_le_bytes());
            entries.extend_from_slice(&entry.placed.0.to_le_bytes());
            entries.extend_from_slice(&entry.zero.0.to_le_bytes());
            entries.extend_from_slice(&entry.checksum.to_le_bytes());
            if entries.len() == PIECE {
                frames.write(Kind::Placed, &entries)?;
                entries.clear();
            }
        }
        if !entries.is_empty() {
            frames.write(Kind::Placed, &entries)?;
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
        let length = tail.at - begin;
        // All of it, before the head says that it is there.
        self.sink.file.sync_data().map_err(io("sync"))?;
        let head = head(self.flags, self.opening.memory, begin, length);
        let written = self.sink.file.write_all_at(&head, 0);
        written
            .and_then(|()| self.sink.file.sync_all())
            .map_err(io("write"))?;
        Ok(totals)
    }
}

fn no_block() -> StreamError {
    malformed("a block that the machine does not have")
}

/// Where blocks go. Cheap to clone.
#[derive(Clone)]
pub struct Sink {
    file: Arc<File>,
    /// Bytes.
    memory: u64,
    /// It is laid over another.
    is_over: bool,
}

impl Sink {
    /// Puts block `number`, of which so much is known; what is then.
    pub fn put(&self, number: u64, before: Entry, content: &[u8]) -> Result<Entry, StreamError> {
        self.put_known(number, before, content, Mask(u16::MAX), Mask(u16::MAX))
    }

    /// The same where only the pages of `known` are spoken of, and of these no more than those of `new` are not in the
    /// file yet.
    fn put_known(
        &self,
        number: u64,
        before: Entry,
        content: &[u8],
        known: Mask,
        new: Mask,
    ) -> Result<Entry, StreamError> {
        let start = number.saturating_mul(BLOCK as u64);
        let size = self.memory.saturating_sub(start).min(BLOCK as u64);
        if content.is_empty() || content.len() as u64 != size {
            return Err(no_block());
        }
        let there = Mask::with_content(content);
        let part = |run: Range<usize>| {
            let bytes = content.get(run.start..run.end.min(content.len()));
            (bytes.unwrap_or_default(), MEMORY + start + run.start as u64)
        };
        let mut hasher = crc32fast::Hasher::new();
        for run in there.runs() {
            hasher.update(part(run).0);
        }
        for run in there.and(new).runs() {
            let (bytes, at) = part(run);
            self.file.write_all_at(bytes, at).map_err(io("write"))?;
        }
        let whole = Mask(u16::MAX >> (16 - content.len().div_ceil(PAGE)));
        let entry = Entry {
            placed: there,
            zero: match self.is_over {
                true => whole.and(known).without(there),
                false => Mask::default(),
            },
            checksum: hasher.finalize(),
        };
        for run in before.placed.without(there).runs() {
            let (bytes, at) = part(run);
            make_zero(&self.file, at, bytes.len() as u64).map_err(io("make a hole in"))?;
        }
        Ok(entry)
    }
}

/// A hole, where the file system has such.
fn make_zero(file: &File, at: u64, bytes: u64) -> std::io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, at, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.write_all_at(&vec![0; bytes as usize], at),
        other => Ok(other?),
    }
}

fn head(flags: u32, memory: u64, frames: u64, length: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    head[12..16].copy_from_slice(&flags.to_le_bytes());
    for (at, number) in [(16, MEMORY), (24, memory), (32, frames), (40, length)] {
        head[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    let checksum = crc32fast::hash(&head[..HEAD - 4]);
    head[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
    head
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
    flags: u32,
    /// Where memory begins.
    memory: u64,
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
        let head = read_head(&file)?;
        let mut frames = frames(&file, &head);
        let opening = read_opening(&mut frames)?;
        if opening.memory != head.bytes {
            return Err(malformed(
                "its head and its opening tell of different memory",
            ));
        }
        let (mut blocks, mut state, mut owner) = (Vec::new(), Vec::new(), Vec::new());
        let totals: Totals = loop {
            match frames.next_frame()? {
                (Kind::Placed, payload) => read_entries(payload, &opening, &mut blocks)?,
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
                _ => return Err(malformed("a frame that no snapshot has")),
            }
        };
        if !frames.is_at_end()? {
            return Err(malformed("something behind its end"));
        }
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
            flags: head.flags,
            memory: head.memory,
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
        let mut content = vec![0; BLOCK];
        for (number, entry) in &self.blocks {
            let start = u64::from(*number) * BLOCK as u64;
            if within(parts, start..start + BLOCK as u64).next().is_none() {
                continue;
            }
            let size = self.read_block(*number, entry, &mut content)?;
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
        let mut content = vec![0; BLOCK];
        for (number, entry) in &self.blocks {
            self.read_block(*number, entry, &mut content)?;
        }
        Ok(())
    }

    /// Reads a block's placed pages to their places in `content`, and checks them; returns how many bytes the block has.
    fn read_block(
        &self,
        number: u32,
        entry: &Entry,
        content: &mut [u8],
    ) -> Result<usize, StreamError> {
        let start = u64::from(number) * BLOCK as u64;
        let size = (self.opening.memory - start).min(BLOCK as u64) as usize;
        let mut hasher = crc32fast::Hasher::new();
        for run in entry.placed.runs() {
            let range = run.start..run.end.min(size);
            let bytes = content.get_mut(range).unwrap_or_default();
            let at = self.memory + start + run.start as u64;
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

    /// The file, and where memory begins in it, for who maps it.
    pub fn placed_in(&self) -> (&File, u64) {
        (&self.file, self.memory)
    }

    /// Where memory lies in the file and not in holes, below an offset in memory: whole pages, neighbours together, in
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

/// What the head says, as far as it can be.
struct Head {
    flags: u32,
    memory: u64,
    bytes: u64,
    frames: u64,
    length: u64,
}

fn read_head(file: &File) -> Result<Head, StreamError> {
    let size = file.metadata().map_err(io("look at"))?.len();
    let mut head = [0; HEAD];
    match file.read_exact_at(&mut head, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(StreamError::Magic);
        }
        other => other.map_err(io("read"))?,
    }
    let (magic, checksum) = (&head[..8], &head[HEAD - 4..]);
    if head == [0; HEAD] {
        return Err(StreamError::Unfinished);
    }
    if magic != MAGIC {
        return Err(StreamError::Magic);
    }
    if checksum != crc32fast::hash(&head[..HEAD - 4]).to_le_bytes() {
        return Err(StreamError::Checksum {
            what: "its head".to_owned(),
        });
    }
    let number = |at: usize| {
        let bytes = head.get(at..).and_then(|bytes| bytes.first_chunk());
        u64::from_le_bytes(bytes.copied().unwrap_or_default())
    };
    let form = number(8) as u32;
    if !(1..=FORMAT).contains(&form) {
        return Err(StreamError::Format { found: form });
    }
    let read = Head {
        flags: (number(8) >> 32) as u32,
        memory: number(16),
        bytes: number(24),
        frames: number(32),
        length: number(40),
    };
    if read.memory != MEMORY || read.flags & !UNCHECKED != 0 {
        return Err(malformed("a head that this build does not know"));
    }
    let memory_end = read.memory.checked_add(read.bytes);
    let frames_end = read.frames.checked_add(read.length);
    if read.bytes > MOST_MEMORY || memory_end.is_none_or(|end| end > read.frames) {
        return Err(malformed("its memory and its frames overlap"));
    }
    if frames_end.is_none_or(|end| end > size) {
        return Err(StreamError::Truncated { what: "its frames" });
    }
    Ok(read)
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
    let head = read_head(file).ok()?;
    let opening = read_opening(&mut frames(file, &head)).ok()?;
    Some(opening.id)
}

fn read_entries(
    payload: &[u8],
    opening: &Opening,
    blocks: &mut Vec<(u32, Entry)>,
) -> Result<(), StreamError> {
    let (entries, []) = payload.as_chunks::<ENTRY>() else {
        return Err(malformed("a part of an entry"));
    };
    for entry in entries {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *entry;
        let number = u32::from_le_bytes([a, b, c, d]);
        let entry = Entry {
            placed: Mask(u16::from_le_bytes([e, f])),
            zero: Mask(u16::from_le_bytes([g, h])),
            checksum: u32::from_le_bytes([i, j, k, l]),
        };
        let start = u64::from(number) * BLOCK as u64;
        let pages = opening
            .memory
            .saturating_sub(start)
            .div_ceil(PAGE as u64)
            .min(16) as u32;
        let all = u16::MAX.checked_shr(16 - pages).unwrap_or(0);
        let (either, both) = (entry.placed.0 | entry.zero.0, entry.placed.0 & entry.zero.0);
        if either == 0 || either & !all != 0 || both != 0 {
            return Err(malformed(
                "no pages, twice, or pages that the machine does not have",
            ));
        }
        if blocks.last().is_some_and(|(last, _)| *last >= number) {
            return Err(malformed("its blocks are not in order"));
        }
        blocks.push((number, entry));
    }
    Ok(())
}

/// [`super::frame::seal`] of a file, its head as well.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn seal(file: &File, numbered: bool) -> std::io::Result<()> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0)?;
    let checksum = crc32fast::hash(&head[..HEAD - 4]);
    head[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&head, 0)?;
    let Ok(Head { frames, length, .. }) = read_head(file) else {
        return Ok(());
    };
    let mut bytes = vec![0; length.min(MOST_STATE as u64) as usize];
    file.read_exact_at(&mut bytes, frames)?;
    super::frame::seal(&mut bytes, numbered);
    file.write_all_at(&bytes, frames)
}

#[cfg(test)]
mod tests;
