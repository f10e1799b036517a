//! The thread of one pair of queues. The first pair's serves the control queue too.
//!
//! It waits in one place only, for kicks, packets, commands and the rate limits. Nothing is ever in
//! flight between two turns, so a command finds it at rest.

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as Commands, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use super::announce::Announcement;
use super::backend::NetBackend;
use super::control::{COMMAND_MAX, Change, Control, F_GUEST_ANNOUNCE, F_MRG_RXBUF};
use super::frame::Frame;
use super::limit::Limiter;
use super::receive::{Receiver, Turn};
use super::transmit::Transmitter;
use super::vhost::{Vhost, VhostError};
use crate::eventfd::EventFd;
use crate::virtio::bucket::TokenBucket;
use crate::virtio::polling::Polling;
use crate::virtio::queue::{Chain, QueueFault, Virtqueue, gather, scatter, total};

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Changes of pairs and offloads a second, and at once: each takes a lock that all networks of the host
/// share (RTNL). A driver makes a few of them in its life.
const SETTINGS_A_SECOND: u64 = 100;
const SETTINGS_BURST: u64 = 64;

const COMMANDS: u64 = 0;
const BACKEND: u64 = 1;
const QUEUE: u64 = 2;
const CONTROL: u64 = 3;
const KERNEL: u64 = 4;

/// What the device, or the first pair's thread, asks of a pair's thread.
#[expect(
    clippy::large_enum_variant,
    reason = "the large one is sent once in a driver's life"
)]
pub(super) enum Command {
    Activate {
        receive: Option<Virtqueue>,
        transmit: Option<Virtqueue>,
        /// The first pair's only.
        control: Option<Virtqueue>,
        features: u64,
    },
    /// Whether the pair is in use, from now on; answered once it is so.
    Enable(bool, SyncSender<()>),
    /// Whether the pair's rings are served here although the kernel would; answered once it is so.
    Here(bool, SyncSender<()>),
    /// What the driver can receive has changed.
    Offloads,
    /// The first pair's only: it is to be said where the device is.
    Announce(Announcement),
    GiveBack(SyncSender<Vec<Virtqueue>>),
    Stop,
}

/// How a thread is spoken to.
pub(super) struct Link {
    pub(super) commands: Sender<Command>,
    pub(super) bell: EventFd,
}

impl Link {
    /// False if the thread has ended.
    pub(super) fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        self.bell.signal();
        sent
    }
}

/// What all threads of a device share.
pub(super) struct Shared {
    control: Mutex<Arc<Control>>,
    pub(super) incoming: Limiter,
    pub(super) outgoing: Limiter,
    /// The driver is asked to say where its addresses are, and has not answered (VIRTIO_NET_S_ANNOUNCE).
    asks: AtomicBool,
}

impl Shared {
    pub(super) fn new(control: Control, incoming: Limiter, outgoing: Limiter) -> Self {
        Self {
            control: Mutex::new(Arc::new(control)),
            incoming,
            outgoing,
            asks: AtomicBool::new(false),
        }
    }

    pub(super) fn asks(&self) -> bool {
        self.asks.load(Ordering::Acquire)
    }

    pub(super) fn ask(&self, asks: bool) {
        self.asks.store(asks, Ordering::Release);
    }

    pub(super) fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_control(&self, control: Control) {
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(control);
    }
}

/// One pair.
pub(super) struct Worker {
    index: u16,
    backend: Box<dyn NetBackend>,
    /// Moves the packets in our place.
    kernel: Option<Vhost>,
    /// Not for now: what it writes is in no log.
    here: bool,
    /// How often it would not. A guest can bring that about as often as it likes: every power of two is
    /// logged.
    refusals: u32,
    shared: Arc<Shared>,
    commands: Commands<Command>,
    bell: EventFd,
    /// The other pairs, of the first one.
    others: Vec<Link>,
    epoll: OwnedFd,
    frame: Frame,
    features: u64,
    enabled: bool,
    failed: bool,
    receiver: Option<Receiver>,
    transmitter: Option<Transmitter>,
    control: Option<Virtqueue>,
    /// It has what a driver gave it: the machine is not at rest.
    active: bool,
    /// Under way, of the first pair; while the machine is at rest its guest may go on elsewhere, and nothing is said.
    announcement: Option<Announcement>,
    /// There may be a command in it.
    kicked: bool,
    /// How often the driver may change what the kernel has to be told.
    settings: TokenBucket,
    /// What the limits kept from being done in the last turn.
    limited: Limited,
    polling: Polling,
}

/// Who waits for the clock. Kicks are off meanwhile, so that nothing else might wake the thread.
#[derive(Debug, Clone, Copy, Default)]
struct Limited {
    incoming: bool,
    outgoing: bool,
    settings: bool,
}

impl Worker {
    pub(super) fn new(
        index: u16,
        backend: Box<dyn NetBackend>,
        kernel: Option<Vhost>,
        shared: Arc<Shared>,
        commands: Commands<Command>,
        bell: EventFd,
    ) -> Result<Self, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            bell.as_fd(),
            EventData::new_u64(COMMANDS),
            EventFlags::IN,
        )?;
        for signal in kernel.iter().flat_map(Vhost::signals) {
            epoll::add(&epoll, signal, EventData::new_u64(KERNEL), EventFlags::IN)?;
        }
        let worker = Self {
            index,
            backend,
            kernel,
            here: false,
            refusals: 0,
            shared,
            commands,
            bell,
            others: Vec::new(),
            epoll,
            frame: Frame::default(),
            features: 0,
            enabled: false,
            failed: false,
            receiver: None,
            transmitter: None,
            control: None,
            active: false,
            announcement: None,
            kicked: false,
            settings: TokenBucket::new(SETTINGS_A_SECOND, SETTINGS_BURST, Instant::now()),
            limited: Limited::default(),
            polling: Polling::default(),
        };
        worker.listen_to_backend()?;
        Ok(worker)
    }

    fn listen_to_backend(&self) -> Result<(), Errno> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        let data = EventData::new_u64(BACKEND);
        epoll::add(&self.epoll, self.backend.as_fd(), data, flags)
    }

    /// Makes it the first pair's: it speaks to the others.
    pub(super) fn lead(&mut self, others: Vec<Link>) {
        self.others = others;
    }

    pub(super) fn run(mut self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(8);
        loop {
            while let Ok(command) = self.commands.try_recv() {
                if matches!(command, Command::Stop) {
                    return;
                }
                self.obey(command);
            }
            let more = self.turn();
            self.wait(&mut events, more);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Activate {
                receive,
                transmit,
                control,
                features,
            } => {
                self.features = features;
                self.active = true;
                self.failed = false;
                self.kicked = true;
                if let Some(control) = &control {
                    self.listen(control.kick(), CONTROL);
                }
                self.control = control;
                self.take_rings(receive, transmit);
                self.apply_offloads();
                let enabled = self.index < self.shared.control().pairs;
                self.enable(enabled);
            }
            Command::Enable(enabled, done) => {
                self.enable(enabled);
                let _ = done.send(());
            }
            Command::Here(here, done) => {
                self.serve_here(here);
                let _ = done.send(());
            }
            Command::Offloads => self.apply_offloads(),
            Command::Announce(announcement) => self.announcement = Some(announcement),
            Command::GiveBack(reply) => {
                let _ = reply.send(self.give_back());
            }
            Command::Stop => {}
        }
    }

    /// Gives the rings to the kernel, or serves them here.
    fn take_rings(&mut self, receive: Option<Virtqueue>, transmit: Option<Virtqueue>) {
        let kernel = self.kernel.as_mut().filter(|_| !self.here);
        match (kernel, receive, transmit) {
            (Some(kernel), Some(receive), Some(transmit)) => {
                match kernel.start([receive, transmit], self.features) {
                    Ok(()) => {
                        // It would wake us for each packet, of which we see none.
                        let _ = epoll::delete(&self.epoll, self.backend.as_fd());
                    }
                    Err((rings, error)) => {
                        self.refused(&error);
                        self.serve_rings(rings.map(Some));
                    }
                }
            }
            (_, receive, transmit) => self.serve_rings([receive, transmit]),
        }
    }

    fn serve_rings(&mut self, [receive, transmit]: [Option<Virtqueue>; 2]) {
        for queue in [&receive, &transmit].into_iter().flatten() {
            self.listen(queue.kick(), QUEUE);
        }
        let mergeable = self.features & F_MRG_RXBUF != 0;
        self.receiver = receive.map(|queue| Receiver::new(queue, mergeable));
        self.transmitter = transmit.map(Transmitter::new);
        let offloads = self.shared.control().offloads(self.features);
        if let Some(receiver) = &mut self.receiver {
            receiver.expect_segments(offloads.tso4 || offloads.tso6);
        }
    }

    /// Takes the rings back from the kernel, if it has them.
    fn rings_of_kernel(&mut self) -> Option<[Virtqueue; 2]> {
        let rings = self.kernel.as_mut()?.stop()?;
        if let Err(error) = self.listen_to_backend() {
            tracing::error!(%error, "a network device cannot hear its tap");
        }
        Some(rings)
    }

    /// Serves the rings here although the kernel would, or has it go on where they are.
    fn serve_here(&mut self, here: bool) {
        self.here = here;
        if !self.active || self.failed {
            return;
        }
        if here {
            if let Some(rings) = self.rings_of_kernel() {
                self.serve_rings(rings.map(Some));
            }
        } else if self.kernel.is_some() {
            let [receive, transmit] = self.own_rings();
            self.take_rings(receive, transmit);
            self.join(self.enabled);
        }
        // Of what came before nobody tells.
        if let Some(receiver) = &mut self.receiver {
            receiver.readable = true;
        }
    }

    /// Takes the rings that are served here, of which no kick is heard any more.
    fn own_rings(&mut self) -> [Option<Virtqueue>; 2] {
        let receive = self.receiver.take().map(Receiver::give_back);
        let transmit = self.transmitter.take().map(Transmitter::give_back);
        for queue in [&receive, &transmit].into_iter().flatten() {
            let _ = epoll::delete(&self.epoll, queue.kick());
        }
        [receive, transmit]
    }

    /// Has the kernel move packets, or no more. If it does not want to, this thread does.
    fn join(&mut self, joined: bool) {
        let Some(kernel) = &mut self.kernel else {
            return;
        };
        let tap = joined.then(|| self.backend.as_fd());
        if let Err(error) = kernel.join(tap) {
            self.refused(&error);
            if let Some(rings) = self.rings_of_kernel() {
                self.serve_rings(rings.map(Some));
            }
        }
    }

    fn refused(&mut self, error: &VhostError) {
        self.refusals = self.refusals.wrapping_add(1);
        if self.refusals.is_power_of_two() {
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            let times = self.refusals;
            tracing::warn!(%error, cause, times, "this process moves the packets");
        }
    }

    /// Edge-triggered: each kick wakes once, and the count need not be read.
    fn listen(&self, kick: BorrowedFd<'_>, source: u64) {
        let flags = EventFlags::IN | EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, kick, EventData::new_u64(source), flags) {
            tracing::error!(%error, "a network device cannot hear its queue");
        }
    }

    fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        // The kernel lets go of the tap before its queue is off, and takes it once that is on.
        if !enabled {
            self.join(false);
        }
        if let Err(error) = self.backend.set_enabled(enabled) {
            tracing::warn!(%error, enabled, "a queue of a tap could not be switched");
        }
        if enabled {
            self.join(true);
        }
        if let Some(receiver) = &mut self.receiver {
            receiver.readable = true;
            if !enabled {
                receiver.put_back();
            }
        }
    }

    fn apply_offloads(&mut self) {
        let offloads = self.shared.control().offloads(self.features);
        if let Some(receiver) = &mut self.receiver {
            receiver.expect_segments(offloads.tso4 || offloads.tso6);
        }
        if self.index == 0
            && let Err(error) = self.backend.set_offloads(offloads)
        {
            tracing::warn!(%error, ?offloads, "the tap's offloads could not be set");
        }
    }

    fn give_back(&mut self) -> Vec<Virtqueue> {
        self.active = false;
        let mut queues: Vec<_> = self.own_rings().into_iter().flatten().collect();
        if let Some(control) = self.control.take() {
            let _ = epoll::delete(&self.epoll, control.kick());
            queues.push(control);
        }
        queues.extend(self.rings_of_kernel().into_iter().flatten());
        queues
    }

    /// How long until it is to be said where the device is.
    fn announces_in(&self) -> Option<Duration> {
        let announcement = self.announcement.as_ref().filter(|_| self.active)?;
        Some(announcement.wait(Instant::now()))
    }

    /// Says where the device is, and asks its driver to, if it is time. By the first pair's tap, whoever moves its
    /// packets: to the host's kernel what is written there comes from the guest.
    fn announce(&mut self) {
        if self.announces_in() != Some(Duration::ZERO) {
            return;
        }
        let mac = self.shared.control().mac;
        if let Some(announcement) = &mut self.announcement {
            for frame in announcement.frames(mac) {
                if let Err(error) = self.backend.send_bytes(&frame) {
                    tracing::debug!(%error, "it was not said where a network device is");
                }
            }
            if !announcement.was_made(Instant::now()) {
                self.announcement = None;
            }
        }
        if let Some(control) = &self.control
            && self.features & F_GUEST_ANNOUNCE != 0
        {
            self.shared.ask(true);
            control.config_changed();
        }
    }

    /// Does what there is to do, a bounded part of it; true if there may be more.
    fn turn(&mut self) -> bool {
        self.announce();
        self.limited = Limited::default();
        if self.failed {
            return false;
        }
        let mut more = false;
        if self.kicked {
            let settings = self.serve(Self::serve_control);
            self.kicked = settings != Turn::Idle;
            self.limited.settings = settings == Turn::Limited;
            more = settings == Turn::More;
        }
        if self.enabled {
            let (incoming, outgoing) = (self.serve(Self::receive), self.serve(Self::transmit));
            self.limited.incoming = incoming == Turn::Limited;
            self.limited.outgoing = outgoing == Turn::Limited;
            more |= incoming == Turn::More || outgoing == Turn::More;
        }
        more && !self.failed
    }

    /// A queue that lies ends the service of its pair until the driver's reset.
    fn serve(&mut self, what: impl Fn(&mut Self) -> Result<Turn, (u16, QueueFault)>) -> Turn {
        match what(self) {
            Ok(turn) => turn,
            Err((index, fault)) => {
                self.failed = true;
                let queues = [
                    self.receiver.as_ref().map(Receiver::queue),
                    self.transmitter.as_ref().map(Transmitter::queue),
                    self.control.as_ref(),
                ];
                let mut queues = queues.into_iter().flatten();
                if let Some(queue) = queues.find(|queue| queue.index() == index) {
                    queue.fail(&fault);
                }
                Turn::Idle
            }
        }
    }

    fn receive(&mut self) -> Result<Turn, (u16, QueueFault)> {
        let Some(receiver) = &mut self.receiver else {
            return Ok(Turn::Idle);
        };
        let control = self.shared.control();
        let (backend, limiter) = (&mut *self.backend, &self.shared.incoming);
        let turn = receiver.turn(backend, &mut self.frame, &control, limiter);
        turn.map_err(|fault| (receiver.queue().index(), fault))
    }

    fn transmit(&mut self) -> Result<Turn, (u16, QueueFault)> {
        let Some(transmitter) = &mut self.transmitter else {
            return Ok(Turn::Idle);
        };
        let limiter = &self.shared.outgoing;
        let turn = transmitter.turn(&mut *self.backend, &mut self.frame, limiter);
        turn.map_err(|fault| (transmitter.queue().index(), fault))
    }

    fn serve_control(&mut self) -> Result<Turn, (u16, QueueFault)> {
        let Some(mut queue) = self.control.take() else {
            return Ok(Turn::Idle);
        };
        let index = queue.index();
        let turn = self.commands_in(&mut queue);
        self.control = Some(queue);
        turn.map_err(|fault| (index, fault))
    }

    fn commands_in(&mut self, queue: &mut Virtqueue) -> Result<Turn, QueueFault> {
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else { break };
            if chain.writable().is_empty() {
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what: "command: it has no place for the answer",
                });
            }
            let Some(answer) = self.command(queue, &chain) else {
                queue.unpop();
                queue.notify()?;
                return Ok(Turn::Limited);
            };
            scatter(queue.memory(), chain.writable(), &[answer]);
            queue.push(chain.head, 1)?;
        }
        queue.notify()?;
        let more = queue.enable_kicks()?;
        Ok(if more { Turn::More } else { Turn::Idle })
    }

    /// Its answer; none if it has to wait for its turn.
    fn command(&mut self, queue: &Virtqueue, chain: &Chain) -> Option<u8> {
        let length = total(chain.readable());
        if length > COMMAND_MAX {
            return Some(ERROR);
        }
        let mut bytes = vec![0; length as usize];
        if !gather(queue.memory(), chain.readable(), &mut bytes) {
            return Some(ERROR);
        }
        let before = self.shared.control();
        let mut control = Control::clone(&before);
        let most = self.others.len() as u16 + 1;
        let Ok(change) = control.command(&bytes, self.features, most) else {
            return Some(ERROR);
        };
        let unchanged = match change {
            Change::Filter => true,
            Change::Announced => {
                self.shared.ask(false);
                true
            }
            Change::Offloads => control.offloads(self.features) == before.offloads(self.features),
            Change::Pairs => control.pairs == before.pairs,
        };
        if !unchanged {
            let now = Instant::now();
            if !self.settings.wait(now).is_zero() {
                return None;
            }
            self.settings.take(1, now);
        }
        self.shared.set_control(control);
        if !unchanged {
            self.carry_out(change);
        }
        Some(OK)
    }

    fn carry_out(&mut self, change: Change) {
        match change {
            Change::Filter | Change::Announced => {}
            Change::Offloads => {
                self.apply_offloads();
                for other in &self.others {
                    other.send(Command::Offloads);
                }
            }
            Change::Pairs => {
                let pairs = usize::from(self.shared.control().pairs);
                for (other, link) in self.others.iter().enumerate() {
                    let (done, wait) = sync_channel(1);
                    // They wait for nobody, so that this is over at once.
                    if link.send(Command::Enable(other + 1 < pairs, done)) {
                        let _ = wait.recv();
                    }
                }
            }
        }
    }

    /// Looks for packets of the driver, and for all else that this thread waits for, for a moment.
    /// True if there is something; `events` holds what came.
    fn look_out(&mut self, events: &mut Vec<epoll::Event>) -> bool {
        let Self {
            polling,
            transmitter,
            epoll,
            ..
        } = self;
        polling.look(|| {
            if transmitter.as_ref().is_some_and(Transmitter::has_more) {
                return true;
            }
            let buffer = rustix::buffer::spare_capacity(events);
            let _ = epoll::wait(&*epoll, buffer, Some(&timespec(Duration::ZERO)));
            !events.is_empty()
        })
    }

    /// True if there is a packet already, for which no kick will come.
    fn ask_for_kicks(&mut self) -> bool {
        self.serve(|worker| match &mut worker.transmitter {
            Some(transmitter) => match transmitter.listen() {
                Ok(true) => Ok(Turn::More),
                Ok(false) => Ok(Turn::Idle),
                Err(fault) => Err((transmitter.queue().index(), fault)),
            },
            None => Ok(Turn::Idle),
        }) == Turn::More
    }

    /// Waits for whatever comes first; only looks at what has come if there is `more` to do.
    fn wait(&mut self, events: &mut Vec<epoll::Event>, more: bool) {
        let settings =
            (self.limited.settings && !self.failed).then(|| self.settings.wait(Instant::now()));
        let waits = [
            (self.limited.incoming, &self.shared.incoming),
            (self.limited.outgoing, &self.shared.outgoing),
        ];
        // A limit that has let go since the turn is a wait of nothing, not no wait.
        let mut timeout = (waits.into_iter())
            .filter(|(limited, _)| *limited && !self.failed)
            .map(|(_, limiter)| limiter.wait())
            .chain(settings)
            .chain(self.announces_in())
            .chain(more.then_some(Duration::ZERO))
            .min()
            .map(timespec);
        events.clear();
        let at_once = Some(timespec(Duration::ZERO));
        let drained = self
            .transmitter
            .as_ref()
            .is_some_and(Transmitter::is_drained);
        if drained && self.enabled && !self.failed && timeout != at_once {
            // A limit says itself when it is worth looking again.
            let looked = timeout.is_none() && self.look_out(events);
            if looked || self.ask_for_kicks() {
                timeout = at_once;
            }
        }
        if events.is_empty() {
            let buffer = rustix::buffer::spare_capacity(events);
            // A signal's EINTR is a turn for nothing.
            let _ = epoll::wait(&self.epoll, buffer, timeout.as_ref());
        }
        self.polling.found();
        for event in events.iter() {
            match event.data.u64() {
                COMMANDS => drop(self.bell.take()),
                BACKEND => {
                    if let Some(receiver) = &mut self.receiver {
                        receiver.readable = true;
                    }
                }
                CONTROL => self.kicked = true,
                KERNEL => {
                    if let Some(kernel) = &mut self.kernel {
                        kernel.serve();
                    }
                }
                _ => {}
            }
        }
    }
}

fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: wait.as_secs() as i64,
        tv_nsec: i64::from(wait.subsec_nanos()),
    }
}
