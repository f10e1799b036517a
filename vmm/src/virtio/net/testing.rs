//! Wires whose far ends the tests hold.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::virtio::testing::DEADLINE;

/// The far end of a device's pair of queues.
pub(crate) struct Far(File);

impl Far {
    /// Sends header and packet.
    pub(crate) fn send(&self, bytes: &[u8]) -> std::io::Result<()> {
        (&self.0).write_all(bytes)
    }

    /// What has come, if something has.
    pub(crate) fn try_take(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let length = (&self.0).read(&mut bytes).ok()?;
        bytes.truncate(length);
        Some(bytes)
    }

    pub(crate) fn take(&self) -> Vec<u8> {
        let begin = Instant::now();
        loop {
            if let Some(packet) = self.try_take() {
                return packet;
            }
            assert!(begin.elapsed() < DEADLINE, "no packet came");
            let mut wait = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
            let second = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let _ = poll(&mut wait, Some(&second));
        }
    }

    /// Takes packets until one is as wanted.
    pub(crate) fn expect(&self, wanted: impl Fn(&[u8]) -> bool) {
        while !wanted(&self.take()) {}
    }
}

pub(crate) struct Wires {
    /// For `NetFiles`.
    pub(crate) files: Vec<File>,
    pub(crate) far: Vec<Far>,
}

pub(crate) fn wires(count: u16) -> Wires {
    let pair = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    };
    let file = |fd: OwnedFd| File::from(fd);
    let (files, far) = (0..count)
        .map(|_| pair())
        .map(|(near, far)| (file(near), Far(file(far))))
        .unzip();
    Wires { files, far }
}
