//! What comes from outside to a guest's network and sockets while it misbehaves: packets, and programs of
//! the host that speak, listen, hang up.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect,
    listen, recv, send, socket_with, socketpair,
};

use super::rig::Outcome;

/// Programs at a time.
const VISITORS: usize = 8;
/// The machine's pairs of queues.
const PAIRS: usize = 2;

/// The far ends of all.
#[derive(Default)]
pub(crate) struct Outside {
    wires: Vec<OwnedFd>,
    door: Option<SocketAddrUnix>,
    visitors: Vec<OwnedFd>,
}

impl Outside {
    /// With the near ends: of the network, and the listening socket.
    pub(super) fn new() -> Outcome<(Self, Vec<File>, OwnedFd)> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (mut wires, mut taps) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            taps.push(near.into());
            wires.push(far);
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("fractus-fuzz-{}-{number}", std::process::id());
        let door = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&listener, &door)?;
        listen(&listener, VISITORS as i32)?;
        let outside = Self {
            wires,
            door: Some(door),
            visitors: Vec::new(),
        };
        Ok((outside, taps, listener))
    }

    /// One act: `what` it is and of whom, and its `size` or port.
    pub(super) fn act(&mut self, what: u8, size: u16) {
        let which = usize::from(what / 8);
        match what % 8 {
            0 | 1 => {
                if let Some(wire) = self.wires.get(which % PAIRS) {
                    let _ = send(wire, &vec![what; usize::from(size)], SendFlags::NOSIGNAL);
                }
            }
            2 => {
                for wire in &self.wires {
                    while recv(wire, &mut [0; 256], RecvFlags::empty()).is_ok_and(|(n, _)| n > 0) {}
                }
            }
            3 => self.visit(&format!("CONNECT {}\n", size % 4)),
            4 => self.visit(&format!("ACCEPT {}\n", size % 4)),
            5 => {
                if let Some(visitor) = self.visitors.get(which) {
                    let _ = send(visitor, &vec![what; usize::from(size)], SendFlags::NOSIGNAL);
                }
            }
            6 => {
                if let Some(visitor) = self.visitors.get(which) {
                    let _ = recv(visitor, &mut vec![0; usize::from(size)], RecvFlags::empty());
                }
            }
            _ if which < self.visitors.len() => drop(self.visitors.swap_remove(which)),
            _ => {}
        }
    }

    fn visit(&mut self, line: &str) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let (Some(door), Ok(socket)) = (&self.door, socket) else {
            return;
        };
        // A door that is not opened in time is as good as a program that does not come.
        if connect(&socket, door).is_ok() && self.visitors.len() < VISITORS {
            let _ = send(&socket, line.as_bytes(), SendFlags::NOSIGNAL);
            self.visitors.push(socket);
        }
    }
}
