//! vCPUs that come and go while the machine runs.
//!
//! All that there can ever be are made with the machine, each at rest on its thread; one that comes is put
//! back to power-on and set going (it waits for the guest's INIT in KVM), one that the guest ejects is
//! taken out again. Which are there the board's processors know; how many the guest uses is told as it
//! starts them and lets them go ([`Event::VcpusUsed`]).

use super::{Event, Machine, MachineError, RunState, StopReason};
use crate::cpu::VcpuState;

/// Those that the guest has started and not let go, a bit each; the first always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UsedVcpus(u64);

impl Default for UsedVcpus {
    fn default() -> Self {
        UsedVcpus(1)
    }
}

impl UsedVcpus {
    pub(super) fn of(states: &[VcpuState]) -> UsedVcpus {
        let started = (0..64u32)
            .zip(states)
            .filter(|(_, state)| state.is_started());
        UsedVcpus(started.fold(1, |bits, (index, _)| bits | 1 << index))
    }

    fn count(self) -> u8 {
        self.0.count_ones() as u8
    }

    fn set(&mut self, index: u8, used: bool) {
        let bit = 1u64.checked_shl(index.into()).unwrap_or(0);
        self.0 = if used { self.0 | bit } else { self.0 & !bit };
    }
}

impl Machine {
    /// Wishes the guest `count` vCPUs: it is told of those that come, and asked for the last ones when there
    /// are to be fewer; what it really uses [`Event::VcpusUsed`] says. From its next reset on it has `count`
    /// in any case. May be asked again.
    pub fn set_vcpus(&mut self, count: u8) -> Result<(), MachineError> {
        self.not_ended("given vCPUs")?;
        let processors = self.processors.clone().ok_or(MachineError::FixedVcpus)?;
        self.config.cpus.check_count(count)?;
        for index in 0..count {
            if !processors.is_present(index) {
                self.vcpus.renew(index)?;
                self.change_used(|used| used.set(index, false));
                if self.state == RunState::Running {
                    self.vcpus.join(index)?;
                }
            }
            processors.appear(index);
        }
        for index in (count..self.config.cpus.most()).rev() {
            processors.ask(index);
        }
        processors.set_wanted(count);
        self.config.cpus.count = count;
        Ok(())
    }

    /// How many vCPUs the guest uses, as far as it can be seen: it started them and did not let them go.
    /// Where none come or go it is not looked at, and all count.
    pub fn vcpus_used(&self) -> u8 {
        match self.processors {
            Some(_) => self.used.count(),
            None => self.config.cpus.count,
        }
    }

    /// Those that run when the machine does.
    pub(super) fn vcpus_there(&self) -> Vec<u8> {
        match &self.processors {
            Some(processors) => processors.present(),
            None => (0..self.config.cpus.count).collect(),
        }
    }

    /// The guest has let go of some: they come to rest, asked for or not. What it was not asked for it gets
    /// again when that many are wished anew.
    pub(super) fn vcpus_ejected(&mut self) {
        let Some(processors) = self.processors.clone() else {
            return;
        };
        for index in processors.take_ejected() {
            if let Err(error) = self.vcpus.renew(index) {
                let detail = format!("take vCPU {index} away: {error}");
                return self.end(StopReason::VmmFault { detail });
            }
            self.change_used(|used| used.set(index, false));
        }
    }

    pub(super) fn vcpu_started(&mut self, index: u8) {
        let there =
            (self.processors.as_ref()).is_some_and(|processors| processors.is_present(index));
        if there {
            self.change_used(|used| used.set(index, true));
        }
    }

    /// A guest that begins anew has the first.
    pub(super) fn forget_used(&mut self) {
        self.change_used(|used| *used = UsedVcpus::default());
    }

    fn change_used(&mut self, change: impl FnOnce(&mut UsedVcpus)) {
        let before = self.used;
        change(&mut self.used);
        if self.used != before && self.processors.is_some() {
            let count = self.used.count();
            self.announce(Event::VcpusUsed { count });
        }
    }
}
