//! How large a machine is while it runs: what its host was asked for, and what its guest has taken.

use serde::{Deserialize, Serialize};

use crate::machine::MachineSpec;

/// What memory comes and goes in while a machine runs (virtio-mem's blocks). What is wanted is rounded up.
pub const HOT_BLOCK_MIB: u64 = 2;

/// Of a machine's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// What the guest was last offered.
    pub vcpus: u8,
    /// What it uses of them, as far as can be seen.
    pub vcpus_used: u8,
    /// None: they stay as many as they are.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// What the machine began with, and keeps.
    pub memory_mib: u64,
    /// What the guest was offered, or asked to leave, besides.
    #[serde(default)]
    pub hot_memory_mib: u64,
    /// What it has taken of that.
    #[serde(default)]
    pub hot_plugged_mib: u64,
    /// None: there can be none.
    #[serde(default)]
    pub max_hot_memory_mib: Option<u64>,
}

impl Size {
    /// Of a machine that is started now.
    pub fn at_start(spec: &MachineSpec) -> Self {
        let hot = spec.max_memory_mib.unwrap_or(0);
        let hot = hot.saturating_sub(spec.memory_mib);
        let hot = hot - hot % HOT_BLOCK_MIB;
        let max_vcpus = spec.max_vcpus.filter(|max| *max > 1);
        Self {
            vcpus: spec.vcpus,
            // Where they can go, they are seen to come.
            vcpus_used: max_vcpus.map_or(spec.vcpus, |_| 1),
            max_vcpus,
            memory_mib: spec.memory_mib,
            hot_memory_mib: 0,
            hot_plugged_mib: 0,
            max_hot_memory_mib: (hot > 0).then_some(hot),
        }
    }

    /// What the machine may use at the moment, whatever was asked for last.
    pub fn most_memory_mib(&self) -> u64 {
        self.memory_mib + self.hot_memory_mib.max(self.hot_plugged_mib)
    }
}

/// Part of [`crate::machine::MachineReport`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeReport {
    /// What the guest is offered now.
    pub vcpus: u8,
    /// What it really uses.
    pub vcpus_used: u8,
    pub memory_mib: u64,
    pub memory_mib_used: u64,
    /// What of the wanted size comes with the machine's next start only, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_next_start: Option<String>,
}
