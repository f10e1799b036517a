//! Work on the queues of all ports, on the machine's reactor.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::control::{self, Event};
use super::port::{Port, Served, Target};
use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};
use crate::virtio::queue::{QueueFault, Virtqueue, gather, scatter, total};

/// The control queues: to the driver, and from it.
const TO_DRIVER: usize = 2;
const FROM_DRIVER: usize = 3;
/// Messages that may wait for the driver; while there are more, the driver's own are not read.
const MESSAGES_MAX: usize = 256;

/// Tags: what is ready, and which queue or port.
const KICK: u32 = 0;
const INPUT: u32 = 1 << 16;
const OUTPUT: u32 = 2 << 16;
const INDEX: u32 = 0xffff;

/// The queues of a port: to the guest, from the guest.
pub(super) fn queues_of(port: usize) -> (usize, usize) {
    if port == 0 {
        (0, 1)
    } else {
        (2 * port + 2, 2 * port + 3)
    }
}

/// The port that a queue belongs to; the control queues belong to none.
fn port_of(queue: usize) -> Option<usize> {
    match queue {
        0 | 1 => Some(0),
        TO_DRIVER | FROM_DRIVER => None,
        _ => Some(queue / 2 - 1),
    }
}

pub(super) struct Ports {
    pub(super) reactor: Reactor,
    work: Mutex<Work>,
}

pub(super) struct Work {
    pub(super) ports: Vec<Port>,
    pub(super) messages: VecDeque<Vec<u8>>,
    pub(super) multiport: bool,
    /// By index; empty unless active.
    queues: Vec<Option<Virtqueue>>,
    kicks: Vec<Registration>,
    failed: bool,
}

impl Ports {
    pub(super) fn new(reactor: &Reactor, ports: Vec<Port>) -> Self {
        let work = Work {
            ports,
            messages: VecDeque::new(),
            multiport: false,
            queues: Vec::new(),
            kicks: Vec::new(),
            failed: false,
        };
        Self {
            reactor: reactor.clone(),
            work: Mutex::new(work),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens to queues and ports and looks at all of them once.
    pub(super) fn start(
        self: &Arc<Self>,
        queues: Vec<Virtqueue>,
        multiport: bool,
    ) -> std::io::Result<()> {
        let mut work = self.lock();
        work.multiport = multiport;
        work.failed = false;
        for queue in queues {
            let index = usize::from(queue.index());
            let subscriber = Arc::clone(self) as Arc<dyn Subscriber>;
            let tag = KICK | u32::from(queue.index());
            work.kicks.push(self.reactor.register(
                queue.kick(),
                Interest::READ,
                subscriber,
                tag,
            )?);
            if work.queues.len() <= index {
                work.queues.resize_with(index + 1, || None);
            }
            work.queues[index] = Some(queue);
        }
        for (index, port) in work.ports.iter_mut().enumerate() {
            let subscriber = || Arc::clone(self) as Arc<dyn Subscriber>;
            if let Some(fd) = &port.input {
                let tag = INPUT | index as u32;
                let registered =
                    self.reactor
                        .register(fd.as_fd(), Interest::NONE, subscriber(), tag);
                port.input_ready = Some(registered?);
            }
            if let Target::Stream(fd) = &port.target {
                let tag = OUTPUT | index as u32;
                let registered =
                    self.reactor
                        .register(fd.as_fd(), Interest::NONE, subscriber(), tag);
                port.output_ready = Some(registered?);
            }
        }
        work.attend(|work| {
            for queue in 0..work.queues.len() {
                work.serve(queue)?;
            }
            Ok(())
        });
        Ok(())
    }

    /// Gives the queues back; whoever is in the middle of a call is waited for.
    pub(super) fn stop(&self) -> Vec<Virtqueue> {
        let mut work = self.lock();
        work.kicks.clear();
        for port in &mut work.ports {
            port.input_ready = None;
            port.output_ready = None;
        }
        work.queues.drain(..).flatten().collect()
    }
}

impl Subscriber for Ports {
    fn ready(&self, tag: u32, ready: Ready) {
        let mut work = self.lock();
        let index = (tag & INDEX) as usize;
        match tag & !INDEX {
            KICK => {
                if let Some(Some(queue)) = work.queues.get(index) {
                    queue.clear_kick();
                }
                work.attend(|work| work.serve(index));
            }
            INPUT => work.attend(|work| work.input(index, ready)),
            _ => work.attend(|work| work.output(index, ready)),
        }
    }
}

impl Work {
    /// Back to what a driver finds first. The host's ends stay.
    pub(super) fn reset(&mut self) {
        self.messages.clear();
        self.multiport = false;
        for port in &mut self.ports {
            port.state = Default::default();
        }
    }

    fn attend(&mut self, body: impl FnOnce(&mut Self) -> Result<(), (usize, QueueFault)>) {
        if self.failed {
            // A closed end would call for ever.
            self.ports
                .iter_mut()
                .for_each(|port| (port.input_ready, port.output_ready) = (None, None));
            return;
        }
        let mut outcome = body(self);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if let (Ok(()), Some(queue)) = (&outcome, queue) {
                outcome = queue.notify().map_err(|fault| (index, fault));
            }
        }
        if let Err((index, fault)) = outcome {
            self.failed = true;
            if let Some(Some(queue)) = self.queues.get(index) {
                queue.fail(&fault);
            }
        }
    }

    fn serve(&mut self, index: usize) -> Result<(), (usize, QueueFault)> {
        let served = match port_of(index) {
            Some(port) if queues_of(port).0 == index => self.receive(port),
            Some(port) => self.send(port),
            // Room for messages lets the driver's be read, which makes messages.
            None => {
                self.tell().map_err(|fault| (TO_DRIVER, fault))?;
                self.listen().map_err(|fault| (FROM_DRIVER, fault))?;
                return self.tell().map_err(|fault| (TO_DRIVER, fault));
            }
        };
        served.map_err(|fault| (index, fault))
    }

    /// The host's end of a port has something for the guest, or has gone.
    fn input(&mut self, port: usize, ready: Ready) -> Result<(), (usize, QueueFault)> {
        let index = queues_of(port).0;
        self.receive(port).map_err(|fault| (index, fault))?;
        let unread = !ready.readable && ready.closed;
        if unread && let Some(port) = self.ports.get_mut(port) {
            // Told even without interest: let go, or be told for ever.
            port.input = None;
            port.input_ready = None;
        }
        if unread {
            self.announce_closed(port)
                .map_err(|fault| (TO_DRIVER, fault))?;
        }
        Ok(())
    }

    /// The host's end of a port takes bytes again, or has gone.
    fn output(&mut self, port: usize, ready: Ready) -> Result<(), (usize, QueueFault)> {
        if ready.closed
            && let Some(port) = self.ports.get_mut(port)
        {
            port.target = Target::Nothing;
            port.output_ready = None;
        }
        let index = queues_of(port).1;
        self.send(port).map_err(|fault| (index, fault))
    }

    /// From the host to the guest.
    fn receive(&mut self, index: usize) -> Result<(), QueueFault> {
        let (Some(port), Some(Some(queue))) = (
            self.ports.get_mut(index),
            self.queues.get_mut(queues_of(index).0),
        ) else {
            return Ok(());
        };
        if self.multiport && !port.state.guest_open {
            port.listen(false);
            return Ok(());
        }
        match port.receive(queue)? {
            Served::Empty if !queue.enable_kicks()? => port.listen(false),
            Served::Closed => self.announce_closed(index)?,
            Served::Empty | Served::More | Served::Blocked => port.listen(true),
        }
        Ok(())
    }

    /// From the guest to the host.
    fn send(&mut self, index: usize) -> Result<(), QueueFault> {
        let (Some(port), Some(Some(queue))) = (
            self.ports.get_mut(index),
            self.queues.get_mut(queues_of(index).1),
        ) else {
            return Ok(());
        };
        let blocked = match port.send(queue)? {
            Served::Blocked => true,
            Served::Empty => {
                if queue.enable_kicks()? {
                    queue.kick_again();
                }
                false
            }
            Served::More | Served::Closed => {
                queue.kick_again();
                false
            }
        };
        if let Some(registration) = &port.output_ready {
            let interest = if blocked {
                Interest::WRITE
            } else {
                Interest::NONE
            };
            if let Err(error) = registration.set_interest(interest) {
                tracing::warn!(port = port.name, %error, "a port's output cannot be waited for");
            }
        }
        Ok(())
    }

    fn announce_closed(&mut self, port: usize) -> Result<(), QueueFault> {
        let known = self.ports.get(port).is_some_and(|port| port.state.ready);
        if self.multiport && known && self.messages.len() < MESSAGES_MAX {
            self.messages
                .push_back(control::message(port as u32, Event::PortOpen, 0));
        }
        self.tell()
    }

    /// Gives the driver the messages that wait.
    fn tell(&mut self) -> Result<(), QueueFault> {
        let Some(Some(queue)) = self.queues.get_mut(TO_DRIVER) else {
            return Ok(());
        };
        while let Some(message) = self.messages.front() {
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            };
            if total(chain.writable()) < message.len() as u64 {
                let what = "buffer that holds a message";
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what,
                });
            }
            let count = scatter(queue.memory(), chain.writable(), message);
            queue.push(chain.head, count as u32)?;
            self.messages.pop_front();
        }
        Ok(())
    }

    /// Reads the driver's messages.
    fn listen(&mut self) -> Result<(), QueueFault> {
        let Some(Some(queue)) = self.queues.get(FROM_DRIVER) else {
            return Ok(());
        };
        for _ in 0..queue.size() {
            if self.messages.len() >= MESSAGES_MAX {
                // Read on when the driver has made room: its kick of the other queue comes here too.
                return Ok(());
            }
            let Some(Some(queue)) = self.queues.get_mut(FROM_DRIVER) else {
                return Ok(());
            };
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    queue.kick_again();
                }
                return Ok(());
            };
            let mut bytes = [0; control::LENGTH];
            let whole = gather(queue.memory(), chain.readable(), &mut bytes);
            queue.push(chain.head, 0)?;
            if let Some((port, event, value)) = control::read(&bytes).filter(|_| whole) {
                self.answer(port, event, value)?;
            }
        }
        if let Some(Some(queue)) = self.queues.get(FROM_DRIVER) {
            queue.kick_again();
        }
        Ok(())
    }

    fn answer(&mut self, index: usize, event: Event, value: u16) -> Result<(), QueueFault> {
        if event == Event::DeviceReady && value == 1 {
            let ports = 0..self.ports.len() as u32;
            self.messages
                .extend(ports.map(|port| control::message(port, Event::PortAdd, 1)));
            return Ok(());
        }
        let Some(port) = self.ports.get_mut(index) else {
            return Ok(());
        };
        match event {
            Event::PortReady if value == 1 => {
                port.state.ready = true;
                let id = index as u32;
                if port.console {
                    self.messages
                        .push_back(control::message(id, Event::ConsolePort, 1));
                }
                self.messages.push_back(control::name(id, &port.name));
                if port.host_open() {
                    self.messages
                        .push_back(control::message(id, Event::PortOpen, 1));
                }
                Ok(())
            }
            Event::PortOpen => {
                port.state.guest_open = value == 1;
                self.receive(index)
            }
            _ => Ok(()),
        }
    }
}
