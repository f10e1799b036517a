//! Disks of machines. One file a backend; today the directory; and config drives,
//! which are small ISO images.

pub mod directory;
pub mod iso;
pub mod room;

pub use directory::{OpenDisk, VolumeError};
