//! Users, projects (domains are projects too), roles, the catalogue, and what tokens need
//! ([`crate::identity`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, boolean, integer, text, text_null};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [
            revision(),
            project(),
            user(),
            role(),
            implied(),
            assignment(),
        ] {
            manager.create_table(table).await?;
        }
        for table in [service(), endpoint(), region(), revocation(), token_key()] {
            manager.create_table(table).await?;
        }
        for (table, first, second, unique) in [
            ("identity_project", "domain_id", "name", true),
            ("identity_user", "domain_id", "name", true),
            ("identity_role", "domain_id", "name", true),
            ("identity_assignment", "target_id", "actor_id", false),
            ("identity_endpoint", "service_id", "id", false),
            ("identity_revocation", "expires_at_us", "audit_id", false),
        ] {
            let mut index = Index::create();
            index
                .name(format!("{table}_{first}_{second}"))
                .table(table)
                .col(first)
                .col(second);
            if unique {
                index.unique();
            }
            manager.create_index(index.to_owned()).await?;
        }
        Ok(())
    }
}

/// One row: a counter that every change of identity raises, by which controllers know whether what
/// they remember still holds.
fn revision() -> TableCreateStatement {
    Table::create()
        .table("identity_revision")
        .col(integer("id").primary_key())
        .col(big_integer("revision"))
        .to_owned()
}

fn project() -> TableCreateStatement {
    Table::create()
        .table("identity_project")
        .col(text("id").primary_key())
        .col(text("name"))
        // Empty for domains.
        .col(text("domain_id"))
        .col(text_null("parent_id"))
        .col(boolean("is_domain"))
        .col(text_null("description"))
        .col(boolean("enabled"))
        .col(text("tags"))
        .col(text("options"))
        .col(text("extra"))
        .to_owned()
}

fn user() -> TableCreateStatement {
    Table::create()
        .table("identity_user")
        .col(text("id").primary_key())
        .col(text("name"))
        .col(text("domain_id"))
        .col(boolean("enabled"))
        .col(text_null("default_project_id"))
        .col(text_null("password_hash"))
        // Tokens issued before do not count.
        .col(big_integer("valid_from_us"))
        .col(big_integer("created_at_us"))
        .col(text("options"))
        .col(text("extra"))
        .to_owned()
}

fn role() -> TableCreateStatement {
    Table::create()
        .table("identity_role")
        .col(text("id").primary_key())
        .col(text("name"))
        // Empty for roles of the whole cloud.
        .col(text("domain_id"))
        .col(text_null("description"))
        .col(text("options"))
        .col(text("extra"))
        .to_owned()
}

fn implied() -> TableCreateStatement {
    Table::create()
        .table("identity_implied_role")
        .col(text("prior_role_id"))
        .col(text("implied_role_id"))
        .primary_key(Index::create().col("prior_role_id").col("implied_role_id"))
        .to_owned()
}

fn assignment() -> TableCreateStatement {
    Table::create()
        .table("identity_assignment")
        .col(text("actor_id"))
        // `project`, `domain`, `system`.
        .col(text("target_kind"))
        .col(text("target_id"))
        .col(text("role_id"))
        .primary_key(
            Index::create()
                .col("actor_id")
                .col("target_kind")
                .col("target_id")
                .col("role_id"),
        )
        .to_owned()
}

fn service() -> TableCreateStatement {
    Table::create()
        .table("identity_service")
        .col(text("id").primary_key())
        .col(text("kind"))
        .col(text_null("name"))
        .col(boolean("enabled"))
        .col(text("extra"))
        .to_owned()
}

fn endpoint() -> TableCreateStatement {
    Table::create()
        .table("identity_endpoint")
        .col(text("id").primary_key())
        .col(text("service_id"))
        .col(text_null("region_id"))
        .col(text("interface"))
        .col(text("url"))
        .col(boolean("enabled"))
        .col(text("extra"))
        .to_owned()
}

fn region() -> TableCreateStatement {
    Table::create()
        .table("identity_region")
        .col(text("id").primary_key())
        .col(text("description"))
        .col(text_null("parent_region_id"))
        .col(text("extra"))
        .to_owned()
}

/// Tokens that were ended before their time.
fn revocation() -> TableCreateStatement {
    Table::create()
        .table("identity_revocation")
        .col(text("audit_id").primary_key())
        .col(big_integer("expires_at_us"))
        .to_owned()
}

/// Keys that seal tokens, wrapped by the master key; the highest id seals.
fn token_key() -> TableCreateStatement {
    Table::create()
        .table("identity_token_key")
        .col(big_integer("id").primary_key())
        .col(text("wrapped"))
        .col(big_integer("created_at_us"))
        .to_owned()
}
