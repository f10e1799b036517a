//! Guests that go on in processes of a newer program, on their host: real processes and the probe. Passes with a note
//! where there is no KVM.
//!
//! `FRACTUS_ROUNDS` says how often the agent is killed meanwhile (default 10); `FRACTUS_SEED` where that begins.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "../../vmm/tests/tap/mod.rs"]
mod tap;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::machine::{Machine, disks};
use common::*;
use fractus_agent::machine::process::launch::HostLauncher;
use fractus_agent::machine::process::{
    Adoption, Command as Order, Heard, Launcher, Plan, Process, TakingOver, end_strays, identity,
};
use fractus_agent::machine::record::ProcessRecord;
use fractus_agent::network::tap_name;
use fractus_agent::paths::Paths;
use fractus_agent::vm::protocol::{MachineEvent, State};
use fractus_agent_api::device::{DeviceId, Mac, Nic};
use fractus_agent_api::machine::{ImageRef, Observed, Power, ServerId, Wanted};
use fractus_agent_api::migration::{MigrationId, State as Journey};
use futures::{SinkExt, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

async fn with_probes() -> Result<Option<(Cloud, Agent, ImageRef)>> {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(None);
    };
    Ok(Some(start(&probe, false).await?))
}

async fn nonce(machine: &Machine<'_>) -> Result<String> {
    let info = machine.asks("info").await?;
    let nonce = info.split(' ').find_map(|word| word.strip_prefix("nonce="));
    Ok(nonce.unwrap().to_owned())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn upgraded(agent: &Agent, arguments: &[&str]) -> Result<String> {
    let output = agent.upgrades_machines(arguments).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    let said = said(&output);
    anyhow::ensure!(output.status.success(), "{said}{error}\n{}", agent.log());
    print!("{said}");
    Ok(said)
}

/// The one process of the machine.
fn process(agent: &Agent, id: ServerId) -> i32 {
    let processes = agent.processes(id);
    assert_eq!(processes.len(), 1, "{processes:?}");
    processes[0]
}

/// Its ticks follow each other: none is missing, none comes twice.
fn ticks_on(log: &str) -> u64 {
    let (whole, _) = log.rsplit_once('\n').unwrap_or_default();
    let ticks = whole.lines().filter_map(|line| line.strip_prefix("tick "));
    let numbers: Vec<u64> = ticks
        .filter_map(|rest| rest.split(' ').next()?.parse().ok())
        .collect();
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "{log}");
    numbers.len() as u64
}

fn nic() -> Nic {
    Nic {
        id: DeviceId(Uuid::new_v4()),
        mac: Mac([2, 0xf0, 0, 0, 0, 1]),
        mtu: None,
        queues: 1,
        limit: None,
    }
}

fn has_interface(nic: &Nic) -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.contains(&tap_name(nic.id))
}

fn vsock_echoes(agent: &Agent, id: ServerId) -> Result {
    let mut stream = UnixStream::connect(agent.machine_folder(id).join("vsock.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT 7")?;
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    stream.write_all(b"here")?;
    let mut back = [0; 4];
    stream.read_exact(&mut back)?;
    anyhow::ensure!(&back == b"here");
    Ok(())
}

#[test]
fn guests_go_on_in_processes_of_the_new_program_with_all_that_they_have() -> Result {
    tap::enter_namespace();
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        let nic = nic();
        let wants = vec![nic.clone()];
        machine.changed(|it| it.spec.disks = disks(1)).await?;
        machine.slot("up").await?;
        machine.changed(|it| it.spec.nics = wants).await?;
        machine.slot("up").await?;
        machine.asks("touch 20").await?;
        machine.asks("disk-write 0 0 1048576 3").await?;
        machine.asks("disk-write 1 0 65536 5").await?;
        let booted = nonce(&machine).await?;
        let (id, mut revision, wanted) = (machine.id, machine.revision, machine.wanted);
        let old = process(&agent, id);
        // It is in a process of the agent's program.
        assert_eq!(upgraded(&agent, &[])?, format!("{id} current\n"));
        agent.install()?;
        let output = agent.upgrades_machines(&["--all"]).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("restart it first"));
        assert_eq!(process(&agent, id), old);
        agent.restart().await?;
        for round in 0..5 {
            let all: &[&str] = if round > 0 { &["--all"] } else { &[] };
            let mut console = agent.client.console(id).await?;
            let before = process(&agent, id);
            let line = upgraded(&agent, all)?;
            assert!(line.starts_with(&format!("{id} handed over, ")), "{line}");
            let after = process(&agent, id);
            assert_ne!(before, after);
            let program = std::fs::read_link(format!("/proc/{after}/exe"))?;
            assert_eq!(program, agent.binary);
            // Who watches and types does so there.
            console.send(Message::binary("echo still\n")).await?;
            let mut heard = String::new();
            while !heard.contains("ok echo still") {
                let next = tokio::time::timeout(PATIENCE, console.next()).await?;
                let next = next.ok_or_else(|| anyhow::anyhow!("the console ends: {heard:?}"))??;
                heard.push_str(&String::from_utf8_lossy(&next.into_data()));
            }
            drop(console);
            let machine = Machine {
                agent: &agent,
                id,
                wanted: wanted.clone(),
                revision,
            };
            assert_eq!(nonce(&machine).await?, booted);
            machine.asks("disk-check 0 0 1048576 3").await?;
            machine.asks("disk-check 1 0 65536 5").await?;
            machine.asks("disk-write 1 65536 65536 6").await?;
            assert!(has_interface(&nic));
            vsock_echoes(&agent, id)?;
        }
        let report = agent.client.get(id).await?;
        assert!(report.settled && is_running(&report) && report.starts == 1);
        assert!(ticks_on(&agent.console_says(id, "tick ").await?) > 1);
        assert_eq!(upgraded(&agent, &[])?, format!("{id} current\n"));

        // What it is told there it does: another agent finds it, and its devices go.
        agent.restart().await?;
        let mut machine = Machine {
            agent: &agent,
            id,
            wanted,
            revision,
        };
        assert_eq!(nonce(&machine).await?, booted);
        machine.changed(|it| it.spec.nics.clear()).await?;
        let slot = machine.slot("down").await?;
        machine.asks(&format!("eject {slot}")).await?;
        agent.until(id, |report| report.nics.is_empty()).await?;
        let by = Instant::now() + PATIENCE;
        while has_interface(&nic) {
            anyhow::ensure!(Instant::now() < by, "the tap is still there");
            // sleeps because interfaces of the kernel are looked at, and do not call.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        machine.changed(|it| it.hard_reboots += 1).await?;
        ticks(&agent, id).await?;
        machine.asks("disk-check 0 0 1048576 3").await?;
        revision = machine.revision + 1;
        let mut wanted = machine.wanted.clone();
        wanted.power = Power::Absent;
        agent.put(id, &put(revision, wanted)).await?;
        agent.settled(id, revision, is_absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        Ok(())
    })
}

#[test]
fn those_that_stand_still_do_so_afterwards_and_those_without_a_guest_are_passed_over() -> Result {
    block_on(async {
        let Some((_cloud, agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let mut paused = Machine::start(&agent, &kernel).await?;
        // With a port for the guest's agent, which goes along.
        let agents = |it: &mut Wanted| {
            it.spec.guest.agent = true;
            it.hard_reboots += 1;
        };
        paused.changed(agents).await?;
        ticks(&agent, paused.id).await?;
        let booted = nonce(&paused).await?;
        paused.changed(|it| it.power = Power::Paused).await?;
        let mut stopped = Machine::start(&agent, &kernel).await?;
        stopped.changed(|it| it.power = Power::Stopped).await?;
        let mut suspended = Machine::start(&agent, &kernel).await?;
        suspended.changed(|it| it.power = Power::Suspended).await?;
        let before = process(&agent, paused.id);
        let said = upgraded(&agent, &["--all"])?;
        let mut lines: Vec<&str> = said.lines().collect();
        lines.sort_unstable();
        let mut expected = vec![
            format!("{} handed over, paused", paused.id),
            format!("{} skipped: it does not run", stopped.id),
            format!("{} skipped: it is suspended", suspended.id),
        ];
        expected.sort();
        assert_eq!(lines, expected);
        assert_ne!(process(&agent, paused.id), before);
        let report = agent.client.get(paused.id).await?;
        assert!(report.settled && report.observed == Observed::Paused);
        paused.changed(|it| it.power = Power::Running).await?;
        assert_eq!(nonce(&paused).await?, booted);
        let one = upgraded(&agent, &["--all", &paused.id.to_string()])?;
        assert!(one.starts_with(&format!("{} handed over, ", paused.id)));
        let nobody = agent.upgrades_machines(&[&Uuid::nil().to_string()]);
        let output = { nobody }.output()?;
        assert!(!output.status.success() && self::said(&output).contains("no such machine"));
        Ok(())
    })
}

/// By the last release's agent, where the environment names it.
#[test]
fn a_process_of_a_release_that_could_not_hand_over_goes_on_and_is_told_of() -> Result {
    let Some(previous) = std::env::var_os("FRACTUS_PREVIOUS_AGENT") else {
        println!("no FRACTUS_PREVIOUS_AGENT: nothing was tested");
        return Ok(());
    };
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let new = std::mem::replace(&mut agent.binary, previous.into());
        agent.restart().await?;
        let Machine { id, .. } = Machine::start(&agent, &kernel).await?;
        ticks(&agent, id).await?;
        agent.binary = new;
        agent.restart().await?;
        agent.settled(id, 1, is_running).await?;
        let old = process(&agent, id);
        let said = upgraded(&agent, &[])?;
        assert!(said.contains("skipped: its process is of an older release"));
        assert_eq!(process(&agent, id), old);
        let at = ticks_on(&agent.console_says(id, "tick ").await?);
        agent.console_says(id, &format!("tick {} ", at + 2)).await?;
        Ok(())
    })
}

/// Children of the agent, from /proc.
fn children(agent: &Agent) -> Vec<i32> {
    let Some(pid) = agent.pid() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(text.split(' ').filter_map(|pid| pid.parse::<i32>().ok()));
    }
    found
}

/// The process that is to take a machine over, as soon as there is one.
fn heir(agent: &Agent, but: i32) -> Pid {
    let by = Instant::now() + PATIENCE;
    while Instant::now() < by {
        if let Some(pid) = children(agent).into_iter().find(|pid| *pid != but) {
            return Pid::from_raw(pid).unwrap();
        }
    }
    panic!("no process takes it over\n{}", agent.log())
}

#[test]
fn a_new_process_that_is_killed_before_it_has_the_guest_leaves_it_where_it_was() -> Result {
    block_on(async {
        let Some((_cloud, agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let machine = Machine::start(&agent, &kernel).await?;
        ticks(&agent, machine.id).await?;
        let booted = nonce(&machine).await?;
        let old = process(&agent, machine.id);
        for _ in 0..3 {
            let mut command = agent.upgrades_machines(&["--all"]);
            let asking = std::thread::spawn(move || command.output());
            let new = heir(&agent, old);
            kill_process(new, Signal::KILL)?;
            let output = asking.join().unwrap()?;
            let said = said(&output);
            assert!(said.contains("failed: "), "{said}");
            assert!(!output.status.success());
            assert_eq!(process(&agent, machine.id), old);
            assert_eq!(nonce(&machine).await?, booted);
            let report = agent.client.get(machine.id).await?;
            assert!(report.settled && is_running(&report), "{report:?}");
        }
        upgraded(&agent, &["--all"])?;
        assert_eq!(nonce(&machine).await?, booted);
        assert!(ticks_on(&agent.console_says(machine.id, "tick ").await?) > 1);
        Ok(())
    })
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn an_agent_that_is_killed_at_any_moment_leaves_one_process_with_the_guest() -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let machine = Machine::start(&agent, &kernel).await?;
        ticks(&agent, machine.id).await?;
        machine.asks("disk-write 0 0 1048576 3").await?;
        let booted = nonce(&machine).await?;
        let (id, wanted, revision) = (machine.id, machine.wanted, machine.revision);
        let mut dice = number("FRACTUS_SEED", 0x5eed);
        for round in 0..number("FRACTUS_ROUNDS", 10) {
            // splitmix64, which repeats a round from its number.
            dice = dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let rolled = (dice ^ dice >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
            let mut command = agent.upgrades_machines(&["--all"]);
            let asking = std::thread::spawn(move || command.output());
            // sleeps because the moment of the strike is what is tried: any moment, from the seed.
            tokio::time::sleep(Duration::from_micros(rolled % 50_000)).await;
            agent.kill();
            let output = asking.join().unwrap()?;
            println!("{round}: {} us, {}", rolled % 50_000, said(&output));
            agent.run().await?;
            agent.settled(id, revision, is_running).await?;
            let machine = Machine {
                agent: &agent,
                id,
                wanted: wanted.clone(),
                revision,
            };
            assert_eq!(nonce(&machine).await?, booted);
            machine.asks("disk-check 0 0 1048576 3").await?;
            process(&agent, id);
        }
        assert!(ticks_on(&agent.console_says(id, "tick ").await?) > 1);
        Ok(())
    })
}

/// Agents of one host, one after the other, with a machine, and no controller.
struct Host {
    folder: tempfile::TempDir,
    mark: Uuid,
    user: u32,
    id: ServerId,
    kernel: ImageRef,
}

impl Host {
    fn new(probe: &[u8]) -> Result<Self> {
        let host = Self {
            folder: tempfile::tempdir()?,
            mark: Uuid::new_v4(),
            user: 1_300_000_000 + std::process::id() % 100_000,
            id: new_id(),
            kernel: image_of(probe),
        };
        let paths = host.paths().machine(host.id);
        std::fs::create_dir_all(paths.folder())?;
        std::fs::write(paths.image(&host.kernel), probe)?;
        std::fs::File::create(paths.disk())?.set_len(1 << 20)?;
        Ok(host)
    }

    fn paths(&self) -> Paths {
        Paths::new(
            self.folder.path().join("state"),
            self.folder.path().join("run"),
        )
    }

    fn agent(&self) -> Result<Arc<HostLauncher>> {
        let mut launcher = HostLauncher::new(self.paths(), self.mark, None, false)?;
        launcher.binary = std::fs::File::open(env!("CARGO_BIN_EXE_fractus-agent"))?.into();
        Ok(Arc::new(launcher))
    }

    fn plan(&self, takes_over: Option<TakingOver>) -> Plan {
        Plan {
            id: self.id,
            spec: wanted(&self.kernel, Power::Running).spec,
            devices: Vec::new(),
            user: self.user,
            goes_on: false,
            arrives: None,
            takes_over,
            most_mib: 64,
            request_id: None,
        }
    }

    /// What an agent does at its start.
    fn ends_all_but(&self, named: ProcessRecord) -> Result<usize> {
        Ok(end_strays(self.mark, |_, pid| pid == named.pid)?)
    }

    /// Of the machine's console.
    fn serial(&self) -> String {
        let path = self.paths().machine(self.id).serial_log();
        let bytes = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(bytes.get(16..).unwrap_or_default()).into_owned();
        text.trim_end_matches('\0').replace('\r', "")
    }

    async fn ticks_to(&self, number: u64) -> Result<u64> {
        let by = Instant::now() + PATIENCE;
        loop {
            let at = ticks_on(&self.serial());
            if at >= number {
                return Ok(at);
            }
            anyhow::ensure!(Instant::now() < by, "{}", self.serial());
            // sleeps because a console's log is read as often as it takes; a deadline ends it.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = end_strays(self.mark, |_, _| false);
    }
}

async fn hears(process: &mut impl Process, what: impl Fn(&Heard) -> bool) -> Result<Heard> {
    let heard = async {
        loop {
            let heard = process.hear().await;
            println!("{heard:?}");
            if what(&heard) {
                return Ok(heard);
            }
            anyhow::ensure!(!matches!(heard, Heard::Ended(_)), "{heard:?}");
        }
    };
    tokio::time::timeout(PATIENCE, heard).await?
}

fn is_offered(heard: &Heard) -> bool {
    let moving = match heard {
        Heard::Moving(moving) => Some(moving),
        Heard::Status(status) => status.moving.as_ref(),
        _ => None,
    };
    moving.is_some_and(|moving| matches!(moving.state, Journey::Offered { .. }))
}

/// Both processes of a guest that stands still in either, as they are when their agent ends.
async fn between(host: &Host) -> Result<[ProcessRecord; 2]> {
    let agent = host.agent()?;
    let mut old = agent.launch(host.plan(None)).await?;
    hears(&mut old, |heard| matches!(heard, Heard::Ready { .. })).await?;
    old.tell(Order::Go, None).await?;
    let runs = |heard: &Heard| *heard == Heard::Event(MachineEvent::Running);
    hears(&mut old, runs).await?;
    host.ticks_to(3).await?;
    let (near, far) = UnixStream::pair()?;
    near.set_nonblocking(true)?;
    let (line, from) = (far.into(), old.identity());
    let plan = host.plan(Some(TakingOver { line, from }));
    let mut new = agent.launch(plan).await?;
    let id = MigrationId(Uuid::new_v4());
    old.hand_over(id, near.into(), None).await?;
    hears(&mut old, is_offered).await?;
    hears(&mut new, |heard| matches!(heard, Heard::Ready { .. })).await?;
    Ok([old.identity(), new.identity()])
}

async fn adopted(host: &Host, named: ProcessRecord) -> Result<impl Process> {
    let agent = host.agent()?;
    let adoption = agent.adopt(host.id, &named).await?;
    let Adoption::Alive(process) = adoption else {
        anyhow::bail!("it is gone");
    };
    Ok(process)
}

#[test]
fn a_guest_goes_on_in_the_process_that_the_record_names() -> Result {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(());
    };
    block_on(async {
        for committed in [false, true] {
            let host = Host::new(&probe)?;
            let [old, new] = between(&host).await?;
            let stood = ticks_on(&host.serial());
            let named = if committed { new } else { old };
            // Their agent is gone, and nobody has told either of them anything.
            assert!(identity::find(&old, old.boot_id)?.is_some());
            assert!(identity::find(&new, new.boot_id)?.is_some());
            assert_eq!(host.ends_all_but(named)?, 1);
            let mut process = adopted(&host, named).await?;
            let status = hears(&mut process, |heard| matches!(heard, Heard::Status(_))).await?;
            let Heard::Status(status) = status else {
                unreachable!()
            };
            assert_eq!(status.state, State::Paused);
            assert_eq!(ticks_on(&host.serial()), stood);
            match committed {
                true => process.tell(Order::Resume, None).await?,
                false => process.stay(None).await?,
            }
            let runs = |heard: &Heard| match heard {
                Heard::TookOver(_) => committed,
                Heard::Status(status) => !committed && status.state == State::Running,
                _ => false,
            };
            hears(&mut process, runs).await?;
            host.ticks_to(stood + 3).await?;
            assert_eq!(nonces(&host.serial()).len(), 1);
        }
        Ok(())
    })
}
