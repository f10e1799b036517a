//! vhost-net: the host's kernel moves a pair's packets between its rings and its tap
//! (linux/vhost.h, linux/vhost_types.h).
//!
//! Owns the order of the ioctls, and the rings while the kernel has them. The kernel reads the rings with
//! the same distrust as we do, and takes kicks and gives interrupts without us. Its descriptor is opened
//! by someone else, and owned before lock-down ([`Vhost::open`]); since Linux 6.4 that makes a thread in this
//! process, which runs none of our code and makes no system call.
//!
//! Of hot memory it is shown what KVM is shown: the view, where what is not plugged reads as zeros and cannot
//! be written to. So what is plugged and unplugged later needs no word to it; from a guest that names memory
//! which it does not have zeros are sent, and packets for there are dropped. What it writes is in no dirty log.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::control::F_MRG_RXBUF;
use crate::eventfd::EventFd;
use crate::memory::Slot;
use crate::virtio::feature;
use crate::virtio::queue::{QueueFault, Virtqueue};
use rustix::io::Errno;

/// What a driver may have negotiated that the kernel has to know of.
const FEATURES: u64 =
    F_MRG_RXBUF | feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;

const SET_OWNER: u64 = 0xaf01;
const GET_FEATURES: u64 = 0x8008_af00;
const SET_FEATURES: u64 = 0x4008_af00;
const SET_MEM_TABLE: u64 = 0x4008_af03;
const SET_VRING_NUM: u64 = 0x4008_af10;
const SET_VRING_ADDR: u64 = 0x4028_af11;
const SET_VRING_BASE: u64 = 0x4008_af12;
const GET_VRING_BASE: u64 = 0xc008_af12;
const SET_VRING_KICK: u64 = 0x4008_af20;
const SET_VRING_CALL: u64 = 0x4008_af21;
const SET_VRING_ERR: u64 = 0x4008_af22;
const SET_BACKEND: u64 = 0x4008_af30;

/// What a pair's thread asks of the kernel when it is locked down: to own another is not among it.
pub const RUNTIME: [u64; 10] = [
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    GET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_CALL,
    SET_VRING_ERR,
    SET_BACKEND,
];

/// A stretch of guest memory and where it is mapped here.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    guest: u64,
    size: u64,
    host: u64,
    flags: u64,
}

/// struct vhost_vring_addr: addresses in this process.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rings {
    ring: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// An ioctl, with its argument.
#[derive(Debug)]
pub enum Call<'a> {
    SetOwner,
    GetFeatures,
    SetFeatures(u64),
    SetMemory(&'a [Region]),
    SetSize(u32, u32),
    SetRings(Rings),
    SetBase(u32, u32),
    GetBase(u32),
    SetKick(u32, BorrowedFd<'a>),
    SetCall(u32, BorrowedFd<'a>),
    SetError(u32, BorrowedFd<'a>),
    /// None: the kernel leaves the ring alone, and has finished what it had begun.
    SetBackend(u32, Option<BorrowedFd<'a>>),
}

/// The kernel, or what stands in for it in tests.
pub trait Kernel: Send {
    /// What the ioctl gives: features or a base, else 0.
    fn call(&mut self, call: Call<'_>) -> Result<u64, Errno>;
}

/// Why the kernel does not take a pair of rings.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    #[error("vhost-net of this host lacks features {missing:#x}")]
    Features { missing: u64 },
    #[error("the rings are not in memory")]
    Rings,
    #[error("vhost-net could not be asked to {what}")]
    Refused { what: &'static str, source: Errno },
    #[error("a descriptor for vhost-net")]
    Descriptor(#[source] std::io::Error),
}

/// One pair of queues in the kernel.
pub struct Vhost {
    kernel: Box<dyn Kernel>,
    /// Told by the kernel when a ring cannot be used.
    error: EventFd,
    /// Interrupts of rings that have no vector: for us to pass on.
    call: EventFd,
    /// Receive and transmit while the kernel has them.
    rings: Option<[Virtqueue; 2]>,
    /// It has found one that it cannot use.
    broken: bool,
}

impl Vhost {
    /// Takes an open /dev/vhost-net, which nobody has used yet.
    pub fn open(device: File) -> Result<Self, VhostError> {
        Self::with(Box::new(device))
    }

    pub fn with(mut kernel: Box<dyn Kernel>) -> Result<Self, VhostError> {
        let mut call = |what, call| {
            let answer = kernel.call(call);
            answer.map_err(|source| VhostError::Refused { what, source })
        };
        call("own it", Call::SetOwner)?;
        let offered = call("ask for its features", Call::GetFeatures)?;
        let missing = FEATURES & !offered;
        if missing != 0 {
            return Err(VhostError::Features { missing });
        }
        let eventfd = || EventFd::new().map_err(VhostError::Descriptor);
        Ok(Self {
            error: eventfd()?,
            call: eventfd()?,
            kernel,
            rings: None,
            broken: false,
        })
    }

    /// Readable when a ring is found broken, or when a ring without a vector has used buffers.
    pub fn signals(&self) -> [BorrowedFd<'_>; 2] {
        [self.error.as_fd(), self.call.as_fd()]
    }

    /// Hands the rings to the kernel, which moves no packet before [`Vhost::join`]; back with the reason if
    /// it does not take them.
    #[expect(
        clippy::result_large_err,
        reason = "what is given back is what was given, once in a driver's life"
    )]
    pub fn start(
        &mut self,
        mut rings: [Virtqueue; 2],
        features: u64,
    ) -> Result<(), ([Virtqueue; 2], VhostError)> {
        match self.set_up(&rings, features) {
            Ok(()) => {
                rings.iter_mut().for_each(Virtqueue::settle_doubt);
                self.rings = Some(rings);
                self.broken = false;
                Ok(())
            }
            // What it was told of them means nothing as long as they are not joined with a tap.
            Err(error) => Err((rings, error)),
        }
    }

    fn set_up(&mut self, rings: &[Virtqueue; 2], features: u64) -> Result<(), VhostError> {
        let [receive, _] = rings;
        let memory = receive.slots();
        let regions: Vec<Region> = memory.iter().map(Region::of).collect();
        let mut call = |what, call| {
            let answer = self.kernel.call(call).map(drop);
            answer.map_err(|source| VhostError::Refused { what, source })
        };
        call("agree on features", Call::SetFeatures(features & FEATURES))?;
        call("map guest memory", Call::SetMemory(&regions))?;
        for (number, queue) in rings.iter().enumerate() {
            let ring = number as u32;
            let addresses = addresses(ring, queue, &memory).ok_or(VhostError::Rings)?;
            let (available, _) = queue.position();
            let (size, base) = (u32::from(queue.size()), u32::from(available));
            let interrupt = queue.lent_interrupt().unwrap_or(self.call.as_fd());
            call("size a ring", Call::SetSize(ring, size))?;
            call("begin at a place in a ring", Call::SetBase(ring, base))?;
            call("place a ring", Call::SetRings(addresses))?;
            call("say errors", Call::SetError(ring, self.error.as_fd()))?;
            call("interrupt", Call::SetCall(ring, interrupt))?;
            call("take kicks", Call::SetKick(ring, queue.kick()))?;
        }
        Ok(())
    }

    /// Has the kernel move packets between its rings and `tap`, or no more. Once it has found one of them
    /// broken it moves none. After an error the rings are to be taken from it ([`Vhost::stop`]).
    pub fn join(&mut self, tap: Option<BorrowedFd<'_>>) -> Result<(), VhostError> {
        let mut joined = Ok(());
        let tap = tap.filter(|_| !self.broken);
        for (number, queue) in self.rings.iter().flatten().enumerate() {
            match self.kernel.call(Call::SetBackend(number as u32, tap)) {
                // Of what was there before nobody will tell.
                Ok(_) if tap.is_some() => queue.kick_again(),
                Ok(_) => {}
                Err(source) => {
                    let what = "join a ring with a tap, or part them";
                    joined = Err(VhostError::Refused { what, source });
                }
            }
        }
        joined
    }

    /// Takes the rings back, once the kernel has finished what it had begun.
    pub fn stop(&mut self) -> Option<[Virtqueue; 2]> {
        if let Err(error) = self.join(None) {
            tracing::error!(%error, "vhost-net does not let go of its rings");
        }
        // An error is of these rings, not of those that the next driver has; nor is an interrupt.
        self.error.take();
        self.pass_on();
        let mut rings = self.rings.take()?;
        for (number, queue) in rings.iter_mut().enumerate() {
            let base = self.kernel.call(Call::GetBase(number as u32));
            let base = base.map_err(|_| QueueFault::Kernel);
            if let Err(fault) = base.and_then(|base| queue.moved_on(base as u16)) {
                queue.fail(&fault);
            }
        }
        Some(rings)
    }

    /// Passes on what the kernel has signalled to us: interrupts, and that it found a ring broken.
    pub fn serve(&mut self) {
        self.pass_on();
        // Taken in any case: it is a level, and would wake us for ever.
        if self.error.take() == 0 || self.broken || self.rings.is_none() {
            return;
        }
        // Every further kick would be a further error.
        self.broken = true;
        if let Err(error) = self.join(None) {
            tracing::error!(%error, "vhost-net does not let a broken ring be");
        }
        // Which of them it was the kernel does not say.
        if let Some([receive, _]) = &self.rings {
            receive.fail(&QueueFault::Kernel);
        }
    }

    /// Interrupts for rings that have no vector; these share one register, so it does not matter which of
    /// them it was.
    fn pass_on(&mut self) {
        if self.call.take() > 0 {
            let rings = self.rings.iter().flatten();
            let without = rings.filter(|queue| queue.lent_interrupt().is_none());
            without.for_each(Virtqueue::interrupt);
        }
    }
}

impl Drop for Vhost {
    /// Others may hold the descriptor, and the kernel would go on.
    fn drop(&mut self) {
        self.stop();
    }
}

impl Region {
    fn of(slot: &Slot) -> Self {
        Self {
            guest: slot.guest,
            size: slot.size,
            host: slot.host,
            flags: 0,
        }
    }
}

/// Where the parts of a ring are in this process.
fn addresses(ring: u32, queue: &Virtqueue, memory: &[Slot]) -> Option<Rings> {
    let [descriptors, available, used] = queue.parts().map(|(address, length)| {
        let within = |slot: &Slot| {
            let offset = address.checked_sub(slot.guest)?;
            let left = slot.size.checked_sub(offset)?;
            (length as u64 <= left).then_some(slot.host + offset)
        };
        memory.iter().find_map(within)
    });
    Some(Rings {
        ring,
        flags: 0,
        descriptors: descriptors?,
        used: used?,
        available: available?,
        log: 0,
    })
}

/// struct vhost_vring_state.
#[repr(C)]
struct State {
    ring: u32,
    number: u32,
}

/// struct vhost_vring_file.
#[repr(C)]
struct Descriptor {
    ring: u32,
    fd: i32,
}

impl Kernel for File {
    fn call(&mut self, call: Call<'_>) -> Result<u64, Errno> {
        let fd = self.as_fd();
        match call {
            // SAFETY: it takes no argument.
            Call::SetOwner => unsafe { ioctl(fd, SET_OWNER, std::ptr::null_mut::<u64>()) },
            Call::GetFeatures => {
                let mut features = 0u64;
                // SAFETY: the kernel writes a u64.
                unsafe { ioctl(fd, GET_FEATURES, &raw mut features) }?;
                Ok(features)
            }
            // SAFETY: the kernel reads a u64.
            Call::SetFeatures(mut bits) => unsafe { ioctl(fd, SET_FEATURES, &raw mut bits) },
            Call::SetMemory(regions) => {
                // struct vhost_memory: their number, padding, and they.
                let mut table = vec![regions.len() as u64];
                for region in regions {
                    table.extend([region.guest, region.size, region.host, region.flags]);
                }
                // SAFETY: the kernel reads as many regions as the first word says, all of which are
                // there; that they are this process's mapping of guest memory, which lives as long
                // as the rings in it, is the caller's word.
                unsafe { ioctl(fd, SET_MEM_TABLE, table.as_mut_ptr()) }
            }
            Call::SetSize(ring, number) => state(fd, SET_VRING_NUM, ring, number),
            Call::SetBase(ring, number) => state(fd, SET_VRING_BASE, ring, number),
            Call::GetBase(ring) => state(fd, GET_VRING_BASE, ring, 0),
            // SAFETY: the kernel reads a struct vhost_vring_addr, and checks its addresses.
            Call::SetRings(mut rings) => unsafe { ioctl(fd, SET_VRING_ADDR, &raw mut rings) },
            Call::SetKick(ring, kick) => descriptor(fd, SET_VRING_KICK, ring, Some(kick)),
            Call::SetCall(ring, call) => descriptor(fd, SET_VRING_CALL, ring, Some(call)),
            Call::SetError(ring, error) => descriptor(fd, SET_VRING_ERR, ring, Some(error)),
            Call::SetBackend(ring, tap) => descriptor(fd, SET_BACKEND, ring, tap),
        }
    }
}

/// A number of a ring, set or read.
fn state(fd: BorrowedFd<'_>, request: u64, ring: u32, number: u32) -> Result<u64, Errno> {
    let mut state = State { ring, number };
    // SAFETY: the kernel reads and writes a struct vhost_vring_state.
    unsafe { ioctl(fd, request, &raw mut state) }?;
    Ok(state.number.into())
}

fn descriptor(
    fd: BorrowedFd<'_>,
    request: u64,
    ring: u32,
    given: Option<BorrowedFd<'_>>,
) -> Result<u64, Errno> {
    let mut file = Descriptor {
        ring,
        fd: given.map_or(-1, |given| given.as_raw_fd()),
    };
    // SAFETY: the kernel reads a struct vhost_vring_file, and takes a reference of its own.
    unsafe { ioctl(fd, request, &raw mut file) }
}

/// # Safety
/// `argument` is what `request` reads or writes.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: *mut T) -> Result<u64, Errno> {
    // SAFETY: the caller's.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, argument) };
    if result >= 0 {
        return Ok(0);
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
pub(crate) mod tests;
