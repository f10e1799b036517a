//! A cloud to measure, and a client of it: the few requests that are measured, over the public API.
//! The client is as thin as can be, so that what it costs itself is small beside what it measures.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fractus_tests::harness;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};

/// A server that is not ACTIVE, or not gone, after this time never will be.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a server. Short against what is measured, long enough not to be the load.
const LOOK: Duration = Duration::from_millis(2);

pub struct Cloud {
    client: Client,
    login: Value,
    identity: String,
    compute: String,
    image: String,
    fractus: String,
    token: String,
}

impl Cloud {
    /// Logs in as the first admin and reads the catalogue.
    pub async fn login(harness: &harness::Cloud) -> anyhow::Result<Self> {
        let domain = json!({"id": "default"});
        let login = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": {
                "name": "admin", "domain": domain, "password": harness.password,
            }}},
            "scope": {"project": {"name": "admin", "domain": domain}},
        }});
        let mut cloud = Self {
            client: Client::builder()
                .timeout(PATIENCE)
                .no_proxy()
                .tls_certs_only([])
                .build()?,
            login,
            identity: format!("{}/identity/v3", harness.url),
            compute: String::new(),
            image: String::new(),
            fractus: format!("{}/fractus/v1", harness.url),
            token: String::new(),
        };
        let (token, body) = cloud.password().await?;
        cloud.token = token;
        cloud.compute = endpoint(&body, "compute")?;
        cloud.image = endpoint(&body, "image")?;
        if !cloud.image.ends_with("/v2") {
            cloud.image.push_str("/v2");
        }
        Ok(cloud)
    }

    /// A token by password, and the body that came with it.
    pub async fn password(&self) -> anyhow::Result<(String, Value)> {
        let url = format!("{}/auth/tokens", self.identity);
        let answer = self.client.post(url).json(&self.login).send().await?;
        let answer = answer.error_for_status()?;
        let token = answer
            .headers()
            .get("x-subject-token")
            .context("no token in the answer")?;
        let token = token.to_str()?.to_owned();
        Ok((token, answer.json().await?))
    }

    async fn send(&self, method: Method, url: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let mut request = self
            .client
            .request(method.clone(), url)
            .header("x-auth-token", &self.token)
            .header("openstack-api-version", "compute 2.96");
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        let status = answer.status();
        let bytes = answer.bytes().await?;
        if !status.is_success() {
            bail!(
                "{method} {url}: {status}: {}",
                String::from_utf8_lossy(&bytes)
            );
        }
        Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    pub async fn validate_token(&self) -> anyhow::Result<()> {
        let url = format!("{}/auth/tokens", self.identity);
        let answer = self
            .client
            .get(url)
            .header("x-auth-token", &self.token)
            .header("x-subject-token", &self.token)
            .send()
            .await?
            .error_for_status()?;
        answer.bytes().await?;
        Ok(())
    }

    pub async fn list_servers(&self) -> anyhow::Result<usize> {
        let body = self
            .send(
                Method::GET,
                &format!("{}/servers/detail", self.compute),
                None,
            )
            .await?;
        Ok(body["servers"].as_array().map_or(0, Vec::len))
    }

    /// An image with `bytes` and properties; its id.
    pub async fn upload(
        &self,
        name: &str,
        properties: Value,
        bytes: Vec<u8>,
    ) -> anyhow::Result<String> {
        let mut body = json!({
            "name": name, "disk_format": "raw", "container_format": "bare", "visibility": "private",
        });
        if let (Some(body), Value::Object(properties)) = (body.as_object_mut(), properties) {
            body.extend(properties);
        }
        let images = format!("{}/images", self.image);
        let made = self.send(Method::POST, &images, Some(&body)).await?;
        let id = made["id"]
            .as_str()
            .context("an image without an id")?
            .to_owned();
        self.client
            .put(format!("{images}/{id}/file"))
            .header("x-auth-token", &self.token)
            .header("content-type", "application/octet-stream")
            .body(bytes)
            .send()
            .await?
            .error_for_status()?;
        Ok(id)
    }

    /// A flavor with 1 vCPU and so many MiB; its id.
    pub async fn flavor(&self, name: &str, mib: u64) -> anyhow::Result<String> {
        let body = json!({"flavor": {"name": name, "vcpus": 1, "ram": mib, "disk": 1}});
        let made = self
            .send(
                Method::POST,
                &format!("{}/flavors", self.compute),
                Some(&body),
            )
            .await?;
        Ok(made["flavor"]["id"]
            .as_str()
            .context("a flavor without an id")?
            .to_owned())
    }

    /// Creates a server and waits for ACTIVE: its id, and the time from the request on.
    pub async fn create(
        &self,
        name: &str,
        image: &str,
        flavor: &str,
    ) -> anyhow::Result<(String, Duration)> {
        let body = json!({"server": {
            "name": name, "imageRef": image, "flavorRef": flavor, "networks": "none",
        }});
        let began = Instant::now();
        let made = self
            .send(
                Method::POST,
                &format!("{}/servers", self.compute),
                Some(&body),
            )
            .await?;
        let id = made["server"]["id"]
            .as_str()
            .context("a server without an id")?
            .to_owned();
        let url = format!("{}/servers/{id}", self.compute);
        loop {
            let server = self.send(Method::GET, &url, None).await?;
            match server["server"]["status"].as_str() {
                Some("ACTIVE") => return Ok((id, began.elapsed())),
                // sleeps because the API has no other way to wait, and the pause is part of what is measured
                Some("BUILD") if began.elapsed() < PATIENCE => tokio::time::sleep(LOOK).await,
                other => bail!("server {id} is {other:?}: {}", server["server"]["fault"]),
            }
        }
    }

    /// Has a server do something.
    pub async fn act(&self, id: &str, action: Value) -> anyhow::Result<Value> {
        let url = format!("{}/servers/{id}/action", self.compute);
        self.send(Method::POST, &url, Some(&action)).await
    }

    /// Waits until a server is that.
    pub async fn until(&self, id: &str, status: &str) -> anyhow::Result<()> {
        let (url, began) = (format!("{}/servers/{id}", self.compute), Instant::now());
        loop {
            let server = self.send(Method::GET, &url, None).await?;
            if server["server"]["status"] == status {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                bail!("server {id} is not {status}: {server}");
            }
            // sleeps because the API has no other way to wait
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The last lines that the server has said on its serial line, on the host that it is on.
    pub async fn console(&self, id: &str) -> anyhow::Result<String> {
        let said = self.act(id, json!({"os-getConsoleOutput": {"length": 3}}));
        let said = said.await?;
        Ok(said["output"].as_str().unwrap_or_default().to_owned())
    }

    /// Has a server go to another host, and asks every `look` until it is there: what that took, as the API says it.
    pub async fn migrate(&self, id: &str, look: Duration) -> anyhow::Result<Value> {
        let live = json!({"os-migrateLive": {"host": null, "block_migration": "auto"}});
        self.act(id, live).await?;
        let url = format!("{}/os-migrations?instance_uuid={id}&limit=1", self.compute);
        let began = Instant::now();
        let uuid = loop {
            let all = self.send(Method::GET, &url, None).await?;
            let newest = &all["migrations"][0];
            match newest["status"].as_str() {
                Some("completed") => break newest["uuid"].as_str().map(str::to_owned),
                Some("error" | "failed" | "cancelled") => {
                    bail!("a migration that failed: {newest}")
                }
                _ if began.elapsed() > PATIENCE => bail!("a migration without an end: {newest}"),
                // sleeps because the API has no other way to wait
                _ => tokio::time::sleep(look).await,
            }
        };
        let uuid = uuid.context("a migration without an id")?;
        let url = format!("{}/migrations/{uuid}", self.fractus);
        Ok(self.send(Method::GET, &url, None).await?["migration"].take())
    }

    /// Deletes a server and waits until it is gone.
    pub async fn delete(&self, id: &str) -> anyhow::Result<()> {
        let url = format!("{}/servers/{id}", self.compute);
        self.send(Method::DELETE, &url, None).await?;
        let began = Instant::now();
        loop {
            let answer = self
                .client
                .get(&url)
                .header("x-auth-token", &self.token)
                .send()
                .await?;
            if answer.status() == StatusCode::NOT_FOUND {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                bail!("server {id} is still there");
            }
            // sleeps because the API has no other way to wait, and the pause is part of what is measured
            tokio::time::sleep(LOOK).await;
        }
    }

    pub async fn forget_image(&self, id: &str) -> anyhow::Result<()> {
        self.send(Method::DELETE, &format!("{}/images/{id}", self.image), None)
            .await
            .map(drop)
    }

    pub async fn forget_flavor(&self, id: &str) -> anyhow::Result<()> {
        self.send(
            Method::DELETE,
            &format!("{}/flavors/{id}", self.compute),
            None,
        )
        .await
        .map(drop)
    }
}

fn endpoint(body: &Value, kind: &str) -> anyhow::Result<String> {
    let services = body["token"]["catalog"]
        .as_array()
        .context("a token without a catalogue")?;
    let service = services.iter().find(|service| service["type"] == kind);
    let endpoints = service.and_then(|service| service["endpoints"].as_array());
    let public = endpoints
        .into_iter()
        .flatten()
        .find(|e| e["interface"] == "public");
    let url = public.and_then(|endpoint| endpoint["url"].as_str());
    Ok(url
        .with_context(|| format!("no {kind} in the catalogue"))?
        .trim_end_matches('/')
        .to_owned())
}
