//! Suspend, and going on from it: where the guest's memory is, and who may believe it, at every moment.
//!
//! The record's `kept` says that the file holds the guest, and that it has not run since. It is set once the
//! file is on its disk under its name, and cleared, on the disk, before a process that was made from it gets
//! its `Go`: memory from before the guest's last write to its disks must never run on them. A crash between the
//! two costs the memory, as a loss of power would, and nothing else.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use fractus_agent_api::decision::Step;
use tokio::time::Instant;
use uuid::Uuid;

use super::steps::START;
use super::{AGAIN, Actor, Over, Phase, Woken, blocking};
use crate::machine::process::launch::most_kept;
use crate::machine::process::{Command, Launcher, MemoryFile, Process, ProcessError};
use crate::machine::record::{Kept, Record};

/// Memory is written and read at least as fast as this; a host that is slower than that is one that hangs.
const MIB_A_SECOND: u64 = 8;

impl<L: Launcher> Actor<L> {
    /// The guest is stopped and its memory kept; its process is ended by the next step.
    pub(super) async fn suspend(&mut self) -> Result<(), Over> {
        if self.failed.is_some() {
            self.publish();
            return self.wait(None).await.map(drop);
        }
        if !self.devices.are_known() {
            return self.wait(Some(Instant::now() + AGAIN)).await.map(drop);
        }
        self.interrupted |= self.phase == Phase::Running;
        let path = self.paths.new_memory();
        let made = self.to_be_kept().and_then(|kept| {
            let file = blocking(|| create(&path));
            let both = file.and_then(|file| Ok((kept, file.try_clone()?, file)));
            both.map_err(|error| format!("{}: {error}", path.display()))
        });
        let (kept, file, ours) = match made {
            Ok(made) => made,
            Err(reason) => {
                self.remove_memory();
                self.fail(reason);
                return Ok(());
            }
        };
        let attempt = Uuid::new_v4();
        let failure = match self.attempt(attempt, file, kept.most_mib).await? {
            Attempt::Written => match self.keep(&path, kept) {
                Ok(()) => return Ok(()),
                Err(reason) => Some(reason),
            },
            Attempt::Failed(reason) => Some(reason),
            Attempt::Void => None,
        };
        // Whoever has it open still has nothing of it.
        let _ = blocking(|| ours.set_len(0));
        self.remove_memory();
        if let Some(reason) = failure {
            self.fail(format!("the guest was not suspended: {reason}"));
            if self.interrupted {
                self.have_it_go_on().await;
            }
        }
        Ok(())
    }

    async fn attempt(&mut self, attempt: Uuid, file: File, most_mib: u64) -> Result<Attempt, Over> {
        let request_id = self.record.request_id.clone();
        let by = Instant::now() + (self.surroundings.memory_takes)(most_mib);
        let Some(process) = &mut self.process else {
            return Ok(Attempt::Void);
        };
        let to = MemoryFile {
            file,
            most: most_kept(most_mib),
            compression: self.surroundings.suspend_compression,
        };
        let told = process.suspend(attempt, to, request_id.as_deref());
        match told.await {
            Ok(()) => {}
            Err(error @ (ProcessError::Mute | ProcessError::Control(_))) => {
                tracing::warn!(machine = %self.record.id, %error, "not told to suspend");
                self.wait(Some(Instant::now() + AGAIN)).await?;
                return Ok(Attempt::Void);
            }
            Err(error) => return Ok(Attempt::Failed(error.to_string())),
        }
        let meetings = self.meetings;
        loop {
            if let Some((_, what)) = self.suspended.take_if(|(of, _)| *of == attempt) {
                return Ok(match what {
                    Ok(()) => Attempt::Written,
                    Err(reason) => Attempt::Failed(reason),
                });
            }
            // A newer intent may want something else, the guest may end, and an answer may be lost.
            let over = self.process.is_none() || self.meetings != meetings;
            if over || self.next() != Step::Suspend {
                return Ok(Attempt::Void);
            }
            if self.wait(Some(by)).await? == Woken::Deadline {
                let reason = "its memory was not written in time".to_owned();
                return Ok(Attempt::Failed(reason));
            }
        }
    }

    /// From here on the file counts, and the process does not.
    fn keep(&mut self, path: &Path, kept: Kept) -> Result<(), String> {
        blocking(|| rename(path, &self.paths.memory())).map_err(|error| error.to_string())?;
        let record = self.paths.record();
        self.record.kept = Some(kept);
        if let Err(error) = blocking(|| self.record.write(&record)) {
            // Whoever reads it next must not find that it does count.
            let found = blocking(|| Record::read(&record));
            if !found.is_ok_and(|found| found.kept.is_some()) {
                self.record.kept = None;
                return Err(error.to_string());
            }
        }
        self.failed = None;
        tracing::info!(machine = %self.record.id, "its memory is kept");
        self.publish();
        Ok(())
    }

    /// It may stand still, or will once its memory has been written.
    async fn have_it_go_on(&mut self) {
        let Some(process) = &mut self.process else {
            return;
        };
        if let Err(error) = process.tell(Command::Resume, None).await {
            tracing::warn!(machine = %self.record.id, %error, "not told to go on");
        }
    }

    /// Waits until the process is made of what was kept, which is kept no more then. False: nothing goes on, and
    /// what was kept still is.
    pub(super) async fn spend_kept(&mut self) -> Result<bool, Over> {
        let age = self.record.intent.age();
        let most_mib = self.record.kept.as_ref().map_or(0, |kept| kept.most_mib);
        let by = Instant::now() + (self.surroundings.memory_takes)(most_mib);
        while !self.ready && self.process.is_some() {
            let late = self.wait(Some(by)).await? == Woken::Deadline;
            if late || self.record.intent.age() != age {
                self.kill().await;
                if late {
                    self.fail("the guest's memory was not read in time".to_owned());
                }
                return Ok(false);
            }
        }
        if self.process.is_none() {
            return Ok(false);
        }
        let kept = self.record.kept.take();
        if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            self.record.kept = kept;
            self.kill().await;
            self.fail(error.to_string());
            return Ok(false);
        }
        Ok(true)
    }

    /// Nothing was made of it after all.
    pub(super) async fn keep_again(&mut self, kept: Kept) {
        self.record.kept = Some(kept);
        self.persist();
        self.kill().await;
    }

    /// The guest will not go on.
    pub(super) fn forget_kept(&mut self) {
        self.record.kept = None;
        self.persist();
        self.remove_memory();
    }

    /// Of which the record does not speak.
    pub(super) fn remove_memory(&self) {
        if self.record.kept.is_some() {
            return;
        }
        for path in [self.paths.memory(), self.paths.new_memory()] {
            match blocking(|| fs::remove_file(&path)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "memory of before is left");
                }
                _ => {}
            }
        }
    }
}

/// What became of an attempt to write the guest.
enum Attempt {
    Written,
    Failed(String),
    /// Nobody wants it any more, or nobody knows: if it is wanted still, there will be another.
    Void,
}

/// As long as it may take to write so many MiB, or to read them.
pub fn memory_takes(most_mib: u64) -> Duration {
    START + Duration::from_secs((most_kept(most_mib) >> 20) / MIB_A_SECOND)
}

/// Anew, for nobody else to read.
pub(super) fn create(path: &Path) -> std::io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path)
}

/// On the disk when this returns.
pub(super) fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::rename(from, to)?;
    match to.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}
