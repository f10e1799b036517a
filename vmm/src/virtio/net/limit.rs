//! How much may pass: the rates of one direction, over all pairs of queues.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::NetLimit;
use crate::virtio::bucket::TokenBucket;

/// A second's burst unless the config says otherwise.
const BURST_MS: u64 = 1000;

/// Shared by the threads of a device. Without a limit it costs nothing.
#[derive(Clone, Default)]
pub struct Limiter(Option<Arc<Mutex<Buckets>>>);

struct Buckets {
    bytes: Option<TokenBucket>,
    packets: Option<TokenBucket>,
}

impl Limiter {
    pub fn new(limit: Option<&NetLimit>, now: Instant) -> Self {
        let Some(limit) = limit else {
            return Self::default();
        };
        let bucket = |rate: u64| {
            let ms = match limit.burst_ms {
                0 => BURST_MS,
                ms => u64::from(ms),
            };
            let burst = u128::from(rate) * u128::from(ms) / 1000;
            TokenBucket::new(rate, u64::try_from(burst).unwrap_or(u64::MAX), now)
        };
        Self(Some(Arc::new(Mutex::new(Buckets {
            bytes: limit.bytes_per_second.map(bucket),
            packets: limit.packets_per_second.map(bucket),
        }))))
    }

    /// How long until the next packet may pass; zero means now.
    pub fn wait(&self) -> Duration {
        let Some(mut buckets) = self.lock() else {
            return Duration::ZERO;
        };
        let now = Instant::now();
        let Buckets { bytes, packets } = &mut *buckets;
        let waits = [bytes, packets].map(|bucket| bucket.as_mut().map(|bucket| bucket.wait(now)));
        waits.into_iter().flatten().max().unwrap_or_default()
    }

    /// Takes note of a packet that passed.
    pub fn passed(&self, length: usize) {
        let Some(mut buckets) = self.lock() else {
            return;
        };
        let now = Instant::now();
        let Buckets { bytes, packets } = &mut *buckets;
        for (bucket, tokens) in [(bytes, length as u64), (packets, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens, now);
            }
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Buckets>> {
        let buckets = self.0.as_ref()?;
        Some(buckets.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
