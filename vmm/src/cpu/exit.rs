//! Why a vCPU left the guest: KVM's many ways as one enum of those that we know.

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

/// What the guest did, or what became of it.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `data` is for one or (string instructions) several accesses of `size` bytes each.
    PortRead {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    PortWrite {
        port: u16,
        size: usize,
        data: &'a [u8],
    },
    MmioRead {
        address: u64,
        data: &'a mut [u8],
    },
    MmioWrite {
        address: u64,
        data: &'a [u8],
    },
    /// The guest ended a level-triggered interrupt of the user-space IOAPIC.
    EndOfInterrupt {
        vector: u8,
    },
    /// A signal, or `immediate_exit`.
    Interrupted,
    TripleFault,
    PowerOff,
    Reset,
    /// KVM or the CPU cannot go on.
    Failed {
        detail: String,
    },
}

/// Runs the guest until it leaves.
pub fn enter(fd: &mut VcpuFd) -> Exit<'_> {
    let run: *const kvm_bindings::kvm_run = fd.get_kvm_run();
    let access_size = || {
        // SAFETY: `run` points into the mapping that `fd` owns. The field is a plain integer (any bits
        // are valid) that the kernel wrote before KVM_RUN returned, and that nothing else writes.
        usize::from(unsafe { (*run).__bindgen_anon_1.io.size }).max(1)
    };
    match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => Exit::PortRead {
            port,
            size: access_size(),
            data,
        },
        Ok(VcpuExit::IoOut(port, data)) => Exit::PortWrite {
            port,
            size: access_size(),
            data,
        },
        Ok(VcpuExit::MmioRead(address, data)) => Exit::MmioRead { address, data },
        Ok(VcpuExit::MmioWrite(address, data)) => Exit::MmioWrite { address, data },
        Ok(VcpuExit::IoapicEoi(vector)) => Exit::EndOfInterrupt { vector },
        Ok(VcpuExit::Intr) => Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => Exit::TripleFault,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Exit::PowerOff,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Exit::Reset,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, data)) => Exit::Failed {
            detail: format!("the guest reported a crash: {data:x?}"),
        },
        Ok(VcpuExit::InternalError) => {
            // SAFETY: as above; the exit reason says that `internal` is the field in use.
            let internal = unsafe { (*run).__bindgen_anon_1.internal };
            let data = internal
                .data
                .get(..internal.ndata as usize)
                .unwrap_or_default();
            let what = match internal.suberror {
                1 => " (an instruction that KVM cannot emulate)",
                2 => " (an exit while an exception was delivered)",
                3 => " (an exception while an event was delivered)",
                4 => " (an unexpected exit reason)",
                _ => "",
            };
            let suberror = internal.suberror;
            let detail = format!("KVM_EXIT_INTERNAL_ERROR, suberror {suberror}{what}, {data:x?}");
            Exit::Failed { detail }
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            let detail = format!("KVM_EXIT_FAIL_ENTRY, reason {reason:#x} on host CPU {cpu}");
            Exit::Failed { detail }
        }
        Ok(VcpuExit::MemoryFault { gpa, size, flags }) => {
            let detail = format!(
                "memory fault at {gpa:#x}, {size:#x} bytes, flags {flags:#x}: is that hot memory that is \
                 not plugged?"
            );
            Exit::Failed { detail }
        }
        Ok(other) => Exit::Failed {
            detail: format!("unexpected exit {other:?}"),
        },
        // EAGAIN: the vCPU waits for INIT and SIPI and was woken by something else.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
        // The host has nothing behind an address that the guest's memory has: which, KVM does not say.
        Err(error) if error.errno() == libc::EFAULT => Exit::Failed {
            detail: format!("KVM_RUN failed: {error}: a write to hot memory that is not plugged?"),
        },
        Err(error) => Exit::Failed {
            detail: format!("KVM_RUN failed: {error}"),
        },
    }
}
