//! Hosts of several ages, and guests that begin with all that theirs has: none comes where it would miss something, and
//! each has what its server's row says.

use std::collections::BTreeMap;

use fractus_agent_api::cpu::{Cpu, missing};
use fractus_agent_api::machine::ServerId;
use sea_orm::EntityTrait;
use uuid::Uuid;

use super::migration::Migrates;
use super::requests;
use super::world::{Plan, World};
use crate::agents::simulated::{SimulatedHost, cpu};
use crate::compute::model::cpu::CpuMode;
use crate::reconcile::machine;
use crate::reconcile::migration::row;

impl World {
    /// Always: no guest misses anything where it is.
    pub fn check_cpus(&self, host: &SimulatedHost) {
        let Some(here) = host.host_report().cpu.guest else {
            return;
        };
        for server in host.all_processes() {
            let lacks = host.guest_cpu(server).map(|kept| missing(&kept, &here));
            let lacks = lacks.unwrap_or_default();
            let seed = self.seed;
            assert!(
                lacks.is_empty(),
                "seed {seed}: {server} misses {lacks:?} on {}",
                host.id()
            );
        }
    }

    /// At rest: what a live migration would go by is what the guest has. How many guests there are.
    async fn check_rows(&self) -> usize {
        let (seed, mut guests) = (self.seed, 0);
        for host in &self.hosts {
            for server in host.processes() {
                let known = machine::find(self.database().reader(), server)
                    .await
                    .unwrap();
                let Some(known) = known.filter(|known| known.host == Some(host.id())) else {
                    continue;
                };
                let began_with = host.guest_cpu(server);
                assert!(began_with.is_some(), "seed {seed}: {server}");
                assert_eq!(known.wanted.spec.cpu, began_with, "seed {seed}: {server}");
                guests += 1;
            }
        }
        guests
    }
}

/// Two of one age, one newer; a fourth is older than either, and of another TSC.
fn age(n: usize) -> Option<Cpu> {
    let mut old = cpu(&["avx"]);
    old.offers.tsc_khz = Some(3_000_000);
    Some(match n % 4 {
        0 | 1 => cpu(&["avx", "avx2"]),
        2 => cpu(&["avx", "avx2", "rtm"]),
        _ => old,
    })
}

async fn storms(seeds: std::ops::Range<u64>, mode: CpuMode) -> (usize, BTreeMap<String, usize>) {
    let plan = Plan {
        hosts: 4,
        servers: 4,
        events: 250,
    };
    let (mut guests, mut ended) = (0, BTreeMap::new());
    for seed in seeds {
        let mut world = World::on(seed, plan, age, mode).await;
        for n in 0..plan.servers {
            let id = Uuid::from_u128(n as u128 + 1);
            world.servers.push(id);
            requests::create(&world.app(), id).await.unwrap();
        }
        world.heal().await;
        world.migrates = Migrates::Too;
        for _ in 0..2 {
            world.run().await;
            world.heal().await;
            world.check_rest().await;
            guests += world.check_rows().await;
        }
        let all = row::Entity::find().all(world.database().reader()).await;
        for migration in all.unwrap() {
            let no_host = migration
                .reason
                .is_some_and(|why| why.contains("its CPU lacks"));
            let what = if no_host {
                "no host"
            } else {
                &migration.status
            };
            *ended.entry(what.to_owned()).or_default() += 1;
        }
    }
    eprintln!("{mode}: {guests} guests, {ended:?}");
    (guests, ended)
}

#[tokio::test]
async fn a_guest_goes_only_where_all_is_that_it_has() {
    let (guests, ended) = storms(4000..4020, CpuMode::Host).await;
    for what in ["no host", "completed"] {
        assert!(
            ended.get(what).is_some_and(|count| *count >= 5),
            "{ended:?}"
        );
    }
    assert!(guests > 0);
}

/// It can go anywhere, and does.
#[tokio::test]
async fn guests_of_the_baseline_go_from_any_host_to_any() {
    let (guests, ended) = storms(4020..4030, CpuMode::Baseline).await;
    assert_eq!(ended.get("no host"), None, "{ended:?}");
    assert!(ended["completed"] >= 5 && guests > 0, "{ended:?}");
}

/// Whatever the hosts come to be, and whichever controller there is.
#[tokio::test]
async fn a_server_keeps_its_cpu_when_hosts_come_to_have_less() {
    let plan = Plan {
        hosts: 2,
        servers: 1,
        events: 0,
    };
    let mut world = World::on(1, plan, age, CpuMode::Baseline).await;
    let id = Uuid::from_u128(1);
    world.servers.push(id);
    requests::create(&world.app(), id).await.unwrap();
    world.heal().await;
    let hosts = world.hosts.clone();
    let server = ServerId(id);
    let on = |id| {
        hosts
            .iter()
            .find(|host| host.processes().contains(&id))
            .unwrap()
    };
    let began_with = on(server).guest_cpu(server).unwrap();
    assert_eq!(began_with.features(), ["avx", "avx2"]);
    for host in &hosts {
        host.set_cpu(age(3));
    }
    world.start_controller().await;
    world.everybody_reports().await;
    world.heal().await;
    assert_eq!(on(server).guest_cpu(server), Some(began_with));
}
