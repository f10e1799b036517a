//! Memory that is a snapshot's file until it is written to: private mappings of the file, laid over those of the memfd.
//!
//! Where an extent lies the memfd has nothing: what nobody has written to is the file's (in the host's page cache, one
//! for all machines that are made from it), what was written to is this process's own. Everywhere else memory is the
//! memfd as ever. An extent never grows and never comes back: what is given back becomes the memfd's again, where it is
//! a hole. (Dropping its pages would bring back what stands in the file.) So pages only ever go from here to the memfd,
//! and who looks without a lock is wrong in no way that matters.

use std::cmp::Reverse;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use libc::c_void;
use rustix::fs::FallocateFlags;
use vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::{AtomicBitmap, GuestMap, advise, bind};
use crate::config::{MemoryConfig, PageSize};
use crate::stream::{BLOCK, Mask, PAGE};

/// Extents that are laid at most, the largest; the rest is read. A mapping takes a microsecond or two and some of the
/// 65,530 that a process has.
const MOST_LAID: usize = 1024;
/// Extents that a guest can make of them by giving back what lies within.
const MOST: usize = 8192;
/// Bytes that are read at a time to have fewer, while the guest stands still: some 10 ms, if the host has them.
const THINNED: u64 = 16 << 20;
/// With fewer extents less for that it is not worth it.
const WORTH: usize = 64;
/// Bytes that may lie between two runs of pages that become one extent: what is there is a hole in the file, and
/// reading it costs a page of the page cache. On tmpfs that is a page of the file, which nobody takes back.
const GAP: u64 = 64 << 10;
const GAP_ON_TMPFS: u64 = 0;

/// Device and inode.
type Identity = (u64, u64);

#[derive(Debug, Default)]
pub(super) struct Overlay(RwLock<Laid>);

#[derive(Debug, Default)]
struct Laid {
    /// `None`: there are no extents.
    file: Option<Identity>,
    /// Offsets in the memfd, of whole pages of 4 KiB, each within one region; in ascending order.
    extents: Vec<Range<u64>>,
    room: Room,
}

/// Whether there may be as many extents as giving back would make.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Room {
    #[default]
    Enough,
    Wanting,
    /// The same, and somebody knows.
    Told,
}

/// What an overlay lies on.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub map: &'a GuestMap,
    pub memfd: &'a File,
    pub pages: PageSize,
}

impl Overlay {
    /// Lays `runs` of the memfd's pages, in ascending order, from `file`, in which the memfd's first byte would stand at
    /// `at`. Nothing of it was written to yet. Returns what was not laid, in ascending order: it is to be read.
    pub fn lay(
        &self,
        ground: Ground<'_>,
        config: &MemoryConfig,
        file: &File,
        at: u64,
        runs: &[Range<u64>],
    ) -> io::Result<Vec<Range<u64>>> {
        let identity = identity(file)?;
        let (extents, rest) = largest(joined(runs, gap(file)?), MOST_LAID);
        let mut laid = self.write();
        for extent in extents {
            for part in ground.within_regions(&extent) {
                let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
                let address = ground.replace(&part, flags, file, at + part.start)?;
                // What is copied on a write; where the page cache lies is not this machine's to say.
                bind(address, length(&part), config)?;
                laid.file = Some(identity);
                laid.extents.push(part);
            }
        }
        Ok(rest)
    }

    pub fn is_empty(&self) -> bool {
        self.read().extents.is_empty()
    }

    /// Something of it is that file's.
    pub fn is_of(&self, file: &File) -> io::Result<bool> {
        let found = self.read().file;
        Ok(found.is_some() && found == Some(identity(file)?))
    }

    pub fn extents(&self) -> Vec<Range<u64>> {
        self.read().extents.clone()
    }

    /// Reads memory as the guest has it, from an offset in the memfd; as much as there is.
    ///
    /// A file that cannot be read ends the process (SIGBUS), as it does if any thread of it touches such a page.
    pub fn read_at(&self, ground: Ground<'_>, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset + done as u64;
            let (is_laid, end) = self.piece(at);
            let most = usize::try_from(end - at).unwrap_or(usize::MAX);
            let length = rest.len().min(most);
            let Some(part) = rest.get_mut(..length) else {
                break;
            };
            done += match is_laid {
                true => ground.copy(part, at)?,
                false => match ground.memfd.read_at(part, at) {
                    Ok(0) => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                    other => other?,
                },
            };
        }
        Ok(done)
    }

    /// Whether an extent has the byte at `at`, and where that ends.
    fn piece(&self, at: u64) -> (bool, u64) {
        let laid = self.read();
        let next = laid.extents.partition_point(|extent| extent.end <= at);
        match laid.extents.get(next) {
            Some(extent) if extent.start <= at => (true, extent.end),
            Some(extent) => (false, extent.start),
            None => (false, u64::MAX),
        }
    }

    /// Whole pages of 4 KiB are zero from now on; how many bytes of them take memory all the same, since the overlay
    /// was to be cut into too many pieces ([`Overlay::wants_room`]).
    pub fn give_back(&self, ground: Ground<'_>, range: Range<u64>) -> io::Result<u64> {
        if self.is_empty() {
            return Ok(0);
        }
        let mut laid = self.write();
        let first = laid.extents.partition_point(|it| it.end <= range.start);
        let last = laid.extents.partition_point(|it| it.start < range.end);
        let found: Vec<_> = laid.extents.get(first..last).unwrap_or_default().to_vec();
        let (mut left, mut kept) = (Vec::new(), 0);
        let room = MOST.saturating_sub(laid.extents.len());
        for extent in found {
            let part = extent.start.max(range.start)..extent.end.min(range.end);
            let sides = [extent.start..part.start, part.end..extent.end];
            let sides = sides.into_iter().filter(|side| !side.is_empty());
            let fits = sides.clone().count() <= 1 + room;
            match fits && ground.restore(&part).is_ok() {
                true => left.extend(sides),
                false => {
                    ground.zero(&part)?;
                    kept += part.end - part.start;
                    left.push(extent);
                    if laid.room == Room::Enough {
                        laid.room = Room::Wanting;
                    }
                }
            }
        }
        laid.extents.splice(first..last, left);
        if laid.extents.len() <= MOST / 2 {
            laid.room = Room::Enough;
        }
        laid.forget_if_empty();
        Ok(kept)
    }

    /// There are as many pieces as there may be, and [`Overlay::thin`] would change that; said once.
    pub fn wants_room(&self) -> bool {
        let is_wanting = self.read().room == Room::Wanting;
        is_wanting && std::mem::replace(&mut self.write().room, Room::Told) == Room::Wanting
    }

    /// Up to half of the pieces, the smallest, go to the memfd, so that others can be cut; fewer, where that takes
    /// longer. Where they are too large for it nothing is done, and it is not asked for again. Nobody writes to memory
    /// meanwhile.
    pub fn thin(&self, ground: Ground<'_>, longest: Duration) -> io::Result<()> {
        let began = Instant::now();
        let mut laid = self.write();
        let small = smallest(&laid.extents, MOST / 2, THINNED);
        if small.len() < WORTH {
            return Ok(());
        }
        let (mut gone, mut outcome) = (Vec::new(), Ok(()));
        for extent in small {
            outcome = ground.settle(&extent);
            if outcome.is_err() {
                break;
            }
            gone.push(extent.start);
            if began.elapsed() > longest {
                break;
            }
        }
        gone.sort_unstable();
        (laid.extents).retain(|extent| gone.binary_search(&extent.start).is_err());
        laid.room = Room::Enough;
        laid.forget_if_empty();
        outcome
    }

    /// What it has is gone; the memfd is all of memory.
    pub fn clear(&self, ground: Ground<'_>) -> io::Result<()> {
        self.take_away(|extent| ground.restore(extent))
    }

    /// What it has goes to the memfd, which is all of memory then. Nobody writes to memory meanwhile.
    pub fn settle(&self, ground: Ground<'_>) -> io::Result<()> {
        self.take_away(|extent| ground.settle(extent))
    }

    fn take_away(&self, each: impl Fn(&Range<u64>) -> io::Result<()>) -> io::Result<()> {
        let mut laid = self.write();
        while let Some(extent) = laid.extents.last() {
            each(extent)?;
            laid.extents.pop();
        }
        laid.forget_if_empty();
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Laid> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Laid> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Laid {
    /// Of no extents there is no file either.
    fn forget_if_empty(&mut self) {
        if self.extents.is_empty() {
            *self = Laid::default();
        }
    }
}

impl Ground<'_> {
    /// Address of a range of the memfd in this process, if it lies in one region.
    fn address(self, range: &Range<u64>) -> io::Result<*mut c_void> {
        let (region, start) = self.region(range.start)?;
        if range.end - start > region.len() {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        Ok((region.as_ptr() as usize + (range.start - start) as usize) as *mut c_void)
    }

    /// Where an offset lies, and where that region begins in the memfd.
    fn region(&self, offset: u64) -> io::Result<(&GuestRegionMmap<AtomicBitmap>, u64)> {
        let start = |region: &GuestRegionMmap<AtomicBitmap>| {
            region.file_offset().map_or(0, FileOffset::start)
        };
        let mut regions = self.map.iter().map(|region| (region, start(region)));
        regions
            .find(|(region, start)| (*start..start + region.len()).contains(&offset))
            .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    fn within_regions(self, range: &Range<u64>) -> Vec<Range<u64>> {
        let part = |region: &GuestRegionMmap<AtomicBitmap>| {
            let start = region.file_offset().map_or(0, FileOffset::start);
            range.start.max(start)..range.end.min(start + region.len())
        };
        let parts = self.map.iter().map(part);
        parts.filter(|part| !part.is_empty()).collect()
    }

    /// Something else is behind these pages from now on; where they are.
    fn replace(
        self,
        range: &Range<u64>,
        flags: libc::c_int,
        file: &File,
        at: u64,
    ) -> io::Result<*mut c_void> {
        let address = self.address(range)?;
        // SAFETY: the range lies within a region of guest memory, a mapping that lives as long as `map`. What replaces
        // it is as readable and writable as it was, and no reference points into it: guest memory is volatile to all.
        let mapped = unsafe {
            libc::mmap(
                address,
                length(range),
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                file.as_raw_fd(),
                at as libc::off_t,
            )
        };
        match mapped == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(address),
        }
    }

    /// The memfd is behind these pages again, as it was before anything was laid over it.
    fn restore(self, range: &Range<u64>) -> io::Result<()> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let address = self.replace(range, flags, self.memfd, range.start)?;
        match self.pages {
            PageSize::Transparent => advise(address, length(range)),
            _ => Ok(()),
        }
    }

    fn copy(self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let (region, start) = self.region(offset)?;
        region
            .read(buffer, MemoryRegionAddress(offset - start))
            .map_err(|error| io::Error::other(error.to_string()))
    }

    fn zero(self, range: &Range<u64>) -> io::Result<()> {
        let (region, start) = self.region(range.start)?;
        for page in range.clone().step_by(4096) {
            let at = MemoryRegionAddress(page - start);
            (region.write_slice(&[0; 4096], at))
                .map_err(|error| io::Error::other(error.to_string()))?;
        }
        Ok(())
    }

    /// The memfd has these pages, and is behind them again.
    fn settle(self, range: &Range<u64>) -> io::Result<()> {
        self.write_down(range)?;
        self.restore(range)
    }

    /// Copies these pages to the memfd below them, but for those that are zero: what lay between runs was in no memory.
    fn write_down(self, range: &Range<u64>) -> io::Result<()> {
        let mut content = vec![0; BLOCK.min(length(range))];
        for start in range.clone().step_by(BLOCK) {
            let block = start..range.end.min(start + BLOCK as u64);
            self.write_all_down(&block)?;
            let content = content.get_mut(..length(&block)).unwrap_or_default();
            self.memfd.read_exact_at(content, block.start)?;
            let whole = Mask(u16::MAX >> (16 - content.len().div_ceil(PAGE)));
            for run in whole.without(Mask::with_content(content)).runs() {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let (at, length) = (block.start + run.start as u64, run.len() as u64);
                rustix::fs::fallocate(self.memfd, flags, at, length)?;
            }
        }
        Ok(())
    }

    /// The same of all of them. What cannot be read is an error here: the kernel reads it.
    fn write_all_down(self, range: &Range<u64>) -> io::Result<()> {
        let address = self.address(range)? as usize;
        let mut done = 0;
        while done < length(range) {
            // SAFETY: the rest of the range is mapped memory, which the kernel reads; it may change meanwhile, as any
            // guest memory may.
            let written = unsafe {
                libc::pwrite(
                    self.memfd.as_raw_fd(),
                    (address + done) as *const c_void,
                    length(range) - done,
                    (range.start + done as u64) as libc::off_t,
                )
            };
            match written {
                1.. => done += written as usize,
                0 => return Err(io::ErrorKind::WriteZero.into()),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

fn length(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}

fn identity(file: &File) -> io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What may lie between two runs of that file.
fn gap(file: &File) -> io::Result<u64> {
    match rustix::fs::fstatfs(file)?.f_type == libc::TMPFS_MAGIC {
        true => Ok(GAP_ON_TMPFS),
        false => Ok(GAP),
    }
}

/// Extents that have all of these runs, which are in ascending order: those with no more than `gap` between them
/// together.
fn joined(runs: &[Range<u64>], gap: u64) -> Vec<Range<u64>> {
    let mut extents: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match extents.last_mut() {
            Some(last) if run.start - last.end <= gap => last.end = run.end,
            _ => extents.push(run.clone()),
        }
    }
    extents
}

/// So many of the extents, the largest, and the others; both in ascending order.
fn largest(mut extents: Vec<Range<u64>>, most: usize) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    if extents.len() <= most {
        return (extents, Vec::new());
    }
    extents.sort_by_key(|extent| Reverse(extent.end - extent.start));
    let mut rest = extents.split_off(most);
    for part in [&mut extents, &mut rest] {
        part.sort_by_key(|extent| extent.start);
    }
    (extents, rest)
}

/// As many of the extents, the smallest first, as together have no more than so many bytes.
fn smallest(extents: &[Range<u64>], most: usize, bytes: u64) -> Vec<Range<u64>> {
    let size = |extent: &Range<u64>| extent.end - extent.start;
    let mut extents = extents.to_vec();
    extents.sort_by_key(size);
    let mut sum = 0;
    let fits = |extent: &Range<u64>| {
        sum += size(extent);
        sum <= bytes
    };
    extents.into_iter().take(most).take_while(fits).collect()
}

#[cfg(test)]
mod tests;
