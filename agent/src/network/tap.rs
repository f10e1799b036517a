//! Taps: the host's end of a machine's network device.
//!
//! A tap lives as long as someone holds a queue of it, and that is the machine's process alone: it
//! outlives the agent with its machine, and is gone with it. So nothing is persistent, nothing has to
//! be adopted, and nothing can be left behind.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// linux/sockios.h.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
const TAP: u16 = 0x0002 | 0x1000 | 0x4000;
const MULTI_QUEUE: u16 = 0x0100;
/// The longest name of an interface (IFNAMSIZ, less its end).
pub const NAME_MAX: usize = 15;

/// struct ifreq.
#[repr(C)]
struct Request {
    name: [u8; NAME_MAX + 1],
    body: [u8; 24],
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("{name:?} is no name of an interface: 1 to {NAME_MAX} bytes without '/' and blanks")]
    Name { name: String },
    #[error("{what} for tap {name}")]
    System {
        what: &'static str,
        name: String,
        source: io::Error,
    },
    #[error("put tap {name} on bridge {bridge}: is there such a bridge on this host?")]
    Bridge {
        name: String,
        bridge: String,
        source: io::Error,
    },
}

/// Opens the tap `name` with that many queues, new or (with one queue) as it is there, and brings it up.
pub fn open(name: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    let failed = |what| {
        let name = name.to_owned();
        move |source| TapError::System { what, name, source }
    };
    let several = if queues > 1 { MULTI_QUEUE } else { 0 };
    let flags = (TAP | several).to_ne_bytes();
    let mut files: Vec<OwnedFd> = Vec::new();
    for _ in 0..queues {
        let file: File = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(failed("open /dev/net/tun"))?;
        let request = Request::new(name, &flags)?;
        control(&file, TUNSETIFF, &request).map_err(failed("make an interface (TUNSETIFF)"))?;
        files.push(file.into());
    }
    let up = (libc::IFF_UP as u16).to_ne_bytes();
    let request = Request::new(name, &up)?;
    let socket = socket().map_err(failed("make a socket"))?;
    control(&socket, libc::SIOCSIFFLAGS, &request).map_err(failed("bring the interface up"))?;
    Ok(files)
}

/// Sets the MTU of an interface.
pub fn set_mtu(name: &str, mtu: u16) -> Result<(), TapError> {
    let failed = |source| TapError::System {
        what: "set the MTU",
        name: name.to_owned(),
        source,
    };
    let socket = socket().map_err(failed)?;
    let request = Request::new(name, &i32::from(mtu).to_ne_bytes())?;
    control(&socket, libc::SIOCSIFMTU, &request).map_err(failed)
}

/// Makes a tap a port of a bridge of this host.
pub fn join(name: &str, bridge: &str) -> Result<(), TapError> {
    let failed = |source| TapError::Bridge {
        name: name.to_owned(),
        bridge: bridge.to_owned(),
        source,
    };
    let socket = socket().map_err(failed)?;
    let index = rustix::net::netdevice::name_to_index(&socket, name);
    let index = index.map_err(|error| failed(error.into()))?;
    let request = Request::new(bridge, &index.to_ne_bytes())?;
    control(&socket, SIOCBRADDIF, &request).map_err(failed)
}

impl Request {
    fn new(name: &str, body: &[u8]) -> Result<Self, TapError> {
        let odd = |byte: u8| byte == b'/' || byte.is_ascii_whitespace() || byte == 0;
        if name.is_empty() || name.len() > NAME_MAX || name.bytes().any(odd) {
            return Err(TapError::Name {
                name: name.to_owned(),
            });
        }
        let mut request = Self {
            name: [0; NAME_MAX + 1],
            body: [0; 24],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.body[..body.len()].copy_from_slice(body);
        Ok(request)
    }
}

fn control(fd: &impl AsRawFd, ioctl: libc::c_ulong, request: &Request) -> io::Result<()> {
    // The kernel writes the name back.
    let mut request = Request {
        name: request.name,
        body: request.body,
    };
    // SAFETY: each of these ioctls reads or writes one struct ifreq, which `request` has the size of.
    match unsafe { libc::ioctl(fd.as_raw_fd(), ioctl, &raw mut request) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// By which interfaces are spoken to.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_gone_with_its_last_queue() {
        let there = |name: &str| {
            let socket = socket().unwrap();
            rustix::net::netdevice::name_to_index(&socket, name).is_ok()
        };
        // SAFETY: no memory is involved; this thread has a network of its own from here on.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        let queues = open("frtest", 2).unwrap();
        assert_eq!(queues.len(), 2);
        assert!(there("frtest"));
        set_mtu("frtest", 1400).unwrap();
        assert!(set_mtu("frtest", 60).is_err(), "Ethernet has at least 68");
        drop(queues);
        assert!(!there("frtest"));
        assert!(matches!(
            join("frtest", "nobridge"),
            Err(TapError::Bridge { .. })
        ));
        for name in ["", "a/b", "a b", "sixteen-bytes-xx"] {
            assert!(matches!(open(name, 1), Err(TapError::Name { .. })));
        }
    }
}
