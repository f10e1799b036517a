//! A guest that is sent to another host, a piece at each turn of the loop.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::{MigrationId, Policy, Progress, State as Journey};

use super::guest::GuestError;
use super::leave::{Leave, PATIENCE};
use super::log;
use super::protocol::{FromMachine, Moving, PAUSE};
use super::seal::{self, Connection};
use super::supervise::Supervisor;

/// A line that is broken when the host goes down has this time to be mended.
const MENDED: Duration = Duration::from_secs(10);

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
        lent: bool,
        files: Vec<OwnedFd>,
    ) -> Result<(), GuestError> {
        let Some(connection) = files.into_iter().next() else {
            self.guest.send_by(Some(policy), None);
            return Ok(());
        };
        let same = |moving: &Moving| moving.migration == migration;
        if self.sent.moving.as_ref().is_some_and(same) {
            // Else it is repeated, because the agent did not hear that it was begun.
            if self.guest.owes() {
                self.owe_by(UnixStream::from(connection));
            }
            return Ok(());
        }
        self.lent.clear();
        let state = match self.begin_to_send(UnixStream::from(connection), lent, policy) {
            Ok(()) => Journey::Copying,
            Err(error) => Journey::Failed {
                reason: error.to_string(),
            },
        };
        self.moves(migration, state, Progress::default());
        Ok(())
    }

    fn begin_to_send(
        &mut self,
        end: UnixStream,
        lent: bool,
        policy: Policy,
    ) -> Result<(), GuestError> {
        let note = self.note()?;
        let connection = match lent {
            true => seal::borrow(end)?,
            false => Connection::plain(end),
        };
        self.guest.send(connection, policy, note)
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
        let same = self
            .sent
            .moving
            .as_ref()
            .is_some_and(|was| was.state == state);
        if same && !tells && progress.as_ref().is_none_or(|now| now.broken.is_none()) {
            return;
        }
        // Whoever asks how it failed wants to know how far it had come.
        let known = || self.sent.moving.as_ref().map(|was| was.progress.clone());
        let progress = progress.or_else(known).unwrap_or_default();
        self.moves(migration, state, progress);
    }

    pub(super) fn moves(&mut self, migration: MigrationId, state: Journey, progress: Progress) {
        let same = self
            .sent
            .moving
            .as_ref()
            .is_some_and(|was| was.state == state);
        if !same || progress.broken.is_some() {
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

    /// The memory that it owes goes by another connection.
    fn owe_by(&mut self, connection: UnixStream) {
        let gone_on = self.guest.go_on_by(connection);
        log::line(format_args!(
            "its memory goes on by another connection: {gone_on:?}"
        ));
        let Some(moving) = &mut self.sent.moving else {
            return;
        };
        moving.progress.broken = gone_on.err().map(|error| error.to_string());
        let moving = moving.clone();
        self.tell(&FromMachine::Moving(moving));
    }

    /// The memory that follows is all here, or does not come at the moment.
    pub(super) fn followed(&mut self, how: Result<(), String>) {
        match how {
            Ok(()) => log::line(format_args!("its memory is whole")),
            Err(reason) => log::line(format_args!("its memory does not come: {reason}")),
        }
        self.tell(&self.status());
    }

    /// The host goes down, and another one's guest needs what is here: that goes first, as long as it goes and there is
    /// time for it.
    pub(super) fn has_time_to_pay(&self) -> bool {
        self.time_to_pay().is_some_and(|time| !time.is_zero())
    }

    fn time_to_pay(&self) -> Option<Duration> {
        let time = self.leave.as_ref().and_then(Leave::busy)?;
        let time = match self.is_broken() {
            true => time.saturating_sub(PATIENCE - MENDED),
            false => time,
        };
        self.guest.owes().then_some(time)
    }

    /// How long the loop may wait before the host ends this machine.
    pub(super) fn to_leave(&self) -> Option<Duration> {
        let leave = self.leave.as_ref()?;
        match self.time_to_pay() {
            Some(time) if !time.is_zero() => Some(time),
            _ => leave.left(),
        }
    }

    fn is_broken(&self) -> bool {
        let moving = self.sent.moving.as_ref();
        moving.is_some_and(|moving| moving.progress.broken.is_some())
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
        let sends = self.guest.is_being_sent() || self.guest.owes() && !self.is_broken();
        let at_once = sends && self.guest.waits_for().is_none();
        at_once.then_some(Duration::ZERO)
    }
}
