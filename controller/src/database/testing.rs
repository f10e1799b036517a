//! For tests: a database of its own for each, on either engine.
//!
//! A test that asks for [`database`] runs on the engine that the environment variable
//! `FRACTUS_TEST_DATABASE` names: `sqlite` (the default) or `postgres`. `scripts/test` runs them all
//! twice, once on each. So one engine's failures stand beside each other in one report, no test is
//! written twice, and whoever works on one test waits for one engine. A test of the database itself
//! asks for both at once ([`engines`]).
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

impl TestDatabase {
    /// The URL of a copy, as a backup would be; it goes with the original.
    pub async fn copy(&self) -> String {
        if self.engine == "postgres" {
            let server = server::shared();
            let copy = unused_name();
            // postgres://USER@HOST/NAME?host=FOLDER
            let before_query = self.url.split('?').next().unwrap_or_default();
            let original = before_query.rsplit('/').next().unwrap_or_default();
            server.copy_database(original, &copy).await;
            return server.url(&copy);
        }
        let url = format!("{}.copy", self.url);
        let sql = format!("VACUUM INTO '{}'", url.trim_start_matches("sqlite://"));
        let copied =
            sea_orm::ConnectionTrait::execute_unprepared(self.database.reader(), &sql).await;
        if let Err(error) = copied {
            panic!("copying {}: {error}", self.url);
        }
        url
    }
}

/// Whether this run's tests are to use PostgreSQL.
pub fn on_postgres() -> bool {
    match std::env::var("FRACTUS_TEST_DATABASE").as_deref() {
        Ok("postgres") => true,
        Ok("sqlite" | "") | Err(_) => false,
        Ok(other) => panic!("FRACTUS_TEST_DATABASE={other}: it is sqlite or postgres"),
    }
}

/// A database of the run's engine.
pub async fn database() -> TestDatabase {
    if on_postgres() {
        postgres().await
    } else {
        sqlite().await
    }
}

/// As [`database`], for a test that writes very often: syncs cost nothing.
pub async fn database_in_memory() -> TestDatabase {
    if on_postgres() {
        postgres().await
    } else {
        sqlite_in_memory().await
    }
}

/// Runs `test` on SQLite, then on PostgreSQL; in a run on PostgreSQL, only there.
pub async fn engines<F, Fut>(test: F)
where
    F: Fn(Database) -> Fut,
    Fut: Future<Output = ()>,
{
    let others = if on_postgres() {
        None
    } else {
        Some(sqlite().await)
    };
    for database in others.into_iter().chain([postgres().await]) {
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

/// A PostgreSQL database that begins as such a dump: with the schema changes that it names and its rows,
/// brought to this build's schema.
pub async fn postgres_from(dump: &str) -> TestDatabase {
    const APPLIED: &str = "INSERT INTO \"seaql_migrations\"";
    let url = postgres_url().await;
    let (applied, rows): (Vec<&str>, Vec<&str>) = dump
        .split_inclusive('\n')
        .skip_while(|line| !line.starts_with("INSERT INTO"))
        .partition(|line| line.starts_with(APPLIED));
    let load = async {
        let mut options = sea_orm::ConnectOptions::new(&url);
        options.max_connections(1).sqlx_logging(false);
        let connection = sea_orm::Database::connect(options).await?;
        super::migration::apply_first(&connection, applied.len()).await?;
        // SQLite's booleans are numbers.
        let cast = "UPDATE pg_cast SET castcontext = 'a' WHERE castsource = 'integer'::regtype \
                    AND casttarget = 'boolean'::regtype";
        for sql in [cast, &rows.concat()] {
            sea_orm::ConnectionTrait::execute_unprepared(&connection, sql).await?;
        }
        connection.close().await
    };
    if let Err(error) = load.await {
        panic!("loading a dump: {error}");
    }
    TestDatabase {
        database: open(&url).await,
        engine: "postgres",
        url,
        _folder: None,
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

/// A PostgreSQL database of its own on the run's server, which goes with that server: a copy of one
/// to which the schema was applied once.
pub async fn postgres() -> TestDatabase {
    let server = server::shared();
    if let Some(template) = server.begin_template() {
        server.create_database(TEMPLATE, None).await;
        open(&server.url(TEMPLATE)).await.close().await;
        template.finish();
    }
    let name = unused_name();
    server.create_database(&name, Some(TEMPLATE)).await;
    let url = server.url(&name);
    let database = match Database::connect(&url).await {
        Ok(database) => database,
        Err(error) => panic!("opening {url}: {error:?}"),
    };
    TestDatabase {
        database,
        engine: "postgres",
        url,
        _folder: None,
    }
}

const TEMPLATE: &str = "with_schema";

fn unused_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "test_{}_{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// The URL of a new, empty PostgreSQL database.
pub async fn postgres_url() -> String {
    let server = server::shared();
    let name = unused_name();
    server.create_database(&name, None).await;
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
