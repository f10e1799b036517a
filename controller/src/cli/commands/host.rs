//! `fractus host`: the hosts that servers run on. Administrators only; what no OpenStack API has is
//! asked of `…/fractus/v1`.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::{path_segment, rows};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every host that joined, and how it is
    List,
    /// Make a one-time token with which one host joins
    JoinToken(JoinToken),
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
        Command::Remove { host } => {
            let hosts = session.list(Service::Hosts, "/hosts", "hosts").await?;
            let found = hosts
                .iter()
                .find(|known| known["id"] == host || known["hostname"] == host);
            let Some(id) = found.and_then(|known| known["id"].as_str()) else {
                return Err(CliError::NotFound {
                    kind: "host",
                    wanted: host,
                });
            };
            let path = format!("/hosts/{}", path_segment(id));
            session
                .call(Service::Hosts, Method::DELETE, &path, None)
                .await?;
            Ok(())
        }
    }
}
