//! Where the agent keeps things: the only module that composes paths.
//!
//! `state` survives a reboot (records, disks, logs, images, identity), `runtime` does not (sockets).

use std::path::{Path, PathBuf};

use fractus_agent_api::copy::CopyId;
use fractus_agent_api::device::DeviceId;
use fractus_agent_api::machine::{ImageRef, ServerId};

/// Unless `--state-dir` says otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/fractus-agent";

#[derive(Debug, Clone)]
pub struct Paths {
    pub state: PathBuf,
    pub runtime: PathBuf,
}

impl Paths {
    pub fn new(state: impl Into<PathBuf>, runtime: impl Into<PathBuf>) -> Self {
        Self {
            state: state.into(),
            runtime: runtime.into(),
        }
    }

    /// Certificate, key, roots and what the controllers said.
    pub fn identity(&self) -> PathBuf {
        self.state.join("identity")
    }

    /// Held by the agent that runs; what it says tells this agent's processes from another's.
    pub fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }

    /// Folder of what an operator says of machines that wait ([`crate::machine::unheard`]).
    pub fn unheard(&self) -> PathBuf {
        self.state.join("start-unheard")
    }

    /// Where commands of this host's root speak to the agent ([`crate::machine::upgrade`]).
    pub fn local(&self) -> PathBuf {
        self.runtime.join("agent.sock")
    }

    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    pub fn machines(&self) -> PathBuf {
        self.state.join("machines")
    }

    pub fn sockets(&self) -> PathBuf {
        self.runtime.join("machines")
    }

    /// Where the kernel for disks that only Linux reads may be (`images/fallback` builds it): with what
    /// is this agent's own, and where a package puts it.
    pub fn fallbacks(&self) -> [FallbackPaths; 2] {
        [
            FallbackPaths::within(&self.state.join("fallback")),
            FallbackPaths::packaged(),
        ]
    }

    pub fn machine(&self, id: ServerId) -> MachinePaths {
        MachinePaths {
            folder: self.machines().join(id.to_string()),
            socket: self.sockets().join(format!("{id}.sock")),
        }
    }
}

/// A kernel for disks that only Linux reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FallbackPaths {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl FallbackPaths {
    /// As `images/fallback/build` leaves it.
    pub fn within(folder: &Path) -> Self {
        Self {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd"),
        }
    }

    pub fn of_default_state() -> Self {
        Self::within(&Path::new(DEFAULT_STATE).join("fallback"))
    }

    pub fn packaged() -> Self {
        Self::within(Path::new("/usr/share/fractus/fallback"))
    }
}

/// The places of one machine.
#[derive(Debug, Clone)]
pub struct MachinePaths {
    pub folder: PathBuf,
    /// By which an agent finds the process again.
    pub socket: PathBuf,
}

impl MachinePaths {
    pub const RECORD: &str = "record.json";

    pub fn record(&self) -> PathBuf {
        self.folder.join(Self::RECORD)
    }

    pub fn disk(&self) -> PathBuf {
        self.folder.join("root.raw")
    }

    /// Of a disk besides the root disk that is kept here.
    pub fn data_disk(&self, id: DeviceId) -> PathBuf {
        self.folder.join(format!("disk-{id}.raw"))
    }

    /// Memory and state of a guest that was suspended.
    pub fn memory(&self) -> PathBuf {
        self.folder.join("memory")
    }

    /// The same while it is being written: not to be believed.
    pub fn new_memory(&self) -> PathBuf {
        self.folder.join("memory.new")
    }

    /// What names of copies of the root disk begin with, whole or not.
    pub const COPY: &str = "copy-";

    /// Of the root disk, whole.
    pub fn copy(&self, id: CopyId) -> PathBuf {
        self.folder.join(format!("{}{id}.raw", Self::COPY))
    }

    /// The same while it is being written: not to be believed.
    pub fn new_copy(&self, id: CopyId) -> PathBuf {
        self.folder.join(format!("{}{id}.new", Self::COPY))
    }

    /// ISO 9660, made anew at each start.
    pub fn config_drive(&self) -> PathBuf {
        self.folder.join("config.iso")
    }

    /// The machine's own link to its kernel or initrd: a host starts its machines without a
    /// controller. The hash has been checked to be one.
    pub fn image(&self, image: &ImageRef) -> PathBuf {
        self.folder.join(format!("{}.image", image.blake3))
    }

    /// Where programs of the host come that want to speak with the guest (virtio-vsock).
    pub fn vsock(&self) -> PathBuf {
        self.folder.join("vsock.sock")
    }

    /// Ring of the serial line's output.
    pub fn serial_log(&self) -> PathBuf {
        self.folder.join("serial.ring")
    }

    /// Ring of what the machine's process says of itself.
    pub fn log(&self) -> PathBuf {
        self.folder.join("vm.ring")
    }

    /// Why the process ended, written by itself.
    pub fn last_words(&self) -> PathBuf {
        self.folder.join("last-words.json")
    }

    /// By which a process is found that takes the machine over, until the other socket is its.
    pub fn next_socket(&self) -> PathBuf {
        self.socket.with_extension("next")
    }

    /// By which a process is brought another line while memory follows its guest.
    pub fn lines_socket(&self) -> PathBuf {
        self.socket.with_extension("lines")
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }
}
