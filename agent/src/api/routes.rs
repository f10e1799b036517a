//! The calls of the agent's table.

use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use axum::{Extension, Router};
use fractus_agent_api::VERSION;
use fractus_agent_api::copy::{CopyId, CopyState};
use fractus_agent_api::host::FullReport;
use fractus_agent_api::identity::Peer;
use fractus_agent_api::machine::{PutMachine, Refusal, ServerId};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Deserialize;
use tracing::Instrument;
use uuid::Uuid;

use super::sparse;
use crate::console::live::{Consoles, Watcher};
use crate::console::ring;
use crate::host::inventory::Inventory;
use crate::machine::Machines;
use crate::machine::process::Launcher;
use crate::paths::Paths;
use crate::vm::protocol::SERIAL_LOG;

/// What the calls need.
pub struct Api<L: Launcher> {
    pub machines: Machines<L>,
    pub inventory: Inventory,
    pub consoles: Consoles,
    pub paths: Paths,
    pub metrics: Option<PrometheusHandle>,
    pub instance: Uuid,
}

impl<L: Launcher> Clone for Api<L> {
    fn clone(&self) -> Self {
        Self {
            machines: self.machines.clone(),
            inventory: self.inventory.clone(),
            consoles: self.consoles.clone(),
            paths: self.paths.clone(),
            metrics: self.metrics.clone(),
            instance: self.instance,
        }
    }
}

/// An intent is a few KiB.
const BODY: usize = 256 << 10;

pub fn router<L: Launcher>(api: Api<L>) -> Router {
    Router::new()
        .route("/v1/host", get(host::<L>))
        .route("/v1/machines", get(list::<L>))
        .route("/v1/machines/{id}", get(one::<L>).put(put::<L>))
        .route("/v1/machines/{id}/console-log", get(console_log::<L>))
        .route("/v1/machines/{id}/console", get(console::<L>))
        .route("/v1/machines/{id}/copies/{copy}", get(copy::<L>))
        .route("/metrics", get(metrics::<L>))
        .layer(DefaultBodyLimit::max(BODY))
        .layer(from_fn(controllers_only))
        .with_state(api)
}

async fn controllers_only(request: Request, next: Next) -> Response {
    if !matches!(
        request.extensions().get::<Peer>(),
        Some(Peer::Controller(_))
    ) {
        return (StatusCode::FORBIDDEN, "only controllers may call an agent").into_response();
    }
    let id = request.headers().get("x-openstack-request-id");
    let id = id.and_then(|id| id.to_str().ok()).unwrap_or("-").to_owned();
    let span = tracing::info_span!(
        "call", request_id = id, method = %request.method(), path = request.uri().path()
    );
    next.run(request).instrument(span).await
}

/// A refusal with the status that `fractus_agent_api::machine` gives it.
struct Refused(Refusal);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            Refusal::Stale { .. } | Refusal::WrongState { .. } => StatusCode::CONFLICT,
            Refusal::Unknown => StatusCode::NOT_FOUND,
            Refusal::Invalid { .. } => StatusCode::BAD_REQUEST,
            Refusal::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(self.0)).into_response()
    }
}

/// An id that is none names no machine.
fn server(id: &str) -> Result<ServerId, Refused> {
    Uuid::try_parse(id)
        .map(ServerId)
        .map_err(|_| Refused(Refusal::Unknown))
}

async fn host<L: Launcher>(State(api): State<Api<L>>) -> Response {
    Json(api.inventory.report()).into_response()
}

async fn list<L: Launcher>(State(api): State<Api<L>>) -> Response {
    let (version, agent_instance) = (VERSION, api.instance);
    let machines = api.machines.list();
    Json(FullReport {
        version,
        agent_instance,
        sequence: 0,
        machines,
    })
    .into_response()
}

async fn one<L: Launcher>(
    State(api): State<Api<L>>,
    Path(id): Path<String>,
) -> Result<Response, Refused> {
    let report = api
        .machines
        .get(server(&id)?)
        .ok_or(Refused(Refusal::Unknown))?;
    Ok(Json(report).into_response())
}

async fn put<L: Launcher>(
    State(api): State<Api<L>>,
    Path(id): Path<String>,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Result<Response, Refused> {
    let invalid = |detail: String| Refused(Refusal::Invalid { detail });
    let body = body.map_err(|e| invalid(e.body_text()))?;
    let put: PutMachine = serde_json::from_slice(&body).map_err(|e| invalid(e.to_string()))?;
    let report = api.machines.put(server(&id)?, put).await.map_err(Refused)?;
    Ok(Json(report).into_response())
}

/// The bytes of a copy that the machine's report speaks of.
async fn copy<L: Launcher>(
    State(api): State<Api<L>>,
    Path((id, copy)): Path<(String, String)>,
) -> Result<Response, Refused> {
    let id = server(&id)?;
    let report = api.machines.get(id).ok_or(Refused(Refusal::Unknown))?;
    let copy = Uuid::try_parse(&copy).map_err(|_| Refused(Refusal::Unknown))?;
    let said = report.copy.filter(|said| said.id.0 == copy);
    match said.map(|said| said.state) {
        Some(CopyState::Made { .. }) => {}
        Some(CopyState::Copying) => {
            let state = "being copied".to_owned();
            return Err(Refused(Refusal::WrongState { state }));
        }
        Some(CopyState::Failed { .. }) | None => return Err(Refused(Refusal::Unknown)),
    }
    let path = api.paths.machine(id).copy(CopyId(copy));
    let pieces = sparse::pieces(path).await.map_err(|error| {
        Refused(Refusal::Unavailable {
            detail: error.to_string(),
        })
    })?;
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, Body::from_stream(pieces)).into_response())
}

#[derive(Deserialize)]
struct Length {
    length: Option<String>,
}

async fn console_log<L: Launcher>(
    State(api): State<Api<L>>,
    Path(id): Path<String>,
    Query(Length { length }): Query<Length>,
) -> Result<Response, Refused> {
    let id = server(&id)?;
    api.machines.get(id).ok_or(Refused(Refusal::Unknown))?;
    let lines = match length {
        None => usize::MAX,
        Some(text) => text.parse().map_err(|_| {
            Refused(Refusal::Invalid {
                detail: format!("length {text:?} is no number of lines"),
            })
        })?,
    };
    let path = api.paths.machine(id).serial_log();
    let read = tokio::task::spawn_blocking(move || match std::fs::File::open(&path) {
        Ok(file) => ring::read(&file, SERIAL_LOG),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    })
    .await
    .unwrap_or_else(|e| Err(std::io::Error::other(e)));
    let log = read.map_err(|e| {
        Refused(Refusal::Unavailable {
            detail: e.to_string(),
        })
    })?;
    let log = match lines {
        usize::MAX => log,
        lines => ring::last_lines(&log, lines).to_vec(),
    };
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], log).into_response())
}

async fn console<L: Launcher>(
    State(api): State<Api<L>>,
    Path(id): Path<String>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, Refused> {
    let id = server(&id)?;
    let report = api.machines.get(id).ok_or(Refused(Refusal::Unknown))?;
    let upgrade = upgrade.map_err(|e| {
        Refused(Refusal::Invalid {
            detail: format!("no WebSocket: {e}"),
        })
    })?;
    let pid = api.machines.pid(id).ok_or_else(|| {
        let state = crate::metrics::state(&report.observed).to_owned();
        Refused(Refusal::WrongState { state })
    })?;
    let watcher = api.consoles.attach(id, pid).await.map_err(|e| {
        Refused(Refusal::Unavailable {
            detail: e.to_string(),
        })
    })?;
    Ok(upgrade
        .max_message_size(64 << 10)
        .on_upgrade(|socket| carry(socket, watcher)))
}

async fn carry(mut socket: WebSocket, mut watcher: Watcher) {
    use tokio::sync::broadcast::error::RecvError;
    loop {
        tokio::select! {
            output = watcher.output.recv() => match output {
                Ok(bytes) => {
                    if socket.send(Message::Binary(bytes)).await.is_err() {
                        return;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => break,
            },
            typed = socket.recv() => {
                let bytes = match typed {
                    Some(Ok(Message::Binary(bytes))) => bytes,
                    Some(Ok(Message::Text(text))) => text.into(),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                };
                if watcher.input.send(bytes).await.is_err() {
                    break;
                }
            }
        }
    }
    let _ = socket.send(Message::Close(None)).await;
}

async fn metrics<L: Launcher>(
    State(api): State<Api<L>>,
    Extension(_): Extension<Peer>,
) -> Response {
    let text = crate::metrics::render(
        api.metrics.as_ref(),
        &api.inventory.report(),
        &api.machines.list(),
    );
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
