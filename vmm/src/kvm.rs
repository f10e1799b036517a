//! One virtual machine in KVM: what is created, in the order that keeps it cheap.
//!
//! Memory slots come before the interrupt chip: with an irqchip in place each
//! KVM_SET_USER_MEMORY_REGION waits for an SRCU grace period (5 ms and more on some hosts). Owns the VM
//! descriptor and the table of interrupt routes. It must never use a capability that it did not check.

mod dirty_log;

use std::io;
use std::mem::ManuallyDrop;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_MSI,
    KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KvmIrqRouting, kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};

use crate::eventfd::EventFd;
use crate::interrupt::{Gsi, InterruptError, IoAddress, IoEvents, MsiController, MsiMessage};
use crate::layout::{IOAPIC_PINS, KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::GuestMemory;

pub use dirty_log::DirtyLog;

/// Most routes KVM takes (KVM_MAX_IRQ_ROUTES).
const ROUTES: u32 = 4096;

/// How often a signal may get into the way of a VM being made.
const MOST_SIGNALS: u32 = 64;

#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("KVM speaks API version {found}, wanted {KVM_API_VERSION}")]
    Version { found: i32 },
    #[error("this host's KVM lacks {capability}; it needs Linux 5.15 or later, or other hardware")]
    Lacks { capability: &'static str },
    #[error(
        "a vCPU's extended state has {bytes} bytes here, and this build saves {most}; run it without what was enabled for \
         its process (AMX, by arch_prctl)"
    )]
    ExtendedState { bytes: usize, most: usize },
    #[error("KVM refused to {action}")]
    Refused {
        action: &'static str,
        source: io::Error,
    },
}

/// Names what was tried when an ioctl fails.
pub(crate) fn refused(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Refused {
        action,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// The open /dev/kvm with what it can do.
pub struct Hypervisor {
    kvm: Kvm,
}

/// What every machine needs: the calls of this crate that not every KVM has. Memory slots, general and system registers,
/// MSRs and the log of writes need none.
const REQUIRED: [(Cap, &str); 19] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    // The local APICs are the kernel's (KVM_GET_LAPIC).
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::EnableCapVm, "KVM_CAP_ENABLE_CAP_VM"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// The first of them that is not there.
fn missing(is_there: impl Fn(Cap) -> bool) -> Option<&'static str> {
    let mut missing = (REQUIRED.iter()).filter(|(capability, _)| !is_there(*capability));
    missing.next().map(|(_, name)| *name)
}

/// KVM says how large the extended state of a vCPU may become (KVM_CAP_XSAVE2); one that says nothing has no larger one.
fn fits(xsave: i32) -> Result<(), KvmError> {
    let most = size_of::<kvm_xsave>();
    match usize::try_from(xsave) {
        Ok(bytes) if bytes > most => Err(KvmError::ExtendedState { bytes, most }),
        _ => Ok(()),
    }
}

/// MSRs that are a vCPU's state and that KVM has, but does not list: what the memory type range registers say by default,
/// of fixed ranges, and of variable ones, of which KVM has eight (Intel SDM vol. 3, table 12-11).
const UNLISTED: [RangeInclusive<u32>; 5] = [
    0x2ff..=0x2ff,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x200..=0x20f,
];

/// Each once, whatever KVM comes to list.
fn with_unlisted(listed: &[u32]) -> Vec<u32> {
    let unlisted = UNLISTED.into_iter().flatten();
    let unlisted = unlisted.filter(|msr| !listed.contains(msr));
    listed.iter().copied().chain(unlisted).collect()
}

impl Hypervisor {
    pub fn open(device: OwnedFd) -> Result<Hypervisor, KvmError> {
        // SAFETY: the descriptor is open and ours alone; whatever it is, ioctls on it are checked.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let found = kvm.get_api_version();
        if found != KVM_API_VERSION as i32 {
            return Err(KvmError::Version { found });
        }
        match missing(|capability| kvm.check_extension(capability)) {
            Some(capability) => Err(KvmError::Lacks { capability }),
            None => Ok(Hypervisor { kvm }),
        }
    }

    /// All CPUID leaves that KVM can give on this host.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused(
                "list the CPUID leaves it supports (KVM_GET_SUPPORTED_CPUID)",
            ))
    }

    /// The local APIC's timer has TSC-deadline mode; KVM_GET_SUPPORTED_CPUID does not say so.
    pub fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// A vCPU's TSC can run at another frequency than the host's.
    pub fn scales_tsc(&self) -> bool {
        self.kvm.check_extension(Cap::TscControl)
    }

    /// A vCPU that nobody uses, to ask what is told of one only; its VM is to outlive it.
    pub fn any_vcpu(&self) -> Result<(VmFd, VcpuFd), KvmError> {
        let vm = self.uninterrupted();
        let vm = vm.map_err(refused("create a VM (KVM_CREATE_VM)"))?;
        let vcpu = vm.create_vcpu(0);
        let vcpu = vcpu.map_err(refused("create a vCPU (KVM_CREATE_VCPU)"))?;
        Ok((vm, vcpu))
    }

    /// Indices of the MSRs that make up a vCPU's state on this host.
    pub fn saved_msrs(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(refused("list its MSRs (KVM_GET_MSR_INDEX_LIST)"))?;
        Ok(with_unlisted(list.as_slice()))
    }

    /// The kernel makes threads for a VM and gives up (EINTR) when something comes for ours meanwhile: a
    /// signal, or work that a ring left to it.
    fn uninterrupted(&self) -> Result<VmFd, kvm_ioctls::Error> {
        let mut tries = 0;
        loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR && tries < MOST_SIGNALS => tries += 1,
                made => return made,
            }
        }
    }

    /// Makes a VM with its memory and a split interrupt chip; vCPUs can be added.
    pub fn create_vm(&self, memory: &GuestMemory) -> Result<Vm, KvmError> {
        let fd = self
            .uninterrupted()
            .map_err(refused("create a VM (KVM_CREATE_VM)"))?;
        // Of this VM: it depends on what this process was permitted.
        fits(fd.check_extension_int(Cap::Xsave2))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(refused(
                "place its identity map (KVM_SET_IDENTITY_MAP_ADDR)",
            ))?;
        fd.set_tss_address(KVM_TSS as usize)
            .map_err(refused("place its task state segment (KVM_SET_TSS_ADDR)"))?;
        give_memory(&fd, memory, 0)?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = u64::from(IOAPIC_PINS);
        fd.enable_cap(&split)
            .map_err(refused("split the interrupt chip (KVM_CAP_SPLIT_IRQCHIP)"))?;
        let mut x2apic = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        x2apic.args[0] =
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        fd.enable_cap(&x2apic)
            .map_err(refused("widen APIC ids (KVM_CAP_X2APIC_API)"))?;
        let routes = Mutex::new(vec![Route::Free; usize::from(IOAPIC_PINS)]);
        Ok(Vm {
            fd,
            routes,
            memory: memory.clone(),
            is_logged: AtomicBool::new(false),
        })
    }
}

/// Sets the slots of `memory`, which the [`Vm`] keeps alive, for the first time or with other flags.
fn give_memory(fd: &VmFd, memory: &GuestMemory, flags: u32) -> Result<(), KvmError> {
    for (index, slot) in memory.slots().into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: index as u32,
            flags,
            guest_phys_addr: slot.guest,
            memory_size: slot.size,
            userspace_addr: slot.host,
        };
        // SAFETY: the range is a mapping that `Vm::memory` keeps alive as long as the VM, and
        // slots do not overlap: they come from one collection of regions.
        unsafe { fd.set_user_memory_region(region) }
            .map_err(refused("take guest memory (KVM_SET_USER_MEMORY_REGION)"))?;
    }
    Ok(())
}

/// A VM. Shared by the machine, its interrupt controllers and devices.
pub struct Vm {
    fd: VmFd,
    /// By GSI. The first 24 belong to the IOAPIC's pins.
    routes: Mutex<Vec<Route>>,
    memory: GuestMemory,
    /// There is a [`DirtyLog`].
    is_logged: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Free,
    Masked,
    Msi(MsiMessage),
}

impl Vm {
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(refused("create a vCPU (KVM_CREATE_VCPU)"))
    }

    /// The guest's kvm-clock.
    pub fn clock(&self) -> Result<kvm_clock_data, KvmError> {
        self.fd
            .get_clock()
            .map_err(refused("read the guest's clock (KVM_GET_CLOCK)"))
    }

    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), KvmError> {
        self.fd
            .set_clock(clock)
            .map_err(refused("set the guest's clock (KVM_SET_CLOCK)"))
    }

    fn routes(&self) -> MutexGuard<'_, Vec<Route>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn install(&self, routes: &[Route]) -> Result<(), InterruptError> {
        let entry = |(gsi, route): (usize, &Route)| match route {
            Route::Msi(message) => Some(routing_entry(gsi as u32, *message)),
            Route::Free | Route::Masked => None,
        };
        let entries: Vec<_> = routes.iter().enumerate().filter_map(entry).collect();
        let failed = |errno| InterruptError::Kvm {
            action: "route interrupts (KVM_SET_GSI_ROUTING)",
            source: io::Error::from_raw_os_error(errno),
        };
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| failed(libc::E2BIG))?;
        self.fd
            .set_gsi_routing(&table)
            .map_err(|error| failed(error.errno()))
    }
}

fn routing_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

fn interrupt_error(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> InterruptError {
    move |error| InterruptError::Kvm {
        action,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// Lends our eventfd to a call that wants the type of vmm-sys-util.
fn lend<T>(fd: &EventFd, call: impl FnOnce(&vmm_sys_util::eventfd::EventFd) -> T) -> T {
    let raw = fd.as_fd().as_raw_fd();
    // SAFETY: the descriptor is an eventfd and stays open through the call, since `fd` is borrowed;
    // ManuallyDrop keeps the copy from closing it.
    let lent = ManuallyDrop::new(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(raw) });
    call(&lent)
}

impl MsiController for Vm {
    fn send(&self, message: MsiMessage) -> Result<(), InterruptError> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // 0 says that the guest has blocked it, as hardware would: no error.
        self.fd
            .signal_msi(msi)
            .map(drop)
            .map_err(interrupt_error("send an MSI (KVM_SIGNAL_MSI)"))
    }

    fn allocate(&self) -> Result<Gsi, InterruptError> {
        let mut routes = self.routes();
        let first = usize::from(IOAPIC_PINS);
        let free = routes
            .iter()
            .skip(first)
            .position(|route| *route == Route::Free);
        let index = free.map_or(routes.len(), |offset| first + offset);
        match routes.get_mut(index) {
            Some(route) => *route = Route::Masked,
            None if index < ROUTES as usize => routes.push(Route::Masked),
            None => return Err(InterruptError::NoFreeRoute { limit: ROUTES }),
        }
        Ok(Gsi(index as u32))
    }

    fn free(&self, gsi: Gsi) {
        if let Some(route) = self.routes().get_mut(gsi.0 as usize) {
            *route = Route::Free;
        }
    }

    fn route(&self, changes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
        let mut routes = self.routes();
        let mut wanted = routes.clone();
        for (gsi, message) in changes {
            if let Some(route) = wanted.get_mut(gsi.0 as usize) {
                *route = message.map_or(Route::Masked, Route::Msi);
            }
        }
        if wanted != *routes {
            // KVM takes the table as a whole: one message that it refuses (the guest chose it) must
            // not stay in ours, or it would spoil the next change, of whatever device.
            self.install(&wanted)?;
            *routes = wanted;
        }
        Ok(())
    }

    fn bind(&self, gsi: Gsi, fd: &EventFd) -> Result<(), InterruptError> {
        lend(fd, |fd| self.fd.register_irqfd(fd, gsi.0)).map_err(interrupt_error(
            "bind an eventfd to an interrupt (KVM_IRQFD)",
        ))
    }

    fn unbind(&self, gsi: Gsi, fd: &EventFd) -> Result<(), InterruptError> {
        lend(fd, |fd| self.fd.unregister_irqfd(fd, gsi.0)).map_err(interrupt_error(
            "unbind an eventfd from an interrupt (KVM_IRQFD)",
        ))
    }
}

impl IoEvents for Vm {
    fn bind(&self, address: IoAddress, fd: &EventFd) -> Result<(), InterruptError> {
        lend(fd, |fd| {
            self.fd
                .register_ioevent(fd, &kvm_address(address), NoDatamatch)
        })
        .map_err(interrupt_error("watch an address (KVM_IOEVENTFD)"))
    }

    fn unbind(&self, address: IoAddress, fd: &EventFd) -> Result<(), InterruptError> {
        lend(fd, |fd| {
            self.fd
                .unregister_ioevent(fd, &kvm_address(address), NoDatamatch)
        })
        .map_err(interrupt_error("stop watching an address (KVM_IOEVENTFD)"))
    }
}

fn kvm_address(address: IoAddress) -> IoEventAddress {
    match address {
        IoAddress::Port(port) => IoEventAddress::Pio(u64::from(port)),
        IoAddress::Mmio(address) => IoEventAddress::Mmio(address),
    }
}

/// Both traits' objects of one VM.
pub fn controllers(vm: &Arc<Vm>) -> (Arc<dyn MsiController>, Arc<dyn IoEvents>) {
    (
        Arc::clone(vm) as Arc<dyn MsiController>,
        Arc::clone(vm) as Arc<dyn IoEvents>,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;
    use crate::pci::Msix;

    fn vm() -> Vm {
        let device = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        let hypervisor = Hypervisor::open(device.unwrap().into()).unwrap();
        let memory = GuestMemory::create(&MachineConfig::minimal(16 << 20).memory).unwrap();
        hypervisor.create_vm(&memory).unwrap()
    }

    #[test]
    fn a_message_that_kvm_refuses_spoils_no_other_route() {
        let vm = vm();
        let (first, second) = (vm.allocate().unwrap(), vm.allocate().unwrap());
        let message = |address| {
            Some(MsiMessage {
                address,
                data: 0x41,
            })
        };
        let good = message(0xfee0_0000);
        // With 32-bit APIC ids the upper half holds bits 8 to 31 of the id; its low byte must be 0.
        let refused = message(0x1_fee0_0000);
        vm.route(&[(first, good)]).unwrap();
        vm.route(&[(first, refused)]).unwrap_err();
        vm.route(&[(second, good)]).unwrap();
        assert_eq!(
            vm.routes()[first.0 as usize],
            Route::Msi(good.unwrap()),
            "the table is what KVM has"
        );
        vm.route(&[(first, refused)])
            .expect_err("what was refused is not taken for done");
    }

    #[test]
    fn each_capability_that_is_missing_is_named() {
        assert_eq!(missing(|_| true), None);
        for (capability, name) in REQUIRED {
            assert_eq!(missing(|asked| asked != capability), Some(name));
        }
    }

    #[test]
    fn extended_state_that_would_be_saved_in_part_is_refused() {
        // 0: KVM does not know the question.
        for size in [0, 832, 4096] {
            fits(size).unwrap();
        }
        let refused = fits(11008).unwrap_err().to_string();
        assert!(
            refused.contains("11008") && refused.contains("4096"),
            "{refused}"
        );
    }

    #[test]
    fn what_kvm_does_not_list_is_saved_and_nothing_twice() {
        let all = with_unlisted(&[0x10, 0x2ff, 0x277]);
        assert_eq!(all[..3], [0x10, 0x2ff, 0x277]);
        assert_eq!(all.len(), 3 + 1 + 2 + 8 + 16);
        let each: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(each.len(), all.len());
    }

    #[test]
    fn kvm_takes_what_a_lent_vector_is_signalled_only_while_the_guest_has_it_unmasked() {
        let (msi, _) = controllers(&Arc::new(vm()));
        let msix = Arc::new(Msix::new(1, msi).unwrap());
        let lent = msix.lend(0).unwrap();
        msix.set_control(1 << 15);
        msix.write_table(0, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(8, &0x41u32.to_le_bytes());
        let signal = || rustix::io::write(&lent, &1u64.to_ne_bytes()).unwrap();
        let pending = || {
            let mut bits = [0];
            msix.read_pending(0, &mut bits);
            bits[0]
        };
        for _ in 0..3 {
            msix.write_table(12, &[0]);
            signal();
            msix.write_table(12, &[1]);
            assert_eq!(pending(), 0, "it has come");
            signal();
            assert_eq!(pending(), 1, "it waits");
        }
    }
}
