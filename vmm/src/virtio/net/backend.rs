//! What a network device's packets come from and go to.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;

use super::frame::Frame;
use super::tap::Tap;

/// What the driver is ready to receive (virtio 1.2 §5.1.4, §5.1.6.5.6), and so what the host may leave
/// to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Packets whose checksum is not filled in. Without it there is none of the others.
    pub checksum: bool,
    /// TCP segments of up to 64 KiB over IPv4.
    pub tso4: bool,
    pub tso6: bool,
    /// Such segments with ECN's bits.
    pub ecn: bool,
}

/// One pair of queues, at the host's end. Packets begin with the 12 bytes of virtio_net_hdr. Called by
/// one thread, and it never blocks.
pub trait NetBackend: Send {
    /// Readable when there is a packet, writable when one more can go.
    fn as_fd(&self) -> BorrowedFd<'_>;

    /// Takes one packet; `AGAIN` if there is none.
    fn receive(&mut self, frame: &mut Frame) -> Result<usize, Errno> {
        frame.read_from(self.as_fd())
    }

    /// Sends what is in the frame; `AGAIN` if there is no room now.
    fn send(&mut self, frame: &Frame) -> Result<(), Errno> {
        frame.write_to(self.as_fd()).map(drop)
    }

    /// Sends a packet of the host's own, header first; `AGAIN` likewise.
    fn send_bytes(&mut self, packet: &[u8]) -> Result<(), Errno> {
        rustix::io::write(self.as_fd(), packet).map(drop)
    }

    /// For the whole device: asked of the first pair only.
    fn set_offloads(&mut self, offloads: Offloads) -> Result<(), Errno>;

    /// Whether the host's kernel can move the packets by itself (vhost-net).
    fn suits_vhost(&self) -> bool {
        false
    }

    /// Whether packets come to this pair at all.
    fn set_enabled(&mut self, enabled: bool) -> Result<(), Errno>;
}

/// A socket that keeps packets' bounds. Whoever is at its other end sends only what it was told.
pub struct Wire(File);

impl Wire {
    pub fn new(socket: File) -> Self {
        Self(socket)
    }
}

impl NetBackend for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offloads(&mut self, _: Offloads) -> Result<(), Errno> {
        Ok(())
    }

    fn set_enabled(&mut self, _: bool) -> Result<(), Errno> {
        Ok(())
    }
}

/// The backend that a descriptor is for; it is made non-blocking.
pub fn open(file: File, queues: u16) -> Result<Box<dyn NetBackend>, OpenError> {
    rustix::io::ioctl_fionbio(&file, true).map_err(OpenError::NonBlocking)?;
    match socket_type(&file) {
        Ok(SocketType::SEQPACKET | SocketType::DGRAM) => Ok(Box::new(Wire::new(file))),
        Ok(_) => Err(OpenError::Stream),
        Err(_) => Ok(Box::new(Tap::new(file, queues > 1)?)),
    }
}

/// Why a descriptor is no end of a network device.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("make it non-blocking")]
    NonBlocking(#[source] Errno),
    #[error("it is a socket without bounds between packets")]
    Stream,
    #[error("it is no tap: TUNGETIFF failed")]
    NoTap(#[source] Errno),
    #[error("the tap was opened with flags {flags:#x}, of which {missing:#x} are missing or wrong")]
    Flags { flags: u32, missing: u32 },
    #[error("set the length of its packets' header (TUNSETVNETHDRSZ)")]
    Header(#[source] Errno),
}
