//! A vCPU that is kept out of the guest for a share of the time, so that the guest writes less while it is sent.
//!
//! Time goes in periods of 10 ms, which all vCPUs of a machine have in common: one that holds a lock is not out while the
//! others are in, and wait for it. For its part of a period a vCPU runs, then its own thread waits for the rest. An alarm of
//! that thread calls it out of the guest ([`Alarm`]); whoever wants it for something else calls it out of the wait, too,
//! and so does who changes the share. (QEMU runs a vCPU for 10 ms at least, so that at 99 % the guest stands still for
//! a second at a time.)

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::signal::Alarm;

const PERIOD: Duration = Duration::from_millis(10);
/// Percent of the time at most: the guest never stands still.
const MOST: u8 = 99;
/// A thread that wakes late has half of its part, or this, whichever is less: at 99 % it would often have none.
const GRACE: Duration = Duration::from_micros(500);

/// Percent of the time that vCPUs are kept out of the guest; all of a machine's have the same.
#[derive(Debug, Clone)]
pub struct Share {
    percent: Arc<AtomicU8>,
    /// When a period began.
    since: Instant,
}

impl Default for Share {
    fn default() -> Self {
        Share {
            percent: Arc::default(),
            since: Instant::now(),
        }
    }
}

impl Share {
    pub fn get(&self) -> u8 {
        self.percent.load(Ordering::Acquire)
    }

    /// True if it was another.
    pub fn set(&self, percent: u8) -> bool {
        let percent = percent.min(MOST);
        self.percent.swap(percent, Ordering::AcqRel) != percent
    }

    /// What has gone of the period.
    fn gone(&self, now: Instant) -> Duration {
        let all = now.saturating_duration_since(self.since).as_nanos() % PERIOD.as_nanos();
        Duration::from_nanos(all as u64)
    }
}

/// One vCPU's, on its thread.
pub struct Throttle {
    share: Share,
    alarm: Alarm,
    /// It may run until then; `None`: as long as it likes, or no period has begun.
    until: Option<Instant>,
}

impl Throttle {
    /// On the vCPU's thread, which the signal that calls vCPUs finds ready.
    pub fn new(share: Share) -> io::Result<Self> {
        Ok(Self {
            share,
            alarm: Alarm::new()?,
            until: None,
        })
    }

    /// It runs again after a rest.
    pub fn begin(&mut self) {
        self.until = None;
    }

    /// Waits until the vCPU may enter the guest; false if it is called off before.
    pub fn lets_in(&mut self, called_off: impl Fn() -> bool) -> bool {
        if self.share.get() == 0 {
            if self.until.take().is_some() {
                self.alarm.stop();
            }
            return true;
        }
        if self.until.is_some_and(|until| Instant::now() < until) {
            return true;
        }
        let Some(part) = self.wait(called_off) else {
            return false;
        };
        self.until = Some(Instant::now() + part);
        self.alarm.set(part);
        true
    }

    /// Until its part of a period: for how long it may run. None: it is called off.
    fn wait(&self, called_off: impl Fn() -> bool) -> Option<Duration> {
        let mut begins = None;
        loop {
            let now = Instant::now();
            let is_late = begins.is_some_and(|begins| now >= begins);
            let waits = match turn(self.share.gone(now), self.share.get(), is_late) {
                Turn::In(part) => return Some(part),
                Turn::Out(waits) => waits,
            };
            if called_off() {
                return None;
            }
            begins.get_or_insert(now + waits);
            thread::park_timeout(waits);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Turn {
    In(Duration),
    Out(Duration),
}

/// Where so much of a period has gone. Late is one that was to run from the beginning of one.
fn turn(gone: Duration, percent: u8, is_late: bool) -> Turn {
    let part = PERIOD * u32::from(100 - percent.min(MOST)) / 100;
    let left = part.saturating_sub(gone);
    let least = match is_late {
        true => (part / 2).min(GRACE),
        false => Duration::ZERO,
    };
    match left.max(least) {
        Duration::ZERO => Turn::Out(PERIOD.saturating_sub(gone)),
        left => Turn::In(left),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::channel;

    use super::super::signal;
    use super::*;

    fn throttle(percent: u8) -> Throttle {
        signal::install().unwrap();
        let share = Share::default();
        share.set(percent);
        Throttle::new(share).unwrap()
    }

    #[test]
    fn a_vcpu_is_in_for_the_first_part_of_each_period() {
        let us = Duration::from_micros;
        for (gone, percent, is_late, expected) in [
            (0, 75, false, Turn::In(us(2500))),
            (2400, 75, false, Turn::In(us(100))),
            (2500, 75, false, Turn::Out(us(7500))),
            (9999, 75, false, Turn::Out(us(1))),
            (0, 99, false, Turn::In(us(100))),
            (100, 99, false, Turn::Out(us(9900))),
            (0, 200, false, Turn::In(us(100))),
            // Who wakes late has something of its part, though it is over.
            (20, 99, true, Turn::In(us(80))),
            (90, 99, true, Turn::In(us(50))),
            (9000, 99, true, Turn::In(us(50))),
            (5000, 20, true, Turn::In(us(3000))),
            (8000, 20, true, Turn::In(us(500))),
        ] {
            assert_eq!(
                turn(us(gone), percent, is_late),
                expected,
                "{gone} {percent}"
            );
        }
    }

    #[test]
    fn one_is_let_in_for_its_part_of_the_time_and_no_longer() {
        for percent in [20, 50, 99] {
            let mut throttle = throttle(percent);
            let (began, mut turns, mut until) = (Instant::now(), 0, None);
            let mut granted = Duration::ZERO;
            // As often as it comes out, for a port or so.
            while turns < 10 {
                assert!(throttle.lets_in(|| false));
                if throttle.until != until {
                    (turns, until) = (turns + 1, throttle.until);
                    granted += until.unwrap().saturating_duration_since(Instant::now());
                }
            }
            let periods = began.elapsed().as_nanos().div_ceil(PERIOD.as_nanos()) as u32 + 1;
            let part = PERIOD * u32::from(100 - percent) / 100;
            let most = (part + GRACE.min(part)) * periods;
            assert!(granted <= most, "{percent}: {granted:?} in {periods}");
            assert!(periods > 2, "{percent}: it never waited");
        }
    }

    #[test]
    fn vcpus_have_their_periods_in_common() {
        let share = Share::default();
        let (one, other) = (share.clone(), share.clone());
        let now = Instant::now();
        assert_eq!(one.gone(now), other.gone(now));
        assert_eq!(one.gone(now + PERIOD * 3), one.gone(now));
        assert_ne!(one.gone(now + PERIOD / 2), one.gone(now));
    }

    #[test]
    fn one_of_no_share_is_never_kept_out() {
        let mut throttle = throttle(0);
        for _ in 0..10 {
            assert!(throttle.lets_in(|| panic!("nobody waits")));
        }
        throttle.share.set(99);
        assert!(throttle.lets_in(|| false));
        while Instant::now() < throttle.until.unwrap() {}
        throttle.share.set(0);
        assert!(throttle.lets_in(|| panic!("nobody waits any more")));
        assert_eq!(throttle.until, None);
        assert!(!throttle.share.set(0) && throttle.share.set(100));
        assert_eq!(throttle.share.get(), MOST);
    }

    /// The wait would be of a period; who calls says so and wakes the thread.
    #[test]
    fn one_that_is_wanted_or_whose_share_ends_waits_no_longer() {
        let (share, wanted) = (Share::default(), Arc::new(AtomicBool::new(false)));
        share.set(99);
        let (its, is_wanted) = (share.clone(), Arc::clone(&wanted));
        let (tell, told) = channel();
        let thread = thread::spawn(move || {
            signal::install().unwrap();
            let mut throttle = Throttle::new(its).unwrap();
            let mut last = true;
            while last {
                last = throttle.lets_in(|| is_wanted.load(Ordering::Acquire));
                let _ = tell.send(last);
            }
        });
        assert!(told.recv().unwrap());
        assert!(told.recv().unwrap());
        share.set(0);
        thread.thread().unpark();
        for _ in 0..1000 {
            assert!(told.recv().unwrap());
        }
        share.set(99);
        wanted.store(true, Ordering::Release);
        thread.thread().unpark();
        while told.recv().unwrap() {}
        thread.join().unwrap();
    }

    #[test]
    fn its_alarm_calls_a_vcpu_out_of_the_guest_and_is_silent_once_it_is_stopped() {
        signal::install().unwrap();
        let mut run = kvm_bindings::kvm_run::default();
        let flag = &raw const run.immediate_exit;
        let armed = signal::Armed::new(&mut run);
        // SAFETY: it lives until the end of the test; the handler writes to it behind our back.
        let is_set = || unsafe { std::ptr::read_volatile(flag) } == 1;
        let alarm = Alarm::new().unwrap();
        alarm.set(Duration::from_secs(1000));
        alarm.stop();
        assert!(!is_set());
        alarm.set(Duration::from_micros(100));
        let begin = Instant::now();
        while !is_set() {
            assert!(begin.elapsed() < Duration::from_secs(30), "no alarm");
        }
        drop((armed, alarm));
    }
}
