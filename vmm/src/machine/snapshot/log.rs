//! What guest and process write to memory: while it is copied, and from one snapshot to the next.

use std::sync::Arc;

use uuid::Uuid;

use super::SnapshotError;
use crate::kvm::{DirtyLog, Vm};
use crate::memory::{GuestMemory, PageSet};

/// What guest and process write to, for as long as it lives. There is one at a time: it has the VM's [`DirtyLog`].
pub(in crate::machine) struct WriteLog {
    log: DirtyLog,
    memory: GuestMemory,
    bytes: u64,
}

impl WriteLog {
    /// # Errors
    /// [`SnapshotError::Logged`]: there is another.
    pub fn begin(vm: &Arc<Vm>, memory: &GuestMemory) -> Result<Self, SnapshotError> {
        let bytes = memory.file_bytes()?;
        let log = DirtyLog::begin(vm)?.ok_or(SnapshotError::Logged)?;
        // What this process wrote before is in the first copy.
        memory.take_own_writes(&mut PageSet::new(bytes));
        Ok(WriteLog {
            log,
            memory: memory.clone(),
            bytes,
        })
    }

    /// Since it was begun or last taken.
    pub fn take(&self) -> Result<PageSet, SnapshotError> {
        let mut pages = PageSet::new(self.bytes);
        self.log.take(&mut pages)?;
        self.memory.take_own_writes(&mut pages);
        Ok(pages)
    }
}

/// A log with all that it has told since a snapshot.
pub(in crate::machine) struct Ledger {
    log: WriteLog,
    /// A whole snapshot and those that were laid over it, each over the one before; empty: there was none yet, or the
    /// next cannot be laid over it.
    chain: Vec<Uuid>,
    since: PageSet,
}

impl Ledger {
    pub fn begin(vm: &Arc<Vm>, memory: &GuestMemory) -> Result<Self, SnapshotError> {
        let log = WriteLog::begin(vm, memory)?;
        Ok(Ledger {
            since: PageSet::new(log.bytes),
            chain: Vec::new(),
            log,
        })
    }

    /// What was written to since that was last asked.
    pub fn take(&mut self) -> Result<PageSet, SnapshotError> {
        let taken = self.log.take();
        match &taken {
            Ok(pages) => self.since.join(pages),
            // A part of it is lost, perhaps.
            Err(_) => self.chain.clear(),
        }
        taken
    }

    /// All that was written to since the snapshot that is there.
    pub fn take_all(&mut self) -> Result<PageSet, SnapshotError> {
        self.take()?;
        Ok(self.since.clone())
    }

    /// The snapshot that a next one can be laid over.
    pub fn base(&self) -> Option<Uuid> {
        self.chain.last().copied()
    }

    /// The next one would be laid over it, or over one that is.
    pub fn needs(&self, snapshot: Uuid) -> bool {
        self.chain.contains(&snapshot)
    }

    /// There is a snapshot of what was last taken, which is whole and on its disk, laid over `base` if over any.
    pub fn is_based_on(&mut self, snapshot: Uuid, base: Option<Uuid>) {
        if base.is_none() {
            self.chain.clear();
        }
        self.chain.push(snapshot);
        self.since = PageSet::new(self.log.bytes);
    }
}
