//! `fractus server migrate` and `fractus server migration`: servers that go to another host, while their guests run or
//! not.
//! Administrators only.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use http::Method;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::server::{SERVER, Wait};
use super::{path_segment, query_value, report, rows};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Args)]
pub struct Migrate {
    #[arg(required = true)]
    servers: Vec<String>,
    /// Where to; the scheduler chooses if not given
    #[arg(long)]
    host: Option<String>,
    /// Stop its guest for it, and start it anew there; then confirm that it stays, or revert
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Migrations, the newest first
    List {
        /// Only those of this server
        #[arg(long)]
        server: Option<String>,
        /// Only those from or to this host
        #[arg(long)]
        host: Option<String>,
        /// Only those with this status, such as running
        #[arg(long)]
        status: Option<String>,
    },
    /// One migration: how far it is, and what it took
    Show {
        /// Its id or number
        migration: String,
    },
    /// Let the guest stay where it is
    Abort {
        /// Its id or number
        migration: String,
    },
    /// Stop the guest for as long as the rest takes, or let it go on there while its memory is still coming, where it may
    ForceComplete {
        /// Its id or number
        migration: String,
    },
}

const COLUMNS: &[(&str, &str)] = &[
    ("Number", "/id"),
    ("ID", "/uuid"),
    ("Server", "/instance_uuid"),
    ("Type", "/migration_type"),
    ("From", "/source_compute"),
    ("To", "/dest_compute"),
    ("Status", "/status"),
    ("Created", "/created_at"),
    ("Updated", "/updated_at"),
];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    match command {
        Command::List {
            server,
            host,
            status,
        } => {
            let mut query: Vec<String> = Vec::new();
            if let Some(server) = server {
                query.push(format!(
                    "instance_uuid={}",
                    SERVER.id(session, &server).await?
                ));
            }
            query.extend(host.map(|host| format!("host={}", query_value(&host))));
            query.extend(status.map(|status| format!("status={}", query_value(&status))));
            let path = format!("/os-migrations?{}", query.join("&"));
            let found = session
                .list(Service::Compute, path.trim_end_matches('?'), "migrations")
                .await?;
            let (header, rows) = rows(&found, COLUMNS);
            output.rows(&header, rows)
        }
        Command::Show { migration } => report::show(&find(session, &migration).await?, output),
        Command::Abort { migration } => {
            let path = path_of(&find(session, &migration).await?);
            let aborted = session.call(Service::Compute, Method::DELETE, &path, None);
            aborted.await.map(|_| ())
        }
        Command::ForceComplete { migration } => {
            let path = format!("{}/action", path_of(&find(session, &migration).await?));
            let body = Some(json!({"force_complete": null}));
            let forced = session.call(Service::Compute, Method::POST, &path, body);
            forced.await.map(|_| ())
        }
    }
}

fn text<'a>(item: &'a Value, name: &str) -> &'a str {
    item[name].as_str().unwrap_or_default()
}

fn path_of(migration: &Value) -> String {
    format!(
        "/servers/{}/migrations/{}",
        text(migration, "server_id"),
        migration["number"]
    )
}

/// All that is known of one, by its id or number.
async fn find(session: &Session, wanted: &str) -> Result<Value, CliError> {
    let path = format!("/migrations/{}", path_segment(wanted));
    match session.get(Service::Hosts, &path).await {
        Ok(mut whole) => Ok(whole["migration"].take()),
        Err(CliError::Refused { status: 404, .. }) => Err(CliError::NotFound {
            kind: "migration",
            wanted: wanted.to_owned(),
        }),
        Err(error) => Err(error),
    }
}

impl Migrate {
    pub async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let mut ids = Vec::new();
        for server in &self.servers {
            let id = SERVER.id(session, server).await?;
            match self.cold {
                true => begin_cold(&id, self.host.as_deref(), session).await?,
                false => begin(&id, self.host.as_deref(), session).await?,
            }
            ids.push(id);
        }
        for id in ids.iter().filter(|_| self.wait.wait) {
            arrived(id, self.wait.timeout, session, output).await?;
        }
        Ok(())
    }
}

/// Asks that the guest goes.
pub async fn begin(id: &str, host: Option<&str>, session: &Session) -> Result<(), CliError> {
    let body = json!({"os-migrateLive": {"host": host, "block_migration": "auto"}});
    let path = format!("/servers/{id}/action");
    let begun = session.call(Service::Compute, Method::POST, &path, Some(body));
    begun.await.map(|_| ())
}

/// Asks that the server goes, with its guest stopped.
pub async fn begin_cold(id: &str, host: Option<&str>, session: &Session) -> Result<(), CliError> {
    let given = host.map(|host| json!({"host": host}));
    let path = format!("/servers/{id}/action");
    let body = Some(json!({"migrate": given}));
    let begun = session.call(Service::Compute, Method::POST, &path, body);
    begun.await.map(|_| ())
}

/// How far a migration is, by its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Its turn has not come yet.
    Waits,
    UnderWay,
    Arrived,
    /// It has not come about.
    Ended,
}

impl Course {
    pub fn of(status: &str) -> Self {
        match status {
            "accepted" | "queued" => Self::Waits,
            "completed" | "done" | "finished" | "confirmed" => Self::Arrived,
            "error" | "failed" | "cancelled" | "reverted" => Self::Ended,
            _ => Self::UnderWay,
        }
    }
}

/// The server's newest migration.
pub async fn newest(id: &str, session: &Session) -> Result<Value, CliError> {
    let path = format!("/os-migrations?instance_uuid={id}&limit=1");
    let mut found = session.get(Service::Compute, &path).await?;
    Ok(found["migrations"][0].take())
}

/// Why it did not come about.
pub async fn reason(migration: &Value, session: &Session) -> Result<String, CliError> {
    let path = format!("/migrations/{}", text(migration, "uuid"));
    let whole = session.get(Service::Hosts, &path).await?;
    let reason = whole["migration"]["reason"].as_str();
    Ok(reason.unwrap_or(text(migration, "status")).to_owned())
}

/// Bytes that are elsewhere, of how many; none: they are not known.
pub async fn progress(migration: &Value, session: &Session) -> Option<(u64, u64)> {
    let path = format!("/migrations/{}", text(migration, "uuid"));
    let whole = session.get(Service::Hosts, &path).await.ok()?;
    there(&whole["migration"]["progress"])
}

/// Looks until the server's newest migration has ended; where the guest is then.
pub async fn arrived(
    id: &str,
    seconds: u64,
    session: &Session,
    output: &Output,
) -> Result<String, CliError> {
    let mut bar = output.spinner(&format!("waiting for {id} to be elsewhere"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut pause = Duration::from_millis(50);
    let ended = loop {
        let newest = newest(id, session).await?;
        match Course::of(text(&newest, "status")) {
            Course::Arrived => break Ok(text(&newest, "dest_compute").to_owned()),
            Course::Ended => {
                break Err(CliError::Stayed {
                    server: id.to_owned(),
                    reason: reason(&newest, session).await?,
                });
            }
            _ if Instant::now() >= end => {
                break Err(CliError::Timeout {
                    what: format!("the migration of {id}"),
                    wanted: "completed".to_owned(),
                    last: text(&newest, "status").to_owned(),
                    seconds,
                });
            }
            Course::Waits | Course::UnderWay => {}
        }
        // For the eye alone.
        if output.has_bars()
            && let Some(progress) = progress(&newest, session).await
        {
            follow(&mut bar, id, progress, output);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    };
    bar.finish_and_clear();
    ended
}

/// How much of the guest's memory and disks its new host has, of how much; a guest that writes makes that less again.
fn there(progress: &Value) -> Option<(u64, u64)> {
    let sum = |names: [&str; 2]| -> u64 {
        let numbers = names.map(|name| progress[name].as_u64());
        numbers.iter().flatten().sum()
    };
    let total = sum(["memory_total", "disk_total"]);
    let left = sum(["memory_left", "disk_left"]);
    (total > 0).then(|| (total.saturating_sub(left), total))
}

fn follow(bar: &mut ProgressBar, id: &str, (there, total): (u64, u64), output: &Output) {
    if bar.length().is_none() {
        bar.finish_and_clear();
        *bar = output.bar(Some(total), id);
        bar.enable_steady_tick(Duration::from_millis(120));
    }
    bar.set_length(total);
    bar.set_position(there);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_all_but_what_is_left() {
        let progress =
            json!({"memory_total": 100, "memory_left": 30, "disk_total": 50, "disk_left": 0});
        assert_eq!(there(&progress), Some((120, 150)));
        let wild = json!({"memory_total": 100, "memory_left": 130});
        assert_eq!(there(&wild), Some((0, 100)));
        let begun = json!({"memory_total": 0, "memory_left": 0, "disk_total": 0, "disk_left": 0});
        assert_eq!(there(&begun), None);
        assert_eq!(there(&Value::Null), None);
    }
}
