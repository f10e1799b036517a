//! Post-copy: a guest that goes on at its target before all of its memory is there.
//!
//! Its migration is over only once the target has everything. Until then it needs a process on each of its two hosts, and is
//! lost with either; connections are the agents' to mend. Whoever allows it allows that: `fractus serve
//! --post-copy`, or a flavor's extra spec [`EXTRA_SPEC`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{
    Generation, MachineReport, Observed, Pages, Power, Revision, ServerId,
};
use fractus_agent_api::migration::{AtLimit, Policy, State as Stream};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr};

use super::handover::keep_progress;
use super::{AT_ONCE, State, goes_on};
use crate::agents::host;
use crate::compute::model::flavor::{FlavorSnapshot, POST_COPY as EXTRA_SPEC};
use crate::compute::ops::{Tools, machine_id};
use crate::operation::{Operation, OperationId, Progress, Step, StepError};
use crate::reconcile::machine::Machine;
use crate::reconcile::{ASK_AGAIN, Machines, machine, state_of};

/// As its flavor says, or else as the cloud does.
pub fn is_allowed(machines: &Machines, flavor: &FlavorSnapshot) -> bool {
    let said = flavor.allows(EXTRA_SPEC);
    said.unwrap_or_else(|| machines.post_copy())
}

/// What becomes of a guest that writes faster than it is copied, if it is for its hosts to say.
pub(super) async fn at_limit(
    machines: &Machines,
    tx: &DatabaseTransaction,
    known: &Machine,
    hosts: [HostId; 2],
) -> Result<AtLimit, DbErr> {
    // Reserved pages can only be touched whole.
    if let Pages::Huge2MiB | Pages::Huge1GiB = known.wanted.spec.pages {
        return Ok(AtLimit::Stop);
    }
    for id in hosts {
        let row = host::find(tx, id).await?;
        let report = row.and_then(|row| machines.report(&row));
        if !report.is_some_and(|report| report.post_copy) {
            tracing::info!(server = %known.server, host = %id, "no memory can follow a guest there");
            return Ok(AtLimit::Stop);
        }
    }
    Ok(AtLimit::PostCopy)
}

/// For one that is to be done with: it goes on there now, or is stopped for the rest.
pub(super) fn at_once(policy: &Policy) -> Policy {
    match policy.at_limit {
        // A process that cannot goes by `Stop`, and is not to end too soon.
        AtLimit::PostCopy => Policy {
            limit_ms: 0,
            longest_ms: AT_ONCE.longest_ms,
            ..*policy
        },
        // One that was slowed down stays so until then, or more would be left.
        AtLimit::Stop | AtLimit::GiveUp => Policy {
            throttle: policy.throttle,
            ..AT_ONCE
        },
    }
}

/// How a guest stands that goes on at its target.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Following {
    /// It needs its source no more.
    Whole,
    Coming,
    /// It will not be whole any more, and this is why.
    Lost(String),
}

/// Why the source will never send any more; none: it may.
async fn is_gone(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    state: &State,
    server: ServerId,
) -> Result<Option<String>, DbErr> {
    if let Some(off) = machines.is_off(connection, state.source).await? {
        return Ok(Some(off));
    }
    let fleet = machines.fleet();
    let Some(said) = fleet.machine(state.source, server) else {
        let has_none = fleet.machines(state.source).is_some();
        return Ok(has_none.then(|| "the source has no record of it".to_owned()));
    };
    Ok(match (state_of(&said, state.migration), &said.observed) {
        // It is there, whatever else it says.
        (Some(Stream::Offered { .. }), _) => None,
        (Some(Stream::Failed { reason }), _) => Some(reason.clone()),
        (_, Observed::Absent | Observed::Stopped { .. } | Observed::Failed { .. }) => {
            let observed = &said.observed;
            Some(format!(
                "the source does not have it any more: {observed:?}"
            ))
        }
        _ => None,
    })
}

/// By what its target says, while the source is there, or is not, and why.
fn judge(said: Option<&MachineReport>, state: &State, gone: Option<&String>) -> Following {
    let Some(said) = said else {
        return Following::Coming;
    };
    let id = state.migration;
    let lacks = said
        .migration
        .as_ref()
        .filter(|migration| migration.id == id);
    let lacks = lacks.and_then(|migration| migration.lacks.as_ref());
    match (lacks, gone) {
        (None, _) if state_of(said, id) == Some(&Stream::Continued) => Following::Whole,
        // Or it has ended by itself, like any other.
        (None, _) if said.settled && (goes_on(said, id) || has_ended(said)) => Following::Whole,
        (Some(lacks), Some(why)) if lacks.starving.is_some() => Following::Lost(format!(
            "the guest was lost on its way: some of its memory was on its old host still, and {why}"
        )),
        _ => Following::Coming,
    }
}

fn has_ended(said: &MachineReport) -> bool {
    matches!(
        said.observed,
        Observed::Absent | Observed::Stopped { .. } | Observed::Failed { .. }
    )
}

/// The target says that all of the guest's memory is there.
pub(super) struct Follow {
    tools: Tools,
    /// By operation, for its commit: what was judged, and of which row. Whoever has not judged does so first.
    verdicts: Mutex<BTreeMap<OperationId, (Age, Following)>>,
}

type Age = (Generation, Revision);

impl Follow {
    pub(super) fn new(tools: Tools) -> Self {
        let verdicts = Mutex::default();
        Self { tools, verdicts }
    }

    fn verdicts(&self) -> MutexGuard<'_, BTreeMap<OperationId, (Age, Following)>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a guest is given up its target is asked: what it lacked may have come with the source's last breath.
    async fn look(&self, operation: &Operation, known: &Machine) -> Result<Following, StepError> {
        let state: State = operation.state()?;
        let (machines, server) = (&self.tools.machines, known.server);
        let Some(target) = state.target.filter(|target| known.host == Some(*target)) else {
            return Ok(Following::Whole);
        };
        let of_now = |said: &MachineReport| (said.generation, said.revision) == known.age();
        let heard = machines.fleet().machine(target, server).filter(of_now);
        if judge(heard.as_ref(), &state, None) == Following::Whole {
            return Ok(Following::Whole);
        }
        let reader = machines.reader();
        if let Some(off) = machines.is_off(reader, target).await? {
            // It does not come back from what its source still has, which is older.
            let what = "the guest was lost with its new host, before all of its memory was there";
            return Ok(Following::Lost(format!("{what}: {off}")));
        }
        if heard.is_none() {
            // Something else was asked of it since, and nobody else tells it while this is under way.
            machines.converge(server).await?;
            return Ok(Following::Coming);
        }
        let Some(gone) = is_gone(machines, reader, &state, server).await? else {
            return Ok(Following::Coming);
        };
        let said = machines.ask(target, server).await?.filter(of_now);
        Ok(judge(said.as_ref(), &state, Some(&gone)))
    }

    /// The server is still where this operation has brought it.
    fn is_its_own(known: &Machine, state: &State) -> bool {
        !known.is_tombstone() && known.host == state.target
    }
}

#[async_trait]
impl Step for Follow {
    fn name(&self) -> &'static str {
        "follow"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let machines = &self.tools.machines;
        let known = machine::find(machines.reader(), server).await?;
        // Deleted meanwhile, or moved on by somebody else: it is theirs to carry on.
        let Some(known) = known.filter(|known| Self::is_its_own(known, &state)) else {
            return Ok(Progress::Done);
        };
        let following = self.look(operation, &known).await?;
        if following == Following::Coming {
            return Ok(Progress::Wait(ASK_AGAIN));
        }
        let owes = |said: Option<&MachineReport>| {
            let state = said.and_then(|said| state_of(said, state.migration));
            matches!(state, Some(Stream::Offered { owes: true, .. }))
        };
        if owes(machines.fleet().machine(state.source, server).as_ref()) {
            // Its last word is of interest, and nothing depends on it; who has all that it owed may say so before it does.
            let said = machines.ask(state.source, server).await.ok().flatten();
            let target = known
                .host
                .and_then(|host| machines.fleet().machine(host, server));
            let lives = target.is_some_and(|target| !has_ended(&target));
            let has_all = following == Following::Whole && lives;
            let now = self.tools.clock.now_us();
            let handovers = &self.tools.handovers;
            if owes(said.as_ref()) && has_all && handovers.awaits_last_word(state.migration, now) {
                return Ok(Progress::Wait(ASK_AGAIN));
            }
        }
        let verdict = (known.age(), following);
        self.verdicts().insert(operation.id, verdict);
        Ok(Progress::Done)
    }

    /// What the source has said last is kept; a guest that is lost is not waited for.
    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        let (machines, now) = (&self.tools.machines, self.tools.clock.now_us());
        let verdict = self.verdicts().get(&operation.id).cloned();
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        if known.as_ref().and_then(|known| known.host) != Some(state.source) {
            host::release(tx, state.source, server).await?;
        }
        let said = machines.fleet().machine(state.source, server);
        let said = said.and_then(|said| said.migration);
        let said = said.filter(|said| said.id == state.migration && said.progress.pause.is_some());
        if let Some(said) = said {
            keep_progress(tx, state.migration, &said.progress).await?;
        }
        let Some(known) = known.filter(|known| Self::is_its_own(known, &state)) else {
            return operation.set_state(&state);
        };
        match verdict.filter(|(age, _)| *age == known.age()) {
            None => return Err(StepError::retry("the server was changed meanwhile")),
            Some((_, Following::Lost(reason))) => {
                let request_id = operation.origin.request_id.clone();
                machine::change(tx, server, request_id, now, |wanted| {
                    wanted.power = Power::Stopped;
                })
                .await?;
                state.lost = Some(reason);
            }
            Some(_) => {}
        }
        operation.set_state(&state)
    }
}
