//! The machine: a synchronous library over KVM.
//!
//! Owns guest memory, vCPUs, board and devices of one virtual machine. It gets open descriptors
//! ([`config::MachineFiles`]) and plain data ([`config::MachineConfig`]); it must never open a host
//! path, resolve a name, or depend on an async runtime, so that whatever can be handed to it can be
//! handed to it by a test.
//!
//! Reading order: [`config`], [`machine`], then [`cpu`] (the run loop), [`board`] and the devices.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("fractus-vmm runs on x86-64 Linux only");

// What the test programs share names the crate as they do; unit tests use it, too.
#[cfg(test)]
extern crate self as fractus_vmm;

pub mod board;
pub mod boot;
pub mod bus;
pub mod config;
pub mod cpu;
pub mod device;
pub mod eventfd;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod interrupt;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod output;
pub mod pci;
pub mod reactor;
pub mod request;
pub mod stream;
pub mod thread;
pub mod virtio;
pub mod work;
