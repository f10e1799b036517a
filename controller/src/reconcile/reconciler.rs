//! Looks after every machine that no operation is looking after.
//!
//! Woken by what agents say, and by a sweep for what they did not say. Each turn compares one server's
//! row with the reports of it and does at most one thing; every turn may be repeated, doubled, or cut
//! off at any point.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::VERSION;
use fractus_agent_api::guest::GuestReport;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{
    MachineReport, Observed, Power, PutMachine, Revision, ServerId, StopReason,
};
use sea_orm::prelude::Uuid;
use sea_orm::{DatabaseTransaction, DbErr};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::converge::{Converged, Machines, alive, runs, vanished};
use super::machine::{self, Machine};
use super::turns::Turns;
use super::{migration, transit};
use crate::agents::fleet::Fleet;
use crate::agents::host;
use crate::clock::Clock;
use crate::database::{self, Database};
use crate::event::{self, Event, Origin, Phase};
use crate::leader::Lead;
use crate::operation::{self, Engine, StepError};
use crate::random::Random;

/// Pause between two sweeps over all machines.
const SWEEP: Duration = Duration::from_secs(10);

/// What the compute service is told, in the transaction that makes it true.
#[async_trait]
pub trait Observer: Send + Sync + 'static {
    /// The machine ended by itself; that it is to be stopped has been written in this transaction.
    async fn stopped(
        &self,
        tx: &DatabaseTransaction,
        server: ServerId,
        reason: &StopReason,
    ) -> Result<(), DbErr>;

    /// The machine is alive, as is wanted of it (that it is to be paused, if its own watchdog paused it,
    /// has been written in this transaction).
    async fn lives(
        &self,
        tx: &DatabaseTransaction,
        server: ServerId,
        life: Life,
    ) -> Result<(), DbErr>;

    /// The guest's memory is kept, as is wanted of it, and was not when its owner was last heard.
    async fn suspended(&self, tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr>;

    /// The machine's disk was made of its copy, as was wanted of it, or was not to be yet.
    async fn restored(&self, tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr>;

    /// The machine could not be made, or kept, what is wanted; what there is of it is left alone.
    async fn failed(
        &self,
        tx: &DatabaseTransaction,
        server: ServerId,
        reason: &str,
    ) -> Result<(), DbErr>;
}

/// What there is to say of a machine that is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub paused: bool,
    /// It was not alive, or was another process, when its owner was last heard: it was begun since.
    pub begun: bool,
    /// What the guest's devices said.
    pub guest: GuestReport,
}

impl Life {
    fn of(report: &MachineReport, last: Option<&MachineReport>) -> Self {
        let same = |last: &MachineReport| alive(&last.observed) && last.starts == report.starts;
        Self {
            paused: report.observed == Observed::Paused,
            begun: !last.is_some_and(same),
            guest: report.guest,
        }
    }
}

/// The reconciler of one controller.
pub struct Reconciler {
    lead: Lead,
    machines: Machines,
    fleet: Arc<Fleet>,
    engine: Arc<Engine>,
    observer: Arc<dyn Observer>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    woken: mpsc::UnboundedSender<ServerId>,
}

/// What to do about one server.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    Nothing,
    /// A host holds it and no row speaks of it, or an older one: it is kept, and an operator is told.
    Unclaimed(HostId),
    /// A host that does not own it (any more) holds it: it is told so.
    Drop(HostId, MachineReport),
    /// The owner does not know what is wanted, or does not work on it.
    Tell(HostId),
    /// The owner's host has rebooted: it waits to hear that the machine is still its own.
    Word(HostId),
    /// The owner holds it, of an epoch before the database was restored.
    Confirm,
    /// The owner has settled, and the row does not say so yet.
    Settle(MachineReport),
    /// The owner had it, and has no record of it any more, or removed it since the backup.
    Vanished(HostId),
}

impl Reconciler {
    /// With the receiving end of its wake-ups, for [`Self::run`].
    pub fn new(
        lead: impl Into<Lead>,
        machines: Machines,
        engine: Arc<Engine>,
        observer: Arc<dyn Observer>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<ServerId>) {
        let (woken, wakes) = mpsc::unbounded_channel();
        let fleet = Arc::clone(machines.fleet());
        let reconciler = Self {
            lead: lead.into(),
            machines,
            fleet,
            engine,
            observer,
            clock,
            random,
            woken,
        };
        (Arc::new(reconciler), wakes)
    }

    /// Something was said of these servers: their operations go on, or the reconciler looks.
    pub fn heard(&self, servers: impl IntoIterator<Item = ServerId>) {
        for server in servers {
            self.engine.wake(&server.to_string());
            // Fails only when the controller is being stopped.
            let _ = self.woken.send(server);
        }
    }

    /// Until `stop`: looks at whoever is woken, and at all of them now and then.
    /// Looks under way are let finish.
    pub async fn run(
        self: Arc<Self>,
        mut wakes: mpsc::UnboundedReceiver<ServerId>,
        stop: CancellationToken,
    ) {
        let mut sweep = self.clock.sleep(SWEEP);
        let mut turns = Turns::default();
        loop {
            turns.begin(|server| {
                let reconciler = Arc::clone(&self);
                async move { reconciler.look_logged(server).await }
            });
            tokio::select! {
                () = stop.cancelled() => return turns.finish().await,
                Some(server) = wakes.recv() => {
                    turns.add(server);
                    // All that was said meanwhile: it waits here, where each server counts once.
                    while let Ok(server) = wakes.try_recv() {
                        turns.add(server);
                    }
                }
                () = turns.ended() => {}
                () = &mut sweep => {
                    for server in self.all().await {
                        turns.add(server);
                    }
                    sweep = self.clock.sleep(SWEEP);
                }
            }
        }
    }

    /// Looks at every machine of every host, one after the other.
    #[cfg(test)]
    pub async fn sweep(&self) {
        for server in self.all().await {
            self.look_logged(server).await;
        }
    }

    /// Every machine of every host: by the table, and by what the host said.
    async fn all(&self) -> Vec<ServerId> {
        let mut all = Vec::new();
        for host in self.fleet.ids() {
            let owned = match machine::ids_of_host(self.lead.reader(), host).await {
                Ok(owned) => owned,
                Err(error) => {
                    tracing::error!(%error, %host, "reading the machines of a host");
                    continue;
                }
            };
            let reported = self.fleet.machines(host).unwrap_or_default();
            let servers: BTreeSet<ServerId> = owned
                .into_iter()
                .chain(reported.iter().map(|report| report.id))
                .collect();
            all.extend(servers);
        }
        all
    }

    async fn look_logged(&self, server: ServerId) {
        match self.look(server).await {
            Ok(()) => {}
            Err(StepError::Database(error)) if database::is_fenced_off(&error) => {
                tracing::info!(%server, "another controller leads, and looks after it");
            }
            Err(error) => tracing::warn!(%server, %error, "reconciling; will be tried again"),
        }
    }

    /// One turn for one server. Another controller's, while another one leads.
    pub async fn look(&self, server: ServerId) -> Result<(), StepError> {
        // The whole look is of one term: what it writes is refused once another one has begun.
        let Some(database) = self.lead.database() else {
            return Ok(());
        };
        let reader = database.reader();
        let row = machine::find(reader, server).await?;
        let holders = self.fleet.holders(server);
        let owner = row.as_ref().and_then(|machine| machine.host);
        let migrations = match holders.iter().any(|(holder, _)| Some(*holder) != owner) {
            true => migration::open(reader, server).await?,
            false => Vec::new(),
        };
        for (holder, report) in &holders {
            match foreign(row.as_ref(), *holder, report, &migrations) {
                Verdict::Drop(host, report) => {
                    if let Some(machine) = &row {
                        self.drop_foreign(host, machine, &report).await?;
                    }
                }
                Verdict::Unclaimed(host) => unclaimed(host, server, report),
                _ => {}
            }
        }
        let Some(machine) = row else { return Ok(()) };
        let verdict = self.verdict(&machine);
        let open = operation::unfinished(reader, Some(&server.to_string())).await?;
        if open.iter().any(|operation| operation.parked.is_none()) {
            // Who holds it is for nobody else to find out: the operation itself waits for it.
            return match verdict {
                Verdict::Confirm if self.is_newest(&machine).await? => {
                    self.confirm(&database, &machine).await
                }
                // An operation that waits for something else does not tell it.
                Verdict::Word(owner) => self.say(owner, &machine).await.map(|_| ()),
                _ => Ok(()),
            };
        }
        match verdict {
            Verdict::Word(owner) => match self.say(owner, &machine).await? {
                Some(report) => self.settled(&database, &machine, report).await,
                None => Ok(()),
            },
            Verdict::Tell(owner) => {
                self.machines.may_tell(&machine).await?;
                if let Converged::Settled(report) = self.machines.tell(owner, &machine).await? {
                    self.settled(&database, &machine, report).await?;
                }
                Ok(())
            }
            Verdict::Settle(report) => self.settled(&database, &machine, report).await,
            Verdict::Confirm if self.is_newest(&machine).await? => {
                self.confirm(&database, &machine).await
            }
            Verdict::Vanished(host) => self.vanished(&database, &machine, host).await,
            Verdict::Nothing | Verdict::Confirm | Verdict::Unclaimed(_) | Verdict::Drop(..) => {
                Ok(())
            }
        }
    }

    /// Tells the owner, whose host has rebooted, that the machine is wanted there; what it says where it has settled at
    /// once. One that was declared to be off hears so once an operator has said that it is up again.
    async fn say(
        &self,
        owner: HostId,
        machine: &Machine,
    ) -> Result<Option<MachineReport>, StepError> {
        let is_off = self.machines.is_off(self.lead.reader(), owner).await?;
        if is_off.is_some() {
            return Ok(None);
        }
        self.machines.may_tell(machine).await?;
        Ok(match self.machines.tell(owner, machine).await? {
            Converged::Settled(report) => Some(report),
            _ => None,
        })
    }

    /// After a restore of the database: nobody has the machine by a newer row than its owner. One that was evacuated
    /// since the backup is another's, and its host may only have been switched on again: unless a guest runs there, every
    /// host has to have said first what it has.
    async fn is_newest(&self, machine: &Machine) -> Result<bool, StepError> {
        let rows = host::all(self.lead.reader()).await?;
        let mut awaited = rows.iter().filter(|row| !row.forced_down);
        let all_heard = awaited.all(|row| self.fleet.machines(row.host_id()).is_some());
        // Looked at after that: what the last of them has said is among it.
        let holders = self.fleet.holders(machine.server);
        let owned = holders.iter().find(|(host, _)| Some(*host) == machine.host);
        let Some((_, owned)) = owned else {
            return Ok(false);
        };
        // One that has let go of it again, too: it was deleted there, or shelved, or is another's by now.
        let newer = |said: &MachineReport| said.generation > owned.generation;
        let is_newest = !holders.iter().any(|(_, said)| newer(said));
        Ok(is_newest && (all_heard || runs(owned)))
    }

    fn verdict(&self, machine: &Machine) -> Verdict {
        let Some(owner) = machine.host else {
            return Verdict::Nothing;
        };
        if self.machines.has_vanished(owner, machine) {
            return Verdict::Vanished(owner);
        }
        let Some(report) = self.fleet.machine(owner, machine.server) else {
            // Nothing is known before the agent's full report.
            if self.fleet.machines(owner).is_none() {
                return Verdict::Nothing;
            }
            return Verdict::Tell(owner);
        };
        let age = (report.generation, report.revision);
        if !machine.confirmed && age <= machine.age() {
            // Whoever has offered a guest, waits for one, or keeps it for a way back, does not say that it is his; nor
            // does who was told of it before another.
            let between = report.observed == Observed::Arriving
                || transit::is_offered(&report)
                || report.parks.is_some()
                || self.is_newer_elsewhere(machine, &report);
            return match between {
                true => Verdict::Nothing,
                false => Verdict::Confirm,
            };
        }
        match age.cmp(&machine.age()) {
            std::cmp::Ordering::Less => Verdict::Tell(owner),
            std::cmp::Ordering::Greater => Verdict::Unclaimed(owner),
            std::cmp::Ordering::Equal if report.waits => Verdict::Word(owner),
            std::cmp::Ordering::Equal if !report.settled => Verdict::Nothing,
            std::cmp::Ordering::Equal
                if machine.settled && machine.report.as_ref() == Some(&report) =>
            {
                Verdict::Nothing
            }
            std::cmp::Ordering::Equal => Verdict::Settle(report),
        }
    }

    /// Another host was told something of it in a later generation than this one was.
    fn is_newer_elsewhere(&self, machine: &Machine, report: &MachineReport) -> bool {
        let mut others = self.fleet.holders(machine.server).into_iter();
        others
            .any(|(host, other)| Some(host) != machine.host && other.generation > report.generation)
    }

    /// The owner's word is recorded, with what follows from it.
    async fn settled(
        &self,
        database: &Database,
        machine: &Machine,
        report: MachineReport,
    ) -> Result<(), StepError> {
        let now = self.clock.now_us();
        let (age, observer) = (machine.age(), Arc::clone(&self.observer));
        let power = machine.wanted.power;
        let (restores, rebuilds) = (machine.wanted.restores.is_some(), machine.wanted.rebuilds);
        let event = self.event(machine, now);
        let said = said(machine, &report);
        let last = machine.report.as_ref();
        let life = Life::of(&report, last);
        let was_suspended = last.is_some_and(|last| last.observed == Observed::Suspended);
        database
            .write(move |tx| {
                let (report, observer) = (report.clone(), Arc::clone(&observer));
                let event = event.clone();
                Box::pin(async move {
                    let server = report.id;
                    let present = machine::find(tx, server).await?;
                    if present.is_none_or(|present| present.age() != age) {
                        // The intent has changed since: the report is of no interest any more.
                        return Ok(());
                    }
                    machine::settle(tx, &report, now).await?;
                    let failed = matches!(report.observed, Observed::Failed { .. });
                    if restores && report.rebuilds >= rebuilds && !failed {
                        observer.restored(tx, server).await?;
                    }
                    match &report.observed {
                        Observed::Absent if power == Power::Absent => {
                            machine::disown(tx, server, now).await?;
                        }
                        Observed::Failed { reason } => {
                            observer.failed(tx, server, reason).await?;
                        }
                        Observed::Stopped { reason }
                            if matches!(
                                power,
                                Power::Running | Power::Paused | Power::Suspended
                            ) =>
                        {
                            machine::change(tx, server, None, now, |wanted| {
                                wanted.power = Power::Stopped;
                            })
                            .await?;
                            observer.stopped(tx, server, reason).await?;
                            let message = Some(format!("{reason:?}"));
                            event::record(
                                tx,
                                Event {
                                    message,
                                    ..event.clone()
                                },
                            )
                            .await?;
                        }
                        Observed::Running if power == Power::Running => {
                            observer.lives(tx, server, life).await?;
                        }
                        Observed::Paused if power == Power::Running => {
                            machine::change(tx, server, None, now, |wanted| {
                                wanted.power = Power::Paused;
                            })
                            .await?;
                            observer.lives(tx, server, life).await?;
                        }
                        Observed::Paused if power == Power::Paused => {
                            observer.lives(tx, server, life).await?;
                        }
                        Observed::Suspended if power == Power::Suspended && !was_suspended => {
                            observer.suspended(tx, server).await?;
                        }
                        _ => {}
                    }
                    if let Some(action) = said {
                        let action = action.to_owned();
                        event::record(tx, Event { action, ..event }).await?;
                    }
                    Ok::<_, DbErr>(())
                })
            })
            .await?;
        // The agent is told of the new intent in a turn of its own.
        let _ = self.woken.send(machine.server);
        Ok(())
    }

    fn event(&self, machine: &Machine, now: i64) -> Event {
        Event {
            id: self.random.uuid(),
            at_us: now,
            subject: machine.server.to_string(),
            action: "machine_stopped".to_owned(),
            phase: Phase::Observed,
            message: None,
            operation_id: None,
            origin: Origin::default(),
            host_id: machine.host.map(|host| host.to_string()),
        }
    }

    async fn confirm(&self, database: &Database, machine: &Machine) -> Result<(), StepError> {
        let known = machine.clone();
        let confirm = database.write(move |tx| {
            let known = known.clone();
            Box::pin(async move { machine::confirm(tx, &known).await })
        });
        confirm.await?;
        self.heard([machine.server]);
        Ok(())
    }

    /// Making it anew would be another, empty machine under the same name: an operator must look.
    async fn vanished(
        &self,
        database: &Database,
        machine: &Machine,
        owner: HostId,
    ) -> Result<(), StepError> {
        // Not told again and again; but of a restored row nothing is settled, and nothing was told.
        if !machine.settled && machine.confirmed {
            return Ok(());
        }
        let reason = vanished(owner);
        tracing::error!(server = %machine.server, %owner, "{reason}");
        let (server, observer) = (machine.server, Arc::clone(&self.observer));
        let age = machine.age();
        database
            .write(move |tx| {
                let (observer, reason) = (Arc::clone(&observer), reason.clone());
                Box::pin(async move {
                    let present = machine::find(tx, server).await?;
                    if present.is_some_and(|present| present.age() == age) {
                        machine::unsettle(tx, server).await?;
                        observer.failed(tx, server, &reason).await?;
                    }
                    Ok::<_, DbErr>(())
                })
            })
            .await?;
        Ok(())
    }

    /// A host that is not the owner is told that the machine is not its own any more. By the row: its
    /// generation is above what the host has, or it is a tombstone above it.
    async fn drop_foreign(
        &self,
        holder: HostId,
        machine: &Machine,
        report: &MachineReport,
    ) -> Result<(), StepError> {
        let mut wanted = machine.wanted.clone();
        wanted.end();
        let put = PutMachine {
            version: VERSION,
            generation: machine.generation,
            revision: Revision(machine.revision.0.max(report.revision.0 + 1)),
            wanted,
            request_id: machine.request_id.clone(),
            boot_id: Some(Uuid::nil()),
        };
        tracing::warn!(server = %machine.server, host = %holder, "drops what it does not own any more");
        let agent = self.machines.agents().agent(holder);
        let agent = agent.map_err(|error| StepError::retry(error.to_string()))?;
        let answer = agent.put(machine.server, &put).await;
        let answer = answer.map_err(|error| StepError::retry(error.to_string()))?;
        self.fleet.answered(holder, &answer, self.clock.now_us());
        Ok(())
    }
}

/// What the guest's devices have said that the row does not know of: a word for the event.
fn said(machine: &Machine, report: &MachineReport) -> Option<&'static str> {
    let before = machine
        .report
        .as_ref()
        .filter(|old| old.starts == report.starts);
    let before = before.map(|old| old.guest).unwrap_or_default();
    if report.guest.watchdog_fired > before.watchdog_fired {
        Some(event::WATCHDOG_FIRED)
    } else if report.guest.panicked && !before.panicked {
        Some("guest_panicked")
    } else {
        None
    }
}

/// What is to be said of a machine on a host that does not own it.
fn foreign(
    row: Option<&Machine>,
    holder: HostId,
    report: &MachineReport,
    migrations: &[migration::Model],
) -> Verdict {
    if report.observed == Observed::Absent && report.settled {
        return Verdict::Nothing;
    }
    let Some(machine) = row else {
        return Verdict::Unclaimed(holder);
    };
    if machine.host == Some(holder) {
        let newer = (report.generation, report.revision) > machine.age();
        return if newer {
            Verdict::Unclaimed(holder)
        } else {
            Verdict::Nothing
        };
    }
    // Its operation says what is kept and what is dropped.
    if migration::keeps(migrations, holder) {
        return Verdict::Nothing;
    }
    if report.generation == machine.generation && machine.confirmed && machine.host.is_some() {
        return told_to_arrive(machine, holder, report);
    }
    let older = report.generation < machine.generation;
    let buried = machine.is_tombstone()
        && machine.host.is_none()
        && (report.generation, report.revision) <= machine.age();
    // The guest that stands still there is the only one until the owner has said that it has it; or an image has been
    // made of what the owner had, and nobody owns it.
    let is_kept = machine.host.is_none() && machine.confirmed;
    let has_it = machine.has_its_own();
    if transit::is_offered(report) && !has_it && !is_kept && !buried {
        return Verdict::Nothing;
    }
    // What does not run, on a host that was declared to be off, stays until the owner has said that it has its own.
    let is_spare = !runs(report) && !has_it && machine.host.is_some() && !machine.is_tombstone();
    if is_spare && machine.confirmed && older {
        return Verdict::Nothing;
    }
    // After a restore, who holds it is not known before the owner has said that it does.
    if (older && machine.confirmed) || buried {
        Verdict::Drop(holder, report.clone())
    } else {
        Verdict::Unclaimed(holder)
    }
}

/// Of a host that was told something in the owner's own generation: that a guest was to come, which nothing
/// speaks of any more; or, in a later revision, that there is to be nothing.
fn told_to_arrive(machine: &Machine, holder: HostId, report: &MachineReport) -> Verdict {
    let arriving = match report.revision.cmp(&machine.revision) {
        std::cmp::Ordering::Less => true,
        std::cmp::Ordering::Equal | std::cmp::Ordering::Greater => transit::is_arriving(report),
    };
    if arriving {
        Verdict::Drop(holder, report.clone())
    } else {
        Verdict::Nothing
    }
}

fn unclaimed(host: HostId, server: ServerId, report: &MachineReport) {
    metrics::counter!("fractus_machines_unclaimed_total").increment(1);
    tracing::warn!(
        %host, %server, generation = report.generation.0, revision = report.revision.0,
        alive = alive(&report.observed),
        waits = report.waits,
        "a machine that this database does not know of, or only an older one; it is left alone, and after a reboot of its \
         host it is started by an operator only (fractus-agent start-unheard)"
    );
}
