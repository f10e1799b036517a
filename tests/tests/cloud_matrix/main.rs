//! The fault matrix: a live migration is stopped at each message of its protocol, one thing is broken there, and in the
//! end one host runs the guest, with all that it had, or its server is ERROR and says why.
//!
//! A real controller and real agents speak by way of the test ([`middle`]), which reads and holds every message. A pair
//! of agents has one server; pairs are at work side by side, each on the next cell that nobody has tried.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod gate;
mod letter;
mod line;
mod middle;
mod pair;
mod spot;
mod table;
mod witness;

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::Result;
use fractus_tests::harness::{Cloud, Options};
use futures::future::join_all;
use serde_json::json;
use tokio::sync::{Barrier, Mutex};
use tokio::task::JoinSet;

use self::middle::Middle;
use self::pair::{Pair, Stage};
use self::spot::{Fault, How, Spot};
use self::table::Table;

/// Pairs that are at work at once.
const PAIRS: usize = 7;

async fn stage(how: How) -> Arc<Stage> {
    let agents = 2 * PAIRS;
    let options = Options {
        agents,
        apart: true,
        ..Options::default()
    };
    let mut cloud = Cloud::without_agents(options).await.unwrap();
    let middle = Middle::start(&cloud, agents).await.unwrap();
    cloud.start_agents().await.unwrap();
    let admin = cloud.admin().await.unwrap().at(96);
    let image = cloud.probe_image(&admin, "tick_ms=50").await.unwrap();
    let flavor = json!({"flavor": {"name": "tiny", "vcpus": 1, "ram": how.ram(), "disk": 0}});
    let flavor = admin.post("/compute/v2.1/flavors", flavor).await.unwrap();
    let flavor = flavor.expect_status(200).unwrap().text("/flavor/id");
    let specs = format!("/compute/v2.1/flavors/{flavor}/os-extra_specs");
    let follows = (how == How::PostCopy).to_string();
    let spec = json!({"extra_specs": {"hw:live_migration_post_copy": follows}});
    let set = admin.post(&specs, spec).await.unwrap();
    set.expect_status(200).unwrap();
    Arc::new(Stage {
        cloud: Mutex::new(cloud),
        admin,
        middle,
        image,
        flavor,
        how,
    })
}

/// Cells that there are, or those that are asked for: `FRACTUS_CELLS=title of a message,title of a fault;…`.
fn cells(how: How) -> Vec<(Spot, Fault)> {
    let asked = std::env::var("FRACTUS_CELLS").ok();
    let full = std::env::var_os("FRACTUS_FULL").is_some();
    let is_asked = |spot: Spot, fault: Fault| match &asked {
        None => full || is_often_tried(how, spot, fault),
        Some(asked) => {
            let mut cells = asked.split(';').filter_map(|cell| cell.split_once(','));
            cells.any(|(s, f)| spot.title().contains(s) && fault.title().contains(f))
        }
    };
    let all = Fault::ALL.into_iter();
    all.flat_map(|fault| Spot::of(how).iter().map(move |spot| (*spot, fault)))
        .filter(|(spot, fault)| fault.cannot(*spot).is_none() && is_asked(*spot, *fault))
        .collect()
}

/// What CI has time for: all that a guest may be lost by, and of the rest every other cell, as on a chessboard; so each
/// message meets half of the faults, and each fault half of the messages.
fn is_often_tried(how: How, spot: Spot, fault: Fault) -> bool {
    let place = |at: Option<usize>| at.unwrap_or_default();
    let row = place(Spot::of(how).iter().position(|other| *other == spot));
    let column = place(Fault::ALL.iter().position(|other| *other == fault));
    matches!(fault, Fault::SourceProcess | Fault::TargetProcess) || (row + column) % 2 == 0
}

async fn tries(pair: &mut Pair, cell: (Spot, Fault), all: Option<&Barrier>, table: &Mutex<Table>) {
    let (spot, fault) = cell;
    let tried = pair.tries(spot, fault, all).await;
    let tried = tried.map_err(|error| format!("{error:#}"));
    if let Err(error) = &tried {
        println!("{} x {}: {error}", spot.title(), fault.title());
    }
    table.lock().await.add(spot, fault, tried);
}

/// All of them at once, each with a pair of its own: what they share is broken once.
async fn together(pairs: &mut [Pair], cells: &[(Spot, Fault)], table: &Mutex<Table>) {
    let ready = join_all(pairs.iter_mut().map(Pair::is_ready)).await;
    ready.into_iter().collect::<Result<()>>().unwrap();
    for some in cells.chunks(pairs.len()) {
        let all = Barrier::new(some.len());
        let tried = pairs.iter_mut().zip(some);
        join_all(tried.map(|(pair, cell)| tries(pair, *cell, Some(&all), table))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cloud_whatever_breaks_at_whatever_message_of_a_migration_one_host_runs_the_guest() {
    tries_all(How::PreCopy).await;
}

/// The same where memory follows the guest: it is on both hosts in part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cloud_whatever_breaks_while_memory_follows_one_host_runs_the_guest_or_says_that_it_is_lost()
 {
    tries_all(How::PostCopy).await;
}

async fn tries_all(how: How) {
    let stage = stage(how).await;
    let mut pairs: Vec<Pair> = (0..PAIRS).map(|index| Pair::new(&stage, index)).collect();
    let table = Arc::new(Mutex::new(Table::of(how)));
    let (shared, own): (Vec<_>, Vec<_>) = cells(how)
        .into_iter()
        .partition(|(_, fault)| *fault == Fault::Controller);
    together(&mut pairs, &shared, &table).await;
    let own = Arc::new(Mutex::new(VecDeque::from(own)));
    let mut work = JoinSet::new();
    for mut pair in pairs {
        let (own, table) = (Arc::clone(&own), Arc::clone(&table));
        work.spawn(async move {
            loop {
                // In a binding of its own, or the lock would be held.
                let cell = own.lock().await.pop_front();
                let Some(cell) = cell else { return };
                tries(&mut pair, cell, None, &table).await;
            }
        });
    }
    work.join_all().await;
    let table = table.lock().await;
    println!("{}", table.text());
    let wrong = table.wrong();
    assert!(
        wrong.is_empty(),
        "{}\n{}\n{}",
        table.text(),
        wrong.join("\n"),
        stage.cloud.lock().await.logs()
    );
}
