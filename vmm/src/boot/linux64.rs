//! The zero page, page tables and descriptors of Linux's 64-bit boot protocol.

use vm_memory::{Bytes, GuestAddress};

use super::bzimage::HEADER;
use super::map::memory_map;
use super::{Boot, BootError, BzImage, Initrd};
use crate::cpu::{BootRegisters, GDT};
use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES, COMMAND_LINE, Layout, ZERO_PAGE};
use crate::memory::GuestMemory;

/// Offsets in the zero page (Documentation/arch/x86/zero-page.rst).
const RSDP: usize = 0x70;
const EXT_RAMDISK_IMAGE: usize = 0xc0;
const EXT_RAMDISK_SIZE: usize = 0xc4;
const EXT_COMMAND_LINE: usize = 0xc8;
const E820_ENTRIES: usize = 0x1e8;
const TYPE_OF_LOADER: usize = 0x210;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;

/// Present, writable; and a page of 2 MiB.
const ENTRY: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = 4096;

pub fn start(
    image: &BzImage,
    boot: &Boot<'_>,
    initrd: Option<Initrd>,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<BootRegisters, BootError> {
    write_page_tables(memory)?;
    for (address, descriptor) in (BOOT_GDT..).step_by(8).zip(GDT) {
        memory.write_obj(descriptor, GuestAddress(address))?;
    }
    let page = zero_page(image, boot.rsdp, initrd, layout);
    memory.write_slice(&page, GuestAddress(ZERO_PAGE))?;
    Ok(BootRegisters::Linux64 {
        entry: image.entry(),
        zero_page: ZERO_PAGE,
    })
}

fn zero_page(image: &BzImage, rsdp: u64, initrd: Option<Initrd>, layout: &Layout) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (to, from) in page.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    };
    put(HEADER, &image.header);
    put(TYPE_OF_LOADER, &[UNDEFINED_LOADER]);
    put(RSDP, &rsdp.to_le_bytes());
    put(COMMAND_LINE_POINTER, &(COMMAND_LINE as u32).to_le_bytes());
    put(
        EXT_COMMAND_LINE,
        &((COMMAND_LINE >> 32) as u32).to_le_bytes(),
    );
    if let Some(initrd) = initrd {
        put(RAMDISK_IMAGE, &(initrd.address as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(initrd.size as u32).to_le_bytes());
        put(
            EXT_RAMDISK_IMAGE,
            &((initrd.address >> 32) as u32).to_le_bytes(),
        );
        put(
            EXT_RAMDISK_SIZE,
            &((initrd.size >> 32) as u32).to_le_bytes(),
        );
    }
    let map = memory_map(layout);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (index, (window, kind)) in map.into_iter().enumerate() {
        let entry = E820_TABLE + index * 20;
        put(entry, &window.base.to_le_bytes());
        put(entry + 8, &window.size.to_le_bytes());
        put(entry + 16, &kind.code().to_le_bytes());
    }
    page
}

/// Maps the first 4 GiB one to one with pages of 2 MiB, as the protocol asks (kernel, zero page and
/// command line must be mapped).
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let level4 = BOOT_PAGE_TABLES;
    let level3 = level4 + PAGE;
    let level2 = level3 + PAGE;
    memory.write_obj(level3 | ENTRY, GuestAddress(level4))?;
    for gib in 0..4 {
        let table = level2 + gib * PAGE;
        memory.write_obj(table | ENTRY, GuestAddress(level3 + gib * 8))?;
        let entries = (0..512).map(|page| (gib << 30) | (page << 21) | ENTRY | LARGE);
        let bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        memory.write_slice(&bytes, GuestAddress(table))?;
    }
    Ok(())
}
