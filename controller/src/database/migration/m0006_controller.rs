//! The controllers of a cloud, and which of them leads ([`crate::leader`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, integer, text};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let controller = Table::create()
            .table("controller")
            .col(text("incarnation").primary_key())
            .col(text("name"))
            .col(text("agents_url"))
            .col(big_integer("beats"))
            .col(big_integer("seen_at_us"))
            .to_owned();
        manager.create_table(controller).await?;
        // One row.
        let leader = Table::create()
            .table("leader")
            .col(integer("id").primary_key())
            .col(big_integer("term"))
            .col(text("incarnation"))
            .col(text("name"))
            .to_owned();
        manager.create_table(leader).await
    }
}
