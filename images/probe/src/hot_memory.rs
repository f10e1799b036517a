//! virtio-mem (virtio 1.2 §5.15): plugs and unplugs what it is told to, and looks at what is there.

use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, PAGE_SIZE, Result};

use crate::memory;
use crate::virtio::{PciTransport, Queue};

const PAGE: u64 = PAGE_SIZE as u64;
const REQUEST: usize = 24;
const RESPONSE: usize = 10;

/// Types of requests.
pub const PLUG: u16 = 0;
pub const UNPLUG: u16 = 1;
pub const UNPLUG_ALL: u16 = 2;
pub const STATE: u16 = 3;

pub struct HotMemory {
    transport: PciTransport,
    requests: Queue<8>,
    buffer: &'static mut [u8],
    block: u64,
    base: u64,
}

/// What the device says of itself, bytes.
pub struct Sizes {
    pub region: u64,
    pub usable: u64,
    pub plugged: u64,
    pub requested: u64,
}

impl HotMemory {
    pub fn new(mut transport: PciTransport) -> Result<Self> {
        transport.negotiate(0)?;
        let requests = Queue::new(&mut transport, 0)?;
        transport.finish_init();
        let block = transport.read_config_space(0)?;
        let base = transport.read_config_space(16)?;
        let buffer = memory::dma_pages(1).ok_or(Error::DmaError)?;
        let region = transport.read_config_space::<u64>(24)?;
        if !memory::map(base, region) {
            return Err(Error::DmaError);
        }
        Ok(Self {
            transport,
            requests,
            buffer,
            block,
            base,
        })
    }

    pub fn sizes(&self) -> Result<Sizes> {
        let field = |offset| self.transport.read_config_space::<u64>(offset);
        Ok(Sizes {
            region: field(24)?,
            usable: field(32)?,
            plugged: field(40)?,
            requested: field(48)?,
        })
    }

    /// Answer, and state where that was asked for.
    pub fn ask(&mut self, kind: u16, first: u64, count: u16) -> Result<(u16, u16)> {
        let (request, response) = self.buffer.split_at_mut(REQUEST);
        let address = self.base + first * self.block;
        request[..8].copy_from_slice(&u64::from(kind).to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..].copy_from_slice(&u64::from(count).to_le_bytes());
        let response = &mut response[..RESPONSE];
        response.fill(0xff);
        (self.requests).request(&mut self.transport, &[&*request], &mut [&mut *response])?;
        let half = |at: usize| u16::from_le_bytes([response[at], response[at + 1]]);
        Ok((half(0), half(8)))
    }

    /// Writes a word into every page of the blocks.
    pub fn fill(&self, first: u64, count: u64, value: u64) {
        let start = self.base + first * self.block;
        memory::dirty(start, count * self.block / PAGE, value);
    }

    /// The first page of the blocks that does not begin with `value`: its distance from the first.
    pub fn check(&self, first: u64, count: u64, value: u64) -> Option<u64> {
        let start = self.base + first * self.block;
        let mut pages = (0..count * self.block).step_by(PAGE_SIZE);
        pages.find(|page| memory::read_u64(start + page) != value)
    }
}
