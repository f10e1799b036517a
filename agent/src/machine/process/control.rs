//! A connection to a machine's process: packets of [`crate::vm::protocol`] over tokio.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::ProcessError;
use crate::vm::packet::{self, PacketError};
use crate::vm::protocol::{AnotherLine, FromMachine, LineTaken, Role, ToMachine, VERSION};

/// Under the eyes of tokio's reactor.
pub fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and always the same until it is dropped, and it is dropped after the
    // registration that owns it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Brings the process another line, to the socket that it has for that ([`crate::vm::protocol::FileRole::Lines`]).
pub async fn bring_line(path: &Path, pid: i32, line: OwnedFd) -> Result<(), ProcessError> {
    let control = Control::reach(path, pid)?;
    let version = VERSION;
    control
        .send(&AnotherLine { version }, &[line.as_fd()])
        .await?;
    let LineTaken { error } = control.receive().await?;
    error.map_or(Ok(()), |error| Err(ProcessError::NotNow(error)))
}

#[derive(Debug)]
pub struct Control(AsyncFd<OwnedFd>);

impl Control {
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(watched(socket)?))
    }

    /// Connects to the process's socket, and makes sure that it is this very process that listens.
    pub async fn connect(path: &Path, pid: i32, role: Role) -> Result<Self, ProcessError> {
        let control = Self::reach(path, pid)?;
        let version = VERSION;
        let hello = ToMachine::Hello { version, role };
        control.send(&hello, &[]).await?;
        Ok(control)
    }

    fn reach(path: &Path, pid: i32) -> Result<Self, ProcessError> {
        let failed = |source: io::Error| ProcessError::System {
            what: format!("connecting to {}", path.display()),
            source,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|e| failed(e.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        // A unix socket connects at once or not at all.
        connect(&socket, &address).map_err(|e| failed(e.into()))?;
        let peer = socket_peercred(&socket).map_err(|e| failed(e.into()))?;
        if peer.pid.as_raw_nonzero().get() != pid {
            return Err(failed(io::Error::other(format!(
                "process {} listens there, not {pid}",
                peer.pid.as_raw_nonzero()
            ))));
        }
        Self::new(socket).map_err(failed)
    }

    pub async fn send<T: serde::Serialize>(
        &self,
        message: &T,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), PacketError> {
        self.retry(Interest::WRITABLE, |socket| {
            packet::send(socket, message, files)
        })
        .await
    }

    pub async fn receive<T: DeserializeOwned>(&self) -> Result<T, PacketError> {
        let received = self
            .retry(Interest::READABLE, |socket| packet::receive(socket))
            .await;
        received.map(|(message, _)| message)
    }

    /// What has arrived already.
    ///
    /// # Errors
    /// One that [would block](PacketError::would_block), where nothing has.
    pub fn try_receive(&self) -> Result<FromMachine, PacketError> {
        packet::receive(self.0.get_ref()).map(|(message, _)| message)
    }

    /// The raw socket, for the console's bytes.
    pub fn socket(&self) -> &AsyncFd<OwnedFd> {
        &self.0
    }

    async fn retry<T>(
        &self,
        interest: Interest,
        mut attempt: impl FnMut(&OwnedFd) -> Result<T, PacketError>,
    ) -> Result<T, PacketError> {
        loop {
            match attempt(self.0.get_ref()) {
                Err(error) if error.would_block() => {}
                done => return done,
            }
            let mut ready = match self.0.ready(interest).await {
                Ok(ready) => ready,
                Err(_) => return Err(PacketError::Closed),
            };
            // Another attempt, and only if that would block too is the readiness used up.
            match attempt(self.0.get_ref()) {
                Err(error) if error.would_block() => ready.clear_ready(),
                done => return done,
            }
        }
    }
}
