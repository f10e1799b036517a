//! What of a machine is to be sent: all of it once, and then what it has written since.

use super::MigrationError;
use crate::machine::snapshot::WriteLog;
use crate::machine::{Machine, SnapshotError};
use crate::memory::PageSet;
use crate::stream::Mask;
use crate::virtio::block::DiskLog;

/// Of what something is a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Memory,
    /// Its number in the configuration.
    Disk(usize),
}

/// Some pages of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub part: Part,
    pub number: u64,
    pub mask: Mask,
}

/// Takes down what guest, devices and process write to.
pub struct Journal {
    /// None: nobody knows what is written to memory, or nobody writes.
    memory: Option<WriteLog>,
    bytes: u64,
    /// In the order of the configuration, if they go.
    disks: Vec<DiskLog>,
    /// Something of these has been sent: zero is not zero there for that reason alone.
    memory_gone: bool,
    disks_gone: bool,
}

impl Journal {
    /// With all that is there.
    pub fn begin(machine: &Machine, disks: bool) -> Result<(Self, Left), MigrationError> {
        let unlogged = machine.devices.iter().any(|device| device.writes_unseen());
        let memory = match unlogged {
            true => None,
            false => Some(WriteLog::begin(&machine.vm, &machine.memory)?),
        };
        let names = match disks {
            true => machine.disks(),
            false => &[],
        };
        let mut logs = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let mut devices = machine.devices.iter();
            let device = devices.find(|device| device.id() == name.as_str());
            let disk = device.and_then(|device| device.disk());
            let disk = disk.ok_or_else(|| MigrationError::Disk {
                action: "find",
                index,
                source: std::io::ErrorKind::Unsupported.into(),
            })?;
            logs.push(disk.log().ok_or_else(|| MigrationError::Disk {
                action: "take down what is written to",
                index,
                source: std::io::Error::other("it is being copied; try again after that"),
            })?);
        }
        let journal = Journal {
            memory,
            bytes: machine.memory.file_bytes()?,
            disks: logs,
            memory_gone: false,
            disks_gone: false,
        };
        let mut all = journal.nothing();
        if journal.memory.is_some() {
            all.memory = machine.memory.present()?;
        }
        for (index, (log, pages)) in journal.disks.iter().zip(&mut all.disks).enumerate() {
            let action = "look for the data of";
            let failed = |source| MigrationError::Disk {
                action,
                index,
                source,
            };
            *pages = log.disk().present().map_err(failed)?;
        }
        Ok((journal, all))
    }

    pub fn nothing(&self) -> Left {
        let none = |log: &DiskLog| PageSet::new(log.disk().bytes());
        Left {
            memory: PageSet::new(self.bytes),
            disks: self.disks.iter().map(none).collect(),
        }
    }

    /// Bytes of each disk that goes.
    pub fn sizes(&self) -> Vec<u64> {
        self.disks.iter().map(|log| log.disk().bytes()).collect()
    }

    /// Anything can be sent while the guest runs.
    pub fn has_rounds(&self) -> bool {
        self.logs_memory() || !self.disks.is_empty()
    }

    /// What the guest writes to its memory is taken down.
    pub fn logs_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// Disks go.
    pub fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }

    /// What was written since it was begun or last taken.
    pub fn take(&self) -> Result<Left, SnapshotError> {
        Ok(Left {
            memory: self.take_memory()?,
            disks: self.disks.iter().map(DiskLog::take).collect(),
        })
    }

    /// Of memory only; nothing where it is not logged.
    pub fn take_memory(&self) -> Result<PageSet, SnapshotError> {
        match &self.memory {
            Some(log) => log.take(),
            None => Ok(PageSet::new(self.bytes)),
        }
    }

    /// As [`Journal::take`] of a machine that stands still, with what nobody has taken down.
    pub fn take_last(&self, machine: &Machine) -> Result<Left, SnapshotError> {
        let mut left = self.take()?;
        if self.memory.is_none() {
            left.memory = machine.memory.present()?;
        }
        Ok(left)
    }

    /// Pages that will be sent at the end for want of a log.
    pub fn unlogged(&self, machine: &Machine) -> Result<u64, SnapshotError> {
        match self.memory {
            Some(_) => Ok(0),
            None => Ok(machine.memory.present()?.count()),
        }
    }

    /// A round of all that there was is over.
    pub fn has_gone(&mut self) {
        self.memory_gone = self.memory.is_some();
        self.disks_gone = true;
    }

    /// Nothing of it was sent yet: what is zero is zero there, too.
    pub fn is_fresh(&self, part: Part) -> bool {
        match part {
            Part::Memory => !self.memory_gone,
            Part::Disk(_) => !self.disks_gone,
        }
    }

    /// Some pages of a block of a disk, each whole.
    pub fn read(&self, index: usize, number: u64, mask: Mask) -> Result<Vec<u8>, MigrationError> {
        let failed = |source| MigrationError::Disk {
            action: "read",
            index,
            source,
        };
        let log = self.disks.get(index);
        let log = log.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        log.disk().read(number, mask).map_err(failed)
    }
}

/// Pages that are to be sent.
#[derive(Clone)]
pub struct Left {
    memory: PageSet,
    disks: Vec<PageSet>,
}

impl Left {
    /// All of them.
    pub fn count(&self) -> u64 {
        self.memory() + self.disks.iter().map(PageSet::count).sum::<u64>()
    }

    /// Those of memory.
    pub fn memory(&self) -> u64 {
        self.memory.count()
    }

    /// Those of memory from that offset on.
    pub fn memory_from(&self, start: u64) -> u64 {
        let mut all = self.memory.clone();
        all.take_before(start);
        all.count()
    }

    /// Takes those of memory before that offset away.
    pub fn take_memory_before(&mut self, end: u64) -> PageSet {
        self.memory.take_before(end)
    }

    pub fn join_memory(&mut self, pages: &PageSet) {
        self.memory.join(pages);
    }

    pub fn join(&mut self, other: &Left) {
        self.join_memory(&other.memory);
        for (pages, more) in self.disks.iter_mut().zip(&other.disks) {
            pages.join(more);
        }
    }
}

/// What of it is to be sent yet: disks, which take longest, and then memory, which is written to most.
pub struct Pending {
    left: Left,
    /// Where the next is looked for.
    part: Part,
    block: u64,
    memory: u64,
    disk: u64,
}

impl Pending {
    pub fn new(left: Left) -> Self {
        let memory = left.memory();
        Pending {
            part: match left.disks.is_empty() {
                true => Part::Memory,
                false => Part::Disk(0),
            },
            block: 0,
            disk: left.count() - memory,
            memory,
            left,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.memory == 0 && self.disk == 0
    }

    /// Pages of memory, and of disks.
    pub fn count(&self) -> (u64, u64) {
        (self.memory, self.disk)
    }

    /// What of memory was not taken yet; of disks everything was.
    pub fn rest(&self) -> Left {
        let mut left = self.left.clone();
        for disk in &mut left.disks {
            disk.take_before(u64::MAX);
        }
        let gone = match self.part {
            Part::Memory => self.block,
            Part::Disk(_) => 0,
        };
        let blocks = self.left.memory.blocks();
        for (number, mask) in blocks.take_while(|(number, _)| *number < gone) {
            left.memory.take(number, mask);
        }
        left
    }

    /// More of memory, which has its turn by now; of disks everything was taken.
    pub fn join_memory(&mut self, pages: &PageSet) {
        let mut rest = self.rest();
        rest.join_memory(pages);
        *self = Pending::new(rest);
    }

    /// Less of it, likewise.
    pub fn remove_memory(&mut self, pages: &PageSet) {
        let mut rest = self.rest();
        rest.memory.remove(pages);
        *self = Pending::new(rest);
    }

    /// The next piece, if it is of that part; `None`: whatever it is of.
    pub fn next(&mut self, of: Option<Part>) -> Option<Piece> {
        loop {
            let pages = match self.part {
                Part::Memory => &self.left.memory,
                Part::Disk(index) => self.left.disks.get(index)?,
            };
            let Some((number, mask)) = pages.block_from(self.block) else {
                (self.part, self.block) = match self.part {
                    Part::Memory => return None,
                    Part::Disk(index) if index + 1 < self.left.disks.len() => {
                        (Part::Disk(index + 1), 0)
                    }
                    Part::Disk(_) => (Part::Memory, 0),
                };
                continue;
            };
            let part = self.part;
            if of.is_some_and(|of| of != part) {
                return None;
            }
            self.block = number + 1;
            let left = match part {
                Part::Memory => &mut self.memory,
                Part::Disk(_) => &mut self.disk,
            };
            *left = left.saturating_sub(mask.count());
            return Some(Piece { part, number, mask });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::stream::PAGE;

    const PAGES: u64 = 4 * 64;

    fn set(pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::new(PAGES * PAGE as u64);
        for page in pages {
            set.add_range(page * PAGE as u64, (page + 1) * PAGE as u64);
        }
        set
    }

    fn pages(piece: &Piece) -> impl Iterator<Item = u64> {
        let Piece { number, mask, .. } = *piece;
        let bits = (0..16).filter(move |bit| mask.0 >> bit & 1 == 1);
        bits.map(move |bit| number * 16 + bit)
    }

    proptest! {
        /// In the middle of a round some are taken away or added; what was sent before is not sent once more for that.
        #[test]
        fn what_is_pending_of_memory_can_become_less_or_more(
            all in prop::collection::btree_set(0..PAGES, 0..80),
            written in prop::collection::btree_set(0..PAGES, 0..80),
            steps in 0..20usize,
            more in any::<bool>(),
        ) {
            let mut pending = Pending::new(Left { memory: set(&all), disks: Vec::new() });
            let mut before = BTreeSet::new();
            for _ in 0..steps {
                before.extend(pending.next(None).iter().flat_map(pages));
            }
            let mut rest: BTreeSet<u64> = all.difference(&before).copied().collect();
            if more {
                pending.join_memory(&set(&written));
                rest.extend(&written);
            } else {
                pending.remove_memory(&set(&written));
                rest.retain(|page| !written.contains(page));
            }
            prop_assert_eq!(pending.count(), (rest.len() as u64, 0));
            let mut after = BTreeSet::new();
            while let Some(piece) = pending.next(None) {
                after.extend(pages(&piece));
            }
            prop_assert_eq!(after, rest);
            prop_assert!(pending.is_empty());
        }
    }
}
