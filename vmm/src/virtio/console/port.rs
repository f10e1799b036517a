//! One port: its host's end and how its two queues are served.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::config::{ConsoleFiles, ConsolePortConfig};
use crate::output::{Output, make_nonblocking};
use crate::reactor::{Interest, Registration};
use crate::virtio::queue::{QueueFault, Segment, Virtqueue, gather, scatter, slice, total};

/// Bytes moved by one system call.
const CHUNK: usize = 4096;

/// What is saved of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct PortState {
    /// The driver knows the port.
    pub(super) ready: bool,
    /// A program in the guest (or its console) has the port open.
    pub(super) guest_open: bool,
    /// Bytes of the next chain to the host that the host has already got.
    pub(super) sent: u64,
}

/// Where a guest's bytes go.
pub(super) enum Target {
    /// Nowhere.
    Nothing,
    /// A console: what nobody reads in time is dropped, so that the guest never waits.
    Console(Output),
    /// A protocol: nothing is dropped, so the guest waits.
    Stream(OwnedFd),
}

pub(super) struct Port {
    pub(super) name: String,
    pub(super) console: bool,
    pub(super) state: PortState,
    pub(super) target: Target,
    pub(super) input: Option<OwnedFd>,
    pub(super) input_ready: Option<Registration>,
    pub(super) output_ready: Option<Registration>,
}

/// Whether a queue was served to its end, or something else has to happen first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Served {
    /// No more chains; a kick tells of the next.
    Empty,
    /// There may be more, at the next turn.
    More,
    /// The host's end has to become ready.
    Blocked,
    /// The host's end has gone.
    Closed,
}

impl Port {
    /// Duplicates what it needs of `files`.
    pub(super) fn open(
        config: &ConsolePortConfig,
        files: &ConsoleFiles,
        reactor: &crate::reactor::Reactor,
    ) -> io::Result<Self> {
        let target = match &files.output {
            None => Target::Nothing,
            Some(fd) if config.console => Target::Console(Output::open(fd.as_fd(), reactor)?),
            Some(fd) => {
                let fd = fd.try_clone()?;
                make_nonblocking(fd.as_fd())?;
                Target::Stream(fd)
            }
        };
        let input = files.input.as_ref().map(OwnedFd::try_clone).transpose()?;
        if let Some(fd) = &input {
            make_nonblocking(fd.as_fd())?;
        }
        Ok(Self {
            name: config.name.clone(),
            console: config.console,
            state: PortState::default(),
            target,
            input,
            input_ready: None,
            output_ready: None,
        })
    }

    /// Somebody is at the host's end.
    pub(super) fn host_open(&self) -> bool {
        self.input.is_some() || !matches!(self.target, Target::Nothing)
    }

    /// Takes what the guest wrote.
    pub(super) fn send(&mut self, queue: &mut Virtqueue) -> Result<Served, QueueFault> {
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                return Ok(Served::Empty);
            };
            if !chain.writable().is_empty() {
                let what = "buffer to be sent";
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what,
                });
            }
            let length = total(chain.readable());
            while self.state.sent < length {
                let part = slice(chain.readable(), self.state.sent, CHUNK as u64);
                match self.write(queue, &part) {
                    Ok(written) => self.state.sent += written as u64,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => {
                        queue.unpop();
                        return Ok(Served::Blocked);
                    }
                    Err(_) => {
                        // Nobody will ever read it: the rest of all this is dropped.
                        self.target = Target::Nothing;
                        self.state.sent = length;
                    }
                }
            }
            self.state.sent = 0;
            queue.push(chain.head, 0)?;
        }
        Ok(Served::More)
    }

    fn write(&self, queue: &Virtqueue, part: &[Segment]) -> Result<usize, Errno> {
        let mut bytes = [0; CHUNK];
        let bytes = &mut bytes[..total(part) as usize];
        gather(queue.memory(), part, bytes);
        match &self.target {
            Target::Nothing => Ok(bytes.len()),
            Target::Console(output) => {
                output.write(bytes);
                Ok(bytes.len())
            }
            // Of a socket whose reader went, without a signal.
            Target::Stream(fd) => match rustix::io::write(fd, bytes) {
                Ok(0) => Err(Errno::PIPE),
                result => result,
            },
        }
    }

    /// Gives the guest what has come in, as far as it has room.
    pub(super) fn receive(&mut self, queue: &mut Virtqueue) -> Result<Served, QueueFault> {
        for _ in 0..queue.size() {
            let Some(fd) = &self.input else {
                return Ok(Served::Blocked);
            };
            let Some(chain) = queue.pop()? else {
                return Ok(Served::Empty);
            };
            if chain.writable().is_empty() {
                let what = "buffer to be filled";
                return Err(QueueFault::Malformed {
                    head: chain.head,
                    what,
                });
            }
            let mut bytes = [0; CHUNK];
            let room = total(chain.writable()).min(CHUNK as u64) as usize;
            match rustix::io::read(fd, &mut bytes[..room]) {
                Ok(0) => {
                    queue.unpop();
                    self.input = None;
                    self.input_ready = None;
                    return Ok(Served::Closed);
                }
                Ok(count) => {
                    let count = scatter(queue.memory(), chain.writable(), &bytes[..count]);
                    queue.push(chain.head, count as u32)?;
                }
                Err(error) => {
                    queue.unpop();
                    if !matches!(error, Errno::AGAIN | Errno::INTR) {
                        self.input = None;
                        self.input_ready = None;
                        return Ok(Served::Closed);
                    }
                    return Ok(Served::Blocked);
                }
            }
        }
        Ok(Served::More)
    }

    /// Waits for input only while the guest has room for it.
    pub(super) fn listen(&self, wanted: bool) {
        if let Some(registration) = &self.input_ready {
            let interest = if wanted {
                Interest::READ
            } else {
                Interest::NONE
            };
            if let Err(error) = registration.set_interest(interest) {
                tracing::warn!(port = self.name, %error, "a port's input cannot be waited for");
            }
        }
    }
}
