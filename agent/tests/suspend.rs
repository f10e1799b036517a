//! Guests whose memory is kept on the host while no process runs them, and that go on from it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use common::machine::{Machine, disk, disks, states};
use common::*;
use fractus_agent_api::device::{DeviceId, DeviceState};
use fractus_agent_api::machine::{ImageRef, MachineReport, Observed, Power, ServerId};
use rstest::rstest;
use uuid::Uuid;

async fn with_probes() -> Result<Option<(Cloud, Agent, ImageRef)>> {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(None);
    };
    Ok(Some(start(&probe, false).await?))
}

fn memory(agent: &Agent, id: ServerId) -> PathBuf {
    agent.machine_folder(id).join("memory")
}

/// Guests are kept so from here on.
async fn compress(agent: &mut Agent, compression: &str) -> Result {
    agent.options = vec!["--suspend-compression".to_owned(), compression.to_owned()];
    agent.restart().await
}

fn is_suspended(report: &MachineReport) -> bool {
    report.observed == Observed::Suspended
}

fn failure(report: &MachineReport) -> &str {
    match &report.observed {
        Observed::Failed { reason } => reason,
        other => panic!("{other:?}"),
    }
}

/// The probe's own number, drawn when it booted.
async fn nonce(machine: &Machine<'_>) -> Result<String> {
    let info = machine.asks("info").await?;
    let mut words = info.split(' ');
    let nonce = words.find_map(|word| word.strip_prefix("nonce="));
    Ok(nonce.unwrap().to_owned())
}

#[rstest]
fn a_suspended_guest_costs_no_process_and_goes_on_with_all_that_it_had(
    #[values("none", "zstd")] compression: &str,
) -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        if compression != "none" {
            compress(&mut agent, compression).await?;
        }
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        for count in [1, 2] {
            machine.changed(|it| it.spec.disks = disks(count)).await?;
            machine.slot("up").await?;
        }
        machine.asks("touch 20").await?;
        machine.asks("fill 8 7").await?;
        machine.asks("disk-write 1 0 65536 3").await?;
        machine.asks("disk-write 2 0 65536 5").await?;
        let booted = nonce(&machine).await?;

        let report = machine.changed(|it| it.power = Power::Suspended).await?;
        assert!(is_suspended(&report), "{report:?}");
        assert_eq!(agent.processes(machine.id), Vec::<i32>::new());
        let file = memory(&agent, machine.id).metadata()?;
        assert_eq!(file.mode() & 0o777, 0o600);
        // Twenty that it touched, and what it is itself.
        let bytes = file.blocks() * 512;
        let expected = match compression {
            "none" => 20 << 20..64 << 20,
            _ => 10 << 10..4 << 20,
        };
        assert!(expected.contains(&bytes), "{bytes}");

        // An agent that comes later knows; and what is wanted of its disks waits for the guest.
        let (id, revision, wanted) = (machine.id, machine.revision, machine.wanted);
        agent.restart().await?;
        let agent = &agent;
        let mut machine = Machine {
            agent,
            id,
            wanted,
            revision,
        };
        let report = machine.changed(|it| drop(it.spec.disks.pop())).await?;
        assert!(is_suspended(&report), "{report:?}");
        assert!(machine.file(DeviceId(Uuid::from_u128(2))).exists());

        let report = machine.changed(|it| it.power = Power::Running).await?;
        assert!(is_running(&report), "{report:?}");
        assert_eq!(report.starts, 2);
        assert!(!memory(agent, id).exists());
        assert_eq!(nonce(&machine).await?, booted);
        machine.asks("filled 8 7").await?;
        machine.asks("disk-check 1 0 65536 3").await?;
        machine.asks("disk-check 2 0 65536 5").await?;
        machine
            .until(&[DeviceState::Attached, DeviceState::Detaching])
            .await?;
        let slot = machine.slot("down").await?;
        machine.asks(&format!("eject {slot}")).await?;
        machine.until(&[DeviceState::Attached]).await?;

        // Again, and this time it is rebooted instead: it boots, and what was kept is gone.
        machine.changed(|it| it.power = Power::Suspended).await?;
        let reboot = |it: &mut fractus_agent_api::machine::Wanted| {
            it.power = Power::Running;
            it.hard_reboots += 1;
        };
        machine.changed(reboot).await?;
        assert!(!memory(agent, id).exists());
        agent.console_says(id, "tick 1 ").await?;
        assert_ne!(nonce(&machine).await?, booted);
        machine.asks("disk-check 1 0 65536 3").await?;

        // And one that is removed leaves nothing.
        machine.changed(|it| it.power = Power::Suspended).await?;
        machine.changed(|it| it.power = Power::Absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        Ok(())
    })
}

/// The option holds from the next start of the agent on, for guests that run already, too; what was kept before is read.
#[test]
fn guests_go_on_from_either_form_whatever_the_agent_writes_by_now() -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks("fill 16 7").await?;
        let booted = nonce(&machine).await?;
        let (id, mut revision, mut wanted) = (machine.id, machine.revision, machine.wanted);
        for (kept, later) in [("none", "zstd"), ("zstd", "none")] {
            compress(&mut agent, kept).await?;
            let mut machine = Machine {
                agent: &agent,
                id,
                wanted,
                revision,
            };
            let report = machine.changed(|it| it.power = Power::Suspended).await?;
            assert!(is_suspended(&report), "{report:?}");
            (revision, wanted) = (machine.revision, machine.wanted);
            let mut form = [0; 4];
            std::fs::File::open(memory(&agent, id))?.read_exact_at(&mut form, 8)?;
            let expected: u32 = if kept == "none" { 1 } else { 2 };
            assert_eq!(u32::from_le_bytes(form), expected);
            compress(&mut agent, later).await?;
            let mut machine = Machine {
                agent: &agent,
                id,
                wanted,
                revision,
            };
            let report = machine.changed(|it| it.power = Power::Running).await?;
            assert!(is_running(&report), "{report:?}");
            machine.asks("filled 16 7").await?;
            assert_eq!(nonce(&machine).await?, booted);
            (revision, wanted) = (machine.revision, machine.wanted);
        }
        Ok(())
    })
}

/// By its record, the guest has not run; and the file is damaged.
#[rstest]
fn memory_that_is_damaged_is_refused_and_kept_until_the_server_is_rebooted(
    #[values("none", "zstd")] compression: &str,
) -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        compress(&mut agent, compression).await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.changed(|it| it.power = Power::Suspended).await?;
        let path = memory(&agent, machine.id);
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)?;
        // A page of the guest's: the first that is there; or a block.
        let at = match compression {
            "none" => rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(2 << 20))?,
            _ => 4096,
        };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at + 100)?;
        file.write_all_at(&[!byte[0]], at + 100)?;
        let report = machine.changed(|it| it.power = Power::Running).await?;
        let reason = failure(&report);
        assert!(reason.contains("it was damaged"), "{reason}");
        agent.ended(machine.id).await?;

        // Mended, it goes on.
        file.write_all_at(&byte, at + 100)?;
        let report = machine.changed(|_| ()).await?;
        assert!(is_running(&report), "{report:?}");
        machine.asks("echo here").await?;
        assert!(!path.exists());
        Ok(())
    })
}

/// An agent whose folder has no more room than that; none without KVM.
async fn on_a_small_disk(size: &str) -> Result<Option<(Cloud, Agent, ImageRef)>> {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(None);
    };
    let cloud = Cloud::start().await;
    let kernel = image_of(&probe);
    cloud.add_image(&kernel, &probe);
    let agent = Agent::start_on_a_small_disk_with(size, &cloud, false).await?;
    Ok(Some((cloud, agent, kernel)))
}

#[test]
fn a_guest_that_cannot_be_kept_for_want_of_room_runs_on() -> Result {
    block_on(async {
        let Some((_cloud, agent, kernel)) = on_a_small_disk("24m").await? else {
            return Ok(());
        };
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks("touch 40").await?;
        let booted = nonce(&machine).await?;
        let processes = agent.processes(machine.id);
        let report = machine.changed(|it| it.power = Power::Suspended).await?;
        assert!(failure(&report).contains("not suspended"), "{report:?}");
        for left in ["memory", "memory.new"] {
            assert!(!agent.machine_folder(machine.id).join(left).exists());
        }
        // It is what it was, and is asked for nothing more.
        let report = machine.changed(|it| it.power = Power::Running).await?;
        assert!(is_running(&report), "{report:?}");
        assert_eq!(nonce(&machine).await?, booted);
        assert_eq!(agent.processes(machine.id), processes);
        Ok(())
    })
}

/// Who compresses allocates and frees much in its thread, at which the allocator must not think of anything that a process
/// that is locked down may not do.
#[test]
fn a_large_guest_that_there_was_no_room_for_is_compressed_the_next_time() -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = on_a_small_disk("64m").await? else {
            return Ok(());
        };
        compress(&mut agent, "zstd").await?;
        let mut machine =
            Machine::start_with(&agent, &kernel, |spec| spec.memory_mib = 640).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        machine.asks("fill 500 7").await?;
        let booted = nonce(&machine).await?;
        machine.changed(|it| it.power = Power::Suspended).await?;
        let report = machine.changed(|it| it.power = Power::Running).await?;
        assert!(is_running(&report), "{report:?}");

        let filler = agent.machine_folder(machine.id).join("filler");
        let room = rustix::fs::statvfs(filler.parent().unwrap())?;
        let file = std::fs::File::create(&filler)?;
        let most = (room.f_bavail * room.f_frsize).saturating_sub(1 << 20);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, most)?;
        let report = machine.changed(|it| it.power = Power::Suspended).await?;
        assert!(failure(&report).contains("not suspended"), "{report:?}");
        let report = machine.changed(|it| it.power = Power::Running).await?;
        assert!(is_running(&report), "{report:?}");
        drop(file);
        std::fs::remove_file(&filler)?;

        for _ in 0..2 {
            let report = machine.changed(|it| it.power = Power::Suspended).await?;
            assert!(is_suspended(&report), "{report:?}");
            let report = machine.changed(|it| it.power = Power::Running).await?;
            assert!(is_running(&report), "{report:?}");
            machine.asks("filled 500 7").await?;
        }
        assert_eq!(nonce(&machine).await?, booted);
        Ok(())
    })
}

/// Without KVM, too: all that surrounds the memory.
#[test]
fn what_a_suspended_machine_had_must_be_there_when_it_goes_on() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        let log = agent.console_says(machine.id, "stand-in boot ").await?;
        let line = log
            .lines()
            .find_map(|line| line.strip_prefix("stand-in boot "));
        let booted = line.unwrap().trim().to_owned();
        machine.changed(|it| it.spec.disks = disks(1)).await?;
        machine.changed(|it| it.power = Power::Suspended).await?;
        let content = machine.file(DeviceId(Uuid::from_u128(1)));
        let aside = content.with_extension("aside");
        std::fs::rename(&content, &aside)?;
        let report = machine.changed(|it| it.power = Power::Running).await?;
        assert!(failure(&report).contains("is gone"), "{report:?}");
        assert!(!content.exists(), "no empty one in its place");
        std::fs::rename(&aside, &content)?;
        let report = machine
            .changed(|it| it.spec.disks.push(disk(DeviceId(Uuid::from_u128(9)))))
            .await?;
        assert_eq!(states(&report), [const { DeviceState::Attached }; 2]);
        let goes_on = format!("stand-in goes on {booted}");
        agent.console_says(machine.id, &goes_on).await?;
        Ok(())
    })
}
