//! Rounds of what is sent while the guest runs: how fast one was, what it left, and whether the rest of it is in vain.
//!
//! The guest's writes are looked at a few times before a round ends. What it has written to by then goes with the next
//! round, as it would in any case, and not with this one too. Once that is most of the round ([`cut`]) the next one begins
//! at once, with the guest slowed down: it would be slowed down at the end for the same reason, and what went until then
//! would have gone for nothing.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::journal::{Left, Pending};
use super::{MigrationError, Sender, SentRound};
use crate::memory::PageSet;
use crate::stream::PAGE;
use crate::stream::converge::{AtLimit, Decision, Midway, Standing, Why, cut, explained};

/// Rounds that are reported; of more than that some in the middle are not.
const ROUNDS_MAX: usize = 256;
/// A round of so many pages with content, for each connection, says how fast they are; a smaller one may have found room in
/// the buffers of the kernel.
const TELLING: u64 = 256;
/// Rounds of what cannot follow a guest, beyond those that its policy gives.
pub const MORE_ROUNDS: u32 = 8;
/// The guest's writes are looked at when one in so many of a round's pages has gone.
const LOOKS: [u64; 3] = [8, 4, 2];
/// And no sooner than so many have: 8 MiB. The guest faults once more on each page that it goes on writing to.
const WORTH_A_LOOK: u64 = 2048;

pub struct Round {
    pub began: Instant,
    pub pages: u64,
    pub disk_pages: u64,
    /// Of these, pages that were not zero.
    pub content: u64,
    /// Of disks, pages that the other side was not told yet to make durable.
    pub disk_content: u64,
    /// Of its time, what disks took to be durable there.
    pub settling: Duration,
    /// Bytes a second, of the last round that could tell.
    pub rate: Option<u64>,
    /// Pages of memory that it has, or had when they had their turn behind disks.
    memory: u64,
    /// Disks go first, and the guest's writes meanwhile have not been looked at.
    behind_disks: bool,
    /// How often they have been since.
    looks: usize,
    /// What was found then, and goes with the next.
    written: Option<PageSet>,
    /// The fewest bytes that a round has left; none: there was none.
    least: Option<u64>,
    /// Rounds in a row that did not leave clearly less than that.
    stalled: u32,
}

impl Round {
    pub fn first(began: Instant, pending: &Pending) -> Self {
        let (memory, disk) = pending.count();
        Round {
            began,
            pages: 0,
            disk_pages: 0,
            content: 0,
            disk_content: 0,
            settling: Duration::ZERO,
            rate: None,
            memory,
            behind_disks: disk > 0,
            looks: 0,
            written: None,
            least: None,
            stalled: 0,
        }
    }
}

impl<S: Read + Write> Sender<S> {
    /// There is more that cannot follow than the guest may stand still for, and it may become less.
    pub(super) fn wants_a_round(&mut self, left: &Left) -> bool {
        let pages = left.count() - left.memory() + left.memory_from(self.machine.memory.bytes());
        let standing = Standing {
            elapsed: Duration::ZERO,
            left: pages * PAGE as u64,
            sent: 0,
            rate: self.rate(),
            stalled: 0,
            throttled: 0,
        };
        let wants = standing.takes() > self.policy.downtime && self.more_rounds > 0;
        self.more_rounds -= u32::from(wants);
        wants
    }

    /// Bytes a second that go to the other side, as far as is known.
    fn rate(&self) -> u64 {
        let all = self.report.totals.pages + self.report.disks.pages;
        let on_average = || rate(all, self.began.elapsed());
        self.round.rate.unwrap_or_else(on_average)
    }

    /// What was written since the round began.
    pub(super) fn take_written(&mut self) -> Result<Left, MigrationError> {
        let mut written = self.journal.take()?;
        written.join(&self.take_seen());
        Ok(written)
    }

    /// What of that was seen before.
    pub(super) fn take_seen(&mut self) -> Left {
        let mut left = self.journal.nothing();
        if let Some(written) = self.round.written.take() {
            left.join_memory(&written);
        }
        left
    }

    /// Looks at what a running guest has written to, in the middle of a round, when it is time for that.
    pub(super) fn look(&mut self) -> Result<(), MigrationError> {
        let (memory, disk) = self.pending.count();
        if disk > 0 || memory == 0 || !self.journal.logs_memory() {
            return Ok(());
        }
        self.memory_since.get_or_insert_with(Instant::now);
        // While the guest stood still nobody looked, and some may have gone.
        if std::mem::take(&mut self.round.behind_disks) && self.round.pages == 0 {
            // Nothing of it has gone with this round, which may have taken long so far.
            let written = self.journal.take_memory()?;
            self.pending.join_memory(&written);
            self.round.memory = self.pending.count().0;
            return Ok(());
        }
        let may_slow = self.policy.throttle.is_some() && self.policy.at_limit != AtLimit::PostCopy;
        let gone = |part: &&u64| self.round.pages >= (self.round.memory / **part).max(WORTH_A_LOOK);
        let looks = LOOKS.iter().take_while(gone).count();
        if !may_slow || looks <= self.round.looks {
            return Ok(());
        }
        self.round.looks = looks;
        let written = self.journal.take_memory()?;
        self.pending.remove_memory(&written);
        let seen = match self.round.written.take() {
            Some(mut seen) => {
                seen.join(&written);
                seen
            }
            None => written,
        };
        let midway = Midway {
            elapsed: self.whole_since.map_or(Duration::ZERO, |at| at.elapsed()),
            of: self.round.memory * PAGE as u64,
            sent: self.round.pages * PAGE as u64,
            written: seen.count() * PAGE as u64,
            throttled: self.machine.vcpus.throttled(),
        };
        self.round.written = Some(seen);
        match cut(&self.policy, &midway) {
            Some(percent) => self.begin_another(percent),
            None => Ok(()),
        }
    }

    /// The rest of the round goes with the next.
    fn begin_another(&mut self, percent: u8) -> Result<(), MigrationError> {
        let mut left = self.pending.rest();
        left.join(&self.take_seen());
        self.learn_rate();
        let bytes = left.count() * PAGE as u64;
        let decided = (Decision::Throttle { percent }, Why::Behind);
        self.note(bytes, decided, true)?;
        self.next_round(left);
        Ok(())
    }

    /// How fast the round was, if it could tell.
    fn learn_rate(&mut self) {
        if self.round.content >= TELLING * self.lanes.count().max(1) as u64 {
            let took = self
                .round
                .began
                .elapsed()
                .saturating_sub(self.round.settling);
            self.round.rate = Some(rate(self.round.content, took));
        }
    }

    /// All of it has gone.
    pub(super) fn after_round(&mut self, written: &Left) -> Result<Decision, MigrationError> {
        let left = (written.count() + self.journal.unlogged(&self.machine)?) * PAGE as u64;
        self.learn_rate();
        let rate = self.rate();
        // By an eighth at least: what is left goes up and down with what the guest just does.
        self.round.stalled = match self.round.least {
            Some(least) if left >= least - least / 8 => self.round.stalled + 1,
            _ => 0,
        };
        let mut policy = self.policy;
        if !self.journal.logs_memory() {
            // However slow it is, all of its memory is left.
            policy.throttle = None;
        }
        let whole_since = *self.whole_since.get_or_insert_with(Instant::now);
        let decided = explained(
            &policy,
            &Standing {
                elapsed: whole_since.elapsed(),
                left,
                sent: (self.round.pages + self.round.disk_pages) * PAGE as u64,
                rate,
                stalled: self.round.stalled,
                throttled: self.machine.vcpus.throttled(),
            },
        );
        self.note(left, decided, false)?;
        Ok(decided.0)
    }

    /// Takes a round down that is over, and does what is decided of the guest's speed.
    fn note(
        &mut self,
        left: u64,
        (decision, why): (Decision, Why),
        cut: bool,
    ) -> Result<(), MigrationError> {
        if self.report.rounds.len() >= ROUNDS_MAX {
            self.report.rounds.remove(ROUNDS_MAX / 2);
        }
        self.report.rounds.push(SentRound {
            pages: self.round.pages,
            disk_pages: self.round.disk_pages,
            took: self.round.began.elapsed(),
            left,
            cut,
            rate: self.rate(),
            throttled: self.machine.vcpus.throttled(),
            decision,
            why,
        });
        let least = self.round.least.map_or(left, |least| least.min(left));
        self.round.least = Some(least);
        if let Decision::Throttle { percent } = decision {
            self.machine.vcpus.throttle(percent);
            // Whether that helps is seen by what is left from here on.
            (self.round.stalled, self.round.least) = (0, Some(left));
        }
        self.mark(None)
    }

    pub(super) fn next_round(&mut self, written: Left) {
        self.pending = Pending::new(written);
        self.journal.has_gone();
        self.round = Round {
            rate: self.round.rate,
            disk_content: self.round.disk_content,
            least: self.round.least,
            stalled: self.round.stalled,
            ..Round::first(Instant::now(), &self.pending)
        };
    }
}

fn rate(pages: u64, took: Duration) -> u64 {
    let rate = u128::from(pages) * PAGE as u128 * 1_000_000 / took.as_micros().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}
