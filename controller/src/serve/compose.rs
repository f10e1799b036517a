//! The parts of a controller, made and put together in the order in which they need each other.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::tls::Credentials;
use sea_orm::DbErr;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use fractus_agent_api::machine::ServerId;

use super::{Config, ServeError, services};
use crate::agents::fleet::Fleet;
use crate::agents::host;
use crate::agents::http::HttpAgents;
use crate::agents::listener::{Blob, BlobSource, Listener, Parts};
use crate::clock::{Clock, SystemClock};
use crate::compute::ops;
use crate::compute::{self, Compute, ServerObserver};
use crate::database::Database;
use crate::hosts::Hosts;
use crate::http::{App, AppParts, Routes, Service};
use crate::identity::{Realm, boot};
use crate::image::blob::FileStore;
use crate::image::{Images, Sweep, store};
use crate::leader::{self, Lead, Me, Seat, Term, Turn};
use crate::operation::{Engine, Kinds};
use crate::random::{Random, SystemRandom};
use crate::reconcile::{Machines, Reconciler, machine};
use crate::secret::MasterKey;
use crate::tls::Authority;

/// How long before the end of its certificate a controller takes a new one is a matter of days:
/// this is much less.
const RENEWAL: Duration = Duration::from_secs(6 * 3600);

/// A controller that has not begun to answer.
pub struct Controller {
    pub app: App,
    engine: Arc<Engine>,
    reconciler: Arc<Reconciler>,
    wakes: mpsc::UnboundedReceiver<ServerId>,
    agents: AgentsSide,
    lead: Lead,
    /// Among the other controllers, where there may be others.
    seat: Option<Seat>,
}

/// What the network between controllers and agents needs.
struct AgentsSide {
    authority: Authority,
    http: Arc<HttpAgents>,
    fleet: Arc<Fleet>,
    name: String,
    addresses: Vec<String>,
    credentials: Credentials,
}

impl Controller {
    /// Opens the database, brings it up to date, makes what a new cloud needs.
    pub async fn compose(config: &Config) -> Result<Self, ServeError> {
        let database = Database::connect(&config.database).await?;
        database.migrate().await?;
        let (clock, random) = (SystemClock::shared(), SystemRandom::shared());
        if config.restored {
            restored(&database, clock.now_us()).await?;
        }
        let master = MasterKey::load_or_create(&config.state_dir.join("master.key"))?;
        let realm = Realm::open(database.clone(), Arc::clone(&clock), master.clone()).await?;
        let realm = Arc::new(realm);
        first_boot(config, &database, &realm, &clock, &random).await?;
        let images = images(config, &database, &*clock).await?;
        let agents = AgentsSide::open(config, &database, master.clone(), &clock, &random).await?;

        let (lead, seat) = lead(config, &database, &agents.fleet, &clock, &*random);
        let callers: Arc<dyn crate::agents::Agents> = Arc::clone(&agents.http) as _;
        let machines = Machines::new(
            database.clone(),
            callers,
            Arc::clone(&agents.fleet),
            Arc::clone(&clock),
        )
        .with_key(master)
        .with_cpu_mode(config.cpu_mode)
        .with_post_copy(config.post_copy)
        .with_auto_converge(config.auto_converge)
        .with_migration_connections(config.migration_connections)
        .with_migrations_per_host(config.migrations_per_host);
        let mut kinds = Kinds::default();
        compute::register(&mut kinds, &machines, &images, &clock, &random);
        let engine = Engine::new(lead.clone(), kinds, Arc::clone(&clock), Arc::clone(&random));
        let (reconciler, wakes) = Reconciler::new(
            lead.clone(),
            machines.clone(),
            Arc::clone(&engine),
            Arc::new(ServerObserver::new(Arc::clone(&clock))),
            Arc::clone(&clock),
            Arc::clone(&random),
        );
        let hosts = Hosts {
            fleet: Arc::clone(&agents.fleet),
            authority: agents.authority.clone(),
            agents_url: config.agents_url.clone(),
            since_us: clock.now_us(),
        };
        let app = App::new(AppParts {
            public_url: config.public_url.clone(),
            database,
            clock,
            random,
            authenticator: Arc::clone(&realm) as _,
            realm,
            images,
            compute: Compute {
                engine: Arc::clone(&engine),
                machines,
            },
            hosts,
        });
        Ok(Self {
            app,
            engine,
            reconciler,
            wakes,
            agents,
            lead,
            seat,
        })
    }

    /// Begins: agents are listened to, operations go on, the reconciler looks. Ends with `stop`.
    pub async fn begin(
        self,
        config: &Config,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<(), ServeError> {
        let Self {
            app,
            engine,
            reconciler,
            wakes,
            agents,
            lead,
            mut seat,
        } = self;
        if let Some(seat) = &mut seat {
            seat.beat().await.map_err(ServeError::Start)?;
        }
        let parts = Parts {
            database: app.database().clone(),
            authority: agents.authority.clone(),
            fleet: Arc::clone(&agents.fleet),
            reconciler: Arc::clone(&reconciler),
            blobs: Arc::new(ImageBlobs(app.images().clone())),
            clock: Arc::clone(app.clock()),
            random: Arc::clone(app.random()),
            lead: lead.clone(),
        };
        let listener = Listener::bind(config.agents_listen, &agents.credentials, parts).await?;
        let renewer = listener.renewer();
        tasks.spawn(listener.run(stop.clone()));
        let until = stop.clone();
        tasks.spawn(async move { reconciler.run(wakes, until).await });
        engine.start().await.map_err(ServeError::Start)?;
        let (until, hearing) = (stop.clone(), Arc::clone(&engine));
        tasks.spawn(async move { lead.listen(until, |subject| hearing.called(subject)).await });
        tasks.spawn(preside(seat, engine, stop.clone()));
        tasks.spawn(renew(agents, renewer, stop.clone()));
        Ok(())
    }
}

/// Whether there may be other controllers, and then a seat among them.
fn lead(
    config: &Config,
    database: &Database,
    fleet: &Arc<Fleet>,
    clock: &Arc<dyn Clock>,
    random: &dyn Random,
) -> (Lead, Option<Seat>) {
    if database.postgres().is_none() {
        return (Lead::alone(database.clone(), &config.agents_url), None);
    }
    let me = Me {
        name: config.name.clone(),
        incarnation: random.uuid(),
        agents_url: config.agents_url.clone(),
    };
    let (seat, lead) = Seat::new(database.clone(), Arc::clone(clock), Arc::clone(fleet), me);
    (lead, Some(seat))
}

/// Until `stop`: holds this controller's seat; then lets the steps under way end, and goes.
async fn preside(mut seat: Option<Seat>, engine: Arc<Engine>, stop: CancellationToken) {
    while let Some(seat) = &mut seat {
        tokio::select! {
            () = tokio::time::sleep(leader::BEAT) => {}
            () = stop.cancelled() => break,
        }
        let carried_on = match seat.beat().await {
            Ok(Turn::Begins(Term(term))) => {
                tracing::info!(term, "this controller leads");
                engine.carry_on().await
            }
            Ok(Turn::Leads | Turn::Follows) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = carried_on {
            tracing::error!(%error, "among the controllers");
        }
    }
    stop.cancelled().await;
    engine.stop().await;
    if let Some(seat) = seat
        && let Err(error) = seat.resign().await
    {
        tracing::warn!(%error, "the other controllers will wait before one of them leads");
    }
}

/// Before anything is told to a host: what it was told after the backup must not win.
async fn restored(database: &Database, now_us: i64) -> Result<(), ServeError> {
    database
        .write(move |tx| Box::pin(async move { ops::restored(tx, now_us).await }))
        .await
        .map_err(ServeError::Restored)?;
    tracing::warn!(
        "the database was restored: servers wait until their hosts say that they have them, and which hosts are off is to \
         be said anew"
    );
    Ok(())
}

async fn first_boot(
    config: &Config,
    database: &Database,
    realm: &Realm,
    clock: &Arc<dyn Clock>,
    random: &Arc<dyn Random>,
) -> Result<(), ServeError> {
    let file = config.state_dir.join("admin-password");
    let first = boot::first(database, realm, &**random, clock.now_us(), &file).await?;
    if first.is_some() {
        tracing::info!(file = %file.display(), "a new cloud; the admin's password is in the file");
    }
    let listed: Vec<Service> = services().iter().map(Routes::service).collect();
    boot::catalog(database, &**random, &config.public_url, &listed).await?;
    Ok(())
}

async fn images(
    config: &Config,
    database: &Database,
    clock: &dyn Clock,
) -> Result<Images, ServeError> {
    let folder = config.state_dir.join("images");
    let files = FileStore::open(folder, &config.name)
        .await
        .map_err(ServeError::Images)?;
    let images = Images::new(database.clone(), Arc::new(files)).within(config.image_limits);
    // Each controller has bytes of its own, and only one of them is started as the first after a restore.
    let epoch = machine::epoch(database.reader()).await;
    let epoch = epoch.map_err(ServeError::Restored)?.to_string();
    let file = config.state_dir.join(format!("epoch-{}", config.name));
    let swept = match tokio::fs::read_to_string(&file).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => "0".to_owned(),
        read => read.map_err(ServeError::Epoch)?,
    };
    let sweep = match swept.trim() == epoch {
        true => Sweep::Remove,
        false => Sweep::SetAside,
    };
    let recovered = images.recover(clock.now_us(), sweep).await;
    recovered.map_err(ServeError::Recover)?;
    if sweep == Sweep::SetAside {
        let written = tokio::fs::write(&file, epoch).await;
        written.map_err(ServeError::Epoch)?;
    }
    Ok(images)
}

impl AgentsSide {
    async fn open(
        config: &Config,
        database: &Database,
        master: MasterKey,
        clock: &Arc<dyn Clock>,
        random: &Arc<dyn Random>,
    ) -> Result<Self, ServeError> {
        let authority = Authority::open(
            database.clone(),
            master,
            Arc::clone(clock),
            Arc::clone(random),
        )
        .await?;
        let addresses = config.agents_addresses();
        let credentials = authority.certify_controller(&config.name, &addresses)?;
        let fleet = Arc::new(Fleet::default());
        for row in host::all(database.reader())
            .await
            .map_err(ServeError::Start)?
        {
            fleet.admit(row.host_id(), &row.endpoint);
        }
        let http = Arc::new(HttpAgents::new(Arc::clone(&fleet), credentials.clone()));
        Ok(Self {
            authority,
            http,
            fleet,
            name: config.name.clone(),
            addresses,
            credentials,
        })
    }
}

/// Takes a new certificate every few hours, and learns of new roots.
async fn renew<E: std::error::Error>(
    agents: AgentsSide,
    renewer: impl Fn(&Credentials) -> Result<(), E>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(RENEWAL) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = agents.authority.refresh().await {
            tracing::error!(%error, "the authority's roots could not be read");
        }
        match agents
            .authority
            .certify_controller(&agents.name, &agents.addresses)
        {
            Ok(credentials) => {
                agents.http.renew(credentials.clone());
                if let Err(error) = renewer(&credentials) {
                    tracing::error!(%error, "the agents listener keeps its old certificate");
                }
            }
            Err(error) => tracing::error!(%error, "no new certificate for this controller"),
        }
    }
}

/// The images, as agents fetch them.
struct ImageBlobs(Images);

#[async_trait]
impl BlobSource for ImageBlobs {
    async fn open(&self, image: Uuid, offset: u64) -> io::Result<Option<Blob>> {
        let found = store::find(self.0.database.reader(), &image.to_string()).await;
        let Some(found) = found.map_err(io::Error::other)? else {
            return Ok(None);
        };
        let (Some(key), Some(size)) = (&found.row.blob, found.row.size) else {
            return Ok(None);
        };
        let size = size.unsigned_abs();
        if offset > size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the image's end",
            ));
        }
        let bytes = self
            .0
            .blobs
            .open(key, offset..size)
            .await
            .map_err(io::Error::other)?;
        Ok(Some(Blob { size, bytes }))
    }
}

impl From<DbErr> for ServeError {
    fn from(error: DbErr) -> Self {
        Self::Start(error)
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::EntityTrait as _;

    use super::super::Options;
    use super::*;

    #[tokio::test]
    async fn only_a_start_with_a_restored_database_begins_a_new_epoch_and_keeps_what_no_row_names()
    {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let mut epochs = Vec::new();
        // Another controller, of the same folder, is started plainly after that.
        for (restored, name) in [(false, "a"), (true, "a"), (false, "b"), (false, "a")] {
            std::fs::write(images.join(format!("{name}.KEY")), b"disk").unwrap();
            let options = Options {
                state_dir: Some(folder.path().to_owned()),
                plain_http: true,
                name: Some(name.to_owned()),
                restored,
                ..Options::default()
            };
            let config = Config::resolve(options).unwrap();
            let controller = Controller::compose(&config).await.unwrap();
            let database = controller.app.database().clone();
            let settings = machine::setting::Entity::find()
                .all(database.reader())
                .await
                .unwrap();
            let epoch = settings.into_iter().find(|row| row.name == "epoch");
            epochs.push(epoch.map_or(0, |row| row.value.parse::<i64>().unwrap()));
            drop(controller);
            database.close().await;
            assert!(!images.join(format!("{name}.KEY")).exists());
            // The second of each name is of a start like any other.
            let kept = images.join(format!("unnamed-{name}.KEY"));
            assert_eq!(kept.exists(), epochs.len() > 1, "{name} {epochs:?}");
        }
        assert_eq!(epochs[0], 0);
        assert!(epochs[1] > 1_700_000_000, "{epochs:?}");
        assert_eq!(epochs[2..], [epochs[1], epochs[1]]);
    }
}
