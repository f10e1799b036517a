//! Where servers are, read from what the agents' part keeps (tables `machine` and `host`).

use std::collections::HashMap;

use sea_orm::sea_query::{Expr, ExprTrait, JoinType, Query};
use sea_orm::{ConnectionTrait, DbErr, FromQueryResult, StatementBuilder};

/// A server's host.
#[derive(Debug, Clone, PartialEq, Eq, FromQueryResult)]
pub struct Placement {
    pub server_id: String,
    pub host_id: String,
    pub hostname: String,
    pub disabled: bool,
    pub forced_down: bool,
    pub heard_at_us: i64,
}

/// The hosts of these servers; those without one are left out.
pub async fn of_servers(
    connection: &impl ConnectionTrait,
    servers: impl IntoIterator<Item = String>,
) -> Result<HashMap<String, Placement>, DbErr> {
    let mut query = select();
    query.and_where(Expr::col(("machine", "server_id")).is_in(servers));
    let found = rows(connection, &query).await?;
    Ok(found
        .into_iter()
        .map(|row| (row.server_id.clone(), row))
        .collect())
}

/// Every server that a host owns.
pub async fn on_hosts(connection: &impl ConnectionTrait) -> Result<Vec<Placement>, DbErr> {
    rows(connection, &select()).await
}

fn select() -> sea_orm::sea_query::SelectStatement {
    Query::select()
        .column(("machine", "server_id"))
        .column(("machine", "host_id"))
        .column(("host", "hostname"))
        .column(("host", "disabled"))
        .column(("host", "forced_down"))
        .column(("host", "heard_at_us"))
        .from("machine")
        .join(
            JoinType::InnerJoin,
            "host",
            Expr::col(("machine", "host_id")).equals(("host", "id")),
        )
        .to_owned()
}

async fn rows(
    connection: &impl ConnectionTrait,
    query: &sea_orm::sea_query::SelectStatement,
) -> Result<Vec<Placement>, DbErr> {
    let statement = StatementBuilder::build(query, &connection.get_database_backend());
    Placement::find_by_statement(statement)
        .all(connection)
        .await
}

/// The id of the host of this name.
pub async fn host_id(
    connection: &impl ConnectionTrait,
    hostname: &str,
) -> Result<Option<String>, DbErr> {
    #[derive(FromQueryResult)]
    struct Found {
        id: String,
    }
    let query = Query::select()
        .column("id")
        .from("host")
        .and_where(Expr::col("hostname").eq(hostname))
        .and_where(Expr::col("removed_at_us").is_null())
        .to_owned();
    let statement = StatementBuilder::build(&query, &connection.get_database_backend());
    let found = Found::find_by_statement(statement).one(connection).await?;
    Ok(found.map(|found| found.id))
}
