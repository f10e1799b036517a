//! `server_create`: place (reserve, owner, intent) → start (agent told, vCPUs in KVM_RUN).
//!
//! Undone upward: what is wanted becomes Absent, the host confirms that nothing is left, the owner and
//! the reservation go. The server's row stays, in ERROR, with the reason.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::guest::GuestReport;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineSpec, Observed, Power, Wanted};
use sea_orm::ActiveValue::Set;
use sea_orm::{DatabaseTransaction, DbErr};
use serde::{Deserialize, Serialize};

use super::{RequestError, Tools, cpu, is_unknown, machine_id, resize, to_error, to_state, turn};
use crate::compute::model::state::{Build, ServerState};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::operation::{Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::{Converged, NoHost, machine};
use crate::scheduler::{Amounts, Request};

pub const KIND: &str = "server_create";

/// Why an operation does not go on that [`is_unknown`] concerns.
pub(super) const UNKNOWN: &str =
    "the database was restored, and the server's host knows nothing of it";

/// What the operation knows of its server.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    amounts: Amounts,
    spec: MachineSpec,
    /// An administrator's choice of the host.
    #[serde(default)]
    host: Option<HostId>,
    /// The guest had ended again by the time it was seen to have started.
    #[serde(default)]
    stopped: bool,
}

/// A server to be created.
#[derive(Debug, Clone)]
pub struct NewServer {
    pub row: server::Model,
    pub spec: MachineSpec,
    pub amounts: Amounts,
    pub host: Option<HostId>,
}

/// Writes servers and their operations in one transaction, within the project's quota.
pub async fn request(
    app: &App,
    origin: Origin,
    servers: Vec<NewServer>,
) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let mut prepared = Vec::with_capacity(servers.len());
    for server in servers {
        let state = State {
            amounts: server.amounts,
            spec: server.spec,
            host: server.host,
            stopped: false,
        };
        let operation = engine.prepare(KIND, server.row.id.clone(), &state, origin.clone())?;
        prepared.push((server.row, operation));
    }
    let subjects: Vec<String> = prepared.iter().map(|(row, _)| row.id.clone()).collect();
    let prepared = Arc::new(prepared);
    app.database()
        .write(move |tx| {
            let prepared = Arc::clone(&prepared);
            Box::pin(async move {
                let rows: Vec<&server::Model> = prepared.iter().map(|(row, _)| row).collect();
                crate::compute::quota::claim(tx, &rows).await?;
                for (row, operation) in prepared.iter() {
                    server::insert(tx, row.clone()).await?;
                    operation.insert(tx).await?;
                }
                Ok::<(), RequestError>(())
            })
        })
        .await?;
    for subject in subjects {
        engine.wake(&subject);
    }
    Ok(())
}

pub struct ServerCreate {
    tools: Tools,
}

impl ServerCreate {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for ServerCreate {
    fn name(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        vec![
            Arc::new(Place(self.tools.clone())),
            Arc::new(Start(self.tools.clone())),
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
        turn(tx, &operation.subject, |row| {
            // A delete that came in between has the last word.
            if !matches!(row.state(), ServerState::Building(_)) {
                return None;
            }
            Some(match outcome {
                Outcome::Done => server::ActiveModel {
                    launched_at_us: Set(Some(now)),
                    ..to_state(running_or_stopped(state.stopped), now)
                },
                Outcome::Undone { reason } | Outcome::Parked { reason } => {
                    to_error(reason, Some(reason), now)
                }
            })
        })
        .await?;
        Ok(())
    }
}

fn running_or_stopped(stopped: bool) -> ServerState {
    if stopped {
        ServerState::Stopped
    } else {
        ServerState::Active
    }
}

/// Chooses a host, takes what the server needs of it, and makes it the owner at generation 1.
struct Place(Tools);

#[async_trait]
impl Step for Place {
    fn name(&self) -> &'static str {
        "place"
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        let server = machine_id(&operation.subject)?;
        let mode = cpu::mode_of(&self.0.machines, tx, &operation.subject).await?;
        let request = Request {
            server,
            amounts: state.amounts,
            host: state.host,
            excluded: Default::default(),
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
        let now = self.0.clock.now_us();
        let mut spec = state.spec.clone();
        let begins = cpu::begins(&self.0.machines, tx, (mode, host), server).await?;
        begins.put(&mut spec);
        let wanted = Wanted {
            power: Power::Running,
            soft_reboots: 0,
            hard_reboots: 0,
            rebuilds: 0,
            arrives: None,
            departs: None,
            continues: None,
            copy: None,
            copies: 0,
            restores: None,
            parks: None,
            spec,
        };
        let request_id = operation.origin.request_id.clone();
        let owned = machine::own(tx, server, host, &wanted, request_id, now).await?;
        if owned.is_none() {
            return Err(StepError::fail(format!(
                "server {server} is owned by another host already"
            )));
        }
        turn(tx, &operation.subject, |row| {
            (row.state() == ServerState::Building(Build::Scheduling))
                .then(|| to_state(ServerState::Building(Build::Spawning), now))
        })
        .await?;
        // What the guest is told is the machine's from here on, and goes with it; an operation's row
        // stays.
        state.spec.guest.instance = None;
        operation.set_state(&state)
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        gone(&self.0, operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let server = machine_id(&operation.subject)?;
        Ok(machine::disown(tx, server, self.0.clock.now_us()).await?)
    }
}

/// The agent is told, and reports that every vCPU has entered the guest.
struct Start(Tools);

#[async_trait]
impl Step for Start {
    fn name(&self) -> &'static str {
        "start"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let server = machine_id(&operation.subject)?;
        let known = machine::find(self.0.machines.reader(), server).await?;
        if known.is_some_and(|known| is_unknown(&self.0.machines, &known)) {
            return Err(StepError::fail(UNKNOWN));
        }
        match self.0.machines.converge(server).await? {
            Converged::Settled(report) => match report.observed {
                // Paused: by its own watchdog, which the reconciler tells. Suspended: asked for since, of a
                // server whose state was reset.
                Observed::Running
                | Observed::Paused
                | Observed::Suspended
                | Observed::Stopped { .. } => Ok(Progress::Done),
                Observed::Failed { reason } => Err(StepError::fail(reason)),
                other => Err(StepError::fail(format!(
                    "the machine is {other:?} instead of running"
                ))),
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
        let observed = settle(&self.0, tx, &operation.subject).await?;
        state.stopped = matches!(observed, Some(Observed::Stopped { .. }));
        operation.set_state(&state)
    }

    /// What is wanted from here on is that there be nothing. Of a restored database that is for an operator to say: the
    /// server may have come to run since, and be elsewhere.
    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let known = machine::find(tx, machine_id(&operation.subject)?).await?;
        let is_deleted = known.as_ref().is_some_and(machine::Machine::is_tombstone);
        if !is_deleted && known.is_some_and(|known| known.host.is_some() && !known.confirmed) {
            return Err(StepError::fail(
                "the database was restored, and no host has said that it has the server",
            ));
        }
        want_absent(&self.0, operation, tx).await?;
        Ok(())
    }
}

/// Records what the owner has settled upon; answers what that is. A guest that ended by itself is
/// wanted stopped from then on.
pub(super) async fn settle(
    tools: &Tools,
    tx: &DatabaseTransaction,
    subject: &str,
) -> Result<Option<Observed>, StepError> {
    let server = machine_id(subject)?;
    let Some(machine) = machine::find(tx, server).await? else {
        return Ok(None);
    };
    let Some(host) = machine.host else {
        return Ok(None);
    };
    let Some(report) = tools.machines.fleet().machine(host, server) else {
        return Ok(None);
    };
    if !report.settled || (report.generation, report.revision) != machine.age() {
        return Ok(None);
    }
    let now = tools.clock.now_us();
    // What the guest itself has said by now is the reconciler's to tell, which looks at what differs
    // from the row: a panic again, as the operation made the server look well; a watchdog once.
    let mut plain = report.clone();
    let told = machine.report.filter(|told| told.starts == report.starts);
    plain.guest = GuestReport {
        panicked: false,
        ..told.map(|told| told.guest).unwrap_or_default()
    };
    machine::settle(tx, &plain, now).await?;
    let ended = matches!(report.observed, Observed::Stopped { .. });
    let power = machine.wanted.power;
    if ended && matches!(power, Power::Running | Power::Paused | Power::Suspended) {
        machine::change(tx, server, machine.request_id, now, |wanted| {
            wanted.power = Power::Stopped;
        })
        .await?;
    }
    if !matches!(report.observed, Observed::Failed { .. })
        && report.rebuilds >= machine.wanted.rebuilds
    {
        let runs = matches!(report.observed, Observed::Running | Observed::Paused);
        resize::is_made(tx, server, runs, now).await?;
    }
    Ok(Some(report.observed))
}

pub(super) async fn want_absent(
    tools: &Tools,
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<(), DbErr> {
    let Ok(server) = machine_id(&operation.subject) else {
        return Ok(());
    };
    let known = machine::find(tx, server).await?;
    if known.is_none_or(|machine| machine.is_tombstone()) {
        return Ok(());
    }
    let request_id = operation.origin.request_id.clone();
    let now = tools.clock.now_us();
    let changed = machine::change(tx, server, request_id, now, Wanted::end);
    changed.await.map(|_| ())
}

/// Waits until the owner says that neither process nor disks are left.
pub(super) async fn gone(tools: &Tools, operation: &Operation) -> Result<Progress, StepError> {
    let server = machine_id(&operation.subject)?;
    match tools.machines.converge(server).await? {
        Converged::Settled(report) => match report.observed {
            Observed::Absent => Ok(Progress::Done),
            other => Err(StepError::retry(format!(
                "the machine is {other:?} instead of gone"
            ))),
        },
        // Nothing was made, or whoever had it is no part of this cloud any more.
        Converged::NoOwner | Converged::Lost(_) => Ok(Progress::Done),
        pending => Ok(pending.pending().unwrap_or(Progress::Done)),
    }
}
