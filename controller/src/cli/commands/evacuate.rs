//! `fractus server evacuate` and `fractus host evacuate`: servers of a host that is off are made anew on others.
//! Administrators only.

use std::time::Duration;

use clap::Args;
use http::Method;
use serde_json::{Value, json};

use super::migration::arrived;
use super::server::{SERVER, Wait};
use super::{path_segment, query_value};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Args)]
pub struct Evacuate {
    #[arg(required = true)]
    servers: Vec<String>,
    /// Where to; the scheduler chooses if not given
    #[arg(long)]
    host: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Args)]
pub struct OfHost {
    /// Name or id
    host: String,
    /// Where to; the scheduler chooses if not given
    #[arg(long)]
    to: Option<String>,
    /// Declare the host to be down first: it is off for certain, and what it ran does not run any more
    #[arg(long)]
    is_off: bool,
    /// Start those again that ran (from 2.95 of the compute API on they stay off)
    #[arg(long)]
    start: bool,
    /// Longest wait for one server
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
}

impl Evacuate {
    pub async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let mut ids = Vec::new();
        for server in &self.servers {
            let id = SERVER.id(session, server).await?;
            begin(&id, self.host.as_deref(), session).await?;
            ids.push(id);
        }
        for id in ids.iter().filter(|_| self.wait.wait) {
            arrived(id, self.wait.timeout, session, output).await?;
        }
        Ok(())
    }
}

/// Asks that the server is made anew elsewhere.
async fn begin(id: &str, host: Option<&str>, session: &Session) -> Result<(), CliError> {
    let body = match host {
        Some(host) => json!({"evacuate": {"host": host}}),
        None => json!({"evacuate": {}}),
    };
    act(id, body, session).await
}

async fn act(id: &str, body: Value, session: &Session) -> Result<(), CliError> {
    let path = format!("/servers/{id}/action");
    let asked = session.call(Service::Compute, Method::POST, &path, Some(body));
    asked.await.map(|_| ())
}

/// How often a server is asked for that has not come anywhere.
const TRIES: u32 = 3;
/// Before it is asked for again.
const AGAIN: Duration = Duration::from_secs(1);

impl OfHost {
    /// All are asked for first, so that they go at once. Those that did not come anywhere are asked for again, and named if
    /// they stay.
    pub async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let (id, name) = super::host::find(&self.host, session).await?;
        if self.is_off {
            let path = format!("/os-services/{}", path_segment(&id));
            let down = Some(json!({"forced_down": true}));
            session
                .call(Service::Compute, Method::PUT, &path, down)
                .await?;
        }
        let path = format!("/servers/detail?all_tenants=1&host={}", query_value(&name));
        let servers = session.list(Service::Compute, &path, "servers").await?;
        let all = servers.len();
        let mut servers: Vec<_> = servers.into_iter().map(|server| (server, false)).collect();
        for tries in 1..=TRIES {
            let is_last = tries == TRIES;
            servers = self.bring(servers, is_last, session, output).await?;
            if servers.is_empty() || is_last {
                break;
            }
            tokio::time::sleep(AGAIN).await;
        }
        if servers.is_empty() {
            return Ok(());
        }
        let stay = servers.len();
        Err(CliError::NotEmpty {
            host: name,
            reason: format!("{stay} of its {all} servers are not elsewhere"),
        })
    }

    /// Each as it was before, and whether it is on its way, only slow; answers those that have not come anywhere.
    async fn bring(
        &self,
        servers: Vec<(Value, bool)>,
        is_last: bool,
        session: &Session,
        output: &Output,
    ) -> Result<Vec<(Value, bool)>, CliError> {
        let mut begun = Vec::new();
        for (server, goes) in &servers {
            begun.push(match goes {
                true => Ok(()),
                false => begin(text(server, "id"), self.to.as_deref(), session).await,
            });
        }
        let (mut stay, all) = (Vec::new(), servers.len());
        for (n, ((server, _), begun)) in servers.into_iter().zip(begun).enumerate() {
            let (id, name) = (text(&server, "id"), text(&server, "name"));
            let shown = format!("{} of {all}: {id} ({name})", n + 1);
            let went = match begun {
                Ok(()) => self.follow(&server, session, output).await,
                // It is not there any more.
                Err(CliError::Refused { status: 404, .. }) => continue,
                Err(error) => Err(error),
            };
            match went {
                Ok(to) => output.remark(&format!("{shown}: is on {to}")),
                Err(
                    error @ (CliError::Errored { .. }
                    | CliError::Stayed { .. }
                    | CliError::Timeout { .. }
                    | CliError::Refused { .. }),
                ) => {
                    // Asked for again it would begin anew.
                    let goes = matches!(error, CliError::Timeout { .. });
                    let again = match (is_last, goes) {
                        (true, _) => "",
                        (false, true) => "is waited for: ",
                        (false, false) => "is asked for again: ",
                    };
                    output.remark(&format!("{shown}: {again}{error}"));
                    stay.push((server, goes));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(stay)
    }

    /// Until it is elsewhere, and runs if it is to; where it is.
    async fn follow(
        &self,
        server: &Value,
        session: &Session,
        output: &Output,
    ) -> Result<String, CliError> {
        let id = text(server, "id");
        let to = arrived(id, self.timeout, session, output).await?;
        if self.start && ran(server) {
            let path = format!("/servers/{id}");
            let now = session.get(Service::Compute, &path).await?;
            // Where an older version was asked for, it runs already.
            if text(&now["server"], "status") == "SHUTOFF" {
                act(id, json!({"os-start": null}), session).await?;
            }
        }
        Ok(to)
    }
}

/// Its guest ran, whatever was done to it, when its host was off.
fn ran(server: &Value) -> bool {
    let has_power = server["OS-EXT-STS:power_state"] == 1;
    match text(server, "status") {
        "ACTIVE" => true,
        "REBOOT" | "HARD_REBOOT" | "MIGRATING" => has_power,
        _ => false,
    }
}

fn text<'a>(item: &'a Value, name: &str) -> &'a str {
    item[name].as_str().unwrap_or_default()
}
