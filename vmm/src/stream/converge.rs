//! When a machine that is sent while its guest writes is stopped for the rest.
//!
//! A pure function of what is known after a round: [`decide`]. Time is given to it, not taken.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Rounds in a row that left no less than the best before them: more of them bring nothing.
const STALLED: u32 = 3;

/// What whoever asks for a migration wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The guest may stand still for so long, as far as it can be told beforehand.
    pub downtime: Duration,
    /// It goes on where it was if it has stood still for so long and not all has been sent.
    pub longest: Duration,
    /// Copying may take so long, from the beginning.
    pub limit: Duration,
    pub at_limit: AtLimit,
}

/// What becomes of a guest that writes faster than it is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AtLimit {
    /// It stands still for as long as the rest takes.
    Stop,
    /// It stays where it is; so does one whose writes nobody can log while it runs (vhost-net).
    GiveUp,
    /// It goes on at the other side, and its memory follows: whoever touches what has not come waits. Then the guest is
    /// on both sides in part, and ends with either of them.
    PostCopy,
}

/// How things stand after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Since the migration began.
    pub elapsed: Duration,
    /// Bytes that the guest has written to since they were copied.
    pub left: u64,
    /// Bytes a second that go to the other side, as far as is known; 0: nothing has been sent.
    pub rate: u64,
    /// Rounds in a row that left no less, or hardly less, than the best before them.
    pub stalled: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    /// What was written is copied while the guest runs on.
    Again,
    /// The guest is stopped for what is left.
    Stop,
    /// The guest runs on, and nothing more is copied.
    GiveUp,
    /// The guest is stopped, and what is left of memory follows when it runs on the other side.
    PostCopy,
}

/// What to do after a round.
pub fn decide(policy: &Policy, standing: &Standing) -> Decision {
    if standing.takes() <= policy.downtime {
        return Decision::Stop;
    }
    let late = standing.elapsed >= policy.limit;
    match policy.at_limit {
        // It would be stopped with as much left in the end: sooner is as good.
        AtLimit::Stop if late || standing.stalled >= STALLED => Decision::Stop,
        AtLimit::PostCopy if late || standing.stalled >= STALLED => Decision::PostCopy,
        AtLimit::GiveUp if late => Decision::GiveUp,
        _ => Decision::Again,
    }
}

impl Standing {
    /// How long what is left would take, at the pace of the last round.
    pub fn takes(&self) -> Duration {
        match (self.left, self.rate) {
            (0, _) => Duration::ZERO,
            (_, 0) => Duration::MAX,
            (left, rate) => {
                let us = u128::from(left) * 1_000_000 / u128::from(rate);
                Duration::from_micros(us.try_into().unwrap_or(u64::MAX))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn policy(at_limit: AtLimit) -> Policy {
        Policy {
            downtime: 10 * MS,
            longest: 1000 * MS,
            limit: 1000 * MS,
            at_limit,
        }
    }

    /// A guest that dirties `writes` bytes a second of at most `of` bytes, over a link of `rate`: what was decided, when,
    /// and what was left.
    fn migrate(policy: &Policy, of: u64, writes: u64, rate: u64) -> (Decision, Duration, u64) {
        let (mut elapsed, mut left, mut stalled) = (Duration::ZERO, of, 0);
        loop {
            let took = Duration::from_micros(left * 1_000_000 / rate + 1);
            elapsed += took;
            let dirtied = (writes as u128 * took.as_micros() / 1_000_000) as u64;
            stalled = if dirtied.min(of) >= left {
                stalled + 1
            } else {
                0
            };
            left = dirtied.min(of);
            let standing = Standing {
                elapsed,
                left,
                rate,
                stalled,
            };
            match decide(policy, &standing) {
                Decision::Again => {}
                decision => return (decision, elapsed, left),
            }
        }
    }

    #[test]
    fn a_guest_that_can_be_caught_up_with_is_stopped_within_its_downtime() {
        for at_limit in [AtLimit::Stop, AtLimit::GiveUp, AtLimit::PostCopy] {
            let policy = policy(at_limit);
            let (decision, elapsed, left) = migrate(&policy, 256 << 20, 300 << 20, 1 << 30);
            assert_eq!(decision, Decision::Stop);
            assert!(
                elapsed < policy.limit && left * 100 < 1 << 30,
                "{elapsed:?} {left}"
            );
        }
    }

    #[test]
    fn one_that_writes_faster_is_stopped_soon_or_left_where_it_is_in_time() {
        let (decision, elapsed, left) = migrate(&policy(AtLimit::Stop), 64 << 20, 4 << 30, 1 << 30);
        assert_eq!((decision, left), (Decision::Stop, 64 << 20));
        assert!(elapsed < 300 * MS, "{elapsed:?}");
        let (decision, elapsed, _) =
            migrate(&policy(AtLimit::PostCopy), 64 << 20, 4 << 30, 1 << 30);
        assert_eq!(decision, Decision::PostCopy);
        assert!(elapsed < 300 * MS, "{elapsed:?}");
        let (decision, elapsed, _) = migrate(&policy(AtLimit::GiveUp), 64 << 20, 4 << 30, 1 << 30);
        assert_eq!(decision, Decision::GiveUp);
        assert!((1000 * MS..1100 * MS).contains(&elapsed), "{elapsed:?}");
    }

    proptest! {
        #[test]
        fn every_migration_comes_to_an_end(of in 1u64..1 << 34, writes in 0u64..1 << 36, rate in 1u64 << 20..1 << 34) {
            for at_limit in [AtLimit::Stop, AtLimit::GiveUp, AtLimit::PostCopy] {
                let policy = policy(at_limit);
                let (decision, elapsed, left) = migrate(&policy, of, writes, rate);
                // The last round begins before the limit, and takes no longer than all of memory does.
                prop_assert!(elapsed <= policy.limit + Duration::from_micros(of * 1_000_000 / rate + 1));
                let fits = u128::from(left) * 1000 <= u128::from(rate) * 10 + 999;
                let at_the_limit = match at_limit {
                    AtLimit::Stop => Decision::Stop,
                    AtLimit::GiveUp => Decision::GiveUp,
                    AtLimit::PostCopy => Decision::PostCopy,
                };
                prop_assert!(fits || decision == at_the_limit);
            }
        }
    }
}
