//! The client against a small cloud of its own: real HTTP on a free port, canned answers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use clap::{CommandFactory, Parser};
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::{Value, json};

use super::arguments::{Arguments, CloudArguments};
use super::config::{self, Config, Environment};
use super::output::Output;
use super::session::{Service, Session};
use super::{CliError, commands};

mod hosts;

/// What was asked of the cloud: method, path with query, microversion, body.
type Asked = Vec<(String, String, String, Value)>;

/// To one request: status and body.
type Answers = VecDeque<(u16, Value)>;

#[derive(Clone, Default)]
struct Cloud {
    url: String,
    asked: Arc<Mutex<Asked>>,
    /// `METHOD path` to status and body; several are given one after the other, the last again and again.
    answers: Arc<Mutex<BTreeMap<String, Answers>>>,
}

impl Cloud {
    async fn start(answers: &[(&str, u16, Value)]) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut by_request: BTreeMap<String, Answers> = BTreeMap::new();
        for (request, status, body) in answers {
            let queue = by_request.entry((*request).to_owned()).or_default();
            queue.push_back((*status, body.clone()));
        }
        let cloud = Self {
            url,
            answers: Arc::new(Mutex::new(by_request)),
            ..Self::default()
        };
        let router = Router::new().fallback(answer).with_state(cloud.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        cloud
    }

    fn config(&self) -> Config {
        let variables = [
            ("OS_AUTH_URL", format!("{}/identity", self.url)),
            ("OS_USERNAME", "admin".to_owned()),
            ("OS_PASSWORD", "secret".to_owned()),
            ("OS_PROJECT_NAME", "admin".to_owned()),
        ];
        let variables = variables
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        let environment = Environment {
            variables,
            folders: Vec::new(),
        };
        config::load(&CloudArguments::default(), &environment).unwrap()
    }

    /// Runs a command line, without `fractus` itself.
    async fn run(&self, line: &[&str]) -> Result<(), CliError> {
        let arguments =
            Arguments::try_parse_from(["fractus"].iter().chain(line)).expect("a good command line");
        let output = Output::new(&arguments.output);
        let session = Session::new(self.config())?;
        commands::execute(arguments.command, &session, &output).await
    }

    fn asked(&self) -> Asked {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(
    State(cloud): State<Cloud>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path_and_query().unwrap().to_string();
    let version = headers
        .get("openstack-api-version")
        .map(|value| value.to_str().unwrap());
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let version = version.unwrap_or_default().to_owned();
    cloud
        .asked
        .lock()
        .unwrap()
        .push((method.to_string(), path.clone(), version, body));
    let url = &cloud.url;
    let endpoint = |path: &str| json!([{"interface": "public", "region": "RegionOne", "url": format!("{url}{path}")}]);
    if path == "/identity/v3/auth/tokens" {
        let catalog = json!([
            {"type": "compute", "name": "nova", "endpoints": endpoint("/compute/v2.1")},
            {"type": "image", "name": "glance", "endpoints": endpoint("/image")}]);
        let token =
            json!({"token": {"expires_at": "2030-01-01T00:00:00.000000Z", "catalog": catalog}});
        return (
            StatusCode::CREATED,
            [("x-subject-token", "TOKEN")],
            axum::Json(token),
        )
            .into_response();
    }
    if path == "/compute/v2.1/" {
        let version = json!({"version": {"min_version": "2.1", "version": "2.79"}});
        return axum::Json(version).into_response();
    }
    if headers
        .get("x-auth-token")
        .is_none_or(|token| token != "TOKEN")
    {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let known = {
        let mut answers = cloud.answers.lock().unwrap();
        let queue = answers.get_mut(&format!("{method} {path}"));
        queue.and_then(|queue| match queue.len() {
            1 => queue.front().cloned(),
            _ => queue.pop_front(),
        })
    };
    let (status, body) = known.unwrap_or((
        404,
        json!({"itemNotFound": {"code": 404, "message": format!("no {path}")}}),
    ));
    let status = StatusCode::from_u16(status).unwrap();
    if body.is_null() {
        status.into_response()
    } else {
        (
            status,
            [("x-openstack-request-id", "req-1")],
            axum::Json(body),
        )
            .into_response()
    }
}

#[test]
fn the_command_line_is_consistent() {
    Arguments::command().debug_assert();
}

#[tokio::test]
async fn issuing_a_token_is_one_request_with_the_whole_login() {
    let cloud = Cloud::start(&[]).await;
    cloud.run(&["token", "issue"]).await.unwrap();
    let asked = cloud.asked();
    assert_eq!(asked.len(), 1);
    let auth = &asked[0].3["auth"];
    assert_eq!(auth["identity"]["methods"], json!(["password"]));
    assert_eq!(
        auth["identity"]["password"]["user"]["domain"],
        json!({"id": "default"})
    );
    assert_eq!(auth["scope"]["project"]["name"], "admin");
}

#[tokio::test]
async fn a_server_is_made_by_names_at_the_negotiated_microversion() {
    let named = |key: &str, id: &str| json!({key: [{"id": id, "name": "small"}]});
    let active = json!({"server": {"id": "S", "status": "ACTIVE", "OS-EXT-STS:task_state": null}});
    let cloud = Cloud::start(&[
        (
            "GET /compute/v2.1/flavors?is_public=None",
            200,
            named("flavors", "F"),
        ),
        ("GET /image/v2/images?name=small", 200, named("images", "I")),
        (
            "POST /compute/v2.1/servers",
            202,
            json!({"server": {"id": "S"}}),
        ),
        ("GET /compute/v2.1/servers/S", 200, active),
    ])
    .await;
    cloud
        .run(&[
            "server", "create", "web", "--flavor", "small", "--image", "small", "--wait",
        ])
        .await
        .unwrap();
    let asked = cloud.asked();
    let (_, _, version, body) = asked
        .iter()
        .find(|(method, path, ..)| method == "POST" && path.ends_with("/servers"))
        .unwrap();
    assert_eq!(version, "compute 2.79");
    let wanted = json!({"name": "web", "flavorRef": "F", "imageRef": "I", "networks": "none"});
    assert_eq!(body["server"], wanted);
}

#[tokio::test]
async fn waiting_for_a_server_that_fails_says_why() {
    let failed = json!({"server": {"id": "S", "status": "ERROR", "OS-EXT-STS:task_state": null,
        "fault": {"message": "No valid host was found."}}});
    let cloud = Cloud::start(&[
        (
            "GET /compute/v2.1/servers/detail?name=web",
            200,
            json!({"servers": [{"id": "S", "name": "web"}]}),
        ),
        ("POST /compute/v2.1/servers/S/action", 202, Value::Null),
        ("GET /compute/v2.1/servers/S", 200, failed),
    ])
    .await;
    let error = cloud
        .run(&["server", "start", "web", "--wait"])
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("No valid host was found."),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_not_there_and_what_is_there_twice_are_told_apart() {
    let twice = json!({"servers": [{"id": "A", "name": "web"}, {"id": "B", "name": "web"}]});
    let cloud = Cloud::start(&[
        ("GET /compute/v2.1/servers/detail?name=web", 200, twice),
        (
            "GET /compute/v2.1/servers/detail?name=no",
            200,
            json!({"servers": []}),
        ),
    ])
    .await;
    let error = cloud.run(&["server", "show", "web"]).await.unwrap_err();
    assert!(
        matches!(&error, CliError::Ambiguous { ids, .. } if ids == &["A", "B"]),
        "{error}"
    );
    let error = cloud.run(&["server", "show", "no"]).await.unwrap_err();
    assert!(
        matches!(error, CliError::NotFound { kind: "server", .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_refusal_carries_message_request_id_and_code() {
    let conflict = json!({"conflictingRequest": {"code": 409, "message": "it is locked"}});
    let cloud = Cloud::start(&[
        (
            "GET /compute/v2.1/servers/detail?name=web",
            200,
            json!({"servers": [{"id": "S", "name": "web"}]}),
        ),
        ("POST /compute/v2.1/servers/S/action", 409, conflict),
    ])
    .await;
    let error = cloud.run(&["server", "stop", "web"]).await.unwrap_err();
    assert_eq!(error.to_string(), "it is locked");
    assert_eq!(
        format!("{:?}", error.exit_code()),
        format!("{:?}", std::process::ExitCode::from(5))
    );
    let help = miette::Diagnostic::help(&error).unwrap().to_string();
    assert!(help.contains("req-1"), "{help}");
}

#[tokio::test]
async fn lists_follow_their_pages() {
    let next = json!({"flavors": [{"id": "1"}], "flavors_links": [
        {"rel": "next", "href": "http://elsewhere/flavors/detail?marker=1"}]});
    let cloud = Cloud::start(&[
        ("GET /compute/v2.1/flavors/detail", 200, next),
        (
            "GET /compute/v2.1/flavors/detail?marker=1",
            200,
            json!({"flavors": [{"id": "2"}]}),
        ),
    ])
    .await;
    let session = Session::new(cloud.config()).unwrap();
    let all = session
        .list(Service::Compute, "/flavors/detail", "flavors")
        .await
        .unwrap();
    assert_eq!(all.len(), 2);
}

#[tokio::test]
async fn a_cloud_that_is_not_there_is_said_to_be_unreachable() {
    let cloud = Cloud::start(&[]).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}/identity/v3", listener.local_addr().unwrap());
    drop(listener);
    let session = Session::new(Config {
        auth_url: nobody,
        ..cloud.config()
    })
    .unwrap();
    let error = session.token().await.unwrap_err();
    assert!(matches!(error, CliError::Unreachable { .. }), "{error}");
}

fn environment(folder: &std::path::Path, variables: &[(&str, &str)]) -> Environment {
    let variables = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    Environment {
        variables,
        folders: vec![folder.to_owned()],
    }
}

#[test]
fn clouds_yaml_secure_yaml_variables_and_flags_are_laid_over_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let clouds = "clouds:\n  home:\n    region_name: R1\n    verify: false\n    auth:\n      auth_url: http://a/identity\n      username: u\n      project_name: p\n      user_domain_name: D\n";
    std::fs::write(folder.path().join("clouds.yaml"), clouds).unwrap();
    let secure = "clouds:\n  home:\n    auth:\n      password: hidden\n";
    std::fs::write(folder.path().join("secure.yaml"), secure).unwrap();
    let environment = environment(
        folder.path(),
        &[("OS_CLOUD", "home"), ("OS_PROJECT_NAME", "q")],
    );
    let flags = CloudArguments {
        os_username: Some("v".into()),
        ..CloudArguments::default()
    };
    let config = config::load(&flags, &environment).unwrap();
    assert_eq!(config.auth_url, "http://a/identity/v3");
    assert_eq!(
        (config.region.as_deref(), config.verify),
        (Some("R1"), false)
    );
    let user = &config.login.0["identity"]["password"]["user"];
    assert_eq!(
        *user,
        json!({"name": "v", "domain": {"name": "D"}, "password": "hidden"})
    );
    assert_eq!(config.login.0["scope"]["project"]["name"], "q");
}

#[test]
fn tokens_and_application_credentials_log_in_too() {
    let nowhere = std::path::Path::new("/nonexistent");
    let login = |variables: &[(&str, &str)]| {
        let mut all = vec![("OS_AUTH_URL", "http://a/identity/v3/")];
        all.extend(variables);
        config::load(&CloudArguments::default(), &environment(nowhere, &all))
            .unwrap()
            .login
            .0
    };
    let token = login(&[("OS_TOKEN", "T"), ("OS_PROJECT_ID", "P")]);
    assert_eq!(token["identity"]["token"]["id"], "T");
    assert_eq!(token["scope"]["project"]["id"], "P");
    let credential = login(&[
        ("OS_APPLICATION_CREDENTIAL_ID", "C"),
        ("OS_APPLICATION_CREDENTIAL_SECRET", "S"),
        ("OS_PROJECT_ID", "P"),
    ]);
    let wanted = json!({"id": "C", "secret": "S"});
    assert_eq!(credential["identity"]["application_credential"], wanted);
    assert!(
        credential.get("scope").is_none(),
        "a credential brings its own project"
    );
}

#[test]
fn without_a_cloud_the_error_says_what_to_set() {
    let nowhere = environment(std::path::Path::new("/nonexistent"), &[]);
    let error = config::load(&CloudArguments::default(), &nowhere).unwrap_err();
    assert!(matches!(error, CliError::NoCloud));
    let named = environment(std::path::Path::new("/nonexistent"), &[("OS_CLOUD", "x")]);
    let error = config::load(&CloudArguments::default(), &named).unwrap_err();
    assert!(matches!(error, CliError::UnknownCloud { .. }), "{error}");
}

const SERVER: &str = "11111111-1111-4111-8111-111111111111";
const MIGRATION: &str = "22222222-2222-4222-8222-222222222222";

/// A cloud in which a migration of the server has come to this.
async fn cloud_with_a_migration(status: &str) -> Cloud {
    let server = json!({"id": SERVER, "name": "web", "status": "ACTIVE"});
    let migration = json!({
        "id": 7, "uuid": MIGRATION, "instance_uuid": SERVER, "status": status,
        "source_compute": "h1", "dest_compute": "h2",
    });
    let migrations = json!({"migrations": [migration]});
    let whole = json!({"migration": {
        "id": MIGRATION, "number": 7, "server_id": SERVER, "kind": "live-migration", "status": status,
        "reason": "no room", "progress": {"rounds": [{"memory_bytes": 1, "took_us": 1, "left": 0, "decision": "stop"}]},
    }});
    let hosts = json!({"hosts": [{"id": "H", "hostname": "h1"}]});
    let newest = format!("GET /compute/v2.1/os-migrations?instance_uuid={SERVER}&limit=1");
    let one = format!("/compute/v2.1/servers/{SERVER}");
    Cloud::start(&[
        (&format!("GET {one}"), 200, json!({"server": server})),
        (&format!("POST {one}/action"), 202, Value::Null),
        (&newest, 200, migrations.clone()),
        ("GET /compute/v2.1/os-migrations", 200, migrations),
        (
            "GET /compute/v2.1/os-migrations?host=h1",
            200,
            json!({"migrations": []}),
        ),
        (
            "GET /compute/v2.1/os-migrations?host=h1&status=finished",
            200,
            json!({"migrations": []}),
        ),
        (&format!("DELETE {one}/migrations/7"), 202, Value::Null),
        (&format!("POST {one}/migrations/7/action"), 202, Value::Null),
        (
            &format!("GET /fractus/v1/migrations/{MIGRATION}"),
            200,
            whole.clone(),
        ),
        ("GET /fractus/v1/migrations/7", 200, whole),
        ("GET /fractus/v1/hosts", 200, hosts),
        (
            "PUT /compute/v2.1/os-services/H",
            200,
            json!({"service": {}}),
        ),
        (
            "GET /compute/v2.1/servers/detail?all_tenants=1&host=h1",
            200,
            json!({"servers": [server]}),
        ),
    ])
    .await
}

#[tokio::test]
async fn hosts_are_shown_and_compared() {
    let cpu = crate::agents::simulated::cpu(&["avx"]);
    let report = json!({
        "architecture": "x86_64", "vendor": "GenuineIntel", "model": "M", "sockets": 1, "cores": 1, "threads": 1,
        "features": [], "guest": cpu,
    });
    let host =
        json!({"id": "H", "hostname": "h1", "state": "up", "disabled": false, "cpu": report});
    let old = json!({"id": "O", "hostname": "old", "state": "up", "disabled": false, "cpu": null});
    let cloud = Cloud::start(&[
        ("GET /fractus/v1/hosts", 200, json!({"hosts": [host, old]})),
        ("GET /fractus/v1/hosts/H", 200, json!({"host": host})),
    ])
    .await;
    cloud.run(&["host", "show", "h1"]).await.unwrap();
    cloud.run(&["host", "baseline"]).await.unwrap();
    cloud.run(&["host", "baseline", "h1", "O"]).await.unwrap();
    let error = cloud.run(&["host", "baseline", "h1", "h9"]).await;
    assert!(
        matches!(error, Err(CliError::NotFound { kind: "host", .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_is_migrated_and_its_end_waited_for() {
    let cloud = cloud_with_a_migration("completed").await;
    let line = ["server", "migrate", SERVER, "--host", "h2", "--wait"];
    cloud.run(&line).await.unwrap();
    let asked = cloud.asked();
    let body = json!({"os-migrateLive": {"host": "h2", "block_migration": "auto"}});
    assert!(
        asked.iter().any(|(_, _, _, sent)| *sent == body),
        "{asked:?}"
    );
    cloud.run(&["host", "drain", "h1"]).await.unwrap();
    let disabled = json!({"status": "disabled", "disabled_reason": "it is drained"});
    let asked = cloud.asked();
    assert!(
        asked.iter().any(|(_, _, _, sent)| *sent == disabled),
        "{asked:?}"
    );

    let cloud = cloud_with_a_migration("failed").await;
    let error = cloud.run(&["server", "migrate", SERVER, "--wait"]).await;
    assert!(error.unwrap_err().to_string().contains("no room"));
    let error = cloud.run(&["host", "drain", "h1"]).await.unwrap_err();
    assert!(error.to_string().contains("1 of its 1 servers"), "{error}");
}

#[tokio::test]
async fn a_migration_is_listed_shown_and_ended_by_its_id_or_number() {
    let cloud = cloud_with_a_migration("running").await;
    for line in [
        vec!["server", "migration", "list"],
        vec!["server", "migration", "show", MIGRATION],
        vec!["server", "migration", "abort", "7"],
        vec!["server", "migration", "force-complete", MIGRATION],
    ] {
        cloud.run(&line).await.unwrap();
    }
    let asked = cloud.asked();
    let path = format!("/compute/v2.1/servers/{SERVER}/migrations/7");
    for (method, path, body) in [
        ("DELETE", path.clone(), Value::Null),
        (
            "POST",
            format!("{path}/action"),
            json!({"force_complete": null}),
        ),
    ] {
        let is_it = |(m, p, _, b): &(String, String, String, Value)| {
            m == method && *p == path && *b == body
        };
        assert!(asked.iter().any(is_it), "{method} {path}: {asked:?}");
    }
    let missing = cloud.run(&["server", "migration", "show", "8"]).await;
    assert!(matches!(missing, Err(CliError::NotFound { .. })));
    // One is asked for, and not all: they may be many.
    let lists = asked
        .iter()
        .filter(|(_, path, ..)| path.contains("os-migrations"));
    assert_eq!(lists.count(), 1, "{asked:?}");
}

#[tokio::test]
async fn an_image_of_a_server_is_made_and_waited_for() {
    const SHOT: &str = "5407c0de-0000-4000-8000-000000000001";
    let server = json!({"id": SERVER, "name": "web", "status": "ACTIVE"});
    let image = |status: &str| json!({"id": SHOT, "name": "web", "status": status});
    for (status, works) in [("active", true), ("queued", false)] {
        let one = format!("/compute/v2.1/servers/{SERVER}");
        let cloud = Cloud::start(&[
            (&format!("GET {one}"), 200, json!({"server": server})),
            (
                &format!("POST {one}/action"),
                202,
                json!({"image_id": SHOT}),
            ),
            (&format!("GET /image/v2/images/{SHOT}"), 200, image(status)),
        ])
        .await;
        let line = [
            "server",
            "image",
            "create",
            SERVER,
            "--property",
            "a=b",
            "--wait",
            "--timeout",
            "1",
        ];
        let done = cloud.run(&line).await;
        assert_eq!(done.is_ok(), works, "{done:?}");
        let body = json!({"createImage": {"name": "web", "metadata": {"a": "b"}}});
        let asked = cloud.asked();
        assert!(
            asked.iter().any(|(_, _, _, sent)| *sent == body),
            "{asked:?}"
        );
    }
}

#[tokio::test]
async fn a_server_is_shelved_unshelved_confirmed_and_reverted_as_it_is_to_be() {
    let one = format!("/compute/v2.1/servers/{SERVER}");
    let shown = |status: &str| json!({"server": {"id": SERVER, "name": "web", "status": status}});
    for (line, sent, status) in [
        (vec!["shelve"], json!({"shelve": null}), "SHELVED_OFFLOADED"),
        (vec!["unshelve"], json!({"unshelve": null}), "ACTIVE"),
        (vec!["confirm"], json!({"confirmResize": null}), "SHUTOFF"),
        (vec!["revert"], json!({"revertResize": null}), "ACTIVE"),
        (
            vec!["unshelve", "--host", "h2", "--availability-zone", "nova"],
            json!({"unshelve": {"host": "h2", "availability_zone": "nova"}}),
            "ACTIVE",
        ),
    ] {
        let cloud = Cloud::start(&[
            (&format!("GET {one}"), 200, shown(status)),
            (&format!("POST {one}/action"), 202, Value::Null),
        ])
        .await;
        let line: Vec<&str> = ["server"].into_iter().chain(line).collect();
        let line = [line.as_slice(), &[SERVER, "--wait", "--timeout", "1"]].concat();
        let done = cloud.run(&line).await;
        assert!(done.is_ok(), "{done:?}");
        let asked = cloud.asked();
        assert!(
            asked.iter().any(|(_, _, _, body)| *body == sent),
            "{asked:?}"
        );
    }
}
