//! Pages: limit, marker, sorting, and the links to the next one.
//!
//! A page is found by keyset: rows after the marker's values of the sort keys, the id last, so that
//! an index serves it and rows that come and go do not shift the pages.

use sea_orm::sea_query::{Condition, Expr, ExprTrait, SimpleExpr};
use sea_orm::{Order, Value};

use crate::http::{ApiError, Query, RequestContext};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Ascending,
    Descending,
}

impl Direction {
    pub fn order(self) -> Order {
        match self {
            Self::Ascending => Order::Asc,
            Self::Descending => Order::Desc,
        }
    }
}

/// What a list can be asked for.
#[derive(Debug, Clone, Copy)]
pub struct PageRules {
    /// Rows a page has at most, and without a limit in the query.
    pub most: u64,
    /// Names that may be sorted by; any other is 400.
    pub sort_keys: &'static [&'static str],
    pub default_sort: &'static [(&'static str, Direction)],
    /// Direction of a `sort_key` without a `sort_dir`.
    pub default_direction: Direction,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// Rows to give at most.
    pub limit: u64,
    /// Whether the query named a limit (nova links to a next page only then, or when full).
    pub limited: bool,
    pub marker: Option<String>,
    /// Never empty; the id, as the last key, is the store's to add.
    pub sort: Vec<(String, Direction)>,
}

impl PageRequest {
    /// Reads `limit`, `marker`, `sort_key`, `sort_dir` (both repeatable).
    pub fn parse(query: &Query, rules: &PageRules) -> Result<Self, ApiError> {
        let limit = query.last("limit").map(parse_limit).transpose()?;
        let mut sort = Vec::new();
        let mut directions = query.all("sort_dir");
        let mut last = rules.default_direction;
        for key in query.all("sort_key") {
            if !rules.sort_keys.contains(&key) {
                return Err(ApiError::bad_request(format!(
                    "Invalid sort key: {key}. It must be one of the following: {}.",
                    rules.sort_keys.join(", ")
                )));
            }
            if let Some(direction) = directions.next() {
                last = parse_direction(direction)?;
            }
            sort.push((key.to_owned(), last));
        }
        if sort.is_empty() {
            let direction = directions.next().map(parse_direction).transpose()?;
            let default = rules.default_sort.iter();
            sort.extend(default.map(|(key, d)| ((*key).to_owned(), direction.unwrap_or(*d))));
        }
        Ok(Self {
            limit: limit.map_or(rules.most, |limit| std::cmp::min(limit, rules.most)),
            limited: limit.is_some(),
            marker: query
                .last("marker")
                .filter(|text| !text.is_empty())
                .map(str::to_owned),
            sort,
        })
    }

    /// The absolute link to the page after `last_id`.
    pub fn next(&self, ctx: &RequestContext, path: &str, query: &Query, last_id: &str) -> String {
        format!("{}?{}", ctx.link(path), query.with("marker", Some(last_id)))
    }
}

fn parse_limit(text: &str) -> Result<u64, ApiError> {
    text.parse::<i64>()
        .map_err(|_| ApiError::bad_request("limit param must be an integer"))
        .and_then(|limit| {
            u64::try_from(limit).map_err(|_| ApiError::bad_request("limit param must be positive"))
        })
}

fn parse_direction(text: &str) -> Result<Direction, ApiError> {
    match text {
        "asc" => Ok(Direction::Ascending),
        "desc" => Ok(Direction::Descending),
        other => Err(ApiError::bad_request(format!(
            "Unknown sort direction, must be one of: asc, desc, not {other}"
        ))),
    }
}

/// The condition for rows after a marker: for keys a, b with the marker's values x, y it is
/// `a > x or (a = x and b > y)`. NULLs come first when ascending (as SQLite sorts; PostgreSQL is
/// told so by the store's ORDER BY).
pub fn after(keys: &[(SimpleExpr, Direction, Option<Value>)]) -> Condition {
    let mut any = Condition::any();
    for (at, (column, direction, value)) in keys.iter().enumerate() {
        let mut all = Condition::all();
        for (column, _, value) in &keys[..at] {
            all = all.add(equals(column, value.as_ref()));
        }
        let Some(beyond) = beyond(column, *direction, value.as_ref()) else {
            continue;
        };
        any = any.add(all.add(beyond));
    }
    if any.is_empty() {
        Condition::all().add(Expr::val(false))
    } else {
        any
    }
}

fn equals(column: &SimpleExpr, value: Option<&Value>) -> SimpleExpr {
    match value {
        Some(value) => column.clone().eq(value.clone()),
        None => column.clone().is_null(),
    }
}

fn beyond(column: &SimpleExpr, direction: Direction, value: Option<&Value>) -> Option<Condition> {
    let column = column.clone();
    match (direction, value) {
        (Direction::Ascending, Some(value)) => Some(Condition::all().add(column.gt(value.clone()))),
        (Direction::Ascending, None) => Some(Condition::all().add(column.is_not_null())),
        (Direction::Descending, Some(value)) => {
            let below = Condition::any().add(column.clone().lt(value.clone()));
            Some(below.add(column.is_null()))
        }
        (Direction::Descending, None) => None,
    }
}
