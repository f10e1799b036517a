//! What a guest is told of its server (the config drive), and how image and flavor have it treated.
//!
//! Owns the contents of nova's metadata documents; the agent lays them out by version. Every server
//! has a config drive for as long as there is no metadata service.

use fractus_agent_api::guest::{GuestOptions, InjectedFile, InstanceData, Watchdog};
use sea_orm::{ConnectionTrait, DbErr};
use serde_json::{Value, json};

use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::store::{keypair, server};
use crate::http::ApiError;
use crate::image::model::Image;

/// The column `config_drive` of a server that has one.
pub const DRIVE: &str = "True";
/// Nobody would tell a guest anything without a drive.
pub const ALWAYS: bool = true;
/// Nova's `dhcp_domain`.
const DOMAIN: &str = "novalocal";

/// How a guest is to be treated: properties of the image, and the flavor's extra specs where the image
/// says nothing.
///
/// # Errors
/// 400 for a value that nova does not take either.
pub fn options(image: &Image, flavor: &FlavorSnapshot) -> Result<GuestOptions, ApiError> {
    let shutdown_timeout_s = match image.property("os_shutdown_timeout") {
        None => None,
        Some(text) => Some(text.trim().parse().map_err(|_| {
            ApiError::bad_request(format!(
                "Invalid image metadata. Error: os_shutdown_timeout is a number of seconds, not \
                 {text:?}"
            ))
        })?),
    };
    let action = image.property("hw_watchdog_action").or_else(|| {
        flavor
            .extra_specs
            .get("hw:watchdog_action")
            .map(String::as_str)
    });
    let watchdog = match action.map(str::to_ascii_lowercase).as_deref() {
        None | Some("disabled") => None,
        Some("reset") => Some(Watchdog::Reset),
        Some("poweroff") => Some(Watchdog::PowerOff),
        Some("pause") => Some(Watchdog::Pause),
        Some("none") => Some(Watchdog::Report),
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "Provided watchdog action ({other}) is not supported."
            )));
        }
    };
    let agent = image.property("hw_qemu_guest_agent").is_some_and(is_true);
    Ok(GuestOptions {
        instance: None,
        shutdown_timeout_s,
        watchdog,
        agent,
    })
}

/// As oslo reads a boolean.
fn is_true(text: &str) -> bool {
    let text = text.trim().to_ascii_lowercase();
    ["1", "t", "true", "on", "y", "yes"].contains(&text.as_str())
}

/// What a server's guest is told, by its row as it is now.
///
/// # Errors
/// A column that cannot be read.
pub fn data(row: &server::Model, key: Option<&keypair::Model>) -> Result<InstanceData, DbErr> {
    let hostname = if row.hostname.contains('.') {
        row.hostname.clone()
    } else {
        format!("{}.{DOMAIN}", row.hostname)
    };
    let mut meta_data = json!({
        "uuid": row.id,
        "hostname": hostname,
        "name": row.name,
        "launch_index": row.launch_index,
        "availability_zone": row.availability_zone,
        "project_id": row.project_id,
        "devices": [],
        "dedicated_cpus": [],
    });
    let metadata = row.metadata();
    if !metadata.is_empty() {
        meta_data["meta"] = json!(metadata);
    }
    if let Some(key) = key {
        meta_data["public_keys"] = json!({key.name.as_str(): key.public_key});
        meta_data["keys"] = json!([{"name": key.name, "type": key.kind, "data": key.public_key}]);
    }
    let Value::Object(meta_data) = meta_data else {
        return Err(DbErr::Custom("meta_data is no object".to_owned()));
    };
    Ok(InstanceData {
        meta_data: meta_data.into_iter().collect(),
        user_data: row.user_data.clone(),
        vendor_data: json!({}),
        vendor_data2: json!({"static": {}}),
        network_data: json!({"links": [], "networks": [], "services": []}),
        ec2: ec2(row, key, &hostname)?,
        files: files(row),
        admin_pass: None,
    })
}

/// `meta-data.json` of EC2, with the placeholders that nova has for what it does not know.
fn ec2(row: &server::Model, key: Option<&keypair::Model>, hostname: &str) -> Result<Value, DbErr> {
    let short = |id: &str| id.get(..8).unwrap_or_default().to_owned();
    let mut document = json!({
        "ami-id": format!("ami-{}", short(&row.image_id)),
        "ami-launch-index": row.launch_index,
        "ami-manifest-path": "FIXME",
        "block-device-mapping": {"ami": "vda", "root": "/dev/vda"},
        "hostname": hostname,
        "instance-action": "none",
        "instance-id": format!("i-{}", short(&row.id)),
        "instance-type": row.flavor()?.name,
        "local-hostname": hostname,
        "local-ipv4": "",
        "placement": {"availability-zone": row.availability_zone},
        "public-hostname": hostname,
        "public-ipv4": "",
        "reservation-id": row.reservation_id,
        "security-groups": ["default"],
    });
    if let Some(key) = key {
        document["public-keys"] = json!({"0": {"openssh-key": key.public_key}});
    }
    Ok(document)
}

fn files(row: &server::Model) -> Vec<InjectedFile> {
    let given: Value = serde_json::from_str(&row.personality).unwrap_or_default();
    let files = given.as_array().into_iter().flatten();
    let text = |file: &Value, name: &str| file[name].as_str().unwrap_or_default().to_owned();
    files
        .map(|file| InjectedFile {
            path: text(file, "path"),
            contents: text(file, "contents"),
        })
        .collect()
}

/// What a guest is to be told, and the name of its key, which may be its user's no longer.
pub struct Told {
    data: InstanceData,
    key_name: Option<String>,
}

/// What the guest of this server is to be told from its next start on; none if it has no drive.
pub async fn of(connection: &impl ConnectionTrait, server: &str) -> Result<Option<Told>, DbErr> {
    let row = server::find(connection, server).await?;
    let Some(row) = row.filter(|row| row.config_drive == DRIVE) else {
        return Ok(None);
    };
    let key = match &row.key_name {
        Some(name) => keypair::find(connection, &row.user_id, name).await?,
        None => None,
    };
    Ok(Some(Told {
        data: data(&row, key.as_ref())?,
        key_name: row.key_name,
    }))
}

/// Instance data of the next start: what is `told` now, with the password `given` by this request or
/// else the one that the guest had `before`, and with its key if that is no longer its user's.
pub fn renewed(
    told: Option<Told>,
    given: Option<Box<InstanceData>>,
    before: Option<Box<InstanceData>>,
) -> Option<Box<InstanceData>> {
    let Some(Told {
        data: mut told,
        key_name,
    }) = told
    else {
        return given.or(before);
    };
    let deleted = key_name.filter(|_| !told.meta_data.contains_key("keys"));
    let had = |before: &&InstanceData| {
        let key = before.meta_data.get("keys").and_then(|keys| keys.get(0));
        deleted.is_some() && key.and_then(|key| key["name"].as_str()) == deleted.as_deref()
    };
    if let Some(before) = before.as_deref().filter(had) {
        for name in ["keys", "public_keys"] {
            if let Some(value) = before.meta_data.get(name) {
                told.meta_data.insert(name.to_owned(), value.clone());
            }
        }
        if let Some(keys) = before.ec2.get("public-keys") {
            told.ec2["public-keys"] = keys.clone();
        }
    }
    let password = |data: Box<InstanceData>| data.admin_pass;
    told.admin_pass = given.and_then(password).or(before.and_then(password));
    Some(Box::new(told))
}
