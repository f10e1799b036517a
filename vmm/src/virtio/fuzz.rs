//! What a guest can do to a virtqueue, driven by bytes: for `cargo fuzz` and for the property tests.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::feature;
use super::queue::{QueueState, Virtqueue, total};
use super::transport::Interrupt;
use crate::config::{MemoryConfig, PageSize};
use crate::eventfd::EventFd;
use crate::interrupt::{Gsi, InterruptError, MsiController, MsiMessage};
use crate::memory::GuestMemory;
use crate::pci::Msix;

const MEMORY: u64 = 2 << 20;
/// Where the guest's writes go, so that most of them mean something.
const ARENA: u64 = 0x4000;
const MAX_SIZE: u16 = 256;
const CHAIN_BYTES_MAX: u64 = 1 << 32;

/// Interrupts that nobody hears.
struct Nobody;

impl MsiController for Nobody {
    fn send(&self, _: MsiMessage) -> Result<(), InterruptError> {
        Ok(())
    }
    fn allocate(&self) -> Result<Gsi, InterruptError> {
        Ok(Gsi(0))
    }
    fn free(&self, _: Gsi) {}
    fn route(&self, _: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
        Ok(())
    }
    fn bind(&self, _: Gsi, _: &EventFd) -> Result<(), InterruptError> {
        Ok(())
    }
    fn unbind(&self, _: Gsi, _: &EventFd) -> Result<(), InterruptError> {
        Ok(())
    }
}

/// Reads `input` as a queue's registers and then as a guest's writes to memory, with the device's
/// work in between.
///
/// # Panics
/// If a chain reaches outside of memory or holds more than a chain may: a bug.
pub fn fuzz_queue(input: &[u8]) {
    let Some((head, steps)) = input.split_first_chunk::<8>() else {
        return;
    };
    let Some((memory, mut queue)) = make(head) else {
        return;
    };
    let mut held = Vec::new();
    for step in steps.chunks_exact(12) {
        let word = |at: usize| u16::from_le_bytes([step[at], step[at + 1]]);
        match step[0] % 8 {
            0..5 => {
                let place = ARENA + u64::from(word(2)) % 0x4000;
                let length = 1usize << (step[1] % 4);
                let _ = memory.write_slice(&step[4..4 + length], GuestAddress(place));
            }
            5 => match queue.pop() {
                Ok(Some(chain)) => {
                    let segments = [chain.readable(), chain.writable()].concat();
                    assert!(total(&segments) <= CHAIN_BYTES_MAX, "a chain of too much");
                    for segment in &segments {
                        let end = segment.address.checked_add(segment.length.into());
                        assert!(end.is_some_and(|end| end <= MEMORY), "outside of memory");
                        assert!(segment.length > 0, "an empty segment");
                    }
                    held.push(chain.head);
                    assert!(
                        held.len() <= usize::from(queue.size()),
                        "too many in flight"
                    );
                }
                Ok(None) => {}
                Err(fault) => queue.fail(&fault),
            },
            6 => {
                if let Some(head) = held.pop() {
                    let _ = queue.push(head, word(4).into());
                }
            }
            _ => {
                let _ = queue.notify();
                let _ = match step[1] % 2 {
                    0 => queue.enable_kicks(),
                    _ => queue.disable_kicks().map(|()| queue.has_more()),
                };
            }
        }
    }
}

/// A queue whose registers are near to what is right; `None` if the device refuses them.
fn make(head: &[u8; 8]) -> Option<(GuestMemory, Virtqueue)> {
    let config = MemoryConfig {
        bytes: MEMORY,
        pages: PageSize::Small,
        host_nodes: Vec::new(),
    };
    let memory = GuestMemory::create(&config).ok()?;
    let place = |byte: u8| match byte {
        255 => u64::MAX - 0xff,
        254 => MEMORY - 0x10,
        byte => ARENA + u64::from(byte) * 0x40,
    };
    let state = QueueState {
        size: if head[0] & 0x80 != 0 {
            head[0].into()
        } else {
            1 << (head[0] % 9)
        },
        vector: 0xffff,
        enabled: true,
        descriptors: place(head[1]),
        driver: place(head[2]),
        device: place(head[3]),
        next_available: u16::from_le_bytes([head[4], head[5]]),
        next_used: u16::from_le_bytes([head[4], head[5]]),
    };
    let indirect = if head[6] & 1 != 0 {
        feature::INDIRECT_DESC
    } else {
        0
    };
    let event_idx = if head[6] & 2 != 0 {
        feature::EVENT_IDX
    } else {
        0
    };
    let msix = Arc::new(Msix::new(1, Arc::new(Nobody)).ok()?);
    let interrupt = Arc::new(Interrupt::new("fuzz", msix, 1));
    let kick = Arc::new(EventFd::new().ok()?);
    let features = feature::VERSION_1 | indirect | event_idx;
    let queue = Virtqueue::new(0, &state, MAX_SIZE, features, &memory, kick, interrupt);
    Some((memory, queue.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_chain_of_a_lying_guest_leaves_memory(
            head in any::<[u8; 8]>(),
            steps in prop::collection::vec(any::<u8>(), 0..2400),
        ) {
            fuzz_queue(&[&head[..], &steps].concat());
        }

        /// Rings where they belong and descriptors that are nearly right, so that chains are found.
        #[test]
        fn no_chain_of_nearly_right_descriptors_leaves_memory(
            indirect in 0u8..4,
            descriptors in prop::collection::vec((0u64..0x30_0000, any::<u16>(), 0u16..8, 0u16..9), 8),
            heads in prop::collection::vec(0u16..9, 8),
            pops in 1usize..12,
        ) {
            // Eight descriptors at the arena's start, the rings behind.
            let mut input = vec![3, 0, 4, 8, 0, 0, indirect, 0];
            let mut put = |offset: usize, bytes: [u8; 8]| {
                input.extend([0, 3]);
                input.extend((offset as u16).to_le_bytes());
                input.extend(bytes);
            };
            for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
                put(16 * index, address.to_le_bytes());
                let [a, b] = length.to_le_bytes();
                let [c, d] = flags.to_le_bytes();
                let [e, f] = next.to_le_bytes();
                put(16 * index + 8, [a, b, 0, 0, c, d, e, f]);
            }
            for (index, pair) in heads.chunks(4).enumerate() {
                let bytes: Vec<u8> = pair.iter().flat_map(|head| head.to_le_bytes()).collect();
                put(0x100 + 4 + 8 * index, bytes.try_into().unwrap());
            }
            put(0x100 - 4, [0, 0, 0, 0, 0, 0, 8, 0]);
            for _ in 0..pops {
                input.extend([5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            }
            fuzz_queue(&input);
        }
    }
}
