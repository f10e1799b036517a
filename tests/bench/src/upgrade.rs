//! A machine that another process of its host takes over (`fractus-agent upgrade-machines`), as the agent says and as the
//! guest feels it: from when its vCPUs are told to stop until all of them run again, and the longest gap that the guest
//! finds in the seconds of it (see `migrate`).

use anyhow::Context;

use crate::api::{Makings, in_a_cloud_of};
use crate::figure::{Figure, median};
use crate::migrate::Ours;

const GUEST_MIB: u64 = 1024;
/// What is promised, ms.
const BLACKOUT: f64 = 6.0;

pub fn handed_over(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    in_a_cloud_of(1, async |cloud, harness| {
        let line = "tick_ms=0 run=\"touch 900; churn 0\"";
        let makings = Makings::with(cloud, line, GUEST_MIB).await?;
        let (id, _) = makings.create(cloud, "upgrade").await?;
        let ours = Ours { cloud, id };
        let mut second = ours.line_after(0).await?.second;
        let (mut told, mut felt) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let before = ours.line_after(second).await?.second;
            told.push(blackout(&harness.upgrade_machines(0)?)?);
            let during = ours.line_after(before).await?.second;
            let after = ours.line_after(during).await?;
            felt.push(after.seconds(before + 1, after.second)?.0);
            second = after.second;
        }
        cloud.delete(&ours.id).await?;
        makings.forget(cloud).await?;
        Ok(vec![
            figure("blackout", told, Some(BLACKOUT)),
            figure("gap", felt, None),
        ])
    })
}

/// In ms, of the line that the command prints.
fn blackout(said: &str) -> anyhow::Result<f64> {
    let ms = said.trim_end().strip_suffix(" ms");
    let ms = ms.and_then(|line| line.rsplit_once(' ')?.1.parse().ok());
    ms.with_context(|| format!("no time in {said:?}"))
}

fn figure(what: &str, values: Vec<f64>, limit: Option<f64>) -> Figure {
    Figure {
        name: format!("upgrade-{what}"),
        unit: "ms",
        rounds: values.len(),
        ours: median(values).unwrap_or(f64::NAN),
        peer: None,
        limit,
        ratio_limit: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_machine_is_read_from_its_line() {
        assert_eq!(blackout("ID handed over, 3.25 ms\n").unwrap(), 3.25);
        assert!(blackout("ID skipped: it does not run\n").is_err());
    }
}
