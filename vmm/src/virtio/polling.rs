//! Looking for a driver's next request instead of sleeping until its kick.
//!
//! A kick costs the guest an exit and the device's thread a wake-up, on a virtual host tens of
//! microseconds each: more than a request takes that the host's cache answers. So a thread that had
//! requests close upon one another looks for the next one for a moment before it asks to be kicked.
//! QEMU's iothreads do it for up to 32 us, vhost-net as long as it is told to (50 us are usual).

use std::time::{Duration, Instant};

/// How long a look takes if nothing comes.
const WINDOW: Duration = Duration::from_micros(50);
/// A look is worth it if the last request came so soon. Longer than the window, since what was slept
/// through took a wake-up more than what is looked for.
const NEAR: Duration = Duration::from_micros(100);
/// The most waits in a row that are not looked into, because looks were in vain.
const SKIP_MAX: u32 = 8;

/// Whether one thread looks for requests. Told when there was nothing to do, and when there was again.
#[derive(Default)]
pub struct Polling {
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    /// The last wait was short.
    near: bool,
    /// Waits that are still not to be looked into, and how many that were at first.
    skip: u32,
    skipped: u32,
}

impl Polling {
    /// Takes note that there is something to do (again).
    pub fn found(&mut self) {
        self.found_at(Instant::now);
    }

    fn found_at(&mut self, now: impl FnOnce() -> Instant) {
        if let Some(since) = self.idle_since.take() {
            self.near = now().saturating_duration_since(since) <= NEAR;
        }
    }

    /// There is nothing to do: looks until `more` says that there is, or for as long as it is worth it.
    /// Whether there is more.
    pub fn look(&mut self, mut more: impl FnMut() -> bool) -> bool {
        let Some(until) = self.until(Instant::now()) else {
            return false;
        };
        while Instant::now() < until {
            if more() {
                self.skipped = 0;
                return true;
            }
            std::hint::spin_loop();
        }
        self.missed();
        false
    }

    /// Until when a look is worth it, if at all.
    fn until(&mut self, now: Instant) -> Option<Instant> {
        self.idle_since.get_or_insert(now);
        if !self.near {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        Some(now + WINDOW)
    }

    /// Each look in vain makes the next one rarer, until one is not.
    fn missed(&mut self) {
        self.skipped = (2 * self.skipped).clamp(1, SKIP_MAX);
        self.skip = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wait of `us` microseconds; whether it was looked into.
    fn wait(polling: &mut Polling, now: &mut Instant, us: u64) -> bool {
        let until = polling.until(*now);
        *now += Duration::from_micros(us);
        if until.is_some_and(|until| until < *now) {
            polling.missed();
        } else if until.is_some() {
            polling.skipped = 0;
        }
        polling.found_at(|| *now);
        until.is_some()
    }

    #[test]
    fn only_requests_close_upon_one_another_are_looked_for() {
        let (mut polling, mut now) = (Polling::default(), Instant::now());
        assert!(!wait(&mut polling, &mut now, 20), "nothing is known yet");
        assert!(wait(&mut polling, &mut now, 20));
        assert!(wait(&mut polling, &mut now, 10_000), "the last was near");
        for _ in 0..100 {
            assert!(!wait(&mut polling, &mut now, 10_000));
        }
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_is_not_brings_them_back() {
        let (mut polling, mut now) = (Polling::default(), Instant::now());
        // Near enough to be hoped for, and always too late.
        let looks = (0..1000)
            .filter(|_| wait(&mut polling, &mut now, 80))
            .count();
        assert!((1000 / 9..130).contains(&looks), "{looks} of 1000");
        let first = (0..20).position(|_| wait(&mut polling, &mut now, 20));
        assert!(first.is_some_and(|first| first <= SKIP_MAX as usize));
        assert!((0..100).all(|_| wait(&mut polling, &mut now, 20)));
    }

    #[test]
    fn a_look_ends_by_itself_and_sees_what_comes() {
        let mut polling = Polling {
            near: true,
            ..Polling::default()
        };
        let mut looks = 0;
        assert!(polling.look(|| {
            looks += 1;
            looks == 3
        }));
        polling.found();
        polling.near = true;
        assert!(!polling.look(|| false));
        assert!(!polling.look(|| true), "the next wait is not looked into");
    }
}
