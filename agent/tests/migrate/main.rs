//! Guests that go from one host to another while they run: two agents, and the test in the controller's place.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../common/mod.rs"]
mod common;
mod follow;
mod lanes;
mod lent;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::machine::{Machine, disks};
use common::*;
use fractus_agent_api::cpu::by_name;
use fractus_agent_api::machine::{
    Generation, ImageRef, MachineReport, Observed, Power, PutMachine, Revision, ServerId, Wanted,
};
use fractus_agent_api::migration::{
    Arrival, AtLimit, Departure, MigrationId, PUT_VERSION, Policy, State, StreamKey,
};
use uuid::Uuid;

fn key() -> StreamKey {
    let pair = rcgen::KeyPair::generate().unwrap();
    let made = rcgen::CertificateParams::new(vec!["migration.fractus".to_owned()]).unwrap();
    StreamKey {
        certificate: made.self_signed(&pair).unwrap().pem(),
        key: pair.serialize_pem(),
    }
}

/// The owner's row, and one attempt to move it.
struct Row {
    id: ServerId,
    generation: u64,
    revision: u64,
    wanted: Wanted,
    migration: MigrationId,
    key: StreamKey,
    /// Whether the process of the source, and of the target, speak themselves.
    direct: [bool; 2],
    /// By how many lanes its memory may go.
    lanes: u8,
}

impl Row {
    fn of(machine: &Machine<'_>) -> Self {
        Self {
            id: machine.id,
            generation: 1,
            revision: machine.revision,
            wanted: machine.wanted.clone(),
            migration: MigrationId(Uuid::new_v4()),
            key: key(),
            direct: [true; 2],
            lanes: 0,
        }
    }

    async fn tell(
        &self,
        agent: &Agent,
        revision: u64,
        change: impl FnOnce(&mut Wanted),
    ) -> Result<MachineReport> {
        let mut wanted = self.wanted.clone();
        change(&mut wanted);
        let put = PutMachine {
            version: PUT_VERSION,
            generation: Generation(self.generation),
            revision: Revision(revision),
            wanted,
            request_id: Some("req-migrate".to_owned()),
            boot_id: None,
        };
        agent.put(self.id, &put).await
    }

    /// The target makes room for a guest that `source` has; its port.
    async fn prepare(&mut self, source: &Agent, target: &Agent) -> Result<u16> {
        self.migration = MigrationId(Uuid::new_v4());
        self.key = key();
        let shape = source.client.get(self.id).await?.shape.unwrap();
        let (id, key) = (self.migration, self.key.clone());
        let direct = self.direct[1];
        let arrival = Arrival {
            id,
            key,
            shape,
            direct,
        };
        let arrives = |wanted: &mut Wanted| wanted.arrives = Some(arrival);
        // Above what it was told the last time that it was to have the guest, or not.
        let last = target.client.get(self.id).await;
        let last = last.map_or(0, |report| report.revision.0);
        let revision = self.revision.max(last) + 1;
        self.tell(target, revision, arrives).await?;
        let listens = |report: &MachineReport| {
            assert!(!failed(report), "{report:?}");
            matches!(state(report), Some(State::Arriving { .. }))
        };
        let report = target.until(self.id, listens).await?;
        assert_eq!(report.observed, Observed::Arriving);
        assert!(!report.settled);
        let Some(State::Arriving { port }) = state(&report) else {
            unreachable!()
        };
        Ok(*port)
    }

    async fn send(&mut self, source: &Agent, port: u16, policy: Policy) -> Result<MachineReport> {
        self.revision += 1;
        let departure = Departure {
            id: self.migration,
            to: SocketAddr::from((common::own_ip(), port)).to_string(),
            key: self.key.clone(),
            policy,
            direct: self.direct[0],
            lanes: self.lanes,
        };
        let departs = |wanted: &mut Wanted| wanted.departs = Some(departure);
        self.tell(source, self.revision, departs).await
    }

    /// The guest stands still on both.
    async fn offered(&mut self, source: &Agent, target: &Agent) -> Result<MachineReport> {
        let port = self.prepare(source, target).await?;
        self.send(source, port, Policy::default()).await?;
        self.until_offered(source, target).await
    }

    async fn until_offered(&self, source: &Agent, target: &Agent) -> Result<MachineReport> {
        let report = source.until(self.id, is_offered).await?;
        let arrived = |report: &MachineReport| state(report) == Some(&State::Arrived);
        let there = target.until(self.id, arrived).await?;
        assert_eq!(there.observed, Observed::Arriving);
        assert!(there.settled && report.settled);
        Ok(report)
    }

    /// The row is the target's from here on.
    async fn commit(&mut self, target: &Agent) -> Result<MachineReport> {
        self.generation += 1;
        self.continues(target).await
    }

    async fn continues(&mut self, host: &Agent) -> Result<MachineReport> {
        self.revision += 1;
        let id = self.migration;
        let continues = |wanted: &mut Wanted| wanted.continues = Some(id);
        self.tell(host, self.revision, continues).await
    }

    async fn drop(&self, host: &Agent) -> Result {
        let last = host.client.get(self.id).await?.revision.0;
        let revision = self.revision.max(last + 1);
        self.tell(host, revision, Wanted::end).await?;
        host.until(self.id, |report| report.settled && is_absent(report))
            .await?;
        // The other one's have its id as well.
        let mark = std::fs::read_to_string(host.folder.path().join("state/lock"))?;
        let mark = mark.trim().replace('-', "");
        let other = |left: &String| {
            !left.starts_with("process") && (!left.starts_with('/') || left.contains(&mark))
        };
        let left: Vec<String> = host.leftovers(self.id).into_iter().filter(other).collect();
        assert_eq!(left, Vec::<String>::new());
        Ok(())
    }

    /// The migration is put off.
    async fn abort(&mut self, source: &Agent) -> Result<MachineReport> {
        self.revision += 1;
        self.tell(source, self.revision, |_| ()).await?;
        source.settled(self.id, self.revision, is_running).await
    }

    async fn moved(&mut self, source: &Agent, target: &Agent) -> Result<MachineReport> {
        let offered = self.offered(source, target).await?;
        self.commit(target).await?;
        let runs = |report: &MachineReport| report.settled && is_running(report);
        let report = target.until(self.id, runs).await?;
        assert_eq!(state(&report), Some(&State::Continued));
        self.drop(source).await?;
        Ok(offered)
    }

    fn on<'a>(&self, agent: &'a Agent) -> Machine<'a> {
        Machine {
            agent,
            id: self.id,
            wanted: self.wanted.clone(),
            revision: self.revision,
        }
    }
}

fn state(report: &MachineReport) -> Option<&State> {
    report.migration.as_ref().map(|migration| &migration.state)
}

fn failed(report: &MachineReport) -> bool {
    matches!(state(report), Some(State::Failed { .. }))
}

fn is_offered(report: &MachineReport) -> bool {
    assert!(!failed(report), "{report:?}");
    matches!(state(report), Some(State::Offered { .. }))
}

async fn nonce(machine: &Machine<'_>) -> Result<String> {
    let info = machine.asks("info").await?;
    let nonce = info.split(' ').find_map(|word| word.strip_prefix("nonce="));
    Ok(nonce.unwrap().to_owned())
}

struct Hosts {
    _cloud: Cloud,
    one: Agent,
    two: Agent,
    kernel: ImageRef,
}

async fn hosts(kernel: &[u8], stand_ins: bool) -> Result<Hosts> {
    let (cloud, one, kernel) = start(kernel, stand_ins).await?;
    let two = Agent::start(&cloud, stand_ins).await?;
    Ok(Hosts {
        _cloud: cloud,
        one,
        two,
        kernel,
    })
}

async fn with_probes() -> Result<Option<Hosts>> {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(None);
    };
    Ok(Some(hosts(&probe, false).await?))
}

#[test]
fn a_guest_goes_to_another_host_and_back_with_all_that_it_has() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let mut machine = Machine::start(one, &hosts.kernel).await?;
        one.console_says(machine.id, "tick 1 ").await?;
        machine.changed(|it| it.spec.disks = disks(1)).await?;
        machine.slot("up").await?;
        machine.asks("touch 20").await?;
        machine.asks("disk-write 0 0 1048576 3").await?;
        machine.asks("disk-write 1 4096 65536 5").await?;
        let booted = nonce(&machine).await?;
        let mut row = Row::of(&machine);
        drop(machine);
        for (from, to, direct) in [
            (one, two, [true, true]),
            (two, one, [true, false]),
            (one, two, [false, true]),
            (two, one, [false, false]),
        ] {
            row.direct = direct;
            let report = row.moved(from, to).await?;
            let progress = report.migration.unwrap().progress;
            println!("{progress:?}");
            assert!(progress.memory_sent > 20 << 20 && progress.disk_total == 2 << 20);
            assert!(progress.disk_sent >= (1 << 20) + 65536 && !progress.rounds.is_empty());
            assert!(progress.pause.is_some());
            let machine = row.on(to);
            assert_eq!(nonce(&machine).await?, booted);
            machine.asks("disk-check 0 0 1048576 3").await?;
            machine.asks("disk-check 1 4096 65536 5").await?;
            to.console_says(row.id, "tick ").await?;
        }
        // What it is told from here on it does as any other: it is rebooted on its disk.
        row.revision += 1;
        row.wanted.hard_reboots += 1;
        row.tell(one, row.revision, |_| ()).await?;
        one.settled(row.id, row.revision, is_running).await?;
        ticks(one, row.id).await?;
        let machine = row.on(one);
        assert_ne!(nonce(&machine).await?, booted);
        machine.asks("disk-check 0 0 1048576 3").await?;
        Ok(())
    })
}

/// A config drive is not the same twice: it goes with its guest.
#[test]
fn a_guest_finds_the_drive_that_it_was_started_with() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let id = new_id();
        let mut wanted = wanted(&hosts.kernel, Power::Running);
        let instance = serde_json::json!({"meta_data": {"hostname": "traveller"}});
        wanted.spec.guest.instance = Some(Box::new(serde_json::from_value(instance)?));
        one.put(id, &put(1, wanted.clone())).await?;
        one.settled(id, 1, is_running).await?;
        one.console_says(id, "tick 1 ").await?;
        let machine = Machine {
            agent: one,
            id,
            wanted,
            revision: 1,
        };
        let length = std::fs::metadata(one.machine_folder(id).join("config.iso"))?.len();
        let hash = format!("disk-hash 1 0 {length}");
        let before = machine.asks(&hash).await?;
        let mut row = Row::of(&machine);
        row.moved(one, two).await?;
        assert_eq!(row.on(two).asks(&hash).await?, before);
        Ok(())
    })
}

#[test]
fn a_migration_that_is_put_off_costs_nothing_and_another_comes_after_it() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let machine = Machine::start(one, &hosts.kernel).await?;
        one.console_says(machine.id, "tick 1 ").await?;
        let booted = nonce(&machine).await?;
        let mut row = Row::of(&machine);
        for _ in 0..2 {
            row.offered(one, two).await?;
            let report = one.client.get(row.id).await?;
            assert_eq!(report.observed, Observed::Offered);
            row.abort(one).await?;
            row.drop(two).await?;
            assert_eq!(nonce(&machine).await?, booted);
        }
        row.moved(one, two).await?;
        assert_eq!(nonce(&row.on(two)).await?, booted);
        Ok(())
    })
}

#[test]
fn a_guest_that_writes_without_end_goes_when_its_policy_says_so() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let machine = Machine::start(one, &hosts.kernel).await?;
        one.console_says(machine.id, "tick 1 ").await?;
        machine.asks("touch 20").await?;
        let _console = machine.types("loudly weave 20").await?;
        one.console_says(machine.id, "begun weave").await?;
        let mut row = Row::of(&machine);
        let never = Policy {
            downtime_ms: 0,
            limit_ms: 600_000,
            at_limit: AtLimit::GiveUp,
            throttle: Some(50),
            ..Policy::default()
        };
        let by = Instant::now() + PATIENCE;
        let (port, report) = loop {
            let port = row.prepare(one, two).await?;
            row.send(one, port, never).await?;
            let slower = |report: &MachineReport| {
                let migration = report.migration.as_ref();
                migration.is_some_and(|migration| migration.progress.throttled > 0)
            };
            let report = one.until(row.id, |it| slower(it) || is_offered(it)).await?;
            if state(&report) == Some(&State::Copying) {
                break (port, report);
            }
            // On a busy host it may get no processor for a whole round, and have written nothing.
            anyhow::ensure!(Instant::now() < by, "it writes nothing");
            row.abort(one).await?;
            row.drop(two).await?;
        };
        assert!(!report.settled && report.observed == Observed::Running);
        let now = Policy {
            downtime_ms: 60_000,
            ..never
        };
        row.send(one, port, now).await?;
        row.until_offered(one, two).await?;
        row.commit(two).await?;
        two.until(row.id, |report| report.settled && is_running(report))
            .await?;
        row.drop(one).await?;
        let machine = row.on(two);
        let _console = machine.types("").await?;
        // Its own pattern is whole.
        two.console_says(row.id, "ok weave").await?;
        Ok(())
    })
}

#[test]
fn a_paused_guest_arrives_paused() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let mut machine = Machine::start(one, &hosts.kernel).await?;
        one.console_says(machine.id, "tick 1 ").await?;
        machine.changed(|it| it.power = Power::Paused).await?;
        let mut row = Row::of(&machine);
        let report = row.offered(one, two).await?;
        let ran = State::Offered {
            ran: false,
            doubt: None,
            owes: false,
        };
        assert_eq!(state(&report), Some(&ran));
        row.commit(two).await?;
        let paused = |report: &MachineReport| report.settled && report.observed == Observed::Paused;
        let report = two.until(row.id, paused).await?;
        assert_eq!(state(&report), Some(&State::Continued));
        row.drop(one).await?;
        assert_eq!(two.client.console_log(row.id, None).await?.len(), 0);
        row.revision += 1;
        row.wanted.power = Power::Running;
        row.tell(two, row.revision, |_| ()).await?;
        two.settled(row.id, row.revision, is_running).await?;
        two.console_says(row.id, "tick ").await?;
        Ok(())
    })
}

/// Its content would go with what the source has of its machine.
#[test]
fn a_disk_that_the_guest_does_not_have_keeps_it_where_it_is() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let mut machine = Machine::start(one, &hosts.kernel).await?;
        one.console_says(machine.id, "tick 1 ").await?;
        machine.changed(|it| it.spec.disks = disks(1)).await?;
        machine.slot("up").await?;
        let file = machine.file(machine.wanted.spec.disks[0].id);
        machine.changed(|it| it.spec.disks.clear()).await?;
        let slot = machine.slot("down").await?;
        machine.asks(&format!("eject {slot}")).await?;
        machine.until(&[]).await?;
        assert!(file.exists());
        let mut row = Row::of(&machine);
        let port = row.prepare(one, two).await?;
        row.send(one, port, Policy::default()).await?;
        let report = one.until(row.id, failed).await?;
        let Some(State::Failed { reason }) = state(&report) else {
            unreachable!()
        };
        assert!(
            reason.contains("stay behind") && is_running(&report),
            "{report:?}"
        );
        row.drop(two).await?;
        row.abort(one).await?;
        // Gone, it is in nobody's way.
        std::fs::remove_file(&file)?;
        row.moved(one, two).await?;
        Ok(())
    })
}

/// What a server has behind it is not done again where its guest comes to, or is lost.
#[test]
fn a_server_that_was_rebooted_before_is_not_rebooted_for_it() -> Result {
    block_on(async {
        let mut hosts = hosts(b"kernel", true).await?;
        let mut machine = Machine::start(&hosts.one, &hosts.kernel).await?;
        let rebuilt = |it: &mut Wanted| (it.rebuilds, it.hard_reboots) = (1, 2);
        machine.changed(rebuilt).await?;
        let mut row = Row::of(&machine);
        drop(machine);
        row.offered(&hosts.one, &hosts.two).await?;
        hosts.two.restart().await?;
        row.commit(&hosts.two).await?;
        let report = hosts.two.until(row.id, failed).await?;
        assert_eq!((report.starts, report.rebuilds), (0, 1));
        assert!(
            matches!(report.observed, Observed::Failed { .. }),
            "{report:?}"
        );
        row.generation += 1;
        row.continues(&hosts.one).await?;
        let runs = |report: &MachineReport| report.settled && is_running(report);
        hosts.one.until(row.id, runs).await?;
        row.drop(&hosts.two).await?;
        let report = row.moved(&hosts.one, &hosts.two).await?;
        assert!(is_offered(&report));
        let report = hosts.two.client.get(row.id).await?;
        assert_eq!(
            (report.starts, report.rebuilds, report.hard_reboots),
            (1, 1, 2)
        );
        Ok(())
    })
}

/// Without KVM, too: all that surrounds it. What is killed is killed where it hurts, and the other side has the guest.
#[test]
fn whichever_side_dies_the_guest_goes_on_where_the_row_says() -> Result {
    block_on(async {
        let mut hosts = hosts(b"kernel", true).await?;
        let machine = Machine::start(&hosts.one, &hosts.kernel).await?;
        let mut row = Row::of(&machine);
        drop(machine);
        let log = hosts.one.console_says(row.id, "stand-in boot ").await?;
        let boot = log.lines().find(|line| line.contains("stand-in boot "));
        let boot = boot.unwrap().replace("boot", "goes on").trim().to_owned();

        // The target's agent dies before it is told: its process goes, too, and it says so.
        row.offered(&hosts.one, &hosts.two).await?;
        hosts.two.restart().await?;
        let report = hosts.two.until(row.id, failed).await?;
        assert!(
            matches!(report.observed, Observed::Failed { .. }),
            "{report:?}"
        );
        row.abort(&hosts.one).await?;
        row.drop(&hosts.two).await?;

        // It dies when the row is its already: the guest still stands where it was, and goes on there.
        row.offered(&hosts.one, &hosts.two).await?;
        hosts.two.restart().await?;
        row.commit(&hosts.two).await?;
        let report = hosts.two.until(row.id, failed).await?;
        assert!(report.settled && report.generation == Generation(row.generation));
        row.generation += 1;
        row.continues(&hosts.one).await?;
        let runs = |report: &MachineReport| report.settled && is_running(report);
        let report = hosts.one.until(row.id, runs).await?;
        assert_eq!(
            (state(&report), report.starts),
            (Some(&State::Continued), 1)
        );
        row.drop(&hosts.two).await?;

        // The source's agent dies while its guest is offered: it still is, for the next one.
        row.offered(&hosts.one, &hosts.two).await?;
        hosts.one.restart().await?;
        hosts.one.until(row.id, is_offered).await?;
        row.commit(&hosts.two).await?;
        hosts.two.until(row.id, runs).await?;
        hosts.two.console_says(row.id, &boot).await?;
        row.drop(&hosts.one).await?;

        // The source's process dies while its guest is offered: nobody starts another in its place.
        row.offered(&hosts.two, &hosts.one).await?;
        hosts.two.kill();
        let mark = std::fs::read_to_string(hosts.two.folder.path().join("state/lock"))?;
        for pid in processes_with(mark.trim()) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        }
        hosts.two.run().await?;
        let report = hosts.two.until(row.id, failed).await?;
        assert!(report.settled, "{report:?}");
        assert_eq!(processes_with(mark.trim()), Vec::<i32>::new());
        row.commit(&hosts.one).await?;
        hosts.one.until(row.id, runs).await?;
        hosts.one.console_says(row.id, &boot).await?;
        row.drop(&hosts.two).await?;
        Ok(())
    })
}

#[test]
fn whoever_has_another_key_or_finds_nobody_keeps_its_guest() -> Result {
    block_on(async {
        let hosts = hosts(b"kernel", true).await?;
        let (one, two) = (&hosts.one, &hosts.two);
        let machine = Machine::start(one, &hosts.kernel).await?;
        let mut row = Row::of(&machine);
        let port = row.prepare(one, two).await?;
        let right = std::mem::replace(&mut row.key, key());
        row.send(one, port, Policy::default()).await?;
        let report = one.until(row.id, failed).await?;
        assert_eq!(report.observed, Observed::Running);
        // Who waits there still waits, and for this attempt it is over.
        row.key = right;
        row.send(one, port, Policy::default()).await?;
        let report = one.settled(row.id, row.revision, |_| true).await?;
        assert!(failed(&report) && is_running(&report), "{report:?}");
        row.drop(two).await?;
        row.migration = MigrationId(Uuid::new_v4());
        row.send(one, port, Policy::default()).await?;
        let report = one.settled(row.id, row.revision, failed).await?;
        assert_eq!(
            (report.observed.clone(), report.starts),
            (Observed::Running, 1)
        );
        row.abort(one).await?;
        row.moved(one, two).await?;
        Ok(())
    })
}

#[test]
fn a_target_that_ends_its_part_leaves_the_guest_where_it_is() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let machine = Machine::start(one, &hosts.kernel).await?;
        one.console_says(machine.id, "tick 1 ").await?;
        machine.asks("touch 20").await?;
        let booted = nonce(&machine).await?;
        let _console = machine.types("loudly weave 20").await?;
        one.console_says(machine.id, "begun weave").await?;
        let mut row = Row::of(&machine);
        let port = row.prepare(one, two).await?;
        let never = Policy {
            downtime_ms: 0,
            at_limit: AtLimit::GiveUp,
            ..Policy::default()
        };
        row.send(one, port, never).await?;
        row.drop(two).await?;
        let by_itself = |report: &MachineReport| {
            failed(report) || matches!(state(report), Some(State::Offered { .. }))
        };
        let report = one.until(row.id, by_itself).await?;
        if failed(&report) {
            assert!(is_running(&report) && report.settled, "{report:?}");
        } else {
            row.abort(one).await?;
        }
        let _console = machine.types("").await?;
        one.console_says(row.id, "ok weave").await?;
        assert_eq!(nonce(&machine).await?, booted);
        // A guest that powers itself off meanwhile has done so where it was.
        let port = row.prepare(one, two).await?;
        row.send(one, port, never).await?;
        let _console = machine.types("poweroff").await?;
        let off = |report: &MachineReport| matches!(report.observed, Observed::Stopped { .. });
        let report = one.until(row.id, off).await?;
        assert!(failed(&report), "{report:?}");
        row.drop(two).await?;
        Ok(())
    })
}

/// What its controller has looked at beforehand, the host looks at itself: before anything of the guest is sent.
#[test]
fn a_guest_keeps_its_cpu_and_a_host_that_lacks_something_of_it_says_what() -> Result {
    block_on(async {
        let Some(hosts) = with_probes().await? else {
            return Ok(());
        };
        let (one, two) = (&hosts.one, &hosts.two);
        let mut machine = Machine::start(one, &hosts.kernel).await?;
        let cpu = one.client.host().await?.cpu.guest.unwrap();
        let mut profile = cpu.offers.clone();
        profile.physical_bits -= 1;
        let anew = |wanted: &mut Wanted| {
            wanted.spec.cpu = Some(Box::new(profile.clone()));
            wanted.hard_reboots += 1;
        };
        assert_eq!(machine.changed(anew).await?.observed, Observed::Running);
        let booted = nonce(&machine).await?;

        let mut row = Row::of(&machine);
        // KVM gives it to nobody: as if this host were an older one.
        let (word, bit) = by_name("enqcmd").unwrap();
        let kept = row.wanted.spec.cpu.as_mut().unwrap();
        *kept.words.entry(word).or_default() |= 1 << bit;
        let shape = one.client.get(row.id).await?.shape.unwrap();
        let (id, key) = (row.migration, row.key.clone());
        let arrives = |wanted: &mut Wanted| {
            wanted.arrives = Some(Arrival {
                id,
                key,
                shape,
                direct: true,
            })
        };
        row.tell(two, row.revision + 1, arrives).await?;
        let report = two.until(row.id, failed).await?;
        let Some(State::Failed { reason }) = state(&report) else {
            unreachable!()
        };
        assert!(reason.contains("lacks enqcmd"), "{reason}");
        row.drop(two).await?;

        row.wanted = machine.wanted.clone();
        row.moved(one, two).await?;
        assert_eq!(nonce(&row.on(two)).await?, booted);
        Ok(())
    })
}
