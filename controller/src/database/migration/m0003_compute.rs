//! Servers, flavors, keypairs ([`crate::compute`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, boolean, double, integer, integer_null, text, text_null,
};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(flavor()).await?;
        manager.create_table(flavor_access()).await?;
        manager.create_table(keypair()).await?;
        let mut unique = index("keypair_user_name", "keypair", &["user_id", "name"]);
        manager.create_index(unique.unique().to_owned()).await?;
        manager.create_table(server()).await?;
        manager.create_table(quota()).await?;
        manager.create_table(console_token()).await?;
        // Keyset pages: of a project, of all projects; and what changed lately.
        for (name, columns) in [
            (
                "server_project",
                ["project_id", "created_at_us", "id"].as_slice(),
            ),
            ("server_created", &["created_at_us", "id"]),
            ("server_updated", &["updated_at_us", "id"]),
            ("server_deleted", &["deleted_at_us"]),
        ] {
            manager.create_index(index(name, "server", columns)).await?;
        }
        Ok(())
    }
}

fn flavor() -> TableCreateStatement {
    Table::create()
        .table("flavor")
        .col(text("id").primary_key())
        .col(text("name").unique_key())
        .col(integer("vcpus"))
        .col(big_integer("ram"))
        .col(big_integer("disk"))
        .col(big_integer("ephemeral"))
        .col(big_integer("swap"))
        .col(double("rxtx_factor"))
        .col(boolean("is_public"))
        .col(boolean("disabled"))
        .col(text_null("description"))
        .col(text("extra_specs"))
        .col(big_integer("created_at_us"))
        .col(big_integer_null("updated_at_us"))
        .to_owned()
}

fn flavor_access() -> TableCreateStatement {
    Table::create()
        .table("flavor_access")
        .col(text("flavor_id"))
        .col(text("project_id"))
        .primary_key(Index::create().col("flavor_id").col("project_id"))
        .to_owned()
}

fn keypair() -> TableCreateStatement {
    Table::create()
        .table("keypair")
        .col(big_integer("id").auto_increment().primary_key())
        .col(text("user_id"))
        .col(text("name"))
        .col(text("kind"))
        .col(text("fingerprint"))
        .col(text("public_key"))
        .col(big_integer("created_at_us"))
        .to_owned()
}

fn server() -> TableCreateStatement {
    Table::create()
        .table("server")
        .col(text("id").primary_key())
        .col(text("project_id"))
        .col(text("user_id"))
        .col(text("name"))
        .col(text_null("description"))
        .col(text("hostname"))
        .col(text("state"))
        .col(text("flavor"))
        .col(text("flavor_id"))
        .col(integer("vcpus"))
        .col(big_integer("ram"))
        .col(text("image_id"))
        .col(text("kernel_id"))
        .col(text("ramdisk_id"))
        .col(text("boot"))
        .col(text("metadata"))
        .col(text("tags"))
        .col(text_null("key_name"))
        .col(text_null("user_data"))
        .col(text("personality"))
        .col(text("availability_zone"))
        .col(text_null("pinned_zone"))
        .col(text("config_drive"))
        .col(text("disk_config"))
        .col(text("access_ip_v4"))
        .col(text("access_ip_v6"))
        .col(text("reservation_id"))
        .col(integer("launch_index"))
        .col(text_null("locked_by"))
        .col(text_null("locked_reason"))
        .col(text_null("trusted_certificates"))
        .col(text("scheduler_hints"))
        .col(integer_null("fault_code"))
        .col(text_null("fault_message"))
        .col(text_null("fault_details"))
        .col(big_integer_null("fault_at_us"))
        .col(big_integer("created_at_us"))
        .col(big_integer("updated_at_us"))
        .col(big_integer_null("launched_at_us"))
        .col(big_integer_null("terminated_at_us"))
        .col(big_integer_null("deleted_at_us"))
        .to_owned()
}

fn quota() -> TableCreateStatement {
    Table::create()
        .table("compute_quota")
        .col(text("project_id"))
        .col(text("resource"))
        .col(big_integer("most"))
        .primary_key(Index::create().col("project_id").col("resource"))
        .to_owned()
}

fn console_token() -> TableCreateStatement {
    Table::create()
        .table("console_token")
        .col(text("hash").primary_key())
        .col(text("server_id"))
        .col(big_integer("expires_at_us"))
        .to_owned()
}

fn index(name: &str, table: &str, columns: &[&str]) -> IndexCreateStatement {
    let mut index = Index::create();
    index.name(name.to_owned()).table(table.to_owned());
    for column in columns {
        index.col((*column).to_owned());
    }
    index
}
