//! Consoles: what the serial line said, and a URL to the live one.

use std::sync::{Arc, LazyLock};

use axum::Json;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use fractus_agent_api::machine::{Refusal, ServerId};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{closed, wrapped};
use super::servers::{admit, find};
use crate::agents::{Agent, AgentError, Console};
use crate::compute::model::state::Action;
use crate::compute::store::console as store;
use crate::http::schema::Schema;
use crate::http::{ApiError, App, JsonBody, Query, Routes};
use crate::policy::Rule;

/// The agent of the server's owner.
pub(super) async fn agent(app: &App, id: &str) -> Result<(Arc<dyn Agent>, ServerId), ApiError> {
    let not_ready = || ApiError::conflict(format!("Instance {id} is not ready"));
    let server = sea_orm::prelude::Uuid::parse_str(id)
        .map(ServerId)
        .map_err(|_| not_ready())?;
    let machine = crate::reconcile::machine::find(app.database().reader(), server).await?;
    let host = machine
        .and_then(|machine| machine.host)
        .ok_or_else(not_ready)?;
    let agent = app
        .compute()
        .machines
        .agents()
        .agent(host)
        .map_err(|_| not_ready())?;
    Ok((agent, server))
}

/// `os-getConsoleOutput`: the last lines of the serial log.
pub async fn output(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        let length = json!({
            "type": ["integer", "string", "null"], "pattern": "^-?[0-9]+$", "minimum": -1,
        });
        let mut inner = closed(json!({"length": length}), &[]);
        inner["type"] = json!(["object", "null"]);
        Schema::of(wrapped("os-getConsoleOutput", inner))
    });
    SCHEMA.check(body)?;
    let row = find(call, id).await?;
    admit(call, &row, Action::ConsoleOutput).await?;
    let length = super::schemas::as_integer(&body["os-getConsoleOutput"]["length"]);
    // No length, or -1: all that is kept.
    let lines = length.and_then(|length| u64::try_from(length).ok());
    let (agent, server) = agent(&call.app, id).await?;
    let log = match agent.console_log(server, lines).await {
        Ok(log) => log,
        // It has not been made there yet: nothing was said.
        Err(AgentError::Refused(Refusal::Unknown)) => Default::default(),
        Err(error) => {
            tracing::warn!(%error, server = id, "reading a console log");
            return Err(ApiError::conflict(format!("Instance {id} is not ready")));
        }
    };
    let text: String = String::from_utf8_lossy(&log)
        .chars()
        .filter(|letter| !letter.is_control() || matches!(letter, '\n' | '\r' | '\t' | '\u{1b}'))
        .collect();
    Ok(Json(json!({"output": text})).into_response())
}

/// Microseconds for which a console's URL can be opened.
const OPEN_FOR_US: i64 = 600_000_000;

/// A URL to the server's serial line, with a token that opens it for a while.
async fn url(call: &Call, id: &str) -> Result<String, ApiError> {
    let row = find(call, id).await?;
    admit(call, &row, Action::RemoteConsole).await?;
    let token = call.app.random().uuid().to_string();
    let now = call.app.now_us();
    let (server, kept) = (row.id.clone(), token.clone());
    call.app
        .database()
        .write(move |tx| {
            let (server, token) = (server.clone(), kept.clone());
            Box::pin(async move {
                let until = now.saturating_add(OPEN_FOR_US);
                Ok::<(), ApiError>(store::insert(tx, &token, &server, now, until).await?)
            })
        })
        .await?;
    let link = call.ctx.link(&format!("{PATH}?token={token}"));
    // `https` becomes `wss`, `http` becomes `ws`.
    Ok(link.replacen("http", "ws", 1))
}

fn unavailable(kind: &str) -> ApiError {
    ApiError::bad_request(format!("Unavailable console type {kind}."))
}

/// `os-getSerialConsole` and its kin, up to 2.5. Only serial consoles are to be had.
pub async fn of_old(
    call: &Call,
    id: &str,
    action: &str,
    body: &Value,
) -> Result<Response, ApiError> {
    call.until(6)?;
    let kinds: &[&str] = match action {
        "os-getSerialConsole" => &["serial"],
        "os-getVNCConsole" => &["novnc", "xvpvnc"],
        _ => &["spice-html5"],
    };
    let kind = json!({"type": "string", "enum": kinds});
    Schema::of(wrapped(action, closed(json!({"type": kind}), &["type"]))).check(body)?;
    let kind = body[action]["type"].as_str().unwrap_or_default();
    if kind != "serial" {
        find(call, id).await?;
        return Err(unavailable(kind));
    }
    let url = url(call, id).await?;
    Ok(Json(json!({"console": {"type": kind, "url": url}})).into_response())
}

/// `POST /servers/{id}/remote-consoles` (2.6).
async fn create(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    static SCHEMAS: LazyLock<[Schema; 2]> = LazyLock::new(|| {
        [false, true].map(|mks| {
            let mut protocols = vec!["vnc", "spice", "serial", "rdp"];
            let mut types = vec!["novnc", "xvpvnc", "spice-html5", "serial", "rdp-html5"];
            if mks {
                protocols.push("mks");
                types.push("webmks");
            }
            let inner = closed(
                json!({
                    "protocol": {"type": "string", "enum": protocols},
                    "type": {"type": "string", "enum": types},
                }),
                &["protocol", "type"],
            );
            Schema::of(wrapped("remote_console", inner))
        })
    });
    call.since(6)?;
    SCHEMAS[usize::from(call.at_least(8))].check(&body.0)?;
    let given = &body.0["remote_console"];
    let text = |name: &str| given[name].as_str().unwrap_or_default();
    let (protocol, kind) = (text("protocol"), text("type"));
    if (protocol, kind) != ("serial", "serial") {
        find(&call, &id).await?;
        return Err(unavailable(kind));
    }
    let url = url(&call, &id).await?;
    Ok(Json(
        json!({"remote_console": {"protocol": protocol, "type": kind, "url": url}}),
    ))
}

/// Where console URLs lead.
const PATH: &str = "/console";

pub fn routes(routes: Routes) -> Routes {
    routes
        .post(
            "/v2.1/servers/{id}/remote-consoles",
            Rule::member("os_compute_api:os-remote-consoles"),
            create,
        )
        // The token in the query is the right to it.
        .get(PATH, Rule::open(), attach)
}

/// Joins a WebSocket to a server's serial line.
async fn attach(
    State(app): State<App>,
    query: Query,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let refused = || ApiError::forbidden("The console's token is unknown or has expired.");
    let token = query.last("token").ok_or_else(refused)?;
    let reader = app.database().reader();
    let id = store::server_of(reader, token, app.now_us())
        .await?
        .ok_or_else(refused)?;
    let upgrade = upgrade
        .map_err(|_| ApiError::bad_request("A console is opened as a WebSocket."))?
        .protocols(["binary"]);
    let (agent, server) = agent(&app, &id).await?;
    let console = agent.console(server).await.map_err(|error| {
        tracing::warn!(%error, %server, "attaching to a console");
        ApiError::conflict(format!("Instance {id} is not ready"))
    })?;
    Ok(upgrade.on_upgrade(move |socket| bridge(socket, console)))
}

/// Until either side ends.
async fn bridge(socket: WebSocket, console: Console) {
    let (mut to_client, mut from_client) = socket.split();
    let Console {
        mut output,
        mut input,
    } = console;
    let out = async {
        while let Some(Ok(bytes)) = output.next().await {
            if to_client.send(Message::Binary(bytes)).await.is_err() {
                return;
            }
        }
        // The machine has stopped, or its host is gone: say so by closing.
        let _ = to_client.send(Message::Close(None)).await;
    };
    let into = async {
        while let Some(Ok(message)) = from_client.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => text.into(),
                Message::Close(_) => return,
                Message::Ping(_) | Message::Pong(_) => continue,
            };
            if input.send(bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = out => {}
        () = into => {}
    }
}
