//! Guests that went, or go, to another host while they run ([`crate::reconcile::migration`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, text, text_null};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let migration = Table::create()
            .table("migration")
            .col(big_integer("id").primary_key())
            .col(text("uuid"))
            .col(text("server_id"))
            .col(text("source_id"))
            .col(text("source"))
            .col(text_null("target_id"))
            .col(text_null("target"))
            .col(text("status"))
            .col(text("flavor_id"))
            .col(text_null("user_id"))
            .col(text_null("project_id"))
            .col(text_null("progress"))
            .col(text_null("reason"))
            .col(big_integer("created_at_us"))
            .col(big_integer("updated_at_us"))
            .col(big_integer_null("ended_at_us"))
            .to_owned();
        manager.create_table(migration).await?;
        let by_uuid = Index::create()
            .name("migration_uuid")
            .table("migration")
            .col("uuid")
            .unique()
            .to_owned();
        manager.create_index(by_uuid).await?;
        let of_server = Index::create()
            .name("migration_server")
            .table("migration")
            .col("server_id")
            .col("ended_at_us")
            .to_owned();
        manager.create_index(of_server).await?;
        let to_host = Index::create()
            .name("migration_target")
            .table("migration")
            .col("target_id")
            .col("ended_at_us")
            .to_owned();
        manager.create_index(to_host).await
    }
}
