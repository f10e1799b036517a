//! Xen's PVH start-of-day structures (xen/include/public/arch-x86/hvm/start_info.h).

use vm_memory::{Bytes, GuestAddress};

use super::map::memory_map;
use super::{Boot, BootError, ElfKernel, Initrd};
use crate::cpu::BootRegisters;
use crate::layout::{COMMAND_LINE, Layout, PVH_START_INFO};
use crate::memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Sizes of hvm_start_info and hvm_modlist_entry; the tables follow in this order.
const START_INFO_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;

pub fn start(
    kernel: &ElfKernel,
    boot: &Boot<'_>,
    initrd: Option<Initrd>,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<BootRegisters, BootError> {
    let map = memory_map(layout);
    let modules = PVH_START_INFO + START_INFO_SIZE;
    let table = modules + MODULE_SIZE;

    let mut bytes = Vec::with_capacity(256);
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(u32::from(initrd.is_some()).to_le_bytes());
    let modules = if initrd.is_some() { modules } else { 0 };
    for address in [modules, COMMAND_LINE, boot.rsdp, table] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend((map.len() as u32).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    let initrd = initrd.unwrap_or(Initrd {
        address: 0,
        size: 0,
    });
    for value in [initrd.address, initrd.size, 0, 0] {
        bytes.extend(value.to_le_bytes());
    }
    for (window, kind) in map {
        bytes.extend(window.base.to_le_bytes());
        bytes.extend(window.size.to_le_bytes());
        bytes.extend(kind.code().to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
    }
    memory.write_slice(&bytes, GuestAddress(PVH_START_INFO))?;
    Ok(BootRegisters::Pvh {
        entry: kernel.entry,
        start_info: PVH_START_INFO as u32,
    })
}
