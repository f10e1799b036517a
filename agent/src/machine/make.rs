//! What a machine is made of before it has a process: boot files and disks.

use std::os::fd::OwnedFd;

use async_trait::async_trait;
use fractus_agent_api::copy::CopyId;
use fractus_agent_api::device::{DeviceId, DeviceKind, Disk, Nic};
use fractus_agent_api::guest::InstanceData;
use fractus_agent_api::machine::{Boot, RootDisk};
use tokio::sync::{OwnedSemaphorePermit, watch};
use uuid::Uuid;

use crate::image::ImageError;
use crate::network::tap::TapError;
use crate::paths::MachinePaths;
use crate::volume::directory::Old;
use crate::volume::{OpenDisk, VolumeError};

#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// With its cause: what it is tells little.
    #[error("{}: {}", .0, std::error::Error::source(.0).map_or(String::new(), ToString::to_string))]
    Tap(#[from] TapError),
    #[error("the config drive: {0}")]
    ConfigDrive(String),
    #[error("{what}: {source}")]
    Io {
        what: String,
        source: std::io::Error,
    },
}

/// A device that can be handed to a machine.
#[derive(Debug)]
pub enum OpenDevice {
    Disk(Disk, OpenDisk),
    /// With the queues of its tap.
    Nic(Nic, Vec<OwnedFd>),
}

impl OpenDevice {
    pub fn id(&self) -> DeviceId {
        match self {
            Self::Disk(disk, _) => disk.id,
            Self::Nic(nic, _) => nic.id,
        }
    }

    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Disk(..) => DeviceKind::Disk,
            Self::Nic(..) => DeviceKind::Nic,
        }
    }
}

/// Free again when dropped.
#[derive(Debug)]
pub struct CopyTurn(pub Option<OwnedSemaphorePermit>);

/// Says to the outside which step is on.
#[derive(Debug, Clone)]
pub struct Progress(watch::Sender<String>);

impl Progress {
    pub fn new(step: &str) -> (Self, watch::Receiver<String>) {
        let (sender, receiver) = watch::channel(step.to_owned());
        (Self(sender), receiver)
    }

    pub fn say(&self, step: impl Into<String>) {
        self.0.send_replace(step.into());
    }
}

/// Every call may be dropped half-way and repeated.
#[async_trait]
pub trait Makings: Send + Sync + 'static {
    /// Kernel and initrd stand in the machine's folder afterwards, and no others.
    async fn boot(
        &self,
        paths: &MachinePaths,
        boot: &Boot,
        progress: &Progress,
    ) -> Result<(), MakeError>;

    /// The root disk stands in the machine's folder afterwards, whole; what `old` says happens to one
    /// that stood there.
    async fn disk(
        &self,
        paths: &MachinePaths,
        disk: &RootDisk,
        old: Old,
        progress: &Progress,
    ) -> Result<(), MakeError>;

    /// The root disk stands in the machine's folder afterwards, empty, in place of any other.
    async fn empty_disk(
        &self,
        paths: &MachinePaths,
        bytes: u64,
        progress: &Progress,
    ) -> Result<(), MakeError>;

    /// A place among those whose root disk is copied, if one is free.
    fn copy_turn(&self) -> Option<CopyTurn>;

    /// Whether this host has room for a copy of the root disk.
    fn copy_has_room(&self, paths: &MachinePaths) -> Result<(), MakeError>;

    /// The root disk, which no guest has now, is this copy of it afterwards: it must not be taken for a copy any more once
    /// a guest has run.
    async fn restore_disk(&self, paths: &MachinePaths, copy: CopyId) -> Result<(), MakeError>;

    /// The root disk, which no guest has now, has `size` bytes at least afterwards.
    fn grow_disk(&self, paths: &MachinePaths, size: u64) -> Result<(), MakeError>;

    /// A copy of the root disk, which no guest has now, stands in its place afterwards, whole; its bytes.
    async fn copy_disk(&self, paths: &MachinePaths, copy: CopyId) -> Result<u64, MakeError>;

    /// Opens a disk besides the root disk, which no guest has now; made where there is none.
    async fn open_disk(&self, paths: &MachinePaths, disk: &Disk) -> Result<OpenDisk, MakeError>;

    /// Whether there is any content of it, as far as can be told.
    fn disk_stands(&self, paths: &MachinePaths, disk: &Disk) -> bool;

    /// There is none afterwards. No guest has it now.
    async fn delete_disk(&self, paths: &MachinePaths, disk: &Disk) -> Result<(), MakeError>;

    /// Makes the host's end of a network device, which is there for as long as it is open.
    fn plug(&self, nic: &Nic) -> Result<Vec<OwnedFd>, MakeError>;

    /// The config drive stands in the machine's folder afterwards, and says this; none: there is none.
    fn config_drive(
        &self,
        paths: &MachinePaths,
        instance: Option<&InstanceData>,
    ) -> Result<(), MakeError>;

    /// All of the machine's folder but its record.
    fn remove(&self, paths: &MachinePaths) -> Result<(), MakeError>;

    /// Of the host, now.
    fn boot_id(&self) -> Option<Uuid>;
}
