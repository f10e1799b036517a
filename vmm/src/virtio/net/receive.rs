//! From the host to the guest: packets into the buffers that the driver has posted.
//!
//! A packet is read straight into guest memory. Since nobody knows its length before, enough buffers
//! for the longest are taken from the queue and kept for the next packet if they were not needed;
//! should there be too few, the end of the packet lands in the host's own room, and the packet waits
//! there for more buffers.

use std::collections::VecDeque;

use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::backend::NetBackend;
use super::control::{Control, HEADER};
use super::frame::{Frame, PACKET_MAX};
use super::limit::Limiter;
use crate::virtio::queue::{Chain, QueueFault, Segment, Virtqueue, gather, scatter, total};

/// Packets before the others have their turn.
const BATCH: usize = 64;
/// Bytes of an Ethernet header: nothing shorter is a packet.
const ETHERNET: usize = 14;
/// Room for a packet while the host may send no segments for the driver to put together.
const ORDINARY: usize = HEADER + 2048;
/// Where num_buffers lies in virtio_net_hdr.
const NUM_BUFFERS: u64 = 10;

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// There may be more at once.
    More,
    /// Nothing is left to do until the backend or the driver says so.
    Idle,
    /// Nothing may be done until the limit lets it. Nobody but the clock says when that is.
    Limited,
}

/// One receive queue.
pub struct Receiver {
    queue: Virtqueue,
    /// A packet may be spread over several buffers (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// Taken from the queue and not used yet.
    posted: VecDeque<Chain>,
    /// Bytes in `posted`.
    room: usize,
    /// Bytes that a packet may have.
    longest: usize,
    /// A packet for which there were too few buffers, header first.
    parked: Option<Vec<u8>>,
    /// The driver is to kick when it posts buffers.
    asking: bool,
    /// The backend may have a packet.
    pub readable: bool,
}

impl Receiver {
    pub fn new(queue: Virtqueue, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            posted: VecDeque::new(),
            room: 0,
            longest: ORDINARY,
            parked: None,
            asking: true,
            readable: true,
        }
    }

    pub fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// Whether the host may send segments of up to 64 KiB.
    pub fn expect_segments(&mut self, expected: bool) {
        self.longest = if expected { PACKET_MAX } else { ORDINARY };
    }

    /// Puts back what was not used. A packet that waited for buffers is lost, as packets may be.
    pub fn give_back(mut self) -> Virtqueue {
        self.put_back();
        self.queue
    }

    /// Leaves the queue alone, as if no buffer had been looked at.
    pub fn put_back(&mut self) {
        for _ in self.posted.drain(..) {
            self.queue.unpop();
        }
        self.room = 0;
        self.parked = None;
    }

    /// Passes on what has come in.
    pub fn turn(
        &mut self,
        backend: &mut dyn NetBackend,
        frame: &mut Frame,
        control: &Control,
        limiter: &Limiter,
    ) -> Result<Turn, QueueFault> {
        let turn = self.receive(backend, frame, control, limiter)?;
        self.queue.notify()?;
        Ok(turn)
    }

    fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        frame: &mut Frame,
        control: &Control,
        limiter: &Limiter,
    ) -> Result<Turn, QueueFault> {
        for _ in 0..BATCH {
            if !self.readable && self.parked.is_none() {
                return Ok(Turn::Idle);
            }
            if !limiter.wait().is_zero() {
                return Ok(Turn::Limited);
            }
            let wanted = self.parked.as_ref().map_or(self.longest, Vec::len);
            self.fill(wanted)?;
            let passed = match self.parked.take() {
                Some(packet) if packet.len() <= self.room => {
                    self.write(&packet);
                    self.hand_over(packet.len())?
                }
                Some(packet) if self.is_full() => {
                    tracing::debug!(length = packet.len(), "a packet is longer than the buffers");
                    0
                }
                Some(packet) => {
                    self.parked = Some(packet);
                    return self.starved();
                }
                None if self.posted.is_empty() => return self.starved(),
                None => match self.read(backend, frame, control)? {
                    Some(passed) => passed,
                    None => return Ok(Turn::Idle),
                },
            };
            if passed > 0 {
                limiter.passed(passed);
            }
        }
        Ok(Turn::More)
    }

    /// There are too few buffers; the driver's next kick tells of more.
    fn starved(&mut self) -> Result<Turn, QueueFault> {
        self.asking = true;
        let more = self.queue.enable_kicks()?;
        Ok(if more { Turn::More } else { Turn::Idle })
    }

    /// No more buffers can come before some of those here are used.
    fn is_full(&self) -> bool {
        !self.mergeable || self.posted.len() >= usize::from(self.queue.size())
    }

    /// Takes buffers until they hold `wanted` bytes; only one where packets cannot be spread. Buffers
    /// that are posted while there are enough need no kick.
    fn fill(&mut self, wanted: usize) -> Result<(), QueueFault> {
        while self.room < wanted && (self.mergeable || self.posted.is_empty()) {
            let Some(chain) = self.queue.pop()? else {
                break;
            };
            let room = total(chain.writable()) as usize;
            if !chain.readable().is_empty() || room < HEADER {
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what: "buffer for a packet",
                });
            }
            self.room += room;
            self.posted.push_back(chain);
        }
        if self.asking && self.room >= wanted {
            self.asking = false;
            self.queue.disable_kicks()?;
        }
        Ok(())
    }

    /// Reads a packet; the bytes that the driver got of it, 0 if it was none for it, or `None` if there
    /// is no packet.
    fn read(
        &mut self,
        backend: &mut dyn NetBackend,
        frame: &mut Frame,
        control: &Control,
    ) -> Result<Option<usize>, QueueFault> {
        frame.begin(self.queue.memory());
        let mut segments = (self.posted.iter()).flat_map(Chain::writable);
        // What finds no place in the frame is left out: the packet waits, as with too few buffers.
        while frame.room() < self.longest
            && let Some(segment) = segments.next()
            && frame.add(segment)
        {}
        let room = frame.room();
        let length = match backend.receive(frame) {
            Ok(0) | Err(Errno::AGAIN) => {
                self.readable = false;
                return Ok(None);
            }
            Err(Errno::INTR) => return Ok(Some(0)),
            Err(error) => {
                tracing::debug!(%error, "no packet could be taken");
                self.readable = false;
                return Ok(None);
            }
            Ok(length) => length,
        };
        // Longer than all there is: cut off, and so worthless.
        let whole = length < room + PACKET_MAX;
        if !whole || length < HEADER + ETHERNET || !control.accepts(self.destination(frame)) {
            return Ok(Some(0));
        }
        if length > room {
            let mut packet = vec![0; length];
            let (head, tail) = packet.split_at_mut(room);
            if self.copy_out(head) {
                tail.copy_from_slice(frame.rest(length));
                self.parked = Some(packet);
            }
            return Ok(Some(0));
        }
        self.hand_over(length).map(Some)
    }

    /// Where the packet that was just read is for.
    fn destination(&self, frame: &Frame) -> [u8; 6] {
        let mut start = [0; HEADER + 6];
        let room = frame.room().min(start.len());
        let (head, tail) = start.split_at_mut(room);
        if self.copy_out(head) {
            let rest = frame.rest(frame.room() + tail.len());
            tail.copy_from_slice(rest);
        }
        let mut address = [0; 6];
        address.copy_from_slice(&start[HEADER..]);
        address
    }

    /// Reads from the posted buffers.
    fn copy_out(&self, data: &mut [u8]) -> bool {
        let mut rest = data;
        for chain in &self.posted {
            let length = rest.len().min(total(chain.writable()) as usize);
            let (now, later) = rest.split_at_mut(length);
            if !now.is_empty() && !gather(self.queue.memory(), chain.writable(), now) {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Copies a packet into the posted buffers, which have room for it.
    fn write(&self, packet: &[u8]) {
        let mut rest = packet;
        for chain in &self.posted {
            let done = scatter(self.queue.memory(), chain.writable(), rest);
            rest = &rest[done..];
        }
    }

    /// Gives the driver the first buffers, which hold a packet of `length`.
    fn hand_over(&mut self, length: usize) -> Result<usize, QueueFault> {
        let mut used: Vec<(u16, u32)> = Vec::with_capacity(4);
        let mut header = None;
        let mut rest = length;
        while rest > 0 {
            let Some(chain) = self.posted.pop_front() else {
                return Err(QueueFault::Ring);
            };
            let room = total(chain.writable()) as usize;
            let here = rest.min(room);
            self.room -= room;
            mark_dirty(&self.queue, chain.writable(), here);
            used.push((chain.head, here as u32));
            rest -= here;
            header.get_or_insert(chain);
        }
        if let Some(chain) = header {
            // 1 also where buffers are not mergeable (§5.1.6.4.1).
            let count = (used.len() as u16).to_le_bytes();
            put(&self.queue, chain.writable(), NUM_BUFFERS, count);
        }
        self.queue.push_together(&used)?;
        Ok(length)
    }
}

/// Writes two bytes at an offset into `segments`.
fn put(queue: &Virtqueue, segments: &[Segment], offset: u64, bytes: [u8; 2]) {
    let mut skip = offset;
    let mut rest = &bytes[..];
    for segment in segments {
        let length = u64::from(segment.length);
        if skip >= length {
            skip -= length;
            continue;
        }
        let here = rest.len().min((length - skip) as usize);
        let (now, later) = rest.split_at(here);
        let place = GuestAddress(segment.address + skip);
        // Checked when it was taken from the queue: it cannot fail.
        let _ = queue.memory().write_slice(now, place);
        (skip, rest) = (0, later);
        if rest.is_empty() {
            return;
        }
    }
}

/// The kernel wrote behind the back of the dirty bitmap.
fn mark_dirty(queue: &Virtqueue, segments: &[Segment], length: usize) {
    let mut rest = length;
    for segment in segments {
        let here = rest.min(segment.length as usize);
        if here == 0 {
            return;
        }
        if let Ok(slice) = (queue.memory()).get_slice(GuestAddress(segment.address), here) {
            slice.bitmap().mark_dirty(0, here);
        }
        rest -= here;
    }
}
