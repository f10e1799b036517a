//! A token bucket: a rate with a burst. Time is passed in.

use std::time::{Duration, Instant};

/// Whoever takes may take more than there is: the debt is waited for before the next may take. So
/// a request of any size passes, and the rate holds over time.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Tokens a second, not 0.
    rate: u64,
    burst: u64,
    /// Tokens now, in billionths.
    level: i128,
    refilled: Instant,
}

const SCALE: i128 = 1_000_000_000;

impl TokenBucket {
    /// Full at first. A rate of 0 counts as 1.
    pub fn new(rate: u64, burst: u64, now: Instant) -> Self {
        let burst = burst.max(1);
        Self {
            rate: rate.max(1),
            burst,
            level: i128::from(burst) * SCALE,
            refilled: now,
        }
    }

    /// How long until someone may take; zero means now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.refill(now);
        if self.level > 0 {
            return Duration::ZERO;
        }
        let nanoseconds = (1 - self.level) / i128::from(self.rate) + 1;
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX).max(1))
    }

    pub fn take(&mut self, tokens: u64, now: Instant) {
        self.refill(now);
        self.level -= i128::from(tokens) * SCALE;
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled).as_nanos() as i128;
        self.refilled = self.refilled.max(now);
        let full = i128::from(self.burst) * SCALE;
        self.level = (self.level + elapsed * i128::from(self.rate)).min(full);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn over_any_time_at_most_rate_and_burst_and_one_request_pass(
            rate in 1u64..1 << 30,
            burst in 1u64..1 << 20,
            requests in prop::collection::vec((1u64..1 << 20, 0u64..1 << 30), 1..100),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = TokenBucket::new(rate, burst, start);
            let (mut taken, mut last) = (0u128, 0);
            for (tokens, pause) in requests {
                now += Duration::from_nanos(pause);
                now += bucket.wait(now);
                prop_assert_eq!(bucket.wait(now), Duration::ZERO, "the wait was long enough");
                bucket.take(tokens, now);
                taken += u128::from(tokens);
                last = tokens;
                let allowed = now.duration_since(start).as_nanos() * u128::from(rate) / 1_000_000_000;
                prop_assert!(taken <= allowed + u128::from(burst) + u128::from(last) + 1);
            }
            let _ = last;
        }
    }
}
