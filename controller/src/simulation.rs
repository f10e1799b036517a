//! The cloud in one process, from one seed: the real engine, reconciler, scheduler, fleet and compute
//! operations over a database, against simulated hosts that decide like real ones.
//!
//! Nothing runs by itself. The [`world::World`] picks one event after the other by its random source:
//! a request of a user, a turn of an operation or of the reconciler, a step of a host, a message that
//! arrives, late, twice or never, a crash. A controller dies at one of its effects, before or after
//! it: a write to the database or a call of an agent ([`network::Doom`]). Between two effects nothing
//! can be told from outside, so this is a crash at any await point. After every event the processes
//! on all hosts are counted; now and then, and at the end when everything is healed and has come to
//! rest, all else is checked ([`check`]).

mod check;
mod cpu;
mod evacuation;
mod faults;
mod golden;
mod migration;
mod network;
mod pair;
mod places;
mod requests;
mod resize;
mod scenarios;
mod seeds;
mod transit;
mod world;

use world::{Plan, World};

/// Rounds of these seeds, and more if there are to be ([`seeds`]), each a small cloud with everything going wrong.
async fn rounds(seeds: std::ops::Range<u64>) {
    let seeds = seeds::of(seeds);
    let mut starts = 0;
    let least = seeds.len() as u64;
    for seed in seeds {
        let mut world = World::new(
            seed,
            Plan {
                hosts: 4,
                servers: 5,
                events: 160,
            },
        )
        .await;
        // Twice: the second storm begins with servers that are stopped, paused and suspended.
        for _ in 0..2 {
            world.run().await;
            world.heal().await;
            world.check_rest().await;
        }
        starts += world.starts();
    }
    assert!(
        starts >= least,
        "{starts} machines were started: nothing was tried"
    );
}

#[tokio::test]
async fn no_seed_of_the_first_fifty_breaks_an_invariant() {
    rounds(0..50).await;
}

#[tokio::test]
async fn no_seed_of_the_second_fifty_breaks_an_invariant() {
    rounds(50..100).await;
}

#[tokio::test]
async fn no_seed_of_the_third_fifty_breaks_an_invariant() {
    rounds(100..150).await;
}

#[tokio::test]
async fn no_seed_of_the_fourth_fifty_breaks_an_invariant() {
    rounds(150..200).await;
}

#[tokio::test]
async fn hundreds_of_hosts_come_to_rest_after_a_storm() {
    let mut world = World::new(
        4711,
        Plan {
            hosts: 300,
            servers: 150,
            events: 2500,
        },
    )
    .await;
    world.run().await;
    world.heal().await;
    world.check_rest().await;
}

#[tokio::test]
async fn one_seed_is_one_history() {
    let history = async |seed| {
        let mut world = World::new(
            seed,
            Plan {
                hosts: 4,
                servers: 5,
                events: 160,
            },
        )
        .await;
        world.run().await;
        world.heal().await;
        world.history()
    };
    let (first, second) = (history(7).await, history(7).await);
    assert!(first.len() > 40, "{} events", first.len());
    assert_eq!(first, second);
    assert_ne!(first, history(8).await);
}
