//! Servers that get another size or host while their guests are stopped ([`crate::compute::ops::resize`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{text, text_null};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // Those of before, and of a controller one release older, are of guests that run.
        let columns = [
            text("kind").default("live-migration").take(),
            text_null("new_flavor_id"),
            text_null("before"),
        ];
        // SQLite adds one at a time.
        for column in columns {
            let table = Table::alter()
                .table("migration")
                .add_column(column)
                .to_owned();
            manager.alter_table(table).await?;
        }
        Ok(())
    }
}
