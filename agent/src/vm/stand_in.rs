//! A guest without a machine, for hosts without KVM: it has a serial line and hears its power button.
//!
//! For tests of all that surrounds a machine (processes, jail, records, consoles). It prints a boot
//! line with the process's boot nonce, echoes each line it reads, and knows the lines `off`, `fault`
//! (a triple fault), `panic` (a fault of the VMM), `deaf` (does not hear the button any more), `oops` (its
//! kernel panics), `reset` and `bite` (its watchdog runs out, and pauses it).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use fractus_agent_api::machine::StopReason;
use rustix::event::{EventfdFlags, eventfd};

use super::guest::{Guest, GuestError};
use super::protocol::{MachineEvent, State};

pub struct StandIn {
    state: State,
    serial: File,
    deaf: bool,
    events: VecDeque<MachineEvent>,
    bell: OwnedFd,
    /// Lines that the reading thread heard.
    lines: Receiver<String>,
}

impl StandIn {
    /// `serial` is a stream socket. `hook` runs at the start of the thread, as the machine's would.
    pub fn new(serial: OwnedFd, hook: impl FnOnce() + Send + 'static) -> io::Result<Self> {
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
            serial,
            deaf: false,
            events: VecDeque::new(),
            bell,
            lines,
        })
    }

    fn push(&mut self, event: MachineEvent) -> Result<(), GuestError> {
        match &event {
            MachineEvent::Running => self.state = State::Running,
            MachineEvent::Paused => self.state = State::Paused,
            MachineEvent::Stopped { .. } => self.state = State::Stopped,
            _ => {}
        }
        self.events.push_back(event);
        ring(&self.bell)
    }

    fn hear(&mut self, line: &str) -> Option<MachineEvent> {
        let _ = writeln!(self.serial, "heard {line}");
        let reason = match line {
            "oops" => return Some(MachineEvent::Panicked),
            "reset" => return Some(MachineEvent::GuestReset),
            "bite" => {
                self.state = State::Paused;
                self.events.push_back(MachineEvent::Paused);
                return Some(MachineEvent::WatchdogFired);
            }
            "off" => StopReason::GuestPowerOff,
            "fault" => StopReason::TripleFault,
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
        Some(MachineEvent::Stopped { reason })
    }
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
        let mut nonce = [0; 8];
        nonce.copy_from_slice(uuid::Uuid::new_v4().as_bytes().get(..8).unwrap_or_default());
        writeln!(
            self.serial,
            "stand-in boot {:016x}",
            u64::from_ne_bytes(nonce)
        )?;
        self.push(MachineEvent::Running)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.push(MachineEvent::Paused)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
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

    fn state(&self) -> State {
        self.state
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn next_event(&mut self) -> Option<MachineEvent> {
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
