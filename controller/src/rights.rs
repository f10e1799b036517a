//! Every endpoint of every service, tried by those who may not.
//!
//! Goes through the table that routes are made by, so an endpoint cannot be left out: one whose
//! parameters this test has no thing for fails it. Owns no code of the controller.

use std::collections::BTreeMap;

use http::Method;
use serde_json::{Value, json};

use crate::http::{Endpoint, Service};
use crate::policy::Needs;
use crate::testing::{self, Answer, TestApp};

/// What the parameters of paths stand for: things of the project `one`, made by its member.
struct Things(BTreeMap<(&'static str, &'static str), String>);

impl Things {
    async fn make(cloud: &TestApp) -> Self {
        let mut things = BTreeMap::new();
        let id = |body: Value, kind: &str| body[kind]["id"].as_str().unwrap_or("").to_owned();
        let name = json!({"name": "of-one"});
        let image = cloud
            .post(&cloud.member, "/image/v2/images", name.clone())
            .await;
        let image = image.expect_status(201).json()["id"]
            .as_str()
            .unwrap()
            .to_owned();
        things.insert(("image", "images"), image);
        let role = cloud
            .get(&cloud.admin, "/identity/v3/roles?name=reader")
            .await
            .json();
        let role = role["roles"][0]["id"].as_str().unwrap().to_owned();
        things.insert(("identity", "roles"), role);
        things.insert(("identity", "projects"), cloud.project_id.clone());
        things.insert(("identity", "users"), cloud.admin_user_id.clone());
        things.insert(("identity", "domains"), "default".to_owned());
        let services = cloud
            .get(&cloud.admin, "/identity/v3/services")
            .await
            .json();
        let service = services["services"][0]["id"].as_str().unwrap().to_owned();
        things.insert(("identity", "services"), service);
        let endpoints = cloud
            .get(&cloud.admin, "/identity/v3/endpoints")
            .await
            .json();
        let endpoint = endpoints["endpoints"][0]["id"].as_str().unwrap().to_owned();
        things.insert(("identity", "endpoints"), endpoint);
        things.insert(("identity", "regions"), "RegionOne".to_owned());
        let flavor = json!({"flavor": {"name": "f", "ram": 64, "vcpus": 1, "disk": 1}});
        let flavor = cloud
            .post(&cloud.admin, "/compute/v2.1/flavors", flavor)
            .await;
        things.insert(
            ("compute", "flavors"),
            id(flavor.expect_status(200).json(), "flavor"),
        );
        Self(things)
    }

    /// The path with its parameters filled in: by what stands before them, else by an id that
    /// nothing has, which a refusal must not depend on.
    fn fill(&self, endpoint: &Endpoint) -> String {
        let service = endpoint.service.prefix();
        let mut filled = String::from("/");
        filled.push_str(service);
        let mut before = "";
        for segment in endpoint.path.split('/').skip(1) {
            filled.push('/');
            if segment.starts_with('{') {
                let thing = self
                    .0
                    .iter()
                    .find(|((of, kind), _)| *of == service && *kind == before);
                filled.push_str(thing.map_or(NOTHING, |(_, id)| id.as_str()));
            } else {
                filled.push_str(segment);
            }
            before = segment;
        }
        filled
    }
}

const NOTHING: &str = "11111111-2222-4333-8444-555555555555";

fn shown(endpoint: &Endpoint) -> String {
    let action = endpoint
        .action
        .map_or(String::new(), |action| format!(" {action}"));
    format!(
        "{} {}{}{action}",
        endpoint.method,
        endpoint.service.prefix(),
        endpoint.path
    )
}

async fn try_as(cloud: &TestApp, token: &str, endpoint: &Endpoint, path: &str) -> Answer {
    let body = match (&endpoint.method, endpoint.action) {
        (_, Some(action)) => json!({ action: {} }),
        (&Method::GET | &Method::HEAD | &Method::DELETE, None) => Value::Null,
        _ => json!({}),
    };
    cloud.ask(token, endpoint.method.clone(), path, body).await
}

/// Endpoints of all services, those that need no token aside.
fn guarded(cloud: &TestApp) -> Vec<Endpoint> {
    let mut endpoints: Vec<_> = cloud
        .public
        .endpoints()
        .filter(|endpoint| endpoint.rule.needs != Needs::Nothing)
        .cloned()
        .collect();
    endpoints.sort_by_key(shown);
    endpoints
}

#[tokio::test]
async fn only_these_endpoints_need_no_token() {
    let cloud = testing::app().await;
    let mut open: Vec<_> = cloud
        .public
        .endpoints()
        .filter(|endpoint| endpoint.rule.needs == Needs::Nothing)
        .map(shown)
        .collect();
    open.sort();
    open.dedup();
    let known = |line: &str| {
        let versions = [
            "/",
            "/versions",
            "/v2",
            "/v2/",
            "/v2.1",
            "/v2.1/",
            "/v3",
            "/v3/",
        ];
        let path = line.split_once(' ').map_or("", |(_, path)| path);
        let (_, below) = path.split_once('/').unwrap_or(("", ""));
        versions.contains(&format!("/{below}").as_str())
            // A login; and who changes a password shows the old one.
            || line == "POST identity/v3/auth/tokens"
            || line == "POST identity/v3/users/{id}/password"
            // A console's URL carries its own secret.
            || line.contains("console")
    };
    let unknown: Vec<_> = open.iter().filter(|line| !known(line)).collect();
    assert!(unknown.is_empty(), "open without a reason: {unknown:#?}");
}

#[tokio::test]
async fn without_a_token_every_endpoint_answers_401() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let endpoints = guarded(&cloud);
    for (service, least) in [
        (Service::Identity, 50),
        (Service::Image, 15),
        (Service::Compute, 60),
        (Service::Fractus, 4),
    ] {
        let count = endpoints
            .iter()
            .filter(|endpoint| endpoint.service == service)
            .count();
        assert!(
            count >= least,
            "{count} endpoints of {service:?}: is the table whole?"
        );
    }
    let mut wrong = Vec::new();
    for endpoint in &endpoints {
        let path = things.fill(endpoint);
        for token in ["", "f1.junk"] {
            let answer = try_as(&cloud, token, endpoint, &path).await;
            if answer.status != 401 || answer.header("www-authenticate").is_empty() {
                wrong.push(format!("{} → {}", shown(endpoint), answer.status));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn a_role_that_is_too_low_is_refused_by_every_endpoint() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let mut wrong = Vec::new();
    for endpoint in guarded(&cloud) {
        let callers = match endpoint.rule.needs {
            Needs::Nothing | Needs::Token | Needs::Reader => continue,
            Needs::Member => vec![("reader", &cloud.reader)],
            Needs::Manager | Needs::Admin | Needs::Service => {
                vec![("reader", &cloud.reader), ("member", &cloud.member)]
            }
        };
        let path = things.fill(&endpoint);
        for (who, token) in callers {
            let answer = try_as(&cloud, token, &endpoint, &path).await;
            // An action of a thing that is not there is 404 before its rule is asked.
            let hidden = endpoint.action.is_some() && answer.status == 404;
            if answer.status != 403 && !hidden {
                wrong.push(format!("{} as {who} → {}", shown(&endpoint), answer.status));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn what_belongs_to_a_project_is_not_there_for_another() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    // What belongs to the cloud and not to a project; of a domain, all in it see its name.
    let of_everybody = ["/v2.1/flavors", "/v3/regions", "/v3/domains"];
    let mut wrong = Vec::new();
    for endpoint in guarded(&cloud) {
        let shared = of_everybody
            .iter()
            .any(|path| endpoint.path.starts_with(path))
            // As in nova: the cloud's defaults, whatever the project.
            || endpoint.path == "/v2.1/os-quota-sets/{id}/defaults";
        if !endpoint.path.contains('{') || shared {
            continue;
        }
        let path = things.fill(&endpoint);
        let answer = try_as(&cloud, &cloud.other, &endpoint, &path).await;
        if answer.status.is_success() {
            wrong.push(format!("{} → {}", shown(&endpoint), answer.status));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn a_reader_changes_nothing() {
    let cloud = testing::app().await;
    let things = Things::make(&cloud).await;
    let mut wrong = Vec::new();
    for endpoint in guarded(&cloud) {
        if matches!(endpoint.method, Method::GET | Method::HEAD) {
            continue;
        }
        let path = things.fill(&endpoint);
        // Its own token a reader may end.
        if endpoint.path == "/v3/auth/tokens" {
            continue;
        }
        let answer = try_as(&cloud, &cloud.reader, &endpoint, &path).await;
        if answer.status.is_success() {
            wrong.push(format!("{} → {}", shown(&endpoint), answer.status));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
