//! How a migration is taken back, by the same row as its commit: whichever comes first is the only one.

use fractus_agent_api::machine::{Observed, Power};
use fractus_agent_api::migration::State as Stream;
use sea_orm::DatabaseTransaction;

use super::handover::keep_progress;
use super::{POST_COPY, State, goes_on, never_ran};
use crate::compute::ops::{Tools, machine_id};
use crate::operation::{Operation, Progress, StepError};
use crate::reconcile::{ASK_AGAIN, Converged, machine};

/// Before anything is taken back its owner is asked once how it is, and not waited for.
pub(super) async fn look_again(
    tools: &Tools,
    operation: &Operation,
) -> Result<Progress, StepError> {
    let server = machine_id(&operation.subject)?;
    let known = machine::find(tools.machines.reader(), server).await?;
    if let Some(owner) = known.and_then(|known| known.host) {
        drop(tools.machines.ask(owner, server).await);
    }
    Ok(Progress::Done)
}

/// While the row is the target's, its word alone says whether the guest was lost there: it is waited for, unless an
/// operator has said that the host is off.
pub(super) async fn hear_target(
    tools: &Tools,
    operation: &Operation,
) -> Result<Progress, StepError> {
    let state: State = operation.state()?;
    let server = machine_id(&operation.subject)?;
    let reader = tools.machines.reader();
    let known = machine::find(reader, server).await?;
    let theirs = known.filter(|known| {
        known.host.is_some()
            && known.host == state.target
            && known.wanted.continues == Some(state.migration)
            && known.confirmed
            && !known.is_tombstone()
    });
    let Some(known) = theirs else {
        return look_again(tools, operation).await;
    };
    if let Some(target) = known.host
        && tools.machines.is_off(reader, target).await?.is_some()
    {
        return Ok(Progress::Done);
    }
    match tools.machines.converge(server).await {
        Ok(Converged::Pending(_)) => Ok(Progress::Wait(ASK_AGAIN)),
        Ok(_) | Err(StepError::Fail { .. }) => Ok(Progress::Done),
        Err(error) => Err(error),
    }
}

/// The guest is not to be sent any more; or is the source's again, if the target has lost it before it ran.
pub(super) async fn take_back(
    tools: &Tools,
    operation: &mut Operation,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let now = tools.clock.now_us();
    let mut state: State = operation.state()?;
    let (id, server) = (state.migration, machine_id(&operation.subject)?);
    let Some(known) = machine::find(tx, server).await? else {
        return Ok(());
    };
    if known.is_tombstone() {
        return Ok(());
    }
    let fleet = tools.machines.fleet();
    let sent = fleet
        .machine(state.source, server)
        .and_then(|said| said.migration);
    if let Some(sent) = sent.as_ref().filter(|sent| sent.id == id) {
        keep_progress(tx, id, &sent.progress).await?;
    }
    if let Some(target) = known.host.filter(|host| Some(*host) == state.target)
        && known.wanted.continues == Some(id)
    {
        let said = fleet.machine(target, server);
        let said = said.filter(|said| (said.generation, said.revision) == known.age());
        let lost = said.as_ref().is_some_and(|said| never_ran(said, id));
        let runs = said.as_ref().is_some_and(|said| goes_on(said, id));
        let off = !lost && !runs && tools.machines.is_off(tx, target).await?.is_some();
        // It may have been told something else since, and runs: there it stays then. So does one whose memory has followed
        // it, and may have run: what its source has is older.
        let all_there = sent
            .as_ref()
            .filter(|sent| sent.id == id)
            .is_some_and(|sent| {
                let owed = matches!(sent.state, Stream::Offered { owes: true, .. });
                !owed && sent.progress.followed.is_none()
            });
        if lost || off && (operation.kind != POST_COPY || all_there) {
            let wanted = known.wanted.clone();
            machine::move_owner(tx, &known, state.source, &wanted, now).await?;
        }
        return operation.set_state(&state);
    }
    if known.host != Some(state.source) {
        return Ok(());
    }
    let said = fleet.machine(state.source, server);
    let ended = said.filter(|said| said.generation == known.generation);
    let ended = ended.and_then(|said| match said.observed {
        Observed::Stopped { reason } if known.wanted.power != Power::Stopped => Some(reason),
        _ => None,
    });
    let departs = known.wanted.departs.as_ref().map(|departure| departure.id);
    if departs == Some(id) || ended.is_some() {
        let request_id = operation.origin.request_id.clone();
        let stops = ended.is_some();
        machine::change(tx, server, request_id, now, |wanted| {
            wanted.departs = None;
            if stops {
                wanted.power = Power::Stopped;
            }
        })
        .await?;
    }
    if ended.is_some() {
        state.ended = ended;
    }
    operation.set_state(&state)
}
