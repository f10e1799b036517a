//! Physical memory, which is also virtual memory (identity mapped): raw access, page tables above
//! 4 GiB, registers of devices, and the pages that devices read and write.

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::cpu;
use crate::start_info::StartInfo;

const GIB: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;
/// User, writable, present; as boot.S makes them.
const TABLE: u64 = 7;
const PAGE: u64 = 0x87;
const PML4: u64 = 0x10_5000;

unsafe extern "C" {
    static image_end: u8;
}

/// Memory handed out in pages, never taken back.
struct Pool<const PAGES: usize> {
    pages: UnsafeCell<[[u8; PAGE_SIZE]; PAGES]>,
    taken: AtomicUsize,
}

// SAFETY: every page is handed out once (`taken` only grows), so no two owners share one.
unsafe impl<const PAGES: usize> Sync for Pool<PAGES> {}

impl<const PAGES: usize> Pool<PAGES> {
    /// Address of `count` zeroed pages in a row; none when the pool is used up.
    fn take(&self, count: usize) -> Option<u64> {
        let first = self.taken.fetch_add(count, Ordering::Relaxed);
        (first + count <= PAGES).then(|| (self.pages.get() as u64) + (first * PAGE_SIZE) as u64)
    }
}

#[repr(align(4096))]
struct Aligned<T>(T);

static TABLES: Aligned<Pool<128>> = Aligned(Pool {
    pages: UnsafeCell::new([[0; PAGE_SIZE]; 128]),
    taken: AtomicUsize::new(0),
});
static DMA: Aligned<Pool<1024>> = Aligned(Pool {
    pages: UnsafeCell::new([[0; PAGE_SIZE]; 1024]),
    taken: AtomicUsize::new(0),
});

pub fn read_u8(address: u64) -> u8 {
    // SAFETY: the first 4 GiB are mapped from the start, the rest by `map`; what is read is the
    // loader's and firmware's memory or a device's registers, never an object of Rust's.
    unsafe { (address as *const u8).read_volatile() }
}

pub fn read_u16(address: u64) -> u16 {
    // SAFETY: as in `read_u8`; unaligned values are what ACPI tables have.
    unsafe { (address as *const u16).read_unaligned() }
}

pub fn read_u32(address: u64) -> u32 {
    // SAFETY: as in `read_u16`.
    unsafe { (address as *const u32).read_unaligned() }
}

pub fn read_u64(address: u64) -> u64 {
    // SAFETY: as in `read_u16`.
    unsafe { (address as *const u64).read_unaligned() }
}

/// One register-wide store to memory that is not Rust's: firmware's registers, the test pages.
pub fn write_u8(address: u64, value: u8) {
    // SAFETY: as in `read_u8`.
    unsafe { (address as *mut u8).write_volatile(value) }
}

/// As `write_u8`.
pub fn write_u64(address: u64, value: u64) {
    // SAFETY: as in `read_u8`; the address is a multiple of 8.
    unsafe { (address as *mut u64).write_volatile(value) }
}

/// Maps what of `address..address + length` lies above 4 GiB. False when there are no tables left.
pub fn map(address: u64, length: u64) -> bool {
    let mut page = (address & !(LARGE - 1)).max(4 * GIB);
    let end = address.saturating_add(length);
    let mut changed = false;
    while page < end {
        let Some(upper) = table_at(PML4, page >> 39) else {
            return false;
        };
        let Some(middle) = table_at(upper, page >> 30) else {
            return false;
        };
        let entry = middle + ((page >> 21) & 511) * 8;
        if read_u64(entry) & 1 == 0 {
            write_entry(entry, page | PAGE);
            changed = true;
        }
        page += LARGE;
    }
    if changed {
        cpu::flush_translations();
    }
    true
}

fn table_at(table: u64, index: u64) -> Option<u64> {
    let entry = table + (index & 511) * 8;
    let value = read_u64(entry);
    if value & 1 != 0 {
        return Some(value & 0x000f_ffff_ffff_f000);
    }
    let fresh = TABLES.0.take(1)?;
    write_entry(entry, fresh | TABLE);
    Some(fresh)
}

fn write_entry(entry: u64, value: u64) {
    // SAFETY: `entry` lies in one of our page tables, which no Rust object aliases.
    unsafe { (entry as *mut u64).write_volatile(value) }
}

/// A stretch of memory that belongs to no object: for touching and dirtying.
#[derive(Clone, Copy)]
pub struct Stretch {
    pub start: u64,
    pub length: u64,
}

/// Usable memory behind the image, whole pages, mapped.
pub fn free(info: &StartInfo) -> impl Iterator<Item = Stretch> + '_ {
    let image = ((&raw const image_end) as u64).next_multiple_of(PAGE_SIZE as u64);
    info.memory().iter().filter_map(move |region| {
        let start = region.start.next_multiple_of(PAGE_SIZE as u64).max(image);
        let end = (region.start + region.length) & !(PAGE_SIZE as u64 - 1);
        (end > start).then_some(Stretch {
            start,
            length: end - start,
        })
    })
}

/// Writes one word into every page of `pages` pages at `start`.
pub fn dirty(start: u64, pages: u64, value: u64) {
    for page in 0..pages {
        // SAFETY: `free` gave the stretch: memory behind the image, which no Rust object lies in.
        unsafe { ((start + page * PAGE_SIZE as u64) as *mut u64).write_volatile(value) }
    }
}

/// Free memory as a device's buffer.
///
/// # Safety
/// The range lies in a stretch of [`free`], and nobody else has it as a buffer meanwhile.
pub unsafe fn as_buffer(start: u64, length: u64) -> &'static mut [u8] {
    // SAFETY: no Rust object lies there, as the caller says.
    unsafe { core::slice::from_raw_parts_mut(start as *mut u8, length as usize) }
}

/// A page below 1 MiB that the loader lists as memory, for starting processors.
pub fn low_page(info: &StartInfo) -> usize {
    const WISHED: u64 = 0x1_0000;
    let usable = |address: u64| {
        info.memory()
            .iter()
            .any(|region| region.start <= address && address + 4096 <= region.start + region.length)
    };
    (WISHED..0x9_0000)
        .step_by(PAGE_SIZE)
        .find(|&a| usable(a))
        .unwrap_or(WISHED) as usize
}

/// Registers of a device.
#[derive(Clone, Copy)]
pub struct Registers(u64);

impl Registers {
    /// None if they cannot be mapped.
    pub fn at(address: u64, length: u64) -> Option<Self> {
        map(address, length).then_some(Self(address))
    }

    pub fn read8(self, offset: u64) -> u8 {
        read_u8(self.0 + offset)
    }

    pub fn read16(self, offset: u64) -> u16 {
        // SAFETY: mapped by `at`; registers belong to no Rust object.
        unsafe { ((self.0 + offset) as *const u16).read_volatile() }
    }

    pub fn read32(self, offset: u64) -> u32 {
        // SAFETY: as in `read16`.
        unsafe { ((self.0 + offset) as *const u32).read_volatile() }
    }

    pub fn write8(self, offset: u64, value: u8) {
        write_u8(self.0 + offset, value);
    }

    pub fn write16(self, offset: u64, value: u16) {
        // SAFETY: as in `read16`; what a device then writes by itself are pages given to it.
        unsafe { ((self.0 + offset) as *mut u16).write_volatile(value) }
    }

    pub fn write32(self, offset: u64, value: u32) {
        // SAFETY: as in `write16`.
        unsafe { ((self.0 + offset) as *mut u32).write_volatile(value) }
    }

    /// In two halves, as virtio asks for its 64-bit fields.
    pub fn write64(self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// Pages for a device, for good.
pub fn dma_pages(count: usize) -> Option<&'static mut [u8]> {
    let address = DMA.0.take(count)?;
    // SAFETY: the pool hands a page out once, so this is the only reference to it.
    Some(unsafe { core::slice::from_raw_parts_mut(address as *mut u8, count * PAGE_SIZE) })
}

/// Keeps a value for good, off the stacks, which are small.
pub fn keep<T>(value: T) -> Option<&'static mut T> {
    let pages = dma_pages(size_of::<T>().div_ceil(PAGE_SIZE))?;
    let place = pages.as_mut_ptr().cast::<T>();
    // SAFETY: the pages are ours alone for good, large enough, and aligned for anything.
    unsafe {
        place.write(value);
        Some(&mut *place)
    }
}

/// A page of DMA memory for acts that leave it in any state; the same one every time.
pub fn scratch_page() -> u64 {
    static SCRATCH: Aligned<Pool<1>> = Aligned(Pool {
        pages: UnsafeCell::new([[0; PAGE_SIZE]; 1]),
        taken: AtomicUsize::new(0),
    });
    SCRATCH.0.pages.get() as u64
}

/// Stretches of DMA pages that were given back: address, and in its low bits the number of pages.
static FREED: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];

fn take_freed(pages: usize) -> Option<u64> {
    let place = FREED.iter().find(|place| {
        let free = place.load(Ordering::Acquire);
        free != 0 && free % PAGE_SIZE as u64 == pages as u64
    })?;
    let address = place.swap(0, Ordering::AcqRel) & !(PAGE_SIZE as u64 - 1);
    for word in (0..(pages * PAGE_SIZE) as u64).step_by(8) {
        // SAFETY: a stretch of the pool that nobody has any more.
        unsafe { ((address + word) as *mut u64).write_volatile(0) }
    }
    Some(address)
}

/// What `virtio-drivers` asks of its platform: here physical is virtual.
pub struct ProbeHal;

// SAFETY: pages come zeroed and page-aligned from a pool that hands each out once; sharing is the
// identity, because all memory is mapped where it lies.
unsafe impl Hal for ProbeHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        match take_freed(pages).or_else(|| DMA.0.take(pages)) {
            Some(address) => (
                address,
                NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling()),
            ),
            // The crate takes address 0 for a failure.
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        // Devices are reset before their queues are dropped. What finds no place is lost.
        let free = address | pages as u64;
        let _ = FREED.iter().any(|place| {
            place
                .compare_exchange(0, free, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, size: usize) -> NonNull<u8> {
        map(address, size as u64);
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr() as *mut u8 as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
