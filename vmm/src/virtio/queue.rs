//! A virtqueue and the chains in it, read with distrust.
//!
//! `virtio-queue` keeps the ring positions; the descriptors are walked here, because its own walk ends
//! silently at the first bad descriptor, and a device must rather stop than act on half a request.

use std::num::Wrapping;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::feature;
use super::transport::Interrupt;
use crate::eventfd::EventFd;
use crate::memory::{self, GuestMap, GuestMemory, HotMemory, Slot};
use crate::pci::Lent;

const DESCRIPTOR_SIZE: u64 = 16;
/// The whole chain may hold this many bytes (virtio 1.2 §2.7.5.2).
const CHAIN_BYTES_MAX: u64 = 1 << 32;
/// virtq_avail.flags (§2.7.6).
const NO_INTERRUPT: u16 = 1;

/// How a queue lied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    #[error("queue size {size} is not a power of two up to {max}")]
    Size { size: u16, max: u16 },
    #[error("the rings lie outside of memory or are misaligned")]
    Rings,
    #[error("the available index runs {ahead} entries ahead in a queue of {size}")]
    AvailableIndex { ahead: u16, size: u16 },
    #[error("more than {size} chains are in flight in a queue of that size")]
    InFlight { size: u16 },
    #[error("chain {head} points at descriptor {index} of a table of {size}")]
    Index { head: u16, index: u16, size: u16 },
    #[error("chain {head} has a loop, or more than {size} descriptors")]
    TooLong { head: u16, size: u16 },
    #[error("chain {head} has an indirect table that may not be: {reason}")]
    Indirect { head: u16, reason: &'static str },
    #[error("chain {head} has a buffer outside of memory: {length} bytes at {address:#x}")]
    Buffer {
        head: u16,
        address: u64,
        length: u32,
    },
    #[error("chain {head} has a readable buffer after a writable one")]
    Order { head: u16 },
    #[error("chain {head} holds more than 4 GiB")]
    TooMuch { head: u16 },
    #[error("chain {head} is no {what}")]
    Malformed { head: u16, what: &'static str },
    #[error("a ring could not be accessed")]
    Ring,
    #[error("the host's kernel found a ring that it cannot use")]
    Kernel,
}

/// Registers and position of a queue: what the driver programmed and how far the device came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueState {
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    pub next_available: u16,
    pub next_used: u16,
}

/// A buffer in guest memory; checked to lie in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub address: u64,
    /// Bytes, not 0.
    pub length: u32,
}

/// A request: what the device may read, then what it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub head: u16,
    segments: Vec<Segment>,
    /// How many of the segments are readable.
    split: usize,
}

impl Chain {
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.split]
    }

    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.split..]
    }
}

/// Bytes in all of them together.
pub fn total(segments: &[Segment]) -> u64 {
    segments
        .iter()
        .map(|segment| u64::from(segment.length))
        .sum()
}

/// The part of `segments` from `skip` on, at most `take` bytes.
pub fn slice(segments: &[Segment], skip: u64, take: u64) -> Vec<Segment> {
    let (mut skip, mut take) = (skip, take);
    let mut part = Vec::with_capacity(segments.len());
    for segment in segments {
        let length = u64::from(segment.length);
        let dropped = skip.min(length);
        skip -= dropped;
        let kept = (length - dropped).min(take);
        take -= kept;
        if kept > 0 {
            part.push(Segment {
                address: segment.address + dropped,
                length: kept as u32,
            });
        }
    }
    part
}

/// Fills `data` from `segments`; false when they hold less. They were checked: memory cannot fail.
pub fn gather(memory: &GuestMap, segments: &[Segment], data: &mut [u8]) -> bool {
    let mut rest = data;
    for segment in segments {
        let length = (segment.length as usize).min(rest.len());
        let (now, later) = rest.split_at_mut(length);
        if memory
            .read_slice(now, GuestAddress(segment.address))
            .is_err()
        {
            return false;
        }
        rest = later;
    }
    rest.is_empty()
}

/// Writes `data` into `segments`, as much as fits; returns how much that was.
pub fn scatter(memory: &GuestMap, segments: &[Segment], data: &[u8]) -> usize {
    let mut rest = data;
    for segment in segments {
        let length = (segment.length as usize).min(rest.len());
        let (now, later) = rest.split_at(length);
        if memory
            .write_slice(now, GuestAddress(segment.address))
            .is_err()
        {
            break;
        }
        rest = later;
    }
    data.len() - rest.len()
}

/// A queue that a device works on.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: Arc<GuestMap>,
    /// Memory that a chain may name only where it is plugged.
    hot: Option<Arc<HotMemory>>,
    kick: Arc<EventFd>,
    interrupt: Arc<Interrupt>,
    indirect: bool,
    /// Interrupt on the next occasion whatever the driver's used_event says: after a restore nobody
    /// knows any more what was last signalled.
    unsure: bool,
    /// How many chains were pushed since the last [`Virtqueue::notify`].
    pushed: u16,
    /// The driver may have been asked to kick.
    asked: bool,
    /// The vector that the host's kernel may signal by itself.
    lent: Option<Lent>,
}

impl Virtqueue {
    /// A queue as `state` says, if that is one that can be used.
    pub(super) fn new(
        index: u16,
        state: &QueueState,
        max_size: u16,
        features: u64,
        memory: &GuestMemory,
        kick: Arc<EventFd>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, QueueFault> {
        if !state.size.is_power_of_two() || state.size > max_size {
            return Err(QueueFault::Size {
                size: state.size,
                max: max_size,
            });
        }
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: features & feature::EVENT_IDX != 0,
            size: state.size,
            ready: true,
            desc_table: state.descriptors,
            avail_ring: state.driver,
            used_ring: state.device,
        })
        .map_err(|_| QueueFault::Rings)?;
        let hot = memory.hot().cloned();
        let memory = memory.space();
        let size = u64::from(state.size);
        let (driver, device) = (state.driver, state.device);
        // Else what we write to one would be news in the other, for ever.
        let apart = driver.saturating_add(6 + 2 * size) <= device
            || device.saturating_add(6 + 8 * size) <= driver;
        if driver == 0 || !apart || !queue.is_valid(memory.as_ref()) {
            return Err(QueueFault::Rings);
        }
        let indirect = features & feature::INDIRECT_DESC != 0;
        let unsure = state.next_used != 0;
        Ok(Self {
            index,
            queue,
            memory,
            hot,
            kick,
            interrupt,
            indirect,
            unsure,
            pushed: 0,
            asked: true,
            lent: None,
        })
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    pub fn memory(&self) -> &Arc<GuestMap> {
        &self.memory
    }

    /// Readable when the driver has notified the queue.
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Takes note of the notifications so far.
    pub fn clear_kick(&self) {
        self.kick.take();
    }

    /// Has the device look at the queue again, after others had their turn.
    pub fn kick_again(&self) {
        self.kick.signal();
    }

    /// Where the device is: next available, next used.
    pub fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// The next chain, or none if the driver has made no more available.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueFault> {
        let size = self.queue.size();
        let memory = self.memory.as_ref();
        let available = self
            .queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(|_| QueueFault::Ring)?;
        let ahead = (available - Wrapping(self.queue.next_avail())).0;
        if ahead == 0 {
            return Ok(None);
        }
        if ahead > size {
            return Err(QueueFault::AvailableIndex { ahead, size });
        }
        if self.queue.next_avail().wrapping_sub(self.queue.next_used()) >= size {
            return Err(QueueFault::InFlight { size });
        }
        let mut entries = self.queue.iter(memory).map_err(|_| QueueFault::Ring)?;
        let head = entries.next().ok_or(QueueFault::Ring)?.head_index();
        self.walk(head).map(Some)
    }

    /// Whether the driver has made chains available that were not popped.
    pub fn has_more(&self) -> bool {
        let available = self
            .queue
            .avail_idx(self.memory.as_ref(), Ordering::Relaxed);
        available.is_ok_and(|available| available.0 != self.queue.next_avail())
    }

    /// How many chains the driver has ever made available, popped or not; it wraps.
    pub fn offered(&self) -> Result<u16, QueueFault> {
        let available = self
            .queue
            .avail_idx(self.memory.as_ref(), Ordering::Acquire);
        available
            .map(|available| available.0)
            .map_err(|_| QueueFault::Ring)
    }

    /// Puts the chain that was popped last back: the next `pop` gives it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a chain back to the driver, `written` bytes of it filled.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueFault> {
        self.pushed = self.pushed.saturating_add(1);
        self.queue
            .add_used(self.memory.as_ref(), head, written)
            .map_err(|_| QueueFault::Ring)
    }

    /// Hands back chains that belong together: the driver sees all of them at once. At most as many
    /// as the queue is long.
    pub fn push_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueFault> {
        let Some(((head, written), before)) = used.split_last() else {
            return Ok(());
        };
        let (size, first) = (self.queue.size(), self.queue.next_used());
        for (step, (head, written)) in before.iter().enumerate() {
            let slot = first.wrapping_add(step as u16) % size;
            let place = (self.queue.used_ring()).checked_add(4 + 8 * u64::from(slot));
            let element = u64::from(*head) | u64::from(*written) << 32;
            place
                .and_then(|place| {
                    let stored = self.memory.write_obj(element.to_le(), GuestAddress(place));
                    stored.ok()
                })
                .ok_or(QueueFault::Ring)?;
        }
        // The index that the last one publishes is behind all of them.
        let before = before.len() as u16;
        self.queue.set_next_used(first.wrapping_add(before));
        self.pushed = self.pushed.saturating_add(before);
        self.push(*head, *written)
    }

    /// Interrupts the driver, if it wants that, about what was pushed since the last time.
    pub fn notify(&mut self) -> Result<(), QueueFault> {
        let pushed = std::mem::take(&mut self.pushed);
        if pushed == 0 && !self.unsure {
            return Ok(());
        }
        // The driver writes what it wants, then looks at the index (§2.7.7.1): what was pushed has to
        // be there before this is read.
        fence(Ordering::SeqCst);
        let driver = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            let event = self.word(driver.checked_add(4 + 2 * u64::from(self.queue.size())))?;
            let behind = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
            behind < pushed
        } else {
            self.word(Some(driver))? & NO_INTERRUPT == 0
        };
        if std::mem::take(&mut self.unsure) || wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Memory for somebody who follows the driver's descriptors without us; valid as long as the queue.
    pub fn slots(&self) -> Vec<Slot> {
        memory::slots(&self.memory, self.hot.as_deref())
    }

    /// Where descriptors, available and used ring are, and their bytes.
    pub fn parts(&self) -> [(u64, usize); 3] {
        let size = usize::from(self.queue.size());
        [
            (self.queue.desc_table(), 16 * size),
            (self.queue.avail_ring(), 6 + 2 * size),
            (self.queue.used_ring(), 6 + 8 * size),
        ]
    }

    /// From now on the host's kernel may interrupt the driver itself, until the queue is dropped.
    pub(super) fn lend_interrupt(&mut self) {
        self.lent = self.interrupt.lend(self.index);
    }

    /// What it signals to do so; none if the queue has no interrupt of its own.
    pub fn lent_interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.lent.as_ref().map(AsFd::as_fd)
    }

    /// Interrupts the driver if nobody knows whether it was told of all that was used.
    pub fn settle_doubt(&mut self) {
        if std::mem::take(&mut self.unsure) {
            self.interrupt();
        }
    }

    /// Interrupts the driver, whether it wants that or not.
    pub fn interrupt(&self) {
        self.interrupt.queue(self.index);
    }

    /// Takes over from the kernel, which came as far as `next_available`, and has used all of that which
    /// the ring says.
    pub fn moved_on(&mut self, next_available: u16) -> Result<(), QueueFault> {
        let used = self.word(self.queue.used_ring().checked_add(2))?;
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(used);
        self.unsure = true;
        Ok(())
    }

    fn word(&self, address: Option<u64>) -> Result<u16, QueueFault> {
        address
            .and_then(|address| {
                let word = self.memory.load(GuestAddress(address), Ordering::Relaxed);
                word.ok()
            })
            .map(u16::from_le)
            .ok_or(QueueFault::Ring)
    }

    /// Asks to be kicked; true if chains came in meanwhile, for which no kick will come.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueFault> {
        self.asked = true;
        self.queue
            .enable_notification(self.memory.as_ref())
            .map_err(|_| QueueFault::Ring)
    }

    /// Asks to be kicked once the driver has made more chains available than `offered`; true if it has.
    pub fn enable_kicks_beyond(&mut self, offered: u16) -> Result<bool, QueueFault> {
        self.enable_kicks()?;
        if self.queue.event_idx_enabled() {
            self.store_available_event(offered)?;
            fence(Ordering::SeqCst);
        }
        Ok(self.offered()? != offered)
    }

    /// The driver kicks when it makes the chain of this number available.
    fn store_available_event(&self, event: u16) -> Result<(), QueueFault> {
        let place = 4 + 8 * u64::from(self.queue.size());
        let stored = self.queue.used_ring().checked_add(place).map(|place| {
            let memory = self.memory.as_ref();
            memory.store(event.to_le(), GuestAddress(place), Ordering::Relaxed)
        });
        stored.and_then(Result::ok).ok_or(QueueFault::Ring)
    }

    /// Asks not to be kicked while the device looks at the queue anyway.
    pub fn disable_kicks(&mut self) -> Result<(), QueueFault> {
        if !std::mem::take(&mut self.asked) {
            return Ok(());
        }
        if self.queue.event_idx_enabled() {
            // The driver kicks when it passes the event, and has passed this one.
            return self.store_available_event(self.queue.next_avail().wrapping_sub(1));
        }
        self.queue
            .disable_notification(self.memory.as_ref())
            .map_err(|_| QueueFault::Ring)
    }

    /// Tells the driver that the device's configuration changed.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }

    /// Takes the device to DEVICE_NEEDS_RESET.
    pub fn fail(&self, fault: &QueueFault) {
        self.interrupt
            .needs_reset(format_args!("queue {}: {fault}", self.index));
    }

    fn walk(&self, head: u16) -> Result<Chain, QueueFault> {
        let size = self.queue.size();
        let mut table = Table {
            base: self.queue.desc_table(),
            size,
        };
        let (mut index, mut indirect, mut bytes) = (head, false, 0u64);
        let mut chain = Chain {
            head,
            segments: Vec::with_capacity(4),
            split: 0,
        };
        // Each descriptor of a chain counts, so that a loop ends here.
        for _ in 0..=size {
            let descriptor = table.read(&self.memory, head, index)?;
            if descriptor.refers_to_indirect_table() {
                // What stands before an indirect descriptor counts as part of the chain (§2.7.5.3.1).
                table = self.indirect_table(head, &descriptor, indirect)?;
                (index, indirect) = (0, true);
                continue;
            }
            let (address, length) = (descriptor.addr().0, descriptor.len());
            bytes += u64::from(length);
            if bytes > CHAIN_BYTES_MAX {
                return Err(QueueFault::TooMuch { head });
            }
            if length > 0 {
                let whole = self
                    .memory
                    .get_slice(GuestAddress(address), length as usize)
                    .is_ok();
                let unplugged = |hot: &Arc<HotMemory>| !hot.allows(address, length.into());
                if !whole || self.hot.as_ref().is_some_and(unplugged) {
                    return Err(QueueFault::Buffer {
                        head,
                        address,
                        length,
                    });
                }
                if !descriptor.is_write_only() {
                    if chain.split < chain.segments.len() {
                        return Err(QueueFault::Order { head });
                    }
                    chain.split += 1;
                }
                chain.segments.push(Segment { address, length });
                if chain.segments.len() > usize::from(size) {
                    return Err(QueueFault::TooLong { head, size });
                }
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(QueueFault::TooLong { head, size })
    }

    fn indirect_table(
        &self,
        head: u16,
        descriptor: &Descriptor,
        nested: bool,
    ) -> Result<Table, QueueFault> {
        let length = descriptor.len();
        let reason = if !self.indirect {
            "not negotiated"
        } else if nested {
            "nested"
        } else if descriptor.has_next() {
            "with a next descriptor"
        } else if length == 0 || !u64::from(length).is_multiple_of(DESCRIPTOR_SIZE) {
            "of a length that is no multiple of 16"
        } else if u64::from(length) / DESCRIPTOR_SIZE > u64::from(self.queue.size()) {
            "longer than the queue"
        } else {
            let size = (u64::from(length) / DESCRIPTOR_SIZE) as u16;
            return Ok(Table {
                base: descriptor.addr().0,
                size,
            });
        };
        Err(QueueFault::Indirect { head, reason })
    }
}

/// A descriptor table.
struct Table {
    base: u64,
    size: u16,
}

impl Table {
    fn read(&self, memory: &GuestMap, head: u16, index: u16) -> Result<Descriptor, QueueFault> {
        if index >= self.size {
            return Err(QueueFault::Index {
                head,
                index,
                size: self.size,
            });
        }
        let address = self.base.checked_add(u64::from(index) * DESCRIPTOR_SIZE);
        address
            .and_then(|address| memory.read_obj(GuestAddress(address)).ok())
            .ok_or(QueueFault::Buffer {
                head,
                address: self.base,
                length: DESCRIPTOR_SIZE as u32,
            })
    }
}

#[cfg(test)]
mod tests;
