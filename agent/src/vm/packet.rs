//! Packets over SEQPACKET sockets, with descriptors. Synchronous: the agent wraps these calls in its
//! reactor, the machine's process polls.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fractus_vmm::config::{MAX_CONSOLE_PORTS, MAX_DISKS, MAX_NETS, MAX_QUEUES};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::MOST;
use crate::network::vhost;

/// Descriptors that one packet may carry: the kernel's own limit (SCM_MAX_FD).
pub const MOST_FILES: usize = 253;

/// What the largest machine that `MachineConfig::validate` allows is launched with: an input and an
/// output a console port, a tap a pair of queues, and what every launch carries (see
/// [`FileRole`](super::protocol::FileRole)), and as many /dev/vhost-net as the agent opens.
const LARGEST: usize =
    MAX_DISKS + 2 * MAX_CONSOLE_PORTS + MAX_NETS * MAX_QUEUES as usize + vhost::MOST + 16;
const _: () = assert!(LARGEST <= MOST_FILES, "it could not be launched");

#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    #[error("the other end is gone")]
    Closed,
    /// Said once, to whoever sends or receives next; what the other end has said before comes after it.
    #[error("the other end is gone, and has not read the last of what it was told")]
    Unread,
    #[error("the socket failed: {0}")]
    Socket(Errno),
    #[error("a packet is not understood: {0}")]
    Garbled(serde_json::Error),
}

impl PacketError {
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Socket(Errno::AGAIN))
    }
}

impl From<Errno> for PacketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE => Self::Closed,
            // Of a unix socket: it was closed with something in its queue.
            Errno::CONNRESET => Self::Unread,
            other => Self::Socket(other),
        }
    }
}

pub fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    files: &[BorrowedFd<'_>],
) -> Result<(), PacketError> {
    let bytes = serde_json::to_vec(message).map_err(PacketError::Garbled)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(PacketError::Socket(Errno::TOOBIG));
    }
    loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), PacketError> {
    let mut bytes = vec![0; MOST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            flags,
        ) {
            Ok(received) => break received.bytes,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    if length == 0 {
        return Err(PacketError::Closed);
    }
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    bytes.truncate(length);
    let message = serde_json::from_slice(&bytes).map_err(PacketError::Garbled)?;
    Ok((message, files))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn the_descriptors_of_the_largest_machine_arrive_in_one_packet() {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (one, other) = pair.unwrap();
        send(&one, &LARGEST, &vec![one.as_fd(); LARGEST]).unwrap();
        let (said, files) = receive::<usize>(&other).unwrap();
        assert_eq!((said, files.len()), (LARGEST, LARGEST));
    }

    #[test]
    fn whoever_ends_without_having_read_all_is_known_by_that_and_what_it_said_is_not_lost() {
        let pair = || {
            let flags = SocketFlags::CLOEXEC;
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
        };
        let (one, other) = pair();
        send(&one, &"read", &[]).unwrap();
        assert_eq!(receive::<String>(&other).unwrap().0, "read");
        send(&one, &"not read", &[]).unwrap();
        send(&other, &"said", &[]).unwrap();
        drop(other);
        assert!(matches!(receive::<String>(&one), Err(PacketError::Unread)));
        assert_eq!(receive::<String>(&one).unwrap().0, "said");
        assert!(matches!(receive::<String>(&one), Err(PacketError::Closed)));
        let (one, other) = pair();
        send(&one, &"read", &[]).unwrap();
        assert_eq!(receive::<String>(&other).unwrap().0, "read");
        drop(other);
        assert!(matches!(receive::<String>(&one), Err(PacketError::Closed)));
    }
}
