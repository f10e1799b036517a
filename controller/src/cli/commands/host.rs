//! `fractus host`: the hosts that servers run on. Administrators only; what no OpenStack API has is
//! asked of `…/fractus/v1`.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::{cpu, drain, evacuate, path_segment, rows};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every host that joined, and how it is
    List,
    /// One host, with the CPU that its guests may have
    Show {
        /// Name or id
        host: String,
    },
    /// What the CPUs of hosts have in common, and what each has beyond that, or lacks of what another has
    Baseline {
        /// Names or ids [default: all that take new servers]
        hosts: Vec<String>,
    },
    /// Make a one-time token with which one host joins
    JoinToken(JoinToken),
    /// Take new servers on a host again
    Enable {
        /// Name or id
        host: String,
    },
    /// Take no new servers on a host; those that are there stay
    Disable {
        /// Name or id
        host: String,
        /// Why, for whoever looks
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
    },
    /// Take no new servers on a host, and bring those that are there to others: as many at once as the controller lets go
    Drain(drain::Drain),
    /// Have the servers of a host that is off, and was declared to be down, made anew on others
    Evacuate(evacuate::OfHost),
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
        Command::Show { host } => {
            let (id, _) = find(&host, session).await?;
            let path = format!("/hosts/{}", path_segment(&id));
            let shown = session.call(Service::Hosts, Method::GET, &path, None);
            cpu::show(&shown.await?["host"], output)
        }
        Command::Baseline { hosts: wanted } => {
            let mut hosts = session.list(Service::Hosts, "/hosts", "hosts").await?;
            let is = |host: &Value, name: &String| host["id"] == *name || host["hostname"] == *name;
            if let Some(unknown) = wanted
                .iter()
                .find(|name| !hosts.iter().any(|host| is(host, name)))
            {
                return Err(no_host(unknown));
            }
            hosts.retain(|host| match wanted.is_empty() {
                true => host["disabled"] == false && host["state"] != "forced-down",
                false => wanted.iter().any(|name| is(host, name)),
            });
            cpu::compare(&hosts, output)
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
        Command::Enable { host } => {
            let (id, _) = find(&host, session).await?;
            set_enabled(&id, None, session).await
        }
        Command::Disable { host, reason } => {
            let (id, _) = find(&host, session).await?;
            set_enabled(&id, Some(&reason), session).await
        }
        Command::Drain(drain) => drain.execute(session, output).await,
        Command::Evacuate(evacuate) => evacuate.execute(session, output).await,
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

fn no_host(wanted: &str) -> CliError {
    CliError::NotFound {
        kind: "host",
        wanted: wanted.to_owned(),
    }
}

/// Its id and name.
pub async fn find(host: &str, session: &Session) -> Result<(String, String), CliError> {
    let hosts = session.list(Service::Hosts, "/hosts", "hosts").await?;
    let text = |known: &Value, name: &str| known[name].as_str().unwrap_or_default().to_owned();
    let found = hosts
        .iter()
        .find(|known| known["id"] == host || known["hostname"] == host);
    let found = found.ok_or_else(|| no_host(host))?;
    Ok((text(found, "id"), text(found, "hostname")))
}

/// Whether it takes new servers; with a reason: it does not.
pub async fn set_enabled(
    id: &str,
    disabled: Option<&str>,
    session: &Session,
) -> Result<(), CliError> {
    let body = match disabled {
        None => json!({"status": "enabled"}),
        Some("") => json!({"status": "disabled"}),
        Some(reason) => json!({"status": "disabled", "disabled_reason": reason}),
    };
    let path = format!("/os-services/{}", path_segment(id));
    let set = session.call(Service::Compute, Method::PUT, &path, Some(body));
    set.await.map(|_| ())
}
