//! Which image a shelved server is kept in ([`crate::compute`]).

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::text_null;

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let kept_in = Table::alter()
            .table("server")
            .add_column(text_null("shelved_image_id"))
            .to_owned();
        manager.alter_table(kept_in).await
    }
}
