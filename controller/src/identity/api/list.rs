//! What all of identity's lists do: filters, limit and marker, links.

use axum::Json;
use axum::extract::FromRequestParts;
use http::Uri;
use http::request::Parts;
use serde_json::{Map, Value, json};

use crate::http::{ApiError, Query, RequestContext};

/// Where a list was asked for: its path below the service, and its query.
#[derive(Debug)]
pub struct Asked {
    pub ctx: RequestContext,
    pub query: Query,
    uri: Uri,
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Ok(query) = Query::from_request_parts(parts, state).await;
        Ok(Self {
            ctx: RequestContext::from_request_parts(parts, state).await?,
            query,
            uri: parts.uri.clone(),
        })
    }
}

impl Asked {
    /// `{"PLURAL": [...], "links": {...}}` of the items that pass the filters, which are those of
    /// `fields` that the query names, with keystone's comparators (`name__contains`).
    pub fn list(&self, plural: &str, fields: &[&str], mut items: Vec<Value>) -> Json<Value> {
        items.retain(|item| self.passes(item, fields));
        let mut truncated = None;
        if let Some(limit) = self.limit() {
            items.sort_by(|one, other| id(one).cmp(id(other)));
            if let Some(marker) = self.query.get("marker") {
                items.retain(|item| id(item) > marker);
            }
            if items.len() > limit {
                items.truncate(limit);
                truncated = items.last().map(|last| id(last).to_owned());
            }
        }
        let next = truncated.as_deref().map(|last| {
            self.ctx.link(&format!(
                "{}?{}",
                self.uri.path(),
                self.query.with("marker", Some(last))
            ))
        });
        let mut body = Map::new();
        body.insert(plural.to_owned(), items.into());
        body.insert("links".to_owned(), self.links(next));
        if truncated.is_some() {
            body.insert("truncated".to_owned(), true.into());
        }
        Json(body.into())
    }

    pub fn links(&self, next: Option<String>) -> Value {
        let asked = self.uri.path_and_query().map_or("", |path| path.as_str());
        json!({"next": next, "self": self.ctx.link(asked), "previous": null})
    }

    fn limit(&self) -> Option<usize> {
        self.query
            .get("limit")?
            .parse()
            .ok()
            .filter(|limit| *limit > 0)
    }

    fn passes(&self, item: &Value, fields: &[&str]) -> bool {
        self.query.pairs().all(|(key, wanted)| {
            let (name, comparator) = key.split_once("__").unwrap_or((key, "exact"));
            if !fields.contains(&name) {
                return true;
            }
            compare(item.get(name).unwrap_or(&Value::Null), comparator, wanted)
        })
    }
}

fn id(item: &Value) -> &str {
    item.get("id").and_then(Value::as_str).unwrap_or("")
}

fn compare(value: &Value, comparator: &str, wanted: &str) -> bool {
    let text = match value {
        Value::Bool(value) => return *value == is_true(wanted),
        Value::String(text) => text.as_str(),
        Value::Null => return wanted.is_empty() || wanted == "null",
        _ => return false,
    };
    let lower = || (text.to_lowercase(), wanted.to_lowercase());
    match comparator {
        "contains" => text.contains(wanted),
        "startswith" => text.starts_with(wanted),
        "endswith" => text.ends_with(wanted),
        "icontains" => lower().0.contains(&lower().1),
        "istartswith" => lower().0.starts_with(&lower().1),
        "iendswith" => lower().0.ends_with(&lower().1),
        "iexact" => lower().0 == lower().1,
        _ => text == wanted,
    }
}

/// A flag in a query, as keystone reads it: anything but a zero or a no.
pub fn is_true(text: &str) -> bool {
    !matches!(
        text.to_ascii_lowercase().as_str(),
        "0" | "false" | "no" | "off" | "f" | "n"
    )
}

/// A flag that is set by being there (`?effective`).
pub fn flag(query: &Query, name: &str) -> bool {
    query
        .get(name)
        .is_some_and(|value| value.is_empty() || is_true(value))
}
