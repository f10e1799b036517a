//! Copies a disk to a file while its guest writes to it, in rounds: all that is no hole, then what was written since.
//!
//! Owns the log of what is written meanwhile. What it has is the disk at one moment only once nobody has written since
//! the log was last taken: [`finish`](DiskCopier::finish) is for a guest that stands still.

use std::fs::File;
use std::io;
use std::time::Instant;

use super::copy::{DiskLog, DiskTarget};
use super::file::DiskFileError;
use crate::memory::PageSet;
use crate::stream::{BLOCK, Mask, PAGE, Target};

/// A disk on its way into a file.
#[derive(Debug)]
pub struct DiskCopier {
    log: DiskLog,
    target: DiskTarget,
    pending: PageSet,
    /// Where the next of them is looked for.
    block: u64,
    /// Nothing has been written to the file yet but what this round writes: what is zero is zero there.
    is_fresh: bool,
}

/// What [`DiskCopier::finish`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// So many pages were left, and all is there.
    Whole(u64),
    /// It took too long.
    Late,
}

impl DiskCopier {
    /// Makes `file` an empty disk as large as the one whose writes are taken down.
    pub fn begin(log: DiskLog, file: &File) -> Result<Self, DiskFileError> {
        let target = DiskTarget::empty(file, log.disk().bytes())?;
        let pending = (log.disk())
            .present()
            .map_err(|source| DiskFileError::Size { source })?;
        Ok(Self {
            log,
            target,
            pending,
            block: 0,
            is_fresh: true,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.log.disk().bytes()
    }

    /// The file shares the disk's blocks, as they are if nobody writes; false: it cannot, and is empty.
    pub fn share(&mut self) -> io::Result<bool> {
        let shared = self.log.disk().share_with(&self.target);
        if !matches!(shared, Ok(true)) {
            self.target.empty_again()?;
        }
        shared
    }

    /// What the file shares need not be copied: only what is written since the disk was begun to be looked at.
    pub fn has_shared(&mut self) {
        self.pending = PageSet::new(self.bytes());
        (self.block, self.is_fresh) = (0, false);
    }

    /// Bytes that are free where the file is.
    pub fn free(&self) -> io::Result<u64> {
        self.target.free()
    }

    /// Copies about so many bytes of this round; how many pages these were. None: the round is over.
    pub fn some(&mut self, bytes: usize) -> io::Result<Option<u64>> {
        let (mut copied, mut left) = (0, bytes);
        while left > 0 {
            let Some((number, mask)) = self.pending.block_from(self.block) else {
                break;
            };
            let pages = self.log.disk().read(number, mask)?;
            self.put(number, mask, &pages)?;
            self.block = number + 1;
            copied += mask.count();
            left = left.saturating_sub(pages.len());
        }
        Ok((copied > 0).then_some(copied))
    }

    /// `pages` are those of the mask, one after the other.
    fn put(&self, number: u64, mask: Mask, pages: &[u8]) -> io::Result<()> {
        let mut at = 0;
        for run in mask.runs() {
            let start = number * BLOCK as u64 + run.start as u64;
            let bytes = pages.get(at..at + run.len()).unwrap_or_default();
            at += run.len();
            let content = Mask::with_content(bytes);
            for part in content.runs() {
                let bytes = bytes.get(part.clone()).unwrap_or_default();
                self.target.put(bytes, start + part.start as u64)?;
            }
            if self.is_fresh {
                continue;
            }
            let all = Mask((1u32 << (run.len() / PAGE)).wrapping_sub(1) as u16);
            for part in all.without(content).runs() {
                self.target
                    .clear(start + part.start as u64, part.len() as u64)?;
            }
        }
        Ok(())
    }

    /// What was copied so far is durable.
    pub fn settle(&self) -> io::Result<()> {
        self.target.settle()
    }

    /// What has been written since this was last asked is the next round; how many pages.
    pub fn next_round(&mut self) -> u64 {
        let mut written = self.log.take();
        // What this one has not come to is still to be copied.
        while let Some((number, mask)) = self.pending.block_from(self.block) {
            for run in mask.runs() {
                let start = number * BLOCK as u64 + run.start as u64;
                written.add_range(start, start + run.len() as u64);
            }
            self.block = number + 1;
        }
        (self.pending, self.block, self.is_fresh) = (written, 0, false);
        self.pending.count()
    }

    /// Copies all that is left of a disk that nobody writes to, by then.
    pub fn finish(&mut self, until: Instant) -> io::Result<Finish> {
        let left = self.next_round();
        while self.some(1 << 20)?.is_some() {
            if Instant::now() > until {
                return Ok(Finish::Late);
            }
        }
        Ok(Finish::Whole(left))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::copy::{DiskCopy, Written};
    use super::super::file::DiskFile;
    use super::*;

    /// What a guest does to its disk: sector, sectors, and what with; zero: it lets go of them.
    #[derive(Debug, Clone)]
    struct Write(u64, u64, u8);

    struct Disk {
        file: File,
        written: Arc<Written>,
        copy: DiskCopy,
        bytes: u64,
    }

    impl Disk {
        fn new(bytes: u64) -> Self {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            let disk = DiskFile::new(file.try_clone().unwrap(), false).unwrap();
            let written: Arc<Written> = Arc::default();
            let copy = DiskCopy::new(disk, Arc::clone(&written));
            Self {
                file,
                written,
                copy,
                bytes,
            }
        }

        fn does(&self, Write(sector, count, byte): &Write) {
            let at = sector * 512 % self.bytes;
            let length = (count * 512).min(self.bytes - at);
            match byte {
                0 => {
                    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE
                        | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&self.file, punch, at, length).unwrap();
                }
                byte => {
                    let bytes = vec![*byte; length as usize];
                    self.file.write_all_at(&bytes, at).unwrap();
                }
            }
            self.written.add(at, length);
        }
    }

    fn in_a_minute() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut all = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    fn write(sectors: u64) -> impl Strategy<Value = Write> {
        (0..sectors, 1..200u64, 0..4u8).prop_map(|(at, count, byte)| Write(at, count, byte))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Whatever is written or let go of between two pieces, and in which round: at the end it is the disk as it
        /// was when the guest stood still, and not as it was before or became afterwards.
        #[test]
        fn the_copy_is_the_disk_at_one_moment(
            sectors in 300..4000u64,
            before in prop::collection::vec(write(4000), 0..8),
            meanwhile in prop::collection::vec((prop::option::of(write(4000)), any::<bool>()), 0..40),
            after in prop::collection::vec(write(4000), 1..4),
        ) {
            let disk = Disk::new(sectors * 512);
            before.iter().for_each(|write| disk.does(write));
            let target = tempfile::tempfile().unwrap();
            target.write_all_at(&[7; 8192], 0).unwrap();
            let mut copier = DiskCopier::begin(disk.copy.log().unwrap(), &target).unwrap();
            for (write, next) in &meanwhile {
                write.iter().for_each(|write| disk.does(write));
                let more = copier.some(1 << 16).unwrap();
                if *next || more.is_none() {
                    copier.next_round();
                }
            }
            let moment = content(&disk.file);
            let finish = copier.finish(in_a_minute()).unwrap();
            prop_assert!(matches!(finish, Finish::Whole(_)));
            after.iter().for_each(|write| disk.does(write));
            copier.settle().unwrap();
            prop_assert!(content(&target) == moment);
            drop(copier);
            prop_assert!(!disk.written.is_kept());
        }
    }

    /// As where the file system lets them share blocks, and takes its time for it.
    #[test]
    fn what_is_written_while_the_blocks_are_shared_is_copied() {
        let disk = Disk::new(8 << 20);
        disk.does(&Write(0, 4096, 1));
        let target = tempfile::tempfile().unwrap();
        let mut copier = DiskCopier::begin(disk.copy.log().unwrap(), &target).unwrap();
        disk.does(&Write(100, 100, 2));
        target.write_all_at(&content(&disk.file), 0).unwrap();
        disk.does(&Write(150, 100, 3));
        disk.does(&Write(2000, 100, 0));
        copier.has_shared();
        assert!(copier.some(1 << 20).unwrap().is_none());
        assert!(copier.next_round() < 64);
        disk.does(&Write(8000, 8, 4));
        copier.finish(in_a_minute()).unwrap();
        assert!(content(&target) == content(&disk.file));
    }

    #[test]
    fn holes_stay_holes_and_what_became_zero_becomes_one() {
        let disk = Disk::new(64 << 20);
        let blocks = |file: &File| file.metadata().unwrap().blocks() * 512;
        disk.does(&Write(0, 2048, 1));
        // Written, and zero all the same.
        disk.file.write_all_at(&vec![0; 1 << 20], 8 << 20).unwrap();
        let target = tempfile::tempfile().unwrap();
        let mut copier = DiskCopier::begin(disk.copy.log().unwrap(), &target).unwrap();
        while copier.some(1 << 20).unwrap().is_some() {}
        assert!(blocks(&target) < 3 << 19, "{}", blocks(&target));
        disk.does(&Write(0, 2048, 0));
        copier.finish(in_a_minute()).unwrap();
        assert!(blocks(&target) < 1 << 18, "{}", blocks(&target));
        assert_eq!(target.metadata().unwrap().len(), 64 << 20);
    }

    #[test]
    fn one_that_takes_too_long_says_so() {
        let disk = Disk::new(64 << 20);
        disk.does(&Write(0, 1 << 16, 1));
        let target = tempfile::tempfile().unwrap();
        let mut copier = DiskCopier::begin(disk.copy.log().unwrap(), &target).unwrap();
        assert_eq!(copier.finish(Instant::now()).unwrap(), Finish::Late);
    }
}
