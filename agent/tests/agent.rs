//! The whole agent, as a program, with stand-ins for guests: intents in, processes and reports out.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::Instant;

use anyhow::Context;
use common::*;
use fractus_agent_api::client::CallError;
use fractus_agent_api::client::agent::AgentClient;
use fractus_agent_api::guest::{InstanceData, Watchdog};
use fractus_agent_api::host::HostId;
use fractus_agent_api::identity::Peer;
use fractus_agent_api::machine::{MachineReport, Observed, Power, Refusal, ServerId, StopReason};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

#[test]
fn a_machine_is_made_reported_and_removed_without_a_trace() -> Result {
    block_on(async {
        let (cloud, agent, kernel) = with_stand_ins().await?;
        let id = new_id();
        let first = agent
            .put(id, &put(1, wanted(&kernel, Power::Running)))
            .await?;
        assert!(!first.settled);
        let report = agent.settled(id, 1, is_running).await?;
        assert_eq!(report.starts, 1);
        assert_eq!(agent.processes(id).len(), 1);
        agent.console_says(id, "stand-in boot").await?;
        let by = Instant::now() + PATIENCE;
        while cloud.heard(|heard| heard.reports.get(&id).cloned()) != Some(report.clone()) {
            anyhow::ensure!(Instant::now() < by, "the controller was not told");
            // sleeps because the controller's double is looked at, and does not call.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let absent = put(2, wanted(&kernel, Power::Absent));
        agent.put(id, &absent).await?;
        agent.settled(id, 2, is_absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        // The tombstone keeps a late message from bringing it back.
        let late = agent
            .client
            .put(id, &put(1, wanted(&kernel, Power::Running)))
            .await;
        assert!(matches!(
            late.unwrap_err().refusal(),
            Some(Refusal::Stale { .. })
        ));
        Ok(())
    })
}

#[test]
fn nothing_of_what_a_guest_was_told_outlives_its_machine() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let told = |power| {
            let mut wanted = wanted(&kernel, power);
            wanted.spec.guest.instance = Some(Box::new(InstanceData {
                meta_data: [("name".to_owned(), "confided-name".into())].into(),
                user_data: Some("Y29uZmlkZWQ=".to_owned()),
                vendor_data: Default::default(),
                vendor_data2: Default::default(),
                network_data: Default::default(),
                ec2: Default::default(),
                files: Vec::new(),
                admin_pass: Some("confided-password".to_owned()),
            }));
            wanted
        };
        let words = ["confided", "Y29uZmlkZWQ="];
        let kept = |id: ServerId| -> Result<usize> {
            let mut kept = 0;
            for entry in std::fs::read_dir(agent.machine_folder(id))? {
                let bytes = std::fs::read(entry?.path())?;
                let text = String::from_utf8_lossy(&bytes);
                kept += usize::from(words.iter().any(|word| text.contains(word)));
            }
            Ok(kept)
        };
        let id = new_id();
        agent.put(id, &put(1, told(Power::Running))).await?;
        agent.settled(id, 1, is_running).await?;
        assert_eq!(kept(id)?, 2, "record and config drive");
        agent.put(id, &put(2, told(Power::Absent))).await?;
        agent.settled(id, 2, is_absent).await?;
        assert_eq!(kept(id)?, 0);
        // Nor is it taken when it is said of one that is gone, or never was.
        agent.put(id, &put(3, told(Power::Absent))).await?;
        assert_eq!(kept(id)?, 0);
        let never = new_id();
        agent.put(never, &put(1, told(Power::Absent))).await?;
        assert_eq!(kept(never)?, 0);
        Ok(())
    })
}

#[test]
fn a_killed_agent_finds_its_machines_again_and_they_never_notice() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        let before = (agent.processes(id), agent.console_says(id, "boot").await?);
        agent.restart().await?;
        let report = agent.settled(id, 1, is_running).await?;
        assert_eq!(report.starts, 1);
        assert_eq!(
            (agent.processes(id), agent.console_says(id, "boot").await?),
            before
        );
        // And it obeys the new agent.
        agent
            .put(id, &put(2, wanted(&kernel, Power::Paused)))
            .await?;
        agent
            .settled(id, 2, |report| report.observed == Observed::Paused)
            .await?;
        agent.restart().await?;
        agent
            .settled(id, 2, |report| report.observed == Observed::Paused)
            .await?;
        agent
            .put(id, &put(3, wanted(&kernel, Power::Running)))
            .await?;
        agent.settled(id, 3, is_running).await?;
        assert_eq!(agent.processes(id), before.0);
        Ok(())
    })
}

#[test]
fn a_guest_that_powers_off_while_the_agent_is_away_is_reported_with_its_reason() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        let mut console = agent.client.console(id).await?;
        agent.kill();
        // The agent's death has closed the console; the machine's own socket is still there.
        while let Some(Ok(_)) = console.next().await {}
        type_in(&agent, id, b"off\n");
        let by = Instant::now() + PATIENCE;
        while !agent.processes(id).is_empty() {
            anyhow::ensure!(Instant::now() < by, "it did not go");
            // sleeps because processes of others end without telling us; a deadline ends it.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        agent.run().await?;
        let off = Observed::Stopped {
            reason: StopReason::GuestPowerOff,
        };
        let report = agent
            .settled(id, 1, |report| report.observed == off)
            .await?;
        assert_eq!(report.starts, 1);
        // A newer intent starts it again.
        agent
            .put(id, &put(2, wanted(&kernel, Power::Running)))
            .await?;
        assert_eq!(agent.settled(id, 2, is_running).await?.starts, 2);
        Ok(())
    })
}

#[test]
fn what_a_guest_does_while_the_agent_is_away_is_known_to_the_next_one() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let id = new_id();
        let mut wanted = wanted(&kernel, Power::Running);
        wanted.spec.guest.watchdog = Some(Watchdog::Pause);
        agent.put(id, &put(1, wanted.clone())).await?;
        agent.settled(id, 1, is_running).await?;
        agent.kill();
        type_in(&agent, id, b"oops\nbite\n");
        let by = Instant::now() + PATIENCE;
        while !agent.vm_log(id).contains("Paused") {
            anyhow::ensure!(Instant::now() < by, "{}", agent.vm_log(id));
            // sleeps because a file is read as often as it takes; a deadline ends it.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        agent.run().await?;
        let paused = |report: &MachineReport| report.observed == Observed::Paused;
        let report = agent.settled(id, 1, paused).await?;
        assert_eq!(
            (report.guest.panicked, report.guest.watchdog_fired),
            (true, 1)
        );
        agent.put(id, &put(2, wanted)).await?;
        agent.settled(id, 2, is_running).await?;
        // And it is not called to mind again.
        agent.restart().await?;
        agent.settled(id, 2, is_running).await?;
        Ok(())
    })
}

/// Straight to the machine's process, past the agent.
fn type_in(agent: &Agent, id: ServerId, bytes: &[u8]) {
    use rustix::net::*;
    let path = agent.folder.path().join(format!("run/machines/{id}.sock"));
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    let hello = br#"{"message":"hello","version":1,"role":"console"}"#;
    send(&socket, hello, SendFlags::empty()).unwrap();
    send(&socket, bytes, SendFlags::empty()).unwrap();
}

#[test]
fn a_stop_that_is_taken_back_ends_with_the_guest_running() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        // It hears the button, and takes its time.
        type_in(&agent, id, b"deaf\n");
        agent.console_says(id, "heard deaf").await?;
        agent
            .put(id, &put(2, wanted(&kernel, Power::Stopped)))
            .await?;
        agent.console_says(id, "power button").await?;
        agent
            .put(id, &put(3, wanted(&kernel, Power::Running)))
            .await?;
        type_in(&agent, id, b"off\n");
        let again = |report: &MachineReport| is_running(report) && report.starts == 2;
        agent.settled(id, 3, again).await?;
        Ok(())
    })
}

#[test]
fn a_machine_that_comes_back_from_its_tombstone_runs_as_nobody_else_does() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let (first, second) = (new_id(), new_id());
        let running = wanted(&kernel, Power::Running);
        agent.put(first, &put(1, running.clone())).await?;
        agent.settled(first, 1, is_running).await?;
        let user = user_of(&agent, first);
        agent
            .put(first, &put(2, wanted(&kernel, Power::Absent)))
            .await?;
        agent.settled(first, 2, is_absent).await?;
        // The next one has the user that was given back.
        agent.put(second, &put(1, running.clone())).await?;
        agent.settled(second, 1, is_running).await?;
        assert_eq!(user_of(&agent, second), user);
        agent.put(first, &put(3, running)).await?;
        agent.settled(first, 3, is_running).await?;
        assert_ne!(user_of(&agent, first), user);
        Ok(())
    })
}

/// Whom the machine's process runs as.
fn user_of(agent: &Agent, id: ServerId) -> u32 {
    let pids = agent.processes(id);
    fractus_agent::machine::process::identity::user(pids[0]).unwrap()
}

#[test]
fn a_killed_machine_is_a_fault_and_stays_down_until_it_is_wanted_anew() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        for pid in agent.processes(id) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        }
        let fault = |report: &MachineReport| {
            matches!(
                &report.observed,
                Observed::Stopped { reason: StopReason::VmmFault { detail } }
                    if detail.contains("signal 9")
            )
        };
        agent.settled(id, 1, fault).await?;
        assert_eq!(agent.processes(id), Vec::<i32>::new());
        agent
            .put(id, &put(2, wanted(&kernel, Power::Running)))
            .await?;
        assert_eq!(agent.settled(id, 2, is_running).await?.starts, 2);
        Ok(())
    })
}

#[test]
fn reboots_and_rebuilds_are_carried_out_once_each() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = new_id();
        let mut wanted = wanted(&kernel, Power::Running);
        agent.put(id, &put(1, wanted.clone())).await?;
        agent.settled(id, 1, is_running).await?;

        wanted.soft_reboots = 1;
        agent.put(id, &put(2, wanted.clone())).await?;
        let report = agent.settled(id, 2, is_running).await?;
        assert_eq!((report.soft_reboots, report.starts), (1, 2));
        let log = agent.console_says(id, "power button").await?;
        assert_eq!(log.matches("stand-in boot").count(), 2);

        wanted.hard_reboots = 3;
        agent.put(id, &put(3, wanted.clone())).await?;
        let report = agent.settled(id, 3, is_running).await?;
        assert_eq!((report.hard_reboots, report.starts), (3, 3));

        let disk = agent.machine_folder(id).join("root.raw");
        std::fs::write(&disk, b"old")?;
        wanted.rebuilds = 1;
        agent.put(id, &put(4, wanted.clone())).await?;
        let report = agent.settled(id, 4, is_running).await?;
        assert_eq!((report.rebuilds, report.starts), (1, 4));
        assert_eq!(std::fs::metadata(&disk)?.len(), 1 << 20);

        // A guest that does not hear its button is ended after a while.
        type_in(&agent, id, b"deaf\n");
        agent.console_says(id, "heard deaf").await?;
        wanted.power = Power::Stopped;
        agent.put(id, &put(5, wanted.clone())).await?;
        let stopped = Observed::Stopped {
            reason: StopReason::Requested,
        };
        agent
            .settled(id, 5, |report| report.observed == stopped)
            .await?;
        assert_eq!(agent.processes(id), Vec::<i32>::new());
        Ok(())
    })
}

#[test]
fn several_watchers_share_the_console_and_can_type() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = new_id();
        let none = agent.client.console(id).await.unwrap_err();
        assert_eq!(none.refusal(), Some(&Refusal::Unknown));
        agent
            .put(id, &put(1, wanted(&kernel, Power::Running)))
            .await?;
        agent.settled(id, 1, is_running).await?;
        let mut one = agent.client.console(id).await?;
        let mut two = agent.client.console(id).await?;
        one.send(Message::binary("hello there\n")).await?;
        for console in [&mut one, &mut two] {
            let mut seen = Vec::new();
            while !String::from_utf8_lossy(&seen).contains("heard hello there") {
                let next = tokio::time::timeout(PATIENCE, console.next()).await?;
                if let Some(Message::Binary(bytes)) = next.transpose()? {
                    seen.extend_from_slice(&bytes);
                }
            }
        }
        let log = agent.client.console_log(id, Some(1)).await?;
        assert_eq!(String::from_utf8_lossy(&log), "heard hello there\n");
        Ok(())
    })
}

#[test]
fn a_download_that_is_cut_off_is_resumed_and_a_wrong_image_leaves_nothing() -> Result {
    block_on(async {
        let (cloud, agent, kernel) = start(&[7; 1 << 20], true).await?;
        cloud.cut_next_download_at(300_000);
        running(&agent, &kernel).await?;
        assert_eq!(cloud.heard(|heard| heard.fetches[&kernel.id]), 2);

        let lie = image_of(b"what it says");
        cloud.add_image(&lie, b"what it is!!");
        let other = new_id();
        agent
            .put(other, &put(1, wanted(&lie, Power::Running)))
            .await?;
        let failed = |report: &MachineReport| matches!(&report.observed, Observed::Failed { reason } if reason.contains("BLAKE3"));
        agent.settled(other, 1, failed).await?;
        let cached: Vec<_> = std::fs::read_dir(agent.folder.path().join("state/images"))?
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(cached, [kernel.blake3]);
        Ok(())
    })
}

#[test]
fn only_controllers_may_call_and_bad_bodies_are_answered() -> Result {
    block_on(async {
        let cloud = Cloud::start().await;
        let agent = Agent::start(&cloud, true).await?;
        // Another host of the cloud, with a good certificate.
        let other = cloud.authority().issue(&Peer::Host(HostId(Uuid::new_v4())));
        let endpoint = format!("https://{}", agent.address);
        let client = AgentClient::new(agent.host, &endpoint, &other)?;
        assert_eq!(
            client
                .host()
                .await
                .unwrap_err()
                .status()
                .map(|s| s.as_u16()),
            Some(403)
        );
        // A controller of another cloud.
        let stranger = Cloud::start().await;
        let client = AgentClient::new(agent.host, &endpoint, &stranger.credentials)?;
        assert!(matches!(
            client.host().await,
            Err(CallError::Unreachable { .. })
        ));
        // The right controller, but another host than it means.
        let client = AgentClient::new(HostId(Uuid::new_v4()), &endpoint, &cloud.credentials)?;
        assert!(matches!(
            client.host().await,
            Err(CallError::Unreachable { .. })
        ));

        let kernel = image_of(b"kernel");
        let mut wrong = put(1, wanted(&kernel, Power::Running));
        wrong.wanted.spec.cpu_profile = "z80".into();
        let id = new_id();
        let refused = agent.client.put(id, &wrong).await.unwrap_err();
        assert!(
            matches!(refused.refusal(), Some(Refusal::Invalid { .. })),
            "{refused}"
        );
        wrong = put(1, wanted(&kernel, Power::Running));
        let kernel = wrong.wanted.spec.boot.kernel.as_mut();
        kernel.unwrap().blake3 = "../../../../etc/passwd".into();
        let refused = agent.client.put(id, &wrong).await.unwrap_err();
        assert!(
            matches!(refused.refusal(), Some(Refusal::Invalid { .. })),
            "{refused}"
        );
        assert_eq!(
            agent.client.get(id).await.unwrap_err().refusal(),
            Some(&Refusal::Unknown)
        );
        Ok(())
    })
}

/// The agent died between the record's write and its `Go`, which is seen from the new one as: a process
/// that has not run its guest, does not answer, and then is gone.
#[test]
fn a_start_that_was_cut_off_by_the_agents_death_is_made_again_and_not_called_a_failure() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        let pid = rustix::process::Pid::from_raw(agent.processes(id)[0]).unwrap();
        agent.kill();
        let path = agent.machine_folder(id).join("record.json");
        let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        record["process"]["ran"] = false.into();
        std::fs::write(&path, record.to_string())?;
        rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
        agent.run().await?;
        agent.logs("found its process").await?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        let again = |report: &MachineReport| is_running(report) && report.starts == 2;
        agent.settled(id, 1, again).await?;
        Ok(())
    })
}

/// A user namespace of its own makes a host of it that has none left.
#[test]
fn an_agent_that_cannot_start_machines_says_so_and_lives_and_looks_again() -> Result {
    block_on(async {
        let limit = |count: u32| format!("echo {count} > /proc/sys/user/max_mnt_namespaces");
        let none = format!("{} && exec \"$0\" \"$@\"", limit(0));
        let prelude = format!("exec unshare --user --map-root-user sh -c '{none}' \"$0\" \"$@\";");
        let cloud = Cloud::start().await;
        let agent = Agent::start_after(&prelude, &cloud, true).await?;
        let lacks = async || -> Result<bool> {
            let host = agent.client.host().await?;
            Ok(host.unable.iter().any(|lack| lack.contains("empty root")))
        };
        assert!(lacks().await?, "{}", agent.log());
        let pid = agent.pid().unwrap().to_string();
        let more = std::process::Command::new("nsenter")
            .args(["--user", "--target", &pid, "sh", "-c", &limit(100)])
            .status()?;
        assert!(more.success());
        assert!(!lacks().await?, "{}", agent.log());
        Ok(())
    })
}

/// Each machine and each connection takes some: the agent must not be at its end with a thousand.
#[test]
fn the_agent_takes_as_many_descriptors_as_the_host_lets_it() -> Result {
    block_on(async {
        let (_cloud, agent, _) = with_stand_ins().await?;
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.pid().unwrap()))?;
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max open files"))
            .unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[3], words[4], "{line}");
        assert_ne!(words[3], "1024", "the test's own limit is the host's");
        Ok(())
    })
}

#[test]
fn a_machine_that_its_host_ends_powers_off_and_is_started_again() -> Result {
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        for process in agent.processes(id) {
            let pid = rustix::process::Pid::from_raw(process).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        let again = |report: &MachineReport| is_running(report) && report.starts == 2;
        agent.settled(id, 1, again).await?;
        agent.console_says(id, "power button").await?;
        Ok(())
    })
}

/// What `fractus-agent take-down` says.
fn take_down(agent: &Agent, within: &str) -> Result<String> {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_fractus-agent"))
        .args(["take-down", "--within", within, "--state-dir"])
        .arg(agent.folder.path().join("state"))
        .arg("--runtime-dir")
        .arg(agent.folder.path().join("run"))
        .output()?;
    anyhow::ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn a_host_that_goes_down_takes_its_machines_down_and_has_them_again_afterwards() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let (runs, paused) = (
            running(&agent, &kernel).await?,
            running(&agent, &kernel).await?,
        );
        let pause = put(2, wanted(&kernel, Power::Paused));
        agent.put(paused, &pause).await?;
        let is_paused = |report: &MachineReport| report.observed == Observed::Paused;
        agent.settled(paused, 2, is_paused).await?;
        let refused = take_down(&agent, "60").unwrap_err().to_string();
        assert!(refused.contains("an agent runs"), "{refused}");
        agent.kill();
        let said = take_down(&agent, "60")?;
        assert_eq!(said, "2 machines ended, 0 were killed\n");
        let left = [agent.processes(runs), agent.processes(paused)].concat();
        assert_eq!(left, Vec::<i32>::new());
        let said = take_down(&agent, "60")?;
        assert_eq!(said, "0 machines ended, 0 were killed\n");
        agent.run().await?;
        let again = |report: &MachineReport| is_running(report) && report.starts == 2;
        agent.settled(runs, 1, again).await?;
        let report = agent.settled(paused, 2, is_paused).await?;
        assert_eq!(report.starts, 2);
        Ok(())
    })
}

#[test]
fn a_guest_that_does_not_hear_the_button_does_not_hold_its_host_up() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        type_in(&agent, id, b"deaf\n");
        agent.console_says(id, "heard deaf").await?;
        agent.kill();
        // Long enough for the first signal to be taken: two that are pending are one.
        let said = take_down(&agent, "5")?;
        assert_eq!(said, "1 machines ended, 0 were killed\n");
        agent.run().await?;
        let again = |report: &MachineReport| is_running(report) && report.starts == 2;
        agent.settled(id, 1, again).await?;
        Ok(())
    })
}

#[test]
fn a_process_that_hangs_is_killed_when_its_host_goes_down_and_its_machine_comes_back() -> Result {
    use rustix::process::{Pid, Signal, kill_process};
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let (hangs, ends) = (
            running(&agent, &kernel).await?,
            running(&agent, &kernel).await?,
        );
        agent.kill();
        for pid in agent.processes(hangs) {
            kill_process(Pid::from_raw(pid).context("a pid")?, Signal::STOP)?;
        }
        let said = take_down(&agent, "2")?;
        assert_eq!(said, "1 machines ended, 1 were killed\n");
        let left = [agent.processes(hangs), agent.processes(ends)].concat();
        assert_eq!(left, Vec::<i32>::new());
        // As after a host that went down: a process that was killed otherwise is a fault, and stays down.
        agent.run().await?;
        let again = |report: &MachineReport| is_running(report) && report.starts == 2;
        agent.settled(hangs, 1, again).await?;
        agent.settled(ends, 1, again).await?;
        Ok(())
    })
}
