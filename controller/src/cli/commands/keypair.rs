//! `fractus keypair`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use http::Method;
use serde_json::json;

use super::{path_segment, row, rows};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Your keypairs
    List,
    /// One keypair
    Show { name: String },
    /// Hand in a public key
    Create(Create),
    /// Delete keypairs
    Delete {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct Create {
    name: String,
    /// File with the public key
    #[arg(long, value_name = "FILE")]
    public_key: PathBuf,
}

const COLUMNS: &[(&str, &str)] = &[
    ("Name", "/keypair/name"),
    ("Fingerprint", "/keypair/fingerprint"),
    ("Type", "/keypair/type"),
];
const FIELDS: &[(&str, &str)] = &[
    ("name", "/keypair/name"),
    ("fingerprint", "/keypair/fingerprint"),
    ("type", "/keypair/type"),
    ("user_id", "/keypair/user_id"),
    ("created_at", "/keypair/created_at"),
    ("public_key", "/keypair/public_key"),
];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    match command {
        Command::List => {
            let keypairs = session
                .list(Service::Compute, "/os-keypairs", "keypairs")
                .await?;
            let (header, rows) = rows(&keypairs, COLUMNS);
            output.rows(&header, rows)
        }
        Command::Show { name } => {
            let path = format!("/os-keypairs/{}", path_segment(&name));
            output.fields(row(&session.get(Service::Compute, &path).await?, FIELDS))
        }
        Command::Create(Create { name, public_key }) => {
            let key = std::fs::read_to_string(&public_key).map_err(|error| CliError::File {
                path: public_key,
                error,
            })?;
            let body = json!({"keypair": {"name": name, "public_key": key.trim()}});
            let made = session
                .call(Service::Compute, Method::POST, "/os-keypairs", Some(body))
                .await?;
            output.fields(row(&made, &FIELDS[..4]))
        }
        Command::Delete { names } => {
            for name in names {
                let path = format!("/os-keypairs/{}", path_segment(&name));
                session
                    .call(Service::Compute, Method::DELETE, &path, None)
                    .await?;
            }
            Ok(())
        }
    }
}
