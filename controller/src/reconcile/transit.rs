//! What a migration's operation says to the two hosts, beside what is wanted of the owner.
//!
//! Decides nothing: whose the guest is stands in the row, and follows from nothing that is said here. A stream's
//! key is sealed wherever it is kept, and is open only on its way to an agent.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fractus_agent_api::VERSION;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{
    MachineReport, Observed, PutMachine, Refusal, Revision, ServerId,
};
use fractus_agent_api::migration::{self, Arrival, MigrationId, State, StreamKey};
use sea_orm::ConnectionTrait;
use sea_orm::DbErr;
use sea_orm::prelude::Uuid;

use super::converge::{Machines, SOON, off};
use super::machine::{self, Machine};
use crate::agents::{AgentError, host};
use crate::operation::StepError;

/// What a sealed key is for.
const STREAM_KEY: &str = "stream_key";

/// What became of what a host that does not own it has of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dropped {
    /// Nothing is there.
    Gone,
    /// The host knows that nothing is to be there.
    Working,
    /// It gives no answer. The reconciler tells it when it is heard again.
    Unreachable(String),
}

impl Machines {
    /// As the database keeps it; only [`Self::tell`] and [`Self::prepare`] open it. None where there is no key.
    pub fn seal_stream_key(&self, plain: &StreamKey) -> Option<StreamKey> {
        let sealed = self.master()?.wrap(STREAM_KEY, plain.key.as_bytes());
        Some(StreamKey {
            certificate: plain.certificate.clone(),
            key: STANDARD.encode(sealed.ok()?),
        })
    }

    pub(super) fn open_stream_key(
        &self,
        id: MigrationId,
        sealed: &StreamKey,
    ) -> Result<StreamKey, StepError> {
        let open = || {
            let key = STANDARD.decode(&sealed.key).ok()?;
            let plain = self.master()?.unwrap_secret(STREAM_KEY, &key).ok()?;
            String::from_utf8(plain.to_vec()).ok()
        };
        let key = open().ok_or_else(|| {
            StepError::fail(format!(
                "the key of migration {id} does not open with master.key"
            ))
        })?;
        Ok(StreamKey {
            certificate: sealed.certificate.clone(),
            key,
        })
    }

    /// Tells the target, which does not own the server, that its guest is to come: in the owner's own generation,
    /// and in a revision above all that it was told in that. `arrival` with its key sealed.
    ///
    /// # Errors
    /// [`StepError::Fail`] when it never will.
    pub async fn prepare(
        &self,
        target: HostId,
        machine: &Machine,
        mut arrival: Arrival,
    ) -> Result<MachineReport, StepError> {
        if !machine.confirmed {
            return Err(StepError::fail("the database was restored meanwhile"));
        }
        arrival.key = self.open_stream_key(arrival.id, &arrival.key)?;
        let mut put = self.open(machine)?;
        (put.wanted.departs, put.wanted.continues) = (None, None);
        put.wanted.arrives = Some(arrival);
        put.version = machine::version(&put.wanted);
        if let Some(said) = self.ask(target, machine.server).await?
            && said.generation == put.generation
            && said.revision >= put.revision
        {
            // Told already, or not done with what it had.
            if said.observed != Observed::Absent || !said.settled {
                return Ok(said);
            }
            put.revision = Revision(said.revision.0 + 1);
        }
        let told = match self.agents().agent(target) {
            Ok(agent) => agent.put(machine.server, &put).await,
            Err(error) => Err(error),
        };
        match told {
            Ok(report) => {
                self.fleet().answered(target, &report, self.now_us());
                if report.settled && report.observed == Observed::Absent {
                    return Err(overtaken(target));
                }
                Ok(report)
            }
            Err(AgentError::Refused(Refusal::Stale { generation, .. }))
                if generation == put.generation =>
            {
                Err(overtaken(target))
            }
            Err(AgentError::NoHost { host }) => match self.lost_or_not_met(host).await {
                Ok(_) => Err(StepError::fail(format!(
                    "host {host} was removed from the cloud"
                ))),
                Err(error) => Err(error),
            },
            Err(AgentError::Refused(Refusal::Invalid { detail })) => Err(StepError::fail(format!(
                "the agent of host {target} cannot take a guest that runs ({detail}); upgrade it"
            ))),
            Err(AgentError::Refused(refusal @ Refusal::Stale { .. })) => Err(StepError::fail(
                format!("host {target} has been told something newer of the server: {refusal}"),
            )),
            Err(error) => Err(soon(error.to_string())),
        }
    }

    /// What the host says of the server right now; none: it has no record of it.
    pub async fn ask(
        &self,
        host: HostId,
        server: ServerId,
    ) -> Result<Option<MachineReport>, StepError> {
        let said = match self.agents().agent(host) {
            Ok(agent) => agent.get(server).await,
            Err(error) => Err(error),
        };
        match said {
            Ok(report) => {
                self.fleet().answered(host, &report, self.now_us());
                Ok(Some(report))
            }
            Err(AgentError::Refused(Refusal::Unknown)) => Ok(None),
            Err(error) => Err(soon(error.to_string())),
        }
    }

    /// Tells a host that does not own the server that nothing of it is to be there; `above` is the newest
    /// revision that it was told. Idempotent. Nothing is told before a restored row was confirmed: what is there then
    /// is the reconciler's to find.
    pub async fn drop_at(
        &self,
        host: HostId,
        machine: &Machine,
        above: Revision,
    ) -> Result<Dropped, StepError> {
        // Of a restored database: the host may have it by a newer row than this one, which nobody has any more.
        if !machine.confirmed {
            return Ok(Dropped::Gone);
        }
        let mut wanted = machine.wanted.clone();
        wanted.end();
        let least = Ord::max(machine.revision, Revision(above.0 + 1));
        let said = self.fleet().machine(host, machine.server);
        let said = said.filter(|said| {
            said.generation == machine.generation && said.observed != Observed::Absent
        });
        let told = said.map_or(0, |said| said.revision.0 + 1);
        let put = PutMachine {
            version: VERSION,
            generation: machine.generation,
            revision: Ord::max(least, Revision(told)),
            wanted,
            request_id: machine.request_id.clone(),
            boot_id: Some(Uuid::nil()),
        };
        let age = (put.generation, least);
        let gone = |report: &MachineReport| {
            report.settled
                && report.observed == Observed::Absent
                && (report.generation, report.revision) >= age
        };
        if self
            .fleet()
            .machine(host, machine.server)
            .is_some_and(|known| gone(&known))
        {
            return Ok(Dropped::Gone);
        }
        let told = match self.agents().agent(host) {
            Ok(agent) => agent.put(machine.server, &put).await,
            Err(error) => Err(error),
        };
        match told {
            Ok(report) => {
                self.fleet().answered(host, &report, self.now_us());
                Ok(if gone(&report) {
                    Dropped::Gone
                } else {
                    Dropped::Working
                })
            }
            Err(AgentError::NoHost { host }) => match self.lost_or_not_met(host).await {
                Ok(_) => Ok(Dropped::Gone),
                Err(error) => Ok(Dropped::Unreachable(error.to_string())),
            },
            // It holds something newer than this controller knows of: for the reconciler to tell of.
            Err(error) => Ok(Dropped::Unreachable(error.to_string())),
        }
    }

    /// Why the host is known to run nothing of this cloud: an operator's word, and no matter of time.
    pub async fn is_off(
        &self,
        connection: &impl ConnectionTrait,
        id: HostId,
    ) -> Result<Option<String>, DbErr> {
        Ok(off(id, host::find(connection, id).await?.as_ref()))
    }
}

/// Between the look at what the target was told last and the intent, it was told in the same revision or a newer one
/// that nothing is to be there: of what an earlier migration had left. The next intent is above that.
fn overtaken(target: HostId) -> StepError {
    soon(format!(
        "host {target} was told meanwhile that it is to have nothing of the server"
    ))
}

/// Asked again in a moment: guests stand still meanwhile.
fn soon(reason: String) -> StepError {
    StepError::Retry {
        reason,
        after: Some(SOON),
    }
}

/// What a report says of this migration.
pub fn state_of(report: &MachineReport, id: MigrationId) -> Option<&State> {
    let migration = report.migration.as_ref()?;
    (migration.id == id).then_some(&migration.state)
}

/// The guest stands still there for another host.
pub(super) fn is_offered(report: &MachineReport) -> bool {
    let said = report.migration.as_ref().map(|said| &said.state);
    report.observed == Observed::Offered || matches!(said, Some(migration::State::Offered { .. }))
}

/// A guest was to come there.
pub(super) fn is_arriving(report: &MachineReport) -> bool {
    report.observed == Observed::Arriving
        || report.migration.is_some()
        || matches!(report.observed, Observed::Starting { .. })
}
