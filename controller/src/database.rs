//! The database: connection, the one write function, migrations.
//!
//! SQLite in a file by default, PostgreSQL by a URL; the services' code, migrations and tests are the
//! same on both. Owns connections and transactions; entities and queries live with their service.
//!
//! **Reading** goes through [`Database::reader`]. **Writing** goes through [`Database::write`] and
//! nothing else: it takes a closure that is run in one transaction, and may be run again when the
//! transaction lost a race, so it must have no effect but on the database. When `write` returns `Ok`,
//! what was written is on disk.
//!
//! - SQLite: a single writer task runs the closures of many callers one after the other, each in a
//!   savepoint of its own, in one `BEGIN IMMEDIATE`, and syncs once for all of them (group commit,
//!   [`sqlite`]).
//! - PostgreSQL: a `SERIALIZABLE` transaction a closure, repeated a bounded number of times with
//!   jitter when it lost against another ([`postgres`]).
//!
//! What a closure must keep to:
//! - It returns on the first [`DbErr`]; on PostgreSQL a failed statement ends the transaction. Where a
//!   duplicate is expected, use `ON CONFLICT`.
//! - It is `Fn`: it clones what it moves into its future.
//! - It never calls [`Database::write`]: on SQLite it would wait for itself.
//!
//! Times are `i64` microseconds UTC in columns named `*_at_us`; ids are TEXT; only types that both
//! engines have.

pub mod migration;
mod postgres;
mod sqlite;
pub mod testing;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::future::BoxFuture;
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, RuntimeErr};

/// Handle to the database; cheap to clone.
#[derive(Clone)]
pub struct Database {
    engine: Engine,
    syncs: Arc<AtomicU64>,
    hook: Option<Arc<dyn WriteHook>>,
    fence: Option<Arc<dyn Fence>>,
}

#[derive(Clone)]
enum Engine {
    Sqlite(sqlite::Sqlite),
    Postgres(postgres::Postgres),
}

/// Why the database could not be opened or brought to this build's schema.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "the database URL must begin with sqlite:// (a path follows) or postgres://, not `{scheme}`"
    )]
    Url { scheme: String },
    #[error("opening the database {url}")]
    Connect {
        url: String,
        #[source]
        source: DbErr,
    },
    #[error(
        "the database has the schema change `{migration}` that this build does not know: it was \
         used by a newer release; run that one, or restore a backup taken before the upgrade"
    )]
    NewerSchema { migration: String },
    #[error("bringing the schema up to date; nothing of it was applied")]
    Migrate(#[source] DbErr),
}

/// Sees every write; the simulation kills and freezes the controller with it. An error from either call
/// is what the writer gets.
#[async_trait]
pub trait WriteHook: Send + Sync + 'static {
    /// Before anything is done: nothing will have been written.
    async fn before(&self) -> Result<(), DbErr>;
    /// After the commit: all has been written, and the writer is not told.
    async fn after(&self) -> Result<(), DbErr>;
}

/// Looked at in the transaction of each write, before anything is written: an error is what the writer
/// gets, and nothing is written.
#[async_trait]
pub trait Fence: Send + Sync + 'static {
    async fn check(&self, tx: &DatabaseTransaction) -> Result<(), DbErr>;
}

impl Database {
    /// Opens `sqlite:///absolute/path` (made when absent), `sqlite://relative/path` or
    /// `postgres://…` (a unix socket as `?host=/directory`).
    pub async fn connect(url: &str) -> Result<Self, OpenError> {
        let syncs = Arc::new(AtomicU64::new(0));
        let scheme = url.split(':').next().unwrap_or_default();
        let opened = match scheme {
            "sqlite" => sqlite::Sqlite::open(url, Arc::clone(&syncs))
                .await
                .map(Engine::Sqlite),
            "postgres" | "postgresql" => postgres::Postgres::open(url, Arc::clone(&syncs))
                .await
                .map(Engine::Postgres),
            other => {
                return Err(OpenError::Url {
                    scheme: other.to_owned(),
                });
            }
        };
        let engine = opened.map_err(|source| OpenError::Connect {
            url: without_password(url),
            source,
        })?;
        Ok(Self {
            engine,
            syncs,
            hook: None,
            fence: None,
        })
    }

    /// Applies the schema changes that are missing, all or none. Refuses a database that a newer
    /// release has changed.
    pub async fn migrate(&self) -> Result<(), OpenError> {
        match &self.engine {
            Engine::Sqlite(sqlite) => migration::apply(sqlite.writer()).await,
            Engine::Postgres(postgres) => migration::apply(postgres.connection()).await,
        }
    }

    /// Connections for reading. They see every write that has returned.
    pub fn reader(&self) -> &DatabaseConnection {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.reader(),
            Engine::Postgres(postgres) => postgres.connection(),
        }
    }

    /// Runs `body` in a transaction and commits what it did if it answers `Ok`. See the module's
    /// documentation for what a body must keep to.
    ///
    /// ```ignore
    /// db.write(move |tx| {
    ///     let row = row.clone();
    ///     Box::pin(async move { row.insert(tx).await?; Ok::<_, StoreError>(()) })
    /// })
    /// .await?;
    /// ```
    pub async fn write<T, E, F>(&self, body: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, E>>
            + Send
            + Sync
            + 'static,
        E: From<DbErr> + Send + 'static,
        T: Send + 'static,
    {
        if let Some(hook) = &self.hook {
            hook.before().await?;
        }
        let written = match &self.fence {
            None => self.write_unfenced(body).await,
            Some(fence) => {
                let (fence, body) = (Arc::clone(fence), Arc::new(body));
                self.write_unfenced(move |tx| {
                    let (fence, body) = (Arc::clone(&fence), Arc::clone(&body));
                    Box::pin(async move {
                        fence.check(tx).await?;
                        body(tx).await
                    })
                })
                .await
            }
        };
        if let Some(hook) = &self.hook {
            hook.after().await?;
        }
        written
    }

    async fn write_unfenced<T, E, F>(&self, body: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, E>>
            + Send
            + Sync
            + 'static,
        E: From<DbErr> + Send + 'static,
        T: Send + 'static,
    {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.write(body).await,
            Engine::Postgres(postgres) => postgres.write(body).await,
        }
    }

    /// How often this process has made a transaction durable: one sync to disk each (SQLite; the
    /// write-ahead log's checkpoints come on top, about one in a thousand pages).
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// The same database with `hook` called around each write.
    pub fn hooked(&self, hook: Arc<dyn WriteHook>) -> Self {
        Self {
            hook: Some(hook),
            ..self.clone()
        }
    }

    /// The same database, each of whose writes `fence` must let through.
    pub fn fenced(&self, fence: Arc<dyn Fence>) -> Self {
        Self {
            fence: Some(fence),
            ..self.clone()
        }
    }

    /// PostgreSQL's connections, for what SQLite has no need of.
    pub fn postgres(&self) -> Option<&DatabaseConnection> {
        match &self.engine {
            Engine::Sqlite(_) => None,
            Engine::Postgres(postgres) => Some(postgres.connection()),
        }
    }

    /// Ends the connections; writes under way are finished first.
    pub async fn close(self) {
        match self.engine {
            Engine::Sqlite(sqlite) => sqlite.close().await,
            Engine::Postgres(postgres) => postgres.close().await,
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engine = match &self.engine {
            Engine::Sqlite(_) => "SQLite",
            Engine::Postgres(_) => "PostgreSQL",
        };
        f.debug_struct("Database")
            .field("engine", &engine)
            .finish_non_exhaustive()
    }
}

/// What is said of a write for which there was no room, by [`is_full`]'s mark.
const FULL: &str = "the database has no room left";

/// Whether a write failed because the disk, or what bounds the database, is full.
pub fn is_full(error: &DbErr) -> bool {
    let source = match error {
        DbErr::Exec(RuntimeErr::SqlxError(source))
        | DbErr::Query(RuntimeErr::SqlxError(source))
        | DbErr::Conn(RuntimeErr::SqlxError(source)) => source,
        DbErr::Custom(said) => return said == FULL,
        _ => return false,
    };
    let code = source.as_database_error().and_then(|error| error.code());
    // SQLITE_FULL; PostgreSQL's disk_full.
    code.is_some_and(|code| ["13", "53100"].contains(&&*code))
}

/// What is said of a write that a fence refused, by [`is_fenced_off`]'s mark.
const FENCED_OFF: &str = "another controller leads: this write was refused";

/// The error of a fence that lets nothing through any more.
pub fn fenced_off() -> DbErr {
    DbErr::Custom(FENCED_OFF.to_owned())
}

/// Whether a write was refused by its fence.
pub fn is_fenced_off(error: &DbErr) -> bool {
    matches!(error, DbErr::Custom(said) if said == FENCED_OFF)
}

/// Counts one transaction made durable.
fn count_sync(syncs: &AtomicU64) {
    syncs.fetch_add(1, Ordering::Relaxed);
    metrics::counter!("fractus_database_syncs_total").increment(1);
}

/// Runs a closure's future; a panic in it is an error of this write and not the end of the writer.
async fn caught<T, E: From<DbErr>>(
    body: impl Future<Output = Result<T, E>> + Send,
) -> Result<T, E> {
    use futures::FutureExt;
    match std::panic::AssertUnwindSafe(body).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(_) => Err(DbErr::Custom("a write panicked and was rolled back".to_owned()).into()),
    }
}

/// The URL for messages.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let authority_end = rest.find('/').unwrap_or(rest.len());
    match rest[..authority_end].rfind('@') {
        Some(at) => format!("{scheme}://…{}", &rest[at..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests;
