//! `PATCH /v2/images/{id}`: glance's two dialects of JSON patch, both turned into [`Change`]s.

use serde_json::{Map, Value, json};

use super::model::{Image, Status, refuse_fixed};
use super::schema;
use crate::http::{ApiError, Caller};

/// Media types that are taken.
pub const MEDIA_TYPES: [&str; 2] = [
    "application/openstack-images-v2.0-json-patch",
    "application/openstack-images-v2.1-json-patch",
];

#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Add(String, Value),
    Replace(String, Value),
    Remove(String),
}

impl Change {
    fn name(&self) -> &str {
        match self {
            Self::Add(name, _) | Self::Replace(name, _) | Self::Remove(name) => name,
        }
    }
}

/// Reads a body of either dialect: `{"op": "add", "path": "/x", "value": 1}` (2.1, RFC 6902) or
/// `{"add": "/x", "value": 1}` (2.0).
pub fn parse(body: &Value, media_type: &str) -> Result<Vec<Change>, ApiError> {
    let Some(operations) = body.as_array() else {
        return Err(ApiError::bad_request(
            "Request body must be a JSON array of operation objects.",
        ));
    };
    let old = media_type == MEDIA_TYPES[0];
    operations
        .iter()
        .map(|operation| parse_one(operation, old))
        .collect()
}

fn parse_one(operation: &Value, old: bool) -> Result<Change, ApiError> {
    let bad = |words: String| ApiError::bad_request(words);
    let Some(operation) = operation.as_object() else {
        return Err(bad("Operations must be JSON objects.".to_owned()));
    };
    let (op, path) = if old {
        old_form(operation)?
    } else {
        new_form(operation)?
    };
    let name = pointer(path)?;
    let value = || {
        operation.get("value").cloned().ok_or_else(|| {
            bad(format!(
                "Operation \"{op}\" requires a member named \"value\"."
            ))
        })
    };
    match op {
        "add" => Ok(Change::Add(name, value()?)),
        "replace" => Ok(Change::Replace(name, value()?)),
        _ => Ok(Change::Remove(name)),
    }
}

const OPERATIONS: [&str; 3] = ["add", "remove", "replace"];

fn new_form(operation: &Map<String, Value>) -> Result<(&str, &str), ApiError> {
    let Some(op) = operation.get("op").and_then(Value::as_str) else {
        return Err(ApiError::bad_request(
            "Unable to find 'op' in JSON Schema change.",
        ));
    };
    if !OPERATIONS.contains(&op) {
        return Err(ApiError::bad_request(format!(
            "Invalid operation: `{op}`. It must be one of the following: {}.",
            OPERATIONS.join(", ")
        )));
    }
    let path = operation.get("path").and_then(Value::as_str);
    path.map(|path| (op, path))
        .ok_or_else(|| ApiError::bad_request("Unable to find 'path' in JSON Schema change."))
}

fn old_form(operation: &Map<String, Value>) -> Result<(&str, &str), ApiError> {
    let mut named = OPERATIONS.iter().filter_map(|op| {
        operation
            .get(*op)
            .and_then(Value::as_str)
            .map(|path| (*op, path))
    });
    match (named.next(), named.next()) {
        (Some(found), None) => Ok(found),
        _ => Err(ApiError::bad_request(
            "Operation objects must contain exactly one member named \"add\", \"remove\", or \
             \"replace\".",
        )),
    }
}

/// The one name in a JSON pointer (RFC 6901): attributes have no depth.
fn pointer(path: &str) -> Result<String, ApiError> {
    let Some(name) = path.strip_prefix('/') else {
        return Err(ApiError::bad_request(format!(
            "Pointer `{path}` does not start with \"/\"."
        )));
    };
    if name.is_empty() {
        return Err(ApiError::bad_request(format!(
            "Pointer `{path}` does not contain valid token."
        )));
    }
    if name.contains('/') {
        return Err(ApiError::bad_request(format!(
            "Invalid JSON pointer for this resource: '{path}'"
        )));
    }
    let mut rest = name;
    while let Some((_, after)) = rest.split_once('~') {
        if !after.starts_with(['0', '1']) {
            return Err(ApiError::bad_request(format!(
                "Pointer `{path}` contains \"~\" not part of a recognized escape sequence."
            )));
        }
        rest = after;
    }
    Ok(name.replace("~1", "/").replace("~0", "~"))
}

/// Attributes that always exist: they can be replaced, and not removed.
const BASE: [&str; 11] = [
    "name",
    "visibility",
    "protected",
    "os_hidden",
    "owner",
    "tags",
    "min_ram",
    "min_disk",
    "disk_format",
    "container_format",
    "locations",
];

/// Applies one change to `image` as `caller` may.
pub fn apply(image: &mut Image, change: &Change, caller: &Caller) -> Result<(), ApiError> {
    let name = change.name();
    refuse_fixed(name)?;
    match change {
        Change::Remove(name) if BASE.contains(&name.as_str()) => {
            Err(ApiError::forbidden("Access was denied to this resource.")
                .with_detail(format!("Property {name} may not be removed.")))
        }
        Change::Remove(name) => {
            if image.property(name).is_none() {
                return Err(missing(name));
            }
            image.properties.retain(|(known, _)| known != name);
            Ok(())
        }
        Change::Replace(name, _)
            if !BASE.contains(&name.as_str()) && image.property(name).is_none() =>
        {
            Err(missing(name))
        }
        Change::Add(name, value) | Change::Replace(name, value) => {
            let one = Map::from_iter([(name.clone(), value.clone())]);
            schema::check_image(&one)?;
            set(image, name, value, caller)
        }
    }
}

fn missing(name: &str) -> ApiError {
    ApiError::conflict("There was a conflict when trying to complete your request.")
        .with_detail(format!("Property {name} does not exist."))
}

/// Sets an attribute or property to a value that the schema has agreed to.
pub fn set(image: &mut Image, name: &str, value: &Value, caller: &Caller) -> Result<(), ApiError> {
    let text = || value.as_str().map(str::to_owned);
    let row = &mut image.row;
    match name {
        "name" => row.name = text(),
        "protected" => row.protected = *value == json!(true),
        "os_hidden" => row.os_hidden = *value == json!(true),
        "min_ram" => row.min_ram = value.as_i64().unwrap_or(0),
        "min_disk" => row.min_disk = value.as_i64().unwrap_or(0),
        "tags" => {
            let tags = value.as_array().into_iter().flatten();
            image.tags = tags
                .filter_map(|tag| tag.as_str().map(str::to_owned))
                .collect();
            image.tags.sort();
            image.tags.dedup();
        }
        "visibility" => {
            let wanted = text().unwrap_or_default();
            let opens = matches!(wanted.as_str(), "public") && row.visibility != "public";
            if opens && !caller.is_admin() {
                return Err(ApiError::forbidden(
                    "You are not authorized to complete publicize_image action.",
                ));
            }
            row.visibility = wanted;
        }
        "owner" => {
            let wanted = text().unwrap_or_default();
            if wanted != row.owner && !caller.is_admin() {
                return Err(ApiError::forbidden("Access was denied to this resource.")
                    .with_detail(format!(
                        "You are not permitted to create images owned by '{wanted}'."
                    )));
            }
            row.owner = wanted;
        }
        "disk_format" | "container_format" => {
            let slot = if name == "disk_format" {
                &mut row.disk_format
            } else {
                &mut row.container_format
            };
            let wanted = text();
            if *slot != wanted && row.status != Status::Queued.name() {
                return Err(ApiError::forbidden(format!(
                    "Attribute {name} can be only replaced for a queued image."
                )));
            }
            *slot = wanted;
        }
        property => {
            image.properties.retain(|(known, _)| known != property);
            if let Some(value) = text() {
                if image.properties.len() >= MOST_PROPERTIES {
                    return Err(ApiError::new(
                        http::StatusCode::PAYLOAD_TOO_LARGE,
                        format!("The limit of {MOST_PROPERTIES} properties has been exceeded."),
                    ));
                }
                if property.chars().count() > 255 || value.chars().count() > 65_535 {
                    return Err(ApiError::bad_request(format!(
                        "The property '{}' is too long.",
                        property.chars().take(40).collect::<String>()
                    )));
                }
                image.properties.push((property.to_owned(), value));
                image.properties.sort();
            }
        }
    }
    Ok(())
}

/// Properties an image has at most (glance's image_property_quota).
pub const MOST_PROPERTIES: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dialects_say_the_same() {
        let new = json!([{"op": "replace", "path": "/name", "value": "x"}, {"op": "remove", "path": "/a~1b"}]);
        let old = json!([{"replace": "/name", "value": "x"}, {"remove": "/a~1b"}]);
        let expected = vec![
            Change::Replace("name".to_owned(), json!("x")),
            Change::Remove("a/b".to_owned()),
        ];
        assert_eq!(parse(&new, MEDIA_TYPES[1]).unwrap(), expected);
        assert_eq!(parse(&old, MEDIA_TYPES[0]).unwrap(), expected);
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        for (body, part) in [
            (json!({"x": 1}), "JSON array"),
            (json!([1]), "JSON objects"),
            (json!([{"op": "bad", "path": "/x"}]), "`bad`"),
            (json!([{"op": "add", "path": "/x"}]), "\"value\""),
            (
                json!([{"op": "add", "path": "x", "value": 1}]),
                "start with",
            ),
            (
                json!([{"op": "add", "path": "/", "value": 1}]),
                "valid token",
            ),
            (
                json!([{"op": "add", "path": "/a/b", "value": 1}]),
                "Invalid JSON pointer",
            ),
            (
                json!([{"op": "add", "path": "/a~2", "value": 1}]),
                "escape sequence",
            ),
        ] {
            let error = parse(&body, MEDIA_TYPES[1]).unwrap_err();
            assert!(
                error.message().contains(part),
                "{body}: {}",
                error.message()
            );
        }
    }
}
