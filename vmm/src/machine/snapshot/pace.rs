//! When a guest that is copied while it runs is stopped for the rest: a pure function of the last round ([`next`]).
//!
//! What is left for the pause has to fit a buffer, else the pause is as long as the file is slow. A guest that writes more
//! than that while it is copied is slowed down, as one that is sent is; where that does not help it is left alone.

use std::time::Duration;

use super::Round;
use crate::stream::PAGE;
use crate::stream::converge::Throttle;

/// A round of so few pages is the last: 4 MiB, a millisecond's copy.
const FEW: u64 = 1024;
/// So many times the guest is copied as fast as it is.
const ROUNDS: usize = 4;
/// So many pages are copied to a buffer in the pause, at most.
pub const MOST_KEPT: u64 = (64 << 20) / PAGE as u64;
/// With so many left the guest is stopped: what it writes until it stands still has room, too.
const FITS: u64 = MOST_KEPT / 4 * 3;

/// No further round begins of a guest that has been slowed down for so long to little effect: programs that miss their time, and other hosts
/// that wait for it, are worse than no snapshot.
const SLOW: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// What was written is copied while the guest runs on.
    Again,
    /// The same, and its vCPUs are kept out of it for so much of the time.
    Slow { percent: u8 },
    /// It is stopped for what is left.
    Stop,
    /// More is left than fits, and nothing helps.
    GiveUp,
}

/// What to do after so many rounds, of which this is the last.
///
/// It comes to an end: the share only grows, and rounds of which each leaves a quarter less than it copied become few. A
/// guest that has been `slowed` for as long as it may be is let alone, unless a round still halves what is left.
pub fn next(rounds: usize, slowed: Duration, last: &Round) -> Next {
    let Round { pages, left, .. } = *last;
    if left <= FITS && (pages <= FEW || rounds >= ROUNDS) {
        return Next::Stop;
    }
    if rounds < ROUNDS {
        return Next::Again;
    }
    if slowed >= SLOW && left > pages / 2 {
        return Next::GiveUp;
    }
    match slower(pages, left, last.throttled) {
        Some(percent) => Next::Slow { percent },
        None if left <= pages / 4 * 3 => Next::Again,
        None => Next::GiveUp,
    }
}

/// The share by which the guest would be caught up with, after a round of `pages` that left so many; none: it is without
/// another, or there is no greater one.
pub fn slower(pages: u64, left: u64, throttled: u8) -> Option<u8> {
    let most = Throttle::MOST;
    Throttle { most }.beyond(left, pages, throttled)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round(pages: u64, left: u64, throttled: u8) -> Round {
        Round {
            pages,
            left,
            throttled,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn a_guest_is_stopped_when_little_is_left_and_slowed_down_when_much_stays() {
        let slow = |percent| Next::Slow { percent };
        for (rounds, (pages, left, throttled), expected) in [
            (1, (100_000, 10, 0), Next::Again),
            (2, (10, 0, 0), Next::Stop),
            // Few were copied, and then it began to write.
            (2, (10, 100_000, 0), Next::Again),
            (3, (100_000, 100_000, 0), Next::Again),
            (4, (100_000, FITS, 0), Next::Stop),
            (4, (100_000, FITS + 1, 0), Next::Again),
            (4, (100_000, 100_000, 0), slow(75)),
            (5, (100_000, 60_000, 0), slow(59)),
            (5, (100_000, 100_000, 75), slow(94)),
            (6, (100_000, 100_000, 94), slow(99)),
            (7, (100_000, 40_000, 99), Next::Again),
            (7, (100_000, 75_000, 99), Next::Again),
            (7, (100_000, 76_000, 99), Next::GiveUp),
            (7, (100_000, FITS, 99), Next::Stop),
        ] {
            let last = round(pages, left, throttled);
            let found = next(rounds, Duration::ZERO, &last);
            assert_eq!(found, expected, "{rounds} {last:?}");
        }
        let late = |left| next(6, SLOW, &round(100_000, left, 75));
        assert_eq!(late(FITS), Next::Stop);
        assert_eq!(late(50_000), Next::Again);
        assert_eq!(late(50_001), Next::GiveUp);
    }

    proptest! {
        /// It writes `writes` pages while one is copied, in thousandths, of `of` pages at most.
        #[test]
        fn every_copy_comes_to_an_end_and_what_is_kept_fits(
            of in 1u64..1 << 32,
            writes in 0u64..1 << 20,
        ) {
            let (mut pages, mut throttled, mut rounds) = (of, 0, 0);
            let mut copied = 0;
            let left = loop {
                let runs = u64::from(100 - throttled);
                let left = (pages.saturating_mul(writes * runs) / 100_000).min(of);
                (rounds, copied) = (rounds + 1, copied + pages);
                match next(rounds, Duration::ZERO, &round(pages, left, throttled)) {
                    Next::Again => {}
                    Next::Slow { percent } => {
                        prop_assert!(percent > throttled && percent <= 99);
                        throttled = percent;
                    }
                    Next::Stop => break left,
                    Next::GiveUp => {
                        // A hundredth of what it writes is too much.
                        prop_assert!(writes * 8 >= 590_000, "{} {}", of, writes);
                        break 0;
                    }
                }
                pages = left;
            };
            prop_assert!(left <= FITS);
            prop_assert!(copied / of < 16, "{} of {}", copied, of);
        }
    }
}
