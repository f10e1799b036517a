//! The schema, as a list of changes, one file a service. Owns the order in which they are applied and
//! the check that a database is not newer than this build.
//!
//! A change that has been released is never edited: what comes later is a new file. Schema changes
//! expand in one release and contract in the one after (a controller one release older may still
//! run). Only column types that both engines have: `text`, `big_integer`, `integer`, `boolean`,
//! `binary`, `double`.

mod m0001_identity;
mod m0002_image;
mod m0003_compute;
mod m0004_operation;
mod m0005_host;
mod m0006_controller;
mod m0007_migration;
mod m0008_shelve;
mod m0009_resize;

use std::collections::BTreeSet;

use sea_orm::{DatabaseConnection, TransactionTrait};
use sea_orm_migration::{MigrationTrait, MigratorTrait};

use super::OpenError;

/// Every change, in order. One line a service; never reordered.
fn changes() -> Vec<Box<dyn MigrationTrait>> {
    vec![
        Box::new(m0001_identity::Migration),
        Box::new(m0002_image::Migration),
        Box::new(m0003_compute::Migration),
        Box::new(m0004_operation::Migration),
        Box::new(m0005_host::Migration),
        Box::new(m0006_controller::Migration),
        Box::new(m0007_migration::Migration),
        Box::new(m0008_shelve::Migration),
        Box::new(m0009_resize::Migration),
    ]
}

struct Changes;

impl MigratorTrait for Changes {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        changes()
    }
}

/// For tests: the schema as it was when there were this many changes.
pub(super) async fn apply_first(
    connection: &DatabaseConnection,
    count: usize,
) -> Result<(), sea_orm::DbErr> {
    let transaction = connection.begin().await?;
    Changes::up(&transaction, u32::try_from(count).ok()).await?;
    transaction.commit().await
}

/// Applies what is missing in one transaction.
pub(super) async fn apply(connection: &DatabaseConnection) -> Result<(), OpenError> {
    let transaction = connection.begin().await.map_err(OpenError::Migrate)?;
    if connection.get_database_backend() == sea_orm::DbBackend::Postgres {
        // Two controllers that start together: the second one waits, and finds all done.
        use sea_orm::ConnectionTrait;
        transaction
            .execute_unprepared("SELECT pg_advisory_xact_lock(42026)")
            .await
            .map_err(OpenError::Migrate)?;
    }
    let known: BTreeSet<String> = changes()
        .iter()
        .map(|change| change.name().to_owned())
        .collect();
    let applied = Changes::get_migration_models(&transaction)
        .await
        .map_err(OpenError::Migrate)?;
    if let Some(newer) = applied
        .into_iter()
        .find(|model| !known.contains(&model.version))
    {
        return Err(OpenError::NewerSchema {
            migration: newer.version,
        });
    }
    Changes::up(&transaction, None)
        .await
        .map_err(OpenError::Migrate)?;
    transaction.commit().await.map_err(OpenError::Migrate)
}
