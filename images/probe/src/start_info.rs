//! What the loader says: `hvm_start_info` of the PVH boot protocol
//! (Xen, xen/include/public/arch-x86/hvm/start_info.h). It lies in memory that is ours to use, so
//! everything is copied out at once.

use crate::memory::{read_u32, read_u64};
use crate::serial::Line;

const MAGIC: u32 = 0x336e_c578;
const MAX_REGIONS: usize = 32;
const KIND_MEMORY: u32 = 1;

#[derive(Clone, Copy, Default)]
pub struct Region {
    pub start: u64,
    pub length: u64,
}

pub struct StartInfo {
    pub command_line: Line,
    /// 0: not given.
    pub rsdp: u64,
    regions: [Region; MAX_REGIONS],
    count: usize,
}

impl StartInfo {
    /// `address`: what was in ebx at the entry.
    pub fn read(address: u64) -> Self {
        let mut info = Self {
            command_line: Line::new(),
            rsdp: 0,
            regions: [Region::default(); MAX_REGIONS],
            count: 0,
        };
        if read_u32(address) != MAGIC {
            return info;
        }
        let version = read_u32(address + 4);
        let mut text = read_u64(address + 24);
        info.rsdp = read_u64(address + 32);
        while text != 0 {
            let byte = (read_u32(text & !3) >> (8 * (text & 3))) as u8;
            if byte == 0 || !info.command_line.push(byte) {
                break;
            }
            text += 1;
        }
        if version >= 1 {
            let table = read_u64(address + 40);
            for i in 0..u64::from(read_u32(address + 48)) {
                let entry = table + 24 * i;
                if read_u32(entry + 16) == KIND_MEMORY && info.count < MAX_REGIONS {
                    info.regions[info.count] = Region {
                        start: read_u64(entry),
                        length: read_u64(entry + 8),
                    };
                    info.count += 1;
                }
            }
        }
        info
    }

    /// Memory that the guest may use, as the loader lists it.
    pub fn memory(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    pub fn memory_mib(&self) -> u64 {
        self.memory()
            .iter()
            .map(|region| region.length)
            .sum::<u64>()
            >> 20
    }

    /// `name=value` of the command line. A value in double quotes may hold blanks.
    pub fn option(&self, name: &str) -> Option<&str> {
        let mut rest = self.command_line.as_str();
        loop {
            rest = rest.trim_start();
            if rest.is_empty() {
                return None;
            }
            let end = rest.find([' ', '=']).unwrap_or(rest.len());
            let (key, after) = rest.split_at(end);
            let Some(value) = after.strip_prefix('=') else {
                rest = after;
                continue;
            };
            let (value, after) = match value.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
                None => value.split_once(' ').unwrap_or((value, "")),
            };
            if key == name {
                return Some(value);
            }
            rest = after;
        }
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.option(name)?.parse().ok()
    }
}
