//! Which images a list shows: the caller's view of them, and the query's filters.

use sea_orm::ColumnTrait;
use sea_orm::sea_query::Condition;

use super::store::image::Column;
use super::store::{has_property, has_tag, shared_with};
use crate::http::{ApiError, Caller, Query};

/// Parameters that steer the list and filter nothing.
const STEERING: [&str; 7] = [
    "limit",
    "marker",
    "sort",
    "sort_key",
    "sort_dir",
    "member_status",
    "visibility",
];

/// The condition of `GET /v2/images` for this caller and query.
pub fn condition(caller: &Caller, query: &Query) -> Result<Condition, ApiError> {
    let mut all = Condition::all().add(visible(caller, query)?);
    if !query.contains("os_hidden") {
        all = all.add(Column::OsHidden.eq(false));
    }
    for (name, value) in query.pairs() {
        if !STEERING.contains(&name) {
            all = all.add(filter(name, value)?);
        }
    }
    Ok(all)
}

fn visible(caller: &Caller, query: &Query) -> Result<Condition, ApiError> {
    let statuses: &[&str] = match query.get("member_status").unwrap_or("accepted") {
        "accepted" => &["accepted"],
        "pending" => &["pending"],
        "rejected" => &["rejected"],
        "all" => &["accepted", "pending", "rejected"],
        other => {
            return Err(ApiError::bad_request(format!("Invalid status: {other}")));
        }
    };
    let project = caller.project_id().unwrap_or_default();
    let own = Condition::all().add(Column::Owner.eq(project));
    let shared = shared_with(project, statuses);
    let everything = caller.is_admin();
    let of = |visibility: &str| Condition::all().add(Column::Visibility.eq(visibility));
    Ok(match query.get("visibility") {
        None if everything => Condition::any()
            .add(Column::Visibility.ne("community"))
            .add(own),
        None => Condition::any().add(of("public")).add(own).add(shared),
        Some("all") if everything => Condition::all(),
        Some("all") => Condition::any()
            .add(of("public"))
            .add(of("community"))
            .add(own)
            .add(shared),
        Some(kind @ ("public" | "community")) => of(kind),
        Some("private") if everything => of("private"),
        Some("private") => of("private").add(own),
        Some("shared") if everything => of("shared"),
        Some("shared") => Condition::any().add(of("shared").add(own)).add(shared),
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "Invalid visibility value: {other}"
            )));
        }
    })
}

fn filter(name: &str, value: &str) -> Result<Condition, ApiError> {
    let all = Condition::all();
    let number =
        || {
            value.parse::<i64>().ok().filter(|number| *number >= 0).ok_or_else(|| {
            ApiError::bad_request(format!(
                "Invalid value '{value}' for parameter '{name}': must be a number of at least 0"
            ))
        })
        };
    Ok(match name {
        "name" => all.add(among(Column::Name, value)?),
        "status" => all.add(among(Column::Status, value)?),
        "id" => all.add(among(Column::Id, value)?),
        "disk_format" => all.add(among(Column::DiskFormat, value)?),
        "container_format" => all.add(among(Column::ContainerFormat, value)?),
        "owner" => all.add(Column::Owner.eq(value)),
        "checksum" => all.add(Column::Checksum.eq(value)),
        "os_hash_value" => all.add(Column::OsHashValue.eq(value)),
        "os_hash_algo" if value == "sha512" => all.add(Column::OsHashValue.is_not_null()),
        "os_hash_algo" => all.add(Column::Id.is_null()),
        "min_ram" => all.add(Column::MinRam.eq(number()?)),
        "min_disk" => all.add(Column::MinDisk.eq(number()?)),
        "size_min" => all.add(Column::Size.gte(number()?)),
        "size_max" => all.add(Column::Size.lte(number()?)),
        "protected" => all.add(Column::Protected.eq(boolean(name, value)?)),
        "os_hidden" => all.add(Column::OsHidden.eq(boolean(name, value)?)),
        "tag" => all.add(has_tag(value)),
        "created_at" => all.add(at_time(Column::CreatedAtUs, value)?),
        "updated_at" => all.add(at_time(Column::UpdatedAtUs, value)?),
        property => all.add(has_property(property, value)),
    })
}

fn boolean(name: &str, value: &str) -> Result<bool, ApiError> {
    match value.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(ApiError::bad_request(format!(
            "Invalid value '{value}' for '{name}'; it is True or False."
        ))),
    }
}

/// `value`, or one of `in:a,"b,c",d`.
fn among(column: Column, value: &str) -> Result<Condition, ApiError> {
    let all = Condition::all();
    let Some(list) = value.strip_prefix("in:") else {
        return Ok(all.add(column.eq(value)));
    };
    let mut items = Vec::new();
    let mut item = String::new();
    let mut quoted = false;
    for letter in list.chars() {
        match letter {
            '"' => quoted = !quoted,
            ',' if !quoted => items.push(std::mem::take(&mut item)),
            other => item.push(other),
        }
    }
    items.push(item);
    if quoted || items.iter().any(String::is_empty) {
        return Err(ApiError::bad_request(format!(
            "Invalid filter value {value}."
        )));
    }
    Ok(all.add(column.is_in(items)))
}

/// `OPERATOR:TIME` with gt, gte, lt, lte, eq, neq and an ISO 8601 time; without an operator, eq. Times
/// are shown by the second, so they compare by the second.
fn at_time(column: Column, value: &str) -> Result<Condition, ApiError> {
    const SECOND_US: i64 = 1_000_000;
    let (operator, time) = match value.split_once(':') {
        Some((operator @ ("gt" | "gte" | "lt" | "lte" | "eq" | "neq"), time)) => (operator, time),
        _ => ("eq", value),
    };
    let begins = parse_time(time)
        .ok_or_else(|| ApiError::bad_request(format!("Bad \"{value}\" query filter format.")))?
        .div_euclid(SECOND_US)
        * SECOND_US;
    let ends = begins.saturating_add(SECOND_US);
    let all = Condition::all();
    Ok(match operator {
        "gt" => all.add(column.gte(ends)),
        "gte" => all.add(column.gte(begins)),
        "lt" => all.add(column.lt(begins)),
        "lte" => all.add(column.lt(ends)),
        "neq" => Condition::any()
            .add(column.lt(begins))
            .add(column.gte(ends)),
        _ => all.add(column.gte(begins)).add(column.lt(ends)),
    })
}

fn parse_time(text: &str) -> Option<i64> {
    let with_zone = text.parse::<jiff::Timestamp>().ok();
    let at = with_zone.or_else(|| {
        let civil = text.parse::<jiff::civil::DateTime>().ok()?;
        Some(civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp())
    })?;
    Some(at.as_microsecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_and_without_a_zone() {
        assert_eq!(parse_time("1970-01-01T00:00:01Z"), Some(1_000_000));
        assert_eq!(parse_time("1970-01-01T00:00:01"), Some(1_000_000));
        assert_eq!(parse_time("yesterday"), None);
    }

    #[test]
    fn lists_of_values_keep_quoted_commas_and_refuse_empty_ones() {
        assert!(among(Column::Name, "in:a,\"b,c\"").is_ok());
        assert!(among(Column::Name, "in:a,,b").is_err());
        assert!(among(Column::Name, "in:\"a").is_err());
    }
}
