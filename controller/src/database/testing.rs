//! For tests: the same test on both engines, each with a database of its own that is gone afterwards.
//!
//! The PostgreSQL server is started by the first test that wants one, as an unprivileged user, on a
//! unix socket in a folder of its own under /tmp, shared by all tests of the run (all children of one
//! nextest, or the threads of one `cargo test`), and ends with that run.

mod server;

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Database;

/// A database with the schema applied, for one test. Dropped with its file or its PostgreSQL database.
#[derive(Debug)]
pub struct TestDatabase {
    pub database: Database,
    /// `sqlite` or `postgres`, for messages.
    pub engine: &'static str,
    pub url: String,
    _folder: Option<Folder>,
}

/// Runs `test` on SQLite, then on PostgreSQL.
pub async fn engines<F, Fut>(test: F)
where
    F: Fn(Database) -> Fut,
    Fut: Future<Output = ()>,
{
    for database in [sqlite().await, postgres().await] {
        eprintln!("engine: {}", database.engine);
        test(database.database.clone()).await;
        database.database.close().await;
    }
}

/// An SQLite database in a file of its own.
pub async fn sqlite() -> TestDatabase {
    let folder = Folder::new();
    let url = format!("sqlite://{}/fractus.sqlite", folder.0.display());
    let database = open(&url).await;
    TestDatabase {
        database,
        engine: "sqlite",
        url,
        _folder: Some(folder),
    }
}

/// An SQLite database in a file in memory: syncs cost nothing.
pub async fn sqlite_in_memory() -> TestDatabase {
    let folder = in_memory();
    let url = format!("sqlite://{}/fractus.sqlite", folder.0.display());
    let database = open(&url).await;
    TestDatabase {
        database,
        engine: "sqlite",
        url,
        _folder: Some(folder),
    }
}

/// An SQLite database in memory that begins as a dump (schema and rows), brought to this build's schema.
pub async fn sqlite_from(dump: &str) -> TestDatabase {
    let empty = in_memory();
    let url = format!("sqlite://{}/fractus.sqlite", empty.0.display());
    let load = async {
        let mut options = sea_orm::ConnectOptions::new(format!("{url}?mode=rwc"));
        options.max_connections(1).sqlx_logging(false);
        let connection = sea_orm::Database::connect(options).await?;
        sea_orm::ConnectionTrait::execute_unprepared(&connection, dump).await?;
        connection.close().await
    };
    if let Err(error) = load.await {
        panic!("loading a dump: {error}");
    }
    let database = open(&url).await;
    TestDatabase {
        database,
        engine: "sqlite",
        url,
        _folder: Some(empty),
    }
}

fn in_memory() -> Folder {
    let shared = std::path::Path::new("/dev/shm");
    if shared.is_dir() {
        Folder::within(shared)
    } else {
        Folder::new()
    }
}

/// A PostgreSQL database of its own on the run's server.
pub async fn postgres() -> TestDatabase {
    let url = postgres_url().await;
    let database = open(&url).await;
    TestDatabase {
        database,
        engine: "postgres",
        url,
        _folder: None,
    }
}

/// The URL of a new, empty PostgreSQL database.
pub async fn postgres_url() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let server = server::shared();
    let name = format!(
        "test_{}_{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    server.create_database(&name).await;
    server.url(&name)
}

async fn open(url: &str) -> Database {
    let database = match Database::connect(url).await {
        Ok(database) => database,
        Err(error) => panic!("opening {url}: {error:?}"),
    };
    if let Err(error) = database.migrate().await {
        panic!("migrating {url}: {error:?}");
    }
    database
}

/// A temporary folder, removed on drop.
#[derive(Debug)]
struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    fn within(parent: &std::path::Path) -> Self {
        let path = parent.join(format!("fractus-test-{}", uuid::Uuid::new_v4()));
        if let Err(error) = std::fs::create_dir(&path) {
            panic!("making {}: {error}", path.display());
        }
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Left for the system's cleaner if it fails.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
