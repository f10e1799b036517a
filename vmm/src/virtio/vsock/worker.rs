//! The thread of a vsock device: packets of the guest to sockets and back, and who comes to the machine's
//! socket.
//!
//! It waits in one place only. All that a guest or a program of the host can make it hold is bounded:
//! connections, what each of them holds, and answers that the guest does not take (while there are too
//! many of them, nothing more is taken from the guest).

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver as Commands, SyncSender};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::connection::{Connection, End};
use super::door::Door;
use super::packet::{HEADER, HOST, Header, Operation, Ports, STREAM};
use super::visitor::{Heard, Visitor};
use crate::eventfd::EventFd;
use crate::virtio::queue::{Chain, QueueFault, Virtqueue, gather, scatter, total};

/// Sockets of the host at a time, connected or not.
pub(super) const SOCKETS_MAX: usize = 256;
/// Answers that wait for the guest's buffers.
const ANSWERS_MAX: usize = 64;
/// Packets each way before the others have their turn.
const BATCH: usize = 64;
/// Bytes behind a header, at most (as Linux has it).
const DATA_MAX: usize = 64 << 10;
/// Ports of the host's that are given to those who connect to the guest.
const FIRST_PORT: u32 = 1 << 30;
/// VMADDR_PORT_ANY of Linux: nobody's.
const ANY_PORT: u32 = u32::MAX;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

const COMMANDS: u64 = 0;
const LISTENER: u64 = 1;
const QUEUE: u64 = 2;
/// Sockets' tokens begin here.
const FIRST_SOCKET: u64 = 16;

pub(super) const RECEIVE: u16 = 0;
pub(super) const TRANSMIT: u16 = 1;
pub(super) const EVENT: u16 = 2;

pub(super) enum Command {
    Activate(Vec<Virtqueue>),
    GiveBack(SyncSender<Vec<Virtqueue>>),
    /// The driver has forgotten all.
    Reset,
    Stop,
}

enum Place {
    Visitor(Visitor),
    Connection(Ports),
}

/// What a guest that goes on here hears of first.
struct News {
    /// How many buffers for events it had offered when it was told.
    told: Option<u16>,
    /// Packets wait for it to have heard.
    holds: bool,
    /// A driver that offers no buffer, or no more, is waited for no longer.
    until: Instant,
    patience: Duration,
}

pub(super) struct Worker {
    cid: u64,
    door: Door,
    commands: Commands<Command>,
    bell: EventFd,
    epoll: OwnedFd,
    /// Receive, transmit and event queue while the driver works.
    queues: [Option<Virtqueue>; 3],
    /// There is one, though the machine may be paused.
    driver: bool,
    failed: bool,
    /// By token.
    sockets: BTreeMap<u64, Place>,
    connections: BTreeMap<Ports, Connection>,
    answers: VecDeque<Header>,
    /// Whose packet the guest got last.
    last: Ports,
    next_token: u64,
    next_port: u32,
    /// The guest is to hear that its connections are gone, before it gets any packet of another.
    news: Option<News>,
    data: Box<[u8]>,
}

impl Worker {
    /// `moved`: the guest goes on here, where it has no connections; packets wait that long for it to have
    /// heard so.
    pub(super) fn new(
        cid: u32,
        listener: OwnedFd,
        moved: Option<Duration>,
        commands: Commands<Command>,
        bell: EventFd,
    ) -> Result<Self, Errno> {
        let door = Door::new(listener)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        for (fd, token, flags) in [
            (bell.as_fd(), COMMANDS, EventFlags::IN),
            (door.as_fd(), LISTENER, EventFlags::IN | EventFlags::ET),
        ] {
            epoll::add(&epoll, fd, EventData::new_u64(token), flags)?;
        }
        Ok(Self {
            cid: cid.into(),
            door,
            commands,
            bell,
            epoll,
            queues: [const { None }; 3],
            driver: false,
            failed: false,
            sockets: BTreeMap::new(),
            connections: BTreeMap::new(),
            answers: VecDeque::new(),
            last: Ports { host: 0, guest: 0 },
            next_token: FIRST_SOCKET,
            next_port: match moved {
                Some(_) => elsewhere()?,
                None => FIRST_PORT,
            },
            news: moved.map(|patience| News {
                told: None,
                holds: true,
                until: Instant::now() + patience,
                patience,
            }),
            data: vec![0; HEADER + DATA_MAX].into_boxed_slice(),
        })
    }

    pub(super) fn run(mut self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(32);
        // Commands before the programs that came after them: those find the driver that is there by now.
        while self.obey(&events) {
            events.iter().for_each(|event| self.heed(event));
            let more = self.turn();
            self.wait(&mut events, more);
        }
    }

    /// False if it is to end.
    fn obey(&mut self, events: &[epoll::Event]) -> bool {
        if (events.iter()).any(|event| event.data.u64() == COMMANDS) {
            // Before the look at them: none is missed.
            self.bell.take();
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Activate(queues) => self.activate(queues),
                Command::GiveBack(reply) => drop(reply.send(self.give_back())),
                Command::Reset => self.forget(),
                Command::Stop => return false,
            }
        }
        true
    }

    fn activate(&mut self, queues: Vec<Virtqueue>) {
        self.driver = true;
        self.failed = false;
        for queue in queues {
            self.watch(queue.kick(), QUEUE, EventFlags::IN);
            let index = usize::from(queue.index());
            if let Some(place) = self.queues.get_mut(index) {
                *place = Some(queue);
            }
        }
        let now = Instant::now();
        for connection in self.connections.values_mut() {
            connection.postpone(now);
        }
        if let Some(news) = &mut self.news {
            news.until = now + news.patience;
        }
    }

    fn give_back(&mut self) -> Vec<Virtqueue> {
        let queues: Vec<_> = self.queues.iter_mut().filter_map(Option::take).collect();
        for queue in &queues {
            let _ = epoll::delete(&self.epoll, queue.kick());
        }
        queues
    }

    /// As if the guest had just been switched on. Those who wait for it go on waiting.
    fn forget(&mut self) {
        self.driver = false;
        self.news = None;
        self.answers.clear();
        self.connections.clear();
        self.sockets
            .retain(|_, place| matches!(place, Place::Visitor(_)));
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64, flags: EventFlags) -> bool {
        let data = EventData::new_u64(token);
        let added = epoll::add(&self.epoll, fd, data, flags | EventFlags::ET);
        if let Err(error) = added {
            tracing::error!(%error, "a vsock device cannot hear one of its descriptors");
        }
        added.is_ok()
    }

    /// Does what there is to do, a bounded part of it; true if there may be more.
    fn turn(&mut self) -> bool {
        let now = Instant::now();
        self.expire(now);
        self.admit(now);
        if self.failed {
            return false;
        }
        let served = self
            .break_news(now)
            .and_then(|()| self.hear_guest(now))
            .and_then(|more| Ok(self.tell_guest(now)? || more));
        served.unwrap_or_else(|(index, fault)| {
            self.failed = true;
            if let Some(Some(queue)) = self.queues.get(usize::from(index)) {
                queue.fail(&fault);
            }
            false
        })
    }

    /// Ends what has waited too long. Nothing does while the machine is paused.
    fn expire(&mut self, now: Instant) {
        let late = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        self.sockets.retain(|_, place| match place {
            Place::Visitor(visitor) => !late(visitor.deadline()),
            Place::Connection(_) => true,
        });
        if self.queues[usize::from(RECEIVE)].is_none() {
            return;
        }
        let over: Vec<Ports> = (self.connections.values())
            .filter(|connection| late(connection.deadline()))
            .map(|connection| connection.ports)
            .collect();
        for ports in over {
            self.end(ports, End::Reset);
        }
    }

    /// Lets in who waits at the listener, as far as there is room.
    fn admit(&mut self, now: Instant) {
        while self.sockets.len() < SOCKETS_MAX
            && let Some(socket) = self.door.admit(now)
        {
            let token = self.next_token;
            self.next_token += 1;
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
            if self.watch(socket.as_fd(), token, flags) {
                let visitor = Visitor::new(socket, now);
                self.sockets.insert(token, Place::Visitor(visitor));
            }
        }
    }

    fn hear(&mut self, token: u64, flags: EventFlags) {
        let now = Instant::now();
        let is = |flag| flags.intersects(flag);
        match self.sockets.get_mut(&token) {
            None => {}
            Some(Place::Visitor(visitor)) => {
                match visitor.hear(is(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)) {
                    Heard::Waits => {}
                    Heard::Gone => drop(self.sockets.remove(&token)),
                    Heard::Connect(port) => self.connect(token, port, now),
                }
            }
            Some(Place::Connection(ports)) => {
                let ports = *ports;
                let Some(connection) = self.connections.get_mut(&ports) else {
                    return;
                };
                let hung_up = is(EventFlags::HUP | EventFlags::ERR);
                let readable = is(EventFlags::IN | EventFlags::RDHUP);
                connection.ready(readable, is(EventFlags::OUT), hung_up, now);
                if let Err(end) = connection.flush() {
                    self.end(ports, end);
                }
            }
        }
    }

    /// A visitor wants a port of the guest's. Without a driver there is nobody.
    fn connect(&mut self, token: u64, port: u32, now: Instant) {
        let Some(Place::Visitor(visitor)) = self.sockets.remove(&token) else {
            return;
        };
        if !self.driver || self.failed {
            return;
        }
        let ports = loop {
            let ports = Ports {
                host: self.next_port,
                guest: port,
            };
            self.next_port = match self.next_port + 1 {
                ANY_PORT => FIRST_PORT,
                next => next,
            };
            // There are fewer connections than ports.
            if !self.connections.contains_key(&ports) {
                break ports;
            }
        };
        let connection = Connection::from_host(ports, visitor.into_socket(), now);
        self.connections.insert(ports, connection);
        self.sockets.insert(token, Place::Connection(ports));
    }

    /// Ends a connection; its socket is closed.
    fn end(&mut self, ports: Ports, end: End) {
        let ended = self.connections.remove(&ports);
        self.sockets
            .retain(|_, place| !matches!(place, Place::Connection(of) if *of == ports));
        if ended.is_some() && end == End::Reset {
            self.answer(ports);
        }
    }

    fn answer(&mut self, ports: Ports) {
        let reset = Header::to_guest(self.cid, ports, Operation::Reset);
        self.answers.push_back(reset);
    }

    /// Takes packets from the guest; true if there may be more.
    fn hear_guest(&mut self, now: Instant) -> Result<bool, (u16, QueueFault)> {
        let Some(mut queue) = self.queues[usize::from(TRANSMIT)].take() else {
            return Ok(false);
        };
        let outcome = self.packets_in(&mut queue, now);
        self.queues[usize::from(TRANSMIT)] = Some(queue);
        outcome.map_err(|fault| (TRANSMIT, fault))
    }

    fn packets_in(&mut self, queue: &mut Virtqueue, now: Instant) -> Result<bool, QueueFault> {
        queue.disable_kicks()?;
        for _ in 0..BATCH {
            if self.answers.len() >= ANSWERS_MAX {
                // The receive queue's next buffers bring us back.
                queue.notify()?;
                return Ok(false);
            }
            let Some(chain) = queue.pop()? else {
                queue.notify()?;
                return queue.enable_kicks();
            };
            self.packet_in(queue, &chain, now)?;
            queue.push(chain.head, 0)?;
        }
        queue.notify()?;
        Ok(true)
    }

    fn packet_in(
        &mut self,
        queue: &Virtqueue,
        chain: &Chain,
        now: Instant,
    ) -> Result<(), QueueFault> {
        let length = total(chain.readable());
        if length < HEADER as u64 || !chain.writable().is_empty() {
            return Err(QueueFault::Malformed {
                head: chain.head,
                what: "packet of a socket",
            });
        }
        let whole = length.min(self.data.len() as u64) as usize;
        let mut bytes = std::mem::take(&mut self.data);
        let fits = gather(queue.memory(), chain.readable(), &mut bytes[..whole]);
        if let (true, Some((header, data))) = (fits, bytes[..whole].split_first_chunk::<HEADER>()) {
            self.sort_in(&Header::from_bytes(header), data, now);
        }
        self.data = bytes;
        Ok(())
    }

    /// A packet of the guest, with what is behind its header.
    fn sort_in(&mut self, header: &Header, data: &[u8], now: Instant) {
        let ports = header.ports();
        // Never what pretends to come from elsewhere (§5.10.6.4.1).
        if header.source_cid != self.cid || header.destination_cid != HOST {
            return;
        }
        let reset = header.operation == Operation::Reset as u16;
        let data = data.get(..header.length as usize);
        let (Some(data), STREAM) = (data, header.kind) else {
            match self.connections.contains_key(&ports) {
                true => self.end(ports, End::Reset),
                false if reset => {}
                false => self.answer(ports),
            }
            return;
        };
        if let Some(connection) = self.connections.get_mut(&ports) {
            if let Err(end) = connection.take(header, data, now) {
                self.end(ports, end);
            }
        } else if header.operation == Operation::Request as u16 {
            self.accept(header, now);
        } else if !reset {
            self.answer(ports);
        }
    }

    /// The guest wants a port of the host's. Who came for it before the guest asked is found, also if
    /// nobody has heard him yet.
    fn accept(&mut self, request: &Header, now: Instant) {
        let ports = request.ports();
        if self.who_waits_for(ports.host).is_none() {
            self.hear_all(now);
        }
        loop {
            let Some(token) = self.who_waits_for(ports.host) else {
                return self.answer(ports);
            };
            let place = self.sockets.insert(token, Place::Connection(ports));
            if let Some(Place::Visitor(visitor)) = place
                && let Some(socket) = visitor.accept(ports.guest)
            {
                let connection = Connection::from_guest(request, socket);
                self.connections.insert(ports, connection);
                return;
            }
            self.sockets.remove(&token);
        }
    }

    fn who_waits_for(&self, port: u32) -> Option<u64> {
        let waits = |place: &Place| match place {
            Place::Visitor(visitor) => visitor.accepts() == Some(port),
            Place::Connection(_) => false,
        };
        let mut sockets = self.sockets.iter();
        sockets
            .find(|(_, place)| waits(place))
            .map(|(token, _)| *token)
    }

    /// Lets in who stands at the door, and hears all who have not said what they want.
    fn hear_all(&mut self, now: Instant) {
        self.door.knock();
        self.admit(now);
        let silent = |place: &Place| match place {
            Place::Visitor(visitor) => visitor.accepts().is_none(),
            Place::Connection(_) => false,
        };
        let sockets = self.sockets.iter();
        let silent: Vec<u64> = (sockets.filter(|(_, place)| silent(place)))
            .map(|(token, _)| *token)
            .collect();
        for token in silent {
            self.hear(token, EventFlags::empty());
        }
    }

    /// Gives the guest what it is to get; true if there may be more.
    fn tell_guest(&mut self, now: Instant) -> Result<bool, (u16, QueueFault)> {
        if self.news.as_ref().is_some_and(|news| news.holds) {
            return Ok(false);
        }
        let Some(mut queue) = self.queues[usize::from(RECEIVE)].take() else {
            return Ok(false);
        };
        let outcome = self.packets_out(&mut queue, now);
        self.queues[usize::from(RECEIVE)] = Some(queue);
        outcome.map_err(|fault| (RECEIVE, fault))
    }

    fn packets_out(&mut self, queue: &mut Virtqueue, now: Instant) -> Result<bool, QueueFault> {
        queue.disable_kicks()?;
        let blocked = self.answers.len() >= ANSWERS_MAX;
        let mut more = true;
        for _ in 0..BATCH {
            if self.answers.is_empty() && self.next_with_packet().is_none() {
                more = false;
                break;
            }
            let Some(chain) = queue.pop()? else {
                more = queue.enable_kicks()?;
                break;
            };
            let room = total(chain.writable()) as usize;
            if room < HEADER || !chain.readable().is_empty() {
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what: "buffer for a packet of a socket",
                });
            }
            let Some(length) = self.packet_out(room, now) else {
                queue.unpop();
                more = false;
                break;
            };
            scatter(queue.memory(), chain.writable(), &self.data[..length]);
            queue.push(chain.head, length as u32)?;
        }
        queue.notify()?;
        // What the guest sends is taken again.
        Ok(more || (blocked && self.answers.len() < ANSWERS_MAX))
    }

    /// Puts the next packet into `data`: its length.
    fn packet_out(&mut self, room: usize, now: Instant) -> Option<usize> {
        let (head, rest) = self.data.split_at_mut(HEADER);
        if let Some(answer) = self.answers.pop_front() {
            head.copy_from_slice(&answer.bytes());
            return Some(HEADER);
        }
        while let Some(ports) = next_after(&self.connections, self.last) {
            self.last = ports;
            let connection = self.connections.get_mut(&ports)?;
            let space = (room - HEADER).min(rest.len());
            if let Some(header) = connection.next(self.cid, &mut rest[..space], now) {
                head.copy_from_slice(&header.bytes());
                return Some(HEADER + header.length as usize);
            }
            if space == 0 {
                // A buffer for headers only; the driver has others.
                return None;
            }
        }
        None
    }

    fn next_with_packet(&self) -> Option<Ports> {
        next_after(&self.connections, self.last)
    }

    /// Tells a guest that goes on here that its connections are gone, and looks whether it has heard.
    ///
    /// Packets of new connections wait until it has: it looks at the two queues in no particular order,
    /// and would forget a connection that overtook the event with the old ones. That it has heard is
    /// seen from the buffer that it offers in place of the event's (Linux: once it has acted on it).
    fn break_news(&mut self, now: Instant) -> Result<(), (u16, QueueFault)> {
        let Some(news) = &mut self.news else {
            return Ok(());
        };
        news.holds &= now < news.until || self.queues[usize::from(RECEIVE)].is_none();
        let Some(queue) = &mut self.queues[usize::from(EVENT)] else {
            return Ok(());
        };
        let mut over = || {
            if news.told.is_none() {
                news.told = tell(queue)?;
            }
            match news.told {
                // Asked for at once: it may be the next that happens.
                Some(told) => Ok(queue.enable_kicks_beyond(told)? || !news.holds),
                None => Ok(false),
            }
        };
        if over().map_err(|fault| (EVENT, fault))? {
            self.news = None;
        }
        Ok(())
    }

    fn wait(&self, events: &mut Vec<epoll::Event>, more: bool) {
        let active = self.queues[usize::from(RECEIVE)].is_some();
        let connections = (self.connections.values())
            .filter(|_| active)
            .filter_map(Connection::deadline);
        let visitors = self.sockets.values().filter_map(|place| match place {
            Place::Visitor(visitor) => visitor.deadline(),
            Place::Connection(_) => None,
        });
        let now = Instant::now();
        // Also where what this turn has ended makes room.
        let room = self.sockets.len() < SOCKETS_MAX;
        let admission = self.door.due(now).filter(|_| room);
        let news = (self.news.as_ref())
            .filter(|news| active && news.holds)
            .map(|news| news.until);
        let timeout = match more {
            true => Some(Duration::ZERO),
            false => (connections.chain(visitors).chain(admission).chain(news))
                .min()
                .map(|until| until.saturating_duration_since(now)),
        };
        let timeout = timeout.map(|wait| Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        events.clear();
        let buffer = rustix::buffer::spare_capacity(events);
        // A signal's EINTR is a turn for nothing.
        let _ = epoll::wait(&self.epoll, buffer, timeout.as_ref());
    }

    fn heed(&mut self, event: &epoll::Event) {
        match event.data.u64() {
            COMMANDS | QUEUE => {}
            LISTENER => self.door.knock(),
            token => self.hear(token, event.flags),
        }
    }
}

/// Where ports begin for a guest that goes on here. What it still says of its old connections, which had
/// the first ones, is not to be taken for another's.
fn elsewhere() -> Result<u32, Errno> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    // Up to twice the first one: as many are left behind it.
    Ok(FIRST_PORT + u32::from_le_bytes(bytes) % FIRST_PORT)
}

/// Hands the event to the driver: how many buffers it had offered for such by then; none if there was
/// none left.
fn tell(queue: &mut Virtqueue) -> Result<Option<u16>, QueueFault> {
    let chain = match queue.pop()? {
        Some(chain) => chain,
        None if queue.enable_kicks()? => match queue.pop()? {
            Some(chain) => chain,
            None => return Ok(None),
        },
        None => return Ok(None),
    };
    if total(chain.writable()) < TRANSPORT_RESET.len() as u64 {
        return Err(QueueFault::Malformed {
            head: chain.head,
            what: "buffer for an event",
        });
    }
    // Before it can have heard of it.
    let offered = queue.offered()?;
    let written = scatter(queue.memory(), chain.writable(), &TRANSPORT_RESET);
    queue.push(chain.head, written as u32)?;
    queue.notify()?;
    Ok(Some(offered))
}

/// The next connection that has a packet, after `last` and round again.
fn next_after(connections: &BTreeMap<Ports, Connection>, last: Ports) -> Option<Ports> {
    let after = connections.range((Bound::Excluded(last), Bound::Unbounded));
    let before = connections.range(..=last);
    (after.chain(before))
        .find(|(_, connection)| connection.has_packet())
        .map(|(ports, _)| *ports)
}
