//! Why a machine does not go to another process.

use std::time::Duration;

use crate::config::ConfigError;
use crate::machine::{BuildError, MachineError, SnapshotError};
use crate::stream::StreamError;

/// Why a machine was not sent, or did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    #[error(transparent)]
    Machine(#[from] SnapshotError),
    #[error("the machine that arrives is not one of this host's: {0}")]
    Config(#[from] ConfigError),
    #[error("the guest writes to its memory or its disks faster than it can be sent")]
    TooBusy,
    #[error("the other side does not take the machine: {reason}")]
    Refused { reason: String },
    #[error("the machine's memory is still coming from where it was before")]
    Arriving,
    #[error("some of the machine's memory is a snapshot's file still, which is not handed over")]
    Unsettled,
    #[error("this process cannot have memory follow a guest (userfaultfd)")]
    NoPostCopy,
    #[error("the guest stood still for {longest:?}, and not all had been sent")]
    Late { longest: Duration },
    /// One of the connections by which its memory goes.
    #[error("lane {lane}")]
    Lane { lane: usize, source: SnapshotError },
    #[error("{action} disk {index}")]
    Disk {
        action: &'static str,
        index: usize,
        source: std::io::Error,
    },
    /// The reason is the owner's, on this side.
    #[error("{0}")]
    Unprepared(String),
}

macro_rules! through_snapshot_error {
    ($($error:ty),*) => {$(
        impl From<$error> for MigrationError {
            fn from(error: $error) -> Self {
                MigrationError::Machine(error.into())
            }
        }
    )*};
}

through_snapshot_error!(
    StreamError,
    MachineError,
    BuildError,
    crate::memory::MemoryError
);
