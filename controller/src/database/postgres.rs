//! PostgreSQL: a `SERIALIZABLE` transaction a write, repeated when it lost against another.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use futures::future::BoxFuture;
use rand::RngExt;
use sea_orm::{
    ConnectOptions, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr,
    IsolationLevel, TransactionTrait,
};

/// How often a write is tried before its error is the caller's.
const ATTEMPTS: u32 = 10;
const CONNECTIONS: u32 = 16;
/// How long a transaction may stand still before the server ends it.
const IDLE: &str = "10s";

#[derive(Clone)]
pub(super) struct Postgres {
    connection: DatabaseConnection,
    syncs: Arc<AtomicU64>,
}

/// What became of one attempt.
enum Attempt<T, E> {
    Finished(Result<T, E>),
    /// The transaction was ended by the server; `E` says how the body or the commit saw it.
    Lost(E),
}

impl Postgres {
    pub(super) async fn open(url: &str, syncs: Arc<AtomicU64>) -> Result<Self, DbErr> {
        let mut options = ConnectOptions::new(url);
        options
            .min_connections(1)
            .max_connections(CONNECTIONS)
            .acquire_timeout(Duration::from_secs(30))
            .sqlx_logging(false)
            // A controller that freezes within a transaction must not hold its locks for ever: the next
            // leader waits for them.
            .map_sqlx_postgres_opts(|options| {
                options.options([("idle_in_transaction_session_timeout", IDLE)])
            });
        Ok(Self {
            connection: sea_orm::Database::connect(options).await?,
            syncs,
        })
    }

    pub(super) fn connection(&self) -> &DatabaseConnection {
        &self.connection
    }

    pub(super) async fn close(self) {
        // Errors here have nobody to tell: what was answered is on disk already.
        let _ = self.connection.close().await;
    }

    pub(super) async fn write<T, E, F>(&self, body: F) -> Result<T, E>
    where
        F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, E>> + Send + Sync,
        E: From<DbErr> + Send,
        T: Send,
    {
        let mut attempt = 1;
        loop {
            match self.attempt(&body).await {
                Attempt::Finished(outcome) => return outcome,
                Attempt::Lost(error) if attempt == ATTEMPTS => return Err(error),
                Attempt::Lost(_) => {
                    metrics::counter!("fractus_database_retries_total").increment(1);
                    let most_us = 500_u64 << attempt.min(7);
                    let pause = rand::rng().random_range(0..most_us);
                    tokio::time::sleep(Duration::from_micros(pause)).await;
                    attempt += 1;
                }
            }
        }
    }

    async fn attempt<T, E, F>(&self, body: &F) -> Attempt<T, E>
    where
        F: for<'t> Fn(&'t DatabaseTransaction) -> BoxFuture<'t, Result<T, E>>,
        E: From<DbErr>,
    {
        let serializable = Some(IsolationLevel::Serializable);
        let transaction = match self.connection.begin_with_config(serializable, None).await {
            Ok(transaction) => transaction,
            Err(error) => return Attempt::Finished(Err(error.into())),
        };
        match super::caught(body(&transaction)).await {
            Ok(value) => match transaction.commit().await {
                Ok(()) => {
                    super::count_sync(&self.syncs);
                    Attempt::Finished(Ok(value))
                }
                Err(error) if lost_a_race(&error) => Attempt::Lost(error.into()),
                Err(error) => Attempt::Finished(Err(error.into())),
            },
            Err(error) => {
                // The body's error type is its own. Whether the server ended the transaction is seen
                // by asking it for anything: after a failed statement it answers nothing more. That
                // is a lost race (40001, 40P01), or a duplicate key, which under SERIALIZABLE may be
                // a race just as well; to repeat the body is right for both.
                let ended = transaction.execute_unprepared("SELECT 1").await.is_err();
                // Fails where the connection is gone, and then there is nothing to roll back.
                let _ = transaction.rollback().await;
                if ended {
                    Attempt::Lost(error)
                } else {
                    Attempt::Finished(Err(error))
                }
            }
        }
    }
}

/// Serialization failure or deadlock.
fn lost_a_race(error: &DbErr) -> bool {
    let text = error.to_string();
    let by_code = match error {
        DbErr::Exec(sea_orm::RuntimeErr::SqlxError(error))
        | DbErr::Query(sea_orm::RuntimeErr::SqlxError(error))
        | DbErr::Conn(sea_orm::RuntimeErr::SqlxError(error)) => error
            .as_database_error()
            .and_then(|error| error.code())
            .is_some_and(|code| code == "40001" || code == "40P01"),
        _ => false,
    };
    by_code || text.contains("could not serialize access") || text.contains("deadlock detected")
}
