//! A machine's descriptors in one message, with the list of what they are.
//!
//! A head of 12 bytes, little-endian: `FORM`, length of the list, count of the descriptors; then the list in postcard.
//! The descriptors come with the first byte (SCM_RIGHTS), in the order of [`List`].

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::super::send::MigrationError;
use super::super::{Kernel, Machine, SnapshotError};
use crate::config::{ConsoleFiles, FallbackFiles, MachineFiles, NetFiles};
use crate::stream::{StreamError, malformed, packed, unpacked};

/// Of the list. Raised when it changes; a build takes its own only.
const FORM: u32 = 1;
const HEAD: usize = 12;
/// Bytes of a list at most.
const MOST: u32 = 4096;
/// Descriptors in a message (SCM_MAX_FD).
const MOST_FILES: usize = 253;

/// What the descriptors are, in their order.
#[derive(Debug, Default, Serialize, Deserialize)]
struct List {
    /// The memfd is the first. Something of it came from a file that nobody has checked.
    unchecked: bool,
    kernel: bool,
    initrd: bool,
    /// Two.
    fallback: bool,
    disks: u8,
    serial: Ends,
    ports: Vec<Ends>,
    /// Queues of each network.
    nets: Vec<u8>,
    vsock: bool,
    /// The owner's own.
    owner: u8,
}

/// Output and input.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
struct Ends(bool, bool);

impl Ends {
    fn of(console: &ConsoleFiles) -> Self {
        Ends(console.output.is_some(), console.input.is_some())
    }
}

/// Ready to be sent.
pub(super) struct Parcel<'a> {
    list: List,
    files: Vec<BorrowedFd<'a>>,
}

impl<'a> Parcel<'a> {
    pub(super) fn of(
        machine: &'a Machine,
        owner: &[BorrowedFd<'a>],
    ) -> Result<Self, MigrationError> {
        let files = &machine.files;
        let fallback = match &machine.kernel {
            Kernel::Disk { fallback, .. } => fallback.as_ref().map(|fallback| fallback.files()),
            Kernel::Files(_) => None,
        };
        let count = |length: usize| {
            let many = || malformed("a machine with more descriptors than a message holds");
            u8::try_from(length).map_err(|_| many())
        };
        let nets: Result<Vec<u8>, _> = files.nets.iter().map(|net| count(net.taps.len())).collect();
        let list = List {
            unchecked: machine.memory.is_unchecked(),
            kernel: files.kernel.is_some(),
            initrd: files.initrd.is_some(),
            fallback: fallback.is_some(),
            disks: count(files.disks.len())?,
            serial: Ends::of(&files.serial),
            ports: files.console_ports.iter().map(Ends::of).collect(),
            nets: nets?,
            vsock: files.vsock.is_some(),
            owner: count(owner.len())?,
        };
        let mut all = vec![machine.memory.as_fd()];
        all.extend(files.kernel.iter().map(AsFd::as_fd));
        all.extend(files.initrd.iter().map(AsFd::as_fd));
        all.extend(
            fallback
                .iter()
                .flat_map(|both| [both.kernel.as_fd(), both.initrd.as_fd()]),
        );
        all.extend(files.disks.iter().map(AsFd::as_fd));
        for console in std::iter::once(&files.serial).chain(&files.console_ports) {
            all.extend(console.output.iter().map(AsFd::as_fd));
            all.extend(console.input.iter().map(AsFd::as_fd));
        }
        all.extend(
            files
                .nets
                .iter()
                .flat_map(|net| net.taps.iter().map(AsFd::as_fd)),
        );
        all.extend(files.vsock.iter().map(AsFd::as_fd));
        all.extend(owner);
        Ok(Parcel { list, files: all })
    }

    pub(super) fn send(&self, socket: impl AsFd) -> Result<(), StreamError> {
        let list = packed(&self.list)?;
        let mut bytes = FORM.to_le_bytes().to_vec();
        bytes.extend((list.len() as u32).to_le_bytes());
        bytes.extend((self.files.len() as u32).to_le_bytes());
        bytes.extend(list);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if self.files.len() > MOST_FILES
            || !control.push(SendAncillaryMessage::ScmRights(&self.files))
        {
            return Err(malformed(
                "a machine with more descriptors than a message holds",
            ));
        }
        let sent = loop {
            let bytes = [IoSlice::new(&bytes)];
            match sendmsg(&socket, &bytes, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                sent => break sent.map_err(|errno| super::written(errno.into()))?,
            }
        };
        // The first of a connection always finds room.
        match sent == bytes.len() {
            true => Ok(()),
            false => Err(malformed("a connection on which something was sent before")),
        }
    }
}

/// As it came.
pub(super) struct Sealed {
    list: List,
    files: Vec<OwnedFd>,
}

/// What came, each in its place.
pub(super) struct Received {
    pub(super) memory: File,
    pub(super) unchecked: bool,
    pub(super) files: MachineFiles,
    pub(super) owners: Vec<OwnedFd>,
}

/// # Errors
/// It is cut short, too long, or of another form.
pub(super) fn receive<S: Read + AsFd>(socket: &mut S) -> Result<Sealed, MigrationError> {
    let (head, files) = head(&*socket)?;
    let [form, length, count] = [0, 4, 8].map(|at: usize| {
        let bytes = head.get(at..).and_then(|bytes| bytes.first_chunk());
        u32::from_le_bytes(bytes.copied().unwrap_or_default())
    });
    if form != FORM {
        return Err(SnapshotError::from(StreamError::Format { found: form }).into());
    }
    if length > MOST || count as usize != files.len() {
        return Err(malformed("descriptors that are not what is said of them").into());
    }
    let mut list = vec![0; length as usize];
    socket.read_exact(&mut list).map_err(read)?;
    Ok(Sealed {
        list: unpacked(&list)?,
        files,
    })
}

fn read(source: std::io::Error) -> StreamError {
    let action = "read";
    StreamError::Io { action, source }
}

fn head(socket: impl AsFd) -> Result<([u8; HEAD], Vec<OwnedFd>), StreamError> {
    let mut head = [0; HEAD];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        let mut bytes = [IoSliceMut::new(&mut head)];
        match recvmsg(&socket, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(read(errno.into())),
        }
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    match length == HEAD {
        true => Ok((head, files)),
        false => Err(StreamError::Truncated {
            what: "its descriptors",
        }),
    }
}

impl Sealed {
    /// # Errors
    /// There are fewer or more descriptors than the list has.
    pub(super) fn unpack(self, kvm: OwnedFd) -> Result<Received, MigrationError> {
        let Sealed { list, files } = self;
        let mut files = files.into_iter();
        let mut next = || {
            let missing = || malformed("fewer descriptors than are spoken of");
            files.next().ok_or_else(missing)
        };
        let mut if_there = |is: bool| is.then(&mut next).transpose();
        let memory = File::from(if_there(true)?.ok_or_else(|| malformed("no memory"))?);
        let kernel = if_there(list.kernel)?.map(File::from);
        let initrd = if_there(list.initrd)?.map(File::from);
        let fallback = (if_there(list.fallback)?).zip(if_there(list.fallback)?);
        let fallback = fallback.map(|(kernel, initrd)| FallbackFiles {
            kernel: kernel.into(),
            initrd: initrd.into(),
        });
        let disks: Result<Vec<_>, _> = (0..list.disks).map(|_| next()).collect();
        let disks = disks?.into_iter().map(File::from).collect();
        let mut console = |Ends(output, input)| -> Result<ConsoleFiles, StreamError> {
            Ok(ConsoleFiles {
                output: output.then(&mut next).transpose()?,
                input: input.then(&mut next).transpose()?,
            })
        };
        let serial = console(list.serial)?;
        let console_ports: Result<Vec<_>, _> = list.ports.into_iter().map(console).collect();
        let console_ports = console_ports?;
        let mut nets = Vec::new();
        for queues in list.nets {
            let taps: Result<Vec<_>, _> = (0..queues).map(|_| next()).collect();
            nets.push(NetFiles {
                taps: taps?.into_iter().map(File::from).collect(),
                vhost: Vec::new(),
            });
        }
        let vsock = list.vsock.then(&mut next).transpose()?;
        let owners: Result<Vec<_>, _> = (0..list.owner).map(|_| next()).collect();
        let owners = owners?;
        if files.next().is_some() {
            return Err(malformed("more descriptors than are spoken of").into());
        }
        let files = MachineFiles {
            kvm,
            kernel,
            initrd,
            fallback,
            disks,
            serial,
            console_ports,
            nets,
            vsock,
        };
        Ok(Received {
            memory,
            unchecked: list.unchecked,
            files,
            owners,
        })
    }
}

/// Takes `input` for a parcel: how many descriptors come with it, then its bytes.
///
/// # Errors
/// It is none.
#[cfg(any(test, feature = "fuzzing"))]
pub fn fuzz(input: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    use std::os::unix::net::UnixStream;
    let (count, bytes) = input.split_first().unwrap_or((&0, &[]));
    let nothing = File::open("/dev/null")?;
    let files = vec![nothing.as_fd(); usize::from(*count).min(MOST_FILES)];
    let (near, mut far) = UnixStream::pair()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    // A socket has room for more than any list has, and nothing follows.
    let bytes = bytes.get(..bytes.len().min(16 << 10)).unwrap_or_default();
    sendmsg(
        &near,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    drop(near);
    let received = receive(&mut far)?.unpack(nothing.try_clone()?.into())?;
    // Each has come to one place.
    let MachineFiles {
        kernel,
        initrd,
        fallback,
        disks,
        serial,
        console_ports,
        nets,
        vsock,
        ..
    } = &received.files;
    let ends = |console: &ConsoleFiles| console.output.iter().chain(&console.input).count();
    let placed = 1
        + kernel.iter().chain(initrd).count()
        + 2 * fallback.iter().count()
        + disks.len()
        + ends(serial)
        + console_ports.iter().map(ends).sum::<usize>()
        + nets.iter().map(|net| net.taps.len()).sum::<usize>()
        + vsock.iter().count()
        + received.owners.len();
    assert_eq!(placed, files.len());
    Ok(())
}

/// One of each, for [`fuzz`].
#[cfg(test)]
pub fn fuzz_seed() -> Vec<u8> {
    let list = List {
        unchecked: false,
        kernel: true,
        initrd: true,
        fallback: true,
        disks: 2,
        serial: Ends(true, true),
        ports: vec![Ends(true, false), Ends(false, false)],
        nets: vec![2, 1],
        vsock: true,
        owner: 3,
    };
    let list = packed(&list).unwrap();
    let files: u8 = 1 + 1 + 1 + 2 + 2 + 2 + 1 + 3 + 1 + 3;
    let mut seed = vec![files];
    for number in [FORM, list.len() as u32, files.into()] {
        seed.extend(number.to_le_bytes());
    }
    seed.extend(list);
    seed
}
