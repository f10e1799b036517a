//! The parsers under damage: what they accept is what the file holds.

use proptest::prelude::*;

use super::{ElfKernel, Kernel, KernelError, Segment, parse_kernel};

/// A kernel that is accepted must not promise what the file does not hold.
fn check(input: &[u8]) {
    let size = input.len() as u64;
    match parse_kernel(input) {
        Ok(Kernel::Elf(elf)) => {
            let ends = |segment: &Segment| segment.address + segment.memory_size;
            for segment in &elf.segments {
                assert!(segment.offset + segment.file_size <= size);
                assert!(segment.file_size <= segment.memory_size);
            }
            for pair in elf.segments.windows(2) {
                if let [one, two] = pair {
                    assert!(ends(one) <= two.address);
                }
            }
            let entry = u64::from(elf.entry);
            let holds = |segment: &Segment| (segment.address..ends(segment)).contains(&entry);
            assert!(elf.segments.iter().any(holds));
        }
        Ok(Kernel::BzImage(image)) => {
            assert!(image.offset + image.size <= size);
            assert!(image.size <= image.init_size);
            assert!(image.header.len() <= 512);
        }
        Err(_) => {}
    }
}

/// An ELF64 with one segment of 16 bytes at 1 MiB and the PVH note.
fn elf() -> Vec<u8> {
    let mut file = vec![0; 64 + 2 * 56 + 20 + 16];
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let segments = [(1u32, 196u64, 0x10_0000u64, 16u64), (4, 176, 0, 20)];
    for (at, (kind, offset, address, size)) in [64, 120].into_iter().zip(segments) {
        put(at, &kind.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 24, &address.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
    }
    put(176, &4u32.to_le_bytes());
    put(180, &4u32.to_le_bytes());
    put(184, &18u32.to_le_bytes());
    put(188, b"Xen\0");
    put(192, &0x10_0004u32.to_le_bytes());
    file
}

fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 1024 + 4096];
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[1]);
    put(0x1f4, &256u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x236, &[1]);
    file
}

#[test]
fn both_formats_are_understood() {
    let segment = Segment {
        address: 0x10_0000,
        offset: 196,
        file_size: 16,
        memory_size: 16,
    };
    let kernel = ElfKernel {
        entry: 0x10_0004,
        segments: vec![segment],
    };
    assert_eq!(parse_kernel(elf().as_slice()).unwrap(), Kernel::Elf(kernel));
    let kernel = parse_kernel(bz_image().as_slice()).unwrap();
    assert!(matches!(kernel, Kernel::BzImage(image) if image.size == 4096));
}

#[test]
fn what_is_wrong_is_named() {
    let mut other_machine = elf();
    other_machine[18] = 183;
    let error = parse_kernel(other_machine.as_slice()).unwrap_err();
    assert!(matches!(error, KernelError::Elf { .. }), "{error}");

    let mut no_note = elf();
    no_note[184] = 1;
    let error = parse_kernel(no_note.as_slice()).unwrap_err();
    assert!(matches!(error, KernelError::NoPvhEntry), "{error}");

    let mut short = elf();
    short.truncate(200);
    let error = parse_kernel(short.as_slice()).unwrap_err();
    assert!(matches!(error, KernelError::Truncated { .. }), "{error}");

    let mut old = bz_image();
    old[0x206] = 5;
    let error = parse_kernel(old.as_slice()).unwrap_err();
    assert!(matches!(error, KernelError::BzImage { .. }), "{error}");

    assert!(matches!(
        parse_kernel([7; 4096].as_slice()),
        Err(KernelError::UnknownFormat)
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn no_bytes_break_the_parsers(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        check(&bytes);
    }

    #[test]
    fn no_damage_breaks_the_parsers(
        format in any::<bool>(),
        damage in prop::collection::vec((0usize..1024, any::<[u8; 8]>(), 1usize..9), 1..6),
        length in 0usize..6000,
    ) {
        let mut bytes = if format { elf() } else { bz_image() };
        for (offset, value, width) in damage {
            let offset = offset % bytes.len();
            for (to, from) in bytes.iter_mut().skip(offset).zip(value).take(width) {
                *to = from;
            }
        }
        bytes.truncate(length);
        check(&bytes);
    }
}
