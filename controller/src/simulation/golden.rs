//! Databases of earlier builds, with operations that were half done when they were written: each is
//! brought to this build's schema and its operations are carried on.
//!
//! `FRACTUS_GOLDEN=write cargo nextest run -p fractus-controller golden` writes the one of this build
//! to `controller/tests/golden/VERSION.sql`; those of released builds are never written again.

use std::path::PathBuf;

use fractus_agent_api::machine::ServerId;
use sea_orm::{ConnectionTrait, Statement};
use uuid::Uuid;

use super::requests;
use super::world::{Plan, World};
use crate::compute::model::state::ServerState;
use crate::compute::store::server;
use crate::database::Database;
use crate::database::testing::{self, TestDatabase};
use crate::operation::Advance;
use crate::random::SeededRandom;

/// Requested, and not placed yet.
const REQUESTED: Uuid = Uuid::from_u128(0xa1);
/// Placed, and its host not told.
const PLACED: Uuid = Uuid::from_u128(0xa2);
/// Placed, then deleted: its creation is to be undone, and a delete waits behind it.
const CANCELLED: Uuid = Uuid::from_u128(0xa3);

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

async fn half_done() -> World {
    let world = World::new(
        99,
        Plan {
            hosts: 2,
            servers: 3,
            events: 0,
        },
    )
    .await;
    let controller = world.controller.as_ref().unwrap();
    for id in [REQUESTED, PLACED, CANCELLED] {
        requests::create(&controller.app, id).await.unwrap();
    }
    for id in [PLACED, CANCELLED] {
        assert_eq!(
            controller.engine.advance(&id.to_string()).await,
            Advance::Advanced
        );
    }
    requests::delete(&controller.app, CANCELLED).await.unwrap();
    world
}

/// All rows and the schema as SQL.
async fn dump(database: &Database) -> String {
    let reader = database.reader();
    let backend = reader.get_database_backend();
    let strings = async |sql: String| -> Vec<String> {
        let rows = reader
            .query_all_raw(Statement::from_string(backend, sql))
            .await
            .unwrap();
        rows.into_iter()
            .map(|row| row.try_get_by_index(0).unwrap())
            .collect()
    };
    let mut text = String::new();
    let schema = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' \
                  ORDER BY type DESC, name";
    for statement in strings(schema.to_owned()).await {
        text.push_str(&statement);
        text.push_str(";\n");
    }
    // What a master key wraps that is nowhere kept cannot be opened again.
    let tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' \
                  AND name NOT IN ('identity_token_key', 'authority') ORDER BY name";
    for table in strings(tables.to_owned()).await {
        let names = strings(format!("SELECT name FROM pragma_table_info('{table}')")).await;
        let quoted: Vec<String> = names
            .iter()
            .map(|name| format!("quote(\"{name}\")"))
            .collect();
        let columns = names.join("\", \"");
        let rows = format!(
            "SELECT 'INSERT INTO \"{table}\" (\"{columns}\") VALUES (' || {} || ')' FROM \"{table}\" \
             ORDER BY 1",
            quoted.join(" || ', ' || ")
        );
        for row in strings(rows).await {
            text.push_str(&row);
            text.push_str(";\n");
        }
    }
    text
}

#[tokio::test]
async fn every_golden_database_is_upgraded_and_its_operations_are_carried_on() {
    if std::env::var_os("FRACTUS_GOLDEN").is_some_and(|mode| mode == "write") {
        std::fs::create_dir_all(folder()).unwrap();
        let file = folder().join(concat!(env!("CARGO_PKG_VERSION"), ".sql"));
        std::fs::write(file, dump(half_done().await.database()).await).unwrap();
    }
    let mut count = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let sql = std::fs::read_to_string(&path).unwrap();
        for test in [
            testing::sqlite_from(&sql).await,
            testing::postgres_from(&sql).await,
        ] {
            eprintln!("golden: {} on {}", path.display(), test.engine);
            carry_on(test).await;
            count += 1;
        }
    }
    assert!(count > 0, "there is at least one golden database");
}

/// A controller of this build carries on what the database holds.
async fn carry_on(test: TestDatabase) {
    let plan = Plan {
        hosts: 2,
        servers: 3,
        events: 0,
    };
    // Other ids than those that are in the database already.
    let mut world = World::of(test, SeededRandom::new(1234), 99, plan).await;
    assert_eq!(
        world.open_subjects().await.len(),
        3,
        "three servers are half done"
    );
    world.servers = vec![REQUESTED, PLACED, CANCELLED];
    world.heal().await;
    world.check_rest().await;
    for (id, expected) in [
        (REQUESTED, ServerState::Active),
        (PLACED, ServerState::Active),
        (CANCELLED, ServerState::Deleted),
    ] {
        let row = server::find_any(world.database().reader(), &id.to_string())
            .await
            .unwrap();
        assert_eq!(row.unwrap().state(), expected, "{id}");
    }
    let running: usize = world.hosts.iter().map(|host| host.processes().len()).sum();
    assert_eq!(running, 2);
    assert!(
        !world
            .hosts
            .iter()
            .any(|host| host.remains().contains(&ServerId(CANCELLED)))
    );
}
