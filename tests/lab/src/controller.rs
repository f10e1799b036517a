//! The controller, which runs natively in the segment.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fractus_tests::harness::{Client, Process, until};
use serde_json::json;

use crate::segment::CONTROLLER;

const PUBLIC_PORT: u16 = 8770;
const AGENTS_PORT: u16 = 8771;
const READY: Duration = Duration::from_secs(60);

/// A running `fractus serve`.
#[derive(Debug)]
pub struct Controller {
    /// Only inside the segment.
    pub url: String,
    pub password: String,
    process: Option<Process>,
    program: PathBuf,
    folder: PathBuf,
    public_port: u16,
}

impl Controller {
    /// `public_port`: 0 for the usual one.
    pub async fn start(program: &Path, folder: &Path, public_port: u16) -> Result<Self> {
        let public_port = match public_port {
            0 => PUBLIC_PORT,
            port => port,
        };
        let mut controller = Self {
            url: format!("http://127.0.0.1:{public_port}"),
            password: String::new(),
            process: None,
            program: program.to_path_buf(),
            folder: folder.to_path_buf(),
            public_port,
        };
        controller.start_again().await?;
        Ok(controller)
    }

    /// Starts it after [`Controller::kill`].
    pub async fn start_again(&mut self) -> Result<()> {
        self.start_again_with(&[]).await
    }

    /// The same, with more options.
    pub async fn start_again_with(&mut self, more: &[&str]) -> Result<()> {
        let state = self.folder.join("controller");
        let text = |text: &str| text.to_owned();
        let mut arguments = vec![
            text("serve"),
            text("--plain-http"),
            text("--state-dir"),
            state.display().to_string(),
            text("--listen"),
            format!("127.0.0.1:{}", self.public_port),
            text("--agents-listen"),
            format!("{CONTROLLER}:{AGENTS_PORT}"),
        ];
        arguments.extend(more.iter().copied().map(text));
        let log = self.folder.join("controller.log");
        let process = Process::start("controller", &self.program, &arguments, &[], &log)?;
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([])
            .build()?;
        let url = format!("{}/identity/v3", self.url);
        let answered = until("the controller answers", READY, || async {
            let answer = client.get(&url).send().await;
            answer.map(drop).map_err(|error| error.to_string())
        });
        if let Err(error) = answered.await {
            bail!("{error}\n{}", process.tail());
        }
        self.process = Some(process);
        let password = std::fs::read_to_string(state.join("admin-password"));
        self.password = password
            .context("the first admin's password")?
            .trim()
            .to_owned();
        Ok(())
    }

    pub fn kill(&mut self) {
        self.process = None;
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::tail).unwrap_or_default()
    }

    /// Where agents reach it.
    pub fn for_agents(&self) -> String {
        format!("https://{CONTROLLER}:{AGENTS_PORT}")
    }

    /// A client that is the first admin, in the project admin.
    pub async fn admin(&self) -> Result<Client> {
        Client::new(&self.url)?
            .log_in("admin", &self.password, "admin")
            .await
    }

    /// A one-time token for a host.
    pub async fn join_token(&self) -> Result<String> {
        let admin = self.admin().await?;
        let body = json!({"join_token": {"ttl_s": 600}});
        let answer = admin.post("/fractus/v1/join-tokens", body).await?;
        Ok(answer.expect_status(201)?.text("/join_token/token"))
    }

    /// Waits until so many hosts are up.
    pub async fn until_hosts_up(&self, wanted: usize) -> Result<()> {
        let admin = self.admin().await?;
        until("every host is up", READY, || async {
            let answer = admin.get("/fractus/v1/hosts").await;
            let answer = answer.map_err(|error| format!("{error:#}"))?;
            let hosts = answer.body["hosts"].as_array().cloned().unwrap_or_default();
            match hosts.iter().filter(|host| host["state"] == "up").count() {
                up if up == wanted => Ok(()),
                up => Err(format!("{up} of {wanted} up: {}", answer.body)),
            }
        })
        .await
    }

    /// The `OS_*` variables of its first admin.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("OS_AUTH_URL", format!("{}/identity/v3", self.url)),
            ("OS_USERNAME", "admin".to_owned()),
            ("OS_PASSWORD", self.password.clone()),
            ("OS_PROJECT_NAME", "admin".to_owned()),
            ("OS_USER_DOMAIN_ID", "default".to_owned()),
            ("OS_PROJECT_DOMAIN_ID", "default".to_owned()),
            ("OS_REGION_NAME", "RegionOne".to_owned()),
            ("OS_IDENTITY_API_VERSION", "3".to_owned()),
        ]
    }
}

/// A test that fails says what its controller did then.
impl Drop for Controller {
    fn drop(&mut self) {
        if std::thread::panicking() && self.process.is_some() {
            println!("{}", self.log());
        }
    }
}
