//! The steps, and how each is taken back. See the table in [`super`].

use async_trait::async_trait;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineReport, Observed, Power, Wanted};
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;

use super::{State, forget_copy, hold};
use crate::agents::host;
use crate::compute::model::cpu::CpuMode;
use crate::compute::model::state::{self, ServerState};
use crate::compute::ops::create::settle;
use crate::compute::ops::image::{self, Fetch, dropped, host_has, unstored, unwritten, waited_us};
use crate::compute::ops::shelve::{has_other_disks, is_over, let_go_of, want_gone};
use crate::compute::ops::{Tools, change, cpu, instance, machine_id, migrate, to_state, turn};
use crate::compute::store::server;
use crate::image::model::Status as ImageStatus;
use crate::image::{Images, snapshot, store};
use crate::operation::{Operation, Progress, Step, StepError};
use crate::reconcile::machine::{self, Machine};
use crate::reconcile::migration::{self, Status};
use crate::reconcile::{ASK_AGAIN, Converged, Dropped, NoHost};
use crate::scheduler::{Amounts, Request, against_cpu};

/// A target that is silent for so long before it owns anything is given up.
const LONGEST_WAIT_US: i64 = 120_000_000;

/// How far the server and its migration are, for those who look.
async fn is_at(
    tools: &Tools,
    operation: &Operation,
    (at, status): (state::Move, Status),
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let (state, now): (State, i64) = (operation.state()?, tools.clock.now_us());
    turn(tx, &operation.subject, |row| match row.state() {
        ServerState::Resizing(standing, _) => {
            Some(to_state(ServerState::Resizing(standing, at), now))
        }
        _ => None,
    })
    .await?;
    migration::update(tx, state.migration, migrate::is_now(status, now)).await?;
    Ok(())
}

/// In a restored database the row may be older than what hosts have: then nothing is told to go.
fn is_known(known: &Machine) -> Result<(), StepError> {
    match known.confirmed {
        true => Ok(()),
        false => Err(StepError::retry(format!(
            "the database was restored, and no host has yet said that it holds server {}",
            known.server
        ))),
    }
}

/// A delete has the last word; what there is of its server is its to end.
async fn is_deleted(tools: &Tools, operation: &Operation) -> Result<bool, StepError> {
    let row = server::find(tools.machines.reader(), &operation.subject).await?;
    Ok(row.is_none_or(|row| is_over(row.state())))
}

/// The owner's row; none: the server is deleted.
async fn owned(
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<Option<Machine>, StepError> {
    let row = server::find(tx, &operation.subject).await?;
    if row.is_none_or(|row| is_over(row.state())) {
        return Ok(None);
    }
    Ok(machine::find(tx, machine_id(&operation.subject)?).await?)
}

/// What is wanted of the machine at its source, as if nothing had been asked; but for its power, where something else has
/// been since.
async fn as_before(
    state: &State,
    wanted: &mut Wanted,
    (operation, tx): (&Operation, &DatabaseTransaction),
) -> Result<(), StepError> {
    let is_followed = change::is_told_otherwise(operation, tx).await?;
    let had = wanted.spec.clone();
    wanted.spec = state.before.size.applied(&had);
    if is_followed {
        // What followed may have begun the guest anew, and has fixed its CPU then.
        (wanted.spec.cpu, wanted.spec.cpu_profile) = (had.cpu, had.cpu_profile);
    }
    wanted.power = match (is_followed, wanted.power) {
        // Its target's guest and disk were to go: so is not what stands at the source.
        (true, Power::Absent) => state.followed.unwrap_or_else(|| state.before.power()),
        (true, power) => power,
        (false, _) => state.before.power(),
    };
    forget_copy(wanted);
    Ok(())
}

/// The source need not keep the copy, and its guest is to run if it did, at its former size.
async fn take_back(
    tools: &Tools,
    operation: &Operation,
    tx: &DatabaseTransaction,
) -> Result<(), StepError> {
    let state: State = operation.state()?;
    let Some(known) = owned(operation, tx).await? else {
        return Ok(());
    };
    if state.begun || known.host != Some(state.source) {
        return Ok(());
    }
    let mut back = known.wanted.clone();
    // Its host may have started the guest so large: what it holds of the host is given back, so it is started anew.
    let may_be_larger = state.stays() && back.restores.is_some() && state.before.ran;
    as_before(&state, &mut back, (operation, tx)).await?;
    if may_be_larger && back.power == Power::Running {
        back.hard_reboots += 1;
        let begins = state
            .before
            .begins(tools, (state.source, known.server), tx)
            .await?;
        begins.put(&mut back.spec);
    }
    if back != known.wanted {
        let (request_id, now) = (operation.origin.request_id.clone(), tools.clock.now_us());
        machine::change(tx, known.server, request_id, now, |wanted| *wanted = back).await?;
    }
    server::update(tx, &operation.subject, state.before.size.columns()).await?;
    Ok(())
}

/// What was brought into the store goes in the end, whichever step has failed; and the source has taken in what the
/// others have changed.
pub(super) struct Settle(pub(super) Tools);

#[async_trait]
impl Step for Settle {
    fn name(&self) -> &'static str {
        "settle"
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let (images, now) = (&self.0.images, self.0.clock.now_us());
        images.discard(&state.image, now).await.map_err(unstored)?;
        images.remove(&state.image, now).await.map_err(unstored)?;
        if state.begun {
            return Ok(Progress::Done);
        }
        dropped(&self.0, operation).await
    }
}

/// By what the CPU is chosen of the guest that the server becomes.
async fn cpu_mode(
    tools: &Tools,
    state: &State,
    known: &Machine,
    tx: &DatabaseTransaction,
) -> Result<CpuMode, StepError> {
    let machines = &tools.machines;
    Ok(match &state.size {
        Some(size) => cpu::mode(machines, &size.flavor()?),
        None => cpu::mode_of(machines, tx, &known.server.to_string()).await?,
    })
}

/// Chooses a host, and takes what the server needs of it.
pub(super) struct Place(pub(super) Tools);

impl Place {
    /// Where it is, if it only gets another size and there is room for that: for both sizes, and for the copy.
    async fn stays(
        &self,
        (state, known, next): (&State, &Machine, Amounts),
        tx: &DatabaseTransaction,
    ) -> Result<bool, StepError> {
        let need = cpu_mode(&self.0, state, known, tx).await?.need();
        let row = host::find(tx, state.source).await?;
        let takes = row.is_some_and(|row| {
            let cpu = self.0.machines.guest_cpu(&row);
            !row.disabled && !row.forced_down && against_cpu(&need, cpu.as_deref()).is_none()
        });
        if state.size.is_none() || !takes {
            return Ok(false);
        }
        let before = state.before.amounts();
        let both = Amounts {
            vcpus: Ord::max(before.vcpus, next.vcpus),
            memory_mib: Ord::max(before.memory_mib, next.memory_mib),
            disk_gib: before.disk_gib + next.disk_gib,
        };
        Ok(hold(tx, state.source, known.server, (before, both)).await?)
    }

    async fn elsewhere(
        &self,
        (state, known, next): (&State, &Machine, Amounts),
        tx: &DatabaseTransaction,
    ) -> Result<HostId, StepError> {
        if has_other_disks(&known.wanted.spec) {
            return Err(StepError::fail(
                "No valid host was found. The server's host has no room for it, and its other disks are in no image.",
            ));
        }
        let mode = cpu_mode(&self.0, state, known, tx).await?;
        let request = Request {
            server: known.server,
            amounts: next,
            host: state.host,
            excluded: Default::default(),
            source: Some(state.source),
            cpu: mode.need(),
        };
        match self.0.machines.place(tx, &request).await {
            Ok(target) => Ok(target),
            Err(NoHost::Database(error)) => Err(error.into()),
            Err(NoHost::Rejected(why)) => {
                Err(StepError::fail(format!("No valid host was found. {why}")))
            }
        }
    }
}

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
        let now = self.0.clock.now_us();
        let mut state: State = operation.state()?;
        let known = owned(operation, tx).await?;
        let known = known.filter(|known| {
            known.host == Some(state.source) && !known.is_tombstone() && known.confirmed
        });
        let known = known.ok_or_else(|| StepError::fail("the server is not where it was"))?;
        let next = match &state.size {
            Some(size) => change::amounts(&size.spec),
            None => change::amounts(&known.wanted.spec),
        };
        let target = match self.stays((&state, &known, next), tx).await? {
            true => state.source,
            false => self.elsewhere((&state, &known, next), tx).await?,
        };
        state.target = Some(target);
        operation.set_state(&state)?;
        if !state.stays() && state.before.copy.is_some() {
            let mut image = snapshot::new(state.image.clone(), snapshot::NOBODY.to_owned(), now);
            image.row.name = Some(format!("{}-resize", operation.subject));
            image.row.visibility = "private".to_owned();
            image.row.disk_format = Some("raw".to_owned());
            image.row.container_format = Some("bare".to_owned());
            let added = Images::add(tx, image, None).await;
            added.map_err(|error| StepError::fail(unwritten(error).to_string()))?;
        }
        let request_id = operation.origin.request_id.clone();
        machine::change(tx, known.server, request_id, now, |wanted| {
            wanted.power = Power::Stopped;
            // Also where it stays: an agent that knows nothing of ways back refuses it here, and nothing is done.
            wanted.parks = Some(state.migration);
            // Of one that does not run any more.
            if let Some(copy) = state.before.copy {
                wanted.have_copy(copy);
            }
        })
        .await?;
        let hostname = host::find(tx, target).await?.map(|row| row.hostname);
        let change = migration::ActiveModel {
            target_id: Set(Some(target.to_string())),
            target: Set(hostname),
            ..migrate::is_now(Status::PreMigrating, now)
        };
        Ok(migration::update(tx, state.migration, change).await?)
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        take_back(&self.0, operation, tx).await
    }
}

/// Waits until the guest has stopped, and its host has the copy.
pub(super) struct Copy(pub(super) Tools);

#[async_trait]
impl Step for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let has_it = match state.before.copy {
            Some(copy) => host_has(&self.0, operation, copy).await?,
            None => stopped(&self.0, operation).await?,
        };
        Ok(has_it.map_or(Progress::Wait(ASK_AGAIN), |()| Progress::Done))
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let at = (state::Move::Migrating, Status::Migrating);
        is_at(&self.0, operation, at, tx).await
    }
}

/// Whether the owner has let the guest stop; none: not yet.
async fn stopped(tools: &Tools, operation: &Operation) -> Result<Option<()>, StepError> {
    let server = machine_id(&operation.subject)?;
    match tools.machines.converge(server).await? {
        Converged::Settled(report) => match report.observed {
            Observed::Stopped { .. } => Ok(Some(())),
            Observed::Failed { reason } => Err(StepError::fail(reason)),
            other => Err(StepError::fail(format!("the guest is {other:?}"))),
        },
        Converged::Pending(_) => Ok(None),
        Converged::NoOwner => Err(StepError::fail("the server has no host")),
        Converged::Lost(lost) => Err(StepError::fail(format!(
            "host {} was removed from the cloud",
            lost.host
        ))),
    }
}

/// Brings the bytes in, where another host is to have them.
pub(super) struct Bring {
    tools: Tools,
    fetch: Fetch,
}

impl Bring {
    pub(super) fn new(tools: Tools, fetch: Fetch) -> Self {
        Self { tools, fetch }
    }

    fn is_needed(state: &State) -> bool {
        !state.stays() && state.before.copy.is_some()
    }
}

#[async_trait]
impl Step for Bring {
    fn name(&self) -> &'static str {
        "fetch"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        match Self::is_needed(&operation.state()?) {
            true => self.fetch.run(operation).await,
            false => Ok(Progress::Done),
        }
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        if Self::is_needed(&operation.state()?) {
            self.fetch.commit(operation, tx).await?;
        }
        let at = (state::Move::Migrated, Status::Migrating);
        is_at(&self.tools, operation, at, tx).await
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.fetch.undo(operation).await
    }
}

/// The commit point.
pub(super) struct Move(pub(super) Tools);

impl Move {
    /// What the target is told: to make the disk of what was brought, whatever it has had of the server before.
    async fn wanted(
        &self,
        (state, known): (&State, &Machine),
        operation: &Operation,
        tx: &DatabaseTransaction,
    ) -> Result<Wanted, StepError> {
        let mut wanted = known.wanted.clone();
        if let Some(size) = &state.size {
            wanted.spec = size.applied(&wanted.spec);
        }
        wanted.power = state.before.power();
        if let Some(target) = state.target {
            let mode = cpu_mode(&self.0, state, known, tx).await?;
            let begins = cpu::begins(&self.0.machines, tx, (mode, target), known.server).await?;
            begins.put(&mut wanted.spec);
        }
        let told = instance::of(tx, &operation.subject).await?;
        let before = wanted.spec.guest.instance.take();
        wanted.spec.guest.instance = instance::renewed(told, None, before);
        if state.stays() {
            wanted.parks = None;
            wanted.restores = state.before.copy;
            return Ok(wanted);
        }
        (wanted.arrives, wanted.departs, wanted.continues) = (None, None, None);
        forget_copy(&mut wanted);
        let said = self.0.machines.fleet().holders(known.server).into_iter();
        let done = said.map(|(_, report)| report.rebuilds).max().unwrap_or(0);
        wanted.rebuilds = wanted.rebuilds.max(done) + 1;
        if let Some(disk) = wanted.spec.root_disk.as_mut()
            && state.before.copy.is_some()
        {
            let image = store::find(tx, &state.image).await?;
            let image = image.filter(|image| image.status() == Some(ImageStatus::Active));
            let image = image.filter(|image| image::is_of(image, state.copy));
            let image = image.ok_or_else(|| StepError::fail("the disk's bytes are gone"))?;
            let image = image.to_ref();
            disk.image = Some(image.map_err(|error| StepError::fail(error.to_string()))?);
        }
        Ok(wanted)
    }
}

#[async_trait]
impl Step for Move {
    fn name(&self) -> &'static str {
        "move"
    }

    /// The source keeps the disk, and no copy of it beside that; and what the target has of the server from before goes, as
    /// it says itself.
    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let Some(target) = state.target.filter(|_| !state.stays()) else {
            return Ok(Progress::Done);
        };
        if is_deleted(&self.0, operation).await? {
            return Ok(Progress::Done);
        }
        let machines = &self.0.machines;
        let server = machine_id(&operation.subject)?;
        let known = machine::find(machines.reader(), server).await?;
        let Some(known) = known.filter(|known| known.host == Some(state.source)) else {
            return Ok(Progress::Done);
        };
        if let Some(reason) = machines.is_off(machines.reader(), target).await? {
            return Err(StepError::fail(reason));
        }
        // Nothing is decided yet: a host that cannot be had is none for the server.
        let late = waited_us(&self.0, operation) > LONGEST_WAIT_US;
        let said = machines.ask(target, server).await;
        let said = said.map_err(|error| error.given_up_if(late))?;
        if let Some(said) = said
            && !(said.settled && said.observed == Observed::Absent)
        {
            let dropped = machines.drop_at(target, &known, said.revision).await?;
            if dropped != Dropped::Gone && late {
                return Err(StepError::fail(format!(
                    "host {target} does not let go of what it has had of the server"
                )));
            }
            if dropped != Dropped::Gone {
                return Ok(Progress::Wait(ASK_AGAIN));
            }
        }
        dropped(&self.0, operation).await
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let (state, now): (State, i64) = (operation.state()?, self.0.clock.now_us());
        let row = server::find(tx, &operation.subject).await?;
        if !row.is_some_and(|row| matches!(row.state(), ServerState::Resizing(..))) {
            return Err(StepError::fail("the server's state was changed meanwhile"));
        }
        let known = owned(operation, tx).await?;
        let known = known.filter(|known| known.host == Some(state.source) && known.confirmed);
        let known = known.filter(|known| known.wanted.power == Power::Stopped);
        let (Some(known), Some(target)) = (known, state.target) else {
            return Err(StepError::fail(
                "something else has been asked of the server meanwhile",
            ));
        };
        if !state.stays() && has_other_disks(&known.wanted.spec) {
            return Err(StepError::fail("the server has got other disks meanwhile"));
        }
        if let Some(size) = &state.size {
            server::update(tx, &operation.subject, size.columns()).await?;
        }
        let next = self.wanted((&state, &known), operation, tx).await?;
        if state.stays() {
            let request_id = operation.origin.request_id.clone();
            machine::change(tx, known.server, request_id, now, |wanted| *wanted = next).await?;
        } else if !machine::move_owner(tx, &known, target, &next, now).await? {
            return Err(StepError::fail("the server is not where it was"));
        }
        let at = (state::Move::Finish, Status::PostMigrating);
        is_at(&self.0, operation, at, tx).await
    }

    /// What the target has goes first.
    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        if state.begun || state.stays() || is_deleted(&self.0, operation).await? {
            return Ok(Progress::Done);
        }
        // Of an owner that is the source still, nothing is to be gone.
        let gone = let_go_of(&self.0, operation, None).await?;
        // A target that was declared to be off, and is not, would run it still.
        if matches!(gone, Progress::Done)
            && let Some(target) = state.target
        {
            let server = machine_id(&operation.subject)?;
            self.0.fence_off(target, server).await?;
        }
        Ok(gone)
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let (state, now): (State, i64) = (operation.state()?, self.0.clock.now_us());
        let Some(known) = owned(operation, tx).await? else {
            return Ok(());
        };
        if state.begun || state.stays() || known.host != state.target {
            return Ok(());
        }
        is_known(&known)?;
        let mut wanted = known.wanted.clone();
        as_before(&state, &mut wanted, (operation, tx)).await?;
        // It has stood still there.
        let begins = state
            .before
            .begins(&self.0, (state.source, known.server), tx)
            .await?;
        begins.put(&mut wanted.spec);
        // Of the disk that stands there: what its host has done is not to be done again.
        wanted.rebuilds = state.before.rebuilds;
        if !machine::move_owner(tx, &known, state.source, &wanted, now).await? {
            return Err(StepError::retry("the server's owner has changed meanwhile"));
        }
        server::update(tx, &operation.subject, state.before.size.columns()).await?;
        Ok(())
    }
}

/// The target has made the disk of what was brought, if it had to.
pub(super) fn is_made(known: &Machine, report: &MachineReport) -> bool {
    report.generation == known.generation && report.rebuilds >= known.wanted.rebuilds
}

/// The target is told, and reports that the guest runs, or that its disk is there.
pub(super) struct Start(pub(super) Tools);

fn unmade() -> StepError {
    StepError::retry("the host has not made the server's disk yet")
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
        if let Some(owner) = known.and_then(|known| known.host)
            && let Some(reason) = machines.is_off(machines.reader(), owner).await?
        {
            return Err(StepError::fail(reason));
        }
        match machines.converge(server).await? {
            Converged::Settled(report) => {
                let known = machine::find(machines.reader(), server).await?;
                let is_made = known.is_some_and(|known| is_made(&known, &report));
                match report.observed {
                    Observed::Failed { reason } => Err(StepError::fail(reason)),
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
        let known = machine::find(tx, machine_id(&operation.subject)?).await?;
        let said = known.and_then(|known| Some((known.report.clone()?, known)));
        let is_made = said.is_some_and(|(report, known)| is_made(&known, &report));
        if state.observed.is_none() || !is_made {
            return Err(unmade());
        }
        state.begun = true;
        operation.set_state(&state)
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut state: State = operation.state()?;
        let Some(known) = owned(operation, tx).await? else {
            return Ok(());
        };
        if state.begun || state.stays() || known.host != state.target {
            return Ok(());
        }
        is_known(&known)?;
        if change::is_told_otherwise(operation, tx).await? && known.wanted.power != Power::Absent {
            state.followed = Some(known.wanted.power);
            operation.set_state(&state)?;
        }
        let (request_id, now) = (operation.origin.request_id.clone(), self.0.clock.now_us());
        Ok(want_gone(tx, known.server, request_id, now).await?)
    }
}

/// What was brought is on its host now.
pub(super) struct Clean(pub(super) Tools);

#[async_trait]
impl Step for Clean {
    fn name(&self) -> &'static str {
        "clean"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let state: State = operation.state()?;
        let removed = self.0.images.remove(&state.image, self.0.clock.now_us());
        removed.await.map_err(unstored)?;
        Ok(Progress::Done)
    }
}
