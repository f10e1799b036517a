//! The agent with real machines: the probe, on KVM, in its jail. Passes with a note where there is none.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "../../vmm/loader/tests/image/mod.rs"]
mod image;

use std::io::Write;
use std::path::Path;

use common::*;
use fractus_agent::host::huge_pages::SHMEM_ENABLED;
use fractus_agent_api::guest::InstanceData;
use fractus_agent_api::machine::{ImageRef, MachineReport, Observed, Power, ServerId, StopReason};
use futures::SinkExt;
use image::distributions::debian;
use tokio_tungstenite::tungstenite::Message;

async fn with_probes() -> Result<Option<(Cloud, Agent, ImageRef)>> {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(None);
    };
    Ok(Some(start(&probe, false).await?))
}

#[test]
fn a_guest_lives_through_the_death_of_its_agent() -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let id = running(&agent, &kernel).await?;
        let before = boots(&agent, id, 1).await?;
        agent.console_says(id, "tick 1 ").await?;
        agent.restart().await?;
        agent.settled(id, 1, is_running).await?;
        let mut console = agent.client.console(id).await?;
        console.send(Message::binary("echo still here\n")).await?;
        let log = agent.console_says(id, "ok echo still here").await?;
        assert_eq!(nonces(&log), before);
        Ok(())
    })
}

#[test]
fn pause_reboot_rebuild_and_power_off_reach_the_guest() -> Result {
    block_on(async {
        let Some((_cloud, agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let id = new_id();
        let mut wanted = wanted(&kernel, Power::Running);
        agent.put(id, &put(1, wanted.clone())).await?;
        agent.settled(id, 1, is_running).await?;
        boots(&agent, id, 1).await?;

        wanted.power = Power::Paused;
        agent.put(id, &put(2, wanted.clone())).await?;
        agent
            .settled(id, 2, |report| report.observed == Observed::Paused)
            .await?;
        wanted.power = Power::Running;
        agent.put(id, &put(3, wanted.clone())).await?;
        agent.settled(id, 3, is_running).await?;
        assert_eq!(boots(&agent, id, 1).await?.len(), 1, "a pause is no reboot");

        wanted.hard_reboots = 1;
        agent.put(id, &put(4, wanted.clone())).await?;
        agent.settled(id, 4, is_running).await?;
        let two = boots(&agent, id, 2).await?;
        assert_ne!(two[0], two[1]);

        wanted.rebuilds = 1;
        agent.put(id, &put(5, wanted.clone())).await?;
        agent.settled(id, 5, is_running).await?;
        boots(&agent, id, 3).await?;

        // The guest resets itself: the same process, a new boot.
        let process = agent.processes(id);
        ticks(&agent, id).await?;
        let mut console = agent.client.console(id).await?;
        console.send(Message::binary("reboot\n")).await?;
        boots(&agent, id, 4).await?;
        assert_eq!(agent.processes(id), process);

        ticks(&agent, id).await?;
        console.send(Message::binary("poweroff\n")).await?;
        let off = Observed::Stopped {
            reason: StopReason::GuestPowerOff,
        };
        agent
            .settled(id, 5, |report| report.observed == off)
            .await?;

        wanted.power = Power::Absent;
        agent.put(id, &put(6, wanted)).await?;
        agent.settled(id, 6, is_absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        Ok(())
    })
}

/// The switch is a file of the test's own, mounted over the host's, which every agent of a test leaves alone.
#[test]
fn huge_pages_are_let_be_asked_for_unless_the_agent_is_told_to_leave_its_host_alone() -> Result {
    const WORDS: &str = "always within_size advise [never] deny force\n";
    block_on(async {
        if probe().is_none() || !Path::new(SHMEM_ENABLED).exists() {
            println!("no /dev/kvm, or a kernel without huge pages: nothing was tested");
            return Ok(());
        }
        let cloud = Cloud::start().await;
        for (leave, wanted) in [("true", WORDS), ("false", "advise")] {
            let mut file = tempfile::NamedTempFile::new()?;
            file.write_all(WORDS.as_bytes())?;
            let mount = format!("mount --bind {} {SHMEM_ENABLED}", file.path().display());
            let run = format!("{mount} && exec \"$0\" \"$@\"");
            let prelude = format!(
                "export FRACTUS_LEAVE_HOST_SETTINGS={leave}; \
                 exec unshare --mount sh -c '{run}' \"$0\" \"$@\";"
            );
            let agent = Agent::start_after(&prelude, &cloud, false).await?;
            let found = std::fs::read_to_string(file.path())?;
            assert_eq!(found, wanted, "{leave}: {}", agent.log());
        }
        Ok(())
    })
}

/// What a server's guest would be told.
fn instance(name: &str) -> InstanceData {
    InstanceData {
        meta_data: [("name".to_owned(), name.into())].into(),
        user_data: Some("IyEvYmluL3No".to_owned()),
        vendor_data: serde_json::json!({}),
        vendor_data2: serde_json::json!({}),
        network_data: serde_json::json!({}),
        ec2: serde_json::json!({}),
        files: Vec::new(),
        admin_pass: None,
    }
}

#[test]
fn a_config_drive_is_read_only_private_made_anew_and_goes_with_its_machine() -> Result {
    use std::os::unix::fs::PermissionsExt;
    block_on(async {
        let Some((_cloud, agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let id = new_id();
        let mut wanted = wanted(&kernel, Power::Running);
        wanted.spec.guest.instance = Some(Box::new(instance("first")));
        agent.put(id, &put(1, wanted.clone())).await?;
        agent.settled(id, 1, is_running).await?;
        ask(&agent, id, "disk-info 1", "ok disk-info bytes=").await?;
        let log = agent.console_says(id, "serial=config-2").await?;
        assert!(log.contains(" ro=1 serial=config-2"), "{log}");
        let drive = agent.machine_folder(id).join("config.iso");
        let first = std::fs::read(&drive)?;
        assert_eq!(
            std::fs::metadata(&drive)?.permissions().mode() & 0o777,
            0o600
        );
        let record = agent.machine_folder(id).join("record.json");
        assert_eq!(
            std::fs::metadata(&record)?.permissions().mode() & 0o777,
            0o600
        );
        let has = |iso: &[u8], text: &str| iso.windows(text.len()).any(|at| at == text.as_bytes());
        assert!(has(&first, r#"{"name":"first","random_seed":""#));

        wanted.spec.guest.instance = Some(Box::new(instance("second")));
        wanted.hard_reboots = 1;
        agent.put(id, &put(2, wanted.clone())).await?;
        agent.settled(id, 2, is_running).await?;
        let second = std::fs::read(&drive)?;
        assert!(has(&second, r#"{"name":"second","random_seed":""#) && !has(&second, "first"));

        wanted.power = Power::Absent;
        agent.put(id, &put(3, wanted)).await?;
        agent.settled(id, 3, is_absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        Ok(())
    })
}

/// Types a command until its answer comes: a guest that boots does not listen yet.
async fn ask(agent: &Agent, id: ServerId, command: &str, answer: &str) -> Result {
    ticks(agent, id).await?;
    let mut console = agent.client.console(id).await?;
    console
        .send(Message::binary(format!("{command}\n").into_bytes()))
        .await?;
    agent.console_says(id, answer).await?;
    Ok(())
}

#[test]
fn a_stop_asks_first_waits_as_long_as_the_image_says_and_then_pulls() -> Result {
    block_on(async {
        let Some((_cloud, agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let id = new_id();
        let stopped = |report: &MachineReport| matches!(&report.observed, Observed::Stopped { reason } if *reason == StopReason::Requested);
        let mut wanted = wanted(&kernel, Power::Running);
        // Longer than this test may take: only a guest that heeds its button ends in time.
        wanted.spec.guest.shutdown_timeout_s = Some(3600);
        agent.put(id, &put(1, wanted.clone())).await?;
        agent.settled(id, 1, is_running).await?;
        ticks(&agent, id).await?;
        wanted.power = Power::Stopped;
        agent.put(id, &put(2, wanted.clone())).await?;
        agent.settled(id, 2, stopped).await?;
        assert!(agent.console_says(id, "button").await?.contains("button"));

        // One that does not heed it is still asked, and then pulled.
        wanted.power = Power::Running;
        wanted.spec.guest.shutdown_timeout_s = Some(1);
        agent.put(id, &put(3, wanted.clone())).await?;
        agent.settled(id, 3, is_running).await?;
        boots(&agent, id, 2).await?;
        ask(&agent, id, "ignore-button", "ok ignore-button").await?;
        wanted.power = Power::Stopped;
        agent.put(id, &put(4, wanted.clone())).await?;
        agent.settled(id, 4, stopped).await?;
        let log = agent.console_says(id, "ok ignore-button").await?;
        let after = log.rsplit("ok ignore-button").next().unwrap_or_default();
        assert!(after.contains("button"), "{log}");
        assert_eq!(agent.processes(id), Vec::<i32>::new());
        Ok(())
    })
}

#[test]
fn a_panic_is_reported_until_the_guest_resets_itself() -> Result {
    block_on(async {
        let Some((_cloud, mut agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let id = running(&agent, &kernel).await?;
        ask(&agent, id, "panic", "ok panic").await?;
        agent
            .settled(id, 1, |report| is_running(report) && report.guest.panicked)
            .await?;
        // It is not the agent alone that knows.
        agent.restart().await?;
        agent
            .settled(id, 1, |report| is_running(report) && report.guest.panicked)
            .await?;
        let mut console = agent.client.console(id).await?;
        console.send(Message::binary("reboot\n")).await?;
        boots(&agent, id, 2).await?;
        agent
            .settled(id, 1, |report| is_running(report) && !report.guest.panicked)
            .await?;
        Ok(())
    })
}

/// Nobody could find it again: it has no record and listens nowhere.
#[test]
fn a_machine_started_by_hand_ends_with_the_process_that_started_it() -> Result {
    use std::io::Read;
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let (kernel, config) = (folder.path().join("probe"), folder.path().join("config"));
    std::fs::write(&kernel, probe)?;
    let machine = serde_json::json!({
        "machine": {
            "uuid": uuid::Uuid::new_v4(),
            "cpus": {"count": 1},
            "memory": {"bytes": 64 << 20},
            "command_line": "tick_ms=100",
        },
        "kernel": kernel,
    });
    std::fs::write(&config, machine.to_string())?;
    let mut starter = std::process::Command::new(env!("CARGO_BIN_EXE_fractus-agent"))
        .args(["vm", "--config"])
        .arg(&config)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut output = starter.stdout.take().unwrap();
    let mut said = [0; 1];
    output.read_exact(&mut said)?;
    starter.kill()?;
    starter.wait()?;
    // The machine holds the other end: were it to live on, this would not return.
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || ended.send(output.read_to_end(&mut Vec::new())));
    end.recv_timeout(PATIENCE)??;
    Ok(())
}

#[test]
fn a_triple_fault_is_reported_as_one_and_a_bad_kernel_as_a_failure() -> Result {
    block_on(async {
        let Some((cloud, agent, kernel)) = with_probes().await? else {
            return Ok(());
        };
        let id = running(&agent, &kernel).await?;
        boots(&agent, id, 1).await?;
        let mut console = agent.client.console(id).await?;
        console.send(Message::binary("triple-fault\n")).await?;
        let fault = |report: &MachineReport| {
            matches!(
                report.observed,
                Observed::Stopped {
                    reason: StopReason::TripleFault { .. } | StopReason::InternalError { .. }
                }
            )
        };
        agent.settled(id, 1, fault).await?;

        let nonsense = image_of(b"no kernel at all");
        cloud.add_image(&nonsense, b"no kernel at all");
        let other = new_id();
        agent
            .put(other, &put(1, wanted(&nonsense, Power::Running)))
            .await?;
        let failed = |report: &MachineReport| matches!(report.observed, Observed::Failed { .. });
        agent.settled(other, 1, failed).await?;
        assert_eq!(agent.processes(other), Vec::<i32>::new());
        Ok(())
    })
}

/// A machine without a kernel of its own, on a disk of this image.
fn from_disk(image: &ImageRef) -> fractus_agent_api::machine::Wanted {
    let mut wanted = wanted(image, Power::Running);
    wanted.spec.boot.kernel = None;
    if let Some(disk) = &mut wanted.spec.root_disk {
        disk.image = Some(image.clone());
    }
    wanted
}

#[test]
fn a_disk_boots_in_the_jail_and_one_that_cannot_says_so_on_its_console() -> Result {
    block_on(async {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(());
        };
        let content = debian(&probe, b"initrd");
        let (cloud, agent, image) = start(&content, false).await?;
        let id = new_id();
        agent.put(id, &put(1, from_disk(&image))).await?;
        agent.settled(id, 1, is_running).await?;
        boots(&agent, id, 1).await?;
        ticks(&agent, id).await?;
        // The jailed process reads the disk again, by itself.
        let mut console = agent.client.console(id).await?;
        console.send(Message::binary("reboot\n")).await?;
        boots(&agent, id, 2).await?;
        ticks(&agent, id).await?;
        // The guest wipes its disk; there is nothing to be found then.
        let size = content.len() - (content.len() % 512);
        let wipe = format!("disk-zero 0 0 {size}\n");
        console.send(Message::binary(wipe)).await?;
        agent.console_says(id, "ok disk-zero").await?;
        console.send(Message::binary("reboot\n")).await?;
        let stopped = |report: &MachineReport| {
            matches!(
                &report.observed,
                Observed::Stopped { reason: StopReason::NotBootable { detail } }
                    if detail.contains("no partition table")
            )
        };
        agent.settled(id, 1, stopped).await?;
        agent
            .console_says(id, "fractus: nothing to boot was found")
            .await?;

        let nonsense = image_of(&[7; 8192]);
        cloud.add_image(&nonsense, &[7; 8192]);
        let other = new_id();
        agent.put(other, &put(1, from_disk(&nonsense))).await?;
        let failed = |report: &MachineReport| {
            matches!(&report.observed, Observed::Failed { reason }
                if reason.contains("no partition table"))
        };
        agent.settled(other, 1, failed).await?;
        agent
            .console_says(other, "fractus: nothing to boot was found")
            .await?;
        let by = std::time::Instant::now() + PATIENCE;
        while !agent.processes(other).is_empty() {
            anyhow::ensure!(std::time::Instant::now() < by, "its process lives on");
            // sleeps because a process's end is seen by looking; a deadline ends it.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        // And the agent lives.
        agent.client.get(id).await?;
        Ok(())
    })
}
