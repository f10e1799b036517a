//! What a paused machine is made of, besides its memory and its host's descriptors.

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;
use crate::cpu::VcpuState;
use crate::device::SavedDevice;
use crate::virtio::Placement;

pub const STATE_VERSION: u32 = 4;

/// State of a machine, for its stream. Memory goes beside it.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    pub(super) version: u32,
    pub(super) config: MachineConfig,
    pub(super) placement: Placement,
    /// The guest's kvm-clock, which stands while the machine does.
    pub(super) clock: kvm_clock_data,
    /// In order of their index.
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) devices: Vec<SavedDevice>,
}

impl MachineState {
    /// Where on the host it may be is as there.
    pub(super) fn take_place(&mut self, here: &MachineConfig) {
        self.config.take_place(here);
    }

    /// Of the machine that was saved.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }
}
