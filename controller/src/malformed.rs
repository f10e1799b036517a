//! Every endpoint of every service, given what no client should send.
//!
//! Goes through the table that routes are made by. Bodies that are too large, too deep, cut off, no
//! JSON or JSON of another type, and ids that are none: each is answered by the API's own error
//! (the oracle in the frame looks at its form), and nothing of the database or of the images is other
//! than it was. Owns no code of the controller.

mod full;
mod kept;

use axum::body::Body;
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};

use self::kept::Kept;
use crate::http::{BODY_LIMIT, Endpoint, Service};
use crate::rights::shown;
use crate::rights::things::Things;
use crate::testing::{self, Answer, TestApp};

/// What is asked by method and path alone, or takes bytes. A line that is not in the table fails, and
/// so does an endpoint that is not here and leaves its body unread.
const NO_JSON: [&str; 11] = [
    "POST image/v2/images/{id}/actions/deactivate",
    "POST image/v2/images/{id}/actions/reactivate",
    "PUT compute/v2.1/servers/{id}/tags/{tag}",
    "PUT identity/v3/domains/{domain}/users/{user}/roles/{role}",
    "PUT identity/v3/projects/{id}/tags/{tag}",
    "PUT identity/v3/projects/{project}/users/{user}/roles/{role}",
    "PUT identity/v3/roles/{id}/implies/{other}",
    "PUT identity/v3/system/users/{user}/roles/{role}",
    "PUT image/v2/images/{id}/file",
    "PUT image/v2/images/{id}/stage",
    "PUT image/v2/images/{id}/tags/{tag}",
];

/// Endpoints that read a JSON body; of those whose body names an action, the path once.
fn with_body(cloud: &TestApp) -> Vec<Endpoint> {
    let takes = [Method::POST, Method::PUT, Method::PATCH];
    let mut endpoints: Vec<_> = cloud
        .public
        .endpoints()
        .filter(|endpoint| takes.contains(&endpoint.method) && endpoint.action.is_none())
        .filter(|endpoint| !NO_JSON.contains(&shown(endpoint).as_str()))
        .cloned()
        .collect();
    endpoints.sort_by_key(shown);
    endpoints
}

/// Sends `body` to an endpoint as an administrator, to whom nothing else is refused.
async fn send(cloud: &TestApp, things: &Things, endpoint: &Endpoint, body: Body) -> Answer {
    let path = things.path(endpoint);
    let headers = things.headers(&cloud.admin, endpoint);
    cloud
        .send(endpoint.method.clone(), &path, &headers, body)
        .await
}

/// Tries a body on every endpoint that takes one; answers those that gave another status than `wanted`.
async fn refused(
    cloud: &TestApp,
    things: &Things,
    wanted: u16,
    body: impl Fn() -> Body,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for endpoint in &with_body(cloud) {
        let answer = send(cloud, things, endpoint, body()).await;
        if answer.status != wanted {
            wrong.push(format!(
                "{} → {} {}",
                shown(endpoint),
                answer.status,
                answer.text()
            ));
        }
    }
    wrong
}

#[tokio::test]
async fn what_takes_no_json_is_in_the_table() {
    let cloud = testing::app().await;
    let table: Vec<_> = cloud.public.endpoints().map(shown).collect();
    for line in NO_JSON {
        assert!(
            table.iter().any(|known| known == line),
            "there is no {line}"
        );
    }
    let endpoints = with_body(&cloud);
    assert!(
        endpoints.len() > 40,
        "{} endpoints: are all there?",
        endpoints.len()
    );
}

#[tokio::test]
async fn a_body_that_is_too_large_is_413_everywhere() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let before = Kept::of(&cloud).await;
    let large = json!({"x": "x".repeat(BODY_LIMIT)}).to_string();
    let wrong = refused(&cloud, &things, 413, || Body::from(large.clone())).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(Kept::of(&cloud).await, before);
}

#[tokio::test]
async fn a_body_that_is_too_deep_is_400_everywhere() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let before = Kept::of(&cloud).await;
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let deep = format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
        let wrong = refused(&cloud, &things, 400, || Body::from(deep.clone())).await;
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
    assert_eq!(Kept::of(&cloud).await, before);
}

#[tokio::test]
async fn a_body_that_is_cut_off_or_no_json_is_400_everywhere() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let before = Kept::of(&cloud).await;
    for text in [
        "{\"server\": {\"name\": \"x",
        "{",
        "[{\"op\":",
        "\u{1}",
        "<x/>",
        "{} {}",
        "\u{feff}{}",
    ] {
        let wrong = refused(&cloud, &things, 400, || Body::from(text)).await;
        assert!(wrong.is_empty(), "{text}: {wrong:#?}");
    }
    let bytes = b"{\"name\": \"\xff\xfe\"}";
    let wrong = refused(&cloud, &things, 400, || Body::from(&bytes[..])).await;
    assert!(wrong.is_empty(), "no UTF-8: {wrong:#?}");
    let broken = || {
        let part = [
            Ok(Bytes::from_static(b"{}")),
            Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
        ];
        Body::from_stream(futures::stream::iter(part))
    };
    let wrong = refused(&cloud, &things, 400, broken).await;
    assert!(wrong.is_empty(), "a connection that ends: {wrong:#?}");
    assert_eq!(Kept::of(&cloud).await, before);
}

#[tokio::test]
async fn json_of_the_wrong_type_is_400_everywhere() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let before = Kept::of(&cloud).await;
    let mut wrong = Vec::new();
    for endpoint in &with_body(&cloud) {
        for body in wrong_types(&things, endpoint) {
            let answer = send(&cloud, &things, endpoint, Body::from(body.to_string())).await;
            if answer.status != 400 {
                wrong.push(format!(
                    "{} {body} → {} {}",
                    shown(endpoint),
                    answer.status,
                    answer.text()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(Kept::of(&cloud).await, before);
}

/// Bodies of which the whole, or what its one name holds, has another type than the right one.
fn wrong_types(things: &Things, endpoint: &Endpoint) -> Vec<Value> {
    let right = things.body(endpoint);
    let others = [
        json!([]),
        json!({}),
        json!("text"),
        json!(7),
        json!(true),
        Value::Null,
        json!([[]]),
    ];
    // An image has no field that it must have, and no change is a change of it.
    let nothing = if endpoint.method == Method::PATCH {
        json!([])
    } else {
        json!({})
    };
    let may_be_empty = endpoint.service == Service::Image;
    let whole = others
        .iter()
        .filter(|other| !(may_be_empty && **other == nothing));
    let mut bodies: Vec<Value> = whole.cloned().collect();
    if let Some((name, value)) = right.as_object().and_then(|map| map.iter().next()) {
        let inner = others
            .iter()
            .filter(|other| other.is_object() != value.is_object());
        bodies.extend(inner.map(|other| json!({ name: other })));
    }
    bodies
}

#[tokio::test]
async fn a_body_of_another_kind_is_refused_in_the_way_of_the_service() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let before = Kept::of(&cloud).await;
    let mut wrong = Vec::new();
    for endpoint in &with_body(&cloud) {
        // As recorded: keystone's words are those of a bad request.
        let wanted = if endpoint.service == Service::Identity {
            400
        } else {
            415
        };
        let headers = [
            ("x-auth-token", cloud.admin.as_str()),
            ("content-type", "application/xml"),
            ("accept", "application/json"),
            ("openstack-api-version", "compute 2.96"),
        ];
        let path = things.path(endpoint);
        let answer = cloud
            .send(endpoint.method.clone(), &path, &headers, "<x/>")
            .await;
        if answer.status != wanted {
            wrong.push(format!(
                "{} → {} {}",
                shown(endpoint),
                answer.status,
                answer.text()
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(Kept::of(&cloud).await, before);
}

/// What nothing is called, in forms that a parser, a path or a database might trip over.
const NO_IDS: [&str; 8] = [
    "nothing-has-this-name",
    "00000000-0000-4000-8000-000000000000",
    "00000000000040008000000000000000",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%27%20OR%201%3D1%20--",
    "-1",
    "99999999999999999999999999",
    "%F0%9F%92%A5",
];

/// Parameters that any name is right for: it is made by the request; or the server, which is being
/// built, keeps it from being asked for. Quotas take any project's id (nova asks keystone for it).
fn takes_any_name(endpoint: &Endpoint, parameter: &str) -> bool {
    let quotas = endpoint.path.starts_with("/v2.1/os-quota-");
    let makes = endpoint.method == Method::PUT || endpoint.service == Service::Compute;
    // A project that has used nothing is one that nobody has heard of.
    let usage = endpoint.path.starts_with("/v2.1/os-simple-tenant-usage/");
    quotas || usage || parameter == "{tag}" && makes
}

#[tokio::test]
async fn an_id_that_nothing_has_is_400_or_404_everywhere() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let before = Kept::of(&cloud).await;
    let long = "x".repeat(5000);
    let ids = || NO_IDS.into_iter().chain([long.as_str()]);
    let mut endpoints: Vec<_> = cloud.public.endpoints().cloned().collect();
    endpoints.sort_by_key(shown);
    let (mut tried, mut wrong) = (0, Vec::new());
    for endpoint in &endpoints {
        let body = things.body(endpoint);
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let headers = things.headers(&cloud.admin, endpoint);
        for (parameter, path) in ids().flat_map(|id| things.paths_with(endpoint, id)) {
            if takes_any_name(endpoint, parameter) {
                continue;
            }
            tried += 1;
            let answer = cloud
                .send(endpoint.method.clone(), &path, &headers, body.clone())
                .await;
            if ![400, 404].contains(&answer.status.as_u16()) {
                let path: String = path.chars().take(200).collect();
                wrong.push(format!(
                    "{} {path} → {} {}",
                    shown(endpoint),
                    answer.status,
                    answer.text()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(tried > 900, "only {tried}");
    assert_eq!(Kept::of(&cloud).await, before);
}
