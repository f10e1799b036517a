//! A vCPU that is kept out of the guest for a share of the time, so that the guest writes less while it is sent.
//!
//! Time goes in periods of 10 ms: for its part of one the vCPU runs, then its own thread waits for the rest. An alarm of
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

/// Percent of the time that vCPUs are kept out of the guest; all of a machine's have the same.
#[derive(Debug, Clone, Default)]
pub struct Share(Arc<AtomicU8>);

impl Share {
    pub fn get(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }

    /// True if it was another.
    pub fn set(&self, percent: u8) -> bool {
        let percent = percent.min(MOST);
        self.0.swap(percent, Ordering::AcqRel) != percent
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
        let now = Instant::now();
        match self.until {
            Some(until) if now < until => return true,
            Some(_) if !self.keep_out(now, called_off) => return false,
            _ => {}
        }
        let out = self.share.get();
        if out > 0 {
            let part = PERIOD - part(out);
            self.until = Some(Instant::now() + part);
            self.alarm.set(part);
        }
        true
    }

    /// False if it is called off.
    fn keep_out(&self, since: Instant, called_off: impl Fn() -> bool) -> bool {
        loop {
            if called_off() {
                return false;
            }
            let end = since + part(self.share.get());
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            thread::park_timeout(left);
        }
    }
}

/// What so many percent are of a period.
fn part(percent: u8) -> Duration {
    PERIOD * u32::from(percent) / 100
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
    fn one_that_has_its_part_is_kept_out_for_the_rest_of_each_period() {
        for percent in [20, 50, 99] {
            let mut throttle = throttle(percent);
            let (mut out, mut periods, mut until) = (Duration::ZERO, 0, None);
            // As often as it comes out, for a port or so.
            while periods < 10 {
                let before = Instant::now();
                assert!(throttle.lets_in(|| false));
                out += before.elapsed();
                if throttle.until != until {
                    (periods, until) = (periods + 1, throttle.until);
                }
            }
            // The first period begins with its part.
            assert!(out >= part(percent) * 9, "{percent}: {out:?}");
        }
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
