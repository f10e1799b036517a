//! Hosts, how they joined, what runs on them ([`crate::agents`], [`crate::reconcile`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, boolean, text, text_null};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(host()).await?;
        manager.create_table(join_token()).await?;
        manager.create_table(authority()).await?;
        manager.create_table(machine()).await?;
        let of_host = Index::create()
            .name("machine_host")
            .table("machine")
            .col("host_id")
            .col("server_id")
            .to_owned();
        manager.create_index(of_host).await?;
        manager.create_table(reservation()).await?;
        manager.create_table(setting()).await
    }
}

fn host() -> TableCreateStatement {
    Table::create()
        .table("host")
        .col(text("id").primary_key())
        .col(text("hostname"))
        .col(text("endpoint"))
        .col(text("report"))
        .col(boolean("disabled"))
        .col(text_null("disabled_reason"))
        .col(boolean("forced_down"))
        .col(big_integer("vcpus_limit"))
        .col(big_integer("memory_mib_limit"))
        .col(big_integer("disk_gib_limit"))
        .col(big_integer("vcpus_used"))
        .col(big_integer("memory_mib_used"))
        .col(big_integer("disk_gib_used"))
        .col(big_integer("joined_at_us"))
        .col(big_integer("heard_at_us"))
        .col(big_integer_null("removed_at_us"))
        .to_owned()
}

fn join_token() -> TableCreateStatement {
    Table::create()
        .table("join_token")
        .col(text("hash").primary_key())
        .col(big_integer("created_at_us"))
        .col(big_integer("expires_at_us"))
        .col(big_integer_null("used_at_us"))
        .col(text_null("host_id"))
        .col(text_null("key_hash"))
        .to_owned()
}

fn authority() -> TableCreateStatement {
    Table::create()
        .table("authority")
        .col(text("id").primary_key())
        .col(text("certificate"))
        .col(text("sealed_key"))
        .col(boolean("signs"))
        .col(big_integer("created_at_us"))
        .col(big_integer_null("retired_at_us"))
        .to_owned()
}

/// Ownership, intent and what was last heard, of one server.
fn machine() -> TableCreateStatement {
    Table::create()
        .table("machine")
        .col(text("server_id").primary_key())
        .col(text_null("host_id"))
        .col(big_integer("generation"))
        .col(big_integer("revision"))
        .col(text("wanted"))
        .col(text_null("request_id"))
        .col(boolean("settled"))
        .col(boolean("confirmed"))
        .col(text_null("report"))
        .col(big_integer("updated_at_us"))
        .to_owned()
}

fn reservation() -> TableCreateStatement {
    Table::create()
        .table("reservation")
        .col(text("server_id"))
        .col(text("host_id"))
        .col(big_integer("vcpus"))
        .col(big_integer("memory_mib"))
        .col(big_integer("disk_gib"))
        .primary_key(Index::create().col("server_id").col("host_id"))
        .to_owned()
}

fn setting() -> TableCreateStatement {
    Table::create()
        .table("setting")
        .col(text("name").primary_key())
        .col(text("value"))
        .to_owned()
}
