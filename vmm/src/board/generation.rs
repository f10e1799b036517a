//! VMGENID: 16 random bytes in guest memory which change when the guest's past is no longer its own (it
//! was restored from a snapshot, or is one of several copies), so that it renews what must be unique:
//! random numbers, keys, leases (Microsoft, "Virtual Machine Generation ID", 2012).
//!
//! Owns the bytes at `layout::GENERATION`, a page that the memory map reserves. They travel with the
//! memory: a migration leaves them as they are.

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::GENERATION;
use crate::memory::GuestMemory;

/// From the start of the page, where the DSDT says.
pub const LENGTH: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("get random numbers for a generation id")]
    Random(#[source] rustix::io::Errno),
    #[error("write the generation id to guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// A new one, other than all before.
pub fn write(memory: &GuestMemory) -> Result<(), GenerationError> {
    let mut id = [0; LENGTH];
    // So few bytes come whole or not at all.
    getrandom(&mut id, GetRandomFlags::empty()).map_err(GenerationError::Random)?;
    Ok(memory.write_slice(&id, GuestAddress(GENERATION.base))?)
}
