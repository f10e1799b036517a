//! Servers as the API shows them, at each microversion.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha224};

use crate::compute::api::call::Call;
use crate::compute::model::time;
use crate::compute::store::placement::{self, Placement};
use crate::compute::store::server::Model;
use crate::http::ApiError;

/// A host that was not heard of for this long is down.
pub(in crate::compute) const SILENCE_US: i64 = 60_000_000;

/// Which answer a server is shown in: fields differ up to 2.74.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    Show,
    Detail,
    Update,
    Rebuild,
}

/// Servers in full, in order.
pub async fn whole(
    call: &Call,
    rows: &[Model],
    occasion: Occasion,
) -> Result<Vec<Value>, ApiError> {
    let ids = rows.iter().map(|row| row.id.clone());
    let placements = if rows.is_empty() {
        HashMap::new()
    } else {
        placement::of_servers(call.reader(), ids).await?
    };
    rows.iter()
        .map(|row| one(call, row, placements.get(&row.id), occasion))
        .collect()
}

/// One server in full.
pub async fn single(call: &Call, row: &Model, occasion: Occasion) -> Result<Value, ApiError> {
    let mut views = whole(call, std::slice::from_ref(row), occasion).await?;
    views
        .pop()
        .ok_or_else(|| ApiError::internal("a server without a view"))
}

/// `id`, `name`, `links`.
pub fn brief(call: &Call, row: &Model) -> Value {
    json!({
        "id": row.id,
        "name": row.name,
        "links": call.links(&format!("servers/{}", row.id)),
    })
}

fn one(
    call: &Call,
    row: &Model,
    placed: Option<&Placement>,
    occasion: Occasion,
) -> Result<Value, ApiError> {
    let mut view = Map::new();
    common(call, row, placed, &mut view)?;
    // Updates and rebuilds show the rest only from 2.75 on.
    let all = call.at_least(75) || matches!(occasion, Occasion::Show | Occasion::Detail);
    if all {
        extended(call, row, placed, &mut view);
        if call.caller.is_admin() {
            for_administrators(call, row, placed, &mut view);
        }
    }
    later(call, row, occasion, &mut view);
    if occasion == Occasion::Rebuild {
        if !all && call.at_least(54) {
            view.insert("key_name".to_owned(), json!(row.key_name));
        }
        if call.at_least(57) {
            view.insert("user_data".to_owned(), json!(row.user_data));
            view.remove("OS-EXT-SRV-ATTR:user_data");
        }
    }
    Ok(Value::Object(view))
}

fn put(view: &mut Map<String, Value>, fields: impl IntoIterator<Item = (&'static str, Value)>) {
    view.extend(
        fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value)),
    );
}

/// What every answer shows at every microversion.
fn common(
    call: &Call,
    row: &Model,
    placed: Option<&Placement>,
    view: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let status = row.state().project().status;
    put(
        view,
        [
            ("accessIPv4", json!(row.access_ip_v4)),
            ("accessIPv6", json!(row.access_ip_v6)),
            ("addresses", json!({})),
            ("created", json!(time::seconds(row.created_at_us))),
            ("flavor", flavor(call, row)?),
            (
                "hostId",
                json!(placed.map_or(String::new(), |host| host_digest(
                    &row.project_id,
                    &host.hostname
                ))),
            ),
            ("id", json!(row.id)),
            ("image", image(call, row)),
            ("links", call.links(&format!("servers/{}", row.id))),
            ("metadata", json!(row.metadata())),
            ("name", json!(row.name)),
            ("status", json!(status)),
            ("tenant_id", json!(row.project_id)),
            ("updated", json!(time::seconds(row.updated_at_us))),
            ("user_id", json!(row.user_id)),
            ("OS-DCF:diskConfig", json!(row.disk_config)),
        ],
    );
    let has_progress = [
        "ACTIVE",
        "BUILD",
        "MIGRATING",
        "REBUILD",
        "RESIZE",
        "VERIFY_RESIZE",
    ];
    if has_progress.contains(&status) {
        put(view, [("progress", json!(0))]);
    }
    if matches!(status, "ERROR" | "DELETED")
        && let (Some(code), Some(at_us)) = (row.fault_code, row.fault_at_us)
    {
        let mut fault = json!({
            "code": code,
            "created": time::seconds(at_us),
            "message": row.fault_message,
        });
        if let Some(details) = row
            .fault_details
            .as_ref()
            .filter(|_| call.caller.is_admin())
        {
            fault["details"] = json!(details);
        }
        put(view, [("fault", fault)]);
    }
    Ok(())
}

/// A name for the host that tells nothing of it, and differs from project to project.
pub fn host_digest(project: &str, hostname: &str) -> String {
    use std::fmt::Write as _;
    let digest = Sha224::digest(format!("{project}{hostname}"));
    let mut text = String::with_capacity(56);
    for byte in digest.iter() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn flavor(call: &Call, row: &Model) -> Result<Value, ApiError> {
    if !call.at_least(47) {
        let id = &row.flavor_id;
        return Ok(json!({"id": id, "links": call.bookmark(&format!("flavors/{id}"))}));
    }
    let flavor = row.flavor()?;
    Ok(json!({
        "vcpus": flavor.vcpus,
        "ram": flavor.ram,
        "disk": flavor.disk,
        "ephemeral": flavor.ephemeral,
        "swap": flavor.swap,
        "original_name": flavor.name,
        "extra_specs": flavor.extra_specs,
    }))
}

fn image(call: &Call, row: &Model) -> Value {
    if row.image_id.is_empty() {
        return json!("");
    }
    let id = &row.image_id;
    json!({"id": id, "links": call.bookmark(&format!("images/{id}"))})
}

/// What lists and shows have had since 2.1.
fn extended(call: &Call, row: &Model, placed: Option<&Placement>, view: &mut Map<String, Value>) {
    let projection = row.state().project();
    let zone = placed.map_or("", |_| row.availability_zone.as_str());
    let moment = |at_us: Option<i64>| at_us.map(time::micros);
    put(
        view,
        [
            ("OS-EXT-AZ:availability_zone", json!(zone)),
            ("config_drive", json!(row.config_drive)),
            ("key_name", json!(row.key_name)),
            ("OS-SRV-USG:launched_at", json!(moment(row.launched_at_us))),
            (
                "OS-SRV-USG:terminated_at",
                json!(moment(row.terminated_at_us)),
            ),
            ("OS-EXT-STS:task_state", json!(projection.task_state)),
            ("OS-EXT-STS:vm_state", json!(projection.vm_state)),
            (
                "OS-EXT-STS:power_state",
                json!(projection.power_state as u8),
            ),
            ("os-extended-volumes:volumes_attached", json!([])),
        ],
    );
    if call.at_least(90) {
        put(view, [("OS-EXT-SRV-ATTR:hostname", json!(row.hostname))]);
    }
    if call.at_least(96) {
        put(view, [("pinned_availability_zone", json!(row.pinned_zone))]);
    }
}

fn for_administrators(
    call: &Call,
    row: &Model,
    placed: Option<&Placement>,
    view: &mut Map<String, Value>,
) {
    let host = placed.map(|host| host.hostname.as_str());
    put(
        view,
        [
            ("OS-EXT-SRV-ATTR:host", json!(host)),
            (
                "OS-EXT-SRV-ATTR:instance_name",
                json!(instance_name(&row.id)),
            ),
            ("OS-EXT-SRV-ATTR:hypervisor_hostname", json!(host)),
        ],
    );
    if call.at_least(3) {
        put(
            view,
            [
                ("OS-EXT-SRV-ATTR:hostname", json!(row.hostname)),
                ("OS-EXT-SRV-ATTR:kernel_id", json!(row.kernel_id)),
                ("OS-EXT-SRV-ATTR:launch_index", json!(row.launch_index)),
                ("OS-EXT-SRV-ATTR:ramdisk_id", json!(row.ramdisk_id)),
                ("OS-EXT-SRV-ATTR:reservation_id", json!(row.reservation_id)),
                ("OS-EXT-SRV-ATTR:root_device_name", json!("/dev/vda")),
                ("OS-EXT-SRV-ATTR:user_data", json!(row.user_data)),
            ],
        );
    }
    if call.at_least(16) {
        put(view, [("host_status", json!(host_status(call, placed)))]);
    }
}

fn host_status(call: &Call, placed: Option<&Placement>) -> &'static str {
    match placed {
        None => "",
        Some(host) if host.disabled => "MAINTENANCE",
        Some(host) if host.forced_down => "DOWN",
        Some(host) if call.app.now_us() - host.heard_at_us > SILENCE_US => "UNKNOWN",
        Some(_) => "UP",
    }
}

/// The machine's name on its host.
pub fn instance_name(id: &str) -> String {
    format!("instance-{}", id.get(..8).unwrap_or(id))
}

/// Fields that came with later microversions and are for everybody.
fn later(call: &Call, row: &Model, occasion: Occasion, view: &mut Map<String, Value>) {
    if call.at_least(9) {
        put(view, [("locked", json!(row.locked_by.is_some()))]);
    }
    if call.at_least(19) {
        put(view, [("description", json!(row.description))]);
    }
    if call.at_least(26) {
        put(view, [("tags", json!(row.tags()))]);
    }
    if call.at_least(63) {
        let list = row.trusted_certificates.as_deref();
        let list: Option<Value> = list.and_then(|text| serde_json::from_str(text).ok());
        put(view, [("trusted_image_certificates", json!(list))]);
    }
    if call.at_least(71) && occasion != Occasion::Detail {
        put(view, [("server_groups", json!([]))]);
    }
    if call.at_least(73) {
        put(view, [("locked_reason", json!(row.locked_reason))]);
    }
}
