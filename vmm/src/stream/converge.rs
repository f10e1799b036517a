//! When a machine that is sent while its guest writes is stopped for the rest.
//!
//! A pure function of what is known after a round: [`decide`]. Time is given to it, not taken.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Rounds in a row that left no less than the best before them: more of them bring nothing.
const STALLED: u32 = 3;

/// A round that leaves no more than one in so many of what it copied needs no help.
const HELPED: u64 = 2;
/// One that needs help is to leave one in so many.
const WANTED: u64 = 4;

/// What whoever asks for a migration wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The guest may stand still for so long, as far as it can be told beforehand.
    pub downtime: Duration,
    /// It goes on where it was if it has stood still for so long and not all has been sent.
    pub longest: Duration,
    /// Copying may take so long once all that there was has been copied for the first time, which takes as long as it takes.
    pub limit: Duration,
    pub at_limit: AtLimit,
    /// A guest that is not caught up with may be slowed down; `None`: it runs as fast as ever.
    #[serde(default)]
    pub throttle: Option<Throttle>,
}

/// How far a guest may be slowed down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttle {
    /// Percent of the time that its vCPUs are kept out of it at most; more than 99 count as 99.
    pub most: u8,
}

impl Throttle {
    /// All that keeps it alive.
    pub const MOST: u8 = 99;

    /// The share with which a round like one that `sent` so much and `left` so much would leave a [`WANTED`] part; `None`: it needs none, or there is no
    /// greater one. A guest that has written to all that was copied may write many times as fast: that shows next time.
    pub(crate) fn beyond(self, left: u64, sent: u64, throttled: u8) -> Option<u8> {
        let (left, sent) = (u128::from(left), u128::from(sent));
        // Of a round that went through nothing there is nothing to tell.
        if sent == 0 || left * u128::from(HELPED) <= sent {
            return None;
        }
        let runs = u128::from(100 - throttled.min(Self::MOST));
        let suits = runs * sent / (left * u128::from(WANTED)).max(1);
        let next = 100 - u8::try_from(suits).unwrap_or(100).min(100);
        let next = next.min(self.most).min(Self::MOST);
        (next > throttled).then_some(next)
    }
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
    /// Since [`Policy::limit`] counts.
    pub elapsed: Duration,
    /// Bytes that the guest has written to since they were copied.
    pub left: u64,
    /// Bytes that the round has gone through.
    pub sent: u64,
    /// Bytes a second that go to the other side, as far as is known; 0: nothing has been sent.
    pub rate: u64,
    /// Rounds in a row that left no less, or hardly less, than the best before them.
    pub stalled: u32,
    /// Percent of the time that vCPUs are kept out of the guest.
    pub throttled: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    /// What was written is copied while the guest runs on.
    Again,
    /// The same, and its vCPUs are kept out of it for so much of the time; rounds that stalled until then do not count
    /// any more.
    Throttle { percent: u8 },
    /// The guest is stopped for what is left.
    Stop,
    /// The guest runs on, and nothing more is copied.
    GiveUp,
    /// The guest is stopped, and what is left of memory follows when it runs on the other side.
    PostCopy,
}

/// Why something was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// What is left takes no longer than the guest may stand still.
    Fits { takes: Duration, downtime: Duration },
    /// It takes longer, and another round may leave less.
    TakesLonger { takes: Duration, downtime: Duration },
    /// The guest has written to more than a part of what the round went through.
    Behind,
    /// So many rounds in a row left no less, or hardly less, than the best before them.
    Stalled { rounds: u32 },
    /// Copying what was written has taken as long as it may.
    Late { limit: Duration },
    /// It has, and the guest would stand still for longer than it may even then.
    Hopeless { takes: Duration, longest: Duration },
}

/// What to do after a round.
pub fn decide(policy: &Policy, standing: &Standing) -> Decision {
    explained(policy, standing).0
}

/// The same, and why.
pub fn explained(policy: &Policy, standing: &Standing) -> (Decision, Why) {
    let (takes, downtime) = (standing.takes(), policy.downtime);
    if takes <= downtime {
        return (Decision::Stop, Why::Fits { takes, downtime });
    }
    let (limit, longest) = (policy.limit, policy.longest);
    let late = standing.elapsed >= limit;
    // A guest that is slower is a lesser evil than one that stands still, and a greater one than one whose memory follows;
    // at the limit it is too late for it.
    if !late
        && policy.at_limit != AtLimit::PostCopy
        && let Some(throttle) = policy.throttle
        && let Some(percent) = throttle.beyond(standing.left, standing.sent, standing.throttled)
    {
        return (Decision::Throttle { percent }, Why::Behind);
    }
    // Of one that is as slow as it may be a second try brings nothing.
    let slowest = policy
        .throttle
        .is_some_and(|throttle| standing.throttled >= throttle.most.min(Throttle::MOST));
    let most = if slowest { 1 } else { STALLED };
    let rounds = standing.stalled;
    let stalled = |most| (rounds >= most).then_some(Why::Stalled { rounds });
    let late = late.then_some(Why::Late { limit });
    // Twice, as a guest that stands still leaves more of the line; and nobody knows before anything was sent.
    let hopeless = standing.rate > 0 && takes > longest.saturating_mul(2);
    let over = match policy.at_limit {
        // It would be stopped for nothing, and go on here.
        AtLimit::Stop if hopeless => {
            let over = late.or(stalled(most).filter(|_| slowest));
            over.map(|_| (Decision::GiveUp, Why::Hopeless { takes, longest }))
        }
        // It would be stopped with as much left in the end: sooner is as good.
        AtLimit::Stop => late.or(stalled(most)).map(|why| (Decision::Stop, why)),
        AtLimit::PostCopy => late
            .or(stalled(STALLED))
            .map(|why| (Decision::PostCopy, why)),
        AtLimit::GiveUp => late.map(|why| (Decision::GiveUp, why)),
    };
    over.unwrap_or((Decision::Again, Why::TakesLonger { takes, downtime }))
}

/// How things stand in the middle of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Midway {
    /// Since [`Policy::limit`] counts.
    pub elapsed: Duration,
    /// Bytes of memory that the round has, or had when it began.
    pub of: u64,
    /// Bytes of these that it has gone through.
    pub sent: u64,
    /// Bytes that the guest has written to since it began.
    pub written: u64,
    /// Percent of the time that vCPUs are kept out of the guest.
    pub throttled: u8,
}

/// Whether the rest of a round is in vain: the guest has written to so much of it that it will have to be slowed down at
/// its end. With which share of the time the next round begins now. Of a guest with much memory that writes to little of it,
/// however often, that is never so.
pub fn cut(policy: &Policy, midway: &Midway) -> Option<u8> {
    let most = u128::from(midway.written) * u128::from(HELPED) > u128::from(midway.of);
    let may = midway.elapsed < policy.limit && policy.at_limit != AtLimit::PostCopy;
    let throttle = policy.throttle.filter(|_| most && may)?;
    throttle.beyond(midway.written, midway.sent, midway.throttled)
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
            throttle: None,
        }
    }

    /// A guest that dirties `writes` bytes a second of at most `of` bytes, over a link of `rate`: what was decided, when,
    /// and what was left. One that is slowed down dirties less.
    fn migrate(policy: &Policy, of: u64, writes: u64, rate: u64) -> (Decision, Duration, u64) {
        let (mut elapsed, mut left, mut stalled) = (Duration::ZERO, of, 0);
        let (mut least, mut throttled) = (u64::MAX, 0);
        let written = |took: Duration, throttled: u8| {
            let share = u128::from(100 - throttled);
            let written = (u128::from(writes) * took.as_micros() * share / 100_000_000) as u64;
            written.min(of)
        };
        let takes = |bytes: u64| Duration::from_micros(bytes * 1_000_000 / rate + 1);
        'rounds: loop {
            for part in [8, 4, 2] {
                let sent = left / part;
                let midway = Midway {
                    elapsed: elapsed + takes(sent),
                    of: left,
                    sent,
                    written: written(takes(sent), throttled),
                    throttled,
                };
                if let Some(percent) = cut(policy, &midway) {
                    assert!(percent > throttled, "{throttled} {percent}");
                    elapsed = midway.elapsed;
                    // As much as it can be.
                    left = (left - sent + midway.written).min(of);
                    (throttled, stalled, least) = (percent, 0, left);
                    continue 'rounds;
                }
            }
            let (sent, took) = (left, takes(left));
            elapsed += took;
            left = written(took, throttled);
            // As who sends counts them.
            stalled = if left >= least - least / 8 {
                stalled + 1
            } else {
                0
            };
            least = least.min(left);
            let standing = Standing {
                elapsed,
                left,
                sent,
                rate,
                stalled,
                throttled,
            };
            match decide(policy, &standing) {
                Decision::Again => {}
                Decision::Throttle { percent } => {
                    assert!(
                        percent > throttled && percent <= 99,
                        "{throttled} {percent}"
                    );
                    (throttled, stalled, least) = (percent, 0, left);
                }
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

    #[test]
    fn a_guest_that_is_caught_up_with_is_not_slowed_down_and_one_that_is_not_as_far_as_it_takes() {
        let policy = Policy {
            throttle: Some(Throttle { most: 97 }),
            ..policy(AtLimit::Stop)
        };
        let mut standing = Standing {
            elapsed: 100 * MS,
            left: 1 << 29,
            sent: 1 << 30,
            rate: 1 << 30,
            stalled: 0,
            throttled: 0,
        };
        assert_eq!(decide(&policy, &standing), Decision::Again, "by half");
        // A quarter is to be left: three in five of what it writes are too many.
        standing.left = (1 << 30) / 5 * 3;
        let percent = 59;
        assert_eq!(decide(&policy, &standing), Decision::Throttle { percent });
        standing.left = standing.sent;
        for percent in [75, 94, 97] {
            assert_eq!(decide(&policy, &standing), Decision::Throttle { percent });
            standing.throttled = percent;
        }
        assert_eq!(
            decide(&policy, &standing),
            Decision::Again,
            "as slow as it may be"
        );
        standing.stalled = 1;
        assert_eq!(decide(&policy, &standing), Decision::Stop, "for nothing");
        (standing.stalled, standing.sent, standing.throttled) = (0, 0, 0);
        assert_eq!(decide(&policy, &standing), Decision::Again, "nothing went");
        (standing.sent, standing.throttled) = (1 << 30, 97);
        standing.stalled = STALLED;
        assert_eq!(decide(&policy, &standing), Decision::Stop);
        (standing.stalled, standing.throttled) = (1, 0);
        standing.elapsed = policy.limit;
        assert_eq!(decide(&policy, &standing), Decision::Stop);
        standing.elapsed = Duration::ZERO;
        standing.left = 0;
        assert_eq!(decide(&policy, &standing), Decision::Stop);
    }

    #[test]
    fn a_round_is_cut_short_only_where_the_guest_is_slowed_down_at_its_end() {
        let slows = Policy {
            throttle: Some(Throttle { most: 99 }),
            ..policy(AtLimit::Stop)
        };
        let midway = Midway {
            elapsed: 100 * MS,
            of: 1 << 30,
            sent: 1 << 28,
            written: (1 << 29) + 4096,
            throttled: 0,
        };
        // It writes twice as fast as is sent, and an eighth would be as fast as a quarter of that.
        assert_eq!(cut(&slows, &midway), Some(88));
        let half = Midway {
            written: 1 << 29,
            ..midway
        };
        assert_eq!(cut(&slows, &half), None, "half of it may be left");
        let large = Midway {
            of: 1 << 36,
            ..midway
        };
        assert_eq!(cut(&slows, &large), None, "little of all that there is");
        let slowest = Midway {
            throttled: 99,
            ..midway
        };
        assert_eq!(cut(&slows, &slowest), None, "as slow as it may be");
        let late = Midway {
            elapsed: slows.limit,
            ..midway
        };
        assert_eq!(cut(&slows, &late), None, "it is over soon");
        let follows = Policy {
            at_limit: AtLimit::PostCopy,
            ..slows
        };
        assert_eq!(cut(&follows, &midway), None, "it is not slowed down");
        assert_eq!(cut(&policy(AtLimit::Stop), &midway), None, "nor may be");
    }

    proptest! {
        /// Nor does it take longer than without.
        #[test]
        fn a_cut_round_saves_time(
            of in 1u64 << 24..1 << 34,
            rate in 1u64 << 24..1 << 32,
            faster in 2u64..16,
        ) {
            let all = Duration::from_micros(of * 1_000_000 / rate + 1);
            let throttle = Some(Throttle { most: 99 });
            let policy = Policy { limit: all * 40, throttle, ..policy(AtLimit::GiveUp) };
            let (decision, elapsed, _) = migrate(&policy, of, rate * faster, rate);
            prop_assert_eq!(decision, Decision::Stop);
            // A first copy of all, a second and what that leaves: no more than two and a half.
            prop_assert!(elapsed * 2 <= all * 5, "{:?} of {:?}", elapsed, all);
        }

        #[test]
        fn every_migration_comes_to_an_end(
            of in 1u64..1 << 34,
            writes in 0u64..1 << 36,
            rate in 1u64 << 20..1 << 34,
            most in prop::option::of(any::<u8>()),
        ) {
            for at_limit in [AtLimit::Stop, AtLimit::GiveUp, AtLimit::PostCopy] {
                let throttle = most.map(|most| Throttle { most });
                let policy = Policy { throttle, ..policy(at_limit) };
                let (decision, elapsed, left) = migrate(&policy, of, writes, rate);
                // The last round begins before the limit, and takes no longer than all of memory does.
                prop_assert!(elapsed <= policy.limit + Duration::from_micros(of * 1_000_000 / rate + 1));
                let fits = u128::from(left) * 1000 <= u128::from(rate) * 10 + 999;
                let takes = u128::from(left) * 1_000_000 / u128::from(rate);
                let takes_too_long = takes > 2 * policy.longest.as_micros();
                let at_the_limit = match at_limit {
                    AtLimit::Stop if takes_too_long => Decision::GiveUp,
                    AtLimit::Stop => Decision::Stop,
                    AtLimit::GiveUp => Decision::GiveUp,
                    AtLimit::PostCopy => Decision::PostCopy,
                };
                prop_assert!(fits || decision == at_the_limit, "{:?}", decision);
            }
        }

        /// It writes up to thirty times as fast as it is copied, and there is time for as many copies of all as there are
        /// steps, and some more.
        #[test]
        fn a_guest_that_is_slowed_down_is_caught_up_with_where_another_is_not(
            of in 1u64 << 24..1 << 34,
            rate in 1u64 << 20..1 << 28,
            faster in 1u64..30,
        ) {
            let all = Duration::from_micros(of * 1_000_000 / rate + 1);
            let plain = Policy { limit: all * 40, ..policy(AtLimit::GiveUp) };
            let throttled = Policy { throttle: Some(Throttle { most: 99 }), ..plain };
            let writes = rate * faster + rate / 100;
            prop_assert_eq!(migrate(&plain, of, writes, rate).0, Decision::GiveUp);
            prop_assert_eq!(migrate(&throttled, of, writes, rate).0, Decision::Stop);
            // One that would be stopped sooner or later is stopped for less.
            let stops = |policy| migrate(&Policy { at_limit: AtLimit::Stop, ..policy }, of, writes, rate);
            prop_assert_eq!(stops(plain).2, of);
            let (decision, _, left) = stops(throttled);
            prop_assert_eq!(decision, Decision::Stop);
            prop_assert!(u128::from(left) * 1000 <= u128::from(rate) * 10 + 999);
        }
    }
}
