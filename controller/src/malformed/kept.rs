//! What a cloud holds, to be compared: every row of every table, and the files of its images.

use std::collections::BTreeMap;

use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};

use crate::testing::TestApp;

/// Equal to another one when nothing was added, changed or left.
#[derive(Debug, PartialEq, Eq)]
pub struct Kept {
    /// Rows of each table as text, sorted.
    rows: BTreeMap<String, Vec<String>>,
    /// Blobs of images, unfinished ones included.
    blobs: Vec<String>,
}

impl Kept {
    pub async fn of(cloud: &TestApp) -> Self {
        let reader = cloud.app.database().reader();
        let mut rows = BTreeMap::new();
        for table in tables(reader).await {
            rows.insert(table.clone(), rows_of(reader, &table).await);
        }
        let mut blobs = cloud.app.images().blobs.keys().await.unwrap();
        blobs.sort();
        Self { rows, blobs }
    }
}

/// The first column of what a query answers.
async fn texts(reader: &DatabaseConnection, sql: &str) -> Vec<String> {
    let statement = Statement::from_string(reader.get_database_backend(), sql);
    let rows = reader.query_all_raw(statement).await.unwrap();
    rows.iter()
        .map(|row| row.try_get_by_index(0).unwrap())
        .collect()
}

async fn tables(reader: &DatabaseConnection) -> Vec<String> {
    let sql = match reader.get_database_backend() {
        DbBackend::Sqlite => "SELECT name FROM sqlite_master WHERE type = 'table'",
        _ => "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'",
    };
    let tables = texts(reader, sql).await;
    assert!(tables.len() > 10, "{tables:?}");
    tables
}

async fn rows_of(reader: &DatabaseConnection, table: &str) -> Vec<String> {
    let row = match reader.get_database_backend() {
        DbBackend::Sqlite => {
            let sql = format!("SELECT name FROM pragma_table_info('{table}')");
            let columns = texts(reader, &sql).await;
            let quoted: Vec<_> = columns
                .iter()
                .map(|name| format!("quote(\"{name}\")"))
                .collect();
            quoted.join(" || ',' || ")
        }
        _ => format!("\"{table}\"::text"),
    };
    texts(reader, &format!("SELECT {row} FROM \"{table}\" ORDER BY 1")).await
}
