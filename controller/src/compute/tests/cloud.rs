//! A whole cloud with one simulated host, in process.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use fractus_agent_api::VERSION;
use fractus_agent_api::host::{Heartbeat, HostId};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use sea_orm::DbErr;
use sea_orm::prelude::Uuid;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agents::fleet::Fleet;
use crate::agents::host;
use crate::agents::simulated::{SimulatedAgents, SimulatedHost};
use crate::clock::SystemClock;
use crate::compute::ServerObserver;
use crate::compute::testing::with;
use crate::database::testing::TestDatabase;
use crate::database::{Database, WriteHook};
use crate::http::{
    App, AppParts, Authenticate, Domain, Identity, Project, Public, PublicUrl, Refused, Role,
};
use crate::identity::Realm;
use crate::image::blob::FileStore;
use crate::image::model::Image;
use crate::image::{Images, store as images};
use crate::random::SystemRandom;
use crate::reconcile::Reconciler;
use crate::secret::MasterKey;

/// Longer than anything takes, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(30);

/// The users and projects of the tokens.
const ROOT: &str = "00000000000000000000000000000001";
pub const USER: &str = "00000000000000000000000000000002";
const OTHER: &str = "00000000000000000000000000000003";
const ADMINS: &str = "0000000000000000000000000000000a";
pub const ONE: &str = "0000000000000000000000000000001a";
pub const TWO: &str = "0000000000000000000000000000002a";

#[derive(Debug)]
struct Tokens(HashMap<&'static str, Arc<Identity>>);

#[async_trait::async_trait]
impl Authenticate for Tokens {
    async fn authenticate(&self, token: &str) -> Result<Arc<Identity>, Refused> {
        self.0.get(token).cloned().ok_or(Refused::Invalid)
    }
}

fn identity(user: &str, project: &str, role: &str) -> Arc<Identity> {
    let domain = Domain {
        id: "default".into(),
        name: "Default".into(),
    };
    Arc::new(Identity {
        user_id: user.into(),
        user_name: user.into(),
        user_domain: domain.clone(),
        project: Some(Project {
            id: project.into(),
            name: project.into(),
            domain,
        }),
        domain: None,
        system: false,
        roles: vec![Role {
            id: role.into(),
            name: role.into(),
        }],
        methods: vec!["password".into()],
        audit_ids: vec!["a".into()],
        issued_at_us: 0,
        expires_at_us: i64::MAX,
    })
}

/// Tells of every write.
struct Written(watch::Sender<u64>);

#[async_trait::async_trait]
impl WriteHook for Written {
    async fn before(&self) -> Result<(), DbErr> {
        Ok(())
    }

    async fn after(&self) -> Result<(), DbErr> {
        self.0.send_modify(|count| *count += 1);
        Ok(())
    }
}

/// A cloud with one simulated host. Tokens: `admin` (project admins), `one` and `reader` (project
/// one), `two` (project two).
pub struct Cloud {
    pub public: Public,
    pub app: App,
    pub host: Arc<SimulatedHost>,
    pub agents: Arc<SimulatedAgents>,
    pub fleet: Arc<Fleet>,
    pub reconciler: Arc<Reconciler>,
    /// While true, the host takes intents and does nothing.
    pub frozen: watch::Sender<bool>,
    written: watch::Receiver<u64>,
    stop: CancellationToken,
    _database: TestDatabase,
    _blobs: tempfile::TempDir,
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: http::HeaderMap,
    pub json: Value,
}

impl Answer {
    /// The message of an error's body.
    pub fn message(&self) -> &str {
        let inner = self.json.as_object().and_then(|map| map.values().next());
        inner
            .and_then(|inner| inner["message"].as_str())
            .unwrap_or_default()
    }
}

impl Cloud {
    pub async fn new() -> Self {
        let database = crate::database::testing::database().await;
        let (sender, written) = watch::channel(0);
        let hooked = database.database.hooked(Arc::new(Written(sender)));
        let blobs = tempfile::tempdir().unwrap();
        let store = FileStore::open(blobs.path(), "c").await.unwrap();
        let fleet = Arc::new(Fleet::default());
        let agents = Arc::new(SimulatedAgents::default());
        let images = Images::new(hooked.clone(), Arc::new(store));
        let compute = with(&hooked, &images, Arc::clone(&agents), Arc::clone(&fleet));
        let key = MasterKey::ephemeral().unwrap();
        let realm = Realm::open(hooked.clone(), SystemClock::shared(), key)
            .await
            .unwrap();
        let app = App::new(AppParts {
            realm: Arc::new(realm),
            public_url: PublicUrl::parse("http://cloud:5000").unwrap(),
            database: hooked.clone(),
            clock: SystemClock::shared(),
            random: SystemRandom::shared(),
            authenticator: Arc::new(Tokens(HashMap::from([
                ("admin", identity(ROOT, ADMINS, "admin")),
                ("one", identity(USER, ONE, "member")),
                ("reader", identity(USER, ONE, "reader")),
                ("two", identity(OTHER, TWO, "member")),
            ]))),
            images,
            compute: compute.clone(),
            hosts: crate::hosts::Hosts::idle(&hooked).await.unwrap(),
        });
        let (frozen, freeze) = watch::channel(false);
        let stop = CancellationToken::new();
        let (reconciler, wakes) = Reconciler::new(
            hooked.clone(),
            compute.machines.clone(),
            Arc::clone(&compute.engine),
            Arc::new(ServerObserver::new(SystemClock::shared())),
            SystemClock::shared(),
            SystemRandom::shared(),
        );
        let (looking, ended) = (Arc::clone(&reconciler), stop.clone());
        tokio::spawn(async move { looking.run(wakes, ended).await });
        let joined = (&hooked, &agents, &fleet, &reconciler);
        let host = join_host(1, joined, freeze, &stop).await;
        compute.engine.start().await.unwrap();
        let public = Public::new(
            app.clone(),
            vec![
                crate::compute::routes(),
                crate::machines::routes(crate::hosts::routes()),
            ],
        );
        let cloud = Self {
            public,
            app,
            host,
            agents,
            fleet,
            reconciler,
            frozen,
            written,
            stop,
            _database: database,
            _blobs: blobs,
        };
        cloud.furnish().await;
        cloud
    }

    /// Another host joins, `host-N`.
    pub async fn join(&self, n: u128) -> Arc<SimulatedHost> {
        let database = self.app.database();
        let joined = (database, &self.agents, &self.fleet, &self.reconciler);
        join_host(n, joined, self.frozen.subscribe(), &self.stop).await
    }

    /// The id of `host-N`.
    pub fn other(&self, n: u128) -> HostId {
        HostId(host_uuid(n))
    }

    /// One host goes on for once, where all are frozen.
    pub fn pump(&self, host: &SimulatedHost) {
        let endpoint = self.fleet.endpoint(host.id()).unwrap_or_default();
        pump(host, &endpoint, &self.fleet, &self.reconciler);
    }

    /// The host has been silent for a minute.
    pub async fn was_heard_last_minute(&self, host: &SimulatedHost) {
        use sea_orm::{ActiveModelTrait, Set};
        let then = crate::clock::Clock::now_us(&SystemClock) - 60_000_000;
        let id = host.id();
        let write = self.app.database().write(move |tx| {
            Box::pin(async move {
                let heard = host::row::ActiveModel {
                    id: Set(id.to_string()),
                    heard_at_us: Set(then),
                    ..Default::default()
                };
                heard.update(tx).await.map(|_| ())
            })
        });
        write.await.unwrap();
        self.fleet.last_heard(id, then);
    }

    /// The reconciler looks at a server.
    pub async fn look(&self, id: &str) {
        self.reconciler.look(super::machine(id)).await.unwrap();
    }

    /// Nobody carries on what is asked for from now on.
    pub async fn still(&self) {
        self.stop.cancel();
        self.app.compute().engine.stop().await;
    }

    /// A flavor `1`, a kernel and a disk image that boots it.
    async fn furnish(&self) {
        let flavor =
            json!({"flavor": {"name": "tiny", "id": "1", "ram": 256, "vcpus": 1, "disk": 1}});
        let made = self
            .call("admin", Method::POST, "/v2.1/flavors", "", flavor)
            .await;
        assert_eq!(made.status, StatusCode::OK, "{}", made.json);
        self.image(KERNEL, "aki", &[]).await;
        self.image(
            DISK,
            "raw",
            &[
                ("kernel_id", KERNEL),
                ("os_command_line", "console=ttyS0 x=1"),
            ],
        )
        .await;
    }

    /// A public image that has bytes.
    pub async fn image(&self, id: &str, format: &str, properties: &[(&str, &str)]) {
        self.image_of(id, format, properties, 1 << 20).await;
    }

    /// The same, of a virtual size in bytes.
    pub async fn image_of(
        &self,
        id: &str,
        format: &str,
        properties: &[(&str, &str)],
        virtual_size: i64,
    ) {
        let row = crate::image::store::image::Model {
            id: id.to_owned(),
            name: Some(format.to_owned()),
            status: "active".to_owned(),
            visibility: "public".to_owned(),
            disk_format: Some(format.to_owned()),
            container_format: Some(if format == "aki" { "aki" } else { "bare" }.to_owned()),
            size: Some(1 << 20),
            virtual_size: Some(virtual_size),
            checksum: None,
            os_hash_value: None,
            blake3: Some("0".repeat(64)),
            content_format: Some("raw".to_owned()),
            protected: false,
            os_hidden: false,
            min_ram: 0,
            min_disk: 0,
            owner: ADMINS.to_owned(),
            blob: None,
            created_at_us: 1,
            updated_at_us: 1,
            deleted_at_us: None,
        };
        let properties = properties.iter();
        let properties = properties
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let image = Image {
            row,
            properties,
            tags: Vec::new(),
        };
        images::insert(self.app.database(), image).await.unwrap();
    }

    /// A request to compute, at `2.VERSION` (empty: without the header), or to `/fractus`.
    pub async fn call(
        &self,
        who: &str,
        method: Method,
        path: &str,
        version: &str,
        body: Value,
    ) -> Answer {
        let path = match path.starts_with("/fractus") {
            true => path.to_owned(),
            false => format!("/compute{path}"),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-auth-token", who)
            .header("accept", "application/json");
        if !version.is_empty() {
            request = request.header("openstack-api-version", format!("compute {version}"));
        }
        let body = if body == Value::Null {
            Body::empty()
        } else {
            Body::from(body.to_string())
        };
        let answer = self.public.serve(request.body(body).unwrap()).await;
        let (parts, body) = answer.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let json = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Answer {
            status: parts.status,
            headers: parts.headers,
            json,
        }
    }

    pub async fn get(&self, who: &str, path: &str, version: &str) -> Answer {
        self.call(who, Method::GET, path, version, Value::Null)
            .await
    }

    /// Creates a server at 2.96 and answers its id.
    pub async fn create(&self, who: &str, name: &str) -> String {
        let body = json!({"server": {
            "name": name, "imageRef": DISK, "flavorRef": "1", "networks": "none",
        }});
        let made = self
            .call(who, Method::POST, "/v2.1/servers", "2.96", body)
            .await;
        assert_eq!(made.status, StatusCode::ACCEPTED, "{}", made.json);
        made.json["server"]["id"].as_str().unwrap().to_owned()
    }

    /// A server that runs.
    pub async fn running(&self, who: &str, name: &str) -> String {
        let id = self.create(who, name).await;
        self.until(who, &id, |server| server["status"] == "ACTIVE")
            .await;
        id
    }

    pub async fn act(&self, who: &str, id: &str, version: &str, body: Value) -> Answer {
        let path = format!("/v2.1/servers/{id}/action");
        self.call(who, Method::POST, &path, version, body).await
    }

    /// The server's newest migration as `os-migrations` shows it, once it has this status.
    pub async fn until_migration(&self, server: &str, wanted: &str) -> Value {
        let mut written = self.written.clone();
        let mut last = Value::Null;
        let path = format!("/v2.1/os-migrations?instance_uuid={server}&limit=1");
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                written.mark_unchanged();
                let answer = self.get("admin", &path, "2.96").await;
                last = answer.json["migrations"][0].clone();
                if last["status"] == wanted {
                    return;
                }
                written.changed().await.unwrap();
            }
        })
        .await;
        assert!(waited.is_ok(), "the migration stays {last}");
        last
    }

    /// The server at rest, once `agreed` agrees to it; asked again after every write.
    pub async fn until(&self, who: &str, id: &str, agreed: impl Fn(&Value) -> bool) -> Value {
        let settled = |server: &Value| server["OS-EXT-STS:task_state"].is_null();
        self.until_is(who, id, |server| settled(server) && agreed(server))
            .await
    }

    /// The same, whatever is done to it.
    pub async fn until_is(&self, who: &str, id: &str, agreed: impl Fn(&Value) -> bool) -> Value {
        let mut written = self.written.clone();
        let mut last = Value::Null;
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                written.mark_unchanged();
                let answer = self.get(who, &format!("/v2.1/servers/{id}"), "2.96").await;
                last = answer.json["server"].clone();
                if answer.status == StatusCode::OK && agreed(&last) {
                    return;
                }
                written.changed().await.unwrap();
            }
        })
        .await;
        assert!(waited.is_ok(), "the server stays {last}");
        last
    }

    /// What the host was last told of the machine, once `agreed` agrees to it.
    pub async fn until_told(
        &self,
        id: &str,
        agreed: impl Fn(&fractus_agent_api::machine::MachineSpec) -> bool,
    ) -> fractus_agent_api::machine::MachineSpec {
        let mut written = self.written.clone();
        let id = super::machine(id);
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                written.mark_unchanged();
                if let Some(wanted) = self.host.wanted(id)
                    && agreed(&wanted.spec)
                {
                    return wanted.spec;
                }
                written.changed().await.unwrap();
            }
        });
        waited.await.unwrap()
    }

    /// Until the host was told this; for one that is frozen, and writes nothing then.
    pub async fn until_takes(&self, id: &str, power: fractus_agent_api::machine::Power) {
        let id = super::machine(id);
        let waited = tokio::time::timeout(PATIENCE, async {
            while self
                .host
                .wanted(id)
                .is_none_or(|wanted| wanted.power != power)
            {
                // sleeps because the host tells nobody what it takes.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        assert!(waited.await.is_ok(), "the host is not told {power:?}");
    }

    /// Until the server is gone for its user.
    pub async fn until_gone(&self, who: &str, id: &str) {
        let mut written = self.written.clone();
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                written.mark_unchanged();
                let answer = self.get(who, &format!("/v2.1/servers/{id}"), "").await;
                if answer.status == StatusCode::NOT_FOUND {
                    return;
                }
                written.changed().await.unwrap();
            }
        })
        .await;
        assert!(waited.is_ok(), "server {id} is still there");
    }
}

/// A kernel.
pub const KERNEL: &str = "0a11ce00-0000-4000-8000-000000000001";
/// A disk that boots it.
pub const DISK: &str = "0a11ce00-0000-4000-8000-000000000002";

/// One simulated host: what it takes, it does at once, and what it does, it reports.
async fn join_host(
    n: u128,
    (database, agents, fleet, reconciler): (
        &Database,
        &Arc<SimulatedAgents>,
        &Arc<Fleet>,
        &Arc<Reconciler>,
    ),
    mut frozen: watch::Receiver<bool>,
    stop: &CancellationToken,
) -> Arc<SimulatedHost> {
    let id = HostId(host_uuid(n));
    let inventory = SimulatedHost::inventory(&format!("host-{n}"), 64, 1 << 20);
    let endpoint = format!("https://10.0.0.{n}:9001");
    let (report, at) = (inventory.clone(), endpoint.clone());
    let now = crate::clock::Clock::now_us(&SystemClock);
    database
        .write(move |tx| {
            let (report, at) = (report.clone(), at.clone());
            Box::pin(async move { host::insert(tx, id, &at, &report, now).await })
        })
        .await
        .unwrap();
    fleet.admit(id, &endpoint);
    let (changed, mut changes) = tokio::sync::mpsc::unbounded_channel();
    let host = SimulatedHost::new(id, inventory, Uuid::from_u128(6 + n), move |_| {
        let _ = changed.send(());
    });
    let host = Arc::new(host);
    agents.add(Arc::clone(&host));
    fleet.full_report(id, &host.full_report(), now);
    let (pumped, fleet, ended) = (Arc::clone(&host), Arc::clone(fleet), stop.clone());
    let reconciler = Arc::clone(reconciler);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = ended.cancelled() => return,
                heard = changes.recv() => if heard.is_none() { return },
                _ = frozen.changed() => {}
            }
            if *frozen.borrow_and_update() {
                continue;
            }
            if !pumped.is_off() {
                pump(&pumped, &endpoint, &fleet, &reconciler);
            }
        }
    });
    host
}

fn host_uuid(n: u128) -> Uuid {
    Uuid::from_u128(0xfeed_0000_0000_4000_8000_0000_0000_0000 + n)
}

/// The host does what it is to do, and says so.
fn pump(host: &SimulatedHost, endpoint: &str, fleet: &Fleet, reconciler: &Reconciler) {
    host.settle();
    let now = crate::clock::Clock::now_us(&SystemClock);
    let (agent_instance, sequence) = host.pushes();
    let beat = Heartbeat {
        version: VERSION,
        agent_instance,
        sequence,
        endpoint: endpoint.to_owned(),
        host: host.host_report(),
    };
    if fleet.heartbeat(host.id(), &beat, now) {
        fleet.full_report(host.id(), &host.full_report(), now);
    }
    if let Some(push) = host.push() {
        let servers: Vec<_> = push.machines.iter().map(|report| report.id).collect();
        if fleet.changes(host.id(), &push, now).is_err() {
            fleet.full_report(host.id(), &host.full_report(), now);
        }
        reconciler.heard(servers);
    }
}
