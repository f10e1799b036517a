//! What projects may have of compute, and what they use.
//!
//! Usage is counted from the servers' own rows within the transaction that adds to them, so it cannot
//! drift; the one writer (SQLite) or serializable transactions (PostgreSQL) keep two requests from
//! both taking what is left.

use sea_orm::sea_query::{Expr, ExprTrait, Func, Query};
use sea_orm::{ConnectionTrait, DbErr, FromQueryResult, StatementBuilder};

use super::ops::RequestError;
use super::store::quota as store;
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
    let sum = |of: fn(&Model) -> i64| rows.iter().map(|row| of(row)).sum::<i64>();
    let wanted = Usage {
        instances: i64::try_from(rows.len()).unwrap_or(i64::MAX),
        cores: sum(|row| i64::from(row.vcpus)),
        ram: sum(|row| row.ram),
    };
    check(connection, &first.project_id, wanted).await
}

/// Refuses what a server is to have more of, within the transaction that gives it.
pub async fn check_more(
    connection: &impl ConnectionTrait,
    project: &str,
    more: Usage,
) -> Result<(), RequestError> {
    match more == Usage::default() {
        // A project that has too much already may still make less of it.
        true => Ok(()),
        false => check(connection, project, more).await,
    }
}

/// Refuses what goes beyond what `project` may have. Outside of the transaction that takes it, this
/// says no early and promises nothing.
pub async fn check(
    connection: &impl ConnectionTrait,
    project: &str,
    wanted: Usage,
) -> Result<(), RequestError> {
    let used = usage(connection, project).await?;
    let limits = limits(connection, project).await?;
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
        if limit >= 0 && wanted > 0 && used.saturating_add(wanted) > limit {
            return Err(RequestError::OverQuota(format!(
                "Quota exceeded for {name}: Requested {wanted}, but already used {used} of {limit} \
                 {name}"
            )));
        }
    }
    Ok(())
}

/// A thing that is limited, with nova's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resource {
    pub name: &'static str,
    pub default: i64,
    pub shown: Shown,
}

/// At which microversions a resource is part of quotas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    Always,
    /// Up to 2.35; the network service's since.
    Network,
    /// Up to 2.56.
    Injected,
    /// Always in quota sets, from 2.50 in quota classes.
    Groups,
}

const fn resource(name: &'static str, default: i64, shown: Shown) -> Resource {
    Resource {
        name,
        default,
        shown,
    }
}

/// In the order in which answers list them.
pub const RESOURCES: [Resource; 14] = [
    resource("cores", 20, Shown::Always),
    resource("fixed_ips", -1, Shown::Network),
    resource("floating_ips", -1, Shown::Network),
    resource("injected_file_content_bytes", 10240, Shown::Injected),
    resource("injected_file_path_bytes", 255, Shown::Injected),
    resource("injected_files", 5, Shown::Injected),
    resource("instances", 10, Shown::Always),
    resource("key_pairs", 100, Shown::Always),
    resource("metadata_items", 128, Shown::Always),
    resource("ram", 51200, Shown::Always),
    resource("security_group_rules", -1, Shown::Network),
    resource("security_groups", -1, Shown::Network),
    resource("server_group_members", 10, Shown::Groups),
    resource("server_groups", 10, Shown::Groups),
];

/// The limits of one project, or (`None`) the defaults, of every resource.
pub async fn limits_of(
    connection: &impl ConnectionTrait,
    project: Option<&str>,
) -> Result<Vec<(Resource, i64)>, DbErr> {
    let defaults = store::of_project(connection, "").await?;
    let own = match project {
        Some(project) => store::of_project(connection, project).await?,
        None => Default::default(),
    };
    let limit = |resource: &Resource| {
        let set = own
            .get(resource.name)
            .or_else(|| defaults.get(resource.name));
        set.copied().unwrap_or(resource.default)
    };
    Ok(RESOURCES
        .iter()
        .map(|resource| (*resource, limit(resource)))
        .collect())
}

async fn limits(connection: &impl ConnectionTrait, project: &str) -> Result<Usage, DbErr> {
    let limits = limits_of(connection, Some(project)).await?;
    let of = |name: &str| {
        limits
            .iter()
            .find(|(resource, _)| resource.name == name)
            .map_or(-1, |(_, limit)| *limit)
    };
    Ok(Usage {
        instances: of("instances"),
        cores: of("cores"),
        ram: of("ram"),
    })
}
