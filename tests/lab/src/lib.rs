//! The lab: hosts with a real `kvm_amd`, made by QEMU in software, so that stock Linux can be run by
//! the real agent on any machine, without /dev/kvm.
//!
//! A [`Lab`] is a controller, which runs natively, and [`Host`]s on a private Ethernet segment, all in
//! a network namespace of the lab's own. Owns every process, file and interface that it makes; all of
//! it ends with the thread that made it. Must never touch the machine's own network, nor a process
//! that it did not start.

mod archive;
mod controller;
mod debian;
mod guest;
mod host;
mod image;
mod kernel;
mod lab;
mod mended;
mod modules;
mod monitor;
mod payload;
mod peer;
mod qemu;
mod report;
mod saved;
mod segment;
mod shell;
mod wire;

pub use archive::Archive;
pub use controller::Controller;
pub use debian::{Tree, tree, variant};
pub use guest::TinyGuest;
pub use host::{Host, Start};
pub use image::{HostImage, Kind};
pub use kernel::{Compression, payload as kernel_payload};
pub use lab::{Lab, Options};
pub use payload::stripped;
pub use peer::Peer;
pub use report::{Count, section};
pub use segment::{Segment, outside};
pub use shell::{Output, run};
