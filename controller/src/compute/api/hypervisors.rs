//! Hypervisors: hosts with their inventory and what is taken of it.

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use fractus_agent_api::host::CpuReport;
use sea_orm::prelude::Uuid;
use serde_json::{Value, json};

use super::call::Call;
use super::hosts::{id_of, number, status, up_or_down};
use super::schemas::is_true;
use super::servers::view::instance_name;
use crate::agents::host::{self, row::Model};
use crate::compute::store::placement::{self, Placement};
use crate::http::{ApiError, Routes};
use crate::policy::Rule;

/// `hypervisor_version` as nova counts: 0.1.0 is 1000.
const VERSION: u32 = 1000;

pub fn routes(routes: Routes) -> Routes {
    const ONE: &str = "/v2.1/os-hypervisors/{id}";
    routes
        .get(
            "/v2.1/os-hypervisors",
            Rule::admin("os_compute_api:os-hypervisors:list"),
            list,
        )
        .get(
            "/v2.1/os-hypervisors/detail",
            Rule::admin("os_compute_api:os-hypervisors:list-detail"),
            detail,
        )
        .get(
            "/v2.1/os-hypervisors/statistics",
            Rule::admin("os_compute_api:os-hypervisors:statistics"),
            statistics,
        )
        .get(ONE, Rule::admin("os_compute_api:os-hypervisors:show"), show)
        .get(
            "/v2.1/os-hypervisors/{id}/search",
            Rule::admin("os_compute_api:os-hypervisors:search"),
            search,
        )
        .get(
            "/v2.1/os-hypervisors/{id}/servers",
            Rule::admin("os_compute_api:os-hypervisors:servers"),
            servers,
        )
        .get(
            "/v2.1/os-hypervisors/{id}/uptime",
            Rule::admin("os_compute_api:os-hypervisors:uptime"),
            uptime,
        )
}

/// All hosts, and what is on them.
struct Hosts {
    rows: Vec<Model>,
    placed: Vec<Placement>,
}

impl Hosts {
    async fn read(call: &Call) -> Result<Self, ApiError> {
        let rows = host::all(call.reader()).await?;
        let placed = placement::on_hosts(call.reader()).await?;
        Ok(Self { rows, placed })
    }

    fn on(&self, row: &Model) -> usize {
        self.placed
            .iter()
            .filter(|placed| placed.host_id == row.id)
            .count()
    }

    fn servers(&self, row: &Model) -> Value {
        let servers: Vec<Value> = self
            .placed
            .iter()
            .filter(|placed| placed.host_id == row.id)
            .map(|placed| {
                let id = &placed.server_id;
                json!({"name": instance_name(id), "uuid": id})
            })
            .collect();
        json!(servers)
    }
}

fn brief(call: &Call, row: &Model) -> Value {
    json!({
        "id": id_of(call, row),
        "hypervisor_hostname": row.hostname,
        "state": up_or_down(call, row),
        "status": status(row),
    })
}

fn whole(call: &Call, hosts: &Hosts, row: &Model) -> Value {
    let mut view = brief(call, row);
    let more = json!({
        "hypervisor_type": "Fractus",
        "hypervisor_version": VERSION,
        "host_ip": address(&row.endpoint),
        "service": {
            "id": id_of(call, row),
            "host": row.hostname,
            "disabled_reason": row.disabled_reason,
        },
    });
    merge(&mut view, more);
    if call.at_least(88) {
        view["uptime"] = json!(uptime_line(call, row));
        return view;
    }
    let (limits, used) = (row.limits(), row.used());
    let inventory = row.inventory();
    let disk_free = inventory.as_ref().map_or(0, |report| report.disk_free_gib);
    merge(
        &mut view,
        json!({
            "vcpus": inventory.as_ref().map_or(limits.vcpus, |report| i64::from(report.cpus)),
            "memory_mb": limits.memory_mib,
            "local_gb": limits.disk_gib,
            "vcpus_used": used.vcpus,
            "memory_mb_used": used.memory_mib,
            "local_gb_used": used.disk_gib,
            "free_ram_mb": limits.memory_mib - used.memory_mib,
            "free_disk_gb": limits.disk_gib - used.disk_gib,
            "current_workload": 0,
            "running_vms": hosts.on(row),
            "disk_available_least": disk_free,
        }),
    );
    let cpu = inventory.map_or(json!({}), |report| {
        json!({
            "arch": report.cpu.architecture,
            "model": report.cpu.model,
            "vendor": vendor(&report.cpu.vendor),
            "features": features(&report.cpu),
            "topology": {
                "cores": report.cpu.cores,
                "threads": report.cpu.threads,
                "sockets": report.cpu.sockets,
            },
        })
    });
    // Up to 2.27 the document was text within the document.
    view["cpu_info"] = if call.at_least(28) {
        cpu
    } else {
        json!(cpu.to_string())
    };
    view
}

/// As libvirt says it.
fn vendor(id: &str) -> &str {
    match id {
        "GenuineIntel" => "Intel",
        "AuthenticAMD" => "AMD",
        "HygonGenuine" => "Hygon",
        other => other,
    }
}

/// What guests may have, as far as the host's agent says so; else what the processor has.
fn features(cpu: &CpuReport) -> Vec<String> {
    match &cpu.guest {
        Some(guest) => guest.offers.features(),
        None => cpu.features.clone(),
    }
}

fn merge(view: &mut Value, more: Value) {
    if let (Value::Object(view), Value::Object(more)) = (view, more) {
        view.extend(more);
    }
}

/// The host part of `https://ADDRESS:PORT`.
fn address(endpoint: &str) -> String {
    let authority = endpoint.split("://").nth(1).unwrap_or(endpoint);
    let authority = authority.split('/').next().unwrap_or(authority);
    let host = authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host);
    host.trim_matches(['[', ']']).to_owned()
}

/// As the command `uptime` says it; `None` for a host that is not heard.
fn uptime_line(call: &Call, row: &Model) -> Option<String> {
    let fleet = call.app.compute().machines.fleet();
    let report = fleet
        .host_report(row.host_id())
        .or_else(|| row.inventory())?;
    let (days, rest) = (report.uptime_s / 86_400, report.uptime_s % 86_400);
    let [one, five, fifteen] = report.load;
    Some(format!(
        " up {days} days, {:>2}:{:02},  0 users,  load average: {one:.2}, {five:.2}, {fifteen:.2}",
        rest / 3600,
        rest % 3600 / 60
    ))
}

async fn list(call: Call) -> Result<Json<Value>, ApiError> {
    page(&call, "os-hypervisors", false).await
}

async fn detail(call: Call) -> Result<Json<Value>, ApiError> {
    page(&call, "os-hypervisors/detail", true).await
}

async fn page(call: &Call, path: &str, detailed: bool) -> Result<Json<Value>, ApiError> {
    let mut hosts = Hosts::read(call).await?;
    if call.at_least(53)
        && let Some(pattern) = call.query.last("hypervisor_hostname_pattern")
    {
        hosts.rows.retain(|row| row.hostname.contains(pattern));
        if hosts.rows.is_empty() {
            return Err(no_match(pattern));
        }
    }
    let paged = call.at_least(33);
    if let Some(marker) = call.marker().filter(|_| paged) {
        let at = hosts.rows.iter().position(|row| named(call, row, marker));
        let at = at.ok_or_else(|| ApiError::bad_request(format!("marker [{marker}] not found")))?;
        hosts.rows.drain(..=at);
    }
    let limit = usize::try_from(call.limit()?).unwrap_or(usize::MAX);
    let more = paged && hosts.rows.len() > limit;
    if more {
        hosts.rows.truncate(limit);
    }
    let with_servers = call.at_least(53) && call.query.last("with_servers").is_some_and(is_true);
    let views: Vec<Value> = hosts
        .rows
        .iter()
        .map(|row| {
            let mut view = if detailed {
                whole(call, &hosts, row)
            } else {
                brief(call, row)
            };
            if with_servers {
                put_servers(call, &hosts, row, &mut view);
            }
            view
        })
        .collect();
    let mut answer = json!({"hypervisors": views});
    if let Some(last) = hosts.rows.last().filter(|_| more) {
        let last = if call.at_least(53) {
            last.id.clone()
        } else {
            number(last).to_string()
        };
        answer["hypervisors_links"] = call.next(path, &last);
    }
    Ok(Json(answer))
}

/// Up to 2.74 a host without servers has no such field.
fn put_servers(call: &Call, hosts: &Hosts, row: &Model, view: &mut Value) {
    if hosts.on(row) > 0 || call.at_least(75) {
        view["servers"] = hosts.servers(row);
    }
}

fn named(call: &Call, row: &Model, id: &str) -> bool {
    if call.at_least(53) {
        row.id == id
    } else {
        number(row).to_string() == id
    }
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found(format!("Hypervisor with ID '{id}' could not be found."))
}

fn no_match(pattern: &str) -> ApiError {
    ApiError::not_found(format!(
        "No hypervisor matching '{pattern}' could be found."
    ))
}

async fn find(call: &Call, hosts: &Hosts, id: &str) -> Result<Model, ApiError> {
    if call.at_least(53) && Uuid::parse_str(id).is_err() {
        return Err(ApiError::bad_request(format!("Invalid uuid {id}")));
    }
    hosts
        .rows
        .iter()
        .find(|row| named(call, row, id))
        .cloned()
        .ok_or_else(|| unknown(id))
}

async fn show(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let hosts = Hosts::read(&call).await?;
    let row = find(&call, &hosts, &id).await?;
    let mut view = whole(&call, &hosts, &row);
    if call.at_least(53) && call.query.last("with_servers").is_some_and(is_true) {
        put_servers(&call, &hosts, &row, &mut view);
    }
    Ok(Json(json!({"hypervisor": view})))
}

async fn statistics(call: Call) -> Result<Json<Value>, ApiError> {
    call.until(88)?;
    let hosts = Hosts::read(&call).await?;
    let counted: Vec<&Model> = hosts.rows.iter().filter(|row| !row.disabled).collect();
    let sum = |of: fn(&Model) -> i64| counted.iter().map(|row| of(row)).sum::<i64>();
    let vcpus = |row: &Model| row.inventory().map_or(0, |report| i64::from(report.cpus));
    let free = |row: &Model| {
        row.inventory()
            .map_or(0, |r| i64::try_from(r.disk_free_gib).unwrap_or(i64::MAX))
    };
    let running: usize = counted.iter().map(|row| hosts.on(row)).sum();
    Ok(Json(json!({"hypervisor_statistics": {
        "count": counted.len(),
        "current_workload": 0,
        "disk_available_least": sum(free),
        "free_disk_gb": sum(|row| row.disk_gib_limit - row.disk_gib_used),
        "free_ram_mb": sum(|row| row.memory_mib_limit - row.memory_mib_used),
        "local_gb": sum(|row| row.disk_gib_limit),
        "local_gb_used": sum(|row| row.disk_gib_used),
        "memory_mb": sum(|row| row.memory_mib_limit),
        "memory_mb_used": sum(|row| row.memory_mib_used),
        "running_vms": running,
        "vcpus": sum(vcpus),
        "vcpus_used": sum(|row| row.vcpus_used),
    }})))
}

/// Hosts whose names contain `pattern` (up to 2.52).
async fn matching(call: &Call, pattern: &str) -> Result<Hosts, ApiError> {
    call.until(53)?;
    let mut hosts = Hosts::read(call).await?;
    hosts.rows.retain(|row| row.hostname.contains(pattern));
    if hosts.rows.is_empty() {
        Err(no_match(pattern))
    } else {
        Ok(hosts)
    }
}

async fn search(call: Call, Path(pattern): Path<String>) -> Result<Json<Value>, ApiError> {
    let hosts = matching(&call, &pattern).await?;
    let views: Vec<Value> = hosts.rows.iter().map(|row| brief(&call, row)).collect();
    Ok(Json(json!({"hypervisors": views})))
}

async fn servers(call: Call, Path(pattern): Path<String>) -> Result<Json<Value>, ApiError> {
    let hosts = matching(&call, &pattern).await?;
    let views: Vec<Value> = hosts
        .rows
        .iter()
        .map(|row| {
            let mut view = brief(&call, row);
            put_servers(&call, &hosts, row, &mut view);
            view
        })
        .collect();
    Ok(Json(json!({"hypervisors": views})))
}

async fn uptime(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    call.until(88)?;
    let hosts = Hosts::read(&call).await?;
    let row = find(&call, &hosts, &id).await?;
    let mut view = brief(&call, &row);
    let line = uptime_line(&call, &row).ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_IMPLEMENTED,
            "The requested functionality is not supported.",
        )
    })?;
    view["uptime"] = json!(line);
    Ok(Json(json!({"hypervisor": view})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_host_is_that_of_its_agent() {
        assert_eq!(address("https://10.0.0.1:9001"), "10.0.0.1");
        assert_eq!(address("https://[fd00::1]:9001"), "fd00::1");
    }
}
