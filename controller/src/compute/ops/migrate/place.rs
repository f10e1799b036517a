//! The first step: a migration's turn has come, and a host is chosen.

use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::machine::{Observed, Revision};
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;

use super::queue::{self, Turn};
use super::steps::waited_us;
use super::{Begun, State, is_now};
use crate::agents::host;
use crate::compute::ops::{Tools, machine_id};
use crate::operation::{Operation, Progress, Step, StepError};
use crate::reconcile::machine::Machine;
use crate::reconcile::migration::{self, Status};
use crate::reconcile::{ASK_AGAIN, Converged, Dropped, NoHost, machine};
use crate::scheduler::Request;

/// A target that cannot be told to drop what it has, or a source that its guest stays, is left to the reconciler.
const LONGEST_DROP_US: i64 = 60_000_000;
/// Whoever waits for its turn is told when it has come; this is for what nobody tells, as of hosts that are there again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Waits for its turn; then chooses a host, takes what the server needs of it, and raises the revision above all that this
/// host was told.
pub(super) struct Place(pub(super) Tools);

impl Place {
    /// What an earlier migration has left of the server elsewhere goes first: that host may be chosen again, and
    /// hears of both in this order.
    async fn clear(
        &self,
        operation: &Operation,
        known: Option<Machine>,
    ) -> Result<Progress, StepError> {
        let (server, machines) = (machine_id(&operation.subject)?, &self.0.machines);
        // Before the owner has said that it has the guest, another one's may be the only one.
        let Some(known) = known.filter(|known| known.settled && known.confirmed) else {
            return Ok(Progress::Done);
        };
        let mut goes = false;
        for (holder, said) in machines.fleet().holders(server) {
            let gone = said.settled && said.observed == Observed::Absent;
            if Some(holder) == known.host || gone || said.generation >= known.generation {
                continue;
            }
            let dropped = machines.drop_at(holder, &known, said.revision).await?;
            goes |= dropped == Dropped::Working;
        }
        let waits = goes && waited_us(&self.0, operation) < LONGEST_DROP_US;
        Ok(match waits {
            true => Progress::Wait(ASK_AGAIN),
            false => Progress::Done,
        })
    }

    /// What there is of the guest instead; one that waits for its turn is nobody else's to look after.
    fn has_ended(&self, known: &Machine) -> Option<Observed> {
        let heard = self.0.machines.fleet().machine(known.host?, known.server)?;
        let is_of_now = heard.settled && (heard.generation, heard.revision) == known.age();
        let ended = matches!(
            heard.observed,
            Observed::Stopped { .. } | Observed::Failed { .. } | Observed::Absent
        );
        (is_of_now && ended).then_some(heard.observed)
    }
}

#[async_trait]
impl Step for Place {
    fn name(&self) -> &'static str {
        "place"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        let known = machine::find(machines.reader(), server).await?;
        if let Some(observed) = known.as_ref().and_then(|known| self.has_ended(known)) {
            return Err(StepError::fail(format!(
                "the guest does not run any more: {observed:?}"
            )));
        }
        if let Progress::Wait(pause) = self.clear(operation, known).await? {
            return Ok(Progress::Wait(pause));
        }
        Ok(
            match queue::turn(machines, machines.reader(), operation).await? {
                Turn::Now(_) => Progress::Done,
                Turn::Later => Progress::Wait(LOOK_AGAIN),
            },
        )
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let (tools, now) = (&self.0, self.0.clock.now_us());
        let mut state: State = operation.state()?;
        if state.key.is_none() {
            return Err(StepError::fail(
                "this controller has no master key to seal the stream's key with",
            ));
        }
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        let known = known.filter(|known| known.host == Some(state.source) && !known.is_tombstone());
        let known = known.ok_or_else(|| StepError::fail("the server is not where it was"))?;
        let full = match queue::turn(&tools.machines, tx, operation).await? {
            Turn::Now(full) => full,
            Turn::Later => return Err(StepError::retry("another guest goes first")),
        };
        let request = Request {
            excluded: full,
            ..queue::request(&known, state.source, state.host)
        };
        let target = match tools.machines.place(tx, &request).await {
            Ok(target) => target,
            Err(NoHost::Database(error)) => return Err(error.into()),
            Err(NoHost::Rejected(why)) => {
                return Err(StepError::fail(format!("No valid host was found. {why}")));
            }
        };
        let told = tools.machines.fleet().machine(target, server);
        let told = told.filter(|told| told.generation == known.generation);
        let above = told.map_or(Revision(0), |told| told.revision);
        let request_id = operation.origin.request_id.clone();
        let raised = machine::change_above(tx, server, above, request_id, now, |_| {}).await?;
        state.begun = raised.as_ref().map(Begun::of);
        state.target = Some(target);
        let hostname = host::find(tx, target).await?.map(|row| row.hostname);
        let change = migration::ActiveModel {
            target_id: Set(Some(target.to_string())),
            target: Set(hostname),
            ..is_now(Status::Preparing, now)
        };
        migration::update(tx, state.migration, change).await?;
        operation.set_state(&state)
    }

    /// The source goes on with its guest, and nothing is left on the target.
    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        let Some(known) = machine::find(machines.reader(), server).await? else {
            return Ok(Progress::Done);
        };
        let dropped = match (state.target, state.begun) {
            (Some(target), Some(begun)) if known.host != Some(target) => {
                machines.drop_at(target, &known, begun.revision).await?
            }
            _ => Dropped::Gone,
        };
        // A tombstone is the delete's to tell.
        let is_off = machines.is_off(machines.reader(), state.source).await?;
        if known.host == Some(state.source)
            && !known.is_tombstone()
            && known.confirmed
            && is_off.is_none()
        {
            // The row says what is wanted: a source that is not heard is told by the reconciler when it is.
            let late = waited_us(&self.0, operation) > LONGEST_DROP_US;
            match machines.converge(server).await {
                Ok(Converged::Pending(_)) if !late => return Ok(Progress::Wait(ASK_AGAIN)),
                Err(error @ (StepError::Retry { .. } | StepError::Database(_))) if !late => {
                    return Err(error);
                }
                // One that has lost it: the outcome says so.
                Ok(_) | Err(_) => {}
            }
        }
        match dropped {
            Dropped::Gone => Ok(Progress::Done),
            Dropped::Working => Ok(Progress::Wait(ASK_AGAIN)),
            Dropped::Unreachable(_) if waited_us(&self.0, operation) > LONGEST_DROP_US => {
                Ok(Progress::Done)
            }
            Dropped::Unreachable(reason) => Err(StepError::retry(reason)),
        }
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        let owner = known.and_then(|known| known.host);
        if let Some(target) = state.target.filter(|target| owner != Some(*target)) {
            host::release(tx, target, server).await?;
        } else if owner.is_some() && owner == state.target {
            host::release(tx, state.source, server).await?;
        }
        Ok(())
    }
}
