//! Memory that comes and goes in blocks, above all other: behind what the guest has plugged stands the
//! machine's memfd, behind the rest nothing.
//!
//! KVM gets a mapping of its own (the *view*), in which a block that is not plugged is a mapping of
//! zeros that cannot be written to: reading it costs no memory, writing to it ends the machine (KVM_RUN fails
//! with EFAULT). So a guest has no more memory than it was granted, whatever its driver does; and one slot
//! of KVM serves for all of it, which never has to be taken away under running vCPUs. The VMM's own
//! mapping ([`super::GuestMap`]) is always whole, so that no address of a guest's can make a thread of ours
//! fault: what devices may touch is asked here.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use libc::c_void;
use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMap, MemoryError, Slot};
use crate::config::{HOT_BLOCK, PageSize};
use crate::layout::Window;

/// The region, shared by the device that plugs and all that look.
#[derive(Debug)]
pub struct HotMemory {
    window: Window,
    /// Of the region in the memfd.
    offset: u64,
    file: Arc<File>,
    pages: PageSize,
    view: View,
    /// Whose bitmap says what changed.
    map: Arc<GuestMap>,
    /// By number.
    plugged: RwLock<Vec<bool>>,
    /// How many changes the host still carries out, where a test says so.
    #[cfg(test)]
    pub(crate) patience: std::sync::atomic::AtomicU64,
}

/// Some blocks, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    pub first: u64,
    pub count: u64,
}

/// How blocks stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

impl HotMemory {
    /// Nothing is plugged. `window` and `offset` are whole blocks.
    pub(super) fn new(
        window: Window,
        offset: u64,
        file: Arc<File>,
        pages: PageSize,
        map: Arc<GuestMap>,
    ) -> Result<HotMemory, MemoryError> {
        let view = View::new(window.size as usize).map_err(failed("map"))?;
        let plugged = RwLock::new(vec![false; (window.size / HOT_BLOCK) as usize]);
        Ok(HotMemory {
            window,
            offset,
            file,
            pages,
            view,
            map,
            plugged,
            #[cfg(test)]
            patience: u64::MAX.into(),
        })
    }

    /// Where the guest finds it.
    pub fn window(&self) -> Window {
        self.window
    }

    /// The blocks of `length` bytes at `address`, if these are whole ones of the region, and not none.
    pub fn blocks(&self, address: u64, length: u64) -> Option<Blocks> {
        let offset = address.checked_sub(self.window.base)?;
        let end = offset.checked_add(length)?;
        let whole = offset.is_multiple_of(HOT_BLOCK) && length.is_multiple_of(HOT_BLOCK);
        (whole && length > 0 && end <= self.window.size).then_some(Blocks {
            first: offset / HOT_BLOCK,
            count: length / HOT_BLOCK,
        })
    }

    pub fn all(&self) -> Blocks {
        Blocks {
            first: 0,
            count: self.window.size / HOT_BLOCK,
        }
    }

    pub fn state(&self, blocks: Blocks) -> BlockState {
        let plugged = self.read();
        let mut states = blocks.of(&plugged).iter();
        match (
            states.clone().all(|plugged| *plugged),
            states.any(|plugged| *plugged),
        ) {
            (true, _) => BlockState::Plugged,
            (false, false) => BlockState::Unplugged,
            (false, true) => BlockState::Mixed,
        }
    }

    /// Whether devices may touch that much at that address: no, if any of it is not plugged.
    pub fn allows(&self, address: u64, length: u64) -> bool {
        let end = address.saturating_add(length);
        let (first, last) = (address.max(self.window.base), end.min(self.window.end()));
        if first >= last {
            return true;
        }
        let number = |address: u64| (address - self.window.base) / HOT_BLOCK;
        let blocks = Blocks {
            first: number(first),
            count: number(last - 1) - number(first) + 1,
        };
        blocks.of(&self.read()).iter().all(|plugged| *plugged)
    }

    /// What is plugged, for a saved state.
    pub fn plugged(&self) -> Vec<Blocks> {
        let (mut runs, mut first) = (Vec::new(), 0);
        for run in self.read().chunk_by(|one, next| one == next) {
            let count = run.len() as u64;
            if run.first() == Some(&true) {
                runs.push(Blocks { first, count });
            }
            first += count;
        }
        runs
    }

    /// Bytes that are plugged.
    pub fn plugged_bytes(&self) -> u64 {
        let count = self.read().iter().filter(|plugged| **plugged).count();
        count as u64 * HOT_BLOCK
    }

    /// Gives the guest blocks that it does not have: zeros. An error leaves things as they were.
    pub fn plug(&self, blocks: Blocks) -> Result<(), MemoryError> {
        #[cfg(test)]
        self.lose_patience()?;
        let mut plugged = self.write();
        // What a device wrote late, when the guest had let go of it.
        self.punch(blocks)?;
        self.reserve(blocks)?;
        if let Err(error) = self.show(blocks) {
            self.punch(blocks)?;
            return Err(error);
        }
        blocks.of_mut(&mut plugged).fill(true);
        Ok(())
    }

    /// The first touch of a huge page that is not there would be a SIGBUS. What is there stays.
    fn reserve(&self, blocks: Blocks) -> Result<(), MemoryError> {
        if self.pages != PageSize::Huge2MiB {
            return Ok(());
        }
        let (offset, bytes) = (self.offset + blocks.offset(), blocks.bytes());
        let taken = rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, offset, bytes);
        taken.map_err(|source| MemoryError::Reserve {
            bytes,
            source: source.into(),
        })
    }

    /// Gives the guest blocks that it has had in the process before: with what is in them.
    pub fn plug_again(&self, runs: &[Blocks]) -> Result<(), MemoryError> {
        let mut plugged = self.write();
        let all = self.all().count;
        let there = |blocks: &Blocks| {
            let end = blocks.first.checked_add(blocks.count);
            blocks.count > 0 && end.is_some_and(|end| end <= all)
        };
        // A state that somebody made up.
        if !runs.iter().all(there) {
            return Err(failed("find the plugged blocks of")(
                io::ErrorKind::InvalidData.into(),
            ));
        }
        for blocks in runs {
            self.reserve(*blocks)?;
            self.show(*blocks)?;
            blocks.of_mut(&mut plugged).fill(true);
        }
        Ok(())
    }

    /// Takes blocks away, and what is in them. An error leaves them with the guest.
    pub fn unplug(&self, blocks: Blocks) -> Result<(), MemoryError> {
        #[cfg(test)]
        self.lose_patience()?;
        let mut plugged = self.write();
        self.view.hide(blocks).map_err(failed("unmap"))?;
        blocks.of_mut(&mut plugged).fill(false);
        if let Err(error) = self.punch(blocks) {
            // Nobody sees it any more; it goes when the blocks are plugged again, or at a reset.
            tracing::warn!(%error, ?blocks, "unplugged memory stays with this process");
        }
        Ok(())
    }

    fn show(&self, blocks: Blocks) -> Result<(), MemoryError> {
        let offset = self.offset + blocks.offset();
        let huge = self.pages == PageSize::Transparent;
        self.view
            .show(blocks, &self.file, offset, huge)
            .map_err(failed("map"))
    }

    /// Nothing is behind them any more.
    fn punch(&self, blocks: Blocks) -> Result<(), MemoryError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = self.offset + blocks.offset();
        let punched = rustix::fs::fallocate(&*self.file, flags, offset, blocks.bytes());
        // What a stream has sent of them is no longer so, whether all of them are gone or some. Afterwards: who takes the
        // log before finds it in the next one.
        let regions = self.map.iter();
        for region in regions.filter(|region| region.start_addr().0 == self.window.base) {
            let (offset, length) = (blocks.offset() as usize, blocks.bytes() as usize);
            region.get_mmap().bitmap().set_addr_range(offset, length);
        }
        punched.map_err(|source| MemoryError::Discard {
            source: source.into(),
        })
    }

    #[cfg(test)]
    fn lose_patience(&self) -> Result<(), MemoryError> {
        use std::sync::atomic::Ordering::Relaxed;
        let left = self.patience.load(Relaxed);
        // One that fails is not the last: the next may be carried out again.
        self.patience
            .store(left.checked_sub(1).unwrap_or(u64::MAX), Relaxed);
        match left {
            0 => Err(failed("map")(io::ErrorKind::OutOfMemory.into())),
            _ => Ok(()),
        }
    }

    /// What the guest would read at the start of a block.
    #[cfg(test)]
    pub(crate) fn seen(&self, block: u64) -> u8 {
        let address = self.view.address as u64 + block * HOT_BLOCK;
        assert!(block * HOT_BLOCK < self.window.size);
        // SAFETY: the view is mapped and readable throughout, as long as `self` lives.
        unsafe { (address as *const u8).read_volatile() }
    }

    pub(super) fn slot(&self) -> Slot {
        Slot {
            guest: self.window.base,
            size: self.window.size,
            host: self.view.address as u64,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<bool>> {
        self.plugged.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<bool>> {
        self.plugged.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Blocks {
    pub fn bytes(self) -> u64 {
        self.count * HOT_BLOCK
    }

    /// From the start of the region, bytes.
    pub fn offset(self) -> u64 {
        self.first * HOT_BLOCK
    }

    /// The first so many of them, and the rest.
    pub fn split(self, count: u64) -> (Blocks, Blocks) {
        let count = count.min(self.count);
        let (first, left) = (self.first + count, self.count - count);
        let rest = Blocks { first, count: left };
        (Blocks { count, ..self }, rest)
    }

    fn range(self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }

    fn of(self, all: &[bool]) -> &[bool] {
        all.get(self.range()).unwrap_or_default()
    }

    fn of_mut(self, all: &mut [bool]) -> &mut [bool] {
        all.get_mut(self.range()).unwrap_or_default()
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> MemoryError {
    move |source| MemoryError::Hot { action, source }
}

/// What KVM maps: `length` bytes at `address`, a multiple of a block, in a larger mapping.
#[derive(Debug)]
struct View {
    whole: *mut c_void,
    whole_length: usize,
    address: usize,
    length: usize,
}

// SAFETY: the addresses are of a mapping that the value owns. It is changed by system calls only, which
// replace parts of it at once; nothing in this process reads or writes it.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

const ZEROS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl View {
    fn new(length: usize) -> io::Result<View> {
        // Aligned as the guest's addresses are: huge pages stay whole.
        let whole_length = length + HOT_BLOCK as usize;
        // SAFETY: a new mapping wherever the kernel finds room for it.
        let whole =
            unsafe { libc::mmap(ptr::null_mut(), whole_length, libc::PROT_READ, ZEROS, -1, 0) };
        if whole == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(View {
            whole,
            whole_length,
            address: (whole as usize).next_multiple_of(HOT_BLOCK as usize),
            length,
        })
    }

    fn show(&self, blocks: Blocks, file: &File, offset: u64, huge: bool) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        self.replace(blocks, access, flags, file.as_raw_fd(), offset)?;
        if huge {
            let (address, length) = self.place(blocks)?;
            // SAFETY: the range is ours; MADV_HUGEPAGE changes no content and no validity. Where it is
            // refused there are small pages.
            unsafe { libc::madvise(address, length, libc::MADV_HUGEPAGE) };
        }
        Ok(())
    }

    fn hide(&self, blocks: Blocks) -> io::Result<()> {
        self.replace(blocks, libc::PROT_READ, ZEROS, -1, 0)
    }

    fn place(&self, blocks: Blocks) -> io::Result<(*mut c_void, usize)> {
        let (offset, length) = (blocks.offset() as usize, blocks.bytes() as usize);
        let inside = offset
            .checked_add(length)
            .is_some_and(|end| end <= self.length);
        if !inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(((self.address + offset) as *mut c_void, length))
    }

    fn replace(
        &self,
        blocks: Blocks,
        access: libc::c_int,
        flags: libc::c_int,
        fd: libc::c_int,
        offset: u64,
    ) -> io::Result<()> {
        let (address, length) = self.place(blocks)?;
        let flags = flags | libc::MAP_FIXED;
        // SAFETY: the range is within the mapping that `self` owns, and no reference points into it: only
        // KVM maps it, which follows the change.
        let mapped =
            unsafe { libc::mmap(address, length, access, flags, fd, offset as libc::off_t) };
        match mapped == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(()),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever had it mapped (KVM, by `Vm`, which keeps the memory
        // alive) is gone.
        unsafe { libc::munmap(self.whole, self.whole_length) };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::GuestMemory;
    use super::*;
    use crate::config::{HotMemoryConfig, MemoryConfig};

    fn memory(pages: PageSize) -> GuestMemory {
        let config = MemoryConfig {
            bytes: 4 << 20,
            pages,
            host_nodes: Vec::new(),
        };
        let hot = HotMemoryConfig {
            max: 8 * HOT_BLOCK,
            bytes: 0,
        };
        GuestMemory::create_with(&config, Some(&hot)).unwrap()
    }

    fn hot(memory: &GuestMemory) -> &HotMemory {
        memory.hot().unwrap()
    }

    fn blocks(first: u64, count: u64) -> Blocks {
        Blocks { first, count }
    }

    fn resident(memory: &GuestMemory) -> i64 {
        rustix::fs::fstat(memory).unwrap().st_blocks * 512
    }

    #[test]
    fn a_block_is_seen_while_it_is_plugged_and_zero_before_and_after() {
        let memory = memory(PageSize::Small);
        let hot = hot(&memory);
        let start = |block| GuestAddress(hot.window().base + block * HOT_BLOCK);
        let before = resident(&memory);
        assert_eq!((0..8).map(|block| hot.seen(block)).sum::<u8>(), 0);
        assert_eq!(resident(&memory), before, "looking costs nothing");
        hot.plug(blocks(2, 3)).unwrap();
        memory
            .write_slice(&[7; HOT_BLOCK as usize], start(3))
            .unwrap();
        assert_eq!([2, 3, 4].map(|block| hot.seen(block)), [0, 7, 0]);
        assert_eq!(hot.plugged_bytes(), 3 * HOT_BLOCK);
        hot.unplug(blocks(3, 1)).unwrap();
        assert_eq!(hot.seen(3), 0);
        let kept = resident(&memory) - before;
        assert!(
            kept <= 2 * 4096,
            "{kept} bytes, where two pages were looked at"
        );
        // A device that writes late is not seen, and not later either.
        memory.write_obj(9u8, start(3)).unwrap();
        assert_eq!(hot.seen(3), 0);
        hot.plug(blocks(3, 1)).unwrap();
        assert_eq!(hot.seen(3), 0);
        memory.write_obj(5u8, start(3)).unwrap();
        assert_eq!(hot.seen(3), 5);
        memory.clear().unwrap();
        assert_eq!(hot.seen(3), 0);
    }

    #[test]
    fn blocks_are_whole_and_inside_and_devices_may_touch_what_is_plugged() {
        let memory = memory(PageSize::Transparent);
        let hot = hot(&memory);
        let base = hot.window().base;
        for (address, length) in [
            (base - HOT_BLOCK, HOT_BLOCK),
            (base + 4096, HOT_BLOCK),
            (base, HOT_BLOCK - 4096),
            (base, 0),
            (base, 9 * HOT_BLOCK),
            (base + 8 * HOT_BLOCK, HOT_BLOCK),
            (base, u64::MAX - HOT_BLOCK + 1),
            (u64::MAX - HOT_BLOCK + 1, HOT_BLOCK),
        ] {
            assert_eq!(
                hot.blocks(address, length),
                None,
                "{address:#x} {length:#x}"
            );
        }
        assert_eq!(
            hot.blocks(base + HOT_BLOCK, 7 * HOT_BLOCK),
            Some(blocks(1, 7))
        );
        hot.plug(blocks(1, 2)).unwrap();
        let states = [(1, 2), (0, 1), (0, 2), (3, 5)];
        let states = states.map(|(first, count)| hot.state(blocks(first, count)));
        use BlockState::{Mixed, Plugged, Unplugged};
        assert_eq!(states, [Plugged, Unplugged, Mixed, Unplugged]);
        let allows = |offset: u64, length| hot.allows(base + offset, length);
        assert!(allows(HOT_BLOCK, 2 * HOT_BLOCK) && allows(2 * HOT_BLOCK - 1, 2));
        assert!(!allows(HOT_BLOCK - 1, 2) && !allows(3 * HOT_BLOCK - 1, 2) && !allows(0, 1));
        assert!(hot.allows(0, 4096) && hot.allows(u64::MAX - 1, 1) && hot.allows(base - 1, 1));
        assert!(!hot.allows(0, u64::MAX));
        let (head, rest) = blocks(3, 5).split(2);
        assert_eq!((head, rest), (blocks(3, 2), blocks(5, 3)));
        assert_eq!(blocks(3, 5).split(9), (blocks(3, 5), blocks(8, 0)));
    }

    #[test]
    fn another_process_sees_what_was_plugged() {
        let config = MemoryConfig {
            bytes: 4 << 20,
            pages: PageSize::Small,
            host_nodes: Vec::new(),
        };
        let first = memory(PageSize::Small);
        hot(&first).plug(blocks(5, 2)).unwrap();
        let base = hot(&first).window().base;
        first
            .write_obj(3u8, GuestAddress(base + 6 * HOT_BLOCK))
            .unwrap();
        let max = HotMemoryConfig {
            max: 8 * HOT_BLOCK,
            bytes: 0,
        };
        let file = File::from(rustix::io::dup(&first).unwrap());
        let second = GuestMemory::map(file, &config, Some(&max)).unwrap();
        // What a state names that somebody made up; one that is right changes nothing of it.
        for (first, count) in [(8, 1), (7, 2), (0, 0), (1 << 43, 1), (u64::MAX, 2)] {
            let made_up = [blocks(0, 1), Blocks { first, count }];
            assert!(hot(&second).plug_again(&made_up).is_err());
            assert!(hot(&second).plugged().is_empty());
        }
        hot(&second).plug_again(&hot(&first).plugged()).unwrap();
        assert_eq!([5, 6].map(|block| hot(&second).seen(block)), [0, 3]);
        assert_eq!(hot(&second).plugged_bytes(), 2 * HOT_BLOCK);
    }
}
