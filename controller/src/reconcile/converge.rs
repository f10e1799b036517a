//! What operations do with machines: place, own, and bring to what is wanted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fractus_agent_api::cpu::Cpu;
use fractus_agent_api::host::{HostId, HostReport};
use fractus_agent_api::machine::{MachineReport, Observed, Power, PutMachine, Refusal, ServerId};
use fractus_agent_api::migration::MOST_LANES;
use sea_orm::prelude::Uuid;
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr};

use super::machine::{self, Machine};
use crate::agents::fleet::{Fleet, Presence};
use crate::agents::{AgentError, Agents, host};
use crate::clock::Clock;
use crate::compute::model::cpu::CpuMode;
use crate::database::Database;
use crate::operation::{Progress, StepError};
use crate::scheduler::{self, HostPresence, HostView, Rejections, Request};
use crate::secret::MasterKey;

/// How long a step that waits for a report sleeps before it asks the agent again by itself. Reports
/// wake it at once; this is for those that were lost.
pub const ASK_AGAIN: Duration = Duration::from_secs(5);
/// The same while a guest may stand still for it.
pub(super) const SOON: Duration = Duration::from_secs(1);

/// Guests that leave one host, or come to it, at once, where nobody says otherwise.
pub const MIGRATIONS_PER_HOST: u16 = 2;

/// What a sealed password is for.
const PASSWORD: &str = "admin_pass";

/// Places servers and brings machines to what is wanted. Cheap to clone.
#[derive(Clone)]
pub struct Machines {
    database: Database,
    agents: Arc<dyn Agents>,
    fleet: Arc<Fleet>,
    clock: Arc<dyn Clock>,
    /// When this controller began to listen.
    since_us: i64,
    /// Seals passwords at rest; without it none are kept.
    master: Option<MasterKey>,
    cpu_mode: CpuMode,
    post_copy: bool,
    auto_converge: bool,
    migration_connections: u8,
    migrations_per_host: u16,
}

/// Why no host was found.
#[derive(Debug, thiserror::Error)]
pub enum NoHost {
    #[error("no host can take the server: {0}")]
    Rejected(#[from] Rejections),
    #[error("the database")]
    Database(#[from] DbErr),
}

/// What [`Machines::converge`] came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Converged {
    /// The owner has settled upon the present intent; what is there may be something else than what is
    /// wanted ([`Observed::Failed`], or a guest that ended by itself).
    Settled(MachineReport),
    /// The agent knows the intent and works on it; its report wakes the server's operation.
    Pending(Option<MachineReport>),
    /// It has no owner, so there is nothing anywhere: never placed, or known to be gone.
    NoOwner,
    /// The owner was removed from the cloud.
    Lost(Lost),
}

/// A machine whose host is no member any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    pub host: HostId,
}

/// A machine's row and its owner's host, read in the order that counts.
#[derive(Debug, Clone)]
pub struct Whose {
    owner: HostId,
    /// The boot of the host that it spoke of last, before the rest was read.
    heard: Option<Uuid>,
    /// None: it was removed from the cloud.
    host: Option<host::row::Model>,
    pub machine: Option<Machine>,
}

impl Whose {
    /// The boot of the owner's host in which the machine is wanted there, for the agent to start it after a reboot; nil:
    /// it is not to be started by this.
    fn word(&self, machine: &Machine) -> Uuid {
        let host = self.host.as_ref().filter(|row| !row.forced_down);
        let Some(row) = host else {
            return Uuid::nil();
        };
        let is_theirs = self.machine.as_ref().is_some_and(|present| {
            present.host == Some(self.owner) && present.age() == machine.age() && present.confirmed
        });
        let boot = self.heard;
        let boot = boot.or_else(|| row.inventory().map(|said| said.boot_id));
        boot.filter(|_| is_theirs).unwrap_or_default()
    }

    /// Why the host is known to run nothing of this cloud: an operator's word.
    pub fn is_off(&self) -> Option<String> {
        off(self.owner, self.host.as_ref())
    }
}

/// Why a host is known to run nothing of this cloud, by its row.
pub(super) fn off(id: HostId, row: Option<&host::row::Model>) -> Option<String> {
    match row {
        None => Some(format!("host {id} was removed from the cloud")),
        Some(row) if row.forced_down => {
            Some(format!("host {} was declared to be down", row.hostname))
        }
        Some(_) => None,
    }
}

impl Converged {
    /// What a step says while it waits; `None` when it is over.
    pub fn pending(&self) -> Option<Progress> {
        matches!(self, Self::Pending(_)).then_some(Progress::Wait(ASK_AGAIN))
    }
}

impl Machines {
    pub fn new(
        database: Database,
        agents: Arc<dyn Agents>,
        fleet: Arc<Fleet>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let since_us = clock.now_us();
        Self {
            database,
            agents,
            fleet,
            clock,
            since_us,
            master: None,
            cpu_mode: CpuMode::default(),
            post_copy: false,
            auto_converge: true,
            migration_connections: 1,
            migrations_per_host: MIGRATIONS_PER_HOST,
        }
    }

    /// By what the CPUs of guests are chosen whose flavors say nothing of it.
    #[must_use]
    pub fn with_cpu_mode(self, cpu_mode: CpuMode) -> Self {
        Self { cpu_mode, ..self }
    }

    pub fn cpu_mode(&self) -> CpuMode {
        self.cpu_mode
    }

    /// Memory may follow guests whose flavors say nothing of it.
    #[must_use]
    pub fn with_post_copy(self, post_copy: bool) -> Self {
        Self { post_copy, ..self }
    }

    pub fn post_copy(&self) -> bool {
        self.post_copy
    }

    /// Guests whose flavors say nothing of it may be slowed down while they are sent.
    #[must_use]
    pub fn with_auto_converge(self, auto_converge: bool) -> Self {
        Self {
            auto_converge,
            ..self
        }
    }

    pub fn auto_converge(&self) -> bool {
        self.auto_converge
    }

    /// By so many connections the memory of a guest goes to another host.
    #[must_use]
    pub fn with_migration_connections(self, migration_connections: u8) -> Self {
        Self {
            migration_connections,
            ..self
        }
    }

    /// Connections for memory alone: one is the stream's own, and needs no other.
    pub fn lanes(&self) -> u8 {
        match self.migration_connections {
            1 => 0,
            several => several.min(MOST_LANES),
        }
    }

    /// So many guests at most leave one host, or come to it, at once.
    #[must_use]
    pub fn with_migrations_per_host(self, migrations_per_host: u16) -> Self {
        Self {
            migrations_per_host,
            ..self
        }
    }

    /// One at least.
    pub fn migrations_per_host(&self) -> usize {
        usize::from(self.migrations_per_host.max(1))
    }

    /// With the key that seals what is secret in a machine's intent.
    #[must_use]
    pub fn with_key(self, master: MasterKey) -> Self {
        let master = Some(master);
        Self { master, ..self }
    }

    /// A password as the database keeps it; only [`Self::tell`] opens it, for the machine's owner.
    /// None where there is no key.
    pub fn seal_password(&self, password: &str) -> Option<String> {
        let sealed = self.master.as_ref()?.wrap(PASSWORD, password.as_bytes());
        sealed.ok().map(|sealed| STANDARD.encode(sealed))
    }

    pub(super) fn master(&self) -> Option<&MasterKey> {
        self.master.as_ref()
    }

    /// What steps read by.
    pub fn reader(&self) -> &DatabaseConnection {
        self.database.reader()
    }

    pub(super) fn now_us(&self) -> i64 {
        self.clock.now_us()
    }

    /// What the owner is told, with its secrets opened. A password that this key does not open (another
    /// cloud's database) is left out: the guest starts without it.
    ///
    /// # Errors
    /// [`StepError::Fail`] when the key of a stream does not open: without it, the intent would be another.
    pub(super) fn open(&self, machine: &Machine) -> Result<PutMachine, StepError> {
        let mut put = machine.put();
        if let Some(departure) = &mut put.wanted.departs {
            departure.key = self.open_stream_key(departure.id, &departure.key)?;
        }
        if let Some(instance) = &mut put.wanted.spec.guest.instance
            && let Some(sealed) = instance.admin_pass.take()
        {
            instance.admin_pass = self.open_password(&sealed);
            if instance.admin_pass.is_none() {
                tracing::warn!(server = %machine.server, "its password does not open with master.key");
            }
        }
        Ok(put)
    }

    fn open_password(&self, sealed: &str) -> Option<String> {
        let sealed = STANDARD.decode(sealed).ok()?;
        let master = self.master.as_ref()?;
        let plain = master.unwrap_secret(PASSWORD, &sealed).ok()?;
        String::from_utf8(plain.to_vec()).ok()
    }

    pub fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    pub fn agents(&self) -> &Arc<dyn Agents> {
        &self.agents
    }

    /// The hosts as the scheduler sees them.
    pub async fn hosts(
        &self,
        connection: &impl sea_orm::ConnectionTrait,
    ) -> Result<Vec<HostView>, DbErr> {
        let rows = host::all(connection).await?;
        Ok(rows.iter().map(|row| self.view(row)).collect())
    }

    /// Whether the host of this row is there, as far as this controller can tell.
    pub fn presence(&self, row: &host::row::Model) -> HostPresence {
        if row.forced_down {
            return HostPresence::ForcedDown;
        }
        let now = self.clock.now_us();
        match self
            .fleet
            .presence(row.host_id(), row.heard_at_us, self.since_us, now)
        {
            Presence::Up => HostPresence::Up,
            Presence::Silent => HostPresence::Silent,
            Presence::NotYetHeard => HostPresence::NotYetHeard,
        }
    }

    /// What the host of this row says of itself; none: nothing.
    pub fn report(&self, row: &host::row::Model) -> Option<HostReport> {
        let live = self.fleet.host_report(row.host_id());
        live.or_else(|| row.inventory())
    }

    /// What CPU guests have on the host of this row; none: it does not say.
    pub fn guest_cpu(&self, row: &host::row::Model) -> Option<Box<Cpu>> {
        self.report(row)?.cpu.guest
    }

    fn view(&self, row: &host::row::Model) -> HostView {
        let mut live = self.report(row);
        HostView {
            id: row.host_id(),
            hostname: row.hostname.clone(),
            presence: self.presence(row),
            disabled: row.disabled,
            limits: row.limits(),
            used: row.used(),
            cpu: live.as_mut().and_then(|report| report.cpu.guest.take()),
            lacks: live.map(|report| report.unable).unwrap_or_default(),
        }
    }

    /// Chooses a host and takes what the server needs of it, in the caller's transaction.
    pub async fn place(
        &self,
        tx: &DatabaseTransaction,
        request: &Request,
    ) -> Result<HostId, NoHost> {
        let hosts = self.hosts(tx).await?;
        let chosen = scheduler::place(request, &hosts)?;
        if host::reserve(tx, chosen, request.server, request.amounts).await? {
            return Ok(chosen);
        }
        // Nothing can have changed within the transaction: the row and its view disagree.
        let mut without = request.clone();
        without.excluded.insert(chosen);
        Err(scheduler::place(&without, &hosts)
            .err()
            .unwrap_or_default()
            .into())
    }

    /// Tells the owner what is wanted, if it has not said that it knows, and answers how far it is.
    /// Idempotent, and never waits for the machine.
    ///
    /// # Errors
    /// [`StepError::Retry`] when the agent gives no answer or cannot now; [`StepError::Fail`] when it
    /// says that it never can.
    pub async fn converge(&self, server: ServerId) -> Result<Converged, StepError> {
        let Some(machine) = machine::find(self.database.reader(), server).await? else {
            return Ok(Converged::NoOwner);
        };
        self.converge_known(&machine, None).await
    }

    /// The same of a row that has just been read, with its owner's host if that was, too ([`Self::whose`]): while a guest
    /// stands still for it, nothing is read twice.
    pub async fn converge_known(
        &self,
        machine: &Machine,
        whose: Option<&Whose>,
    ) -> Result<Converged, StepError> {
        let Some(owner) = machine.host else {
            return Ok(Converged::NoOwner);
        };
        if let Some(report) = self.fleet.machine(owner, machine.server)
            && (report.generation, report.revision) == machine.age()
            && report.settled
        {
            return Ok(Converged::Settled(report));
        }
        if self.has_vanished(owner, machine) {
            return Err(StepError::fail(vanished(owner)));
        }
        self.may_tell(machine).await?;
        let whose = whose.filter(|whose| whose.owner == owner);
        self.tell_by(owner, machine, whose).await
    }

    /// Reads what [`Whose::word`] is said by.
    ///
    /// First the boot, then whether an operator has declared the host to be off, then whose the machine is: if it is
    /// moved away later, then because the host was declared to be off later, and this boot of it is over by then.
    pub async fn whose(&self, owner: HostId, server: ServerId) -> Result<Whose, DbErr> {
        let heard = self.fleet.host_report(owner).map(|said| said.boot_id);
        let reader = self.database.reader();
        let host = host::find(reader, owner).await?;
        let machine = machine::find(reader, server).await?;
        Ok(Whose {
            owner,
            heard,
            host,
            machine,
        })
    }

    /// Sends the intent to the owner.
    pub(super) async fn tell(
        &self,
        owner: HostId,
        machine: &Machine,
    ) -> Result<Converged, StepError> {
        self.tell_by(owner, machine, None).await
    }

    async fn tell_by(
        &self,
        owner: HostId,
        machine: &Machine,
        whose: Option<&Whose>,
    ) -> Result<Converged, StepError> {
        let mut put = self.open(machine)?;
        if !machine.is_tombstone() {
            put.boot_id = Some(match whose {
                Some(whose) => whose.word(machine),
                None => self.whose(owner, machine.server).await?.word(machine),
            });
        }
        let told = match self.agents.agent(owner) {
            Ok(agent) => agent.put(machine.server, &put).await,
            Err(error) => Err(error),
        };
        match told {
            Ok(report) => {
                self.fleet.answered(owner, &report, self.clock.now_us());
                let known = (report.generation, report.revision) == machine.age();
                if known && report.settled {
                    return Ok(Converged::Settled(report));
                }
                Ok(Converged::Pending(Some(report)))
            }
            Err(AgentError::NoHost { host }) => self.lost_or_not_met(host).await,
            // Something newer was asked: by the time this step is run again, the row says so too; if it
            // never does, the database is older than the world, and the reconciler cries.
            Err(AgentError::Refused(Refusal::Stale {
                generation,
                revision,
            })) => {
                let reason = format!(
                    "host {owner} has been told something newer of server {} (generation {}, \
                     revision {})",
                    machine.server, generation.0, revision.0
                );
                Err(StepError::retry(reason))
            }
            Err(AgentError::Refused(refusal @ Refusal::Invalid { .. })) => {
                // What was never taken is not there to be removed either.
                if machine.is_tombstone() && self.is_unknown_to(owner, machine.server).await {
                    return Ok(Converged::NoOwner);
                }
                Err(StepError::fail(format!(
                    "host {owner} refuses the machine: {refusal}"
                )))
            }
            Err(error) => Err(StepError::retry(error.to_string())),
        }
    }

    /// Whether a host is a member is the table's to say: what this controller has met of it may lack
    /// one that joined through another, or just now.
    pub(super) async fn lost_or_not_met(&self, host: HostId) -> Result<Converged, StepError> {
        match host::find(self.database.reader(), host).await? {
            None => Ok(Converged::Lost(Lost { host })),
            Some(row) => {
                self.fleet.admit(host, &row.endpoint);
                let reason = format!("host {host} has not been heard by this controller yet");
                Err(StepError::retry(reason))
            }
        }
    }

    /// The owner once had the machine and says that it has no record of it any more, or, after a
    /// restore of the database, that it has removed it since. To tell it what is wanted would make
    /// another, empty machine under the same name.
    pub fn has_vanished(&self, owner: HostId, machine: &Machine) -> bool {
        if machine.is_tombstone() {
            return false;
        }
        match self.fleet.machine(owner, machine.server) {
            // Nothing is known before the agent's full report.
            None => machine.report.is_some() && self.fleet.machines(owner).is_some(),
            Some(report) => {
                let age = (report.generation, report.revision);
                !machine.confirmed && age <= machine.age() && report.observed == Observed::Absent
            }
        }
    }

    /// The agent itself says that it has neither record nor tombstone.
    async fn is_unknown_to(&self, owner: HostId, server: ServerId) -> bool {
        let Ok(agent) = self.agents.agent(owner) else {
            return false;
        };
        matches!(
            agent.get(server).await,
            Err(AgentError::Refused(Refusal::Unknown))
        )
    }

    /// A machine must not be started on its owner while another host speaks of a process of it, nor,
    /// after a restore of the database, be there at all before it is known where it is.
    pub(super) async fn may_tell(&self, machine: &Machine) -> Result<(), StepError> {
        if machine.is_tombstone() {
            return Ok(());
        }
        if !machine.confirmed {
            return Err(StepError::retry(format!(
                "the database was restored, and no host has yet said that it holds server {}",
                machine.server
            )));
        }
        if machine.wanted.power == Power::Stopped {
            return Ok(());
        }
        let others: BTreeMap<HostId, MachineReport> = self
            .fleet
            .holders(machine.server)
            .into_iter()
            .filter(|(host, report)| Some(*host) != machine.host && runs(report))
            // Told in the owner's own generation: a guest is to come there, and none is started.
            .filter(|(_, report)| {
                !(matches!(report.observed, Observed::Starting { .. })
                    && report.generation == machine.generation)
            })
            .collect();
        for host in others.keys() {
            // What such a one said last, it said before that.
            if self.is_off(self.reader(), *host).await?.is_some() {
                continue;
            }
            return Err(StepError::retry(format!(
                "host {host} still runs a process of server {}",
                machine.server
            )));
        }
        Ok(())
    }
}

/// What a user is told of a machine that [`Machines::has_vanished`].
pub(super) fn vanished(owner: HostId) -> String {
    format!("host {owner} has no record of the server any more")
}

/// Whether a guest runs there, or may by itself: not on a host that has rebooted, and waits for a word. One whose process
/// could not do what was asked of it has failed, and runs all the same.
pub fn runs(report: &MachineReport) -> bool {
    let has_process = matches!(report.observed, Observed::Failed { .. }) && report.shape.is_some();
    (alive(&report.observed) || has_process) && !report.waits
}

/// Whether a guest runs, or may by itself: not one that stands still between two hosts until its owner's row is
/// told.
pub(super) fn alive(observed: &Observed) -> bool {
    matches!(
        observed,
        Observed::Starting { .. } | Observed::Running | Observed::Paused
    )
}
