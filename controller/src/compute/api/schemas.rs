//! The parameter types that nova's schemas share: names, booleans, integers, ids, addresses.
//!
//! Owns building blocks only; each endpoint puts its schema together from them. Source: the checks
//! that the recorded nova makes.

use serde_json::{Map, Value, json};

/// An object in which only what is named is allowed.
pub fn closed(properties: Value, required: &[&str]) -> Value {
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

/// `{"NAME": inner}` and nothing else.
pub fn wrapped(name: &str, inner: Value) -> Value {
    let mut properties = Map::new();
    properties.insert(name.to_owned(), inner);
    closed(Value::Object(properties), &[name])
}

pub fn string(least: u32, most: u32) -> Value {
    json!({"type": "string", "minLength": least, "maxLength": most})
}

pub fn string_or_null(most: u32) -> Value {
    json!({"type": ["string", "null"], "minLength": 0, "maxLength": most})
}

/// Printable, 1 to 255 letters, no white space at either end.
pub fn name() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 255, "format": "name"})
}

pub fn boolean() -> Value {
    json!({
        "type": ["boolean", "string"],
        "enum": [
            true, "True", "TRUE", "true", "1", "ON", "On", "on", "YES", "Yes", "yes",
            false, "False", "FALSE", "false", "0", "OFF", "Off", "off", "NO", "No", "no",
        ],
    })
}

/// Reads what [`boolean`] accepts, and the one-letter forms of queries.
pub fn as_bool(value: &Value) -> bool {
    match value {
        Value::Bool(set) => *set,
        Value::String(text) => is_true(text),
        _ => false,
    }
}

pub fn is_true(text: &str) -> bool {
    matches!(
        text.to_ascii_lowercase().as_str(),
        "true" | "1" | "on" | "yes" | "t" | "y"
    )
}

pub fn is_false(text: &str) -> bool {
    matches!(
        text.to_ascii_lowercase().as_str(),
        "false" | "0" | "off" | "no" | "f" | "n"
    )
}

pub fn integer(least: i64, most: i64) -> Value {
    json!({
        "type": ["integer", "string"],
        "pattern": "^[0-9]*$",
        "minimum": least,
        "maximum": most,
        "minLength": 1,
    })
}

pub fn positive_integer() -> Value {
    json!({"type": ["integer", "string"], "pattern": "^[0-9]*$", "minimum": 1, "minLength": 1})
}

/// A quota: -1 (no limit) upward.
pub fn quota() -> Value {
    json!({
        "type": ["integer", "string"],
        "pattern": "^-?[0-9]+$",
        "minimum": -1,
        "maximum": 0x7FFF_FFFF,
    })
}

/// Reads what the integer schemas accept.
pub fn as_integer(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number
            .as_i64()
            .or_else(|| number.as_f64().map(|number| number as i64)),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

pub fn uuid() -> Value {
    json!({"type": "string", "format": "uuid"})
}

pub fn metadata() -> Value {
    json!({
        "type": "object",
        "patternProperties": {
            "^[a-zA-Z0-9-_:. ]{1,255}$": {"type": "string", "maxLength": 255},
        },
        "additionalProperties": false,
    })
}

/// A server's tag: 1 to 60 letters, neither `/` nor `,`.
pub fn tag() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 60, "pattern": "^[^,/]*$"})
}

pub fn tags() -> Value {
    json!({"type": "array", "items": tag(), "maxItems": 50})
}

pub fn hostname() -> Value {
    json!({
        "type": "string",
        "minLength": 2,
        "maxLength": 63,
        "pattern": "^[a-zA-Z0-9]+[a-zA-Z0-9-]*[a-zA-Z0-9]+$",
    })
}

/// From 2.94: a fully qualified name.
pub fn fqdn() -> Value {
    json!({
        "type": "string",
        "minLength": 2,
        "maxLength": 255,
        "pattern": "^[a-zA-Z0-9]+[a-zA-Z0-9-.]*[a-zA-Z0-9]+$",
    })
}

pub fn user_data() -> Value {
    json!({"type": "string", "format": "base64", "maxLength": 65535})
}

pub fn trusted_certificates() -> Value {
    json!({
        "type": ["array", "null"],
        "minItems": 1,
        "maxItems": 50,
        "uniqueItems": true,
        "items": {"type": "string", "minLength": 1},
    })
}

/// A query that takes these parameters, each any number of times; `more`: what else is ignored.
pub fn query(parameters: &[(&str, Value)], more: More) -> Value {
    let properties: Map<String, Value> = parameters
        .iter()
        .map(|(name, of)| ((*name).to_owned(), json!({"type": "array", "items": of})))
        .collect();
    let mut schema = json!({"type": "object", "properties": properties});
    match more {
        More::Anything => {}
        More::Underscores => {
            schema["patternProperties"] = json!({"^_": {}});
            schema["additionalProperties"] = json!(false);
        }
        More::Nothing => schema["additionalProperties"] = json!(false),
    }
    schema
}

/// What a query may hold beside what it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum More {
    Anything,
    /// Names with a leading underscore.
    Underscores,
    Nothing,
}

/// `limit`: digits.
pub fn limit() -> Value {
    json!({"type": "string", "pattern": "^[0-9]*$"})
}
