//! The frame's forms, checked against the recorded ones.

use axum::response::IntoResponse;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::*;
use crate::testing::{self, Answer};

fn routes() -> Vec<Routes> {
    let routes = |service| {
        Routes::new(service)
            .get(
                "/v2.1/made-up",
                Rule::reader("os_compute_api:flavors"),
                link,
            )
            .post(
                "/v2.1/made-up",
                Rule::admin("os_compute_api:os-flavor-manage:create"),
                echo,
            )
            .get("/v2.1/made-up/panic", Rule::reader("x"), boom)
    };
    vec![
        routes(Service::Compute),
        routes(Service::Image),
        crate::identity::routes(),
    ]
}

async fn link(ctx: RequestContext) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(
        json!({"link": ctx.link("/v2.1/made-up"), "new": ctx.at_least(2, 61)}),
    ))
}

async fn echo(body: JsonBody) -> Result<impl IntoResponse, ApiError> {
    Ok((StatusCode::CREATED, axum::Json(body.0)))
}

async fn boom() -> Result<(), ApiError> {
    panic!("meant by the test")
}

/// The names `admin` and `reader` in X-Auth-Token stand for tokens of such callers.
async fn ask(method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let cloud = testing::with_services(routes()).await;
    let headers: Vec<_> = headers
        .iter()
        .map(|(name, value)| match *value {
            "admin" => (*name, cloud.admin.as_str()),
            "reader" => (*name, cloud.reader.as_str()),
            other => (*name, other),
        })
        .collect();
    cloud.send(method, path, &headers, body.to_owned()).await
}

async fn get(path: &str, headers: &[(&str, &str)]) -> Answer {
    ask(Method::GET, path, headers, "").await
}

#[tokio::test]
async fn without_a_token_each_service_says_401_in_its_own_form() {
    let nova = get("/compute/v2.1/made-up", &[]).await;
    assert_eq!(nova.status.as_u16(), 401);
    assert_eq!(
        nova.text(),
        r#"{"error":{"code":401,"title":"Unauthorized","message":"The request you have made requires authentication."}}"#
    );
    assert_eq!(
        nova.header("www-authenticate"),
        "Keystone uri=\"http://127.0.0.1:5000/identity\""
    );
    assert!(nova.header("x-openstack-request-id").starts_with("req-"));
    assert_eq!(
        nova.header("x-compute-request-id"),
        nova.header("x-openstack-request-id")
    );

    let keystone = get("/identity/v3/projects", &[]).await;
    assert_eq!(
        (
            keystone.status.as_u16(),
            keystone.json()["error"]["title"].clone()
        ),
        (401, "Unauthorized".into())
    );
    assert_eq!(keystone.header("vary"), "X-Auth-Token");

    let glance = get("/image/v2.1/made-up", &[("accept", "*/*")]).await;
    assert_eq!(glance.status.as_u16(), 401);
    assert_eq!(
        glance.text(),
        "<html>\n <head>\n  <title>401 Unauthorized</title>\n </head>\n <body>\n  <h1>401 \
         Unauthorized</h1>\n  This server could not verify that you are authorized to access the \
         document you requested. Either you supplied the wrong credentials (e.g., bad password), \
         or your browser does not understand how to supply the credentials required.<br /><br \
         />\n\n\n\n </body>\n</html>"
    );
}

#[tokio::test]
async fn a_token_is_asked_for_before_the_path_is_looked_at_but_not_by_open_paths() {
    assert_eq!(get("/compute/v2.1/nosuch", &[]).await.status.as_u16(), 401);
    assert_eq!(get("/identity/v2.1/nosuch", &[]).await.status.as_u16(), 404);
    let whole = testing::app().await;
    for open in ["/compute", "/compute/"] {
        assert_eq!(whole.get("", open).await.status.as_u16(), 200);
    }
    assert_eq!(get("/elsewhere", &[]).await.status.as_u16(), 404);
}

#[tokio::test]
async fn an_unknown_path_is_webobs_404() {
    let html = get(
        "/compute/v2.1/nosuch",
        &[("x-auth-token", "admin"), ("accept", "*/*")],
    )
    .await;
    assert_eq!(
        html.text(),
        "<html>\n <head>\n  <title>404 Not Found</title>\n </head>\n <body>\n  <h1>404 Not \
         Found</h1>\n  The resource could not be found.<br /><br />\n\n\n\n </body>\n</html>"
    );
    let json = get(
        "/image/v2/no",
        &[("x-auth-token", "admin"), ("accept", "application/json")],
    )
    .await;
    assert_eq!(
        json.json(),
        json!({"message": "The resource could not be found.<br /><br />\n\n\n",
               "code": "404 Not Found", "title": "Not Found"})
    );
    let plain = get("/image/v2/no", &[("x-auth-token", "admin")]).await;
    assert_eq!(
        plain.text(),
        "404 Not Found\n\nThe resource could not be found.\n\n   "
    );
    let put = ask(
        Method::PUT,
        "/image/v2.1/made-up",
        &[("x-auth-token", "admin")],
        "",
    )
    .await;
    assert_eq!(put.status.as_u16(), 405);
    assert!(put.header("allow").contains("GET"), "{:?}", put.headers);
}

#[tokio::test]
async fn a_reader_is_refused_in_the_words_of_the_service() {
    let json = [
        ("x-auth-token", "reader"),
        ("content-type", "application/json"),
    ];
    let nova = ask(Method::POST, "/compute/v2.1/made-up", &json, "{}").await;
    assert_eq!(
        nova.json(),
        json!({"forbidden": {"code": 403, "message":
            "Policy doesn't allow os_compute_api:os-flavor-manage:create to be performed."}})
    );
    assert_eq!(
        nova.header("content-type"),
        "application/json; charset=UTF-8"
    );
}

#[tokio::test]
async fn microversions_are_echoed_and_refused_as_recorded() {
    let old = get("/compute/v2.1/made-up", &[("x-auth-token", "reader")]).await;
    assert_eq!(old.header("openstack-api-version"), "compute 2.1");
    assert_eq!(
        old.json(),
        json!({"link": "http://127.0.0.1:5000/compute/v2.1/made-up", "new": false})
    );
    let new = [
        ("x-auth-token", "reader"),
        ("openstack-api-version", "compute 2.61"),
    ];
    let new = get("/compute/v2.1/made-up", &new).await;
    assert_eq!(new.json()["new"], true);
    assert_eq!(new.header("x-openstack-nova-api-version"), "2.61");
    assert_eq!(
        new.header("vary"),
        "OpenStack-API-Version, X-OpenStack-Nova-API-Version"
    );
    let beyond = [
        ("x-auth-token", "reader"),
        ("x-openstack-nova-api-version", "2.999"),
    ];
    let beyond = get("/compute/v2.1/made-up", &beyond).await;
    assert_eq!(beyond.status.as_u16(), 406);
    assert_eq!(
        beyond.json(),
        json!({"computeFault": {"code": 406, "message": "Version 2.999 is not supported by the \
               API. Minimum is 2.1 and maximum is 2.96."}})
    );
    assert_eq!(beyond.header("openstack-api-version"), "compute 2.999");
}

#[tokio::test]
async fn bad_bodies_are_answers() {
    let post = |kind: &'static str, body: String| async move {
        let headers = [("x-auth-token", "admin"), ("content-type", kind)];
        ask(Method::POST, "/compute/v2.1/made-up", &headers, &body).await
    };
    assert_eq!(
        post("application/json", r#"{"a": 1}"#.into())
            .await
            .status
            .as_u16(),
        201
    );
    let xml = post("application/xml", "<x/>".into()).await;
    assert_eq!(
        xml.json(),
        json!({"badMediaType": {"code": 415, "message": "Unsupported Content-Type"}})
    );
    let bad = post("application/json", "{bad".into()).await;
    assert_eq!(
        bad.json(),
        json!({"badRequest": {"code": 400, "message": "Malformed request body"}})
    );
    assert_eq!(
        post("application/json", "[".repeat(100_000))
            .await
            .status
            .as_u16(),
        400
    );
    assert_eq!(
        post("application/json", " ".repeat(BODY_LIMIT + 1))
            .await
            .status
            .as_u16(),
        413
    );
}

#[tokio::test]
async fn a_nul_is_refused_before_a_handler_sees_it() {
    let headers = [
        ("x-auth-token", "admin"),
        ("content-type", "application/json"),
    ];
    let refused = json!({"badRequest": {"code": 400, "message":
        "The request has a NUL character; leave it out."}});
    for body in [r#"{"a": "b\u0000"}"#, r#"{"a\u0000": [1]}"#] {
        let answer = ask(Method::POST, "/compute/v2.1/made-up", &headers, body).await;
        assert_eq!(
            (answer.status.as_u16(), answer.json()),
            (400, refused.clone())
        );
    }
    for path in ["/compute/v2.1/made-up?name=%00", "/compute/v2.1/x%00"] {
        let answer = get(path, &headers).await;
        assert_eq!(
            (answer.status.as_u16(), answer.json()),
            (400, refused.clone())
        );
    }
    let literal = get("/compute/v2.1/made-up?name=%2500", &headers).await;
    assert_eq!(literal.status.as_u16(), 200);
}

#[tokio::test]
async fn a_request_runs_to_its_end_without_its_client() {
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let (ended, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let go = std::sync::Arc::new(tokio::sync::Notify::new());
    let gate = std::sync::Arc::clone(&go);
    let slow = move || {
        let (begun, ended, gate) = (begun.clone(), ended.clone(), gate.clone());
        async move {
            begun.send(()).unwrap();
            gate.notified().await;
            ended.send(()).unwrap();
            "done"
        }
    };
    let routes = Routes::new(Service::Compute).get("/v2.1/made-up/slow", Rule::open(), slow);
    let cloud = testing::with_services(vec![routes, crate::identity::routes()]).await;
    let request = http::Request::builder().uri("/compute/v2.1/made-up/slow");
    let request = request.body(axum::body::Body::empty()).unwrap();
    let router = cloud.public.clone().into_router();
    let client = tokio::spawn(tower::ServiceExt::oneshot(router, request));
    begins.recv().await.unwrap();
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    go.notify_one();
    let ended = tokio::time::timeout(PATIENCE, ends.recv()).await;
    assert_eq!(ended, Ok(Some(())));
}

#[tokio::test]
async fn a_panic_is_a_500_in_the_form_of_the_service() {
    let answer = get("/compute/v2.1/made-up/panic", &[("x-auth-token", "reader")]).await;
    assert_eq!(answer.status.as_u16(), 500);
    assert_eq!(answer.json()["computeFault"]["code"], 500);
}

#[tokio::test]
async fn the_table_lists_every_endpoint() {
    let cloud = testing::with_services(routes()).await;
    let of_nova: Vec<_> = cloud
        .public
        .endpoints()
        .filter(|endpoint| endpoint.service == Service::Compute)
        .map(|endpoint| format!("{} {}", endpoint.method, endpoint.path))
        .collect();
    assert_eq!(
        of_nova,
        [
            "GET /v2.1/made-up",
            "POST /v2.1/made-up",
            "GET /v2.1/made-up/panic"
        ]
    );
}

/// Set in the process that is to fail.
const FAILS: &str = "FRACTUS_TEST_WRONG_ANSWER";

async fn wrong() -> axum::Json<Value> {
    axum::Json(json!({"flavors": 7}))
}

/// Proof that the oracle sees what goes over a socket.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_answer_behind_a_socket_fails_its_test() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    if std::env::var_os(FAILS).is_some() {
        let rule = Rule::reader("os_compute_api:flavors");
        let routes = Routes::new(Service::Compute).get("/v2.1/flavors", rule, wrong);
        let cloud = testing::with_services(vec![routes, crate::identity::routes()]).await;
        let listening = crate::serve::listener::bind("127.0.0.1:0").await.unwrap();
        let address = listening.local_addr().unwrap();
        let router = cloud.public.clone().into_router();
        let (stop, tasks) = Default::default();
        tokio::spawn(crate::serve::listener::serve(
            listening, None, router, stop, tasks,
        ));
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let token = &cloud.reader;
        let asked = format!(
            "GET /compute/v2.1/flavors HTTP/1.1\r\nhost: cloud\r\nx-auth-token: {token}\r\n\
             connection: close\r\n\r\n"
        );
        socket.write_all(asked.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        return;
    }
    let name = "http::tests::a_wrong_answer_behind_a_socket_fails_its_test";
    // A process that ends so cleans nothing up.
    let folder = tempfile::tempdir().unwrap();
    let ran = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("TMPDIR", folder.path())
        .env(FAILS, "1")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(!ran.status.success(), "{said}");
    assert!(said.contains("is not what OpenStack says"), "{said}");
}
