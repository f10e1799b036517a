//! A guest that goes on in another process: which of its devices is which, beside what the machine itself
//! writes of them.
//!
//! It stands in the same file, or comes by the same stream, and so does not depend on what any agent remembers.

use std::fs::File;
use std::os::fd::OwnedFd;

use fractus_agent_api::device::DeviceId;
use fractus_vmm::config::NetFiles;
use fractus_vmm::machine::Compression;
use fractus_vmm::stream::snapshot::Snapshot;
use serde::{Deserialize, Serialize};

use super::devices::Devices;
use super::guest::GuestError;
use super::handover::End;
use super::protocol::{FromMachine, GuestSaid, Launch, State};
use super::stand_in;
use super::supervise::Supervisor;
use super::{VmError, chain, log};

/// Of this note. Raised when the meaning of a field changes.
const VERSION: u32 = 1;

/// JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Note {
    version: u32,
    /// Names of the disks, in the order of the machine's own; none: it stays for the machine's life.
    disks: Vec<Option<DeviceId>>,
    nets: Vec<Option<DeviceId>>,
    /// What the guest's devices have said.
    #[serde(default)]
    said: GuestSaid,
    /// What the descriptors are that the process lent which hands its guest over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lent: Vec<End>,
}

/// What another process has written. Without a note nobody has said which of the guest's devices is which: it was
/// written by hand.
pub enum Kept {
    Machine(Box<Snapshot>, Option<Note>),
    /// Of which this guest is one of several.
    Template(Box<Snapshot>, Option<Note>),
    StandIn(stand_in::Kept, Note),
}

impl Kept {
    pub fn template(file: File) -> Result<Self, VmError> {
        let (snapshot, note) = snapshot(file)?;
        Ok(Self::Template(snapshot, note))
    }

    /// `real`: of a machine, not of a stand-in.
    pub fn open(file: File, real: bool) -> Result<Self, VmError> {
        if real {
            let (snapshot, note) = snapshot(file)?;
            return Ok(Self::Machine(snapshot, note));
        }
        let kept = stand_in::Kept::read(file).map_err(|error| damaged(&error))?;
        let note = Note::read(kept.note())?;
        Ok(Self::StandIn(kept, note))
    }

    pub fn note(&self) -> Option<&Note> {
        match self {
            Self::StandIn(_, note) => Some(note),
            Self::Machine(_, note) | Self::Template(_, note) => note.as_ref(),
        }
    }

    /// The files that came, in the order in which the guest had them.
    ///
    /// # Errors
    /// One that it had did not come; or nobody knows which is which, and they have names.
    pub fn order<T>(
        &self,
        launch: &Launch,
        disks: Vec<T>,
        nets: Vec<NetFiles>,
    ) -> Result<(Vec<T>, Vec<NetFiles>), VmError> {
        let mut names = launch.disks.iter().chain(&launch.nets).flatten();
        match (self.note(), names.next()) {
            (Some(note), _) => note.order(launch, disks, nets),
            (None, None) => Ok((disks, nets)),
            (None, Some(name)) => Err(VmError::Build(format!(
                "the memory that was kept does not say which of its devices is {name}"
            ))),
        }
    }
}

fn snapshot(file: File) -> Result<(Box<Snapshot>, Option<Note>), VmError> {
    let snapshot = Snapshot::open(file).map_err(|error| damaged(&error))?;
    let note = match snapshot.owner() {
        [] => None,
        note => Some(Note::read(note)?),
    };
    Ok((Box::new(snapshot), note))
}

fn damaged(error: &dyn std::error::Error) -> VmError {
    VmError::Build(format!("the memory that was kept: {}", chain(error)))
}

impl Note {
    pub fn read(bytes: &[u8]) -> Result<Self, VmError> {
        let note: Self = serde_json::from_slice(bytes).map_err(|error| {
            VmError::Build(format!(
                "what is said of the guest's devices: {}",
                chain(&error)
            ))
        })?;
        match note.version {
            1..=VERSION => Ok(note),
            version => Err(VmError::Build(format!(
                "the guest comes from a newer agent (note {version})"
            ))),
        }
    }

    pub fn said(&self) -> GuestSaid {
        self.said
    }

    pub fn lent(&self) -> &[End] {
        &self.lent
    }

    /// The files that came, disks with whatever goes with them, in the order in which the machine had them.
    pub fn order<T>(
        &self,
        launch: &Launch,
        disks: Vec<T>,
        nets: Vec<NetFiles>,
    ) -> Result<(Vec<T>, Vec<NetFiles>), VmError> {
        let disks = order("disk", &self.disks, &launch.disks, disks)?;
        let nets = order("network", &self.nets, &launch.nets, nets)?;
        Ok((disks, nets))
    }

    /// Of the machine that was made of them.
    pub fn devices(&self, names: &(Vec<String>, Vec<String>)) -> Devices {
        Devices::going_on((&names.0, &self.disks), (&names.1, &self.nets))
    }
}

/// `given` are of those `ids`; one without a name is the same as the next without one.
fn order<T>(
    what: &str,
    wanted: &[Option<DeviceId>],
    ids: &[Option<DeviceId>],
    given: Vec<T>,
) -> Result<Vec<T>, VmError> {
    let ids = ids.iter().copied().chain(std::iter::repeat(None));
    let mut given: Vec<(Option<DeviceId>, T)> = ids.zip(given).collect();
    let mut take = |id: &Option<DeviceId>| {
        let at = given.iter().position(|(is, _)| is == id);
        let name = id.map_or_else(String::new, |id| format!(" {id}"));
        let missing = || {
            VmError::Build(format!(
                "the guest that goes on has a {what}{name} that did not come"
            ))
        };
        Ok(given.remove(at.ok_or_else(missing)?).1)
    };
    wanted.iter().map(&mut take).collect()
}

/// An attempt to keep the guest in a file.
pub struct ToSuspend {
    pub attempt: uuid::Uuid,
    pub compression: Compression,
    pub file: OwnedFd,
}

impl Supervisor {
    /// The guest is stopped and written; one that ran goes on if that fails. Its last output is to be carried
    /// before and after: nobody may be there to do so later.
    pub(super) fn suspend(&mut self, to: ToSuspend) {
        let ran = self.guest.state() == State::Running;
        let attempt = to.attempt;
        let written = self.write(to);
        if let Err(error) = &written {
            log::line(format_args!("not suspended: {error}"));
            if ran
                && self.guest.state() == State::Paused
                && let Err(error) = self.guest.resume()
            {
                log::line(format_args!("and it does not go on: {error}"));
            }
        }
        let error = written.err().map(|error| error.to_string());
        self.tell(&FromMachine::Suspended { attempt, error });
    }

    fn write(&mut self, to: ToSuspend) -> Result<(), GuestError> {
        match self.guest.state() {
            State::Running => self.guest.pause()?,
            State::Paused => {}
            state => return Err(GuestError::Machine(format!("is {state:?}"))),
        }
        let note = self.note()?;
        self.guest.write(to.file.into(), to.compression, &note)
    }

    /// For whoever goes on with the guest.
    pub(super) fn note(&self) -> Result<Vec<u8>, GuestError> {
        let (disks, nets) = self.guest.names();
        let ids = |names: &[String]| names.iter().map(|name| self.devices.id(name)).collect();
        let note = Note {
            version: VERSION,
            disks: ids(&disks),
            nets: ids(&nets),
            said: self.said.words(),
            lent: self.lent.clone(),
        };
        Ok(serde_json::to_vec(&note).map_err(std::io::Error::from)?)
    }
}
