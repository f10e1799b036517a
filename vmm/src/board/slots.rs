//! PCI slots that are filled and emptied while the guest runs: the register block by which the guest's
//! ACPI hears of it and says that it has let a function go.
//!
//! Owns three registers of 32 bits, a bit for each slot of the bus: *up* (filled; reading clears),
//! *down* (the host asks for it; reading clears) and *eject* (written by `_EJ0`). It never touches the
//! bus: the machine's owner puts functions there and takes them away. However often a guest ejects, one
//! request waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::power::{EVENT_PCI_SLOTS, PowerPort};
use crate::device::{BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::request::{Request, RequestSender};

pub(super) const ID: &str = "slots";
const STATE_VERSION: u32 = 1;

/// Offsets from `layout::SLOTS_PORT`.
pub const UP: u16 = 0;
pub const DOWN: u16 = 4;
pub const EJECT: u16 = 8;
/// Bytes that the device takes.
pub const SIZE: u64 = 12;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotsState {
    up: u32,
    down: u32,
    /// What the host has asked for and not got yet.
    asked: u32,
    /// What the guest has let go of and the owner not taken yet.
    ejected: u32,
}

pub struct SlotsResources {
    pub power: Arc<PowerPort>,
    pub requests: RequestSender,
}

pub struct PciSlots {
    state: Mutex<SlotsState>,
    resources: SlotsResources,
}

impl PciSlots {
    pub fn new(resources: SlotsResources) -> PciSlots {
        PciSlots {
            state: Mutex::default(),
            resources,
        }
    }

    /// There is a function in `slot` now.
    pub fn filled(&self, slot: u8) {
        self.lock().up |= bit(slot);
        self.resources.power.raise(EVENT_PCI_SLOTS);
    }

    /// Asks the guest to let the function in `slot` go; again, if it was asked before.
    pub fn ask(&self, slot: u8) {
        {
            let mut state = self.lock();
            state.down |= bit(slot);
            state.asked |= bit(slot);
        }
        self.resources.power.raise(EVENT_PCI_SLOTS);
    }

    /// The slots that the guest has ejected since the last time.
    pub fn take_ejected(&self) -> Vec<u8> {
        let mut state = self.lock();
        let ejected = std::mem::take(&mut state.ejected);
        list(ejected)
    }

    /// The slots that the guest was asked for and keeps.
    pub fn asked(&self) -> Vec<u8> {
        list(self.lock().asked)
    }

    /// The function in `slot` is gone.
    pub fn emptied(&self, slot: u8) {
        let mut state = self.lock();
        let keep = !bit(slot);
        state.up &= keep;
        state.down &= keep;
        state.asked &= keep;
    }

    fn lock(&self) -> MutexGuard<'_, SlotsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

fn list(bits: u32) -> Vec<u8> {
    (0..32).filter(|slot| bits & bit(*slot) != 0).collect()
}

impl BusDevice for PciSlots {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data) else {
            return data.fill(0xff);
        };
        let mut state = self.lock();
        let value = match u16::try_from(offset) {
            Ok(UP) => std::mem::take(&mut state.up),
            Ok(DOWN) => std::mem::take(&mut state.down),
            _ => 0,
        };
        *word = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(word), true) = (data.try_into(), offset == u64::from(EJECT)) else {
            return;
        };
        let slots = u32::from_le_bytes(word);
        let mut state = self.lock();
        let told = state.ejected != 0;
        state.ejected |= slots;
        if !told && slots != 0 {
            self.resources.requests.send(Request::SlotsEjected);
        }
    }
}

impl Device for PciSlots {
    fn id(&self) -> &str {
        ID
    }

    fn reset(&self) -> Result<(), DeviceError> {
        *self.lock() = SlotsState::default();
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &*self.lock())
    }
}

impl Restore for PciSlots {
    type State = SlotsState;
    type Resources = SlotsResources;
    const VERSION: u32 = STATE_VERSION;

    fn restore(resources: SlotsResources, state: SlotsState) -> Result<Self, DeviceError> {
        if state.ejected != 0 {
            resources.requests.send(Request::SlotsEjected);
        }
        Ok(PciSlots {
            state: Mutex::new(state),
            resources,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::power::{EVENTS, PowerResources};
    use super::*;
    use crate::interrupt::InterruptLine;
    use crate::request::{RequestReceiver, channel};

    struct Nowhere;

    impl InterruptLine for Nowhere {
        fn set(&self, _: bool) {}
    }

    fn resources() -> (SlotsResources, Arc<PowerPort>, RequestReceiver) {
        let (requests, receiver) = channel().unwrap();
        let power = Arc::new(PowerPort::new(PowerResources {
            line: Arc::new(Nowhere),
            requests: requests.clone(),
        }));
        let resources = SlotsResources {
            power: power.clone(),
            requests,
        };
        (resources, power, receiver)
    }

    fn read(slots: &PciSlots, offset: u16) -> u32 {
        let mut data = [0xee; 4];
        slots.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn events(power: &PowerPort) -> u8 {
        let mut data = [0];
        power.read(EVENTS.into(), &mut data);
        data[0]
    }

    #[test]
    fn what_came_and_what_is_asked_for_is_read_once_after_an_event() {
        let (resources, power, _receiver) = resources();
        let slots = PciSlots::new(resources);
        slots.filled(31);
        slots.ask(5);
        assert_eq!(events(&power), EVENT_PCI_SLOTS);
        assert_eq!((read(&slots, UP), read(&slots, UP)), (1 << 31, 0));
        assert_eq!((read(&slots, DOWN), read(&slots, DOWN)), (1 << 5, 0));
        assert_eq!(slots.asked(), [5], "it is still wanted");
        slots.ask(5);
        assert_eq!(
            (events(&power), read(&slots, DOWN)),
            (EVENT_PCI_SLOTS, 1 << 5)
        );
        slots.emptied(5);
        assert_eq!(slots.asked(), []);
        // Other widths are nothing.
        slots.filled(1);
        let mut byte = [0];
        slots.read(UP.into(), &mut byte);
        slots.write(EJECT.into(), &[1, 0]);
        assert_eq!((byte, slots.take_ejected()), ([0xff], vec![]));
        assert_eq!(read(&slots, UP), 2);
    }

    #[test]
    fn a_guest_that_ejects_all_the_time_makes_one_request_also_after_a_restore() {
        let (resources, _power, receiver) = resources();
        let slots = PciSlots::new(resources);
        for slot in (0..1000).map(|round| round % 32) {
            slots.write(EJECT.into(), &(1u32 << slot).to_le_bytes());
        }
        slots.write(EJECT.into(), &0u32.to_le_bytes());
        assert_eq!(receiver.try_next(), Some(Request::SlotsEjected));
        assert_eq!(receiver.try_next(), None);
        let state = slots.save().unwrap().unpack(STATE_VERSION).unwrap();
        let (resources, _power, receiver) = self::resources();
        let slots = PciSlots::restore(resources, state).unwrap();
        assert_eq!(receiver.try_next(), Some(Request::SlotsEjected));
        assert_eq!(slots.take_ejected().len(), 32);
        slots.write(EJECT.into(), &4u32.to_le_bytes());
        assert_eq!(receiver.try_next(), Some(Request::SlotsEjected));
        assert_eq!(slots.take_ejected(), [2]);
    }
}
