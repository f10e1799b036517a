//! What every service relies on, on both engines.

use std::sync::atomic::{AtomicUsize, Ordering};

use sea_orm::{ConnectionTrait, Statement};

use super::testing::{self, engines};
use super::*;

async fn make_table(database: &Database) {
    database
        .write(|tx| {
            Box::pin(async move {
                tx.execute_unprepared("CREATE TABLE t (id TEXT PRIMARY KEY, n BIGINT NOT NULL)")
                    .await?;
                tx.execute_unprepared("INSERT INTO t VALUES ('a', 0)")
                    .await?;
                Ok::<_, DbErr>(())
            })
        })
        .await
        .unwrap();
}

async fn count(database: &Database, sql: &str) -> i64 {
    let connection = database.reader();
    let backend = connection.get_database_backend();
    let row = connection
        .query_one_raw(Statement::from_string(backend, sql))
        .await
        .unwrap();
    row.unwrap().try_get_by_index(0).unwrap()
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("as the test wants")]
    Refused,
    #[error(transparent)]
    Database(#[from] DbErr),
}

#[tokio::test]
async fn like_tells_capitals_from_small_letters() {
    engines(|database| async move {
        make_table(&database).await;
        for (pattern, found) in [("a%", 1), ("A%", 0)] {
            let sql = format!("SELECT count(*) FROM t WHERE id LIKE '{pattern}'");
            assert_eq!(count(&database, &sql).await, found, "{pattern}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_write_that_answers_an_error_leaves_nothing_and_does_not_harm_its_neighbours() {
    engines(|database| async move {
        make_table(&database).await;
        let insert = |id: &'static str, refuse: bool| {
            let database = database.clone();
            async move {
                database
                    .write(move |tx| {
                        Box::pin(async move {
                            let sql = format!("INSERT INTO t VALUES ('{id}', 1)");
                            tx.execute_unprepared(&sql).await?;
                            if refuse {
                                Err(Refused::Refused)
                            } else {
                                Ok(())
                            }
                        })
                    })
                    .await
            }
        };
        let (b, c, d) = futures::join!(insert("b", false), insert("c", true), insert("d", false));
        assert!(b.is_ok() && d.is_ok());
        assert!(matches!(c, Err(Refused::Refused)));
        assert_eq!(
            count(&database, "SELECT COUNT(*) FROM t WHERE id IN ('b', 'd')").await,
            2
        );
        assert_eq!(
            count(&database, "SELECT COUNT(*) FROM t WHERE id = 'c'").await,
            0
        );
    })
    .await;
}

#[tokio::test]
async fn a_failed_statement_is_the_callers_error_and_the_next_write_works() {
    engines(|database| async move {
        make_table(&database).await;
        let duplicate = database
            .write(|tx| {
                Box::pin(async move {
                    tx.execute_unprepared("INSERT INTO t VALUES ('a', 1)")
                        .await?;
                    Ok::<_, DbErr>(())
                })
            })
            .await;
        assert!(duplicate.is_err());
        let next = database
            .write(|tx| {
                Box::pin(async move {
                    tx.execute_unprepared("UPDATE t SET n = 5")
                        .await
                        .map(|_| ())
                })
            })
            .await;
        next.unwrap();
        assert_eq!(count(&database, "SELECT n FROM t").await, 5);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_increment_is_lost_among_concurrent_writers() {
    engines(|database| async move {
        make_table(&database).await;
        let runs = Arc::new(AtomicUsize::new(0));
        let increments = (0..32).map(|_| {
            let (database, runs) = (database.clone(), Arc::clone(&runs));
            tokio::spawn(async move {
                database
                    .write(move |tx| {
                        let runs = Arc::clone(&runs);
                        Box::pin(async move {
                            runs.fetch_add(1, Ordering::Relaxed);
                            let backend = tx.get_database_backend();
                            let read = Statement::from_string(backend, "SELECT n FROM t");
                            let row = tx.query_one_raw(read).await?.unwrap();
                            let n: i64 = row.try_get_by_index(0)?;
                            let sql = format!("UPDATE t SET n = {}", n + 1);
                            tx.execute_unprepared(&sql).await?;
                            Ok::<_, DbErr>(())
                        })
                    })
                    .await
            })
        });
        let outcomes = futures::future::join_all(increments).await;
        let done = outcomes
            .into_iter()
            .filter(|outcome| matches!(outcome, Ok(Ok(()))))
            .count();
        // Retries are bounded, so on PostgreSQL some may have given up; none may have vanished.
        assert!(done > 0);
        assert_eq!(count(&database, "SELECT n FROM t").await, done as i64);
    })
    .await;
}

#[tokio::test]
async fn writes_that_wait_together_share_one_sync() {
    let test = testing::sqlite().await;
    let database = &test.database;
    make_table(database).await;
    let before = database.syncs();
    let writes = (0..50).map(|i| {
        database.write(move |tx| {
            Box::pin(async move {
                let sql = format!("INSERT INTO t VALUES ('id{i}', 1)");
                tx.execute_unprepared(&sql).await.map(|_| ())
            })
        })
    });
    futures::future::try_join_all(writes).await.unwrap();
    let syncs = database.syncs() - before;
    assert!(
        (1..=2).contains(&syncs),
        "{syncs} syncs for 50 writes queued at once"
    );
    assert_eq!(count(database, "SELECT COUNT(*) FROM t").await, 51);
}

#[tokio::test]
async fn a_panicking_write_is_an_error_and_the_writer_lives_on() {
    engines(|database| async move {
        make_table(&database).await;
        let panicked = database
            .write(|_| {
                Box::pin(async move {
                    if true {
                        panic!("as the test wants")
                    }
                    Ok::<(), DbErr>(())
                })
            })
            .await;
        assert!(panicked.is_err());
        database
            .write(|tx| {
                Box::pin(async move { tx.execute_unprepared("DELETE FROM t").await.map(|_| ()) })
            })
            .await
            .unwrap();
        assert_eq!(count(&database, "SELECT COUNT(*) FROM t").await, 0);
    })
    .await;
}

#[tokio::test]
async fn migrating_again_changes_nothing_and_a_newer_schema_is_refused() {
    engines(|database| async move {
        database.migrate().await.unwrap();
        database
            .write(|tx| {
                Box::pin(async move {
                    let sql =
                        "INSERT INTO seaql_migrations (version, applied_at) VALUES ('m9999_x', 1)";
                    tx.execute_unprepared(sql).await.map(|_| ())
                })
            })
            .await
            .unwrap();
        let refused = database.migrate().await;
        assert!(
            matches!(&refused, Err(OpenError::NewerSchema { migration }) if migration == "m9999_x"),
            "{refused:?}"
        );
    })
    .await;
}

#[test]
fn a_url_is_shown_without_its_password() {
    let shown = without_password("postgres://fractus:secret@db/fractus");
    assert!(
        !shown.contains("secret") && shown.contains("@db/fractus"),
        "{shown}"
    );
    assert_eq!(
        without_password("sqlite:///var/lib/x"),
        "sqlite:///var/lib/x"
    );
}

/// `scripts/test` runs the tests once more with this variable: had it not arrived, they would all
/// pass on SQLite again.
#[tokio::test]
async fn the_run_is_on_the_engine_that_its_variable_names() {
    let test = testing::database().await;
    let asked = std::env::var("FRACTUS_TEST_DATABASE").unwrap_or_else(|_| "sqlite".to_owned());
    let (version, engine) = match asked.as_str() {
        "postgres" => ("SELECT version()", "PostgreSQL"),
        _ => ("SELECT sqlite_version()", "3."),
    };
    let row = test.database.reader().query_one_raw(Statement::from_string(
        test.database.reader().get_database_backend(),
        version,
    ));
    let said: String = row.await.unwrap().unwrap().try_get_by_index(0).unwrap();
    assert!(said.starts_with(engine), "{said}");
}
