//! A guest without a machine, for hosts without KVM: it has a serial line and hears its power button.
//!
//! For tests of all that surrounds a machine (processes, jail, records, consoles). It prints a boot
//! line with the process's boot nonce, echoes each line it reads, and knows the lines `off`, `fault`
//! (a triple fault), `panic` (a fault of the VMM), `deaf` (does not hear the button any more), `oops` (its
//! kernel panics), `reset` and `bite` (its watchdog runs out, and pauses it). It lets go of a device when
//! it is asked to, and takes the size that it is offered, until it reads `cling`: then only a `reset`
//! does either. One that is suspended, or sent to another host, goes on in another process with the same nonce; its
//! disks stay empty there.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use fractus_agent_api::machine::StopReason;
use fractus_agent_api::migration::{Lacks, Policy, Progress, State as Journey};
use fractus_agent_api::size::Size;
use fractus_vmm::config::{DiskConfig, MachineConfig, NetConfig, NetFiles};
use fractus_vmm::machine::Compression;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::VmError;
use super::guest::{Guest, GuestError, GuestEvent};
use super::kept::Note;
use super::protocol::{Launch, MachineEvent, State};
use super::seal::{Connection, Leashed, Sealed};

pub struct StandIn {
    state: State,
    nonce: String,
    serial: File,
    deaf: bool,
    clings: bool,
    devices: Vec<Held>,
    size: Size,
    events: VecDeque<GuestEvent>,
    bell: OwnedFd,
    /// Lines that the reading thread heard.
    lines: Receiver<String>,
    /// What became of copying its disk.
    copied: Option<io::Result<()>>,
    /// Where it is being sent, and what goes with it.
    sent: Option<(Sealed<UnixStream>, Vec<u8>)>,
    /// It was offered, and ran before that.
    offered: Option<bool>,
    /// It arrived, and did not run where it comes from.
    stands: bool,
}

/// What one becomes that is suspended; whole with its last byte.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kept {
    nonce: String,
    deaf: bool,
    clings: bool,
    size: Size,
    disks: Vec<String>,
    nets: Vec<String>,
    note: Vec<u8>,
    /// An older one did.
    #[serde(default = "ran")]
    ran: bool,
}

fn ran() -> bool {
    true
}

/// What answers one that has been sent.
const ARRIVED: u8 = b'!';

/// One that another process sends.
pub(super) fn arrive(
    mut stream: Sealed<Leashed>,
    launch: &Launch,
    serial: OwnedFd,
    disks: Vec<File>,
    nets: Vec<NetFiles>,
    hook: impl FnOnce() + Send + 'static,
) -> Result<(Box<dyn Guest>, Option<Note>), VmError> {
    let failed = |source| VmError::System {
        what: "the stand-in that arrives",
        source,
    };
    let mut kept = serde_json::Deserializer::from_reader(&mut stream);
    let kept = Kept::deserialize(&mut kept).map_err(|error| failed(error.into()))?;
    let note = Note::read(&kept.note)?;
    let (disks, nets) = note.order(launch, disks, nets)?;
    let guest = StandIn::new(serial, &launch.config, disks, nets, hook).map_err(failed)?;
    let guest = guest.going_on(kept);
    let answered = stream.write_all(&[ARRIVED]).and_then(|()| stream.flush());
    answered.map_err(failed)?;
    Ok((Box::new(guest), Some(note)))
}

impl Kept {
    pub fn read(file: File) -> serde_json::Result<Self> {
        serde_json::from_reader(file)
    }

    pub fn note(&self) -> &[u8] {
        &self.note
    }
}

/// A device as a machine has it, and names it.
struct Held {
    name: String,
    asked: bool,
    /// It came while the stand-in ran.
    later: bool,
    /// Open for as long as it is there.
    files: Vec<File>,
}

/// Disks that may come while it runs, and networks.
const LATER: usize = 4;

impl StandIn {
    /// `serial` is a stream socket. `hook` runs at the start of the thread, as the machine's would.
    pub fn new(
        serial: OwnedFd,
        config: &MachineConfig,
        disks: Vec<File>,
        nets: Vec<NetFiles>,
        hook: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let disks = disks.into_iter().map(|disk| vec![disk]).enumerate();
        let disks = disks.map(|(number, files)| (format!("disk{number}"), files));
        let nets = nets.into_iter().map(|net| net.taps).enumerate();
        let nets = nets.map(|(number, files)| (format!("net{number}"), files));
        let devices = disks.chain(nets).map(|(name, files)| Held {
            name,
            asked: false,
            later: false,
            files,
        });
        let devices = devices.collect();
        let serial = File::from(serial);
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (sender, lines) = channel();
        let (ears, ring) = (serial.try_clone()?, bell.try_clone()?);
        std::thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || {
                hook();
                listen(ears, &ring, &sender);
            })?;
        Ok(Self {
            state: State::Ready,
            nonce: uuid::Uuid::new_v4().simple().to_string().split_off(16),
            serial,
            deaf: false,
            clings: false,
            devices,
            size: Size {
                vcpus: config.cpus.count,
                vcpus_used: config.cpus.count,
                max_vcpus: config.cpus.max,
                memory_mib: config.memory.bytes >> 20,
                hot_memory_mib: 0,
                hot_plugged_mib: 0,
                max_hot_memory_mib: config.hot_memory.map(|hot| hot.max >> 20),
            },
            events: VecDeque::new(),
            bell,
            lines,
            copied: None,
            sent: None,
            offered: None,
            stands: false,
        })
    }

    /// Goes on where another was; it has as many devices.
    #[must_use]
    pub fn going_on(mut self, kept: Kept) -> Self {
        let names = kept.disks.into_iter().chain(kept.nets);
        for (held, name) in self.devices.iter_mut().zip(names) {
            held.name = name;
        }
        self.state = State::Paused;
        (self.nonce, self.size) = (kept.nonce, kept.size);
        (self.deaf, self.clings, self.stands) = (kept.deaf, kept.clings, !kept.ran);
        self
    }

    fn packed(&self, note: &[u8], ran: bool) -> Result<Vec<u8>, GuestError> {
        let (disks, nets) = self.names();
        let kept = Kept {
            nonce: self.nonce.clone(),
            deaf: self.deaf,
            clings: self.clings,
            size: self.size,
            disks,
            nets,
            note: note.to_vec(),
            ran,
        };
        Ok(serde_json::to_vec(&kept).map_err(io::Error::from)?)
    }

    fn push(&mut self, event: MachineEvent) -> Result<(), GuestError> {
        match &event {
            MachineEvent::Running => self.state = State::Running,
            MachineEvent::Paused => self.state = State::Paused,
            MachineEvent::Stopped { .. } => self.state = State::Stopped,
            _ => {}
        }
        self.events.push_back(GuestEvent::Machine(event));
        ring(&self.bell)
    }

    /// What was asked for goes.
    fn eject(&mut self) {
        for gone in self.devices.extract_if(.., |device| device.asked) {
            self.events.push_back(GuestEvent::DeviceGone(gone.name));
        }
    }

    /// All that it is offered, and leaves what it is to leave.
    fn take_size(&mut self) {
        self.size.vcpus_used = self.size.vcpus;
        self.size.hot_plugged_mib = self.size.hot_memory_mib;
        self.events.push_back(GuestEvent::Resized);
    }

    /// Takes a device, and says on its serial line what came.
    fn take(&mut self, word: &str, files: Vec<File>, what: &str) -> Result<String, GuestError> {
        let of_kind = |device: &&Held| device.later && device.name.starts_with(word);
        if self.devices.iter().filter(of_kind).count() >= LATER {
            let text = "no place is left for one that comes later";
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text).into());
        }
        let is_free = |name: &String| self.devices.iter().all(|device| device.name != *name);
        let mut names = (0..).map(|number| format!("{word}{number}"));
        let name = names.find(is_free).unwrap_or_default();
        writeln!(self.serial, "came {what}")?;
        self.devices.push(Held {
            name: name.clone(),
            asked: false,
            later: true,
            files,
        });
        Ok(name)
    }

    fn hear(&mut self, line: &str) -> Option<GuestEvent> {
        let _ = writeln!(self.serial, "heard {line}");
        let said = GuestEvent::Machine;
        let reason = match line {
            "oops" => return Some(said(MachineEvent::Panicked)),
            "reset" => {
                self.eject();
                self.take_size();
                return Some(said(MachineEvent::GuestReset));
            }
            "bite" => {
                self.state = State::Paused;
                self.events.push_back(said(MachineEvent::Paused));
                return Some(said(MachineEvent::WatchdogFired));
            }
            "cling" => {
                self.clings = true;
                return None;
            }
            "off" => StopReason::GuestPowerOff,
            "fault" => StopReason::TripleFault {
                detail: "as it was told to".to_owned(),
            },
            "panic" => StopReason::VmmFault {
                detail: "asked to".to_owned(),
            },
            "deaf" => {
                self.deaf = true;
                return None;
            }
            _ => return None,
        };
        self.state = State::Stopped;
        Some(said(MachineEvent::Stopped { reason }))
    }
}

/// Through the host's cache, so that no buffer has to be aligned.
fn copy(disk: &File, to: &File) -> io::Result<()> {
    for file in [disk, to] {
        rustix::fs::fcntl_setfl(file, OFlags::empty())?;
    }
    let (mut at, mut buffer) = (0, vec![0; 64 << 10]);
    loop {
        let length = disk.read_at(&mut buffer, at)?;
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        to.write_all_at(bytes, at)?;
        at += length as u64;
    }
    to.sync_all()
}

fn ring(bell: &OwnedFd) -> Result<(), GuestError> {
    rustix::io::write(bell, &1u64.to_ne_bytes()).map_err(io::Error::from)?;
    Ok(())
}

fn listen(mut ears: File, bell: &OwnedFd, lines: &Sender<String>) {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while let Ok(1) = ears.read(&mut byte) {
        if byte == *b"\n" {
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            line.clear();
            if lines.send(text).is_err() || ring(bell).is_err() {
                return;
            }
        } else {
            line.extend(byte);
        }
    }
}

impl Guest for StandIn {
    fn start(&mut self) -> Result<(), GuestError> {
        if self.stands {
            return Ok(());
        }
        match self.state {
            State::Paused => writeln!(self.serial, "stand-in goes on {}", self.nonce)?,
            _ => writeln!(self.serial, "stand-in boot {}", self.nonce)?,
        }
        self.push(MachineEvent::Running)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.push(MachineEvent::Paused)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.offered.is_some() {
            return Err(io::Error::from(io::ErrorKind::ResourceBusy).into());
        }
        self.push(MachineEvent::Running)
    }

    fn press_power_button(&mut self) -> Result<(), GuestError> {
        writeln!(self.serial, "power button")?;
        if self.deaf {
            return Ok(());
        }
        self.push(MachineEvent::Stopped {
            reason: StopReason::GuestPowerOff,
        })
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        self.push(MachineEvent::Stopped {
            reason: StopReason::Requested,
        })
    }

    fn attach_disk(&mut self, config: DiskConfig, file: File) -> Result<String, GuestError> {
        self.take("disk", vec![file], &config.serial_number)
    }

    fn attach_net(&mut self, config: NetConfig, files: NetFiles) -> Result<String, GuestError> {
        let mac = config.mac.map(|byte| format!("{byte:02x}")).join(":");
        self.take("net", files.taps, &mac)
    }

    fn detach(&mut self, device: &str) -> Result<(), GuestError> {
        for held in self.devices.iter_mut().filter(|held| held.name == device) {
            held.asked = true;
        }
        writeln!(self.serial, "asked for {device}")?;
        if !self.clings {
            self.eject();
            ring(&self.bell)?;
        }
        Ok(())
    }

    fn size(&self) -> Size {
        self.size
    }

    fn resize(&mut self, vcpus: u8, hot_memory: u64) -> Result<(), GuestError> {
        (self.size.vcpus, self.size.hot_memory_mib) = (vcpus, hot_memory >> 20);
        writeln!(self.serial, "offered {vcpus} vCPUs")?;
        if !self.clings {
            self.take_size();
            ring(&self.bell)?;
        }
        Ok(())
    }

    fn names(&self) -> (Vec<String>, Vec<String>) {
        let names = self.devices.iter().map(|held| held.name.clone());
        names.partition(|name| name.starts_with("disk"))
    }

    fn write(&mut self, mut file: File, _: Compression, note: &[u8]) -> Result<(), GuestError> {
        // Whoever is suspended is to run when it goes on.
        file.write_all(&self.packed(note, true)?)?;
        Ok(file.sync_all()?)
    }

    fn copy(&mut self, file: File) -> Result<(), GuestError> {
        let disk = self.devices.iter().find(|held| held.name == "disk0");
        let disk = disk.and_then(|held| held.files.first());
        let disk = disk.ok_or(io::Error::from(io::ErrorKind::NotFound))?;
        // Nobody writes to it meanwhile.
        self.copied = Some(copy(disk, &file));
        Ok(())
    }

    fn copy_on(&mut self) -> Option<Result<(), GuestError>> {
        Some(self.copied.take()?.map_err(GuestError::from))
    }

    fn copy_no_more(&mut self) {
        self.copied = None;
    }

    fn send(
        &mut self,
        connection: Connection,
        _policy: Policy,
        note: Vec<u8>,
    ) -> Result<(), GuestError> {
        connection.socket.set_nonblocking(false)?;
        // It has no memory that would go by lanes.
        self.sent = Some((connection.sealed(|socket| socket)?.main, note));
        Ok(())
    }

    fn hand_over(
        &mut self,
        _connection: UnixStream,
        _note: Vec<u8>,
        _files: &[BorrowedFd<'_>],
    ) -> Result<(), GuestError> {
        Err(io::Error::from(io::ErrorKind::Unsupported).into())
    }

    fn is_being_sent(&self) -> bool {
        self.sent.is_some()
    }

    fn owes(&self) -> bool {
        false
    }

    fn go_on_by(&mut self, _connection: UnixStream) -> Result<(), GuestError> {
        Err(io::Error::from(io::ErrorKind::Unsupported).into())
    }

    fn lacks(&self) -> Option<Lacks> {
        None
    }

    fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_handed_over(&self) -> bool {
        false
    }

    fn send_by(&mut self, _policy: Option<Policy>, note: Option<Vec<u8>>) {
        if let (Some((_, goes)), Some(note)) = (&mut self.sent, note) {
            *goes = note;
        }
    }

    fn send_on(&mut self, _tells: bool) -> Option<(Journey, Option<Progress>)> {
        let (mut connection, note) = self.sent.take()?;
        let ran = self.state == State::Running;
        let sent = self.packed(&note, ran).and_then(|bytes| {
            let mut answer = [0];
            connection.write_all(&bytes)?;
            connection.flush()?;
            connection.read_exact(&mut answer)?;
            Ok(())
        });
        let journey = match sent {
            Ok(()) => {
                (self.state, self.offered) = (State::Paused, Some(ran));
                Journey::Offered {
                    ran,
                    doubt: None,
                    owes: false,
                }
            }
            Err(error) => Journey::Failed {
                reason: error.to_string(),
            },
        };
        Some((journey, None))
    }

    fn stay(&mut self) -> Result<(), GuestError> {
        self.sent = None;
        match self.offered.take() {
            Some(true) => self.push(MachineEvent::Running),
            _ => Ok(()),
        }
    }

    fn state(&self) -> State {
        self.state
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn next_event(&mut self) -> Option<GuestEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        while let Ok(line) = self.lines.try_recv() {
            if let Some(event) = self.hear(&line) {
                return Some(event);
            }
        }
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        // A line may have come between the last look and the silencing of the bell.
        let line = self.lines.try_recv().ok()?;
        self.hear(&line)
    }
}
