//! What the reconciler sees, as a server's state.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::machine::{ServerId, StopReason};
use sea_orm::ActiveValue::Set;
use sea_orm::{DatabaseTransaction, DbErr};

use super::{resize, to_error, to_state, turn};
use crate::clock::Clock;
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::store::server;
use crate::reconcile::{Life, Observer};

const PANICKED: &str =
    "The guest's kernel panicked; look at its console, and reboot the server hard";

/// Compute's ear at the reconciler.
pub struct ServerObserver {
    clock: Arc<dyn Clock>,
}

impl ServerObserver {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock }
    }
}

#[async_trait]
impl Observer for ServerObserver {
    /// A guest that powered itself off is SHUTOFF; one that was ended by a fault is ERROR, and says
    /// which.
    async fn stopped(
        &self,
        tx: &DatabaseTransaction,
        server: ServerId,
        reason: &StopReason,
    ) -> Result<(), DbErr> {
        let now = self.clock.now_us();
        turn(tx, &server.to_string(), |row| {
            if is_told_by_its_operation(row.state()) {
                return None;
            }
            if let ServerState::Resized(_) = row.state() {
                // It can still go back, whatever has ended it.
                return Some(server::ActiveModel {
                    state: Set(ServerState::Resized(Standing::Stopped).key()),
                    ..ended(reason, now)
                });
            }
            let end = ended(reason, now);
            Some(still_imaging(row, end))
        })
        .await
    }

    /// A panic is an error that can be looked at, and ends with the guest's own reset. A server whose
    /// machine could not be started is what is wanted of it once its agent has started it after all, as
    /// a new agent tries to.
    async fn lives(
        &self,
        tx: &DatabaseTransaction,
        machine: ServerId,
        life: Life,
    ) -> Result<(), DbErr> {
        let now = self.clock.now_us();
        turn(tx, &machine.to_string(), |row| match row.state() {
            ServerState::Active if life.paused => Some(to_state(ServerState::Paused, now)),
            ServerState::Active if life.guest.panicked => Some(crashed(now)),
            ServerState::Crashed if !life.guest.panicked => {
                Some(to_state(ServerState::Active, now))
            }
            ServerState::Error if life.begun && life.paused => {
                Some(to_state(ServerState::Paused, now))
            }
            ServerState::Error if life.begun => Some(to_state(ServerState::Active, now)),
            // The end of its resume was not seen by the operation.
            ServerState::Resized(Standing::Stopped) => {
                Some(to_state(ServerState::Resized(Standing::Active), now))
            }
            ServerState::Suspended if life.paused => Some(to_state(ServerState::Paused, now)),
            ServerState::Suspended => Some(to_state(ServerState::Active, now)),
            _ => None,
        })
        .await
    }

    /// A server whose suspend had failed is what is wanted of it once its agent has suspended it after
    /// all; so is one whose operation did not see the end.
    async fn suspended(&self, tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr> {
        let now = self.clock.now_us();
        turn(tx, &server.to_string(), |row| {
            let disagrees = matches!(
                row.state(),
                ServerState::Active
                    | ServerState::Paused
                    | ServerState::Crashed
                    | ServerState::Error
            );
            disagrees.then(|| to_state(ServerState::Suspended, now))
        })
        .await
    }

    async fn restored(&self, tx: &DatabaseTransaction, server: ServerId) -> Result<(), DbErr> {
        resize::is_made(tx, server, false, self.clock.now_us()).await
    }

    async fn failed(
        &self,
        tx: &DatabaseTransaction,
        server: ServerId,
        reason: &str,
    ) -> Result<(), DbErr> {
        let now = self.clock.now_us();
        turn(tx, &server.to_string(), |row| {
            if let ServerState::Resized(_) = row.state() {
                return Some(server::ActiveModel {
                    state: Set(ServerState::Resized(Standing::Stopped).key()),
                    ..to_error(reason, Some(reason), now)
                });
            }
            let over = is_told_by_its_operation(row.state());
            // Said before: when it happened stays as it was.
            let said =
                row.state() == ServerState::Error && row.fault_details.as_deref() == Some(reason);
            let error = || still_imaging(row, to_error(reason, Some(reason), now));
            (!over && !said).then(error)
        })
        .await
    }
}

/// What becomes of the machine is no news of a server that goes, or is kept in an image.
fn is_told_by_its_operation(state: ServerState) -> bool {
    matches!(
        state,
        ServerState::Deleting(_)
            | ServerState::Deleted
            | ServerState::Shelving(..)
            | ServerState::Shelved
            | ServerState::Offloading
            | ServerState::ShelvedOffloaded
            | ServerState::Unshelving(_)
            | ServerState::Resizing(..)
            | ServerState::Confirming(_)
            | ServerState::Reverting
    )
}

/// An image is made of the disk all the same: what the server has become, it is beside that.
fn still_imaging(row: &server::Model, change: server::ActiveModel) -> server::ActiveModel {
    let ServerState::Imaging(_, shot) = row.state() else {
        return change;
    };
    let becomes = change.state.try_as_ref();
    let becomes = becomes.and_then(|key| ServerState::from_key(key)?.standing());
    let standing = becomes.unwrap_or(Standing::Error);
    server::ActiveModel {
        state: Set(ServerState::Imaging(standing, shot).key()),
        ..change
    }
}

/// A server whose guest's kernel has panicked.
pub(super) fn crashed(now_us: i64) -> server::ActiveModel {
    server::ActiveModel {
        state: Set(ServerState::Crashed.key()),
        ..to_error(PANICKED, None, now_us)
    }
}

/// What a server is whose guest has ended so.
pub(super) fn ended(reason: &StopReason, now_us: i64) -> server::ActiveModel {
    match fault(reason) {
        None => to_state(ServerState::Stopped, now_us),
        Some((message, details)) => to_error(message, details, now_us),
    }
}

/// What a user is told, and what an administrator is told besides; none for an ordinary end.
fn fault(reason: &StopReason) -> Option<(&str, Option<&str>)> {
    match reason {
        StopReason::Requested
        | StopReason::GuestPowerOff
        | StopReason::Watchdog
        | StopReason::HostReboot => None,
        StopReason::TripleFault { detail } => Some((
            "The guest's processor faulted three times over; reboot the server hard",
            Some(detail),
        )),
        StopReason::InternalError { detail } => Some((
            "KVM could not go on with the guest; its registers are in the details",
            Some(detail),
        )),
        StopReason::NotBootable { detail } => Some((detail, Some(detail))),
        StopReason::VmmFault { detail } => Some((
            "The machine's process ended by a fault; its disks are whole, reboot the server hard",
            Some(detail),
        )),
    }
}
