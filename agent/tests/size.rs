//! vCPUs and memory that come and go while a machine runs, through the whole agent; the guests are
//! stand-ins.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::machine::Machine;
use common::*;
use fractus_agent_api::machine::{ImageRef, MachineReport, Power};
use fractus_agent_api::size::SizeReport;

/// 1 of at most 4 vCPUs, 64 of at most 256 MiB.
async fn machine<'a>(agent: &'a Agent, kernel: &ImageRef) -> Result<Machine<'a>> {
    let mut machine = Machine {
        agent,
        id: new_id(),
        wanted: wanted(kernel, Power::Running),
        revision: 0,
    };
    let sized = machine.changed(|it| {
        it.spec.max_vcpus = Some(4);
        it.spec.max_memory_mib = Some(256);
    });
    assert!(is_running(&sized.await?));
    Ok(machine)
}

fn offered(report: &MachineReport) -> (u8, u64) {
    let size = report.size.as_ref().unwrap();
    (size.vcpus, size.memory_mib)
}

fn used(report: &MachineReport) -> (u8, u64) {
    let size = report.size.as_ref().unwrap();
    (size.vcpus_used, size.memory_mib_used)
}

#[test]
fn a_machine_grows_and_shrinks_without_a_new_start_as_far_as_it_was_made_for() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let mut machine = machine(&agent, &kernel).await?;
        let process = agent.processes(machine.id);
        let grow = |it: &mut fractus_agent_api::machine::Wanted| {
            (it.spec.vcpus, it.spec.memory_mib) = (3, 129);
        };
        let report = machine.changed(grow).await?;
        // Memory comes in blocks of 2 MiB.
        assert_eq!(offered(&report), (3, 130));
        agent
            .until(machine.id, |report| used(report) == (3, 130))
            .await?;
        assert_eq!(report.size.unwrap().at_next_start, None);

        let Machine {
            id,
            revision,
            wanted,
            ..
        } = machine;
        agent.restart().await?;
        agent
            .settled(id, revision, |report| used(report) == (3, 130))
            .await?;
        let agent = &agent;
        let mut machine = Machine {
            agent,
            id,
            revision,
            wanted,
        };
        let shrink = |it: &mut fractus_agent_api::machine::Wanted| {
            (it.spec.vcpus, it.spec.memory_mib) = (1, 32);
        };
        let report = machine.changed(shrink).await?;
        assert_eq!(offered(&report), (1, 64), "it was started with as much");
        let why = report.size.unwrap().at_next_start.unwrap();
        assert!(why.contains("32 MiB"), "{why}");
        assert_eq!(agent.processes(id), process);

        let report = machine.changed(|it| it.hard_reboots += 1).await?;
        assert_eq!(offered(&report), (1, 32));
        assert_eq!(report.size.unwrap().at_next_start, None);
        Ok(())
    })
}

#[test]
fn what_a_guest_does_not_take_is_told_and_waited_for_by_nobody() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let mut machine = machine(&agent, &kernel).await?;
        machine.hears("cling").await?;
        let grow = |it: &mut fractus_agent_api::machine::Wanted| {
            (it.spec.vcpus, it.spec.memory_mib) = (4, 256);
        };
        let report = machine.changed(grow).await?;
        let expected = SizeReport {
            vcpus: 4,
            vcpus_used: 1,
            memory_mib: 256,
            memory_mib_used: 64,
            at_next_start: None,
        };
        assert_eq!(report.size, Some(expected));
        machine.changed(|it| it.power = Power::Paused).await?;
        machine.changed(|it| it.power = Power::Running).await?;
        machine.hears("reset").await?;
        agent
            .until(machine.id, |report| used(report) == (4, 256))
            .await?;
        Ok(())
    })
}
