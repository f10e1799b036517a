//! The balloon's queues and what is done with their chains.

use super::super::queue::{Chain, QueueFault, Virtqueue, gather, total};
use super::statistics::LIST_MAX;
use super::{BalloonReport, BalloonStatistics, CHAINS_A_TURN, PAGE, QUEUES, Registers, feature};
use crate::memory::GuestMemory;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
/// Page numbers of one chain: a page of them, as Windows sends; Linux and FreeBSD send 256.
const NUMBERS_MAX: usize = 1024;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    /// Also a queue for hints, in which nothing ever comes, since none are asked for.
    Reporting,
}

/// A queue's index is said by the specification to be fixed, and drivers count only the queues of what
/// was negotiated (Linux, QEMU). Both are understood: whatever comes after the statistics, or in their
/// place, are reports.
fn role(index: usize, features: u64) -> Role {
    match index {
        INFLATE => Role::Inflate,
        DEFLATE => Role::Deflate,
        STATISTICS if features & feature::STATS_VQ != 0 => Role::Statistics,
        _ => Role::Reporting,
    }
}

pub(super) struct Work {
    pub(super) registers: Registers,
    features: u64,
    queues: [Option<Virtqueue>; QUEUES],
    /// A queue lied: all wait for the driver's reset.
    failed: bool,
    /// The host changed its wish while there was nobody to tell.
    untold: bool,
    /// The chain that the next request for statistics hands back.
    held: Option<u16>,
    statistics: Option<BalloonStatistics>,
    given_back: u64,
}

impl Work {
    pub(super) fn new(registers: Registers) -> Self {
        Self {
            registers,
            features: 0,
            queues: [const { None }; QUEUES],
            failed: false,
            untold: false,
            held: None,
            statistics: None,
            given_back: 0,
        }
    }

    pub(super) fn add(&mut self, queue: Virtqueue) {
        let index = usize::from(queue.index());
        if let Some(place) = self.queues.get_mut(index) {
            *place = Some(queue);
        }
    }

    /// The queues are there.
    pub(super) fn begin(&mut self, features: u64) {
        self.features = features;
        self.failed = false;
        if std::mem::take(&mut self.untold) {
            self.tell();
        }
    }

    /// Gives the queues up. A list of statistics that is held back becomes the next one of its queue
    /// again.
    pub(super) fn end(&mut self) -> Vec<Virtqueue> {
        if self.held.take().is_some()
            && let Some(queue) = &mut self.queues[STATISTICS]
        {
            queue.unpop();
        }
        self.queues.iter_mut().filter_map(Option::take).collect()
    }

    pub(super) fn forget_driver(&mut self) {
        self.registers.actual = 0;
        self.registers.poison = 0;
        self.statistics = None;
        self.features = 0;
    }

    pub(super) fn set_target(&mut self, pages: u32) {
        if self.registers.target != pages {
            self.registers.target = pages;
            self.tell();
        }
    }

    fn tell(&mut self) {
        match self.queues.iter().flatten().next() {
            Some(queue) => queue.config_changed(),
            None => self.untold = true,
        }
    }

    /// Hands the driver its list back, which it fills anew.
    pub(super) fn ask_statistics(&mut self) {
        if self.failed {
            return;
        }
        if let (Some(head), Some(queue)) = (self.held.take(), &mut self.queues[STATISTICS])
            && let Err(fault) = queue.push(head, 0).and_then(|()| queue.notify())
        {
            self.failed = true;
            queue.fail(&fault);
        }
    }

    pub(super) fn report(&self) -> BalloonReport {
        BalloonReport {
            target: u64::from(self.registers.target) * PAGE,
            actual: u64::from(self.registers.actual) * PAGE,
            given_back: self.given_back,
            statistics: self.statistics,
        }
    }

    pub(super) fn clear_kick(&self, index: usize) {
        if let Some(Some(queue)) = self.queues.get(index) {
            queue.clear_kick();
        }
    }

    /// Looks at a queue, if it is there.
    pub(super) fn serve(&mut self, index: usize, memory: &GuestMemory) {
        if self.failed {
            return;
        }
        let Some(mut queue) = self.queues.get_mut(index).and_then(Option::take) else {
            return;
        };
        if let Err(fault) = self.answer(&mut queue, role(index, self.features), memory) {
            self.failed = true;
            queue.fail(&fault);
        }
        self.queues[index] = Some(queue);
    }

    fn answer(
        &mut self,
        queue: &mut Virtqueue,
        role: Role,
        memory: &GuestMemory,
    ) -> Result<(), QueueFault> {
        for _ in 0..CHAINS_A_TURN {
            // A second list, which no driver has, waits for the first.
            if role == Role::Statistics && self.held.is_some() {
                break;
            }
            let Some(chain) = queue.pop()? else { break };
            match role {
                Role::Inflate => self.inflate(&chain, memory)?,
                Role::Deflate => drop(page_numbers(&chain, memory)?),
                Role::Reporting => self.take_report(&chain, memory)?,
                Role::Statistics => {
                    self.take_statistics(&chain, memory)?;
                    self.held = Some(chain.head);
                    continue;
                }
            }
            queue.push(chain.head, 0)?;
        }
        queue.notify()?;
        if queue.enable_kicks()? && !(role == Role::Statistics && self.held.is_some()) {
            queue.kick_again();
        }
        Ok(())
    }

    fn inflate(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), QueueFault> {
        let mut numbers = page_numbers(chain, memory)?;
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
            let (Some(first), pages) = (run.first(), run.len() as u64) else {
                continue;
            };
            self.give_back(memory, u64::from(*first) * PAGE, pages * PAGE);
        }
        Ok(())
    }

    fn take_report(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), QueueFault> {
        if !chain.readable().is_empty() {
            return Err(malformed(chain, "report of free pages"));
        }
        if self.registers.may_lose_reported(self.features) {
            for segment in chain.writable() {
                self.give_back(memory, segment.address, segment.length.into());
            }
        }
        Ok(())
    }

    fn give_back(&mut self, memory: &GuestMemory, address: u64, length: u64) {
        match memory.give_back(address, length) {
            Ok(bytes) => self.given_back = self.given_back.saturating_add(bytes),
            // The guest keeps what it has: nothing is lost but the host's gain.
            Err(error) => tracing::debug!(%error, address, length, "memory was not given back"),
        }
    }

    fn take_statistics(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), QueueFault> {
        if !chain.writable().is_empty() {
            return Err(malformed(chain, "list of statistics"));
        }
        let length = total(chain.readable()).min(LIST_MAX as u64) as usize;
        let mut list = vec![0; length];
        if gather(memory, chain.readable(), &mut list) {
            self.statistics = Some(BalloonStatistics::parse(&list));
        }
        Ok(())
    }
}

/// The chain's page numbers, of 32 bits each (§5.5.6).
fn page_numbers(chain: &Chain, memory: &GuestMemory) -> Result<Vec<u32>, QueueFault> {
    let length = total(chain.readable());
    let sound =
        chain.writable().is_empty() && length.is_multiple_of(4) && length <= 4 * NUMBERS_MAX as u64;
    let mut bytes = vec![0; if sound { length as usize } else { 0 }];
    if !sound || !gather(memory, chain.readable(), &mut bytes) {
        return Err(malformed(chain, "list of page numbers"));
    }
    let number = |four: &[u8]| four.try_into().map(u32::from_le_bytes).ok();
    Ok(bytes.chunks_exact(4).filter_map(number).collect())
}

fn malformed(chain: &Chain, what: &'static str) -> QueueFault {
    QueueFault::Malformed {
        head: chain.head,
        what,
    }
}
