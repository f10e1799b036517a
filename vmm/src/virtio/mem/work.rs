//! The queue of a memory device and what is done with its requests.

use super::super::queue::{Chain, QueueFault, Virtqueue, gather, scatter, total};
use super::{BLOCKS_A_TURN, CHAINS_A_TURN};
use crate::config::HOT_BLOCK;
use crate::memory::{BlockState, Blocks, HotMemory};

/// struct virtio_mem_req and virtio_mem_resp (§5.15.6), bytes.
const REQUEST: usize = 24;
const RESPONSE: usize = 10;

/// Types of requests.
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// What a request is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    Ack = 0,
    /// More than is requested.
    Nack = 1,
    /// Not now: the driver tries again.
    Busy = 2,
    /// No blocks, or not in the state that the request wants.
    Error = 3,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Plug,
    Unplug,
    UnplugAll,
}

/// A request under way.
struct Job {
    chain: Chain,
    change: Change,
    done: Blocks,
    left: Blocks,
}

pub(super) struct Work {
    pub(super) requested: u64,
    pub(super) usable: u64,
    /// As it was when the owner was last told, or would have been.
    pub(super) plugged: u64,
    /// The owner has been told of a change, and has not looked.
    pub(super) told: bool,
    queue: Option<Virtqueue>,
    /// The queue lied: it waits for the driver's reset.
    failed: bool,
    /// The host changed its wish while there was nobody to tell.
    untold: bool,
    job: Option<Job>,
}

impl Work {
    pub(super) fn new(requested: u64, usable: u64) -> Self {
        Self {
            requested,
            usable,
            plugged: 0,
            told: false,
            queue: None,
            failed: false,
            untold: false,
            job: None,
        }
    }

    pub(super) fn set_requested(&mut self, bytes: u64, usable: u64) {
        if self.requested != bytes {
            self.requested = bytes;
            self.usable = self.usable.max(usable);
            match &self.queue {
                Some(queue) => queue.config_changed(),
                None => self.untold = true,
            }
        }
    }

    /// Nothing is plugged: less may be usable.
    pub(super) fn shrink(&mut self, usable: u64) {
        self.usable = usable;
    }

    pub(super) fn begin(&mut self, queue: Virtqueue) {
        self.failed = false;
        if std::mem::take(&mut self.untold) {
            queue.config_changed();
        }
        self.queue = Some(queue);
    }

    /// Gives the queue up; what is under way is finished before.
    pub(super) fn end(&mut self, memory: &HotMemory) -> Option<Virtqueue> {
        let mut queue = self.queue.take()?;
        while let Some(job) = self.job.take() {
            if let Err(fault) = self
                .go_on(job, &mut queue, memory)
                .and_then(|()| queue.notify())
            {
                queue.fail(&fault);
            }
        }
        Some(queue)
    }

    pub(super) fn clear_kick(&self) {
        if let Some(queue) = &self.queue {
            queue.clear_kick();
        }
    }

    pub(super) fn serve(&mut self, memory: &HotMemory) {
        if self.failed {
            return;
        }
        let Some(mut queue) = self.queue.take() else {
            return;
        };
        if let Err(fault) = self.turn(&mut queue, memory) {
            self.failed = true;
            queue.fail(&fault);
        }
        self.queue = Some(queue);
    }

    fn turn(&mut self, queue: &mut Virtqueue, memory: &HotMemory) -> Result<(), QueueFault> {
        for _ in 0..CHAINS_A_TURN {
            if let Some(job) = self.job.take() {
                self.go_on(job, queue, memory)?;
                break;
            }
            let Some(chain) = queue.pop()? else { break };
            self.take_request(chain, queue, memory)?;
        }
        queue.notify()?;
        if self.job.is_some() || queue.enable_kicks()? {
            queue.kick_again();
        }
        Ok(())
    }

    fn take_request(
        &mut self,
        chain: Chain,
        queue: &mut Virtqueue,
        memory: &HotMemory,
    ) -> Result<(), QueueFault> {
        let mut bytes = [0; REQUEST];
        let sound = total(chain.readable()) >= REQUEST as u64
            && total(chain.writable()) >= RESPONSE as u64
            && gather(queue.memory(), chain.readable(), &mut bytes);
        if !sound {
            return Err(QueueFault::Malformed {
                head: chain.head,
                what: "request with a place for its answer",
            });
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let address = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|step| bytes[8 + step]));
        let blocks = self.blocks(memory, address, half(16));
        let job = match half(0) {
            request::PLUG => self
                .check_plug(memory, blocks)
                .map(|left| (Change::Plug, left)),
            request::UNPLUG => check_unplug(memory, blocks).map(|left| (Change::Unplug, left)),
            request::UNPLUG_ALL => Ok((Change::UnplugAll, memory.all())),
            request::STATE => {
                let state = blocks.map(|blocks| memory.state(blocks));
                return answer_state(&chain, queue, state);
            }
            _ => Err(Answer::Error),
        };
        match job {
            Ok((change, left)) => {
                let (done, _) = left.split(0);
                let job = Job {
                    chain,
                    change,
                    done,
                    left,
                };
                self.go_on(job, queue, memory)
            }
            Err(answer) => reply(&chain, queue, answer, 0),
        }
    }

    /// The blocks that a request names, where they may be plugged.
    fn blocks(&self, memory: &HotMemory, address: u64, count: u16) -> Option<Blocks> {
        let blocks = memory.blocks(address, u64::from(count) * HOT_BLOCK)?;
        (blocks.offset() + blocks.bytes() <= self.usable).then_some(blocks)
    }

    fn check_plug(&self, memory: &HotMemory, blocks: Option<Blocks>) -> Result<Blocks, Answer> {
        let blocks = blocks.ok_or(Answer::Error)?;
        if memory.plugged_bytes() + blocks.bytes() > self.requested {
            return Err(Answer::Nack);
        }
        match memory.state(blocks) {
            BlockState::Unplugged => Ok(blocks),
            BlockState::Plugged | BlockState::Mixed => Err(Answer::Error),
        }
    }

    /// Does one piece of a job; answers it with the last.
    fn go_on(
        &mut self,
        mut job: Job,
        queue: &mut Virtqueue,
        memory: &HotMemory,
    ) -> Result<(), QueueFault> {
        let (piece, left) = job.left.split(BLOCKS_A_TURN);
        let changed = match job.change {
            Change::Plug => memory.plug(piece),
            Change::Unplug | Change::UnplugAll => memory.unplug(piece),
        };
        if let Err(error) = changed {
            tracing::debug!(%error, ?piece, "hot memory cannot be changed now");
            return self.take_back(&job, queue, memory);
        }
        job.done.count += piece.count;
        job.left = left;
        if job.left.count > 0 {
            self.job = Some(job);
            return Ok(());
        }
        if job.change == Change::UnplugAll {
            self.usable = super::usable(self.requested, memory);
        }
        reply(&job.chain, queue, Answer::Ack, 0)
    }

    /// A request that fails half way has changed nothing: the driver goes by that. Whatever is unplugged in
    /// whole can stay so, since the driver asks again.
    fn take_back(
        &mut self,
        job: &Job,
        queue: &mut Virtqueue,
        memory: &HotMemory,
    ) -> Result<(), QueueFault> {
        let undone = match (job.change, job.done.count) {
            (_, 0) | (Change::UnplugAll, _) => Ok(()),
            (Change::Plug, _) => memory.unplug(job.done),
            (Change::Unplug, _) => memory.plug(job.done),
        };
        match undone {
            Ok(()) => reply(&job.chain, queue, Answer::Busy, 0),
            Err(_) => Err(QueueFault::Malformed {
                head: job.chain.head,
                what: "request that the host could carry out or take back",
            }),
        }
    }
}

fn check_unplug(memory: &HotMemory, blocks: Option<Blocks>) -> Result<Blocks, Answer> {
    let blocks = blocks.ok_or(Answer::Error)?;
    match memory.state(blocks) {
        BlockState::Plugged => Ok(blocks),
        BlockState::Unplugged | BlockState::Mixed => Err(Answer::Error),
    }
}

fn answer_state(
    chain: &Chain,
    queue: &mut Virtqueue,
    state: Option<BlockState>,
) -> Result<(), QueueFault> {
    match state {
        Some(BlockState::Plugged) => reply(chain, queue, Answer::Ack, 0),
        Some(BlockState::Unplugged) => reply(chain, queue, Answer::Ack, 1),
        Some(BlockState::Mixed) => reply(chain, queue, Answer::Ack, 2),
        None => reply(chain, queue, Answer::Error, 0),
    }
}

fn reply(
    chain: &Chain,
    queue: &mut Virtqueue,
    answer: Answer,
    state: u16,
) -> Result<(), QueueFault> {
    let mut response = [0; RESPONSE];
    response[..2].copy_from_slice(&(answer as u16).to_le_bytes());
    response[8..].copy_from_slice(&state.to_le_bytes());
    scatter(queue.memory(), chain.writable(), &response);
    queue.push(chain.head, RESPONSE as u32)
}
