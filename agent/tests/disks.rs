//! Disks of a machine that come and go while it runs, through the whole agent; the guests are stand-ins.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::machine::{Machine, disk, disks, states};
use common::*;
use fractus_agent_api::device::{DeviceId, DeviceState, Disk, Presence};
use fractus_agent_api::machine::{MachineReport, Observed, Power, Refusal, Wanted};
use uuid::Uuid;

const ID: DeviceId = DeviceId(Uuid::from_u128(0xd1));

#[test]
fn a_disk_comes_and_goes_while_its_machine_runs_and_its_content_stays() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        let process = agent.processes(machine.id);
        let report = machine.changed(|it| it.spec.disks = disks(1)).await?;
        assert_eq!(states(&report), [DeviceState::Attached]);
        let id = machine.wanted.spec.disks[0].id;
        // As OpenStack's guests know their volumes.
        let text = format!("came {}", &id.to_string()[..20]);
        agent.console_says(machine.id, &text).await?;
        std::fs::write(machine.file(id), b"of a user")?;

        // A list that does not name it detaches it, and so does one that says so.
        machine.changed(|it| it.spec.disks.clear()).await?;
        machine.until(&[]).await?;
        machine.changed(|it| it.spec.disks = disks(1)).await?;
        machine.until(&[DeviceState::Attached]).await?;
        machine
            .changed(|it| it.spec.disks[0].presence = Presence::Detached)
            .await?;
        machine.until(&[DeviceState::Detached]).await?;
        assert!(std::fs::read(machine.file(id))?.starts_with(b"of a user"));

        // It was made as large as was asked for, and is made larger.
        let grow = |it: &mut Wanted| {
            it.spec.disks[0].presence = Presence::Attached;
            it.spec.disks[0].size = 2 << 20;
        };
        machine.changed(grow).await?;
        machine.until(&[DeviceState::Attached]).await?;
        assert_eq!(std::fs::metadata(machine.file(id))?.len(), 2 << 20);
        let delete = |it: &mut Wanted| it.spec.disks[0].presence = Presence::Deleted;
        machine.changed(delete).await?;
        machine.until(&[DeviceState::Deleted]).await?;
        assert!(!machine.file(id).exists());
        assert_eq!(agent.processes(machine.id), process, "no new start");

        // What is detached goes with its machine.
        machine.changed(|it| it.spec.disks = disks(2)).await?;
        machine.changed(|it| it.spec.disks.clear()).await?;
        machine.until(&[]).await?;
        let (id, revision) = (machine.id, machine.revision);
        agent
            .put(id, &put(revision + 1, wanted(&kernel, Power::Absent)))
            .await?;
        agent.settled(id, revision + 1, is_absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        agent.kill();
        Ok(())
    })
}

#[test]
fn a_guest_that_keeps_its_disk_is_told_of_and_obeys_otherwise() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        machine.changed(|it| it.spec.disks = disks(1)).await?;
        machine.hears("cling").await?;
        let report = machine.changed(|it| it.spec.disks.clear()).await?;
        assert_eq!(states(&report), [DeviceState::Detaching]);
        let report = machine.changed(|it| it.power = Power::Paused).await?;
        assert_eq!(
            (states(&report), report.observed),
            (vec![DeviceState::Detaching], Observed::Paused)
        );
        machine.changed(|it| it.power = Power::Running).await?;
        let Machine {
            id,
            revision,
            wanted,
            ..
        } = machine;
        // The next agent knows it too.
        agent.restart().await?;
        let machine = Machine {
            agent: &agent,
            id,
            revision,
            wanted,
        };
        machine.until(&[DeviceState::Detaching]).await?;
        machine.hears("reset").await?;
        machine.until(&[]).await?;
        Ok(())
    })
}

#[test]
fn what_an_agent_began_the_next_one_ends() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        let mut wanted = wanted(&kernel, Power::Running);
        for (revision, count) in [(2, 3), (3, 1), (4, 2), (5, 0)] {
            wanted.spec.disks = disks(count);
            agent.put(id, &put(revision, wanted.clone())).await?;
            agent.restart().await?;
            let expected = vec![DeviceState::Attached; usize::try_from(count)?];
            let there = |report: &MachineReport| states(report) == expected;
            let report = agent.settled(id, revision, there).await?;
            assert_eq!(report.starts, 1);
        }
        Ok(())
    })
}

#[test]
fn more_disks_than_a_process_has_places_for_come_with_the_next_start() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        let report = machine.changed(|it| it.spec.disks = disks(5)).await?;
        let (later, now): (Vec<_>, Vec<_>) = states(&report)
            .into_iter()
            .partition(|state| *state != DeviceState::Attached);
        assert_eq!(now.len(), 4);
        assert!(
            matches!(&later[..], [DeviceState::AtNextStart { reason }] if reason.contains("place")),
            "{later:?}"
        );
        let report = machine.changed(|it| it.hard_reboots += 1).await?;
        assert_eq!(states(&report), [const { DeviceState::Attached }; 5]);
        // A machine that does not run has them when it does.
        let report = machine.changed(|it| it.power = Power::Stopped).await?;
        let waits = |state: &DeviceState| matches!(state, DeviceState::AtNextStart { .. });
        assert!(states(&report).iter().all(waits), "{report:?}");
        // Its disks are deleted all the same.
        let file = machine.file(machine.wanted.spec.disks[4].id);
        assert!(file.exists());
        let delete = |it: &mut Wanted| it.spec.disks[4].presence = Presence::Deleted;
        machine.changed(delete).await?;
        assert!(!file.exists());
        Ok(())
    })
}

#[test]
fn a_disk_that_cannot_be_opened_fails_alone_and_is_tried_with_the_next_intent() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        std::fs::create_dir(machine.file(ID))?;
        let report = machine
            .changed(|it| it.spec.disks = vec![disk(ID), disks(1)[0].clone()])
            .await?;
        assert_eq!(report.observed, Observed::Running);
        let states_now = states(&report);
        assert!(
            matches!(&states_now[..], [DeviceState::Failed { reason }, DeviceState::Attached]
                if reason.contains("disk-")),
            "{states_now:?}"
        );
        std::fs::remove_dir(machine.file(ID))?;
        machine.changed(|_| ()).await?;
        machine
            .until(&[DeviceState::Attached, DeviceState::Attached])
            .await?;
        Ok(())
    })
}

type Change = fn(&mut Vec<Disk>);

#[test]
fn disks_that_no_machine_could_have_are_refused() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        let with = |change: Change| {
            let mut wanted = wanted(&kernel, Power::Running);
            wanted.spec.disks = disks(2);
            change(&mut wanted.spec.disks);
            put(2, wanted)
        };
        let wrong: [(Change, &str); 5] = [
            (|it| it[1].id = it[0].id, "named twice"),
            (|it| it[0].size = 0, "size"),
            (|it| it[0].serial_number = Some("ä".into()), "serial"),
            (
                |it| {
                    let limit = br#"{"bytes_per_second":0}"#;
                    it[0].limit = serde_json::from_slice(limit).unwrap();
                },
                "for ever",
            ),
            (|it| *it = disks(15), "at most 14"),
        ];
        for (change, word) in wrong {
            let refused = agent.client.put(id, &with(change)).await.unwrap_err();
            let Some(Refusal::Invalid { detail }) = refused.refusal() else {
                panic!("{refused}");
            };
            assert!(detail.contains(word), "{detail}");
        }
        agent.settled(id, 1, is_running).await?;
        Ok(())
    })
}
