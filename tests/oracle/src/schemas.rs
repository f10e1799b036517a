//! The two witnesses that speak JSON Schema: Tempest (compute, by microversion) and OpenAPI.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use jsonschema::{Draft, Validator};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Violation;
use crate::exchange::{Body, Exchange, Service};
use crate::template;

/// Compiled schemas, made when first needed.
#[derive(Debug, Default)]
struct Compiled(Mutex<HashMap<usize, Arc<Validator>>>);

impl Compiled {
    fn get(&self, number: usize, draft: Draft, schema: impl FnOnce() -> Value) -> Arc<Validator> {
        let mut compiled = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        compiled
            .entry(number)
            .or_insert_with(|| {
                let built = jsonschema::options().with_draft(draft).build(&schema());
                Arc::new(built.unwrap_or_else(|fault| panic!("schema {number}: {fault}")))
            })
            .clone()
    }
}

fn validate(
    validator: &Validator,
    body: &Value,
    witness: &'static str,
    violations: &mut Vec<Violation>,
) {
    violations.extend(validator.iter_errors(body).map(|fault| Violation {
        witness,
        place: format!("body{}", fault.instance_path().as_str().replace('/', ".")),
        what: fault.to_string(),
    }));
}

/// Tempest's response schemas.
#[derive(Debug, Deserialize)]
pub struct Tempest {
    operations: Vec<TempestOperation>,
    schemas: Vec<Value>,
    #[serde(skip)]
    compiled: Compiled,
}

#[derive(Debug, Deserialize)]
struct TempestOperation {
    method: String,
    path: String,
    action: Option<String>,
    ranges: Vec<Range>,
}

/// What holds from one microversion to another (minor parts, both included).
#[derive(Debug, Deserialize)]
struct Range {
    from: u16,
    to: u16,
    status: Vec<u16>,
    /// Index into the schemas; `None`: no body.
    body: Option<usize>,
}

impl Tempest {
    pub fn load() -> Self {
        crate::recorded::parse(include_str!("../data/tempest.json"), "tempest.json")
    }

    fn find(&self, method: &str, path: &str, action: Option<&str>) -> Option<&TempestOperation> {
        let fitting = self.operations.iter().filter(|operation| {
            operation.method == method && operation.action.as_deref() == action
        });
        template::best(fitting, |operation| &operation.path, path)
    }

    pub fn knows(&self, service: Service, method: &str, path: &str, action: Option<&str>) -> bool {
        service == Service::Compute && self.find(method, path, action).is_some()
    }

    /// True when there was something to hold the answer to.
    pub fn check(&self, exchange: &Exchange, violations: &mut Vec<Violation>) -> bool {
        if exchange.service != Service::Compute || exchange.status >= 400 {
            return false;
        }
        let action = exchange.action.as_deref();
        let Some(operation) = self.find(&exchange.method, &exchange.path, action) else {
            return false;
        };
        let minor = exchange.microversion.max(1);
        let Some(range) = operation
            .ranges
            .iter()
            .find(|range| (range.from..=range.to).contains(&minor))
        else {
            return false;
        };
        let mut violate = |place: &str, what: String| {
            violations.push(Violation {
                witness: "tempest",
                place: place.to_owned(),
                what,
            });
        };
        if !range.status.contains(&exchange.status) {
            violate(
                "status",
                format!("{} where {:?} is right", exchange.status, range.status),
            );
            return true;
        }
        match (range.body, &exchange.body) {
            // With return_reservation_id there is no server in the answer, and Tempest does not look.
            (Some(_), Body::Json(body)) if body.get("reservation_id").is_some() => return false,
            (Some(number), Body::Json(body)) => {
                let validator = self
                    .compiled
                    .get(number, Draft::Draft4, || self.schemas[number].clone());
                validate(&validator, body, "tempest", violations);
            }
            (None, Body::None) => {}
            (Some(_), _) => violate("body", "no JSON".to_owned()),
            (None, _) => violate("body", "should not exist".to_owned()),
        }
        true
    }
}

/// The OpenAPI response schemas that every real answer passes.
#[derive(Debug)]
pub struct OpenApi(Vec<(Service, Document)>);

#[derive(Debug, Deserialize)]
struct Document {
    operations: Vec<OpenApiAnswer>,
    components: Value,
    #[serde(skip)]
    compiled: Compiled,
}

#[derive(Debug, Deserialize)]
struct OpenApiAnswer {
    method: String,
    path: String,
    status: u16,
    /// `None`: real answers fail it, or it accepts anything.
    schema: Option<Value>,
}

impl OpenApi {
    pub fn load() -> Self {
        let documents = [
            (
                Service::Identity,
                include_str!("../data/openapi/identity.json"),
            ),
            (Service::Image, include_str!("../data/openapi/image.json")),
            (
                Service::Compute,
                include_str!("../data/openapi/compute.json"),
            ),
        ];
        Self(
            documents
                .map(|(service, text)| (service, crate::recorded::parse(text, service.name())))
                .into(),
        )
    }

    fn document(&self, service: Service) -> Option<&Document> {
        self.0
            .iter()
            .find(|(of, _)| *of == service)
            .map(|(_, document)| document)
    }

    pub fn knows(&self, service: Service, method: &str, path: &str) -> bool {
        self.document(service).is_some_and(|document| {
            document.operations.iter().any(|answer| {
                answer.method == method
                    && answer.schema.is_some()
                    && template::rank(&answer.path, path).is_some()
            })
        })
    }

    /// Whether the API reference names this status of the operation.
    pub fn names(&self, exchange: &Exchange) -> bool {
        self.document(exchange.service).is_some_and(|document| {
            document.operations.iter().any(|answer| {
                answer.method == exchange.method
                    && answer.status == exchange.status
                    && template::rank(&answer.path, &exchange.path).is_some()
            })
        })
    }

    /// True when there was something to hold the answer to.
    pub fn check(&self, exchange: &Exchange, violations: &mut Vec<Violation>) -> bool {
        let Some(document) = self.document(exchange.service) else {
            return false;
        };
        let Body::Json(body) = &exchange.body else {
            return false;
        };
        let numbered: Vec<(usize, &OpenApiAnswer)> = document
            .operations
            .iter()
            .enumerate()
            .filter(|(_, answer)| {
                answer.method == exchange.method && answer.status == exchange.status
            })
            .collect();
        let best = template::best(&numbered, |(_, answer)| &answer.path, &exchange.path);
        let Some((
            number,
            OpenApiAnswer {
                schema: Some(schema),
                ..
            },
        )) = best
        else {
            return false;
        };
        let validator = document.compiled.get(*number, Draft::Draft202012, || {
            let mut schema = schema.clone();
            schema["components"] = json!(document.components);
            schema
        });
        validate(&validator, body, "openapi", violations);
        true
    }
}
