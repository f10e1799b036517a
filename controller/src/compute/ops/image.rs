//! `server_create_image`: the server's root disk, as it is at one moment, becomes an image.
//!
//! | step | what it does | the server's task |
//! |---|---|---|
//! | (request) | the image is there, queued, and the host is told to copy the disk | image_snapshot_pending |
//! | begin | | image_snapshot |
//! | copy | waits until the host has the copy | image_pending_upload |
//! | upload | | image_uploading |
//! | fetch | brings the bytes into the store; the image is active | |
//! | release | the host drops its copy | none |
//!
//! Whatever fails takes all of it back: the host drops what it has, the image is gone, and the server is as before. The
//! bytes come a piece at each turn ([`Fetching`]), so that a controller that ends need not wait for all of them, and one
//! that is to give up does; another begins anew.

mod fetching;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::copy::{CopyId, CopyState};
use fractus_agent_api::machine::{MachineReport, Observed, Power, Refusal};
use sea_orm::DatabaseTransaction;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use self::fetching::{Fetched, Fetches, Fetching};
use super::{RequestError, Tools, machine_id, observe, to_error, to_state, turn};
use crate::agents::AgentError;
use crate::compute::model::state::{ServerState, Shot, Standing};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::{ApiError, App};
use crate::image::snapshot::Standing as Stands;
use crate::image::store::StoreError;
use crate::image::{Image, Images};
use crate::operation::{Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::{ASK_AGAIN, Converged, machine};

pub const KIND: &str = "server_create_image";

/// A copy, or its bytes, that has not come for so long will not.
const LONGEST_US: i64 = 86_400_000_000;
/// A host that does not drop its copy is left to the reconciler.
const LONGEST_DROP_US: i64 = 60_000_000;
/// Images whose bytes come in at once; all of them are hashed here.
const AT_ONCE: usize = 2;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    image: String,
    copy: CopyId,
}

/// What a request wants of one server.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The server's state as it was when this was admitted.
    pub from: ServerState,
    /// To be filled.
    pub image: Image,
    /// The server's project, where the image is another's.
    pub shared_with: Option<String>,
}

/// Writes the image, that a copy of the disk is wanted, and the operation that brings it in.
pub async fn request(app: &App, origin: Origin, id: &str, wish: Wish) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let server = machine_id(id)?;
    let request_id = origin.request_id.clone();
    let copy = CopyId(app.random().uuid());
    let state = State {
        image: wish.image.row.id.clone(),
        copy,
    };
    let prepared = engine.prepare(KIND, id, &state, origin)?;
    let (subject, now) = (id.to_owned(), app.now_us());
    app.database()
        .write(move |tx| {
            let (id, prepared, wish) = (subject.clone(), prepared.clone(), wish.clone());
            let request_id = request_id.clone();
            Box::pin(async move {
                let standing = wish.from.standing().unwrap_or(Standing::Error);
                let change = to_state(ServerState::Imaging(standing, Shot::Pending), now);
                if !server::turn(tx, &id, wish.from, change).await? {
                    return Err(RequestError::Overtaken);
                }
                let known = machine::find(tx, server).await?;
                let there = known.as_ref().is_some_and(|known| {
                    known.host.is_some() && !known.is_tombstone() && known.confirmed
                });
                if !there {
                    return Err(RequestError::Overtaken);
                }
                if known.is_some_and(|known| known.wanted.copy.is_some()) {
                    return Err(RequestError::ImageUnderWay);
                }
                machine::change(tx, server, request_id, now, |wanted| {
                    wanted.have_copy(copy);
                })
                .await?;
                let added = Images::add(tx, wish.image, wish.shared_with).await;
                added.map_err(unwritten)?;
                Ok(prepared.insert(tx).await?)
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

/// Its id is new, and so nothing but the database can be in its way.
pub(super) fn unwritten(error: StoreError) -> RequestError {
    match error {
        StoreError::Database(error) => error.into(),
        other => StepError::fail(other.to_string()).into(),
    }
}

/// What the store says of the image's bytes: no room, no quota, or that it is out of order.
fn refused(error: ApiError) -> StepError {
    match error.status().is_server_error() {
        true => StepError::retry(error.cause().unwrap_or(error.message()).to_owned()),
        false => StepError::fail(error.message().to_owned()),
    }
}

pub(super) fn unstored(error: StoreError) -> StepError {
    match error {
        StoreError::Database(error) => error.into(),
        other => refused(other.into()),
    }
}

pub(super) fn waited_us(tools: &Tools, operation: &Operation) -> i64 {
    let now = tools.clock.now_us();
    now.saturating_sub(operation.step_entered_at_us)
}

pub struct CreateImage {
    tools: Tools,
    fetch: Fetch,
}

impl CreateImage {
    pub(super) fn new(tools: Tools, fetch: Fetch) -> Self {
        Self { tools, fetch }
    }
}

#[async_trait]
impl Kind for CreateImage {
    fn name(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let tools = || self.tools.clone();
        vec![
            Arc::new(Begin(tools())),
            Arc::new(Copy(tools())),
            Arc::new(Upload(tools())),
            Arc::new(self.fetch.clone()),
            Arc::new(Release(tools())),
        ]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        let state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tx, server).await?;
        let wanted = known.as_ref().and_then(|known| known.wanted.copy);
        if wanted.is_some_and(|copy| copy != state.copy) {
            // Another image is being made since: what the server is, is that one's.
            return Ok(());
        }
        if matches!(outcome, Outcome::Parked { .. }) {
            // Nobody brings it in any more.
            let_go(&self.tools, operation, &state, tx).await?;
        }
        let said = known.and_then(|known| {
            let said = self.tools.machines.fleet().machine(known.host?, server)?;
            let is_of_now = (said.generation, said.revision) == known.age();
            (is_of_now && said.settled).then_some((said, known.wanted.power))
        });
        // The action's event says why there is no image.
        turn(tx, &operation.subject, |row| match (row.state(), outcome) {
            (ServerState::Imaging(..), Outcome::Parked { reason }) => {
                Some(to_error(reason, Some(reason), now))
            }
            (ServerState::Imaging(standing, _), _) => Some(is_now(standing, said.as_ref(), now)),
            // A delete, or an administrator's reset, has the last word.
            _ => None,
        })
        .await?;
        Ok(())
    }
}

/// What the server is by its host's last word: its guest may have ended, or been stopped by its watchdog, while the
/// reconciler left it to the operation. What follows from that, the reconciler sees to.
pub(super) fn is_now(
    standing: Standing,
    said: Option<&(MachineReport, Power)>,
    now: i64,
) -> server::ActiveModel {
    let Some((report, power)) = said else {
        return to_state(standing.settled(), now);
    };
    let lives = matches!(power, Power::Running | Power::Paused | Power::Suspended);
    match (&report.observed, report.guest.panicked) {
        (Observed::Stopped { reason }, _) if lives => observe::ended(reason, now),
        (Observed::Failed { reason }, _) => to_error(reason, Some(reason), now),
        (Observed::Paused, _) if standing == Standing::Active => to_state(ServerState::Paused, now),
        (Observed::Running, true) if standing == Standing::Active => observe::crashed(now),
        _ => to_state(standing.settled(), now),
    }
}

/// How far the server is, for its user.
async fn is_at(
    tools: &Tools,
    operation: &Operation,
    shot: Shot,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let now = tools.clock.now_us();
    turn(tx, &operation.subject, |row| match row.state() {
        ServerState::Imaging(standing, _) => {
            Some(to_state(ServerState::Imaging(standing, shot), now))
        }
        ServerState::Shelving(standing, _) => {
            Some(to_state(ServerState::Shelving(standing, shot), now))
        }
        _ => None,
    })
    .await?;
    Ok(())
}

/// The host need not keep the copy any more.
async fn let_go(
    tools: &Tools,
    operation: &Operation,
    state: &State,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let server = machine_id(&operation.subject)?;
    let known = machine::find(tx, server).await?;
    if known.is_some_and(|known| known.wanted.copy == Some(state.copy)) {
        let (request_id, now) = (operation.origin.request_id.clone(), tools.clock.now_us());
        machine::change(tx, server, request_id, now, |wanted| wanted.copy = None).await?;
    }
    Ok(())
}

/// Has the host drop what it has, if it can be had to soon.
pub(super) async fn dropped(tools: &Tools, operation: &Operation) -> Result<Progress, StepError> {
    let server = machine_id(&operation.subject)?;
    let known = machine::find(tools.machines.reader(), server).await?;
    // A tombstone is the delete's to tell.
    if known
        .as_ref()
        .is_none_or(|known| known.is_tombstone() || known.wanted.copy.is_some())
    {
        return Ok(Progress::Done);
    }
    let owner = known.and_then(|known| known.host);
    if let Some(owner) = owner
        && tools
            .machines
            .is_off(tools.machines.reader(), owner)
            .await?
            .is_some()
    {
        // It drops that when it is back.
        return Ok(Progress::Done);
    }
    let late = waited_us(tools, operation) > LONGEST_DROP_US;
    match tools.machines.converge(server).await {
        Ok(Converged::Pending(_)) if !late => Ok(Progress::Wait(ASK_AGAIN)),
        Err(error @ (StepError::Retry { .. } | StepError::Database(_))) if !late => Err(error),
        // Of one that is lost, or says no, there is nothing to be had.
        Ok(_) | Err(_) => Ok(Progress::Done),
    }
}

/// The image and the copy go in the end, whichever step has failed.
struct Begin(Tools);

#[async_trait]
impl Step for Begin {
    fn name(&self) -> &'static str {
        "begin"
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        is_at(&self.0, operation, Shot::Taking, tx).await
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        // One that is whole stays: its bytes were the image's before this operation could write so.
        let gone = self.0.images.discard(&state.image, self.0.clock.now_us());
        gone.await.map_err(unstored)?;
        dropped(&self.0, operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let_go(&self.0, operation, &state, tx).await
    }
}

/// Whether the host has the copy; none: not yet.
async fn is_copied(
    tools: &Tools,
    operation: &Operation,
    state: &State,
) -> Result<Option<()>, StepError> {
    if tools.images.stands(&state.image).await.map_err(unstored)? == Stands::Gone {
        return Err(StepError::fail("the image was deleted meanwhile"));
    }
    host_has(tools, operation, state.copy).await
}

/// Whether the host has this copy; none: not yet.
pub(super) async fn host_has(
    tools: &Tools,
    operation: &Operation,
    copy: CopyId,
) -> Result<Option<()>, StepError> {
    let late = waited_us(tools, operation) > LONGEST_US;
    let server = machine_id(&operation.subject)?;
    let known = machine::find(tools.machines.reader(), server).await?;
    if known.is_none_or(|known| known.wanted.copy != Some(copy)) {
        return Err(StepError::fail(
            "something else has been asked of the server meanwhile",
        ));
    }
    let said = match tools.machines.converge(server).await {
        Ok(Converged::Settled(report)) => of_copy(&report, copy)?,
        Ok(Converged::NoOwner) => return Err(StepError::fail("the server has no host")),
        Ok(Converged::Lost(lost)) => {
            let reason = format!("host {} was removed from the cloud", lost.host);
            return Err(StepError::fail(reason));
        }
        Ok(Converged::Pending(_)) => None,
        Err(StepError::Retry { reason, .. }) if late => return Err(StepError::fail(reason)),
        Err(StepError::Fail { reason }) => {
            return Err(StepError::fail(format!(
                "the disk cannot be copied there; an agent of before has to be upgraded first: {reason}"
            )));
        }
        Err(error) => return Err(error),
    };
    match said {
        None if late => Err(StepError::fail("the disk was not copied in a day")),
        said => Ok(said),
    }
}

/// Of one that has settled.
fn of_copy(report: &MachineReport, copy: CopyId) -> Result<Option<()>, StepError> {
    let said = report.copy.as_ref().filter(|said| said.id == copy);
    match (said.map(|said| &said.state), &report.observed) {
        (Some(CopyState::Made { .. }), _) => Ok(Some(())),
        (Some(CopyState::Failed { reason }), _) => Err(StepError::fail(reason.clone())),
        (_, Observed::Failed { reason }) => Err(StepError::fail(reason.clone())),
        (_, _) => Err(StepError::fail("the server's host knows of no copy")),
    }
}

/// Waits for the host.
pub(super) struct Copy(pub(super) Tools);

#[async_trait]
impl Step for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let copied = is_copied(&self.0, operation, &state).await?;
        Ok(copied.map_or(Progress::Wait(ASK_AGAIN), |()| Progress::Done))
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        is_at(&self.0, operation, Shot::Taken, tx).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let_go(&self.0, operation, &state, tx).await
    }
}

/// Says that the bytes are coming.
pub(super) struct Upload(pub(super) Tools);

#[async_trait]
impl Step for Upload {
    fn name(&self) -> &'static str {
        "upload"
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        is_at(&self.0, operation, Shot::Uploading, tx).await
    }
}

/// Whether an image's bytes are of this copy, and not what somebody has uploaded before it came.
pub(super) fn is_of(image: &Image, copy: CopyId) -> bool {
    let blob = image.row.blob.as_deref().unwrap_or_default();
    let of = copy.0.simple().to_string();
    blob.split_once('.')
        .is_some_and(|(_, key)| key.starts_with(&of))
}

/// Brings the bytes in. Cheap to clone.
#[derive(Clone)]
pub(super) struct Fetch {
    tools: Tools,
    fetches: Fetches,
    turns: Arc<Semaphore>,
}

impl Fetch {
    /// All that are made of it take turns.
    pub(super) fn new(tools: Tools) -> Self {
        Self {
            tools,
            fetches: Fetches::default(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// From the beginning; none: not yet, or nothing is to be fetched any more.
    async fn begin(
        &self,
        operation: &Operation,
        state: &State,
    ) -> Result<Option<Fetching>, StepError> {
        let (tools, images) = (&self.tools, &self.tools.images);
        let Ok(turn) = Arc::clone(&self.turns).try_acquire_owned() else {
            return Ok(None);
        };
        if is_copied(tools, operation, state).await?.is_none() {
            return Ok(None);
        }
        let server = machine_id(&operation.subject)?;
        let known = machine::find(tools.machines.reader(), server).await?;
        let Some(host) = known.and_then(|known| known.host) else {
            return Ok(None);
        };
        let agent = tools.machines.agents().agent(host);
        let agent = agent.map_err(|error| StepError::retry(error.to_string()))?;
        let parts = match agent.copy(server, state.copy).await {
            Ok(parts) => parts,
            // It was lost with its host's power, and will be made again.
            Err(AgentError::Refused(Refusal::Unknown | Refusal::WrongState { .. })) => {
                tools.machines.ask(host, server).await?;
                return Ok(None);
            }
            Err(error) => return Err(StepError::retry(error.to_string())),
        };
        let (of, own) = (state.copy.0.simple(), tools.random.uuid().simple());
        let key = format!("{}.{of}{own}", images.blobs.holder());
        let begun = images.begin_filling(&state.image, &key, tools.clock.now_us());
        let intake = begun.await.map_err(refused)?;
        Ok(intake.map(|intake| Fetching::new(key, parts, intake, turn)))
    }
}

#[async_trait]
impl Step for Fetch {
    fn name(&self) -> &'static str {
        "fetch"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let images = &self.tools.images;
        match images.stands(&state.image).await.map_err(unstored)? {
            Stands::Whole => return Ok(Progress::Done),
            Stands::Gone => return Err(StepError::fail("the image was deleted meanwhile")),
            Stands::Awaited => {}
        }
        let begun = self.fetches.take(operation.id);
        // One that only waits for others to be done is not late.
        let has_turn = begun.is_some() || self.turns.available_permits() > 0;
        if has_turn && waited_us(&self.tools, operation) > LONGEST_US {
            return Err(StepError::fail("the disk's copy was not fetched in a day"));
        }
        let fetching = match begun {
            Some(fetching) => fetching,
            None => match self.begin(operation, &state).await? {
                Some(fetching) => fetching,
                None => return Ok(Progress::Wait(ASK_AGAIN)),
            },
        };
        match fetching.some().await? {
            Fetched::Some(fetching) => {
                self.fetches.keep(operation.id, fetching);
                Ok(Progress::Wait(Duration::ZERO))
            }
            Fetched::All(Fetching { key, intake, .. }) => {
                let found = intake.finish().await.map_err(refused)?;
                let now = self.tools.clock.now_us();
                let ended = images.end_filling(&state.image, &key, found, now).await;
                match ended.map_err(refused)? {
                    true => Ok(Progress::Done),
                    false => Ok(Progress::Wait(Duration::ZERO)),
                }
            }
        }
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let_go(&self.tools, operation, &state, tx).await
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.fetches.take(operation.id);
        Ok(Progress::Done)
    }
}

/// The host drops its copy.
struct Release(Tools);

#[async_trait]
impl Step for Release {
    fn name(&self) -> &'static str {
        "release"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        dropped(&self.0, operation).await
    }
}
