//! A machine that another process of its host takes over: its memory and its descriptors go, nothing is copied.
//!
//! [`Handing`] owns the machine, whose guest runs until the other process, in [`take_over`], has every descriptor, memory
//! mapped, and VM and vCPUs made. Then the guest is stopped and the machine's state follows, the other process makes a machine of it, and
//! both stand still: [`Handed`] and [`Inheritance`]. Which of them runs from then on is for their owner to say, as in a
//! migration, and whatever fails before that leaves the guest running here. There is no offer in doubt: an answer that
//! is lost is a failure, since nobody has the other machine run who has not heard of this one that it stands still.
//!
//! What goes first, with the descriptors ([`parcel`]), has a form of its own; all else is frames:
//!
//! | Here | There |
//! |---|---|
//! | parcel, *config*, *owner* | *ready*, or *refused* and why |
//! | *owner* if it changed, *state* in pieces, *end* | *ready*, or *refused* and why |

mod parcel;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use self::parcel::Parcel;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) use self::parcel::fuzz as fuzz_parcel;
#[cfg(test)]
pub(super) use self::parcel::fuzz_seed as parcel_seed;
use super::build::{Chassis, restore_on};
use super::clocks::{Mark, Passage};
use super::receive::{config_in, is_made_alike, reason};
use super::send::{MigrationError, Unsent, answer};
use super::snapshot::unpacked as unpacked_state;
use super::state::{MachineState, STATE_VERSION};
use super::{Machine, MachineError, Pause, RunState, SnapshotError};
use crate::config::{MachineConfig, NetConfig, NetFiles};
use crate::memory::GuestMemory;
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::{MOST_STATE, StreamError, malformed, packed, unpacked};
use crate::thread::ThreadHook;

/// Bytes of state in a frame.
const PIECE: usize = 1 << 20;

/// A machine that is being handed over, and runs.
pub struct Handing<S> {
    machine: Machine,
    out: FrameWriter<S>,
    /// What the owner keeps with it, if that is something else than what was sent.
    owner: Option<Vec<u8>>,
    /// The other side has all but the state.
    is_awaited: bool,
}

/// How far it is.
pub enum Step<S> {
    Waiting(Handing<S>),
    Over(Handed),
}

/// A machine that stands still here and in the process that has taken it over. Dropping it ends this one.
pub struct Handed {
    machine: Machine,
    ran: bool,
    pause: Pause,
}

/// What only the process that takes a machine over can have of its host.
pub struct HostFiles {
    /// /dev/kvm, read-write.
    pub kvm: OwnedFd,
    /// Open /dev/vhost-net, which nobody has used yet: for each pair of queues of the networks without a rate limit;
    /// those for which they do not suffice have none.
    pub vhost: Vec<File>,
}

/// A machine that is here, paused, and stands still where it was. It may run once its owner knows that the other one
/// never will; dropping it ends it.
pub struct Inheritance {
    pub machine: Machine,
    /// It ran where it was, and is to run here.
    pub ran: bool,
    /// When it was stopped there, by CLOCK_MONOTONIC, if it ran.
    pub stopped: Duration,
    /// What its owner kept with it, and its owner's own descriptors.
    pub owner: Vec<u8>,
    pub files: Vec<OwnedFd>,
    /// From the state's last byte to a machine.
    pub made: Duration,
}

/// The last frame.
#[derive(Debug, Serialize, Deserialize)]
struct Ending {
    ran: bool,
    stopped_ns: u64,
}

/// By CLOCK_MONOTONIC, which all processes of a host share.
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    // It is never negative, and counts from the boot.
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

fn written(source: io::Error) -> StreamError {
    let action = "write";
    StreamError::Io { action, source }
}

impl<S: Read + Write + AsFd> Handing<S> {
    /// Begins to hand `machine` to whoever called [`take_over`] on the other end of `connection`, a stream socket whose own
    /// timeouts bound each wait; `owner` and `files` are for that one's owner.
    ///
    /// # Errors
    /// The machine neither runs nor is paused, or the connection is broken.
    pub fn begin(
        machine: Machine,
        connection: S,
        owner: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<Self, Unsent> {
        let mut out = FrameWriter::new(connection);
        match offer(&machine, &mut out, owner, files) {
            Ok(()) => Ok(Handing {
                machine,
                out,
                owner: None,
                is_awaited: false,
            }),
            Err(error) => Err(unsent(machine, error)),
        }
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Whose events are to be served. Its devices stay.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Has something else go with it than what it began with.
    pub fn set_owner(&mut self, owner: Vec<u8>) {
        self.owner = Some(owner);
    }

    /// Readable once [`Handing::advance`] has something to do.
    pub fn connection(&self) -> &S {
        self.out.get_ref()
    }

    /// Whether it goes on at once, though nothing is readable: the guest was owed something.
    pub fn is_awaited(&self) -> bool {
        self.is_awaited
    }

    /// The machine is not to be handed over after all; the other side finds its stream cut short.
    pub fn give_up(self) -> Machine {
        self.machine
    }

    /// Stops the guest and hands it over, if the other side is ready for it and nothing is to be carried out for the
    /// guest first.
    ///
    /// # Errors
    /// The guest has ended, the connection is broken or the other side refuses: the machine is as it was.
    pub fn advance(mut self) -> Result<Step<S>, Unsent> {
        match self.step() {
            Ok(None) => Ok(Step::Waiting(self)),
            Ok(Some((ran, pause))) => Ok(Step::Over(Handed {
                machine: self.machine,
                ran,
                pause,
            })),
            Err(error) => Err(unsent(self.machine, error)),
        }
    }

    fn step(&mut self) -> Result<Option<(bool, Pause)>, MigrationError> {
        if !matches!(self.machine.state, RunState::Running | RunState::Paused) {
            return Err(SnapshotError::Over.into());
        }
        if !self.is_awaited {
            if !is_readable(self.out.get_ref()) {
                return Ok(None);
            }
            answer(self.out.get_mut())?;
            self.is_awaited = true;
        }
        let (began, stopped) = (Instant::now(), now());
        let ran = self.machine.state == RunState::Running;
        if ran {
            if let Err(error) = self.machine.rest() {
                self.machine.run_on(&error);
                return Err(error.into());
            }
            self.machine.state = RunState::Paused;
        }
        let mut pause = Pause {
            stop: began.elapsed(),
            ..Pause::default()
        };
        let over = self.machine.owes() || !self.machine.announced.is_empty();
        let outcome = match over {
            true => Ok(()),
            false => self.state_follows(ran, stopped, &mut pause),
        };
        if ran
            && (over || outcome.is_err())
            && let Err(error) = self.machine.run()
        {
            self.machine.run_on(&error);
            return Err(error.into());
        }
        outcome?;
        let pause = if ran { pause } else { Pause::default() };
        Ok((!over).then_some((ran, pause)))
    }

    fn state_follows(
        &mut self,
        ran: bool,
        stopped: Duration,
        pause: &mut Pause,
    ) -> Result<(), MigrationError> {
        let began = Instant::now();
        let (read, state) = self.machine.packed_at()?;
        pause.state = began.elapsed();
        let began = Instant::now();
        if let Some(owner) = self.owner.take() {
            self.out.write(Kind::Owner, &owner)?;
        }
        for piece in state.chunks(PIECE) {
            self.out.write(Kind::State, piece)?;
        }
        let mark = packed(&Mark::now(Some(read)))?;
        self.out.write(Kind::Mark, &mark)?;
        let stopped_ns = u64::try_from(stopped.as_nanos()).unwrap_or(u64::MAX);
        self.out
            .write(Kind::End, &packed(&Ending { ran, stopped_ns })?)?;
        self.out.get_mut().flush().map_err(written)?;
        pause.send = began.elapsed();
        let began = Instant::now();
        answer(self.out.get_mut())?;
        pause.answer = began.elapsed();
        Ok(())
    }
}

impl Handed {
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Whether the guest ran here, and is to run there.
    pub fn ran(&self) -> bool {
        self.ran
    }

    pub fn pause(&self) -> Pause {
        self.pause
    }

    /// The other machine never will run: the guest goes on here, if it ran.
    ///
    /// # Errors
    /// The machine cannot run any more; it has ended.
    pub fn take_back(mut self) -> Result<Machine, MachineError> {
        if self.ran
            && let Err(error) = self.machine.run()
        {
            self.machine.run_on(&error);
            return Err(error);
        }
        Ok(self.machine)
    }
}

fn unsent(machine: Machine, error: MigrationError) -> Unsent {
    Unsent {
        machine: Box::new(machine),
        error,
        report: None,
    }
}

fn is_readable(connection: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::IN)];
    // One that is broken says so when it is read.
    poll(&mut fds, Some(&Timespec::default())) != Ok(0)
}

/// All but the state.
fn offer<S: Read + Write + AsFd>(
    machine: &Machine,
    out: &mut FrameWriter<S>,
    owner: &[u8],
    files: &[BorrowedFd<'_>],
) -> Result<(), MigrationError> {
    if machine.state != RunState::Paused {
        machine.expect(RunState::Running, "handed over")?;
    }
    if !machine.is_whole() {
        // Some of it comes by a connection of this process.
        return Err(MigrationError::Arriving);
    }
    if !machine.memory.is_settled() {
        // To read all of it would take as long as there is of it, in the pause.
        return Err(MigrationError::Unsettled);
    }
    let parcel = Parcel::of(machine, files)?;
    parcel.send(out.get_mut())?;
    let mut config = STATE_VERSION.to_le_bytes().to_vec();
    config.extend(packed(&machine.config)?);
    out.write(Kind::Config, &config)?;
    out.write(Kind::Owner, owner)?;
    Ok(out.get_mut().flush().map_err(written)?)
}

/// Takes a machine over from [`Handing`] at the other end of `connection`, a stream socket whose own timeouts bound each
/// wait. That side is told how it went.
///
/// # Errors
/// What comes is damaged, cut short or of another build, or this process cannot run the machine. Nothing of it is left.
pub fn take_over<S: Read + Write + AsFd>(
    connection: S,
    host: HostFiles,
    hook: Option<ThreadHook>,
) -> Result<Inheritance, MigrationError> {
    let mut frames = FrameReader::new(connection);
    let taken = take(&mut frames, host, hook);
    let out = frames.get_mut();
    match taken {
        Ok(taken) => say(out, Kind::Ready, b"").map(|()| taken),
        Err(error) => {
            // Whoever hands it over may be gone.
            let _ = say(out, Kind::Refused, &reason(&error));
            Err(error)
        }
    }
}

fn say(out: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<(), MigrationError> {
    FrameWriter::new(&mut *out).write(kind, payload)?;
    Ok(out.flush().map_err(written)?)
}

fn take<S: Read + Write + AsFd>(
    frames: &mut FrameReader<S>,
    host: HostFiles,
    hook: Option<ThreadHook>,
) -> Result<Inheritance, MigrationError> {
    let parcel = parcel::receive(frames.get_mut())?;
    let config = match frames.next_frame()? {
        (Kind::Config, payload) => config_in(payload)?,
        _ => return Err(malformed("it has no configuration").into()),
    };
    config.validate()?;
    let owner = match frames.next_frame()? {
        (Kind::Owner, payload) => payload.to_vec(),
        _ => return Err(malformed("nothing is said by its owner").into()),
    };
    let parcel::Received {
        memory,
        unchecked,
        mut files,
        owners,
    } = parcel.unpack(host.kvm)?;
    let memory = map(memory, &config)?;
    if unchecked {
        memory.mark_unchecked();
    }
    lend(&mut files.nets, &config.nets, host.vhost);
    config.validate_files(&files)?;
    // All that depends on nothing that is saved, before the guest is stopped.
    let chassis = Chassis::new(&config, &files, memory, hook)?;
    say(frames.get_mut(), Kind::Ready, b"")?;
    let Followed {
        owner,
        state,
        ending,
        passage,
    } = follow(frames, owner)?;
    let at = Instant::now();
    let state: MachineState = unpacked_state(&state)?;
    if !is_made_alike(state.config(), &config) {
        return Err(malformed("a state of another machine than came").into());
    }
    let mut machine = restore_on(chassis, state, files, || passage.missed())?;
    // One that has not run on this host yet is announced once it does.
    machine.is_new_here = !ending.ran;
    Ok(Inheritance {
        machine,
        ran: ending.ran,
        stopped: Duration::from_nanos(ending.stopped_ns),
        owner,
        files: owners,
        made: at.elapsed(),
    })
}

/// What comes once the guest stands still.
struct Followed {
    owner: Vec<u8>,
    state: Vec<u8>,
    ending: Ending,
    passage: Passage,
}

fn follow<S: Read>(
    frames: &mut FrameReader<S>,
    mut owner: Vec<u8>,
) -> Result<Followed, MigrationError> {
    let mut state = Vec::new();
    let mut passage = Passage::within_host();
    loop {
        match frames.next_frame()? {
            (Kind::Owner, payload) => owner = payload.to_vec(),
            (Kind::Mark, payload) => passage.hear(unpacked(payload)?),
            (Kind::State, []) => return Err(malformed("a frame of nothing").into()),
            (Kind::State, payload) if state.len() + payload.len() > MOST_STATE => {
                return Err(malformed("more state than any machine has").into());
            }
            (Kind::State, payload) => state.extend_from_slice(payload),
            (Kind::End, payload) => {
                let ending = unpacked(payload)?;
                passage.end();
                return Ok(Followed {
                    owner,
                    state,
                    ending,
                    passage,
                });
            }
            _ => return Err(malformed("a frame where none of its kind should be").into()),
        }
    }
}

/// The memfd is as large as it has to be, and stays so: else a touch of it could be a SIGBUS.
fn map(memory: File, config: &MachineConfig) -> Result<GuestMemory, MigrationError> {
    let seals = rustix::fs::fcntl_get_seals(&memory);
    if !seals.is_ok_and(|seals| seals.contains(rustix::fs::SealFlags::SHRINK)) {
        return Err(malformed("memory that could be cut short").into());
    }
    let expected = GuestMemory::file_bytes_of(&config.memory, config.hot_memory.as_ref());
    let found = memory.metadata().map_err(SnapshotError::Read)?.len();
    if found != expected {
        return Err(StreamError::Shape { expected, found }.into());
    }
    Ok(GuestMemory::map(
        memory,
        &config.memory,
        config.hot_memory.as_ref(),
    )?)
}

/// The kernel keeps no rate of ours.
fn lend(nets: &mut [NetFiles], configs: &[NetConfig], vhost: Vec<File>) {
    let mut vhost = vhost.into_iter();
    for (net, config) in nets.iter_mut().zip(configs) {
        let queues = usize::from(config.queues);
        if config.limit.is_none() && vhost.len() >= queues {
            net.vhost = vhost.by_ref().take(queues).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn memory_of_another_size_or_that_could_be_cut_short_is_not_mapped() {
        let config = MachineConfig::minimal(64 << 20);
        let made = |bytes: u64, seals| {
            let memory = memfd_create("memory", MemfdFlags::ALLOW_SEALING).unwrap();
            ftruncate(&memory, bytes).unwrap();
            fcntl_add_seals(&memory, seals).unwrap();
            map(File::from(memory), &config).map(drop)
        };
        made(64 << 20, SealFlags::SHRINK).unwrap();
        for (bytes, seals) in [
            (64 << 20, SealFlags::GROW),
            (63 << 20, SealFlags::SHRINK),
            (65 << 20, SealFlags::SHRINK),
        ] {
            assert!(made(bytes, seals).is_err(), "{bytes} {seals:?}");
        }
        assert!(map(tempfile::tempfile().unwrap(), &config).is_err());
    }
}
