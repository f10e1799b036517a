//! A tap in a network namespace of the calling thread's own: nothing of it is left when the thread and
//! its descriptors are gone, and tests need no names that others could use.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    reason = "a fault fails the test, and not every program uses all of it"
)]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TAP: u16 = 0x0002 | 0x1000 | 0x4000;
const MULTI_QUEUE: u16 = 0x0100;
/// The host's address on the tap, and the guest's.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// struct ifreq.
#[repr(C)]
struct Request {
    name: [u8; 16],
    body: [u8; 24],
}

impl Request {
    fn new(name: &str, body: &[u8]) -> Request {
        let mut request = Request {
            name: [0; 16],
            body: [0; 24],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.body[..body.len()].copy_from_slice(body);
        request
    }
}

/// Puts the calling thread, and those that it starts, into a network namespace of its own.
pub fn enter_namespace() {
    // SAFETY: no memory is involved; the thread shares its network with nobody any more.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "unshare: {}", io::Error::last_os_error());
    set_up("lo");
}

/// A tap named `name` with that many queues, up, with the address [`HOST`].
pub fn tap(name: &str, queues: u16) -> Vec<File> {
    let several = if queues > 1 { MULTI_QUEUE } else { 0 };
    let open = || {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .expect("open /dev/net/tun: the network tests need it, and root");
        let request = Request::new(name, &(TAP | several).to_ne_bytes());
        control(&file, TUNSETIFF, &request);
        file
    };
    let files = (0..queues).map(|_| open()).collect();
    let socket = control_socket();
    for (ioctl, address) in [(libc::SIOCSIFADDR, HOST), (libc::SIOCSIFNETMASK, MASK)] {
        // struct sockaddr_in: family, port, address.
        let mut body = [0; 8];
        body[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        body[4..].copy_from_slice(&address.octets());
        control(&socket, ioctl, &Request::new(name, &body));
    }
    set_up(name);
    files
}

/// What passes the tap `name`, as a port of a switch there sees it; from now on.
pub struct Watch(File);

impl Watch {
    pub fn new(name: &str) -> Watch {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let name = CString::new(name).unwrap();
        // SAFETY: a new descriptor, owned by nobody else; the address is as long as is said and lives on.
        unsafe {
            let fd = libc::socket(libc::AF_PACKET, kind, all.into());
            assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
            let socket = File::from_raw_fd(fd);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let length = size_of::<libc::sockaddr_ll>() as u32;
            let bound = libc::bind(fd, (&raw const address).cast(), length);
            assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
            Watch(socket)
        }
    }

    /// The next frame, if one has come.
    pub fn seen(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        let length = (&self.0).read(&mut frame).ok()?;
        frame.truncate(length);
        Some(frame)
    }

    /// Waits for a frame that is as wanted; those before it are dropped.
    pub fn expect(&self, patience: Duration, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let deadline = Instant::now() + patience;
        loop {
            match self.seen() {
                Some(frame) if wanted(&frame) => return frame,
                Some(_) => {}
                None => {
                    let left = deadline.checked_duration_since(Instant::now());
                    let left = left.expect("no such frame in time").as_millis();
                    let mut fds = libc::pollfd {
                        fd: self.0.as_raw_fd(),
                        events: libc::POLLIN,
                        revents: 0,
                    };
                    // SAFETY: one struct pollfd, as is said.
                    unsafe { libc::poll(&raw mut fds, 1, left as i32 + 1) };
                }
            }
        }
    }
}

fn set_up(name: &str) {
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as u16;
    let request = Request::new(name, &flags.to_ne_bytes());
    control(&control_socket(), libc::SIOCSIFFLAGS, &request);
}

fn control(fd: &impl AsRawFd, ioctl: libc::c_ulong, request: &Request) {
    // SAFETY: each of these ioctls reads or writes one struct ifreq.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), ioctl, &raw const *request) };
    let error = io::Error::last_os_error();
    assert!(result >= 0, "ioctl {ioctl:#x}: {error}");
}

fn control_socket() -> OwnedFd {
    // SAFETY: a new descriptor, owned by nobody else.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}
