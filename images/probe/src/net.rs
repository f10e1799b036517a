//! virtio-net (virtio 1.2 §5.1): a driver of the first pair of queues, with checksum and segmentation
//! offloads for what comes in, and mergeable buffers; and of the control queue, if the device may ask where we are.
//!
//! The driver only: what is said over it stands in `stack`.

use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, Result};

use crate::virtio::{PciTransport, Queue};
use crate::{cpu, memory};

const FEATURE_CSUM: u64 = 1 << 0;
const FEATURE_GUEST_CSUM: u64 = 1 << 1;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_GUEST_TSO4: u64 = 1 << 7;
const FEATURE_MRG_RXBUF: u64 = 1 << 15;
const FEATURE_STATUS: u64 = 1 << 16;
const FEATURE_CTRL_VQ: u64 = 1 << 17;
const FEATURE_GUEST_ANNOUNCE: u64 = 1 << 21;

const ANNOUNCE: u64 = FEATURE_STATUS | FEATURE_CTRL_VQ | FEATURE_GUEST_ANNOUNCE;
/// Where the status lies in the configuration (§5.1.4), and what in it asks us to say where we are.
const STATUS: usize = 6;
const STATUS_ANNOUNCE: u16 = 2;
/// VIRTIO_NET_CTRL_ANNOUNCE_ACK (§5.1.6.5.4), and what is no answer to it.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];
const NO_ANSWER: u8 = 0xff;
const OFFLOADS: u64 = FEATURE_CSUM | FEATURE_GUEST_CSUM | FEATURE_GUEST_TSO4;

/// Bytes of virtio_net_hdr (§5.1.6), and what in it is needed here.
pub const HEADER: usize = 12;
const FLAG_NEEDS_CSUM: u8 = 1;
const NUM_BUFFERS: usize = 10;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Of a driver of one pair of queues.
const CONTROL: u16 = 2;
const QUEUE: usize = 128;
const RECEIVE_BUFFER: usize = 4096;
const TRANSMIT_BUFFER: usize = 2048;
/// The longest packet, with its header: 64 KiB of IP.
const LONGEST: usize = 68 << 10;
pub const ETHERNET: usize = 14;
/// The largest frame that is sent.
pub const FRAME_MAX: usize = 1514;

/// The device. Its buffers belong to it for good.
pub struct Net {
    pub transport: PciTransport,
    pub mac: [u8; 6],
    features: u64,
    pub receiver: Receiver,
    pub transmitter: Transmitter,
    control: Option<Control>,
    /// How often the device has taken it that we have said where we are.
    pub announced: u64,
}

/// By which the device asks where we are, and is answered.
struct Control {
    queue: Queue<8>,
    buffer: &'static mut [u8],
    /// Of changes of the configuration, and how many were seen.
    vector: u8,
    seen: u64,
}

/// What comes in.
pub struct Receiver {
    queue: Queue<QUEUE>,
    buffers: &'static mut [u8],
    /// A packet that came in several buffers.
    whole: &'static mut [u8],
    /// Which buffer each descriptor stands for.
    slots: [u16; QUEUE],
    posted: bool,
    pub packets: u64,
}

/// What goes out.
pub struct Transmitter {
    queue: Queue<QUEUE>,
    buffers: &'static mut [u8],
    slots: [u16; QUEUE],
    free: [u16; QUEUE],
    free_count: usize,
    /// The host fills in checksums.
    checksums_left: bool,
    sent: bool,
    pub packets: u64,
}

/// Where a packet lies that was just received; to be given back by [`Receiver::done`].
#[derive(Clone, Copy)]
pub struct Received {
    /// None: in `whole`.
    slot: Option<u16>,
    length: usize,
}

impl Net {
    /// With the offloads that the device has, or none.
    #[inline(never)]
    pub fn new(mut transport: PciTransport, offloads: bool) -> Result<&'static mut Self> {
        let wanted = FEATURE_MAC | FEATURE_MRG_RXBUF | if offloads { OFFLOADS } else { 0 };
        let can = transport.read_device_features() & ANNOUNCE == ANNOUNCE;
        let features = transport.negotiate(wanted | if can { ANNOUNCE } else { 0 })?;
        if features & FEATURE_MRG_RXBUF == 0 {
            return Err(Error::Unsupported);
        }
        let mac = transport.read_config_space::<[u8; 6]>(0)?;
        let receive = Queue::new(&mut transport, RECEIVE)?;
        let mut transmit: Queue<QUEUE> = Queue::new(&mut transport, TRANSMIT)?;
        // What was sent is looked for when there is more to send.
        transmit.ring.set_dev_notify(false);
        let control = match features & ANNOUNCE {
            ANNOUNCE => Control::new(&mut transport)?,
            _ => None,
        };
        transport.finish_init();
        let pages = |bytes: usize| memory::dma_pages(bytes.div_ceil(4096)).ok_or(Error::DmaError);
        let net = memory::keep(Self {
            transport,
            mac,
            features,
            receiver: Receiver {
                queue: receive,
                buffers: pages(QUEUE * RECEIVE_BUFFER)?,
                whole: pages(LONGEST)?,
                slots: [0; QUEUE],
                posted: false,
                packets: 0,
            },
            transmitter: Transmitter {
                queue: transmit,
                buffers: pages(QUEUE * TRANSMIT_BUFFER)?,
                slots: [0; QUEUE],
                free: core::array::from_fn(|slot| slot as u16),
                free_count: QUEUE,
                checksums_left: false,
                sent: false,
                packets: 0,
            },
            control,
            announced: 0,
        })
        .ok_or(Error::DmaError)?;
        net.transmitter.checksums_left = net.checksums_left();
        for slot in 0..QUEUE as u16 {
            net.receiver.post(slot)?;
        }
        net.flush();
        Ok(net)
    }

    /// Whether checksums are left to the host, in both directions.
    pub fn checksums_left(&self) -> bool {
        self.features & (FEATURE_CSUM | FEATURE_GUEST_CSUM) == FEATURE_CSUM | FEATURE_GUEST_CSUM
    }

    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the device has asked us to say where we are, since this was asked last.
    pub fn is_asked(&mut self) -> bool {
        let Some(control) = &mut self.control else {
            return false;
        };
        let came = cpu::interrupts_of(control.vector);
        if core::mem::replace(&mut control.seen, came) == came {
            return false;
        }
        let status = self.transport.read_config_space::<u16>(STATUS);
        status.is_ok_and(|status| status & STATUS_ANNOUNCE != 0)
    }

    /// Tells the device that we have.
    pub fn acknowledge(&mut self) {
        let Some(control) = &mut self.control else {
            return;
        };
        let (command, answer) = control.buffer.split_at_mut(ANNOUNCE_ACK.len());
        command.copy_from_slice(&ANNOUNCE_ACK);
        answer[0] = NO_ANSWER;
        let done =
            (control.queue).request(&mut self.transport, &[&*command], &mut [&mut answer[..1]]);
        if done.is_ok() && answer[0] == 0 {
            self.announced += 1;
        }
    }

    /// Tells the device of what was posted and sent.
    pub fn flush(&mut self) {
        let (receiver, transmitter) = (&mut self.receiver, &mut self.transmitter);
        if core::mem::take(&mut receiver.posted) && receiver.queue.should_notify() {
            self.transport.notify(RECEIVE);
        }
        if core::mem::take(&mut transmitter.sent) && transmitter.queue.should_notify() {
            self.transport.notify(TRANSMIT);
        }
    }
}

impl Control {
    /// None without an interrupt by which the device could ask.
    fn new(transport: &mut PciTransport) -> Result<Option<Self>> {
        let queue = Queue::new(transport, CONTROL)?;
        let buffer = memory::dma_pages(1).ok_or(Error::DmaError)?;
        let control = transport.listen_to_config().map(|vector| Self {
            queue,
            buffer,
            vector,
            seen: cpu::interrupts_of(vector),
        });
        Ok(control)
    }
}

impl Receiver {
    pub fn has_packet(&self) -> bool {
        self.queue.ring.can_pop()
    }

    fn post(&mut self, slot: u16) -> Result {
        let start = usize::from(slot) * RECEIVE_BUFFER;
        let buffer = &mut self.buffers[start..start + RECEIVE_BUFFER];
        // SAFETY: the buffer is ours for good, and is looked at only after it was popped.
        let token = unsafe { self.queue.ring.add(&[], &mut [buffer])? };
        self.slots[usize::from(token)] = slot;
        self.posted = true;
        Ok(())
    }

    /// The next used buffer and how much of it was filled.
    fn pop(&mut self) -> Option<(u16, usize)> {
        let token = self.queue.ring.peek_used()?;
        let slot = self.slots[usize::from(token)];
        let start = usize::from(slot) * RECEIVE_BUFFER;
        let buffer = &mut self.buffers[start..start + RECEIVE_BUFFER];
        // SAFETY: the buffer that was added with this token.
        let length = unsafe { self.queue.ring.pop_used(token, &[], &mut [buffer]) };
        Some((slot, (length.ok()? as usize).min(RECEIVE_BUFFER)))
    }

    /// Takes a packet out of the queue.
    pub fn receive(&mut self) -> Option<Received> {
        let (first, mut length) = self.pop()?;
        self.packets += 1;
        let start = usize::from(first) * RECEIVE_BUFFER;
        let count = u16::from_le_bytes([
            self.buffers[start + NUM_BUFFERS],
            self.buffers[start + NUM_BUFFERS + 1],
        ]);
        if count <= 1 {
            return Some(Received {
                slot: Some(first),
                length,
            });
        }
        self.whole[..length].copy_from_slice(&self.buffers[start..start + length]);
        let _ = self.post(first);
        for _ in 1..count {
            // All of a packet's buffers are shown at once.
            let (slot, here) = self.pop()?;
            let start = usize::from(slot) * RECEIVE_BUFFER;
            let here = here.min(self.whole.len() - length);
            self.whole[length..length + here].copy_from_slice(&self.buffers[start..start + here]);
            length += here;
            let _ = self.post(slot);
        }
        Some(Received { slot: None, length })
    }

    /// The packet's bytes, without the header.
    pub fn frame(&self, received: Received) -> &[u8] {
        let bytes = match received.slot {
            Some(slot) => {
                let start = usize::from(slot) * RECEIVE_BUFFER;
                &self.buffers[start..start + received.length]
            }
            None => &self.whole[..received.length],
        };
        bytes.get(HEADER..).unwrap_or(&[])
    }

    pub fn done(&mut self, received: Received) {
        if let Some(slot) = received.slot {
            let _ = self.post(slot);
        }
    }
}

impl Transmitter {
    /// Whether a packet can be sent now.
    pub fn has_room(&mut self) -> bool {
        self.reclaim();
        self.free_count > 0
    }

    fn reclaim(&mut self) {
        while let Some(token) = self.queue.ring.peek_used() {
            let slot = self.slots[usize::from(token)];
            let start = usize::from(slot) * TRANSMIT_BUFFER;
            // The descriptor holds the length; the slice's own is not looked at but for its address.
            let buffer = &self.buffers[start..start + TRANSMIT_BUFFER];
            // SAFETY: the buffer that was added with this token (its length does not matter here).
            if unsafe { self.queue.ring.pop_used(token, &[buffer], &mut []) }.is_err() {
                return;
            }
            self.free[self.free_count] = slot;
            self.free_count += 1;
        }
    }

    /// Sends a frame of `length` bytes that `fill` writes. There is room ([`Transmitter::has_room`]).
    pub fn send<R>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let length = length.min(TRANSMIT_BUFFER - HEADER);
        self.free_count = self.free_count.saturating_sub(1);
        let slot = self.free[self.free_count];
        let left = self.checksums_left;
        let start = usize::from(slot) * TRANSMIT_BUFFER;
        let buffer = &mut self.buffers[start..start + HEADER + length];
        let (header, frame) = buffer.split_at_mut(HEADER);
        let result = fill(frame);
        header.fill(0);
        if let Some((begin, offset)) = left.then(|| begin_checksum(frame)).flatten() {
            header[0] = FLAG_NEEDS_CSUM;
            header[6..8].copy_from_slice(&(begin as u16).to_le_bytes());
            header[8..10].copy_from_slice(&(offset as u16).to_le_bytes());
        }
        // SAFETY: the buffer is ours for good, and is written to again only after it was popped.
        if let Ok(token) = unsafe { self.queue.ring.add(&[buffer], &mut []) } {
            self.slots[usize::from(token)] = slot;
            self.packets += 1;
            self.sent = true;
        }
        result
    }
}

/// Puts the sum of the pseudo header where the host adds the rest: start of TCP or UDP, and offset of
/// the checksum in it.
fn begin_checksum(frame: &mut [u8]) -> Option<(usize, usize)> {
    const IPV4: [u8; 2] = [8, 0];
    if frame.get(12..14)? != IPV4 {
        return None;
    }
    let start = ETHERNET + 4 * usize::from(*frame.get(ETHERNET)? & 15);
    let protocol = *frame.get(ETHERNET + 9)?;
    let offset = match protocol {
        6 => 16,
        17 => 6,
        _ => return None,
    };
    let total = u16::from_be_bytes([*frame.get(ETHERNET + 2)?, *frame.get(ETHERNET + 3)?]);
    let payload = usize::from(total).checked_sub(start - ETHERNET)?;
    let addresses = frame.get(ETHERNET + 12..ETHERNET + 20)?;
    let words = addresses.chunks_exact(2);
    let mut sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    sum += u32::from(protocol) + payload as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let place = frame.get_mut(start + offset..start + offset + 2)?;
    place.copy_from_slice(&(sum as u16).to_be_bytes());
    Some((start, offset))
}
