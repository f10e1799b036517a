//! A machine that arrives from another process ([`super::Sender`]).

pub(super) mod lanes;

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use uuid::Uuid;

use self::lanes::Lanes;
use super::build::{Chassis, restore_on};
use super::clocks::Passage;
use super::feeding::Feeding;
use super::send::MigrationError;
use super::snapshot::unpacked as unpacked_state;
use super::state::{MachineState, STATE_VERSION};
use super::{BuildError, Machine, SnapshotError, in_full};
use crate::config::{MachineConfig, MachineFiles};
use crate::memory::{Faults, GuestMemory, PageSet};
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::lane::Connections;
use crate::stream::{MOST_STATE, Opening, StreamError, Target, Totals, live, malformed, unpacked};
use crate::thread::{ThreadHook, Threads};
use crate::virtio::block::DiskTarget;

/// Bytes of a reason that are told at most.
const MOST_REASON: usize = 1024;

/// A machine that is here, paused, and was offered by the other side, where it stands still as well. It may run once
/// its owner knows that the other one never will; dropping it ends it.
pub struct Arrived {
    pub machine: Machine,
    /// It ran where it was, and is to run here.
    pub ran: bool,
    /// What its owner kept with it there.
    pub owner: Vec<u8>,
    pub report: ReceiveReport,
}

/// What a machine comes to.
pub struct Landing {
    pub files: MachineFiles,
    /// Bytes that each disk may have at most, where their content is to come: a file that is open for writing, and loses
    /// what it had. Empty: they have it.
    pub most: Vec<u64>,
    /// What memory needs that is to come after the guest; `None`: it cannot.
    pub faults: Option<Faults>,
}

/// What an arrival took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveReport {
    /// As the sender has it.
    pub id: Uuid,
    pub totals: Totals,
    pub disks: Totals,
    /// From the state's last byte to a machine.
    pub made: Duration,
}

/// Takes a machine from `connection`, whose own timeouts bound each wait, to memory of its own. `here` says how large it
/// is and which of the host's CPUs and NUMA nodes it may use; `land` is given what the machine's owner keeps with it, and
/// gives its files. The sender is told how it went.
///
/// # Errors
/// The stream is damaged, cut short, hostile or of another build, or this host cannot run the machine. Nothing of it is
/// left but what its disks hold.
pub fn receive<S: Read + Write + AsFd>(
    connection: S,
    here: &MachineConfig,
    land: impl FnOnce(&[u8]) -> Result<Landing, String>,
    hook: Option<ThreadHook>,
) -> Result<Arrived, MigrationError> {
    receive_with(connection, here, land, hook, |_, _, _| Ok(Lanes::default()))
}

/// The same of one whose memory comes by lanes, if there are any ([`super::Sender::begin_by`]).
///
/// # Errors
/// Likewise; none of the lanes' threads is left.
pub fn receive_by<S: Read + Write + AsFd + Send + 'static>(
    connections: Connections<S>,
    here: &MachineConfig,
    land: impl FnOnce(&[u8]) -> Result<Landing, String>,
    hook: Option<ThreadHook>,
) -> Result<Arrived, MigrationError> {
    let Connections { main, lanes } = connections;
    if lanes.is_empty() {
        return receive(main, here, land, hook);
    }
    let own = main.as_fd().try_clone_to_owned();
    let own = own.map_err(|source| StreamError::Io {
        action: "make lanes of",
        source,
    })?;
    receive_with(main, here, land, hook, |stream, memory, threads| {
        Lanes::begin(lanes, own, stream, memory, threads)
    })
}

fn receive_with<S: Read + Write + AsFd>(
    connection: S,
    here: &MachineConfig,
    land: impl FnOnce(&[u8]) -> Result<Landing, String>,
    hook: Option<ThreadHook>,
    lanes: impl FnOnce(Uuid, &GuestMemory, &Threads) -> Result<Lanes, MigrationError>,
) -> Result<Arrived, MigrationError> {
    let mut frames = FrameReader::new(connection);
    let mut answers = 0;
    match take(&mut frames, here, land, hook, lanes, &mut answers) {
        Ok(arrived) if arrived.machine.feeding.is_some() => {
            if let Some(feeding) = &arrived.machine.feeding {
                feeding.say_ready()?;
            }
            Ok(arrived)
        }
        Ok(arrived) => {
            FrameWriter::behind(frames.get_mut(), answers).write(Kind::Ready, b"")?;
            let flushed = frames.get_mut().flush();
            flushed.map_err(|source| StreamError::Io {
                action: "write",
                source,
            })?;
            Ok(arrived)
        }
        Err(error) => {
            // Who sent it may be gone.
            let _ = FrameWriter::behind(frames.get_mut(), answers)
                .write(Kind::Refused, &reason(&error));
            let _ = frames.get_mut().flush();
            Err(error)
        }
    }
}

/// For people on the other side.
pub(super) fn reason(error: &dyn std::error::Error) -> Vec<u8> {
    let mut reason = in_full(error).into_bytes();
    reason.truncate(MOST_REASON);
    reason
}

/// Of a build whose state is of the same form: another's may say something else by the same bytes.
pub(super) fn config_in(payload: &[u8]) -> Result<MachineConfig, MigrationError> {
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

/// What is made before the state comes is what the state needs.
pub(super) fn is_made_alike(one: &MachineConfig, other: &MachineConfig) -> bool {
    let made = |config: &MachineConfig| {
        let (cpus, hot) = (&config.cpus, config.hot_memory.map(|hot| hot.max));
        let vcpus = (cpus.most(), cpus.max.is_some(), cpus.profile.clone());
        (config.memory.clone(), hot, vcpus, cpus.host_cpus.clone())
    };
    made(one) == made(other)
}

/// Disks whose content comes, in the order of the configuration.
#[derive(Default)]
struct Disks {
    targets: Vec<DiskTarget>,
    /// Something has come that may not be durable.
    unsettled: bool,
}

impl Disks {
    /// Empty, and as large as they are where they come from.
    fn make(payload: &[u8], landing: &Landing) -> Result<Self, MigrationError> {
        let sizes: Vec<u64> = unpacked(payload)?;
        let files = &landing.files.disks;
        if sizes.len() != files.len() || sizes.len() != landing.most.len() {
            return Err(malformed("the content of more or fewer disks than it has").into());
        }
        let mut targets = Vec::new();
        let all = sizes.iter().zip(files).zip(&landing.most).enumerate();
        for (index, ((bytes, file), most)) in all {
            let failed = |source| MigrationError::Disk {
                action: "make",
                index,
                source,
            };
            if bytes > most {
                return Err(malformed("a larger disk than was agreed").into());
            }
            let disk = DiskTarget::empty(file, *bytes);
            targets.push(disk.map_err(|error| failed(io::Error::other(error)))?);
        }
        Ok(Disks {
            unsettled: !targets.is_empty(),
            targets,
        })
    }

    fn put(&mut self, payload: &[u8]) -> Result<Totals, MigrationError> {
        let (index, payload) = live::of_disk(payload)?;
        self.unsettled = true;
        let disk = self.targets.get(index as usize);
        let disk = disk.ok_or_else(|| malformed("the content of a disk that does not come"))?;
        let length = disk.length().map_err(|source| MigrationError::Disk {
            action: "look at",
            index: index as usize,
            source,
        })?;
        Ok(live::put(payload, disk, length)?)
    }

    /// A guest that has written nothing since does not stand still for it.
    fn settle(&mut self) -> Result<(), MigrationError> {
        if !std::mem::take(&mut self.unsettled) {
            return Ok(());
        }
        for (index, disk) in self.targets.iter().enumerate() {
            disk.settle().map_err(|source| MigrationError::Disk {
                action: "make durable",
                index,
                source,
            })?;
        }
        Ok(())
    }
}

/// A stream that was read to its end, and no machine yet: all that can be told of it without KVM has been.
pub(super) struct Gathered {
    pub(super) id: Uuid,
    pub(super) state: MachineState,
    pub(super) memory: GuestMemory,
    pub(super) files: MachineFiles,
    pub(super) ran: bool,
    pub(super) owner: Vec<u8>,
    pub(super) totals: Totals,
    pub(super) disks: Totals,
    /// Pages that come later.
    pub(super) owed: PageSet,
    pub(super) faults: Option<Faults>,
    /// When its last byte had come.
    at: Instant,
    /// What is known of the way by which it came.
    passage: Passage,
}

/// What the first frame says.
fn opening_of<S: Read>(frames: &mut FrameReader<S>) -> Result<Opening, MigrationError> {
    let opening: Opening = match frames.next_frame()? {
        (Kind::Opening, payload) => unpacked(payload)?,
        _ => return Err(malformed("it does not begin with its opening").into()),
    };
    match opening.base {
        Some(base) => Err(SnapshotError::Base { base }.into()),
        None => Ok(opening),
    }
}

/// What the second one says, as it is to be here.
fn config_of<S: Read>(
    frames: &mut FrameReader<S>,
    here: &MachineConfig,
) -> Result<MachineConfig, MigrationError> {
    let mut config = match frames.next_frame()? {
        (Kind::Config, payload) => config_in(payload)?,
        _ => return Err(malformed("it has no configuration").into()),
    };
    config.take_place(here);
    check_shape(&config, here)?;
    config.validate()?;
    Ok(config)
}

/// What the last frame says, if it counts what has come.
fn ran_there(payload: &[u8], came: (Totals, Totals)) -> Result<bool, StreamError> {
    let ending: live::Ending = unpacked(payload)?;
    match (ending.memory, ending.disks) == came {
        true => Ok(ending.ran),
        false => Err(malformed("its end counts other pages than it has")),
    }
}

fn take<S: Read + Write + AsFd>(
    frames: &mut FrameReader<S>,
    here: &MachineConfig,
    land: impl FnOnce(&[u8]) -> Result<Landing, String>,
    hook: Option<ThreadHook>,
    lanes: impl FnOnce(Uuid, &GuestMemory, &Threads) -> Result<Lanes, MigrationError>,
    answers: &mut u32,
) -> Result<Arrived, MigrationError> {
    let mut chassis = None;
    let prepare = |stream, config: &_, files: &_, memory: &GuestMemory| {
        let made = Chassis::new(config, files, memory.clone(), hook)?;
        let lanes = lanes(stream, memory, &made.board().threads)?;
        chassis = Some(made);
        Ok(lanes)
    };
    let settled = |connection: &mut S| {
        FrameWriter::behind(&mut *connection, *answers).write(Kind::Got, b"")?;
        *answers += 1;
        connection.flush().map_err(|source| StreamError::Io {
            action: "write",
            source,
        })
    };
    let gathered = gather(frames, here, land, prepare, settled)?;
    let chassis = chassis.ok_or_else(|| malformed("it has no configuration"))?;
    let board = chassis.board().clone();
    let mut feeding = None;
    if gathered.owed.count() > 0 {
        let faults = gathered.faults.ok_or(MigrationError::NoPostCopy)?;
        let came = frames.frames();
        let begun = Feeding::begin(
            gathered.owed,
            faults,
            &gathered.memory,
            (&board.threads, &board.requests),
            frames.get_mut(),
            [came, *answers],
        )?;
        feeding = Some(begun);
    }
    let missed = || gathered.passage.missed();
    let restored = restore_on(chassis, gathered.state, gathered.files, missed);
    let mut machine = restored.inspect_err(|error| {
        if let Some(feeding) = &feeding {
            feeding.say_refused(&reason(error));
        }
    })?;
    machine.is_new_here = true;
    if let Some(feeding) = feeding {
        machine.is_fed_by(feeding);
    }
    let report = ReceiveReport {
        id: gathered.id,
        totals: gathered.totals,
        disks: gathered.disks,
        made: gathered.at.elapsed(),
    };
    Ok(Arrived {
        machine,
        ran: gathered.ran,
        owner: gathered.owner,
        report,
    })
}

/// Reads a stream to its end, into memory and disks of this host's; see [`receive`]. Once there is memory, `prepare` may
/// have it come by lanes; then `settled` says each time that disks are durable.
pub(super) fn gather<S: Read>(
    frames: &mut FrameReader<S>,
    here: &MachineConfig,
    land: impl FnOnce(&[u8]) -> Result<Landing, String>,
    prepare: impl FnOnce(
        Uuid,
        &MachineConfig,
        &MachineFiles,
        &GuestMemory,
    ) -> Result<Lanes, MigrationError>,
    mut settled: impl FnMut(&mut S) -> Result<(), StreamError>,
) -> Result<Gathered, MigrationError> {
    let opening = opening_of(frames)?;
    let config = config_of(frames, here)?;
    let mut owner = match frames.next_frame()? {
        (Kind::Owner, payload) => payload.to_vec(),
        _ => return Err(malformed("nothing is said by its owner").into()),
    };
    let landing = land(&owner).map_err(MigrationError::Unprepared)?;
    config.validate_files(&landing.files)?;
    let memory = GuestMemory::create_with(&config.memory, config.hot_memory.as_ref())?;
    let bytes = memory.length().map_err(SnapshotError::Read)?;
    if opening.memory != bytes {
        return Err(StreamError::Shape {
            expected: bytes,
            found: opening.memory,
        }
        .into());
    }
    let mut lanes = prepare(opening.id, &config, &landing.files, &memory)?;
    let mut owed = PageSet::new(bytes);
    let (mut totals, mut disk_totals) = (Totals::default(), Totals::default());
    let (mut disks, mut state) = (Disks::default(), Vec::new());
    let mut passage = Passage::begin();
    let ran = loop {
        match lanes.unless_failed(frames.next_frame())? {
            (Kind::Pages | Kind::State, []) => return Err(malformed("a frame of nothing").into()),
            (Kind::Disks, payload) if disks.targets.is_empty() => {
                disks = Disks::make(payload, &landing)?
            }
            (Kind::Blocks, payload) => {
                let more = disks.put(payload)?;
                disk_totals.pages += more.pages;
                disk_totals.zeros += more.zeros;
            }
            (Kind::Sync, _) => {
                disks.settle()?;
                if !lanes.are_none() {
                    settled(frames.get_mut())?;
                }
            }
            (Kind::Pages, payload) if lanes.are_none() => {
                let more = live::put(payload, &memory, bytes)?;
                totals.pages += more.pages;
                totals.zeros += more.zeros;
            }
            (Kind::Owner, payload) => owner = payload.to_vec(),
            (Kind::Mark, payload) => passage.hear(unpacked(payload)?),
            (Kind::Owed, payload) => live::add_owed(payload, &mut owed)?,
            (Kind::State, payload) if state.len() + payload.len() > MOST_STATE => {
                return Err(malformed("more state than any machine has").into());
            }
            (Kind::State, payload) => state.extend_from_slice(payload),
            (Kind::End, _) if disks.targets.len() != landing.most.len() => {
                return Err(malformed("no content of its disks").into());
            }
            (Kind::End, payload) => {
                lanes.join(lanes::LATE, &mut totals)?;
                break ran_there(payload, (totals, disk_totals))?;
            }
            _ => return Err(malformed("a frame where none of its kind should be").into()),
        }
    };
    disks.settle()?;
    drop(disks);
    passage.end();
    let at = Instant::now();
    let mut state = unpacked_state(&state)?;
    state.take_place(here);
    // Memory and vCPUs are made by what was said first.
    if !is_made_alike(state.config(), &config) {
        return Err(malformed("the state of another machine").into());
    }
    Ok(Gathered {
        id: opening.id,
        state,
        memory,
        files: landing.files,
        ran,
        owner,
        totals,
        disks: disk_totals,
        owed,
        faults: landing.faults,
        at,
        passage,
    })
}
