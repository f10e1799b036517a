//! A guest that is sent to another host, a piece at each turn of the loop.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::{MigrationId, Policy, Progress, State as Journey};

use super::guest::GuestError;
use super::log;
use super::protocol::{FromMachine, Moving, PAUSE};
use super::supervise::Supervisor;

/// The last guest that was sent, or the one that is.
#[derive(Debug, Default)]
pub struct Sent {
    pub moving: Option<Moving>,
    told_at: Option<Instant>,
}

impl Sent {
    fn is_due(&self) -> bool {
        self.told_at.is_none_or(|at| at.elapsed() >= PAUSE)
    }
}

impl Supervisor {
    /// Without a connection: the guest that is being sent goes by this policy.
    pub(super) fn send(
        &mut self,
        migration: MigrationId,
        policy: Policy,
        files: Vec<OwnedFd>,
    ) -> Result<(), GuestError> {
        let Some(connection) = files.into_iter().next() else {
            self.guest.send_by(Some(policy), None);
            return Ok(());
        };
        let same = |moving: &Moving| moving.migration == migration;
        if self.sent.moving.as_ref().is_some_and(same) {
            // Repeated, because the agent did not hear that it was begun.
            return Ok(());
        }
        self.lent.clear();
        let note = self.note()?;
        let state = match self.guest.send(UnixStream::from(connection), policy, note) {
            Ok(()) => Journey::Copying,
            Err(error) => Journey::Failed {
                reason: error.to_string(),
            },
        };
        self.moves(migration, state, Progress::default());
        Ok(())
    }

    /// Some more of it.
    pub(super) fn send_on(&mut self) {
        let Some(migration) = self.sent.moving.as_ref().map(|moving| moving.migration) else {
            return;
        };
        let tells = self.sent.is_due();
        let Some((state, progress)) = self.guest.send_on(tells) else {
            return;
        };
        self.lean.happened();
        if state == Journey::Copying && !tells {
            return;
        }
        self.moves(migration, state, progress.unwrap_or_default());
    }

    pub(super) fn moves(&mut self, migration: MigrationId, state: Journey, progress: Progress) {
        if state != Journey::Copying {
            log::line(format_args!(
                "migration {migration}: {state:?}, {progress:?}"
            ));
        }
        let moving = Moving {
            migration,
            state,
            progress,
        };
        self.sent = Sent {
            moving: Some(moving.clone()),
            told_at: Some(Instant::now()),
        };
        self.tell(&FromMachine::Moving(moving));
    }

    /// What goes with it is what its devices have said by then.
    pub(super) fn say_anew(&mut self) {
        if self.guest.is_being_sent()
            && let Ok(note) = self.note()
        {
            self.guest.send_by(None, Some(note));
        }
    }

    /// A reason, when the guest can neither go nor stay.
    pub(super) fn stay(&mut self) -> Option<StopReason> {
        let stayed = self.guest.stay();
        if let Some(moving) = &mut self.sent.moving
            && !matches!(moving.state, Journey::Failed { .. })
        {
            moving.state = Journey::Failed {
                reason: "it was not to be sent any more".to_owned(),
            };
        }
        match stayed {
            Ok(()) => {
                self.tell(&self.status());
                None
            }
            Err(error) => Some(StopReason::VmmFault {
                detail: format!("the guest does not go on: {error}"),
            }),
        }
    }

    /// How long the loop may wait for something to happen.
    pub(super) fn to_send(&self) -> Option<Duration> {
        let at_once = self.guest.is_being_sent() && self.guest.waits_for().is_none();
        at_once.then_some(Duration::ZERO)
    }
}
