//! A copy of the root disk, as the intent names one ([`fractus_agent_api::copy`]).
//!
//! The machine's process makes it while its guest runs; where there is no process, the agent does. It counts once it
//! stands under its own name, where it was brought whole and durable: what else there is of copies was never finished,
//! and goes. So nothing of it has to be in the record.

use std::fs::{self, File};
use std::io;

use fractus_agent_api::copy::{self, Copies, CopyId, CopyReport, CopyState, CopyStep};
use fractus_agent_api::decision::Step;
use tokio::time::Instant;
use uuid::Uuid;

use super::suspend::{create, rename};
use super::{AGAIN, Actor, Over, Phase, blocking};
use crate::machine::make::CopyTurn;
use crate::machine::process::{Launcher, Process, ProcessError};
use crate::paths::MachinePaths;
use crate::volume::directory;

/// What is known of copies.
#[derive(Debug, Default)]
pub(super) struct Copying {
    /// Which stands there, and its bytes.
    made: Option<(CopyId, u64)>,
    begun: Option<Begun>,
    failed: Option<(CopyId, String)>,
    /// The process may be at one that nobody has heard of.
    stray: bool,
    /// It could not be told that one is not wanted any more.
    untold: bool,
}

/// What the process was told of last.
#[derive(Debug)]
struct Begun {
    id: CopyId,
    attempt: Uuid,
    /// Whoever has it open still is to have nothing of it.
    file: File,
    _turn: CopyTurn,
}

impl Copying {
    fn seen(&self) -> Copies {
        Copies {
            made: self.made.map(|(id, _)| id),
            begun: self.begun.as_ref().map(|begun| begun.id),
            failed: self.failed.as_ref().map(|(id, _)| *id),
        }
    }

    /// A newer intent is held.
    pub(super) fn try_anew(&mut self) {
        self.failed = None;
    }

    /// The process is met again, and may be at a copy that it was not told to end.
    pub(super) fn may_stray(&mut self) {
        (self.stray, self.untold) = (true, false);
    }

    pub(super) fn is_untold(&self) -> bool {
        self.untold
    }
}

impl<L: Launcher> Actor<L> {
    pub(super) fn next_copy(&self) -> Option<CopyStep> {
        copy::next(&self.record.intent.wanted, &self.copying.seen())
            .filter(|step| *step == CopyStep::Drop || self.is_here())
    }

    pub(super) fn copy_is_settled(&self) -> bool {
        copy::is_settled(&self.record.intent.wanted, &self.copying.seen())
    }

    pub(super) fn copy_report(&self) -> Option<CopyReport> {
        let id = self.record.intent.wanted.copy?;
        let state = match (&self.copying.made, &self.copying.failed) {
            (Some((made, bytes)), _) if *made == id => CopyState::Made { bytes: *bytes },
            _ if self.record.intent.wanted.restores == Some(id) => CopyState::Failed {
                reason: "it is not there".to_owned(),
            },
            (_, Some((failed, reason))) if *failed == id => CopyState::Failed {
                reason: reason.clone(),
            },
            _ => CopyState::Copying,
        };
        Some(CopyReport { id, state })
    }

    /// What an earlier agent has left: the copy that is wanted, if it is there.
    pub(super) fn find_copy(&mut self) {
        let wanted = self.record.intent.wanted.copy;
        if let Some(id) = wanted {
            let path = self.paths.copy(id);
            let about = blocking(|| fs::metadata(path));
            self.copying.made = about.ok().map(|about| (id, about.len()));
        }
        self.sweep_copies(wanted);
    }

    /// The machine's process is gone, or may have answered where nobody heard it.
    pub(super) fn lose_copy(&mut self) {
        if let Some(begun) = self.copying.begun.take() {
            let _ = blocking(|| begun.file.set_len(0));
            self.sweep_copies(self.copying.made.map(|(id, _)| id));
        }
    }

    /// Nobody wants a copy whose file nobody has any more. One that is begun has ended it.
    pub(super) fn strays(&self) -> bool {
        self.copying.stray && self.process.is_some() && self.copying.begun.is_none()
    }

    pub(super) async fn end_stray(&mut self) {
        self.copying.stray = false;
        let request_id = self.record.request_id.clone();
        if let Some(process) = &mut self.process
            && let Err(error) = process.no_copy(request_id.as_deref()).await
        {
            // When it is met again it is told again.
            self.copying.untold = true;
            tracing::warn!(machine = %self.record.id, %error, "not told to copy no more");
        }
    }

    /// The machine is gone, and its copies with it.
    pub(super) fn forget_copies(&mut self) {
        self.copying = Copying::default();
    }

    pub(super) async fn carry_copy(&mut self, step: CopyStep) -> Result<(), Over> {
        match (step, self.phase) {
            (CopyStep::Drop, _) => self.drop_copies().await,
            (CopyStep::Make(_), Phase::Starting) => return self.rest().await,
            (CopyStep::Make(id), Phase::None) => return self.copy_at_rest(id).await,
            (CopyStep::Make(id), Phase::Running | Phase::Paused) => {
                return self.have_it_copied(id).await;
            }
        }
        Ok(())
    }

    /// Those that are not wanted.
    async fn drop_copies(&mut self) {
        let wanted = self.record.intent.wanted.copy;
        if let Some(begun) = self.copying.begun.take_if(|begun| Some(begun.id) != wanted) {
            let _ = blocking(|| begun.file.set_len(0));
            let request_id = self.record.request_id.clone();
            if let Some(process) = &mut self.process
                && let Err(error) = process.no_copy(request_id.as_deref()).await
            {
                // It goes on until it is met again, and what it writes is in no folder.
                self.copying.untold = true;
                tracing::warn!(machine = %self.record.id, %error, "not told to copy no more");
            }
        }
        self.copying.made.take_if(|(id, _)| Some(*id) != wanted);
        self.sweep_copies(self.copying.made.map(|(id, _)| id));
        self.publish();
    }

    /// All but one.
    fn sweep_copies(&self, but: Option<CopyId>) {
        let stays = but.map(|id| self.paths.copy(id));
        let swept = blocking(|| -> io::Result<()> {
            for entry in fs::read_dir(self.paths.folder())? {
                let entry = entry?;
                let name = entry.file_name();
                let is_copy = name.to_string_lossy().starts_with(MachinePaths::COPY);
                if is_copy && Some(entry.path()) != stays {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        });
        if let Err(error) = swept
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(machine = %self.record.id, %error, "copies of before are left");
        }
    }

    fn copy_failed(&mut self, id: CopyId, reason: String) {
        tracing::warn!(machine = %self.record.id, copy = %id, reason, "no copy of its disk");
        self.copying.failed = Some((id, reason));
        self.sweep_copies(None);
        self.publish();
    }

    /// No guest has the disk. A newer intent makes it void: what is wanted may be one that does.
    async fn copy_at_rest(&mut self, id: CopyId) -> Result<(), Over> {
        if self.record.intent.wanted.spec.root_disk.is_none() {
            self.copy_failed(id, "the machine has no root disk".to_owned());
            return Ok(());
        }
        self.sweep_copies(None);
        self.publish();
        let (makings, paths) = (self.surroundings.makings.clone(), self.paths.clone());
        let age = self.record.intent.age();
        let goes_on =
            |actor: &Self| actor.record.intent.age() == age && actor.next() == Step::Settled;
        let copying = async move { makings.copy_disk(&paths, id).await };
        match self.meanwhile(copying, goes_on).await? {
            None => {}
            Some(Ok(bytes)) => self.copy_is_made(id, bytes),
            Some(Err(error)) => self.copy_failed(id, error.to_string()),
        }
        Ok(())
    }

    fn copy_is_made(&mut self, id: CopyId, bytes: u64) {
        tracing::info!(machine = %self.record.id, copy = %id, bytes, "its disk is copied");
        self.copying.made = Some((id, bytes));
        self.publish();
    }

    /// The process is told; what it says of this attempt is heard in [`Self::copied`].
    async fn have_it_copied(&mut self, id: CopyId) -> Result<(), Over> {
        if self.record.intent.wanted.spec.root_disk.is_none() {
            self.copy_failed(id, "the machine has no root disk".to_owned());
            return Ok(());
        }
        let makings = self.surroundings.makings.clone();
        let Some(turn) = makings.copy_turn() else {
            return self.rest_until(Some(Instant::now() + AGAIN)).await;
        };
        if let Err(error) = blocking(|| makings.copy_has_room(&self.paths)) {
            self.copy_failed(id, error.to_string());
            return Ok(());
        }
        self.sweep_copies(None);
        let path = self.paths.new_copy(id);
        let made = blocking(|| {
            let file = create(&path).map_err(|error| error.to_string())?;
            let open = directory::open(&path, false).map_err(|error| error.to_string())?;
            let root = fs::metadata(self.paths.disk()).map_err(|error| error.to_string())?;
            Ok::<_, String>((file, open.file, root.len()))
        });
        let (ours, file, most) = match made {
            Ok(made) => made,
            Err(error) => {
                self.copy_failed(id, format!("{}: {error}", path.display()));
                return Ok(());
            }
        };
        let attempt = Uuid::new_v4();
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        let told = process.copy(attempt, file, most, request_id.as_deref());
        match told.await {
            Ok(()) => {}
            Err(error @ (ProcessError::Mute | ProcessError::Control(_))) => {
                tracing::warn!(machine = %self.record.id, %error, "not told to copy its disk");
                return self.wait(Some(Instant::now() + AGAIN)).await.map(drop);
            }
            Err(error) => {
                self.copy_failed(id, error.to_string());
                return Ok(());
            }
        }
        self.copying.begun = Some(Begun {
            id,
            attempt,
            file: ours,
            _turn: turn,
        });
        self.copying.stray = false;
        self.publish();
        Ok(())
    }

    /// What the process says of an attempt. The file is on its disk if it says so; that it is under its name is not,
    /// and a host that loses its power then makes another.
    pub(super) fn copied(&mut self, attempt: Uuid, what: Result<(), String>) {
        let begun = &mut self.copying.begun;
        let Some(Begun { id, file, .. }) = begun.take_if(|begun| begun.attempt == attempt) else {
            return;
        };
        let kept = what.and_then(|()| {
            let (from, to) = (self.paths.new_copy(id), self.paths.copy(id));
            let bytes = blocking(|| rename(&from, &to).and_then(|()| file.metadata()));
            bytes
                .map(|about| about.len())
                .map_err(|error| error.to_string())
        });
        match kept {
            Ok(bytes) => self.copy_is_made(id, bytes),
            Err(reason) => {
                let _ = blocking(|| file.set_len(0));
                self.copy_failed(id, reason);
            }
        }
    }
}
