//! A machine written to a file while its guest runs, and one made from such a file.
//!
//! Memory is copied under the log of writes; what was written meanwhile is copied again, until little is left. Then the
//! guest stands still: its state is saved and the pages that are left are copied to a buffer, which goes to the file
//! when the guest runs again. So neither the size of memory nor a slow file is in the pause; but they are where the
//! guest writes faster than is copied, and where vhost-net writes to its memory.
//!
//! A machine is made from the file in two ways ([`Loading`]): memory is read first, or mapped and read when it is
//! touched.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::state::STATE_VERSION;
use super::{BuildError, Machine, MachineError, MachineState, RunState, build};
use crate::config::{MachineConfig, MachineFiles, MemoryConfig, PageSize};
use crate::kvm::{KvmError, Vm};
use crate::memory::{GuestMemory, MemoryError, PageSet};
use crate::stream::snapshot::{Snapshot, SnapshotWriter};
use crate::stream::{BLOCK, Mask, Opening, PAGE, StreamError, Totals, malformed};
use crate::thread::ThreadHook;

/// With so few pages left the guest is stopped for them: 4 MiB, a millisecond's copy.
const FEW: u64 = 1024;
/// After so many rounds it is stopped, however many are left.
const ROUNDS: usize = 4;
/// So many pages are copied to a buffer at most; more go to the file while the guest stands still.
const MOST_KEPT: u64 = (64 << 20) / PAGE as u64;

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
    #[error(
        "the machine's memory is still read from that very file: it has to be written to another"
    )]
    Onto,
    #[error("read the guest's memory")]
    Read(#[source] std::io::Error),
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
    /// The price: no checksum of a page is looked at ([`Snapshot::check`] does that, before or meanwhile). The file has
    /// to stay as it is for as long as any such machine lives, or until it was reset: what is written to it changes
    /// under the guest, and a truncation of it, or a disk that cannot be read, ends the process by SIGBUS. So it is for
    /// who owns it: a file that was unlinked, or is nobody's but root's, open for reading only (a process that a guest
    /// has taken over could write to the memory of others else). Memory of huge pages (hugetlbfs) and hot memory are
    /// read first all the same; pages that are copied are of 4 KiB, also in a machine of transparent ones.
    Lazy,
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
    /// How long the guest stood still; nothing, if it did anyway.
    pub pause: Duration,
    pub whole: Duration,
}

/// One copy of what had been written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    pub pages: u64,
    pub took: Duration,
}

impl Machine {
    /// Writes the machine to `file`, as it is at one moment; a guest that runs stands still for that moment only. The
    /// file is on its disk when this returns. Of the disks nothing is in it; `owner` is for who opens it
    /// ([`Snapshot::owner`]).
    ///
    /// # Errors
    /// The machine neither runs nor is paused, the guest ends or resets itself meanwhile, or something cannot be read
    /// or written; what is in the file then is taken for a snapshot by nobody.
    pub fn snapshot(&mut self, file: File, owner: &[u8]) -> Result<SnapshotReport, SnapshotError> {
        let began = Instant::now();
        if self.state != RunState::Paused {
            self.expect(RunState::Running, "written to a snapshot")?;
        }
        let memory = self.memory.clone();
        // The first thing that is done to the file is that it is emptied.
        if memory.is_made_of(&file)? {
            return Err(SnapshotError::Onto);
        }
        let bytes = memory.file_bytes()?;
        let opening = Opening {
            id: Uuid::new_v4(),
            base: None,
            memory: bytes,
            made_by: concat!("fractus-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let mut report = SnapshotReport {
            id: opening.id,
            totals: Totals::default(),
            rounds: Vec::new(),
            last: 0,
            pause: Duration::ZERO,
            whole: Duration::ZERO,
        };
        let mut copy = Copy {
            memory,
            writer: SnapshotWriter::new(file, opening)?,
        };
        let state = match self.state {
            RunState::Paused => {
                // First, since disks are written to the end for it: what is copied may go to theirs.
                let state = self.packed()?;
                report.last = copy.all()?;
                state
            }
            _ => self.copy_running(&mut copy, &mut report)?,
        };
        report.totals = copy.writer.finish(&state, owner)?;
        report.whole = began.elapsed();
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
        let (state, memory) = loaded(snapshot, here, loading)?;
        Ok(build::restore(state, memory, files, hook)?)
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
    pub(super) fn packed(&self) -> Result<Vec<u8>, SnapshotError> {
        // What the guest has asked for and nobody has carried out is not in its state.
        if self.owes() {
            return Err(SnapshotError::Over);
        }
        let action = "packed";
        let mut bytes = STATE_VERSION.to_le_bytes().to_vec();
        let state = postcard::to_stdvec(&self.saved()?)
            .map_err(|source| SnapshotError::State { action, source })?;
        bytes.extend(state);
        Ok(bytes)
    }

    /// Returns the state that goes with what `copy` has.
    fn copy_running(
        &mut self,
        copy: &mut Copy,
        report: &mut SnapshotReport,
    ) -> Result<Vec<u8>, SnapshotError> {
        // What nobody logs is copied when nobody writes any more.
        let unseen = self.devices.iter().any(|device| device.writes_unseen());
        let log = match unseen {
            true => None,
            false => Some(WriteLog::begin(&self.vm, &self.memory)?),
        };
        if let Some(log) = &log {
            let mut round = || -> Result<u64, SnapshotError> {
                let (began, first) = (Instant::now(), report.rounds.is_empty());
                let pages = match first {
                    true => copy.all()?,
                    false => copy.again(&log.take()?)?,
                };
                let took = began.elapsed();
                report.rounds.push(Round { pages, took });
                Ok(pages)
            };
            for _ in 0..ROUNDS {
                if round()? <= FEW || self.board.requests.halting() {
                    break;
                }
            }
        }

        let began = Instant::now();
        if let Err(error) = self.rest() {
            self.run_on(&error);
            return Err(error.into());
        }
        self.state = RunState::Paused;
        let kept = self.at_rest(copy, log.as_ref());
        if let Err(error) = self.run() {
            self.run_on(&error);
            return Err(error.into());
        }
        report.pause = began.elapsed();
        drop(log);
        let (state, kept) = kept?;
        report.last = kept.pages;
        for (number, mask, pages) in &kept.blocks {
            copy.writer.amend(*number, *mask, pages)?;
        }
        Ok(state)
    }

    /// What only a guest that stands still shows.
    fn at_rest(
        &self,
        copy: &mut Copy,
        log: Option<&WriteLog>,
    ) -> Result<(Vec<u8>, Kept), SnapshotError> {
        let state = self.packed()?;
        let mut kept = Kept::default();
        let Some(log) = log else {
            kept.pages = copy.all()?;
            return Ok((state, kept));
        };
        let written = log.take()?;
        kept.pages = written.count();
        if kept.pages > MOST_KEPT {
            copy.again(&written)?;
            return Ok((state, kept));
        }
        for (number, mask) in written.blocks() {
            let pages = read_pages(&copy.memory, number, mask)?;
            kept.blocks.push((number, mask, pages));
        }
        Ok((state, kept))
    }
}

/// All that a machine is made from, checked as far as it can be without KVM.
pub(super) fn loaded(
    snapshot: &Snapshot,
    here: &MachineConfig,
    loading: Loading,
) -> Result<(MachineState, GuestMemory), SnapshotError> {
    if let Some(base) = snapshot.opening().base {
        return Err(SnapshotError::Base { base });
    }
    let mut state = unpacked(snapshot.state())?;
    state.take_place(here);
    let config = state.config();
    config.validate().map_err(BuildError::from)?;
    check_memory(config, here, snapshot.opening().memory)?;
    let memory = GuestMemory::create_with(&config.memory, config.hot_memory.as_ref())?;
    fill(&memory, snapshot, &config.memory, loading)?;
    Ok((state, memory))
}

/// Brings memory that is all zeros what the snapshot has of it.
fn fill(
    memory: &GuestMemory,
    snapshot: &Snapshot,
    config: &MemoryConfig,
    loading: Loading,
) -> Result<(), SnapshotError> {
    let huge = matches!(config.pages, PageSize::Huge2MiB | PageSize::Huge1GiB);
    if loading == Loading::Eager || huge {
        return Ok(snapshot.load(memory)?);
    }
    // Hot memory is mapped twice, which a private mapping cannot be.
    let hot = GuestMemory::hot_offset_of(config);
    snapshot.load_from(memory, hot)?;
    let (file, at) = snapshot.placed_in();
    let runs = snapshot.placed_below(config.bytes);
    Ok(memory.lay_over(config, file, at, &runs)?)
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

/// Pages as they were in the pause.
#[derive(Default)]
struct Kept {
    pages: u64,
    /// Number, which pages, and they.
    blocks: Vec<(u64, Mask, Vec<u8>)>,
}

/// Copies memory to a snapshot.
struct Copy {
    memory: GuestMemory,
    writer: SnapshotWriter,
}

impl Copy {
    /// All that there is; how many pages that may be.
    fn all(&mut self) -> Result<u64, SnapshotError> {
        let present = self.memory.present()?;
        self.again(&present)
    }

    /// What has been written to; how many pages.
    fn again(&mut self, written: &PageSet) -> Result<u64, SnapshotError> {
        for (number, _) in written.blocks() {
            self.block(number)?;
        }
        Ok(written.count())
    }

    fn block(&mut self, number: u64) -> Result<(), SnapshotError> {
        let mut content = [0; BLOCK];
        let at = number * BLOCK as u64;
        let read = self.memory.read_at(&mut content, at);
        let read = read.map_err(SnapshotError::Read)?;
        let content = content.get(..read).unwrap_or_default();
        Ok(self.writer.put(number, content)?)
    }
}

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

/// What guest and process write to, for as long as it lives. There is one at a time.
pub(super) struct WriteLog {
    vm: Arc<Vm>,
    memory: GuestMemory,
    bytes: u64,
}

impl WriteLog {
    pub(super) fn begin(vm: &Arc<Vm>, memory: &GuestMemory) -> Result<Self, SnapshotError> {
        let bytes = memory.file_bytes()?;
        let log = WriteLog {
            vm: Arc::clone(vm),
            memory: memory.clone(),
            bytes,
        };
        // What this process wrote before is in the first copy.
        memory.take_own_writes(&mut PageSet::new(bytes));
        vm.log_writes(true)?;
        Ok(log)
    }

    /// Since it was begun or last taken.
    pub(super) fn take(&self) -> Result<PageSet, SnapshotError> {
        let mut pages = PageSet::new(self.bytes);
        self.vm.take_written(&mut pages)?;
        self.memory.take_own_writes(&mut pages);
        Ok(pages)
    }
}

impl Drop for WriteLog {
    fn drop(&mut self) {
        if let Err(error) = self.vm.log_writes(false) {
            tracing::warn!(%error, "the guest's writes are logged on, and slower");
        }
    }
}

#[cfg(test)]
mod tests;
