//! One connection between a guest's port and a socket of the host: who may send how much, what is owed
//! to the guest, and how it ends (virtio 1.2 §5.10.6.3 to §5.10.6.6).
//!
//! What the guest sends goes to the socket at once; what the socket does not take is kept, at most as
//! much as the guest was told that it may send ([`BUFFER`]).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::packet::{Header, NO_RECEIVE, NO_SEND, Operation, Ports};

/// Bytes of the guest's that a connection may hold.
pub const BUFFER: u32 = 64 << 10;
/// How long the guest may take to answer a request or a shutdown, and the host to take the last bytes.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest has to be told.
    Reset,
    /// It was the guest that told us.
    Told,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest was asked, or is about to be.
    Requested,
    Open,
    /// The guest has sent all that it will, and wants no more: the host gets what is left.
    Draining,
    /// The host is gone, and the guest is to confirm it.
    Closing,
}

/// Packets that the guest is to get apart from data.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: u32,
}

pub struct Connection {
    pub ports: Ports,
    socket: OwnedFd,
    stage: Stage,
    owed: Owed,
    /// What the guest can hold of what is sent to it, and how much of that it has passed on.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// Bytes to the guest since the beginning; like all such counts it wraps.
    sent: u32,
    /// Bytes from the guest, those of them that the socket took, and how many of these it knows of.
    received: u32,
    forwarded: u32,
    told: u32,
    waiting: VecDeque<u8>,
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    readable: bool,
    writable: bool,
    hung_up: bool,
    deadline: Option<Instant>,
}

impl Connection {
    /// One that a program of the host wants.
    pub fn from_host(ports: Ports, socket: OwnedFd, now: Instant) -> Self {
        let mut connection = Self::new(ports, socket, Stage::Requested);
        connection.owed.request = true;
        connection.deadline = Some(now + PATIENCE);
        connection
    }

    /// One that the guest wants, by `request`.
    pub fn from_guest(request: &Header, socket: OwnedFd) -> Self {
        let mut connection = Self::new(request.ports(), socket, Stage::Open);
        connection.owed.response = true;
        connection.heed_credit(request);
        connection
    }

    fn new(ports: Ports, socket: OwnedFd, stage: Stage) -> Self {
        Self {
            ports,
            socket,
            stage,
            owed: Owed::default(),
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            received: 0,
            forwarded: 0,
            told: 0,
            waiting: VecDeque::new(),
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            readable: true,
            writable: true,
            hung_up: false,
            deadline: None,
        }
    }

    /// When it is over unless something happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Begins to wait anew, after a time in which nothing could happen.
    pub fn postpone(&mut self, now: Instant) {
        if let Some(deadline) = &mut self.deadline {
            *deadline = now + PATIENCE;
        }
    }

    /// What the socket is ready for, from now on.
    pub fn ready(&mut self, readable: bool, writable: bool, hung_up: bool, now: Instant) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
        // It had ended one way already.
        if self.hung_up && !self.host_sends && self.stage == Stage::Open {
            self.host_ended(now);
        }
    }

    /// Takes a packet of the guest, which belongs to this connection.
    pub fn take(&mut self, header: &Header, data: &[u8], now: Instant) -> Result<(), End> {
        self.heed_credit(header);
        match Operation::from_number(header.operation) {
            Some(Operation::Reset) => Err(End::Told),
            Some(Operation::Response) if self.stage == Stage::Requested => {
                self.stage = Stage::Open;
                self.deadline = None;
                let answer = format!("OK {}\n", self.ports.host);
                match send(&self.socket, answer.as_bytes(), SendFlags::NOSIGNAL) {
                    Ok(length) if length == answer.len() => Ok(()),
                    _ => Err(End::Reset),
                }
            }
            _ if self.stage == Stage::Requested => Err(End::Reset),
            Some(Operation::Data) => self.take_data(data),
            Some(Operation::Shutdown) => self.take_shutdown(header.flags, now),
            Some(Operation::CreditUpdate) => Ok(()),
            Some(Operation::CreditRequest) => {
                self.owed.credit_update = true;
                Ok(())
            }
            Some(Operation::Request | Operation::Response) | None => Err(End::Reset),
        }
    }

    fn heed_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = header.forwarded;
        self.owed.credit_request &= self.credit() == 0;
    }

    /// Bytes that the guest can take now.
    fn credit(&self) -> u32 {
        let held = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(held)
    }

    fn take_data(&mut self, data: &[u8]) -> Result<(), End> {
        self.received = self.received.wrapping_add(data.len() as u32);
        // It may count on nothing that it was not told.
        if !self.guest_sends || self.received.wrapping_sub(self.told) > BUFFER {
            return Err(End::Reset);
        }
        if self.stage == Stage::Closing {
            // Nobody is there any more.
            self.passed_on(data.len());
            return Ok(());
        }
        let taken = match self.waiting.is_empty() {
            true => self.write(data)?,
            false => 0,
        };
        self.waiting.extend(data.iter().skip(taken));
        Ok(())
    }

    fn take_shutdown(&mut self, flags: u32, now: Instant) -> Result<(), End> {
        self.guest_receives &= flags & NO_RECEIVE == 0;
        self.guest_sends &= flags & NO_SEND == 0;
        if !self.guest_receives && !self.guest_sends {
            self.owed = Owed::default();
            self.stage = Stage::Draining;
            self.deadline = Some(now + PATIENCE);
        } else if !self.guest_receives {
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        self.finish_sending()
    }

    /// What follows once the host has all that the guest sent.
    fn finish_sending(&mut self) -> Result<(), End> {
        if !self.waiting.is_empty() || self.guest_sends {
            return Ok(());
        }
        if self.stage == Stage::Draining {
            return Err(End::Reset);
        }
        let _ = shutdown(&self.socket, Shutdown::Write);
        Ok(())
    }

    /// Gives the host what waits for it.
    pub fn flush(&mut self) -> Result<(), End> {
        if self.waiting.is_empty() || !self.writable {
            return Ok(());
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut outcome = Ok(());
        while outcome.is_ok() && self.writable && !waiting.is_empty() {
            let (first, _) = waiting.as_slices();
            outcome = self.write(first).map(|taken| drop(waiting.drain(..taken)));
        }
        if !waiting.is_empty() {
            self.waiting = waiting;
        }
        outcome?;
        self.finish_sending()
    }

    /// How much of it the socket took.
    fn write(&mut self, data: &[u8]) -> Result<usize, End> {
        let mut taken = 0;
        while taken < data.len() && self.writable {
            match send(&self.socket, &data[taken..], SendFlags::NOSIGNAL) {
                Ok(length) => taken += length,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // The host does not read any more; what it has sent is lost with it.
                Err(_) => return Err(End::Reset),
            }
        }
        self.passed_on(taken);
        Ok(taken)
    }

    fn passed_on(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        let known_room = BUFFER.saturating_sub(self.received.wrapping_sub(self.told));
        self.owed.credit_update |= self.forwarded != self.told && known_room < BUFFER / 2;
    }

    /// Whether [`Connection::next`] may have something.
    pub fn has_packet(&self) -> bool {
        let owed = &self.owed;
        let other = owed.request
            || owed.response
            || owed.credit_update
            || owed.credit_request
            || owed.shutdown != 0;
        other || self.may_read()
    }

    fn may_read(&self) -> bool {
        let open = self.stage == Stage::Open && self.host_sends && self.guest_receives;
        open && self.readable && self.credit() > 0
    }

    /// The next packet for the guest, its bytes in the beginning of `room`.
    pub fn next(&mut self, cid: u64, room: &mut [u8], now: Instant) -> Option<Header> {
        let take = |flag: &mut bool| std::mem::take(flag);
        if take(&mut self.owed.request) {
            return Some(self.header(cid, Operation::Request));
        }
        if take(&mut self.owed.response) {
            return Some(self.header(cid, Operation::Response));
        }
        if self.may_read()
            && let Some(length) = self.read(room, now)
        {
            let mut header = self.header(cid, Operation::Data);
            header.length = length;
            return Some(header);
        }
        let shutdown = std::mem::take(&mut self.owed.shutdown);
        if shutdown != 0 {
            let mut header = self.header(cid, Operation::Shutdown);
            header.flags = shutdown;
            return Some(header);
        }
        if take(&mut self.owed.credit_request) {
            return Some(self.header(cid, Operation::CreditRequest));
        }
        if take(&mut self.owed.credit_update) {
            return Some(self.header(cid, Operation::CreditUpdate));
        }
        None
    }

    /// Bytes of the host, as many as the guest can take.
    fn read(&mut self, room: &mut [u8], now: Instant) -> Option<u32> {
        let most = room.len().min(self.credit() as usize);
        if most == 0 {
            return None;
        }
        match recv(&self.socket, &mut room[..most], RecvFlags::empty()) {
            Ok((0, _)) => {
                self.host_ended(now);
                None
            }
            Ok((length, _)) => {
                self.sent = self.sent.wrapping_add(length as u32);
                self.owed.credit_request = self.credit() == 0;
                Some(length as u32)
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                None
            }
            Err(Errno::INTR) => None,
            Err(_) => {
                self.hung_up = true;
                self.host_ended(now);
                None
            }
        }
    }

    /// The host sends no more; if it is gone altogether, or the guest has nothing to say, that is all.
    fn host_ended(&mut self, now: Instant) {
        self.host_sends = false;
        // The end of what it sends may be seen before its event is.
        self.hung_up |= has_hung_up(&self.socket);
        self.owed.shutdown = NO_SEND;
        if self.hung_up || !self.guest_sends {
            self.owed.shutdown |= NO_RECEIVE;
            self.stage = Stage::Closing;
            self.deadline = Some(now + PATIENCE);
            self.waiting.clear();
        }
    }

    fn header(&mut self, cid: u64, operation: Operation) -> Header {
        self.told = self.forwarded;
        self.owed.credit_update = false;
        Header {
            buffer: BUFFER,
            forwarded: self.forwarded,
            ..Header::to_guest(cid, self.ports, operation)
        }
    }
}

fn has_hung_up(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let gone = PollFlags::HUP | PollFlags::ERR;
    let now = Timespec::default();
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().intersects(gone)
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
