//! `server_shelve`: the guest is stopped, its root disk becomes an image, and no host has anything of the server any
//! more. `server_shelve_offload`: the last of it once more, where its host could not be had to let go.
//!
//! | step | what it does | the server's task |
//! |---|---|---|
//! | (request) | the image is there, queued; the host is told to stop the guest and then to copy the disk | shelving |
//! | settle, begin | they undo | |
//! | copy | waits until the host has the copy | shelving_image_pending_upload |
//! | upload | | shelving_image_uploading |
//! | keep | brings the bytes into the store; commit: the row names the image, and the machine is to be gone | shelving_offloading |
//! | former | an image that the server was kept in before goes | |
//! | offload | the host lets go of it, or is waited for no longer; commit: nobody owns it, and its place is given back | none |
//!
//! The commit of *keep* is the only decision. Whatever fails before it takes all of it back: the image is gone, and a
//! guest that ran is started again. From there on there is no way back but [`unshelve`](super::unshelve): undoing goes
//! on to the end.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::copy::CopyId;
use fractus_agent_api::device::Presence;
use fractus_agent_api::machine::{MachineSpec, Power, ServerId};
use sea_orm::ActiveValue::Set;
use sea_orm::{DatabaseTransaction, DbErr};
use serde::{Deserialize, Serialize};

use super::create::gone;
use super::image::{self, Fetch, dropped, is_now, unstored, waited_us};
use super::{RequestError, Tools, change, machine_id, to_error, to_state, turn, unshelve};
use crate::compute::model::state::{ServerState, Shot, Standing};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::image::model::Status;
use crate::image::{Image, Images, store};
use crate::operation::{self, Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::{machine, migration};

pub const KIND: &str = "server_shelve";
pub const OFFLOAD: &str = "server_shelve_offload";

/// What the operation knows; steps of [`image`] read the first two.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    image: String,
    copy: CopyId,
    /// The guest was not held in any way, and is to run again if nothing comes of it.
    ran: bool,
    /// The image of before, that the server is not kept in any more.
    #[serde(default)]
    former: Option<String>,
}

/// How long a host is waited for that has only to remove what the image holds. What comes back later is a generation
/// behind, and goes then.
const LONGEST_OFFLOAD_US: i64 = 60_000_000;

/// What a request wants of one server.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The server's state as it was when this was admitted.
    pub from: ServerState,
    /// To be filled.
    pub image: Image,
    /// The image that the server was kept in before, and that was left where its guest could not be started at first.
    pub former: Option<String>,
}

/// Writes the image, that the guest is to be stopped and its disk copied, and the operation.
pub async fn request(app: &App, origin: Origin, id: &str, wish: Wish) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let server = machine_id(id)?;
    let request_id = origin.request_id.clone();
    let copy = CopyId(app.random().uuid());
    let standing = wish.from.standing().unwrap_or(Standing::Error);
    let state = State {
        image: wish.image.row.id.clone(),
        copy,
        ran: standing == Standing::Active,
        former: wish.former.clone(),
    };
    let prepared = engine.prepare(KIND, id, &state, origin)?;
    let (subject, now) = (id.to_owned(), app.now_us());
    app.database()
        .write(move |tx| {
            let (id, prepared, wish) = (subject.clone(), prepared.clone(), wish.clone());
            let request_id = request_id.clone();
            Box::pin(async move {
                // An image that it was kept in before stays its own until there is another.
                let change = to_state(ServerState::Shelving(standing, Shot::Pending), now);
                if !server::turn(tx, &id, wish.from, change).await? {
                    return Err(RequestError::Overtaken);
                }
                let known = machine::find(tx, server).await?;
                let known = known.filter(|known| {
                    known.host.is_some() && !known.is_tombstone() && known.confirmed
                });
                let known = known.ok_or(RequestError::Overtaken)?;
                // One that is parked is an operator's to look at.
                if !migration::open(tx, server).await?.is_empty() {
                    return Err(RequestError::Overtaken);
                }
                if known.wanted.copy.is_some() {
                    return Err(RequestError::ImageUnderWay);
                }
                // Its state was reset: what it has by now is for that to say.
                let open = operation::unfinished(tx, Some(&id)).await?;
                if open.iter().any(|other| other.kind == unshelve::KIND) {
                    return Err(RequestError::Overtaken);
                }
                if has_other_disks(&known.wanted.spec) {
                    return Err(RequestError::OtherDisks(id));
                }
                // A host copies the disk of a machine that is otherwise as wanted: after its guest has ended.
                machine::change(tx, server, request_id, now, |wanted| {
                    wanted.power = Power::Stopped;
                    wanted.have_copy(copy);
                })
                .await?;
                let added = Images::add(tx, wish.image, None).await;
                added.map_err(image::unwritten)?;
                Ok(prepared.insert(tx).await?)
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

/// Writes that the host of a shelved server is to let go of it, once more.
pub async fn offload(
    app: &App,
    origin: Origin,
    id: &str,
    from: ServerState,
) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let request_id = origin.request_id.clone();
    let prepared = engine.prepare(OFFLOAD, id, &serde_json::json!({}), origin)?;
    let (subject, now) = (id.to_owned(), app.now_us());
    app.database()
        .write(move |tx| {
            let (id, prepared) = (subject.clone(), prepared.clone());
            let request_id = request_id.clone();
            Box::pin(async move {
                let change = to_state(ServerState::Offloading, now);
                if !server::turn(tx, &id, from, change).await? {
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

/// Of a server whose disk is an image: its machine is to be gone, if that is not wanted yet.
pub(super) async fn is_kept_only(
    tx: &DatabaseTransaction,
    id: &str,
    request_id: Option<String>,
    now_us: i64,
) -> Result<(), RequestError> {
    let row = server::find(tx, id).await?;
    if row.is_none_or(|row| row.shelved_image_id.is_none()) {
        return Err(RequestError::NotShelved(id.to_owned()));
    }
    let server = machine_id(id)?;
    let known = machine::find(tx, server).await?;
    if known.is_some_and(|known| known.host.is_some() && !known.is_tombstone()) {
        want_gone(tx, server, request_id, now_us).await?;
    }
    Ok(())
}

/// After a restore of the database: a server that its host was about to let go of may have been unshelved there since.
/// Nobody's word is known to have it, and none is told to have nothing of it.
pub async fn restored(tx: &DatabaseTransaction, now_us: i64) -> Result<(), DbErr> {
    for row in server::kept_in_images(tx).await? {
        let Ok(server) = machine_id(&row.id) else {
            continue;
        };
        // A deleted one is to go wherever it is.
        if !is_over(row.state()) {
            machine::vacate(tx, server, now_us).await?;
        }
    }
    Ok(())
}

/// Takes back a shelving whose image does not count yet, and an unshelving that has no host yet; part of the
/// transaction of what wants so.
pub async fn give_up(tx: &DatabaseTransaction, id: &str, reason: &str) -> Result<(), DbErr> {
    let row = server::find(tx, id).await?;
    if row.is_some_and(|row| matches!(row.state(), ServerState::Shelving(..))) {
        operation::cancel(tx, id, &[KIND], reason).await?;
    }
    if is_kept_nowhere_else(tx, id).await? {
        operation::cancel(tx, id, &[unshelve::KIND], reason).await?;
    }
    Ok(())
}

/// The server's disk is an image, and no host is to have one.
pub async fn is_kept_nowhere_else(tx: &DatabaseTransaction, id: &str) -> Result<bool, DbErr> {
    let row = server::find(tx, id).await?;
    let (Some(row), Ok(server)) = (row, machine_id(id)) else {
        return Ok(false);
    };
    let known = machine::find(tx, server).await?;
    Ok(row.shelved_image_id.is_some() && known.is_none_or(|known| known.host.is_none()))
}

/// Disks whose content is nowhere but on the host, and in no image.
pub(super) fn has_other_disks(spec: &MachineSpec) -> bool {
    let mut disks = spec.disks.iter();
    disks.any(|disk| disk.presence != Presence::Deleted)
}

/// The host is to have nothing of the machine. What its guest is told is kept here, for when it is made anew; the host
/// is not told.
pub(super) async fn want_gone(
    tx: &DatabaseTransaction,
    server: ServerId,
    request_id: Option<String>,
    now_us: i64,
) -> Result<(), DbErr> {
    let known = machine::find(tx, server).await?;
    if known.is_none_or(|known| known.is_tombstone()) {
        return Ok(());
    }
    let changed = machine::change(tx, server, request_id, now_us, |wanted| {
        wanted.power = Power::Absent;
        (wanted.arrives, wanted.departs, wanted.continues) = (None, None, None);
        wanted.copy = None;
    });
    changed.await.map(|_| ())
}

/// Nobody owns the machine any more. Of a server that is deleted this is the delete's to say.
pub(super) async fn vacate(
    tools: &Tools,
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let row = server::find(tx, &operation.subject).await?;
    if row.is_none_or(|row| is_over(row.state())) {
        return Ok(());
    }
    let server = machine_id(&operation.subject)?;
    Ok(machine::vacate(tx, server, tools.clock.now_us()).await?)
}

/// A delete has the last word.
pub(super) fn is_over(state: ServerState) -> bool {
    matches!(state, ServerState::Deleting(_) | ServerState::Deleted)
}

/// Waits until the owner has nothing of the machine, if that is what is wanted; what it cannot do now it can another
/// time. A host that is declared to be down is not waited for, and any other for `longest_us` at most: of one whose
/// guest has ended for sure.
pub(super) async fn let_go_of(
    tools: &Tools,
    operation: &Operation,
    longest_us: Option<i64>,
) -> Result<Progress, StepError> {
    let server = machine_id(&operation.subject)?;
    let reader = tools.machines.reader();
    let known = machine::find(reader, server).await?;
    let Some(known) = known.filter(machine::Machine::is_tombstone) else {
        return Ok(Progress::Done);
    };
    let told = gone(tools, operation).await;
    if matches!(told, Ok(Progress::Done)) {
        return told;
    }
    let is_off = match known.host {
        Some(owner) => tools.machines.is_off(reader, owner).await?.is_some(),
        None => false,
    };
    let waited = waited_us(tools, operation);
    if is_off || longest_us.is_some_and(|longest| waited >= longest) {
        return Ok(Progress::Done);
    }
    match told {
        Err(StepError::Fail { reason }) => Err(StepError::retry(reason)),
        other => other,
    }
}

/// What a server is whose disk is an image: by whether a host has anything of it.
pub(super) async fn shelved(
    tx: &DatabaseTransaction,
    server: ServerId,
) -> Result<ServerState, DbErr> {
    let known = machine::find(tx, server).await?;
    Ok(match known.and_then(|known| known.host) {
        None => ServerState::ShelvedOffloaded,
        Some(_) => ServerState::Shelved,
    })
}

pub struct Shelve {
    tools: Tools,
    fetch: Fetch,
}

impl Shelve {
    pub(super) fn new(tools: Tools, fetch: Fetch) -> Self {
        Self { tools, fetch }
    }
}

#[async_trait]
impl Kind for Shelve {
    fn name(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let tools = || self.tools.clone();
        vec![
            Arc::new(Begin::new("settle", tools())),
            Arc::new(Begin::new("begin", tools())),
            Arc::new(Copy {
                tools: tools(),
                copy: image::Copy(tools()),
            }),
            Arc::new(image::Upload(tools())),
            Arc::new(Keep {
                tools: tools(),
                fetch: self.fetch.clone(),
            }),
            Arc::new(Former(tools())),
            Arc::new(Offload(tools())),
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
        let server = machine_id(&operation.subject)?;
        let stands = shelved(tx, server).await?;
        let known = machine::find(tx, server).await?;
        let said = known.and_then(|known| {
            let said = self.tools.machines.fleet().machine(known.host?, server)?;
            let is_of_now = (said.generation, said.revision) == known.age();
            (is_of_now && said.settled).then_some((said, known.wanted.power))
        });
        // What was held is not any more.
        let standing = match state.ran {
            true => Standing::Active,
            false => Standing::Stopped,
        };
        // The action's event says why it is not shelved.
        turn(tx, &operation.subject, |row| match (row.state(), outcome) {
            (over, _) if is_over(over) => None,
            // Whatever an administrator has called it since.
            _ if is_kept(row, &state) => Some(to_state(stands, now)),
            (ServerState::Shelving(..), Outcome::Parked { reason }) => {
                Some(to_error(reason, Some(reason), now))
            }
            (ServerState::Shelving(..), _) => Some(is_now(standing, said.as_ref(), now)),
            _ => None,
        })
        .await?;
        Ok(())
    }
}

/// The server's row says that its disk is this image.
fn is_kept(row: &server::Model, state: &State) -> bool {
    row.shelved_image_id.as_ref() == Some(&state.image)
}

/// The image and the copy go in the end, whichever step has failed, and the guest runs if it did. There are two: the
/// one that is undone last waits for what the other one has changed.
struct Begin {
    name: &'static str,
    tools: Tools,
}

impl Begin {
    fn new(name: &'static str, tools: Tools) -> Self {
        Self { name, tools }
    }
}

#[async_trait]
impl Step for Begin {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let row = server::find(self.tools.machines.reader(), &operation.subject).await?;
        if row.is_some_and(|row| is_kept(&row, &state)) {
            return Ok(Progress::Done);
        }
        let (images, now) = (&self.tools.images, self.tools.clock.now_us());
        images.discard(&state.image, now).await.map_err(unstored)?;
        let server = machine_id(&operation.subject)?;
        let known = machine::find(self.tools.machines.reader(), server).await?;
        let in_doubt = known.is_some_and(|known| !known.confirmed && !known.is_tombstone());
        // Whole or not: nobody was told of it as his server's. But of a restored database it may be all that there is.
        if !in_doubt {
            images.remove(&state.image, now).await.map_err(unstored)?;
        }
        dropped(&self.tools, operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        take_back(&self.tools, operation, tx).await
    }
}

/// Before the image counts: the host need not keep the copy, and a guest that ran is to run.
async fn take_back(
    tools: &Tools,
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let state: State = operation.state()?;
    let server = machine_id(&operation.subject)?;
    let row = server::find(tx, &operation.subject).await?;
    let known = machine::find(tx, server).await?;
    let (Some(row), Some(known)) = (row, known) else {
        return Ok(());
    };
    if known.host.is_none() || is_over(row.state()) || is_kept(&row, &state) {
        return Ok(());
    }
    let copies = known.wanted.copy == Some(state.copy);
    let stopped = known.wanted.power == Power::Stopped;
    let runs = state.ran && stopped && !change::is_followed(operation, tx).await?;
    if copies || runs {
        let (request_id, now) = (operation.origin.request_id.clone(), tools.clock.now_us());
        machine::change(tx, server, request_id, now, |wanted| {
            if copies {
                wanted.copy = None;
            }
            if runs {
                wanted.power = Power::Running;
            }
        })
        .await?;
    }
    Ok(())
}

/// Waits for the host, as for any image of a disk.
struct Copy {
    tools: Tools,
    copy: image::Copy,
}

#[async_trait]
impl Step for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.copy.run(operation).await
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.copy.commit(operation, tx).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        take_back(&self.tools, operation, tx).await
    }
}

/// Brings the bytes in, as for any image of a disk.
struct Keep {
    tools: Tools,
    fetch: Fetch,
}

#[async_trait]
impl Step for Keep {
    fn name(&self) -> &'static str {
        "keep"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.fetch.run(operation).await
    }

    /// The commit point: the image is the server's disk, and what its host has is not any more.
    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let image = store::find(tx, &state.image).await?;
        let image = image.filter(|image| image.status() == Some(Status::Active));
        let Some(image) = image else {
            return Err(StepError::fail("the image was deleted meanwhile"));
        };
        if !image::is_of(&image, state.copy) {
            return Err(StepError::fail("somebody else has filled the image"));
        }
        let row = server::find(tx, &operation.subject).await?;
        let known = machine::find(tx, server).await?;
        let known =
            known.filter(|known| known.host.is_some() && known.wanted.copy == Some(state.copy));
        // After a restore of the database the image may be all that there is by now, or of no use any more.
        if known.as_ref().is_some_and(|known| !known.confirmed) {
            return Err(StepError::retry(
                "the database was restored, and the server's host has not said yet that it has it",
            ));
        }
        let (Some(row), Some(known)) = (row, known) else {
            return Err(StepError::fail(
                "something else has been asked of the server meanwhile",
            ));
        };
        if !matches!(row.state(), ServerState::Shelving(..)) {
            return Err(StepError::fail("the server's state was changed meanwhile"));
        }
        if has_other_disks(&known.wanted.spec) {
            return Err(StepError::fail("the server has got other disks meanwhile"));
        }
        let (request_id, now) = (
            operation.origin.request_id.clone(),
            self.tools.clock.now_us(),
        );
        let change = server::ActiveModel {
            shelved_image_id: Set(Some(state.image)),
            ..to_state(ServerState::Offloading, now)
        };
        turn(tx, &operation.subject, |_| Some(change)).await?;
        Ok(want_gone(tx, server, request_id, now).await?)
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.fetch.undo(operation).await
    }
}

/// The image that the server was kept in before is of no use any more, now that another counts.
struct Former(Tools);

impl Former {
    async fn remove(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        if let Some(former) = &state.former {
            let removed = self.0.images.remove(former, self.0.clock.now_us()).await;
            removed.map_err(unstored)?;
        }
        Ok(Progress::Done)
    }
}

#[async_trait]
impl Step for Former {
    fn name(&self) -> &'static str {
        "former"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.remove(operation).await
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.remove(operation).await
    }
}

/// The host ends what it has of the machine, and removes its disks.
pub(super) struct Offload(pub(super) Tools);

#[async_trait]
impl Step for Offload {
    fn name(&self) -> &'static str {
        "offload"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let_go_of(&self.0, operation, Some(LONGEST_OFFLOAD_US)).await
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        vacate(&self.0, operation, tx).await
    }

    /// There is no way back: on to the end, but for what a delete does then.
    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let row = server::find(self.0.machines.reader(), &operation.subject).await?;
        if row.is_none_or(|row| is_over(row.state())) {
            return Ok(Progress::Done);
        }
        let_go_of(&self.0, operation, Some(LONGEST_OFFLOAD_US)).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        vacate(&self.0, operation, tx).await
    }
}

pub struct ShelveOffload {
    tools: Tools,
}

impl ShelveOffload {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for ShelveOffload {
    fn name(&self) -> &'static str {
        OFFLOAD
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        vec![Arc::new(Offload(self.tools.clone()))]
    }

    async fn finish(
        &self,
        operation: &Operation,
        _outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        let stands = shelved(tx, machine_id(&operation.subject)?).await?;
        turn(tx, &operation.subject, |row| {
            (!is_over(row.state())).then(|| to_state(stands, now))
        })
        .await?;
        Ok(())
    }
}
