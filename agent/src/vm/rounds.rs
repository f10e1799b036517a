//! Rounds of a guest that is sent, in the words of the wire, and why each was the last or not, for people.

use std::time::Duration;

use fractus_agent_api::migration::{Decision, Round};
use fractus_vmm::machine::SentRound;
use fractus_vmm::stream::converge::{self, Why};

use super::traveller::PAGE;

pub fn round(round: &SentRound) -> Round {
    Round {
        memory_bytes: round.pages * PAGE,
        disk_bytes: round.disk_pages * PAGE,
        took_us: u64::try_from(round.took.as_micros()).unwrap_or(u64::MAX),
        left: round.left,
        rate: round.rate,
        throttled: round.throttled,
        cut: round.cut,
        decision: match round.decision {
            converge::Decision::Again | converge::Decision::Throttle { .. } => Decision::Again,
            converge::Decision::Stop => Decision::Stop,
            converge::Decision::GiveUp => Decision::GiveUp,
            converge::Decision::PostCopy => Decision::PostCopy,
        },
        why: Some(why(round)),
    }
}

fn why(round: &SentRound) -> String {
    let mut why = match round.why {
        Why::Fits { takes, downtime } => format!(
            "what is left takes {}, and the guest may stand still for {}",
            time(takes),
            time(downtime)
        ),
        Why::TakesLonger { takes, downtime } => format!(
            "what is left would take {}, and the guest may stand still for {}",
            time(takes),
            time(downtime)
        ),
        Why::Behind if round.cut => {
            "the guest had written to most of it before it was over".to_owned()
        }
        Why::Behind => "the guest writes nearly as fast as it is copied, or faster".to_owned(),
        Why::Stalled { rounds } => {
            format!("{rounds} copies in a row left no less than those before")
        }
        Why::Late { limit } => format!(
            "after the first copy, copying what was written may take {}",
            time(limit)
        ),
        Why::Hopeless { takes, longest } => format!(
            "the guest would stand still for {}, and may for {} at most",
            time(takes),
            time(longest)
        ),
    };
    if let converge::Decision::Throttle { percent } = round.decision {
        why += &format!("; its vCPUs are kept out of it {percent} % of the time from here on");
    }
    why
}

/// To three digits or so.
fn time(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0..10_000 => format!("{}.{} ms", us / 1000, us / 100 % 10),
        10_000..10_000_000 => format!("{} ms", us / 1000),
        _ if time == Duration::MAX => "an unknown time".to_owned(),
        _ => format!("{} s", us / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_says_why_it_was_the_last_or_not() {
        let ms = Duration::from_millis;
        let (takes, downtime) = (Duration::from_micros(512_300), ms(10));
        let mut sent = SentRound {
            pages: 16,
            disk_pages: 1,
            took: ms(7),
            left: 4096,
            cut: false,
            rate: 5,
            throttled: 0,
            decision: converge::Decision::Again,
            why: Why::TakesLonger { takes, downtime },
        };
        let told = round(&sent);
        assert_eq!(
            (told.memory_bytes, told.disk_bytes, told.took_us, told.rate),
            (65_536, 4096, 7000, 5)
        );
        let takes_longer =
            "what is left would take 512 ms, and the guest may stand still for 10 ms";
        assert_eq!(told.why.as_deref(), Some(takes_longer));
        (sent.decision, sent.why) = (converge::Decision::Throttle { percent: 88 }, Why::Behind);
        sent.cut = true;
        let told = round(&sent);
        assert_eq!((told.decision, told.cut), (Decision::Again, true));
        let behind = "the guest had written to most of it before it was over; its vCPUs are kept out of it 88 % of the \
                      time from here on";
        assert_eq!(told.why.as_deref(), Some(behind));
    }

    #[test]
    fn times_are_told_as_people_tell_them() {
        for (us, told) in [
            (0, "0.0 ms"),
            (9_999, "9.9 ms"),
            (10_000, "10 ms"),
            (9_999_999, "9999 ms"),
            (600_000_000, "600 s"),
        ] {
            assert_eq!(time(Duration::from_micros(us)), told);
        }
        assert_eq!(time(Duration::MAX), "an unknown time");
    }
}
