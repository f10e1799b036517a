//! The host's identity has two writers: a renewal of its certificate, and what heartbeats are answered.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::*;
use fractus_agent::host::credentials::{Identity, Membership};
use fractus_agent::host::push;
use fractus_agent::paths::Paths;
use fractus_agent_api::host::HostId;
use fractus_agent_api::identity::Peer;
use uuid::Uuid;

const EACH: usize = 6;

#[test]
fn changes_of_the_identity_from_two_sides_all_stand_in_memory_and_on_the_disk() -> Result {
    block_on(async {
        let cloud = Cloud::start().await;
        let folder = tempfile::tempdir()?;
        let paths = Paths::new(folder.path(), folder.path().join("run"));
        let host_id = HostId(Uuid::new_v4());
        let identity = Identity {
            membership: Membership {
                version: 1,
                host_id,
                endpoint: "https://127.0.0.1:1".into(),
                controllers: Vec::new(),
            },
            credentials: cloud.authority().issue(&Peer::Host(host_id)),
        };
        let link = push::Cloud::new(paths.clone(), identity)?;
        std::thread::scope(|scope| {
            for side in 0..2 {
                let link = &link;
                scope.spawn(move || {
                    for turn in 0..EACH {
                        let controller = format!("https://127.0.0.{}:{}", side + 1, turn + 1);
                        link.modify(|identity| identity.membership.controllers.push(controller))
                            .unwrap();
                    }
                });
            }
        });
        let held = link.link().identity.membership.clone();
        assert_eq!(held.controllers.len(), 2 * EACH, "{:?}", held.controllers);
        assert_eq!(Identity::load(&paths.identity())?.membership, held);
        Ok(())
    })
}
