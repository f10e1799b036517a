//! Stock Linux on our own hypervisor, on a real `kvm_amd`. Run by `scripts/lab test`; CI runs those
//! whose names begin with `scenario_`. Each test has a lab of its own, and they run one after the other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod cloud;
mod debian;
mod dmesg;
mod host;
mod hotplug;
mod migrate;
mod questions;
mod scenario;
mod soak;
mod suspend;
mod terminal;
mod vhost;
