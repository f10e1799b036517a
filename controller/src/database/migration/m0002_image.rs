//! Images ([`crate::image`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, boolean, text, text_null};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(image()).await?;
        manager.create_table(property()).await?;
        manager.create_table(tag()).await?;
        manager.create_table(member()).await?;
        for (name, table, columns) in [
            ("image_created", "image", ["created_at_us", "id"]),
            ("image_updated", "image", ["updated_at_us", "id"]),
            ("image_name", "image", ["name", "id"]),
            ("image_owner", "image", ["owner", "id"]),
            ("image_blob", "image", ["blob", "id"]),
            ("image_property_value", "image_property", ["name", "value"]),
            ("image_tag_tag", "image_tag", ["tag", "image_id"]),
            (
                "image_member_member",
                "image_member",
                ["member_id", "image_id"],
            ),
        ] {
            let [first, second] = columns;
            let index = Index::create()
                .name(name)
                .table(table)
                .col(first)
                .col(second)
                .to_owned();
            manager.create_index(index).await?;
        }
        Ok(())
    }
}

fn image() -> TableCreateStatement {
    Table::create()
        .table("image")
        .col(text("id").primary_key())
        .col(text_null("name"))
        .col(text("status"))
        .col(text("visibility"))
        .col(text_null("disk_format"))
        .col(text_null("container_format"))
        .col(big_integer_null("size"))
        .col(big_integer_null("virtual_size"))
        .col(text_null("checksum"))
        .col(text_null("os_hash_value"))
        .col(text_null("blake3"))
        .col(text_null("content_format"))
        .col(boolean("protected"))
        .col(boolean("os_hidden"))
        .col(big_integer("min_ram"))
        .col(big_integer("min_disk"))
        .col(text("owner"))
        .col(text_null("blob"))
        .col(big_integer("created_at_us"))
        .col(big_integer("updated_at_us"))
        .col(big_integer_null("deleted_at_us"))
        .to_owned()
}

fn property() -> TableCreateStatement {
    Table::create()
        .table("image_property")
        .col(text("image_id"))
        .col(text("name"))
        .col(text("value"))
        .primary_key(Index::create().col("image_id").col("name"))
        .to_owned()
}

fn tag() -> TableCreateStatement {
    Table::create()
        .table("image_tag")
        .col(text("image_id"))
        .col(text("tag"))
        .primary_key(Index::create().col("image_id").col("tag"))
        .to_owned()
}

fn member() -> TableCreateStatement {
    Table::create()
        .table("image_member")
        .col(text("image_id"))
        .col(text("member_id"))
        .col(text("status"))
        .col(big_integer("created_at_us"))
        .col(big_integer("updated_at_us"))
        .primary_key(Index::create().col("image_id").col("member_id"))
        .to_owned()
}
