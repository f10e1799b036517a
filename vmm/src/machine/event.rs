//! What a machine tells its owner.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Built or restored, no guest instruction has run in this process.
    Ready,
    Running,
    Paused,
    /// For good.
    Stopped,
}

/// Something that the owner should know. A guest can bring some of it about as often as it likes: whoever
/// passes events on bounds how many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Every vCPU has entered KVM_RUN (after `start` or `resume`).
    Running,
    /// No vCPU runs and every device is at rest.
    Paused,
    /// The machine has ended; nothing but dropping it is left.
    Stopped(StopReason),
    /// The guest reset itself (or the watchdog did); it has begun anew in this process, and runs.
    GuestReset,
    /// The guest has let go of a device that was asked for; its descriptors are closed and the machine
    /// has it no more.
    DeviceGone { id: String },
    /// The guest has started a vCPU or let one go (of a machine with `CpuConfig::max`): it uses so many
    /// now. One that it has only taken offline counts as used.
    VcpusUsed { count: u8 },
    /// The guest has plugged or unplugged hot memory: so many bytes are plugged now.
    HotMemory { plugged: u64 },
    /// All of the memory that came after the guest is here: where it came from is not needed any more.
    Whole,
    /// Its memory does not come any more: it stands where it touches what has not come, until there is another connection
    /// (`Feeder::go_on_by`).
    Starving { reason: String },
    /// The guest's kernel panicked (pvpanic); the machine runs on.
    Panicked { crash_loaded: bool },
    /// The guest stopped feeding its watchdog; what the config says comes after.
    WatchdogFired,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// `Machine::stop`.
    Requested,
    /// The guest powered itself off (ACPI S5).
    GuestPowerOff,
    /// A guest's exception within an exception within an exception (KVM_EXIT_SHUTDOWN). kvm_amd has reset
    /// the vCPU before it says so: the registers are those of a reset there, elsewhere those of the fault.
    TripleFault { vcpu: u8, registers: Registers },
    /// KVM could not go on: KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_FAIL_ENTRY, or KVM_RUN itself failed.
    InternalError { vcpu: u8, detail: String },
    /// The watchdog's action was to power off.
    Watchdog,
    /// After a reset there was nothing that could be booted.
    NotBootable { detail: String },
    /// A device was misused beyond repair or lost its host resource.
    DeviceFault { device: String, detail: String },
    /// A part of the VMM failed: a thread panicked, or a reset did not succeed.
    VmmFault { detail: String },
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::Requested => write!(f, "stopped as requested"),
            StopReason::GuestPowerOff => write!(f, "the guest powered itself off"),
            StopReason::TripleFault { vcpu, registers } => {
                write!(f, "vCPU {vcpu} took a triple fault; {registers}")
            }
            StopReason::InternalError { vcpu, detail } => {
                write!(f, "KVM could not go on with vCPU {vcpu}: {detail}")
            }
            StopReason::NotBootable { detail } => write!(f, "it cannot be booted: {detail}"),
            StopReason::Watchdog => write!(f, "powered off by the watchdog"),
            StopReason::DeviceFault { device, detail } => write!(f, "device {device}: {detail}"),
            StopReason::VmmFault { detail } => write!(f, "the VMM failed: {detail}"),
        }
    }
}

/// The registers that say where a vCPU stood, for a report to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Registers {
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub cs: u16,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cs:rip {:#x}:{:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} \
             rsi {:#x} rdi {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            self.cs,
            self.rip,
            self.rsp,
            self.rflags,
            self.rax,
            self.rbx,
            self.rcx,
            self.rdx,
            self.rsi,
            self.rdi,
            self.cr0,
            self.cr2,
            self.cr3,
            self.cr4,
            self.efer,
        )
    }
}
