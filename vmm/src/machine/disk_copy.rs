//! A disk copied to a file as it is at one moment, while the guest runs.
//!
//! In rounds under the log of what is written, as for a migration, which [`decide`] ends; then the guest stands still for
//! what is left. Where the file system lets files share their blocks, that takes the rounds' place, or the first one's
//! where it takes longer than a guest may stand still.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use super::snapshot::Round;
use super::{Machine, MachineError, RunState, SnapshotError};
use crate::stream::PAGE;
use crate::stream::converge::{AtLimit, Decision, Policy, Standing, decide};
use crate::virtio::block::{DiskCopier, Finish};

/// Copied at a time; whoever owns the machine looks after it in between.
const PIECE: usize = 1 << 20;
/// Bytes between two looks at what is free.
const LOOK_EVERY: u64 = 64 << 20;
/// So many rounds in a row that left no less than the best before them: the guest writes faster than it is copied.
const STALLED: u32 = 3;
/// So many of the first are told of.
const ROUNDS: usize = 64;

/// Why there is no copy. The guest is as it was.
#[derive(Debug, thiserror::Error)]
pub enum DiskCopyError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the machine has no disk {index} in a file")]
    NoDisk { index: usize },
    #[error(
        "disk {index} is being copied or sent already, and what its guest writes can be told to one only; try again after that"
    )]
    Logged { index: usize },
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
    #[error("{free} bytes are free where the copy is, and {reserve} are to stay so")]
    NoRoom { free: u64, reserve: u64 },
}

/// How a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskCopyPolicy {
    /// When the guest is stopped, for how long, and what becomes of one that writes too fast. The limit counts from the
    /// end of the first round, which takes as long as the disk is large.
    pub converge: Policy,
    /// Bytes that stay free where the copy is.
    pub reserve: u64,
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
    policy: DiskCopyPolicy,
    shares: bool,
    began: Instant,
    /// When the first round was over.
    seen_whole: Option<Instant>,
    /// Since what is free was last looked at.
    unlooked: u64,
    round: Round,
    round_began: Instant,
    /// What the best round left, and how many since left no less.
    least: Option<u64>,
    stalled: u32,
    report: DiskCopyReport,
}

impl Machine {
    /// Begins to copy a disk of the configuration to `file`, whose content goes.
    ///
    /// # Errors
    /// There is no such disk, the file cannot be one, or the disk is being copied or sent already: then the file is as it
    /// was.
    pub fn copy_disk(
        &self,
        index: usize,
        file: &File,
        policy: DiskCopyPolicy,
    ) -> Result<DiskCopying, DiskCopyError> {
        let name = self.disks().get(index);
        let device = name.and_then(|name| self.devices.iter().find(|it| it.id() == name));
        let disk = device.and_then(|device| device.disk());
        let disk = disk.ok_or(DiskCopyError::NoDisk { index })?;
        // Before anything of the file is touched.
        let log = disk.log().ok_or(DiskCopyError::Logged { index })?;
        let mut copier = DiskCopier::begin(log, file).map_err(DiskCopyError::Begin)?;
        // Once without a pause: it says whether there is such a thing and how long it takes, and has the storage do most
        // of it now.
        let began = Instant::now();
        let shares = match sharing(copier.share()?, began.elapsed(), &policy.converge) {
            Sharing::InPause => true,
            Sharing::AsFirstRound => {
                copier.has_shared();
                false
            }
            Sharing::None => false,
        };
        let report = DiskCopyReport {
            bytes: copier.bytes(),
            ..DiskCopyReport::default()
        };
        Ok(DiskCopying {
            copier,
            policy,
            shares,
            began,
            seen_whole: None,
            unlooked: LOOK_EVERY,
            round: NOTHING,
            round_began: Instant::now(),
            least: None,
            stalled: 0,
            report,
        })
    }

    /// The guest stands still for `work` and no longer, if it runs; how long that was. The work is told when that has
    /// been for too long: its devices, too, must have come to rest by then.
    fn while_at_rest<T>(
        &mut self,
        longest: Duration,
        work: impl FnOnce(Instant) -> T,
    ) -> Result<(T, Duration), MachineError> {
        let began = Instant::now();
        let until = began + longest;
        if self.state != RunState::Running {
            return Ok((work(until), Duration::ZERO));
        }
        self.expect_whole("copied")?;
        if let Err(error) = self.rest_by(until) {
            self.run_on(&error);
            return Err(error);
        }
        let done = work(until);
        if let Err(error) = self.run() {
            self.run_on(&error);
            return Err(error);
        }
        Ok((done, began.elapsed()))
    }
}

/// One that would not be waited for at the limit need not be waited for until then.
fn or_give_up(policy: &Policy, standing: &Standing) -> Decision {
    match decide(policy, standing) {
        Decision::Again if policy.at_limit == AtLimit::GiveUp && standing.stalled >= STALLED => {
            Decision::GiveUp
        }
        decision => decision,
    }
}

/// What a first clone of the disk's blocks, beside the running guest, is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// There is no such thing.
    None,
    /// The next will be as fast, and can be had while the guest stands still.
    InPause,
    /// Nobody can wait for another; what was written since is copied.
    AsFirstRound,
}

fn sharing(is_shared: bool, took: Duration, policy: &Policy) -> Sharing {
    match is_shared {
        false => Sharing::None,
        true if took < policy.downtime => Sharing::InPause,
        true => Sharing::AsFirstRound,
    }
}

const NOTHING: Round = Round {
    pages: 0,
    left: 0,
    throttled: 0,
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
        let longest = self.policy.converge.longest;
        if self.shares {
            let (shared, pause) = machine.while_at_rest(longest, |_| self.copier.share())?;
            self.shares = false;
            if shared? {
                self.report.shared = true;
                return self.end(pause);
            }
        }
        self.look()?;
        if let Some(pages) = self.copier.some(PIECE)? {
            self.round.pages += pages;
            self.unlooked += pages * PAGE as u64;
            return Ok(None);
        }
        // Only the copying is to be done again in the pause.
        self.round.took = self.round_began.elapsed();
        self.copier.settle()?;
        if machine.state == RunState::Paused {
            // Nobody writes, and so nothing has to be waited for.
            if self.copier.next_round() > 0 {
                return Ok(None);
            }
            return self.end(Duration::ZERO);
        }
        match self.after_round() {
            // No copy of a disk slows its guest down: that is not in its policy.
            Decision::Again | Decision::Throttle { .. } => return Ok(None),
            Decision::GiveUp => return Err(DiskCopyError::Late { longest }),
            // Nothing of a disk can follow.
            Decision::Stop | Decision::PostCopy => {}
        }
        let (finish, pause) = machine.while_at_rest(longest, |until| self.copier.finish(until))?;
        match finish? {
            Finish::Whole(last) => self.report.last += last,
            Finish::Late => return Err(DiskCopyError::Late { longest }),
        }
        self.end(pause)
    }

    /// Copies what there is while the guest runs, and what it writes meanwhile, until what is left is little enough.
    fn come_near(&mut self) -> Result<(), DiskCopyError> {
        // Where blocks are shared nothing has to be copied first.
        while !self.shares {
            match self.one_round()? {
                Decision::Again | Decision::Throttle { .. } => {}
                Decision::Stop | Decision::PostCopy => break,
                Decision::GiveUp => {
                    let longest = self.policy.converge.longest;
                    return Err(DiskCopyError::Late { longest });
                }
            }
        }
        Ok(())
    }

    /// A whole one.
    fn one_round(&mut self) -> Result<Decision, DiskCopyError> {
        loop {
            self.look()?;
            match self.copier.some(PIECE)? {
                Some(pages) => {
                    self.round.pages += pages;
                    self.unlooked += pages * PAGE as u64;
                }
                None => break,
            }
        }
        self.round.took = self.round_began.elapsed();
        self.copier.settle()?;
        Ok(self.after_round())
    }

    /// What is left, of a guest that stands still until then.
    fn finish(&mut self, until: Instant) -> Result<(), DiskCopyError> {
        if self.shares && self.copier.share()? {
            self.report.shared = true;
            return Ok(());
        }
        match self.copier.finish(until)? {
            Finish::Whole(last) => self.report.last = last,
            Finish::Late => {
                let longest = self.policy.converge.longest;
                return Err(DiskCopyError::Late { longest });
            }
        }
        Ok(())
    }

    /// Others want room on that storage, too.
    fn look(&mut self) -> Result<(), DiskCopyError> {
        if self.unlooked < LOOK_EVERY {
            return Ok(());
        }
        self.unlooked = 0;
        let (free, reserve) = (self.copier.free()?, self.policy.reserve);
        match free < reserve {
            true => Err(DiskCopyError::NoRoom { free, reserve }),
            false => Ok(()),
        }
    }

    fn after_round(&mut self) -> Decision {
        let round = Round {
            left: self.copier.next_round(),
            ..std::mem::replace(&mut self.round, NOTHING)
        };
        let left = round.left * PAGE as u64;
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
        let seen_whole = *self.seen_whole.get_or_insert(self.round_began);
        let standing = Standing {
            elapsed: seen_whole.elapsed(),
            left,
            // Nobody is slowed down for it.
            sent: 0,
            rate: u64::try_from(rate).unwrap_or(u64::MAX),
            stalled: self.stalled,
            throttled: 0,
        };
        or_give_up(&self.policy.converge, &standing)
    }

    fn end(&mut self, pause: Duration) -> Result<Option<DiskCopyReport>, DiskCopyError> {
        self.copier.settle()?;
        self.report.pause = pause;
        self.report.whole = self.began.elapsed();
        Ok(Some(std::mem::take(&mut self.report)))
    }
}

/// Disks that are copied as they are when a snapshot is taken ([`Machine::snapshot_with_disks`]).
pub(super) struct Disks<'a> {
    copies: &'a mut [DiskCopying],
    /// Of the guest: it is not to stand still for long.
    runs: bool,
}

/// However long it takes.
const AGES: Duration = Duration::from_secs(86_400 * 365);

impl<'a> Disks<'a> {
    /// With all that is there, if the guest runs: so that little is left when it stands still.
    pub fn of(copies: &'a mut [DiskCopying], runs: bool) -> Result<Self, SnapshotError> {
        let mut disks = Disks { copies, runs };
        if runs {
            disks.each(DiskCopying::come_near)?;
        }
        Ok(disks)
    }

    /// What was written while memory was copied.
    pub fn again(&mut self) -> Result<(), SnapshotError> {
        self.each(|disk| match disk.shares {
            true => Ok(()),
            false => disk.one_round().map(drop),
        })
    }

    /// They are whole as they are now, if the guest stands still.
    pub fn finish(&mut self) -> Result<(), SnapshotError> {
        let (began, runs) = (Instant::now(), self.runs);
        self.each(|disk| {
            let longest = match runs {
                true => disk.policy.converge.longest,
                false => AGES,
            };
            disk.finish(began + longest)
        })
    }

    /// They are durable.
    pub fn reports(&mut self) -> Result<Vec<DiskCopyReport>, SnapshotError> {
        let mut reports = Vec::new();
        self.each(|disk| {
            // It is whole: there is a report.
            reports.extend(disk.end(Duration::ZERO)?);
            Ok(())
        })?;
        Ok(reports)
    }

    fn each(
        &mut self,
        mut what: impl FnMut(&mut DiskCopying) -> Result<(), DiskCopyError>,
    ) -> Result<(), SnapshotError> {
        for (index, disk) in self.copies.iter_mut().enumerate() {
            what(disk).map_err(|source| SnapshotError::Disk {
                index,
                source: Box::new(source),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const POLICY: Policy = Policy {
        downtime: Duration::from_millis(500),
        longest: Duration::from_secs(1),
        limit: Duration::from_secs(1800),
        at_limit: AtLimit::GiveUp,
        throttle: None,
    };

    #[test]
    fn blocks_are_shared_within_the_pause_only_where_that_is_known_to_be_short() {
        assert_eq!(sharing(false, MS, &POLICY), Sharing::None);
        assert_eq!(sharing(true, 499 * MS, &POLICY), Sharing::InPause);
        assert_eq!(sharing(true, 500 * MS, &POLICY), Sharing::AsFirstRound);
    }

    #[test]
    fn one_that_writes_too_fast_is_never_stopped_for_it() {
        let mut standing = Standing {
            elapsed: Duration::ZERO,
            left: 1 << 30,
            sent: 0,
            rate: 100 << 20,
            stalled: 0,
            throttled: 0,
        };
        assert_eq!(or_give_up(&POLICY, &standing), Decision::Again);
        standing.stalled = STALLED;
        assert_eq!(or_give_up(&POLICY, &standing), Decision::GiveUp);
        (standing.stalled, standing.elapsed) = (0, POLICY.limit);
        assert_eq!(or_give_up(&POLICY, &standing), Decision::GiveUp);
        standing.left = 40 << 20;
        assert_eq!(or_give_up(&POLICY, &standing), Decision::Stop);
    }
}
