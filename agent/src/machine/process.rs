//! The process of a machine, seen from the agent: started, found again, told, heard, ended.
//!
//! [`Launcher`] and [`Process`] are what an actor knows of it; the real ones are here.
//! A process belongs to the record that names it: it gets its
//! `Go` only after that record is on the disk, and one that no record names is ended
//! ([`end_strays`]).

pub mod control;
mod devices;
mod heard;
pub mod identity;
pub mod launch;
pub(crate) mod nest;
pub(crate) mod sockets;
pub(crate) mod spawn;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::decision::size::Resize;
use fractus_agent_api::device::DeviceId;
use fractus_agent_api::machine::{MachineSpec, ServerId, StopReason};
use fractus_agent_api::migration::{AtLimit, MigrationId, Policy, Shape};
use fractus_vmm::machine::Compression;
use tokio::io::unix::AsyncFd;
use uuid::Uuid;

use self::control::Control;
pub use self::heard::{End, Heard, Status};
use super::guest_agent::GuestAgent;
use super::make::OpenDevice;
use super::record::ProcessRecord;
use crate::clock::now_us;
use crate::machine::line::Way;
use crate::vm::packet::PacketError;
use crate::vm::protocol::{FromMachine, LastWords, MachineEvent, Role, ToMachine, VERSION};
use crate::volume::VolumeError;

/// What a process is to be made of.
#[derive(Debug)]
pub struct Plan {
    pub id: ServerId,
    pub spec: MachineSpec,
    /// Those of `spec` that it begins with, besides root disk and config drive.
    pub devices: Vec<OpenDevice>,
    pub user: u32,
    /// Its guest goes on from what was kept of it; `devices` are those that it had then.
    pub goes_on: bool,
    /// Its guest comes from another process, with its disks.
    pub arrives: Option<Arriving>,
    /// Its guest is handed over by the process that has it, with all its devices; there are no `devices` then.
    pub takes_over: Option<TakingOver>,
    /// Memory that it may have at most, MiB.
    pub most_mib: u64,
    pub request_id: Option<String>,
}

/// How a guest comes.
#[derive(Debug)]
pub struct Arriving {
    /// A stream socket, whose other end is carried to where it comes from.
    pub line: OwnedFd,
    pub shape: Shape,
}

/// From whom a guest is taken over.
#[derive(Debug)]
pub struct TakingOver {
    /// A stream socket, whose other end that process has.
    pub line: OwnedFd,
    pub from: ProcessRecord,
}

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{what}: {source}")]
    System {
        what: String,
        source: std::io::Error,
    },
    #[error("the machine's process: {0}")]
    Control(#[from] crate::vm::packet::PacketError),
    #[error("the machine's process does not answer")]
    Mute,
    #[error(transparent)]
    Disk(#[from] VolumeError),
    /// The next one can.
    #[error("{0}")]
    NotNow(String),
    #[error("the machine cannot be described to the VMM: {0}")]
    Config(String),
}

#[async_trait]
pub trait Launcher: Send + Sync + 'static {
    type Process: Process;

    /// Starts a process that is being jailed and built, and waits for its `Go`.
    async fn launch(&self, plan: Plan) -> Result<Self::Process, ProcessError>;

    /// The process that the record names, if it is alive; else how it ended.
    ///
    /// # Errors
    /// It cannot be told now. Nothing may be started, since it may be alive.
    async fn adopt(
        &self,
        id: ServerId,
        recorded: &ProcessRecord,
    ) -> std::io::Result<Adoption<Self::Process>>;

    /// Whether the process runs the program that new ones are started from.
    fn is_current(&self, process: &ProcessRecord) -> std::io::Result<bool>;

    /// The process that has taken the machine over is found where the one before was. May be repeated.
    fn settle(&self, id: ServerId) -> std::io::Result<()>;

    /// Lets the machine's process use as much as a machine of that size may.
    fn limit(&self, id: ServerId, vcpus: u8, memory_mib: u64) -> std::io::Result<()>;

    /// Removes what is outside of the machine's folder: socket and control group.
    async fn clear(&self, id: ServerId) -> Result<(), ProcessError>;
}

pub enum Adoption<P> {
    Alive(P),
    Gone(End),
}

/// Where a guest's memory is to be kept, and how.
#[derive(Debug)]
pub struct MemoryFile {
    pub file: File,
    /// Bytes that it may have then.
    pub most: u64,
    pub compression: Compression,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Go,
    /// Its status answers.
    Status,
    Pause,
    Resume,
    PressPowerButton,
}

#[async_trait]
pub trait Process: Send + 'static {
    fn identity(&self) -> ProcessRecord;

    async fn tell(
        &mut self,
        command: Command,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Hands it a device for its guest; what it says of its devices answers.
    async fn attach(
        &mut self,
        device: OpenDevice,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Has it offer its guest another size; what it says of its size answers.
    async fn resize(&mut self, to: Resize, request_id: Option<&str>) -> Result<(), ProcessError>;

    /// Has it ask its guest to let a device go; answered likewise. May be said again.
    async fn detach(
        &mut self,
        device: DeviceId,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Has it stop its guest and write it; what it says of this attempt answers.
    async fn suspend(
        &mut self,
        attempt: Uuid,
        to: MemoryFile,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Has it copy its root disk, which has `bytes`, to `file`, while its guest runs; what it says of this attempt
    /// answers. An attempt of before is given up.
    async fn copy(
        &mut self,
        attempt: Uuid,
        file: File,
        bytes: u64,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Has it copy nothing any more.
    async fn no_copy(&mut self, request_id: Option<&str>) -> Result<(), ProcessError>;

    /// Whether it can speak with another process itself, by a connection that is lent to it.
    fn seals(&self) -> bool {
        true
    }

    /// Whether it takes several such connections, for one guest.
    fn lanes(&self) -> bool {
        true
    }

    /// Has it send its guest by `line`, or, without one, by another policy; or have the memory go by `line` that follows a
    /// guest which was offered. What it says of this migration answers, but for a policy.
    async fn send(
        &mut self,
        migration: MigrationId,
        policy: Policy,
        line: Option<(OwnedFd, Way)>,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Brings it another line, by which memory comes that follows its guest. Not by its loop, which may be waiting for
    /// that memory.
    async fn bring_line(&self, line: OwnedFd) -> Result<(), ProcessError>;

    /// # Errors
    /// It is of an agent that could not, or has not said.
    fn can_hand_over(&self) -> Result<(), ProcessError>;

    /// Has it hand its guest over to the process at the other end of `line`; what it says of this migration answers.
    async fn hand_over(
        &mut self,
        migration: MigrationId,
        line: OwnedFd,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError>;

    /// Has it not send its guest any more; its status answers.
    async fn stay(&mut self, request_id: Option<&str>) -> Result<(), ProcessError>;

    /// The next thing that it says or does. May be dropped and called again. After
    /// [`Heard::Ended`] it is not called any more.
    async fn hear(&mut self) -> Heard;

    /// Tells the guest's agent what time it is, without waiting for it: one that was paused does not
    /// know. Nothing happens where there is none.
    fn set_guest_time(&self) {}

    /// Ends it now; returns when it is gone.
    async fn kill(&mut self) -> Result<End, ProcessError>;

    /// Of one that [`Self::kill`] has ended, what [`Heard::GoUnread`] says of others.
    fn go_unread(&self) -> bool {
        false
    }
}

/// A process of this host, held by a descriptor that can mean no other.
pub struct HostProcess {
    identity: ProcessRecord,
    pidfd: AsyncFd<OwnedFd>,
    /// `None` while it does not answer.
    control: Option<Control>,
    paths: crate::paths::MachinePaths,
    /// Last of what it said, kept for its end.
    failure: Option<String>,
    /// That its guest goes on is the last that it was told.
    goes: bool,
    /// It has not read that, and nobody has heard so.
    unread: bool,
    /// What it answered when it was adopted.
    greeting: Option<Heard>,
    /// Whether it can suspend its guest: one of an older agent cannot. None: it has not said.
    suspends: Option<bool>,
    /// Whether it can send it, likewise.
    sends: Option<bool>,
    /// Whether it can copy its root disk, likewise.
    copies: Option<bool>,
    /// Whether it can hand its guest over, likewise.
    hands: Option<bool>,
    /// Whether memory can follow the guest that it sends.
    follows: bool,
    seals: bool,
    lanes: bool,
}

/// A process that was adopted while it was busy is asked again after this time.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a killed process may take to be gone.
const DEATH: Duration = Duration::from_secs(30);

impl HostProcess {
    async fn connect(&mut self) -> Result<Heard, ProcessError> {
        let (pid, role) = (self.identity.pid, Role::Control);
        let control = match Control::connect(&self.paths.socket, pid, role).await {
            Ok(control) => control,
            Err(error) => {
                // The agent that had it take over the machine may have ended just then.
                let next = Control::connect(&self.paths.next_socket(), pid, role).await;
                let Ok(control) = next else {
                    return Err(error);
                };
                let settled = sockets::settle(&self.paths);
                settled.map_err(launch::failed("settling its socket"))?;
                control
            }
        };
        let answer = tokio::time::timeout(Duration::from_secs(5), control.receive()).await;
        match answer.map_err(|_| ProcessError::Mute)?? {
            FromMachine::Status {
                version,
                state,
                guest,
                devices,
                size,
                suspends,
                sends,
                copies,
                hands,
                follows,
                seals,
                lanes,
                moving,
                lacks,
                ..
            } if version <= VERSION => {
                self.control = Some(control);
                (self.goes, self.unread) = (false, false);
                (self.suspends, self.sends) = (Some(suspends), Some(sends));
                (self.copies, self.hands) = (Some(copies), Some(hands));
                (self.follows, self.seals, self.lanes) = (follows, seals, lanes);
                let status = Status {
                    state,
                    guest,
                    devices,
                    size,
                    moving,
                    lacks,
                    fresh: true,
                };
                Ok(Heard::Status(status))
            }
            other => {
                tracing::warn!(
                    ?other,
                    "a machine's process answered a greeting with something else"
                );
                Err(ProcessError::Mute)
            }
        }
    }

    async fn say(
        &mut self,
        message: &ToMachine,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ProcessError> {
        let control = self.control.as_ref().ok_or(ProcessError::Mute)?;
        let sent = control.send(message, files).await;
        match sent {
            Ok(()) => self.goes = matches!(message, ToMachine::Go),
            // Said once: whoever receives then is told of an orderly end.
            Err(PacketError::Unread) => self.unread |= self.goes,
            Err(_) => {}
        }
        Ok(sent?)
    }

    /// Reads what is left of an end that is known: what it had not read, and not what it has said.
    fn drain(&mut self) {
        while let Some(control) = &self.control {
            match control.try_receive() {
                Ok(_) => {}
                Err(PacketError::Unread) => self.unread |= self.goes,
                Err(_) => self.control = None,
            }
        }
    }

    /// It has ended, and all that it said was heard.
    fn gone(&mut self) -> Heard {
        match std::mem::take(&mut self.unread) {
            true => Heard::GoUnread,
            false => Heard::Ended(self.end()),
        }
    }

    /// Its jail lets it write no file beyond the largest that it was started with.
    fn let_write(&self, bytes: u64) -> Result<(), ProcessError> {
        if identity::ended(self.pidfd.get_ref()) {
            return Ok(());
        }
        let larger = |error| {
            format!(
                "it is larger than what the machine's process may write, which stays so: {error}"
            )
        };
        identity::let_write(&self.identity, bytes)
            .map_err(|error| ProcessError::NotNow(larger(error)))
    }

    fn end(&self) -> End {
        let status = identity::reap(self.pidfd.get_ref());
        match last_words(&self.paths.last_words()) {
            Some(reason) => End::Said(reason),
            None => {
                let status = status.unwrap_or_else(|| "no reason given".to_owned());
                let detail = match &self.failure {
                    Some(failure) => failure.clone(),
                    None => format!("the machine's process ended: {status}"),
                };
                End::Silent { detail }
            }
        }
    }

    fn heard(&mut self, message: FromMachine) -> Option<Heard> {
        match message {
            FromMachine::Ready { lacks, .. } => Some(Heard::Ready { lacks }),
            FromMachine::Status {
                state,
                guest,
                devices,
                size,
                moving,
                lacks,
                ..
            } => Some(Heard::Status(Status {
                state,
                guest,
                devices,
                size,
                moving,
                lacks,
                fresh: false,
            })),
            FromMachine::Moving(moving) => Some(Heard::Moving(moving)),
            FromMachine::TookOver { blackout_us } => Some(Heard::TookOver(blackout_us)),
            FromMachine::ResizeRefused { detail } => Some(Heard::ResizeRefused(detail)),
            FromMachine::Suspended { attempt, error } => {
                Some(Heard::Suspended(attempt, error.map_or(Ok(()), Err)))
            }
            FromMachine::Copied { attempt, error } => {
                Some(Heard::Copied(attempt, error.map_or(Ok(()), Err)))
            }
            FromMachine::DeviceRefused { id, detail } => Some(Heard::DeviceRefused(id, detail)),
            // The end of the process says so too, and once is enough.
            FromMachine::Event {
                event: MachineEvent::Stopped { .. },
            } => None,
            FromMachine::Event { event } => Some(Heard::Event(event)),
            FromMachine::Refused { detail } => Some(Heard::Refused(detail)),
            FromMachine::Failed { detail } => {
                self.failure = Some(detail.clone());
                Some(Heard::Failed(detail))
            }
        }
    }
}

#[async_trait]
impl Process for HostProcess {
    fn identity(&self) -> ProcessRecord {
        self.identity
    }

    async fn tell(
        &mut self,
        command: Command,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        let request_id = request_id.map(str::to_owned);
        let message = match command {
            Command::Go => ToMachine::Go,
            Command::Status => ToMachine::Status,
            Command::Pause => ToMachine::Pause { request_id },
            Command::Resume => ToMachine::Resume { request_id },
            Command::PressPowerButton => ToMachine::PressPowerButton { request_id },
        };
        self.say(&message, &[]).await
    }

    async fn attach(
        &mut self,
        device: OpenDevice,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        let request_id = request_id.map(str::to_owned);
        match device {
            OpenDevice::Disk(disk, open) => {
                self.let_write(open.bytes)?;
                let message = ToMachine::AttachDisk {
                    request_id,
                    id: disk.id,
                    config: devices::disk_config(&disk, &open),
                };
                self.say(&message, &[open.file.as_fd()]).await
            }
            OpenDevice::Nic(nic, taps) => {
                let message = ToMachine::AttachNet {
                    request_id,
                    id: nic.id,
                    config: devices::net_config(&nic),
                };
                let taps: Vec<_> = taps.iter().map(AsFd::as_fd).collect();
                self.say(&message, &taps).await
            }
        }
    }

    async fn resize(&mut self, to: Resize, request_id: Option<&str>) -> Result<(), ProcessError> {
        let message = ToMachine::Resize {
            request_id: request_id.map(str::to_owned),
            vcpus: to.vcpus,
            hot_memory: to.hot_memory_mib << 20,
        };
        self.say(&message, &[]).await
    }

    async fn detach(
        &mut self,
        device: DeviceId,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        let message = ToMachine::Detach {
            request_id: request_id.map(str::to_owned),
            id: device,
        };
        self.say(&message, &[]).await
    }

    async fn suspend(
        &mut self,
        attempt: Uuid,
        to: MemoryFile,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        if !self.suspends.ok_or(ProcessError::Mute)? {
            let text = "the machine's process was started by an agent that could not suspend it; it can be \
                        suspended once it has been stopped and started";
            return Err(ProcessError::NotNow(text.to_owned()));
        }
        self.let_write(to.most)?;
        let message = ToMachine::Suspend {
            request_id: request_id.map(str::to_owned),
            attempt,
            compression: to.compression,
        };
        self.say(&message, &[to.file.as_fd()]).await
    }

    async fn copy(
        &mut self,
        attempt: Uuid,
        file: File,
        bytes: u64,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        if !self.copies.ok_or(ProcessError::Mute)? {
            let text = "the machine's process was started by an agent that could not copy its disk; that can be done \
                        once it has been stopped";
            return Err(ProcessError::NotNow(text.to_owned()));
        }
        self.let_write(bytes)?;
        let message = ToMachine::Copy {
            request_id: request_id.map(str::to_owned),
            attempt,
        };
        self.say(&message, &[file.as_fd()]).await
    }

    async fn no_copy(&mut self, request_id: Option<&str>) -> Result<(), ProcessError> {
        if !self.copies.ok_or(ProcessError::Mute)? {
            return Ok(());
        }
        let request_id = request_id.map(str::to_owned);
        self.say(&ToMachine::NoCopy { request_id }, &[]).await
    }

    fn seals(&self) -> bool {
        self.seals
    }

    fn lanes(&self) -> bool {
        self.lanes
    }

    async fn send(
        &mut self,
        migration: MigrationId,
        mut policy: Policy,
        line: Option<(OwnedFd, Way)>,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        if policy.at_limit == AtLimit::PostCopy && !self.follows {
            // It does not know the word.
            policy.at_limit = AtLimit::Stop;
        }
        if !self.sends.ok_or(ProcessError::Mute)? {
            let text = "the machine's process was started by an agent that could not send its guest elsewhere; it can \
                        be moved once it has been stopped and started";
            return Err(ProcessError::NotNow(text.to_owned()));
        }
        let message = ToMachine::Send {
            request_id: request_id.map(str::to_owned),
            migration,
            policy,
            lent: line.as_ref().is_some_and(|(_, way)| *way == Way::Lent),
        };
        let files: Vec<_> = line.iter().map(|(line, _)| line.as_fd()).collect();
        self.say(&message, &files).await
    }

    async fn bring_line(&self, line: OwnedFd) -> Result<(), ProcessError> {
        let pid = self.identity.pid;
        let path = self.paths.lines_socket();
        let brought = control::bring_line(&path, pid, line);
        let brought = tokio::time::timeout(Duration::from_secs(5), brought).await;
        brought.map_err(|_| ProcessError::Mute)?
    }

    fn can_hand_over(&self) -> Result<(), ProcessError> {
        let text = "its process is of an older release: it is upgraded by its next hard reboot, or by a live \
                    migration";
        match self.hands.ok_or(ProcessError::Mute)? {
            true => Ok(()),
            false => Err(ProcessError::NotNow(text.to_owned())),
        }
    }

    async fn hand_over(
        &mut self,
        migration: MigrationId,
        line: OwnedFd,
        request_id: Option<&str>,
    ) -> Result<(), ProcessError> {
        self.can_hand_over()?;
        let message = ToMachine::HandOver {
            request_id: request_id.map(str::to_owned),
            migration,
        };
        self.say(&message, &[line.as_fd()]).await
    }

    async fn stay(&mut self, request_id: Option<&str>) -> Result<(), ProcessError> {
        let request_id = request_id.map(str::to_owned);
        self.say(&ToMachine::Stay { request_id }, &[]).await
    }

    async fn hear(&mut self) -> Heard {
        if let Some(greeting) = self.greeting.take() {
            return greeting;
        }
        loop {
            let Some(control) = &self.control else {
                tokio::select! {
                    _ = self.pidfd.readable() => return self.gone(),
                    () = tokio::time::sleep(AGAIN) => {}
                }
                if let Ok(greeting) = self.connect().await {
                    return greeting;
                }
                continue;
            };
            let (received, over) = tokio::select! {
                biased;
                received = control.receive() => (received, false),
                // What it said in the end is still in the socket.
                _ = self.pidfd.readable() => (control.try_receive(), true),
            };
            match received {
                Ok(message) => {
                    if let Some(heard) = self.heard(message) {
                        return heard;
                    }
                }
                // What it has said is read first: then the socket is at its end.
                Err(PacketError::Unread) => self.unread |= self.goes,
                Err(error) => {
                    tracing::debug!(%error, "connection to a machine's process");
                    // Only of one that has ended: another could go on for ever.
                    if over {
                        self.drain();
                    }
                    self.control = None;
                    if over {
                        return self.gone();
                    }
                }
            }
        }
    }

    fn set_guest_time(&self) {
        let (socket, pid) = (self.paths.socket.clone(), self.identity.pid);
        tokio::spawn(async move {
            let set = async {
                let mut agent = GuestAgent::connect(&socket, pid).await?;
                agent.set_time(now_us().saturating_mul(1000)).await
            };
            if let Err(error) = set.await {
                tracing::info!(pid, %error, "the guest was not told the time");
            }
        });
    }

    async fn kill(&mut self) -> Result<End, ProcessError> {
        identity::kill(self.pidfd.get_ref()).map_err(|source| ProcessError::System {
            what: "ending the process".into(),
            source,
        })?;
        // One that hangs in the kernel (a dead disk) does not go; it is tried again.
        if tokio::time::timeout(DEATH, self.pidfd.readable())
            .await
            .is_err()
        {
            return Err(ProcessError::Mute);
        }
        self.drain();
        Ok(self.end())
    }

    fn go_unread(&self) -> bool {
        self.unread
    }
}

/// Why a process said that it ended. The file is the process's to write, and so is read up to a size
/// that an honest one stays below.
fn last_words(path: &Path) -> Option<StopReason> {
    let mut said = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_WORDS).read_to_end(&mut said))
        .ok()?;
    let words: LastWords = serde_json::from_slice(&said).ok()?;
    Some(words.reason)
}

/// Bytes.
const MOST_WORDS: u64 = 64 << 10;

/// Ends every process that carries this agent's mark and that no record names: those of a start that
/// was cut off before its record was written, which never ran a guest.
pub fn end_strays(
    mark: Uuid,
    is_recorded: impl Fn(ServerId, i32) -> bool,
) -> std::io::Result<usize> {
    let mut ended = 0;
    for process in identity::marked(mark)? {
        if is_recorded(ServerId(process.machine), process.pid) {
            continue;
        }
        tracing::warn!(pid = process.pid, machine = %process.machine, "ending a process without a record");
        identity::kill(&process.pidfd)?;
        identity::reap(&process.pidfd);
        ended += 1;
    }
    Ok(ended)
}

#[cfg(test)]
mod hear_tests;

#[cfg(test)]
mod tests {
    use super::*;

    fn triple_fault() -> StopReason {
        let detail = "vCPU 1, its registers".to_owned();
        StopReason::TripleFault { detail }
    }

    #[test]
    fn last_words_are_heard_and_no_more_is_read_than_an_honest_process_writes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = LastWords {
            version: VERSION,
            reason: triple_fault(),
        };
        let bytes = serde_json::to_vec(&words).unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(last_words(file.path()), Some(triple_fault()));
        // A TiB of nothing after them.
        file.as_file().set_len(1 << 40).unwrap();
        assert_eq!(last_words(file.path()), None);
    }
}
