//! An agent whose disk is full: what cannot be made fails with a reason, nothing of it is left, and the
//! agent and its other machines go on.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};

use common::*;
use fractus_agent_api::client::CallError;
use fractus_agent_api::machine::{MachineReport, Observed, Power, Refusal, RootDisk, ServerId};

fn reason(report: &MachineReport) -> Option<String> {
    match &report.observed {
        Observed::Failed { reason } => Some(reason.clone()),
        _ => None,
    }
}

/// Files of the image cache.
fn cached(agent: &Agent) -> Vec<String> {
    let entries = std::fs::read_dir(agent.folder.path().join("state/images")).unwrap();
    let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    entries.map(|entry| name(entry.unwrap())).collect()
}

/// Takes all room of the agent's disk until dropped.
struct Filler(PathBuf);

impl Filler {
    fn new(state: &Path) -> Self {
        let path = state.join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        for size in [1 << 16, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        Self(path)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

const MIB: usize = 1 << 20;

#[test]
fn an_image_or_a_disk_for_which_there_is_no_room_fails_its_machine_and_leaves_nothing() -> Result {
    block_on(async {
        let cloud = Cloud::start().await;
        let agent = Agent::start_on_a_small_disk("24m", &cloud).await?;
        let image = |byte: u8, size: usize| {
            let bytes = vec![byte; size];
            let image = image_of(&bytes);
            cloud.add_image(&image, &bytes);
            image
        };
        let (kernel, fat) = (image(1, 4096), image(2, 40 * MIB));
        let root = image(3, 15 * MIB);
        let other = running(&agent, &kernel).await?;
        let processes = agent.processes(other);

        // A kernel that the cache has no room for.
        let without_kernel = new_id();
        let wants = put(1, wanted(&fat, Power::Running));
        agent.put(without_kernel, &wants).await?;
        let failed = |report: &MachineReport| reason(report).is_some();
        let report = agent.settled(without_kernel, 1, failed).await?;
        let said = format!("the host has no room left for image {}", fat.id);
        assert_eq!(reason(&report), Some(said));
        assert_eq!(
            agent.leftovers(without_kernel),
            ["root.raw"],
            "its empty disk"
        );
        assert!(!cached(&agent).iter().any(|name| name.contains(&fat.blake3)));

        // A disk beside the image that it is made from.
        let without_disk = new_id();
        let mut wants = wanted(&kernel, Power::Running);
        wants.spec.root_disk = Some(RootDisk {
            image: Some(root.clone()),
            size: 15 << 20,
        });
        agent.put(without_disk, &put(1, wants.clone())).await?;
        let report = agent.settled(without_disk, 1, failed).await?;
        let said = format!("the host has no room left for a disk of {} bytes", 15 * MIB);
        assert_eq!(reason(&report), Some(said));
        assert_eq!(agent.leftovers(without_disk), Vec::<String>::new());

        // With less to hold, a newer intent brings it up; what it was when it failed is gone with it.
        for id in [without_kernel, without_disk] {
            agent
                .put(id, &put(2, wanted(&kernel, Power::Absent)))
                .await?;
            agent.settled(id, 2, is_absent).await?;
            assert_eq!(agent.leftovers(id), Vec::<String>::new());
        }
        assert_eq!(agent.processes(other), processes, "never disturbed");
        running(&agent, &kernel).await?;
        Ok(())
    })
}

#[test]
fn an_intent_that_cannot_be_kept_is_refused_and_taken_once_there_is_room() -> Result {
    block_on(async {
        let cloud = Cloud::start().await;
        let agent = Agent::start_on_a_small_disk("8m", &cloud).await?;
        let kernel = image_of(b"kernel");
        cloud.add_image(&kernel, b"kernel");
        let known = running(&agent, &kernel).await?;
        let filler = Filler::new(&agent.folder.path().join("state"));
        let refused = |answer: &std::result::Result<MachineReport, CallError>| {
            let error = answer.as_ref().unwrap_err();
            assert!(
                matches!(error.refusal(), Some(Refusal::Unavailable { .. })),
                "{error}"
            );
        };
        let new = ServerId(uuid::Uuid::new_v4());
        let wants = put(1, wanted(&kernel, Power::Running));
        refused(&agent.client.put(new, &wants).await);
        let pause = put(2, wanted(&kernel, Power::Paused));
        refused(&agent.client.put(known, &pause).await);
        // What was refused was not taken: the machine is as it was.
        let report = agent.client.get(known).await?;
        assert_eq!((report.revision.0, is_running(&report)), (1, true));
        assert!(!agent.machine_folder(new).exists());
        drop(filler);
        agent.put(known, &pause).await?;
        let paused = |report: &MachineReport| report.observed == Observed::Paused;
        agent.settled(known, 2, paused).await?;
        agent.put(new, &wants).await?;
        agent.settled(new, 1, is_running).await?;
        Ok(())
    })
}
