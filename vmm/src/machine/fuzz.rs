//! What a receiver can be sent, driven by bytes: for `cargo fuzz` and for tests.
//!
//! It goes as far as there is a board without KVM: the stream is read into memory and disks, what follows the guest is
//! taken in by the threads that a machine has for it, the devices are made from what the stream says of them, run, and come
//! to rest. What is left out is KVM's: it takes the vCPUs' registers or refuses.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendFlags, Shutdown};

use super::MigrationError;
use super::build::check;
use super::feeding::{AtEnd, Feeding};
use super::receive::{Gathered, Landing, gather};
use super::snapshot::{Loading, loaded};
use super::state::MachineState;
use crate::config::MachineFiles;
use crate::device::SavedDevices;
use crate::fuzzing::rig::{DISK, Rig, every_device, files_of_every_device};
use crate::fuzzing::sparse;
use crate::memory::{Faults, GuestMemory};
use crate::request::{Request, channel};
use crate::stream::frame::{self, FrameReader};
use crate::stream::snapshot::{self, Snapshot};
use crate::thread::Threads;

/// Bytes of a live stream at most.
const STREAM_MAX: usize = 1 << 20;
/// Bytes of a snapshot's file at most, holes and all.
const FILE_MAX: u64 = 1 << 30;

/// Bits of an input's first byte. It is a snapshot's file, else a live stream.
pub(super) const SNAPSHOT: u8 = 1;
/// Checksums are made right: what was changed is believed.
pub(super) const SEALED: u8 = 2;
/// The frames' numbers, too.
pub(super) const NUMBERED: u8 = 4;
/// The file's memory is mapped, not read. Of [`ANSWERS`]: they are said by another connection than the first.
pub(super) const LAZY: u8 = 8;
/// It is what the other side says of memory that follows, to who sends it.
pub(super) const ANSWERS: u8 = 16;
/// It is the first message of a machine that is handed over, with as many descriptors as its first byte says.
pub(super) const PARCEL: u8 = 32;

/// Reads `input` as what arrives at a host that awaits the smallest machine with every device: a byte of bits, then a
/// stream or a file, [`sparse`]. Also what arrives at one that has sent a machine.
///
/// # Panics
/// If a device does, or does not come to rest, or cannot be saved or reset: a bug.
pub fn fuzz_receive(input: &[u8]) {
    if let Some((mode, squeezed)) = input.split_first() {
        // Refused is an answer.
        let _ = receive(*mode, squeezed);
    }
}

/// Of a stream and a file a board is made, and all is done to it.
pub(super) fn receive(mode: u8, squeezed: &[u8]) -> Result<(), Box<dyn Error>> {
    if mode & PARCEL != 0 {
        return super::handover::fuzz_parcel(squeezed);
    }
    if mode & ANSWERS != 0 {
        let says = stream_in(mode, squeezed);
        return super::send::fuzz_answers(&says, mode & LAZY != 0);
    }
    let (files, _outside) = files_of_every_device()?;
    let (state, memory, files) = match mode & SNAPSHOT {
        0 => from_stream(mode, squeezed, files)?,
        _ => {
            let (state, memory) = from_file(mode, squeezed)?;
            (state, memory, files)
        }
    };
    let rig = board(state, memory, &files)?;
    exercise(&rig);
    Ok(())
}

type Parts = (MachineState, GuestMemory, MachineFiles);

fn stream_in(mode: u8, squeezed: &[u8]) -> Vec<u8> {
    let mut stream = sparse::spread(squeezed, STREAM_MAX);
    if mode & SEALED != 0 {
        frame::seal(&mut stream, mode & NUMBERED != 0);
    }
    stream
}

fn from_stream(mode: u8, squeezed: &[u8], files: MachineFiles) -> Result<Parts, Box<dyn Error>> {
    let stream = stream_in(mode, squeezed);
    let most = vec![DISK; files.disks.len()];
    let land = |_: &[u8]| {
        Ok(Landing {
            // Where there are none, what follows is refused.
            faults: Faults::open().ok(),
            ..landing(files, most)
        })
    };
    let mut frames = FrameReader::new(stream.as_slice());
    let no_lanes = |_, _: &_, _: &_, _: &_| Ok(Default::default());
    let mut gathered = gather(&mut frames, &every_device(), land, no_lanes, |_| Ok(()))?;
    if gathered.owed.count() > 0 {
        follow(&mut gathered, &mut frames)?;
    }
    let (state, file) = (gathered.state, gathered.memory.file().try_clone()?);
    drop(gathered.memory);
    // By what the state says of it, as `receive` has it.
    let config = &state.config;
    let memory = GuestMemory::map(file, &config.memory, config.hot_memory.as_ref())?;
    Ok((state, memory, gathered.files))
}

/// Takes in what follows the guest, to the last of it, as a machine does that runs already.
///
/// # Errors
/// Not all of it comes.
fn follow(gathered: &mut Gathered, frames: &mut FrameReader<&[u8]>) -> Result<(), Box<dyn Error>> {
    let faults = gathered.faults.take().ok_or(MigrationError::NoPostCopy)?;
    let owed = std::mem::take(&mut gathered.owed);
    let (requests, news) = channel()?;
    let threads = Threads::new(None, requests.clone());
    let (near, far) = UnixStream::pair()?;
    let came = frames.frames();
    let board = (&threads, &requests);
    let feeding = Feeding::begin(owed, faults, &gathered.memory, board, &far, [came, 0])?;
    let feeding = Arc::new(feeding);
    let rest: &[u8] = frames.get_mut();
    let is_whole = thread::scope(|scope| {
        let sends = scope.spawn(|| {
            let mut left = rest;
            while !left.is_empty()
                && let Ok(sent) = rustix::net::send(&near, left, SendFlags::NOSIGNAL)
            {
                left = left.get(sent..).unwrap_or_default();
            }
            // Nothing follows that; what is said can still be.
            let _ = rustix::net::shutdown(&near, Shutdown::Write);
        });
        let is_whole = loop {
            match news.try_next() {
                Some(Request::Whole) => break true,
                Some(_) => break false,
                None => {
                    let mut fds = [PollFd::new(&news, PollFlags::IN)];
                    let _ = rustix::event::poll(&mut fds, None);
                }
            }
        };
        // Whoever still sends what nobody takes.
        let _ = rustix::net::shutdown(&far, Shutdown::Both);
        let _ = sends.join();
        is_whole
    });
    drop(AtEnd(Some(Arc::clone(&feeding))));
    drop(feeding);
    match is_whole {
        true => Ok(()),
        false => Err("not all of its memory has come".into()),
    }
}

/// Nothing of memory follows.
pub(super) fn landing(files: MachineFiles, most: Vec<u64>) -> Landing {
    Landing {
        files,
        most,
        faults: None,
    }
}

fn from_file(mode: u8, squeezed: &[u8]) -> Result<(MachineState, GuestMemory), Box<dyn Error>> {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC)?);
    let (length, pieces) = sparse::pieces(squeezed);
    file.set_len(length.min(FILE_MAX))?;
    for (place, piece) in pieces {
        if place < FILE_MAX {
            file.write_all_at(piece, place)?;
        }
    }
    if mode & SEALED != 0 {
        snapshot::seal(&file, mode & NUMBERED != 0)?;
    }
    // One that is compressed may say that it has more.
    if snapshot::memory_in(&file) > Some(FILE_MAX) {
        return Err("more memory than is to be made".into());
    }
    let loading = match mode & LAZY {
        0 => Loading::Eager,
        _ => Loading::Lazy,
    };
    let snapshot = Snapshot::open(read_only(&file)?)?;
    Ok(loaded(&[&snapshot], &every_device(), loading)?)
}

/// The same file, as it is handed over to be mapped.
pub(super) fn read_only(file: &File) -> std::io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// As [`super::build`] makes it, but for KVM.
pub(super) fn board(
    state: MachineState,
    memory: GuestMemory,
    files: &MachineFiles,
) -> Result<Rig, Box<dyn Error>> {
    check(&state)?;
    let config = &state.config;
    config.validate_files(files)?;
    let saved = SavedDevices::new(state.devices);
    Rig::build(config, files, memory, saved, state.placement)
}

/// Whatever it was made of, it is a board.
fn exercise(rig: &Rig) {
    for step in ["goes on", "is saved", "is reset", "runs", "is saved"] {
        for device in &rig.devices {
            let done = match step {
                "goes on" | "runs" => device.resume(),
                "is reset" => device.reset(),
                _ => device.pause().and_then(|()| device.save().map(drop)),
            };
            assert!(done.is_ok(), "{} not {step}: {done:?}", device.id());
        }
    }
}
