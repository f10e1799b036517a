//! How a machine is put together, in the order that keeps its start short: memory and VM, then the
//! vCPUs' threads, which prepare themselves while the board is made and the kernel loaded.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fractus_loader::FindError;

use super::feeding::AtEnd;
use super::state::{MachineState, STATE_VERSION};
use super::vcpus::UsedVcpus;
use super::{Kernel, Machine, MachineError, RunState, clocks, handover};
use crate::board::{self, FixedDevices, IoApic, acpi, generation, smbios};
use crate::boot::disk::BootDisk;
use crate::boot::{self, Boot, BootError, Fallback, Source};
use crate::bus::Bus;
use crate::config::{BootSource, ConfigError, CpuProfile, MachineConfig, MachineFiles};
use crate::cpu::{BootRegisters, EndOfInterrupt, Surroundings, VcpuSet, VcpuSetError};
use crate::device::{Board, DeviceError, SavedDevices};
use crate::kvm::{Hypervisor, KvmError, Vm, controllers};
use crate::layout::Layout;
use crate::memory::{GuestMemory, MemoryError};
use crate::reactor::Reactor;
use crate::request::{RequestReceiver, channel};
use crate::stream::lane::MOST_LANES;
use crate::thread::{ThreadHook, Threads};
use crate::virtio::block::THREADS;
use crate::virtio::{self, Attached, Placement};
use crate::work::{Spawner, Work};

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
    #[error("what the guest finds in its memory could not be written")]
    Load(#[source] Box<MachineError>),
    #[error("a saved machine of version {version}; this build reads version {STATE_VERSION}")]
    StateVersion { version: u32 },
    #[error("a saved machine with {states} vCPU states for {count} vCPUs")]
    VcpuStates { states: usize, count: u8 },
    #[error("{what}")]
    Host {
        what: &'static str,
        source: std::io::Error,
    },
}

/// A machine that starts anew.
pub(super) fn build(
    config: MachineConfig,
    files: MachineFiles,
    hook: Option<ThreadHook>,
) -> Result<Machine, BuildError> {
    config.validate()?;
    let memory = GuestMemory::create_with(&config.memory, config.hot_memory.as_ref())?;
    let chassis = Chassis::new(&config, &files, memory, hook)?;
    let mut parts = chassis.complete(config, files, Saved::default())?;
    // A disk is read at the start: its content is a user's, and by then the process is locked down.
    let boot = match parts.kernel {
        Kernel::Files(_) => Some(parts.load().map_err(|error| match error {
            MachineError::Boot(error) => BuildError::Boot(error),
            error => BuildError::Load(Box::new(error)),
        })?),
        Kernel::Disk { .. } => None,
    };
    parts.vcpus.ready().map_err(VcpuSetError::from)?;
    if let Some(boot) = boot {
        parts.vcpus.power_on(boot).map_err(VcpuSetError::from)?;
        parts.loaded = true;
    }
    Ok(parts)
}

/// A machine that goes on where another was saved, on the memory that the other had, or one like it.
pub(super) fn restore(
    saved: MachineState,
    memory: GuestMemory,
    files: MachineFiles,
    hook: Option<ThreadHook>,
) -> Result<Machine, BuildError> {
    check(&saved)?;
    let chassis = Chassis::new(&saved.config, &files, memory, hook)?;
    restore_on(chassis, saved, files, || Duration::ZERO)
}

/// The same, on what was made for it; a guest that is on its way has been nowhere for as long as `missed` says.
pub(super) fn restore_on(
    chassis: Chassis,
    saved: MachineState,
    files: MachineFiles,
    missed: impl Fn() -> Duration,
) -> Result<Machine, BuildError> {
    check(&saved)?;
    let MachineState {
        config,
        placement,
        clock,
        vcpus,
        devices,
        ..
    } = saved;
    let saved = Saved {
        devices: SavedDevices::new(devices),
        placement,
    };
    let mut machine = chassis.complete(config, files, saved)?;
    machine.vcpus.ready().map_err(VcpuSetError::from)?;
    machine.used = UsedVcpus::of(&vcpus);
    machine
        .vcpus
        .load(vcpus, missed())
        .map_err(VcpuSetError::from)?;
    machine.vm.set_clock(&clocks::later(&clock, missed()))?;
    machine.state = RunState::Paused;
    Ok(machine)
}

/// Checks what can be told of a saved machine without its files and KVM.
pub(super) fn check(saved: &MachineState) -> Result<(), BuildError> {
    let version = saved.version;
    if version != STATE_VERSION {
        return Err(BuildError::StateVersion { version });
    }
    saved.config.validate()?;
    let (states, count) = (saved.vcpus.len(), saved.config.cpus.most());
    match states == usize::from(count) {
        true => Ok(()),
        false => Err(BuildError::VcpuStates { states, count }),
    }
}

/// What devices are made from; empty for a machine that starts anew.
#[derive(Default)]
struct Saved {
    devices: SavedDevices,
    placement: Placement,
}

/// What of a machine depends on nothing that is saved: VM, vCPUs and their threads. It can be made while the rest is still
/// coming.
pub(super) struct Chassis {
    vcpus: VcpuSet,
    /// What of the configuration's the vCPUs were made of, and keep.
    profile: CpuProfile,
    reactor: Reactor,
    receiver: RequestReceiver,
    end_of_interrupt: Arc<LateEnd>,
    board: Board,
    vm: Arc<Vm>,
}

/// Where vCPUs tell of ends of interrupts, before there is an IO-APIC: none of them runs.
#[derive(Default)]
struct LateEnd(OnceLock<Arc<IoApic>>);

impl EndOfInterrupt for LateEnd {
    fn end_of_interrupt(&self, vector: u8) {
        if let Some(ioapic) = self.0.get() {
            ioapic.end_of_interrupt(vector);
        }
    }
}

impl Chassis {
    /// `config` is valid, and what of it is memory and vCPUs is that of the machine.
    pub fn new(
        config: &MachineConfig,
        files: &MachineFiles,
        memory: GuestMemory,
        hook: Option<ThreadHook>,
    ) -> Result<Self, BuildError> {
        // Where the kernel's clock is mapped is looked for once, which a locked-down process could not.
        handover::now();
        let hot = config.hot_memory.map_or(0, |hot| hot.max);
        let layout = Layout::with_hot(config.memory.bytes, hot);
        let hypervisor = hypervisor(files)?;
        let vm = Arc::new(hypervisor.create_vm(&memory)?);
        let (requests, receiver) = channel().map_err(host("make an eventfd"))?;
        let reactor = Reactor::new().map_err(host("make an epoll descriptor"))?;
        let threads = Threads::new(hook, requests.clone());
        let (msi, io_events) = controllers(&vm);
        let board = Board {
            memory,
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            msi,
            io_events,
            reactor: reactor.clone(),
            threads,
            requests: requests.clone(),
            layout,
        };
        let end_of_interrupt = Arc::<LateEnd>::default();
        let surroundings = Surroundings {
            pio: Arc::clone(&board.pio),
            mmio: Arc::clone(&board.mmio),
            end_of_interrupt: end_of_interrupt.clone(),
            requests,
        };
        let mut cpus = config.cpus.clone();
        let vcpus = VcpuSet::create(&hypervisor, &vm, &mut cpus, &surroundings, &board.threads)?;
        Ok(Chassis {
            vcpus,
            profile: cpus.profile,
            reactor,
            receiver,
            end_of_interrupt,
            board,
            vm,
        })
    }

    pub fn board(&self) -> &Board {
        &self.board
    }

    /// All but what the guest starts with.
    fn complete(
        self,
        mut config: MachineConfig,
        mut files: MachineFiles,
        saved: Saved,
    ) -> Result<Machine, BuildError> {
        config.validate_files(&files)?;
        let Saved {
            devices: mut saved,
            placement,
        } = saved;
        let Chassis {
            vcpus,
            profile,
            reactor,
            receiver,
            end_of_interrupt,
            board,
            vm,
        } = self;
        config.cpus.profile = profile;
        let kernel = kernel(&config, &mut files)?;
        let ioapic = board::interrupts(Arc::clone(&board.msi), &mut saved)?;
        let _ = end_of_interrupt.0.set(Arc::clone(&ioapic));
        let FixedDevices {
            power,
            slots,
            processors,
            panic,
            verdict,
            all: mut devices,
        } = board::attach(&config, &files, ioapic, &board, &mut saved)?;
        let Attached {
            devices: behind_pci,
            places,
            balloon,
            hot_memory,
        } = virtio::attach(&config, &files, &board, placement, &mut saved)?;
        devices.extend(behind_pci);
        saved.finish()?;
        let threads = &board.threads;
        let spawner = spawner(&config, threads).map_err(host("start the spawner of threads"))?;
        threads.seal();
        let reactor_thread = reactor
            .run(threads)
            .map_err(host("start the reactor's thread"))?;
        // What devices have duplicated is kept for who takes the machine over. vhost-net is of this process only.
        for net in &mut files.nets {
            net.vhost.clear();
        }
        Ok(Machine {
            at_end: AtEnd::default(),
            vcpus,
            devices,
            power,
            panic,
            verdict,
            balloon,
            hot_memory,
            _reactor: reactor_thread,
            receiver,
            state: RunState::Ready,
            pending: Default::default(),
            announced: Default::default(),
            config,
            files,
            kernel,
            told_running: false,
            loaded: false,
            is_new_here: false,
            memory: board.memory.clone(),
            layout: board.layout,
            _spawner: spawner,
            board,
            slots,
            processors,
            used: UsedVcpus::default(),
            places,
            ledger: None,
            feeding: None,
            whole: true,
            postponed: Default::default(),
            vm,
        })
    }
}

fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

/// What makes the VM, by a descriptor of its own.
fn hypervisor(files: &MachineFiles) -> Result<Hypervisor, BuildError> {
    let failed = |source| BuildError::Host {
        what: "duplicate the descriptor of /dev/kvm",
        source,
    };
    let kvm = files.kvm.try_clone().map_err(failed)?;
    Ok(Hypervisor::open(kvm)?)
}

/// What makes the threads of devices that may come, the second one of a copy, and those by which memory goes elsewhere.
fn spawner(config: &MachineConfig, threads: &Threads) -> std::io::Result<Option<Spawner>> {
    threads.prepare([
        (Work::Block, usize::from(config.hot_disks) * THREADS),
        (Work::Net, usize::from(config.hot_nets)),
        (Work::Copy, 1),
        (Work::Lane, MOST_LANES),
    ])
}

/// What is booted, now and at every reset.
fn kernel(config: &MachineConfig, files: &mut MachineFiles) -> Result<Kernel, BuildError> {
    match config.boot {
        BootSource::Files => {
            let kernel = files.kernel.as_ref().ok_or(BootError::NoKernel)?;
            let initrd = files.initrd.as_ref().map(|initrd| initrd as &dyn Source);
            Ok(Kernel::Files(boot::inspect(kernel, initrd)?))
        }
        BootSource::Disk(index) => {
            let disk = files.disks.get(index).ok_or(BootError::NoKernel)?;
            let disk = disk.try_clone().map_err(|source| BuildError::Host {
                what: "duplicate the descriptor of the disk to boot",
                source,
            })?;
            Ok(Kernel::Disk {
                disk: BootDisk::new(disk),
                fallback: files.fallback.take().map(Fallback::new),
            })
        }
    }
}

impl Machine {
    /// Puts kernel, initrd, command line and tables into memory, which is zero.
    pub(super) fn load(&self) -> Result<BootRegisters, MachineError> {
        acpi::write(&self.config, &self.layout, &self.memory).map_err(BootError::from)?;
        smbios::write(self.config.uuid, &self.memory).map_err(MachineError::Identity)?;
        generation::write(&self.memory)?;
        boot::write_reset_vector(&self.memory).map_err(BootError::from)?;
        let command_line = &self.config.command_line;
        let inspected = match &self.kernel {
            Kernel::Files(inspected) => inspected,
            Kernel::Disk { disk, fallback } => {
                return self.load_disk(disk, fallback.as_ref());
            }
        };
        let boot = Boot {
            kernel: self.files.kernel.as_ref().ok_or(BootError::NoKernel)?,
            initrd: self
                .files
                .initrd
                .as_ref()
                .map(|initrd| initrd as &dyn Source),
            command_line,
            rsdp: acpi::RSDP,
        };
        let registers = boot::load_inspected(inspected, &boot, &self.memory, &self.layout)?;
        Ok(registers)
    }

    /// What is on the disk, or what is to find that out where the loader cannot.
    fn load_disk(
        &self,
        disk: &BootDisk,
        fallback: Option<&Fallback>,
    ) -> Result<BootRegisters, MachineError> {
        let (memory, layout) = (&self.memory, &self.layout);
        let more = &self.config.command_line;
        let loaded = disk.load(more, acpi::RSDP, memory, layout);
        match (loaded, fallback, &self.verdict) {
            (
                Err(BootError::Disk(needs @ FindError::NeedsFallback { .. })),
                Some(fallback),
                Some(verdict),
            ) => {
                tracing::info!(%needs, "boot the fallback");
                let number = match self.config.boot {
                    BootSource::Disk(number) => number,
                    BootSource::Files => 0,
                };
                let registers = fallback.load(number, more, acpi::RSDP, memory, layout)?;
                verdict.ask();
                Ok(registers)
            }
            (loaded, ..) => Ok(loaded?),
        }
    }
}
