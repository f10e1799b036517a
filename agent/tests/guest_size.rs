//! vCPUs and memory that come and go under a real guest: the probe, on KVM, in its jail. Passes with a note
//! where there is none.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::machine::Machine;
use common::*;
use fractus_agent_api::machine::{MachineReport, Power, Wanted};

fn offered(report: &MachineReport) -> (u8, u64) {
    let size = report.size.as_ref().unwrap();
    (size.vcpus, size.memory_mib)
}

fn used(report: &MachineReport) -> (u8, u64) {
    let size = report.size.as_ref().unwrap();
    (size.vcpus_used, size.memory_mib_used)
}

#[test]
fn a_jailed_guest_takes_vcpus_and_memory_and_lets_them_go() -> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let (_cloud, mut agent, kernel) = start(&probe, false).await?;
        let mut machine = Machine {
            agent: &agent,
            id: new_id(),
            wanted: wanted(&kernel, Power::Running),
            revision: 0,
        };
        let sized = |it: &mut Wanted| {
            it.spec.max_vcpus = Some(4);
            it.spec.max_memory_mib = Some(128);
        };
        let report = machine.changed(sized).await?;
        assert_eq!((offered(&report), used(&report)), ((1, 64), (1, 64)));
        agent.console_says(machine.id, "tick 1 ").await?;
        let process = agent.processes(machine.id);
        let grow = |it: &mut Wanted| (it.spec.vcpus, it.spec.memory_mib) = (3, 96);
        let report = machine.changed(grow).await?;
        assert_eq!((offered(&report), used(&report)), ((3, 96), (1, 64)));
        let cpus = machine.asks("cpus").await?;
        assert!(cpus.contains("present=7 up=6"), "{cpus}");
        machine.asks("spin 1 2").await?;
        assert_eq!(machine.asks("memory plug 0 16").await?, "answer=0");
        machine.asks("memory fill 0 16 7").await?;
        machine.asks("memory check 0 16 7").await?;
        agent
            .until(machine.id, |report| used(report) == (3, 96))
            .await?;

        let Machine {
            id,
            revision,
            wanted,
            ..
        } = machine;
        agent.restart().await?;
        let agent = &agent;
        agent
            .settled(id, revision, |report| used(report) == (3, 96))
            .await?;
        let mut machine = Machine {
            agent,
            id,
            revision,
            wanted,
        };
        let shrink = |it: &mut Wanted| (it.spec.vcpus, it.spec.memory_mib) = (2, 64);
        let report = machine.changed(shrink).await?;
        assert_eq!((offered(&report), used(&report)), ((2, 64), (3, 96)));
        let cpus = machine.asks("cpus").await?;
        assert!(cpus.contains("down=4"), "{cpus}");
        machine.asks("cpu-eject 2").await?;
        machine.asks("memory unplug-all").await?;
        agent.until(id, |report| used(report) == (2, 64)).await?;
        assert_eq!(agent.processes(id), process);

        // It begins anew as large as is wanted then.
        let larger = |it: &mut Wanted| {
            (it.spec.vcpus, it.spec.memory_mib) = (4, 128);
            it.hard_reboots += 1;
        };
        let report = machine.changed(larger).await?;
        assert_eq!(offered(&report), (4, 128));
        agent.until(id, |report| used(report) == (4, 128)).await?;
        Ok(())
    })
}
