//! What a user's kernel file can do to the loader, driven by bytes: for `cargo fuzz` and for the
//! property tests.

use std::fs::File;
use std::io::Write;

use rustix::fs::{MemfdFlags, memfd_create};

use super::{Boot, load, parse_kernel};
use crate::config::{MemoryConfig, PageSize};
use crate::layout::Layout;
use crate::memory::GuestMemory;

const MEMORY: u64 = 32 << 20;

/// Takes `input` for a kernel file and, where it is understood, loads it, with itself as initrd.
///
/// # Panics
/// If the loader does: a bug.
pub fn fuzz_load(input: &[u8]) {
    if parse_kernel(input).is_err() {
        return;
    }
    let Ok(file) = memfd_create("kernel", MemfdFlags::CLOEXEC) else {
        return;
    };
    let mut file = File::from(file);
    if file.write_all(input).is_err() {
        return;
    }
    let config = MemoryConfig {
        bytes: MEMORY,
        pages: PageSize::Small,
        host_nodes: Vec::new(),
    };
    let Ok(memory) = GuestMemory::create(&config) else {
        return;
    };
    let boot = Boot {
        kernel: &file,
        initrd: Some(&file),
        command_line: "console=ttyS0",
        rsdp: 0xe_0000,
    };
    let _ = load(&boot, &memory, &Layout::new(MEMORY));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An ELF file with a loadable segment and a PVH note, and a few bytes of it changed.
    fn elf(changes: &[(usize, u8)]) -> Vec<u8> {
        let mut file = vec![0; 0x200];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
        put(24, &0x10_0000u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(52, &[64, 0, 56, 0, 2, 0]);
        let mut header = |at: usize, kind: u32, fields: [u64; 6]| {
            put(at, &kind.to_le_bytes());
            put(at + 4, &7u32.to_le_bytes());
            for (i, field) in fields.iter().enumerate() {
                put(at + 8 + 8 * i, &field.to_le_bytes());
            }
        };
        header(64, 1, [0x100, 0x10_0000, 0x10_0000, 0x80, 0x1000, 0x1000]);
        header(120, 4, [0x180, 0, 0, 0x18, 0x18, 4]);
        put(0x180, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
        put(0x18c, b"Xen\0");
        put(0x190, &0x10_0000u64.to_le_bytes());
        for &(at, value) in changes {
            file[at % 0x200] = value;
        }
        file
    }

    #[test]
    fn the_unchanged_file_is_understood() {
        assert!(parse_kernel(&elf(&[])[..]).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(input in prop::collection::vec(any::<u8>(), 0..2000)) {
            fuzz_load(&input);
        }

        #[test]
        fn a_nearly_right_elf_file_is_an_answer(
            changes in prop::collection::vec((0usize..0x1a0, any::<u8>()), 0..6)
        ) {
            fuzz_load(&elf(&changes));
        }

        #[test]
        fn a_nearly_right_bzimage_is_an_answer(
            header in prop::collection::vec(any::<u8>(), 0x80),
            length in 0usize..0x4000,
            changes in prop::collection::vec((0x1f0usize..0x270, any::<u8>()), 0..4)
        ) {
            let mut file = vec![0; 0x270 + length];
            file[0x1f0..0x270].copy_from_slice(&header);
            file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            file[0x202..0x206].copy_from_slice(b"HdrS");
            file[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
            for (at, value) in changes {
                file[at] = value;
            }
            fuzz_load(&file);
        }
    }
}
