//! virtio-balloon (virtio 1.2 §5.5), as much of it as reports free pages.

use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, Result};

use crate::memory;
use crate::virtio::{PciTransport, Queue};

const FEATURE_REPORTING: u64 = 1 << 5;
/// Counted among the queues of what is negotiated, as Linux counts: after inflate and deflate.
const REPORTING: u16 = 2;
/// Bytes of one report: Linux's largest block.
const BLOCK: u64 = 4 << 20;

pub struct Balloon {
    transport: PciTransport,
    reports: Queue<8>,
}

impl Balloon {
    pub fn new(mut transport: PciTransport) -> Result<Self> {
        if transport.negotiate(FEATURE_REPORTING)? & FEATURE_REPORTING == 0 {
            return Err(Error::Unsupported);
        }
        let reports = Queue::new(&mut transport, REPORTING)?;
        transport.finish_init();
        Ok(Self { transport, reports })
    }

    /// Pages that the host wishes in the balloon.
    pub fn target(&self) -> Result<u32> {
        self.transport.config32(0).ok_or(Error::ConfigSpaceTooSmall)
    }

    /// Reports a range of free memory; what was in it is gone.
    pub fn report_free(&mut self, start: u64, length: u64) -> Result {
        let mut at = start;
        while at < start + length {
            let size = (start + length - at).min(BLOCK);
            // SAFETY: the caller's range is free memory, and the request is over when this returns.
            let block = unsafe { memory::as_buffer(at, size) };
            self.reports
                .request(&mut self.transport, &[], &mut [block])?;
            at += size;
        }
        Ok(())
    }
}
