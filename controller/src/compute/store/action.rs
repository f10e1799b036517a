//! What was done to servers, read from the events of their operations: an action a request.

use sea_orm::{ConnectionTrait, DbErr};

use crate::event::{self, Phase};

/// An action and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// Kind of the operation.
    pub kind: String,
    pub request_id: String,
    pub user_id: String,
    pub project_id: String,
    pub started_at_us: i64,
    /// None: under way.
    pub ended: Option<End>,
    /// False for what is done in the request itself (lock).
    pub operation: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub at_us: i64,
    pub failure: Option<String>,
}

impl Action {
    pub fn updated_at_us(&self) -> i64 {
        self.ended
            .as_ref()
            .map_or(self.started_at_us, |end| end.at_us)
    }
}

/// A server's actions, newest first.
pub async fn of_server(
    connection: &impl ConnectionTrait,
    server: &str,
) -> Result<Vec<Action>, DbErr> {
    let events = event::of_subject(connection, server).await?;
    let mut actions: Vec<(Option<String>, Action)> = Vec::new();
    for event in events {
        if event.phase == Phase::Requested.as_str() {
            let operation = event.operation_id.is_some();
            let action = Action {
                kind: event.action,
                request_id: event.request_id.unwrap_or_default(),
                user_id: event.user_id.unwrap_or_default(),
                project_id: event.project_id.unwrap_or_default(),
                started_at_us: event.at_us,
                ended: None,
                operation,
            };
            actions.push((event.operation_id, action));
            continue;
        }
        let begun = event.operation_id.as_ref().and_then(|id| {
            actions
                .iter_mut()
                .find(|(operation, _)| operation.as_ref() == Some(id))
        });
        if let Some((_, action)) = begun {
            let failed = event.phase == Phase::Failed.as_str();
            action.ended = Some(End {
                at_us: event.at_us,
                failure: failed.then(|| event.message.unwrap_or_default()),
            });
        }
    }
    actions.reverse();
    Ok(actions.into_iter().map(|(_, action)| action).collect())
}
