//! Time, passed in. Owns the two traits' worth of "now" and "later" that the controller's logic is
//! allowed to know; nothing else in the crate asks the operating system for the time, so that the
//! simulation decides it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::BoxFuture;

/// Now, and a later moment to wait for.
pub trait Clock: Send + Sync + 'static {
    /// Microseconds since the Unix epoch, UTC. Never goes backwards within a process by more than
    /// the operator sets the clock back.
    fn now_us(&self) -> i64;

    /// Resolves once `duration` has passed on this clock.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl SystemClock {
    pub fn shared() -> Arc<dyn Clock> {
        Arc::new(Self)
    }
}

impl Clock for SystemClock {
    fn now_us(&self) -> i64 {
        // A clock before 1970 counts as 1970: it is wrong anyway, and an error here would have no
        // reader.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }
}

/// A clock that stands still until it is told to go on. Sleepers are woken by [`Self::advance`].
#[derive(Debug, Clone)]
pub struct SimulatedClock {
    now_us: Arc<AtomicI64>,
    moved: Arc<tokio::sync::watch::Sender<i64>>,
}

impl SimulatedClock {
    pub fn starting_at(now_us: i64) -> Self {
        let (moved, _) = tokio::sync::watch::channel(now_us);
        Self {
            now_us: Arc::new(AtomicI64::new(now_us)),
            moved: Arc::new(moved),
        }
    }

    /// Lets `duration` pass.
    pub fn advance(&self, duration: Duration) {
        let by = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        let now = self
            .now_us
            .fetch_add(by, Ordering::SeqCst)
            .saturating_add(by);
        self.moved.send_replace(now);
    }
}

impl Clock for SimulatedClock {
    fn now_us(&self) -> i64 {
        self.now_us.load(Ordering::SeqCst)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let by = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        let until = self.now_us().saturating_add(by);
        let mut moved = self.moved.subscribe();
        async move {
            // The sender lives as long as the clock; without it no time passes ever again.
            if moved.wait_for(|now| *now >= until).await.is_err() {
                futures::future::pending::<()>().await;
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sleeper_wakes_when_its_time_has_come_and_not_before() {
        let clock = SimulatedClock::starting_at(1_000);
        let mut sleep = clock.sleep(Duration::from_micros(500));
        clock.advance(Duration::from_micros(499));
        assert!((&mut sleep).now_or_never().is_none());
        clock.advance(Duration::from_micros(1));
        sleep.await;
        assert_eq!(clock.now_us(), 1_500);
    }
}
