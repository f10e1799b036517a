//! A server's serial console: its log, and the terminal attached to it live.

use clap::Args;
use http::Method;
use serde_json::json;

use super::server::SERVER;
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};
use crate::cli::terminal;

#[derive(Debug, Args)]
pub struct Attach {
    server: String,
    /// Print the URL (WebSocket, good for a few minutes) instead of attaching
    #[arg(long)]
    url: bool,
}

pub async fn log(
    server: &str,
    lines: Option<u64>,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let path = format!("/servers/{}/action", SERVER.id(session, server).await?);
    let asked = match lines {
        Some(lines) => json!({"length": lines}),
        None => json!({}),
    };
    let body = Some(json!({ "os-getConsoleOutput": asked }));
    let said = session
        .call(Service::Compute, Method::POST, &path, body)
        .await?;
    let text = said["output"].as_str().unwrap_or_default();
    output
        .raw(text.as_bytes())
        .and_then(|()| {
            output.raw(if text.ends_with('\n') || text.is_empty() {
                b""
            } else {
                b"\n"
            })
        })
        .map_err(|error| CliError::Local {
            what: "writing",
            error,
        })
}

pub async fn attach(attach: Attach, session: &Session, output: &Output) -> Result<(), CliError> {
    let id = SERVER.id(session, &attach.server).await?;
    let path = format!("/servers/{id}/remote-consoles");
    let body = Some(json!({"remote_console": {"protocol": "serial", "type": "serial"}}));
    let made = session
        .call(Service::Compute, Method::POST, &path, body)
        .await?;
    let Some(url) = made["remote_console"]["url"].as_str() else {
        return Err(CliError::Answer {
            request: format!("POST {path}"),
            what: "without a URL".to_owned(),
        });
    };
    if attach.url {
        return output.fields(vec![
            ("protocol", json!("serial")),
            ("type", json!("serial")),
            ("url", json!(url)),
        ]);
    }
    output.remark(&format!("Attached to {}; Ctrl-] detaches.", attach.server));
    let end = terminal::attach(url, &session.config).await?;
    output.remark(&format!("\r\n{end}"));
    Ok(())
}
