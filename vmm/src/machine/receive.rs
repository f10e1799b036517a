//! A machine that arrives from another process ([`super::Sender`]).

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::send::MigrationError;
use super::snapshot::unpacked as unpacked_state;
use super::{Machine, SnapshotError};
use crate::config::{MachineConfig, MachineFiles};
use crate::memory::GuestMemory;
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::{Opening, StreamError, Target, Totals, live, malformed, unpacked};
use crate::thread::ThreadHook;

/// Bytes of state at most: what a hostile sender can make us allocate.
const MOST_STATE: usize = 64 << 20;
/// Bytes of a reason that are told at most.
const MOST_REASON: usize = 1024;

/// A machine that is here, paused, and was offered by the other side, where it stands still as well. It may run once
/// its owner knows that the other one never will; dropping it ends it.
pub struct Arrived {
    pub machine: Machine,
    pub report: ReceiveReport,
}

/// What an arrival took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveReport {
    /// As the sender has it.
    pub id: Uuid,
    pub totals: Totals,
    /// From the state's last byte to a machine.
    pub made: Duration,
}

/// Takes a machine from `connection`, whose own timeouts bound each wait, to memory of its own. `here` says which of
/// the host's CPUs and NUMA nodes it may use. The sender is told how it went.
///
/// # Errors
/// The stream is damaged, cut short, hostile or of another build, or this host cannot run the machine. Nothing of it is
/// left.
pub fn receive<S: Read + Write>(
    connection: S,
    here: &MachineConfig,
    files: MachineFiles,
    hook: Option<ThreadHook>,
) -> Result<Arrived, MigrationError> {
    let mut frames = FrameReader::new(connection);
    match take(&mut frames, here, files, hook) {
        Ok(arrived) => {
            FrameWriter::new(frames.get_mut()).write(Kind::Ready, b"")?;
            Ok(arrived)
        }
        Err(error) => {
            let mut reason = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                reason = format!("{reason}: {cause}");
                source = cause.source();
            }
            let reason = reason.as_bytes();
            let reason = reason.get(..MOST_REASON).unwrap_or(reason);
            // Who sent it may be gone.
            let _ = FrameWriter::new(frames.get_mut()).write(Kind::Refused, reason);
            Err(error)
        }
    }
}

fn take<S: Read>(
    frames: &mut FrameReader<S>,
    here: &MachineConfig,
    files: MachineFiles,
    hook: Option<ThreadHook>,
) -> Result<Arrived, MigrationError> {
    let opening: Opening = match frames.next_frame()? {
        (Kind::Opening, payload) => unpacked(payload)?,
        _ => return Err(malformed("it does not begin with its opening").into()),
    };
    let mut config: MachineConfig = match frames.next_frame()? {
        (Kind::Config, payload) => unpacked(payload)?,
        _ => return Err(malformed("it has no configuration").into()),
    };
    config.take_place(here);
    config.validate()?;
    config.validate_files(&files)?;
    let memory = GuestMemory::create_with(&config.memory, config.hot_memory.as_ref())?;
    let bytes = memory.length().map_err(SnapshotError::Read)?;
    if opening.memory != bytes {
        return Err(StreamError::Shape {
            expected: bytes,
            found: opening.memory,
        }
        .into());
    }
    let (mut totals, mut state) = (Totals::default(), Vec::new());
    loop {
        match frames.next_frame()? {
            (Kind::Pages, payload) => {
                let more = live::put(payload, &memory, bytes)?;
                totals.pages += more.pages;
                totals.zeros += more.zeros;
            }
            (Kind::State, payload) if state.len() + payload.len() > MOST_STATE => {
                return Err(malformed("more state than any machine has").into());
            }
            (Kind::State, payload) => state.extend_from_slice(payload),
            (Kind::End, payload) if unpacked::<Totals>(payload)? == totals => break,
            (Kind::End, _) => {
                return Err(malformed("its end counts other pages than it has").into());
            }
            _ => return Err(malformed("a frame where none of its kind should be").into()),
        }
    }
    let began = Instant::now();
    let mut state = unpacked_state(&state)?;
    state.take_place(here);
    // Its memory is mapped by what the state says of it.
    let arrives = state.config();
    let most = |config: &MachineConfig| config.hot_memory.map(|hot| hot.max);
    if arrives.memory != config.memory || most(arrives) != most(&config) {
        return Err(malformed("its state and its configuration tell of different memory").into());
    }
    let file = memory.file().try_clone().map_err(SnapshotError::Read)?;
    drop(memory);
    let machine = Machine::restore(state, file, files, hook)?;
    let report = ReceiveReport {
        id: opening.id,
        totals,
        made: began.elapsed(),
    };
    Ok(Arrived { machine, report })
}
