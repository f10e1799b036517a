//! ELF kernels with a PVH entry (ELF64 and ELF32, little-endian x86; Xen's docs/misc/pvh.pandoc).

use super::{BootError, Fields, KernelError, Source, check_room, read_exact};
use crate::layout::Layout;
use crate::memory::GuestMemory;

/// A part of the file that goes to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Where in the file, and how many bytes of it.
    pub offset: u64,
    pub file_size: u64,
    /// Bytes in memory; what the file does not fill is zero.
    pub memory_size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElfKernel {
    /// Address of the 32-bit entry point.
    pub entry: u32,
    pub segments: Vec<Segment>,
}

/// More program headers than any kernel has.
const MAX_HEADERS: u16 = 64;
/// More than any kernel's notes; they are read whole.
const MAX_NOTES: u64 = 64 << 10;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Where the two classes keep their fields.
struct Class {
    header: usize,
    program_headers: fn(&Fields<'_>) -> (u64, u16, u16),
    header_size: u16,
    segment: fn(&Fields<'_>) -> Segment,
}

const ELF64: Class = Class {
    header: 64,
    program_headers: |f| (f.u64(32), f.u16(54), f.u16(56)),
    header_size: 56,
    segment: |f| Segment {
        offset: f.u64(8),
        address: f.u64(24),
        file_size: f.u64(32),
        memory_size: f.u64(40),
    },
};

const ELF32: Class = Class {
    header: 52,
    program_headers: |f| (f.u32(28).into(), f.u16(42), f.u16(44)),
    header_size: 32,
    segment: |f| Segment {
        offset: f.u32(4).into(),
        address: f.u32(12).into(),
        file_size: f.u32(16).into(),
        memory_size: f.u32(20).into(),
    },
};

pub fn parse<S: Source + ?Sized>(source: &S) -> Result<ElfKernel, KernelError> {
    let problem = |problem| Err(KernelError::Elf { problem });
    let mut header = [0; 64];
    read_exact(
        source,
        0,
        header.get_mut(..52).unwrap_or_default(),
        "the ELF header",
    )?;
    // Class, data, machine: 64 or 32 bits, little-endian, EM_X86_64 or EM_386.
    let (class, machine) = match header {
        [_, _, _, _, 2, 1, ..] => (ELF64, 62),
        [_, _, _, _, 1, 1, ..] => (ELF32, 3),
        _ => return problem("not a little-endian file of 32 or 64 bits"),
    };
    read_exact(
        source,
        0,
        header.get_mut(..class.header).unwrap_or_default(),
        "the ELF header",
    )?;
    let fields = Fields(&header);
    if fields.u16(18) != machine {
        return problem("not for x86");
    }
    let (offset, entry_size, count) = (class.program_headers)(&fields);
    if entry_size != class.header_size || count == 0 || count > MAX_HEADERS {
        return problem("program headers of a wrong size or number");
    }
    let mut table = vec![0; usize::from(entry_size) * usize::from(count)];
    read_exact(source, offset, &mut table, "the program headers")?;
    let file_size = source.size()?;

    let mut segments = Vec::new();
    let mut entry = None;
    for bytes in table.chunks(usize::from(entry_size)) {
        let fields = Fields(bytes);
        let segment = (class.segment)(&fields);
        match fields.u32(0) {
            PT_LOAD if segment.memory_size > 0 => {
                check_segment(&segment, file_size)?;
                segments.push(segment);
            }
            PT_NOTE if entry.is_none() => entry = find_entry(source, &segment)?,
            _ => {}
        }
    }
    let entry = entry.ok_or(KernelError::NoPvhEntry)?;
    segments.sort_by_key(|segment| segment.address);
    let overlap = segments.windows(2).any(|pair| match pair {
        [one, two] => one.address + one.memory_size > two.address,
        _ => false,
    });
    if overlap {
        return problem("segments overlap");
    }
    let within = |segment: &Segment| {
        let offset = u64::from(entry).checked_sub(segment.address);
        offset.is_some_and(|offset| offset < segment.memory_size)
    };
    if !segments.iter().any(within) {
        return problem("the entry point is in no segment");
    }
    Ok(ElfKernel { entry, segments })
}

fn check_segment(segment: &Segment, file_size: u64) -> Result<(), KernelError> {
    if segment.file_size > segment.memory_size {
        return Err(KernelError::Elf {
            problem: "a segment is larger in the file than in memory",
        });
    }
    if segment.address.checked_add(segment.memory_size).is_none() {
        return Err(KernelError::Elf {
            problem: "a segment leaves the address space",
        });
    }
    let end = segment.offset.checked_add(segment.file_size);
    if end.is_none_or(|end| end > file_size) {
        return Err(KernelError::Truncated { what: "a segment" });
    }
    Ok(())
}

/// Looks for the PVH entry in one note segment.
fn find_entry<S: Source + ?Sized>(source: &S, notes: &Segment) -> Result<Option<u32>, KernelError> {
    if notes.file_size > MAX_NOTES {
        return Err(KernelError::Elf {
            problem: "notes of more than 64 KiB",
        });
    }
    let mut bytes = vec![0; notes.file_size as usize];
    read_exact(source, notes.offset, &mut bytes, "the notes")?;
    let mut rest = bytes.as_slice();
    // Name size, descriptor size, type; then both, each padded to 4 bytes.
    while rest.len() >= 12 {
        let fields = Fields(rest);
        let (name_size, size) = (fields.u32(0) as usize, fields.u32(4) as usize);
        let name_end = 12usize.saturating_add(name_size.saturating_add(3) & !3);
        let next = name_end.saturating_add(size.saturating_add(3) & !3);
        let xen = name_size == 4 && fields.bytes(12) == *b"Xen\0";
        if xen && fields.u32(8) == XEN_ELFNOTE_PHYS32_ENTRY && matches!(size, 4 | 8) {
            if rest.len() < name_end.saturating_add(size) {
                return Err(KernelError::Truncated {
                    what: "the PVH entry note",
                });
            }
            let entry = if size == 4 {
                fields.u32(name_end).into()
            } else {
                fields.u64(name_end)
            };
            return match u32::try_from(entry) {
                Ok(entry) => Ok(Some(entry)),
                Err(_) => Err(KernelError::Elf {
                    problem: "the PVH entry is above 4 GiB",
                }),
            };
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

/// Copies the segments; returns the address after the last.
pub fn load(
    kernel: &ElfKernel,
    file: &dyn Source,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<u64, BootError> {
    let mut top = 0;
    for segment in &kernel.segments {
        let end = segment.address + segment.memory_size;
        check_room(segment.address, end, layout)?;
        let read = file.load(memory, segment.offset, segment.address, segment.file_size)?;
        if read != segment.file_size {
            return Err(KernelError::Truncated { what: "a segment" }.into());
        }
        top = top.max(end);
    }
    Ok(top)
}
