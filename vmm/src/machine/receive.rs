//! A machine that arrives from another process ([`super::Sender`]).

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::send::MigrationError;
use super::snapshot::unpacked as unpacked_state;
use super::state::STATE_VERSION;
use super::{BuildError, Machine, SnapshotError};
use crate::config::{MachineConfig, MachineFiles};
use crate::memory::GuestMemory;
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::{MOST_STATE, Opening, StreamError, Target, Totals, live, malformed, unpacked};
use crate::thread::ThreadHook;

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

/// Takes a machine from `connection`, whose own timeouts bound each wait, to memory of its own. `here` says how large it
/// is and which of the host's CPUs and NUMA nodes it may use. The sender is told how it went.
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
            let flushed = frames.get_mut().flush();
            flushed.map_err(|source| StreamError::Io {
                action: "write",
                source,
            })?;
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

/// Of a build whose state is of the same form: another's may say something else by the same bytes.
fn config_in(payload: &[u8]) -> Result<MachineConfig, MigrationError> {
    let (version, config) = payload
        .split_first_chunk()
        .ok_or_else(|| malformed("it has no configuration"))?;
    let version = u32::from_le_bytes(*version);
    if version != STATE_VERSION {
        return Err(BuildError::StateVersion { version }.into());
    }
    Ok(unpacked(config)?)
}

/// It is to be as large as was agreed: nothing is taken from the host because a stream says so.
fn check_shape(arrives: &MachineConfig, here: &MachineConfig) -> Result<(), StreamError> {
    let shape = |config: &MachineConfig| {
        let hot = config.hot_memory.map(|hot| hot.max);
        (
            config.memory.bytes,
            config.memory.pages,
            hot,
            config.cpus.most(),
        )
    };
    match shape(arrives) == shape(here) {
        true => Ok(()),
        false => Err(malformed(
            "a machine of other memory or vCPUs than was agreed",
        )),
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
    if let Some(base) = opening.base {
        return Err(SnapshotError::Base { base }.into());
    }
    let mut config = match frames.next_frame()? {
        (Kind::Config, payload) => config_in(payload)?,
        _ => return Err(malformed("it has no configuration").into()),
    };
    config.take_place(here);
    check_shape(&config, here)?;
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
            (Kind::Pages | Kind::State, []) => return Err(malformed("a frame of nothing").into()),
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
    check_shape(state.config(), here)?;
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
