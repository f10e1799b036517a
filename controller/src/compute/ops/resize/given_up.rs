//! What becomes of a resize whose server an administrator has called something else, or that failed on its way back and
//! was mended since.
//!
//! What a server could go back to is only let go of while its owner is there, and has said that it has what the server
//! is: otherwise it may be all that is left.

use fractus_agent_api::machine::{MachineReport, Observed, Power, ServerId};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr};

use super::{MIGRATE, RESIZE, close, forget_copy, open_one, steps, verdict};
use crate::agents::host;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::ops::{machine_id, migrate, to_state, turn};
use crate::compute::store::server;
use crate::operation;
use crate::reconcile::Machines;
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration::{self, Status};
use crate::scheduler::HostPresence;

const KINDS: [&str; 4] = [RESIZE, MIGRATE, verdict::REVERT, verdict::CONFIRM];

/// An administrator has said what the server is: what is under way is taken back if it can be, and what waits for its
/// user's word stays as it is now; part of the transaction of what wants so. Some: what it could go back to is kept, as
/// its owner has not said that it has what the server is; it still waits for its user's word, and this is its state.
pub async fn give_up(
    tx: &DatabaseTransaction,
    machines: &Machines,
    id: &str,
    reason: &str,
    now_us: i64,
) -> Result<Option<ServerState>, DbErr> {
    // A confirm goes on: it comes to the same.
    operation::cancel(tx, id, &[RESIZE, MIGRATE, verdict::REVERT], reason).await?;
    let Ok(server) = machine_id(id) else {
        return Ok(None);
    };
    if is_at_work(tx, id).await? {
        return Ok(None);
    }
    // It waits for its user's word, or its operation is parked.
    let Some(of) = open_one(tx, server).await? else {
        return Ok(None);
    };
    match why_not_there(machines, tx, server, Word::Recorded).await? {
        None => {
            stays(tx, server, &of, reason, now_us).await?;
            Ok(None)
        }
        Some(why) if of.status() == Status::Finished => {
            tracing::warn!(%server, why, "what the server could go back to is kept");
            Ok(Some(waits(tx, server).await?))
        }
        Some(why) => {
            tracing::warn!(%server, why, "what its migration has left is kept");
            Ok(None)
        }
    }
}

/// One of its operations decides what becomes of it.
async fn is_at_work(tx: &DatabaseTransaction, id: &str) -> Result<bool, DbErr> {
    let open = operation::unfinished(tx, Some(id)).await?;
    Ok(open
        .iter()
        .any(|other| other.parked.is_none() && KINDS.contains(&other.kind.as_str())))
}

/// The state of one that waits for its user's word.
async fn waits(tx: &DatabaseTransaction, server: ServerId) -> Result<ServerState, DbErr> {
    let known = machine::find(tx, server).await?;
    let runs = known.is_some_and(|known| known.wanted.power != Power::Stopped);
    Ok(ServerState::Resized(match runs {
        true => Standing::Active,
        false => Standing::Stopped,
    }))
}

/// The server's state was reset while its operation was under way, which has ended with the server as it is now: as if it
/// were reset after that.
pub(super) async fn was_reset(
    tx: &DatabaseTransaction,
    machines: &Machines,
    server: ServerId,
    of: &migration::Model,
    now_us: i64,
) -> Result<(), DbErr> {
    if why_not_there(machines, tx, server, Word::Heard)
        .await?
        .is_none()
    {
        return stays(tx, server, of, "the server's state was reset", now_us).await;
    }
    migration::update(
        tx,
        of.migration(),
        migrate::is_now(Status::Finished, now_us),
    )
    .await?;
    let kept = waits(tx, server).await?;
    turn(tx, &server.to_string(), |row| {
        (row.state() == ServerState::Active).then(|| to_state(kept, now_us))
    })
    .await
}

/// The server stays what it is now, and cannot go back any more. Its owner has what it is.
async fn stays(
    tx: &DatabaseTransaction,
    server: ServerId,
    of: &migration::Model,
    reason: &str,
    now_us: i64,
) -> Result<(), DbErr> {
    let Some(mut known) = machine::find(tx, server).await? else {
        return Ok(());
    };
    if known.host.is_some() && has_any(&known) {
        let changed = machine::change(tx, server, None, now_us, forget_copy).await?;
        known = changed.unwrap_or(known);
    }
    let ended = (Status::Error, Some(reason.to_owned()));
    close(tx, &known, of, ended, now_us).await
}

/// Its owner keeps something to go back to.
fn has_any(known: &Machine) -> bool {
    known.wanted.copy.is_some() || known.wanted.parks.is_some()
}

/// Whose word on a machine is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// What the leader has recorded of it: who asks may be another controller, which hears no agents.
    Recorded,
    /// The leader's: also what it has heard, and not recorded yet.
    Heard,
}

/// Why it is not known that the server's owner has what the server is by its row; none: it has said so, and is there.
pub(super) async fn why_not_there(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    server: ServerId,
    word: Word,
) -> Result<Option<String>, DbErr> {
    let known = machine::find(connection, server).await?;
    let owned = known.and_then(|known| {
        let owner = known.host?;
        Some((known, owner))
    });
    let Some((known, owner)) = owned else {
        return Ok(Some("no host has the server".to_owned()));
    };
    if !is_up(machines, connection, owner).await? {
        return Ok(Some(format!("the server's host {owner} is not there")));
    }
    let recorded = known.report.clone().filter(|_| known.settled);
    let said = match word {
        Word::Recorded => recorded,
        Word::Heard if machines.has_vanished(owner, &known) => None,
        Word::Heard => {
            let heard = machines.fleet().machine(owner, server);
            let is_of_now = |said: &MachineReport| {
                said.settled && (said.generation, said.revision) == known.age()
            };
            heard.filter(is_of_now).or(recorded)
        }
    };
    let Some(said) = said.filter(|_| known.confirmed) else {
        return Ok(Some(
            "the server's host has not said what it has".to_owned(),
        ));
    };
    let is_well = matches!(
        said.observed,
        Observed::Running | Observed::Paused | Observed::Stopped { .. }
    );
    Ok(match is_well && steps::is_made(&known, &said) {
        true => None,
        false => Some(format!(
            "the server's host says that it is {:?}",
            said.observed
        )),
    })
}

/// The host is heard, and was not declared to be off.
pub(super) async fn is_up(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    host: fractus_agent_api::host::HostId,
) -> Result<bool, DbErr> {
    let row = host::find(connection, host).await?;
    Ok(row.is_some_and(|row| machines.presence(&row) == HostPresence::Up))
}

/// The owner has what is wanted of it: a disk that was to be made of a copy is made, so that the copy is of no use any
/// more. Of a server that could still go back, it is what it goes back to; of one that failed on its way, and runs by now,
/// nothing else is kept either.
pub async fn is_made(
    tx: &DatabaseTransaction,
    server: ServerId,
    runs: bool,
    now_us: i64,
) -> Result<(), DbErr> {
    let known = machine::find(tx, server).await?;
    let row = server::find(tx, &server.to_string()).await?;
    let (Some(known), Some(row)) = (known, row) else {
        return Ok(());
    };
    let may_go_back = matches!(
        row.state(),
        ServerState::Resizing(..) | ServerState::Resized(_)
    );
    if may_go_back {
        return Ok(());
    }
    if known.wanted.restores.is_some() {
        let request_id = known.request_id.clone();
        machine::change(tx, server, request_id, now_us, forget_copy).await?;
    }
    let failed = open_one(tx, server).await?;
    let failed = failed.filter(|of| matches!(of.status(), Status::Error | Status::Finished));
    // Of one that is being confirmed, or goes back, its operation says so.
    if let Some(of) = failed
        && runs
        && !is_at_work(tx, &row.id).await?
    {
        let reason = of.reason.clone();
        let reason = reason.unwrap_or_else(|| "the server was started anew instead".to_owned());
        stays(tx, server, &of, &reason, now_us).await?;
    }
    Ok(())
}
