//! Consoles: what the serial line said, and a URL to the live one.

use std::sync::LazyLock;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{closed, wrapped};
use super::servers::{admit, find};
use crate::agents::{Agent, AgentError};
use crate::compute::model::state::Action;
use crate::http::schema::Schema;
use crate::http::{ApiError, App};
use fractus_agent_api::machine::{Refusal, ServerId};
use std::sync::Arc;

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

/// `os-getSerialConsole` and its kin, up to 2.5.
pub async fn of_old(call: &Call, id: &str, _: &str, _: &Value) -> Result<Response, ApiError> {
    call.until(6)?;
    let _ = id;
    Err(super::call::gone())
}
