//! Guest memory without a guest.

use super::*;
use crate::layout::{HOLE_END, HOLE_START};

fn config(bytes: u64) -> MemoryConfig {
    MemoryConfig {
        bytes,
        pages: PageSize::Small,
        host_nodes: Vec::new(),
    }
}

#[test]
fn memory_above_the_hole_follows_in_the_file() {
    let memory = GuestMemory::create(&config(HOLE_START + (2 << 20))).unwrap();
    memory
        .write_obj(0x1122_3344u32, GuestAddress(HOLE_END))
        .unwrap();
    let mut bytes = [0; 4];
    rustix::io::pread(memory.as_fd(), &mut bytes, HOLE_START).unwrap();
    assert_eq!(u32::from_le_bytes(bytes), 0x1122_3344);
    assert!(memory.write_obj(0u8, GuestAddress(HOLE_START)).is_err());
}

#[test]
fn own_writes_are_in_the_dirty_bitmap() {
    let memory = GuestMemory::create(&config(4 << 20)).unwrap();
    memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
    let region = memory.iter().next().unwrap();
    let dirty = |address| GuestMemoryRegion::bitmap(region).dirty_at(address);
    assert!(dirty(0x5000) && !dirty(0x4000) && !dirty(0x6000));
}

#[test]
fn cleared_memory_reads_as_zero_and_costs_nothing() {
    let memory = GuestMemory::create(&config(4 << 20)).unwrap();
    memory.write_slice(&[7; 1 << 20], GuestAddress(0)).unwrap();
    memory.clear().unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x8_0000)).unwrap(), 0);
    let blocks = rustix::fs::fstat(memory.as_fd()).unwrap().st_blocks;
    assert!(blocks <= 8, "{blocks} blocks are still there");
}

#[test]
fn whole_pages_of_ram_are_given_back_and_nothing_beside_them() {
    let memory = GuestMemory::create(&config(HOLE_START + (2 << 20))).unwrap();
    let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
    memory.write_slice(&[7; 0x5000], GuestAddress(0)).unwrap();
    memory.write_obj(7u8, GuestAddress(HOLE_END)).unwrap();
    memory
        .iter()
        .for_each(|region| region.get_mmap().bitmap().reset());

    assert_eq!(memory.give_back(0x1001, 0x2fff).unwrap(), 0x2000);
    assert_eq!(
        [0xfff, 0x1fff, 0x2000, 0x3fff, 0x4000].map(byte),
        [7, 7, 0, 0, 7]
    );
    let region = memory.iter().next().unwrap();
    let dirty = |address| GuestMemoryRegion::bitmap(region).dirty_at(address);
    assert_eq!(
        [0x1000, 0x2000, 0x3000, 0x4000].map(dirty),
        [false, true, true, false]
    );

    assert_eq!(memory.give_back(HOLE_START, 1 << 20).unwrap(), 0);
    assert_eq!(memory.give_back(u64::MAX - 1, u64::MAX).unwrap(), 0);
    // Over the end of the low part, the hole, and the high part.
    let across = memory.give_back(HOLE_START - 0x2000, HOLE_END - HOLE_START + 0x3000);
    assert_eq!(across.unwrap(), 0x3000);
    assert_eq!(byte(HOLE_END), 0);
}

#[test]
fn the_size_is_sealed() {
    let memory = GuestMemory::create(&config(4 << 20)).unwrap();
    assert!(rustix::fs::ftruncate(memory.as_fd(), 0).is_err());
}
