//! `fractus host`: the hosts that servers run on. Administrators only; what no OpenStack API has is
//! asked of `…/fractus/v1`.

use std::collections::BTreeSet;

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::{cpu, evacuate, migration, path_segment, query_value, rows, server};
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
    /// Take no new servers on a host, and bring those that run there to others, one after the other
    Drain {
        /// Name or id
        host: String,
        /// Longest wait for one server
        #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
        timeout: u64,
    },
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
        Command::Drain { host, timeout } => drain(&host, timeout, session, output).await,
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
    let (mut seen, mut stay) = (BTreeSet::new(), 0);
    let mut is_last = false;
    loop {
        let servers = session.list(Service::Compute, &path, "servers").await?;
        let new = servers
            .iter()
            .filter(|server| seen.insert(text(server, "id").to_owned()));
        let new: Vec<&Value> = new.collect();
        for (n, server) in new.iter().enumerate() {
            let shown = format!(
                "{} of {}: {} ({})",
                n + 1,
                new.len(),
                text(server, "id"),
                text(server, "name")
            );
            match leave(server, timeout, session, output).await? {
                Left::For(to) => output.remark(&format!("{shown}: went to {to}")),
                Left::Stays(why) => {
                    output.remark(&format!("{shown}: {why}"));
                    stay += 1;
                }
            }
        }
        // What was on its way here when the host was disabled arrives all the same: it is in the list that is asked for
        // after it has.
        let arrived = arrivals(&name, timeout, session, output).await?;
        match new.is_empty() && !arrived {
            true if is_last => break,
            quiet => is_last = quiet,
        }
    }
    let kept = kept_disks(&name, session, output).await?;
    if stay + kept == 0 {
        return Ok(());
    }
    Err(CliError::NotEmpty {
        host: name.clone(),
        reason: format!(
            "{stay} of its {} servers are there still, and disks of {kept} others",
            seen.len()
        ),
    })
}

fn text<'a>(item: &'a Value, name: &str) -> &'a str {
    item[name].as_str().unwrap_or_default()
}

enum Left {
    For(String),
    Stays(String),
}

/// Brings one server to another host.
async fn leave(
    server: &Value,
    timeout: u64,
    session: &Session,
    output: &Output,
) -> Result<Left, CliError> {
    let id = text(server, "id");
    let gone = match text(server, "status") {
        "ACTIVE" | "PAUSED" => migration::begin(id, None, session).await,
        "SHUTOFF" => migration::begin_cold(id, None, session).await,
        // It is on its way already.
        "MIGRATING" => Ok(()),
        status => return Ok(Left::Stays(format!("is {status}, and stays"))),
    };
    let gone = match gone {
        Ok(()) => migration::arrived(id, timeout, session, output).await,
        Err(error) => Err(error),
    };
    let gone = match gone {
        // This host keeps its disk until then.
        Ok(to) if text(server, "status") == "SHUTOFF" => {
            let confirmed = server::confirm(id, timeout, session, output).await;
            confirmed.map(|()| to)
        }
        gone => gone,
    };
    match gone {
        Ok(to) => Ok(Left::For(to)),
        Err(
            error @ (CliError::Errored { .. } | CliError::Stayed { .. } | CliError::Refused { .. }),
        ) => Ok(Left::Stays(format!("stays: {error}"))),
        Err(error) => Err(error),
    }
}

/// Names the servers that are elsewhere, and may still come back to the disk that they have left here; answers how many.
async fn kept_disks(name: &str, session: &Session, output: &Output) -> Result<usize, CliError> {
    let path = format!("/os-migrations?host={}&status=finished", query_value(name));
    let all = session.list(Service::Compute, &path, "migrations").await?;
    let left = all.iter().filter(|migration| {
        text(migration, "source_compute") == name && text(migration, "dest_compute") != name
    });
    let mut kept = 0;
    for migration in left {
        output.remark(&format!(
            "{} is on {}, and its disk is here until it is confirmed or reverted",
            text(migration, "instance_uuid"),
            text(migration, "dest_compute")
        ));
        kept += 1;
    }
    Ok(kept)
}

/// Waits until what is on its way to the host is there, or will not come; false if nothing was.
async fn arrivals(
    name: &str,
    timeout: u64,
    session: &Session,
    output: &Output,
) -> Result<bool, CliError> {
    let path = format!("/os-migrations?host={}", query_value(name));
    let all = session.list(Service::Compute, &path, "migrations").await?;
    let coming = all.iter().filter(|migration| {
        let under_way = [
            "accepted",
            "preparing",
            "running",
            "pre-migrating",
            "migrating",
            "post-migrating",
        ]
        .contains(&text(migration, "status"));
        under_way && text(migration, "dest_compute") == name
    });
    let mut any = false;
    for migration in coming {
        any = true;
        match migration::arrived(text(migration, "instance_uuid"), timeout, session, output).await {
            Ok(_) | Err(CliError::Stayed { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(any)
}
