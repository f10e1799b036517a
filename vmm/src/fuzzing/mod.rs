//! The bodies of the fuzz targets (`vmm/fuzz`): each takes any bytes for what a guest or a user does,
//! and panics only where there is a bug.
//!
//! Compiled for `cargo fuzz` and for tests; a machine never has them. The ordinary tests run them too,
//! over the checked-in seeds and a few thousand mutations of these (`tests`), so that a target that no
//! longer holds is seen without a fuzzer.

mod guest;
mod outside;
pub(crate) mod rig;
pub(crate) mod sparse;
#[cfg(test)]
mod tests;

pub use crate::boot::fuzz_load as kernel_loader;
pub use crate::machine::fuzz_receive as receiver;
pub use crate::pci::fuzz_config_space as pci_config;
pub use crate::virtio::fuzz_queue as virtqueue;
pub use guest::{board, network};
