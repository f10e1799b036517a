//! What projects may have of compute, and what they use.
//!
//! Usage is counted from the servers' own rows within the transaction that adds to them, so it cannot
//! drift; the one writer (SQLite) or serializable transactions (PostgreSQL) keep two requests from
//! both taking what is left.

use sea_orm::sea_query::{Expr, ExprTrait, Func, Query};
use sea_orm::{ConnectionTrait, DbErr, FromQueryResult, StatementBuilder};

use super::ops::RequestError;
use super::store::server::Model;

/// Amounts of what is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub instances: i64,
    pub cores: i64,
    /// MiB.
    pub ram: i64,
}

/// What `project` uses.
pub async fn usage(connection: &impl ConnectionTrait, project: &str) -> Result<Usage, DbErr> {
    #[derive(FromQueryResult)]
    struct Sums {
        instances: i64,
        cores: Option<i64>,
        ram: Option<i64>,
    }
    let big =
        |column: &'static str| Func::cast_as(Func::sum(Expr::col(("server", column))), "bigint");
    let query = Query::select()
        .expr_as(Func::count(Expr::col(("server", "id"))), "instances")
        .expr_as(big("vcpus"), "cores")
        .expr_as(big("ram"), "ram")
        .from("server")
        .and_where(Expr::col(("server", "project_id")).eq(project))
        .and_where(Expr::col(("server", "deleted_at_us")).is_null())
        .to_owned();
    let statement = StatementBuilder::build(&query, &connection.get_database_backend());
    let sums = Sums::find_by_statement(statement).one(connection).await?;
    Ok(sums.map_or(Usage::default(), |sums| Usage {
        instances: sums.instances,
        cores: sums.cores.unwrap_or_default(),
        ram: sums.ram.unwrap_or_default(),
    }))
}

/// Refuses servers (all of one project) that go beyond what the project may have.
pub async fn claim(connection: &impl ConnectionTrait, rows: &[&Model]) -> Result<(), RequestError> {
    let Some(first) = rows.first() else {
        return Ok(());
    };
    let used = usage(connection, &first.project_id).await?;
    let limits = limits(connection, &first.project_id).await?;
    let sum = |of: fn(&Model) -> i64| rows.iter().map(|row| of(row)).sum::<i64>();
    let wanted = Usage {
        instances: i64::try_from(rows.len()).unwrap_or(i64::MAX),
        cores: sum(|row| i64::from(row.vcpus)),
        ram: sum(|row| row.ram),
    };
    for (name, wanted, used, limit) in [
        ("cores", wanted.cores, used.cores, limits.cores),
        (
            "instances",
            wanted.instances,
            used.instances,
            limits.instances,
        ),
        ("ram", wanted.ram, used.ram, limits.ram),
    ] {
        if limit >= 0 && used + wanted > limit {
            return Err(RequestError::OverQuota(format!(
                "Quota exceeded for {name}: Requested {wanted}, but already used {used} of {limit} \
                 {name}"
            )));
        }
    }
    Ok(())
}

/// Nova's defaults, until an administrator says otherwise.
const DEFAULTS: Usage = Usage {
    instances: 10,
    cores: 20,
    ram: 51200,
};

async fn limits(_: &impl ConnectionTrait, _: &str) -> Result<Usage, DbErr> {
    Ok(DEFAULTS)
}
