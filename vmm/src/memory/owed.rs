//! Pages of a guest's memory that are elsewhere still while it runs: whoever touches one waits until it has come.
//!
//! By userfaultfd in two of its modes. A page that the memfd has, with what it held when it was last sent, is a *minor*
//! fault; one that it has not is a *missing* one. So nothing of what came before has to be thrown away first, which would
//! take as long as there is much of it, while the guest stands still; and what lies between pages that are owed costs one
//! fault each, at most. Other memory costs nothing.
//!
//! Sources: ioctl_userfaultfd(2); Documentation/admin-guide/mm/userfaultfd.rst (minor faults: Linux 5.14 for shmem).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use linux_raw_sys::general as abi;
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE,
};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use rustix::process::{Resource, getrlimit};
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMap, PageSet};
use crate::eventfd::EventFd;
use crate::stream::{BLOCK, Mask, PAGE, Target};

const FEATURES: u32 = abi::UFFD_FEATURE_MISSING_SHMEM | abi::UFFD_FEATURE_MINOR_SHMEM;
const MODES: u32 = abi::UFFDIO_REGISTER_MODE_MISSING | abi::UFFDIO_REGISTER_MODE_MINOR;
/// `_IOWR(0xaa, 7, struct uffdio_continue)`.
const UFFDIO_CONTINUE: u32 = 0xc020_aa07;
/// Ranges that are registered at most: each is a mapping of its own to the kernel, of which a process has 65530.
const RANGES: usize = 512;
/// The least number of the descriptor, or so much below the most that the process may have.
const LAST: u64 = 1000;
const ROOM: u64 = 24;
/// Bytes of a message.
const MESSAGE: usize = 32;

/// What tells of touches. It has to be made before the process gives up its rights: with them gone the kernel tells
/// nothing of its own touches, and KVM's are such.
#[derive(Debug)]
pub struct Faults(OwnedFd);

impl Faults {
    /// # Errors
    /// The kernel has no such thing, not for shared memory, or not for this process.
    pub fn open() -> io::Result<Faults> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a new descriptor; no memory is registered with it yet.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = abi::uffdio_api {
            api: abi::UFFD_API.into(),
            features: FEATURES.into(),
            ioctls: 0,
        };
        ask(&fd, UFFDIO_API, &mut api)?;
        // What a killed process has open the kernel ends from the highest number down, and this one has to be gone before
        // the last of KVM's: the end of a VM waits for the faults that KVM has begun for it (async_pf), which end with this.
        let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let last = most.saturating_sub(ROOM).min(LAST);
        Ok(Faults(rustix::io::fcntl_dupfd_cloexec(&fd, last as i32)?))
    }
}

/// Where a part of the memfd is mapped.
#[derive(Debug)]
struct Part {
    offset: u64,
    host: u64,
    size: u64,
}

#[derive(Debug)]
struct Left {
    pages: PageSet,
    count: u64,
}

impl Left {
    fn take(&mut self, number: u64, mask: Mask) -> Mask {
        let taken = self.pages.take(number, mask);
        self.count -= taken.count();
        taken
    }
}

/// Memory with pages that are owed.
#[derive(Debug)]
pub struct Owed {
    faults: OwnedFd,
    file: Arc<File>,
    parts: Vec<Part>,
    /// What is registered, by its place in the memfd.
    ranges: Vec<Range<u64>>,
    left: Mutex<Left>,
    /// Signalled once nothing is owed.
    empty: EventFd,
    /// The mappings.
    _map: Arc<GuestMap>,
}

impl Owed {
    /// From here on whoever touches one of `pages` waits. Nobody has touched memory through its mappings yet.
    pub(super) fn begin(
        faults: Faults,
        map: &Arc<GuestMap>,
        file: &Arc<File>,
        pages: PageSet,
    ) -> io::Result<Owed> {
        let part = |region: &vm_memory::GuestRegionMmap<_>| Part {
            offset: region.file_offset().map_or(0, FileOffset::start),
            host: region.as_ptr() as u64,
            size: region.len(),
        };
        let owed = Owed {
            faults: faults.0,
            file: Arc::clone(file),
            parts: map.iter().map(part).collect(),
            ranges: ranges_of(&pages, RANGES),
            empty: EventFd::new()?,
            left: Mutex::new(Left {
                count: pages.count(),
                pages,
            }),
            _map: Arc::clone(map),
        };
        for range in &owed.ranges {
            owed.each_mapping(range, |range| {
                let mut register = abi::uffdio_register {
                    range,
                    mode: MODES.into(),
                    ioctls: 0,
                };
                ask(&owed.faults, UFFDIO_REGISTER, &mut register)
            })?;
        }
        Ok(owed)
    }

    /// The block that somebody waits for a page of; `None`: nobody waits for what is not here. Never waits itself.
    pub fn next_wanted(&self) -> io::Result<Option<u64>> {
        loop {
            let Some(offset) = self.next_touched()? else {
                return Ok(None);
            };
            let (number, page) = place(offset);
            if self.owed(number).0 >> page & 1 == 1 {
                return Ok(Some(number));
            }
            self.let_have(offset)?;
        }
    }

    /// Readable once nothing is owed.
    pub fn empty(&self) -> &EventFd {
        &self.empty
    }

    /// Pages that are owed still.
    pub fn count(&self) -> u64 {
        self.lock().count
    }

    pub fn pages(&self) -> PageSet {
        self.lock().pages.clone()
    }

    /// Whether any of the block are.
    pub fn has(&self, number: u64) -> bool {
        !self.owed(number).is_empty()
    }

    fn owed(&self, number: u64) -> Mask {
        self.lock().pages.of_block(number)
    }

    /// Nothing of this range is owed any more: it is about to be zero.
    pub(super) fn forget(&self, range: Range<u64>) -> io::Result<()> {
        let mut left = self.lock();
        for (number, mask) in blocks_of(range) {
            let owed = left.take(number, mask);
            self.wake(number, owed)?;
        }
        self.look(&left);
        Ok(())
    }

    /// Nobody waits any more: all of memory is as the memfd has it.
    pub(super) fn end(&self) -> io::Result<()> {
        for range in &self.ranges {
            self.each_mapping(range, |mut range| {
                ask(&self.faults, UFFDIO_UNREGISTER, &mut range)
            })?;
        }
        Ok(())
    }

    /// Whoever waits fails: there is nothing any more where memory was registered. For a machine that is ending.
    pub fn abandon(&self) -> io::Result<()> {
        for range in &self.ranges {
            self.each_mapping(range, |range| {
                let flags =
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
                let (start, length) = (range.start as *mut libc::c_void, range.len as usize);
                // SAFETY: the range is guest memory of this process, to which nobody has a reference; whoever touches it
                // through an address ends the process, as is meant.
                let mapped = unsafe { libc::mmap(start, length, libc::PROT_NONE, flags, -1, 0) };
                if mapped == libc::MAP_FAILED {
                    return Err(last_error());
                }
                // Who waits looks again, also where there is nothing any more.
                let mut range = range;
                ask(&self.faults, UFFDIO_WAKE, &mut range)
            })?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, left: &Left) {
        if left.count == 0 {
            self.empty.signal();
        }
    }

    /// Where the next touch was, by its place in the memfd.
    fn next_touched(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        loop {
            match rustix::io::read(&self.faults, &mut message) {
                Ok(MESSAGE) => {}
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let address = message.get(16..).and_then(<[u8]>::first_chunk);
            let address = u64::from_ne_bytes(address.copied().unwrap_or_default());
            let part = |part: &&Part| (part.host..part.host + part.size).contains(&address);
            if u32::from(message[0]) == abi::UFFD_EVENT_PAGEFAULT
                && let Some(part) = self.parts.iter().find(part)
            {
                return Ok(Some(part.offset + (address - part.host)));
            }
        }
    }

    /// Lets a page be touched that is not owed, and its neighbours that are there.
    fn let_have(&self, offset: u64) -> io::Result<()> {
        let (number, page) = place(offset);
        let end = page + 1 + (self.owed(number).0 >> page >> 1).trailing_zeros() as usize;
        let start = number * BLOCK as u64;
        let first = start + (page * PAGE) as u64;
        let all = first..start + (end.min(BLOCK / PAGE) * PAGE) as u64;
        self.each_mapping(&all, |range| match self.show(range) {
            // It is a hole, or begins with one.
            Err(Errno::FAULT) => self.show_zero(abi::uffdio_range {
                len: PAGE as u64,
                ..range
            }),
            shown => shown,
        })
    }

    /// Maps what the memfd has there, up to what it has not.
    fn show(&self, range: abi::uffdio_range) -> Result<(), Errno> {
        let mut done = 0;
        while done < range.len {
            let mut more = abi::uffdio_continue {
                range: abi::uffdio_range {
                    start: range.start + done,
                    len: range.len - done,
                },
                mode: 0,
                mapped: 0,
            };
            match ask(&self.faults, UFFDIO_CONTINUE, &mut more) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => done += u64::try_from(more.mapped).unwrap_or(0),
                // Somebody has mapped it meanwhile.
                Err(Errno::EXIST) => {
                    let mut one = abi::uffdio_range {
                        len: PAGE as u64,
                        ..more.range
                    };
                    ask(&self.faults, UFFDIO_WAKE, &mut one)?;
                    done += PAGE as u64;
                }
                // What comes behind the first is a favour.
                Err(Errno::FAULT) if done > 0 => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn show_zero(&self, range: abi::uffdio_range) -> Result<(), Errno> {
        let mut zero = abi::uffdio_zeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        match ask(&self.faults, UFFDIO_ZEROPAGE, &mut zero) {
            // Whoever waits looks again.
            Err(Errno::EXIST | Errno::AGAIN) => {
                let mut range = range;
                ask(&self.faults, UFFDIO_WAKE, &mut range)
            }
            done => done,
        }
    }

    fn wake(&self, number: u64, mask: Mask) -> io::Result<()> {
        for run in mask.runs() {
            self.each_mapping(&run_of(number, &run), |mut range| {
                ask(&self.faults, UFFDIO_WAKE, &mut range)
            })?;
        }
        Ok(())
    }

    /// Does something to each mapping of a range of the memfd.
    fn each_mapping(
        &self,
        range: &Range<u64>,
        mut what: impl FnMut(abi::uffdio_range) -> Result<(), Errno>,
    ) -> io::Result<()> {
        for part in &self.parts {
            let start = range.start.max(part.offset);
            let end = range.end.min(part.offset + part.size);
            if start < end {
                what(abi::uffdio_range {
                    start: part.host + (start - part.offset),
                    len: end - start,
                })?;
            }
        }
        Ok(())
    }
}

/// As a stream finds it: what is not owed is passed over.
impl Target for Owed {
    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut left = self.lock();
        for (number, mask) in blocks_of(offset..offset + bytes.len() as u64) {
            let owed = left.pages.of_block(number).and(mask);
            for run in owed.runs() {
                let at = run_of(number, &run);
                let content = (at.start - offset) as usize..(at.end - offset) as usize;
                let content = bytes.get(content).ok_or(io::ErrorKind::InvalidInput)?;
                self.file.write_all_at(content, at.start)?;
            }
            left.take(number, owed);
            for run in owed.runs() {
                let shown = self.each_mapping(&run_of(number, &run), |range| self.show(range));
                if shown.is_err() {
                    // Who waits looks again, and is answered as one who did not wait.
                    self.wake(number, owed)?;
                }
            }
        }
        self.look(&left);
        Ok(())
    }

    fn clear(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let mut left = self.lock();
        for (number, mask) in blocks_of(offset..offset + length) {
            let owed = left.pages.of_block(number).and(mask);
            for run in owed.runs() {
                let at = run_of(number, &run);
                rustix::fs::fallocate(&*self.file, flags, at.start, at.end - at.start)?;
            }
            left.take(number, owed);
            // Who waited finds a hole now, which is another fault.
            self.wake(number, owed)?;
        }
        self.look(&left);
        Ok(())
    }
}

impl AsFd for Owed {
    /// Readable while somebody waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}

/// What is owed of a memory, for all that give pages of it back.
#[derive(Debug, Default)]
pub(super) struct Debt(RwLock<Option<Arc<Owed>>>);

impl Debt {
    pub fn set(&self, owed: Option<Arc<Owed>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = owed;
    }

    pub fn get(&self) -> Option<Arc<Owed>> {
        let owed = self.0.read().unwrap_or_else(PoisonError::into_inner);
        owed.clone()
    }

    /// This range is about to be zero.
    pub fn forget(&self, range: Range<u64>) -> io::Result<()> {
        match self.get() {
            Some(owed) => owed.forget(range),
            None => Ok(()),
        }
    }
}

/// Block and page in it.
fn place(offset: u64) -> (u64, usize) {
    let block = BLOCK as u64;
    (offset / block, (offset % block) as usize / PAGE)
}

fn run_of(number: u64, run: &Range<usize>) -> Range<u64> {
    let start = number * BLOCK as u64;
    start + run.start as u64..start + run.end as u64
}

/// Blocks of a range of whole pages, with the pages of each.
fn blocks_of(range: Range<u64>) -> impl Iterator<Item = (u64, Mask)> {
    let block = BLOCK as u64;
    let numbers = range.start / block..range.end.div_ceil(block);
    numbers.map(move |number| {
        let start = number * block;
        let page = |at: u64| ((at.clamp(start, start + block) - start) / PAGE as u64) as u32;
        let (first, end) = (page(range.start), page(range.end));
        let bits = (1u32 << end) - (1u32 << first);
        (number, Mask(bits as u16))
    })
}

/// Whole blocks with all that are owed, as so many ranges at most: of the gaps between them the largest are left out.
fn ranges_of(pages: &PageSet, most: usize) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (number, _) in pages.blocks() {
        match runs.last_mut() {
            Some(last) if last.end == number => last.end = number + 1,
            _ => runs.push(number..number + 1),
        }
    }
    let gap = |pair: &[Range<u64>]| match pair {
        [one, next] => next.start - one.end,
        _ => 0,
    };
    let mut gaps: Vec<u64> = runs.windows(2).map(gap).collect();
    let left_out = most.saturating_sub(1);
    let least = match gaps.len() > left_out {
        true => *gaps.select_nth_unstable_by(left_out, |a, b| b.cmp(a)).1 + 1,
        false => 0,
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match ranges.last_mut() {
            Some(last) if run.start - last.end < least => last.end = run.end,
            _ => ranges.push(run),
        }
    }
    let bytes = |range: Range<u64>| range.start * BLOCK as u64..range.end * BLOCK as u64;
    ranges.into_iter().map(bytes).collect()
}

fn ask<T>(fd: &OwnedFd, request: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: each request is called with the structure that it is defined with, which lives through the call. Registered
    // and resolved are mappings of guest memory only, to which nobody has a reference.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), argument) };
    match result {
        0.. => Ok(()),
        _ => Err(last_error()),
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;
