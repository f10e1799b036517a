//! What can go wrong for someone at a terminal, each with what to do about it.

use std::path::PathBuf;
use std::process::ExitCode;

use miette::Diagnostic;
use thiserror::Error;

#[derive(Debug, Error, Diagnostic)]
pub enum CliError {
    #[error("no cloud is named")]
    #[diagnostic(help(
        "set OS_CLOUD to a cloud of clouds.yaml, or OS_AUTH_URL, OS_USERNAME, OS_PASSWORD and \
         OS_PROJECT_NAME; `scripts/up --env` prints them for a cloud that it started"
    ))]
    NoCloud,
    #[error("there is no cloud {name:?} in {}", places.join(", "))]
    #[diagnostic(help("clouds that are there: {}", if known.is_empty() { "none".to_owned() } else { known.join(", ") }))]
    UnknownCloud {
        name: String,
        places: Vec<String>,
        known: Vec<String>,
    },
    #[error("{what}")]
    #[diagnostic(help("{help}"))]
    Configuration { what: String, help: String },
    #[error("reading {}: {error}", path.display())]
    #[diagnostic(help("the file must be there and readable"))]
    File {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("{what}: {error}")]
    Local {
        what: &'static str,
        error: std::io::Error,
    },
    #[error("{url} cannot be reached: {detail}")]
    #[diagnostic(help("{help}"))]
    Unreachable {
        url: String,
        detail: String,
        help: &'static str,
    },
    #[error("logging in failed: {message}")]
    #[diagnostic(help("check user name, password, project and their domains; {hint}"))]
    Login { message: String, hint: String },
    #[error("the cloud offers no {service} service in region {region}")]
    #[diagnostic(help("`fractus catalog list` shows what it offers"))]
    NoService { service: String, region: String },
    #[error("there is no {kind} {wanted:?}")]
    #[diagnostic(help("`fractus {kind} list` shows what you can see"))]
    NotFound { kind: &'static str, wanted: String },
    #[error("{count} {kind}s have the name {wanted:?}")]
    #[diagnostic(help("name it by its id: {}", ids.join(", ")))]
    Ambiguous {
        kind: &'static str,
        wanted: String,
        count: usize,
        ids: Vec<String>,
    },
    #[error("{message}")]
    #[diagnostic(help("{}", advice(*status, request_id)))]
    Refused {
        status: u16,
        message: String,
        request_id: String,
    },
    #[error("not understood: the answer to {request} is {what}")]
    #[diagnostic(help(
        "is OS_AUTH_URL the URL of an OpenStack identity API, such as http://HOST:PORT/identity/v3?"
    ))]
    Answer { request: String, what: String },
    #[error("{what} went to ERROR: {reason}")]
    #[diagnostic(help(
        "`fractus server show {what}` has the fault; delete the server and create it anew when the cause is gone"
    ))]
    Errored { what: String, reason: String },
    #[error("server {server} was not brought elsewhere: {reason}")]
    #[diagnostic(help(
        "`fractus server migration list --server {server}` has the migration; the server is as `fractus server show {server}` says"
    ))]
    Stayed { server: String, reason: String },
    #[error("host {host} is not empty: {reason}")]
    #[diagnostic(help("what is said above of each of them is why; then the same again"))]
    NotEmpty { host: String, reason: String },
    #[error("{what} is {last} after {seconds} s, not {wanted}")]
    #[diagnostic(help(
        "it may still get there: look with `fractus server show`, or wait longer with --timeout"
    ))]
    Timeout {
        what: String,
        wanted: String,
        last: String,
        seconds: u64,
    },
    #[error("the console was refused: {detail}")]
    #[diagnostic(help(
        "consoles are there while the server runs; their URLs work for a few minutes"
    ))]
    Console { detail: String },
}

fn advice(status: u16, request_id: &str) -> String {
    let what = match status {
        401 => "the token is not valid any more: log in again",
        403 => {
            "your roles in this project do not allow it, or a quota is used up: ask an administrator"
        }
        404 => "look whether it still exists, and in this project",
        409 => "wait until what is under way with it is done, or change its state first",
        413 | 429 => "the cloud is busy: try again in a little while",
        500..=599 => "the cloud failed; its log has more under the request's id",
        _ => "change the request as the message says",
    };
    if request_id.is_empty() {
        what.to_owned()
    } else {
        format!("{what} (request {request_id})")
    }
}

impl CliError {
    /// The codes that `super::run` documents.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::NoCloud
            | Self::UnknownCloud { .. }
            | Self::Configuration { .. }
            | Self::File { .. }
            | Self::Ambiguous { .. } => 2,
            Self::NotFound { .. } => 3,
            Self::Login { .. } => 4,
            Self::Unreachable { .. } => 6,
            Self::Refused { status, .. } => match status {
                404 => 3,
                401 | 403 => 4,
                409 | 413 => 5,
                _ => 1,
            },
            _ => 1,
        })
    }
}
