//! Disks of machines. One file a backend; today the directory.

pub mod directory;

pub use directory::VolumeError;
