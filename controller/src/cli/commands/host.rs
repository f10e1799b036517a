//! `fractus host`: the hosts that servers run on. Administrators only; what no OpenStack API has is
//! asked of `…/fractus/v1`.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::{migration, path_segment, query_value, rows};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every host that joined, and how it is
    List,
    /// Make a one-time token with which one host joins
    JoinToken(JoinToken),
    /// Take no new servers on a host, and bring those that run there to others, one after the other
    Drain {
        /// Name or id
        host: String,
        /// Longest wait for one server
        #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
        timeout: u64,
    },
    /// End a host's membership: its certificate is refused from now on
    Remove {
        /// Name or id
        host: String,
    },
}

#[derive(Debug, Args)]
pub struct JoinToken {
    /// How long the token can be used
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    ttl: u64,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "/id"),
    ("Name", "/hostname"),
    ("State", "/state"),
    ("CPUs", "/cpus"),
    ("Memory MiB", "/memory_mib"),
    ("Agent", "/agent_version"),
    ("Endpoint", "/endpoint"),
    ("Seen", "/seen_at"),
];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    match command {
        Command::List => {
            let hosts = session.list(Service::Hosts, "/hosts", "hosts").await?;
            let (header, rows) = rows(&hosts, COLUMNS);
            output.rows(&header, rows)
        }
        Command::JoinToken(JoinToken { ttl }) => {
            let body = json!({"join_token": {"ttl_s": ttl}});
            let made = session
                .call(Service::Hosts, Method::POST, "/join-tokens", Some(body))
                .await?;
            let Value::Object(fields) = &made["join_token"] else {
                return Err(CliError::Answer {
                    request: "POST /join-tokens".to_owned(),
                    what: "without a join_token".to_owned(),
                });
            };
            let known = ["token", "expires_at", "controller"];
            let row = known
                .into_iter()
                .filter_map(|name| Some((name, fields.get(name)?.clone())))
                .collect();
            output.fields(row)?;
            output.remark("On the host: fractus-agent join --help says how to use the token.");
            Ok(())
        }
        Command::Drain { host, timeout } => drain(&host, timeout, session, output).await,
        Command::Remove { host } => {
            let (id, _) = find(&host, session).await?;
            let path = format!("/hosts/{}", path_segment(&id));
            session
                .call(Service::Hosts, Method::DELETE, &path, None)
                .await?;
            Ok(())
        }
    }
}

/// Its id and name.
async fn find(host: &str, session: &Session) -> Result<(String, String), CliError> {
    let hosts = session.list(Service::Hosts, "/hosts", "hosts").await?;
    let text = |known: &Value, name: &str| known[name].as_str().unwrap_or_default().to_owned();
    let found = hosts
        .iter()
        .find(|known| known["id"] == host || known["hostname"] == host);
    let found = found.ok_or_else(|| CliError::NotFound {
        kind: "host",
        wanted: host.to_owned(),
    })?;
    Ok((text(found, "id"), text(found, "hostname")))
}

/// Servers that cannot go while they run are named, and stay.
async fn drain(
    host: &str,
    timeout: u64,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let (id, name) = find(host, session).await?;
    let disabled = json!({"status": "disabled", "disabled_reason": "it is drained"});
    let path = format!("/os-services/{}", path_segment(&id));
    session
        .call(Service::Compute, Method::PUT, &path, Some(disabled))
        .await?;
    let path = format!("/servers/detail?all_tenants=1&host={}", query_value(&name));
    let servers = session.list(Service::Compute, &path, "servers").await?;
    let mut stay = 0;
    for (n, server) in servers.iter().enumerate() {
        let text = |name: &str| server[name].as_str().unwrap_or_default();
        let (id, status) = (text("id"), text("status"));
        let shown = format!("{} of {}: {id} ({})", n + 1, servers.len(), text("name"));
        let gone = match status {
            "ACTIVE" | "PAUSED" => migration::begin(id, None, session).await,
            // It is on its way already.
            "MIGRATING" => Ok(()),
            status => {
                output.remark(&format!("{shown}: is {status}, and stays"));
                stay += 1;
                continue;
            }
        };
        let gone = match gone {
            Ok(()) => migration::arrived(id, timeout, session, output).await,
            Err(error) => Err(error),
        };
        match gone {
            Ok(to) => output.remark(&format!("{shown}: went to {to}")),
            Err(error @ (CliError::Errored { .. } | CliError::Refused { .. })) => {
                output.remark(&format!("{shown}: stays: {error}"));
                stay += 1;
            }
            Err(error) => return Err(error),
        }
    }
    if stay == 0 {
        return Ok(());
    }
    Err(CliError::Errored {
        what: format!("host {name}"),
        reason: format!("{stay} of its {} servers are there still", servers.len()),
    })
}
