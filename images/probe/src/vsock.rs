//! virtio-vsock (virtio 1.2 §5.10): echoes whatever comes over its connections, those that the host makes
//! to port 7 and those that `vsock connect` makes to a port of the host's.

use core::fmt::Write as _;

use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, Result};

use crate::memory;
use crate::serial::Line;
use crate::virtio::{PciTransport, Queue};

const ECHO: u32 = 7;
const HOST: u64 = 2;
/// Where the probe's own ports begin.
const FIRST_PORT: u32 = 1024;

/// Bytes of virtio_vsock_hdr (§5.10.6), and the one kind of socket.
const HEADER: usize = 44;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
const QUEUE: usize = 32;
const BUFFER: usize = 4096;
const EVENTS: usize = 4;
const CONNECTIONS: usize = 4;
/// Bytes that a connection holds.
const ROOM: usize = 16 << 10;

#[derive(Clone, Copy, Default)]
struct Header {
    source: u64,
    destination: u64,
    source_port: u32,
    destination_port: u32,
    length: u32,
    operation: u16,
    buffer: u32,
    forwarded: u32,
}

impl Header {
    fn read(bytes: &[u8]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let long = |at: usize| u64::from(word(at + 4)) << 32 | u64::from(word(at));
        Self {
            source: long(0),
            destination: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            operation: (word(28) >> 16) as u16,
            buffer: word(36),
            forwarded: word(40),
        }
    }

    fn write(&self, bytes: &mut [u8]) {
        bytes[..HEADER].fill(0);
        bytes[0..8].copy_from_slice(&self.source.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&STREAM.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Free,
    Requested,
    Open,
    /// The host sends no more: to be reset once all is echoed.
    Closing,
}

struct Connection {
    stage: Stage,
    host_port: u32,
    port: u32,
    held: &'static mut [u8],
    start: usize,
    length: usize,
    /// What the host can hold, has passed on, and was sent.
    host_buffer: u32,
    host_forwarded: u32,
    sent: u32,
    forwarded: u32,
}

/// The device.
pub struct Vsock {
    transport: PciTransport,
    pub cid: u64,
    receive: Queue<QUEUE>,
    transmit: Queue<QUEUE>,
    events: Queue<EVENTS>,
    receive_buffers: &'static mut [u8],
    transmit_buffers: &'static mut [u8],
    event_buffers: &'static mut [u8],
    /// Which buffer each descriptor stands for.
    receive_slots: [u16; QUEUE],
    transmit_slots: [u16; QUEUE],
    event_slots: [u16; EVENTS],
    free: [u16; QUEUE],
    free_count: usize,
    connections: [Connection; CONNECTIONS],
    next_port: u32,
    echoed: u64,
    /// How often the host said that all connections are gone.
    moves: u64,
}

impl Vsock {
    #[inline(never)]
    pub fn new(mut transport: PciTransport) -> Result<&'static mut Self> {
        transport.negotiate(0)?;
        let cid = u64::from(transport.config32(0).ok_or(Error::ConfigSpaceTooSmall)?);
        let receive = Queue::new(&mut transport, RECEIVE)?;
        let mut transmit: Queue<QUEUE> = Queue::new(&mut transport, TRANSMIT)?;
        // What was sent is looked for when there is more to send.
        transmit.ring.set_dev_notify(false);
        let events = Queue::new(&mut transport, EVENT)?;
        transport.finish_init();
        let pages = |bytes: usize| memory::dma_pages(bytes.div_ceil(4096)).ok_or(Error::DmaError);
        let connection = || -> Result<Connection> {
            Ok(Connection {
                stage: Stage::Free,
                host_port: 0,
                port: 0,
                held: pages(ROOM)?,
                start: 0,
                length: 0,
                host_buffer: 0,
                host_forwarded: 0,
                sent: 0,
                forwarded: 0,
            })
        };
        let vsock = memory::keep(Self {
            transport,
            cid,
            receive,
            transmit,
            events,
            receive_buffers: pages(QUEUE * BUFFER)?,
            transmit_buffers: pages(QUEUE * BUFFER)?,
            event_buffers: pages(EVENTS * 4)?,
            receive_slots: [0; QUEUE],
            transmit_slots: [0; QUEUE],
            event_slots: [0; EVENTS],
            free: core::array::from_fn(|slot| slot as u16),
            free_count: QUEUE,
            connections: [connection()?, connection()?, connection()?, connection()?],
            next_port: FIRST_PORT,
            echoed: 0,
            moves: 0,
        })
        .ok_or(Error::DmaError)?;
        for slot in 0..QUEUE as u16 {
            vsock.post(slot)?;
        }
        for slot in 0..EVENTS as u16 {
            vsock.post_event(slot)?;
        }
        vsock.transport.notify(RECEIVE);
        vsock.transport.notify(EVENT);
        Ok(vsock)
    }

    fn post(&mut self, slot: u16) -> Result {
        let start = usize::from(slot) * BUFFER;
        let buffer = &mut self.receive_buffers[start..start + BUFFER];
        // SAFETY: the buffer is ours for good, and is looked at only after it was popped.
        let token = unsafe { self.receive.ring.add(&[], &mut [buffer])? };
        self.receive_slots[usize::from(token)] = slot;
        Ok(())
    }

    fn post_event(&mut self, slot: u16) -> Result {
        let start = usize::from(slot) * 4;
        let buffer = &mut self.event_buffers[start..start + 4];
        // SAFETY: the buffer is ours for good, and is looked at only after it was popped.
        let token = unsafe { self.events.ring.add(&[], &mut [buffer])? };
        self.event_slots[usize::from(token)] = slot;
        Ok(())
    }

    /// Does what there is to do; true if there may be more at once.
    pub fn turn(&mut self) -> bool {
        let moved = self.hear_events();
        let mut received = false;
        // One answer at most to each packet, and a piece of echo.
        while self.has_room(2) && self.packet_in() {
            received = true;
        }
        if received && self.receive.should_notify() {
            self.transport.notify(RECEIVE);
        }
        let sent = (0..CONNECTIONS).fold(false, |sent, index| self.echo(index) || sent);
        moved || received || sent
    }

    fn hear_events(&mut self) -> bool {
        let Some(token) = self.events.ring.peek_used() else {
            return false;
        };
        let slot = self.event_slots[usize::from(token)];
        let start = usize::from(slot) * 4;
        let buffer = &mut self.event_buffers[start..start + 4];
        // SAFETY: the buffer that was added with this token.
        let length = unsafe { self.events.ring.pop_used(token, &[], &mut [buffer]) };
        if length == Ok(4) && self.event_buffers[start..start + 4] == [0; 4] {
            self.moves += 1;
            for connection in &mut self.connections {
                connection.stage = Stage::Free;
            }
        }
        if self.post_event(slot).is_ok() && self.events.should_notify() {
            self.transport.notify(EVENT);
        }
        true
    }

    fn packet_in(&mut self) -> bool {
        let Some(token) = self.receive.ring.peek_used() else {
            return false;
        };
        let slot = self.receive_slots[usize::from(token)];
        let start = usize::from(slot) * BUFFER;
        let buffer = &mut self.receive_buffers[start..start + BUFFER];
        // SAFETY: the buffer that was added with this token.
        let length = unsafe { self.receive.ring.pop_used(token, &[], &mut [buffer]) };
        let length = (length.unwrap_or(0) as usize).min(BUFFER);
        if length >= HEADER {
            let header = Header::read(&self.receive_buffers[start..start + HEADER]);
            self.sort_in(&header, start + HEADER, length - HEADER);
        }
        let _ = self.post(slot);
        true
    }

    /// A packet, its bytes from `at` on in the buffers.
    fn sort_in(&mut self, header: &Header, at: usize, length: usize) {
        let (from, to) = (header.source_port, header.destination_port);
        let is_ours =
            |c: &Connection| c.stage != Stage::Free && (c.host_port, c.port) == (from, to);
        let index = match self.connections.iter().position(is_ours) {
            Some(index) => index,
            None if header.operation == REQUEST && to == ECHO => match self.begin(from, to) {
                Some(index) => index,
                None => return self.refuse(from, to),
            },
            None if header.operation == RESET => return,
            None => return self.refuse(from, to),
        };
        let connection = &mut self.connections[index];
        connection.host_buffer = header.buffer;
        connection.host_forwarded = header.forwarded;
        match header.operation {
            REQUEST => {
                connection.stage = Stage::Open;
                self.say(index, RESPONSE, 0);
            }
            RESPONSE => connection.stage = Stage::Open,
            RESET => connection.stage = Stage::Free,
            SHUTDOWN => connection.stage = Stage::Closing,
            DATA => {
                let length = length.min(header.length as usize);
                let data = &self.receive_buffers[at..at + length];
                connection.hold(data);
            }
            CREDIT_REQUEST => self.say(index, CREDIT_UPDATE, 0),
            _ => {}
        }
    }

    fn begin(&mut self, host_port: u32, port: u32) -> Option<usize> {
        let free = |c: &Connection| c.stage == Stage::Free;
        let index = self.connections.iter().position(free)?;
        let connection = &mut self.connections[index];
        connection.stage = Stage::Requested;
        (connection.host_port, connection.port) = (host_port, port);
        (connection.start, connection.length) = (0, 0);
        (connection.sent, connection.forwarded) = (0, 0);
        (connection.host_buffer, connection.host_forwarded) = (0, 0);
        Some(index)
    }

    /// Asks for a connection to a port of the host's.
    pub fn connect(&mut self, host_port: u32) -> Result {
        let port = self.next_port;
        self.next_port += 1;
        let index = self.begin(host_port, port).ok_or(Error::QueueFull)?;
        self.say(index, REQUEST, 0);
        Ok(())
    }

    /// Sends back what is held, as much as the host takes; true if some was sent.
    fn echo(&mut self, index: usize) -> bool {
        let connection = &self.connections[index];
        if !matches!(connection.stage, Stage::Open | Stage::Closing) || !self.has_room(1) {
            return false;
        }
        let connection = &self.connections[index];
        if connection.length == 0 {
            if connection.stage == Stage::Closing {
                self.say(index, RESET, 0);
                self.connections[index].stage = Stage::Free;
            }
            return false;
        }
        let in_flight = connection.sent.wrapping_sub(connection.host_forwarded);
        let credit = connection.host_buffer.saturating_sub(in_flight) as usize;
        let length = credit.min(connection.length).min(BUFFER - HEADER);
        if length > 0 {
            self.echoed += length as u64;
            self.say(index, DATA, length);
        }
        length > 0
    }

    fn refuse(&mut self, host_port: u32, port: u32) {
        let header = Header {
            source: self.cid,
            destination: HOST,
            source_port: port,
            destination_port: host_port,
            operation: RESET,
            ..Header::default()
        };
        self.send(&header, None);
    }

    /// Sends a packet of a connection, with that much of what it holds.
    fn say(&mut self, index: usize, operation: u16, length: usize) {
        let connection = &mut self.connections[index];
        connection.forwarded = connection.forwarded.wrapping_add(length as u32);
        connection.sent = connection.sent.wrapping_add(length as u32);
        let header = Header {
            source: self.cid,
            destination: HOST,
            source_port: connection.port,
            destination_port: connection.host_port,
            length: length as u32,
            operation,
            buffer: ROOM as u32,
            forwarded: connection.forwarded,
        };
        self.send(&header, Some(index));
    }

    fn has_room(&mut self, packets: usize) -> bool {
        while let Some(token) = self.transmit.ring.peek_used() {
            let slot = self.transmit_slots[usize::from(token)];
            let start = usize::from(slot) * BUFFER;
            // The descriptor holds the length; the slice's own is not looked at but for its address.
            let buffer = &self.transmit_buffers[start..start + BUFFER];
            // SAFETY: the buffer that was added with this token (its length does not matter here).
            if unsafe { self.transmit.ring.pop_used(token, &[buffer], &mut []) }.is_err() {
                break;
            }
            self.free[self.free_count] = slot;
            self.free_count += 1;
        }
        self.free_count >= packets
    }

    fn send(&mut self, header: &Header, data_of: Option<usize>) {
        if !self.has_room(1) {
            return;
        }
        self.free_count -= 1;
        let slot = self.free[self.free_count];
        let start = usize::from(slot) * BUFFER;
        let length = HEADER + header.length as usize;
        let buffer = &mut self.transmit_buffers[start..start + length];
        header.write(buffer);
        if let Some(index) = data_of {
            self.connections[index].let_go(&mut buffer[HEADER..]);
        }
        // SAFETY: the buffer is ours for good, and is written to again only after it was popped.
        if let Ok(token) = unsafe { self.transmit.ring.add(&[buffer], &mut []) } {
            self.transmit_slots[usize::from(token)] = slot;
            if self.transmit.should_notify() {
                self.transport.notify(TRANSMIT);
            }
        }
    }

    pub fn tell(&self, out: &mut Line) {
        let open = |c: &&Connection| c.stage == Stage::Open;
        let open = self.connections.iter().filter(open).count();
        let (cid, echoed, moves) = (self.cid, self.echoed, self.moves);
        let _ = write!(out, " cid={cid} open={open} echoed={echoed} moves={moves}");
    }
}

impl Connection {
    /// Keeps bytes; a host that sends more than it may loses them.
    fn hold(&mut self, data: &[u8]) {
        for &byte in data.iter().take(ROOM - self.length) {
            self.held[(self.start + self.length) % ROOM] = byte;
            self.length += 1;
        }
    }

    fn let_go(&mut self, into: &mut [u8]) {
        for byte in into {
            *byte = self.held[self.start];
            self.start = (self.start + 1) % ROOM;
            self.length = self.length.saturating_sub(1);
        }
    }
}
