//! The root complex: configuration access by ECAM and by ports, and decoding of the BARs.
//!
//! A BAR answers where the guest put it only if that lies wholly inside the window and nothing
//! answers there yet; the one that was there first stays. The lock on the topology serialises
//! configuration writes; accesses to BARs take only the lock of their function, so a function that
//! takes long (a reset that waits for I/O) does not hold up the others.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::config::{ConfigSpace, Identity};
use super::{ECAM_SIZE, SLOTS};
use crate::layout::Window;

const ADDRESS_ENABLE: u32 = 1 << 31;

/// A function on the bus.
pub trait PciFunction: Send {
    fn config(&self) -> &ConfigSpace;
    fn config_mut(&mut self) -> &mut ConfigSpace;
    /// Reads configuration space; overridden where a register has a life of its own.
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }
    /// Writes configuration space.
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// The BAR answers at `base` from now on, or nowhere.
    fn bar_moved(&mut self, bar: u8, base: Option<u64>);
}

/// Why a function could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("PCI slot {0} does not exist or is taken")]
    Taken(usize),
    #[error(
        "no room in the PCI window for a BAR of {size:#x} bytes of the function in slot {slot}"
    )]
    WindowFull { slot: usize, size: u64 },
}

/// What of the root complex itself a snapshot holds; functions are saved by who made them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootState {
    /// The latch behind port 0xcf8.
    pub config_address: u32,
}

/// A BAR that exists: what the guest asks for and whether it got it.
#[derive(Debug, Clone, Copy)]
struct Claim {
    slot: usize,
    bar: u8,
    size: u64,
    wanted: Option<u64>,
    granted: Option<u64>,
}

/// A function as the bus shares it with its owner.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// The bus and who sits on it.
pub struct RootComplex {
    slots: RwLock<[Option<SharedFunction>; SLOTS]>,
    claims: RwLock<Vec<Claim>>,
    windows: Vec<Window>,
    /// Held across a configuration write; also the latch of port 0xcf8.
    config_address: Mutex<u32>,
    topology: Mutex<()>,
}

impl RootComplex {
    /// A root complex with its host bridge in slot 0. BARs answer only inside `windows`.
    pub fn new(windows: &[Window]) -> Self {
        let root = Self {
            slots: RwLock::new(Default::default()),
            claims: RwLock::new(Vec::new()),
            windows: windows.to_vec(),
            config_address: Mutex::new(0),
            topology: Mutex::new(()),
        };
        if let Some(slot) = write(&root.slots).first_mut() {
            *slot = Some(Arc::new(Mutex::new(HostBridge::new())));
        }
        root
    }

    /// Puts a function on the bus and its BARs at free places of the window, as firmware would;
    /// BARs that already have an address (a restored function) keep it.
    pub fn insert(&self, slot: usize, function: SharedFunction) -> Result<(), SlotError> {
        let _topology = lock(&self.topology);
        if slot >= SLOTS || read(&self.slots)[slot].is_some() {
            return Err(SlotError::Taken(slot));
        }
        let bars: Vec<_> = lock(&function).config().bars().collect();
        for bar in &bars {
            if lock(&function).config().register_address(bar) == 0 {
                let place = self.free_place(bar.size);
                let base = place.ok_or(SlotError::WindowFull {
                    slot,
                    size: bar.size,
                })?;
                lock(&function).config_mut().place_bar(bar.index, base);
            }
            let claim = Claim {
                slot,
                bar: bar.index,
                size: bar.size,
                wanted: None,
                granted: None,
            };
            write(&self.claims).push(claim);
        }
        write(&self.slots)[slot] = Some(function);
        self.settle(slot);
        Ok(())
    }

    /// Takes a function off the bus: it answers nowhere any more, and its slot is free. An access that
    /// has begun ends as it would have. False if the slot is empty, or the host bridge's.
    pub fn remove(&self, slot: usize) -> bool {
        let _topology = lock(&self.topology);
        if slot == 0 {
            return false;
        }
        let Some(function) = write(&self.slots).get_mut(slot).and_then(Option::take) else {
            return false;
        };
        let mut gone = Vec::new();
        write(&self.claims).retain(|claim| {
            let stays = claim.slot != slot;
            if !stays {
                gone.push(claim.bar);
            }
            stays
        });
        for bar in gone {
            lock(&function).bar_moved(bar, None);
        }
        // Somebody may have waited for its place.
        self.settle(0);
        true
    }

    /// Takes the place that a guest's reset gives the functions: BARs where firmware would put them.
    /// Call it after the functions were reset.
    pub fn reset(&self) {
        *lock(&self.config_address) = 0;
        for slot in 0..SLOTS {
            let _topology = lock(&self.topology);
            self.settle(slot);
        }
    }

    /// The first free slot after the host bridge.
    pub fn free_slot(&self) -> Option<usize> {
        read(&self.slots).iter().position(Option::is_none)
    }

    /// Reads through ECAM; `offset` counts from the start of its window.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        let (slot, register) = ecam_target(offset);
        self.config_read(slot, register, data);
    }

    /// Writes through ECAM.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        let (slot, register) = ecam_target(offset);
        self.config_write(slot, register, data);
    }

    /// Reads ports 0xcf8 to 0xcff; `offset` counts from 0xcf8.
    pub fn port_read(&self, offset: u16, data: &mut [u8]) {
        let address = *lock(&self.config_address);
        match offset {
            0..4 => {
                let bytes = address.to_le_bytes();
                for (step, byte) in data.iter_mut().enumerate() {
                    *byte = bytes
                        .get(usize::from(offset) + step)
                        .copied()
                        .unwrap_or(0xff);
                }
            }
            _ => {
                let (slot, register) = port_target(address, offset);
                self.config_read(slot, register, data);
            }
        }
    }

    /// Writes ports 0xcf8 to 0xcff. Only a whole dword reaches the address latch.
    pub fn port_write(&self, offset: u16, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(bytes)) => *lock(&self.config_address) = u32::from_le_bytes(bytes) & 0x80ff_fffc,
            (4..8, _) => {
                let (slot, register) = port_target(*lock(&self.config_address), offset);
                self.config_write(slot, register, data);
            }
            _ => {}
        }
    }

    /// Reads guest physical memory that a BAR answers; `false` if none does.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((function, bar, offset)) = self.decode(address, data.len()) else {
            return false;
        };
        lock(&function).read_bar(bar, offset, data);
        true
    }

    /// Writes guest physical memory that a BAR answers; `false` if none does.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        let Some((function, bar, offset)) = self.decode(address, data.len()) else {
            return false;
        };
        lock(&function).write_bar(bar, offset, data);
        true
    }

    pub fn save(&self) -> RootState {
        RootState {
            config_address: *lock(&self.config_address),
        }
    }

    pub fn load(&self, state: &RootState) {
        *lock(&self.config_address) = state.config_address;
    }

    /// Every BAR that answers now: slot, BAR, base, size.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn places(&self) -> Vec<(usize, u8, u64, u64)> {
        read(&self.claims)
            .iter()
            .filter_map(|claim| Some((claim.slot, claim.bar, claim.granted?, claim.size)))
            .collect()
    }

    fn config_read(&self, slot: Option<usize>, register: u16, data: &mut [u8]) {
        match slot.and_then(|slot| self.function(slot)) {
            Some(function) => lock(&function).read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: Option<usize>, register: u16, data: &[u8]) {
        let _topology = lock(&self.topology);
        let Some((slot, function)) = slot.and_then(|slot| Some((slot, self.function(slot)?)))
        else {
            return;
        };
        lock(&function).write_config(register, data);
        // Command or a BAR: only these move anything.
        if register < 0x28 && usize::from(register) + data.len() > 0x04 {
            self.settle(slot);
        }
    }

    /// Reads again what `changed` wants, then grants what can be granted. Takes the function's lock,
    /// never two at a time, and never while it holds the claims.
    fn settle(&self, changed: usize) {
        let Some(function) = self.function(changed) else {
            return;
        };
        let wishes = {
            let function = lock(&function);
            let config = function.config();
            config
                .bars()
                .map(|bar| (bar.index, config.wanted_address(&bar)))
                .collect::<Vec<_>>()
        };
        let mut moved = Vec::new();
        {
            let mut claims = write(&self.claims);
            for claim in claims.iter_mut().filter(|claim| claim.slot == changed) {
                claim.wanted = wishes
                    .iter()
                    .find(|wish| wish.0 == claim.bar)
                    .and_then(|wish| wish.1);
                if claim.granted.is_some() && claim.granted != claim.wanted {
                    claim.granted = None;
                    moved.push((claim.slot, claim.bar, None));
                }
            }
            for index in 0..claims.len() {
                let claim = claims[index];
                let (None, Some(base)) = (claim.granted, claim.wanted) else {
                    continue;
                };
                if self.is_free(&claims, base, claim.size) {
                    claims[index].granted = Some(base);
                    moved.push((claim.slot, claim.bar, Some(base)));
                }
            }
        }
        for (slot, bar, base) in moved {
            if let Some(function) = self.function(slot) {
                lock(&function).bar_moved(bar, base);
            }
        }
    }

    fn is_free(&self, claims: &[Claim], base: u64, size: u64) -> bool {
        self.windows.iter().any(|window| holds(window, base, size))
            && !claims.iter().any(|claim| {
                claim
                    .granted
                    .is_some_and(|other| overlaps((base, size), (other, claim.size)))
            })
    }

    /// A place for a BAR where no function's register points to and nothing answers.
    fn free_place(&self, size: u64) -> Option<u64> {
        let taken = self.registered_places();
        self.windows.iter().find_map(|window| {
            let end = window.base.checked_add(window.size)?;
            let mut base = window.base.checked_next_multiple_of(size)?;
            while base.checked_add(size)? <= end {
                match taken.iter().find(|place| overlaps((base, size), **place)) {
                    None => return Some(base),
                    Some((other, length)) => {
                        base = (other + length).checked_next_multiple_of(size)?
                    }
                }
            }
            None
        })
    }

    /// Base and size of every BAR register that is set, decoded or not.
    fn registered_places(&self) -> Vec<(u64, u64)> {
        let slots: Vec<SharedFunction> = read(&self.slots).iter().flatten().cloned().collect();
        slots
            .iter()
            .flat_map(|slot| {
                let function = lock(slot);
                let config = function.config();
                config
                    .bars()
                    .map(|bar| (config.register_address(&bar), bar.size))
                    .filter(|place| place.0.checked_add(place.1).is_some())
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    fn decode(&self, address: u64, length: usize) -> Option<(SharedFunction, u8, u64)> {
        let (slot, bar, offset) = read(&self.claims).iter().find_map(|claim| {
            let offset = address.checked_sub(claim.granted?)?;
            let end = offset.checked_add(length as u64)?;
            (end <= claim.size).then_some((claim.slot, claim.bar, offset))
        })?;
        Some((self.function(slot)?, bar, offset))
    }

    fn function(&self, slot: usize) -> Option<SharedFunction> {
        read(&self.slots).get(slot)?.clone()
    }
}

fn holds(window: &Window, base: u64, size: u64) -> bool {
    base >= window.base
        && base
            .checked_add(size)
            .is_some_and(|end| end <= window.end())
}

fn overlaps(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.0.saturating_add(other.1) && other.0 < one.0.saturating_add(one.1)
}

fn ecam_target(offset: u64) -> (Option<usize>, u16) {
    let target = (offset >> 12) & 0xff;
    let first_function = target & 7 == 0 && offset < ECAM_SIZE;
    (
        first_function.then_some((target >> 3) as usize),
        (offset & 0xfff) as u16,
    )
}

fn port_target(address: u32, offset: u16) -> (Option<usize>, u16) {
    let slot = (address >> 11) & 0x1f;
    let (bus, function) = ((address >> 16) & 0xff, (address >> 8) & 7);
    let reachable = address & ADDRESS_ENABLE != 0 && bus == 0 && function == 0;
    (
        reachable.then_some(slot as usize),
        (address & 0xfc) as u16 + (offset & 3),
    )
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Slot 0: something for a guest to find when it looks for a bus.
struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    fn new() -> Self {
        Self {
            // The generic PCIe host bridge of Red Hat's registry, which every guest knows.
            config: ConfigSpace::new(&Identity {
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: [0x06, 0, 0],
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            }),
        }
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn read_bar(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&mut self, _bar: u8, _base: Option<u64>) {}
}
