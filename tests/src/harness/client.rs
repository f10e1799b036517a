//! An HTTP client whose every answer passes the oracle.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use fractus_oracle::{Exchange, Oracle};
use reqwest::Method;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

/// Requests as one user, at one microversion.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    pub url: String,
    pub token: Option<String>,
    /// The minor part: 96 for 2.96; `None` sends none, which is 2.1.
    pub microversion: Option<u16>,
}

/// An answer that passed the oracle.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
    /// Null when it is no JSON.
    pub body: Value,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The text at a JSON pointer; empty when there is none.
    pub fn text(&self, pointer: &str) -> String {
        self.body
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    }
}

impl Client {
    /// Nobody yet; `url` is the public URL without a slash at its end.
    pub fn new(url: &str) -> Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .build()?;
        Ok(Self {
            http,
            url: url.to_owned(),
            token: None,
            microversion: None,
        })
    }

    /// Somebody: logs in by password, in a project of the default domain.
    pub async fn log_in(&self, user: &str, password: &str, project: &str) -> Result<Self> {
        let domain = json!({"id": "default"});
        let user = json!({"name": user, "domain": domain, "password": password});
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": project, "domain": domain}}}});
        let answer = self
            .post("/identity/v3/auth/tokens", body)
            .await?
            .expect_status(201)?;
        let token = answer.header("x-subject-token").to_owned();
        Ok(Self {
            token: Some(token),
            ..self.clone()
        })
    }

    #[must_use]
    pub fn at(&self, minor: u16) -> Self {
        Self {
            microversion: Some(minor),
            ..self.clone()
        }
    }

    #[must_use]
    pub fn as_nobody(&self) -> Self {
        Self {
            token: None,
            ..self.clone()
        }
    }

    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.request(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Result<Answer> {
        self.request(Method::POST, path, Some(body)).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Result<Answer> {
        self.request(Method::PUT, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<Answer> {
        self.request(Method::DELETE, path, None).await
    }

    pub async fn request(&self, method: Method, path: &str, body: Option<Value>) -> Result<Answer> {
        let bytes = body.as_ref().map(serde_json::to_vec).transpose()?;
        self.send(method, path, "application/json", bytes, body.as_ref())
            .await
    }

    /// A request with a body of any kind.
    pub async fn upload(&self, path: &str, bytes: Vec<u8>) -> Result<Answer> {
        self.send(
            Method::PUT,
            path,
            "application/octet-stream",
            Some(bytes),
            None,
        )
        .await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        bytes: Option<Vec<u8>>,
        body: Option<&Value>,
    ) -> Result<Answer> {
        let mut request = self
            .http
            .request(method.clone(), format!("{}{path}", self.url))
            .headers(self.headers()?)
            .header("content-type", content_type);
        if let Some(bytes) = bytes {
            request = request.body(bytes);
        }
        let answer = request
            .send()
            .await
            .with_context(|| format!("{method} {path}"))?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let bytes = answer
            .bytes()
            .await
            .with_context(|| format!("body of {method} {path}"))?;
        Self::judge(&method, path, body, status, &headers, &bytes)?;
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Ok(Answer {
            status,
            headers,
            bytes: bytes.to_vec(),
            body,
        })
    }

    fn headers(&self) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        let mut add = |name: &'static str, value: String| -> Result<()> {
            headers.insert(
                HeaderName::from_static(name),
                HeaderValue::from_str(&value)?,
            );
            Ok(())
        };
        add("accept", "application/json".to_owned())?;
        if let Some(token) = &self.token {
            add("x-auth-token", token.clone())?;
        }
        if let Some(minor) = self.microversion {
            add("openstack-api-version", format!("compute 2.{minor}"))?;
        }
        Ok(headers)
    }

    fn judge(
        method: &Method,
        path: &str,
        request: Option<&Value>,
        status: u16,
        headers: &HeaderMap,
        bytes: &[u8],
    ) -> Result<()> {
        let named = headers.iter().map(|(name, value)| {
            (
                name.to_string(),
                String::from_utf8_lossy(value.as_bytes()).into_owned(),
            )
        });
        let exchange = Exchange::new(method.as_str(), path, request, status, named, bytes);
        let Some(exchange) = exchange else {
            return Ok(());
        };
        if let Err(said) = Oracle::get().hold(&exchange) {
            bail!("{said}");
        }
        Ok(())
    }
}

impl Answer {
    /// Itself, if it has this status.
    ///
    /// # Errors
    /// With the body, when it has another one.
    pub fn expect_status(self, status: u16) -> Result<Self> {
        if self.status != status {
            bail!(
                "status {} where {status} was expected: {}",
                self.status,
                self.body
            );
        }
        Ok(self)
    }
}

/// What Linux says last.
pub const PANIC: &str = "end Kernel panic - not syncing";
/// Longest wait for a server to get somewhere.
const SETTLES: Duration = Duration::from_secs(60);

/// Servers, as tests need them.
impl Client {
    /// Makes a server without networks; gives its id.
    pub async fn create_server(&self, name: &str, image: &str, flavor: &str) -> Result<String> {
        let server =
            json!({"name": name, "imageRef": image, "flavorRef": flavor, "networks": "none"});
        let made = self
            .at(96)
            .post("/compute/v2.1/servers", json!({"server": server}))
            .await?;
        Ok(made.expect_status(202)?.text("/server/id"))
    }

    /// One action; `body` is `{"os-start": null}` and the like.
    pub async fn act(&self, server: &str, body: Value) -> Result<Answer> {
        self.post(&format!("/compute/v2.1/servers/{server}/action"), body)
            .await
    }

    /// Waits until the server has this status and nothing is under way.
    ///
    /// # Errors
    /// When it does not get there, or to ERROR instead.
    pub async fn until_status(&self, server: &str, wanted: &str) -> Result<Value> {
        self.until_status_within(server, wanted, SETTLES).await
    }

    /// The same, of a server that takes its time.
    pub async fn until_status_within(
        &self,
        server: &str,
        wanted: &str,
        limit: Duration,
    ) -> Result<Value> {
        let path = format!("/compute/v2.1/servers/{server}");
        let what = format!("server {server} is {wanted}");
        let seen = super::until(&what, limit, || async {
            let answer = self
                .get(&path)
                .await
                .map_err(|error| format!("{error:#}"))?;
            let server = &answer.body["server"];
            let (status, task) = (&server["status"], &server["OS-EXT-STS:task_state"]);
            if status == wanted && task.is_null() {
                Ok(Ok(server.clone()))
            } else if status == "ERROR" && task.is_null() {
                Ok(Err(server["fault"].to_string()))
            } else {
                Err(format!("{status} {task}"))
            }
        });
        seen.await?
            .map_err(|fault| anyhow::anyhow!("server {server} went to ERROR: {fault}"))
    }

    /// Waits until the newest migration of the server has this status; gives it as `os-migrations` shows it.
    ///
    /// # Errors
    /// When it does not get there, or has ended otherwise: with the reason, of an administrator's client.
    pub async fn until_migration(
        &self,
        server: &str,
        wanted: &str,
        limit: Duration,
    ) -> Result<Value> {
        let path = format!("/compute/v2.1/os-migrations?instance_uuid={server}");
        let what = format!("the migration of server {server} is {wanted}");
        let seen = super::until(&what, limit, || async {
            let answer = self
                .get(&path)
                .await
                .map_err(|error| format!("{error:#}"))?;
            let all = answer.body["migrations"].as_array().cloned();
            let newest = all.and_then(|all| all.into_iter().max_by_key(|it| it["id"].as_i64()));
            let newest = newest.unwrap_or_default();
            let status = newest["status"].as_str().unwrap_or_default();
            let over = ["completed", "failed", "error", "cancelled"].contains(&status);
            match status == wanted {
                true => Ok(Ok(newest)),
                false if over => Ok(Err(newest)),
                false => Err(answer.body.to_string()),
            }
        });
        let ended = match seen.await? {
            Ok(there) => return Ok(there),
            Err(ended) => ended,
        };
        let path = format!(
            "/fractus/v1/migrations/{}",
            ended["uuid"].as_str().unwrap_or_default()
        );
        let whole = self.get(&path).await?;
        anyhow::bail!("{what}: it is over: {}", whole.body)
    }

    /// Waits until there is no such server any more.
    pub async fn until_gone(&self, server: &str) -> Result<()> {
        let path = format!("/compute/v2.1/servers/{server}");
        super::until(&format!("server {server} is gone"), SETTLES, || async {
            let answer = self
                .get(&path)
                .await
                .map_err(|error| format!("{error:#}"))?;
            match answer.status {
                404 => Ok(()),
                _ => Err(answer.text("/server/status")),
            }
        })
        .await
    }

    /// Waits until a line of the server's console log has this text; gives the log. The line is whole: a guest
    /// writes it byte by byte, and what stands behind the text is there as well.
    pub async fn until_logged(&self, server: &str, wanted: &str) -> Result<String> {
        self.until_logged_within(server, wanted, SETTLES).await
    }

    pub async fn until_logged_within(
        &self,
        server: &str,
        wanted: &str,
        longest: Duration,
    ) -> Result<String> {
        let is_there = |text: &str| {
            let ended = text.rfind('\n').map_or(0, |end| end + 1);
            text[..ended].contains(wanted)
        };
        let what = format!("{wanted:?} in the log of {server}");
        let seen = super::until(&what, longest, || async {
            let text = self.console_log(server).await?;
            // Of a guest whose kernel has panicked nothing more is to be waited for.
            if is_there(&text) || text.contains(PANIC) {
                Ok(text)
            } else {
                Err(text)
            }
        });
        let text = seen.await?;
        if !is_there(&text) {
            bail!("{what}: its kernel panicked: {text}");
        }
        Ok(text)
    }

    /// What the server's guest has said so far; its last line may be half of one.
    pub async fn console_log(&self, server: &str) -> Result<String, String> {
        let answer = self.act(server, json!({"os-getConsoleOutput": {}})).await;
        Ok(answer
            .map_err(|error| format!("{error:#}"))?
            .text("/output"))
    }
}
