//! Start, stop, reboot, pause, unpause, suspend, resume, rebuild: each changes what is wanted of the
//! machine in the request's transaction, and its operation waits until the host has settled upon it.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::machine::{MachineSpec, Observed, Power, Wanted};
use sea_orm::ActiveValue::Set;
use sea_orm::{DatabaseTransaction, DbErr};
use serde::{Deserialize, Serialize};

use super::cpu::{self, Begins};
use super::create::settle;
use super::{RequestError, Tools, boot, image, instance, machine_id, to_error, to_state, turn};
use crate::agents::host;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::operation::{self, Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::{Converged, Machines, machine};
use crate::scheduler::Amounts;

/// What is done to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Start,
    Stop,
    SoftReboot,
    HardReboot,
    Pause,
    Unpause,
    Suspend,
    Resume,
    Rebuild,
}

/// The kinds' names, as [`operation::cancel`] takes them.
pub fn kinds() -> impl Iterator<Item = &'static str> {
    Change::ALL.into_iter().map(Change::kind)
}

impl Change {
    pub const ALL: [Self; 9] = [
        Self::Start,
        Self::Stop,
        Self::SoftReboot,
        Self::HardReboot,
        Self::Pause,
        Self::Unpause,
        Self::Suspend,
        Self::Resume,
        Self::Rebuild,
    ];

    fn kind(self) -> &'static str {
        match self {
            Self::Start => "server_start",
            Self::Stop => "server_stop",
            Self::SoftReboot => "server_soft_reboot",
            Self::HardReboot => "server_hard_reboot",
            Self::Pause => "server_pause",
            Self::Unpause => "server_unpause",
            Self::Suspend => "server_suspend",
            Self::Resume => "server_resume",
            Self::Rebuild => "server_rebuild",
        }
    }

    /// The state of a server while this is done to it.
    fn transit(self, standing: Standing) -> ServerState {
        match self {
            Self::Start => ServerState::Starting,
            Self::Stop => ServerState::Stopping(standing),
            Self::SoftReboot => ServerState::SoftRebooting,
            Self::HardReboot => ServerState::HardRebooting(standing),
            Self::Pause => ServerState::Pausing,
            Self::Unpause => ServerState::Unpausing,
            Self::Suspend => ServerState::Suspending,
            Self::Resume => ServerState::Resuming,
            Self::Rebuild => ServerState::Rebuilding(standing),
        }
    }

    /// The guest is started with what is true of its server now, as nova writes its drive anew.
    fn begins_anew(self) -> bool {
        matches!(self, Self::Start | Self::HardReboot | Self::Rebuild)
    }

    /// What is wanted of the machine from the request on.
    fn apply(self, standing: Standing, wanted: &mut Wanted, spec: Option<MachineSpec>) {
        match self {
            Self::Start | Self::Unpause | Self::Resume => wanted.power = Power::Running,
            Self::Stop => wanted.power = Power::Stopped,
            Self::Pause => wanted.power = Power::Paused,
            Self::Suspend => wanted.power = Power::Suspended,
            Self::SoftReboot => wanted.soft_reboots += 1,
            Self::HardReboot => {
                wanted.power = Power::Running;
                wanted.hard_reboots += 1;
                // Unless the disk is to be made of it still.
                if wanted.restores.is_none() {
                    wanted.copy = None;
                }
            }
            Self::Rebuild => {
                wanted.rebuilds += 1;
                // It would be one of another disk.
                (wanted.copy, wanted.restores) = (None, None);
                // A stopped server stays stopped, with its new disk.
                wanted.power = if standing == Standing::Stopped {
                    Power::Stopped
                } else {
                    Power::Running
                };
            }
        }
        if let Some(mut spec) = spec {
            // What an image or a flavor knows nothing of.
            spec.disks = std::mem::take(&mut wanted.spec.disks);
            spec.nics = std::mem::take(&mut wanted.spec.nics);
            wanted.spec = spec;
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    /// Key of the state that the server was put in meanwhile.
    transit: String,
    /// What was seen when it had settled.
    #[serde(default)]
    observed: Option<Observed>,
}

/// What a request wants of one server.
#[derive(Debug, Clone)]
pub struct Wish {
    pub change: Change,
    /// The server's state as it was when the change was admitted.
    pub from: ServerState,
    /// Columns that change with it (rebuild).
    pub columns: server::ActiveModel,
    /// A new specification of the machine (rebuild).
    pub spec: Option<MachineSpec>,
}

/// Writes what is wanted, and the operation that brings it about. The server as it stands then: a moment
/// later all may be done.
pub async fn request(
    app: &App,
    origin: Origin,
    id: &str,
    wish: Wish,
) -> Result<server::Model, RequestError> {
    let engine = &app.compute().engine;
    let standing = wish.from.standing().unwrap_or(Standing::Error);
    let transit = wish.change.transit(standing);
    let request_id = origin.request_id.clone();
    let state = State {
        transit: transit.key(),
        observed: None,
    };
    let prepared = engine.prepare(wish.change.kind(), id, &state, origin)?;
    let (subject, now) = (id.to_owned(), app.now_us());
    let machines = app.compute().machines.clone();
    let row = app
        .database()
        .write(move |tx| {
            let (id, prepared, wish) = (subject.clone(), prepared.clone(), wish.clone());
            let (request_id, machines) = (request_id.clone(), machines.clone());
            Box::pin(async move {
                let mut change = wish.columns;
                change.state = Set(transit.key());
                change.updated_at_us = Set(now);
                if !server::turn(tx, &id, wish.from, change).await? {
                    return Err(RequestError::Overtaken);
                }
                if wish.change == Change::HardReboot {
                    // The way out of what hangs: whatever it was, it is not waited for any more.
                    let others: Vec<&str> = kinds().chain([image::KIND]).collect();
                    operation::cancel(tx, &id, &others, "the server is rebooted").await?;
                }
                if wish.change == Change::Rebuild {
                    operation::cancel(tx, &id, &[image::KIND], "the server is rebuilt").await?;
                }
                let server = machine_id(&id)?;
                // A tombstone stays one, whatever the row's state says (an administrator's reset, a
                // delete that waits for a silent host): its data may be gone already.
                let known = machine::find(tx, server).await?;
                let Some(known) =
                    known.filter(|known| known.host.is_some() && !known.is_tombstone())
                else {
                    return Err(RequestError::Overtaken);
                };
                if let Some(spec) = &wish.spec {
                    refit(tx, &known, spec).await?;
                }
                let told = match wish.change.begins_anew() {
                    true => instance::of(tx, &id).await?,
                    false => None,
                };
                let begins = begins(&machines, tx, (wish.change, &known)).await?;
                machine::change(tx, server, request_id, now, |wanted| {
                    let before = wanted.spec.guest.instance.take();
                    wish.change.apply(standing, wanted, wish.spec);
                    let given = wanted.spec.guest.instance.take();
                    wanted.spec.guest.instance = instance::renewed(told, given, before);
                    if let Some(begins) = begins {
                        begins.put(&mut wanted.spec);
                    }
                })
                .await?;
                prepared.insert(tx).await?;
                server::find(tx, &id).await?.ok_or(RequestError::Overtaken)
            })
        })
        .await?;
    engine.wake(id);
    Ok(row)
}

/// The CPU of a guest that begins anew; none: it stays as it is. One that is started may run all the same, unless it was to
/// be off.
async fn begins(
    machines: &Machines,
    tx: &DatabaseTransaction,
    (change, known): (Change, &machine::Machine),
) -> Result<Option<Begins>, DbErr> {
    let is_off = known.wanted.power == Power::Stopped;
    let Some(host) = known.host.filter(|_| change.begins_anew()) else {
        return Ok(None);
    };
    if change == Change::Start && !is_off {
        return Ok(None);
    }
    let mode = cpu::mode_of(machines, tx, &known.server.to_string()).await?;
    cpu::begins(machines, tx, (mode, host), known.server)
        .await
        .map(Some)
}

/// What the server holds of its host becomes what `spec` needs: without a size of its own in the
/// flavor, the disk is as large as its image.
pub async fn refit(
    tx: &DatabaseTransaction,
    known: &machine::Machine,
    spec: &MachineSpec,
) -> Result<(), RequestError> {
    let needed = amounts(spec);
    let Some(host) = known.host.filter(|_| amounts(&known.wanted.spec) != needed) else {
        return Ok(());
    };
    host::release(tx, host, known.server).await?;
    if host::reserve(tx, host, known.server, needed).await? {
        Ok(())
    } else {
        Err(RequestError::NoRoom(known.server.to_string()))
    }
}

/// What a machine takes of its host.
pub(super) fn amounts(spec: &MachineSpec) -> Amounts {
    Amounts {
        vcpus: i64::from(spec.vcpus),
        memory_mib: i64::try_from(spec.memory_mib).unwrap_or(i64::MAX),
        disk_gib: boot::gib(spec.root_disk.as_ref()),
    }
}

/// Whether the user has asked for something else of the server since.
pub(super) async fn is_followed(
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<bool, StepError> {
    Ok(!followers(operation, tx).await?.is_empty())
}

/// Whether one of those that follow says whether the guest is to run.
pub(super) async fn is_told_otherwise(
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<bool, StepError> {
    let [live, follows] = super::migrate::KINDS;
    let says = |kind: &String| ![super::image::KIND, live, follows].contains(&kind.as_str());
    Ok(followers(operation, tx).await?.iter().any(says))
}

/// Kinds of what was asked for later.
async fn followers(
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<Vec<String>, StepError> {
    let id = operation.id.to_string();
    let waiting = operation::unfinished(tx, Some(&operation.subject)).await?;
    let later = waiting.into_iter().filter(|other| {
        let later = (other.created_at_us, &other.id) > (operation.created_at_us, &id);
        other.parked.is_none() && later
    });
    Ok(later.map(|other| other.kind).collect())
}

pub struct ServerChange {
    change: Change,
    tools: Tools,
}

impl ServerChange {
    pub(super) fn new(change: Change, tools: Tools) -> Self {
        Self { change, tools }
    }

    /// A guest that could not be suspended runs on, and one that could not go on is suspended still: that is
    /// what is wanted of it then, and its user may try again.
    async fn stays_as_it_was(
        &self,
        operation: &Operation,
        state: &State,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<Option<ServerState>, StepError> {
        let (power, stays) = match (self.change, outcome) {
            (Change::Suspend, Outcome::Undone { .. }) => (Power::Running, ServerState::Active),
            (Change::Resume, Outcome::Undone { .. }) => (Power::Suspended, ServerState::Suspended),
            _ => return Ok(None),
        };
        let row = server::find(tx, &operation.subject).await?;
        if row.is_none_or(|row| row.state().key() != state.transit) {
            return Ok(None);
        }
        let id = machine_id(&operation.subject)?;
        let known = machine::find(tx, id).await?;
        // It is the host that could not do it. One that is gone is an error like any other.
        let said = known.as_ref().and_then(|known| {
            let owner = known.host.filter(|_| !known.is_tombstone())?;
            self.tools.machines.fleet().machine(owner, id)
        });
        let Some(known) = known.filter(|_| {
            said.is_some_and(|report| matches!(report.observed, Observed::Failed { .. }))
        }) else {
            return Ok(None);
        };
        let now = self.tools.clock.now_us();
        machine::change(tx, id, known.request_id, now, |wanted| wanted.power = power).await?;
        Ok(Some(stays))
    }
}

#[async_trait]
impl Kind for ServerChange {
    fn name(&self) -> &'static str {
        self.change.kind()
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        vec![Arc::new(Settle(self.tools.clone()))]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let state: State = operation.state()?;
        let now = self.tools.clock.now_us();
        // What was given up for a later request is no failure of the server's: two hard reboots put
        // it in one and the same state, and the second one ends it.
        if *outcome != Outcome::Done && is_followed(operation, tx).await? {
            return Ok(());
        }
        let stays = self.stays_as_it_was(operation, &state, outcome, tx).await?;
        turn(tx, &operation.subject, |row| {
            // A later request (a hard reboot, a delete) has the last word.
            if row.state().key() != state.transit {
                return None;
            }
            match outcome {
                Outcome::Done => settled(row, state.observed.as_ref(), now),
                // The action's event says why.
                Outcome::Undone { .. } if stays.is_some() => {
                    stays.map(|state| to_state(state, now))
                }
                Outcome::Undone { reason } | Outcome::Parked { reason } => {
                    Some(to_error(reason, Some(reason), now))
                }
            }
        })
        .await?;
        Ok(())
    }
}

fn settled(
    row: &server::Model,
    observed: Option<&Observed>,
    now: i64,
) -> Option<server::ActiveModel> {
    let state = match observed {
        Some(Observed::Running) => ServerState::Active,
        Some(Observed::Paused) => ServerState::Paused,
        Some(Observed::Suspended) => ServerState::Suspended,
        Some(Observed::Stopped { .. }) => ServerState::Stopped,
        Some(Observed::Failed { reason }) => return Some(to_error(reason, Some(reason), now)),
        // Not seen any more by the time of the commit: as it was, until the reconciler says more.
        _ => row.state().standing()?.settled(),
    };
    let mut change = to_state(state, now);
    if matches!(row.state(), ServerState::Rebuilding(_)) && state == ServerState::Active {
        change.launched_at_us = Set(Some(now));
    }
    Some(change)
}

/// Waits for the host.
struct Settle(Tools);

#[async_trait]
impl Step for Settle {
    fn name(&self) -> &'static str {
        "settle"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let server = machine_id(&operation.subject)?;
        match self.0.machines.converge(server).await? {
            Converged::Settled(report) => match report.observed {
                Observed::Failed { reason } => Err(StepError::fail(reason)),
                _ => Ok(Progress::Done),
            },
            Converged::NoOwner => Err(StepError::fail("the server has no host")),
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
