//! Lists of servers: filters, sorting, pages.

use std::sync::LazyLock;

use sea_orm::prelude::Uuid;
use serde_json::{Value, json};

use super::schema::{self, Aged};
use crate::compute::api::call::Call;
use crate::compute::api::schemas::{is_false, is_true};
use crate::compute::model::state::ServerState;
use crate::compute::model::time;
use crate::compute::store::server::{self, Column, Filter, Model, Sort, escape_like};
use crate::http::ApiError;
use crate::policy::Rule;

/// A page of servers.
pub struct Page {
    pub rows: Vec<Model>,
    /// The link to the next page, if there may be one.
    pub next: Option<Value>,
}

/// Reads the query and the page that it asks for; `path` below the version.
pub async fn page(call: &Call, path: &str) -> Result<Page, ApiError> {
    static QUERY: LazyLock<Aged> = LazyLock::new(|| Aged::new(schema::LIST_AGES, schema::list));
    call.check_query(QUERY.at(call.ctx.microversion()))?;
    let limit = call.limit()?;
    let filter = filter(call, path).await?;
    let sorts = sorts(call);
    let marker = match call.marker() {
        None => None,
        Some(id) => {
            let unknown = || ApiError::bad_request(format!("marker [{id}] not found"));
            Uuid::parse_str(id).map_err(|_| unknown())?;
            let row = server::find_any(call.reader(), id)
                .await?
                .ok_or_else(unknown)?;
            if !call.caller.may_see(&row.project_id) {
                return Err(unknown());
            }
            Some(row)
        }
    };
    if limit == 0 {
        return Ok(Page {
            rows: Vec::new(),
            next: None,
        });
    }
    let rows = server::list(call.reader(), &filter, &sorts, marker.as_ref(), limit).await?;
    let full = rows.len() as u64 == limit;
    let next = rows
        .last()
        .filter(|_| full)
        .map(|last| call.next(path, &last.id));
    Ok(Page { rows, next })
}

fn sorts(call: &Call) -> Vec<Sort> {
    let directions: Vec<bool> = call
        .query
        .all("sort_dir")
        .map(|dir| dir == "desc")
        .collect();
    let first = directions.first().copied().unwrap_or(true);
    let mut sorts: Vec<Sort> = call
        .query
        .all("sort_key")
        .enumerate()
        .map(|(at, key)| Sort {
            column: column(key),
            descending: directions.get(at).copied().unwrap_or(first),
        })
        .collect();
    if sorts.is_empty() {
        sorts.push(Sort {
            column: Column::CreatedAtUs,
            descending: first,
        });
    }
    sorts.push(Sort {
        column: Column::Id,
        descending: first,
    });
    sorts
}

/// The column of a sort key. Keys of what this cloud does not keep sort by the id alone.
fn column(key: &str) -> Column {
    match key {
        "auto_disk_config" => Column::DiskConfig,
        "display_name" => Column::Name,
        "display_description" => Column::Description,
        "access_ip_v4" => Column::AccessIpV4,
        "access_ip_v6" => Column::AccessIpV6,
        "locked" | "locked_by" => Column::LockedBy,
        "launched_at" => Column::LaunchedAtUs,
        "terminated_at" => Column::TerminatedAtUs,
        "created_at" => Column::CreatedAtUs,
        "updated_at" => Column::UpdatedAtUs,
        "key_name" => Column::KeyName,
        "project_id" => Column::ProjectId,
        "user_id" => Column::UserId,
        "hostname" => Column::Hostname,
        "vm_state" | "task_state" | "power_state" => Column::State,
        "kernel_id" => Column::KernelId,
        "ramdisk_id" => Column::RamdiskId,
        "config_drive" => Column::ConfigDrive,
        "availability_zone" => Column::AvailabilityZone,
        "image_ref" => Column::ImageId,
        "instance_type_id" => Column::FlavorId,
        "launch_index" => Column::LaunchIndex,
        _ => Column::Id,
    }
}

/// Filters that anybody may use; with 2.82 and 2.83 more of them joined.
const EVERYBODYS: [&str; 17] = [
    "reservation_id",
    "name",
    "status",
    "image",
    "flavor",
    "ip",
    "changes-since",
    "all_tenants",
    "access_ip_v4",
    "access_ip_v6",
    "uuid",
    "locked",
    "tags",
    "tags-any",
    "not-tags",
    "not-tags-any",
    "metadata",
];
const EVERYBODYS_LATER: [&str; 9] = [
    "availability_zone",
    "config_drive",
    "key_name",
    "created_at",
    "launched_at",
    "terminated_at",
    "power_state",
    "task_state",
    "vm_state",
];
const EVERYBODYS_AT_83: [&str; 5] = [
    "display_description",
    "description",
    "user_id",
    "hostname",
    "progress",
];

/// Whether the caller may filter by this parameter; what he may not is ignored.
fn permitted(call: &Call, name: &str) -> bool {
    call.caller.is_admin()
        || EVERYBODYS.contains(&name)
        || (name == "ip6" && call.at_least(5))
        || (name == "changes-before" && call.at_least(66))
        || (call.at_least(83)
            && (EVERYBODYS_LATER.contains(&name) || EVERYBODYS_AT_83.contains(&name)))
}

async fn filter(call: &Call, path: &str) -> Result<Filter, ApiError> {
    let get = |name: &str| call.query.last(name).filter(|_| permitted(call, name));
    let mut filter = Filter {
        deleted: Some(false),
        ..Filter::default()
    };
    scope(call, path, &mut filter)?;
    states(call, &get, &mut filter)?;
    times(&get, &mut filter)?;
    columns(&get, &mut filter);
    if let Some(host) = get("host").or_else(|| get("node")) {
        filter.host = Some(host_by_name(call, host).await?);
    }
    // No server has an address before there are networks.
    if get("ip").is_some_and(|ip| !ip.is_empty()) || get("ip6").is_some_and(|ip| !ip.is_empty()) {
        filter.nothing = true;
    }
    if call.at_least(26) {
        let list = |name: &str| -> Vec<String> {
            let text = get(name).unwrap_or_default();
            text.split(',')
                .filter(|tag| !tag.is_empty())
                .map(str::to_owned)
                .collect()
        };
        filter.tags = list("tags");
        filter.tags_any = list("tags-any");
        filter.not_tags = list("not-tags");
        filter.not_tags_any = list("not-tags-any");
    }
    if let Some(text) = get("metadata") {
        let pairs: serde_json::Map<String, Value> = serde_json::from_str(&text.replace('\'', "\""))
            .map_err(|_| ApiError::bad_request(format!("Invalid metadata filter [{text}]")))?;
        for (name, value) in pairs {
            filter
                .metadata
                .push((name, value.as_str().unwrap_or_default().to_owned()));
        }
    }
    Ok(filter)
}

/// Whose servers: one's own project's; with `all_tenants` (administrators) everybody's, or those of
/// `project_id`.
fn scope(call: &Call, path: &str, filter: &mut Filter) -> Result<(), ApiError> {
    let all = call
        .query
        .last("all_tenants")
        .is_some_and(|text| !is_false(text));
    if all {
        call.require(Rule::admin(if path.ends_with("detail") {
            "os_compute_api:servers:detail:get_all_tenants"
        } else {
            "os_compute_api:servers:index:get_all_tenants"
        }))?;
        let project = call
            .query
            .last("project_id")
            .or_else(|| call.query.last("tenant_id"));
        filter.project = project.map(str::to_owned);
    } else {
        filter.project = Some(call.project()?.to_owned());
    }
    if call.caller.is_admin() && call.query.last("deleted").is_some_and(is_true) {
        filter.deleted = Some(true);
    }
    Ok(())
}

fn states<'a>(
    call: &Call,
    get: &impl Fn(&str) -> Option<&'a str>,
    filter: &mut Filter,
) -> Result<(), ApiError> {
    let mut allowed: Vec<ServerState> = ServerState::all().collect();
    let mut narrowed = false;
    let statuses: Vec<&str> = call
        .query
        .all("status")
        .filter(|text| !text.is_empty())
        .collect();
    if !statuses.is_empty() {
        let wanted: Vec<ServerState> = statuses
            .iter()
            .flat_map(|status| ServerState::of_status(status))
            .collect();
        if wanted.is_empty() && call.at_least(38) {
            return Err(ApiError::bad_request("Invalid status value"));
        }
        if wanted.contains(&ServerState::Deleted) {
            if !call.caller.is_admin() {
                return Err(ApiError::forbidden(
                    "Only administrators may list deleted instances",
                ));
            }
            filter.deleted = Some(true);
        }
        allowed.retain(|state| wanted.contains(state));
        narrowed = true;
    }
    type Projected = fn(ServerState) -> String;
    let projections: [(&str, Projected); 3] = [
        ("vm_state", |state| state.project().vm_state.to_owned()),
        ("task_state", |state| {
            state.project().task_state.unwrap_or("None").to_owned()
        }),
        ("power_state", |state| {
            (state.project().power_state as u8).to_string()
        }),
    ];
    for (name, of) in projections {
        if let Some(text) = get(name) {
            allowed.retain(|state| of(*state).eq_ignore_ascii_case(text));
            narrowed = true;
        }
    }
    if narrowed {
        filter.nothing |= allowed.is_empty();
        filter.states = Some(allowed);
    }
    Ok(())
}

fn times<'a>(get: &impl Fn(&str) -> Option<&'a str>, filter: &mut Filter) -> Result<(), ApiError> {
    let read = |name: &str| match get(name) {
        None => Ok(None),
        Some(text) => time::parse(text).map(Some).ok_or_else(|| {
            ApiError::bad_request(format!(
                "Invalid input for query parameters {name}. Value: {text}."
            ))
        }),
    };
    filter.changed_since_us = read("changes-since")?;
    filter.changed_before_us = read("changes-before")?;
    if filter.changed_since_us.is_some() || filter.changed_before_us.is_some() {
        // Deleted servers are changes too.
        filter.deleted = None;
    }
    if let (Some(since), Some(before)) = (filter.changed_since_us, filter.changed_before_us)
        && since > before
    {
        return Err(ApiError::bad_request(
            "The value of changes-since must be less than or equal to changes-before.",
        ));
    }
    Ok(())
}

fn columns<'a>(get: &impl Fn(&str) -> Option<&'a str>, filter: &mut Filter) {
    let exact = [
        ("uuid", Column::Id),
        ("user_id", Column::UserId),
        ("reservation_id", Column::ReservationId),
        ("key_name", Column::KeyName),
        ("kernel_id", Column::KernelId),
        ("ramdisk_id", Column::RamdiskId),
        ("hostname", Column::Hostname),
        ("availability_zone", Column::AvailabilityZone),
        ("image_ref", Column::ImageId),
        ("locked_by", Column::LockedBy),
    ];
    for (name, column) in exact {
        if let Some(value) = get(name) {
            filter.equal.push((column, value.into()));
        }
    }
    // Clients give an id or a link.
    for (name, column) in [("image", Column::ImageId), ("flavor", Column::FlavorId)] {
        if let Some(value) = get(name) {
            let id = value.rsplit('/').next().unwrap_or(value);
            filter.equal.push((column, id.into()));
        }
    }
    for (names, column) in [
        (["name", "display_name"], Column::Name),
        (["description", "display_description"], Column::Description),
        (["access_ip_v4", "access_ip_v4"], Column::AccessIpV4),
        (["access_ip_v6", "access_ip_v6"], Column::AccessIpV6),
    ] {
        if let Some(pattern) = names.iter().find_map(|name| get(name)) {
            filter.like.push((column, like_of_regex(pattern)));
        }
    }
    if let Some(text) = get("config_drive") {
        let value = if is_true(text) { "True" } else { "" };
        filter.equal.push((Column::ConfigDrive, value.into()));
    }
    if let Some(text) = get("locked") {
        filter.present.push((Column::LockedBy, is_true(text)));
    }
    if let Some(index) = get("launch_index").and_then(|text| text.parse::<i32>().ok()) {
        filter.equal.push((Column::LaunchIndex, index.into()));
    }
}

/// A regular expression as a `LIKE` pattern, as far as names are searched with: text, anchors, `.`,
/// `.*`. Anything else is taken literally.
fn like_of_regex(regex: &str) -> String {
    let (start, body) = match regex.strip_prefix('^') {
        Some(rest) => ("", rest),
        None => ("%", regex),
    };
    let (body, end) = match body.strip_suffix('$') {
        Some(rest) => (rest, ""),
        None => (body, "%"),
    };
    let mut pattern = String::from(start);
    let mut letters = body.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '.' if letters.peek() == Some(&'*') => {
                letters.next();
                pattern.push('%');
            }
            '.' => pattern.push('_'),
            '\\' => {
                if let Some(next) = letters.next() {
                    pattern.push_str(&escape_like(&next.to_string()));
                }
            }
            other => pattern.push_str(&escape_like(&other.to_string())),
        }
    }
    pattern.push_str(end);
    pattern
}

async fn host_by_name(call: &Call, name: &str) -> Result<Option<String>, ApiError> {
    Ok(crate::compute::store::placement::host_id(call.reader(), name).await?)
}

/// The body of a list.
pub fn body(servers: Vec<Value>, next: Option<Value>) -> Value {
    let mut body = json!({"servers": servers});
    if let Some(next) = next {
        body["servers_links"] = next;
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_filter_is_a_regular_expression() {
        assert_eq!(like_of_regex("web"), "%web%");
        assert_eq!(like_of_regex("^web-1$"), "web-1");
        assert_eq!(like_of_regex("a.*b_c"), r"%a%b\_c%");
        assert_eq!(like_of_regex(r"a\.b"), "%a.b%");
    }
}
