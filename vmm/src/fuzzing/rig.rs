//! A whole board without KVM: all devices as a machine has them, on buses that the target drives, with
//! doubles of the kernel's interrupts that notice when a device loses count of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::board::{self, IoApic};
use crate::bus::Bus;
use crate::config::{
    BalloonConfig, ConsoleFiles, ConsolePortConfig, CpuProfile, DiskConfig, HOT_BLOCK,
    HotMemoryConfig, MIN_MEMORY, MachineConfig, MachineFiles, NetConfig, NetFiles, PageSize,
    RngConfig, VsockConfig, WatchdogAction, WatchdogConfig,
};
use crate::device::{Board, Device, SavedDevices};
use crate::eventfd::EventFd;
use crate::interrupt::{Gsi, InterruptError, IoAddress, IoEvents, MsiController, MsiMessage};
use crate::layout::{IOAPIC_PINS, Layout};
use crate::memory::GuestMemory;
use crate::reactor::{Reactor, ReactorThread};
use crate::request::{RequestReceiver, channel};
use crate::thread::Threads;
use crate::virtio::{self, Placement};

use super::outside::Outside;

pub(super) const MEMORY: u64 = 16 << 20;
pub(super) const HOT_MEMORY: u64 = 32 << 20;
pub(crate) const DISK: u64 = 64 << 10;
/// The guest's context id.
pub(super) const CID: u32 = 3;

/// Which devices stand behind PCI, from slot 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Devices {
    /// A disk of two queues, a console of two ports, random numbers, a balloon, hot memory.
    Local,
    /// Random numbers, a network of two pairs of queues, vsock: what others can speak to from outside.
    Network,
}

impl Devices {
    /// The greatest size of a queue of each.
    pub(super) fn queue_sizes(self) -> &'static [u16] {
        match self {
            Devices::Local => &[256, 64, 64, 128, 64],
            Devices::Network => &[64, 256, 128],
        }
    }

    /// Which of them a step means. Hot memory came last and has a mark of its own, so that older seeds mean
    /// what they meant.
    pub(super) fn meant(self, kind: u8, what: u8) -> u8 {
        match self {
            Devices::Local if kind >> 4 == 0xe => 4,
            Devices::Local => what % 4,
            Devices::Network => what % 3,
        }
    }

    /// Which of them gives random numbers.
    pub(super) fn rng(self) -> u8 {
        match self {
            Devices::Local => 2,
            Devices::Network => 0,
        }
    }
}

/// A board with devices behind PCI and every fixed device.
pub(crate) struct Rig {
    pub(super) memory: GuestMemory,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) ioapic: Arc<IoApic>,
    pub(super) doorbells: Arc<Doorbells>,
    pub(crate) requests: RequestReceiver,
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(super) outside: Outside,
    _reactor: ReactorThread,
}

impl Rig {
    /// An error is the host's (no descriptors left), not the target's.
    pub(super) fn new(kind: Devices) -> Outcome<Self> {
        let config = config(kind);
        let (files, outside) = match kind {
            Devices::Local => (files()?, Outside::default()),
            Devices::Network => network_files()?,
        };
        let memory = GuestMemory::create_with(&config.memory, config.hot_memory.as_ref())?;
        let (saved, placement) = Default::default();
        let rig = Self {
            outside,
            ..Self::build(&config, &files, memory, saved, placement)?
        };
        for device in &rig.devices {
            device.resume()?;
        }
        Ok(rig)
    }

    /// With devices that are new, or at rest as they were saved.
    ///
    /// # Errors
    /// What was saved is not of such a machine, or the host has no more descriptors or threads.
    pub(crate) fn build(
        config: &MachineConfig,
        files: &MachineFiles,
        memory: GuestMemory,
        mut saved: SavedDevices,
        placement: Placement,
    ) -> Outcome<Self> {
        let (requests, receiver) = channel()?;
        let reactor = Reactor::new()?;
        let threads = Threads::new(None, requests.clone());
        let doorbells = Arc::new(Doorbells::default());
        let msi: Arc<dyn MsiController> = Arc::new(Routes::default());
        let hot = config.hot_memory.map_or(0, |hot| hot.max);
        let board = Board {
            memory: memory.clone(),
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            msi: Arc::clone(&msi),
            io_events: doorbells.clone(),
            reactor: reactor.clone(),
            threads: threads.clone(),
            requests,
            layout: Layout::with_hot(config.memory.bytes, hot),
        };
        let ioapic = board::interrupts(msi, &mut saved)?;
        let fixed = board::attach(config, files, ioapic.clone(), &board, &mut saved)?;
        let mut devices = fixed.all;
        devices.extend(virtio::attach(config, files, &board, placement, &mut saved)?.devices);
        saved.finish()?;
        let reactor = reactor.run(&threads)?;
        Ok(Self {
            memory,
            pio: board.pio,
            mmio: board.mmio,
            ioapic,
            doorbells,
            requests: receiver,
            devices,
            outside: Outside::default(),
            _reactor: reactor,
        })
    }
}

/// Any error of the set-up.
pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn config(kind: Devices) -> MachineConfig {
    let mut config = MachineConfig::minimal(MEMORY);
    config.memory.pages = PageSize::Small;
    config.rng = Some(RngConfig {
        bytes_per_second: Some(1 << 30),
    });
    config.watchdog = Some(WatchdogConfig {
        action: WatchdogAction::None,
    });
    if kind == Devices::Network {
        config.nets = vec![NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            queues: 2,
            mtu: Some(1500),
            limit: None,
            addresses: Vec::new(),
        }];
        config.vsock = Some(VsockConfig { cid: CID });
        return config;
    }
    config.disks = vec![DiskConfig {
        read_only: false,
        serial_number: "victim".to_owned(),
        direct: false,
        limit: None,
        queues: 2,
    }];
    config.console_ports = [("a", true), ("b", false)]
        .map(|(name, console)| ConsolePortConfig {
            name: name.to_owned(),
            console,
        })
        .into();
    config.balloon = Some(BalloonConfig {
        bytes: 1 << 20,
        deflate_on_oom: true,
    });
    config.hot_memory = Some(HotMemoryConfig {
        max: HOT_MEMORY,
        bytes: 16 << 20,
    });
    config.cpus.max = Some(8);
    config
}

/// The smallest machine that has every device, for what is saved.
pub(crate) fn every_device() -> MachineConfig {
    let network = config(Devices::Network);
    let mut config = MachineConfig {
        nets: network.nets,
        vsock: network.vsock,
        ..config(Devices::Local)
    };
    config.cpus.profile = CpuProfile::X86_64V2;
    config.cpus.max = Some(2);
    config.memory.bytes = MIN_MEMORY;
    config.balloon = Some(BalloonConfig::default());
    config.hot_memory = Some(HotMemoryConfig {
        max: 2 * HOT_BLOCK,
        bytes: 0,
    });
    config
}

/// Its files; no kernel and no KVM.
pub(crate) fn files_of_every_device() -> Outcome<(MachineFiles, Outside)> {
    let (network, outside) = network_files()?;
    let files = MachineFiles {
        nets: network.nets,
        vsock: network.vsock,
        ..files()?
    };
    Ok((files, outside))
}

fn files() -> Outcome<MachineFiles> {
    let memfd = || memfd_create("fuzz", MemfdFlags::CLOEXEC);
    let disk = File::from(memfd()?);
    disk.set_len(DISK)?;
    Ok(MachineFiles {
        kvm: memfd()?,
        kernel: Some(memfd()?.into()),
        initrd: None,
        fallback: None,
        disks: vec![disk],
        serial: line()?,
        console_ports: vec![line()?, ConsoleFiles::default()],
        nets: Vec::new(),
        vsock: None,
    })
}

fn network_files() -> Outcome<(MachineFiles, Outside)> {
    let (outside, taps, vsock) = Outside::new()?;
    let files = MachineFiles {
        disks: Vec::new(),
        console_ports: Vec::new(),
        nets: vec![NetFiles {
            taps,
            vhost: Vec::new(),
        }],
        vsock: Some(vsock),
        ..files()?
    };
    Ok((files, outside))
}

/// A line that takes all output and has input from the start.
fn line() -> Outcome<ConsoleFiles> {
    let (reader, writer) = rustix::pipe::pipe()?;
    rustix::io::write(&writer, &[b'x'; 512])?;
    let output: OwnedFd = File::options().write(true).open("/dev/null")?.into();
    Ok(ConsoleFiles {
        output: Some(output),
        input: Some(reader),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel's ioeventfds.
#[derive(Default)]
pub(super) struct Doorbells(Mutex<BTreeMap<u64, EventFd>>);

impl Doorbells {
    /// Rings where the kernel would; false if the access goes to the bus.
    pub(super) fn ring(&self, address: u64) -> bool {
        let bells = lock(&self.0);
        let bell = bells.get(&address);
        bell.inspect(|bell| bell.signal()).is_some()
    }
}

/// Ports lie below all memory that a BAR may take.
fn place(address: IoAddress) -> u64 {
    match address {
        IoAddress::Port(port) => port.into(),
        IoAddress::Mmio(address) => address,
    }
}

impl IoEvents for Doorbells {
    fn bind(&self, address: IoAddress, fd: &EventFd) -> Result<(), InterruptError> {
        let copy = fd.try_clone().map_err(|source| InterruptError::Kvm {
            action: "watch an address",
            source,
        })?;
        let at = place(address);
        assert!(lock(&self.0).insert(at, copy).is_none(), "bound twice");
        Ok(())
    }

    fn unbind(&self, address: IoAddress, _fd: &EventFd) -> Result<(), InterruptError> {
        let at = place(address);
        assert!(lock(&self.0).remove(&at).is_some(), "was not bound");
        Ok(())
    }
}

/// The kernel's interrupt routes.
#[derive(Default)]
struct Routes(Mutex<RouteTable>);

#[derive(Default)]
struct RouteTable {
    next: u32,
    taken: BTreeSet<Gsi>,
    bound: BTreeSet<Gsi>,
}

impl MsiController for Routes {
    fn send(&self, _: MsiMessage) -> Result<(), InterruptError> {
        Ok(())
    }

    fn allocate(&self) -> Result<Gsi, InterruptError> {
        let mut table = lock(&self.0);
        let gsi = Gsi(u32::from(IOAPIC_PINS) + table.next);
        table.next += 1;
        table.taken.insert(gsi);
        Ok(gsi)
    }

    fn free(&self, gsi: Gsi) {
        let mut table = lock(&self.0);
        assert!(!table.bound.contains(&gsi), "freed while bound");
        assert!(table.taken.remove(&gsi), "freed twice");
    }

    fn route(&self, routes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
        let table = lock(&self.0);
        let pin = |gsi: &Gsi| gsi.0 < u32::from(IOAPIC_PINS);
        let ours = |gsi: &Gsi| pin(gsi) || table.taken.contains(gsi);
        assert!(
            routes.iter().all(|(gsi, _)| ours(gsi)),
            "routes what it does not have"
        );
        Ok(())
    }

    fn bind(&self, gsi: Gsi, _: &EventFd) -> Result<(), InterruptError> {
        assert!(lock(&self.0).bound.insert(gsi), "bound twice");
        Ok(())
    }

    fn unbind(&self, gsi: Gsi, _: &EventFd) -> Result<(), InterruptError> {
        assert!(lock(&self.0).bound.remove(&gsi), "was not bound");
        Ok(())
    }
}
