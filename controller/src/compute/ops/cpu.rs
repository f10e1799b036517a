//! The CPU of a guest that begins anew: fixed in the transaction that says where, and kept until it begins anew again.

use fractus_agent_api::cpu::Profile;
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{MachineSpec, ServerId};
use sea_orm::{ConnectionTrait, DbErr};

use crate::compute::model::cpu::{CpuMode, EXTRA_SPEC};
use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::store::server;
use crate::reconcile::Machines;

/// What a guest begins with.
#[derive(Debug, Clone)]
pub(super) struct Begins {
    name: &'static str,
    profile: Option<Box<Profile>>,
}

impl Begins {
    pub fn put(self, spec: &mut MachineSpec) {
        spec.cpu_profile = self.name.to_owned();
        spec.cpu = self.profile;
    }
}

/// As its flavor says, or else as the cloud does.
pub(super) fn mode(machines: &Machines, flavor: &FlavorSnapshot) -> CpuMode {
    let said = flavor.extra_specs.get(EXTRA_SPEC);
    // One that no release knows was given before it was checked.
    let said = said.and_then(|name| name.parse().ok());
    said.unwrap_or_else(|| machines.cpu_mode())
}

/// The same of a server.
pub(super) async fn mode_of(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    server: &str,
) -> Result<CpuMode, DbErr> {
    match server::find(connection, server).await? {
        Some(row) => Ok(mode(machines, &row.flavor()?)),
        None => Ok(machines.cpu_mode()),
    }
}

/// What a guest has that begins on this host.
pub(super) async fn begins(
    machines: &Machines,
    connection: &impl ConnectionTrait,
    (mode, host): (CpuMode, HostId),
    server: ServerId,
) -> Result<Begins, DbErr> {
    let hosts = machines.hosts(connection).await?;
    let lacks = mode.lacks(host, &hosts);
    if !lacks.is_empty() {
        // Where it is, it stays: its host has come to offer less, or was enough for what its flavor said before. To refuse
        // this would keep a server down whose kernel may well do without; a program that does not says so.
        let lacks = lacks.join(", ");
        tracing::warn!(%server, %host, level = %mode, lacks, "a guest begins with less than its level");
    }
    let profile = mode.choose(host, &hosts).map(Box::new);
    let name = mode.name_of_old();
    Ok(Begins { name, profile })
}
