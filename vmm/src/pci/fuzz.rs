//! What a guest can do to PCI, driven by bytes: for `cargo fuzz` and for the property tests.

use std::sync::{Arc, Mutex};

use super::config::{BarSpec, BarWidth, ConfigSpace, Identity};
use super::root::{PciFunction, RootComplex};
use crate::layout::Window;

const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 0x10_0000,
};

/// A function with two BARs that remembers where it was told that they answer.
struct Probe {
    config: ConfigSpace,
    told: Arc<Mutex<[Option<u64>; 6]>>,
}

impl PciFunction for Probe {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn read_bar(&mut self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(bar);
    }
    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&mut self, bar: u8, base: Option<u64>) {
        if let (Ok(mut told), index) = (self.told.lock(), usize::from(bar)) {
            told[index] = base;
        }
    }
}

/// Reads `input` as accesses of a guest to configuration space and BARs.
///
/// # Panics
/// If what answers overlaps, leaves the window, or is not what the functions were told: a bug.
pub fn fuzz_config_space(input: &[u8]) {
    let root = RootComplex::new(&[WINDOW]);
    let mut told = Vec::new();
    for slot in 1..4usize {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1040,
            revision: 1,
            class: [0xff, 0, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let size = 0x1000 << slot;
        config.add_bar(BarSpec {
            index: 0,
            width: BarWidth::Bits32,
            prefetchable: false,
            size,
        });
        config.add_bar(BarSpec {
            index: 4,
            width: BarWidth::Bits64,
            prefetchable: true,
            size,
        });
        config.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        let places = Arc::new(Mutex::new([None; 6]));
        told.push(Arc::clone(&places));
        // The window has room for all of them.
        let _ = root.insert(
            slot,
            Arc::new(Mutex::new(Probe {
                config,
                told: places,
            })),
        );
    }
    for step in input.chunks_exact(12) {
        let (head, rest) = step.split_at(4);
        let (offset, value) = rest.split_at(4);
        let offset = u32::from_le_bytes([offset[0], offset[1], offset[2], offset[3]]);
        let length = usize::from(head[1] % 9);
        let data: Vec<u8> = value.iter().cycle().take(length).copied().collect();
        let mut buffer = vec![0; length];
        let register = u64::from(head[2] & 3) << 15 | u64::from(offset & 0xfff);
        match head[0] % 8 {
            0..3 => root.ecam_write(register, &data),
            3 => root.ecam_write(u64::from(offset), &data),
            4 => root.port_write(head[2].into(), &data),
            5 => root.port_read(head[2].into(), &mut buffer),
            6 => root.ecam_read(u64::from(offset), &mut buffer),
            _ => {
                let address = WINDOW.base.wrapping_add(u64::from(offset % 0x20_0000));
                root.mmio_write(address, &data);
                root.mmio_read(address, &mut buffer);
            }
        }
        check(&root, &told);
    }
}

fn check(root: &RootComplex, told: &[Arc<Mutex<[Option<u64>; 6]>>]) {
    let places = root.places();
    for (index, (slot, bar, base, size)) in places.iter().enumerate() {
        assert!(
            *base >= WINDOW.base && base + size <= WINDOW.end(),
            "answers outside the window"
        );
        for (_, _, other, length) in &places[..index] {
            assert!(
                base + size <= *other || other + length <= *base,
                "two BARs answer at once"
            );
        }
        let told = told[slot - 1].lock().map(|told| told[usize::from(*bar)]);
        assert_eq!(
            told.ok().flatten(),
            Some(*base),
            "a function believes it is elsewhere"
        );
    }
    let granted = places.len();
    let believed: usize = told
        .iter()
        .filter_map(|told| told.lock().ok())
        .map(|told| told.iter().flatten().count())
        .sum();
    assert_eq!(granted, believed, "a function believes that it answers");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_guest_writes_bars_stay_apart(input in prop::collection::vec(any::<u8>(), 0..1200)) {
            fuzz_config_space(&input);
        }

        #[test]
        fn moving_bars_about_keeps_them_apart(
            moves in prop::collection::vec((1u64..4, 0u16..4, 0u32..0x24, any::<bool>()), 1..200)
        ) {
            // Aimed at the interesting registers: decode on or off, BARs to places close together.
            let mut input = Vec::new();
            for (slot, register, place, decode) in moves {
                let (offset, value) = match register {
                    0 => (0x04u32, if decode { 2u32 } else { 0 }),
                    1 => (0x10, 0xc000_0000 + place * 0x1000),
                    2 => (0x20, 0xc000_0000 + place * 0x1000),
                    _ => (0x24, u32::from(!decode)),
                };
                input.extend([0, 4, slot as u8, 0]);
                input.extend(offset.to_le_bytes());
                input.extend(value.to_le_bytes());
            }
            fuzz_config_space(&input);
        }
    }
}
