//! After a reboot of its host a machine waits to hear that it is wanted there still.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::process::Command;

use common::*;
use fractus_agent_api::machine::{MachineReport, Observed, Power, PutMachine, ServerId};
use uuid::Uuid;

fn waits(report: &MachineReport) -> bool {
    report.waits && !report.settled && matches!(report.observed, Observed::Starting { .. })
}

/// What a controller says that knows of this boot.
fn said_in(boot: Uuid, revision: u64, wanted: fractus_agent_api::machine::Wanted) -> PutMachine {
    PutMachine {
        boot_id: Some(boot),
        ..put(revision, wanted)
    }
}

/// Stays so: it is looked at by who was told of every change.
async fn keeps_waiting(agent: &Agent, id: ServerId) -> Result {
    let report = agent.until(id, waits).await?;
    assert!(agent.processes(id).is_empty());
    assert_eq!(report.starts, 1);
    Ok(())
}

#[test]
fn a_guest_is_started_after_a_reboot_once_a_controller_has_said_that_it_is_to() -> Result {
    block_on(async {
        let (cloud, mut agent, kernel) = with_stand_ins().await?;
        let (id, off) = (running(&agent, &kernel).await?, new_id());
        agent
            .put(off, &put(1, wanted(&kernel, Power::Stopped)))
            .await?;
        agent.settled(off, 1, |_| true).await?;
        agent.reboot().await?;
        agent
            .until(off, |report| report.settled && !report.waits)
            .await?;
        keeps_waiting(&agent, id).await?;
        // The controller hears that, in a report of the agent's own.
        let by = std::time::Instant::now() + PATIENCE;
        let told = |heard: &mut controller::Heard| {
            heard.reports.get(&id).is_some_and(|report| report.waits)
        };
        while !cloud.heard(told) {
            assert!(std::time::Instant::now() < by, "the controller is not told");
            // sleeps because what a controller hears is looked at as often as it takes.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        // An agent's restart is no word, nor is what was meant for another boot.
        agent.restart().await?;
        keeps_waiting(&agent, id).await?;
        let running = wanted(&kernel, Power::Running);
        for (revision, boot) in [(1, Uuid::from_u128(77)), (2, Uuid::nil())] {
            agent
                .put(id, &said_in(boot, revision, running.clone()))
                .await?;
            keeps_waiting(&agent, id).await?;
        }
        let boot = agent.boot_id();
        assert_eq!(agent.client.host().await?.boot_id, boot);
        agent.put(id, &said_in(boot, 2, running.clone())).await?;
        let report = agent.settled(id, 2, is_running).await?;
        assert_eq!((report.starts, report.waits), (2, false));
        // Heard once in a boot is enough: a machine whose process is killed with its agent is told apart from one
        // that never ran here.
        agent.restart().await?;
        agent.settled(id, 2, is_running).await?;
        agent.reboot().await?;
        agent.until(id, waits).await?;
        // Said twice it is started once.
        for _ in 0..2 {
            let said = said_in(agent.boot_id(), 2, running.clone());
            agent.put(id, &said).await?;
        }
        let report = agent.settled(id, 2, is_running).await?;
        assert_eq!((report.starts, agent.processes(id).len()), (3, 1));
        Ok(())
    })
}

#[test]
fn an_operator_has_guests_started_where_no_controller_will() -> Result {
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let (one, two) = (
            running(&agent, &kernel).await?,
            running(&agent, &kernel).await?,
        );
        agent.reboot().await?;
        for id in [one, two] {
            keeps_waiting(&agent, id).await?;
        }
        let state = agent.folder.path().join("state");
        let boot = agent.folder.path().join("boot");
        let say = |arguments: &[&str]| {
            let mount = format!(
                "mount --bind {} /proc/sys/kernel/random/boot_id",
                boot.display()
            );
            let output = Command::new("unshare")
                .args(["--mount", "sh", "-c"])
                .arg(format!("{mount} && exec \"$0\" start-unheard \"$@\""))
                .arg(env!("CARGO_BIN_EXE_fractus-agent"))
                .arg("--state-dir")
                .arg(&state)
                .args(arguments)
                .output()
                .unwrap();
            let said = String::from_utf8(output.stdout).unwrap();
            (output.status.success(), said)
        };
        let (_, listed) = say(&[]);
        assert!(
            [one, two].iter().all(|id| listed.contains(&id.to_string())),
            "{listed}"
        );
        keeps_waiting(&agent, one).await?;
        let other = new_id().to_string();
        assert!(!say(&[&other]).0, "it has no such machine");
        let (done, said) = say(&[&one.to_string()]);
        assert!(done && said.starts_with("1 servers"), "{said}");
        agent.settled(one, 1, is_running).await?;
        keeps_waiting(&agent, two).await?;
        let (done, _) = say(&["--all"]);
        assert!(done);
        agent.settled(two, 1, is_running).await?;
        let (_, listed) = say(&[]);
        assert_eq!(listed, "");
        Ok(())
    })
}
