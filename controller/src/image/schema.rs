//! The schemas that glance publishes, and the checks that follow from them.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use crate::http::ApiError;
use crate::http::schema::Schema;

pub const DISK_FORMATS: [&str; 11] = [
    "ami", "ari", "aki", "vhd", "vhdx", "vmdk", "raw", "qcow2", "vdi", "iso", "ploop",
];
pub const CONTAINER_FORMATS: [&str; 8] = [
    "ami",
    "ari",
    "aki",
    "bare",
    "ovf",
    "ova",
    "docker",
    "compressed",
];
const UUID: &str =
    "^([0-9a-fA-F]){8}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){12}$";

static IMAGE: LazyLock<Schema> = LazyLock::new(|| Schema::of(image()));

/// 400 in glance's words when an image with these attributes would not fit the schema.
pub fn check_image(attributes: &Map<String, Value>) -> Result<(), ApiError> {
    if let Some(misfit) = IMAGE.misfit(&Value::Object(attributes.clone())) {
        return Err(ApiError::bad_request(format!(
            "Provided object does not match schema 'image': {}",
            misfit.message
        )));
    }
    for name in ["min_disk", "min_ram"] {
        if let Some(value) = attributes.get(name).and_then(Value::as_i64)
            && value < 0
        {
            return Err(ApiError::bad_request(format!(
                "Invalid value '{value}' for parameter '{name}': Cannot be a negative value"
            )));
        }
        if attributes
            .get(name)
            .and_then(Value::as_u64)
            .is_some_and(|v| v > i32::MAX as u64)
        {
            return Err(ApiError::bad_request(format!(
                "Value of '{name}' is too large."
            )));
        }
    }
    Ok(())
}

fn with_null(names: &[&str]) -> Vec<Value> {
    std::iter::once(Value::Null)
        .chain(names.iter().map(|name| json!(name)))
        .collect()
}

/// `GET /v2/schemas/image`.
pub fn image() -> Value {
    let text = |what: &str| json!({"type": "string", "description": what});
    let fixed = |what: &str| json!({"type": "string", "readOnly": true, "description": what});
    let fixed_null = |kind: &str, what: &str| json!({"type": ["null", kind], "readOnly": true, "description": what});
    json!({
        "name": "image",
        "properties": {
            "id": {"type": "string", "description": "The image's id", "pattern": UUID},
            "name": {"type": ["null", "string"], "description": "Name of the image", "maxLength": 255},
            "status": {"type": "string", "readOnly": true, "description": "Where the image is in its life",
                "enum": ["queued", "saving", "active", "killed", "deleted", "uploading", "importing",
                         "pending_delete", "deactivated"]},
            "visibility": {"type": "string", "description": "Who can see the image",
                "enum": ["community", "public", "private", "shared"]},
            "protected": {"type": "boolean", "description": "Whether the image is safe from deletion"},
            "os_hidden": {"type": "boolean", "description": "Whether lists leave the image out"},
            "checksum": {"type": ["null", "string"], "readOnly": true, "maxLength": 32,
                "description": "MD5 of the bytes, in hex"},
            "os_hash_algo": {"type": ["null", "string"], "readOnly": true, "maxLength": 64,
                "description": "Algorithm of os_hash_value"},
            "os_hash_value": {"type": ["null", "string"], "readOnly": true, "maxLength": 128,
                "description": "Hash of the bytes, in hex"},
            "owner": {"type": ["null", "string"], "maxLength": 255, "description": "The project that owns the image"},
            "size": fixed_null("integer", "Size of the bytes stored"),
            "virtual_size": fixed_null("integer", "Size that a guest sees, in bytes"),
            "container_format": {"type": ["null", "string"], "description": "What the disk is wrapped in",
                "enum": with_null(&CONTAINER_FORMATS)},
            "disk_format": {"type": ["null", "string"], "description": "Format of the disk",
                "enum": with_null(&DISK_FORMATS)},
            "created_at": fixed("When the image was made"),
            "updated_at": fixed("When the image was last changed"),
            "tags": {"type": "array", "description": "Words to find the image by",
                "items": {"type": "string", "maxLength": 255}},
            "direct_url": fixed("Address of the bytes in the store"),
            "min_ram": {"type": "integer", "description": "MiB of memory that a server needs at least"},
            "min_disk": {"type": "integer", "description": "GiB of disk that a server needs at least"},
            "self": fixed("Path of the image"),
            "file": fixed("Path of the bytes"),
            "schema": fixed("Path of this schema"),
            "kernel_id": {"type": ["null", "string"], "pattern": UUID,
                "description": "Image of the kernel that the machine is booted with"},
            "ramdisk_id": {"type": ["null", "string"], "pattern": UUID,
                "description": "Image of the initial ramdisk that goes with the kernel"},
            "os_distro": text("Name of the distribution, in lower case"),
            "os_version": text("Version of the distribution"),
            "architecture": text("Architecture of the processor, as in x86_64"),
        },
        "additionalProperties": {"type": "string"},
        "links": [
            {"rel": "self", "href": "{self}"},
            {"rel": "enclosure", "href": "{file}"},
            {"rel": "describedby", "href": "{schema}"},
        ],
    })
}

/// `GET /v2/schemas/member`.
pub fn member() -> Value {
    json!({
        "name": "member",
        "properties": {
            "member_id": {"type": "string", "description": "The project that the image is shared with"},
            "image_id": {"type": "string", "description": "The image's id", "pattern": UUID},
            "created_at": {"type": "string", "description": "When it was shared"},
            "updated_at": {"type": "string", "description": "When the member last answered"},
            "status": {"type": "string", "description": "The member's answer",
                "enum": ["pending", "accepted", "rejected"]},
            "schema": {"readOnly": true, "type": "string"},
        },
    })
}

/// `GET /v2/schemas/images`.
pub fn images() -> Value {
    collection(
        "images",
        image(),
        json!({
            "first": {"type": "string"},
            "next": {"type": "string"},
        }),
    )
}

/// `GET /v2/schemas/members`.
pub fn members() -> Value {
    collection("members", member(), json!({}))
}

fn collection(name: &str, item: Value, more: Value) -> Value {
    let mut properties = Map::new();
    properties.insert(name.to_owned(), json!({"type": "array", "items": item}));
    if let Value::Object(more) = more {
        properties.extend(more);
    }
    properties.insert("schema".to_owned(), json!({"type": "string"}));
    let links = if name == "images" {
        json!([
            {"rel": "first", "href": "{first}"},
            {"rel": "next", "href": "{next}"},
            {"rel": "describedby", "href": "{schema}"},
        ])
    } else {
        json!([{"rel": "describedby", "href": "{schema}"}])
    };
    json!({"name": name, "properties": properties, "links": links})
}
