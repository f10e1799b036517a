//! The steps after the first, and how each is taken back. See the table in [`super`].

use async_trait::async_trait;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, ServerId, StopReason};
use fractus_agent_api::migration::{Arrival, Departure, Policy, State as Stream};
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;

use super::back::{hear_target, look_again, take_back};
use super::{Begun, POST_COPY, State, goes_on, is_now, kept, never_ran};
use super::{follow, guest};
use crate::agents::host;
use crate::compute::ops::{Tools, machine_id};
use crate::operation::{Operation, Progress, Step, StepError};
use crate::reconcile::machine::Machine;
use crate::reconcile::migration::{self, Status};
use crate::reconcile::{ASK_AGAIN, Converged, machine, state_of};

/// A target that has not listened for so long will not.
const LONGEST_PREPARE_US: i64 = 600_000_000;
/// Beyond what the policy gives: a guest that is still not offered then stays. Its disks travel, which may take hours.
const LONGEST_SEND_US: i64 = 86_400_000_000;

/// The row, while it is the source's and nothing else was asked of the guest.
async fn undisturbed(
    tools: &Tools,
    operation: &Operation,
    state: &State,
) -> Result<(Machine, Begun), StepError> {
    let server = machine_id(&operation.subject)?;
    let known = machine::find(tools.machines.reader(), server).await?;
    expected(state, known)
}

fn expected(state: &State, known: Option<Machine>) -> Result<(Machine, Begun), StepError> {
    let begun = state.begun.filter(|begun| {
        known
            .as_ref()
            .is_some_and(|known| known.host == Some(state.source) && begun.still_holds(known))
    });
    match (known, begun) {
        (Some(known), Some(begun)) => Ok((known, begun)),
        _ => Err(StepError::fail(
            "something else has been asked of the server meanwhile",
        )),
    }
}

fn target(state: &State) -> Result<HostId, StepError> {
    let target = state.target;
    target.ok_or_else(|| StepError::fail("no target was chosen"))
}

pub(super) fn waited_us(tools: &Tools, operation: &Operation) -> i64 {
    let now = tools.clock.now_us();
    now.saturating_sub(operation.step_entered_at_us)
}

/// The target makes room for the guest, and listens.
pub(super) struct Prepare(pub(super) Tools);

impl Prepare {
    /// What the guest's process was made for. A guest that has just come may be known of only by what was said before
    /// it ran: then its host is asked.
    async fn arrival(&self, operation: &Operation, state: &State) -> Result<Arrival, StepError> {
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        let runs =
            |said: &MachineReport| matches!(said.observed, Observed::Running | Observed::Paused);
        let heard = machines.fleet().machine(state.source, server);
        let said = match heard.filter(|heard| runs(heard) && heard.shape.is_some()) {
            Some(said) => Some(said),
            None => machines.ask(state.source, server).await?,
        };
        let said = said.ok_or_else(|| StepError::fail("its host has no record of the server"))?;
        if !runs(&said) {
            let observed = said.observed;
            return Err(StepError::fail(format!(
                "the guest does not run any more: {observed:?}"
            )));
        }
        let shape = said.shape.ok_or_else(|| {
            StepError::fail(format!(
                "the agent of host {}, or the machine's process there, is too old to send a guest that runs; \
                 upgrade it, and reboot the server hard",
                state.source
            ))
        })?;
        Ok(Arrival {
            id: state.migration,
            key: state
                .key
                .clone()
                .ok_or_else(|| StepError::fail("the stream has no key"))?,
            direct: operation.kind != POST_COPY,
            shape,
        })
    }
}

#[async_trait]
impl Step for Prepare {
    fn name(&self) -> &'static str {
        "prepare"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let (known, begun) = undisturbed(&self.0, operation, &state).await?;
        let machines = &self.0.machines;
        let target = target(&state)?;
        if let Some(off) = machines.is_off(machines.reader(), target).await? {
            return Err(StepError::fail(off));
        }
        if known.revision != begun.revision {
            return Err(StepError::fail("the server was changed meanwhile"));
        }
        if waited_us(&self.0, operation) > LONGEST_PREPARE_US {
            return Err(StepError::fail(format!("host {target} does not listen")));
        }
        let arrival = self.arrival(operation, &state).await?;
        let heard = machines.fleet().machine(target, known.server);
        let heard = heard.filter(|heard| {
            heard.generation == known.generation
                && heard.revision >= known.revision
                && state_of(heard, state.migration).is_some()
        });
        let said = match heard {
            Some(heard) => heard,
            None => machines.prepare(target, &known, arrival).await?,
        };
        match state_of(&said, state.migration) {
            Some(Stream::Arriving { .. }) => return Ok(Progress::Done),
            Some(Stream::Failed { reason }) => return Err(StepError::fail(reason.clone())),
            _ => {}
        }
        match said.observed {
            Observed::Failed { reason } => Err(StepError::fail(reason)),
            _ => Ok(Progress::Wait(ASK_AGAIN)),
        }
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.0.clock.now_us();
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let (known, _) = expected(&state, machine::find(tx, server).await?)?;
        let target = target(&state)?;
        let said = self.0.machines.fleet().machine(target, server);
        let port = match said
            .as_ref()
            .and_then(|said| state_of(said, state.migration))
        {
            Some(Stream::Arriving { port }) => *port,
            _ => return Err(StepError::retry("the target does not listen any more")),
        };
        let row = host::find(tx, target).await?;
        let row = row.ok_or_else(|| StepError::fail(format!("host {target} was removed")))?;
        let hosts = [state.source, target];
        let machines = &self.0.machines;
        let at_limit = match operation.kind.as_str() {
            POST_COPY => follow::at_limit(machines, tx, &known, hosts).await?,
            _ => state.policy.at_limit,
        };
        let direct = operation.kind != POST_COPY;
        let departure = Departure {
            direct,
            lanes: if direct { machines.lanes() } else { 0 },
            id: state.migration,
            to: address(&row.endpoint, port)?,
            key: state
                .key
                .ok_or_else(|| StepError::fail("the stream has no key"))?,
            policy: Policy {
                at_limit,
                ..state.policy
            },
        };
        let request_id = operation.origin.request_id.clone();
        machine::change(tx, server, request_id, now, |wanted| {
            (wanted.arrives, wanted.continues) = (None, None);
            wanted.departs = Some(departure);
        })
        .await?;
        Ok(migration::update(tx, state.migration, is_now(Status::Running, now)).await?)
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        look_again(&self.0, operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        take_back(&self.0, operation, tx).await
    }
}

/// Where the target listens: at the address of its agent.
fn address(endpoint: &str, port: u16) -> Result<String, StepError> {
    let uri: http::Uri = endpoint
        .parse()
        .map_err(|error| StepError::fail(format!("the target's endpoint {endpoint}: {error}")))?;
    let host = uri
        .host()
        .ok_or_else(|| StepError::fail(format!("the target's endpoint {endpoint} has no host")))?;
    // The brackets of an IPv6 address stay.
    Ok(format!("{host}:{port}"))
}

/// The source sends, and offers; the target has it.
pub(super) struct Send(pub(super) Tools);

impl Send {
    /// What the source says of this migration, once it was told of it.
    async fn source(&self, state: &State, known: &Machine) -> Result<MachineReport, StepError> {
        let machines = &self.0.machines;
        let told = |said: &MachineReport| match state_of(said, state.migration) {
            // It holds whatever the policy is by now.
            Some(Stream::Offered { .. }) => said.generation == known.generation,
            said_so => {
                (said.generation, said.revision) == known.age()
                    && (said_so.is_some() || said.settled)
            }
        };
        if let Some(said) = machines.fleet().machine(state.source, known.server)
            && told(&said)
        {
            return Ok(said);
        }
        match machines.converge(known.server).await? {
            Converged::Settled(said) | Converged::Pending(Some(said)) => Ok(said),
            Converged::Pending(None) => Err(StepError::retry("the source has said nothing yet")),
            Converged::NoOwner => Err(StepError::fail("the server has no host any more")),
            Converged::Lost(lost) => Err(StepError::fail(format!(
                "host {} was removed from the cloud",
                lost.host
            ))),
        }
    }

    /// Both hosts have said that the guest stands still between them, in the generation in which its target was chosen.
    /// Whether it is to go all the same is then the commit's to see: nothing is read for that beforehand.
    fn both_have_said(&self, state: &State, server: ServerId) -> bool {
        let (fleet, id) = (self.0.machines.fleet(), state.migration);
        let (Some(begun), Some(target)) = (state.begun, state.target) else {
            return false;
        };
        let Some(source) = fleet.machine(state.source, server) else {
            return false;
        };
        let Some(Stream::Offered { doubt, .. }) = state_of(&source, id) else {
            return false;
        };
        self.offer_is_heard(state, server);
        let there = fleet.machine(target, server);
        let arrived = there.is_some_and(|there| state_of(&there, id) == Some(&Stream::Arrived));
        arrived && doubt.is_none() && source.generation == begun.generation
    }

    /// From then on the guest stands still for its owner's move.
    fn offer_is_heard(&self, state: &State, server: ServerId) {
        let heard = self.0.machines.fleet().said_at_us(state.source, server);
        let heard = heard.unwrap_or_else(|| self.0.clock.now_us());
        self.0.handovers.offered(state.migration, heard);
    }

    /// The guest is offered: whether the target has it. With a doubt only a fresh word of the target's counts.
    async fn has_arrived(
        &self,
        state: &State,
        known: &Machine,
        doubt: Option<&String>,
    ) -> Result<Progress, StepError> {
        let (machines, id) = (&self.0.machines, state.migration);
        let target = target(state)?;
        let heard = machines.fleet().machine(target, known.server);
        if doubt.is_none()
            && let Some(Stream::Arrived) = heard.as_ref().and_then(|heard| state_of(heard, id))
        {
            return Ok(Progress::Done);
        }
        let said = machines.ask(target, known.server).await?;
        let why = doubt.map_or_else(String::new, |doubt| format!(" ({doubt})"));
        match said.as_ref().and_then(|said| state_of(said, id)) {
            Some(Stream::Arrived) => Ok(Progress::Done),
            Some(Stream::Arriving { .. }) if doubt.is_none() => Ok(Progress::Wait(ASK_AGAIN)),
            Some(Stream::Failed { reason }) => Err(StepError::fail(format!("{reason}{why}"))),
            _ => Err(StepError::fail(format!(
                "the target does not have the guest{why}"
            ))),
        }
    }
}

#[async_trait]
impl Step for Send {
    fn name(&self) -> &'static str {
        "send"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        if self.both_have_said(&state, machine_id(&operation.subject)?) {
            return Ok(Progress::Done);
        }
        let (known, _) = undisturbed(&self.0, operation, &state).await?;
        let (machines, id) = (&self.0.machines, state.migration);
        let target = target(&state)?;
        if known.wanted.departs.as_ref().map(|departure| departure.id) != Some(id) {
            return Err(StepError::fail("the guest is not to be sent any more"));
        }
        if let Some(off) = machines.is_off(machines.reader(), target).await? {
            return Err(StepError::fail(off));
        }
        let said = match self.source(&state, &known).await {
            Err(StepError::Retry { reason, .. }) if self.is_overdue(operation, &known) => {
                return Err(StepError::fail(reason));
            }
            said => said?,
        };
        match state_of(&said, id) {
            Some(Stream::Offered { doubt, .. }) => {
                self.offer_is_heard(&state, known.server);
                return self.has_arrived(&state, &known, doubt.as_ref()).await;
            }
            // Its process is gone, and begins no other under this intent: the target may have had all of the guest by
            // then, and is the only one who has it.
            Some(Stream::Failed { reason }) if is_gone(&said) => {
                return self.has_arrived(&state, &known, Some(reason)).await;
            }
            Some(Stream::Failed { reason }) => return Err(StepError::fail(reason.clone())),
            _ => {}
        }
        match said.observed {
            Observed::Stopped { reason } => Err(StepError::fail(format!(
                "the guest has ended while it was sent: {reason:?}"
            ))),
            Observed::Failed { reason } => Err(StepError::fail(reason)),
            _ if self.is_overdue(operation, &known) => Err(StepError::fail(
                "the guest was not offered in the time that it was given",
            )),
            _ => self.target_still_listens(&state, &known, target),
        }
    }

    /// The commit point: the row, and with it the guest, is the target's.
    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.0.clock.now_us();
        let mut state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let (known, _) = expected(&state, machine::find(tx, server).await?)?;
        let (target, id) = (target(&state)?, state.migration);
        if known.wanted.departs.as_ref().map(|departure| departure.id) != Some(id) {
            return Err(StepError::fail("the guest is not to be sent any more"));
        }
        if let Some(off) = self.0.machines.is_off(tx, target).await? {
            return Err(StepError::fail(off));
        }
        let mut wanted = known.wanted.clone();
        (wanted.arrives, wanted.departs) = (None, None);
        wanted.continues = Some(id);
        let said = self.0.machines.fleet().machine(state.source, server);
        if let Some(said) = &said {
            guest::leaves(&self.0, tx, (&known, said), &mut state, &mut wanted).await?;
        }
        if !machine::move_owner(tx, &known, target, &wanted, now).await? {
            return Err(StepError::fail("the server was changed meanwhile"));
        }
        let mut change = is_now(Status::PostMigrating, now);
        if let Some(report) = said
            .and_then(|said| said.migration)
            .filter(|it| it.id == id)
        {
            change.progress = Set(kept(&report.progress));
        }
        migration::update(tx, id, change).await?;
        operation.set_state(&state)
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        hear_target(&self.0, operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        take_back(&self.0, operation, tx).await
    }
}

/// Nothing is left of the guest where it was sent from: no process either, whose shape would be said. One that has ended
/// by itself ran there until then, so the target has not all of it, and need not be asked.
fn is_gone(said: &MachineReport) -> bool {
    let over = matches!(
        said.observed,
        Observed::Failed { .. }
            | Observed::Stopped {
                reason: StopReason::VmmFault { .. } | StopReason::HostReboot
            }
    );
    over && said.shape.is_none()
}

impl Send {
    fn is_overdue(&self, operation: &Operation, known: &Machine) -> bool {
        let departure = known.wanted.departs.as_ref();
        let limit_ms = departure.map_or(0, |departure| {
            departure.policy.limit_ms.max(departure.policy.longest_ms)
        });
        let limit_us = i64::try_from(limit_ms.saturating_mul(1000)).unwrap_or(i64::MAX);
        waited_us(&self.0, operation) > limit_us.saturating_add(LONGEST_SEND_US)
    }

    /// The guest is not offered: a target that has given up is one that it never will be.
    fn target_still_listens(
        &self,
        state: &State,
        known: &Machine,
        target: HostId,
    ) -> Result<Progress, StepError> {
        let heard = self.0.machines.fleet().machine(target, known.server);
        match heard
            .as_ref()
            .and_then(|heard| state_of(heard, state.migration))
        {
            Some(Stream::Failed { reason }) => Err(StepError::fail(reason.clone())),
            _ => Ok(Progress::Wait(ASK_AGAIN)),
        }
    }
}

/// The target is told that the guest is its own, and says that it goes on.
pub(super) struct Resume(pub(super) Tools);

#[async_trait]
impl Step for Resume {
    fn name(&self) -> &'static str {
        "resume"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let (machines, id) = (&self.0.machines, state.migration);
        let target = target(&state)?;
        self.0.handovers.moved(id, self.0.clock.now_us());
        let whose = machines.whose(target, server).await?;
        let Some(known) = whose.machine.clone() else {
            return Ok(Progress::Done);
        };
        // Deleted meanwhile, or moved on by somebody else: it is theirs to carry on.
        if known.is_tombstone() || known.host != Some(target) {
            return Ok(Progress::Done);
        }
        // What it has said itself counts for more than what is said of it.
        let heard = machines.fleet().machine(target, server);
        let heard = heard.filter(|said| (said.generation, said.revision) == known.age());
        if heard.is_some_and(|said| said.settled && goes_on(&said, id)) {
            let since = machines.fleet().said_at_us(target, server);
            let since = since.unwrap_or_else(|| self.0.clock.now_us());
            self.0.handovers.runs(id, since);
            return Ok(Progress::Done);
        }
        if let Some(off) = whose.is_off() {
            return Err(StepError::fail(off));
        }
        let said = match machines.converge_known(&known, Some(&whose)).await? {
            Converged::Settled(said) | Converged::Pending(Some(said)) => said,
            Converged::Lost(lost) => {
                return Err(StepError::fail(format!(
                    "host {} was removed from the cloud",
                    lost.host
                )));
            }
            Converged::Pending(None) | Converged::NoOwner => return Ok(Progress::Wait(ASK_AGAIN)),
        };
        if (said.generation, said.revision) != known.age() {
            return Ok(Progress::Wait(ASK_AGAIN));
        }
        self.0.handovers.told(id, self.0.clock.now_us());
        if never_ran(&said, id) {
            let reason = match state_of(&said, id) {
                Some(Stream::Failed { reason }) => reason.clone(),
                _ => format!("the guest was lost on its way: {:?}", said.observed),
            };
            return Err(StepError::fail(reason));
        }
        let continued = state_of(&said, id) == Some(&Stream::Continued);
        Ok(if continued || said.settled {
            self.0.handovers.runs(id, self.0.clock.now_us());
            Progress::Done
        } else {
            Progress::Wait(ASK_AGAIN)
        })
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.0.clock.now_us();
        let mut state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        let owner = known.as_ref().and_then(|known| known.host);
        // Where memory may follow, the source is needed yet.
        if owner != Some(state.source) && operation.kind != POST_COPY {
            host::release(tx, state.source, server).await?;
        }
        let said = owner.and_then(|owner| self.0.machines.fleet().machine(owner, server));
        let said = said.filter(|said| {
            known.as_ref().is_some_and(|known| {
                !known.is_tombstone() && known.age() == (said.generation, said.revision)
            })
        });
        if let (Some(said), Some(known)) = (said, &known) {
            if let Some(plain) = guest::settled(known, &said, &state) {
                machine::settle(tx, &plain, now).await?;
            }
            state.observed = Some(said.observed);
        }
        self.0.handovers.keep(tx, state.migration).await?;
        operation.set_state(&state)
    }
}
