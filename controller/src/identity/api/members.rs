//! Members of a request's resource: those with a column, and the rest, which keystone keeps and
//! shows as they are.

use serde_json::{Map, Value, json};

use crate::http::ApiError;
use crate::http::schema::Schema;

/// The members of a body's one object, taken out one by one.
#[derive(Debug)]
pub struct Members(Map<String, Value>);

impl Members {
    /// `body[name]`; a schema has seen that it is an object.
    pub fn of(mut body: Value, name: &str) -> Result<Self, ApiError> {
        match body.get_mut(name).map(Value::take) {
            Some(Value::Object(members)) => Ok(Self(members)),
            _ => Err(ApiError::bad_request(format!(
                "'{name}' is a required property"
            ))),
        }
    }

    /// Takes a member out; `None` if it is absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name)
    }

    /// Sets `to` if the member is there and no null.
    pub fn string(&mut self, name: &str, to: &mut String) {
        if let Some(Value::String(value)) = self.take(name) {
            *to = value;
        }
    }

    /// Sets `to` if the member is there; null makes it `None`.
    pub fn optional(&mut self, name: &str, to: &mut Option<String>) {
        match self.take(name) {
            Some(Value::String(value)) => *to = Some(value),
            Some(Value::Null) => *to = None,
            _ => {}
        }
    }

    pub fn boolean(&mut self, name: &str, to: &mut bool) {
        if let Some(Value::Bool(value)) = self.take(name) {
            *to = value;
        }
    }

    /// Sets `to` to the member's JSON if it is there.
    pub fn json(&mut self, name: &str, to: &mut String) {
        if let Some(value) = self.take(name).filter(|value| !value.is_null()) {
            *to = value.to_string();
        }
    }

    /// Merges what is left into a row's `extra`; a null takes a member out.
    pub fn rest(self, extra: &mut String) {
        let mut merged = object(extra);
        for (name, value) in self.0 {
            if value.is_null() {
                merged.shift_remove(&name);
            } else {
                merged.insert(name, value);
            }
        }
        *extra = Value::Object(merged).to_string();
    }
}

/// The schema of a body that makes a `kind`: its one object has these properties, any others, and at
/// least those that are required.
pub fn made(kind: &str, properties: Value, required: &[&str]) -> Schema {
    body(
        kind,
        json!({"properties": properties, "required": required}),
    )
}

/// The schema of a body that changes a `kind`: its one object has at least one member.
pub fn changed(kind: &str, properties: Value) -> Schema {
    body(kind, json!({"properties": properties, "minProperties": 1}))
}

fn body(kind: &str, mut inner: Value) -> Schema {
    inner["type"] = json!("object");
    inner["additionalProperties"] = json!(true);
    Schema::of(json!({"type": "object", "properties": {kind: inner}, "required": [kind]}))
}

/// A column that holds a JSON object; anything else in it counts as empty.
pub fn object(column: &str) -> Map<String, Value> {
    serde_json::from_str(column).unwrap_or_default()
}
