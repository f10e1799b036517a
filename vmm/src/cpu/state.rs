//! What a vCPU is made of, read from and written to KVM.
//!
//! The order of writing follows what KVM makes depend on what: XCR0 before XSAVE, control registers
//! before general ones, the local APIC before the MSRs (the TSC deadline needs its timer's mode).

use std::io;

use kvm_bindings::{
    KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// All of a vCPU but CPUID, which the config makes.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug_registers: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("vCPU {index}: KVM refused to {action}")]
    Refused {
        index: u8,
        action: &'static str,
        source: io::Error,
    },
    #[error("vCPU {index}: this host has no MSR {msr:#x} of the saved state, or refuses its value")]
    Msr { index: u8, msr: u32 },
    #[error("vCPU {index}: more entries than KVM takes")]
    TooMany { index: u8 },
    #[error("vCPU {index}: prepare its thread for signals")]
    Signal { index: u8, source: io::Error },
    #[error("vCPU {index}: pin it to host CPU {host_cpu}; is it there, and allowed here?")]
    Pin {
        index: u8,
        host_cpu: u32,
        source: io::Error,
    },
    #[error("vCPU {index}: its thread is gone")]
    Gone { index: u8 },
}

pub(super) fn refused(index: u8, action: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuError {
    move |error| VcpuError::Refused {
        index,
        action,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// IA32_TSC_DEADLINE: written last, its value fires the timer.
const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;

/// Whether a vCPU in this run state has been started: it is no longer as it was after power-on, where
/// all but the first wait for INIT.
pub fn is_started(state: kvm_mp_state) -> bool {
    state.mp_state != KVM_MP_STATE_UNINITIALIZED
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run and has nothing pending.
    pub fn read(fd: &VcpuFd, index: u8, saved_msrs: &[u32]) -> Result<VcpuState, VcpuError> {
        Ok(VcpuState {
            // First: it lets KVM settle INIT and SIPI that are on the way.
            mp_state: fd
                .get_mp_state()
                .map_err(refused(index, "get its run state"))?,
            regs: fd.get_regs().map_err(refused(index, "get its registers"))?,
            sregs: fd
                .get_sregs()
                .map_err(refused(index, "get its system registers"))?,
            xcrs: fd.get_xcrs().map_err(refused(index, "get its XCRs"))?,
            xsave: fd
                .get_xsave()
                .map_err(refused(index, "get its XSAVE area"))?,
            debug_registers: fd
                .get_debug_regs()
                .map_err(refused(index, "get its debug registers"))?,
            lapic: fd
                .get_lapic()
                .map_err(refused(index, "get its local APIC"))?,
            events: fd
                .get_vcpu_events()
                .map_err(refused(index, "get its pending events"))?,
            msrs: read_msrs(fd, index, saved_msrs)?,
        })
    }

    pub fn is_started(&self) -> bool {
        is_started(self.mp_state)
    }

    /// Its general registers.
    #[cfg(test)]
    pub(crate) fn registers(&self) -> &kvm_regs {
        &self.regs
    }

    /// Its time stamp counter has gone on for so many ticks.
    pub fn go_on(&mut self, ticks: u64) {
        go_on(&mut self.msrs, ticks);
    }

    /// As it is but for what depends on the host's CPU and kernel, which is as in `here`: MSRs and extended state.
    #[cfg(test)]
    pub(crate) fn on_cpu_of(self, here: &VcpuState) -> VcpuState {
        VcpuState {
            xcrs: here.xcrs,
            xsave: kvm_xsave {
                region: here.xsave.region,
                ..Default::default()
            },
            msrs: here.msrs.clone(),
            ..self
        }
    }

    /// Writes the state to a vCPU that does not run; CPUID has been set.
    pub fn write(&self, fd: &VcpuFd, index: u8) -> Result<(), VcpuError> {
        self.write_with(fd, index, &self.msrs)
    }

    /// The same for a vCPU that joins others which run: writing 0 has KVM give it their time, where what
    /// its counter showed at power-on would put it far behind (Linux: kvm_synchronize_tsc).
    pub fn write_with_time_of_others(&self, fd: &VcpuFd, index: u8) -> Result<(), VcpuError> {
        let mut msrs = self.msrs.clone();
        for msr in msrs.iter_mut().filter(|msr| msr.index == TSC) {
            msr.data = 0;
        }
        self.write_with(fd, index, &msrs)
    }

    fn write_with(&self, fd: &VcpuFd, index: u8, msrs: &[kvm_msr_entry]) -> Result<(), VcpuError> {
        fd.set_mp_state(self.mp_state)
            .map_err(refused(index, "set its run state"))?;
        fd.set_regs(&self.regs)
            .map_err(refused(index, "set its registers"))?;
        fd.set_sregs(&self.sregs)
            .map_err(refused(index, "set its system registers"))?;
        fd.set_xcrs(&self.xcrs)
            .map_err(refused(index, "set its XCRs"))?;
        // SAFETY: the area is the 4096 bytes of kvm_xsave; KVM reads more only where it says so
        // (KVM_CAP_XSAVE2), and of such a host no VM was made (`Hypervisor::create_vm`).
        unsafe { fd.set_xsave(&self.xsave) }.map_err(refused(index, "set its XSAVE area"))?;
        fd.set_debug_regs(&self.debug_registers)
            .map_err(refused(index, "set its debug registers"))?;
        fd.set_lapic(&self.lapic)
            .map_err(refused(index, "set its local APIC"))?;
        write_msrs(fd, index, msrs)?;
        fd.set_vcpu_events(&self.events)
            .map_err(refused(index, "set its pending events"))
    }
}

fn go_on(msrs: &mut [kvm_msr_entry], ticks: u64) {
    for msr in msrs.iter_mut().filter(|msr| msr.index == TSC) {
        msr.data = msr.data.wrapping_add(ticks);
    }
}

/// Reads those of `indices` that this vCPU has; KVM stops at the first that it has not.
fn read_msrs(fd: &VcpuFd, index: u8, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let entries: Vec<_> = left
            .iter()
            .take(kvm_bindings::KVM_MAX_MSR_ENTRIES)
            .map(|msr| kvm_msr_entry {
                index: *msr,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooMany { index })?;
        let read = fd
            .get_msrs(&mut msrs)
            .map_err(refused(index, "get its MSRs"))?;
        found.extend(msrs.as_slice().iter().take(read).copied());
        // One that cannot be read is left out.
        let skip = if read < entries.len() { read + 1 } else { read };
        left = left.get(skip..).unwrap_or_default();
    }
    found.sort_by_key(|entry| entry.index == TSC_DEADLINE);
    Ok(found)
}

/// Writes MSRs. One that KVM listed and cannot take back is passed over when its value is 0, as it
/// was after power-on.
fn write_msrs(fd: &VcpuFd, index: u8, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
    let mut left = entries;
    while !left.is_empty() {
        let batch = left
            .get(..left.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES))
            .unwrap_or(left);
        let msrs = Msrs::from_entries(batch).map_err(|_| VcpuError::TooMany { index })?;
        let written = fd.set_msrs(&msrs).map_err(refused(index, "set its MSRs"))?;
        left = left.get(written..).unwrap_or_default();
        if written < batch.len()
            && let Some((refusal, rest)) = left.split_first()
        {
            if refusal.data != 0 && !read_only(refusal.index) {
                return Err(VcpuError::Msr {
                    index,
                    msr: refusal.index,
                });
            }
            left = rest;
        }
    }
    Ok(())
}

/// MSRs that describe the host and that KVM lists but some hosts do not let anyone set.
fn read_only(msr: u32) -> bool {
    // IA32_ARCH_CAPABILITIES, MSR_PLATFORM_INFO, IA32_UCODE_REV, IA32_PERF_CAPABILITIES.
    matches!(msr, 0x10a | 0xce | 0x8b | 0x345)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_stamp_counter_goes_on() {
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let mut msrs = [msr(TSC, u64::MAX - 1), msr(TSC_DEADLINE, 9)];
        go_on(&mut msrs, 3);
        assert_eq!(msrs.map(|msr| msr.data), [1, 9]);
    }
}
