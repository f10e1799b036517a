//! How a machine is put together, in the order that keeps its start short: memory and VM, then the
//! vCPUs' threads, which prepare themselves while the board is made and the kernel loaded.

use std::sync::Arc;

use super::{Machine, RunState};
use crate::board::{self, FixedDevices, IoApic, acpi};
use crate::boot::{self, Boot, BootError};
use crate::bus::Bus;
use crate::config::{ConfigError, MachineConfig, MachineFiles};
use crate::cpu::{BootRegisters, Surroundings, VcpuSet, VcpuSetError};
use crate::device::{Board, DeviceError};
use crate::kvm::{Hypervisor, KvmError, controllers};
use crate::layout::Layout;
use crate::memory::{GuestMemory, MemoryError};
use crate::reactor::Reactor;
use crate::request::channel;
use crate::thread::{ThreadHook, Threads};
use crate::virtio;

/// Why a machine could not be made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the machine's configuration is invalid")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Vcpus(#[from] VcpuSetError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the kernel cannot be booted")]
    Boot(#[from] BootError),
    #[error("{what}")]
    Host {
        what: &'static str,
        source: std::io::Error,
    },
}

pub(super) fn build(
    config: MachineConfig,
    mut files: MachineFiles,
    hook: Option<ThreadHook>,
) -> Result<Machine, BuildError> {
    config.validate()?;
    config.validate_files(&files)?;
    let host = |what| move |source| BuildError::Host { what, source };
    let memory = GuestMemory::create(&config.memory)?;
    let layout = Layout::new(config.memory.bytes);
    let kvm = files
        .kvm
        .try_clone()
        .map_err(host("duplicate the descriptor of /dev/kvm"))?;
    let hypervisor = Hypervisor::open(kvm)?;
    let vm = Arc::new(hypervisor.create_vm(&memory)?);

    let (requests, receiver) = channel().map_err(host("make an eventfd"))?;
    let reactor = Reactor::new().map_err(host("make an epoll descriptor"))?;
    let threads = Threads::new(hook, requests.clone());
    let (msi, io_events) = controllers(&vm);
    let board = Board {
        memory: memory.clone(),
        pio: Arc::new(Bus::new()),
        mmio: Arc::new(Bus::new()),
        msi: Arc::clone(&msi),
        io_events,
        reactor: reactor.clone(),
        threads: threads.clone(),
        requests: requests.clone(),
        layout,
    };
    let ioapic = Arc::new(IoApic::new(msi));
    let surroundings = Surroundings {
        pio: Arc::clone(&board.pio),
        mmio: Arc::clone(&board.mmio),
        end_of_interrupt: ioapic.clone(),
        requests,
    };
    let mut vcpus = VcpuSet::create(&hypervisor, &vm, &config.cpus, &surroundings, &threads)?;
    let FixedDevices {
        power,
        all: mut devices,
    } = board::attach(&config, &files, ioapic, &board)?;
    devices.extend(virtio::attach(&config, &files, &board)?);
    let reactor_thread = reactor
        .run(&threads)
        .map_err(host("start the reactor's thread"))?;
    // Descriptors that devices have duplicated are not needed again; the kernel is, by a reset.
    files.disks.clear();
    files.console_ports.clear();

    let boot = load(&config, &files, &memory, &layout)?;
    vcpus.ready().map_err(VcpuSetError::from)?;
    vcpus.power_on(boot).map_err(VcpuSetError::from)?;
    Ok(Machine {
        vcpus,
        devices,
        power,
        _reactor: reactor_thread,
        receiver,
        state: RunState::Ready,
        announced: Default::default(),
        config,
        files,
        memory,
        layout,
        _board: board,
        _vm: vm,
    })
}

/// Puts kernel, initrd, command line and tables into memory, which is zero.
pub(super) fn load(
    config: &MachineConfig,
    files: &MachineFiles,
    memory: &GuestMemory,
    layout: &Layout,
) -> Result<BootRegisters, BootError> {
    let boot = Boot {
        kernel: &files.kernel,
        initrd: files.initrd.as_ref(),
        command_line: &config.command_line,
        rsdp: acpi::RSDP,
    };
    acpi::write(config, layout, memory).map_err(BootError::from)?;
    boot::load(&boot, memory, layout)
}
