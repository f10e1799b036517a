//! `fractus flavor`.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::{Kind, object, pair, path_segment, row, rows};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

pub(super) const FLAVOR: Kind = Kind {
    service: Service::Compute,
    name: "flavor",
    by_name: "/flavors?is_public=None",
    key: "flavors",
    by_id: "/flavors/{}",
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The flavors that you can use
    List,
    /// One flavor
    Show { flavor: String },
    /// Make a flavor (administrators)
    Create(Create),
    /// Delete flavors (administrators)
    Delete {
        #[arg(required = true)]
        flavors: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct Create {
    name: String,
    /// Chosen by the cloud if not given
    #[arg(long, default_value = "auto")]
    id: String,
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Memory in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    ram: u64,
    /// Root disk in GiB; 0: as large as the image
    #[arg(long, default_value_t = 0, value_name = "GIB")]
    disk: u64,
    /// Only for projects that are given access
    #[arg(long)]
    private: bool,
    /// Extra spec; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    property: Vec<(String, String)>,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "/id"),
    ("Name", "/name"),
    ("RAM", "/ram"),
    ("Disk", "/disk"),
    ("VCPUs", "/vcpus"),
    ("Is Public", "/os-flavor-access:is_public"),
];

const FIELDS: &[(&str, &str)] = &[
    ("id", "/id"),
    ("name", "/name"),
    ("vcpus", "/vcpus"),
    ("ram", "/ram"),
    ("disk", "/disk"),
    ("is_public", "/os-flavor-access:is_public"),
    ("properties", "/extra_specs"),
];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    match command {
        Command::List => {
            let flavors = session
                .list(Service::Compute, "/flavors/detail", "flavors")
                .await?;
            let (header, rows) = rows(&flavors, COLUMNS);
            output.rows(&header, rows)
        }
        Command::Show { flavor } => {
            let id = FLAVOR.id(session, &flavor).await?;
            let path = format!("/flavors/{}", path_segment(&id));
            let flavor = session.get(Service::Compute, &path).await?;
            output.fields(row(&flavor["flavor"], FIELDS))
        }
        Command::Create(create) => create.execute(session, output).await,
        Command::Delete { flavors } => {
            for flavor in flavors {
                let id = FLAVOR.id(session, &flavor).await?;
                let path = format!("/flavors/{}", path_segment(&id));
                session
                    .call(Service::Compute, Method::DELETE, &path, None)
                    .await?;
            }
            Ok(())
        }
    }
}

impl Create {
    async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let mut flavor = json!({
            "name": self.name, "vcpus": self.vcpus, "ram": self.ram, "disk": self.disk,
            "os-flavor-access:is_public": !self.private,
        });
        flavor["id"] = if self.id == "auto" {
            Value::Null
        } else {
            json!(self.id)
        };
        let body = Some(json!({ "flavor": flavor }));
        let mut made = session
            .call(Service::Compute, Method::POST, "/flavors", body)
            .await?;
        if !self.property.is_empty() {
            let id = path_segment(made["flavor"]["id"].as_str().unwrap_or_default());
            let body = Some(json!({ "extra_specs": object(&self.property) }));
            let path = format!("/flavors/{id}/os-extra_specs");
            let specs = session
                .call(Service::Compute, Method::POST, &path, body)
                .await?;
            made["flavor"]["extra_specs"] = specs["extra_specs"].clone();
        }
        output.fields(row(&made["flavor"], FIELDS))
    }
}
