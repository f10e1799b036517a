//! A guest's clocks, which go on while it is between two machines.
//!
//! kvm-clock and the time stamp counters stand in what is saved, and would go on from there: each move would cost a guest
//! its blackout, and its wall clock with it. How long that was, no host can tell by its time of day, which may be another
//! one's plus or minus anything. So who sends a guest says now and then what its own clock is, which nobody sets, and in
//! the end what it was when the guest's were read: the word that took least to come tells how far that clock is ahead of
//! the one here, and later words that they were on their way for longer. What is lost is what that word took. Only those of
//! the last half minute count, since no two clocks are equally fast.
//!
//! A guest that was suspended to a file is another matter: hours at once would be a surprise to all that it waits for, and
//! its wall clock is its agent's to set.

use std::time::Duration;

use kvm_bindings::kvm_clock_data;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// What a sender's clock was, in nanoseconds: a frame of its own, which older builds pass over.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Mark {
    /// When this was written.
    at: u64,
    /// When the guest's clocks were read, which follow.
    read: Option<u64>,
}

impl Mark {
    pub(super) fn now(read: Option<Duration>) -> Self {
        Mark {
            at: nanoseconds(now()),
            read: read.map(nanoseconds),
        }
    }
}

/// Marks older than twice this do not count: by 50 us a second at most, and more than any crystal's, clocks go apart.
const WINDOW: Duration = Duration::from_secs(15);

/// What is known of a way by which a guest comes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Passage {
    /// How far the clock here is ahead of the sender's, at most: by what has come since `since`, and in the window before.
    ahead: Option<i128>,
    before: Option<i128>,
    since: Duration,
    /// When the guest's clocks were read, by the sender's; by the one here, when their last byte came.
    read: Option<u64>,
    came: Duration,
}

impl Passage {
    /// From another host, or one that may be.
    pub(super) fn begin() -> Self {
        Passage {
            ahead: None,
            before: None,
            since: now(),
            read: None,
            came: now(),
        }
    }

    /// From another process of this host, whose clock is the same.
    pub(super) fn within_host() -> Self {
        Passage {
            ahead: Some(0),
            since: Duration::MAX,
            ..Passage::begin()
        }
    }

    /// A mark has come.
    pub(super) fn hear(&mut self, mark: Mark) {
        self.hear_at(mark, now());
    }

    fn hear_at(&mut self, mark: Mark, here: Duration) {
        let ahead = i128::from(nanoseconds(here)) - i128::from(mark.at);
        let window = here.saturating_sub(self.since);
        if window >= WINDOW {
            // Of a long silence the last word is all there is.
            let last = self.ahead.take();
            self.before = last.filter(|_| window < 2 * WINDOW);
            self.since = here;
        }
        self.ahead = Some(self.ahead.map_or(ahead, |least| least.min(ahead)));
        self.read = mark.read;
    }

    /// All has come.
    pub(super) fn end(&mut self) {
        self.came = now();
    }

    /// How long the guest has been nowhere by now.
    pub(super) fn missed(&self) -> Duration {
        self.missed_at(now())
    }

    /// Not less than it took here: of a build that says nothing that is all that is known.
    fn missed_at(&self, here: Duration) -> Duration {
        let at_least = here.saturating_sub(self.came);
        let (Some(ahead), Some(read)) = (self.ahead, self.read) else {
            return at_least;
        };
        let ahead = self.before.map_or(ahead, |before| before.min(ahead));
        let passed = i128::from(nanoseconds(here)) - ahead - i128::from(read);
        u64::try_from(passed).map_or(at_least, |passed| {
            Duration::from_nanos(passed).max(at_least)
        })
    }
}

/// The clock as it is so much later.
pub(super) fn later(clock: &kvm_clock_data, passed: Duration) -> kvm_clock_data {
    kvm_clock_data {
        clock: clock.clock.saturating_add(nanoseconds(passed)),
        ..Default::default()
    }
}

/// By a clock that nobody sets or slows down.
pub(super) fn now() -> Duration {
    let now = clock_gettime(ClockId::MonotonicRaw);
    // It is never negative, and counts from the boot.
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    proptest! {
        /// Whatever the hosts' clocks are, and however long lines were full: all is known but what the quickest word took.
        #[test]
        fn a_blackout_is_known_but_for_the_least_way(
            here in 0..u64::MAX / 4,
            there in 0..u64::MAX / 4,
            ways in prop::collection::vec(0..2_000u64, 1..5),
            blackout in 1..20_000u64,
            restored in 0..100u64,
        ) {
            let mut passage = Passage { came: Duration::ZERO, since: Duration::MAX, ..Passage::begin() };
            let mut passed = 0;
            let mut hear = |passage: &mut Passage, way: u64, read: Option<u64>| {
                let mark = Mark { at: there + passed * MS, read: read.map(|ms| there + ms * MS) };
                let came = passed + way;
                passage.hear_at(mark, Duration::from_nanos(here + came * MS));
                passed += 500;
                came
            };
            for way in &ways {
                hear(&mut passage, *way, None);
            }
            let read = (ways.len() as u64 * 500).saturating_sub(blackout);
            let came = hear(&mut passage, *ways.last().unwrap(), Some(read));
            passage.came = Duration::from_nanos(here + came * MS);
            let missed = passage.missed_at(Duration::from_nanos(here + (came + restored) * MS));
            let truth = came + restored - read;
            let least = *ways.iter().min().unwrap();
            prop_assert_eq!(missed, ms(truth - least).max(ms(restored)));
        }
    }

    #[test]
    fn of_a_sender_that_says_nothing_only_the_time_here_is_known() {
        let mut passage = Passage::begin();
        passage.came = ms(5_000);
        assert_eq!(passage.missed_at(ms(5_003)), ms(3));
        passage.hear_at(Mark { at: 7, read: None }, ms(1));
        assert_eq!(passage.missed_at(ms(5_003)), ms(3));
        // Nor of one that says what cannot be.
        let (at, read) = (0, Some(u64::MAX));
        passage.hear_at(Mark { at, read }, ms(1));
        assert_eq!(passage.missed_at(ms(5_003)), ms(3));
        let (at, read) = (u64::MAX, Some(0));
        passage.hear_at(Mark { at, read }, ms(1));
        passage.missed_at(ms(5_003));
    }

    #[test]
    fn clocks_that_go_apart_are_compared_anew() {
        let mut passage = Passage {
            since: Duration::ZERO,
            ..Passage::begin()
        };
        // By a thousandth, for ten minutes: 600 ms. The last half minute's are 30.
        let there = |here: u64| here - here / 1000;
        let mark = |here: u64, read| Mark {
            at: there(here) * MS,
            read,
        };
        for second in 0..600 {
            passage.hear_at(mark(second * 1000, None), ms(second * 1000 + 2));
        }
        passage.hear_at(mark(600_000, Some(there(600_000) * MS)), ms(600_002));
        passage.came = ms(600_002);
        let missed = passage.missed_at(ms(600_002));
        assert!(missed <= ms(33), "{missed:?}");
    }

    #[test]
    fn within_a_host_nothing_is_on_its_way() {
        let mut passage = Passage::within_host();
        let (at, read) = (30 * MS, Some(10 * MS));
        passage.hear_at(Mark { at, read }, ms(900));
        passage.came = ms(900);
        assert_eq!(passage.missed_at(ms(1_000)), ms(990));
    }

    #[test]
    fn a_clock_goes_on_without_what_kvm_noted_with_it() {
        let saved = kvm_clock_data {
            clock: 7_000,
            flags: kvm_bindings::KVM_CLOCK_REALTIME,
            realtime: 5,
            ..Default::default()
        };
        let later = later(&saved, Duration::from_micros(5));
        let (flags, clock) = (later.flags, later.clock);
        assert_eq!((flags, clock), (0, 12_000));
    }
}
