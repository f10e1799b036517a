//! `server_evacuate`: the host of a server was declared to be down, and another one makes the server anew.
//!
//! | step | what it does |
//! |---|---|
//! | (request) | the server's task is rebuilding; whatever else was under way with it is given up |
//! | fence | its host is silent, or does not say that it runs the server: what it said before counts for nothing |
//! | place | a host is chosen and what the server needs of it is taken; commit: it is the owner, a generation higher |
//! | start | its disk is made of its image, and its guest runs, or stays off |
//!
//! The commit of *place* is the only decision, by compare-and-set of the owner's row, and there is no way back from it.
//! It takes an operator's word that the host is off; time alone never moves a server. Before it, all is as it was.
//!
//! All disks are on hosts: those of a server are lost with its host, and made anew, the root disk of its image, others
//! empty. (Of storage that hosts share, *place* would have to keep the disks, and not to raise `rebuilds`.) What the old
//! host has goes when it is heard again: it waits for a word before it starts anything, and one that was never off ends
//! its guest on sight of the higher generation, before the new owner is told to start another.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{ImageRef, Observed, Power, ServerId, Wanted};
use fractus_agent_api::migration::MigrationId;
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;
use sea_orm::prelude::*;
use serde::{Deserialize, Serialize};

use super::create::settle;
use super::image::waited_us;
use super::{
    RequestError, Tools, change, cpu, image, instance, machine_id, migrate, resize, shelve,
    to_error, to_state, turn, unshelve,
};
use crate::agents::{fleet, host};
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::image::store;
use crate::operation::{self, Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::migration::{self, Purpose, Status};
use crate::reconcile::{Converged, NoHost, machine};
use crate::scheduler::Request;

pub const KIND: &str = "server_evacuate";

/// A host that was heard within two heartbeats is no silent one.
const FENCE_US: i64 = 2_000_000 * fleet::HEARTBEAT_INTERVAL_S as i64;
/// Nothing is decided before *place*: what is waited for longer is given up.
const LONGEST_WAIT_US: i64 = 120_000_000;

/// Of what was under way.
const GIVEN_UP: &str = "the server is evacuated";

/// What the operation knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    migration: MigrationId,
    source: HostId,
    /// An administrator's choice.
    host: Option<HostId>,
    /// The guest is to stay off.
    stop: bool,
    /// It was to be off only while it was shelved, which is given up.
    #[serde(default)]
    was_shelved: bool,
    /// Sealed; none: the one that it has.
    admin_pass: Option<String>,
    /// Whom it was given to.
    #[serde(default)]
    target: Option<HostId>,
    /// What was seen when that one had settled.
    #[serde(default)]
    observed: Option<Observed>,
}

/// What a request wants of one server.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The server's state as it was when this was admitted.
    pub from: ServerState,
    /// None: the scheduler's choice.
    pub host: Option<HostId>,
    /// The guest is to stay off there, whatever it was.
    pub stop: bool,
    /// A new password, sealed.
    pub admin_pass: Option<String>,
}

/// Writes that the server is to be made anew elsewhere, and the operation that brings it about.
pub async fn request(app: &App, origin: Origin, id: &str, wish: Wish) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let server = machine_id(id)?;
    let known = machine::find(app.database().reader(), server).await?;
    let source = known.and_then(|known| known.host);
    let source = source.ok_or(RequestError::Overtaken)?;
    let state = State {
        migration: MigrationId(app.random().uuid()),
        source,
        host: wish.host,
        stop: wish.stop,
        was_shelved: matches!(wish.from, ServerState::Shelving(Standing::Active, _)),
        admin_pass: wish.admin_pass,
        target: None,
        observed: None,
    };
    let prepared = engine.prepare(KIND, id, &state, origin.clone())?;
    let (subject, now, from) = (id.to_owned(), app.now_us(), wish.from);
    app.database()
        .write(move |tx| {
            let (id, prepared, origin) = (subject.clone(), prepared.clone(), origin.clone());
            let migration = state.migration;
            Box::pin(async move {
                let standing = from.standing().unwrap_or(Standing::Error);
                let change = to_state(ServerState::Evacuating(standing), now);
                // As long as the row says what is under way.
                give_up_others(tx, &id, (server, source)).await?;
                if !server::turn(tx, &id, from, change).await? {
                    return Err(RequestError::Overtaken);
                }
                let known = machine::find(tx, server).await?;
                let there = known.is_some_and(|known| is_theirs(&known, source));
                if !there || !is_declared_off(tx, source).await? {
                    return Err(RequestError::Overtaken);
                }
                let row = server::find(tx, &id).await?;
                let row = row.ok_or(RequestError::Overtaken)?;
                let record = record(&row, migration, source, &origin, now, tx).await?;
                migration::insert(tx, record).await?;
                Ok(prepared.insert(tx).await?)
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

fn is_theirs(known: &machine::Machine, source: HostId) -> bool {
    known.host == Some(source) && !known.is_tombstone()
}

/// By an operator; one that was removed from the cloud is, too.
async fn is_declared_off(tx: &DatabaseTransaction, host: HostId) -> Result<bool, DbErr> {
    Ok(host::find(tx, host)
        .await?
        .is_none_or(|row| row.forced_down))
}

/// Whatever its host had been asked for will not come about there.
async fn give_up_others(
    tx: &DatabaseTransaction,
    id: &str,
    (server, owner): (ServerId, HostId),
) -> Result<(), RequestError> {
    let others: Vec<&str> = change::kinds().chain([image::KIND, KIND]).collect();
    operation::cancel(tx, id, &others, GIVEN_UP).await?;
    shelve::give_up(tx, id, GIVEN_UP).await?;
    migrate::give_up(tx, server, GIVEN_UP).await?;
    // A guest that is its target's already may be its source's again, where the target is lost: by its own operation.
    let others = migration::open(tx, server).await?;
    // What a resize could go back to is on the host that the server came from: not to be lost unasked. Where that one owns
    // it still, or again, what another has is not what its user wants.
    for row in others.iter().filter(|row| row.before.is_some()) {
        if row.source() != owner && !is_declared_off(tx, row.source()).await? {
            return Err(RequestError::OnItsWay(id.to_owned()));
        }
    }
    let moved = others
        .iter()
        .any(|row| row.status() == Status::PostMigrating);
    let open = operation::unfinished(tx, Some(id)).await?;
    let decides = open
        .iter()
        .any(|it| migrate::KINDS.contains(&it.kind.as_str()) && it.parked.is_none());
    match moved && decides {
        true => Err(RequestError::OnItsWay(id.to_owned())),
        false => Ok(()),
    }
}

/// Its row among the migrations. It holds no hosts back: who owns the server says all there is to say.
async fn record(
    server: &server::Model,
    id: MigrationId,
    source: HostId,
    origin: &Origin,
    now_us: i64,
    tx: &DatabaseTransaction,
) -> Result<migration::Model, DbErr> {
    Ok(migration::Model {
        ended_at_us: Some(now_us),
        ..migrate::accepted(
            server,
            (id, Purpose::Evacuation),
            source,
            origin,
            now_us,
            tx,
        )
        .await?
    })
}

/// What the disk is made of: the image that its host made it of last, or the one that the server was made of, where
/// that was only to bring the disk (after an unshelving or a cold migration).
async fn image_of(
    tx: &DatabaseTransaction,
    row: &server::Model,
    last: ImageRef,
) -> Result<ImageRef, StepError> {
    if store::find(tx, &last.id.to_string()).await?.is_some() {
        return Ok(last);
    }
    let id = &row.image_id;
    let image = store::find(tx, id).await?;
    let image = image.ok_or_else(|| StepError::fail(format!("Image {id} could not be found.")))?;
    image
        .to_ref()
        .map_err(|unusable| StepError::fail(unusable.to_string()))
}

/// Changes that row.
async fn note(
    tx: &DatabaseTransaction,
    id: MigrationId,
    change: migration::ActiveModel,
) -> Result<(), DbErr> {
    migration::row::Entity::update_many()
        .set(change)
        .filter(migration::row::Column::Uuid.eq(id.to_string()))
        .exec(tx)
        .await
        .map(|_| ())
}

pub struct Evacuate {
    tools: Tools,
}

impl Evacuate {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for Evacuate {
    fn name(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let tools = || self.tools.clone();
        vec![
            Arc::new(Fence(tools())),
            Arc::new(Place(tools())),
            Arc::new(Start(tools())),
        ]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let now = self.tools.clock.now_us();
        let has_moved = state.target.is_some();
        let (status, reason) = match outcome {
            Outcome::Done => (Status::Done, None),
            Outcome::Undone { reason } if has_moved => (Status::Failed, Some(reason)),
            Outcome::Undone { reason } | Outcome::Parked { reason } => {
                (Status::Error, Some(reason))
            }
        };
        let change = migration::ActiveModel {
            status: Set(status.word().to_owned()),
            reason: Set(reason.cloned()),
            updated_at_us: Set(now),
            ended_at_us: Set(Some(now)),
            ..Default::default()
        };
        note(tx, state.migration, change).await?;
        // What was given up for a later request is that one's to end.
        if *outcome != Outcome::Done && change::is_followed(operation, tx).await? {
            return Ok(());
        }
        let power = match has_moved {
            true => None,
            false => as_wanted(operation, &state, now, tx).await?,
        };
        turn(tx, &operation.subject, |row| {
            let ServerState::Evacuating(standing) = row.state() else {
                // A delete, or an administrator's reset, has the last word.
                return None;
            };
            Some(match outcome {
                Outcome::Done => unshelve::runs(state.observed.as_ref(), now),
                // The action's event says why.
                Outcome::Undone { .. } if !has_moved => to_state(stands(standing, power), now),
                Outcome::Undone { reason } | Outcome::Parked { reason } => {
                    to_error(reason, Some(reason), now)
                }
            })
        })
        .await?;
        Ok(())
    }
}

/// What is wanted of a server that stays where it was, whatever was under way: its host, when it is back, does that. One
/// that was to be shelved is to run again.
async fn as_wanted(
    operation: &Operation,
    state: &State,
    now: i64,
    tx: &DatabaseTransaction,
) -> Result<Option<Power>, StepError> {
    let server = machine_id(&operation.subject)?;
    let known = machine::find(tx, server).await?;
    let Some(known) = known.filter(|known| is_theirs(known, state.source)) else {
        return Ok(None);
    };
    if !state.was_shelved || known.wanted.power != Power::Stopped {
        return Ok(Some(known.wanted.power));
    }
    let request_id = operation.origin.request_id.clone();
    machine::change(tx, server, request_id, now, |wanted| {
        wanted.power = Power::Running;
    })
    .await?;
    Ok(Some(Power::Running))
}

/// The state of a server that stays where it was.
fn stands(standing: Standing, power: Option<Power>) -> ServerState {
    match (standing, power) {
        (Standing::Error, _) | (_, None | Some(Power::Absent)) => standing.settled(),
        (_, Some(Power::Running)) => ServerState::Active,
        (_, Some(Power::Paused)) => ServerState::Paused,
        (_, Some(Power::Suspended)) => ServerState::Suspended,
        (_, Some(Power::Stopped)) => ServerState::Stopped,
    }
}

/// The host was declared to be off, and does not say that it runs the server.
struct Fence(Tools);

#[async_trait]
impl Step for Fence {
    fn name(&self) -> &'static str {
        "fence"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        if machines
            .is_off(machines.reader(), state.source)
            .await?
            .is_none()
        {
            return Err(StepError::fail(format!(
                "host {} is not declared to be down any more",
                state.source
            )));
        }
        let late = waited_us(&self.0, operation) > LONGEST_WAIT_US;
        let fenced = self.0.is_silent_or_idle(state.source, server).await;
        fenced.map_err(|error| error.given_up_if(late))?;
        // Of a restored row: one that was evacuated, or moved, since the backup is another's.
        let known = machine::find(machines.reader(), server).await?;
        let Some(known) = known.filter(|known| is_theirs(known, state.source)) else {
            return Err(StepError::fail("the server is not where it was"));
        };
        let nobodys = unshelve::is_nobodys(machines, &known, machines.reader()).await;
        nobodys.map_err(|error| error.given_up_if(late))?;
        Ok(Progress::Done)
    }
}

impl Tools {
    /// Whether a host that was declared to be off does not run the server, as far as it can be asked. What one that gives
    /// no answer has said before counts for nothing, but not while it was heard of late: its agent may only be starting.
    pub(super) async fn is_silent_or_idle(
        &self,
        host: HostId,
        server: ServerId,
    ) -> Result<(), StepError> {
        let machines = &self.machines;
        match machines.ask(host, server).await {
            Ok(Some(said)) if crate::reconcile::runs(&said) => Err(StepError::fail(format!(
                "host {host} answers, and runs the server: it is not down, whatever was declared; end the server there, \
                 or its host, first"
            ))),
            // It was switched on again, and starts nothing before it is told to.
            Ok(_) => Ok(()),
            Err(error) => {
                let heard = machines.fleet().heard_at_us(host);
                let silent_us = heard.map(|heard| self.clock.now_us().saturating_sub(heard));
                if silent_us.is_some_and(|silent| silent < FENCE_US) {
                    return Err(StepError::retry(format!(
                        "host {host} was heard of late: it is asked again until it has been silent for long enough \
                         ({error})"
                    )));
                }
                machines.fleet().forget_machines(host);
                Ok(())
            }
        }
    }
}

impl Tools {
    /// What was on its way from a host when it lost its power is heard after it was fenced: it holds the owner no longer.
    pub(super) async fn fence_others(&self, server: ServerId) -> Result<(), StepError> {
        let machines = &self.machines;
        let known = machine::find(machines.reader(), server).await?;
        let owner = known.and_then(|known| known.host);
        for (holder, said) in machines.fleet().holders(server) {
            if Some(holder) != owner && crate::reconcile::runs(&said) {
                self.fence_off(holder, server).await?;
            }
        }
        Ok(())
    }

    /// If the host was declared to be off: waits until it does not run the server, as far as it can be asked.
    pub(super) async fn fence_off(&self, host: HostId, server: ServerId) -> Result<(), StepError> {
        let machines = &self.machines;
        if machines.is_off(machines.reader(), host).await?.is_none() {
            return Ok(());
        }
        // What is decided is not given up for what another host says: the reconciler has that end its guest.
        self.is_silent_or_idle(host, server)
            .await
            .map_err(|error| match error {
                StepError::Fail { reason } => StepError::retry(reason),
                other => other,
            })
    }
}

/// Chooses a host, takes what the server needs of it, and makes it the owner.
struct Place(Tools);

impl Place {
    /// What the new owner is told: as before, of the image, and with nothing of what was under way.
    async fn wanted(
        &self,
        operation: &Operation,
        state: &State,
        known: &machine::Machine,
        tx: &DatabaseTransaction,
    ) -> Result<Wanted, StepError> {
        let row = server::find(tx, &operation.subject).await?;
        let row = row.filter(|row| matches!(row.state(), ServerState::Evacuating(_)));
        let Some(row) = row else {
            return Err(StepError::fail("the server's state was changed meanwhile"));
        };
        let mut wanted = known.wanted.clone();
        (wanted.arrives, wanted.departs, wanted.continues) = (None, None, None);
        resize::forget_copy(&mut wanted);
        if let Some(disk) = &mut wanted.spec.root_disk
            && let Some(was) = disk.image.take()
        {
            disk.image = Some(image_of(tx, &row, was).await?);
        }
        wanted.rebuilds += 1;
        // What was in memory is lost; a server that failed is tried again.
        let is_off = wanted.power == Power::Stopped && !state.was_shelved;
        let stays_off = is_off && row.state().standing() != Some(Standing::Error);
        wanted.power = match state.stop || stays_off {
            true => Power::Stopped,
            false => Power::Running,
        };
        let told = instance::of(tx, &operation.subject).await?;
        let before = wanted.spec.guest.instance.take();
        let given = match &state.admin_pass {
            Some(sealed) if told.is_some() => {
                let mut data = instance::data(&row, None)?;
                data.admin_pass = Some(sealed.clone());
                Some(Box::new(data))
            }
            _ => None,
        };
        wanted.spec.guest.instance = instance::renewed(told, given, before);
        Ok(wanted)
    }
}

#[async_trait]
impl Step for Place {
    fn name(&self) -> &'static str {
        "place"
    }

    /// The commit point.
    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        let (server, now) = (machine_id(&operation.subject)?, self.0.clock.now_us());
        if !is_declared_off(tx, state.source).await? {
            return Err(StepError::fail(format!(
                "host {} is not declared to be down any more",
                state.source
            )));
        }
        let known = machine::find(tx, server).await?;
        let known = known.filter(|known| is_theirs(known, state.source));
        let known = known.ok_or_else(|| StepError::fail("the server is not where it was"))?;
        unshelve::is_nobodys(&self.0.machines, &known, tx).await?;
        let mut wanted = self.wanted(operation, &state, &known, tx).await?;
        let mode = cpu::mode_of(&self.0.machines, tx, &operation.subject).await?;
        // One that is parked keeps nothing any more.
        migrate::bury(tx, server, GIVEN_UP, now).await?;
        resize::count_present(tx, server).await?;
        // A disk of before, of which a server that failed may be had back: it is no host's to make anew unasked.
        let kept = match known.has_its_own() {
            true => Vec::new(),
            false => unshelve::leftovers(&self.0.machines, server),
        };
        let kept: BTreeSet<HostId> = kept.into_iter().map(|(holder, _)| holder).collect();
        if let Some(host) = state.host.filter(|host| kept.contains(host)) {
            return Err(StepError::fail(format!(
                "host {host} has a disk of the server from before, which would be made anew: see to that first"
            )));
        }
        let request = Request {
            server,
            amounts: change::amounts(&wanted.spec),
            host: state.host,
            excluded: kept.into_iter().chain([state.source]).collect(),
            source: None,
            cpu: mode.need(),
        };
        let target = match self.0.machines.place(tx, &request).await {
            Ok(target) => target,
            Err(NoHost::Database(error)) => return Err(error.into()),
            Err(NoHost::Rejected(why)) => {
                return Err(StepError::fail(format!("No valid host was found. {why}")));
            }
        };
        let begins = cpu::begins(&self.0.machines, tx, (mode, target), known.server).await?;
        begins.put(&mut wanted.spec);
        if !machine::move_owner(tx, &known, target, &wanted, now).await? {
            return Err(StepError::fail("the server was changed meanwhile"));
        }
        // Who owns it is known now, also in a restored database.
        machine::vouch(tx, server).await?;
        host::release(tx, state.source, server).await?;
        let hostname = host::find(tx, target).await?.map(|row| row.hostname);
        let change = migration::ActiveModel {
            target_id: Set(Some(target.to_string())),
            target: Set(hostname),
            updated_at_us: Set(now),
            ..Default::default()
        };
        note(tx, state.migration, change).await?;
        tracing::warn!(%server, source = %state.source, %target, "evacuated: its old host has it no more");
        state.target = Some(target);
        // It has gone into what the owner is told.
        state.admin_pass = None;
        operation.set_state(&state)
    }
}

/// The new owner is told, and says that the guest runs, or that its disk is made.
struct Start(Tools);

#[async_trait]
impl Step for Start {
    fn name(&self) -> &'static str {
        "start"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        self.0.fence_others(server).await?;
        match machines.converge(server).await? {
            Converged::Settled(report) => match report.observed {
                Observed::Failed { reason } => Err(StepError::fail(reason)),
                _ => Ok(Progress::Done),
            },
            Converged::NoOwner => Err(StepError::fail("the server has no host any more")),
            Converged::Lost(lost) => Err(StepError::fail(format!(
                "host {} was removed from the cloud",
                lost.host
            ))),
            pending => Ok(pending.pending().unwrap_or(Progress::Done)),
        }
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        state.observed = settle(&self.0, tx, &operation.subject).await?;
        operation.set_state(&state)
    }
}
