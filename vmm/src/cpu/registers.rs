//! The registers that a vCPU starts with.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use serde::{Deserialize, Serialize};

use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES};

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootRegisters {
    /// Xen's PVH protocol (docs/misc/pvh.pandoc): 32-bit, no paging, EBX points to hvm_start_info.
    Pvh { entry: u32, start_info: u32 },
    /// Linux's 64-bit protocol (Documentation/arch/x86/boot.rst): long mode, identity map, RSI points
    /// to the zero page.
    Linux64 { entry: u64, zero_page: u64 },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Selectors as both protocols want them (__BOOT_CS, __BOOT_DS).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

/// Descriptors of the table at [`BOOT_GDT`]: null, null, 64-bit code, data.
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

impl BootRegisters {
    pub fn general(self) -> kvm_regs {
        let base = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match self {
            BootRegisters::Pvh { entry, start_info } => kvm_regs {
                rip: entry.into(),
                rbx: start_info.into(),
                ..base
            },
            BootRegisters::Linux64 { entry, zero_page } => kvm_regs {
                rip: entry,
                rsi: zero_page,
                ..base
            },
        }
    }

    /// Changes the registers after power-on to those of the protocol.
    pub fn system(self, mut sregs: kvm_sregs) -> kvm_sregs {
        let long = matches!(self, BootRegisters::Linux64 { .. });
        sregs.cs = segment(CODE, 0xb, long);
        let data = segment(DATA, 0x3, false);
        (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
        (sregs.gs, sregs.ss) = (data, data);
        // Type 11: a busy task state segment; PVH asks for limit 0x67.
        sregs.tr = kvm_segment {
            limit: 0x67,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        if long {
            sregs.gdt.base = BOOT_GDT;
            sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = BOOT_PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        sregs
    }
}

/// A flat segment of 4 GiB.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pvh_enters_in_flat_protected_mode_without_paging() {
        let boot = BootRegisters::Pvh {
            entry: 0x10_0000,
            start_info: 0x6000,
        };
        let (regs, sregs) = (boot.general(), boot.system(kvm_sregs::default()));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x10_0000, 0x6000, 2));
        assert_eq!(sregs.cr0, 0x11);
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.efer), (1, 0, 0));
        assert_eq!((sregs.tr.limit, sregs.tr.type_), (0x67, 0xb));
    }

    #[test]
    fn linux_enters_in_long_mode_with_paging() {
        let boot = BootRegisters::Linux64 {
            entry: 0x10_0200,
            zero_page: 0x7000,
        };
        let (regs, sregs) = (boot.general(), boot.system(kvm_sregs::default()));
        assert_eq!((regs.rip, regs.rsi), (0x10_0200, 0x7000));
        assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
        assert_eq!((sregs.cs.l, sregs.efer), (1, 0x500));
        assert_eq!(sregs.cr0 & CR0_PG, CR0_PG);
    }
}
