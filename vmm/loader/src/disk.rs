//! The disk as the loader sees it: reads at any place, through a small cache, on a budget.
//!
//! Every read and every turn of a loop is paid for here, so that no content of a disk can make the
//! loader work, wait or allocate without end. What was overspent stops the whole search.

use std::cell::RefCell;
use std::io;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Something that can be read at any place.
pub trait ReadAt {
    /// Fills all of `buffer`; `offset..offset + buffer.len()` is within the size.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Bytes.
    fn size(&self) -> u64;
}

impl ReadAt for &[u8] {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = self.get(start..).and_then(|rest| rest.get(..buffer.len()));
        match found {
            Some(found) => {
                buffer.copy_from_slice(found);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

impl ReadAt for std::fs::File {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }

    fn size(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }
}

/// What a search may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest kernel, and largest sum of initrds, bytes: what the guest's memory can hold.
    pub memory: u64,
    /// CPU time of the thread that searches: what else the host is busy with takes nothing of it.
    pub work: Duration,
    /// All of the time that it waited for the disk.
    pub wait: Duration,
    /// Bytes read from the disk.
    pub bytes: u64,
    /// Turns of loops, and what is compared and copied between them, [`BYTES_A_STEP`] at a time.
    pub steps: u64,
    /// Bytes of memory for what is made of configurations and of where files stand, over the search.
    pub kept: u64,
}

/// Bytes of text that are worked on for one step: with either, some 100 ns are gone.
const BYTES_A_STEP: u64 = 32;

impl Limits {
    /// For a guest with so many bytes of memory. A disk of today is searched in some milliseconds;
    /// the largest share is for the journal of a file system that was not unmounted.
    pub fn for_memory(memory: u64) -> Limits {
        Limits {
            memory,
            work: Duration::from_millis(800),
            wait: Duration::from_secs(5),
            bytes: 1 << 30,
            steps: 8_000_000,
            kept: 64 << 20,
        }
    }
}

/// Why something on the disk could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("not there")]
    NotFound,
    #[error("no regular file")]
    NotAFile,
    #[error("no directory")]
    NotAFolder,
    #[error("more than 40 symbolic links on the way")]
    TooManyLinks,
    #[error("{size} bytes, of which {limit} are possible")]
    TooLarge { size: u64, limit: u64 },
    #[error("damaged: {0}")]
    Damaged(&'static str),
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    #[error("behind the end of the disk or partition")]
    OutOfBounds,
    #[error("reading at byte {offset}: {source}")]
    Io { offset: u64, source: io::Error },
    /// Ends the search.
    #[error("{0}")]
    Exhausted(&'static str),
}

impl Fault {
    pub fn ends_the_search(&self) -> bool {
        matches!(self, Fault::Exhausted(_))
    }
}

/// Bytes of a cached window, to which reads are aligned.
const WINDOW: u64 = 32 << 10;
const WINDOWS: usize = 64;

struct Window {
    /// In windows.
    index: u64,
    used: u64,
    bytes: Vec<u8>,
}

struct Inner<'a> {
    source: &'a mut dyn ReadAt,
    windows: Vec<Window>,
    clock: u64,
    steps: u64,
    bytes: u64,
    kept: u64,
    waited: Duration,
}

pub struct Disk<'a> {
    inner: RefCell<Inner<'a>>,
    size: u64,
    limits: Limits,
    /// Of this thread's CPU time.
    began: Duration,
}

/// CPU time that this thread has used. The first look at the clock in a process asks the kernel where it
/// finds the clock (prctl), which a process that is locked down may not: whoever searches in such a one
/// looks once before.
pub fn worked() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

impl<'a> Disk<'a> {
    pub fn new(source: &'a mut dyn ReadAt, limits: Limits) -> Disk<'a> {
        let size = source.size();
        Disk {
            inner: RefCell::new(Inner {
                source,
                windows: Vec::new(),
                clock: 0,
                steps: 0,
                bytes: 0,
                kept: 0,
                waited: Duration::ZERO,
            }),
            size,
            limits,
            began: worked(),
        }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// One turn of a loop whose end the disk decides.
    pub fn step(&self) -> Result<(), Fault> {
        self.steps(1)
    }

    /// One turn that looks at so many bytes of text.
    pub fn step_over(&self, bytes: usize) -> Result<(), Fault> {
        self.steps(1 + bytes as u64 / BYTES_A_STEP)
    }

    fn steps(&self, count: u64) -> Result<(), Fault> {
        let mut inner = self.inner.borrow_mut();
        let before = inner.steps;
        inner.steps = before.saturating_add(count);
        if inner.steps > self.limits.steps {
            return Err(Fault::Exhausted("the disk's structures are endless"));
        }
        if before / 1024 != inner.steps / 1024 {
            self.check_time(inner.waited)?;
        }
        Ok(())
    }

    /// So many bytes of memory are taken, and not counted back.
    pub fn keep(&self, bytes: u64) -> Result<(), Fault> {
        let mut inner = self.inner.borrow_mut();
        inner.kept = inner.kept.saturating_add(bytes);
        match inner.kept > self.limits.kept {
            true => Err(Fault::Exhausted(
                "what is on the disk takes too much memory to understand",
            )),
            false => Ok(()),
        }
    }

    /// Bytes of memory that may still be taken.
    pub fn room(&self) -> u64 {
        let kept = self.inner.borrow().kept;
        self.limits.kept.saturating_sub(kept)
    }

    fn check_time(&self, waited: Duration) -> Result<(), Fault> {
        if waited > self.limits.wait {
            return Err(Fault::Exhausted("the disk is too slow"));
        }
        if worked().saturating_sub(self.began) > self.limits.work {
            return Err(Fault::Exhausted("the search took too long"));
        }
        Ok(())
    }

    /// Fills `buffer` from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let length = buffer.len() as u64;
        let end = offset.checked_add(length).ok_or(Fault::OutOfBounds)?;
        if end > self.size {
            return Err(Fault::OutOfBounds);
        }
        let mut rest = buffer;
        let mut at = offset;
        while !rest.is_empty() {
            self.step()?;
            let within = (at % WINDOW) as usize;
            let take = rest.len().min(WINDOW as usize - within);
            let (now, later) = rest.split_at_mut(take);
            self.read_window(at / WINDOW, within, now)?;
            rest = later;
            at += take as u64;
        }
        Ok(())
    }

    fn read_window(&self, index: u64, within: usize, target: &mut [u8]) -> Result<(), Fault> {
        let mut inner = self.inner.borrow_mut();
        inner.clock += 1;
        let clock = inner.clock;
        let known = inner
            .windows
            .iter()
            .position(|window| window.index == index);
        let place = match known {
            Some(place) => place,
            None => self.fetch(&mut inner, index)?,
        };
        let window = inner.windows.get_mut(place).ok_or(Fault::OutOfBounds)?;
        window.used = clock;
        let found = window.bytes.get(within..within + target.len());
        target.copy_from_slice(found.ok_or(Fault::OutOfBounds)?);
        Ok(())
    }

    /// Reads a window in the place of the one that was not used for longest.
    fn fetch(&self, inner: &mut Inner<'_>, index: u64) -> Result<usize, Fault> {
        let offset = index * WINDOW;
        let length = WINDOW.min(self.size.saturating_sub(offset));
        inner.bytes += length;
        if inner.bytes > self.limits.bytes {
            return Err(Fault::Exhausted(
                "too much of the disk would have to be read",
            ));
        }
        let place = if inner.windows.len() < WINDOWS {
            inner.windows.push(Window {
                index: u64::MAX,
                used: 0,
                bytes: Vec::new(),
            });
            inner.windows.len() - 1
        } else {
            let oldest = inner.windows.iter().enumerate();
            oldest
                .min_by_key(|(_, window)| window.used)
                .map_or(0, |(place, _)| place)
        };
        let began = Instant::now();
        let Inner {
            source, windows, ..
        } = inner;
        let window = windows.get_mut(place).ok_or(Fault::OutOfBounds)?;
        // Not valid until it is read.
        window.index = u64::MAX;
        window.bytes.resize(length as usize, 0);
        let read = source.read_at(offset, &mut window.bytes);
        if read.is_ok() {
            window.index = index;
        }
        inner.waited += began.elapsed();
        read.map_err(|source| Fault::Io { offset, source })?;
        self.check_time(inner.waited)?;
        Ok(place)
    }
}

/// A range of the disk: a partition, or all of it.
#[derive(Clone, Copy)]
pub struct Volume<'a> {
    pub disk: &'a Disk<'a>,
    /// Bytes from the disk's begin.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

impl Volume<'_> {
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(Fault::OutOfBounds);
        }
        let offset = self.start.checked_add(offset).ok_or(Fault::OutOfBounds)?;
        self.disk.read(offset, buffer)
    }

    pub fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub fn step(&self) -> Result<(), Fault> {
        self.disk.step()
    }
}

/// A part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Stands on the disk, at this byte of it.
    Disk {
        offset: u64,
        length: u64,
    },
    Zero {
        length: u64,
    },
    /// Kept among metadata.
    Bytes(Vec<u8>),
}

impl Piece {
    /// Bytes.
    pub fn length(&self) -> u64 {
        match self {
            Piece::Disk { length, .. } | Piece::Zero { length } => *length,
            Piece::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// More pieces than a file that can be booted has: blocks of 1 KiB, each alone, are 64 MiB.
const MAX_PIECES: usize = 1 << 16;

/// The pieces of a file in the making; neighbours are joined.
#[derive(Default)]
pub struct Pieces {
    list: Vec<Piece>,
    /// Bytes so far.
    length: u64,
}

impl Pieces {
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn push(&mut self, piece: Piece) -> Result<(), Fault> {
        let added = piece.length();
        if added == 0 {
            return Ok(());
        }
        self.length = self
            .length
            .checked_add(added)
            .ok_or(Fault::Damaged("a file's size"))?;
        let full = self.list.len() >= MAX_PIECES;
        match (self.list.last_mut(), &piece) {
            (Some(Piece::Disk { offset, length }), Piece::Disk { offset: next, .. })
                if offset.checked_add(*length) == Some(*next) =>
            {
                *length += added;
            }
            (Some(Piece::Zero { length }), Piece::Zero { .. }) => *length += added,
            _ if full => return Err(Fault::Damaged("a file in too many pieces")),
            _ => self.list.push(piece),
        }
        Ok(())
    }

    /// Cut, or filled with zeros, to exactly `size` bytes.
    pub fn finish(mut self, size: u64) -> Result<Vec<Piece>, Fault> {
        if self.length < size {
            let length = size - self.length;
            self.push(Piece::Zero { length })?;
        }
        let mut surplus = self.length - size;
        while surplus > 0 {
            let Some(last) = self.list.last_mut() else {
                break;
            };
            let length = last.length();
            if length <= surplus {
                surplus -= length;
                self.list.pop();
                continue;
            }
            let keep = length - surplus;
            match last {
                Piece::Disk { length, .. } | Piece::Zero { length } => *length = keep,
                Piece::Bytes(bytes) => bytes.truncate(keep as usize),
            }
            surplus = 0;
        }
        Ok(self.list)
    }
}

/// `size` bytes from `offset` on, if `pieces` have them.
pub fn cut(pieces: &[Piece], offset: u64, size: u64) -> Option<Vec<Piece>> {
    let end = offset.checked_add(size)?;
    let (mut part, mut begin) = (Vec::new(), 0u64);
    for piece in pieces {
        let after = begin.checked_add(piece.length())?;
        let (from, to) = (offset.max(begin), end.min(after));
        if from < to {
            let (skip, length) = (from - begin, to - from);
            part.push(match piece {
                Piece::Disk { offset, .. } => Piece::Disk {
                    offset: offset + skip,
                    length,
                },
                Piece::Zero { .. } => Piece::Zero { length },
                Piece::Bytes(bytes) => {
                    let bytes = bytes.get(skip as usize..(skip + length) as usize);
                    Piece::Bytes(bytes.unwrap_or_default().to_vec())
                }
            });
        }
        begin = after;
    }
    (end <= begin).then_some(part)
}

/// All bytes of `pieces`, which are few.
pub fn read_pieces(disk: &Disk<'_>, pieces: &[Piece]) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Disk { offset, length } => {
                let begin = bytes.len();
                bytes.resize(begin + *length as usize, 0);
                disk.read(*offset, bytes.get_mut(begin..).unwrap_or_default())?;
            }
            Piece::Zero { length } => bytes.resize(bytes.len() + *length as usize, 0),
            Piece::Bytes(more) => bytes.extend_from_slice(more),
        }
    }
    Ok(bytes)
}
