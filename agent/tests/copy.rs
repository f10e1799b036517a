//! Copies of a machine's root disk, of guests that run, stand still and are gone.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::machine::Machine;
use common::*;
use fractus_agent_api::copy::{CopyId, CopyReport, CopyState, PUT_VERSION};
use fractus_agent_api::machine::{MachineReport, Observed, Power, Refusal, RootDisk, ServerId};
use uuid::Uuid;

const ONE: CopyId = CopyId(Uuid::from_u128(0xc1));
const TWO: CopyId = CopyId(Uuid::from_u128(0xc2));
const BYTES: u64 = 32 << 20;

/// What of copies stands in the machine's folder.
fn copies(agent: &Agent, id: ServerId) -> Vec<String> {
    let names = agent.leftovers(id).into_iter();
    names.filter(|name| name.contains("copy-")).collect()
}

fn state(report: &MachineReport) -> Option<CopyState> {
    let CopyReport { state, .. } = report.copy.clone()?;
    Some(state)
}

/// The whole of a copy, and how many of its bytes came.
async fn fetched(agent: &Agent, id: ServerId, copy: CopyId) -> Result<(Vec<u8>, usize)> {
    let mut body = agent.client.copy(id, copy).await?;
    let (mut all, mut came) = (Vec::new(), 0);
    loop {
        match body.next().await? {
            Ok(pieces) => {
                for piece in pieces {
                    all.resize(usize::try_from(piece.offset)?, 0);
                    all.extend(&piece.bytes);
                    came += piece.bytes.len();
                }
            }
            Err(size) => {
                all.resize(usize::try_from(size)?, 0);
                return Ok((all, came));
            }
        }
    }
}

/// With a root disk of 32 MiB, and a guest that has booted, if this host can have one.
async fn booted<'a>(
    agent: &'a Agent,
    kernel: &fractus_agent_api::machine::ImageRef,
) -> Result<Machine<'a>> {
    let id = new_id();
    let mut wanted = wanted(kernel, Power::Running);
    wanted.spec.root_disk = Some(RootDisk {
        image: None,
        size: BYTES,
    });
    agent.put(id, &put(1, wanted.clone())).await?;
    agent.until(id, is_running).await?;
    Ok(Machine {
        agent,
        id,
        wanted,
        revision: 1,
    })
}

#[test]
fn a_guest_runs_on_while_its_disk_is_copied_and_the_copy_goes_when_nobody_wants_it() -> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let (_cloud, mut agent, kernel) = start(&probe, false).await?;
        let mut machine = booted(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks("disk-write 0 1048576 1048576 7").await?;
        let processes = agent.processes(machine.id);
        let report = machine.changed(|it| it.copy = Some(ONE)).await?;
        assert_eq!(state(&report), Some(CopyState::Made { bytes: BYTES }));
        assert!(is_running(&report) && report.starts == 1, "{report:?}");
        assert_eq!(copies(&agent, machine.id).len(), 1);
        let (first, came) = fetched(&agent, machine.id, ONE).await?;
        assert_eq!(first.len() as u64, BYTES);
        assert!((1 << 20..2 << 20).contains(&came), "{came} bytes came");
        // It is of then, whatever the guest writes since.
        machine.asks("disk-write 0 1048576 1048576 8").await?;
        assert!(fetched(&agent, machine.id, ONE).await?.0 == first);

        // Its guest stands still.
        machine
            .changed(|it| (it.copy, it.power) = (Some(TWO), Power::Paused))
            .await?;
        let (second, _) = fetched(&agent, machine.id, TWO).await?;
        assert!(second != first);
        assert!(fetched(&agent, machine.id, ONE).await.is_err());
        assert_eq!(copies(&agent, machine.id).len(), 1);
        machine.changed(|it| it.power = Power::Running).await?;
        machine.asks("disk-check 0 1048576 1048576 8").await?;
        assert_eq!(agent.processes(machine.id), processes);

        // An agent that comes later has it still; and one whose guest is suspended, or gone, copies itself.
        let (id, revision, wanted) = (machine.id, machine.revision, machine.wanted);
        agent.restart().await?;
        let agent = &agent;
        let mut machine = Machine {
            agent,
            id,
            wanted,
            revision,
        };
        assert!(fetched(agent, id, TWO).await?.0 == second);
        for (copy, power) in [(ONE, Power::Suspended), (TWO, Power::Stopped)] {
            let report = machine
                .changed(|it| (it.copy, it.power) = (Some(copy), power))
                .await?;
            assert_eq!(state(&report), Some(CopyState::Made { bytes: BYTES }));
            assert_eq!(agent.processes(id), Vec::<i32>::new());
            assert!(fetched(agent, id, copy).await?.0 == second);
        }
        machine.changed(|it| it.copy = None).await?;
        assert_eq!(copies(agent, id), Vec::<String>::new());
        machine.changed(|it| it.copy = Some(ONE)).await?;
        machine
            .changed(|it| (it.copy, it.power) = (None, Power::Absent))
            .await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        Ok(())
    })
}

/// The agent is killed while the process copies, and the process while it does.
#[test]
fn whoever_is_killed_meanwhile_there_is_a_copy_in_the_end() -> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let (_cloud, mut agent, kernel) = start(&probe, false).await?;
        let machine = booted(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks("disk-write 0 0 16777216 7").await?;
        let (id, mut wanted) = (machine.id, machine.wanted);
        wanted.copy = Some(ONE);
        agent.put(id, &put(2, wanted.clone())).await?;
        agent.restart().await?;
        let is_made = |report: &MachineReport| {
            report.revision.0 >= 2 && matches!(state(report), Some(CopyState::Made { .. }))
        };
        let report = agent.until(id, is_made).await?;
        assert!(is_running(&report) && report.starts == 1, "{report:?}");
        let (first, _) = fetched(&agent, id, ONE).await?;
        assert_eq!(copies(&agent, id).len(), 1);

        wanted.copy = Some(TWO);
        agent.put(id, &put(3, wanted.clone())).await?;
        for pid in agent.processes(id) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let report = agent.settled(id, 3, is_made).await?;
        assert!(
            matches!(report.observed, Observed::Stopped { .. }),
            "{report:?}"
        );
        assert!(fetched(&agent, id, TWO).await?.0 == first);
        assert_eq!(copies(&agent, id).len(), 1);
        Ok(())
    })
}

#[test]
fn a_copy_that_has_no_room_leaves_nothing_and_its_guest_alone() -> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let cloud = Cloud::start().await;
        let kernel = image_of(&probe);
        cloud.add_image(&kernel, &probe);
        let agent = Agent::start_on_a_small_disk_with("40m", &cloud, false).await?;
        let mut machine = booted(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks("disk-write 0 0 25165824 7").await?;
        let report = machine.changed(|it| it.copy = Some(ONE)).await?;
        let Some(CopyState::Failed { reason }) = state(&report) else {
            panic!("{report:?}");
        };
        assert!(reason.contains("make room there"), "{reason}");
        assert!(is_running(&report), "{report:?}");
        assert_eq!(copies(&agent, machine.id), Vec::<String>::new());
        machine.asks("disk-check 0 0 25165824 7").await?;
        let report = machine.changed(|it| it.power = Power::Stopped).await?;
        assert!(
            matches!(state(&report), Some(CopyState::Failed { .. })),
            "{report:?}"
        );
        assert_eq!(copies(&agent, machine.id), Vec::<String>::new());
        Ok(())
    })
}

/// Without KVM, too: all that surrounds the disk.
#[test]
fn a_copy_is_wanted_by_its_own_version_only() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        let mut wanted = machine.wanted.clone();
        wanted.copy = Some(ONE);
        let mut old = put(2, wanted);
        old.version = PUT_VERSION - 1;
        let refused = agent.client.put(machine.id, &old).await.unwrap_err();
        assert!(
            matches!(refused.refusal(), Some(Refusal::Invalid { .. })),
            "{refused}"
        );
        let report = machine.changed(|it| it.copy = Some(ONE)).await?;
        assert_eq!(state(&report), Some(CopyState::Made { bytes: 1 << 20 }));
        let unknown = agent.client.copy(machine.id, TWO).await.unwrap_err();
        assert!(
            matches!(unknown.refusal(), Some(Refusal::Unknown)),
            "{unknown}"
        );
        machine.changed(|it| it.copy = None).await?;
        assert_eq!(copies(&agent, machine.id), Vec::<String>::new());
        Ok(())
    })
}

/// Without KVM, too: the disk is what the guest finds.
#[test]
fn a_disk_is_made_of_its_copy_again_and_grows_with_its_server() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        let disk = agent.machine_folder(machine.id).join("root.raw");
        machine.changed(|it| it.power = Power::Stopped).await?;
        std::fs::write(&disk, vec![7; 1 << 20])?;
        let report = machine.changed(|it| it.copy = Some(ONE)).await?;
        assert_eq!(state(&report), Some(CopyState::Made { bytes: 1 << 20 }));
        // Larger, from its next start on.
        let larger = |it: &mut fractus_agent_api::machine::Wanted| {
            it.spec.root_disk.as_mut().unwrap().size = 3 << 20;
        };
        machine.changed(larger).await?;
        assert_eq!(disk.metadata()?.len(), 1 << 20);
        machine.changed(|it| it.power = Power::Running).await?;
        let grown = std::fs::read(&disk)?;
        assert_eq!(grown.len(), 3 << 20);
        let is_as_it_was = |bytes: &[u8]| bytes.iter().take(1 << 20).all(|byte| *byte == 7);
        assert!(is_as_it_was(&grown) && grown.iter().skip(1 << 20).all(|byte| *byte == 0));
        machine.changed(|it| it.power = Power::Stopped).await?;
        std::fs::write(&disk, vec![8; 3 << 20])?;

        // An agent that knows nothing of it would make it of its image.
        let mut old = put(machine.revision + 1, machine.wanted.clone());
        (old.wanted.restores, old.wanted.rebuilds) = (Some(ONE), 1);
        old.version = PUT_VERSION;
        let refused = agent.client.put(machine.id, &old).await.unwrap_err();
        assert!(
            matches!(refused.refusal(), Some(Refusal::Invalid { .. })),
            "{refused}"
        );
        let back = |it: &mut fractus_agent_api::machine::Wanted| {
            it.spec.root_disk.as_mut().unwrap().size = 1 << 20;
            it.restores = Some(ONE);
            it.rebuilds += 1;
        };
        for rebuilds in [1, 2] {
            let report = machine.changed(back).await?;
            assert_eq!(report.rebuilds, rebuilds);
            assert!(std::fs::read(&disk)? == vec![7; 1 << 20]);
        }
        let left = agent.leftovers(machine.id);
        assert!(!left.iter().any(|name| name.ends_with(".new")), "{left:?}");
        // The copy goes, and the disk stays.
        machine
            .changed(|it| {
                (it.copy, it.restores) = (None, None);
                it.power = Power::Running;
            })
            .await?;
        assert_eq!(copies(&agent, machine.id), Vec::<String>::new());
        assert!(std::fs::read(&disk)? == vec![7; 1 << 20]);

        // Of one that is not there nothing is made, and the disk is left.
        machine.changed(|it| it.power = Power::Stopped).await?;
        let (id, revision, wanted) = (machine.id, machine.revision, machine.wanted);
        agent.restart().await?;
        let mut machine = Machine {
            agent: &agent,
            id,
            wanted,
            revision,
        };
        let report = machine
            .changed(|it| (it.restores, it.rebuilds) = (Some(TWO), it.rebuilds + 1))
            .await?;
        assert!(
            matches!(report.observed, Observed::Failed { .. }),
            "{report:?}"
        );
        assert!(std::fs::read(&disk)? == vec![7; 1 << 20]);
        Ok(())
    })
}
