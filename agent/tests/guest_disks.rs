//! Disks that come and go under a real guest: the probe, on KVM, in its jail. Passes with a note where
//! there is none.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::machine::{Machine, disk, disks, states};
use common::*;
use fractus_agent_api::device::{DeviceId, DeviceState, DiskLimit, Presence};
use fractus_agent_api::machine::Power;
use uuid::Uuid;

/// CAP_SYS_RESOURCE, which test machines may lack.
fn may_raise_limits() -> bool {
    const SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << SYS_RESOURCE != 0
}

#[test]
fn a_jailed_guest_gets_a_disk_larger_than_any_writes_it_and_lets_it_go() -> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let (_cloud, mut agent, kernel) = start(&probe, false).await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        let process = agent.processes(machine.id);
        // Larger than what the process may write when it starts: its root disk and its memory. An agent
        // that may not change that says so.
        let size = match may_raise_limits() {
            true => 1 << 30,
            false => {
                let mut large = disk(DeviceId(Uuid::from_u128(8)));
                large.size = 1 << 30;
                let report = machine.changed(|it| it.spec.disks = vec![large]).await?;
                assert!(
                    matches!(&states(&report)[..], [DeviceState::AtNextStart { reason }]
                        if reason.contains("larger")),
                    "{report:?}"
                );
                32 << 20
            }
        };
        let mut new = disk(DeviceId(Uuid::from_u128(7)));
        new.size = size;
        new.serial_number = Some("data".to_owned());
        new.limit = Some(DiskLimit {
            bytes_per_second: Some(1 << 40),
            operations_per_second: None,
            burst_ms: 0,
        });
        let report = machine.changed(|it| it.spec.disks = vec![new]).await?;
        assert_eq!(states(&report), [DeviceState::Attached]);
        let came = machine.slot("up").await?;
        let info = machine.asks("disk-info 1").await?;
        assert_eq!(info, format!("bytes={size} ro=0 serial=data"));
        let end = size - 65536;
        machine.asks(&format!("disk-write 1 {end} 65536 3")).await?;
        machine.asks(&format!("disk-check 1 {end} 65536 3")).await?;

        let detach = |it: &mut fractus_agent_api::machine::Wanted| {
            it.spec.disks[0].presence = Presence::Detached;
        };
        let report = machine.changed(detach).await?;
        assert_eq!(states(&report), [DeviceState::Detaching]);
        assert_eq!(machine.slot("down").await?, came);
        machine.asks(&format!("eject {came}")).await?;
        machine.until(&[DeviceState::Detached]).await?;

        // It has what was written when it comes again, and with the next start too.
        let attach = |it: &mut fractus_agent_api::machine::Wanted| {
            it.spec.disks[0].presence = Presence::Attached;
        };
        machine.changed(attach).await?;
        machine.slot("up").await?;
        machine.asks(&format!("disk-check 1 {end} 65536 3")).await?;
        assert_eq!(agent.processes(machine.id), process);
        machine.changed(|it| it.hard_reboots += 1).await?;
        assert_ne!(agent.processes(machine.id), process);
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks(&format!("disk-check 1 {end} 65536 3")).await?;

        // One that it began with goes likewise, whatever agent asks.
        let (id, revision, wanted) = (machine.id, machine.revision, machine.wanted);
        agent.restart().await?;
        let agent = &agent;
        let mut machine = Machine {
            agent,
            id,
            wanted,
            revision,
        };
        let delete = |it: &mut fractus_agent_api::machine::Wanted| {
            it.spec.disks[0].presence = Presence::Deleted;
        };
        machine.changed(delete).await?;
        machine.until(&[DeviceState::Detaching]).await?;
        let went = machine.slot("down").await?;
        machine.asks(&format!("eject {went}")).await?;
        machine.until(&[DeviceState::Deleted]).await?;
        Ok(())
    })
}

#[test]
fn a_paused_guest_gets_disks_up_to_its_process_places_and_a_reset_takes_what_was_asked_for()
-> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let (_cloud, agent, kernel) = start(&probe, false).await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.changed(|it| it.power = Power::Paused).await?;
        let report = machine.changed(|it| it.spec.disks = disks(5)).await?;
        let attached = states(&report)
            .iter()
            .filter(|state| **state == DeviceState::Attached)
            .count();
        assert_eq!(attached, 4, "{report:?}");
        assert!(
            matches!(&report.disks[4].state, DeviceState::AtNextStart { reason } if reason.contains("in use")),
            "{report:?}"
        );
        machine.changed(|it| it.power = Power::Running).await?;
        machine.changed(|it| it.spec.disks.truncate(3)).await?;
        let _console = machine.types("reboot").await?;
        let three = [const { DeviceState::Attached }; 3];
        machine.until(&three).await?;
        agent.console_says(machine.id, "disks=4").await?;
        Ok(())
    })
}
