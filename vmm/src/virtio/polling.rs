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
/// Of waits after a long one each that many is looked into all the same: a wake-up may be all that was
/// long.
const CHANCE: u32 = 32;

/// Whether one thread looks for requests. Told when there was nothing to do, and when there was again.
#[derive(Default)]
pub struct Polling {
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    /// The last wait was short.
    near: bool,
    /// Waits that were not looked into since one was short.
    far: u32,
    /// Waits that are still not to be looked into, and how many that were at first.
    skip: u32,
    skipped: u32,
    /// A look was in vain, and nothing has come since.
    in_vain: bool,
}

impl Polling {
    /// Takes note that there is something to do (again).
    pub fn found(&mut self) {
        self.found_at(Instant::now);
    }

    fn found_at(&mut self, now: impl FnOnce() -> Instant) {
        let Some(since) = self.idle_since.take() else {
            return;
        };
        self.near = now().saturating_duration_since(since) <= NEAR;
        if std::mem::take(&mut self.in_vain) {
            // Each look in vain makes the next one rarer, until one is not.
            self.skipped = (2 * self.skipped).clamp(1, SKIP_MAX);
            self.skip = self.skipped;
        }
    }

    /// There is nothing to do: looks until `more` says that there is, or for as long as it is worth it.
    /// Whether there is more.
    pub fn look(&mut self, more: impl FnMut() -> bool) -> bool {
        self.look_by(Instant::now, more)
    }

    fn look_by(
        &mut self,
        mut now: impl FnMut() -> Instant,
        mut more: impl FnMut() -> bool,
    ) -> bool {
        let began = now();
        self.idle_since.get_or_insert(began);
        if !self.is_worth_it() {
            return false;
        }
        loop {
            // The time first: who lost its processor meanwhile still looks once more.
            let over = now().saturating_duration_since(began) >= WINDOW;
            if more() {
                self.skipped = 0;
                return true;
            }
            if over {
                self.in_vain = true;
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn is_worth_it(&mut self) -> bool {
        if !self.near {
            self.far += 1;
            if self.far < CHANCE {
                return false;
            }
        }
        self.far = 0;
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Clock(Cell<Instant>);

    impl Clock {
        /// A wait in which something comes after `us`, or a while later for who sleeps; whether it was looked for.
        fn wait(&self, polling: &mut Polling, us: u64, wake_up: u64) -> bool {
            let begin = self.0.get();
            let comes = begin + Duration::from_micros(us);
            let looked = Cell::new(false);
            let found = polling.look_by(
                || {
                    self.0.set(self.0.get() + Duration::from_micros(1));
                    self.0.get()
                },
                || {
                    looked.set(true);
                    self.0.get() >= comes
                },
            );
            if !found {
                self.0
                    .set(comes.max(self.0.get()) + Duration::from_micros(wake_up));
            }
            polling.found_at(|| self.0.get());
            looked.get()
        }
    }

    fn new() -> (Polling, Clock) {
        (Polling::default(), Clock(Cell::new(Instant::now())))
    }

    #[test]
    fn only_requests_close_upon_one_another_are_looked_for() {
        let (mut polling, clock) = new();
        assert!(!clock.wait(&mut polling, 20, 20), "nothing is known yet");
        assert!((0..100).all(|_| clock.wait(&mut polling, 20, 20)));
        assert!(clock.wait(&mut polling, 10_000, 20), "the last was near");
        let looks = (0..3200).filter(|_| clock.wait(&mut polling, 10_000, 20));
        let looks = looks.count();
        assert!((1..=100).contains(&looks), "{looks} of 3200");
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_is_not_brings_them_back() {
        let (mut polling, clock) = new();
        // Near enough to be hoped for, and always too late.
        let looks = (0..1000).filter(|_| clock.wait(&mut polling, 80, 0));
        let looks = looks.count();
        assert!((1000 / 9..130).contains(&looks), "{looks} of 1000");
        let first = (0..20).position(|_| clock.wait(&mut polling, 20, 0));
        assert!(first.is_some_and(|first| first <= SKIP_MAX as usize));
        assert!((0..100).all(|_| clock.wait(&mut polling, 20, 0)));
    }

    /// Where waking up takes longer than what was slept through.
    #[test]
    fn a_slow_wake_up_does_not_keep_it_from_looking() {
        let (mut polling, clock) = new();
        let first = (0..100).position(|_| clock.wait(&mut polling, 20, 200));
        assert!(first.is_some_and(|first| first <= CHANCE as usize));
        assert!((0..100).all(|_| clock.wait(&mut polling, 20, 200)));
    }

    /// Its processor was taken from it while the request came.
    #[test]
    fn a_look_that_took_too_long_looks_once_more() {
        let mut polling = Polling {
            near: true,
            ..Polling::default()
        };
        let begin = Instant::now();
        let mut times = [begin, begin + Duration::from_millis(5)].into_iter();
        assert!(polling.look_by(|| times.next().unwrap(), || true));
        assert!(!polling.in_vain);
    }

    #[test]
    fn a_look_ends_by_itself() {
        let mut polling = Polling {
            near: true,
            ..Polling::default()
        };
        assert!(!polling.look(|| false));
        assert!(polling.in_vain);
    }
}
