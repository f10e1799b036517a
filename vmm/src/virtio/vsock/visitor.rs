//! A program of the host that has come to the machine's socket and has not been connected yet.
//!
//! It says one line, in the way that Firecracker and Cloud Hypervisor have made usual:
//!
//! ```text
//! CONNECT 1234      to the guest's port 1234. Once the guest has accepted: OK and a port of the host's
//! ACCEPT 1234       whoever in the guest connects to port 1234 of the host. Then: OK and the guest's port
//! ```
//!
//! After the answer the socket is the stream. Who wants several connections from the guest comes several
//! times: those who wait are the backlog, first come, first served. (A jailed process can connect to no
//! socket of the host, so that those who listen have to come to it.)

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// The longest line with its end.
const LINE_MAX: usize = 32;
/// How long the line may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Visitor {
    socket: OwnedFd,
    /// Until it has said what it wants.
    deadline: Instant,
    accepts: Option<u32>,
}

/// What came of hearing a visitor.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// It is to be heard again.
    Waits,
    /// It wants the guest's port.
    Connect(u32),
    /// It has gone, or says what nobody understands.
    Gone,
}

impl Visitor {
    pub fn new(socket: OwnedFd, now: Instant) -> Self {
        Self {
            socket,
            deadline: now + PATIENCE,
            accepts: None,
        }
    }

    /// The host's port for which it takes a connection of the guest.
    pub fn accepts(&self) -> Option<u32> {
        self.accepts
    }

    /// When it is sent away; never while it waits for the guest.
    pub fn deadline(&self) -> Option<Instant> {
        self.accepts.is_none().then_some(self.deadline)
    }

    /// Hears what it says, and takes no byte of what belongs to the stream. `hung_up`: it will say
    /// no more.
    pub fn hear(&mut self, hung_up: bool) -> Heard {
        if self.accepts.is_some() {
            return if hung_up { Heard::Gone } else { Heard::Waits };
        }
        let mut line = [0; LINE_MAX];
        let length = match recv(&self.socket, &mut line[..], RecvFlags::PEEK) {
            Ok((0, _)) => return Heard::Gone,
            Ok((length, _)) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Heard::Waits,
            Err(_) => return Heard::Gone,
        };
        let Some(end) = line[..length].iter().position(|&byte| byte == b'\n') else {
            let may_come = length < LINE_MAX && !hung_up;
            return if may_come { Heard::Waits } else { Heard::Gone };
        };
        // They were there when they were looked at: no other reads this socket.
        let _ = recv(&self.socket, &mut line[..=end], RecvFlags::empty());
        let words = std::str::from_utf8(&line[..end]).ok();
        let wish = words.and_then(|line| line.split_once(' '));
        match wish.map(|(word, port)| (word, port.trim_end().parse())) {
            Some(("CONNECT", Ok(port))) => Heard::Connect(port),
            Some(("ACCEPT", Ok(port))) => {
                self.accepts = Some(port);
                if hung_up { Heard::Gone } else { Heard::Waits }
            }
            _ => Heard::Gone,
        }
    }

    /// Its socket, for a connection of its own wish.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Its socket, for a connection from the guest's `port`; none if it has gone.
    pub fn accept(self, port: u32) -> Option<OwnedFd> {
        let answer = format!("OK {port}\n");
        let sent = send(&self.socket, answer.as_bytes(), SendFlags::NOSIGNAL);
        (sent == Ok(answer.len())).then_some(self.socket)
    }
}
