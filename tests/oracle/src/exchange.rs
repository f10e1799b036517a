//! One request and its answer, as the oracle looks at it.

use serde_json::Value;

/// The API that a request went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Service {
    Identity,
    Image,
    Compute,
}

impl Service {
    pub const ALL: [Self; 3] = [Self::Identity, Self::Image, Self::Compute];

    /// Also the first part of its public paths.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Image => "image",
            Self::Compute => "compute",
        }
    }
}

/// The body of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    None,
    Json(Value),
    /// Anything else: an image's bytes, HTML.
    Other,
}

/// One request and its answer.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub service: Service,
    pub method: String,
    /// Without the service's prefix and the query: `/v2.1/servers/detail`.
    pub path: String,
    /// Of a `POST …/action`, the first key of the request's body.
    pub action: Option<String>,
    /// The minor part of the microversion that the answer says it is in; 0 where there are none.
    pub microversion: u16,
    pub status: u16,
    /// Names in lower case, each once.
    pub headers: Vec<(String, String)>,
    pub body: Body,
}

impl Exchange {
    /// From what went over the wire. `path` is the public one, `/compute/v2.1/servers?limit=1`, also
    /// behind an origin. `None` when it belongs to no service that the oracle knows.
    pub fn new(
        method: &str,
        path: &str,
        request: Option<&Value>,
        status: u16,
        headers: impl IntoIterator<Item = (String, String)>,
        body: &[u8],
    ) -> Option<Self> {
        let path = match path.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |slash| &rest[slash..]),
            None => path,
        };
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let (service, rest) = Service::ALL.into_iter().find_map(|service| {
            let rest = path.strip_prefix('/')?.strip_prefix(service.name())?;
            (rest.is_empty() || rest.starts_with('/')).then_some((service, rest))
        })?;
        let headers = joined(headers);
        let action = (rest.ends_with("/action"))
            .then(|| request?.as_object()?.keys().next().cloned())
            .flatten();
        let body = match serde_json::from_slice(body) {
            _ if body.is_empty() => Body::None,
            Ok(value) if is_json(&headers) => Body::Json(value),
            _ => Body::Other,
        };
        Some(Self {
            service,
            method: method.to_ascii_uppercase(),
            path: if rest.is_empty() {
                "/".to_owned()
            } else {
                rest.to_owned()
            },
            action,
            microversion: microversion(&headers),
            status,
            headers,
            body,
        })
    }

    /// The body, not too much of it.
    pub fn shown(&self) -> String {
        match &self.body {
            Body::None => String::new(),
            Body::Json(value) => value.to_string().chars().take(4000).collect(),
            Body::Other => "(a body that is no JSON)".to_owned(),
        }
    }

    /// The first header of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }
}

/// One of each name, in lower case: several lines of one name are one list (RFC 9110 5.2).
fn joined(headers: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    for (name, value) in headers {
        let name = name.to_ascii_lowercase();
        match all.iter_mut().find(|(known, _)| *known == name) {
            Some((_, first)) => *first = format!("{first}, {value}"),
            None => all.push((name, value)),
        }
    }
    all
}

fn is_json(headers: &[(String, String)]) -> bool {
    headers
        .iter()
        .any(|(name, value)| name == "content-type" && value.contains("json"))
}

/// `openstack-api-version: compute 2.96` is 96.
fn microversion(headers: &[(String, String)]) -> u16 {
    headers
        .iter()
        .filter(|(name, _)| name == "openstack-api-version")
        .filter_map(|(_, value)| value.split_whitespace().last()?.split_once('.'))
        .find_map(|(_, minor)| minor.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn service_path_action_and_microversion_are_read_off_the_wire() {
        let exchange = Exchange::new(
            "post",
            "https://cloud:5000/compute/v2.1/servers/1/action?x=1",
            Some(&json!({"os-start": null})),
            202,
            [(
                "OpenStack-API-Version".to_owned(),
                "compute 2.61".to_owned(),
            )],
            b"",
        )
        .unwrap();
        assert_eq!(exchange.service, Service::Compute);
        assert_eq!(exchange.path, "/v2.1/servers/1/action");
        assert_eq!(exchange.action.as_deref(), Some("os-start"));
        assert_eq!(
            (exchange.microversion, exchange.method.as_str()),
            (61, "POST")
        );
        assert_eq!(exchange.body, Body::None);
    }

    #[test]
    fn a_path_of_no_service_is_no_exchange() {
        assert!(Exchange::new("GET", "/computer/v2.1", None, 200, [], b"").is_none());
    }
}
