//! `server_confirm_resize`, `server_revert_resize`: a server stays what it has become, or goes back.
//!
//! | confirm | what it does |
//! |---|---|
//! | (request) | the host that it came from, or its own of the copy, need keep nothing |
//! | drop | waits for that, a minute at most; commit: what it held besides is given back |
//!
//! | revert | what it does |
//! |---|---|
//! | (request) | the host that it came from is there |
//! | settle | it undoes |
//! | look | that host says that it has the disk; commit: the guest is to stop |
//! | stop | waits for that, and for that host's word again |
//! | back | commit: the machine has its former size, and is its former host's, a generation higher; or its disk is to be made of the copy |
//! | start | the guest runs, if it did before |
//! | drop | what is left of it goes; commit: what it held besides is given back |
//!
//! Before *back* a revert can be taken back itself; from there on it goes on to the end.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{Observed, ServerId};
use sea_orm::DatabaseTransaction;
use sea_orm::prelude::Uuid;
use serde::{Deserialize, Serialize};

use super::given_up::Word;
use super::{Before, close, forget_copy, given_up, kept, open_one};
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::ops::image::{self, dropped, waited_us};
use crate::compute::ops::shelve::is_over;
use crate::compute::ops::{RequestError, Tools, machine_id, migrate, to_error, to_state, turn};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::operation::{Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration::{self, Status};
use crate::reconcile::{ASK_AGAIN, Dropped};

pub const CONFIRM: &str = "server_confirm_resize";
pub const REVERT: &str = "server_revert_resize";

/// A host that does not drop what it has is left to the reconciler.
pub(super) const LONGEST_DROP_US: i64 = 60_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Confirm,
    Revert,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    /// The migration's.
    pub(super) uuid: Uuid,
    pub(super) source: HostId,
    pub(super) before: Before,
    /// Its guest ran.
    pub(super) ran: bool,
    /// Its owner's row is what it was before.
    #[serde(default)]
    pub(super) is_back: bool,
    #[serde(default)]
    pub(super) observed: Option<Observed>,
}

/// The host that had it, or has it, besides its owner; none: it has only got another size there.
pub(super) fn other(state: &State, of: &migration::Model, known: &Machine) -> Option<HostId> {
    let mut hosts = of.hosts();
    hosts
        .find(|host| Some(*host) != known.host)
        .filter(|_| of.target_id.as_deref() != Some(state.source.to_string().as_str()))
}

/// Writes what is to become of the server, and the operation that brings it about.
pub async fn request(
    app: &App,
    origin: Origin,
    id: &str,
    (verdict, from): (Verdict, ServerState),
) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let server = machine_id(id)?;
    let reader = app.database().reader();
    let open = migration::open(reader, server).await?;
    let waiting = |row: &migration::Model| row.before.is_some() && row.status() == Status::Finished;
    let of = open.into_iter().find(waiting);
    let of = of.ok_or_else(|| RequestError::NothingToConfirm(id.to_owned()))?;
    match verdict {
        Verdict::Confirm => is_there(app, server).await?,
        Verdict::Revert => can_be_had(app, &of).await?,
    }
    let state = State {
        uuid: of.migration().0,
        source: of.source(),
        before: kept(&of)?,
        ran: from == ServerState::Resized(Standing::Active),
        is_back: false,
        observed: None,
    };
    let (kind, status, to) = match verdict {
        Verdict::Confirm => {
            let runs = match state.ran {
                true => Standing::Active,
                false => Standing::Stopped,
            };
            (CONFIRM, Status::Confirming, ServerState::Confirming(runs))
        }
        Verdict::Revert => (REVERT, Status::Reverting, ServerState::Reverting),
    };
    let request_id = origin.request_id.clone();
    let prepared = engine.prepare(kind, id, &state, origin)?;
    let (subject, now, uuid) = (id.to_owned(), app.now_us(), of.migration());
    app.database()
        .write(move |tx| {
            let (id, prepared) = (subject.clone(), prepared.clone());
            let request_id = request_id.clone();
            Box::pin(async move {
                if !server::turn(tx, &id, from, to_state(to, now)).await? {
                    return Err(RequestError::Overtaken);
                }
                let waiting = open_one(tx, server).await?;
                let waits = waiting
                    .is_some_and(|row| row.migration() == uuid && row.status() == Status::Finished);
                let known = machine::find(tx, server).await?;
                let known = known.filter(|known| known.host.is_some() && !known.is_tombstone());
                if !waits || known.is_none() {
                    return Err(RequestError::Overtaken);
                }
                let has_copy = known.is_some_and(|known| known.wanted.copy.is_some());
                if has_copy && verdict == Verdict::Confirm {
                    machine::change(tx, server, request_id, now, forget_copy).await?;
                }
                migration::update(tx, uuid, migrate::is_now(status, now)).await?;
                Ok::<(), RequestError>(prepared.insert(tx).await?)
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

/// A confirm removes what the server could go back to: so its host must have said, of the present row, that it has what
/// the server has become, and be there.
async fn is_there(app: &App, server: ServerId) -> Result<(), RequestError> {
    let machines = &app.compute().machines;
    let why =
        given_up::why_not_there(machines, app.database().reader(), server, Word::Recorded).await?;
    match why {
        None => Ok(()),
        Some(why) => Err(RequestError::NotThere(format!(
            "{why}: what server {server} could go back to is kept; revert, or mend that first"
        ))),
    }
}

/// A revert stops the guest: so the host that it goes back to must be there.
async fn can_be_had(app: &App, of: &migration::Model) -> Result<(), RequestError> {
    let machines = &app.compute().machines;
    match given_up::is_up(machines, app.database().reader(), of.source()).await? {
        true => Ok(()),
        false => Err(RequestError::NotThere(format!(
            "host {}, which has what the server could go back to, is not there",
            of.source
        ))),
    }
}

/// Time decides nothing of a server whose guest has ended by a fault since it was started as it is now.
fn has_failed(server: &server::Model) -> bool {
    let started = server.launched_at_us.unwrap_or(0);
    server.fault_at_us.is_some_and(|failed| failed >= started)
}

/// Confirms all servers that have waited for `window` to be, as nova does by `resize_confirm_window`.
pub async fn confirm_overdue(app: &App, window: std::time::Duration) -> Result<(), RequestError> {
    let window = i64::try_from(window.as_micros()).unwrap_or(i64::MAX);
    let before = app.now_us().saturating_sub(window);
    for row in migration::unconfirmed(app.database().reader(), before).await? {
        let server = server::find(app.database().reader(), &row.server_id).await?;
        let Some(server) = server.filter(|server| !has_failed(server)) else {
            continue;
        };
        let from @ ServerState::Resized(_) = server.state() else {
            continue;
        };
        let origin = Origin {
            request_id: Some(format!("req-{}", app.random().uuid())),
            user_id: row.user_id.clone(),
            project_id: row.project_id.clone(),
        };
        match request(app, origin, &row.server_id, (Verdict::Confirm, from)).await {
            // Its user, or another controller, was first; or what it has become is not well, and time decides nothing.
            Ok(())
            | Err(
                RequestError::Overtaken
                | RequestError::NothingToConfirm(_)
                | RequestError::NotThere(_),
            ) => {}
            Err(error) => {
                tracing::error!(server = row.server_id, %error, "it cannot be confirmed by time");
            }
        }
    }
    Ok(())
}

/// The migration that is decided on, and its server's machine; none: the server is deleted.
pub(super) async fn looked_at(
    operation: &Operation,
    connection: &impl sea_orm::ConnectionTrait,
) -> Result<Option<(State, migration::Model, Machine)>, StepError> {
    let state: State = operation.state()?;
    let row = server::find(connection, &operation.subject).await?;
    if row.is_none_or(|row| is_over(row.state())) {
        return Ok(None);
    }
    let id = fractus_agent_api::migration::MigrationId(state.uuid);
    let of = migration::find(connection, id).await?;
    let known = machine::find(connection, machine_id(&operation.subject)?).await?;
    Ok(of.zip(known).map(|(of, known)| (state, of, known)))
}

/// Has whoever does not own the server, or its owner of the copy, drop what is there: a minute at most.
async fn drop_rest(tools: &Tools, operation: &Operation) -> Result<Progress, StepError> {
    let machines = &tools.machines;
    let Some((state, of, known)) = looked_at(operation, machines.reader()).await? else {
        return Ok(Progress::Done);
    };
    let Some(holder) = other(&state, &of, &known) else {
        return dropped(tools, operation).await;
    };
    let late = waited_us(tools, operation) > LONGEST_DROP_US;
    if late || machines.is_off(machines.reader(), holder).await?.is_some() {
        return Ok(Progress::Done);
    }
    let said = machines.fleet().machine(holder, known.server);
    let above = said.map_or(known.revision, |said| said.revision);
    Ok(match machines.drop_at(holder, &known, above).await? {
        Dropped::Gone => Progress::Done,
        Dropped::Working | Dropped::Unreachable(_) => Progress::Wait(ASK_AGAIN),
    })
}

/// What is left of it goes, and what it held is given back.
pub(super) struct Drop {
    pub(super) tools: Tools,
    pub(super) status: Status,
}

#[async_trait]
impl Step for Drop {
    fn name(&self) -> &'static str {
        "drop"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        drop_rest(&self.tools, operation).await
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        if let Some((_, of, known)) = looked_at(operation, tx).await? {
            close(tx, &known, &of, (self.status, None), now).await?;
        }
        Ok(())
    }

    /// There is no way back: on to the end.
    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        drop_rest(&self.tools, operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.commit(operation, tx).await
    }
}

pub struct Confirm {
    tools: Tools,
}

impl Confirm {
    pub(in crate::compute::ops) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for Confirm {
    fn name(&self) -> &'static str {
        CONFIRM
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        vec![Arc::new(Drop {
            tools: self.tools.clone(),
            status: Status::Confirmed,
        })]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        let said = known.and_then(|known| {
            let said = self.tools.machines.fleet().machine(known.host?, server)?;
            let is_of_now = (said.generation, said.revision) == known.age();
            (is_of_now && said.settled).then_some((said, known.wanted.power))
        });
        turn(tx, &operation.subject, |row| match (row.state(), outcome) {
            (ServerState::Confirming(_), Outcome::Parked { reason }) => {
                Some(to_error(reason, Some(reason), now))
            }
            (ServerState::Confirming(standing), _) => {
                Some(image::is_now(standing, said.as_ref(), now))
            }
            _ => None,
        })
        .await?;
        Ok(())
    }
}
