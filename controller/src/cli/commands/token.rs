//! `fractus token`, `fractus catalog`.

use clap::Subcommand;
use serde_json::{Value, json};

use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::Session;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Log in and print the token
    Issue,
}

#[derive(Debug, Subcommand)]
pub enum Catalog {
    /// The services and their endpoints
    List,
}

pub async fn token(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    let Command::Issue = command;
    let token = session.token().await?;
    let field = |pointer: &str| token.body.pointer(pointer).cloned().unwrap_or(Value::Null);
    output.fields(vec![
        ("expires", field("/expires_at")),
        ("id", json!(token.id)),
        ("project_id", field("/project/id")),
        ("user_id", field("/user/id")),
    ])
}

pub async fn catalog(command: Catalog, session: &Session, output: &Output) -> Result<(), CliError> {
    let Catalog::List = command;
    let token = session.token().await?;
    let entries = token.body["catalog"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let rows = entries
        .iter()
        .map(|entry| {
            let endpoints: Vec<String> = entry["endpoints"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|endpoint| {
                    let part = |name: &str| endpoint[name].as_str().unwrap_or_default().to_owned();
                    format!(
                        "{} {}: {}",
                        part("region_id"),
                        part("interface"),
                        part("url")
                    )
                })
                .collect();
            vec![
                ("Name", entry["name"].clone()),
                ("Type", entry["type"].clone()),
                ("Endpoints", json!(endpoints.join("\n"))),
            ]
        })
        .collect();
    output.rows(&["Name", "Type", "Endpoints"], rows)
}
