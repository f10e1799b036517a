//! `os-simple-tenant-usage`: how long servers ran in a period, and what they held meanwhile, by project.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::Path;
use serde_json::{Value, json};

use super::call::Call;
use crate::compute::model::time;
use crate::compute::store::server::{self, Model};
use crate::http::{ApiError, Routes};
use crate::policy::Rule;

/// Servers that are read at once, and at most on a page.
const PAGE: u64 = 1000;
const HOUR_US: f64 = 3_600_000_000.0;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v2.1/os-simple-tenant-usage",
            Rule::admin("os_compute_api:os-simple-tenant-usage:list"),
            list,
        )
        .get(
            "/v2.1/os-simple-tenant-usage/{id}",
            Rule::reader("os_compute_api:os-simple-tenant-usage:show"),
            show,
        )
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
struct Period {
    from_us: i64,
    to_us: i64,
    now_us: i64,
}

impl Period {
    /// `start` and `end`, each now if it is not given; what is to come is not counted.
    fn of(call: &Call) -> Result<Self, ApiError> {
        let moment = |name: &str, otherwise: i64| match call.query.last(name) {
            None | Some("") => Ok(otherwise),
            Some(text) => time::parse(text)
                .ok_or_else(|| ApiError::bad_request("Datetime is in invalid format")),
        };
        let now_us = call.app.now_us();
        let from_us = moment("start", now_us - 1)?;
        let to_us = moment("end", now_us)?;
        if from_us >= to_us {
            return Err(ApiError::bad_request(
                "Invalid start time. The start time cannot occur after the end time.",
            ));
        }
        // A period that has not begun is empty, and not negative.
        let to_us = to_us.min(now_us).max(from_us);
        Ok(Self {
            from_us,
            to_us,
            now_us,
        })
    }

    /// Hours of the period in which the server was there.
    fn hours(self, row: &Model) -> f64 {
        let Some(launched) = row.launched_at_us else {
            return 0.0;
        };
        let until = row.terminated_at_us.unwrap_or(self.to_us).min(self.to_us);
        (until - launched.max(self.from_us)).max(0) as f64 / HOUR_US
    }
}

/// One project's sums.
#[derive(Debug, Default)]
struct Sum {
    hours: f64,
    gib_hours: f64,
    vcpu_hours: f64,
    mib_hours: f64,
    servers: Vec<Value>,
}

impl Sum {
    /// `detailed`: the server is listed, too.
    fn add(&mut self, row: &Model, period: Period, detailed: bool) -> Result<(), ApiError> {
        let flavor = row.flavor()?;
        let hours = period.hours(row);
        let gib = flavor.disk + flavor.ephemeral;
        self.hours += hours;
        self.gib_hours += hours * gib as f64;
        self.vcpu_hours += hours * f64::from(flavor.vcpus);
        self.mib_hours += hours * flavor.ram as f64;
        if !detailed {
            return Ok(());
        }
        let launched = row.launched_at_us;
        let until = row.terminated_at_us.unwrap_or(period.now_us);
        self.servers.push(json!({
            "hours": hours,
            "flavor": flavor.name,
            "instance_id": row.id,
            "name": row.name,
            "tenant_id": row.project_id,
            "memory_mb": flavor.ram,
            "local_gb": gib,
            "vcpus": flavor.vcpus,
            "started_at": launched.map(time::micros),
            "ended_at": row.terminated_at_us.map(time::micros),
            "state": match row.terminated_at_us {
                Some(_) => "terminated",
                None => row.state().project().vm_state,
            },
            "uptime": launched.map_or(0, |launched| (until - launched).max(0) / 1_000_000),
        }));
        Ok(())
    }

    fn view(self, project: &str, period: Period, detailed: bool) -> Value {
        let mut view = json!({
            "tenant_id": project,
            "total_local_gb_usage": self.gib_hours,
            "total_vcpus_usage": self.vcpu_hours,
            "total_memory_mb_usage": self.mib_hours,
            "total_hours": self.hours,
            "start": time::micros(period.from_us),
            "stop": time::micros(period.to_us),
        });
        if detailed {
            view["server_usages"] = json!(self.servers);
        }
        view
    }
}

/// Sums by project, and the last server of a page that was full.
async fn sums(
    call: &Call,
    period: Period,
    project: Option<&str>,
    detailed: bool,
) -> Result<(BTreeMap<String, Sum>, Option<String>), ApiError> {
    let paged = call.at_least(40);
    let limit = if paged { call.limit()? } else { PAGE };
    let mut marker = match call.marker().filter(|_| paged) {
        None => None,
        Some(id) => Some(
            server::find_any(call.reader(), id)
                .await?
                .ok_or_else(|| ApiError::bad_request(format!("marker [{id}] not found")))?,
        ),
    };
    let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
    loop {
        let (from, to) = (period.from_us, period.to_us);
        let rows = server::there_between(call.reader(), from, to, project, marker.as_ref(), limit);
        let rows = rows.await?;
        for row in &rows {
            sums.entry(row.project_id.clone())
                .or_default()
                .add(row, period, detailed)?;
        }
        let full = rows.len() as u64 >= limit && limit > 0;
        let last = rows.into_iter().last();
        if paged || !full {
            let next = last.filter(|_| paged && full).map(|row| row.id);
            return Ok((sums, next));
        }
        marker = last;
    }
}

async fn list(call: Call) -> Result<Json<Value>, ApiError> {
    let period = Period::of(&call)?;
    let detailed = call.query.last("detailed") == Some("1");
    let (sums, next) = sums(&call, period, None, detailed).await?;
    let usages = sums.into_iter();
    let usages: Vec<Value> = usages
        .map(|(project, sum)| sum.view(&project, period, detailed))
        .collect();
    let mut answer = json!({"tenant_usages": usages});
    if let Some(last) = next {
        answer["tenant_usages_links"] = call.next("os-simple-tenant-usage", &last);
    }
    Ok(Json(answer))
}

async fn show(call: Call, Path(project): Path<String>) -> Result<Json<Value>, ApiError> {
    if call.caller.project_id() != Some(project.as_str()) {
        call.require(Rule::admin("os_compute_api:os-simple-tenant-usage:show"))?;
    }
    let period = Period::of(&call)?;
    let (mut sums, next) = sums(&call, period, Some(&project), true).await?;
    // Nova says `{}` where there was nothing, which its own clients' schemas do not take.
    let usage = sums.remove(&project).unwrap_or_default();
    let usage = usage.view(&project, period, true);
    let mut answer = json!({"tenant_usage": usage});
    if let Some(last) = next {
        let path = format!("os-simple-tenant-usage/{project}");
        answer["tenant_usage_links"] = call.next(&path, &last);
    }
    Ok(Json(answer))
}
