//! PCI: one root complex with one bus, type-0 functions only.
//!
//! Owns the configuration spaces, the decoding of BARs and the MSI-X tables. It never touches guest
//! memory and never knows what a function is for. A guest may write anything into any register:
//! whatever it writes, a BAR answers only inside the window given to PCI and never where another
//! BAR already answers, so a guest that misprograms one function cannot take another from its place.
//!
//! Sources: PCI Local Bus Specification 3.0 (§6.1 configuration space, §6.2.5 BARs, §6.8.2 MSI-X),
//! PCI Express Base Specification (§7.2.2 ECAM).

mod config;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
mod msix;
mod ports;
mod root;

pub use config::{BarSpec, BarWidth, ConfigSpace, ConfigState, Identity};
#[cfg(any(test, feature = "fuzzing"))]
pub use fuzz::fuzz_config_space;
#[cfg(test)]
pub(crate) use msix::tests as msix_recorder;
pub use msix::{Lent, MSIX_CAPABILITY, MSIX_ENTRY_SIZE, Msix, MsixError, MsixLayout, MsixState};
pub use ports::{BarWindow, ConfigPorts, Ecam, PciBus};
pub use root::{PciFunction, RootComplex, RootState, SharedFunction, SlotError};

/// Functions that one bus can hold; the host bridge takes slot 0.
pub const SLOTS: usize = 32;
/// Bytes that the ECAM window of one bus covers.
pub const ECAM_SIZE: u64 = 1 << 20;
