//! A disk beside its device: what its guest writes is taken down, and its content goes to another host, comes from
//! one, or is copied to another file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::backend::{Io, Operation};
use super::buffer::Buffer;
use super::file::{self, DiskFile, DiskFileError};
use crate::memory::PageSet;
use crate::stream::{BLOCK, Mask, PAGE, Target};

/// What a guest has written to, in pages, while somebody wants to know.
#[derive(Debug, Default)]
pub(super) struct Written {
    is_kept: AtomicBool,
    pages: Mutex<PageSet>,
}

impl Written {
    /// Whoever has been told of a write by the storage says so before he tells the guest.
    pub(super) fn add(&self, offset: u64, length: u64) {
        if self.is_kept() {
            self.pages()
                .add_range(offset, offset.saturating_add(length));
        }
    }

    /// Somebody copies the disk.
    pub(super) fn is_kept(&self) -> bool {
        self.is_kept.load(Ordering::SeqCst)
    }

    fn pages(&self) -> MutexGuard<'_, PageSet> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk that a device has. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DiskCopy {
    disk: DiskFile,
    written: Arc<Written>,
}

impl DiskCopy {
    pub(super) fn new(disk: DiskFile, written: Arc<Written>) -> Self {
        Self { disk, written }
    }

    /// Of the disk, as its guest sees it.
    pub fn bytes(&self) -> u64 {
        self.disk.geometry().capacity
    }

    /// Takes down what is written from now on, for as long as the log lives. `None`: somebody takes it down already, and
    /// to read a log is to empty it.
    pub fn log(&self) -> Option<DiskLog> {
        let mut pages = self.written.pages();
        if self.written.is_kept.swap(true, Ordering::SeqCst) {
            return None;
        }
        *pages = PageSet::new(self.bytes());
        drop(pages);
        Some(DiskLog(self.clone()))
    }

    /// What is not a hole.
    pub fn present(&self) -> io::Result<PageSet> {
        let (disk, end) = (&*self.disk.file, self.bytes());
        let mut pages = PageSet::new(end);
        let mut at = 0;
        while at < end {
            let Some(data) = next(disk, SeekFrom::Data(at))? else {
                break;
            };
            at = next(disk, SeekFrom::Hole(data))?.unwrap_or(end).min(end);
            pages.add_range(data, at);
        }
        Ok(pages)
    }

    /// Has `to` share the blocks of the disk, which takes no time; false: the file system has no such thing. What
    /// the guest writes meanwhile may be in it or not.
    pub fn share_with(&self, to: &DiskTarget) -> io::Result<bool> {
        let (disk, file) = (&*self.disk.file, &*to.disk.file);
        match rustix::fs::ioctl_ficlone(file.as_fd(), disk.as_fd()) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => {
                return Ok(false);
            }
            Err(errno) => return Err(errno.into()),
        }
        to.is_settled.store(false, Ordering::Relaxed);
        file.set_len(to.disk.geometry().capacity)?;
        Ok(true)
    }

    /// Some pages of a block, each whole: what lies beyond the disk is zero.
    pub fn read(&self, number: u64, mask: Mask) -> io::Result<Vec<u8>> {
        let mut pages = vec![0; mask.count() as usize * PAGE];
        let mut rest = pages.as_mut_slice();
        for run in mask.runs() {
            let Some((target, more)) = rest.split_at_mut_checked(run.len()) else {
                break;
            };
            rest = more;
            let start = number * BLOCK as u64 + run.start as u64;
            let length = self.bytes().saturating_sub(start).min(run.len() as u64) as usize;
            let Some(target) = target.get_mut(..length).filter(|target| !target.is_empty()) else {
                continue;
            };
            let mut buffer = bounce(length)?;
            file::read(&self.disk, &mut buffer, start)?;
            if let Some(bytes) = buffer.bounced() {
                target.copy_from_slice(bytes);
            }
        }
        Ok(pages)
    }
}

/// Takes down the writes to a disk until it is dropped. There is one of these at a time: who has it is told what nobody
/// else will be.
#[derive(Debug)]
pub struct DiskLog(DiskCopy);

impl DiskLog {
    pub fn disk(&self) -> &DiskCopy {
        &self.0
    }

    /// Since it was begun or last taken.
    pub fn take(&self) -> PageSet {
        let mut pages = self.0.written.pages();
        std::mem::replace(&mut *pages, PageSet::new(self.0.bytes()))
    }
}

impl Drop for DiskLog {
    fn drop(&mut self) {
        // Under the lock: whoever begins the next log does it before or after all of this.
        let mut pages = self.0.written.pages();
        self.0.written.is_kept.store(false, Ordering::SeqCst);
        *pages = PageSet::default();
    }
}

/// A disk that is filled before any guest has it.
#[derive(Debug)]
pub struct DiskTarget {
    disk: DiskFile,
    /// Of its content nothing has to be written to the end any more.
    is_settled: AtomicBool,
}

impl DiskTarget {
    /// Makes `file` an empty disk of so many bytes.
    pub fn empty(file: &File, bytes: u64) -> Result<Self, DiskFileError> {
        let sized = |source| DiskFileError::Size { source };
        // Fails on a block device, which would keep what it has where nothing comes.
        file.set_len(0).map_err(sized)?;
        file.set_len(bytes).map_err(sized)?;
        let file = file.try_clone().map_err(sized)?;
        let disk = DiskFile::new(file, false)?;
        let found = disk.geometry().capacity;
        if found < bytes {
            return Err(DiskFileError::TooSmall { bytes: found });
        }
        let is_settled = AtomicBool::new(true);
        Ok(Self { disk, is_settled })
    }

    /// Of what has come nothing is left.
    pub(super) fn empty_again(&self) -> io::Result<()> {
        self.disk.file.set_len(0)?;
        self.disk.file.set_len(self.disk.geometry().capacity)
    }

    /// Bytes that are free where it is.
    pub(super) fn free(&self) -> io::Result<u64> {
        let about = rustix::fs::fstatvfs(&*self.disk.file)?;
        Ok(about.f_bavail.saturating_mul(about.f_frsize))
    }

    /// What has come so far is durable.
    pub fn settle(&self) -> io::Result<()> {
        if !self.is_settled.swap(true, Ordering::Relaxed) {
            rustix::fs::fdatasync(&*self.disk.file)?;
        }
        Ok(())
    }
}

impl Target for DiskTarget {
    /// In whole pages.
    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.geometry().capacity.next_multiple_of(PAGE as u64))
    }

    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let capacity = self.disk.geometry().capacity;
        let length = capacity.saturating_sub(offset).min(bytes.len() as u64) as usize;
        let Some(bytes) = bytes.get(..length).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        self.is_settled.store(false, Ordering::Relaxed);
        let mut buffer = bounce(length)?;
        if let Some(target) = buffer.bounced() {
            target.copy_from_slice(bytes);
        }
        Ok(file::write(&self.disk, &mut buffer, offset)?)
    }

    fn clear(&self, offset: u64, length: u64) -> io::Result<()> {
        let capacity = self.disk.geometry().capacity;
        let length = capacity.saturating_sub(offset).min(length);
        if length == 0 {
            return Ok(());
        }
        self.is_settled.store(false, Ordering::Relaxed);
        let mut io = Io {
            tag: 0,
            operation: Operation::WriteZeroes { unmap: true },
            offset,
            length,
            buffer: Buffer::none(),
        };
        Ok(file::execute(&self.disk, &mut io)?)
    }
}

fn bounce(length: usize) -> io::Result<Buffer> {
    Buffer::bounce(length, PAGE).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// The next data or hole; `None`: there is no more. What does not know of holes is all data.
fn next(disk: &File, what: SeekFrom) -> io::Result<Option<u64>> {
    match (seek(disk, what), what) {
        (Ok(at), _) => Ok(Some(at)),
        (Err(Errno::NXIO), _) => Ok(None),
        (Err(Errno::INVAL | Errno::OPNOTSUPP), SeekFrom::Data(at)) => Ok(Some(at)),
        (Err(Errno::INVAL | Errno::OPNOTSUPP), _) => Ok(None),
        (Err(errno), _) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    fn disk(bytes: u64) -> (File, DiskCopy) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        let disk = DiskFile::new(file.try_clone().unwrap(), false).unwrap();
        (file, DiskCopy::new(disk, Arc::default()))
    }

    /// Writes a disk over by the pages of `pages`.
    fn copy(from: &DiskCopy, pages: &PageSet, to: &DiskTarget) {
        for (number, mask) in pages.blocks() {
            let content = from.read(number, mask).unwrap();
            let mut at = 0;
            for run in mask.runs() {
                let start = number * BLOCK as u64 + run.start as u64;
                to.put(&content[at..at + run.len()], start).unwrap();
                at += run.len();
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Also of a disk whose last page is not whole.
        #[test]
        fn a_copy_is_what_was_there_and_what_was_written_since(
            sectors in 300..700u64,
            before in prop::collection::vec((0..700u64, 1..9usize, 1u8..), 0..8),
            since in prop::collection::vec((0..700u64, 1..9usize, 1u8..), 0..8),
        ) {
            let bytes = sectors * 512;
            let (file, from) = disk(bytes);
            let write = |writes: &[(u64, usize, u8)]| {
                for (sector, count, byte) in writes {
                    let at = sector * 512 % bytes;
                    let length = (count * 512).min((bytes - at) as usize);
                    file.write_all_at(&vec![*byte; length], at).unwrap();
                    from.written.add(at, length as u64);
                }
            };
            write(&before);
            let log = from.log().unwrap();
            let target = tempfile::tempfile().unwrap();
            target.write_all_at(&[7; 4096], 0).unwrap();
            let to = DiskTarget::empty(&target, bytes).unwrap();
            copy(&from, &from.present().unwrap(), &to);
            write(&since);
            copy(&from, &log.take(), &to);
            prop_assert_eq!(log.take().count(), 0);
            to.settle().unwrap();
            let read = |file: &File| {
                let mut all = vec![0; bytes as usize];
                file.read_exact_at(&mut all, 0).unwrap();
                all
            };
            prop_assert_eq!(target.metadata().unwrap().len(), bytes);
            prop_assert!(read(&file) == read(&target));
            to.clear(0, bytes.next_multiple_of(PAGE as u64)).unwrap();
            prop_assert!(read(&target).iter().all(|byte| *byte == 0));
            drop(log);
            from.written.add(0, 512);
            prop_assert_eq!(from.written.pages().count(), 0);
        }
    }

    #[test]
    fn nobody_else_is_told_what_a_log_is_told() {
        let (_file, disk) = disk(1 << 20);
        let log = disk.log().unwrap();
        disk.written.add(0, 4096);
        assert!(disk.log().is_none());
        assert!(disk.clone().log().is_none());
        disk.written.add(8192, 4096);
        assert_eq!(log.take().count(), 2, "who was refused took nothing away");
        drop(log);
        let next = disk.log().unwrap();
        assert_eq!(next.take().count(), 0);
        disk.written.add(0, 4096);
        assert_eq!(next.take().count(), 1);
    }

    #[test]
    fn holes_are_not_copied() {
        let (file, disk) = disk(16 << 20);
        file.write_all_at(&[1; 4096], 8 << 20).unwrap();
        let present = disk.present().unwrap();
        assert!((1..=16).contains(&present.count()), "{}", present.count());
    }
}
