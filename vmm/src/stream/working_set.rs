//! Which pages of a snapshot guests that go on from it touch, so that the next one finds them read.
//!
//! A lazy restore reads a page when it is touched, one after the other, in the guest's time. What guests of one snapshot
//! touch first is mostly the same, so it is recorded once ([`WorkingSet::of_process`]), and read for the next one in
//! large requests ([`Snapshot::fetch`]). That is for a file that is not in the page cache: else it gains nothing. (Ustiugov et al., "Benchmarking, analysis, and optimization of serverless function
//! snapshots", call it REAP; it fills pages by userfaultfd, each machine its own.) The set only says what is read ahead:
//! one that is wrong, or that somebody made up, costs reading and never changes a page.
//!
//! Its file, little-endian: magic (8), form (4), number of runs (4), the snapshot's id (16), bytes of its memory (8); for
//! each run where it begins and ends (8 each), offsets in memory, in ascending order; CRC-32 of all that (4).

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{Advice, fadvise, major, minor};
use uuid::Uuid;

use super::snapshot::Snapshot;
use super::{PAGE, StreamError, io, malformed};

const MAGIC: [u8; 8] = *b"FRACTUSW";
const FORM: u32 = 1;
const HEAD: usize = 40;
const RUN: usize = 16;
/// More than that become fewer by what lies between them: a mebibyte of file.
const MOST_RUNS: usize = 1 << 16;
/// Runs with no more than that between them are one: a request is dearer than to read so much.
const GAP: u64 = 64 << 10;
/// Bytes that are asked for at a time: of a longer request the kernel reads no more than the device's read-ahead, which is
/// 128 KiB where nobody has changed it.
const REQUEST: u64 = 128 << 10;
/// Bytes of the page map that are read at a time, 8 for each page.
const LOOK: usize = 64 << 10;
/// In the page map: the page is in this process's memory, or swapped out of it.
const PRESENT: u64 = 0b11 << 62;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("it is of the snapshot {found}, and this is {expected}")]
    Foreign { expected: Uuid, found: Uuid },
    #[error("nothing of the snapshot is mapped there")]
    Unmapped,
    #[error("nothing of the snapshot was touched yet")]
    Untouched,
    #[error("look which pages are mapped")]
    Look(#[source] io::Error),
}

/// Parts of a snapshot's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    snapshot: Uuid,
    /// Bytes.
    memory: u64,
    /// Offsets in memory, of whole pages, in ascending order and apart from each other.
    runs: Vec<Range<u64>>,
}

impl WorkingSet {
    /// What a process has touched so far of a snapshot that its memory is mapped from; `maps` and `pages` are its
    /// /proc/PID/maps and pagemap.
    ///
    /// The page map, since it says what this process has touched: mincore says of a file what is in the page cache,
    /// whoever brought it there, and `PAGEMAP_SCAN` came with Linux 6.7. From outside, since a machine's process neither
    /// has /proc nor may write files. Where the page cache has its neighbours the kernel maps up to 16 pages at a touch
    /// (`fault_around_bytes`), so that of what is only read 64 KiB count; of what is written, the page.
    ///
    /// # Errors
    /// Nothing of it is mapped, perhaps not any more; or on a file system that tells /proc another device than `stat`
    /// (btrfs).
    pub fn of_process(
        snapshot: &Snapshot,
        maps: &str,
        pages: &File,
    ) -> Result<Self, WorkingSetError> {
        let (file, begins) = snapshot.placed_in().ok_or(WorkingSetError::Unmapped)?;
        let found = file.metadata().map_err(WorkingSetError::Look)?;
        let device = format!("{:02x}:{:02x}", major(found.dev()), minor(found.dev()));
        let inode = found.ino().to_string();
        let memory = snapshot.opening().memory;
        let (mut touched, mut left) = (Vec::new(), memory);
        let mut is_mapped = false;
        let ours = maps.lines().filter_map(Mapping::parse);
        for mapping in ours.filter(|it| it.device == device && it.inode == inode) {
            is_mapped = true;
            let Some(offset) = mapping.offset.checked_sub(begins) else {
                continue;
            };
            // What lies behind memory is no memory, whatever a process maps, and however often.
            let length = memory.saturating_sub(offset).min(left);
            left -= length.min(mapping.length());
            let runs = mapping.touched(length, pages);
            for run in runs.map_err(WorkingSetError::Look)? {
                touched.push(offset + run.start..offset + run.end);
            }
        }
        if !is_mapped {
            return Err(WorkingSetError::Unmapped);
        }
        if touched.is_empty() {
            return Err(WorkingSetError::Untouched);
        }
        touched.sort_by_key(|run| run.start);
        Ok(WorkingSet {
            snapshot: snapshot.opening().id,
            memory,
            runs: few(touched, MOST_RUNS),
        })
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEAD + RUN * self.runs.len() + 4);
        bytes.extend(MAGIC);
        bytes.extend(FORM.to_le_bytes());
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        bytes.extend(self.snapshot.as_bytes());
        bytes.extend(self.memory.to_le_bytes());
        for run in &self.runs {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend(run.end.to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        to.write_all(&bytes)
    }

    /// # Errors
    /// It is none, was damaged or made up, or is of another snapshot.
    pub fn read(from: impl Read, snapshot: &Snapshot) -> Result<Self, WorkingSetError> {
        let most = HEAD + RUN * MOST_RUNS + 4;
        let mut bytes = Vec::new();
        let read = from.take(most as u64 + 1).read_to_end(&mut bytes);
        read.map_err(io("read"))?;
        let truncated = StreamError::Truncated { what: "its head" };
        if bytes.get(..8).ok_or(truncated)? != MAGIC {
            return Err(malformed("this is no working set").into());
        }
        let number = |at: usize| {
            let bytes = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
            u64::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let (form, count) = (number(8) as u32, (number(8) >> 32) as usize);
        if form != FORM {
            return Err(malformed("a form that this build does not know").into());
        }
        if count > MOST_RUNS || bytes.len() != HEAD + RUN * count + 4 {
            return Err(StreamError::Truncated { what: "its runs" }.into());
        }
        let (said, sum) = bytes.split_at(HEAD + RUN * count);
        if sum != crc32fast::hash(said).to_le_bytes() {
            let what = "the working set".to_owned();
            return Err(StreamError::Checksum { what }.into());
        }
        let id = said.get(16..32).and_then(|id| Uuid::from_slice(id).ok());
        let (opening, found) = (snapshot.opening(), id.unwrap_or_default());
        if found != opening.id {
            let expected = opening.id;
            return Err(WorkingSetError::Foreign { expected, found });
        }
        let runs = (0..count).map(|run| HEAD + RUN * run);
        let runs: Vec<_> = runs.map(|at| number(at)..number(at + 8)).collect();
        let set = WorkingSet {
            snapshot: found,
            memory: number(32),
            runs,
        };
        match set.memory == opening.memory && set.is_sound() {
            true => Ok(set),
            false => Err(malformed("runs that are none of its memory").into()),
        }
    }

    fn is_sound(&self) -> bool {
        let mut end = 0;
        self.runs.iter().all(|run| {
            let pages = [run.start, run.end];
            let whole = pages.iter().all(|at| at.is_multiple_of(PAGE as u64));
            let follows = run.start >= end && run.start < run.end && run.end <= self.memory;
            end = run.end;
            whole && follows
        })
    }
}

impl Snapshot {
    /// Has the kernel read this part of memory to the page cache, where it is not there yet, in large requests. It may wait
    /// until the disk has taken them, but not for what it reads.
    ///
    /// They are not mapped as well (MADV_POPULATE_READ): that gained nothing where they are in the page cache, since the
    /// kernel maps some at a touch anyway, and what a guest waits for then is KVM's part.
    ///
    /// # Errors
    /// The file system cannot.
    pub fn fetch(&self, set: &WorkingSet) -> io::Result<()> {
        let Some((file, begins)) = self.placed_in() else {
            return Ok(());
        };
        for run in joined(&set.runs, GAP) {
            for at in run.clone().step_by(REQUEST as usize) {
                let length = NonZeroU64::new(REQUEST.min(run.end - at));
                fadvise(file, begins + at, length, Advice::WillNeed)?;
            }
        }
        Ok(())
    }
}

/// A line of /proc/PID/maps.
struct Mapping<'a> {
    addresses: Range<u64>,
    /// In the file.
    offset: u64,
    device: &'a str,
    inode: &'a str,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let mut word = || words.next();
        let (start, end) = word()?.split_once('-')?;
        let (_rights, offset, device, inode) = (word()?, word()?, word()?, word()?);
        let number = |word: &str| u64::from_str_radix(word, 16).ok();
        Some(Mapping {
            addresses: number(start)?..number(end)?,
            offset: number(offset)?,
            device,
            inode,
        })
    }

    fn length(&self) -> u64 {
        self.addresses.end.saturating_sub(self.addresses.start)
    }

    /// Runs of whole pages that are present in its first so many bytes, from its beginning.
    fn touched(&self, most: u64, pages: &File) -> io::Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let (mut at, page) = (0, PAGE as u64);
        let length = self.length().min(most) / page * page;
        let mut entries = vec![0; LOOK];
        while at < length {
            let most = ((length - at).div_ceil(page) * 8).min(LOOK as u64) as usize;
            let entries = entries.get_mut(..most).unwrap_or_default();
            pages.read_exact_at(entries, (self.addresses.start + at) / page * 8)?;
            for entry in entries.as_chunks::<8>().0 {
                let is_touched = u64::from_le_bytes(*entry) & PRESENT != 0;
                match runs.last_mut() {
                    _ if !is_touched => {}
                    Some(last) if last.end == at => last.end = at + page,
                    _ => runs.push(at..at + page),
                }
                at += page;
            }
        }
        Ok(runs)
    }
}

/// Those with no more than `gap` between them together.
fn joined(runs: &[Range<u64>], gap: u64) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if run.start <= last.end.saturating_add(gap) => {
                last.end = last.end.max(run.end);
            }
            _ => all.push(run.clone()),
        }
    }
    all
}

/// No more than so many, by what lies between them.
fn few(runs: Vec<Range<u64>>, most: usize) -> Vec<Range<u64>> {
    let (mut runs, mut gap) = (joined(&runs, 0), PAGE as u64);
    while runs.len() > most {
        runs = joined(&runs, gap);
        gap *= 2;
    }
    runs
}

#[cfg(test)]
mod tests;
