//! `POST /servers`: from the body to rows and operations.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::MachineSpec;
use sea_orm::prelude::Uuid;
use serde_json::{Map, Value, json};

use super::schema::{self, Aged};
use super::{metadata, shortest, tags};
use crate::compute::api::call::Call;
use crate::compute::api::schemas::{as_bool, as_integer};
use crate::compute::model::flavor::{self as flavors, FlavorSnapshot};
use crate::compute::model::hostname;
use crate::compute::model::server::BootPlan;
use crate::compute::model::state::{Build, ServerState};
use crate::compute::ops;
use crate::compute::ops::create::NewServer;
use crate::compute::ops::instance;
use crate::compute::quota::{self, Usage};
use crate::compute::store::{flavor, keypair, placement, server};
use crate::http::{ApiError, JsonBody};
use crate::policy::Rule;
use crate::scheduler::Amounts;

/// The one availability zone.
pub const ZONE: &str = "nova";

/// What a request asks for, checked.
struct Order<'a> {
    given: &'a Value,
    count: u32,
    flavor: FlavorSnapshot,
    plan: BootPlan,
    image_id: String,
    zone: Option<String>,
    host: Option<HostId>,
    hints: Value,
    password: String,
    key: Option<keypair::Model>,
}

impl Order<'_> {
    /// What all its servers together take of the project's quota.
    fn usage(&self) -> Usage {
        let instances = i64::from(self.count);
        let ram = i64::try_from(self.flavor.ram).unwrap_or(i64::MAX);
        Usage {
            instances,
            cores: instances.saturating_mul(i64::from(self.flavor.vcpus)),
            ram: instances.saturating_mul(ram),
        }
    }
}

pub async fn create(call: Call, body: JsonBody) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Aged> =
        LazyLock::new(|| Aged::new(schema::CREATE_AGES, schema::create));
    SCHEMA.at(call.ctx.microversion()).check(&body.0)?;
    let order = order(&call, &body.0).await?;
    // Thousands of servers that nobody may have are refused before any of them is made up.
    quota::check(call.reader(), call.project()?, order.usage()).await?;
    let reservation = format!(
        "r-{}",
        letters(&call, 8, b"abcdefghijklmnopqrstuvwxyz0123456789")
    );
    let servers = (0..order.count)
        .map(|index| new_server(&call, &order, &reservation, index))
        .collect::<Result<Vec<_>, _>>()?;
    let first = servers
        .first()
        .map(|server| server.row.id.clone())
        .unwrap_or_default();
    ops::create::request(&call.app, crate::compute::api::origin(&call), servers).await?;
    if order
        .given
        .get("return_reservation_id")
        .is_some_and(as_bool)
    {
        return Ok((
            StatusCode::ACCEPTED,
            Json(json!({"reservation_id": reservation})),
        )
            .into_response());
    }
    let groups = match order.given["security_groups"].as_array() {
        Some(groups) if !groups.is_empty() => json!(groups),
        _ => json!([{"name": "default"}]),
    };
    let answer = json!({"server": {
        "id": first,
        "links": call.links(&format!("servers/{first}")),
        "OS-DCF:diskConfig": order.given["OS-DCF:diskConfig"].as_str().unwrap_or("MANUAL"),
        "security_groups": groups,
        "adminPass": order.password,
    }});
    let location = call.ctx.link(&format!("/v2.1/servers/{first}"));
    Ok((
        StatusCode::ACCEPTED,
        [(header::LOCATION, location)],
        Json(answer),
    )
        .into_response())
}

async fn order<'a>(call: &Call, body: &'a Value) -> Result<Order<'a>, ApiError> {
    let given = &body["server"];
    let hints = body
        .get("os:scheduler_hints")
        .or_else(|| body.get("OS-SCH-HNT:scheduler_hints"));
    metadata::within_quota(&metadata::read(&given["metadata"]))?;
    personality(given)?;
    let count = count(call, given)?;
    networks(call, given)?;
    security_groups(given)?;
    let flavor_id = flavor_id(&given["flavorRef"]);
    let project = (!call.caller.is_admin()).then(|| call.caller.project_id().unwrap_or_default());
    let flavor = flavor::find(call.reader(), &flavor_id, project)
        .await?
        .ok_or_else(|| ApiError::bad_request(format!("Flavor {flavor_id} could not be found.")))?
        .snapshot();
    let key = match given["key_name"].as_str() {
        None => None,
        Some(name) => {
            let key = keypair::find(call.reader(), &call.caller.user_id, name).await?;
            Some(key.ok_or_else(|| ApiError::bad_request("Invalid key_name provided."))?)
        }
    };
    let (zone, host) = destination(call, given).await?;
    let image_id = image_id(given)?;
    let plan = ops::boot::plan(call.reader(), &call.caller, &image_id, &flavor).await?;
    let password = match given["adminPass"].as_str() {
        Some(password) => password.to_owned(),
        None => password(call),
    };
    Ok(Order {
        given,
        count,
        flavor,
        plan,
        image_id,
        zone,
        host,
        hints: hints.cloned().unwrap_or_else(|| json!({})),
        password,
        key,
    })
}

pub(in crate::compute::api) fn personality(given: &Value) -> Result<(), ApiError> {
    const MOST: usize = 5;
    const PATH: usize = 255;
    const CONTENT: usize = 10 << 10;
    if given["personality"]
        .as_array()
        .is_some_and(|files| files.len() > MOST)
    {
        return Err(ApiError::forbidden("Personality file limit exceeded."));
    }
    for file in given["personality"].as_array().into_iter().flatten() {
        let length = |name: &str| file[name].as_str().map_or(0, str::len);
        if length("path") > PATH {
            return Err(ApiError::forbidden(format!(
                "Personality file path exceeds maximum {PATH}"
            )));
        }
        // The content is base64.
        if length("contents") / 4 * 3 > CONTENT {
            return Err(ApiError::forbidden(format!(
                "Personality file content exceeds maximum {CONTENT}"
            )));
        }
    }
    Ok(())
}

/// How many servers: `max_count`, or else `min_count`, or else one.
fn count(call: &Call, given: &Value) -> Result<u32, ApiError> {
    let read = |name: &str| given.get(name).and_then(as_integer);
    let least = read("min_count").unwrap_or(1);
    let most = read("max_count").unwrap_or(least);
    if least > most {
        return Err(ApiError::bad_request("min_count must be <= max_count"));
    }
    if most > 1 && call.at_least(90) && given.get("hostname").is_some() && !call.at_least(94) {
        return Err(ApiError::bad_request(
            "Multiple instances cannot be created with the same hostname: leave it out, or create \
             them one by one",
        ));
    }
    // Quotas decide; this only keeps the number in bounds.
    u32::try_from(most.min(10_000)).map_err(|_| ApiError::bad_request("max_count is too large"))
}

/// There are no networks yet: only servers without one can be had.
fn networks(call: &Call, given: &Value) -> Result<(), ApiError> {
    match &given["networks"] {
        Value::Null => Ok(()),
        Value::String(word) if word == "none" => Ok(()),
        Value::String(_) => Err(ApiError::bad_request(
            "This cloud has no networks yet: ask for networks: none",
        )),
        Value::Array(list) if list.is_empty() && !call.at_least(37) => Ok(()),
        Value::Array(list) => {
            let Some(network) = list.first() else {
                return Err(ApiError::bad_request(
                    "This cloud has no networks yet: ask for networks: none",
                ));
            };
            if let Some(port) = network["port"].as_str() {
                return Err(ApiError::bad_request(format!(
                    "Port id {port} could not be found."
                )));
            }
            let id = network["uuid"].as_str().unwrap_or_default();
            if Uuid::parse_str(id).is_err() {
                return Err(ApiError::bad_request(format!(
                    "Bad networks format: network uuid is not in proper format ({id})"
                )));
            }
            Err(ApiError::bad_request(format!(
                "Network {id} could not be found."
            )))
        }
        _ => Ok(()),
    }
}

fn security_groups(given: &Value) -> Result<(), ApiError> {
    for group in given["security_groups"].as_array().into_iter().flatten() {
        let name = group["name"].as_str().unwrap_or("default");
        if name != "default" {
            return Err(ApiError::bad_request(format!(
                "Unable to find security_group with name or id '{name}'"
            )));
        }
    }
    Ok(())
}

/// The image, also where clients say it once more as block device 0.
fn image_id(given: &Value) -> Result<String, ApiError> {
    let reference = given["imageRef"].as_str().unwrap_or_default();
    let mut image = reference.to_owned();
    for device in given["block_device_mapping_v2"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let local_image = device["source_type"] == "image" && device["destination_type"] == "local";
        let first = as_integer(&device["boot_index"]) == Some(0);
        let id = device["uuid"]
            .as_str()
            .or_else(|| device["image_id"].as_str());
        match id {
            Some(id) if local_image && first && (image.is_empty() || image == id) => {
                image = id.to_owned();
            }
            _ => return Err(no_volumes()),
        }
    }
    if given["block_device_mapping"]
        .as_array()
        .is_some_and(|list| !list.is_empty())
    {
        return Err(no_volumes());
    }
    if image.is_empty() {
        return Err(ApiError::bad_request(
            "Block Device Mapping is Invalid: Boot sequence for the \
                                          instance and image/block device mapping combination is \
                                          not valid.",
        ));
    }
    Ok(image)
}

fn no_volumes() -> ApiError {
    ApiError::bad_request(
        "Block Device Mapping is Invalid: this cloud has no volumes yet; a server boots from an \
         image on its host's disk",
    )
}

/// `availability_zone` (`ZONE[:HOST]`) and, from 2.74, `host`: the zone to show and the host to take.
async fn destination(
    call: &Call,
    given: &Value,
) -> Result<(Option<String>, Option<HostId>), ApiError> {
    let mut parts = given["availability_zone"]
        .as_str()
        .unwrap_or_default()
        .splitn(3, ':');
    let zone = parts.next().filter(|zone| !zone.is_empty());
    if zone.is_some_and(|zone| zone != ZONE) {
        return Err(ApiError::bad_request(
            "The requested availability zone is not available",
        ));
    }
    let forced = parts.next().filter(|host| !host.is_empty());
    if forced.is_some() {
        call.require(Rule::admin("os_compute_api:servers:create:forced_host"))?;
    }
    let requested = given["host"]
        .as_str()
        .or_else(|| given["hypervisor_hostname"].as_str());
    if requested.is_some() {
        call.require(Rule::admin("compute:servers:create:requested_destination"))?;
    }
    let Some(name) = forced.or(requested) else {
        return Ok((zone.map(str::to_owned), None));
    };
    let unknown = || ApiError::bad_request(format!("Compute host {name} could not be found."));
    let id = placement::host_id(call.reader(), name)
        .await?
        .ok_or_else(unknown)?;
    let id = Uuid::parse_str(&id).map_err(ApiError::internal)?;
    Ok((zone.map(str::to_owned), Some(HostId(id))))
}

fn new_server(
    call: &Call,
    order: &Order<'_>,
    reservation: &str,
    index: u32,
) -> Result<NewServer, ApiError> {
    let id = call.app.random().uuid().to_string();
    let row = row(call, order, reservation, index, id)?;
    let mut spec = spec(&order.flavor, &order.plan)?;
    if row.config_drive == instance::DRIVE {
        let mut data = instance::data(&row, order.key.as_ref())?;
        data.admin_pass = call.app.compute().machines.seal_password(&order.password);
        spec.guest.instance = Some(Box::new(data));
    }
    let flavor = &order.flavor;
    let amounts = Amounts {
        vcpus: i64::from(flavor.vcpus),
        memory_mib: row.ram,
        disk_gib: ops::boot::disk_gib(&order.plan),
    };
    Ok(NewServer {
        row,
        spec,
        amounts,
        host: order.host,
    })
}

/// Of a reference, which may be a link.
pub fn flavor_id(reference: &Value) -> String {
    match reference {
        Value::String(text) => text.rsplit('/').next().unwrap_or(text).to_owned(),
        other => other.to_string(),
    }
}

/// What the machine of a server is.
pub fn spec(flavor: &FlavorSnapshot, plan: &BootPlan) -> Result<MachineSpec, ApiError> {
    let vcpus = u8::try_from(flavor.vcpus)
        .ok()
        .filter(|vcpus| (1..=64).contains(vcpus));
    let vcpus = vcpus.ok_or_else(|| {
        ApiError::bad_request(format!("A server has 1 to 64 vCPUs, not {}.", flavor.vcpus))
    })?;
    Ok(MachineSpec {
        vcpus,
        max_vcpus: None,
        memory_mib: flavor.ram,
        max_memory_mib: None,
        pages: flavors::pages(&flavor.extra_specs),
        numa_nodes: Vec::new(),
        cpus: Vec::new(),
        cpu_profile: "host".to_owned(),
        cpu: None,
        boot: plan.boot(),
        root_disk: plan.root_disk.clone(),
        disks: Vec::new(),
        nics: Vec::new(),
        guest: plan.guest.clone(),
    })
}

fn row(
    call: &Call,
    order: &Order<'_>,
    reservation: &str,
    index: u32,
    id: String,
) -> Result<server::Model, ApiError> {
    let (given, now) = (order.given, call.app.now_us());
    let text = |name: &str| given[name].as_str().map(str::to_owned);
    let json = |value: &Value| value.to_string();
    let mut name = text("name").unwrap_or_default();
    let mut hostname = text("hostname").unwrap_or_else(|| hostname::from_name(&name, &id));
    if order.count > 1 {
        name = format!("{name}-{}", index + 1);
        hostname = format!("{hostname}-{}", index + 1);
    }
    let image_part = |part: Option<&fractus_agent_api::machine::ImageRef>| {
        part.map_or(String::new(), |image| image.id.to_string())
    };
    let kernel = order.plan.kernel.as_ref();
    let kernel = kernel.filter(|image| image.id.to_string() != order.image_id);
    let tags: BTreeSet<String> = tags::read(&given["tags"]);
    // Like nova, that shows the drive which the machine has, asked for or not.
    let config_drive = given.get("config_drive").is_some_and(as_bool) || instance::ALWAYS;
    Ok(server::Model {
        project_id: call.project()?.to_owned(),
        user_id: call.caller.user_id.clone(),
        // Below 2.19 the name served as description.
        description: if call.at_least(19) {
            text("description")
        } else {
            Some(name.clone())
        },
        name,
        hostname,
        state: ServerState::Building(Build::Scheduling).key(),
        flavor: serde_json::to_string(&order.flavor).map_err(ApiError::internal)?,
        flavor_id: order.flavor.id.clone(),
        vcpus: i32::try_from(order.flavor.vcpus).unwrap_or(i32::MAX),
        ram: i64::try_from(order.flavor.ram).unwrap_or(i64::MAX),
        image_id: order.image_id.clone(),
        kernel_id: image_part(kernel),
        ramdisk_id: image_part(order.plan.initrd.as_ref()),
        boot: serde_json::to_string(&order.plan).map_err(ApiError::internal)?,
        metadata: json(&json!(metadata::read(&given["metadata"]))),
        tags: json(&json!(tags)),
        key_name: text("key_name"),
        user_data: text("user_data"),
        personality: json(given.get("personality").unwrap_or(&json!([]))),
        availability_zone: ZONE.to_owned(),
        pinned_zone: order.zone.clone(),
        config_drive: if config_drive {
            instance::DRIVE.to_owned()
        } else {
            String::new()
        },
        disk_config: text("OS-DCF:diskConfig").unwrap_or_else(|| "MANUAL".to_owned()),
        access_ip_v4: text("accessIPv4").unwrap_or_default(),
        access_ip_v6: text("accessIPv6")
            .map(|address| shortest(&address))
            .unwrap_or_default(),
        reservation_id: reservation.to_owned(),
        launch_index: i32::try_from(index).unwrap_or(i32::MAX),
        locked_by: None,
        locked_reason: None,
        trusted_certificates: given["trusted_image_certificates"]
            .as_array()
            .map(|list| json(&json!(list))),
        scheduler_hints: json(
            order
                .hints
                .as_object()
                .map_or(&json!(Map::new()), |_| &order.hints),
        ),
        shelved_image_id: None,
        fault_code: None,
        fault_message: None,
        fault_details: None,
        fault_at_us: None,
        created_at_us: now,
        updated_at_us: now,
        launched_at_us: None,
        terminated_at_us: None,
        deleted_at_us: None,
        id,
    })
}

/// A password of nova's shape; machines get it by their config drive.
pub fn password(call: &Call) -> String {
    letters(
        call,
        12,
        b"23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz",
    )
}

fn letters(call: &Call, count: usize, alphabet: &[u8]) -> String {
    let mut bytes = vec![0; count * 4];
    call.app.random().fill(&mut bytes);
    bytes
        .chunks_exact(4)
        .map(|chunk| {
            let number = chunk
                .iter()
                .fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte));
            char::from(alphabet[number % alphabet.len()])
        })
        .collect()
}
