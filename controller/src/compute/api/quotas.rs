//! Quota sets, quota classes and limits.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::call::Call;
use super::schemas::{self, More, as_bool, as_integer, wrapped};
use crate::compute::quota::{self, RESOURCES, Resource, Shown, Usage};
use crate::compute::store::quota as store;
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

pub fn routes(routes: Routes) -> Routes {
    const SET: &str = "/v2.1/os-quota-sets/{id}";
    const CLASS: &str = "/v2.1/os-quota-class-sets/{id}";
    routes
        .get(
            "/v2.1/limits",
            Rule::reader("os_compute_api:limits"),
            limits,
        )
        .get(SET, Rule::reader("os_compute_api:os-quota-sets:show"), show)
        .get(
            "/v2.1/os-quota-sets/{id}/defaults",
            Rule::reader("os_compute_api:os-quota-sets:defaults"),
            defaults,
        )
        .get(
            "/v2.1/os-quota-sets/{id}/detail",
            Rule::reader("os_compute_api:os-quota-sets:detail"),
            detail,
        )
        .put(
            SET,
            Rule::admin("os_compute_api:os-quota-sets:update"),
            update,
        )
        .delete(
            SET,
            Rule::admin("os_compute_api:os-quota-sets:delete"),
            delete,
        )
        .get(
            CLASS,
            Rule::admin("os_compute_api:os-quota-class-sets:show"),
            show_class,
        )
        .put(
            CLASS,
            Rule::admin("os_compute_api:os-quota-class-sets:update"),
            update_class,
        )
}

fn shown(call: &Call, resource: &Resource, class: bool) -> bool {
    match resource.shown {
        Shown::Always => true,
        Shown::Network => !call.at_least(if class { 50 } else { 36 }),
        Shown::Injected => !call.at_least(57),
        Shown::Groups => !class || call.at_least(50),
    }
}

fn set(
    call: &Call,
    limits: &[(Resource, i64)],
    class: bool,
    value: impl Fn(&Resource, i64) -> Value,
) -> Map<String, Value> {
    limits
        .iter()
        .filter(|(resource, _)| shown(call, resource, class))
        .map(|(resource, limit)| (resource.name.to_owned(), value(resource, *limit)))
        .collect()
}

fn with_id(id: &str, set: Map<String, Value>) -> Map<String, Value> {
    let mut whole = Map::new();
    whole.insert("id".to_owned(), id.into());
    whole.extend(set);
    whole
}

/// Quotas of other projects are for administrators.
fn own(call: &Call, project: &str, rule: &'static str) -> Result<(), ApiError> {
    if call.caller.project_id() == Some(project) {
        Ok(())
    } else {
        call.require(Rule::admin(rule))
    }
}

async fn show(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    own(&call, &id, "os_compute_api:os-quota-sets:show")?;
    let limits = quota::limits_of(call.reader(), Some(&id)).await?;
    let set = set(&call, &limits, false, |_, limit| json!(limit));
    Ok(Json(json!({"quota_set": with_id(&id, set)})))
}

async fn defaults(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let limits = quota::limits_of(call.reader(), None).await?;
    let set = set(&call, &limits, false, |_, limit| json!(limit));
    Ok(Json(json!({"quota_set": with_id(&id, set)})))
}

fn used(usage: &Usage, resource: &Resource) -> i64 {
    match resource.name {
        "instances" => usage.instances,
        "cores" => usage.cores,
        "ram" => usage.ram,
        // Per user or per server: not counted by project.
        _ => 0,
    }
}

async fn detail(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    own(&call, &id, "os_compute_api:os-quota-sets:detail")?;
    let limits = quota::limits_of(call.reader(), Some(&id)).await?;
    let usage = quota::usage(call.reader(), &id).await?;
    let set = set(
        &call,
        &limits,
        false,
        |resource, limit| json!({"limit": limit, "in_use": used(&usage, resource), "reserved": 0}),
    );
    Ok(Json(json!({"quota_set": with_id(&id, set)})))
}

/// Schemas of a set and of a class, below 2.36, from there, from 2.57.
fn schema(call: &Call, class: bool) -> &'static Schema {
    static SCHEMAS: LazyLock<Vec<Schema>> = LazyLock::new(|| {
        let mut schemas = Vec::new();
        for (class, age) in [
            (false, 0),
            (false, 1),
            (false, 2),
            (true, 0),
            (true, 1),
            (true, 2),
        ] {
            let named = RESOURCES.iter().filter(|resource| match resource.shown {
                Shown::Always => true,
                Shown::Network => age < 1,
                Shown::Injected => age < 2,
                Shown::Groups => !class || age >= 1,
            });
            let mut properties: Map<String, Value> = named
                .map(|resource| (resource.name.to_owned(), schemas::quota()))
                .collect();
            if !class {
                properties.insert("force".to_owned(), schemas::boolean());
            }
            let inner = schemas::closed(Value::Object(properties), &[]);
            let name = if class {
                "quota_class_set"
            } else {
                "quota_set"
            };
            schemas.push(Schema::of(wrapped(name, inner)));
        }
        schemas
    });
    let network = if class { 50 } else { 36 };
    let age = usize::from(call.at_least(network)) + usize::from(call.at_least(57));
    &SCHEMAS[usize::from(class) * 3 + age]
}

async fn update(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    schema(&call, false).check(&body.0)?;
    let given = &body.0["quota_set"];
    let usage = quota::usage(call.reader(), &id).await?;
    let forced = given.get("force").is_some_and(as_bool);
    let rows = rows(&id, given);
    for row in rows.iter().filter(|row| !forced && row.most >= 0) {
        let Some(resource) = RESOURCES.iter().find(|known| known.name == row.resource) else {
            continue;
        };
        let used = used(&usage, resource);
        if row.most < used {
            return Err(ApiError::bad_request(format!(
                "Quota limit {} for {} must be greater than or equal to already used and reserved \
                 {used}.",
                row.most, row.resource
            )));
        }
    }
    write(&call, rows).await?;
    let limits = quota::limits_of(call.reader(), Some(&id)).await?;
    Ok(Json(
        json!({"quota_set": set(&call, &limits, false, |_, limit| json!(limit))}),
    ))
}

fn rows(project: &str, given: &Value) -> Vec<store::Model> {
    let pairs = given.as_object().into_iter().flatten();
    pairs
        .filter(|(name, _)| *name != "force")
        .filter_map(|(name, value)| {
            Some(store::Model {
                project_id: project.to_owned(),
                resource: name.clone(),
                most: as_integer(value)?,
            })
        })
        .collect()
}

async fn write(call: &Call, rows: Vec<store::Model>) -> Result<(), ApiError> {
    call.app
        .database()
        .write(move |tx| {
            let rows = rows.clone();
            Box::pin(async move {
                for row in rows {
                    store::set(tx, row).await?;
                }
                Ok::<(), ApiError>(())
            })
        })
        .await
}

async fn delete(call: Call, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    call.app
        .database()
        .write(move |tx| {
            let id = id.clone();
            Box::pin(async move { Ok::<(), ApiError>(store::clear(tx, &id).await?) })
        })
        .await?;
    Ok(StatusCode::ACCEPTED)
}

async fn show_class(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let limits = quota::limits_of(call.reader(), None).await?;
    let set = set(&call, &limits, true, |_, limit| json!(limit));
    Ok(Json(json!({"quota_class_set": with_id(&id, set)})))
}

async fn update_class(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    schema(&call, true).check(&body.0)?;
    // Only the class `default` means anything, as in nova.
    if id == "default" {
        write(&call, rows("", &body.0["quota_class_set"])).await?;
    }
    let limits = quota::limits_of(call.reader(), None).await?;
    Ok(Json(
        json!({"quota_class_set": set(&call, &limits, true, |_, limit| json!(limit))}),
    ))
}

async fn limits(call: Call) -> Result<Json<Value>, ApiError> {
    static QUERY: LazyLock<[Schema; 2]> = LazyLock::new(|| {
        let tenant = || [("tenant_id", json!({"type": "string"}))];
        [More::Anything, More::Nothing].map(|more| Schema::of(schemas::query(&tenant(), more)))
    });
    call.check_query(&QUERY[usize::from(call.at_least(75))])?;
    let project = match call.query.last("tenant_id") {
        Some(project) => {
            own(&call, project, "os_compute_api:limits:other_project")?;
            project.to_owned()
        }
        None => call.project()?.to_owned(),
    };
    let limits = quota::limits_of(call.reader(), Some(&project)).await?;
    let usage = quota::usage(call.reader(), &project).await?;
    let of = |name: &str| {
        limits
            .iter()
            .find(|(resource, _)| resource.name == name)
            .map_or(-1, |(_, limit)| *limit)
    };
    let mut absolute = Map::new();
    let mut put = |name: &str, value: i64| {
        absolute.insert(name.to_owned(), value.into());
    };
    put("maxTotalCores", of("cores"));
    if !call.at_least(57) {
        put("maxPersonality", of("injected_files"));
        put("maxPersonalitySize", of("injected_file_content_bytes"));
    }
    put("maxTotalInstances", of("instances"));
    put("maxTotalKeypairs", of("key_pairs"));
    put("maxServerMeta", of("metadata_items"));
    if !call.at_least(39) {
        put("maxImageMeta", of("metadata_items"));
    }
    put("maxTotalRAMSize", of("ram"));
    put("maxServerGroups", of("server_groups"));
    put("maxServerGroupMembers", of("server_group_members"));
    if !call.at_least(36) {
        put("maxTotalFloatingIps", of("floating_ips"));
        put("maxSecurityGroups", of("security_groups"));
        put("maxSecurityGroupRules", of("security_group_rules"));
        put("totalFloatingIpsUsed", 0);
        put("totalSecurityGroupsUsed", 0);
    }
    put("totalRAMUsed", usage.ram);
    put("totalCoresUsed", usage.cores);
    put("totalInstancesUsed", usage.instances);
    put("totalServerGroupsUsed", 0);
    Ok(Json(json!({"limits": {"rate": [], "absolute": absolute}})))
}
