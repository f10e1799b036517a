//! Schemas of servers' bodies and queries, by microversion.

use serde_json::{Value, json};

use crate::compute::api::schemas::{
    More, boolean, closed, fqdn, hostname, metadata, name, positive_integer, query, string,
    string_or_null, tag, tags, trusted_certificates, user_data, wrapped,
};
use crate::http::Microversion;
use crate::http::schema::Schema;

/// A schema that changes at some microversions, compiled once for each.
#[derive(Debug)]
pub struct Aged {
    /// Minor versions at which it changes, rising.
    ages: &'static [u16],
    compiled: Vec<Schema>,
}

impl Aged {
    pub fn new(ages: &'static [u16], make: fn(Microversion) -> Value) -> Self {
        let firsts = std::iter::once(1).chain(ages.iter().copied());
        let compiled = firsts
            .map(|minor| Schema::of(make(Microversion::new(2, minor))))
            .collect();
        Self { ages, compiled }
    }

    pub fn at(&self, version: Microversion) -> &Schema {
        let age = self
            .ages
            .iter()
            .filter(|minor| version.at_least(2, **minor))
            .count();
        &self.compiled[age]
    }
}

/// Where [`create`], [`update`], [`rebuild`] and [`list`] change.
pub const CREATE_AGES: &[u16] = &[19, 32, 33, 37, 42, 52, 57, 63, 67, 74, 90, 94];
pub const UPDATE_AGES: &[u16] = &[19, 90, 94];
pub const REBUILD_AGES: &[u16] = &[19, 54, 57, 63, 90, 94];
pub const LIST_AGES: &[u16] = &[26, 66, 73, 75];

fn at_least(version: Microversion, minor: u16) -> bool {
    version.at_least(2, minor)
}

pub fn disk_config() -> Value {
    json!({"type": "string", "enum": ["AUTO", "MANUAL"]})
}

fn personality() -> Value {
    json!({
        "type": "array",
        "items": closed(
            json!({"path": {"type": "string"}, "contents": {"type": "string", "format": "base64"}}),
            &[],
        ),
    })
}

fn address(format: &str) -> Value {
    json!({"type": "string", "format": format})
}

fn networks(version: Microversion) -> Value {
    let mut one = json!({
        "fixed_ip": {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
        "port": {"type": ["string", "null"], "format": "uuid"},
        "uuid": {"type": "string"},
    });
    // 2.32 to 2.36 and from 2.42 on: a bug took the field away between (nova's own history).
    if (at_least(version, 32) && !at_least(version, 37)) || at_least(version, 42) {
        one["tag"] = tag();
    }
    let list = json!({"type": "array", "items": closed(one, &[])});
    if at_least(version, 37) {
        json!({"oneOf": [list, {"type": "string", "enum": ["none", "auto"]}]})
    } else {
        list
    }
}

fn block_devices(version: Microversion) -> Value {
    let number = json!({"type": ["integer", "string", "null"], "pattern": "^-?[0-9]*$"});
    let mut device = json!({
        "boot_index": number,
        "delete_on_termination": boolean(),
        "destination_type": {"type": "string", "enum": ["local", "volume"]},
        "device_name": {"type": "string", "minLength": 1, "maxLength": 255},
        "device_type": {"type": "string", "maxLength": 255},
        "disk_bus": {"type": "string", "maxLength": 255},
        "guest_format": {"type": "string", "maxLength": 255},
        "no_device": {},
        "source_type": {"type": "string", "enum": ["volume", "image", "snapshot", "blank"]},
        "uuid": {"type": "string", "minLength": 1, "maxLength": 255},
        "image_id": {"type": "string", "format": "uuid"},
        "volume_id": {"type": "string", "format": "uuid"},
        "snapshot_id": {"type": "string", "format": "uuid"},
        "volume_size": {"type": ["integer", "string"], "pattern": "^[0-9]*$", "minimum": 1},
    });
    if (at_least(version, 32) && !at_least(version, 33)) || at_least(version, 42) {
        device["tag"] = tag();
    }
    if at_least(version, 67) {
        device["volume_type"] = json!({"type": ["string", "null"], "maxLength": 255});
    }
    json!({"type": "array", "items": closed(device, &[])})
}

/// `POST /servers`.
pub fn create(version: Microversion) -> Value {
    let mut server = json!({
        "name": name(),
        "imageRef": {"oneOf": [
            {"type": "string", "format": "uuid"},
            {"type": "string", "maxLength": 0},
        ]},
        "flavorRef": {"type": ["string", "integer"], "minLength": 1},
        "adminPass": {"type": "string"},
        "metadata": metadata(),
        "networks": networks(version),
        "OS-DCF:diskConfig": disk_config(),
        "accessIPv4": address("ipv4"),
        "accessIPv6": address("ipv6"),
        "availability_zone": name(),
        "block_device_mapping": {"type": "array"},
        "block_device_mapping_v2": block_devices(version),
        "config_drive": boolean(),
        "key_name": string(1, 255),
        "min_count": positive_integer(),
        "max_count": positive_integer(),
        "return_reservation_id": boolean(),
        "security_groups": {
            "type": "array",
            "items": closed(json!({"name": {"type": "string", "minLength": 1, "maxLength": 255}}), &[]),
        },
        "user_data": user_data(),
    });
    if !at_least(version, 57) {
        server["personality"] = personality();
    }
    if at_least(version, 19) {
        server["description"] = string_or_null(255);
    }
    if at_least(version, 52) {
        server["tags"] = tags();
    }
    if at_least(version, 63) {
        server["trusted_image_certificates"] = trusted_certificates();
    }
    if at_least(version, 74) {
        server["host"] = string(1, 255);
        server["hypervisor_hostname"] = string(1, 255);
    }
    if at_least(version, 90) {
        server["hostname"] = if at_least(version, 94) {
            fqdn()
        } else {
            hostname()
        };
    }
    let required: &[&str] = if at_least(version, 37) {
        &["name", "flavorRef", "networks"]
    } else {
        &["name", "flavorRef"]
    };
    let hints = json!({"type": "object"});
    closed(
        json!({
            "server": closed(server, required),
            "os:scheduler_hints": hints,
            "OS-SCH-HNT:scheduler_hints": hints,
        }),
        &["server"],
    )
}

/// `PUT /servers/{id}`.
pub fn update(version: Microversion) -> Value {
    let mut server = json!({
        "name": name(),
        "OS-DCF:diskConfig": disk_config(),
        "accessIPv4": address("ipv4"),
        "accessIPv6": address("ipv6"),
    });
    if at_least(version, 19) {
        server["description"] = string_or_null(255);
    }
    if at_least(version, 90) {
        server["hostname"] = if at_least(version, 94) {
            fqdn()
        } else {
            hostname()
        };
    }
    wrapped("server", closed(server, &[]))
}

/// The action `rebuild`.
pub fn rebuild(version: Microversion) -> Value {
    let mut body = json!({
        "imageRef": {"type": "string", "format": "uuid"},
        "name": name(),
        "adminPass": {"type": "string"},
        "metadata": metadata(),
        "preserve_ephemeral": boolean(),
        "OS-DCF:diskConfig": disk_config(),
        "accessIPv4": address("ipv4"),
        "accessIPv6": address("ipv6"),
    });
    if !at_least(version, 57) {
        body["personality"] = personality();
    }
    if at_least(version, 19) {
        body["description"] = string_or_null(255);
    }
    if at_least(version, 54) {
        body["key_name"] = json!({"type": ["string", "null"], "minLength": 1, "maxLength": 255});
    }
    if at_least(version, 57) {
        body["user_data"] = json!({"oneOf": [user_data(), {"type": "null"}]});
    }
    if at_least(version, 63) {
        body["trusted_image_certificates"] = trusted_certificates();
    }
    if at_least(version, 90) {
        body["hostname"] = if at_least(version, 94) {
            fqdn()
        } else {
            hostname()
        };
    }
    wrapped("rebuild", closed(body, &["imageRef"]))
}

/// Sort keys in nova's order (the message for a wrong one lists them).
pub const SORT_KEYS: [&str; 30] = [
    "auto_disk_config",
    "display_name",
    "access_ip_v6",
    "locked",
    "root_device_name",
    "launched_at",
    "progress",
    "display_description",
    "key_name",
    "project_id",
    "hostname",
    "updated_at",
    "locked_by",
    "access_ip_v4",
    "task_state",
    "vm_state",
    "kernel_id",
    "config_drive",
    "availability_zone",
    "node",
    "image_ref",
    "terminated_at",
    "user_id",
    "ramdisk_id",
    "created_at",
    "uuid",
    "power_state",
    "instance_type_id",
    "host",
    "launch_index",
];

/// The query of `GET /servers` and `/servers/detail`.
pub fn list(version: Microversion) -> Value {
    let mut sort_keys = SORT_KEYS.to_vec();
    if at_least(version, 73) {
        sort_keys.retain(|key| *key != "locked");
        sort_keys.insert(3, "locked");
    }
    let text = json!({"type": "string"});
    let moment = json!({"type": "string", "format": "date-time"});
    let mut parameters = vec![
        ("sort_key", json!({"type": "string", "enum": sort_keys})),
        (
            "sort_dir",
            json!({"type": "string", "enum": ["asc", "desc"]}),
        ),
        ("limit", crate::compute::api::schemas::limit()),
        ("changes-since", moment.clone()),
    ];
    for free in [
        "user_id",
        "project_id",
        "tenant_id",
        "launch_index",
        "image_ref",
        "image",
        "kernel_id",
        "ramdisk_id",
        "hostname",
        "key_name",
        "instance_type_id",
        "vm_state",
        "task_state",
        "power_state",
        "display_name",
        "display_description",
        "name",
        "description",
        "reservation_id",
        "uuid",
        "host",
        "node",
        "availability_zone",
        "config_drive",
        "access_ip_v4",
        "access_ip_v6",
        "ip",
        "ip6",
        "flavor",
        "status",
        "marker",
        "deleted",
        "deleted_only",
        "all_tenants",
        "locked_by",
        "progress",
        "root_device_name",
        "terminated_at",
        "launched_at",
        "created_at",
        "updated_at",
        "cleaned",
        "soft_deleted",
        "not-implemented",
        "metadata",
        "system_metadata",
        "auto_disk_config",
        "block_device_mapping",
        "services",
        "tags",
        "tags-any",
        "not-tags",
        "not-tags-any",
    ] {
        let tag_filter = free.contains("tags");
        if !tag_filter || at_least(version, 26) {
            parameters.push((free, text.clone()));
        }
    }
    if at_least(version, 66) {
        parameters.push(("changes-before", moment));
    }
    if at_least(version, 73) {
        parameters.push(("locked", text.clone()));
    }
    let more = if at_least(version, 75) {
        More::Underscores
    } else {
        More::Anything
    };
    query(&parameters, more)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A threshold that a schema uses and its ages do not name would go unnoticed.
    #[test]
    fn ages_name_every_change() {
        for (ages, make) in [
            (CREATE_AGES, create as fn(Microversion) -> Value),
            (UPDATE_AGES, update),
            (REBUILD_AGES, rebuild),
            (LIST_AGES, list),
        ] {
            let changes: Vec<u16> = (2..=96)
                .filter(|minor| {
                    let at = |minor| make(Microversion::new(2, minor));
                    at(*minor) != at(*minor - 1)
                })
                .collect();
            assert_eq!(changes, ages);
        }
    }
}
