//! A disk copied to a file as it is at one moment, while the guest runs.
//!
//! In rounds under the log of what is written, as for a migration, which [`decide`] ends; then the guest stands still for
//! what is left. Where the file system lets files share their blocks, that takes the rounds' place.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use super::snapshot::Round;
use super::{Machine, MachineError, RunState};
use crate::stream::PAGE;
use crate::stream::converge::{Decision, Policy, Standing, decide};
use crate::virtio::block::{DiskCopier, Finish};

/// Copied at a time; whoever owns the machine looks after it in between.
const PIECE: usize = 1 << 20;
/// So many of the first are told of.
const ROUNDS: usize = 64;

/// Why there is no copy. The guest is as it was.
#[derive(Debug, thiserror::Error)]
pub enum DiskCopyError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the machine has no disk {index} in a file")]
    NoDisk { index: usize },
    #[error("make the copy's file as large as the disk")]
    Begin(#[source] crate::virtio::block::DiskFileError),
    #[error("copy the disk")]
    Copy(#[from] io::Error),
    #[error("the machine has ended meanwhile")]
    Over,
    #[error(
        "the guest writes faster than its disk is copied, and would stand still for more than {} s",
        longest.as_secs_f32()
    )]
    Late { longest: Duration },
}

/// What a copy took.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskCopyReport {
    /// Of the disk.
    pub bytes: u64,
    /// It shares its blocks with the disk.
    pub shared: bool,
    /// While the guest ran, the first of all that was there.
    pub rounds: Vec<Round>,
    /// Pages that were left for the pause.
    pub last: u64,
    /// How long the guest stood still; nothing, if it did anyway.
    pub pause: Duration,
    pub whole: Duration,
}

/// A disk that is being copied, beside its machine. Dropped, it is not any more.
#[derive(Debug)]
pub struct DiskCopying {
    copier: DiskCopier,
    policy: Policy,
    shares: bool,
    began: Instant,
    round: Round,
    round_began: Instant,
    /// What the best round left, and how many since left no less.
    least: Option<u64>,
    stalled: u32,
    report: DiskCopyReport,
}

impl Machine {
    /// Begins to copy a disk of the configuration to `file`, whose content goes. One copy at a time, and none of a
    /// machine that is being sent.
    pub fn copy_disk(
        &self,
        index: usize,
        file: &File,
        policy: Policy,
    ) -> Result<DiskCopying, DiskCopyError> {
        let name = self.disks().get(index);
        let device = name.and_then(|name| self.devices.iter().find(|it| it.id() == name));
        let disk = device.and_then(|device| device.disk());
        let disk = disk.ok_or(DiskCopyError::NoDisk { index })?;
        let mut copier = DiskCopier::begin(&disk, file).map_err(DiskCopyError::Begin)?;
        // Once without a pause: it says whether there is such a thing, and has the storage do most of it now.
        let shares = copier.share()?;
        let report = DiskCopyReport {
            bytes: copier.bytes(),
            ..DiskCopyReport::default()
        };
        Ok(DiskCopying {
            copier,
            policy,
            shares,
            began: Instant::now(),
            round: NOTHING,
            round_began: Instant::now(),
            least: None,
            stalled: 0,
            report,
        })
    }

    /// The guest stands still for `work` and no longer, if it runs; how long that was.
    fn while_at_rest<T>(
        &mut self,
        work: impl FnOnce() -> T,
    ) -> Result<(T, Duration), MachineError> {
        if self.state != RunState::Running {
            return Ok((work(), Duration::ZERO));
        }
        let began = Instant::now();
        if let Err(error) = self.rest() {
            self.run_on(&error);
            return Err(error);
        }
        let done = work();
        if let Err(error) = self.run() {
            self.run_on(&error);
            return Err(error);
        }
        Ok((done, began.elapsed()))
    }
}

const NOTHING: Round = Round {
    pages: 0,
    took: Duration::ZERO,
};

impl DiskCopying {
    /// Copies some more; what it took, once all of it is durable.
    ///
    /// # Errors
    /// There will be no copy; the file has no content that means anything.
    pub fn advance(
        &mut self,
        machine: &mut Machine,
    ) -> Result<Option<DiskCopyReport>, DiskCopyError> {
        if !matches!(machine.state, RunState::Running | RunState::Paused) {
            return Err(DiskCopyError::Over);
        }
        if self.shares {
            let (shared, pause) = machine.while_at_rest(|| self.copier.share())?;
            self.shares = false;
            if shared? {
                self.report.shared = true;
                return self.end(pause);
            }
        }
        if let Some(pages) = self.copier.some(PIECE)? {
            self.round.pages += pages;
            return Ok(None);
        }
        // Not in the pause.
        self.copier.settle()?;
        self.round.took = self.round_began.elapsed();
        if machine.state == RunState::Running && self.after_round() == Decision::Again {
            return Ok(None);
        }
        let longest = self.policy.longest;
        let (finish, pause) = machine.while_at_rest(|| self.copier.finish(longest))?;
        match finish? {
            Finish::Whole(last) => self.report.last += last,
            Finish::Late => return Err(DiskCopyError::Late { longest }),
        }
        self.end(pause)
    }

    fn after_round(&mut self) -> Decision {
        let round = std::mem::replace(&mut self.round, NOTHING);
        let left = self.copier.next_round() * PAGE as u64;
        self.round_began = Instant::now();
        let rate =
            u128::from(round.pages) * PAGE as u128 * 1_000_000 / round.took.as_micros().max(1);
        self.stalled = match self.least {
            Some(least) if left >= least - least / 8 => self.stalled + 1,
            _ => 0,
        };
        self.least = Some(self.least.map_or(left, |least| least.min(left)));
        if self.report.rounds.len() < ROUNDS {
            self.report.rounds.push(round);
        }
        decide(
            &self.policy,
            &Standing {
                elapsed: self.began.elapsed(),
                left,
                rate: u64::try_from(rate).unwrap_or(u64::MAX),
                stalled: self.stalled,
            },
        )
    }

    fn end(&mut self, pause: Duration) -> Result<Option<DiskCopyReport>, DiskCopyError> {
        self.copier.settle()?;
        self.report.pause = pause;
        self.report.whole = self.began.elapsed();
        Ok(Some(std::mem::take(&mut self.report)))
    }
}
