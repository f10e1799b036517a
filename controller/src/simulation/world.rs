//! Hosts, one controller that comes and goes, and the events between them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::VERSION;
use fractus_agent_api::cpu::Cpu;
use fractus_agent_api::host::{Heartbeat, HostId};
use fractus_agent_api::machine::{ServerId, StopReason};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, RngExt, SeedableRng};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::migration::{Guests, Migrates};
use super::network::{Doom, Mail, Network};
use super::requests;
use crate::agents::fleet::Fleet;
use crate::agents::host;
use crate::agents::simulated::{SimulatedHost, stream};
use crate::clock::{Clock, SimulatedClock};
use crate::compute::model::cpu::CpuMode;
use crate::compute::ops::change::Change;
use crate::compute::{Compute, ServerObserver, register};
use crate::database::Database;
use crate::database::testing::{self, TestDatabase};
use crate::hosts::Hosts;
use crate::http::{App, AppParts, Authenticate, Identity, PublicUrl, Refused};
use crate::identity::Realm;
use crate::image::Images;
use crate::image::blob::FileStore;
use crate::leader::{Lead, Me, Seat};
use crate::operation::{self, Advance, Engine, Kinds};
use crate::random::{Random, SeededRandom};
use crate::reconcile::{MIGRATIONS_PER_HOST, Machines, Reconciler, machine};
use crate::secret::MasterKey;

/// How big, how long.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub hosts: usize,
    pub servers: usize,
    pub events: usize,
}

pub struct World {
    pub seed: u64,
    plan: Plan,
    pub(super) random: StdRng,
    pub(super) ids: Arc<SeededRandom>,
    pub clock: SimulatedClock,
    pub test: TestDatabase,
    pub network: Network,
    pub hosts: Vec<Arc<SimulatedHost>>,
    pub servers: Vec<Uuid>,
    pub controller: Option<Controller>,
    folder: tempfile::TempDir,
    realm: Arc<Realm>,
    membership: Hosts,
    history: Vec<String>,
    /// Changes the kinds that the next controller is started with.
    pub kinds: Box<dyn Fn(Kinds) -> Kinds>,
    /// Healing does not start a controller anew.
    pub keeps_controller: bool,
    pub master: MasterKey,
    /// What of live migrations is in a storm.
    pub migrates: Migrates,
    /// Whether hosts without power are.
    pub evacuates: bool,
    /// What was seen of guests, for [`super::migration`].
    pub guests: Guests,
    cpu_mode: CpuMode,
    /// Of live migrations, at once; for the next controller that is started.
    pub migrations_per_host: u16,
}

/// One life of the controller.
pub struct Controller {
    pub app: App,
    pub engine: Arc<Engine>,
    pub fleet: Arc<Fleet>,
    pub reconciler: Arc<Reconciler>,
    wakes: mpsc::UnboundedReceiver<ServerId>,
    pub doom: Arc<Doom>,
    /// Among others, if there may be any.
    pub seat: Option<Seat>,
}

#[derive(Debug)]
struct Nobody;

#[async_trait]
impl Authenticate for Nobody {
    async fn authenticate(&self, _token: &str) -> Result<Arc<Identity>, Refused> {
        unreachable!("the simulation speaks no HTTP")
    }
}

const START_US: i64 = 1_800_000_000_000_000;

impl World {
    /// A new cloud, whose hosts have all reported to its controller.
    pub async fn new(seed: u64, plan: Plan) -> Self {
        Self::on(seed, plan, |_| None, CpuMode::default()).await
    }

    /// The same on hosts of these CPUs.
    pub async fn on(
        seed: u64,
        plan: Plan,
        cpu: impl Fn(usize) -> Option<Cpu>,
        mode: CpuMode,
    ) -> Self {
        let test = testing::database_in_memory().await;
        let ids = SeededRandom::new(seed);
        for n in 0..plan.hosts {
            let id = HostId(ids.uuid());
            let mut inventory = SimulatedHost::inventory(&format!("host{n}"), 4, 4096);
            inventory.cpu.guest = cpu(n).map(Box::new);
            let insert = test.database.write(move |tx| {
                let said = inventory.clone();
                Box::pin(async move {
                    host::insert(tx, id, "https://simulated:1", &said, START_US).await
                })
            });
            insert.await.unwrap();
        }
        let insert = test.database.write(move |tx| {
            Box::pin(async move { Images::add(tx, requests::image_row(START_US), None).await })
        });
        insert.await.unwrap();
        Self::of_mode(test, ids, (seed, plan), mode).await
    }

    /// The cloud of a database; its hosts have no machines yet.
    pub async fn of(test: TestDatabase, ids: SeededRandom, seed: u64, plan: Plan) -> Self {
        Self::of_mode(test, ids, (seed, plan), CpuMode::default()).await
    }

    async fn of_mode(
        test: TestDatabase,
        ids: SeededRandom,
        (seed, plan): (u64, Plan),
        cpu_mode: CpuMode,
    ) -> Self {
        let clock = SimulatedClock::starting_at(START_US);
        let network = Network::new(seed);
        let mut hosts = Vec::new();
        for row in host::all(test.database.reader()).await.unwrap() {
            let inventory = row.inventory().unwrap();
            let host = SimulatedHost::new(row.host_id(), inventory, ids.uuid(), |_| {});
            let host = Arc::new(host);
            network.hosts.add(Arc::clone(&host));
            hosts.push(host);
        }
        let realm = Realm::idle(&test.database).await;
        let membership = Hosts::idle(&test.database).await.unwrap();
        let mut world = Self {
            seed,
            plan,
            random: StdRng::seed_from_u64(seed),
            ids: Arc::new(ids),
            clock,
            test,
            network,
            hosts,
            servers: Vec::new(),
            controller: None,
            folder: tempfile::tempdir().unwrap(),
            realm,
            membership,
            history: Vec::new(),
            kinds: Box::new(|kinds| kinds),
            keeps_controller: false,
            master: MasterKey::ephemeral().unwrap(),
            migrates: Migrates::Never,
            evacuates: false,
            guests: Guests::default(),
            cpu_mode,
            migrations_per_host: MIGRATIONS_PER_HOST,
        };
        world.start_controller().await;
        world.everybody_reports().await;
        world
    }

    /// Of the controller that users speak to.
    pub fn app(&self) -> App {
        self.controller.as_ref().unwrap().app.clone()
    }

    pub fn history(&self) -> Vec<String> {
        self.history.clone()
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.history.push(what.into());
    }

    /// The database as nobody's crash disturbs it.
    pub fn database(&self) -> &Database {
        &self.test.database
    }

    /// The only controller.
    pub async fn start_controller(&mut self) {
        self.controller = Some(self.life(None).await);
    }

    /// A life of a controller: one of several if it has a name.
    pub async fn life(&self, name: Option<&str>) -> Controller {
        let doom = Arc::new(Doom::default());
        let database = self.test.database.hooked(Arc::clone(&doom) as _);
        let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
        let random: Arc<dyn Random> = Arc::clone(&self.ids) as _;
        let fleet = Arc::new(Fleet::default());
        fleet.admit_all(&database).await.unwrap();
        let (lead, seat) = match name {
            None => (Lead::from(database.clone()), None),
            Some(name) => {
                let me = Me {
                    name: name.to_owned(),
                    incarnation: random.uuid(),
                    agents_url: format!("https://{name}:1"),
                };
                let clock = Arc::clone(&clock);
                let (seat, lead) = Seat::new(database.clone(), clock, Arc::clone(&fleet), me);
                (lead, Some(seat))
            }
        };
        let agents = self.network.agents(Arc::clone(&doom));
        let machines = Machines::new(
            database.clone(),
            agents,
            Arc::clone(&fleet),
            Arc::clone(&clock),
        )
        .with_key(self.master.clone())
        .with_cpu_mode(self.cpu_mode)
        .with_migrations_per_host(self.migrations_per_host);
        let blobs = FileStore::open(self.folder.path(), "simulated")
            .await
            .unwrap();
        let images = Images::new(database.clone(), Arc::new(blobs));
        let mut kinds = Kinds::default();
        register(&mut kinds, &machines, &images, &clock, &random);
        let kinds = (self.kinds)(kinds);
        let engine = Engine::new(lead.clone(), kinds, Arc::clone(&clock), Arc::clone(&random));
        let (reconciler, wakes) = Reconciler::new(
            lead,
            machines.clone(),
            Arc::clone(&engine),
            Arc::new(ServerObserver::new(Arc::clone(&clock))),
            Arc::clone(&clock),
            Arc::clone(&random),
        );
        let hosts = self.membership.clone();
        let app = App::new(AppParts {
            public_url: PublicUrl::parse("http://127.0.0.1:5000").unwrap(),
            images,
            database,
            clock,
            random,
            authenticator: Arc::new(Nobody),
            realm: Arc::clone(&self.realm),
            compute: Compute {
                engine: Arc::clone(&engine),
                machines,
            },
            hosts,
        });
        Controller {
            app,
            engine,
            fleet,
            reconciler,
            wakes,
            doom,
            seat,
        }
    }

    /// Buries a controller that has died.
    fn bury(&mut self) {
        if self
            .controller
            .as_ref()
            .is_some_and(|controller| controller.doom.is_dead())
        {
            self.controller = None;
            self.network.drop_mail();
            self.note("the controller is dead");
        }
    }

    pub async fn run(&mut self) {
        self.network.set_loss(60);
        for n in 0..self.plan.events {
            self.event().await;
            self.bury();
            self.check_processes();
            self.check_guests();
            self.check_places().await;
            if n % 16 == 0 {
                self.check_records().await;
            }
        }
    }

    async fn event(&mut self) {
        self.clock
            .advance(Duration::from_millis(self.random.random_range(1..400)));
        let now = self.clock.now_us();
        for host in &self.hosts {
            host.set_now_us(now);
        }
        if self.migrates != Migrates::Never && self.random.random_bool(self.migrates.share()) {
            return self.migration_event().await;
        }
        if self.evacuates && self.random.random_bool(0.5) {
            return self.evacuation_event().await;
        }
        // As often in a bigger cloud, for each host and server.
        let per_event = 1 + self.plan.hosts / 30;
        match self.random.random_range(0..100) {
            0..16 => self.request().await,
            16..44 => {
                for _ in 0..per_event {
                    self.advance_one().await;
                }
            }
            44..66 => {
                for _ in 0..per_event * 2 {
                    self.step_a_host();
                }
            }
            66..80 => {
                for _ in 0..per_event * 2 {
                    self.deliver().await;
                }
            }
            80..86 => self.reconcile().await,
            86..89 => {
                for _ in 0..per_event {
                    self.heartbeat();
                }
            }
            89..92 => self.crash_or_start_controller().await,
            92..94 => self.kill_or_start_agent(),
            94..96 => self.freeze_or_thaw(),
            96 => self.reboot_host(),
            97 if self.random.random_bool(0.5) => {
                let full = self.random.random_bool(0.5);
                self.any_host().set_full(full);
            }
            97 => self.end_a_guest(),
            98 => {
                self.network.deliver_late();
            }
            _ => self
                .clock
                .advance(Duration::from_secs(self.random.random_range(1..4000))),
        }
    }

    async fn request(&mut self) {
        let Some(controller) = &self.controller else {
            return;
        };
        let app = controller.app.clone();
        let creating = self.servers.len() < self.plan.servers && self.random.random_bool(0.5);
        if creating {
            let id = self.ids.uuid();
            self.servers.push(id);
            let outcome = requests::create(&app, id).await.is_ok();
            return self.note(format!("create {id}: {outcome}"));
        }
        let Some(id) = self.servers.choose(&mut self.random).copied() else {
            return;
        };
        if self.migrates != Migrates::Only && self.random.random_bool(0.15) {
            let outcome = requests::image(&app, id).await;
            return self.note(format!("image of {id}: {:?}", outcome.ok()));
        }
        // Guests that are shelved do not migrate.
        let shelves = match self.migrates {
            Migrates::Never => 0.15,
            Migrates::Too => 0.05,
            Migrates::Only => 0.0,
        };
        if self.random.random_bool(shelves) {
            let outcome = requests::shelve_or_unshelve(&app, id).await;
            return self.note(format!("shelve or unshelve {id}: {:?}", outcome.ok()));
        }
        if self.random.random_bool(shelves) {
            let turn = self.random.random_bool(0.5);
            let outcome = requests::resize(&app, id, turn).await;
            return self.note(format!("resize {id} {turn}: {:?}", outcome.ok()));
        }
        if self.random.random_bool(0.12) {
            let outcome = requests::delete(&app, id).await.is_ok();
            return self.note(format!("delete {id}: {outcome}"));
        }
        // One that the server's state admits, if there is any: chosen blindly, nearly all are refused.
        let mut changes = Change::ALL.to_vec();
        if self.migrates == Migrates::Only {
            // None that begins a guest anew.
            changes = vec![Change::Pause, Change::Unpause];
        }
        changes.shuffle(&mut self.random);
        // And a hard reboot, admitted nearly always, would end all the others.
        let hard = self.random.random_bool(0.2);
        for change in changes {
            if change == Change::HardReboot && !hard {
                continue;
            }
            let outcome = requests::change(&app, id, change).await;
            if !matches!(outcome, Ok(false)) {
                return self.note(format!("{change:?} {id}: {:?}", outcome.ok()));
            }
        }
    }

    async fn advance_one(&mut self) {
        let Some(controller) = &self.controller else {
            return;
        };
        let engine = Arc::clone(&controller.engine);
        let subjects = self.open_subjects().await;
        let Some(subject) = subjects.choose(&mut self.random).cloned() else {
            return;
        };
        let advance = engine.advance(&subject).await;
        self.note(format!("advance {subject}: {advance:?}"));
    }

    pub async fn open_subjects(&self) -> Vec<String> {
        let open = self.open().await.into_iter();
        let subjects: BTreeSet<_> = open.map(|row| row.subject).collect();
        subjects.into_iter().collect()
    }

    /// What is under way.
    async fn open(&self) -> Vec<operation::row::Model> {
        let open = operation::unfinished(self.database().reader(), None).await;
        let open = open.unwrap().into_iter();
        open.filter(|row| row.parked.is_none()).collect()
    }

    pub(super) fn any_host(&mut self) -> Arc<SimulatedHost> {
        Arc::clone(self.hosts.choose(&mut self.random).unwrap())
    }

    fn step_a_host(&mut self) {
        let mut host = self.any_host();
        if host.machines().is_empty() {
            host = self.any_host();
        }
        if self.network.is_frozen(host.id()) {
            return;
        }
        if let Some(id) = host.machines().choose(&mut self.random).copied() {
            let stepped = host.step(id);
            self.note(format!("step {id}: {stepped}"));
        }
        if let Some(changes) = host.push() {
            self.network.post(host.id(), Mail::Changes(changes));
        }
    }

    pub(super) async fn deliver(&mut self) {
        if self.controller.is_none() {
            return self.network.drop_mail();
        }
        if let Some((host, mail)) = self.network.deliver() {
            self.receive(host, mail).await;
        }
    }

    /// What the listener does, without the network.
    async fn receive(&mut self, host: HostId, mail: Mail) {
        let now = self.clock.now_us();
        let Some(controller) = &self.controller else {
            return;
        };
        let fleet = &controller.fleet;
        let report_needed = match &mail {
            Mail::Heartbeat(heartbeat) => fleet.heartbeat(host, heartbeat, now),
            Mail::Changes(changes) => {
                let gap = fleet.changes(host, changes, now).is_err();
                if !gap {
                    controller
                        .reconciler
                        .heard(changes.machines.iter().map(|report| report.id));
                }
                gap
            }
            Mail::Report(full) => {
                let vanished = fleet.full_report(host, full, now);
                let owned = machine::of_host(self.test.database.reader(), host)
                    .await
                    .unwrap();
                let concerned: BTreeSet<ServerId> = full
                    .machines
                    .iter()
                    .map(|report| report.id)
                    .chain(vanished)
                    .chain(owned.iter().map(|machine| machine.server))
                    .collect();
                controller.reconciler.heard(concerned);
                false
            }
        };
        if report_needed
            && let Some(host) = self.network.hosts.host(host)
            && !host.agent_is_down()
            && !self.network.is_frozen(host.id())
        {
            self.network
                .post(host.id(), Mail::Report(host.full_report()));
        }
    }

    async fn reconcile(&mut self) {
        let Some(controller) = &mut self.controller else {
            return;
        };
        let mut woken = BTreeSet::new();
        while let Ok(server) = controller.wakes.try_recv() {
            woken.insert(server);
        }
        let reconciler = Arc::clone(&controller.reconciler);
        for server in woken {
            // Errors are tried again.
            let _ = reconciler.look(server).await;
        }
        if self.random.random_bool(0.2) && self.hosts.len() < 20 {
            reconciler.sweep().await;
        }
    }

    fn heartbeat(&mut self) {
        let host = self.any_host();
        if !self.network.is_frozen(host.id()) && !host.agent_is_down() {
            self.network
                .post(host.id(), Mail::Heartbeat(Box::new(beat(&host))));
        }
    }

    async fn crash_or_start_controller(&mut self) {
        match &self.controller {
            Some(controller) => {
                let effects = self.random.random_range(0..6);
                controller.doom.arm(effects);
                self.note(format!("the controller will die in {effects} effects"));
            }
            None => {
                self.start_controller().await;
                self.note("a controller starts");
            }
        }
    }

    fn kill_or_start_agent(&mut self) {
        let host = self.any_host();
        if host.is_off() {
            return;
        }
        if host.agent_is_down() {
            host.start_agent(self.ids.uuid());
        } else {
            host.kill_agent();
        }
        self.note(format!(
            "agent {}: down {}",
            host.id(),
            host.agent_is_down()
        ));
    }

    fn freeze_or_thaw(&mut self) {
        let host = self.any_host();
        if self.network.is_frozen(host.id()) {
            self.network.thaw(host.id());
        } else {
            self.network.freeze(host.id());
        }
        self.note(format!(
            "host {}: frozen {}",
            host.id(),
            self.network.is_frozen(host.id())
        ));
    }

    fn reboot_host(&mut self) {
        let host = self.any_host();
        self.guests.killed.extend(host.all_processes());
        host.reboot(self.ids.uuid());
        self.note(format!("host {} reboots", host.id()));
    }

    fn end_a_guest(&mut self) {
        let host = self.any_host();
        if let Some(id) = host.processes().choose(&mut self.random).copied() {
            self.guests.killed.insert(id);
            let reason = match self.random.next_u32() % 3 {
                0 => StopReason::GuestPowerOff,
                1 => StopReason::TripleFault {
                    detail: String::new(),
                },
                _ => StopReason::VmmFault {
                    detail: "killed".to_owned(),
                },
            };
            let ended = host.end_process(id, reason.clone());
            self.note(format!("guest {id}: {reason:?} {ended}"));
        }
    }

    /// Every host that can sends a full report, and it arrives.
    pub async fn everybody_reports(&mut self) {
        for host in self.hosts.clone() {
            if host.agent_is_down() || self.network.is_frozen(host.id()) {
                continue;
            }
            self.receive(host.id(), Mail::Heartbeat(Box::new(beat(&host))))
                .await;
            self.receive(host.id(), Mail::Report(host.full_report()))
                .await;
        }
    }

    /// Ends all faults and lets everything run until nothing is left to do: hosts without power last.
    pub async fn heal(&mut self) {
        self.network.set_loss(0);
        self.network.thaw_all();
        for host in self.hosts.clone() {
            if host.agent_is_down() && !host.is_off() {
                host.start_agent(self.ids.uuid());
            }
        }
        // What was late comes now, at the worst of times: after all is decided.
        let doomed = self.controller.as_ref().is_some_and(|c| c.doom.is_dead());
        let restarts = doomed || self.controller.is_none() || self.random.random_bool(0.3);
        if restarts && !self.keeps_controller {
            self.start_controller().await;
        } else if let Some(controller) = &self.controller {
            controller.doom.arm(u32::MAX);
        }
        while self.network.deliver_late() {}
        self.settle_down().await;
        if self.power_on().await {
            self.settle_down().await;
        }
    }

    /// Lets everything run until nothing is left to do.
    pub async fn settle_down(&mut self) {
        let mut quiet = 0;
        for _ in 0..400 {
            let before = self.fingerprint().await;
            self.round().await;
            self.check_processes();
            self.check_guests();
            self.check_places().await;
            quiet = if self.fingerprint().await == before {
                quiet + 1
            } else {
                0
            };
            if quiet == 2 {
                return;
            }
        }
        panic!(
            "seed {}: no rest after healing: {:?}",
            self.seed,
            self.open_subjects().await
        );
    }

    /// Everybody does everything once.
    pub async fn round(&mut self) {
        self.clock.advance(Duration::from_secs(11));
        self.hosts_work();
        self.everybody_reports().await;
        self.network.drop_mail();
        let Some(controller) = &self.controller else {
            return;
        };
        let (engine, reconciler) = (
            Arc::clone(&controller.engine),
            controller.reconciler.clone(),
        );
        for subject in self.open_subjects().await {
            while engine.advance(&subject).await == Advance::Advanced {}
        }
        reconciler.sweep().await;
    }

    /// Hosts do all that they can, and what they send each other arrives.
    pub fn hosts_work(&self) {
        let settle = || {
            for host in &self.hosts {
                if !self.network.is_frozen(host.id()) {
                    host.settle();
                }
            }
        };
        settle();
        for server in self.network.hosts.streams() {
            self.network.hosts.stream(server, stream::Event::End);
        }
        for server in self.network.hosts.debts() {
            self.network.hosts.pay(server);
        }
        settle();
    }

    /// What hosts and rows say of all machines.
    pub async fn fingerprint(&self) -> (BTreeMap<HostId, String>, Vec<String>, String) {
        // One that has just begun to wait for something that takes its time is not at rest.
        let open = self.open().await.into_iter();
        let open = open.map(|row| format!("{} {} at {}", row.subject, row.kind, row.step));
        let hosts = self.hosts.iter().map(|host| {
            let report = host.full_report();
            let machines: Vec<_> = report.machines.iter().map(|m| format!("{m:?}")).collect();
            (host.id(), machines.concat())
        });
        let mut rows = String::new();
        for host in &self.hosts {
            let machines = machine::of_host(self.database().reader(), host.id())
                .await
                .unwrap();
            rows.push_str(&format!("{machines:?}"));
        }
        (hosts.collect(), open.collect(), rows)
    }
}

fn beat(host: &SimulatedHost) -> Heartbeat {
    let (agent_instance, sequence) = host.pushes();
    Heartbeat {
        version: VERSION,
        agent_instance,
        sequence,
        endpoint: "https://simulated:1".to_owned(),
        host: host.host_report(),
    }
}
