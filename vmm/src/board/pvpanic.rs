//! pvpanic: a port by which a guest's kernel says that it panicked (QEMU docs/specs/pvpanic.rst).
//! It has no state.

use crate::device::BusDevice;
use crate::request::{Request, RequestSender};

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

pub struct PvPanic(pub RequestSender);

impl BusDevice for PvPanic {
    /// The events that it understands.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let events = data.first().copied().unwrap_or(0);
        if events & (PANICKED | CRASH_LOADED) != 0 {
            let crash_loaded = events & CRASH_LOADED != 0;
            self.0.send(Request::Panicked { crash_loaded });
        }
    }
}
