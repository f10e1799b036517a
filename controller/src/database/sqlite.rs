//! SQLite: one writer with group commit, several readers.
//!
//! The writer task owns the one writing connection. It takes every write that waits, runs each in a
//! savepoint inside one `BEGIN IMMEDIATE`, commits (one sync, `synchronous=FULL`), and only then
//! answers all of them. Nothing is answered before it is on disk, and no write sees half of another.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use futures::future::BoxFuture;
use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnectOptions, DatabaseConnection, DatabaseTransaction, DbErr, RuntimeErr,
    SqliteTransactionMode, TransactionOptions, TransactionTrait,
};
use tokio::sync::{mpsc, oneshot};

/// Writes that may wait for the writer; more of them wait to be queued.
const QUEUE: usize = 1024;
/// Writes that share one commit at most, so that the first of them is not kept waiting long.
const GROUP: usize = 128;
const READERS: u32 = 8;

#[derive(Clone)]
pub(super) struct Sqlite {
    jobs: mpsc::Sender<Box<dyn Job>>,
    writer: DatabaseConnection,
    reader: DatabaseConnection,
}

impl Sqlite {
    pub(super) async fn open(url: &str, syncs: Arc<AtomicU64>) -> Result<Self, DbErr> {
        let writer = connect(url, 1).await?;
        let reader = connect(url, READERS).await?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        tokio::spawn(run_writer(writer.clone(), queue, syncs));
        Ok(Self {
            jobs,
            writer,
            reader,
        })
    }

    pub(super) fn writer(&self) -> &DatabaseConnection {
        &self.writer
    }

    pub(super) fn reader(&self) -> &DatabaseConnection {
        &self.reader
    }

    pub(super) async fn write<T, E, F>(&self, body: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, E>>
            + Send
            + Sync
            + 'static,
        E: From<DbErr> + Send + 'static,
        T: Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job = Box::new(Write {
            body,
            outcome: None,
            answer,
        });
        self.jobs.send(job).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }

    pub(super) async fn close(self) {
        let Self {
            jobs,
            writer,
            reader,
        } = self;
        drop(jobs);
        // Errors here have nobody to tell: what was answered is on disk already.
        let _ = reader.close().await;
        let _ = writer.close().await;
    }
}

fn closed() -> DbErr {
    DbErr::Conn(RuntimeErr::Internal(
        "the database has been closed".to_owned(),
    ))
}

async fn connect(url: &str, connections: u32) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(url);
    options
        .min_connections(1)
        .max_connections(connections)
        .acquire_timeout(Duration::from_secs(30))
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .sqlx_logging(false)
        .map_sqlx_sqlite_opts(|options| {
            options
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .foreign_keys(true)
                // Only another process (a backup) can hold the lock.
                .busy_timeout(Duration::from_secs(10))
                .pragma("temp_store", "memory")
                // As PostgreSQL has it.
                .pragma("case_sensitive_like", "on")
        });
    sea_orm::Database::connect(options).await
}

/// A write whose types are forgotten, so that different ones queue together.
trait Job: Send {
    /// Runs in a savepoint; true if it is to be kept.
    fn run<'t>(&'t mut self, tx: &'t DatabaseTransaction) -> BoxFuture<'t, bool>;
    /// Tells the caller; `committed` is an error if the group's commit failed.
    fn answer(self: Box<Self>, committed: Result<(), DbErr>);
}

struct Write<T, E, F> {
    body: F,
    outcome: Option<Result<T, E>>,
    answer: oneshot::Sender<Result<T, E>>,
}

impl<T, E, F> Job for Write<T, E, F>
where
    F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, E>> + Send + Sync,
    E: From<DbErr> + Send,
    T: Send,
{
    fn run<'t>(&'t mut self, tx: &'t DatabaseTransaction) -> BoxFuture<'t, bool> {
        Box::pin(async move {
            let outcome = super::caught((self.body)(tx)).await;
            let keep = outcome.is_ok();
            self.outcome = Some(outcome);
            keep
        })
    }

    fn answer(self: Box<Self>, committed: Result<(), DbErr>) {
        let outcome = match (self.outcome, committed) {
            // A refusal of the body's own stands whatever became of the commit.
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(error.into()),
            (Some(Ok(value)), Ok(())) => Ok(value),
            (None, Ok(())) => Err(closed().into()),
        };
        // A caller that has gone away does not want to know.
        let _ = self.answer.send(outcome);
    }
}

/// Where a group of writes came to grief.
enum Broken {
    /// At its begin or its end: it is all or nothing of the group.
    Whole(DbErr),
    /// In between: one of its writes has ended the transaction for all (SQLite rolls back by itself when
    /// the disk is full), and the others may be as good as ever.
    Between(DbErr),
}

/// The writer task: ends when the last handle is gone.
async fn run_writer(
    connection: DatabaseConnection,
    mut queue: mpsc::Receiver<Box<dyn Job>>,
    syncs: Arc<AtomicU64>,
) {
    let mut group = Vec::with_capacity(GROUP);
    while queue.recv_many(&mut group, GROUP).await > 0 {
        let together = group.len() > 1;
        let committed = match commit(&connection, &mut group, &syncs).await {
            Err(Broken::Between(_)) if together => {
                for mut job in group.drain(..) {
                    let alone = std::slice::from_mut(&mut job);
                    let committed = commit(&connection, alone, &syncs).await;
                    job.answer(committed.map_err(|broken| same_error(&broken.into_inner())));
                }
                continue;
            }
            other => other.map_err(Broken::into_inner),
        };
        for job in group.drain(..) {
            job.answer(committed.as_ref().copied().map_err(same_error));
        }
    }
}

impl Broken {
    fn into_inner(self) -> DbErr {
        match self {
            Self::Whole(error) | Self::Between(error) => error,
        }
    }
}

/// Commits a group, counts its sync, and after a failure gives the next one a connection of its own.
async fn commit(
    connection: &DatabaseConnection,
    group: &mut [Box<dyn Job>],
    syncs: &AtomicU64,
) -> Result<(), Broken> {
    let committed = commit_group(connection, group).await;
    match committed {
        Ok(true) => super::count_sync(syncs),
        Ok(false) => {}
        Err(broken) => {
            let (Broken::Whole(error) | Broken::Between(error)) = &broken;
            tracing::error!(%error, "a group of writes was not committed");
            renew(connection).await;
            return Err(broken);
        }
    }
    Ok(())
}

/// Has the pool open another connection. Where SQLite has ended a transaction by itself, sqlx still
/// counts one, would take the next one for a savepoint in it, and say of what was never committed that
/// it was.
async fn renew(connection: &DatabaseConnection) {
    let old = connection.get_sqlite_connection_pool().acquire().await;
    let closed = match old {
        Ok(old) => old.close().await,
        Err(error) => Err(error),
    };
    if let Err(error) = closed {
        tracing::error!(%error, "the writing connection could not be closed");
    }
}

/// Runs all jobs in one transaction. True if there was anything to commit.
async fn commit_group(
    connection: &DatabaseConnection,
    mut group: &mut [Box<dyn Job>],
) -> Result<bool, Broken> {
    let immediate = TransactionOptions {
        sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
        ..TransactionOptions::default()
    };
    let begun = connection.begin_with_options(immediate).await;
    let transaction = begun.map_err(Broken::Whole)?;
    let mut kept = false;
    // One that is alone is kept or not with the transaction: each savepoint is two trips to SQLite's thread.
    if let [job] = group {
        kept = job.run(&transaction).await;
        group = &mut [];
    }
    for job in group {
        let savepoint = transaction.begin().await.map_err(Broken::Between)?;
        let ended = if job.run(&savepoint).await {
            kept = true;
            savepoint.commit().await
        } else {
            savepoint.rollback().await
        };
        ended.map_err(Broken::Between)?;
    }
    let ended = if kept {
        transaction.commit().await
    } else {
        transaction.rollback().await
    };
    ended.map_err(Broken::Whole)?;
    Ok(kept)
}

/// [`DbErr`] cannot be cloned; every member of a group gets one of its own.
fn same_error(error: &DbErr) -> DbErr {
    if super::is_full(error) {
        return DbErr::Custom(super::FULL.to_owned());
    }
    DbErr::Conn(RuntimeErr::Internal(format!(
        "the write was not committed: {error}"
    )))
}
