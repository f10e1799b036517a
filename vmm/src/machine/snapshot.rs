//! A machine written to a file while its guest runs, and one made from such a file.
//!
//! Memory is copied under the log of writes; what was written meanwhile is copied again, until little is left. Then the
//! guest stands still: its state is saved and the pages that are left are copied to a buffer, which goes to the file
//! when the guest runs again. So neither the size of memory nor a slow file is in the pause; but they are where
//! vhost-net writes to memory. A guest that writes faster than is copied is slowed down until what is left fits the buffer
//! ([`pace`]), and no snapshot is made of one that does so all the same, but where a long pause is asked for.
//!
//! Disks may be copied as they are at the same moment ([`Machine::snapshot_with_disks`]): in rounds beside those of memory,
//! and what is left of them is copied in the same pause.
//!
//! A snapshot may have only what was written since another ([`Scope`]), which it is laid over when it is read; and each may
//! be compressed ([`Compression`]), whatever those are that it is laid over.
//!
//! A machine is made from the file in two ways ([`Loading`]): memory is read first, or mapped and read when it is
//! touched.

mod copy;
mod log;
mod pace;

use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use uuid::Uuid;

use super::disk_copy::{DiskCopyError, DiskCopyReport, DiskCopying, Disks};
use super::state::STATE_VERSION;
use super::{BuildError, Machine, MachineError, MachineState, RunState, build};
use crate::config::{MachineConfig, MachineFiles, MemoryConfig, PageSize};
use crate::kvm::KvmError;
use crate::memory::{GuestMemory, MemoryError, PageSet};
use crate::stream::snapshot::{self, Compression, Snapshot, SnapshotWriter};
use crate::stream::{BLOCK, Mask, Opening, PAGE, StreamError, Totals, malformed};
use crate::thread::ThreadHook;

use copy::Copy;
pub(super) use log::{Ledger, WriteLog};
use pace::{MOST_KEPT, Next};

/// Why a machine could not be written, or made from what was. A guest that ran runs on.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the guest has reset, ended or broken itself meanwhile")]
    Over,
    #[error("it is laid over the snapshot {base}, which was not loaded before it")]
    Base { base: Uuid },
    #[error("nobody has taken down what was written since a snapshot: a whole one is to be made")]
    Untracked,
    #[error("what the machine writes is told to somebody else: it is being sent")]
    Logged,
    #[error(
        "the machine's memory is still read from that very file: it has to be written to another"
    )]
    Onto,
    #[error(
        "that file has the snapshot {base}, which this one would be laid over: it has to be written to another"
    )]
    OntoBase { base: Uuid },
    #[error(
        "memory is not mapped from a file that could be written to: it has to be open for reading only"
    )]
    Writable,
    #[error(
        "the snapshot's memory is compressed: it can be read, all of it and first, and not be mapped"
    )]
    Compressed,
    #[error("some of the machine's memory is elsewhere still")]
    Arriving,
    #[error(
        "the guest writes to its memory faster than the file takes it, also when it is slowed down: a faster disk, a quieter hour or a long pause is needed"
    )]
    TooBusy,
    #[error("read the guest's memory")]
    Read(#[source] std::io::Error),
    #[error("copy disk {index} as it is at that moment")]
    Disk {
        /// In the order of the copies.
        index: usize,
        source: Box<DiskCopyError>,
    },
    #[error("the machine's state cannot be {action}")]
    State {
        action: &'static str,
        source: postcard::Error,
    },
}

/// How memory comes from a snapshot's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loading {
    /// All of it is read and checked first; the file is not needed afterwards.
    Eager,
    /// Pages are mapped, read when they are touched, and copied when they are written to: nothing is read first, and
    /// machines of one file share what they have not written to.
    ///
    /// The price: no checksum of a page is looked at ([`Snapshot::check`] does that, before or meanwhile), and a
    /// snapshot of such a machine says so until it was reset ([`Snapshot::is_unchecked`]). The file has
    /// to stay as it is for as long as any such machine lives, or until it was reset: what is written to it changes
    /// under the guest, and a truncation of it, or a disk that cannot be read, ends the process by SIGBUS. So it is for
    /// who owns it: a file that was unlinked, or is nobody's but root's, and open for reading only
    /// ([`SnapshotError::Writable`]: a process that a guest has taken over could write to the memory of others else).
    /// Memory of huge pages (hugetlbfs) and hot memory are
    /// read first all the same; pages that are copied are of 4 KiB, also in a machine of transparent ones. What is
    /// compressed cannot be mapped ([`SnapshotError::Compressed`]).
    Lazy,
}

/// What of memory a snapshot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All of it.
    Whole,
    /// All of it; and what is written from then on is taken down, so that the next may be [`Scope::Since`]. That costs
    /// the guest as much as being migrated: its first write to each page after each snapshot (2 us on kvm-pvm). It ends
    /// with a migration, a network that vhost-net serves, a snapshot of another scope onto a file that the next would
    /// be laid over, or [`Machine::stop_tracking`].
    Tracked,
    /// What was written to since the last one that was tracked or was `Since`, over which it is to be laid: pages, not
    /// blocks. It is tracked itself.
    Since,
}

/// What is written, and how. Of a [`Scope`] alone: not compressed, and without a long pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotOptions {
    pub scope: Scope,
    pub compression: Compression,
    /// A guest that writes faster than the file takes it, also when it is slowed down, stands still for as long as the rest
    /// takes; else there is no snapshot of it ([`SnapshotError::TooBusy`]).
    pub long_pause: bool,
}

impl From<Scope> for SnapshotOptions {
    fn from(scope: Scope) -> Self {
        SnapshotOptions {
            scope,
            compression: Compression::None,
            long_pause: false,
        }
    }
}

/// What a snapshot took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotReport {
    pub id: Uuid,
    pub totals: Totals,
    /// While the guest ran, the first of all memory.
    pub rounds: Vec<Round>,
    /// Pages that were left for the pause.
    pub last: u64,
    /// Of the disks that were copied as they were at that moment; the pause is one for all.
    pub disks: Vec<DiskCopyReport>,
    /// How long the guest stood still; nothing, if it did anyway.
    pub pause: Duration,
    pub whole: Duration,
}

impl SnapshotReport {
    /// How long the guest was slowed down, and to what share of the time its vCPUs were kept out of it at most, in percent;
    /// zero: it was not.
    pub fn slowed(&self) -> (Duration, u8) {
        let slow = self.rounds.iter().filter(|round| round.throttled > 0);
        let took = slow.clone().map(|round| round.took).sum();
        (took, slow.map(|round| round.throttled).max().unwrap_or(0))
    }
}

/// One copy of what had been written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    pub pages: u64,
    /// Pages that had been written to meanwhile.
    pub left: u64,
    /// Percent of that time that vCPUs were kept out of the guest.
    pub throttled: u8,
    pub took: Duration,
}

impl Machine {
    /// Writes the machine to `file`, as it is at one moment; a guest that runs stands still for that moment only. The
    /// file is on its disk when this returns. Of the disks nothing is in it; `owner` is for who opens it
    /// ([`Snapshot::owner`]).
    ///
    /// # Errors
    /// The machine neither runs nor is paused, or it runs while it is being sent; the guest ends or resets itself
    /// meanwhile, or writes too fast, or something cannot be read or written; what is in the file then is taken for a
    /// snapshot by nobody, and the guest runs on, as fast as ever.
    pub fn snapshot(&mut self, file: File, owner: &[u8]) -> Result<SnapshotReport, SnapshotError> {
        self.snapshot_of(Scope::Whole, file, owner)
    }

    /// The same, of a part of memory or compressed.
    ///
    /// # Errors
    /// Likewise; with [`Scope::Since`] there has to be one before it, in another file, and with it and
    /// [`Scope::Tracked`] nothing may write to memory that is in no log (vhost-net). What is to be in the next one is
    /// not lost by an error.
    pub fn snapshot_of(
        &mut self,
        options: impl Into<SnapshotOptions>,
        file: File,
        owner: &[u8],
    ) -> Result<SnapshotReport, SnapshotError> {
        self.snapshot_with_disks(options.into(), file, owner, &mut [])
    }

    /// The same, and `disks`, which were begun to be copied ([`Machine::copy_disk`]), are copied as they are at the very
    /// moment: a machine that is made of them all goes on as this one did. The guest stands still for what is left of
    /// them as well, for as long as the most patient of their policies says at most.
    ///
    /// # Errors
    /// Likewise; of the copies none means anything then, also if it is the snapshot that failed.
    pub fn snapshot_with_disks(
        &mut self,
        options: SnapshotOptions,
        file: File,
        owner: &[u8],
        disks: &mut [DiskCopying],
    ) -> Result<SnapshotReport, SnapshotError> {
        let scope = options.scope;
        let began = Instant::now();
        if self.state != RunState::Paused {
            self.expect(RunState::Running, "written to a snapshot")?;
        }
        if !self.is_whole() {
            return Err(SnapshotError::Arriving);
        }
        // The first thing that is done to the file is that it is emptied.
        if self.memory.is_made_of(&file)? {
            return Err(SnapshotError::Onto);
        }
        let is_needed = |id: &Uuid| self.ledger.as_ref().is_some_and(|it| it.needs(*id));
        match snapshot::id_in(&file).filter(is_needed) {
            Some(base) if scope == Scope::Since => return Err(SnapshotError::OntoBase { base }),
            // It will be gone, and whatever is laid over it nothing.
            Some(_) => self.stop_tracking(),
            None => {}
        }
        let mut ledger = self.ledger(scope)?;
        let base = match (scope, &ledger) {
            (Scope::Since, Some(ledger)) => ledger.base(),
            _ => None,
        };
        let disks = Disks::of(disks, self.state == RunState::Running);
        let written = disks.and_then(|mut disks| {
            self.write(file, options, owner, base, (ledger.as_mut(), &mut disks))
        });
        if let (Ok(report), Some(ledger)) = (&written, &mut ledger)
            && scope != Scope::Whole
        {
            ledger.is_based_on(report.id, base);
        }
        // One that was begun for this snapshot alone ends with it.
        self.ledger = ledger.filter(|ledger| ledger.base().is_some());
        let mut report = written?;
        report.whole = began.elapsed();
        Ok(report)
    }

    /// What is written to is not taken down any more; the next snapshot is a whole one.
    pub fn stop_tracking(&mut self) {
        self.ledger = None;
    }

    /// What takes down what is written from here on, and perhaps has since a snapshot; none: nobody writes meanwhile,
    /// or nobody can tell.
    fn ledger(&mut self, scope: Scope) -> Result<Option<Ledger>, SnapshotError> {
        let before = self.ledger.take();
        if self.devices.iter().any(|device| device.writes_unseen()) {
            return match scope {
                Scope::Whole => Ok(None),
                Scope::Tracked | Scope::Since => Err(SnapshotError::Untracked),
            };
        }
        match before {
            None if scope == Scope::Since => Err(SnapshotError::Untracked),
            None if scope == Scope::Whole && self.state == RunState::Paused => Ok(None),
            None => Ledger::begin(&self.vm, &self.memory).map(Some),
            before => Ok(before),
        }
    }

    fn write(
        &mut self,
        file: File,
        options: SnapshotOptions,
        owner: &[u8],
        base: Option<Uuid>,
        (ledger, disks): (Option<&mut Ledger>, &mut Disks<'_>),
    ) -> Result<SnapshotReport, SnapshotError> {
        let opening = Opening {
            id: Uuid::new_v4(),
            base,
            memory: self.memory.file_bytes()?,
            made_by: concat!("fractus-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let mut report = SnapshotReport {
            id: opening.id,
            totals: Totals::default(),
            rounds: Vec::new(),
            last: 0,
            disks: Vec::new(),
            pause: Duration::ZERO,
            whole: Duration::ZERO,
        };
        let mut copy = Copy::begin(
            self.memory.clone(),
            self.board.threads.clone(),
            SnapshotWriter::new(file, opening, options.compression)?,
        );
        let state = match (self.state, ledger) {
            (RunState::Paused, ledger) => {
                // First, since disks are written to the end for it: what is copied may go to theirs.
                let state = self.packed()?;
                disks.finish()?;
                report.last = copy.first(ledger)?;
                state
            }
            (_, Some(ledger)) => {
                let logs = (ledger, &mut *disks);
                let state = self.copy_running(&mut copy, &mut report, logs, options.long_pause);
                // Whatever came of it.
                self.vcpus.throttle(0);
                state?
            }
            // What nobody logs is copied when nobody writes any more.
            (_, None) => self.at_rest(&mut report, |machine, report| {
                let state = machine.packed()?;
                disks.finish()?;
                report.last = copy.first(None)?;
                Ok(state)
            })?,
        };
        // Before the snapshot is one.
        report.disks = disks.reports()?;
        report.totals = copy.finish(&state, owner)?;
        Ok(report)
    }

    /// A paused machine from a snapshot, on memory of its own, which comes as `loading` says. `here` says which of the
    /// host's CPUs and NUMA nodes it may use; what it had elsewhere, or a file that somebody made up, says nothing of
    /// that. The guest is told nothing: of several that go on from one file, each is to be told that it is another
    /// ([`Machine::change_generation`]).
    ///
    /// # Errors
    /// The snapshot is damaged, of another build or of huge pages that `here` has not, or this host cannot run it.
    /// Nothing of it is left.
    pub fn from_snapshot(
        snapshot: &Snapshot,
        here: &MachineConfig,
        files: MachineFiles,
        loading: Loading,
        hook: Option<ThreadHook>,
    ) -> Result<Machine, SnapshotError> {
        Machine::from_snapshots(&[snapshot], here, files, loading, hook)
    }

    /// The same from a whole snapshot and those that are laid over it, each over the one before ([`Scope::Since`]).
    /// These are read first, however the whole one comes.
    pub fn from_snapshots(
        chain: &[&Snapshot],
        here: &MachineConfig,
        files: MachineFiles,
        loading: Loading,
        hook: Option<ThreadHook>,
    ) -> Result<Machine, SnapshotError> {
        let (state, memory) = loaded(chain, here, loading)?;
        let mut machine = build::restore(state, memory, files, hook)?;
        machine.is_new_here = true;
        Ok(machine)
    }

    /// Names of the disks, in the order of the configuration, as [`Machine::detach`] takes them. One that was made
    /// from a snapshot has the same.
    pub fn disks(&self) -> &[String] {
        self.places.placement().disks()
    }

    /// The same of its networks.
    pub fn nets(&self) -> &[String] {
        self.places.placement().nets()
    }

    /// The form's version, then the state, for who knows no other form.
    fn packed(&self) -> Result<Vec<u8>, SnapshotError> {
        Ok(self.packed_at()?.1)
    }

    /// The same, and when the guest's clocks were read.
    pub(super) fn packed_at(&self) -> Result<(Duration, Vec<u8>), SnapshotError> {
        // What the guest has asked for and nobody has carried out is not in its state.
        if self.owes() {
            return Err(SnapshotError::Over);
        }
        let action = "packed";
        let mut bytes = STATE_VERSION.to_le_bytes().to_vec();
        let (read, state) = self.saved()?;
        let state = postcard::to_stdvec(&state)
            .map_err(|source| SnapshotError::State { action, source })?;
        bytes.extend(state);
        Ok((read, bytes))
    }

    /// Returns the state that goes with what `copy` has. Whoever calls it takes the vCPUs' share away.
    fn copy_running(
        &mut self,
        copy: &mut Copy,
        report: &mut SnapshotReport,
        (ledger, disks): (&mut Ledger, &mut Disks<'_>),
        long_pause: bool,
    ) -> Result<Vec<u8>, SnapshotError> {
        let mut written = None;
        loop {
            // Before memory's: what is written while they are settled is in that one.
            disks.again()?;
            let (round, mut rest) = self.round(copy, ledger, written.as_ref())?;
            report.rounds.push(round);
            let next = match self.board.requests.halting() {
                true => Next::Stop,
                false => pace::next(report.rounds.len(), report.slowed().0, &round),
            };
            match next {
                Next::Again => {}
                Next::Slow { percent } => self.vcpus.throttle(percent),
                Next::GiveUp if !long_pause => return Err(SnapshotError::TooBusy),
                Next::Stop | Next::GiveUp => {
                    let stopped = self.at_rest(report, |machine, report| {
                        let logs = (&mut *ledger, &mut *disks);
                        machine.rest_of_it(copy, logs, &mut rest, long_pause, report)
                    });
                    if let Some((state, kept)) = stopped? {
                        for (number, mask, pages) in &kept {
                            copy.amend(*number, *mask, pages)?;
                        }
                        return Ok(state);
                    }
                    // It wrote that much before it stood still.
                    let left = rest.count();
                    let slower = pace::slower(left, left, self.vcpus.throttled());
                    self.vcpus.throttle(slower.ok_or(SnapshotError::TooBusy)?);
                }
            }
            written = Some(rest);
        }
    }

    /// Copies what was written, at first all; what was written meanwhile.
    fn round(
        &self,
        copy: &mut Copy,
        ledger: &mut Ledger,
        written: Option<&PageSet>,
    ) -> Result<(Round, PageSet), SnapshotError> {
        let (began, throttled) = (Instant::now(), self.vcpus.throttled());
        let pages = match written {
            None => copy.first(Some(&mut *ledger))?,
            Some(written) => copy.again(written)?,
        };
        let took = began.elapsed();
        let rest = ledger.take()?;
        let round = Round {
            pages,
            left: rest.count(),
            throttled,
            took,
        };
        Ok((round, rest))
    }

    /// The guest stands still for as long as `body` takes.
    fn at_rest<T>(
        &mut self,
        report: &mut SnapshotReport,
        body: impl FnOnce(&Machine, &mut SnapshotReport) -> Result<T, SnapshotError>,
    ) -> Result<T, SnapshotError> {
        let began = Instant::now();
        if let Err(error) = self.rest() {
            self.run_on(&error);
            return Err(error.into());
        }
        self.state = RunState::Paused;
        let outcome = body(self, report);
        if let Err(error) = self.run() {
            self.run_on(&error);
            return Err(error.into());
        }
        report.pause += began.elapsed();
        outcome
    }

    /// What only a guest that stands still shows, and those pages that are left besides `rest`, which are in it then; none:
    /// they are too many.
    fn rest_of_it(
        &self,
        copy: &mut Copy,
        (ledger, disks): (&mut Ledger, &mut Disks<'_>),
        rest: &mut PageSet,
        long_pause: bool,
        report: &mut SnapshotReport,
    ) -> Result<Option<AtRest>, SnapshotError> {
        let state = self.packed()?;
        rest.join(&ledger.take()?);
        report.last = rest.count();
        let mut kept = Vec::new();
        if report.last <= MOST_KEPT || long_pause {
            disks.finish()?;
        }
        if report.last <= MOST_KEPT {
            for (number, mask) in rest.blocks() {
                kept.push((number, mask, read_pages(&self.memory, number, mask)?));
            }
        } else if long_pause {
            copy.again(rest)?;
        } else {
            return Ok(None);
        }
        // What is still to be written is written while it runs as fast as ever.
        self.vcpus.throttle(0);
        Ok(Some((state, kept)))
    }
}

/// All that a machine is made from, checked as far as it can be without KVM.
pub(super) fn loaded(
    chain: &[&Snapshot],
    here: &MachineConfig,
    loading: Loading,
) -> Result<(MachineState, GuestMemory), SnapshotError> {
    let mut below = None;
    for snapshot in chain {
        let opening = snapshot.opening();
        if opening.base != below {
            return Err(match opening.base {
                Some(base) => SnapshotError::Base { base },
                None => malformed("a whole snapshot, where one is laid over another").into(),
            });
        }
        below = Some(opening.id);
    }
    let (Some((first, over)), Some(last)) = (chain.split_first(), chain.last()) else {
        return Err(malformed("no snapshot at all").into());
    };
    let mut state = unpacked(last.state())?;
    state.take_place(here);
    let config = state.config();
    config.validate().map_err(BuildError::from)?;
    check_memory(config, here, first.opening().memory)?;
    let memory = GuestMemory::create_with(&config.memory, config.hot_memory.as_ref())?;
    fill(&memory, first, &config.memory, loading)?;
    for snapshot in over {
        snapshot.load(&memory)?;
        heed(&memory, snapshot);
    }
    Ok((state, memory))
}

/// Brings memory that is all zeros what the snapshot has of it.
fn fill(
    memory: &GuestMemory,
    snapshot: &Snapshot,
    config: &MemoryConfig,
    loading: Loading,
) -> Result<(), SnapshotError> {
    heed(memory, snapshot);
    let huge = matches!(config.pages, PageSize::Huge2MiB | PageSize::Huge1GiB);
    if loading == Loading::Eager || huge {
        return Ok(snapshot.load(memory)?);
    }
    let (file, at) = snapshot.placed_in().ok_or(SnapshotError::Compressed)?;
    let access =
        rustix::fs::fcntl_getfl(file).map_err(|errno| SnapshotError::Read(errno.into()))?;
    if access & OFlags::RWMODE != OFlags::RDONLY {
        return Err(SnapshotError::Writable);
    }
    let runs = snapshot.placed_below(config.bytes);
    let mut rest = memory.lay_over(config, file, at, &runs)?;
    // Hot memory is mapped twice, which a private mapping cannot be.
    rest.push(GuestMemory::hot_offset_of(config)..u64::MAX);
    Ok(snapshot.load_within(memory, &rest)?)
}

/// What a snapshot says of its bytes goes on in memory that is made of it, and in its snapshots.
fn heed(memory: &GuestMemory, snapshot: &Snapshot) {
    if snapshot.is_unchecked() {
        tracing::warn!("what this memory comes from was never checked, and may have been damaged");
        memory.mark_unchecked();
    }
}

/// What is saved says how much memory is made. It has to be as much as there is of it in the file; and huge pages, which
/// are taken from the host at once, are no more than were agreed.
fn check_memory(
    saved: &MachineConfig,
    here: &MachineConfig,
    found: u64,
) -> Result<(), StreamError> {
    let bytes = |config: &MachineConfig| {
        GuestMemory::file_bytes_of(&config.memory, config.hot_memory.as_ref())
    };
    let expected = bytes(saved);
    if found != expected {
        return Err(StreamError::Shape { expected, found });
    }
    let pages = saved.memory.pages;
    let huge = matches!(pages, PageSize::Huge2MiB | PageSize::Huge1GiB);
    match huge && (pages != here.memory.pages || expected > bytes(here)) {
        true => Err(malformed("more huge pages than were agreed")),
        false => Ok(()),
    }
}

pub(super) fn unpacked(bytes: &[u8]) -> Result<MachineState, SnapshotError> {
    let action = "read";
    let failed = |source| SnapshotError::State { action, source };
    let (version, state) = bytes
        .split_first_chunk()
        .ok_or_else(|| failed(postcard::Error::DeserializeUnexpectedEnd))?;
    let version = u32::from_le_bytes(*version);
    if version != STATE_VERSION {
        return Err(BuildError::StateVersion { version }.into());
    }
    match postcard::take_from_bytes(state).map_err(failed)? {
        (state, []) => Ok(state),
        _ => Err(failed(postcard::Error::DeserializeBadEncoding)),
    }
}

/// Pages of a block as they were in the pause: its number, which pages, and they.
type Kept = (u64, Mask, Vec<u8>);

/// What goes to the file when the guest runs again: its state, and pages.
type AtRest = (Vec<u8>, Vec<Kept>);

/// Some pages of a block, each whole.
pub(super) fn read_pages(
    memory: &GuestMemory,
    number: u64,
    mask: Mask,
) -> Result<Vec<u8>, SnapshotError> {
    let mut pages = vec![0; mask.count() as usize * PAGE];
    let mut rest = pages.as_mut_slice();
    for run in mask.runs() {
        let Some((target, more)) = rest.split_at_mut_checked(run.len()) else {
            break;
        };
        let at = number * BLOCK as u64 + run.start as u64;
        memory.read_at(target, at).map_err(SnapshotError::Read)?;
        rest = more;
    }
    Ok(pages)
}

#[cfg(test)]
mod busy;
#[cfg(test)]
mod tests;
