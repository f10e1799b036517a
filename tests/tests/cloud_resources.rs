//! Identity, images, flavors and keypairs of a real controller without hosts: what is right and what
//! is wrong, each answer held to the oracle by the client.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use fractus_tests::harness::{Client, Cloud, Options};
use reqwest::Method;
use serde_json::{Value, json};

async fn cloud() -> (Cloud, Client) {
    let cloud = Cloud::start(Options {
        agents: 0,
        ..Options::default()
    })
    .await
    .unwrap();
    let admin = cloud.admin().await.unwrap();
    (cloud, admin)
}

/// Runs requests and gathers what is wrong with their answers, so that one run tells all.
struct Round<'a> {
    client: &'a Client,
    wrong: Vec<String>,
}

impl Round<'_> {
    async fn ask(&mut self, method: Method, path: &str, body: Option<Value>, status: u16) -> Value {
        let name = format!("{method} {path}");
        match self.client.request(method, path, body).await {
            Ok(answer) if answer.status == status => answer.body,
            Ok(answer) => {
                self.wrong.push(format!(
                    "{name}: {} not {status}: {}",
                    answer.status, answer.body
                ));
                answer.body
            }
            Err(error) => {
                self.wrong.push(format!("{error:#}"));
                Value::Null
            }
        }
    }

    async fn get(&mut self, path: &str, status: u16) -> Value {
        self.ask(Method::GET, path, None, status).await
    }

    async fn upload(&mut self, path: &str, bytes: Vec<u8>, status: u16) {
        match self.client.upload(path, bytes).await {
            Ok(answer) if answer.status == status => {}
            Ok(answer) => self
                .wrong
                .push(format!("PUT {path}: {} not {status}", answer.status)),
            Err(error) => self.wrong.push(format!("{error:#}")),
        }
    }

    async fn post(&mut self, path: &str, body: Value, status: u16) -> Value {
        self.ask(Method::POST, path, Some(body), status).await
    }

    fn end(self) {
        assert!(
            self.wrong.is_empty(),
            "{} wrong:\n{}",
            self.wrong.len(),
            self.wrong.join("\n")
        );
    }
}

fn id(body: &Value, kind: &str) -> String {
    body[kind]["id"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn cloud_identity_lists_as_keystone_does() {
    let (_cloud, admin) = cloud().await;
    let mut round = Round {
        client: &admin,
        wrong: Vec::new(),
    };
    for path in [
        "",
        "/v3/auth/catalog",
        "/v3/auth/projects",
        "/v3/projects",
        "/v3/users",
        "/v3/roles",
        "/v3/services",
        "/v3/endpoints",
        "/v3/role_assignments",
        "/v3/domains/default",
    ] {
        round
            .get(
                &format!("/identity{path}"),
                if path.is_empty() { 300 } else { 200 },
            )
            .await;
    }
    round.get("/identity/v3", 200).await;
    let nobody = admin.as_nobody();
    assert_eq!(nobody.get("/identity/v3/users").await.unwrap().status, 401);
    assert!(nobody.log_in("admin", "wrong", "admin").await.is_err());
    round.end();
}

#[tokio::test]
async fn cloud_identity_makes_and_ends_projects_users_and_roles_as_keystone_does() {
    let (_cloud, admin) = cloud().await;
    let mut round = Round {
        client: &admin,
        wrong: Vec::new(),
    };
    let made = round
        .post(
            "/identity/v3/projects",
            json!({"project": {"name": "blue"}}),
            201,
        )
        .await;
    let project = id(&made, "project");
    round
        .post(
            "/identity/v3/projects",
            json!({"project": {"name": "blue"}}),
            409,
        )
        .await;
    round
        .post("/identity/v3/projects", json!({"project": {}}), 400)
        .await;
    let user = json!({"user": {"name": "ann", "password": "pw", "default_project_id": project}});
    let user = id(&round.post("/identity/v3/users", user, 201).await, "user");
    let role = id(
        &round
            .post(
                "/identity/v3/roles",
                json!({"role": {"name": "painter"}}),
                201,
            )
            .await,
        "role",
    );
    let grant = format!("/identity/v3/projects/{project}/users/{user}/roles/{role}");
    round.ask(Method::PUT, &grant, None, 204).await;
    round.ask(Method::HEAD, &grant, None, 204).await;
    round
        .get(
            &format!("/identity/v3/projects/{project}/users/{user}/roles"),
            200,
        )
        .await;
    round
        .get(
            &format!("/identity/v3/role_assignments?user.id={user}&include_names"),
            200,
        )
        .await;
    for path in [
        format!("users/{user}"),
        format!("projects/{project}"),
        format!("roles/{role}"),
    ] {
        round.get(&format!("/identity/v3/{path}"), 200).await;
    }
    let change = json!({"user": {"description": "x"}});
    round
        .ask(
            Method::PATCH,
            &format!("/identity/v3/users/{user}"),
            Some(change),
            200,
        )
        .await;
    let hers = admin.log_in("ann", "pw", "blue").await.unwrap();
    let seen = hers.get("/identity/v3/users").await.unwrap();
    assert_eq!(seen.status, 403);
    round.ask(Method::DELETE, &grant, None, 204).await;
    for path in [
        format!("users/{user}"),
        format!("projects/{project}"),
        format!("roles/{role}"),
    ] {
        let path = format!("/identity/v3/{path}");
        round.ask(Method::DELETE, &path, None, 204).await;
        round.get(&path, 404).await;
    }
    round.end();
}

#[tokio::test]
async fn cloud_images_answer_as_glance_does() {
    let (_cloud, admin) = cloud().await;
    let mut round = Round {
        client: &admin,
        wrong: Vec::new(),
    };
    round.get("/image/v2/images", 200).await;
    round.get("/image/v2/schemas/image", 200).await;
    let new =
        json!({"name": "a", "disk_format": "raw", "container_format": "bare", "colour": "red"});
    let made = round.post("/image/v2/images", new, 201).await;
    let path = format!(
        "/image/v2/images/{}",
        made["id"].as_str().unwrap_or_default()
    );
    round
        .post(
            "/image/v2/images",
            json!({"name": "a", "disk_format": "nonsense"}),
            400,
        )
        .await;
    round.get(&format!("{path}/file"), 204).await;
    round
        .upload(&format!("{path}/file"), vec![7; 4096], 204)
        .await;
    let shown = round.get(&path, 200).await;
    if shown["status"] != "active" || shown["size"] != 4096 {
        round.wrong.push(format!("not active: {shown}"));
    }
    round
        .upload(&format!("{path}/file"), vec![8; 4096], 409)
        .await;

    round.get("/image/v2/images?name=a&limit=1", 200).await;
    round
        .get("/image/v2/images/00000000-0000-0000-0000-000000000000", 404)
        .await;
    round
        .ask(Method::PUT, &format!("{path}/tags/t"), None, 204)
        .await;
    round
        .ask(Method::DELETE, &format!("{path}/tags/t"), None, 204)
        .await;
    round.ask(Method::DELETE, &path, None, 204).await;
    round.get(&path, 404).await;
    round.end();
}

#[tokio::test]
async fn cloud_flavors_and_keypairs_answer_as_nova_does() {
    let (_cloud, admin) = cloud().await;
    for minor in [1, 2, 10, 36, 53, 55, 60, 61, 75, 88, 96] {
        let at = admin.at(minor);
        let mut round = Round {
            client: &at,
            wrong: Vec::new(),
        };
        let flavor = json!({"name": format!("f{minor}"), "ram": 64, "vcpus": 1, "disk": 1});
        let made = round
            .post("/compute/v2.1/flavors", json!({"flavor": flavor}), 200)
            .await;
        let path = format!("/compute/v2.1/flavors/{}", id(&made, "flavor"));
        round.get("/compute/v2.1/flavors", 200).await;
        round.get("/compute/v2.1/flavors/detail", 200).await;
        round.get("/compute/v2.1/flavors/detail?limit=1", 200).await;
        round.get(&path, 200).await;
        let specs = json!({"extra_specs": {"hw:numa_nodes": "1"}});
        round
            .post(&format!("{path}/os-extra_specs"), specs, 200)
            .await;
        round.get(&format!("{path}/os-extra_specs"), 200).await;
        round
            .get(&format!("{path}/os-extra_specs/hw:numa_nodes"), 200)
            .await;
        round
            .post(
                "/compute/v2.1/flavors",
                json!({"flavor": {"name": ""}}),
                400,
            )
            .await;
        round.ask(Method::DELETE, &path, None, 202).await;
        round.get(&path, 404).await;
        let key =
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHFbqgQGqQ7OZk9m0hgF4TzJrGZ3b8xk5W8e0x5xq1Ez a@b";
        let keypair = json!({"keypair": {"name": "k", "public_key": key}});
        round
            .post(
                "/compute/v2.1/os-keypairs",
                keypair,
                if minor < 2 { 200 } else { 201 },
            )
            .await;
        round.get("/compute/v2.1/os-keypairs", 200).await;
        round.get("/compute/v2.1/os-keypairs/k", 200).await;
        let status = if minor < 2 { 202 } else { 204 };
        round
            .ask(Method::DELETE, "/compute/v2.1/os-keypairs/k", None, status)
            .await;
        round.get("/compute/v2.1/os-keypairs/k", 404).await;
        round.get("/compute/v2.1/servers", 200).await;
        round.get("/compute/v2.1/servers/detail", 200).await;
        round.get("/compute/v2.1/servers/nosuch", 404).await;
        round.end();
    }
}
