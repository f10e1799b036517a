//! Post-copy: a guest that goes on at its target before all of its memory is there.
//!
//! Its migration is over only once the target has everything. Until then it needs a process on each of its two hosts, and is
//! lost with either; connections are the agents' to mend. Whoever allows it allows that: `fractus serve
//! --post-copy`, or a flavor's extra spec [`POST_COPY`].

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, ServerId};
use fractus_agent_api::migration::{AtLimit, Lacks, MigrationId, Policy, State as Stream};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr};

use super::{AT_ONCE, State};
use crate::agents::host;
use crate::compute::model::flavor::{FlavorSnapshot, POST_COPY};
use crate::compute::ops::Tools;
use crate::compute::store::server;
use crate::operation::StepError;
use crate::reconcile::{Machines, state_of};

/// As its flavor says, or else as the cloud does.
fn is_allowed(machines: &Machines, flavor: &FlavorSnapshot) -> bool {
    let said = flavor.extra_specs.get(POST_COPY);
    // One that no release knows was given before it was checked.
    let said = said.and_then(|word| word.parse().ok());
    said.unwrap_or_else(|| machines.post_copy())
}

/// What becomes of a guest that writes faster than it is copied.
pub(super) async fn at_limit(
    machines: &Machines,
    tx: &DatabaseTransaction,
    server: &str,
    hosts: [HostId; 2],
) -> Result<AtLimit, DbErr> {
    let row = server::find(tx, server).await?;
    let allowed = match row {
        Some(row) => is_allowed(machines, &row.flavor()?),
        None => false,
    };
    if !allowed {
        return Ok(AtLimit::Stop);
    }
    for id in hosts {
        let row = host::find(tx, id).await?;
        let report = row.and_then(|row| machines.report(&row));
        if !report.is_some_and(|report| report.post_copy) {
            tracing::info!(server, host = %id, "no memory can follow a guest there");
            return Ok(AtLimit::Stop);
        }
    }
    Ok(AtLimit::PostCopy)
}

/// For one that is to be done with: it goes on there now, or is stopped for the rest.
pub(super) fn at_once(policy: &Policy) -> Policy {
    match policy.at_limit {
        AtLimit::PostCopy => Policy {
            limit_ms: 0,
            ..*policy
        },
        AtLimit::Stop | AtLimit::GiveUp => AT_ONCE,
    }
}

/// How a guest stands that goes on at its target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Following {
    /// It needs its source no more.
    Whole,
    Coming,
    /// What it has not got it never will, and this is why.
    Lost(String),
}

fn lacks(report: &MachineReport, id: MigrationId) -> Option<&Lacks> {
    let said = report.migration.as_ref().filter(|said| said.id == id)?;
    said.lacks.as_ref()
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
    let Some(said) = machines.fleet().machine(state.source, server) else {
        return Ok(None);
    };
    Ok(match (state_of(&said, state.migration), &said.observed) {
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

/// What follows from what was heard of both hosts.
pub(super) async fn heard(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    state: &State,
    (target, server): (HostId, ServerId),
) -> Result<Following, DbErr> {
    let said = machines.fleet().machine(target, server);
    let said = said.as_ref().and_then(|said| lacks(said, state.migration));
    let Some(lacks) = said else {
        return Ok(Following::Whole);
    };
    let gone = is_gone(machines, connection, state, server).await?;
    Ok(match (gone, &lacks.starving) {
        (Some(why), Some(_)) => Following::Lost(format!(
            "the guest was lost on its way: some of its memory was on its old host still, and {why}"
        )),
        _ => Following::Coming,
    })
}

/// The same; before a guest is given up its target is asked: what it lacked may have come with the source's last breath.
pub(super) async fn look(
    tools: &Tools,
    state: &State,
    (target, server): (HostId, ServerId),
) -> Result<Following, StepError> {
    let machines = &tools.machines;
    let reader = machines.reader();
    let following = heard(machines, reader, state, (target, server)).await?;
    if following == Following::Whole {
        return Ok(following);
    }
    if is_gone(machines, reader, state, server).await?.is_none() {
        return Ok(Following::Coming);
    }
    machines.ask(target, server).await?;
    Ok(heard(machines, reader, state, (target, server)).await?)
}
