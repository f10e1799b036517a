//! The steps of a revert: see the table in [`super::verdict`].

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::copy::CopyState;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, Power, ServerId, Wanted};
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;

use super::steps::is_made;
use super::verdict::{Drop, LONGEST_DROP_US, REVERT, State, looked_at, other};
use super::{close, forget_copy, given_up, stands};
use crate::agents::host;
use crate::compute::model::state::ServerState;
use crate::compute::ops::create::settle;
use crate::compute::ops::image::waited_us;
use crate::compute::ops::{Tools, change, instance, machine_id, migrate, to_error, to_state, turn};
use crate::compute::store::server;
use crate::operation::{Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration::{self, Status};
use crate::reconcile::{ASK_AGAIN, Converged};

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
            (Outcome::Undone { reason }, Some(Observed::Failed { .. }) | None) => {
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
        let said = asked(tools, operation, (state.source, known.server)).await?;
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
        if let Some(owner) = known.host
            && machines.is_off(machines.reader(), owner).await?.is_some()
        {
            let late = waited_us(&self.0, operation) > LONGEST_DROP_US;
            let fenced = self.0.is_silent_or_idle(owner, known.server).await;
            fenced.map_err(|error| error.given_up_if(late))?;
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
        let begins = state
            .before
            .begins(&self.0, (state.source, known.server), tx)
            .await?;
        begins.put(&mut wanted.spec);
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
    let is_followed = change::is_told_otherwise(operation, tx).await?;
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
        if let Some(owner) = known.host
            && let Some(reason) = machines.is_off(machines.reader(), owner).await?
        {
            return Err(StepError::fail(reason));
        }
        self.0.fence_others(known.server).await?;
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
