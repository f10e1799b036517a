//! When to tell what a guest changes as often as it likes: the first time at once, and then now and then.

use std::time::{Duration, Instant};

use super::protocol::PAUSE;

#[derive(Debug, Default)]
pub struct Pace {
    told_at: Option<Instant>,
    untold: bool,
}

impl Pace {
    pub fn happened(&mut self) {
        self.untold = true;
    }

    /// How long it may wait; none: there is nothing to tell.
    pub fn left(&self) -> Option<Duration> {
        let since = self.told_at.map_or(PAUSE, |at| at.elapsed());
        self.untold.then(|| PAUSE.saturating_sub(since))
    }

    /// Whether it is to be told now. It counts as told then.
    pub fn is_due(&mut self) -> bool {
        let due = self.left() == Some(Duration::ZERO);
        if due {
            (self.told_at, self.untold) = (Some(Instant::now()), false);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_all_the_time_is_told_now_and_then_and_the_last_of_it_too() {
        let mut pace = Pace::default();
        assert!(!pace.is_due() && pace.left().is_none());
        pace.happened();
        assert!(pace.is_due(), "the first time");
        (0..1000).for_each(|_| pace.happened());
        assert!(pace.left().is_some_and(|left| left <= PAUSE));
        pace.told_at = Instant::now().checked_sub(PAUSE);
        assert!(pace.is_due());
        assert!(!pace.is_due());
    }
}
