//! The one loop of a machine's process: owns the guest, hears the agent, carries the serial line.
//!
//! A state machine at rest in `poll`. It must never block elsewhere: a console that does not read
//! loses bytes (the log has them), an agent that does not read loses its connection and comes back. The exception is a
//! guest that is sent to another host: a megabyte at a turn, for as long as [`super::paced`] lets that take, and as its
//! disks take to be read; likewise one whose disk is copied.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use fractus_agent_api::machine::{ServerId, StopReason};
use fractus_agent_api::migration::MigrationId;
use fractus_vmm::machine::Compression;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::devices::Devices;
use super::guest::{Guest, GuestError, GuestEvent};
use super::handover::{End, Taken, Visitors};
use super::kept::ToSuspend;
use super::lean::Lean;
use super::leave::Leave;
use super::moving::Sent;
use super::pace::Pace;
use super::protocol::{
    self, FromMachine, LastWords, MachineEvent, Role, State, ToMachine, VERSION,
};
use super::said::Said;
use super::{log, packet};
use crate::console::ring::RingWriter;

/// All that the loop owns.
pub struct Supervisor {
    pub id: ServerId,
    pub guest: Box<dyn Guest>,
    /// Those that can come and go.
    pub devices: Devices,
    /// What the guest takes of what it is offered.
    pub pace: Pace,
    /// What of the program itself is in memory.
    pub lean: Lean,
    /// How it hears that its host is going down; `None` only when run by hand.
    pub leave: Option<Leave>,
    /// Listening; `None` only when run by hand.
    pub listener: Option<OwnedFd>,
    /// The agent, if it is there.
    pub agent: Option<OwnedFd>,
    /// Our end of the guest's serial line, a stream socket.
    pub serial: OwnedFd,
    /// Our end of the guest agent's port, likewise; `None`: the machine has none.
    pub port: Option<OwnedFd>,
    pub serial_log: Option<RingWriter>,
    /// Where the serial line also goes, and comes from, when run by hand.
    pub terminal: Option<Terminal>,
    pub last_words: Option<File>,
    /// What events have said, and perhaps to nobody.
    pub said: Said,
    /// There may be events of the guest that no turn of the loop has taken yet.
    pub unheard: bool,
    /// Of a guest that goes on here the agent does not know what it has: it is told once that runs.
    pub to_tell: bool,
    /// The guest is to be suspended, to this file.
    pub suspend: Option<ToSuspend>,
    /// Its root disk is being copied, in this attempt.
    pub copying: Option<uuid::Uuid>,
    /// What became of sending it to another host.
    pub sent: Sent,
    /// Its guest is to be handed over, to where this leads.
    pub handing: Option<(MigrationId, OwnedFd)>,
    /// What was lent to the process that it is handed over to, in this order.
    pub lent: Vec<End>,
    /// Its guest was handed over by another process, with who was there; none: it was not.
    pub taken: Option<Taken>,
    /// It cannot go on, and this is why.
    pub broken: Option<StopReason>,
    /// The agent is gone, and nothing listens for another: nobody could ever end this machine.
    pub abandoned: bool,
}

/// How much of one side is carried before the others have their turn.
const ROUNDS: usize = 16;

pub struct Terminal {
    pub input: Option<OwnedFd>,
    pub output: OwnedFd,
}

/// The sides of the loop that come and go.
#[derive(Default)]
pub(super) struct Guests {
    /// Connections that have not said what they are for.
    new: Option<OwnedFd>,
    pub console: Option<OwnedFd>,
    /// Who speaks to the guest's agent.
    pub speaker: Option<OwnedFd>,
}

impl Supervisor {
    /// Until the machine has ended; says why it did.
    pub fn run(mut self) -> StopReason {
        let Visitors { console, speaker } = match &mut self.taken {
            Some(taken) => std::mem::take(&mut taken.visitors),
            None => Visitors::default(),
        };
        let new = None;
        let mut others = Guests {
            new,
            console,
            speaker,
        };
        self.lean.happened();
        loop {
            let ready = match self.wait(&others) {
                Ok(ready) => ready,
                Err(errno) => {
                    return self.end(StopReason::VmmFault {
                        detail: format!("poll: {errno}"),
                    });
                }
            };
            if self.pace.is_due() {
                self.tell(&self.status());
            }
            self.lean.keep();
            if ready.serial {
                self.carry_output(&mut others, ROUNDS);
            }
            if ready.agent {
                self.hear_agent();
            }
            if let Some(to) = self.suspend.take() {
                self.carry_output(&mut others, usize::MAX);
                self.suspend(to);
                // What the guest said last is kept nowhere else.
                self.carry_output(&mut others, usize::MAX);
            }
            if let Some((migration, line)) = self.handing.take() {
                self.hand_over(migration, line, &others);
            }
            if let Some(reason) = self.broken.take() {
                return self.end(reason);
            }
            if self.abandoned {
                return self.end(StopReason::Requested);
            }
            if ready.leave {
                self.make_ready_to_leave();
            }
            if self.leave.as_ref().and_then(Leave::left) == Some(Duration::ZERO)
                && !self.has_time_to_pay()
            {
                // What a guest said last that does not shut down is what somebody will want to read.
                let _ = self.guest.stop();
                self.carry_output(&mut others, usize::MAX);
                return self.end(StopReason::HostReboot);
            }
            // A command may have made events that no descriptor tells of.
            if (ready.guest || ready.agent || self.unheard)
                && let Some(reason) = self.hear_guest()
            {
                let reason = match &self.leave {
                    Some(leave) => leave.reason(reason),
                    None => reason,
                };
                // What the guest said last is in the socket still; nobody writes there any more.
                self.carry_output(&mut others, usize::MAX);
                if let StopReason::NotBootable { detail } = &reason {
                    self.say(detail);
                    let console = others.console.as_ref();
                    let _ = console.map(|console| send(console, detail.as_bytes(), SEND));
                }
                return self.end(reason);
            }
            if ready.console {
                self.carry_input(&mut others);
            }
            if ready.port {
                self.carry_port(&mut others);
            }
            if ready.speaker {
                self.carry_speech(&mut others);
            }
            if ready.terminal {
                self.carry_terminal();
            }
            if ready.new {
                self.greet(&mut others);
            }
            if ready.listener {
                self.accept(&mut others);
            }
            self.send_on();
            self.copy_on();
        }
    }

    fn wait(&self, others: &Guests) -> Result<Ready, Errno> {
        let terminal = self.terminal.as_ref().and_then(|t| t.input.as_ref());
        // The lines of one that was handed over are read by whoever has it.
        let here = !self.guest.is_handed_over();
        fn end(fd: Option<&OwnedFd>, here: bool) -> Option<BorrowedFd<'_>> {
            fd.filter(|_| here).map(AsFd::as_fd)
        }
        let sources: [(Option<BorrowedFd<'_>>, Source); 11] = [
            (end(Some(&self.serial), here), |ready| &mut ready.serial),
            (self.guest.waits_for(), |ready| &mut ready.sent),
            (Some(self.guest.event_fd()), |ready| &mut ready.guest),
            (self.agent.as_ref().map(AsFd::as_fd), |ready| {
                &mut ready.agent
            }),
            (
                self.leave.as_ref().map(|leave| leave.signals.as_fd()),
                |ready| &mut ready.leave,
            ),
            (end(others.console.as_ref(), here), |ready| {
                &mut ready.console
            }),
            (end(self.port.as_ref(), here), |ready| &mut ready.port),
            (end(others.speaker.as_ref(), here), |ready| {
                &mut ready.speaker
            }),
            (terminal.map(AsFd::as_fd), |ready| &mut ready.terminal),
            (others.new.as_ref().map(AsFd::as_fd), |ready| &mut ready.new),
            (self.listener.as_ref().map(AsFd::as_fd), |ready| {
                &mut ready.listener
            }),
        ];
        let mut polled = Vec::with_capacity(sources.len());
        let mut flags = Vec::with_capacity(sources.len());
        for (fd, source) in &sources {
            if let Some(fd) = fd {
                polled.push(PollFd::from_borrowed_fd(*fd, PollFlags::IN));
                flags.push(*source);
            }
        }
        // What was left over is gone on with at once; no descriptor need tell of it.
        let left = match self.unheard {
            true => Some(Duration::ZERO),
            false => {
                let leave = self.to_leave();
                let more = self.copying.map(|_| Duration::ZERO).or(self.to_send());
                let all = [self.pace.left(), self.lean.left(), leave, more];
                all.into_iter().flatten().min()
            }
        };
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut ready = Ready::default();
        for (fd, source) in polled.iter().zip(flags) {
            *source(&mut ready) = !fd.revents().is_empty();
        }
        Ok(ready)
    }

    /// Serial output: to the log, and to whoever watches. What is there after so many rounds waits
    /// for the next turn of the loop: a guest that never pauses must not keep us from the agent.
    fn carry_output(&mut self, others: &mut Guests, rounds: usize) {
        let mut bytes = [0; 4096];
        for _ in 0..rounds {
            let length = match recv(&self.serial, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((length, _)) if length > 0 => length,
                Err(Errno::INTR) => continue,
                Ok(_) | Err(_) => return,
            };
            let Some(bytes) = bytes.get(..length) else {
                return;
            };
            if let Some(log) = &mut self.serial_log
                && let Err(error) = log.write(bytes)
            {
                log::line(format_args!("serial log: {error}"));
            }
            if let Some(terminal) = &self.terminal {
                let _ = rustix::io::write(&terminal.output, bytes);
            }
            if let Some(console) = &others.console
                && let Err(errno) = send(console, bytes, SEND)
                && errno != Errno::AGAIN
            {
                others.console = None;
            }
        }
    }

    /// Says something on the guest's console that the guest did not: it has ended, and this is why.
    pub fn say(&mut self, text: &str) {
        let text = format!("\r\nfractus: {text}\r\n");
        let bytes = text.as_bytes();
        if let Some(log) = &mut self.serial_log
            && let Err(error) = log.write(bytes)
        {
            log::line(format_args!("serial log: {error}"));
        }
        if let Some(terminal) = &self.terminal {
            let _ = rustix::io::write(&terminal.output, bytes);
        }
    }

    fn carry_input(&mut self, others: &mut Guests) {
        let Some(console) = &others.console else {
            return;
        };
        let mut bytes = [0; 4096];
        match recv(console, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((length, _)) if length > 0 => self.type_in(bytes.get(..length).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(_) | Err(_) => others.console = None,
        }
    }

    /// What the guest's agent says, to whoever speaks to it; lost if nobody does or reads.
    fn carry_port(&mut self, others: &mut Guests) {
        let Some(port) = &self.port else { return };
        let mut bytes = [0; 4096];
        for _ in 0..ROUNDS {
            let length = match recv(port, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((length, _)) if length > 0 => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                Ok(_) | Err(_) => {
                    self.port = None;
                    return;
                }
            };
            if let (Some(speaker), Some(bytes)) = (&others.speaker, bytes.get(..length))
                && let Err(errno) = send(speaker, bytes, SEND)
                && errno != Errno::AGAIN
            {
                others.speaker = None;
            }
        }
    }

    fn carry_speech(&mut self, others: &mut Guests) {
        let (Some(speaker), Some(port)) = (&others.speaker, &self.port) else {
            others.speaker = None;
            return;
        };
        let mut bytes = [0; 4096];
        match recv(speaker, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((length, _)) if length > 0 => {
                let _ = send(port, bytes.get(..length).unwrap_or_default(), SEND);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(_) | Err(_) => others.speaker = None,
        }
    }

    fn carry_terminal(&mut self) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        let Some(input) = &terminal.input else { return };
        let mut bytes = [0; 4096];
        match rustix::io::read(input, &mut bytes) {
            Ok(0) => terminal.input = None,
            Ok(length) => self.type_in(bytes.get(..length).unwrap_or_default()),
            Err(_) => {}
        }
    }

    fn type_in(&self, bytes: &[u8]) {
        let _ = send(&self.serial, bytes, SEND);
    }

    /// The guest may power off first, if it can hear that.
    fn make_ready_to_leave(&mut self) {
        let hears = self.guest.state() == State::Running;
        let Some(leave) = &mut self.leave else { return };
        let asks = leave.is_first(hears);
        log::line(format_args!("SIGTERM: the host ends this machine"));
        self.lean.happened();
        if asks && let Err(error) = self.guest.press_power_button() {
            log::line(format_args!("the power button: {error}"));
        }
    }

    /// What the machine has to say; a reason when it has ended.
    fn hear_guest(&mut self) -> Option<StopReason> {
        self.unheard = true;
        for _ in 0..ROUNDS {
            let Some(event) = self.guest.next_event() else {
                self.unheard = false;
                break;
            };
            if event != GuestEvent::Resized {
                log::line(format_args!("{event:?}"));
                self.lean.happened();
            }
            let event = match event {
                GuestEvent::Machine(MachineEvent::Stopped { reason }) => return Some(reason),
                GuestEvent::Machine(event) => event,
                GuestEvent::DeviceGone(name) => {
                    self.device_gone(&name);
                    continue;
                }
                GuestEvent::Followed(how) => {
                    self.followed(how);
                    continue;
                }
                GuestEvent::Resized => {
                    self.pace.happened();
                    continue;
                }
            };
            self.said.take_down(&event);
            self.say_anew();
            if event == MachineEvent::Running
                && let Some(blackout_us) = self.taken.as_mut().and_then(Taken::blackout_us)
            {
                self.tell(&FromMachine::TookOver { blackout_us });
            }
            // First what it has: once it is known to run, its devices are looked at.
            if event == MachineEvent::Running && std::mem::take(&mut self.to_tell) {
                self.tell(&self.status());
            }
            self.tell(&FromMachine::Event { event });
        }
        None
    }

    fn hear_agent(&mut self) {
        let Some(agent) = &self.agent else { return };
        match packet::receive::<ToMachine>(agent) {
            Ok((message, files)) => self.obey(message, files),
            Err(error) if error.would_block() => {}
            Err(error) => {
                self.lose_agent(&error);
            }
        }
    }

    /// Descriptors that came with a message which has no use for them are closed.
    fn obey(&mut self, message: ToMachine, files: Vec<OwnedFd>) {
        log::line(format_args!("agent: {message:?}"));
        self.lean.happened();
        let done = match message {
            ToMachine::Hello { .. } | ToMachine::Status => self.tell_status(),
            ToMachine::Go => self.guest.start(),
            // Repeated, because the agent did not hear that it was done.
            ToMachine::Pause { .. } if self.guest.state() == State::Paused => self.tell_status(),
            ToMachine::Resume { .. } if self.guest.state() == State::Running => self.tell_status(),
            ToMachine::Pause { request_id } => {
                log::request(request_id);
                self.only_in(State::Running)
                    .and_then(|()| self.guest.pause())
            }
            ToMachine::Resume { request_id } => {
                log::request(request_id);
                self.only_in(State::Paused)
                    .and_then(|()| self.guest.resume())
            }
            ToMachine::PressPowerButton { request_id } => {
                log::request(request_id);
                self.guest.press_power_button()
            }
            ToMachine::Stop { request_id } => {
                log::request(request_id);
                self.guest.stop()
            }
            ToMachine::AttachDisk {
                request_id,
                id,
                config,
            } => {
                log::request(request_id);
                self.attach_disk(id, config, files);
                Ok(())
            }
            ToMachine::AttachNet {
                request_id,
                id,
                config,
            } => {
                log::request(request_id);
                self.attach_net(id, config, files);
                Ok(())
            }
            ToMachine::Resize {
                request_id,
                vcpus,
                hot_memory,
            } => {
                log::request(request_id);
                self.resize(vcpus, hot_memory);
                Ok(())
            }
            ToMachine::Suspend {
                request_id,
                attempt,
                compression,
            } => {
                log::request(request_id);
                // Its disks are made durable, and not what is copied of them.
                self.copy_no_more("its guest is suspended");
                self.is_to_suspend(attempt, compression, files)
            }
            ToMachine::Send {
                request_id,
                migration,
                policy,
                lent,
            } => {
                log::request(request_id);
                self.copy_no_more("its guest is to be sent to another host");
                self.send(migration, policy, lent, files)
            }
            ToMachine::HandOver {
                request_id,
                migration,
            } => self.is_to_hand_over(request_id, migration, files),
            copies @ (ToMachine::Copy { .. } | ToMachine::NoCopy { .. }) => {
                self.obey_about_copies(copies, files);
                Ok(())
            }
            ToMachine::Stay { request_id } => {
                log::request(request_id);
                self.broken = self.stay();
                Ok(())
            }
            ToMachine::Detach { request_id, id } => {
                log::request(request_id);
                self.detach(id);
                Ok(())
            }
        };
        if let Err(error) = done {
            log::line(format_args!("refused: {error}"));
            self.tell(&FromMachine::Refused {
                detail: error.to_string(),
            });
        }
    }

    fn tell_status(&mut self) -> Result<(), GuestError> {
        self.tell(&self.status());
        Ok(())
    }

    /// The loop does it, which has the serial line at hand.
    fn is_to_suspend(
        &mut self,
        attempt: uuid::Uuid,
        compression: Compression,
        files: Vec<OwnedFd>,
    ) -> Result<(), GuestError> {
        self.suspend = files.into_iter().next().map(|file| ToSuspend {
            attempt,
            compression,
            file,
        });
        match self.suspend {
            Some(_) => Ok(()),
            None => Err(GuestError::Machine(
                "no file came for its memory".to_owned(),
            )),
        }
    }

    fn only_in(&self, state: State) -> Result<(), GuestError> {
        match self.guest.state() {
            is if is == state => Ok(()),
            is => Err(GuestError::Machine(format!("is {is:?}, not {state:?}"))),
        }
    }

    pub(super) fn status(&self) -> FromMachine {
        FromMachine::Status {
            version: VERSION,
            id: self.id,
            state: self.guest.state(),
            guest: Some(self.said.words()),
            devices: Some(self.devices.all()),
            size: Some(self.guest.size()),
            suspends: true,
            sends: true,
            copies: true,
            hands: true,
            follows: true,
            seals: true,
            lanes: true,
            moving: self.sent.moving.clone(),
            lacks: self.guest.lacks(),
        }
    }

    pub(super) fn tell(&mut self, message: &FromMachine) {
        let Some(agent) = &self.agent else { return };
        if let Err(error) = packet::send(agent, message, &[]) {
            self.lose_agent(&error);
        }
    }

    /// A machine outlives its agent, which comes back through the listener; one that was started by
    /// hand has none, and ends with who started it.
    fn lose_agent(&mut self, error: &packet::PacketError) {
        log::line(format_args!("the agent: {error}"));
        self.agent = None;
        self.abandoned = self.listener.is_none();
    }

    fn accept(&mut self, others: &mut Guests) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(connection) = accept_with(listener, flags) {
            others.new = Some(connection);
        }
    }

    /// The first packet of a connection says what it is for.
    fn greet(&mut self, others: &mut Guests) {
        let Some(connection) = others.new.take() else {
            return;
        };
        self.lean.happened();
        match packet::receive::<ToMachine>(&connection) {
            Ok((
                ToMachine::Hello {
                    role: Role::Control,
                    ..
                },
                _,
            )) => {
                self.agent = Some(connection);
                self.tell(&self.status());
            }
            Ok((
                ToMachine::Hello {
                    role: Role::Console,
                    ..
                },
                _,
            )) => {
                others.console = Some(connection);
            }
            Ok((
                ToMachine::Hello {
                    role: Role::GuestAgent,
                    ..
                },
                _,
            )) => {
                others.speaker = Some(connection);
            }
            Ok((other, _)) => log::line(format_args!("{other:?} came before a Hello")),
            Err(error) if error.would_block() => others.new = Some(connection),
            Err(error) => log::line(format_args!("a connection: {error}")),
        }
    }

    fn end(&mut self, reason: StopReason) -> StopReason {
        let words = LastWords {
            version: protocol::VERSION,
            reason: reason.clone(),
        };
        if let (Some(file), Ok(bytes)) = (&self.last_words, serde_json::to_vec(&words))
            && let Err(error) = (file.set_len(0)).and_then(|()| file.write_all_at(&bytes, 0))
        {
            log::line(format_args!("last words: {error}"));
        }
        self.tell(&FromMachine::Event {
            event: MachineEvent::Stopped {
                reason: reason.clone(),
            },
        });
        log::line(format_args!("ended: {reason:?}"));
        reason
    }
}

const SEND: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

#[derive(Default)]
struct Ready {
    serial: bool,
    /// Looked at at every turn.
    sent: bool,
    guest: bool,
    agent: bool,
    leave: bool,
    console: bool,
    port: bool,
    speaker: bool,
    terminal: bool,
    new: bool,
    listener: bool,
}

type Source = fn(&mut Ready) -> &mut bool;
