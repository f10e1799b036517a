//! pvpanic: a port by which a guest's kernel says that it panicked (QEMU docs/specs/pvpanic.rst).
//!
//! It tells the machine's owner once in the guest's life, up to the next reset: a guest that writes for
//! ever must not fill the owner's queue. The guest can see nothing of that, so it is not saved.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::BusDevice;
use crate::request::{Request, RequestSender};

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

pub struct PvPanic {
    requests: RequestSender,
    told: AtomicBool,
}

impl PvPanic {
    pub fn new(requests: RequestSender) -> Self {
        Self {
            requests,
            told: AtomicBool::new(false),
        }
    }

    /// The guest begins a new life, in which it may panic again. Called while no vCPU runs.
    pub fn reset(&self) {
        self.told.store(false, Ordering::Release);
    }
}

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
        let panicked = events & (PANICKED | CRASH_LOADED) != 0;
        if panicked && !self.told.swap(true, Ordering::AcqRel) {
            let crash_loaded = events & CRASH_LOADED != 0;
            self.requests.send(Request::Panicked { crash_loaded });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::channel;

    #[test]
    fn a_panic_is_told_once_between_two_resets() {
        let (sender, receiver) = channel().unwrap();
        let port = PvPanic::new(sender);
        port.write(0, &[0]);
        assert_eq!(receiver.try_next(), None);
        for crash_loaded in [true, false] {
            let event = if crash_loaded { CRASH_LOADED } else { PANICKED };
            port.write(0, &[event]);
            for _ in 0..1000 {
                port.write(0, &[PANICKED]);
            }
            assert_eq!(
                receiver.try_next(),
                Some(Request::Panicked { crash_loaded })
            );
            assert_eq!(receiver.try_next(), None);
            port.reset();
        }
    }
}
