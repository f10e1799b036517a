//! vCPUs: CPUID, registers, the run loop and their threads.
//!
//! Each vCPU belongs to its thread alone. The machine speaks to it by [`Command`]s through
//! [`VcpuSet`]; it answers when it has come to rest. What a vCPU meets on its way out of the guest is
//! one enum ([`exit::Exit`]), met by one `match` ([`run`]).

mod cpuid;
mod exit;
mod gate;
mod host;
mod registers;
mod run;
mod set;
mod signal;
mod state;
mod throttle;

pub use cpuid::shape;
pub use host::{Lacks, check, offered};
pub use registers::{BootRegisters, GDT};
pub use run::{EndOfInterrupt, Surroundings};
pub use set::{VcpuSet, VcpuSetError};
pub use state::{VcpuError, VcpuState};

#[cfg(doc)]
use set::Command;
