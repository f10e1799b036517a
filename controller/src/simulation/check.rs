//! What must be true: always, often, and at rest.

use std::collections::{BTreeMap, BTreeSet};

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{Observed, Power, ServerId};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};

use super::requests;
use super::requests::SHELVED;
use super::world::World;
use crate::agents::host;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::store::server;
use crate::image::store::image;
use crate::operation;
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration;

impl World {
    /// Always: never two processes of a server.
    pub fn check_processes(&self) {
        let mut seen: BTreeMap<ServerId, HostId> = BTreeMap::new();
        for host in &self.hosts {
            for server in host.processes() {
                if let Some(other) = seen.insert(server, host.id()) {
                    panic!(
                        "seed {}: {server} runs on {} and {other}",
                        self.seed,
                        host.id()
                    );
                }
            }
        }
    }

    /// How many processes were started on all hosts, by their records.
    pub fn starts(&self) -> u64 {
        let reports = self
            .hosts
            .iter()
            .flat_map(|host| host.full_report().machines);
        reports.map(|report| report.starts).sum()
    }

    /// Often: a process has a record, and the record names its host.
    pub async fn check_records(&self) {
        for host in &self.hosts {
            for server in host.processes() {
                let row = machine::find(self.database().reader(), server)
                    .await
                    .unwrap();
                let owner = row.and_then(|machine| machine.host);
                assert_eq!(
                    owner,
                    Some(host.id()),
                    "seed {}: {server} runs on {} and is owned by {owner:?}",
                    self.seed,
                    host.id()
                );
            }
        }
    }

    /// At rest: everything is what it should be, and nothing is left of what is gone.
    pub async fn check_rest(&self) {
        let seed = self.seed;
        self.check_processes();
        self.check_records().await;
        let reader = self.database().reader();
        let open = operation::unfinished(reader, None).await.unwrap();
        assert!(open.is_empty(), "seed {seed}: stuck or parked: {open:?}");
        self.check_migrations().await;
        self.check_images().await;
        let mut alive = BTreeSet::new();
        for id in &self.servers {
            let server = ServerId(*id);
            let row = server::find_any(reader, &id.to_string()).await.unwrap();
            let machine = machine::find(reader, server).await.unwrap();
            // A create that died before its transaction was never there.
            let Some(row) = row else {
                assert_eq!(machine, None, "seed {seed}: {id} has a machine and no row");
                continue;
            };
            let state = row.state();
            assert!(!state.in_transit(), "seed {seed}: {id} is left {state:?}");
            assert!(
                !matches!(state, ServerState::Building(_)),
                "seed {seed}: {id} is {state:?}"
            );
            self.check_server(server, state, machine.as_ref());
            self.check_shelved(&row).await;
            if machine.is_some_and(|machine| machine.host.is_some()) {
                alive.insert(server);
            }
        }
        self.check_hosts(&alive).await;
    }

    /// An image of a server's disk has its bytes, or is gone; and no host keeps a copy.
    async fn check_images(&self) {
        let seed = self.seed;
        let rows = image::Entity::find().all(self.database().reader()).await;
        for row in rows.unwrap() {
            if row.id == requests::image_row(0).row.id {
                continue;
            }
            let gone = row.deleted_at_us.is_some();
            let whole = row.status == "active" && row.size == Some(1 << 20);
            assert!(gone || whole, "seed {seed}: an image is left {row:?}");
        }
        for host in &self.hosts {
            for server in host.machines() {
                let copy = host.copied(server);
                // What a server that was resized may go back to.
                let wanted = host.wanted(server).and_then(|wanted| wanted.copy);
                let may_go_back = self.can_go_back(server).await.is_some();
                assert!(
                    copy.is_none() || may_go_back && copy == wanted,
                    "seed {seed}: {} keeps a copy of {server}",
                    host.id()
                );
            }
        }
    }

    /// The hosts of a server that was resized, or migrated, and could go back; none: it could not.
    async fn can_go_back(&self, server: ServerId) -> Option<BTreeSet<HostId>> {
        let reader = self.database().reader();
        let row = server::find(reader, &server.to_string()).await.unwrap();
        if !matches!(row?.state(), ServerState::Resized(_)) {
            return None;
        }
        let open = migration::open(reader, server).await.unwrap();
        let [one] = open.as_slice() else {
            panic!("seed {}: {server} was resized by {open:?}", self.seed);
        };
        assert_eq!(one.status(), migration::Status::Finished);
        Some(one.hosts().collect())
    }

    fn check_server(&self, server: ServerId, state: ServerState, machine: Option<&Machine>) {
        let seed = self.seed;
        let place = machine.and_then(|machine| Some((machine.host?, machine)));
        let Some((owner, machine)) = place else {
            assert!(
                matches!(
                    state,
                    ServerState::Deleted
                        | ServerState::Error
                        | ServerState::Shelved
                        | ServerState::ShelvedOffloaded
                ),
                "seed {seed}: {server} is {state:?} and has no host"
            );
            return;
        };
        assert_ne!(
            state,
            ServerState::Deleted,
            "seed {seed}: {server} is deleted and owned"
        );
        let host = self.network.hosts.host(owner).unwrap();
        let report = host.report(server).unwrap();
        assert!(
            report.settled,
            "seed {seed}: {server} is not settled: {report:?}"
        );
        assert_eq!(
            (report.generation, report.revision),
            machine.age(),
            "seed {seed}: {server}"
        );
        let wanted = &machine.wanted;
        let fits = match (state, wanted.power) {
            (ServerState::Active, Power::Running) => report.observed == Observed::Running,
            (ServerState::Paused, Power::Paused) => report.observed == Observed::Paused,
            (ServerState::Suspended, Power::Suspended) => report.observed == Observed::Suspended,
            (ServerState::Stopped, Power::Stopped) => {
                matches!(report.observed, Observed::Stopped { .. })
            }
            (ServerState::Resized(Standing::Active), Power::Running) => {
                report.observed == Observed::Running
            }
            (ServerState::Resized(_), Power::Stopped) => {
                matches!(report.observed, Observed::Stopped { .. })
            }
            (ServerState::Error, _) => true,
            _ => false,
        };
        assert!(
            fits,
            "seed {seed}: {server} is {state:?}, wanted {:?}, and {:?}",
            wanted.power, report.observed
        );
        let kept = host.kept(server).is_some();
        assert!(
            state == ServerState::Error || kept == (state == ServerState::Suspended),
            "seed {seed}: {server} is {state:?}; memory is kept: {kept}"
        );
        let done = (report.soft_reboots, report.hard_reboots, report.rebuilds);
        let asked = (wanted.soft_reboots, wanted.hard_reboots, wanted.rebuilds);
        assert_eq!(
            done, asked,
            "seed {seed}: {server}: what was asked for was done"
        );
        let disks = host.disks(server);
        assert!(
            disks <= 1 + wanted.rebuilds,
            "seed {seed}: {server} lost a disk: {disks} made"
        );
    }

    /// A shelved server has its image, whole; nothing is left of the images of all others.
    async fn check_shelved(&self, row: &server::Model) {
        let (seed, reader) = (self.seed, self.database().reader());
        let name = format!("{}{SHELVED}", row.id);
        let images = image::Entity::find().filter(image::Column::Name.eq(name));
        let images = images.filter(image::Column::DeletedAtUs.is_null());
        let left: Vec<String> = images
            .all(reader)
            .await
            .unwrap()
            .into_iter()
            .map(|row| row.id)
            .collect();
        let kept: Vec<String> = row.shelved_image_id.iter().cloned().collect();
        assert_eq!(left, kept, "seed {seed}: images of shelved {}", row.id);
        let shelved = [ServerState::Shelved, ServerState::ShelvedOffloaded];
        let is_shelved = shelved.contains(&row.state());
        // One whose guest could not be started keeps it.
        assert!(
            is_shelved != kept.is_empty() || row.state() == ServerState::Error,
            "seed {seed}: {} is {:?}, and its image is {kept:?}",
            row.id,
            row.state()
        );
    }

    async fn check_hosts(&self, alive: &BTreeSet<ServerId>) {
        let seed = self.seed;
        for host in &self.hosts {
            for server in host.remains() {
                assert!(
                    alive.contains(&server),
                    "seed {seed}: {server} is left on {}",
                    host.id()
                );
            }
        }
        let reader = self.database().reader();
        let reservations = host::reservation::Entity::find().all(reader).await.unwrap();
        let reserved: BTreeSet<ServerId> = reservations
            .iter()
            .map(|row| ServerId(row.server_id.parse().unwrap()))
            .collect();
        assert_eq!(
            &reserved, alive,
            "seed {seed}: reservations are of servers with a host"
        );
        let mut held: BTreeMap<ServerId, BTreeSet<HostId>> = BTreeMap::new();
        for reservation in &reservations {
            let server = ServerId(reservation.server_id.parse().unwrap());
            let host = HostId(reservation.host_id.parse().unwrap());
            held.entry(server).or_default().insert(host);
        }
        for (server, hosts) in held {
            let owner = machine::find(reader, server).await.unwrap().unwrap().host;
            let of_owner = owner.into_iter().collect();
            let expected = self.can_go_back(server).await.unwrap_or(of_owner);
            assert_eq!(
                hosts, expected,
                "seed {seed}: {server} holds of its own hosts"
            );
        }
        for row in host::all(reader).await.unwrap() {
            let here = reservations
                .iter()
                .filter(|reservation| reservation.host_id == row.id);
            let memory: i64 = here.map(|reservation| reservation.memory_mib).sum();
            assert_eq!(
                row.memory_mib_used, memory,
                "seed {seed}: host {}",
                row.hostname
            );
            assert!(row.memory_mib_used <= row.memory_mib_limit, "seed {seed}");
        }
    }
}
