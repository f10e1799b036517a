//! A guest whose process speaks with the other one itself: who can end that, and who cannot.

use fractus_agent::machine::line::{self, Way};

use super::*;

/// Without an end, as long as the guest writes.
const NEVER: Policy = Policy {
    downtime_ms: 0,
    longest_ms: 30_000,
    limit_ms: 600_000,
    at_limit: AtLimit::GiveUp,
    throttle: None,
};

fn sent(report: &MachineReport) -> u64 {
    let migration = report.migration.as_ref();
    migration.map_or(0, |migration| migration.progress.memory_sent)
}

/// The guest writes to 20 MiB of its memory all the time.
pub(super) async fn writing(hosts: &Hosts) -> Result<Row> {
    let one = &hosts.one;
    let machine = Machine::start(one, &hosts.kernel).await?;
    one.console_says(machine.id, "tick 1 ").await?;
    machine.asks("touch 20").await?;
    let _console = machine.types("loudly weave 20").await?;
    one.console_says(machine.id, "begun weave").await?;
    Ok(Row::of(&machine))
}

/// Its pattern is whole.
pub(super) async fn has_all(row: &Row, hosts: &Hosts) -> Result {
    let machine = row.on(&hosts.one);
    let _console = machine.types("").await?;
    hosts.one.console_says(row.id, "ok weave").await?;
    Ok(())
}

/// It is being copied, and there is no end of that.
pub(super) async fn copying(row: &mut Row, hosts: &Hosts) -> Result {
    let (one, two) = (&hosts.one, &hosts.two);
    let by = Instant::now() + PATIENCE;
    loop {
        let port = row.prepare(one, two).await?;
        row.send(one, port, NEVER).await?;
        let enough = |report: &MachineReport| sent(report) > 30 << 20;
        let report = one.until(row.id, |it| enough(it) || is_offered(it)).await?;
        if state(&report) == Some(&State::Copying) {
            return Ok(());
        }
        // On a busy host it may get no processor for a whole round, and have written nothing.
        anyhow::ensure!(Instant::now() < by, "it writes nothing");
        row.abort(one).await?;
        row.drop(two).await?;
    }
}

#[test]
fn the_sources_agent_may_go_meanwhile_and_the_targets_may_not() -> Result {
    block_on(async {
        let Some(mut hosts) = with_probes().await? else {
            return Ok(());
        };
        let mut row = writing(&hosts).await?;
        copying(&mut row, &hosts).await?;
        let before = sent(&hosts.one.client.get(row.id).await?);
        hosts.one.restart().await?;
        let more = |report: &MachineReport| sent(report) > before + (8 << 20);
        let report = hosts.one.until(row.id, |it| more(it) || failed(it)).await?;
        assert!(!failed(&report), "{report:?}");

        // Nobody could let the guest go on there.
        hosts.two.kill();
        let report = hosts.one.until(row.id, failed).await?;
        assert_eq!(report.observed, Observed::Running);
        hosts.two.run().await?;
        row.abort(&hosts.one).await?;
        row.drop(&hosts.two).await?;
        has_all(&row, &hosts).await
    })
}

#[test]
fn a_guest_whose_target_takes_nothing_stays_when_it_is_to() -> Result {
    /// Less than a process waits for room.
    const AT_ONCE: Duration = Duration::from_secs(45);
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let mut row = writing(&hosts).await?;
        for way in [true, false] {
            (row.migration, row.key) = (MigrationId(Uuid::new_v4()), key());
            row.direct = [way; 2];
            // Whose end of it nobody reads.
            let target = line::listen(common::own_ip(), &row.key, Way::Carried).await?;
            row.send(&hosts.one, target.port, NEVER).await?;
            let begun = |report: &MachineReport| state(report) == Some(&State::Copying);
            hosts.one.until(row.id, begun).await?;
            // sleeps because a process that waits for room says nothing.
            tokio::time::sleep(Duration::from_secs(1)).await;
            tokio::time::timeout(AT_ONCE, row.abort(&hosts.one)).await??;
        }
        has_all(&row, &hosts).await
    })
}
