//! Disks as raw files in the machine's folder.
//!
//! A disk is made beside its place and renamed when it is whole, so that whatever stands there is
//! whole. A qcow2 image is converted; one that names a backing or data file is refused, since those
//! would be files of the host.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fractus_agent_api::machine::ImageFormat;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder};
use rustix::fs::{Advice, CWD, RenameFlags, SeekFrom, fadvise, renameat_with, seek};
use rustix::io::Errno;

use super::room::{NoRoom, Room};
use crate::image::cache::is_full;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("the host has no room left for a disk of {size} bytes")]
    Full { size: u64 },
    #[error("making {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("opening {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("deleting {path}: {source}")]
    Delete { path: PathBuf, source: io::Error },
    #[error("the image is no qcow2 that can be used: {detail}")]
    Qcow2 { detail: String },
    #[error("{path} is no file: a disk is kept in one")]
    NoFile { path: PathBuf },
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("no longer wanted")]
    Cancelled,
}

/// Ends the work when dropped: the caller no longer waits for it.
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub fn new() -> (Self, Arc<AtomicBool>) {
        let flag = Arc::new(AtomicBool::new(false));
        (Self(flag.clone()), flag)
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const CHUNK: usize = 1 << 20;
/// Bytes of a copy between two looks at what is free.
const LOOK_EVERY: u64 = 64 << 20;
/// A disk has whole ones, bytes.
pub const BLOCK: u64 = 4096;

/// What happens to a disk that stands in the place already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Old {
    /// It is whole, since it stands there: the new one is given up for it.
    Keep,
    Replace,
}

/// Makes a raw disk at `path` of `size` bytes or the image's virtual size, whichever is larger. Holes
/// stay holes. Blocks.
pub fn make(
    path: &Path,
    old: Old,
    size: u64,
    image: Option<(File, ImageFormat)>,
    cancelled: &AtomicBool,
) -> Result<(), VolumeError> {
    let goes_on = |_: &File, _| match cancelled.load(Ordering::Relaxed) {
        true => Err(VolumeError::Cancelled),
        false => Ok(()),
    };
    make_while(path, old, size, image, &goes_on)
}

/// Makes a copy of `disk` at `path`, and leaves others room: it is refused, and ends, where that would not be. Its
/// bytes. Blocks.
pub fn copy_disk(disk: File, path: &Path, cancelled: &AtomicBool) -> Result<u64, VolumeError> {
    let io = |source| VolumeError::Io {
        path: path.to_owned(),
        source,
    };
    let about = disk.metadata().map_err(io)?;
    Room::beside(&disk).map_err(io)?.takes(0)?;
    let looked_at = Cell::new(0);
    let goes_on = |copy: &File, at: u64| {
        if cancelled.load(Ordering::Relaxed) {
            return Err(VolumeError::Cancelled);
        }
        // Room for all of it, once blocks cannot be shared; and then that others still have some.
        let bytes = match at {
            0 => about.blocks() * 512,
            _ if at.saturating_sub(looked_at.get()) < LOOK_EVERY => return Ok(()),
            _ => 0,
        };
        looked_at.set(at);
        Ok(Room::beside(copy).map_err(io)?.takes(bytes)?)
    };
    let image = disk.try_clone().map_err(io)?;
    let image = Some((image, ImageFormat::Raw));
    make_while(path, Old::Replace, about.len(), image, &goes_on)?;
    // Nobody reads it again soon.
    let _ = fadvise(&disk, 0, None, Advice::DontNeed);
    Ok(fs::metadata(path).map_err(io)?.len())
}

/// Asked before each chunk of the new file, which begins there, and at the end.
type GoesOn<'a> = &'a dyn Fn(&File, u64) -> Result<(), VolumeError>;

fn make_while(
    path: &Path,
    old: Old,
    size: u64,
    image: Option<(File, ImageFormat)>,
    goes_on: GoesOn<'_>,
) -> Result<(), VolumeError> {
    let io = |source| match is_full(&source) {
        true => VolumeError::Full { size },
        false => VolumeError::Io {
            path: path.to_owned(),
            source,
        },
    };
    // A name of its own: an earlier attempt that was given up may still be writing.
    let beside = path.with_extension(format!("{}.new", uuid::Uuid::new_v4().simple()));
    let made = (|| {
        let disk = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&beside)
            .map_err(io)?;
        let content = match image {
            None => 0,
            Some((image, ImageFormat::Raw)) => copy_raw(&image, &disk, goes_on, &io)?,
            Some((image, ImageFormat::Qcow2)) => copy_qcow2(image, &disk, goes_on, &io)?,
        };
        disk.set_len(size.max(content).next_multiple_of(BLOCK))
            .map_err(io)?;
        disk.sync_all().map_err(io)?;
        goes_on(&disk, size)?;
        match old {
            Old::Replace => fs::rename(&beside, path).map_err(io),
            Old::Keep => match renameat_with(CWD, &beside, CWD, path, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => fs::remove_file(&beside).map_err(io),
                other => other.map_err(|errno| io(errno.into())),
            },
        }
    })();
    if made.is_err() {
        let _ = fs::remove_file(&beside);
    }
    made
}

/// A disk that can be handed to a machine.
#[derive(Debug)]
pub struct OpenDisk {
    pub file: File,
    /// Past the host's cache (O_DIRECT).
    pub direct: bool,
    /// Of the disk; nothing behind them is written.
    pub bytes: u64,
}

/// Opens the disk that stands at `path`, past the host's cache where the file system can. Blocks.
pub fn open(path: &Path, read_only: bool) -> Result<OpenDisk, VolumeError> {
    let io = |source| VolumeError::Open {
        path: path.to_owned(),
        source,
    };
    let mut options = File::options();
    options.read(true).write(!read_only);
    let (file, direct) = match options.clone().custom_flags(libc::O_DIRECT).open(path) {
        Ok(file) => (file, true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            (options.open(path).map_err(io)?, false)
        }
        Err(error) => return Err(io(error)),
    };
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        let path = path.to_owned();
        return Err(VolumeError::NoFile { path });
    }
    Ok(OpenDisk {
        file,
        direct,
        bytes: about.len(),
    })
}

/// The same for one that is made, empty, where there is none, and made larger where it is too small.
/// No guest has it now.
pub fn open_or_make(path: &Path, size: u64, read_only: bool) -> Result<OpenDisk, VolumeError> {
    let io = |source| VolumeError::Io {
        path: path.to_owned(),
        source,
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let size = size.next_multiple_of(BLOCK);
            make(path, Old::Keep, size, None, &AtomicBool::new(false))?;
        }
        Err(error) => return Err(io(error)),
        Ok(_) => grow(path, size)?,
    }
    open(path, read_only)
}

/// The disk that stands there has `size` bytes at least afterwards; it is never made smaller. No guest has it now.
pub fn grow(path: &Path, size: u64) -> Result<(), VolumeError> {
    let io = |source| VolumeError::Io {
        path: path.to_owned(),
        source,
    };
    let size = size.next_multiple_of(BLOCK);
    let about = fs::metadata(path).map_err(io)?;
    if about.is_file() && about.len() < size {
        let file = File::options().write(true).open(path).map_err(io)?;
        file.set_len(size).map_err(io)?;
    }
    Ok(())
}

/// The disk at `path` is what stands at `copy`, in place of any other: both are names of one file from then on. It takes no
/// room, and may be repeated. No guest has either now.
pub fn take(copy: &Path, path: &Path) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Io {
        path: path.to_owned(),
        source,
    };
    let beside = path.with_extension(format!("{}.new", uuid::Uuid::new_v4().simple()));
    fs::hard_link(copy, &beside).map_err(|source| VolumeError::Open {
        path: copy.to_owned(),
        source,
    })?;
    let taken = fs::rename(&beside, path).map_err(failed);
    // Where it was taken before, both names are of one file already, and rename(2) does nothing.
    match fs::remove_file(&beside) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed(source)),
        _ => taken?,
    }
    let folder = path
        .parent()
        .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let folder = File::open(folder).map_err(failed)?;
    folder.sync_all().map_err(failed)
}

/// Nothing stands there afterwards.
pub fn delete(path: &Path) -> Result<(), VolumeError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(VolumeError::Delete {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn copy_raw(
    image: &File,
    disk: &File,
    goes_on: GoesOn<'_>,
    io: &dyn Fn(io::Error) -> VolumeError,
) -> Result<u64, VolumeError> {
    let length = image.metadata().map_err(io)?.len();
    // A clone shares the blocks, where the file system can.
    if rustix::fs::ioctl_ficlone(disk.as_fd(), image.as_fd()).is_ok() {
        return Ok(length);
    }
    disk.set_len(length).map_err(io)?;
    let data = |at| match seek(image, SeekFrom::Data(at)) {
        Ok(data) => data.max(at),
        Err(Errno::NXIO) => length,
        // What does not know of holes is all data; what cannot be read says so then.
        Err(_) => at,
    };
    let read = |buffer: &mut [u8], at| image.read_exact_at(buffer, at);
    copy(length, disk, goes_on, io, data, read)?;
    Ok(length)
}

fn copy_qcow2(
    image: File,
    disk: &File,
    goes_on: GoesOn<'_>,
    io: &dyn Fn(io::Error) -> VolumeError,
) -> Result<u64, VolumeError> {
    let unusable = |e: io::Error| VolumeError::Qcow2 {
        detail: e.to_string(),
    };
    refuse_outside_files(&image)?;
    let storage = ImagoFile::try_from(image).map_err(unusable)?;
    let qcow2 = Qcow2::<ImagoFile>::builder(storage)
        .backing(None)
        .write(false)
        .open(imago::DenyImplicitOpenGate::default())
        .map_err(unusable)?;
    let image = FormatAccess::new(qcow2);
    let length = image.size();
    if length > 1 << 46 {
        return Err(VolumeError::Qcow2 {
            detail: format!("virtual size of {length} bytes"),
        });
    }
    disk.set_len(length).map_err(io)?;
    let read = |buffer: &mut [u8], at| image.read(buffer, at);
    copy(length, disk, goes_on, io, |at| at, read)?;
    Ok(length)
}

/// The qcow2 header (docs/interop/qcow2.txt): bytes 8-15 say where a backing file's name is, bit 2 of
/// the incompatible features (bytes 72-79, version 3) that there is a data file.
fn refuse_outside_files(image: &File) -> Result<(), VolumeError> {
    let refused = |detail: &str| {
        Err(VolumeError::Qcow2 {
            detail: detail.to_owned(),
        })
    };
    let mut header = [0; 80];
    if image.read_exact_at(&mut header, 0).is_err() || !header.starts_with(b"QFI\xfb") {
        return refused("it is too short, or has no qcow2 header");
    }
    let [.., features_end] = header;
    if header.get(8..16).is_some_and(|backing| backing != [0; 8]) {
        return refused("it has a backing file");
    }
    let version = header
        .get(4..8)
        .map_or(0, |bytes| u8::from(bytes.ends_with(&[3])));
    if version == 1 && features_end & 0b100 != 0 {
        return refused("it has an external data file");
    }
    Ok(())
}

/// Leaves out what is zero: the disk is sparse. `data` says where the next may be that is not, at this place or behind.
fn copy(
    length: u64,
    disk: &File,
    goes_on: GoesOn<'_>,
    io: &dyn Fn(io::Error) -> VolumeError,
    data: impl Fn(u64) -> u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> Result<(), VolumeError> {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < length {
        goes_on(disk, at)?;
        at = data(at);
        if at >= length {
            break;
        }
        let now = CHUNK.min((length - at) as usize);
        let Some(chunk) = buffer.get_mut(..now) else {
            break;
        };
        read(chunk, at).map_err(io)?;
        if chunk.iter().any(|byte| *byte != 0) {
            disk.write_all_at(chunk, at).map_err(io)?;
        }
        at += now as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
