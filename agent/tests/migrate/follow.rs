//! Guests whose memory follows them: by lines that are slow, that break, and whose ends are killed.

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::Lacks;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::*;

/// What a line lets through, from the source to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    /// Some 20 MiB a second.
    Slow,
    Shut,
    /// Nobody comes through, and who is there is thrown out.
    Cut,
}

/// A network between two hosts.
struct Wire {
    port: u16,
    gate: watch::Sender<Gate>,
    task: JoinHandle<()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Wire {
    async fn to(port: u16) -> Result<Self> {
        let listener = TcpListener::bind((own_ip(), 0)).await?;
        let own = listener.local_addr()?.port();
        let (gate, watched) = watch::channel(Gate::Slow);
        let task = tokio::spawn(async move {
            let mut carrying = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let watched = watched.clone();
                carrying.spawn(async move {
                    if *watched.borrow() == Gate::Cut {
                        return;
                    }
                    let Ok(far) = TcpStream::connect((own_ip(), port)).await else {
                        return;
                    };
                    carry(near, far, watched).await;
                });
            }
        });
        Ok(Self {
            port: own,
            gate,
            task,
        })
    }

    fn set(&self, gate: Gate) {
        self.gate.send_replace(gate);
    }
}

async fn carry(near: TcpStream, far: TcpStream, mut gate: watch::Receiver<Gate>) {
    let mut cut = gate.clone();
    let (mut reads, mut writes) = near.into_split();
    let (mut answers, mut asks) = far.into_split();
    let there = async {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let shut = |gate: &Gate| *gate != Gate::Shut;
            let Ok(now) = gate.wait_for(shut).await.map(|gate| *gate) else {
                return;
            };
            if now == Gate::Slow {
                // sleeps because the line is a slow one
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
            match reads.read(&mut bytes).await {
                Ok(length) if length > 0 => {
                    if asks.write_all(&bytes[..length]).await.is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = tokio::io::copy(&mut answers, &mut writes) => {}
        _ = cut.wait_for(|gate| *gate == Gate::Cut) => {}
    }
}

fn lacks(report: &MachineReport) -> Option<&Lacks> {
    report.migration.as_ref()?.lacks.as_ref()
}

fn owes(report: &MachineReport) -> bool {
    matches!(state(report), Some(State::Offered { owes: true, .. }))
}

fn is_whole(report: &MachineReport) -> bool {
    report.settled && is_running(report) && lacks(report).is_none()
}

fn starves(report: &MachineReport) -> bool {
    lacks(report).is_some_and(|lacks| lacks.starving.is_some())
}

/// The machine's process, of this agent's: the other one's have its id as well.
fn process(agent: &Agent, id: ServerId) -> Result<Pid> {
    let mark = std::fs::read_to_string(agent.folder.path().join("state/lock"))?;
    let own = processes_with(mark.trim());
    let mut those = agent.processes(id).into_iter();
    let found = those.find(|pid| own.contains(pid));
    found
        .and_then(Pid::from_raw)
        .ok_or_else(|| anyhow::anyhow!("it has no process"))
}

impl Row {
    /// The guest, which writes, goes on at the target, and no more of its memory comes; it is the target's.
    async fn parts(&mut self, source: &Agent, target: &Agent) -> Result<Wire> {
        let port = self.prepare(source, target).await?;
        let wire = Wire::to(port).await?;
        let follows = Policy {
            downtime_ms: 0,
            limit_ms: 0,
            at_limit: AtLimit::PostCopy,
            ..Policy::default()
        };
        self.send(source, wire.port, follows).await?;
        source.until(self.id, is_offered).await?;
        wire.set(Gate::Shut);
        let report = source.until(self.id, is_offered).await?;
        anyhow::ensure!(owes(&report), "{report:?}");
        let arrived = |report: &MachineReport| state(report) == Some(&State::Arrived);
        let report = target.until(self.id, arrived).await?;
        assert_eq!(lacks(&report), Some(&Lacks::default()));
        self.commit(target).await?;
        let report = target
            .until(self.id, |it| state(it) == Some(&State::Continued))
            .await?;
        anyhow::ensure!(lacks(&report).is_some(), "{report:?}");
        Ok(wire)
    }
}

/// A guest on the first host that writes all over its memory.
async fn writing(hosts: &Hosts) -> Result<(Row, String)> {
    let machine = Machine::start(&hosts.one, &hosts.kernel).await?;
    hosts.one.console_says(machine.id, "tick 1 ").await?;
    let booted = nonce(&machine).await?;
    machine.asks("disk-write 0 0 1048576 3").await?;
    write_on(&machine).await?;
    let mut row = Row::of(&machine);
    row.direct = [false; 2];
    Ok((row, booted))
}

async fn write_on(machine: &Machine<'_>) -> Result {
    machine.asks("touch 40").await?;
    let _console = machine.types("loudly weave 40").await?;
    machine
        .agent
        .console_says(machine.id, "begun weave")
        .await?;
    Ok(())
}

/// It is the guest that it was, and its own pattern is whole.
async fn has_all(machine: &Machine<'_>, booted: &str) -> Result {
    let _console = machine.types("").await?;
    machine.agent.console_says(machine.id, "ok weave").await?;
    assert_eq!(nonce(machine).await?, booted);
    machine.asks("disk-check 0 0 1048576 3").await?;
    Ok(())
}

#[test]
fn memory_follows_a_guest_and_the_source_is_needed_until_all_is_there() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        assert!(one.client.host().await?.post_copy);
        let (mut row, booted) = writing(&hosts).await?;
        let wire = row.parts(one, two).await?;
        wire.set(Gate::Slow);
        two.until(row.id, is_whole).await?;
        let paid = |report: &MachineReport| is_offered(report) && !owes(report);
        let progress = one.until(row.id, paid).await?.migration.unwrap().progress;
        println!("{progress:?}");
        let followed = progress.followed.unwrap();
        assert!(followed.bytes > 1 << 20 && followed.took_us > 0 && progress.memory_left == 0);
        row.drop(one).await?;
        has_all(&row.on(two), &booted).await?;
        // And as any other from there on: without that it would be refused.
        row.moved(two, one).await?;
        assert_eq!(nonce(&row.on(one)).await?, booted);
        Ok(())
    })
}

#[test]
fn a_line_that_breaks_and_agents_that_are_killed_cost_nothing_but_time() -> Result {
    block_on(async {
        let Some(mut hosts) = with_probes().await? else {
            return Ok(());
        };
        let (mut row, booted) = writing(&hosts).await?;
        let wire = row.parts(&hosts.one, &hosts.two).await?;
        wire.set(Gate::Cut);
        hosts.two.until(row.id, starves).await?;
        let broken = |report: &MachineReport| {
            let migration = report.migration.as_ref();
            owes(report) && migration.is_some_and(|it| it.progress.broken.is_some())
        };
        hosts.one.until(row.id, broken).await?;
        wire.set(Gate::Slow);
        hosts.two.until(row.id, is_whole).await?;
        row.drop(&hosts.one).await?;
        has_all(&row.on(&hosts.two), &booted).await?;

        // Both agents, one after the other, in the way back.
        write_on(&row.on(&hosts.two)).await?;
        let wire = row.parts(&hosts.two, &hosts.one).await?;
        hosts.two.restart().await?;
        let report = hosts.two.until(row.id, is_offered).await?;
        assert!(owes(&report), "{report:?}");
        hosts.one.restart().await?;
        let report = hosts.one.until(row.id, |it| lacks(it).is_some()).await?;
        assert_eq!(state(&report), Some(&State::Continued));
        wire.set(Gate::Open);
        hosts.one.until(row.id, is_whole).await?;
        row.drop(&hosts.two).await?;
        has_all(&row.on(&hosts.one), &booted).await
    })
}

#[test]
fn a_guest_whose_source_is_killed_is_lost_and_its_disks_are_not() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let (mut row, booted) = writing(&hosts).await?;
        let wire = row.parts(one, two).await?;
        kill_process(process(one, row.id)?, Signal::KILL)?;
        wire.set(Gate::Cut);
        one.until(row.id, failed).await?;
        let report = two.until(row.id, starves).await?;
        assert_eq!(state(&report), Some(&State::Continued));
        row.drop(one).await?;
        // Whoever looks on gives it up; it hears no power button.
        row.revision += 1;
        row.wanted.power = Power::Stopped;
        row.tell(two, row.revision, |_| ()).await?;
        let stopped = |report: &MachineReport| {
            let reason = StopReason::Requested;
            report.observed == Observed::Stopped { reason }
        };
        two.settled(row.id, row.revision, stopped).await?;
        row.revision += 1;
        row.wanted.power = Power::Running;
        row.tell(two, row.revision, |_| ()).await?;
        two.settled(row.id, row.revision, is_running).await?;
        two.console_says(row.id, "tick 1 ").await?;
        let machine = row.on(two);
        assert_ne!(nonce(&machine).await?, booted);
        machine.asks("disk-check 0 0 1048576 3").await?;
        Ok(())
    })
}

#[test]
fn a_guest_whose_target_is_killed_is_not_begun_again_where_it_was() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let (mut row, _) = writing(&hosts).await?;
        let _wire = row.parts(one, two).await?;
        kill_process(process(two, row.id)?, Signal::KILL)?;
        let ended = |report: &MachineReport| matches!(report.observed, Observed::Stopped { .. });
        let report = two.until(row.id, ended).await?;
        let Observed::Stopped { reason } = &report.observed else {
            unreachable!()
        };
        assert!(matches!(reason, StopReason::VmmFault { .. }), "{reason:?}");
        // It is not said to have failed before it ran: by that the row would go back.
        assert!(!failed(&report), "{report:?}");
        let report = one.client.get(row.id).await?;
        assert!(is_offered(&report) && report.observed == Observed::Offered);
        row.drop(one).await
    })
}

/// It would take the guest that has gone with it.
#[test]
fn a_process_whose_host_goes_down_sends_first_what_it_owes() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let (mut row, booted) = writing(&hosts).await?;
        let wire = row.parts(one, two).await?;
        let process = process(one, row.id)?;
        kill_process(process, Signal::TERM)?;
        let folder = one.machine_folder(row.id);
        let by = Instant::now() + PATIENCE;
        while !one.vm_log(row.id).contains("SIGTERM") {
            anyhow::ensure!(
                Instant::now() < by,
                "it hears nothing: {}",
                folder.display()
            );
            // sleeps because a file is read as often as it takes; a deadline ends it.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        wire.set(Gate::Open);
        two.until(row.id, is_whole).await?;
        one.until(row.id, |it| it.observed != Observed::Offered)
            .await?;
        row.drop(one).await?;
        has_all(&row.on(two), &booted).await
    })
}
