//! The commands, one file a noun, and what they share: finding things by name or id, waiting.

pub mod console;
mod cpu;
pub mod drain;
pub mod evacuate;
pub mod flavor;
pub mod host;
pub mod image;
pub mod keypair;
pub mod machine;
pub mod migration;
mod report;
pub mod server;
pub mod token;

use serde_json::Value;

use super::CliError;
use super::arguments::Command;
use super::output::{Output, Row};
use super::session::{Service, Session};

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    match command {
        Command::Token(command) => token::token(command, session, output).await,
        Command::Catalog(command) => token::catalog(command, session, output).await,
        Command::Image(command) => image::execute(command, session, output).await,
        Command::Flavor(command) => flavor::execute(command, session, output).await,
        Command::Keypair(command) => keypair::execute(command, session, output).await,
        Command::Server(command) => server::execute(*command, session, output).await,
        Command::Console(attach) => console::attach(attach, session, output).await,
        Command::Host(command) => host::execute(command, session, output).await,
        Command::Machine(command) => machine::execute(command, session, output).await,
        // Carried out before there was a session, or (the controller) instead of it.
        Command::Completions { .. } | Command::Man { .. } | Command::Serve(_) => Ok(()),
    }
}

/// A kind of thing that can be named by its name or its id.
struct Kind {
    service: Service,
    /// As the user knows it: `server`.
    name: &'static str,
    /// The list's path and the key of its items; `{}` stands for the name as a query value.
    by_name: &'static str,
    key: &'static str,
    /// Path of one, `{}` stands for the id.
    by_id: &'static str,
}

impl Kind {
    /// The thing itself. By id when it looks like one or such an id exists, else by name.
    async fn find(&self, session: &Session, wanted: &str) -> Result<Value, CliError> {
        let looks_like_id = uuid::Uuid::try_parse(wanted).is_ok();
        if looks_like_id && let Some(found) = self.by_id(session, wanted).await? {
            return Ok(found);
        }
        let path = self.by_name.replace("{}", &query_value(wanted));
        let mut named: Vec<Value> = session
            .list(self.service, &path, self.key)
            .await?
            .into_iter()
            .filter(|item| item["name"] == wanted)
            .collect();
        match named.len() {
            1 => Ok(named.remove(0)),
            0 => match self.by_id(session, wanted).await? {
                Some(found) if !looks_like_id => Ok(found),
                _ => Err(CliError::NotFound {
                    kind: self.name,
                    wanted: wanted.to_owned(),
                }),
            },
            count => Err(CliError::Ambiguous {
                kind: self.name,
                wanted: wanted.to_owned(),
                count,
                ids: named
                    .iter()
                    .filter_map(|item| item["id"].as_str())
                    .map(str::to_owned)
                    .collect(),
            }),
        }
    }

    async fn by_id(&self, session: &Session, id: &str) -> Result<Option<Value>, CliError> {
        let path = self.by_id.replace("{}", &path_segment(id));
        match session.get(self.service, &path).await {
            Ok(mut found) => {
                let inner = found.get_mut(self.name).map(Value::take);
                Ok(Some(inner.unwrap_or(found)))
            }
            Err(CliError::Refused {
                status: 400 | 404, ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn id(&self, session: &Session, wanted: &str) -> Result<String, CliError> {
        Ok(self.find(session, wanted).await?["id"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }
}

/// A string as one value of a query.
fn query_value(text: &str) -> String {
    escape(text, b"-_.~")
}

/// A string as one part of a path.
fn path_segment(text: &str) -> String {
    escape(text, b"-_.~:@")
}

fn escape(text: &str, kept: &[u8]) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || kept.contains(&byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// Some fields of a thing under the names that a table shows.
fn row(item: &Value, columns: &[(&'static str, &str)]) -> Row {
    columns
        .iter()
        .map(|(column, pointer)| {
            (
                *column,
                item.pointer(pointer).cloned().unwrap_or(Value::Null),
            )
        })
        .collect()
}

fn rows(items: &[Value], columns: &[(&'static str, &str)]) -> (Vec<&'static str>, Vec<Row>) {
    let header = columns.iter().map(|(column, _)| *column).collect();
    (
        header,
        items.iter().map(|item| row(item, columns)).collect(),
    )
}

/// `KEY=VALUE`, as of `--property`.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("should be KEY=VALUE".to_owned()),
    }
}

fn object(pairs: &[(String, String)]) -> Value {
    let fields = pairs
        .iter()
        .map(|(key, value)| (key.clone(), Value::String(value.clone())));
    Value::Object(fields.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_signs_stay_one_value() {
        assert_eq!(query_value("a b&c=ü"), "a%20b%26c%3D%C3%BC");
        assert_eq!(path_segment("a/b"), "a%2Fb");
    }

    #[test]
    fn a_property_needs_a_key() {
        assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(pair("=b").is_err() && pair("a").is_err());
    }
}
