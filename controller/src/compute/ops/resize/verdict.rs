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
use fractus_agent_api::copy::CopyState;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, Power, ServerId, Wanted};
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;
use sea_orm::prelude::Uuid;
use serde::{Deserialize, Serialize};

use super::steps::is_made;
use super::{Before, close, forget_copy, given_up, kept, open_one, stands};
use crate::agents::host;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::ops::create::settle;
use crate::compute::ops::image::{self, dropped, waited_us};
use crate::compute::ops::shelve::is_over;
use crate::compute::ops::{
    RequestError, Tools, change, instance, machine_id, migrate, to_error, to_state, turn,
};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::operation::{Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration::{self, Status};
use crate::reconcile::{ASK_AGAIN, Converged, Dropped};

pub const CONFIRM: &str = "server_confirm_resize";
pub const REVERT: &str = "server_revert_resize";

/// A host that does not drop what it has is left to the reconciler.
const LONGEST_DROP_US: i64 = 60_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Confirm,
    Revert,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    /// The migration's.
    uuid: Uuid,
    source: HostId,
    before: Before,
    /// Its guest ran.
    ran: bool,
    /// Its owner's row is what it was before.
    #[serde(default)]
    is_back: bool,
    #[serde(default)]
    observed: Option<Observed>,
}

/// The host that had it, or has it, besides its owner; none: it has only got another size there.
fn other(state: &State, of: &migration::Model, known: &Machine) -> Option<HostId> {
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
    let why = given_up::why_not_there(machines, app.database().reader(), server).await?;
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
async fn looked_at(
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
struct Drop {
    tools: Tools,
    status: Status,
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

pub struct Revert {
    tools: Tools,
}

impl Revert {
    pub(in crate::compute::ops) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for Revert {
    fn name(&self) -> &'static str {
        REVERT
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let tools = || self.tools.clone();
        vec![
            Arc::new(Settle(tools())),
            Arc::new(Look(tools())),
            Arc::new(Stop(tools())),
            Arc::new(Back(tools())),
            Arc::new(Start(tools())),
            Arc::new(Drop {
                tools: tools(),
                status: Status::Reverted,
            }),
        ]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        let Some((state, of, known)) = looked_at(operation, tx).await? else {
            return Ok(());
        };
        let row = server::find(tx, &operation.subject).await?;
        let is_reset = row.is_some_and(|row| row.state() != ServerState::Reverting);
        match (outcome, &state.observed) {
            (Outcome::Parked { .. }, _) => {}
            _ if !state.is_back && is_reset => {
                given_up::was_reset(tx, &self.tools.machines, known.server, &of, now).await?;
            }
            _ if !state.is_back => {
                let waits = migrate::is_now(Status::Finished, now);
                migration::update(tx, of.migration(), waits).await?;
            }
            // What it came from is not well: what it had become is kept too, until an administrator has looked.
            (Outcome::Undone { reason }, Some(Observed::Failed { .. }) | None) if !is_reset => {
                let change = migration::ActiveModel {
                    reason: Set(Some(reason.clone())),
                    ..migrate::is_now(Status::Error, now)
                };
                migration::update(tx, of.migration(), change).await?;
            }
            // Given up between its last steps: what is left elsewhere is the reconciler's to see to.
            _ => close(tx, &known, &of, (Status::Reverted, None), now).await?,
        }
        turn(tx, &operation.subject, |row| match (row.state(), outcome) {
            (ServerState::Reverting, Outcome::Parked { reason }) => {
                Some(to_error(reason, Some(reason), now))
            }
            // The action's event says why.
            (ServerState::Reverting, _) if !state.is_back => {
                // It runs on, if it did: what it is asked to be besides, others say.
                let runs = state.ran.then_some(Observed::Running);
                Some(to_state(
                    stands(state.observed.as_ref().or(runs.as_ref())),
                    now,
                ))
            }
            (ServerState::Reverting, Outcome::Undone { reason }) if state.observed.is_none() => {
                Some(to_error(reason, Some(reason), now))
            }
            (ServerState::Reverting, _) => Some(is_again(&state, now)),
            _ => None,
        })
        .await?;
        Ok(())
    }
}

/// What a server is that went back.
fn is_again(state: &State, now: i64) -> server::ActiveModel {
    match &state.observed {
        Some(Observed::Failed { reason }) => to_error(reason, Some(reason), now),
        Some(Observed::Paused) => to_state(ServerState::Paused, now),
        Some(Observed::Stopped { .. }) => to_state(ServerState::Stopped, now),
        Some(_) => to_state(ServerState::Active, now),
        None => to_state(state.before.standing().settled(), now),
    }
}

/// What the server goes back to is there, as its host says now; then its guest is to stop.
struct Look(Tools);

#[async_trait]
impl Step for Look {
    fn name(&self) -> &'static str {
        "look"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let Some(looked_at) = looked_at(operation, self.0.machines.reader()).await? else {
            return Err(StepError::fail("the server is deleted"));
        };
        source_has_it(&self.0, operation, &looked_at).await?;
        Ok(Progress::Done)
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let row = server::find(tx, &operation.subject).await?;
        if row.is_none_or(|row| row.state() != ServerState::Reverting) {
            return Err(StepError::fail("the server's state was changed meanwhile"));
        }
        let (request_id, now) = (operation.origin.request_id.clone(), self.0.clock.now_us());
        let server = machine_id(&operation.subject)?;
        machine::change(tx, server, request_id, now, |wanted| {
            wanted.power = Power::Stopped;
        })
        .await?;
        Ok(())
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        run_on(&self.0, operation, tx).await
    }
}

/// What the host says on which it was; it is not asked for ever.
async fn source_has_it(
    tools: &Tools,
    operation: &Operation,
    (state, of, known): &(State, migration::Model, Machine),
) -> Result<(), StepError> {
    let machines = &tools.machines;
    let gone = |what: &str| {
        StepError::fail(format!(
            "what the server goes back to is not on host {} any more: {what}",
            of.source
        ))
    };
    if other(state, of, known).is_none() {
        let Some(copy) = state.before.copy else {
            return Ok(());
        };
        let said = machines.fleet().machine(state.source, known.server);
        let said = said.and_then(|said| said.copy);
        let is_made = said
            .is_some_and(|said| said.id == copy && matches!(said.state, CopyState::Made { .. }));
        return match is_made {
            true => Ok(()),
            false => Err(gone("there is no copy of its disk")),
        };
    }
    // Its word of now, and of this migration.
    match asked(tools, operation, (state.source, known.server)).await? {
        Some(said)
            if said.settled
                && said.parks == Some(of.migration())
                && matches!(said.observed, Observed::Stopped { .. }) =>
        {
            Ok(())
        }
        Some(said) => Err(gone(&format!("it is {:?}", said.observed))),
        None => Err(gone("it has no record of it")),
    }
}

/// What a host says of the server, if it says so within a minute, and was not declared to be off.
async fn asked(
    tools: &Tools,
    operation: &Operation,
    (host, server): (HostId, ServerId),
) -> Result<Option<MachineReport>, StepError> {
    let machines = &tools.machines;
    if let Some(reason) = machines.is_off(machines.reader(), host).await? {
        return Err(StepError::fail(reason));
    }
    let late = waited_us(tools, operation) > LONGEST_DROP_US;
    let said = machines.ask(host, server).await;
    said.map_err(|error| error.given_up_if(late))
}

/// The guest stands nowhere any more, and what it goes back to is still there.
struct Stop(Tools);

#[async_trait]
impl Step for Stop {
    fn name(&self) -> &'static str {
        "stop"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let machines = &self.0.machines;
        let Some(looked_at) = looked_at(operation, machines.reader()).await? else {
            return Err(StepError::fail("the server is deleted"));
        };
        let known = &looked_at.2;
        let is_off = match known.host {
            Some(owner) => machines.is_off(machines.reader(), owner).await?.is_some(),
            None => false,
        };
        if is_off {
            source_has_it(&self.0, operation, &looked_at).await?;
            return Ok(Progress::Done);
        }
        // Its record is gone, or cannot be read: whether a guest runs by it nobody knows.
        if let Some(owner) = known.host
            && machines.has_vanished(owner, known)
        {
            return Err(StepError::fail(format!(
                "host {owner} has no record of the server any more, and may run it all the same: declare it to be down \
                 once it is off for certain"
            )));
        }
        match machines.converge(known.server).await? {
            Converged::Settled(report) => match report.observed {
                Observed::Stopped { .. } => {
                    source_has_it(&self.0, operation, &looked_at).await?;
                    Ok(Progress::Done)
                }
                // Whether it has a process still cannot be told.
                Observed::Failed { reason } => Err(StepError::fail(reason)),
                other => Err(StepError::retry(format!(
                    "the guest is {other:?} instead of stopped"
                ))),
            },
            Converged::NoOwner => Err(StepError::fail("the server has no host")),
            // Whoever had it is no part of this cloud any more.
            Converged::Lost(_) => {
                source_has_it(&self.0, operation, &looked_at).await?;
                Ok(Progress::Done)
            }
            pending => Ok(pending.pending().unwrap_or(Progress::Done)),
        }
    }

    /// It runs on where it is, if it did.
    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        run_on(&self.0, operation, tx).await
    }
}

/// What the others have changed when they were undone is taken in.
struct Settle(Tools);

#[async_trait]
impl Step for Settle {
    fn name(&self) -> &'static str {
        "settle"
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        taken_in(&self.0, operation).await
    }
}

/// Waits until the owner has taken in what is wanted, a minute at most.
async fn taken_in(tools: &Tools, operation: &Operation) -> Result<Progress, StepError> {
    let Some((state, _, known)) = looked_at(operation, tools.machines.reader()).await? else {
        return Ok(Progress::Done);
    };
    let late = waited_us(tools, operation) > LONGEST_DROP_US;
    if state.is_back || late {
        return Ok(Progress::Done);
    }
    match tools.machines.converge(known.server).await {
        Ok(Converged::Pending(_)) => Ok(Progress::Wait(ASK_AGAIN)),
        Err(error @ (StepError::Retry { .. } | StepError::Database(_))) => Err(error),
        Ok(_) | Err(_) => Ok(Progress::Done),
    }
}

/// The commit point.
struct Back(Tools);

impl Back {
    async fn wanted(
        &self,
        (state, known, stays): (&State, &Machine, bool),
        operation: &Operation,
        tx: &DatabaseTransaction,
    ) -> Result<Wanted, StepError> {
        let mut wanted = known.wanted.clone();
        wanted.spec = state.before.size.applied(&wanted.spec);
        wanted.power = state.before.power();
        let told = instance::of(tx, &operation.subject).await?;
        let before = wanted.spec.guest.instance.take();
        wanted.spec.guest.instance = instance::renewed(told, None, before);
        let said = self.0.machines.fleet().machine(state.source, known.server);
        let done = said.map(|said| said.rebuilds);
        match (stays, state.before.copy) {
            // The disk is the one that stands there.
            (false, _) => {
                forget_copy(&mut wanted);
                wanted.rebuilds = done.unwrap_or(state.before.rebuilds);
            }
            (true, Some(copy)) => {
                wanted.restores = Some(copy);
                wanted.rebuilds = wanted.rebuilds.max(done.unwrap_or(0)) + 1;
            }
            (true, None) => {}
        }
        Ok(wanted)
    }
}

#[async_trait]
impl Step for Back {
    fn name(&self) -> &'static str {
        "back"
    }

    /// How often the host to be has made the disk, by its own word: it is to be made once more, or not again.
    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let looked_at = looked_at(operation, self.0.machines.reader()).await?;
        if let Some((state, _, known)) = looked_at {
            asked(&self.0, operation, (state.source, known.server)).await?;
        }
        Ok(Progress::Done)
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.0.clock.now_us();
        let looked_at = looked_at(operation, tx).await?;
        let row = server::find(tx, &operation.subject).await?;
        let is_reverting = row.is_some_and(|row| row.state() == ServerState::Reverting);
        let looked_at = looked_at.filter(|(_, _, known)| {
            is_reverting
                && known.host.is_some()
                && known.confirmed
                && known.wanted.power == Power::Stopped
        });
        let Some((mut state, of, known)) = looked_at else {
            return Err(StepError::fail(
                "something else has been asked of the server meanwhile",
            ));
        };
        server::update(tx, &operation.subject, state.before.size.columns()).await?;
        let stays = other(&state, &of, &known).is_none();
        let next = self.wanted((&state, &known, stays), operation, tx).await?;
        if stays {
            let request_id = operation.origin.request_id.clone();
            machine::change(tx, known.server, request_id, now, |wanted| *wanted = next).await?;
        } else if !machine::move_owner(tx, &known, state.source, &next, now).await? {
            return Err(StepError::fail("the server is not where it was"));
        }
        state.is_back = true;
        operation.set_state(&state)
    }

    /// As it was, where it is.
    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        run_on(&self.0, operation, tx).await
    }
}

/// Before it is back: its guest is to run again, if it did.
async fn run_on(
    tools: &Tools,
    operation: &mut Operation,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let Some((mut state, _, known)) = looked_at(operation, tx).await? else {
        return Ok(());
    };
    if state.is_back {
        return Ok(());
    }
    let is_followed = change::is_followed(operation, tx).await?;
    if state.ran && known.wanted.power == Power::Stopped && !is_followed {
        let (request_id, now) = (operation.origin.request_id.clone(), tools.clock.now_us());
        let running = |wanted: &mut Wanted| wanted.power = Power::Running;
        machine::change(tx, known.server, request_id, now, running).await?;
    }
    state.observed = state.ran.then_some(Observed::Running);
    operation.set_state(&state)
}

/// The host is told, and the guest runs, if it did before.
struct Start(Tools);

impl Start {
    /// What the host has settled upon; none: it is no part of this cloud any more.
    async fn settled(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        // A copy that no disk could be made of stays: it is the only one.
        state.observed = settle(&self.0, tx, &operation.subject).await?;
        let known = machine::find(tx, machine_id(&operation.subject)?).await?;
        let owner = match known.and_then(|known| known.host) {
            Some(owner) => host::find(tx, owner).await?,
            None => None,
        };
        if state.observed.is_none() && owner.is_some() {
            return Err(StepError::retry("the host has not settled yet"));
        }
        operation.set_state(&state)
    }
}

#[async_trait]
impl Step for Start {
    fn name(&self) -> &'static str {
        "start"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let machines = &self.0.machines;
        let Some((_, _, known)) = looked_at(operation, machines.reader()).await? else {
            return Ok(Progress::Done);
        };
        match machines.converge(known.server).await? {
            Converged::Settled(report) => {
                let known = machine::find(machines.reader(), known.server).await?;
                match report.observed {
                    Observed::Failed { reason } => Err(StepError::fail(reason)),
                    _ if known.is_some_and(|known| is_made(&known, &report)) => Ok(Progress::Done),
                    _ => Err(StepError::retry("the host has not made the disk yet")),
                }
            }
            Converged::NoOwner | Converged::Lost(_) => Ok(Progress::Done),
            pending => Ok(pending.pending().unwrap_or(Progress::Done)),
        }
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.settled(operation, tx).await
    }

    /// There is no way back: what it is now, it says in the end.
    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        if !state.is_back {
            return Ok(Progress::Done);
        }
        match self.run(operation).await {
            Err(StepError::Fail { .. }) => Ok(Progress::Done),
            other => other,
        }
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let deleted = looked_at(operation, tx).await?.is_none();
        match state.is_back && !deleted {
            true => self.settled(operation, tx).await,
            false => Ok(()),
        }
    }
}
