//! What becomes of a disk whose resize is given up at one moment or another.

use std::sync::Arc;

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::ServerId;

use super::requests;
use super::scenarios::{ONE, active, state};
use super::world::World;
use crate::compute::model::state::ServerState;
use crate::compute::ops::change::Change;
use crate::operation::Advance;
use crate::reconcile::machine;

async fn owner(world: &World) -> HostId {
    let known = machine::find(world.database().reader(), ServerId(ONE)).await;
    known.unwrap().unwrap().host.unwrap()
}

/// The server is migrated, and its row is its target's already, which has not been told.
async fn moved() -> (World, HostId) {
    let mut world = active(2, &[ONE]).await;
    let source = owner(&world).await;
    assert!(requests::resize(&world.app(), ONE, false).await.unwrap());
    let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
    while owner(&world).await == source {
        if engine.advance(&ONE.to_string()).await != Advance::Advanced {
            for host in &world.hosts {
                host.settle();
            }
            world.everybody_reports().await;
        }
    }
    (world, source)
}

/// What is to go at its target does not go at its source, whatever was asked of the server before that.
#[tokio::test]
async fn a_server_that_is_reset_and_rebooted_while_it_is_started_elsewhere_keeps_its_disk() {
    for change in [Change::HardReboot, Change::Stop] {
        let (mut world, source) = moved().await;
        requests::reset(&world.app(), ONE).await.unwrap();
        let asked = requests::change(&world.app(), ONE, change).await;
        assert!(asked.unwrap(), "{change:?}");
        world.heal().await;
        world.check_rest().await;
        let host = world.hosts.iter().find(|host| host.id() == source);
        assert_eq!(owner(&world).await, source, "{change:?}");
        assert_eq!(host.unwrap().disks(ServerId(ONE)), 1, "{change:?}");
        let wanted = match change {
            Change::Stop => ServerState::Stopped,
            _ => ServerState::Active,
        };
        assert_eq!(state(&world, ONE).await, wanted);
    }
}
