//! virtio-rng (virtio 1.2 §5.4): the host's random numbers, at a bounded rate.
//!
//! Lives on the machine's reactor. A request is answered with at most [`FILL_MAX`] bytes, and what the
//! rate does not allow yet waits in the queue, not here.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::bucket::TokenBucket;
use super::queue::{Chain, QueueFault, Virtqueue, scatter, slice, total};
use super::{Activation, DeviceType, VirtioDevice};
use crate::config::RngConfig;
use crate::device::{DeviceError, SavedDevice};
use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};

const QUEUE_SIZE: u16 = 64;
/// Bytes a second when the config says nothing: more than any guest needs, little for the host.
const RATE: u64 = 8 << 20;
/// Bytes that one request gets at most; the used length tells the driver (§5.4.6.1).
const FILL_MAX: u64 = 64 << 10;
const STATE_VERSION: u32 = 1;
const KICK: u32 = 0;
const TIMER: u32 = 1;

/// The device.
pub struct Rng {
    id: String,
    reactor: Reactor,
    source: Arc<Source>,
    registrations: Vec<Registration>,
}

struct Source {
    timer: OwnedFd,
    work: Mutex<Work>,
}

struct Work {
    queue: Option<Virtqueue>,
    /// The queue lied; it waits here for the driver's reset.
    failed: bool,
    bucket: TokenBucket,
}

impl Rng {
    pub fn new(id: &str, config: &RngConfig, reactor: &Reactor) -> Result<Self, DeviceError> {
        let rate = config.bytes_per_second.unwrap_or(RATE);
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .map_err(|error| DeviceError::new(id, "make its timer", error))?;
        let bucket = TokenBucket::new(rate, FILL_MAX, Instant::now());
        let source = Arc::new(Source {
            timer,
            work: Mutex::new(Work {
                queue: None,
                failed: false,
                bucket,
            }),
        });
        Ok(Self {
            id: id.to_owned(),
            reactor: reactor.clone(),
            source,
            registrations: Vec::new(),
        })
    }

    /// Makes the device from its saved state, which holds nothing: what it gave is gone.
    pub fn restore(
        saved: &SavedDevice,
        config: &RngConfig,
        reactor: &Reactor,
    ) -> Result<Self, DeviceError> {
        saved.unpack::<()>(STATE_VERSION)?;
        Self::new(&saved.id, config, reactor)
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Some(queue) = activation.queues.into_iter().next() else {
            return Ok(());
        };
        let failed = |error| DeviceError::new(&self.id, "listen for requests", error);
        let register = |fd, tag| {
            self.reactor
                .register(fd, Interest::READ, self.source.clone(), tag)
        };
        self.registrations = vec![
            register(queue.kick(), KICK).map_err(failed)?,
            register(self.source.timer.as_fd(), TIMER).map_err(failed)?,
        ];
        let mut work = self.source.lock();
        work.queue = Some(queue);
        work.failed = false;
        self.source.serve(&mut work);
        Ok(())
    }

    fn deactivate(&mut self, _within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        self.registrations.clear();
        Ok(self.source.lock().queue.take().into_iter().collect())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(&self.id, STATE_VERSION, &())
    }
}

impl Subscriber for Source {
    fn ready(&self, tag: u32, _ready: Ready) {
        let mut work = self.lock();
        if tag == TIMER {
            let mut expirations = [0; 8];
            let _ = rustix::io::read(&self.timer, &mut expirations);
        } else if let Some(queue) = &work.queue {
            queue.clear_kick();
        }
        self.serve(&mut work);
    }
}

impl Source {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, work: &mut Work) {
        let Work {
            queue: Some(queue),
            failed: failed @ false,
            bucket,
        } = work
        else {
            return;
        };
        match answer(queue, bucket) {
            Ok(Duration::ZERO) => {}
            Ok(wait) => self.wake_after(wait),
            Err(fault) => {
                *failed = true;
                queue.fail(&fault);
            }
        }
    }

    fn wake_after(&self, wait: Duration) {
        let it_value = Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let it_interval = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval,
            it_value,
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::warn!(%error, "the timer of the random number device could not be set");
        }
    }
}

/// Answers what is there, as far as the rate goes; returns how long to wait before going on.
fn answer(queue: &mut Virtqueue, bucket: &mut TokenBucket) -> Result<Duration, QueueFault> {
    let mut wait = Duration::ZERO;
    // A driver that makes more available meanwhile is served at its next kick or turn.
    for _ in 0..queue.size() {
        wait = bucket.wait(Instant::now());
        if wait > Duration::ZERO {
            break;
        }
        let Some(chain) = queue.pop()? else { break };
        let filled = fill(queue, &chain)?;
        bucket.take(filled, Instant::now());
        queue.push(chain.head, filled as u32)?;
    }
    queue.notify()?;
    if queue.enable_kicks()? && wait == Duration::ZERO {
        // More came in: look again at the reactor's next turn, after the others had theirs.
        wait = Duration::from_nanos(1);
    }
    Ok(wait)
}

fn fill(queue: &Virtqueue, chain: &Chain) -> Result<u64, QueueFault> {
    if chain.writable().is_empty() || !chain.readable().is_empty() {
        return Err(QueueFault::Malformed {
            head: chain.head,
            what: "buffer for random numbers",
        });
    }
    let wanted = total(chain.writable()).min(FILL_MAX);
    let mut done = 0;
    let mut bytes = [0u8; 4096];
    while done < wanted {
        let now = (wanted - done).min(bytes.len() as u64);
        let Ok(got) = getrandom(&mut bytes[..now as usize], GetRandomFlags::empty()) else {
            break;
        };
        let part = slice(chain.writable(), done, got as u64);
        scatter(queue.memory(), &part, &bytes[..got]);
        done += got as u64;
    }
    Ok(done)
}

#[cfg(test)]
mod tests;
