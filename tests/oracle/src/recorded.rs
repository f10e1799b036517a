//! The first witness: what a real OpenStack said, as shapes.
//!
//! A recording is one example, an answer of ours another: what they must have in common is decided
//! here. Fields and types are those of the recordings of the same microversion; where there is none,
//! of the nearest below and above it (what both have is required, what either has is allowed). A
//! field that is sometimes there and sometimes not, in recordings that differ in nothing else, is
//! optional. Where a recording had `null` or an empty list, the other microversions tell what else
//! it may be.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Violation;
use crate::exchange::{Body, Exchange, Service};
use crate::{headers, template};

/// What the recordings had to say of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// The same operation, status and microversion was recorded.
    Exactly,
    /// The operation and status were, at other microversions.
    Nearby,
    /// The form of errors with this status, in this service.
    ErrorForm,
    Nothing,
}

#[derive(Debug, Deserialize)]
struct Operation {
    method: String,
    path: String,
    action: Option<String>,
    optional: BTreeSet<String>,
    answers: BTreeMap<u16, Answer>,
}

impl Operation {
    fn successes(&self) -> Vec<u16> {
        let statuses = self.answers.keys().copied();
        statuses.filter(|status| *status < 400).collect()
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    /// Names of those that each recording has.
    headers: Vec<String>,
    /// Forms of the values that say something, by name.
    values: BTreeMap<String, BTreeSet<String>>,
    bodies: Vec<String>,
    versions: BTreeMap<u16, Shape>,
}

#[derive(Debug, Deserialize)]
struct Shape {
    types: BTreeSet<String>,
    #[serde(default)]
    forms: BTreeSet<String>,
    fields: Option<BTreeMap<String, Shape>>,
    map: Option<Box<Shape>>,
    items: Option<Box<Shape>>,
    #[serde(default)]
    open: bool,
}

#[derive(Debug, Deserialize)]
struct Recording {
    operations: Vec<Operation>,
    errors: BTreeMap<u16, Shape>,
}

/// The recordings of all services.
#[derive(Debug)]
pub struct Recordings(Vec<(Service, Recording)>);

/// Reads data that was built in, and so is right or nothing works.
pub fn parse<T: DeserializeOwned>(text: &str, name: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|fault| panic!("reference data {name}: {fault}"))
}

impl Recordings {
    pub fn load() -> Self {
        let recordings = [
            (
                Service::Identity,
                include_str!("../data/recorded/identity.json"),
            ),
            (Service::Image, include_str!("../data/recorded/image.json")),
            (
                Service::Compute,
                include_str!("../data/recorded/compute.json"),
            ),
        ];
        Self(
            recordings
                .map(|(service, text)| (service, parse(text, service.name())))
                .into(),
        )
    }

    fn recording(&self, service: Service) -> Option<&Recording> {
        self.0
            .iter()
            .find(|(of, _)| *of == service)
            .map(|(_, recording)| recording)
    }

    fn find(
        &self,
        service: Service,
        method: &str,
        path: &str,
        action: Option<&str>,
    ) -> Option<&Operation> {
        let fitting = self
            .recording(service)?
            .operations
            .iter()
            .filter(|operation| {
                operation.method == method && operation.action.as_deref() == action
            });
        template::best(fitting, |operation| &operation.path, path)
    }

    pub fn knows(&self, service: Service, method: &str, path: &str, action: Option<&str>) -> bool {
        self.find(service, method, path, action)
            .is_some_and(|operation| operation.answers.keys().any(|status| *status < 400))
    }

    pub fn check(&self, exchange: &Exchange, violations: &mut Vec<Violation>) -> Recorded {
        if exchange.method == "HEAD" && self.of_exchange(exchange).is_none() {
            return self.head(exchange, violations);
        }
        let operation = self.of_exchange(exchange);
        let answer = operation.and_then(|operation| operation.answers.get(&exchange.status));
        if let Some(answer) = answer {
            headers::names(exchange, &answer.headers, violations);
        }
        self.header_values(exchange, answer, violations);
        if exchange.status >= 400 {
            return self.error(exchange, answer, violations);
        }
        let (Some(operation), Some(answer)) = (operation, answer) else {
            let given: Vec<u16> = operation.map(Operation::successes).unwrap_or_default();
            if !given.is_empty() && !also_status(exchange) {
                violations.push(Violation {
                    witness: "recorded",
                    place: "status".to_owned(),
                    what: format!("{} where {given:?} was recorded", exchange.status),
                });
            }
            return Recorded::Nothing;
        };
        match &exchange.body {
            Body::Json(body) if !answer.versions.is_empty() => {
                let versions: Vec<(u16, &Shape)> = answer
                    .versions
                    .iter()
                    .map(|(minor, shape)| (*minor, shape))
                    .collect();
                let mut comparison = Comparison {
                    minor: exchange.microversion,
                    optional: &operation.optional,
                    violations,
                };
                comparison.compare(&versions, body, &Place::body());
                if answer.versions.contains_key(&exchange.microversion) {
                    Recorded::Exactly
                } else {
                    Recorded::Nearby
                }
            }
            body => {
                let kind = match body {
                    Body::None => "none",
                    Body::Json(_) => "json",
                    Body::Other => "text",
                };
                if !answer.bodies.iter().any(|known| known == kind) {
                    violations.push(Violation {
                        witness: "recorded",
                        place: "body".to_owned(),
                        what: format!("{kind} where {:?} was recorded", answer.bodies),
                    });
                }
                Recorded::Exactly
            }
        }
    }

    fn of_exchange(&self, exchange: &Exchange) -> Option<&Operation> {
        self.find(
            exchange.service,
            &exchange.method,
            &exchange.path,
            exchange.action.as_deref(),
        )
    }

    /// A HEAD that was not recorded is the GET of that path without its body (RFC 9110 9.3.2).
    fn head(&self, exchange: &Exchange, violations: &mut Vec<Violation>) -> Recorded {
        let got = self.find(exchange.service, "GET", &exchange.path, None);
        if exchange.status >= 400 {
            return Recorded::ErrorForm;
        }
        let Some(got) = got else {
            return Recorded::Nothing;
        };
        let Some(answer) = got.answers.get(&exchange.status) else {
            violations.push(Violation {
                witness: "recorded",
                place: "status".to_owned(),
                what: format!(
                    "{} where {:?} was recorded",
                    exchange.status,
                    got.successes()
                ),
            });
            return Recorded::Nothing;
        };
        headers::names(exchange, &answer.headers, violations);
        Recorded::Nearby
    }

    /// Values have the forms that this answer's recordings have; of an answer that was not recorded, those
    /// of any answer of the service that succeeds, or fails, as it does.
    fn header_values(
        &self,
        exchange: &Exchange,
        answer: Option<&Answer>,
        violations: &mut Vec<Violation>,
    ) {
        let fails = exchange.status >= 400;
        for (name, value) in &exchange.headers {
            // What it depends on is what the request named, and an error of glance has the type that was
            // asked for: both are the request's, not the operation's.
            let asked_for = name == "vary"
                || name == "content-type" && fails && exchange.service == Service::Image;
            let own = answer.filter(|_| !asked_for);
            let own = own.and_then(|answer| answer.values.get(name));
            let known: BTreeSet<&String> = match own {
                Some(own) => own.iter().collect(),
                // Where it leads is each operation's own.
                None if name == "location" => continue,
                None => self
                    .recording(exchange.service)
                    .iter()
                    .flat_map(|recording| &recording.operations)
                    .flat_map(|operation| &operation.answers)
                    .filter(|(status, _)| (**status >= 400) == fails)
                    .filter_map(|(_, answer)| answer.values.get(name))
                    .flatten()
                    .collect(),
            };
            headers::value(exchange, name, value, &known, violations);
        }
        headers::agree(exchange, violations);
    }

    /// Statuses of failures that were recorded of the operation.
    pub(crate) fn failed_with(&self, exchange: &Exchange) -> bool {
        let method = match exchange.method.as_str() {
            "HEAD" => "GET",
            other => other,
        };
        [exchange.method.as_str(), method].iter().any(|method| {
            let action = exchange.action.as_deref();
            self.find(exchange.service, method, &exchange.path, action)
                .is_some_and(|operation| operation.answers.contains_key(&exchange.status))
        })
    }

    /// Errors have one form for each status in a service, whatever the operation.
    fn error(
        &self,
        exchange: &Exchange,
        answer: Option<&Answer>,
        violations: &mut Vec<Violation>,
    ) -> Recorded {
        let Body::Json(body) = &exchange.body else {
            let html = exchange.service == Service::Image && exchange.body == Body::Other;
            let bare = exchange.method == "HEAD";
            // Routers know no path and say so in HTML, before any service is asked.
            let unrouted = exchange.status == 404 && exchange.body == Body::Other;
            let recorded = answer.is_some_and(|answer| !answer.bodies.iter().any(|b| b == "json"));
            if !(html || bare || unrouted || recorded) {
                violations.push(Violation {
                    witness: "recorded",
                    place: "body".to_owned(),
                    what: "an error without a JSON body".to_owned(),
                });
            }
            return Recorded::ErrorForm;
        };
        let known = self
            .recording(exchange.service)
            .and_then(|recording| recording.errors.get(&exchange.status));
        if let Some(shape) = known {
            let anything = every_field(shape, "");
            let mut comparison = Comparison {
                minor: 0,
                optional: &anything,
                violations,
            };
            comparison.compare(&[(0, shape)], body, &Place::body());
        }
        if let Err(what) = error_form(exchange, body) {
            violations.push(Violation {
                witness: "recorded",
                place: "body".to_owned(),
                what,
            });
        }
        Recorded::ErrorForm
    }
}

/// Names of all fields below a shape, as the list of optional fields has them.
fn every_field(shape: &Shape, at: &str) -> BTreeSet<String> {
    shape
        .fields
        .iter()
        .flatten()
        .flat_map(|(name, inner)| {
            let name = format!("{at}.{name}");
            let mut below = every_field(inner, &name);
            below.insert(name);
            below
        })
        .collect()
}

/// Every error has a message, and a code that is its status.
fn error_form(exchange: &Exchange, body: &Value) -> Result<(), String> {
    let said = body.as_object().ok_or("an error that is no object")?;
    let inner = match said.values().next() {
        Some(Value::Object(inner)) if said.len() == 1 => inner,
        _ => said,
    };
    if !inner.get("message").is_some_and(Value::is_string) {
        return Err("an error without a message".to_owned());
    }
    match inner.get("code") {
        Some(Value::Number(code)) if code.as_u64() == Some(exchange.status.into()) => Ok(()),
        // As the router of glance and of nova says it: `"404 Not Found"`.
        Some(Value::String(code)) if code.starts_with(&exchange.status.to_string()) => Ok(()),
        // As the router of keystone says it.
        None if exchange.status == 405 && exchange.service == Service::Identity => Ok(()),
        other => Err(format!(
            "code {other:?} in an error of status {}",
            exchange.status
        )),
    }
}

/// Fields that an answer may carry though no recording of it has them: nova gives a server in ERROR its
/// fault in `servers/detail` as in `servers/{id}` (OpenStack compute API reference, `fault`), and no
/// server happened to be in ERROR when the lists were recorded.
const ALSO: [&str; 1] = [".servers[].fault"];

/// Fields that an answer may lack though each recording has them: nova gives a fault's details to
/// administrators, and to others only where its code is not 500 (API reference, `fault.details`).
const MAY_LACK: [&str; 1] = [".server.fault.details"];

/// Servers of these statuses show their progress, others do not (API reference, `progress`); what changes
/// a server was recorded of active ones only.
const WITH_PROGRESS: [&str; 6] = [
    "ACTIVE",
    "BUILD",
    "MIGRATING",
    "REBUILD",
    "RESIZE",
    "VERIFY_RESIZE",
];

/// Whether the field of this name may be absent beside these.
fn may_lack(name: &str, beside: &serde_json::Map<String, Value>) -> bool {
    let status = beside.get("status").and_then(Value::as_str);
    let progress = name == ".server.progress" || name == ".servers[].progress";
    MAY_LACK.contains(&name) || progress && status.is_some_and(|s| !WITH_PROGRESS.contains(&s))
}

/// Successes besides the recorded ones: a tag that the server has already is a 204 (the recordings'
/// README; API reference, "Add a single tag").
const ALSO_STATUS: [(Service, &str, &str, u16); 1] = [(
    Service::Compute,
    "PUT",
    "/v2.1/servers/{id}/tags/{tag}",
    204,
)];

fn also_status(exchange: &Exchange) -> bool {
    ALSO_STATUS.iter().any(|(service, method, path, status)| {
        (*service, *status) == (exchange.service, exchange.status)
            && *method == exchange.method
            && template::rank(path, &exchange.path).is_some()
    })
}

/// A place in a body: as the reader sees it, and as the list of optional fields names it.
struct Place {
    shown: String,
    name: String,
}

impl Place {
    fn body() -> Self {
        Self {
            shown: "body".to_owned(),
            name: String::new(),
        }
    }

    fn field(&self, field: &str) -> Self {
        Self {
            shown: format!("{}.{field}", self.shown),
            name: format!("{}.{field}", self.name),
        }
    }

    /// What stands in a map, whose keys are data.
    fn entry(&self, key: &str) -> Self {
        Self {
            shown: format!("{}.{key}", self.shown),
            name: format!("{}.*", self.name),
        }
    }

    fn item(&self, index: usize) -> Self {
        Self {
            shown: format!("{}[{index}]", self.shown),
            name: format!("{}[]", self.name),
        }
    }
}

/// One comparison of a body with what was recorded.
struct Comparison<'a> {
    minor: u16,
    optional: &'a BTreeSet<String>,
    violations: &'a mut Vec<Violation>,
}

type Versions<'s> = [(u16, &'s Shape)];

impl Comparison<'_> {
    fn violate(&mut self, place: &Place, what: String) {
        let place = place.shown.clone();
        self.violations.push(Violation {
            witness: "recorded",
            place,
            what,
        });
    }

    fn compare(&mut self, versions: &Versions<'_>, value: &Value, place: &Place) {
        if versions.iter().any(|(_, shape)| shape.types.is_empty()) {
            return; // cut out of the recording
        }
        let near = nearest(versions, self.minor);
        if !self.type_fits(versions, &near, value) {
            let known: BTreeSet<&String> =
                near.iter().flat_map(|(_, shape)| &shape.types).collect();
            self.violate(
                place,
                format!("{} where {known:?} was recorded", type_of(value)),
            );
            return;
        }
        match value {
            Value::Object(fields) => self.object(versions, fields, place),
            Value::Array(items) => {
                let known: Vec<(u16, &Shape)> = versions
                    .iter()
                    .filter_map(|(minor, shape)| Some((*minor, shape.items.as_deref()?)))
                    .collect();
                if !known.is_empty() {
                    for (index, item) in items.iter().enumerate() {
                        self.compare(&known, item, &place.item(index));
                    }
                }
            }
            Value::String(text) => self.form(&near, text, place),
            _ => {}
        }
    }

    fn type_fits(&self, all: &Versions<'_>, near: &Versions<'_>, value: &Value) -> bool {
        let kind = type_of(value);
        let any = |versions: &Versions<'_>| {
            versions.iter().any(|(_, shape)| {
                shape.types.contains(kind) || kind == "integer" && shape.types.contains("number")
            })
        };
        let only_null = near
            .iter()
            .all(|(_, shape)| shape.types.iter().all(|t| t == "null"));
        let never_told = all
            .iter()
            .all(|(_, shape)| shape.types.iter().all(|t| t == "null"));
        any(near) || (only_null || kind == "null") && any(all) || never_told
    }

    fn object(
        &mut self,
        versions: &Versions<'_>,
        fields: &serde_json::Map<String, Value>,
        place: &Place,
    ) {
        let maps: Vec<(u16, &Shape)> = versions
            .iter()
            .filter_map(|(minor, shape)| Some((*minor, shape.map.as_deref()?)))
            .collect();
        if !maps.is_empty() {
            let seen: Vec<(u16, &Shape)> = (maps.into_iter())
                .filter(|(_, shape)| !shape.types.is_empty())
                .collect();
            for (key, value) in fields.iter().filter(|_| !seen.is_empty()) {
                self.compare(&seen, value, &place.entry(key));
            }
            return;
        }
        let known: Vec<(u16, &Shape)> = versions
            .iter()
            .filter(|(_, shape)| shape.fields.is_some())
            .copied()
            .collect();
        if known.is_empty() {
            return;
        }
        let near = nearest(&known, self.minor);
        let open = known.iter().any(|(_, shape)| shape.open);
        let has = |shape: &Shape, name: &str| {
            shape
                .fields
                .as_ref()
                .is_some_and(|fields| fields.contains_key(name))
        };
        let required: BTreeSet<&String> = near
            .iter()
            .flat_map(|(_, shape)| shape.fields.iter().flat_map(BTreeMap::keys))
            .filter(|name| near.iter().all(|(_, shape)| has(shape, name)))
            .filter(|name| {
                let name = place.field(name).name;
                !self.optional.contains(&name) && !may_lack(&name, fields)
            })
            .collect();
        for name in required {
            if !fields.contains_key(name) {
                self.violate(&place.field(name), "is missing".to_owned());
            }
        }
        for (name, value) in fields {
            let inner = place.field(name);
            let optional = self.optional.contains(&inner.name);
            let allowed = near.iter().any(|(_, shape)| has(shape, name))
                || optional
                    && known
                        .iter()
                        .any(|(at, shape)| *at <= self.minor && has(shape, name));
            if allowed {
                let of_field: Vec<(u16, &Shape)> = known
                    .iter()
                    .filter_map(|(at, shape)| Some((*at, shape.fields.as_ref()?.get(name)?)))
                    .collect();
                self.compare(&of_field, value, &inner);
            } else if !open && !ALSO.contains(&inner.name.as_str()) {
                self.violate(&inner, "was never recorded here".to_owned());
            }
        }
    }

    /// Times and ids look as they do in the recordings.
    fn form(&mut self, near: &Versions<'_>, text: &str, place: &Place) {
        let known: BTreeSet<&str> = near
            .iter()
            .flat_map(|(_, shape)| shape.forms.iter().map(String::as_str))
            .collect();
        let name = place.name.rsplit(['.', ':']).next().unwrap_or_default();
        let is_time = !known.is_empty() && known.iter().all(|form| form.starts_with("time"));
        let is_id = (name == "id" || name == "uuid" || name.ends_with("_id"))
            && (known.iter().all(|form| *form == "uuid")
                || known.iter().all(|form| *form == "hex32"))
            && !known.is_empty();
        if (is_time || is_id) && !known.contains(form_of(text)) {
            self.violate(place, format!("{text:?} where {known:?} was recorded"));
        }
    }
}

/// The version itself where there is one, else the nearest below and above it.
fn nearest<'s>(versions: &Versions<'s>, minor: u16) -> Vec<(u16, &'s Shape)> {
    if let Some(exact) = versions.iter().find(|(at, _)| *at == minor) {
        return vec![*exact];
    }
    let below = versions
        .iter()
        .filter(|(at, _)| *at < minor)
        .max_by_key(|(at, _)| *at);
    let above = versions
        .iter()
        .filter(|(at, _)| *at > minor)
        .min_by_key(|(at, _)| *at);
    below.into_iter().chain(above).copied().collect()
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The form of a string, as `generate.py` names it.
fn form_of(text: &str) -> &'static str {
    let hex = |part: &str| {
        part.bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let date = |part: &str| {
        let form: String = part
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        form == "0000-00-00T00:00:00"
    };
    if let Some((seconds, rest)) = text.split_at_checked(19).filter(|(head, _)| date(head)) {
        debug_assert_eq!(seconds.len(), 19);
        return match rest.strip_prefix('.') {
            None if rest == "Z" => "time_z",
            Some(micro) if micro.strip_suffix('Z').is_some_and(digits) => "time_us_z",
            Some(micro) if digits(micro) => "time_us",
            _ => "text",
        };
    }
    let parts: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    if lengths == [8, 4, 4, 4, 12] && parts.iter().all(|part| hex(part)) {
        return "uuid";
    }
    if text.len() == 32 && hex(text) {
        return "hex32";
    }
    let schemes = ["http://", "https://", "ws://", "wss://"];
    if schemes.iter().any(|scheme| text.starts_with(scheme)) {
        "url"
    } else {
        "text"
    }
}
