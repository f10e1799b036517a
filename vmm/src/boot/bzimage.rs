//! Linux bzImage (Documentation/arch/x86/boot.rst), for its 64-bit entry point.

use super::{BootError, Fields, KernelError, Source, check_room, read_exact};
use crate::layout::Layout;
use crate::memory::GuestMemory;

/// The setup header stands at this offset of file and zero page alike.
pub const HEADER: usize = 0x1f1;
/// The first two sectors, which hold the header.
const HEAD: usize = 1024;
/// 2.12: the first with xloadflags.
const OLDEST: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 2;
/// Where the 64-bit entry stands in the protected-mode code.
const ENTRY64: u64 = 0x200;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BzImage {
    /// Bytes of the setup header, to be copied to the zero page.
    pub header: Vec<u8>,
    /// Where the protected-mode code begins in the file, and its size.
    pub offset: u64,
    pub size: u64,
    /// Where it goes, and how much memory it needs there before it can look for itself.
    pub address: u64,
    pub init_size: u64,
    initrd_max: u32,
    above_4g: bool,
    command_line_size: u32,
}

impl BzImage {
    pub fn entry(&self) -> u64 {
        self.address + ENTRY64
    }

    pub fn command_line_limit(&self) -> usize {
        // Before 2.06, or a field of zero: 255.
        let limit = if self.command_line_size == 0 {
            255
        } else {
            self.command_line_size
        };
        (limit as usize).min(crate::layout::COMMAND_LINE_MAX - 1)
    }

    /// Last address that the initrd may use.
    pub fn initrd_limit(&self) -> u64 {
        if self.above_4g {
            u64::from(u32::MAX)
        } else {
            u64::from(self.initrd_max)
        }
    }
}

pub fn parse<S: Source + ?Sized>(source: &S) -> Result<BzImage, KernelError> {
    let problem = |problem| KernelError::BzImage { problem };
    let mut head = [0; HEAD];
    match read_exact(source, 0, &mut head, "the setup header") {
        Err(KernelError::Truncated { .. }) => return Err(KernelError::UnknownFormat),
        other => other?,
    }
    let fields = Fields(&head);
    if fields.u16(0x1fe) != 0xaa55 || fields.bytes(0x202) != *b"HdrS" {
        return Err(KernelError::UnknownFormat);
    }
    if fields.u16(0x206) < OLDEST {
        return Err(problem("boot protocol older than 2.12 (Linux 3.8)"));
    }
    let flags = fields.u16(0x236);
    if flags & XLF_KERNEL_64 == 0 {
        return Err(problem("no 64-bit entry point: a 32-bit kernel"));
    }
    let setup_sectors = match fields.u8(HEADER) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = (setup_sectors + 1) * 512;
    // In units of 16 bytes; the file may be padded behind it, for a signature.
    let announced = u64::from(fields.u32(0x1f4)) * 16;
    let left = source.size()?.saturating_sub(offset);
    if announced == 0 || left == 0 || announced > left.saturating_add(15) {
        return Err(KernelError::Truncated {
            what: "the kernel's code",
        });
    }
    let relocatable = fields.u8(0x234) != 0;
    let preferred = fields.u64(0x258);
    let address = if relocatable && preferred >= crate::layout::HIGH_MEMORY {
        preferred
    } else {
        crate::layout::HIGH_MEMORY
    };
    // The header's end: a jump at 0x200 over it says how long it is.
    let header_end = 0x202 + usize::from(fields.u8(0x201));
    let header = head
        .get(HEADER..header_end)
        .ok_or(problem("a header longer than its sectors"))?;
    Ok(BzImage {
        header: header.to_vec(),
        offset,
        size: announced.min(left),
        address,
        init_size: u64::from(fields.u32(0x260)).max(announced),
        initrd_max: fields.u32(0x22c),
        above_4g: flags & XLF_CAN_BE_LOADED_ABOVE_4G != 0,
        command_line_size: fields.u32(0x238),
    })
}

/// Copies the protected-mode code; returns the address after what it needs.
pub fn load(
    image: &BzImage,
    file: &dyn Source,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<u64, BootError> {
    let end = image.address.saturating_add(image.init_size);
    check_room(image.address, end, layout)?;
    let read = file.load(memory, image.offset, image.address, image.size)?;
    if read != image.size {
        return Err(KernelError::Truncated {
            what: "the kernel's code",
        }
        .into());
    }
    Ok(end)
}
