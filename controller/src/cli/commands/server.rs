//! `fractus server`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::console::{self, Attach};
use super::flavor::FLAVOR;
use super::image::{self, IMAGE};
use super::{Kind, evacuate, migration, object, pair, query_value, row, rows};
use crate::cli::CliError;
use crate::cli::output::{Output, Row};
use crate::cli::session::{Service, Session};

pub(super) const SERVER: Kind = Kind {
    service: Service::Compute,
    name: "server",
    by_name: "/servers/detail?name={}",
    key: "servers",
    by_id: "/servers/{}",
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Your servers
    List {
        /// Only those whose name matches (a regular expression)
        #[arg(long)]
        name: Option<String>,
        /// Only those with this status, such as ACTIVE
        #[arg(long)]
        status: Option<String>,
        /// Of every project (administrators)
        #[arg(long)]
        all_projects: bool,
    },
    /// One server
    Show { server: String },
    /// Make a server
    Create(Box<Create>),
    /// Delete servers, with their disks
    Delete {
        #[arg(required = true)]
        servers: Vec<String>,
        /// Also when it is locked or in the middle of something
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Start servers that are shut off
    Start(Named),
    /// Shut servers off
    Stop(Named),
    /// Restart servers
    Reboot {
        #[command(flatten)]
        named: Named,
        /// Without asking the guest first
        #[arg(long)]
        hard: bool,
    },
    /// Hold servers where they are
    Pause(Named),
    /// Let paused servers go on
    Unpause(Named),
    /// Hold servers where they are, with their memory on their hosts' disks
    Suspend(Named),
    /// Let suspended servers go on
    Resume(Named),
    /// Keep servers as images, with nothing of them on any host
    Shelve(Named),
    /// Start shelved servers again
    Unshelve {
        #[command(flatten)]
        named: Named,
        /// Where to (administrators); the scheduler chooses if not given
        #[arg(long)]
        host: Option<String>,
        #[arg(long)]
        availability_zone: Option<String>,
    },
    /// Keep servers from being changed
    Lock(Named),
    /// Let servers be changed again
    Unlock(Named),
    /// Make a server's root disk anew from an image
    Rebuild {
        server: String,
        /// The server's own if not given
        #[arg(long)]
        image: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Give a server another flavor: its guest is stopped, and started anew; then confirm, or revert
    Resize {
        server: String,
        #[arg(long)]
        flavor: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Let servers that were resized, or migrated with their guest stopped, stay so
    Confirm(Named),
    /// Let them be what they were, where they were
    Revert(Named),
    /// Images of servers' disks
    #[command(subcommand)]
    Image(Picture),
    /// Bring servers to another host, while they run or not (administrators)
    Migrate(migration::Migrate),
    /// Make servers anew on another host whose own is off, and was declared to be down (administrators); they stay off
    Evacuate(evacuate::Evacuate),
    /// Servers that go, or went, to another host or size (administrators)
    #[command(subcommand)]
    Migration(migration::Command),
    /// What the server wrote to its serial console
    #[command(visible_alias = "console-log")]
    Log {
        server: String,
        /// The last lines only
        #[arg(long)]
        lines: Option<u64>,
    },
    /// Attach this terminal to a server's serial console
    Console(Attach),
}

#[derive(Debug, Subcommand)]
pub enum Picture {
    /// Make an image of a server's root disk, as it is at one moment; the server goes on
    Create {
        server: String,
        /// Of the image; the server's own if not given
        #[arg(long)]
        name: Option<String>,
        /// Of the image; may be given several times
        #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
        property: Vec<(String, String)>,
        #[command(flatten)]
        wait: Wait,
    },
}

#[derive(Debug, Args)]
pub struct Named {
    #[arg(required = true)]
    servers: Vec<String>,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Clone, Copy, Args)]
pub struct Wait {
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
    /// Longest wait
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub struct Create {
    name: String,
    #[arg(long)]
    flavor: String,
    #[arg(long)]
    image: String,
    #[arg(long, value_name = "KEYPAIR")]
    key_name: Option<String>,
    /// File that the guest finds as its user data
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Metadata; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    property: Vec<(String, String)>,
    /// none, auto, or a network's id
    #[arg(long, default_value = "none")]
    nic: String,
    #[arg(long)]
    availability_zone: Option<String>,
    #[arg(long)]
    description: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "/id"),
    ("Name", "/name"),
    ("Status", "/status"),
    ("Task", "/OS-EXT-STS:task_state"),
    ("Image", "/image/id"),
    ("Flavor", "/flavor/original_name"),
];

const FIELDS: &[(&str, &str)] = &[
    ("id", "/id"),
    ("name", "/name"),
    ("status", "/status"),
    ("task_state", "/OS-EXT-STS:task_state"),
    ("vm_state", "/OS-EXT-STS:vm_state"),
    ("power_state", "/OS-EXT-STS:power_state"),
    ("fault", "/fault/message"),
    ("host", "/OS-EXT-SRV-ATTR:host"),
    ("availability_zone", "/OS-EXT-AZ:availability_zone"),
    ("image", "/image/id"),
    ("flavor", "/flavor"),
    ("key_name", "/key_name"),
    ("locked", "/locked"),
    ("description", "/description"),
    ("properties", "/metadata"),
    ("project_id", "/tenant_id"),
    ("user_id", "/user_id"),
    ("created", "/created"),
    ("updated", "/updated"),
    ("launched_at", "/OS-SRV-USG:launched_at"),
];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    let act = |named: Named, action: Value, wanted: Option<&'static str>| async move {
        actions(&named, &action, wanted, session, output).await
    };
    match command {
        Command::List {
            name,
            status,
            all_projects,
        } => list(name, status, all_projects, session, output).await,
        Command::Show { server } => {
            show(&SERVER.id(session, &server).await?, session, output).await
        }
        Command::Create(create) => create.execute(session, output).await,
        Command::Delete {
            servers,
            force,
            wait,
        } => delete(&servers, force, wait, session, output).await,
        Command::Start(named) => act(named, json!({"os-start": null}), Some("ACTIVE")).await,
        Command::Stop(named) => act(named, json!({"os-stop": null}), Some("SHUTOFF")).await,
        Command::Reboot { named, hard } => {
            let kind = if hard { "HARD" } else { "SOFT" };
            act(named, json!({"reboot": {"type": kind}}), Some("ACTIVE")).await
        }
        Command::Pause(named) => act(named, json!({"pause": null}), Some("PAUSED")).await,
        Command::Unpause(named) => act(named, json!({"unpause": null}), Some("ACTIVE")).await,
        Command::Suspend(named) => act(named, json!({"suspend": null}), Some("SUSPENDED")).await,
        Command::Resume(named) => act(named, json!({"resume": null}), Some("ACTIVE")).await,
        Command::Shelve(named) => {
            act(named, json!({"shelve": null}), Some("SHELVED_OFFLOADED")).await
        }
        Command::Unshelve {
            named,
            host,
            availability_zone,
        } => act(named, unshelve(host, availability_zone), Some("ACTIVE")).await,
        Command::Lock(named) => act(named, json!({"lock": null}), None).await,
        Command::Unlock(named) => act(named, json!({"unlock": null}), None).await,
        Command::Rebuild {
            server,
            image,
            wait,
        } => {
            let server = SERVER.find(session, &server).await?;
            let image = match image {
                Some(image) => IMAGE.id(session, &image).await?,
                None => server["image"]["id"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            };
            let named = Named {
                servers: vec![server["id"].as_str().unwrap_or_default().to_owned()],
                wait,
            };
            act(
                named,
                json!({"rebuild": {"imageRef": image}}),
                Some("ACTIVE"),
            )
            .await
        }
        Command::Resize {
            server,
            flavor,
            wait,
        } => {
            let flavor = FLAVOR.id(session, &flavor).await?;
            let named = Named {
                servers: vec![server],
                wait,
            };
            let body = json!({"resize": {"flavorRef": flavor}});
            act(named, body, Some("VERIFY_RESIZE")).await
        }
        Command::Confirm(named) => act(named, json!({"confirmResize": null}), Some(AT_REST)).await,
        Command::Revert(named) => act(named, json!({"revertResize": null}), Some(AT_REST)).await,
        Command::Image(picture) => picture.execute(session, output).await,
        Command::Migrate(migrate) => migrate.execute(session, output).await,
        Command::Evacuate(evacuate) => evacuate.execute(session, output).await,
        Command::Migration(command) => migration::execute(command, session, output).await,
        Command::Log { server, lines } => console::log(&server, lines, session, output).await,
        Command::Console(attach) => console::attach(attach, session, output).await,
    }
}

/// In place of a status: running, or shut off, as it was before.
const AT_REST: &str = "ACTIVE or SHUTOFF";

fn unshelve(host: Option<String>, zone: Option<String>) -> Value {
    let given = [("host", host), ("availability_zone", zone)];
    let given: serde_json::Map<String, Value> = given
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), json!(value?))))
        .collect();
    match given.is_empty() {
        true => json!({"unshelve": null}),
        false => json!({"unshelve": given}),
    }
}

async fn list(
    name: Option<String>,
    status: Option<String>,
    all_projects: bool,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let mut query: Vec<String> = Vec::new();
    query.extend(name.map(|name| format!("name={}", query_value(&name))));
    query.extend(status.map(|status| format!("status={}", query_value(&status))));
    query.extend(all_projects.then(|| "all_tenants=1".to_owned()));
    let path = format!("/servers/detail?{}", query.join("&"));
    let servers = session
        .list(Service::Compute, path.trim_end_matches('?'), "servers")
        .await?;
    let (header, rows) = rows(&servers, COLUMNS);
    output.rows(&header, rows)
}

fn fields(server: &Value) -> Row {
    row(server, FIELDS)
        .into_iter()
        .filter(|(name, value)| *name != "fault" || !value.is_null())
        .map(|(name, value)| match (name, value.as_u64()) {
            ("power_state", Some(1)) => (name, json!("Running")),
            ("power_state", Some(3)) => (name, json!("Paused")),
            ("power_state", Some(4)) => (name, json!("Shutdown")),
            ("power_state", Some(6)) => (name, json!("Crashed")),
            ("power_state", Some(0)) => (name, json!("NOSTATE")),
            _ => (name, value),
        })
        .collect()
}

async fn show(id: &str, session: &Session, output: &Output) -> Result<(), CliError> {
    let server = session
        .get(Service::Compute, &format!("/servers/{id}"))
        .await?;
    output.fields(fields(&server["server"]))
}

impl Create {
    async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let mut server = json!({
            "name": self.name,
            "flavorRef": FLAVOR.id(session, &self.flavor).await?,
            "imageRef": IMAGE.id(session, &self.image).await?,
            "networks": match self.nic.as_str() {
                word @ ("none" | "auto") => json!(word),
                network => json!([{"uuid": network}]),
            },
        });
        if let Some(path) = &self.user_data {
            let data = std::fs::read(path).map_err(|error| CliError::File {
                path: path.clone(),
                error,
            })?;
            server["user_data"] = json!(STANDARD.encode(data));
        }
        let optional = [
            ("key_name", &self.key_name),
            ("availability_zone", &self.availability_zone),
            ("description", &self.description),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                server[name] = json!(value);
            }
        }
        if !self.property.is_empty() {
            server["metadata"] = object(&self.property);
        }
        let body = Some(json!({ "server": server }));
        let made = session
            .call(Service::Compute, Method::POST, "/servers", body)
            .await?;
        let id = made["server"]["id"].as_str().unwrap_or_default().to_owned();
        if self.wait.wait {
            until(&id, "ACTIVE", self.wait.timeout, session, output).await?;
        }
        show(&id, session, output).await
    }
}

impl Picture {
    async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let Self::Create {
            server,
            name,
            property,
            wait,
        } = self;
        let server = SERVER.find(session, &server).await?;
        let text = |name: &str| server[name].as_str().unwrap_or_default().to_owned();
        let (id, name) = (text("id"), name.unwrap_or_else(|| text("name")));
        let mut image = json!({"name": name});
        if !property.is_empty() {
            image["metadata"] = object(&property);
        }
        let path = format!("/servers/{id}/action");
        let body = Some(json!({"createImage": image}));
        let made = session
            .call(Service::Compute, Method::POST, &path, body)
            .await?;
        let image = made["image_id"].as_str().unwrap_or_default().to_owned();
        if wait.wait {
            image::until_active(&image, wait.timeout, session, output).await?;
        }
        image::show(&image, session, output).await
    }
}

async fn actions(
    named: &Named,
    action: &Value,
    wanted: Option<&str>,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    for server in &named.servers {
        let id = SERVER.id(session, server).await?;
        let path = format!("/servers/{id}/action");
        session
            .call(Service::Compute, Method::POST, &path, Some(action.clone()))
            .await?;
        if let Some(wanted) = wanted.filter(|_| named.wait.wait) {
            until(&id, wanted, named.wait.timeout, session, output).await?;
        }
    }
    Ok(())
}

/// What the server has become it stays.
pub async fn confirm(
    id: &str,
    seconds: u64,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let named = Named {
        servers: vec![id.to_owned()],
        wait: Wait {
            wait: true,
            timeout: seconds,
        },
    };
    let body = json!({"confirmResize": null});
    actions(&named, &body, Some(AT_REST), session, output).await
}

async fn delete(
    servers: &[String],
    force: bool,
    wait: Wait,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let mut ids = Vec::new();
    for server in servers {
        let id = SERVER.id(session, server).await?;
        let path = format!("/servers/{id}");
        if force {
            let body = Some(json!({"forceDelete": null}));
            let path = format!("{path}/action");
            session
                .call(Service::Compute, Method::POST, &path, body)
                .await?;
        } else {
            session
                .call(Service::Compute, Method::DELETE, &path, None)
                .await?;
        }
        ids.push(id);
    }
    for id in ids.iter().filter(|_| wait.wait) {
        until(id, "DELETED", wait.timeout, session, output).await?;
    }
    Ok(())
}

/// Looks until the server has the status and nothing is under way; `DELETED` is when it is gone.
async fn until(
    id: &str,
    wanted: &str,
    seconds: u64,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let spinner = output.spinner(&format!("waiting for {id} to be {wanted}"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut pause = Duration::from_millis(20);
    loop {
        let server = match session
            .get(Service::Compute, &format!("/servers/{id}"))
            .await
        {
            Err(CliError::Refused { status: 404, .. }) if wanted == "DELETED" => break,
            other => other?,
        };
        let server = &server["server"];
        let status = server["status"].as_str().unwrap_or_default();
        let is_wanted = match wanted {
            AT_REST => ["ACTIVE", "SHUTOFF"].contains(&status),
            wanted => status == wanted,
        };
        if is_wanted && server["OS-EXT-STS:task_state"].is_null() {
            break;
        }
        if status == "ERROR" && wanted != "DELETED" {
            spinner.finish_and_clear();
            let reason = server["fault"]["message"]
                .as_str()
                .unwrap_or("no reason is given");
            return Err(CliError::Errored {
                what: id.to_owned(),
                reason: reason.to_owned(),
            });
        }
        if Instant::now() >= end {
            spinner.finish_and_clear();
            let (wanted, last) = (wanted.to_owned(), status.to_owned());
            return Err(CliError::Timeout {
                what: id.to_owned(),
                wanted,
                last,
                seconds,
            });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    }
    spinner.finish_and_clear();
    Ok(())
}
