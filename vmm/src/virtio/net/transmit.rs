//! From the guest to the host: each chain is a packet, written out of guest memory in one call.

use rustix::io::Errno;

use super::backend::NetBackend;
use super::control::HEADER;
use super::frame::{Frame, PACKET_MAX};
use super::limit::Limiter;
use super::receive::Turn;
use crate::virtio::queue::{Chain, QueueFault, Virtqueue, total};

/// Packets before the others have their turn.
const BATCH: usize = 64;

/// One transmit queue.
pub struct Transmitter {
    queue: Virtqueue,
    /// Nothing more was in the queue; kicks are not asked for yet.
    drained: bool,
}

impl Transmitter {
    pub fn new(queue: Virtqueue) -> Self {
        Self {
            queue,
            drained: false,
        }
    }

    pub fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    pub fn give_back(self) -> Virtqueue {
        self.queue
    }

    /// Whether nothing was left when it was last looked at, and the driver was not asked to tell of more.
    pub fn is_drained(&self) -> bool {
        self.drained
    }

    /// Whether it was drained, and has packets again.
    pub fn has_more(&self) -> bool {
        self.drained && self.queue.has_more()
    }

    /// Asks to be kicked, if nothing else brings the next packet. True if there is one already.
    pub fn listen(&mut self) -> Result<bool, QueueFault> {
        if std::mem::take(&mut self.drained) {
            return self.queue.enable_kicks();
        }
        Ok(false)
    }

    /// Sends what is there. Kicks are off afterwards, until [`Transmitter::listen`].
    pub fn turn(
        &mut self,
        backend: &mut dyn NetBackend,
        frame: &mut Frame,
        limiter: &Limiter,
    ) -> Result<Turn, QueueFault> {
        self.queue.disable_kicks()?;
        self.drained = false;
        let turn = self.send_all(backend, frame, limiter)?;
        self.queue.notify()?;
        Ok(turn)
    }

    fn send_all(
        &mut self,
        backend: &mut dyn NetBackend,
        frame: &mut Frame,
        limiter: &Limiter,
    ) -> Result<Turn, QueueFault> {
        for _ in 0..BATCH {
            if !limiter.wait().is_zero() {
                return Ok(Turn::Limited);
            }
            let Some(chain) = self.queue.pop()? else {
                self.drained = true;
                return Ok(Turn::Idle);
            };
            if !chain.writable().is_empty() {
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what: "packet to be sent",
                });
            }
            match self.send(&chain, backend, frame) {
                Ok(length) => limiter.passed(length),
                Err(Errno::AGAIN) => {
                    // The backend says when there is room.
                    self.queue.unpop();
                    return Ok(Turn::Idle);
                }
                Err(error) => tracing::debug!(%error, "a packet of the guest was dropped"),
            }
            self.queue.push(chain.head, 0)?;
        }
        Ok(Turn::More)
    }

    fn send(
        &self,
        chain: &Chain,
        backend: &mut dyn NetBackend,
        frame: &mut Frame,
    ) -> Result<usize, Errno> {
        let length = total(chain.readable()) as usize;
        if !(HEADER..=PACKET_MAX).contains(&length) {
            return Err(Errno::MSGSIZE);
        }
        frame.begin(self.queue.memory());
        if !chain.readable().iter().all(|segment| frame.add(segment)) {
            return Err(Errno::MSGSIZE);
        }
        backend.send(frame).map(|()| length)
    }
}
