//! A guest's clocks, which go on while it is between two machines.
//!
//! kvm-clock and the time stamp counters stand in what is saved, and would go on from there: each move would cost a guest
//! its blackout, and its wall clock with it. KVM tells what time it was on the host beside kvm-clock only where that follows
//! the time stamp counter (KVM_CLOCK_REALTIME), so it is noted here. A guest that was suspended to a file is another matter:
//! hours at once would be a surprise to all that it waits for, and its wall clock is its agent's to set.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};

/// No blackout is that long: hosts are whose clocks do not agree.
const LONGEST: Duration = Duration::from_secs(5);

/// Notes the host's time with a guest's clock, where KVM has not.
pub(super) fn dated(clock: kvm_clock_data) -> kvm_clock_data {
    if clock.flags & KVM_CLOCK_REALTIME != 0 {
        return clock;
    }
    kvm_clock_data {
        flags: clock.flags | KVM_CLOCK_REALTIME,
        realtime: nanoseconds(now()),
        ..clock
    }
}

/// How long a guest has been nowhere whose state has come whole at `heard`.
pub(super) fn missed(saved: &kvm_clock_data, heard: Instant) -> Duration {
    between(saved, now(), heard.elapsed())
}

/// By the hosts' time of day, and not less than it took here.
fn between(clock: &kvm_clock_data, now: Duration, at_least: Duration) -> Duration {
    if clock.flags & KVM_CLOCK_REALTIME == 0 {
        return at_least;
    }
    let saved = Duration::from_nanos(clock.realtime);
    let passed = now.checked_sub(saved);
    passed
        .filter(|passed| (at_least..LONGEST).contains(passed))
        .unwrap_or(at_least)
}

/// The clock as it is so much later.
pub(super) fn later(clock: &kvm_clock_data, passed: Duration) -> kvm_clock_data {
    kvm_clock_data {
        clock: clock.clock.saturating_add(nanoseconds(passed)),
        ..Default::default()
    }
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: Duration = Duration::from_secs(1_800_000_000);
    const HEARD: Duration = Duration::from_millis(3);

    fn saved() -> kvm_clock_data {
        kvm_clock_data {
            clock: 7_000,
            flags: KVM_CLOCK_REALTIME,
            realtime: nanoseconds(SAVED),
            ..Default::default()
        }
    }

    fn after(passed: Duration) -> Duration {
        between(&saved(), SAVED + passed, HEARD)
    }

    #[test]
    fn what_the_hosts_clocks_say_counts_if_it_can_be_true() {
        let passed = Duration::from_millis(12);
        assert_eq!(after(passed), passed);
        assert_eq!(after(Duration::from_millis(1)), HEARD, "not before it came");
        assert_eq!(after(LONGEST), HEARD, "no blackout is that long");
        let behind = between(&saved(), SAVED - passed, HEARD);
        assert_eq!(behind, HEARD, "the target's clock is behind");
        let undated = kvm_clock_data {
            flags: 0,
            ..saved()
        };
        assert_eq!(between(&undated, SAVED + passed, HEARD), HEARD);
    }

    #[test]
    fn a_clock_is_dated_once_and_goes_on_without_its_date() {
        let dated_now = dated(kvm_clock_data {
            clock: 7_000,
            ..Default::default()
        });
        let (flags, clock) = (dated_now.flags, dated_now.clock);
        assert_eq!((flags, clock), (KVM_CLOCK_REALTIME, 7_000));
        let noted = Duration::from_nanos(dated_now.realtime);
        assert!(now() - noted < Duration::from_secs(60), "{noted:?}");
        assert_eq!(
            dated(saved()).realtime,
            saved().realtime,
            "KVM's own counts"
        );

        let later = later(&saved(), Duration::from_micros(5));
        let (flags, clock) = (later.flags, later.clock);
        assert_eq!((flags, clock), (0, 12_000));
    }
}
