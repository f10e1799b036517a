//! Operations and events ([`crate::operation`], [`crate::event`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, integer, string, text, text_null};

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(operation()).await?;
        let unfinished = ["finished_at_us", "due_at_us", "id"];
        manager
            .create_index(index("operation_due", "operation", &unfinished))
            .await?;
        let of_subject = ["subject", "created_at_us", "id"];
        manager
            .create_index(index("operation_subject", "operation", &of_subject))
            .await?;
        manager.create_table(event()).await?;
        let of_subject = ["subject", "at_us", "id"];
        manager
            .create_index(index("event_subject", "event", &of_subject))
            .await?;
        manager
            .create_index(index("event_at", "event", &["at_us", "id"]))
            .await
    }
}

fn operation() -> TableCreateStatement {
    Table::create()
        .table("operation")
        .col(text("id").primary_key())
        .col(string("kind"))
        .col(integer("version"))
        .col(text("subject"))
        .col(text("state"))
        .col(text("steps"))
        .col(integer("step"))
        .col(string("direction"))
        .col(integer("attempts"))
        .col(text_null("error"))
        .col(text_null("parked"))
        .col(text_null("request_id"))
        .col(text_null("user_id"))
        .col(text_null("project_id"))
        .col(big_integer("revision"))
        .col(big_integer("due_at_us"))
        .col(big_integer("step_entered_at_us"))
        .col(big_integer("created_at_us"))
        .col(big_integer("updated_at_us"))
        .col(big_integer_null("finished_at_us"))
        .to_owned()
}

fn event() -> TableCreateStatement {
    Table::create()
        .table("event")
        .col(text("id").primary_key())
        .col(big_integer("at_us"))
        .col(text("subject"))
        .col(text("action"))
        .col(string("phase"))
        .col(text_null("message"))
        .col(text_null("operation_id"))
        .col(text_null("request_id"))
        .col(text_null("user_id"))
        .col(text_null("project_id"))
        .col(text_null("host_id"))
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
