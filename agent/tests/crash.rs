//! `kill -9` of agents and machines at random moments: whatever was cut off is carried out afterwards,
//! with one process a machine at most and nothing left behind.
//!
//! `FRACTUS_ROUNDS` says how many rounds (default 5); `FRACTUS_SEED` where they begin. Guests are the
//! probe where there is KVM, else stand-ins.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::{Duration, Instant};

use common::machine::disk;
use common::*;
use fractus_agent_api::device::{DeviceId, DeviceState};
use fractus_agent_api::machine::{MachineReport, Observed, Power, ServerId, StopReason, Wanted};

/// xorshift64*: a round is repeated from its number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// A change of what is wanted; the first is a creation.
fn change(dice: &mut Dice, wanted: &mut Wanted) {
    match dice.roll(11) {
        0 => wanted.soft_reboots += 1,
        1 => wanted.hard_reboots += 1,
        2 => wanted.rebuilds += 1,
        3 => wanted.power = Power::Paused,
        4 => wanted.power = Power::Stopped,
        5 => wanted.power = Power::Running,
        6 | 7 => wanted.power = Power::Suspended,
        _ => change_disks(dice, wanted),
    }
}

/// One of two comes or goes.
fn change_disks(dice: &mut Dice, wanted: &mut Wanted) {
    let id = DeviceId(uuid::Uuid::from_u128(dice.roll(2).into()));
    let disks = &mut wanted.spec.disks;
    match disks.iter().position(|disk| disk.id == id) {
        Some(at) => drop(disks.remove(at)),
        None => disks.push(disk(id)),
    }
}

/// Those that are wanted are there, if only until the guest lets them go to come anew (the probe never
/// does by itself); and no content is lost.
fn has_its_disks(agent: &Agent, report: &MachineReport, wanted: &Wanted) -> bool {
    wanted.spec.disks.iter().all(|disk| {
        let is_there =
            |state: &DeviceState| matches!(state, DeviceState::Attached | DeviceState::Detaching);
        let mut reports = report.disks.iter();
        let file = format!("disk-{}.raw", disk.id);
        reports.any(|report| report.id == disk.id && is_there(&report.state))
            && agent.machine_folder(report.id).join(file).exists()
    })
}

async fn strike(dice: &mut Dice, agent: &mut Agent, id: ServerId) -> Result {
    // sleeps because the moment of the strike is what is tried: any moment, from the seed.
    tokio::time::sleep(Duration::from_micros(dice.roll(40_000))).await;
    if dice.roll(3) == 0 {
        let struck = agent.processes(id);
        for pid in &struck {
            if let Some(pid) = rustix::process::Pid::from_raw(*pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        // A signal has been sent, not yet taken: what comes next must not meet a process that is
        // about to go.
        let by = Instant::now() + PATIENCE;
        while agent.processes(id).iter().any(|pid| struck.contains(pid)) {
            anyhow::ensure!(Instant::now() < by, "{struck:?} outlive a SIGKILL");
            tokio::task::yield_now().await;
        }
        return Ok(());
    }
    agent.restart().await
}

fn is_fault(report: &MachineReport) -> bool {
    match &report.observed {
        Observed::Stopped { reason } => matches!(reason, StopReason::VmmFault { .. }),
        // Killed before its guest ran.
        Observed::Failed { .. } => true,
        _ => false,
    }
}

#[test]
fn kills_at_random_moments_leave_one_process_or_none_and_nothing_behind() -> Result {
    block_on(async {
        let probe = probe();
        let bytes = probe.as_deref().unwrap_or(b"kernel");
        let (_cloud, mut agent, kernel) = start(bytes, probe.is_none()).await?;
        let seed = number("FRACTUS_SEED", 1);
        for round in seed..seed + number("FRACTUS_ROUNDS", 5) {
            println!("round {round}");
            let mut dice = Dice(round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            let id = new_id();
            let mut wanted = wanted(&kernel, Power::Running);
            let mut revision = 0;
            for _ in 0..3 {
                revision += 1;
                agent.put(id, &put(revision, wanted.clone())).await?;
                strike(&mut dice, &mut agent, id).await?;
                assert!(agent.processes(id).len() <= 1, "round {round}");
                change(&mut dice, &mut wanted);
            }
            // A killed machine is a fault that stays: the next intent starts it anew. One that was
            // put before the agent noticed the kill has its fault under that intent, and needs
            // another.
            wanted.power = Power::Running;
            let report = loop {
                revision += 1;
                agent.put(id, &put(revision, wanted.clone())).await?;
                let there = |report: &MachineReport| {
                    is_fault(report) || is_running(report) && agent.processes(id).len() == 1
                };
                let report = agent.settled(id, revision, there).await?;
                if is_running(&report) {
                    break report;
                }
                assert!(revision < 6, "round {round}: it ends by itself: {report:?}");
            };
            assert_eq!(report.rebuilds, wanted.rebuilds, "round {round}");
            assert_eq!(report.hard_reboots, wanted.hard_reboots, "round {round}");
            assert_eq!(report.soft_reboots, wanted.soft_reboots, "round {round}");
            assert_eq!(agent.processes(id).len(), 1, "round {round}");
            for left in ["memory", "memory.new"] {
                let path = agent.machine_folder(id).join(left);
                assert!(!path.exists(), "round {round}: {left}");
            }
            assert!(
                has_its_disks(&agent, &report, &wanted),
                "round {round}: {report:?}"
            );

            wanted.power = Power::Absent;
            agent.put(id, &put(revision + 1, wanted)).await?;
            if dice.roll(2) == 0 {
                strike(&mut dice, &mut agent, id).await?;
            }
            agent.settled(id, revision + 1, is_absent).await?;
            assert_eq!(agent.leftovers(id), Vec::<String>::new(), "round {round}");
        }
        Ok(())
    })
}
