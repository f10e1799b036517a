//! A guest whose memory goes by several connections, and what ends that in the middle.

use rustix::process::{Pid, Signal, kill_process};

use super::lent::{copying, has_all, writing};
use super::*;

/// Its processes, by the agent's mark.
fn kill_machines(host: &Agent) -> Result {
    let mark = std::fs::read_to_string(host.folder.path().join("state/lock"))?;
    for pid in processes_with(mark.trim()) {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL)?;
    }
    Ok(())
}

fn lanes(report: &MachineReport) -> u8 {
    let migration = report.migration.as_ref();
    migration.map_or(0, |migration| migration.progress.lanes)
}

#[test]
fn its_memory_goes_by_lanes_where_both_sides_speak_themselves() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let mut row = writing(&hosts).await?;
        row.lanes = 3;
        for (from, to, direct, by) in [
            (one, two, [true, true], 3),
            (two, one, [true, false], 0),
            (one, two, [false, true], 0),
            (two, one, [true, true], 3),
        ] {
            row.direct = direct;
            let report = row.moved(from, to).await?;
            let progress = &report.migration.as_ref().unwrap().progress;
            println!("{progress:?}");
            assert_eq!(lanes(&report), by, "{direct:?}");
            assert!(progress.memory_sent > 20 << 20 && !progress.rounds.is_empty());
        }
        has_all(&row, &hosts).await
    })
}

#[test]
fn whatever_ends_it_meanwhile_leaves_nothing_half_done() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let mut row = writing(&hosts).await?;
        row.lanes = 3;

        copying(&mut row, &hosts).await?;
        assert_eq!(lanes(&one.client.get(row.id).await?), 3);
        kill_machines(two)?;
        let report = one.until(row.id, failed).await?;
        assert_eq!(report.observed, Observed::Running);
        row.abort(one).await?;
        row.drop(two).await?;

        copying(&mut row, &hosts).await?;
        row.abort(one).await?;
        row.drop(two).await?;
        has_all(&row, &hosts).await?;

        let machine = row.on(one);
        let _console = machine.types("loudly weave 20").await?;
        copying(&mut row, &hosts).await?;
        kill_machines(one)?;
        let report = two.until(row.id, failed).await?;
        assert!(
            matches!(report.observed, Observed::Failed { .. }),
            "{report:?}"
        );
        row.drop(two).await?;
        one.until(row.id, failed).await?;
        row.drop(one).await
    })
}
