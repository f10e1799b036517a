//! Guest memory: one sealed memfd, mapped shared, with a dirty bitmap for the VMM's own writes.
//!
//! Owns the descriptor, the mapping, page size and NUMA binding. The descriptor is what is handed over
//! when source and target of a migration share a host; its size is sealed, so that whoever maps it
//! can never be made to fault by a truncation. What is not touched is not there: a page that was given
//! back reads as zero. Parts of it may still be a snapshot's file ([`overlay`]): then the descriptor alone
//! is not all of memory, until it is [`GuestMemory::settle`]d.

mod dirty;
mod hot;
mod overlay;
mod owed;

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use crate::config::{HOT_BLOCK, HotMemoryConfig, MemoryConfig, PageSize};
use crate::layout::{Layout, Window};
use crate::stream::{BLOCK, Target};
use overlay::{Ground, Overlay};
use owed::Debt;

pub use dirty::PageSet;
pub use hot::{BlockState, Blocks, HotMemory};
pub use owed::{Faults, Owed};

/// What the rust-vmm crates work on.
pub type GuestMap = GuestMemoryMmap<AtomicBitmap>;

/// The memory of one machine. Cheap to clone; derefs to [`GuestMap`].
#[derive(Clone, Debug)]
pub struct GuestMemory {
    map: Arc<GuestMap>,
    file: Arc<File>,
    pages: PageSize,
    bytes: u64,
    hot: Option<Arc<HotMemory>>,
    over: Arc<Overlay>,
    /// Something of it came from a file that nobody has checked.
    unchecked: Arc<AtomicBool>,
    debt: Arc<Debt>,
}

/// One contiguous range as KVM wants it.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the mapping in this process, valid as long as the [`GuestMemory`] lives.
    pub host: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("create a memfd of {bytes} bytes with {pages:?} pages")]
    Create {
        bytes: u64,
        pages: PageSize,
        source: io::Error,
    },
    #[error("map {size} bytes of guest memory at {guest:#x}")]
    Map {
        guest: u64,
        size: u64,
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("lay out guest memory")]
    Layout(#[from] vm_memory::GuestRegionCollectionError),
    #[error("ask for transparent huge pages")]
    HugePages { source: io::Error },
    #[error("bind guest memory to host NUMA nodes {nodes:?}")]
    Bind { nodes: Vec<u32>, source: io::Error },
    #[error("reserve {bytes} bytes of huge pages: are enough of them free on these nodes?")]
    Reserve { bytes: u64, source: io::Error },
    #[error("read {length} bytes from a file to guest memory at {guest:#x}")]
    ReadFile {
        length: u64,
        guest: u64,
        source: io::Error,
    },
    #[error("{action} hot memory")]
    Hot {
        action: &'static str,
        source: io::Error,
    },
    #[error("ask how much guest memory there is")]
    Size { source: io::Error },
    #[error("give memory back to the host")]
    Discard { source: io::Error },
    #[error("{action} the snapshot that memory is made of")]
    Overlay {
        action: &'static str,
        source: io::Error,
    },
    #[error("wait for the pages that are elsewhere (userfaultfd)")]
    Owed { source: io::Error },
    #[error("look for what there is of guest memory")]
    Present { source: io::Error },
}

impl GuestMemory {
    /// Makes memory for a machine; `config` is valid.
    pub fn create(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
        GuestMemory::create_with(config, None)
    }

    /// Bytes of the memfd of such memory; `config` and `hot` are valid.
    pub fn file_bytes_of(config: &MemoryConfig, hot: Option<&HotMemoryConfig>) -> u64 {
        hot.map_or(config.bytes, |hot| hot_offset(config) + hot.max)
    }

    /// Where hot memory begins in the memfd of such memory.
    pub fn hot_offset_of(config: &MemoryConfig) -> u64 {
        hot_offset(config)
    }

    /// With room for hot memory, of which nothing is plugged.
    pub fn create_with(
        config: &MemoryConfig,
        hot: Option<&HotMemoryConfig>,
    ) -> Result<GuestMemory, MemoryError> {
        let bytes = GuestMemory::file_bytes_of(config, hot);
        let file = create_file(config.pages, bytes).map_err(|source| MemoryError::Create {
            bytes,
            pages: config.pages,
            source,
        })?;
        let memory = GuestMemory::map(file, config, hot)?;
        memory.reserve()?;
        Ok(memory)
    }

    /// Huge pages are taken at once: the first touch of one that is not there would be a SIGBUS.
    fn reserve(&self) -> Result<(), MemoryError> {
        if !self.has_reserved_pages() {
            return Ok(());
        }
        let bytes = self.bytes;
        rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, 0, bytes).map_err(|source| {
            MemoryError::Reserve {
                bytes,
                source: source.into(),
            }
        })
    }

    /// Maps memory that exists already; `file` has the size and page size of `config`. Of hot memory
    /// nothing is plugged.
    pub fn map(
        file: File,
        config: &MemoryConfig,
        hot: Option<&HotMemoryConfig>,
    ) -> Result<GuestMemory, MemoryError> {
        let file = Arc::new(file);
        let layout = Layout::with_hot(config.bytes, hot.map_or(0, |hot| hot.max));
        let mut regions = Vec::new();
        let mut offset = 0;
        for range in layout.ram().chain(layout.hot) {
            if Some(range) == layout.hot {
                offset = hot_offset(config);
            }
            let region = MmapRegionBuilder::new_with_bitmap(
                range.size as usize,
                AtomicBitmap::with_len(range.size as usize),
            )
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .build()
            .map_err(|source| MemoryError::Map {
                guest: range.base,
                size: range.size,
                source,
            })?;
            let start = region.as_ptr().cast::<libc::c_void>();
            if config.pages == PageSize::Transparent {
                advise(start, region.size()).map_err(|source| MemoryError::HugePages { source })?;
            }
            bind(start, region.size(), config).map_err(|source| MemoryError::Bind {
                nodes: config.host_nodes.clone(),
                source,
            })?;
            offset += range.size;
            // The layout never overflows: memory is at most 4 TiB from 4 GiB.
            regions.extend(GuestRegionMmap::new(region, GuestAddress(range.base)));
        }
        let map = Arc::new(GuestMap::from_regions(regions)?);
        let make = |window: Window| {
            let (offset, file) = (hot_offset(config), Arc::clone(&file));
            HotMemory::new(window, offset, file, config.pages, Arc::clone(&map))
        };
        let hot = layout.hot.map(make).transpose()?.map(Arc::new);
        Ok(GuestMemory {
            map,
            file,
            pages: config.pages,
            bytes: config.bytes,
            hot,
            over: Arc::default(),
            unchecked: Arc::default(),
            debt: Arc::default(),
        })
    }

    /// Has `runs` of memory be what stands in `file`, without reading it: pages of 4 KiB by their offset in the memfd,
    /// in ascending order, of which the first byte of all would stand at `at`, whole pages into the file. They are read
    /// when they are touched, and copied when they are written to; the file is never written to. Memory is all zeros
    /// until now, not of huge pages that are reserved, and nothing of what is hot is among the runs.
    ///
    /// Returns what is still to be read, in ascending order: of runs that lie far from each other only so many are
    /// mapped.
    ///
    /// The file has to stay as it is for as long as memory lives: what is written to it changes under the guest, and
    /// where it is truncated, or cannot be read, a touch is a SIGBUS, which ends the process.
    #[must_use = "what was not mapped is to be read"]
    pub fn lay_over(
        &self,
        config: &MemoryConfig,
        file: &File,
        at: u64,
        runs: &[Range<u64>],
    ) -> Result<Vec<Range<u64>>, MemoryError> {
        let failed = |source| MemoryError::Overlay {
            action: "map",
            source,
        };
        let beyond = runs.last().is_some_and(|last| last.end > self.bytes);
        if beyond || self.has_reserved_pages() {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        if !runs.is_empty() {
            self.mark_unchecked();
        }
        let laid = self.over.lay(self.ground(), config, file, at, runs);
        laid.map_err(failed)
    }

    /// What is in it came from a file that may be damaged, as far as anybody knows: so it is from
    /// [`GuestMemory::lay_over`], or this call, until it is [cleared](GuestMemory::clear).
    pub fn is_unchecked(&self) -> bool {
        self.unchecked.load(Ordering::Relaxed)
    }

    pub fn mark_unchecked(&self) {
        self.unchecked.store(true, Ordering::Relaxed);
    }

    /// Something of memory is still that file's ([`GuestMemory::lay_over`]).
    pub fn is_made_of(&self, file: &File) -> Result<bool, MemoryError> {
        self.over
            .is_of(file)
            .map_err(|source| MemoryError::Overlay {
                action: "look at",
                source,
            })
    }

    /// The memfd alone is all of memory.
    pub fn is_settled(&self) -> bool {
        self.over.is_empty()
    }

    /// Reads what is still a file's and not zero, so that the memfd alone is all of memory from now on. No vCPU runs, no device is
    /// active.
    pub fn settle(&self) -> Result<(), MemoryError> {
        let settled = self.over.settle(self.ground());
        settled.map_err(|source| MemoryError::Overlay {
            action: "read",
            source,
        })
    }

    /// What is given back is zeroed and kept, because what is still a file's was cut into as many pieces as may be:
    /// there is to be a moment for [`GuestMemory::make_room`]. Said once.
    pub fn wants_room(&self) -> bool {
        self.over.wants_room()
    }

    /// Reads some of what is still a file's, for about so long at most, so that what is given back finds room to be cut
    /// out. No vCPU runs, no device is active.
    pub fn make_room(&self, longest: Duration) -> Result<(), MemoryError> {
        let thinned = self.over.thin(self.ground(), longest);
        thinned.map_err(|source| MemoryError::Overlay {
            action: "read",
            source,
        })
    }

    /// From here on whoever touches one of `pages` waits until it has come, or is zero. Nobody has touched memory yet
    /// but by its memfd; it is not of huge pages that are reserved, nor hot.
    ///
    /// # Errors
    /// It is, or the kernel refuses.
    pub fn owe(&self, faults: Faults, pages: PageSet) -> Result<Arc<Owed>, MemoryError> {
        let failed = |source| MemoryError::Owed { source };
        let last = pages.blocks().last();
        let end = last.map_or(0, |(number, _)| (number + 1) * BLOCK as u64);
        let beyond = end > self.bytes.next_multiple_of(BLOCK as u64);
        if self.has_reserved_pages() || !self.over.is_empty() || beyond {
            return Err(failed(io::ErrorKind::Unsupported.into()));
        }
        let owed = Owed::begin(faults, &self.map, &self.file, pages).map_err(failed)?;
        let owed = Arc::new(owed);
        self.debt.set(Some(Arc::clone(&owed)));
        Ok(owed)
    }

    /// Nothing is owed any more, or ever will be paid: nobody waits for it.
    pub fn owe_nothing(&self) -> Result<(), MemoryError> {
        match self.debt.get() {
            Some(owed) => {
                owed.end().map_err(|source| MemoryError::Owed { source })?;
                self.debt.set(None);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Nothing of it is elsewhere ([`GuestMemory::owe`]): its memfd has it.
    pub fn is_whole(&self) -> bool {
        self.debt.get().is_none()
    }

    /// What parts that are a file's lie on.
    fn ground(&self) -> Ground<'_> {
        Ground {
            map: &self.map,
            memfd: &self.file,
            pages: self.pages,
        }
    }

    fn has_reserved_pages(&self) -> bool {
        matches!(self.pages, PageSize::Huge2MiB | PageSize::Huge1GiB)
    }

    /// As the guest has it, from an offset in the memfd; as much as there is. What is not there is zero, and is not
    /// made by being read.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.over.read_at(self.ground(), buffer, offset)
    }

    /// Pages that may be something else than zero, by their place in the memfd.
    pub fn present(&self) -> Result<PageSet, MemoryError> {
        let failed = |source| MemoryError::Present { source };
        let end = self.file_bytes()?;
        let (mut pages, mut at) = (PageSet::new(end), 0);
        while let Some(data) = next(&self.file, SeekFrom::Data(at)).map_err(failed)? {
            // No hole behind it: to the end.
            at = next(&self.file, SeekFrom::Hole(data))
                .map_err(failed)?
                .unwrap_or(end);
            pages.add_range(data, at);
        }
        for extent in self.over.extents() {
            pages.add_range(extent.start, extent.end);
        }
        Ok(pages)
    }

    /// The ranges to be given to KVM.
    pub fn slots(&self) -> Vec<Slot> {
        slots(&self.map, self.hot.as_deref())
    }

    /// Where each of the [`GuestMemory::slots`] begins in the memfd.
    pub fn offsets(&self) -> impl Iterator<Item = u64> {
        let start = |region: &GuestRegionMmap<AtomicBitmap>| {
            region.file_offset().map_or(0, FileOffset::start)
        };
        self.map.iter().map(start)
    }

    /// The memfd: all of memory, if that is [settled](GuestMemory::settle).
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Adds what this process has written to since this was last asked to `pages`.
    pub fn take_own_writes(&self, pages: &mut PageSet) {
        for (region, offset) in self.map.iter().zip(self.offsets()) {
            let written = region.get_mmap().bitmap().get_and_reset();
            pages.add(offset, &written);
        }
    }

    /// Bytes of the memfd, hot memory and all.
    pub fn file_bytes(&self) -> Result<u64, MemoryError> {
        let length = self.length();
        length.map_err(|source| MemoryError::Size { source })
    }

    /// Without hot memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What comes and goes, if the machine has such.
    pub fn hot(&self) -> Option<&Arc<HotMemory>> {
        self.hot.as_ref()
    }

    pub fn page_size(&self) -> PageSize {
        self.pages
    }

    /// The shared map, in the form that virtio-queue and vm-memory take (`GuestAddressSpace`).
    pub fn space(&self) -> Arc<GuestMap> {
        Arc::clone(&self.map)
    }

    /// Reads `length` bytes of `file` from `offset` straight into guest memory, at most as many as the
    /// file has; returns how many.
    pub fn read_file(
        &self,
        file: &File,
        offset: u64,
        guest: u64,
        length: u64,
    ) -> Result<u64, MemoryError> {
        let failed = |source| MemoryError::ReadFile {
            length,
            guest,
            source,
        };
        let mut done = 0;
        while done < length {
            let left = usize::try_from(length - done).unwrap_or(usize::MAX);
            let slice =
                GuestMemoryBackend::get_slices(&*self.map, GuestAddress(guest + done), left)
                    .next()
                    .and_then(Result::ok)
                    .ok_or_else(|| failed(io::ErrorKind::AddrNotAvailable.into()))?;
            let target = slice.ptr_guard_mut();
            // SAFETY: the slice is `slice.len()` bytes of guest memory, mapped and writable while
            // `self` lives. The guest may see them change, and so may we: nothing is borrowed.
            let read = unsafe {
                libc::pread(
                    file.as_fd().as_raw_fd(),
                    target.as_ptr().cast(),
                    slice.len(),
                    (offset + done) as libc::off_t,
                )
            };
            match read {
                0 => break,
                1.. => {
                    slice.bitmap().mark_dirty(0, read as usize);
                    done += read as u64;
                }
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(failed(error));
                    }
                }
            }
        }
        Ok(done)
    }

    /// Gives the whole pages of `length` bytes at `guest` back to the host; returns how many bytes
    /// those are. They read as zero from now on, until somebody writes to them. What is no RAM is
    /// passed over; what could not be given back is as zero ([`GuestMemory::wants_room`]).
    ///
    /// Huge pages are not given back: they were taken in advance so that no touch can fail, and another
    /// would take them meanwhile.
    pub fn give_back(&self, guest: u64, length: u64) -> Result<u64, MemoryError> {
        if self.has_reserved_pages() {
            return Ok(0);
        }
        let page = self.pages.bytes();
        let end = guest.saturating_add(length);
        let mut given = 0;
        for region in self.map.iter() {
            let (base, size) = (region.start_addr().0, region.len());
            let last = end.min(base + size) / page * page;
            let Some(file) = region.file_offset().filter(|_| guest < last) else {
                continue;
            };
            let first = guest.max(base).next_multiple_of(page);
            let bytes = last.saturating_sub(first);
            if bytes == 0 {
                continue;
            }
            let offset = file.start() + (first - base);
            let kept = self.punch(offset, bytes);
            // What a stream has sent of them is no longer so.
            let mapping = region.get_mmap();
            (mapping.bitmap()).set_addr_range((first - base) as usize, bytes as usize);
            given += bytes - kept.map_err(|source| MemoryError::Discard { source })?;
        }
        Ok(given)
    }

    /// These pages are zero; how many bytes of them take memory all the same.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<u64> {
        self.debt.forget(offset..offset + bytes)?;
        let kept = self.over.give_back(self.ground(), offset..offset + bytes)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&*self.file, flags, offset, bytes)?;
        Ok(kept)
    }

    /// All zeros again, and nothing of it in the host's memory, nor of a file. No vCPU runs, no device is active.
    pub fn clear(&self) -> Result<(), MemoryError> {
        let forgotten = self.debt.forget(0..self.bytes);
        let cleared = forgotten.and_then(|()| self.over.clear(self.ground()));
        cleared.map_err(|source| MemoryError::Discard { source })?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let hot = self.hot.as_ref().map_or(0, |hot| hot.window().size);
        // What lies between the two is nothing.
        let bytes = self.bytes.next_multiple_of(HOT_BLOCK) + hot;
        rustix::fs::fallocate(&*self.file, flags, 0, bytes).map_err(|source| {
            MemoryError::Discard {
                source: source.into(),
            }
        })?;
        for region in self.map.iter() {
            region.get_mmap().bitmap().set_addr_range(0, region.size());
        }
        self.unchecked.store(false, Ordering::Relaxed);
        self.reserve()
    }
}

/// As a stream finds it: also what is not plugged of hot memory, which is zero.
impl Target for GuestMemory {
    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.has_reserved_pages() {
            // hugetlbfs takes no write; and a page of it that is not there when it is touched is a SIGBUS.
            let page = self.pages.bytes();
            let first = offset / page * page;
            let length = (offset + bytes.len() as u64).next_multiple_of(page) - first;
            rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, first, length)?;
        } else if self.over.is_empty() {
            return self.file.write_all_at(bytes, offset);
        }
        let nowhere = || io::Error::from(io::ErrorKind::AddrNotAvailable);
        let region = |region: &&GuestRegionMmap<AtomicBitmap>| {
            let start = region.file_offset().map_or(0, FileOffset::start);
            (start..start + region.len()).contains(&offset)
        };
        let region = self.map.iter().find(region).ok_or_else(nowhere)?;
        let start = region.file_offset().map_or(0, FileOffset::start);
        let at = MemoryRegionAddress(offset - start);
        (region.write_slice(bytes, at)).map_err(|error| io::Error::other(error.to_string()))
    }

    fn clear(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.has_reserved_pages() {
            true => self.put(&vec![0; length as usize], offset),
            false => self.punch(offset, length).map(drop),
        }
    }
}

impl Deref for GuestMemory {
    type Target = GuestMap;

    fn deref(&self) -> &GuestMap {
        &self.map
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Memory as the guest has it, for the host's kernel: hot memory in the view in which what is not plugged
/// cannot be written to. The mappings live as long as both.
pub fn slots(map: &GuestMap, hot: Option<&HotMemory>) -> Vec<Slot> {
    let slot = |region: &GuestRegionMmap<AtomicBitmap>| match hot {
        Some(hot) if hot.window().base == region.start_addr().0 => hot.slot(),
        _ => Slot {
            guest: region.start_addr().0,
            size: region.len(),
            host: region.as_ptr() as u64,
        },
    };
    map.iter().map(slot).collect()
}

/// Where hot memory begins in the file.
fn hot_offset(config: &MemoryConfig) -> u64 {
    config.bytes.next_multiple_of(HOT_BLOCK)
}

fn create_file(pages: PageSize, bytes: u64) -> io::Result<File> {
    let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = match pages {
        PageSize::Small | PageSize::Transparent => base | MemfdFlags::NOEXEC_SEAL,
        PageSize::Huge2MiB => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        PageSize::Huge1GiB => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fd = match rustix::fs::memfd_create("guest-memory", flags) {
        // NOEXEC_SEAL is known from Linux 6.3 on.
        Err(rustix::io::Errno::INVAL) => {
            rustix::fs::memfd_create("guest-memory", flags - MemfdFlags::NOEXEC_SEAL)
        }
        other => other,
    }?;
    rustix::fs::ftruncate(&fd, bytes)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals)?;
    Ok(File::from(fd))
}

/// The next data or hole; `None`: there is no more.
fn next(file: &File, what: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, what) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Asks for huge pages where there can be some. Kernels without answer EINVAL: small pages then. `start` and `length`
/// are of a mapping of ours.
fn advise(start: *mut libc::c_void, length: usize) -> io::Result<()> {
    // SAFETY: MADV_HUGEPAGE changes no content and no validity, of whatever range.
    let failed = unsafe { libc::madvise(start, length, libc::MADV_HUGEPAGE) } != 0;
    let error = io::Error::last_os_error();
    match failed && error.raw_os_error() != Some(libc::EINVAL) {
        true => Err(error),
        false => Ok(()),
    }
}

/// Has the pages of a mapping of ours be of the host's NUMA nodes of `config`, if it names any.
fn bind(start: *mut libc::c_void, length: usize, config: &MemoryConfig) -> io::Result<()> {
    if config.host_nodes.is_empty() {
        return Ok(());
    }
    let nodes = config.host_nodes.iter();
    let mask = nodes.fold(0u64, |mask, node| mask | 1 << (node & 63));
    // SAFETY: a policy changes no content and no validity, of whatever range; the mask lives through the call and has
    // the 64 bits that are said (the kernel wants one more than the highest).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            length,
            libc::MPOL_BIND,
            &raw const mask,
            65,
            0,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
