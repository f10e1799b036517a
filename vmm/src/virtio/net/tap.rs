//! A queue of a tap device, opened by someone else: the few ioctls of tun (linux/if_tun.h).
//!
//! It never makes, names or configures an interface.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::backend::{NetBackend, Offloads, OpenError};
use super::control::HEADER;

const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const IFF_TUN: u32 = 0x0001;
const IFF_TAP: u32 = 0x0002;
const IFF_NO_PI: u32 = 0x1000;
const IFF_VNET_HDR: u32 = 0x4000;
const IFF_MULTI_QUEUE: u32 = 0x0100;
const IFF_ATTACH_QUEUE: u32 = 0x0200;
const IFF_DETACH_QUEUE: u32 = 0x0400;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;

/// struct ifreq, of which the flags matter here.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// One queue of a tap.
pub struct Tap {
    file: File,
    /// Whether the kernel gives it packets.
    attached: bool,
    /// What was asked for last: asking takes a lock that all networks of the host share.
    offloads: Option<libc::c_ulong>,
}

impl Tap {
    /// Takes a queue as a network device needs it; `several`: it is one of several.
    pub fn new(file: File, several: bool) -> Result<Self, OpenError> {
        let mut request = Request::new(0);
        // SAFETY: TUNGETIFF writes a struct ifreq, which `request` has the size of.
        result(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) })
            .map_err(OpenError::NoTap)?;
        let flags = u32::from(request.flags);
        let queues = if several { IFF_MULTI_QUEUE } else { 0 };
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | queues;
        let missing = (wanted & !flags) | (flags & IFF_TUN);
        if missing != 0 {
            return Err(OpenError::Flags { flags, missing });
        }
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        result(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
            .map_err(OpenError::Header)?;
        Ok(Self {
            file,
            // One that another process had may have come to rest without it.
            attached: flags & IFF_DETACH_QUEUE == 0,
            offloads: None,
        })
    }
}

impl NetBackend for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> Result<(), Errno> {
        let mut flags = 0;
        if offloads.checksum {
            let on = |wanted: bool, flag| if wanted { flag } else { 0 };
            flags = TUN_F_CSUM | on(offloads.tso4, TUN_F_TSO4) | on(offloads.tso6, TUN_F_TSO6);
            if offloads.tso4 || offloads.tso6 {
                flags |= on(offloads.ecn, TUN_F_TSO_ECN);
            }
        }
        if self.offloads == Some(flags) {
            return Ok(());
        }
        self.offloads = None;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        result(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) })?;
        self.offloads = Some(flags);
        Ok(())
    }

    fn suits_vhost(&self) -> bool {
        true
    }

    fn set_enabled(&mut self, enabled: bool) -> Result<(), Errno> {
        if enabled == self.attached {
            return Ok(());
        }
        let request = Request::new(if enabled {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        });
        // SAFETY: TUNSETQUEUE reads a struct ifreq, which `request` has the size of.
        result(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETQUEUE, &raw const request) })?;
        self.attached = enabled;
        Ok(())
    }
}

impl Request {
    fn new(flags: u32) -> Self {
        Self {
            name: [0; 16],
            flags: flags as u16,
            rest: [0; 22],
        }
    }
}

fn result(value: libc::c_int) -> Result<(), Errno> {
    if value >= 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
