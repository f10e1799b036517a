//! Things of the project `one`, and a request to each endpoint that is about them and well-formed,
//! so that nothing but the caller can be what is wrong with it.

use std::collections::BTreeMap;

use fractus_agent_api::host::HostId;
use http::Method;
use sea_orm::DbErr;
use serde_json::{Value, json};

use crate::agents::host;
use crate::agents::simulated::SimulatedHost;
use crate::http::Endpoint;
use crate::reconcile::migration;
use crate::testing::{Answer, TestApp};

/// What the parameters of paths stand for, by service and by the segment before them.
pub struct Things(BTreeMap<(&'static str, &'static str), String>);

fn first(list: &Value, kind: &str, key: &str) -> String {
    list[kind][0][key].as_str().unwrap().to_owned()
}

/// An image of `one` that has bytes.
async fn image(cloud: &TestApp, body: Value) -> String {
    let made = cloud.post(&cloud.member, "/image/v2/images", body).await;
    let id = made.expect_status(201).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let headers = [
        ("x-auth-token", cloud.member.as_str()),
        ("content-type", "application/octet-stream"),
    ];
    let path = format!("/image/v2/images/{id}/file");
    let bytes = vec![0; 4096];
    let loaded = cloud.send(Method::PUT, &path, &headers, bytes).await;
    loaded.expect_status(204);
    id
}

/// A server of `one` that nothing carries on, with metadata and a tag; and the flavor it has.
async fn server(cloud: &TestApp, image: &str) -> (String, String) {
    let flavor = json!({"flavor": {"name": "f", "ram": 64, "vcpus": 1, "disk": 1}});
    let path = "/compute/v2.1/flavors";
    let flavor = cloud.post(&cloud.admin, path, flavor).await;
    let flavor = flavor.expect_status(200).json()["flavor"]["id"].clone();
    let flavor = flavor.as_str().unwrap().to_owned();
    let specs = json!({"extra_specs": {"key": "value"}});
    let path = format!("/compute/v2.1/flavors/{flavor}/os-extra_specs");
    let specs = cloud.post(&cloud.admin, &path, specs).await;
    specs.expect_status(200);
    let body = json!({"server": {
        "name": "of-one", "imageRef": image, "flavorRef": flavor, "networks": "none",
        "metadata": {"key": "value"}, "tags": ["blue"],
    }});
    let headers = headers(&cloud.member, "application/json", "compute 2.96");
    let path = "/compute/v2.1/servers";
    let made = cloud
        .send(Method::POST, path, &headers, body.to_string())
        .await;
    let made = made.expect_status(202).json();
    (made["server"]["id"].as_str().unwrap().to_owned(), flavor)
}

async fn a_host(cloud: &TestApp) -> String {
    let id = HostId(cloud.app.random().uuid());
    let (report, now_us) = (SimulatedHost::inventory("h", 4, 4096), cloud.app.now_us());
    let write = cloud.app.database().write(move |tx| {
        let report = report.clone();
        Box::pin(async move {
            host::insert(tx, id, "https://127.0.0.1:1", &report, now_us).await?;
            Ok::<(), DbErr>(())
        })
    });
    write.await.unwrap();
    id.to_string()
}

/// A migration of the server, which is not under way any more; its number and its id.
async fn a_migration(cloud: &TestApp, server: &str, host: &str) -> (String, String) {
    let (uuid, now_us) = (cloud.app.random().uuid().to_string(), cloud.app.now_us());
    let row = migration::Model {
        id: 0,
        uuid: uuid.clone(),
        server_id: server.to_owned(),
        source_id: host.to_owned(),
        source: "h".to_owned(),
        target_id: None,
        target: None,
        status: "error".to_owned(),
        flavor_id: "f".to_owned(),
        user_id: Some(cloud.project_id.clone()),
        project_id: Some(cloud.project_id.clone()),
        progress: None,
        reason: Some("no host".to_owned()),
        created_at_us: now_us,
        updated_at_us: now_us,
        ended_at_us: Some(now_us),
        kind: migration::Purpose::Live.word().to_owned(),
        new_flavor_id: None,
        before: None,
    };
    let write = cloud.app.database().write(move |tx| {
        let row = row.clone();
        Box::pin(async move { migration::insert(tx, row).await })
    });
    write.await.unwrap();
    ("1".to_owned(), uuid)
}

fn headers<'a>(token: &'a str, kind: &'a str, version: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut headers = vec![("content-type", kind), ("accept", "application/json")];
    if !token.is_empty() {
        headers.push(("x-auth-token", token));
    }
    if !version.is_empty() {
        headers.push(("openstack-api-version", version));
    }
    headers
}

impl Things {
    pub async fn make(cloud: &TestApp) -> Self {
        let mut things = BTreeMap::new();
        of_identity(cloud, &mut things).await;
        of_image(cloud, &mut things).await;
        of_compute(cloud, &mut things).await;
        Self(things)
    }

    /// What no text for another project may have in it.
    pub fn telltales(&self) -> Vec<String> {
        let kinds = [
            ("compute", "servers"),
            ("compute", "os-keypairs"),
            ("image", "images"),
            ("identity", "projects"),
            ("identity", "users"),
        ];
        kinds.iter().map(|kind| self.0[kind].clone()).collect()
    }

    /// What stands for the parameter behind a segment: `("compute", "servers")` is a server's id.
    pub fn named(&self, service: &'static str, segment: &'static str) -> &str {
        &self.0[&(service, segment)]
    }

    /// The path with its parameters filled in. A parameter that nothing stands for fails the test:
    /// an endpoint tried with a thing that does not exist proves little.
    pub fn path(&self, endpoint: &Endpoint) -> String {
        let service = endpoint.service.prefix();
        let mut filled = format!("/{service}");
        let mut before = "";
        for segment in endpoint.path.split('/').skip(1) {
            filled.push('/');
            if segment.starts_with('{') {
                let Some(thing) = self.0.get(&(service, before)) else {
                    panic!("{service}{}: nothing stands for {segment}", endpoint.path);
                };
                filled.push_str(thing);
            } else {
                filled.push_str(segment);
            }
            before = segment;
        }
        filled
    }

    /// Each parameter (`{id}`) of the path, and the path with `id` in its place.
    pub fn paths_with(&self, endpoint: &Endpoint, id: &str) -> Vec<(&'static str, String)> {
        let template: Vec<_> = endpoint.path.split('/').collect();
        let right = self.path(endpoint);
        let parameters = (1..template.len()).filter(|at| template[*at].starts_with('{'));
        let paths = parameters.map(|at| {
            // The service's prefix comes first.
            let mut segments: Vec<_> = right.split('/').collect();
            segments[at + 1] = id;
            (template[at], segments.join("/"))
        });
        paths.collect()
    }

    /// Headers of a request by the owner of a token.
    pub fn headers<'a>(&self, token: &'a str, endpoint: &Endpoint) -> Vec<(&'a str, &'a str)> {
        let kind = match (endpoint.service.prefix(), &endpoint.method) {
            ("image", &Method::PATCH) => "application/openstack-images-v2.1-json-patch",
            ("image", &Method::PUT) if !endpoint.path.contains("members") => {
                "application/octet-stream"
            }
            _ => "application/json",
        };
        headers(token, kind, version(endpoint))
    }

    pub async fn try_as(&self, cloud: &TestApp, token: &str, endpoint: &Endpoint) -> Answer {
        let path = self.path(endpoint);
        let body = self.body(endpoint);
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let headers = self.headers(token, endpoint);
        cloud
            .send(endpoint.method.clone(), &path, &headers, body)
            .await
    }

    /// A body that is right; `{}` where none but an administrator gets as far as having it read.
    pub fn body(&self, endpoint: &Endpoint) -> Value {
        let image = &self.0[&("image", "images")];
        if let Some(action) = endpoint.action {
            let given = match action {
                "reboot" => json!({"type": "HARD"}),
                "rebuild" => json!({"imageRef": image}),
                "createImage" => json!({"name": "of-one"}),
                "resize" => json!({"flavorRef": "larger"}),
                "os-getConsoleOutput" => json!({}),
                "os-getSerialConsole" => json!({"type": "serial"}),
                "os-getVNCConsole" => json!({"type": "novnc"}),
                "os-getSPICEConsole" => json!({"type": "spice-html5"}),
                _ => Value::Null,
            };
            return json!({ action: given });
        }
        let service = endpoint.service.prefix();
        match (&endpoint.method, service, endpoint.path) {
            (&Method::GET | &Method::HEAD | &Method::DELETE, ..) => Value::Null,
            (_, "compute", "/v2.1/servers/{id}") => json!({"server": {"name": "new"}}),
            (_, "compute", "/v2.1/servers/{id}/metadata") => json!({"metadata": {"key": "new"}}),
            (_, "compute", "/v2.1/servers/{id}/metadata/{key}") => json!({"meta": {"key": "new"}}),
            (_, "compute", "/v2.1/servers/{id}/tags") => json!({"tags": ["blue"]}),
            (_, "compute", "/v2.1/servers/{id}/tags/{tag}") => Value::Null,
            (_, "compute", "/v2.1/servers/{id}/migrations/{number}/action") => {
                json!({"force_complete": null})
            }
            (_, "compute", "/v2.1/servers/{id}/remote-consoles") => {
                json!({"remote_console": {"protocol": "serial", "type": "serial"}})
            }
            (&Method::PATCH, "image", _) => {
                json!([{"op": "replace", "path": "/name", "value": "new"}])
            }
            (_, "image", "/v2/images/{id}/members") => {
                json!({"member": self.0[&("identity", "projects")]})
            }
            (_, "image", "/v2/images/{id}/members/{member}") => json!({"status": "accepted"}),
            (_, "image", "/v2/images/{id}/import") => {
                json!({"method": {"name": "glance-direct"}})
            }
            _ => json!({}),
        }
    }
}

/// A version at which the endpoint exists.
fn version(endpoint: &Endpoint) -> &'static str {
    let newer = ["/tags", "/remote-consoles", "migrations"];
    // What changes them by id is younger than what shows them.
    let put = ["/v2.1/flavors/{id}", "/v2.1/os-services/{id}"];
    if endpoint.service.prefix() != "compute" {
        ""
    } else if newer.iter().any(|part| endpoint.path.contains(part))
        || endpoint.method == Method::PUT && put.contains(&endpoint.path)
    {
        "compute 2.96"
    } else {
        "compute 2.1"
    }
}

type Named = BTreeMap<(&'static str, &'static str), String>;

async fn of_identity(cloud: &TestApp, things: &mut Named) {
    let lists = [
        ("services", "services"),
        ("endpoints", "endpoints"),
        ("roles", "roles?name=reader"),
        ("users", "users?name=member"),
    ];
    for (kind, path) in lists {
        let path = format!("/identity/v3/{path}");
        let list = cloud.get(&cloud.admin, &path).await.json();
        things.insert(("identity", kind), first(&list, kind, "id"));
    }
    let role = things[&("identity", "roles")].clone();
    things.insert(("identity", "implies"), role);
    let project = cloud.project_id.clone();
    let path = format!("/identity/v3/projects/{project}/tags/blue");
    let tagged = cloud
        .ask(&cloud.admin, Method::PUT, &path, Value::Null)
        .await;
    tagged.expect_status(201);
    things.insert(("identity", "tags"), "blue".to_owned());
    things.insert(("identity", "projects"), project);
    things.insert(("identity", "domains"), "default".to_owned());
    things.insert(("identity", "regions"), "RegionOne".to_owned());
}

async fn of_image(cloud: &TestApp, things: &mut Named) {
    let kernel = json!({"name": "kernel", "disk_format": "aki", "container_format": "aki"});
    let kernel = image(cloud, kernel).await;
    let disk = json!({
        "name": "of-one", "disk_format": "raw", "container_format": "bare",
        "visibility": "shared", "kernel_id": kernel, "tags": ["blue"],
    });
    let disk = image(cloud, disk).await;
    // Shared, but not with `two`.
    let member = json!({"member": cloud.admin_project_id});
    let path = format!("/image/v2/images/{disk}/members");
    let shared = cloud.post(&cloud.member, &path, member).await;
    shared.expect_status(200);
    things.insert(("image", "images"), disk);
    things.insert(("image", "members"), cloud.admin_project_id.clone());
    things.insert(("image", "tags"), "blue".to_owned());
    things.insert(("image", "schemas"), "image".to_owned());
}

async fn of_compute(cloud: &TestApp, things: &mut Named) {
    let (server, flavor) = server(cloud, &things[&("image", "images")]).await;
    let path = format!("/compute/v2.1/servers/{server}/os-instance-actions");
    let actions = cloud.get(&cloud.member, &path).await.expect_status(200);
    let request = first(&actions.json(), "instanceActions", "request_id");
    let keypair = json!({"keypair": {"name": "of-one"}});
    let path = "/compute/v2.1/os-keypairs";
    let keypair = cloud.post(&cloud.member, path, keypair).await;
    keypair.expect_status(200);
    let host = a_host(cloud).await;
    let (number, migration) = a_migration(cloud, &server, &host).await;
    things.insert(("fractus", "migrations"), migration);
    things.insert(("compute", "migrations"), number);
    things.insert(("fractus", "hosts"), host.clone());
    things.insert(("fractus", "machines"), server.clone());
    let named = [
        ("servers", server),
        ("flavors", flavor),
        ("os-instance-actions", request),
        ("os-keypairs", "of-one".to_owned()),
        ("os-hypervisors", host.clone()),
        ("os-services", host),
        ("os-quota-sets", cloud.project_id.clone()),
        ("os-simple-tenant-usage", cloud.project_id.clone()),
        ("os-quota-class-sets", "default".to_owned()),
        ("os-extra_specs", "key".to_owned()),
        ("metadata", "key".to_owned()),
        ("tags", "blue".to_owned()),
        ("ips", "network".to_owned()),
        ("extensions", "os-keypairs".to_owned()),
    ];
    things.extend(named.map(|(kind, id)| (("compute", kind), id)));
}
