//! Dispatch of guest accesses to devices: one [`Bus`] for ports, one for memory-mapped I/O.
//!
//! Owns the map from ranges to devices. Holds no lock while a device runs, so that a device may move
//! its own range (a PCI BAR) from within an access.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::device::BusDevice;

struct Slot {
    size: u64,
    device: Arc<dyn BusDevice>,
}

#[derive(Default)]
pub struct Bus {
    /// By first address; ranges do not overlap.
    slots: RwLock<BTreeMap<u64, Slot>>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("range {base:#x}, {size:#x} bytes, is empty or leaves the address space")]
    BadRange { base: u64, size: u64 },
    #[error("range {base:#x}, {size:#x} bytes, overlaps the one at {other:#x}")]
    Overlap { base: u64, size: u64, other: u64 },
}

impl Bus {
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Gives `size` addresses from `base` to `device`.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = match size.checked_sub(1).and_then(|less| base.checked_add(less)) {
            Some(last) => last,
            None => return Err(BusError::BadRange { base, size }),
        };
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, slot)) = slots.range(..=last).next_back()
            && other + (slot.size - 1) >= base
        {
            return Err(BusError::Overlap { base, size, other });
        }
        slots.insert(base, Slot { size, device });
        Ok(())
    }

    /// Takes the range that was inserted at `base` away; false when there is none.
    pub fn remove(&self, base: u64) -> bool {
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    /// Reads from the device at `address`; where there is none, or the access leaves its range, all
    /// bits are one, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to the device at `address`; without one nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (base, slot) = slots.range(..=address).next_back()?;
        let offset = address - base;
        let fits = offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= slot.size);
        fits.then(|| (Arc::clone(&slot.device), offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_the_offset_in_its_range() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        assert!(bus.write(0x3fa, &[7]));
        assert_eq!(*device.0.lock().unwrap(), vec![(2, vec![7])]);
        let mut data = [0];
        assert!(bus.read(0x3fd, &mut data));
        assert_eq!(data, [5]);
    }

    #[test]
    fn nobody_home_reads_as_ones() {
        let bus = Bus::new();
        bus.insert(0x10, 2, Arc::new(Recorder::default())).unwrap();
        let mut data = [0; 4];
        assert!(
            !bus.read(0x10, &mut data),
            "the access is wider than the range"
        );
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0x12, &[0]));
    }

    #[test]
    fn a_removed_range_can_be_given_away_again() {
        let bus = Bus::new();
        bus.insert(0x10, 2, Arc::new(Recorder::default())).unwrap();
        assert!(bus.remove(0x10));
        assert!(!bus.remove(0x10));
        bus.insert(0x11, 2, Arc::new(Recorder::default())).unwrap();
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(ranges in prop::collection::vec((0u64..64, 0u64..16), 0..32)) {
            let bus = Bus::new();
            let mut taken = [false; 128];
            for (base, size) in ranges {
                let wanted = base as usize..(base + size) as usize;
                let free = size > 0 && taken[wanted.clone()].iter().all(|taken| !taken);
                let inserted = bus.insert(base, size, Arc::new(Recorder::default())).is_ok();
                prop_assert_eq!(inserted, free);
                if inserted {
                    taken[wanted].fill(true);
                }
            }
            for (address, taken) in taken.iter().enumerate() {
                prop_assert_eq!(bus.read(address as u64, &mut [0]), *taken);
            }
        }

        #[test]
        fn no_access_panics(base: u64, size: u64, address: u64, length in 0usize..16) {
            let bus = Bus::new();
            let _ = bus.insert(base, size, Arc::new(Recorder::default()));
            bus.read(address, &mut vec![0; length]);
            bus.write(address, &vec![0; length]);
        }
    }
}
