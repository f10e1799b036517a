//! A disk in a raw file or on a block device: what it can do, and the system calls on it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{Advice, AtFlags, FallocateFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use super::backend::{Alignment, Geometry, Io, Operation, SECTOR};
use super::buffer::Buffer;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskFileError {
    #[error("find out the disk's size")]
    Size { source: io::Error },
    #[error("find out how the disk's file is to be accessed")]
    Inspect { source: io::Error },
    #[error("the disk has {bytes} bytes, less than one sector")]
    TooSmall { bytes: u64 },
}

/// An open disk. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DiskFile {
    pub(super) file: Arc<File>,
    geometry: Geometry,
    direct: bool,
}

impl DiskFile {
    /// `file` is open for reading, and for writing unless `read_only`. What does not fill a sector at
    /// its end is out of reach.
    ///
    /// A file opened O_DIRECT whose file system wants offsets in multiples of more than a sector loses
    /// that flag: a guest may address single sectors (images partitioned for 512 bytes do).
    pub fn new(mut file: File, read_only: bool) -> Result<Self, DiskFileError> {
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|source| DiskFileError::Size { source })?;
        if bytes < SECTOR {
            return Err(DiskFileError::TooSmall { bytes });
        }
        let inspect = |errno: Errno| DiskFileError::Inspect {
            source: errno.into(),
        };
        let flags = rustix::fs::fcntl_getfl(&file).map_err(inspect)?;
        let mut direct = flags.contains(OFlags::DIRECT);
        let (alignment, physical_block) = inspect_alignment(&file).map_err(inspect)?;
        if direct && alignment.offset > SECTOR {
            rustix::fs::fcntl_setfl(&file, flags - OFlags::DIRECT).map_err(inspect)?;
            tracing::info!(?alignment, "the disk is read through the host's cache");
            direct = false;
        }
        let alignment = if direct {
            alignment
        } else {
            Alignment {
                memory: 1,
                offset: 1,
            }
        };
        let capacity = bytes - bytes % SECTOR;
        let geometry = Geometry {
            capacity,
            physical_block,
            alignment,
            read_only,
        };
        Ok(Self {
            file: Arc::new(file),
            geometry,
            direct,
        })
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether it is read and written past the host's cache.
    pub(super) fn direct(&self) -> bool {
        self.direct
    }

    /// Lets go of the host's cache of it (which O_DIRECT does not fill).
    pub(super) fn drop_cache(&self) {
        if !self.direct {
            let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        }
    }
}

/// What direct I/O needs on this file, by statx where the kernel knows (6.1), else what any storage of
/// the last decade takes; and the block size that the file system prefers.
fn inspect_alignment(file: &File) -> Result<(Alignment, u32), Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, mask)?;
    let physical_block = stat.stx_blksize.clamp(512, 1 << 16);
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align != 0;
    let alignment = if known {
        Alignment {
            memory: u64::from(stat.stx_dio_mem_align).max(1),
            offset: u64::from(stat.stx_dio_offset_align),
        }
    } else {
        Alignment {
            memory: 4096,
            offset: SECTOR,
        }
    };
    Ok((alignment, physical_block))
}

/// What to try when zeroes are to be made, in this order.
pub(super) fn zero_modes(unmap: bool) -> [FallocateFlags; 2] {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    if unmap { [punch, zero] } else { [zero, punch] }
}

/// Carries out a piece of I/O, here and now.
pub(super) fn execute(disk: &DiskFile, io: &mut Io) -> Result<(), Errno> {
    let (offset, length) = (io.offset, io.length);
    match io.operation {
        Operation::Read => transfer(disk, Way::Read, &mut io.buffer, offset),
        Operation::Write => write(disk, &mut io.buffer, offset),
        Operation::Flush => rustix::fs::fdatasync(&disk.file),
        Operation::Discard => {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&disk.file, punch, offset, length)
        }
        Operation::WriteZeroes { unmap } => {
            for mode in zero_modes(unmap) {
                match rustix::fs::fallocate(&disk.file, mode, offset, length) {
                    Err(Errno::OPNOTSUPP) => {}
                    result => return result,
                }
            }
            io.buffer = Buffer::zeroes(length).ok_or(Errno::OPNOTSUPP)?;
            write(disk, &mut io.buffer, offset)
        }
    }
}

/// Fills the buffer, here and now.
pub(super) fn read(disk: &DiskFile, buffer: &mut Buffer, offset: u64) -> Result<(), Errno> {
    transfer(disk, Way::Read, buffer, offset)
}

/// Writes all of the buffer, here and now.
pub(super) fn write(disk: &DiskFile, buffer: &mut Buffer, offset: u64) -> Result<(), Errno> {
    transfer(disk, Way::Write, buffer, offset)
}

/// What came of a write that may not wait.
pub(super) enum AtOnce {
    /// So many bytes, of which the buffer takes note; perhaps none.
    Wrote(u64),
    /// This file system has no such writes to its cache.
    Never,
}

/// Writes as much as goes without waiting for anything.
pub(super) fn write_at_once(disk: &DiskFile, io: &mut Io) -> AtOnce {
    let pieces = io.buffer.pieces();
    let (fd, start, count) = (disk.file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32);
    // SAFETY: as in `transfer`.
    let result = unsafe { libc::pwritev2(fd, start, count, io.offset as i64, libc::RWF_NOWAIT) };
    match u64::try_from(result) {
        Ok(done) => {
            io.buffer.advance(done);
            AtOnce::Wrote(done)
        }
        Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
            // The kernel or the file system does not know it.
            Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => AtOnce::Never,
            _ => AtOnce::Wrote(0),
        },
    }
}

#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
}

fn transfer(disk: &DiskFile, way: Way, buffer: &mut Buffer, mut offset: u64) -> Result<(), Errno> {
    while !buffer.pieces().is_empty() {
        let pieces = buffer.pieces();
        let (fd, start, count) = (disk.file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32);
        // SAFETY: the pieces are `count` valid iovecs; what they point to is kept alive by the buffer,
        // and is either shared guest memory (never borrowed) or memory that only this I/O has.
        let result = unsafe {
            match way {
                Way::Read => libc::preadv(fd, start, count, offset as i64),
                Way::Write => libc::pwritev(fd, start, count, offset as i64),
            }
        };
        match u64::try_from(result) {
            // Inside its size a disk has no end: it shrank under us.
            Ok(0) => return Err(Errno::IO),
            Ok(done) => {
                offset += done;
                buffer.advance(done);
            }
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                other => return Err(other.unwrap_or(Errno::IO)),
            },
        }
    }
    Ok(())
}
