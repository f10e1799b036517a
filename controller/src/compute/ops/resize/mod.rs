//! `server_resize`, `server_migrate`: a server gets another size, or another host while its guest does not run; and both
//! can be taken back until its user has said that it is to stay so ([`verdict`]).
//!
//! | step | what it does | the server's task |
//! |---|---|---|
//! | (request) | the migration's row, which keeps what the server was; what is more of it counts against the quota | resize_prep |
//! | settle | it undoes | |
//! | place | a host is chosen, and room taken; the owner is told to stop the guest and then to copy the disk | |
//! | copy | waits until it has the copy | resize_migrating |
//! | fetch | for another host: brings the bytes into the store, as an image that is nobody's | resize_migrated |
//! | move | commit: the machine has its new size, and is the new host's, a generation higher | resize_finish |
//! | start | the host has the disk, and the guest runs if it did | |
//! | clean | the image goes | none |
//!
//! A server that only gets another size stays where it is if there is room: its disk grows in place, and the copy, which
//! stays on the host, is what it goes back to. From another host it goes back to the one that it came from, which keeps
//! the disk and lets its guest stand still: the row of the migration is open until then, and keeps the reconciler from
//! dropping it. What the new host's guest writes before that is lost, as with nova.
//!
//! What fails before the guest was started takes all of it back.

mod given_up;
pub mod revert;
mod steps;
pub mod verdict;

pub use given_up::give_up;
pub(super) use given_up::is_made;

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::copy::CopyId;
use fractus_agent_api::guest::GuestOptions;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineSpec, Observed, Power, RootDisk, ServerId, Wanted};
use fractus_agent_api::migration::MigrationId;
use sea_orm::ActiveValue::{NotSet, Set};
use sea_orm::{DatabaseTransaction, DbErr};
use serde::{Deserialize, Serialize};

use super::image::{self, Fetch};
use super::shelve::is_over;
use super::{RequestError, Tools, change, cpu, machine_id, migrate, to_error, to_state, turn};
use crate::agents::host;
use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::model::state::{Move, ServerState, Standing};
use crate::compute::quota::{self, Usage};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::operation::{Kind, Operation, Outcome, Step, StepError};
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration::{self, Purpose, Status};
use crate::scheduler::Amounts;

pub const RESIZE: &str = "server_resize";
pub const MIGRATE: &str = "server_migrate";

/// What the operation knows; steps of [`image`] read the first two.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    image: String,
    copy: CopyId,
    migration: MigrationId,
    source: HostId,
    before: Before,
    /// An administrator's choice.
    host: Option<HostId>,
    /// None: it stays as large as it is.
    size: Option<Size>,
    #[serde(default)]
    target: Option<HostId>,
    /// The target has the disk, and its guest has run, or may have.
    #[serde(default)]
    begun: bool,
    /// What was seen when the target had settled.
    #[serde(default)]
    observed: Option<Observed>,
    /// While it is taken back: what has been asked of the guest since.
    #[serde(default)]
    followed: Option<Power>,
}

impl State {
    /// It gets another size, and keeps its host.
    fn stays(&self) -> bool {
        self.target == Some(self.source)
    }
}

/// What a server is by its flavor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// JSON, as in the server's row.
    pub flavor: String,
    pub flavor_id: String,
    /// JSON, likewise.
    pub boot: String,
    pub vcpus: i32,
    /// MiB.
    pub ram: i64,
    /// Without devices, and without what the guest is told.
    pub spec: MachineSpec,
    /// None: as it is.
    #[serde(default)]
    pub disk_config: Option<String>,
}

impl Size {
    /// Of the server as it is.
    fn of(row: &server::Model, spec: &MachineSpec) -> Self {
        let mut spec = spec.clone();
        (spec.disks, spec.nics, spec.guest.instance) = (Vec::new(), Vec::new(), None);
        Self {
            flavor: row.flavor.clone(),
            flavor_id: row.flavor_id.clone(),
            boot: row.boot.clone(),
            vcpus: row.vcpus,
            ram: row.ram,
            spec,
            disk_config: Some(row.disk_config.clone()),
        }
    }

    fn flavor(&self) -> Result<FlavorSnapshot, StepError> {
        let read = serde_json::from_str(&self.flavor);
        read.map_err(|error| StepError::fail(format!("the flavor of the server's size: {error}")))
    }

    /// The columns of the server's row that are its own; what counts against the quota is said elsewhere.
    fn columns(&self) -> server::ActiveModel {
        server::ActiveModel {
            flavor: Set(self.flavor.clone()),
            flavor_id: Set(self.flavor_id.clone()),
            boot: Set(self.boot.clone()),
            disk_config: self.disk_config.clone().map_or(NotSet, Set),
            ..Default::default()
        }
    }

    /// The machine, so large: what a flavor knows nothing of stays.
    fn applied(&self, spec: &MachineSpec) -> MachineSpec {
        let image = spec.root_disk.as_ref().and_then(|disk| disk.image.clone());
        let root_disk = self.spec.root_disk.as_ref();
        MachineSpec {
            disks: spec.disks.clone(),
            nics: spec.nics.clone(),
            root_disk: root_disk.map(|disk| RootDisk {
                image,
                size: disk.size,
            }),
            guest: GuestOptions {
                instance: spec.guest.instance.clone(),
                ..self.spec.guest.clone()
            },
            ..self.spec.clone()
        }
    }
}

/// What it goes back to.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Before {
    size: Size,
    ran: bool,
    /// Of its disk: what its host has done by then, which is not to be done again.
    rebuilds: u64,
    /// The copy that its host has of the disk, if it stays there; none: it has no disk.
    copy: Option<CopyId>,
}

impl Before {
    fn power(&self) -> Power {
        match self.ran {
            true => Power::Running,
            false => Power::Stopped,
        }
    }

    fn standing(&self) -> Standing {
        match self.ran {
            true => Standing::Active,
            false => Standing::Stopped,
        }
    }

    fn amounts(&self) -> Amounts {
        change::amounts(&self.size.spec)
    }

    /// The CPU of its guest, which begins anew on the host that it comes back to.
    async fn begins(
        &self,
        tools: &Tools,
        (host, server): (HostId, ServerId),
        tx: &DatabaseTransaction,
    ) -> Result<cpu::Begins, StepError> {
        let mode = cpu::mode(&tools.machines, &self.size.flavor()?);
        Ok(cpu::begins(&tools.machines, tx, (mode, host), server).await?)
    }
}

/// What a request wants of one server.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The server's state as it was when this was admitted.
    pub from: ServerState,
    /// None: it is to be elsewhere.
    pub size: Option<Size>,
    /// None: the scheduler's choice.
    pub host: Option<HostId>,
}

/// Writes what is to become of the server, and the operation that brings it about.
pub async fn request(app: &App, origin: Origin, id: &str, wish: Wish) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let server = machine_id(id)?;
    let row = server::find(app.database().reader(), id).await?;
    let known = machine::find(app.database().reader(), server).await?;
    let source = known.as_ref().and_then(|known| known.host);
    let (Some(row), Some(known), Some(source)) = (row, known, source) else {
        return Err(RequestError::Overtaken);
    };
    let copy = CopyId(app.random().uuid());
    let (purpose, kind) = match wish.size {
        Some(_) => (Purpose::Resize, RESIZE),
        None => (Purpose::Cold, MIGRATE),
    };
    let migration = MigrationId(app.random().uuid());
    let state = State {
        // So that whoever knows of the one finds the other.
        image: migration.to_string(),
        copy,
        migration,
        source,
        before: Before {
            size: Size::of(&row, &known.wanted.spec),
            ran: wish.from.standing() == Some(Standing::Active),
            rebuilds: known.wanted.rebuilds,
            copy: known.wanted.spec.root_disk.is_some().then_some(copy),
        },
        host: wish.host,
        size: wish.size.clone(),
        target: None,
        begun: false,
        observed: None,
        followed: None,
    };
    let prepared = engine.prepare(kind, id, &state, origin.clone())?;
    let (subject, now) = (id.to_owned(), app.now_us());
    app.database()
        .write(move |tx| {
            let (id, prepared, origin) = (subject.clone(), prepared.clone(), origin.clone());
            let (wish, state, known) = (wish.clone(), state.clone(), known.clone());
            Box::pin(async move {
                let present = machine::find(tx, server).await?;
                let is_as_read = present.is_some_and(|present| {
                    present.age() == known.age() && present.confirmed && !present.is_tombstone()
                });
                let row = server::find(tx, &id).await?;
                let row = row.filter(|_| is_as_read).ok_or(RequestError::Overtaken)?;
                let mut change = server::ActiveModel::default();
                if let Some(size) = &wish.size {
                    let more = Usage {
                        instances: 0,
                        cores: i64::from(Ord::max(size.vcpus - row.vcpus, 0)),
                        ram: Ord::max(size.ram - row.ram, 0),
                    };
                    quota::check_more(tx, &row.project_id, more).await?;
                    // Of both, until it is known which it is to be.
                    change.vcpus = Set(Ord::max(size.vcpus, row.vcpus));
                    change.ram = Set(Ord::max(size.ram, row.ram));
                }
                let standing = state.before.standing();
                change.state = Set(ServerState::Resizing(standing, Move::Prep).key());
                change.updated_at_us = Set(now);
                if !server::turn(tx, &id, wish.from, change).await? {
                    return Err(RequestError::Overtaken);
                }
                // One that is parked is an operator's to look at.
                if !migration::open(tx, server).await?.is_empty() {
                    return Err(RequestError::Overtaken);
                }
                if known.wanted.copy.is_some() {
                    return Err(RequestError::ImageUnderWay);
                }
                if purpose == Purpose::Cold && super::shelve::has_other_disks(&known.wanted.spec) {
                    return Err(RequestError::OtherDisks(id));
                }
                let ids = (state.migration, purpose);
                let accepted = migrate::accepted(&row, ids, source, &origin, now, tx).await?;
                let accepted = migration::Model {
                    new_flavor_id: wish.size.map(|size| size.flavor_id),
                    before: Some(written(&state.before)?),
                    ..accepted
                };
                migration::insert(tx, accepted).await?;
                Ok(prepared.insert(tx).await?)
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

fn written(before: &Before) -> Result<String, DbErr> {
    serde_json::to_string(before).map_err(|error| DbErr::Custom(error.to_string()))
}

/// What the row of a migration keeps of its server.
fn kept(row: &migration::Model) -> Result<Before, DbErr> {
    let text = row.before.as_deref().unwrap_or_default();
    serde_json::from_str(text).map_err(|error| {
        DbErr::Type(format!(
            "migration {}: what the server was: {error}",
            row.uuid
        ))
    })
}

/// What the server holds of a host becomes this; false, and as before, if there is no room.
async fn hold(
    tx: &DatabaseTransaction,
    on: HostId,
    server: ServerId,
    (before, then): (Amounts, Amounts),
) -> Result<bool, DbErr> {
    host::release(tx, on, server).await?;
    if host::reserve(tx, on, server, then).await? {
        return Ok(true);
    }
    host::keep(tx, on, server, before).await?;
    Ok(false)
}

/// The migration is over: its server holds what it is of the host that owns it, and nothing of another; what is left
/// there is the reconciler's to see to.
async fn close(
    tx: &DatabaseTransaction,
    known: &Machine,
    of: &migration::Model,
    (status, reason): (Status, Option<String>),
    now_us: i64,
) -> Result<(), DbErr> {
    let server = known.server;
    for held in of.hosts().filter(|held| Some(*held) != known.host) {
        host::release(tx, held, server).await?;
    }
    if let Some(owner) = known.host {
        host::keep(tx, owner, server, change::amounts(&known.wanted.spec)).await?;
    }
    count_present(tx, server).await?;
    let change = migration::ActiveModel {
        reason: Set(reason),
        ended_at_us: Set(Some(now_us)),
        ..migrate::is_now(status, now_us)
    };
    migration::update(tx, of.migration(), change).await
}

/// What the server is by its flavor counts against its project's quota, and no larger size any more.
pub(super) async fn count_present(tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr> {
    let Some(row) = server::find(tx, &server.to_string()).await? else {
        return Ok(());
    };
    let flavor = row.flavor()?;
    let is_his = server::ActiveModel {
        vcpus: Set(i32::try_from(flavor.vcpus).unwrap_or(i32::MAX)),
        ram: Set(i64::try_from(flavor.ram).unwrap_or(i64::MAX)),
        ..Default::default()
    };
    server::update(tx, &row.id, is_his).await
}

/// The one of a server that could still be taken back.
async fn open_one(
    tx: &DatabaseTransaction,
    server: ServerId,
) -> Result<Option<migration::Model>, DbErr> {
    let open = migration::open(tx, server).await?;
    Ok(open.into_iter().find(|row| row.before.is_some()))
}

/// The host need not keep what the server could go back to.
pub(super) fn forget_copy(wanted: &mut Wanted) {
    (wanted.copy, wanted.restores, wanted.parks) = (None, None, None);
}

pub struct Resize {
    name: &'static str,
    tools: Tools,
    fetch: Fetch,
}

impl Resize {
    pub(super) fn new(name: &'static str, tools: Tools, fetch: Fetch) -> Self {
        Self { name, tools, fetch }
    }

    /// None of it came about.
    async fn taken_back(
        &self,
        operation: &Operation,
        (state, reason): (&State, &str),
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        let server = machine_id(&operation.subject)?;
        let of = migration::find(tx, state.migration).await?;
        let known = machine::find(tx, server).await?;
        if let (Some(known), Some(of)) = (&known, of) {
            let ended = (Status::Error, Some(reason.to_owned()));
            close(tx, known, &of, ended, now).await?;
        }
        let said = known.and_then(|known| {
            let said = self.tools.machines.fleet().machine(known.host?, server)?;
            let is_of_now = (said.generation, said.revision) == known.age();
            (is_of_now && said.settled).then_some((said, known.wanted.power))
        });
        let standing = state.before.standing();
        turn(tx, &operation.subject, |row| match row.state() {
            ServerState::Resizing(..) => Some(image::is_now(standing, said.as_ref(), now)),
            _ => None,
        })
        .await?;
        Ok(())
    }

    /// The guest was started as it was to be.
    async fn came_about(
        &self,
        operation: &Operation,
        state: &State,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        let change = migrate::is_now(Status::Finished, now);
        migration::update(tx, state.migration, change).await?;
        let row = server::find(tx, &operation.subject).await?;
        let is_resizing = |row: &server::Model| matches!(row.state(), ServerState::Resizing(..));
        if row.is_some_and(|row| !is_resizing(&row)) {
            let of = migration::find(tx, state.migration).await?;
            if let Some(of) = of.filter(|of| of.ended_at_us.is_none()) {
                let server = machine_id(&operation.subject)?;
                given_up::was_reset(tx, &self.tools.machines, server, &of, now).await?;
            }
            return Ok(());
        }
        turn(tx, &operation.subject, |_| {
            Some(server::ActiveModel {
                launched_at_us: Set(Some(now)),
                ..to_state(stands(state.observed.as_ref()), now)
            })
        })
        .await?;
        Ok(())
    }
}

/// What a server is whose guest is so, and which can go back.
fn stands(observed: Option<&Observed>) -> ServerState {
    let runs = matches!(observed, Some(Observed::Running | Observed::Paused));
    ServerState::Resized(match runs {
        true => Standing::Active,
        false => Standing::Stopped,
    })
}

#[async_trait]
impl Kind for Resize {
    fn name(&self) -> &'static str {
        self.name
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let tools = || self.tools.clone();
        vec![
            Arc::new(steps::Settle(tools())),
            Arc::new(steps::Place(tools())),
            Arc::new(steps::Copy(tools())),
            Arc::new(steps::Bring::new(tools(), self.fetch.clone())),
            Arc::new(steps::Move(tools())),
            Arc::new(steps::Start(tools())),
            Arc::new(steps::Clean(tools())),
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
        let row = server::find(tx, &operation.subject).await?;
        // What it held is the delete's to give back.
        if row.is_none_or(|row| is_over(row.state())) {
            return Ok(());
        }
        match outcome {
            Outcome::Done => self.came_about(operation, &state, tx).await,
            // There is no way back from there but its user's.
            Outcome::Undone { .. } if state.begun => self.came_about(operation, &state, tx).await,
            Outcome::Undone { reason } => self.taken_back(operation, (&state, reason), tx).await,
            Outcome::Parked { reason } => {
                let change = migration::ActiveModel {
                    reason: Set(Some(reason.clone())),
                    ..migrate::is_now(Status::Error, now)
                };
                migration::update(tx, state.migration, change).await?;
                let error = to_error(reason, Some(reason), now);
                Ok(turn(tx, &operation.subject, |_| Some(error)).await?)
            }
        }
    }
}
