//! The machine's one event loop, on one thread: serial input, console ports, timers.
//!
//! Owns an epoll instance and the map from tokens to subscribers. It must never block in a
//! subscriber: whoever has long work starts a thread of his own.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::eventfd::EventFd;
use crate::thread::{ThreadKind, Threads};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a subscriber waits for. Level-triggered: a subscriber that does not take what is there must
/// drop the interest, or it is called again at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

impl Interest {
    pub const NONE: Interest = Interest {
        readable: false,
        writable: false,
    };
    pub const READ: Interest = Interest {
        readable: true,
        writable: false,
    };
    pub const WRITE: Interest = Interest {
        readable: false,
        writable: true,
    };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.readable);
        flags.set(EventFlags::OUT, self.writable);
        flags
    }
}

/// What a descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    pub readable: bool,
    pub writable: bool,
    /// The other end has gone (EPOLLHUP or EPOLLERR); told even without any interest, so the
    /// subscriber should drop its registration.
    pub closed: bool,
}

/// Called on the reactor's thread. `tag` is the one that the descriptor was registered with.
pub trait Subscriber: Send + Sync {
    fn ready(&self, tag: u32, ready: Ready);
}

/// The handle that devices register with. Cheap to clone.
#[derive(Clone)]
pub struct Reactor {
    shared: Arc<Shared>,
}

/// By token, with the tag that each gave itself.
type Subscribers = HashMap<u64, (Arc<dyn Subscriber>, u32)>;

struct Shared {
    epoll: OwnedFd,
    next: AtomicU64,
    subscribers: Mutex<Subscribers>,
    stop: AtomicBool,
    wake: EventFd,
}

/// Token of the eventfd that ends the loop.
const WAKE: u64 = 0;

/// A descriptor in the loop; dropping it takes it out. A call that has begun may still be running.
pub struct Registration {
    shared: Arc<Shared>,
    fd: OwnedFd,
    token: u64,
}

/// The loop's thread; dropping it ends and joins it.
pub struct ReactorThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Reactor {
    pub fn new() -> io::Result<Reactor> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = EventFd::new()?;
        epoll::add(
            &epoll,
            wake.as_fd(),
            EventData::new_u64(WAKE),
            EventFlags::IN,
        )?;
        let shared = Shared {
            epoll,
            next: AtomicU64::new(WAKE + 1),
            subscribers: Mutex::default(),
            stop: AtomicBool::new(false),
            wake,
        };
        Ok(Reactor {
            shared: Arc::new(shared),
        })
    }

    /// Starts the loop; once for a reactor.
    pub fn run(&self, threads: &Threads) -> io::Result<ReactorThread> {
        let shared = Arc::clone(&self.shared);
        let thread = threads.spawn(
            ThreadKind::Console,
            "reactor",
            || (),
            move |()| shared.serve(),
        )?;
        Ok(ReactorThread {
            shared: Arc::clone(&self.shared),
            thread: Some(thread),
        })
    }

    /// Calls `subscriber` with `tag` whenever `fd` is ready for `interest`. The descriptor is
    /// duplicated. Regular files cannot be waited for (EPERM).
    pub fn register(
        &self,
        fd: BorrowedFd<'_>,
        interest: Interest,
        subscriber: Arc<dyn Subscriber>,
        tag: u32,
    ) -> io::Result<Registration> {
        let fd = fd.try_clone_to_owned()?;
        let token = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.shared.lock().insert(token, (subscriber, tag));
        let registration = Registration {
            shared: Arc::clone(&self.shared),
            fd,
            token,
        };
        let data = EventData::new_u64(token);
        epoll::add(&self.shared.epoll, &registration.fd, data, interest.flags())?;
        Ok(registration)
    }
}

impl Registration {
    pub fn set_interest(&self, interest: Interest) -> io::Result<()> {
        let data = EventData::new_u64(self.token);
        Ok(epoll::modify(
            &self.shared.epoll,
            &self.fd,
            data,
            interest.flags(),
        )?)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Taken out under the lock and dropped without it: it may own other registrations.
        let subscriber = self.shared.lock().remove(&self.token);
        drop(subscriber);
        let _ = epoll::delete(&self.shared.epoll, &self.fd);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Subscribers> {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(16);
        while !self.stop.load(Ordering::Acquire) {
            events.clear();
            // EINTR is the only failure that a valid epoll descriptor has.
            if epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            )
            .is_err()
            {
                continue;
            }
            for event in &events {
                let (token, flags) = (event.data.u64(), event.flags);
                let subscriber = self
                    .lock()
                    .get(&token)
                    .map(|(who, tag)| (Arc::clone(who), *tag));
                if let Some((subscriber, tag)) = subscriber {
                    let ready = Ready {
                        readable: flags.contains(EventFlags::IN),
                        writable: flags.contains(EventFlags::OUT),
                        closed: flags.intersects(EventFlags::HUP | EventFlags::ERR),
                    };
                    subscriber.ready(tag, ready);
                }
            }
        }
    }
}

impl Drop for ReactorThread {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Subscribers own registrations, which own the map: the circle is cut here. They go when the
        // lock is free, since each registration's end takes it.
        let subscribers = std::mem::take(&mut *self.shared.lock());
        drop(subscribers);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::request::channel;

    struct Forward(Mutex<mpsc::Sender<(u32, Ready)>>);

    impl Subscriber for Forward {
        fn ready(&self, tag: u32, ready: Ready) {
            let _ = self.0.lock().unwrap().send((tag, ready));
        }
    }

    #[test]
    fn a_readable_descriptor_calls_its_subscriber_until_it_is_dropped() {
        let (requests, _receiver) = channel().unwrap();
        let reactor = Reactor::new().unwrap();
        let _thread = reactor.run(&Threads::new(None, requests)).unwrap();
        let (sender, calls) = mpsc::channel();
        let forward = Arc::new(Forward(Mutex::new(sender)));
        let fd = EventFd::new().unwrap();
        let registration = reactor
            .register(fd.as_fd(), Interest::READ, forward, 7)
            .unwrap();
        fd.signal();
        let (tag, ready) = calls.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((tag, ready.readable, ready.closed), (7, true, false));
        drop(registration);
        // With the registration the subscriber goes, and with it the channel's only sender.
        while calls.recv_timeout(Duration::from_secs(10)).is_ok() {}
        assert_eq!(calls.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }
}
