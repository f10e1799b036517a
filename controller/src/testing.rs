//! For tests: the whole public API in process, over a database of its own, with tokens of
//! callers of every kind.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::clock::SystemClock;
use crate::database::testing::{self, TestDatabase};
use crate::http::{App, AppParts, Public, PublicUrl, Routes, Service};
use crate::identity::{Realm, boot};
use crate::image::Images;
use crate::image::blob::FileStore;
use crate::random::SystemRandom;
use crate::secret::MasterKey;

/// A cloud in process. Dropped with its files.
#[derive(Debug)]
pub struct TestApp {
    pub app: App,
    pub public: Public,
    /// admin in the project admin.
    pub admin: String,
    /// member and reader in the project `one`.
    pub member: String,
    pub reader: String,
    /// member of the project `two`, to whom nothing of `one` exists.
    pub other: String,
    /// service in the project `service`.
    pub service: String,
    pub project_id: String,
    pub other_project_id: String,
    pub admin_project_id: String,
    pub admin_user_id: String,
    pub admin_password: String,
    _database: TestDatabase,
    _images: Folder,
}

/// A folder that goes with the test.
#[derive(Debug)]
struct Folder(std::path::PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // Left for the system's cleaner if it fails.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// With all services of this cloud.
pub async fn app() -> TestApp {
    with_services(crate::serve::services()).await
}

/// With the given services only.
pub async fn with_services(services: Vec<Routes>) -> TestApp {
    match build(services).await {
        Ok(app) => app,
        Err(error) => panic!("composing the test's cloud: {error:?}"),
    }
}

async fn build(services: Vec<Routes>) -> Result<TestApp, Box<dyn std::error::Error>> {
    let database = testing::database().await;
    let db = database.database.clone();
    let (clock, random) = (SystemClock::shared(), SystemRandom::shared());
    let realm = Realm::open(db.clone(), Arc::clone(&clock), MasterKey::ephemeral()?).await?;
    let password_file = std::env::temp_dir().join(format!("fractus-test-{}", random.uuid()));
    let booted = boot::first(&db, &realm, &*random, clock.now_us(), &password_file).await?;
    let booted = booted.ok_or("the database is not new")?;
    let admin_password = std::fs::read_to_string(&password_file)?
        .trim_end()
        .to_owned();
    std::fs::remove_file(&password_file)?;
    let public_url = PublicUrl::parse("http://127.0.0.1:5000")?;
    let listed: Vec<Service> = services.iter().map(Routes::service).collect();
    boot::catalog(&db, &*random, &public_url, &listed).await?;
    let images = std::env::temp_dir().join(format!("fractus-test-images-{}", random.uuid()));
    let files = FileStore::open(&images, "test").await?;
    let folder = Folder(images);
    let realm = Arc::new(realm);
    let app = App::new(AppParts {
        public_url,
        // A test's disk may be small.
        images: Images::new(db.clone(), Arc::new(files)).within(crate::image::Limits {
            reserve: 0,
            ..crate::image::Limits::default()
        }),
        compute: crate::compute::testing::idle(&db),
        hosts: crate::hosts::Hosts::idle(&db).await?,
        database: db,
        clock,
        random,
        authenticator: Arc::clone(&realm) as _,
        realm,
    });
    let mut test = TestApp {
        public: Public::new(app.clone(), services),
        app,
        admin: String::new(),
        member: String::new(),
        reader: String::new(),
        other: String::new(),
        service: String::new(),
        project_id: String::new(),
        other_project_id: String::new(),
        admin_project_id: booted.admin_project_id.clone(),
        admin_user_id: booted.admin_user_id,
        admin_password,
        _database: database,
        _images: folder,
    };
    let realm = test.app.realm();
    test.admin = realm.token_for(&test.admin_user_id, &booted.admin_project_id)?;
    test.project_id = test.make_project("one").await;
    test.other_project_id = test.make_project("two").await;
    let (one, two) = (test.project_id.clone(), test.other_project_id.clone());
    test.member = test.make_user("member", "member", &one).await;
    test.reader = test.make_user("reader", "reader", &one).await;
    test.other = test.make_user("other", "member", &two).await;
    let services_project = test.make_project("service").await;
    test.service = test
        .make_user("service", "service", &services_project)
        .await;
    Ok(test)
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: bytes::Bytes,
}

impl Answer {
    /// The body as JSON; a body that is none fails the test.
    pub fn json(&self) -> Value {
        match serde_json::from_slice(&self.bytes) {
            Ok(value) => value,
            Err(error) => panic!("{} {error}: {}", self.status, self.text()),
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// All values of a header, joined.
    pub fn header(&self, name: &str) -> String {
        let values = self.headers.get_all(name).iter();
        values
            .map(|value| value.to_str().unwrap_or("?"))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Fails the test unless the status is this.
    pub fn expect_status(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.text());
        self
    }
}

impl TestApp {
    /// A request with these headers and this body.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = match request.body(body.into()) {
            Ok(request) => request,
            Err(error) => panic!("{path}: {error}"),
        };
        read(self.public.serve(request).await).await
    }

    /// A JSON request with a token; null is no body.
    pub async fn ask(&self, token: &str, method: Method, path: &str, body: Value) -> Answer {
        let headers = [
            ("x-auth-token", token),
            ("content-type", "application/json"),
            ("accept", "application/json"),
        ];
        let headers = if token.is_empty() {
            &headers[1..]
        } else {
            &headers[..]
        };
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.send(method, path, headers, body).await
    }

    pub async fn get(&self, token: &str, path: &str) -> Answer {
        self.ask(token, Method::GET, path, Value::Null).await
    }

    pub async fn post(&self, token: &str, path: &str, body: Value) -> Answer {
        self.ask(token, Method::POST, path, body).await
    }

    /// A token by password, scoped to a project.
    pub async fn log_in(&self, user: &str, password: &str, project_id: &str) -> String {
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": {
                "name": user, "domain": {"id": "default"}, "password": password}}},
            "scope": {"project": {"id": project_id}},
        }});
        let answer = self
            .post("", "/identity/v3/auth/tokens", body)
            .await
            .expect_status(201);
        answer.header("x-subject-token")
    }

    async fn make_project(&self, name: &str) -> String {
        let body = json!({"project": {"name": name}});
        let answer = self.post(&self.admin, "/identity/v3/projects", body).await;
        id_in(&answer.expect_status(201).json(), "project")
    }

    /// A user without a password, with a role in a project, and a token of that user.
    pub async fn make_user(&self, name: &str, role: &str, project_id: &str) -> String {
        let body = json!({"user": {"name": name}});
        let answer = self.post(&self.admin, "/identity/v3/users", body).await;
        let user_id = id_in(&answer.expect_status(201).json(), "user");
        let roles = self
            .get(&self.admin, &format!("/identity/v3/roles?name={role}"))
            .await
            .json();
        let role_id = roles["roles"][0]["id"].as_str().unwrap_or("").to_owned();
        let path = format!("/identity/v3/projects/{project_id}/users/{user_id}/roles/{role_id}");
        self.ask(&self.admin, Method::PUT, &path, Value::Null)
            .await
            .expect_status(204);
        match self.app.realm().token_for(&user_id, project_id) {
            Ok(token) => token,
            Err(error) => panic!("a token for {name}: {error}"),
        }
    }

    pub fn random_id(&self) -> String {
        self.app.random().uuid().to_string()
    }
}

fn id_in(body: &Value, kind: &str) -> String {
    body[kind]["id"].as_str().unwrap_or("").to_owned()
}

async fn read(answer: Response) -> Answer {
    let (status, headers) = (answer.status(), answer.headers().clone());
    let bytes = match answer.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => panic!("the answer's body: {error}"),
    };
    Answer {
        status,
        headers,
        bytes,
    }
}
