//! What an image is, and how it is shown.

use serde_json::{Map, Value, json};

use crate::http::{ApiError, Caller};

pub use super::store::image::Model as Row;

/// An image with what belongs to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    pub row: Row,
    /// In the order of their names.
    pub properties: Vec<(String, String)>,
    pub tags: Vec<String>,
}

/// Where an image is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It has no bytes yet.
    Queued,
    /// Bytes are coming in.
    Saving,
    /// Bytes are staged and wait for an import.
    Uploading,
    Active,
    /// As active, but only an administrator may read the bytes.
    Deactivated,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Saving => "saving",
            Self::Uploading => "uploading",
            Self::Active => "active",
            Self::Deactivated => "deactivated",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [
            Self::Queued,
            Self::Saving,
            Self::Uploading,
            Self::Active,
            Self::Deactivated,
        ]
        .into_iter()
        .find(|status| status.name() == text)
    }
}

/// Attributes that the service alone sets.
pub const READ_ONLY: [&str; 13] = [
    "id",
    "status",
    "checksum",
    "size",
    "virtual_size",
    "created_at",
    "updated_at",
    "self",
    "file",
    "schema",
    "direct_url",
    "os_hash_algo",
    "os_hash_value",
];

/// Names that no property may have.
pub const RESERVED: [&str; 4] = ["location", "locations", "deleted", "deleted_at"];

/// The prefix of names that belong to the service.
pub const RESERVED_PREFIX: &str = "os_glance_";

/// 403 for an attribute that users cannot set.
pub fn refuse_fixed(name: &str) -> Result<(), ApiError> {
    if READ_ONLY.contains(&name) {
        return Err(ApiError::forbidden(format!(
            "Attribute '{name}' is read-only."
        )));
    }
    if RESERVED.contains(&name) || name.starts_with(RESERVED_PREFIX) {
        return Err(ApiError::forbidden("Access was denied to this resource.")
            .with_detail(format!("Attribute '{name}' is reserved.")));
    }
    Ok(())
}

impl Image {
    pub fn property(&self, name: &str) -> Option<&str> {
        self.properties
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// `None` for a status that this build does not know.
    pub fn status(&self) -> Option<Status> {
        Status::parse(&self.row.status)
    }

    /// Whether the caller may change it. Members of a shared image and readers of a public one may
    /// not.
    pub fn belongs_to(&self, caller: &Caller) -> bool {
        caller.is_admin() || caller.project_id() == Some(self.row.owner.as_str())
    }

    /// The body of `GET /v2/images/{id}`. Properties come first, as the original has it.
    pub fn view(&self) -> Value {
        let row = &self.row;
        let mut view = Map::new();
        for (name, value) in &self.properties {
            view.insert(name.clone(), json!(value));
        }
        let path = format!("/v2/images/{}", row.id);
        let fixed = [
            ("name", json!(row.name)),
            ("disk_format", json!(row.disk_format)),
            ("container_format", json!(row.container_format)),
            ("visibility", json!(row.visibility)),
            ("size", json!(row.size)),
            ("virtual_size", json!(row.virtual_size)),
            ("status", json!(row.status)),
            ("checksum", json!(row.checksum)),
            ("protected", json!(row.protected)),
            ("min_ram", json!(row.min_ram)),
            ("min_disk", json!(row.min_disk)),
            ("owner", json!(row.owner)),
            ("os_hidden", json!(row.os_hidden)),
            (
                "os_hash_algo",
                json!(row.os_hash_value.as_ref().map(|_| "sha512")),
            ),
            ("os_hash_value", json!(row.os_hash_value)),
            ("id", json!(row.id)),
            ("created_at", json!(iso_time(row.created_at_us))),
            ("updated_at", json!(iso_time(row.updated_at_us))),
            ("tags", json!(self.tags)),
            ("self", json!(path)),
            ("file", json!(format!("{path}/file"))),
            ("schema", json!("/v2/schemas/image")),
        ];
        view.extend(fixed.map(|(name, value)| (name.to_owned(), value)));
        Value::Object(view)
    }
}

/// `2026-11-22T09:25:24Z`.
pub fn iso_time(us: i64) -> String {
    jiff::Timestamp::from_microsecond(us)
        .unwrap_or_default()
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string()
}
