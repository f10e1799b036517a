//! Reading a request of virtio-blk (virtio 1.2 §5.2.6) out of a chain.

use super::backend::{Geometry, Operation, SECTOR};
use crate::memory::GuestMap;
use crate::virtio::queue::{Chain, QueueFault, Segment, gather, slice, total};

const HEADER: u64 = 16;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Bytes of struct virtio_blk_discard_write_zeroes.
const RANGE: u64 = 16;
const UNMAP: u32 = 1;

/// The most that one request may discard, or have zeroed, in sectors: what is announced.
pub const DISCARD_SECTORS_MAX: u32 = (1 << 30) / SECTOR as u32;
pub const ZEROES_SECTORS_MAX: u32 = (super::buffer::ZEROES_MAX / SECTOR) as u32;
/// Data of one request, bytes: beyond it the request fails. No driver asks for a tenth of it.
pub const DATA_MAX: u64 = 64 << 20;

/// How a request ends (the status byte).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// I/O on a range inside of the disk; the data's segments, for reads and writes.
    Io {
        operation: Operation,
        offset: u64,
        length: u64,
        data: Vec<Segment>,
    },
    /// The serial number, to be written there.
    SerialNumber { data: Vec<Segment> },
    /// Nothing that can be done.
    Refuse(Status),
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    /// Guest address of the status byte.
    pub status_at: u64,
    pub wish: Wish,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub capacity: u64,
    pub read_only: bool,
}

impl From<Geometry> for Rules {
    fn from(geometry: Geometry) -> Self {
        Self {
            capacity: geometry.capacity,
            read_only: geometry.read_only,
        }
    }
}

/// Reads the request in `chain`. A chain without room for header and status is a fault of the driver;
/// whatever else is wrong gets a status.
pub fn parse(chain: &Chain, memory: &GuestMap, rules: &Rules) -> Result<Request, QueueFault> {
    let malformed = QueueFault::Malformed {
        head: chain.head,
        what: "disk request",
    };
    let mut header = [0; HEADER as usize];
    let status = chain
        .writable()
        .last()
        .filter(|_| gather(memory, chain.readable(), &mut header));
    let Some(status) = status else {
        return Err(malformed);
    };
    let status_at = status.address + u64::from(status.length) - 1;
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([a, b, c, d]);
    let sector = u64::from_le_bytes(sector);
    let readable = || slice(chain.readable(), HEADER, u64::MAX);
    let writable = || slice(chain.writable(), 0, total(chain.writable()) - 1);
    let wish = match kind {
        IN => transfer(Operation::Read, sector, writable(), rules),
        OUT if rules.read_only => Wish::Refuse(Status::IoError),
        OUT => transfer(Operation::Write, sector, readable(), rules),
        FLUSH => Wish::Io {
            operation: Operation::Flush,
            offset: 0,
            length: 0,
            data: Vec::new(),
        },
        GET_ID => Wish::SerialNumber { data: writable() },
        DISCARD | WRITE_ZEROES => range(kind, &readable(), memory, rules),
        _ => Wish::Refuse(Status::Unsupported),
    };
    Ok(Request {
        head: chain.head,
        status_at,
        wish,
    })
}

fn transfer(operation: Operation, sector: u64, data: Vec<Segment>, rules: &Rules) -> Wish {
    let length = total(&data);
    let whole = length > 0 && length <= DATA_MAX && length.is_multiple_of(SECTOR);
    match sector.checked_mul(SECTOR).filter(|_| whole) {
        Some(offset) if inside(offset, length, rules) => Wish::Io {
            operation,
            offset,
            length,
            data,
        },
        _ => Wish::Refuse(Status::IoError),
    }
}

/// Discard and write zeroes take one range each, as is announced.
fn range(kind: u32, data: &[Segment], memory: &GuestMap, rules: &Rules) -> Wish {
    let mut raw = [0; RANGE as usize];
    if rules.read_only || total(data) != RANGE || !gather(memory, data, &mut raw) {
        return Wish::Refuse(Status::IoError);
    }
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = raw;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let (operation, most, known) = if kind == DISCARD {
        (Operation::Discard, DISCARD_SECTORS_MAX, 0)
    } else {
        (
            Operation::WriteZeroes {
                unmap: flags & UNMAP != 0,
            },
            ZEROES_SECTORS_MAX,
            UNMAP,
        )
    };
    if flags & !known != 0 {
        return Wish::Refuse(Status::Unsupported);
    }
    let length = u64::from(sectors) * SECTOR;
    match sector.checked_mul(SECTOR) {
        Some(offset) if sectors > 0 && sectors <= most && inside(offset, length, rules) => {
            Wish::Io {
                operation,
                offset,
                length,
                data: Vec::new(),
            }
        }
        _ => Wish::Refuse(Status::IoError),
    }
}

fn inside(offset: u64, length: u64, rules: &Rules) -> bool {
    offset
        .checked_add(length)
        .is_some_and(|end| end <= rules.capacity)
}
