//! virtio-blk (virtio 1.2 §5.2): read, write, flush, discard, write zeroes, serial number; and the
//! patterns and hashes by which a test outside checks what the guest did.

use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, Result};

use crate::memory;
use crate::ring::RingMemory;
use crate::virtio::{PciTransport, Queue};

pub const SECTOR: u64 = 512;
/// Bytes of one request at most.
const CHUNK: usize = 256 << 10;

const FEATURE_RO: u64 = 1 << 5;
pub const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
const FEATURES: u64 = FEATURE_RO | FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

pub struct Disk {
    pub transport: PciTransport,
    queue: Queue<16>,
    features: u64,
    /// Bytes.
    pub capacity: u64,
    buffer: &'static mut [u8],
    /// Of the queue that bears load (disk_load.rs), once there was some.
    pub(crate) load_ring: Option<RingMemory>,
}

impl Disk {
    pub fn new(transport: PciTransport) -> Result<Self> {
        let buffer = memory::dma_pages(CHUNK / 4096).ok_or(Error::DmaError)?;
        Self::with_buffer(transport, buffer)
    }

    /// Resets the device and sets it up again.
    pub fn anew(self) -> Result<Self> {
        Self::with_buffer(self.transport.renewed(), self.buffer)
    }

    fn with_buffer(mut transport: PciTransport, buffer: &'static mut [u8]) -> Result<Self> {
        let features = transport.negotiate(FEATURES)?;
        let low = transport.config32(0).ok_or(Error::ConfigSpaceTooSmall)?;
        let high = transport.config32(4).ok_or(Error::ConfigSpaceTooSmall)?;
        let queue = Queue::new(&mut transport, 0)?;
        transport.finish_init();
        let capacity = (u64::from(high) << 32 | u64::from(low)) * SECTOR;
        Ok(Self {
            transport,
            queue,
            features,
            capacity,
            buffer,
            load_ring: None,
        })
    }

    /// The queue for single requests, on a device that was just reset.
    pub(crate) fn set_up(&mut self) -> Result {
        self.features = self.transport.negotiate(FEATURES)?;
        self.queue = Queue::new(&mut self.transport, 0)?;
        self.transport.finish_init();
        Ok(())
    }

    pub(crate) fn buffer_address(&mut self) -> u64 {
        self.buffer.as_mut_ptr() as u64
    }

    pub(crate) fn buffer_length(&self) -> u64 {
        self.buffer.len() as u64
    }

    /// Fills the buffer with a pattern.
    pub(crate) fn fill(&mut self, seed: u64) {
        for (i, word) in self.buffer.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&pattern(seed, 8 * i as u64).to_le_bytes());
        }
    }

    pub fn read_only(&self) -> bool {
        self.features & FEATURE_RO != 0
    }

    /// The device answers with a byte of status, after the data if it reads.
    fn simple(&mut self, kind: u32, sector: u64, data: &[u8]) -> Result {
        let header = header(kind, sector);
        let mut status = [0xff];
        let transport = &mut self.transport;
        if data.is_empty() {
            self.queue
                .request(transport, &[&header], &mut [&mut status])?;
        } else {
            self.queue
                .request(transport, &[&header, data], &mut [&mut status])?;
        }
        answer(status[0])
    }

    pub fn flush(&mut self) -> Result {
        if self.features & FEATURE_FLUSH == 0 {
            return Ok(());
        }
        self.simple(FLUSH, 0, &[])
    }

    /// Discards, or writes zeroes (which may unmap).
    pub fn clear(&mut self, offset: u64, length: u64, zeroes: bool) -> Result {
        let (feature, kind) = match zeroes {
            true => (FEATURE_WRITE_ZEROES, WRITE_ZEROES),
            false => (FEATURE_DISCARD, DISCARD),
        };
        if self.features & feature == 0 {
            return Err(Error::Unsupported);
        }
        let mut segment = [0u8; 16];
        segment[..8].copy_from_slice(&(offset / SECTOR).to_le_bytes());
        segment[8..12].copy_from_slice(&((length / SECTOR) as u32).to_le_bytes());
        segment[12] = u8::from(zeroes);
        self.simple(kind, 0, &segment)
    }

    /// The serial number: up to 20 bytes, padded with NUL.
    pub fn serial(&mut self) -> Result<[u8; 20]> {
        let mut serial = [0; 20];
        let mut status = [0xff];
        self.queue.request(
            &mut self.transport,
            &[&header(GET_ID, 0)],
            &mut [&mut serial, &mut status],
        )?;
        answer(status[0])?;
        Ok(serial)
    }

    /// FNV-1a (64 bit) of a range of whole sectors.
    pub fn hash(&mut self, offset: u64, length: u64) -> Result<u64> {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        self.read(offset, length, |_, bytes| {
            for &byte in bytes {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
            Ok(())
        })?;
        Ok(hash)
    }

    /// Offset of the first word that is not the pattern's.
    pub fn check(&mut self, offset: u64, length: u64, seed: u64) -> Result<Option<u64>> {
        let mut wrong = None;
        self.read(offset, length, |at, bytes| {
            for (i, word) in bytes.chunks_exact(8).enumerate() {
                let place = at + 8 * i as u64;
                if wrong.is_none() && word != pattern(seed, place).to_le_bytes() {
                    wrong = Some(place);
                }
            }
            Ok(())
        })?;
        Ok(wrong)
    }

    /// Fills a range of whole sectors with the pattern of `seed`.
    pub fn write(&mut self, offset: u64, length: u64, seed: u64) -> Result {
        let mut at = offset;
        while at < offset + length {
            let size = (offset + length - at).min(CHUNK as u64);
            let data = &mut self.buffer[..size as usize];
            for (i, word) in data.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&pattern(seed, at + 8 * i as u64).to_le_bytes());
            }
            let mut status = [0xff];
            self.queue.request(
                &mut self.transport,
                &[&header(WRITE, at / SECTOR), data],
                &mut [&mut status],
            )?;
            answer(status[0])?;
            at += size;
        }
        Ok(())
    }

    fn read(
        &mut self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(u64, &[u8]) -> Result,
    ) -> Result {
        let mut at = offset;
        while at < offset + length {
            let size = (offset + length - at).min(CHUNK as u64);
            let data = &mut self.buffer[..size as usize];
            let mut status = [0xff];
            self.queue.request(
                &mut self.transport,
                &[&header(READ, at / SECTOR)],
                &mut [data, &mut status],
            )?;
            answer(status[0])?;
            each(at, data)?;
            at += size;
        }
        Ok(())
    }
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn answer(status: u8) -> Result {
    match status {
        0 => Ok(()),
        2 => Err(Error::Unsupported),
        _ => Err(Error::IoError),
    }
}

/// The 8 bytes at `offset` of a disk written with `seed`: SplitMix64 of both, little endian.
pub fn pattern(seed: u64, offset: u64) -> u64 {
    mix(seed ^ (offset / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// SplitMix64's finaliser.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
