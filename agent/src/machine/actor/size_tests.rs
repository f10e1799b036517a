//! The size of a machine whose process says what the test has it say.

use fractus_agent_api::decision::size::Resize;
use fractus_agent_api::size::Size;

use super::size::QUIET;
use super::tests::{Stage, Told};
use super::*;
use crate::machine::process::Status;

/// 1 to 4 vCPUs, 64 to 256 MiB.
fn size() -> Size {
    Size {
        vcpus: 1,
        vcpus_used: 1,
        max_vcpus: Some(4),
        memory_mib: 64,
        hot_memory_mib: 0,
        hot_plugged_mib: 0,
        max_hot_memory_mib: Some(192),
    }
}

fn status(size: Size, fresh: bool) -> Heard {
    Heard::Status(Status {
        lacks: None,
        moving: None,
        state: State::Running,
        guest: None,
        devices: Some(Vec::new()),
        size: Some(size),
        fresh,
    })
}

impl Stage {
    /// Takes the intent, and asks for what is to be asked for.
    async fn want_size(&mut self, revision: u64, vcpus: u8, memory_mib: u64) {
        let (Message::Put(mut put, answer), _) = super::tests::put(revision, Power::Running) else {
            unreachable!("as it was made")
        };
        let spec = &mut put.wanted.spec;
        (spec.vcpus, spec.memory_mib) = (vcpus, memory_mib);
        (spec.max_vcpus, spec.max_memory_mib) = (Some(vcpus), Some(memory_mib));
        self.actor.take(Message::Put(put, answer));
        self.ask().await;
    }

    async fn ask(&mut self) {
        while let Some(to) = self.actor.next_size() {
            assert!(self.actor.resize(to).await.is_ok());
        }
    }

    /// Used vCPUs and memory, and whether something is left for the next start.
    fn used(&self) -> (u8, u64, bool) {
        let size = self.reports.borrow().size.clone().unwrap();
        let later = size.at_next_start.is_some();
        (size.vcpus_used, size.memory_mib_used, later)
    }
}

#[tokio::test]
async fn a_guest_has_room_before_it_is_offered_memory_and_keeps_it_until_it_has_left_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.hears(status(size(), true)).await;
    stage.want_size(2, 2, 128).await;
    let to = Resize {
        vcpus: 2,
        hot_memory_mib: 64,
    };
    assert_eq!(stage.told(), [Told::Limit(128), Told::Resize(to)]);
    assert!(!stage.is_settled());
    let offered = Size {
        vcpus: 2,
        hot_memory_mib: 64,
        ..size()
    };
    stage.hears(status(offered, false)).await;
    assert!(stage.is_settled(), "its guest is not waited for");
    assert_eq!(stage.used(), (1, 64, false));
    let taken = Size {
        vcpus_used: 2,
        hot_plugged_mib: 64,
        ..offered
    };
    stage.hears(status(taken, false)).await;
    assert_eq!(stage.used(), (1, 64, false), "a while later");
    let untold = stage.actor.size_is_untold();
    assert!(stage.actor.sizes.deadline(untold).is_some());
    stage.actor.sizes.pass(QUIET);
    stage.actor.publish();
    assert_eq!(stage.used(), (2, 128, false));

    stage.told();
    stage.want_size(3, 1, 64).await;
    let to = Resize {
        vcpus: 1,
        hot_memory_mib: 0,
    };
    assert_eq!(stage.told(), [Told::Limit(128), Told::Resize(to)]);
    let asked = Size {
        vcpus: 1,
        hot_memory_mib: 0,
        ..taken
    };
    stage.hears(status(asked, false)).await;
    assert_eq!(stage.told(), [], "the guest has it still");
    let left = Size {
        hot_plugged_mib: 32,
        ..asked
    };
    stage.hears(status(left, false)).await;
    assert_eq!(stage.told(), [Told::Limit(96)]);
}

#[tokio::test]
async fn what_a_process_was_not_made_for_or_refuses_waits_for_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.hears(status(size(), true)).await;
    stage.want_size(2, 8, 64).await;
    let to = Resize {
        vcpus: 4,
        hot_memory_mib: 0,
    };
    assert_eq!(stage.told(), [Told::Limit(64), Told::Resize(to)]);
    stage.hears(Heard::ResizeRefused("no".to_owned())).await;
    stage.hears(status(size(), false)).await;
    assert_eq!((stage.is_settled(), stage.told()), (true, vec![]));
    assert_eq!(stage.used(), (1, 64, true));
    // A newer intent tries anew; a connection that broke may have taken it along.
    stage.want_size(3, 8, 64).await;
    stage.told();
    stage.hears(status(size(), true)).await;
    stage.ask().await;
    assert_eq!(stage.told(), [Told::Limit(64), Told::Resize(to)]);
}
