//! `server_unshelve`: a host makes the server's disk of the image that it is kept in, and the guest boots anew.
//!
//! | step | what it does |
//! |---|---|
//! | (request) | the server's task is unshelving |
//! | offload | whoever still has something of the machine lets go of it ([`shelve`](super::shelve)) |
//! | place | what is left of it anywhere goes; a host is chosen, what the server needs of it is taken, and it is the owner, a generation higher |
//! | start | the guest runs |
//! | clean | the image goes |
//!
//! Before the host has made the disk all of it can be taken back: the host lets go of what it has, and the server is
//! shelved as before. It is told to by a rebuild: what it has of the server from before is no disk of it, and that it
//! has made this one is what it counts. From there on the host's disk is the only one that counts, and nothing is taken
//! back. The image goes last, and stays where the guest could not be started for good.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, Power, ServerId, Wanted};
use sea_orm::ActiveValue::Set;
use sea_orm::{ConnectionTrait, DatabaseTransaction};
use serde::{Deserialize, Serialize};

use super::create::{UNKNOWN, settle};
use super::image::{unstored, waited_us};
use super::shelve::{Offload, is_kept_only, is_over, let_go_of, shelved, vacate, want_gone};
use super::{
    RequestError, Tools, change, cpu, instance, is_unknown, machine_id, to_error, to_state, turn,
};
use crate::agents::host;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::image::model::Status;
use crate::image::store;
use crate::operation::{Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::{ASK_AGAIN, Converged, Dropped, Machines, NoHost, machine};
use crate::scheduler::Request;

pub const KIND: &str = "server_unshelve";

/// A host that does not let go of what it has is none for the server.
const LONGEST_DROP_US: i64 = 60_000_000;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    /// An administrator's choice.
    host: Option<HostId>,
    /// The row that it was placed by was of a restored database, and no host had said that it has it.
    #[serde(default)]
    unconfirmed: bool,
    /// The host has made the disk, and the guest has run there, or may have.
    #[serde(default)]
    begun: bool,
    /// What was seen when the host had settled.
    #[serde(default)]
    observed: Option<Observed>,
}

impl State {
    /// The image is of no use any more.
    fn is_outdated(&self) -> bool {
        self.begun && !matches!(self.observed, Some(Observed::Failed { .. }))
    }
}

/// What a request wants of one server.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The server's state as it was when this was admitted.
    pub from: ServerState,
    /// None: the scheduler's choice.
    pub host: Option<HostId>,
    /// Columns that change with it (the zone that it is to stay in).
    pub columns: server::ActiveModel,
}

/// Writes that the server is to run again, and the operation that brings it about.
pub async fn request(app: &App, origin: Origin, id: &str, wish: Wish) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let request_id = origin.request_id.clone();
    let state = State {
        host: wish.host,
        unconfirmed: false,
        begun: false,
        observed: None,
    };
    let prepared = engine.prepare(KIND, id, &state, origin)?;
    let (subject, now) = (id.to_owned(), app.now_us());
    app.database()
        .write(move |tx| {
            let (id, prepared, wish) = (subject.clone(), prepared.clone(), wish.clone());
            let request_id = request_id.clone();
            Box::pin(async move {
                let standing = wish.from.standing().unwrap_or(Standing::Error);
                let mut change = wish.columns;
                change.state = Set(ServerState::Unshelving(standing).key());
                change.updated_at_us = Set(now);
                if !server::turn(tx, &id, wish.from, change).await? {
                    return Err(RequestError::Overtaken);
                }
                is_kept_only(tx, &id, request_id, now).await?;
                Ok::<(), RequestError>(prepared.insert(tx).await?)
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

pub struct Unshelve {
    tools: Tools,
}

impl Unshelve {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for Unshelve {
    fn name(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let tools = || self.tools.clone();
        vec![
            Arc::new(Offload(tools())),
            Arc::new(Place(tools())),
            Arc::new(Start(tools())),
            Arc::new(Clean(tools())),
        ]
    }

    async fn finish(
        &self,
        operation: &Operation,
        _outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let now = self.tools.clock.now_us();
        // What was given up for a later request is that one's to end.
        if !state.begun && change::is_followed(operation, tx).await? {
            return Ok(());
        }
        let server = machine_id(&operation.subject)?;
        let stands = shelved(tx, server).await?;
        let known = machine::find(tx, server).await?;
        let is_nowhere = known.is_some_and(|known| known.host.is_none());
        // Where it failed, the action's event says why.
        turn(tx, &operation.subject, |row| match row.state() {
            over if is_over(over) => None,
            ServerState::Unshelving(_) if state.begun => Some(runs(state.observed.as_ref(), now)),
            ServerState::Unshelving(_) => Some(to_state(stands, now)),
            // Whatever an administrator has called it since.
            _ if is_nowhere && row.shelved_image_id.is_some() => Some(to_state(stands, now)),
            _ => None,
        })
        .await?;
        Ok(())
    }
}

/// What a server is whose guest has been started.
pub(super) fn runs(observed: Option<&Observed>, now: i64) -> server::ActiveModel {
    let change = match observed {
        Some(Observed::Failed { reason }) => return to_error(reason, Some(reason), now),
        Some(Observed::Paused) => to_state(ServerState::Paused, now),
        Some(Observed::Suspended) => to_state(ServerState::Suspended, now),
        Some(Observed::Stopped { .. }) => to_state(ServerState::Stopped, now),
        // Not seen any more by the time of the commit: until the reconciler says more.
        _ => to_state(ServerState::Active, now),
    };
    server::ActiveModel {
        launched_at_us: Set(Some(now)),
        ..change
    }
}

/// Hosts that have anything of a server which none is to have, as far as they were heard.
pub(super) fn leftovers(machines: &Machines, server: ServerId) -> Vec<(HostId, MachineReport)> {
    let holders = machines.fleet().holders(server).into_iter();
    holders
        .filter(|(_, said)| !(said.settled && said.observed == Observed::Absent))
        .collect()
}

/// After a restore of the database a host may have the server by a newer row than this one: each has to have said
/// what it has, but for those that are declared to be down. The owner by the row, if there is one, does not count.
pub(super) async fn is_nobodys(
    machines: &Machines,
    known: &machine::Machine,
    connection: &impl ConnectionTrait,
) -> Result<(), StepError> {
    if known.confirmed {
        return Ok(());
    }
    let rows = host::all(connection).await?;
    let silent = rows
        .iter()
        .find(|row| !row.forced_down && machines.fleet().machines(row.host_id()).is_none());
    if let Some(row) = silent {
        return Err(StepError::retry(format!(
            "the database was restored, and host {} has not said yet what it has",
            row.hostname
        )));
    }
    // Looked at after that: what the last of them has said is among it.
    let mut others = leftovers(machines, known.server).into_iter();
    match others.find(|(holder, _)| Some(*holder) != known.host) {
        None => Ok(()),
        Some((holder, _)) => Err(StepError::fail(format!(
            "the database was restored, and host {holder} has the server since its backup"
        ))),
    }
}

/// Chooses a host, takes what the server needs of it, and makes it the owner.
struct Place(Tools);

impl Place {
    /// What the host is told: as before, of that image.
    async fn wanted(
        &self,
        operation: &Operation,
        tx: &DatabaseTransaction,
    ) -> Result<Wanted, StepError> {
        let row = server::find(tx, &operation.subject).await?;
        let row = row.filter(|row| matches!(row.state(), ServerState::Unshelving(_)));
        let Some(row) = row else {
            return Err(StepError::fail("the server's state was changed meanwhile"));
        };
        let image_id = row.shelved_image_id.unwrap_or_default();
        let image = store::find(tx, &image_id).await?;
        let image = image.filter(|image| image.status() == Some(Status::Active));
        let image = image.ok_or_else(|| {
            let reason = format!("Unshelve attempted but the image {image_id} cannot be found.");
            StepError::fail(reason)
        })?;
        let image = image
            .to_ref()
            .map_err(|unusable| StepError::fail(unusable.to_string()))?;
        let known = machine::find(tx, machine_id(&operation.subject)?).await?;
        let known = known.filter(|known| known.host.is_none());
        let Some(known) = known else {
            return Err(StepError::fail("a host owns the server"));
        };
        is_nobodys(&self.0.machines, &known, tx).await?;
        let mut wanted = known.wanted;
        wanted.power = Power::Running;
        // A host that has a disk of the server still, or had one, makes it anew all the same.
        let said = self.0.machines.fleet().holders(known.server).into_iter();
        let done = said.map(|(_, report)| report.rebuilds).max().unwrap_or(0);
        wanted.rebuilds = wanted.rebuilds.max(done) + 1;
        let Some(disk) = &mut wanted.spec.root_disk else {
            return Err(StepError::fail("the server has no disk of its own"));
        };
        disk.image = Some(image);
        let told = instance::of(tx, &operation.subject).await?;
        let before = wanted.spec.guest.instance.take();
        wanted.spec.guest.instance = instance::renewed(told, None, before);
        Ok(wanted)
    }
}

#[async_trait]
impl Step for Place {
    fn name(&self) -> &'static str {
        "place"
    }

    /// What is anywhere of the server goes first: a host that is chosen must not start on a disk of before.
    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        let known = machine::find(machines.reader(), server).await?;
        let Some(known) = known.filter(|known| known.host.is_none()) else {
            return Ok(Progress::Done);
        };
        is_nobodys(machines, &known, machines.reader()).await?;
        let mut goes = false;
        for (holder, said) in leftovers(machines, server) {
            if machines.is_off(machines.reader(), holder).await?.is_some() {
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

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let mut wanted = self.wanted(operation, tx).await?;
        let known = machine::find(tx, server).await?;
        state.unconfirmed = known.is_some_and(|known| !known.confirmed);
        operation.set_state(&state)?;
        let mode = cpu::mode_of(&self.0.machines, tx, &operation.subject).await?;
        let request = Request {
            server,
            amounts: change::amounts(&wanted.spec),
            host: state.host,
            excluded: leftovers(&self.0.machines, server)
                .into_iter()
                .map(|(holder, _)| holder)
                .collect(),
            source: None,
            cpu: mode.need(),
        };
        let host = match self.0.machines.place(tx, &request).await {
            Ok(host) => host,
            Err(NoHost::Database(error)) => return Err(error.into()),
            Err(NoHost::Rejected(why)) => {
                return Err(StepError::fail(format!("No valid host was found. {why}")));
            }
        };
        let begins = cpu::begins(&self.0.machines, tx, (mode, host), server).await?;
        begins.put(&mut wanted.spec);
        let (request_id, now) = (operation.origin.request_id.clone(), self.0.clock.now_us());
        let owned = machine::own(tx, server, host, &wanted, request_id, now).await?;
        owned
            .map(|_| ())
            .ok_or_else(|| StepError::fail("a host owns the server"))
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let row = server::find(self.0.machines.reader(), &operation.subject).await?;
        // What is deleted is the delete's to tell.
        if state.begun || row.is_none_or(|row| is_over(row.state())) {
            return Ok(Progress::Done);
        }
        let_go_of(&self.0, operation, None).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        if state.begun {
            return Ok(());
        }
        vacate(&self.0, operation, tx).await?;
        if state.unconfirmed {
            machine::doubt(tx, machine_id(&operation.subject)?).await?;
        }
        Ok(())
    }
}

/// The agent is told, and reports that every vCPU has entered the guest.
struct Start(Tools);

/// The owner has made the disk of the image that it was told of last.
fn is_made(known: &machine::Machine, report: &MachineReport) -> bool {
    report.generation == known.generation && report.rebuilds >= known.wanted.rebuilds
}

fn unmade() -> StepError {
    StepError::retry("the host has not made the server's disk of its image yet")
}

#[async_trait]
impl Step for Start {
    fn name(&self) -> &'static str {
        "start"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let server = machine_id(&operation.subject)?;
        let machines = &self.0.machines;
        let known = machine::find(machines.reader(), server).await?;
        if known
            .as_ref()
            .is_some_and(|known| is_unknown(machines, known))
        {
            return Err(StepError::fail(UNKNOWN));
        }
        let owner = known.and_then(|known| known.host);
        let is_off = match owner {
            Some(owner) => machines.is_off(machines.reader(), owner).await?,
            None => None,
        };
        // It may have made the disk, and nobody will hear of it: the image is as good.
        if let Some(reason) = is_off {
            return Err(StepError::fail(reason));
        }
        match machines.converge(server).await? {
            Converged::Settled(report) => {
                let known = machine::find(self.0.machines.reader(), server).await?;
                let is_made = known.is_some_and(|known| is_made(&known, &report));
                match report.observed {
                    // The image could not be had, or the disk not be made.
                    Observed::Failed { reason } if !is_made => Err(StepError::fail(reason)),
                    _ if !is_made => Err(unmade()),
                    _ => Ok(Progress::Done),
                }
            }
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
        // By its last word, which may be another than the one that was waited for: the image goes by that.
        let known = machine::find(tx, machine_id(&operation.subject)?).await?;
        let said = known.and_then(|known| Some((known.report.clone()?, known)));
        let is_made = said.is_some_and(|(report, known)| is_made(&known, &report));
        if state.observed.is_none() || !is_made {
            return Err(unmade());
        }
        state.begun = true;
        operation.set_state(&state)
    }

    /// What is wanted from here on is that there be nothing.
    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        // A delete's tombstone is the delete's.
        let known = known.filter(|known| known.host.is_some() && !known.is_tombstone());
        let Some(known) = known.filter(|_| !state.begun) else {
            return Ok(());
        };
        let (request_id, now) = (operation.origin.request_id.clone(), self.0.clock.now_us());
        want_gone(tx, server, request_id, now).await?;
        if !known.confirmed {
            // Of a restored database: it may have come to run since, there or elsewhere, and nobody is to be told by
            // this row that it is gone.
            machine::vacate(tx, server, now).await?;
            machine::doubt(tx, server).await?;
        }
        Ok(())
    }
}

/// The guest has run: its image is of no use any more. There is no way back, and so it goes also where this is undone.
struct Clean(Tools);

impl Clean {
    async fn remove(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let row = server::find(self.0.machines.reader(), &operation.subject).await?;
        let image = row.and_then(|row| row.shelved_image_id);
        if let Some(image) = image.filter(|_| state.is_outdated()) {
            let removed = self.0.images.remove(&image, self.0.clock.now_us()).await;
            removed.map_err(unstored)?;
        }
        Ok(Progress::Done)
    }
}

#[async_trait]
impl Step for Clean {
    fn name(&self) -> &'static str {
        "clean"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.remove(operation).await
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        if state.is_outdated() {
            let change = server::ActiveModel {
                shelved_image_id: Set(None),
                ..Default::default()
            };
            server::update(tx, &operation.subject, change).await?;
        }
        Ok(())
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.remove(operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.commit(operation, tx).await
    }
}
