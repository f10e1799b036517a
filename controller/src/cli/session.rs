//! A session with a cloud: one login, the catalogue, requests in the form that each service wants.
//!
//! Logs in when the first request needs it, and asks for the compute microversion when the first
//! compute request does. Owns no state between two runs: no token is kept on disk.

use std::error::Error as _;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, Method, StatusCode};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::CliError;
use super::config::Config;

/// Lowest and highest compute microversion that this client understands.
const COMPUTE_LOWEST: u16 = 1;
const COMPUTE_HIGHEST: u16 = 96;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    Identity,
    Image,
    Compute,
    /// What no OpenStack API has: hosts and how they join.
    Hosts,
}

impl Service {
    fn kind(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Image => "image",
            Self::Compute => "compute",
            Self::Hosts => "fractus",
        }
    }
}

/// A token and what came with it.
#[derive(Debug)]
pub struct Token {
    pub id: String,
    /// The answer's `token`.
    pub body: Value,
}

#[derive(Debug)]
pub struct Session {
    pub config: Config,
    http: Client,
    token: OnceCell<Token>,
    compute_version: OnceCell<String>,
}

impl Session {
    pub fn new(config: Config) -> Result<Self, CliError> {
        Ok(Self {
            http: client(&config)?,
            config,
            token: OnceCell::new(),
            compute_version: OnceCell::new(),
        })
    }

    /// Logs in, once.
    pub async fn token(&self) -> Result<&Token, CliError> {
        self.token.get_or_try_init(|| self.log_in()).await
    }

    async fn log_in(&self) -> Result<Token, CliError> {
        let url = format!("{}/auth/tokens", self.config.auth_url);
        let body = json!({ "auth": self.config.login.0 });
        let answer = self.send(self.http.post(&url).json(&body)).await?;
        let status = answer.status();
        let token = header(answer.headers(), "x-subject-token");
        let mut said = json_body(answer, &format!("POST {url}")).await?;
        match (status, token) {
            (StatusCode::CREATED, Some(id)) => Ok(Token {
                id,
                body: said["token"].take(),
            }),
            (StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND, _) => Err(CliError::Login {
                message: message(&said, status),
                hint: format!("identity is {}", self.config.auth_url),
            }),
            (StatusCode::CREATED, None) => Err(CliError::Answer {
                request: format!("POST {url}"),
                what: "without a token".to_owned(),
            }),
            (status, _) => Err(CliError::Refused {
                status: status.as_u16(),
                message: message(&said, status),
                request_id: String::new(),
            }),
        }
    }

    /// The service's URL in this region, without a slash at its end.
    pub async fn endpoint(&self, service: Service) -> Result<String, CliError> {
        if let Some(url) = self.config.endpoints.get(service.kind()) {
            return Ok(url.clone());
        }
        if service == Service::Identity {
            return Ok(self.config.auth_url.clone());
        }
        let token = self.token().await?;
        let found = find_endpoint(
            &token.body["catalog"],
            service.kind(),
            self.config.region.as_deref(),
            &self.config.interface,
        );
        match (found, service) {
            (Some(url), _) => Ok(url),
            (None, Service::Hosts) => {
                // The hosts' API stands beside the compute API that runs on them.
                let compute = Box::pin(self.endpoint(Service::Compute)).await?;
                let origin = compute.split("/compute").next().unwrap_or(&compute);
                Ok(format!("{origin}/fractus/v1"))
            }
            (None, service) => Err(CliError::NoService {
                service: service.kind().to_owned(),
                region: self
                    .config
                    .region
                    .clone()
                    .unwrap_or_else(|| "any".to_owned()),
            }),
        }
    }

    /// The microversion of compute requests: what was asked for, else the highest known to both.
    async fn compute_version(&self) -> Result<&String, CliError> {
        self.compute_version
            .get_or_try_init(|| async {
                if let Some(asked) = &self.config.compute_api_version {
                    return Ok(asked.clone());
                }
                let url = format!("{}/", self.endpoint(Service::Compute).await?);
                let answer = self.send(self.http.get(&url)).await?;
                let said = json_body(answer, &format!("GET {url}")).await?;
                negotiate(&said["version"]).ok_or_else(|| CliError::Answer {
                    request: format!("GET {url}"),
                    what: "no version document, or one of a cloud too old or too new".to_owned(),
                })
            })
            .await
    }

    async fn request(
        &self,
        service: Service,
        method: Method,
        path: &str,
    ) -> Result<RequestBuilder, CliError> {
        let mut url = self.endpoint(service).await?;
        if service == Service::Image && !url.ends_with("/v2") {
            url.push_str("/v2");
        }
        let mut request = self
            .http
            .request(method, format!("{url}{path}"))
            .header("accept", "application/json")
            .header("x-auth-token", &self.token().await?.id);
        if service == Service::Compute {
            let version = self.compute_version().await?;
            request = request
                .header("openstack-api-version", format!("compute {version}"))
                .header("x-openstack-nova-api-version", version);
        }
        Ok(request)
    }

    /// One request; the answer's JSON, or null when it has none.
    pub async fn call(
        &self,
        service: Service,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value, CliError> {
        let name = format!("{method} {path}");
        let mut request = self.request(service, method, path).await?;
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = succeeded(self.send(request).await?, &name).await?;
        json_body(answer, &name).await
    }

    pub async fn get(&self, service: Service, path: &str) -> Result<Value, CliError> {
        self.call(service, Method::GET, path, None).await
    }

    /// One request with a body of another kind than plain JSON.
    pub async fn send_bytes(
        &self,
        service: Service,
        method: Method,
        path: &str,
        content_type: &str,
        body: reqwest::Body,
    ) -> Result<Value, CliError> {
        let name = format!("{method} {path}");
        let request = self.request(service, method, path).await?;
        let request = request.header("content-type", content_type).body(body);
        let answer = succeeded(self.send(request).await?, &name).await?;
        json_body(answer, &name).await
    }

    /// One request whose answer is a stream of bytes; with its length where the server says it.
    pub async fn fetch(
        &self,
        service: Service,
        path: &str,
    ) -> Result<
        (
            Option<u64>,
            impl Stream<Item = reqwest::Result<Bytes>> + use<>,
        ),
        CliError,
    > {
        let request = self.request(service, Method::GET, path).await?;
        let request = request.header("accept", "application/octet-stream");
        let answer = succeeded(self.send(request).await?, &format!("GET {path}")).await?;
        Ok((answer.content_length(), answer.bytes_stream()))
    }

    /// All pages of a list: follows the `next` links.
    pub async fn list(
        &self,
        service: Service,
        path: &str,
        key: &str,
    ) -> Result<Vec<Value>, CliError> {
        let mut all = Vec::new();
        let mut path = path.to_owned();
        loop {
            let mut page = self.get(service, &path).await?;
            let next = next_page(&page, key);
            if let Value::Array(items) = page[key].take() {
                if items.is_empty() {
                    return Ok(all);
                }
                all.extend(items);
            }
            match next {
                // Links are of the public URL; ours may be another one.
                Some(query) => {
                    path = format!("{}?{query}", path.split('?').next().unwrap_or_default());
                }
                None => return Ok(all),
            }
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, CliError> {
        request
            .send()
            .await
            .map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, error: &reqwest::Error) -> CliError {
        let mut detail = error.without_url_text();
        let mut source = error.source();
        while let Some(inner) = source {
            detail = inner.to_string();
            source = inner.source();
        }
        let url = error
            .url()
            .map_or_else(|| self.config.auth_url.clone(), ToString::to_string);
        let help = if detail.to_ascii_lowercase().contains("certificate") {
            "give the certificate of the cloud's authority with --os-cacert (or OS_CACERT), or, where \
             you are sure that nobody is in between, --insecure"
        } else if error.is_timeout() {
            "the cloud took too long to answer: is it overloaded, or the network in between down?"
        } else {
            "is the controller running, and OS_AUTH_URL right? `scripts/up` starts a cloud here"
        };
        CliError::Unreachable { url, detail, help }
    }
}

/// The text of a reqwest error without the URL, which is shown already.
trait WithoutUrl {
    fn without_url_text(&self) -> String;
}

impl WithoutUrl for reqwest::Error {
    fn without_url_text(&self) -> String {
        let text = self.to_string();
        text.split(" for url").next().unwrap_or(&text).to_owned()
    }
}

fn client(config: &Config) -> Result<Client, CliError> {
    let mut builder = Client::builder()
        .user_agent(concat!("fractus/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(15))
        .no_proxy();
    if let Some(path) = &config.cacert {
        let certificates = read_certificates(path)?;
        builder = builder.tls_certs_only(certificates);
    } else if config.auth_url.starts_with("http://") {
        // Reading the system's roots takes longer than the whole request.
        builder = builder.tls_certs_only([]);
    }
    if !config.verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    builder.build().map_err(|error| CliError::Configuration {
        what: format!("no HTTP client: {error}"),
        help: "are the certificates of OS_CACERT in PEM form?".to_owned(),
    })
}

fn read_certificates(path: &std::path::Path) -> Result<Vec<reqwest::Certificate>, CliError> {
    let pem = std::fs::read(path).map_err(|error| CliError::File {
        path: path.to_owned(),
        error,
    })?;
    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| CliError::Configuration {
        what: format!("{} holds no PEM certificates: {error}", path.display()),
        help: "OS_CACERT should name the file with the cloud's certificate authority".to_owned(),
    })
}

/// The error that an unsuccessful answer is.
async fn succeeded(answer: Response, request: &str) -> Result<Response, CliError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let request_id = header(answer.headers(), "x-openstack-request-id").unwrap_or_default();
    let text = answer.text().await.unwrap_or_default();
    let message = match serde_json::from_str(&text) {
        Ok(said) => message(&said, status),
        Err(_) => format!("{request}: {status}"),
    };
    Err(CliError::Refused {
        status: status.as_u16(),
        message,
        request_id,
    })
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

async fn json_body(answer: Response, request: &str) -> Result<Value, CliError> {
    let wrong = |what: String| CliError::Answer {
        request: request.to_owned(),
        what,
    };
    let bytes = answer
        .bytes()
        .await
        .map_err(|error| wrong(format!("cut off ({error})")))?;
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&bytes).map_err(|_| wrong("not JSON".to_owned()))
}

/// What an error body says, whichever service's form it has.
fn message(said: &Value, status: StatusCode) -> String {
    let of = |value: &Value| value["message"].as_str().map(str::to_owned);
    of(said)
        .or_else(|| said.as_object()?.values().find_map(of))
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| status.to_string())
}

fn find_endpoint(
    catalog: &Value,
    kind: &str,
    region: Option<&str>,
    interface: &str,
) -> Option<String> {
    let entry = catalog
        .as_array()?
        .iter()
        .find(|entry| entry["type"] == kind)?;
    let endpoint = entry["endpoints"].as_array()?.iter().find(|endpoint| {
        endpoint["interface"] == interface
            && region.is_none_or(|region| {
                endpoint["region_id"] == region || endpoint["region"] == region
            })
    })?;
    Some(endpoint["url"].as_str()?.trim_end_matches('/').to_owned())
}

/// The highest microversion that the version document and this client have in common.
fn negotiate(document: &Value) -> Option<String> {
    let minor =
        |name: &str| -> Option<u16> { document[name].as_str()?.strip_prefix("2.")?.parse().ok() };
    let (lowest, highest) = (minor("min_version")?, minor("version")?);
    let common = highest.min(COMPUTE_HIGHEST);
    (common >= lowest.max(COMPUTE_LOWEST)).then(|| format!("2.{common}"))
}

/// The query of the next page: compute and volume say it in `KEY_links`, image in `next`, identity in
/// `links.next`.
fn next_page(page: &Value, key: &str) -> Option<String> {
    let of_links = || {
        page[format!("{key}_links")]
            .as_array()?
            .iter()
            .find(|link| link["rel"] == "next")?["href"]
            .as_str()
    };
    let link = of_links()
        .or_else(|| page["next"].as_str())
        .or_else(|| page["links"]["next"].as_str())?;
    Some(link.split_once('?')?.1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_microversion_is_taken() {
        let document = |low: &str, high: &str| json!({"min_version": low, "version": high});
        assert_eq!(
            negotiate(&document("2.1", "2.104")).as_deref(),
            Some("2.96")
        );
        assert_eq!(negotiate(&document("2.1", "2.53")).as_deref(), Some("2.53"));
        assert_eq!(negotiate(&document("2.97", "2.104")), None);
        assert_eq!(negotiate(&json!({})), None);
    }

    #[test]
    fn an_endpoint_is_found_by_type_interface_and_region() {
        let catalog = json!([{"type": "compute", "endpoints": [
            {"interface": "admin", "region": "R", "region_id": "R", "url": "http://a/"},
            {"interface": "public", "region": "R", "region_id": "R", "url": "http://p/v2.1/"}]}]);
        let find = |region, interface| find_endpoint(&catalog, "compute", region, interface);
        assert_eq!(find(None, "public").as_deref(), Some("http://p/v2.1"));
        assert_eq!(find(Some("R"), "admin").as_deref(), Some("http://a"));
        assert_eq!(find(Some("Q"), "public"), None);
    }

    #[test]
    fn messages_are_read_in_every_services_form() {
        let status = StatusCode::CONFLICT;
        let nova = json!({"conflictingRequest": {"code": 409, "message": "locked"}});
        assert_eq!(message(&nova, status), "locked");
        assert_eq!(
            message(&json!({"message": "plain", "code": "409"}), status),
            "plain"
        );
        assert_eq!(message(&json!([]), status), "409 Conflict");
    }

    #[test]
    fn pages_are_followed_in_every_services_form() {
        let compute = json!({"servers": [], "servers_links": [
            {"rel": "next", "href": "http://x/servers?marker=1"}]});
        assert_eq!(next_page(&compute, "servers").as_deref(), Some("marker=1"));
        assert_eq!(
            next_page(&json!({"next": "/v2/images?marker=2"}), "images").as_deref(),
            Some("marker=2")
        );
        assert_eq!(next_page(&json!({"links": {"next": null}}), "users"), None);
    }
}
