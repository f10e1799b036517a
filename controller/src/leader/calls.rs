//! How the leader hears of what another controller has written for it to carry out: by PostgreSQL's
//! notifications. They save the wait for the leader's next sweep and nothing hangs on them.

use std::time::Duration;

use sea_orm::sqlx::postgres::PgListener;
use sea_orm::{ConnectionTrait, DbBackend, Statement};
use tokio_util::sync::CancellationToken;

use super::Lead;

const CHANNEL: &str = "fractus_operations";
/// Before the database is asked again to tell.
const AGAIN: Duration = Duration::from_secs(1);

impl Lead {
    /// Tells whoever leads that there may be something to do for `subject`.
    pub async fn call(&self, subject: &str) {
        let Some(connection) = self.database.postgres() else {
            return;
        };
        let values = [CHANNEL.into(), subject.into()];
        let sql = "SELECT pg_notify($1, $2)";
        let notify = Statement::from_sql_and_values(DbBackend::Postgres, sql, values);
        if let Err(error) = connection.execute_raw(notify).await {
            tracing::warn!(%error, subject, "the leader is not told");
        }
    }

    /// Until `stop`: hands each subject that another controller calls for to `called`. Returns at once on
    /// SQLite, where there is no other.
    pub async fn listen(&self, stop: CancellationToken, called: impl Fn(&str)) {
        let Some(connection) = self.database.postgres() else {
            return;
        };
        let pool = connection.get_postgres_connection_pool();
        loop {
            let listening = async {
                let mut listener = PgListener::connect_with(pool).await?;
                listener.listen(CHANNEL).await?;
                loop {
                    called(listener.recv().await?.payload());
                }
            };
            let ended: Result<(), sea_orm::sqlx::Error> = tokio::select! {
                ended = listening => ended,
                () = stop.cancelled() => return,
            };
            if let Err(error) = ended {
                tracing::warn!(%error, "listening for other controllers' calls");
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}
