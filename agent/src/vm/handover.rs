//! A guest that one process of a host hands over to another, seen from either: the older one lends what only it has, and
//! stands still until it is told to stay or ended; the newer one makes a machine of that, and waits for its `Go`.
//!
//! All that the machine has open goes along, also its lines and who is there on them. The newer process never has its
//! guest run before an agent says so whose record names it: the one that started it, by `Go`, or, if that one is gone,
//! the next one, which has ended every process that its record does not name.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use fractus_agent_api::migration::{MigrationId, Progress, State as Journey};
use fractus_vmm::config::WatchdogAction;
use fractus_vmm::machine::{self, HostFiles};
use fractus_vmm::thread::{ThreadHook, ThreadKind};
use serde::{Deserialize, Serialize};

use super::guest::GuestError;
use super::kept::Note;
use super::protocol::FileRole;
use super::supervise::{Guests, Supervisor};
use super::traveller::Traveller;
use super::{Built, Files, Lock, VmError, chain, log};

/// How long the older process may take for each step: it serves its guest meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// A descriptor that the process itself has, beside those of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The other end of the guest's serial line, and of its agent's port.
    Serial,
    Port,
    /// Who watches, and who speaks to the guest's agent.
    Console,
    Speaker,
}

/// Who was there on a guest's lines.
#[derive(Debug, Default)]
pub struct Visitors {
    pub console: Option<OwnedFd>,
    pub speaker: Option<OwnedFd>,
}

/// Of a guest that was taken over.
#[derive(Debug)]
pub struct Taken {
    pub visitors: Visitors,
    /// When it was stopped, if it ran, by the clock that all processes of a host share.
    stopped: Option<Duration>,
}

impl Taken {
    /// How long it has stood still, asked when it runs: said once.
    pub fn blackout_us(&mut self) -> Option<u64> {
        let stood = machine::monotonic().saturating_sub(self.stopped.take()?);
        u64::try_from(stood.as_micros()).ok()
    }
}

impl Supervisor {
    /// The loop does it, which knows who is there.
    pub(super) fn is_to_hand_over(
        &mut self,
        request_id: Option<String>,
        migration: MigrationId,
        files: Vec<OwnedFd>,
    ) -> Result<(), GuestError> {
        log::request(request_id);
        self.copy_no_more("its guest is to be handed over to another process");
        let line = files.into_iter().next();
        let line = line.ok_or_else(|| GuestError::Machine("no socket came".to_owned()))?;
        self.handing = Some((migration, line));
        Ok(())
    }

    pub(super) fn hand_over(&mut self, migration: MigrationId, line: OwnedFd, others: &Guests) {
        let begun = self.lend(line, others);
        let state = match begun {
            Ok(()) => Journey::Copying,
            Err(error) => Journey::Failed {
                reason: error.to_string(),
            },
        };
        self.moves(migration, state, Progress::default());
    }

    fn lend(&mut self, line: OwnedFd, others: &Guests) -> Result<(), GuestError> {
        let ends = [
            (End::Serial, Some(&self.serial)),
            (End::Port, self.port.as_ref()),
            (End::Console, others.console.as_ref()),
            (End::Speaker, others.speaker.as_ref()),
        ];
        let there = ends.into_iter().filter_map(|(end, fd)| Some((end, fd?)));
        let (lent, files): (Vec<End>, Vec<BorrowedFd<'_>>) =
            there.map(|(end, fd)| (end, fd.as_fd())).unzip();
        self.lent = lent;
        let note = self.note()?;
        self.guest.hand_over(UnixStream::from(line), note, &files)
    }
}

/// A machine of what another process hands over, with what only a new process can have of its host.
pub(super) fn take_over(line: OwnedFd, files: &mut Files, lock: Lock) -> Result<Built, VmError> {
    let kvm = files
        .take(FileRole::Kvm)
        .ok_or(VmError::Missing(FileRole::Kvm))?;
    let vhost = std::iter::from_fn(|| files.file(FileRole::Vhost)).collect();
    let line = UnixStream::from(line);
    let prepared = line
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| line.set_write_timeout(Some(PATIENCE)));
    prepared.map_err(|source| VmError::System {
        what: "the socket of the process before",
        source,
    })?;
    let hook: ThreadHook = Arc::new(move |kind: ThreadKind| lock.down(kind.into()));
    let taken = machine::take_over(line, HostFiles { kvm, vhost }, Some(hook));
    let taken = taken.map_err(|error| VmError::Build(chain(&error)))?;
    log::line(format_args!("taken over: made in {:?}", taken.made));
    let note = Note::read(&taken.owner)?;
    let config = taken.machine.config();
    let watchdog = config.watchdog.as_ref();
    let pauses = watchdog.is_some_and(|watchdog| watchdog.action == WatchdogAction::Pause);
    let (mut serial, mut port, mut visitors) = (None, None, Visitors::default());
    for (end, file) in note.lent().iter().zip(taken.files) {
        *match end {
            End::Serial => &mut serial,
            End::Port => &mut port,
            End::Console => &mut visitors.console,
            End::Speaker => &mut visitors.speaker,
        } = Some(file);
    }
    let serial =
        serial.ok_or_else(|| VmError::Build("the guest's serial line did not come".to_owned()))?;
    let guest = Traveller::arrived(taken.machine, taken.ran, None);
    let guest = guest.map_err(|source| VmError::System {
        what: "the machine's events",
        source,
    })?;
    Ok(Built {
        guest: Box::new(guest),
        note: Some(note),
        serial,
        port,
        pauses,
        taken: Some(Taken {
            visitors,
            stopped: taken.ran.then_some(taken.stopped),
        }),
    })
}
