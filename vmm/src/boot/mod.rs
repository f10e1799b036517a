//! Loads a kernel: PVH ELF or Linux bzImage, with initrd and command line, into guest memory.
//!
//! The files are descriptors, or parts of a disk that the loader found ([`disk`]).
//!
//! Kernel files come from users: [`parse_kernel`] believes nothing in them, reads little, allocates
//! little, and answers with a typed error. What is loaded from a descriptor goes into guest memory
//! without a copy in between.

mod bzimage;
pub mod disk;
mod elf;
mod fallback;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
mod linux64;
mod map;
mod pvh;
mod reset_vector;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::board::acpi::AcpiError;
use crate::cpu::BootRegisters;
use crate::layout::{COMMAND_LINE, HIGH_MEMORY, Layout};
use crate::memory::{GuestMemory, MemoryError};

pub use bzimage::BzImage;
pub use elf::{ElfKernel, Segment};
pub use fallback::Fallback;
#[cfg(any(test, feature = "fuzzing"))]
pub use fuzz::fuzz_load;
pub use reset_vector::write_reset_vector;

/// Something that can be read at any place; short at its end.
pub trait Source {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Bytes.
    fn size(&self) -> io::Result<u64>;

    /// Copies `length` bytes from `offset` to guest memory at `guest`, at most as many as there are;
    /// returns how many.
    fn load(
        &self,
        memory: &GuestMemory,
        offset: u64,
        guest: u64,
        length: u64,
    ) -> Result<u64, MemoryError> {
        let failed = |source| MemoryError::ReadFile {
            length,
            guest,
            source,
        };
        let mut buffer = vec![0; length.min(1 << 20) as usize];
        let mut done = 0;
        while done < length {
            let take = (length - done).min(buffer.len() as u64) as usize;
            let part = buffer.get_mut(..take).unwrap_or_default();
            let read = self.read_at(offset + done, part).map_err(failed)?;
            if read == 0 {
                break;
            }
            let target = GuestAddress(guest + done);
            let written = memory.write_slice(part.get(..read).unwrap_or_default(), target);
            written.map_err(|error| failed(io::Error::other(error)))?;
            done += read as u64;
        }
        Ok(done)
    }
}

impl Source for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn load(
        &self,
        memory: &GuestMemory,
        offset: u64,
        guest: u64,
        length: u64,
    ) -> Result<u64, MemoryError> {
        memory.read_file(self, offset, guest, length)
    }
}

impl Source for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let left = self.get(start..).unwrap_or_default();
        let length = left.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(left) {
            *to = *from;
        }
        Ok(length)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// A kernel that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    Elf(ElfKernel),
    BzImage(BzImage),
}

/// Why a file cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("read the kernel file")]
    Read(#[from] io::Error),
    #[error("neither an ELF file nor a Linux bzImage")]
    UnknownFormat,
    #[error("the kernel file ends within {what}")]
    Truncated { what: &'static str },
    #[error("ELF: {problem}")]
    Elf { problem: &'static str },
    #[error(
        "ELF without a PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY); Linux needs CONFIG_PVH, or boot \
         its bzImage instead"
    )]
    NoPvhEntry,
    #[error("bzImage: {problem}")]
    BzImage { problem: &'static str },
}

/// Why a kernel that was understood does not fit into this machine.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("the kernel wants {start:#x} to {end:#x}, which is not free memory of this machine")]
    DoesNotFit { start: u64, end: u64 },
    #[error("the initrd of {size} bytes does not fit behind the kernel: more memory is needed")]
    InitrdDoesNotFit { size: u64 },
    #[error("the command line has {length} bytes, this kernel takes {limit}")]
    CommandLine { length: usize, limit: usize },
    #[error("read the initrd file")]
    Initrd(#[source] io::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error("write boot data to guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
    #[error("no kernel and no disk to boot were given")]
    NoKernel,
    #[error(transparent)]
    Disk(#[from] fractus_loader::FindError),
    #[error("the kernel that reads what only Linux can read cannot be booted")]
    Fallback(#[source] Box<BootError>),
    #[error("{how} cannot be booted ({file})")]
    OnDisk {
        /// Which entry of which file led to it.
        how: String,
        /// The kernel.
        file: String,
        source: Box<BootError>,
    },
}

/// Tells what a kernel file is. Safe on any bytes.
pub fn parse_kernel<S: Source + ?Sized>(source: &S) -> Result<Kernel, KernelError> {
    let mut magic = [0; 4];
    read_exact(source, 0, &mut magic, "its first bytes")?;
    if magic == *b"\x7fELF" {
        return elf::parse(source).map(Kernel::Elf);
    }
    bzimage::parse(source).map(Kernel::BzImage)
}

/// What a machine boots.
pub struct Boot<'a> {
    pub kernel: &'a dyn Source,
    pub initrd: Option<&'a dyn Source>,
    pub command_line: &'a str,
    /// Guest address of the ACPI root pointer.
    pub rsdp: u64,
}

/// Where an initrd was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    pub address: u64,
    pub size: u64,
}

/// What is to be known of the files before they are loaded, any number of times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    kernel: Kernel,
    /// Bytes.
    initrd: Option<u64>,
}

/// Looks at the files. Loading them afterwards takes nothing but pread, so that a process that may do
/// no more can still reset its machine.
pub fn inspect(kernel: &dyn Source, initrd: Option<&dyn Source>) -> Result<Inspected, BootError> {
    let size = initrd.map(Source::size).transpose();
    Ok(Inspected {
        kernel: parse_kernel(kernel)?,
        initrd: size.map_err(BootError::Initrd)?,
    })
}

/// Inspects and loads.
pub fn load(
    boot: &Boot<'_>,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<BootRegisters, BootError> {
    let inspected = inspect(boot.kernel, boot.initrd)?;
    load_inspected(&inspected, boot, memory, layout)
}

/// Loads all of it; memory is zero. Returns how the first vCPU begins.
pub fn load_inspected(
    inspected: &Inspected,
    boot: &Boot<'_>,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<BootRegisters, BootError> {
    let kernel = &inspected.kernel;
    let end = match kernel {
        Kernel::Elf(elf) => elf::load(elf, boot.kernel, memory, layout)?,
        Kernel::BzImage(image) => bzimage::load(image, boot.kernel, memory, layout)?,
    };
    let limit = match kernel {
        Kernel::Elf(_) => crate::layout::COMMAND_LINE_MAX - 1,
        Kernel::BzImage(image) => image.command_line_limit(),
    };
    let length = boot.command_line.len();
    if length > limit {
        return Err(BootError::CommandLine { length, limit });
    }
    // Memory is zero: the terminating NUL is there.
    memory.write_slice(boot.command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    let initrd = match (boot.initrd, inspected.initrd) {
        (Some(file), Some(size)) => {
            let limit = match kernel {
                Kernel::Elf(_) => u64::from(u32::MAX),
                Kernel::BzImage(image) => image.initrd_limit(),
            };
            Some(load_initrd(file, size, end, limit, memory, layout)?)
        }
        _ => None,
    };
    match kernel {
        Kernel::Elf(elf) => pvh::start(elf, boot, initrd, memory, layout),
        Kernel::BzImage(image) => linux64::start(image, boot, initrd, memory, layout),
    }
}

/// Puts the initrd as high as it goes below `limit` (last usable address), above the kernel's end.
fn load_initrd(
    file: &dyn Source,
    size: u64,
    kernel_end: u64,
    limit: u64,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<Initrd, BootError> {
    let top = layout.low.end().min(limit.saturating_add(1));
    let address = top.checked_sub(size).map(|address| address & !0xfff);
    let address = address
        .filter(|address| *address >= kernel_end.max(HIGH_MEMORY))
        .ok_or(BootError::InitrdDoesNotFit { size })?;
    let read = file.load(memory, 0, address, size)?;
    if read != size {
        return Err(BootError::Initrd(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(Initrd { address, size })
}

/// `start..end` is RAM from 1 MiB on, below the hole.
fn check_room(start: u64, end: u64, layout: &Layout) -> Result<(), BootError> {
    let fits = start >= HIGH_MEMORY && start <= end && end <= layout.low.end();
    if fits {
        Ok(())
    } else {
        Err(BootError::DoesNotFit { start, end })
    }
}

fn read_exact<S: Source + ?Sized>(
    source: &S,
    offset: u64,
    buffer: &mut [u8],
    what: &'static str,
) -> Result<(), KernelError> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let place = offset
            .checked_add(done as u64)
            .ok_or(KernelError::Truncated { what })?;
        match source.read_at(place, rest) {
            Ok(0) => return Err(KernelError::Truncated { what }),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Little-endian fields of a fixed buffer; what is outside reads as 0.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let found = self
            .0
            .get(offset..)
            .and_then(|rest| rest.first_chunk::<N>());
        found.copied().unwrap_or([0; N])
    }

    fn u8(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.bytes(offset))
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}
