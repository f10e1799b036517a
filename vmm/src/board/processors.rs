//! vCPUs that come and go: the register block by which the guest's ACPI sees which are there, hears of
//! changes, and says that it has let one go.
//!
//! Owns a bit for each vCPU in *present* (what `_STA` tells), *up* (look at it; reading clears) and
//! *down* (the host asks for it; reading clears), in two words of 32 bits each, and *eject*, to which
//! `_EJ0` writes a number. It never touches a vCPU: the machine's owner starts and ends them. The first
//! vCPU always stays. However often a guest ejects, one request waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::power::{EVENT_PROCESSORS, PowerPort};
use crate::device::{BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::request::{Request, RequestSender};

pub(super) const ID: &str = "processors";
const STATE_VERSION: u32 = 1;

/// Offsets from `layout::PROCESSORS_PORT`; the upper word of each pair follows the lower.
pub const PRESENT: u16 = 0;
pub const UP: u16 = 8;
pub const DOWN: u16 = 16;
pub const EJECT: u16 = 24;
/// Bytes that the device takes.
pub const SIZE: u64 = 28;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessorsState {
    /// How many there should be, from the next reset on in any case.
    wanted: u8,
    present: u64,
    up: u64,
    down: u64,
    /// What the host has asked for and not got yet.
    asked: u64,
    /// What the guest has let go of and the owner not taken yet.
    ejected: u64,
}

pub struct ProcessorsResources {
    pub power: Arc<PowerPort>,
    pub requests: RequestSender,
}

pub struct Processors {
    state: Mutex<ProcessorsState>,
    resources: ProcessorsResources,
}

impl Processors {
    /// With the first `count` vCPUs.
    pub fn new(resources: ProcessorsResources, count: u8) -> Processors {
        Processors {
            state: Mutex::new(ProcessorsState::begin(count)),
            resources,
        }
    }

    /// How many there should be after a reset.
    pub fn set_wanted(&self, count: u8) {
        self.lock().wanted = count;
    }

    /// vCPU `index` is there: told to the guest if it was not, and not asked for any more.
    pub fn appear(&self, index: u8) {
        {
            let mut state = self.lock();
            state.keep(index);
            if state.present & bit(index) != 0 {
                return;
            }
            state.present |= bit(index);
            state.up |= bit(index);
        }
        self.resources.power.raise(EVENT_PROCESSORS);
    }

    /// Asks the guest to let vCPU `index` go; again, if it was asked before. One that is not there, or
    /// the first, is not asked for.
    pub fn ask(&self, index: u8) {
        {
            let mut state = self.lock();
            if index == 0 || state.present & bit(index) == 0 {
                return;
            }
            state.down |= bit(index);
            state.asked |= bit(index);
        }
        self.resources.power.raise(EVENT_PROCESSORS);
    }

    pub fn is_present(&self, index: u8) -> bool {
        self.lock().present & bit(index) != 0
    }

    /// Those that are there, in ascending order.
    pub fn present(&self) -> Vec<u8> {
        list(self.lock().present)
    }

    /// Those that the guest has ejected since the last time.
    pub fn take_ejected(&self) -> Vec<u8> {
        let mut state = self.lock();
        list(std::mem::take(&mut state.ejected))
    }

    fn lock(&self) -> MutexGuard<'_, ProcessorsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProcessorsState {
    fn begin(count: u8) -> ProcessorsState {
        ProcessorsState {
            wanted: count,
            present: (0..count).fold(0, |present, index| present | bit(index)),
            ..ProcessorsState::default()
        }
    }

    /// Nothing of it is under way any more.
    fn keep(&mut self, index: u8) {
        let others = !bit(index);
        self.up &= others;
        self.down &= others;
        self.asked &= others;
        self.ejected &= others;
    }

    /// True if it is the first that the owner is to take.
    fn eject(&mut self, index: u8) -> bool {
        if index == 0 || self.present & bit(index) == 0 {
            return false;
        }
        let told = self.ejected != 0;
        self.keep(index);
        self.present &= !bit(index);
        self.ejected |= bit(index);
        !told
    }
}

fn bit(index: u8) -> u64 {
    1u64.checked_shl(index.into()).unwrap_or(0)
}

fn list(bits: u64) -> Vec<u8> {
    (0..64).filter(|index| bits & bit(*index) != 0).collect()
}

/// Takes one of the two words.
fn take(bits: &mut u64, upper: bool) -> u32 {
    let (shift, rest) = if upper {
        (32, u64::from(u32::MAX))
    } else {
        (0, !u64::from(u32::MAX))
    };
    let word = (*bits >> shift) as u32;
    *bits &= rest;
    word
}

impl BusDevice for Processors {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data) else {
            return data.fill(0xff);
        };
        let mut state = self.lock();
        let upper = offset & 4 != 0;
        let value = match u16::try_from(offset & !4) {
            Ok(PRESENT) => take(&mut { state.present }, upper),
            Ok(UP) => take(&mut state.up, upper),
            Ok(DOWN) => take(&mut state.down, upper),
            _ => 0,
        };
        *word = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(word), true) = (data.try_into(), offset == u64::from(EJECT)) else {
            return;
        };
        let Ok(index) = u8::try_from(u32::from_le_bytes(word)) else {
            return;
        };
        if self.lock().eject(index) {
            self.resources.requests.send(Request::VcpusEjected);
        }
    }
}

impl Device for Processors {
    fn id(&self) -> &str {
        ID
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        *state = ProcessorsState::begin(state.wanted);
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &*self.lock())
    }
}

impl Restore for Processors {
    type State = ProcessorsState;
    type Resources = ProcessorsResources;
    const VERSION: u32 = STATE_VERSION;

    fn restore(resources: Self::Resources, state: ProcessorsState) -> Result<Self, DeviceError> {
        if state.ejected != 0 {
            resources.requests.send(Request::VcpusEjected);
        }
        Ok(Processors {
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

    fn resources() -> (ProcessorsResources, Arc<PowerPort>, RequestReceiver) {
        let (requests, receiver) = channel().unwrap();
        let power = Arc::new(PowerPort::new(PowerResources {
            line: Arc::new(Nowhere),
            requests: requests.clone(),
        }));
        let resources = ProcessorsResources {
            power: power.clone(),
            requests,
        };
        (resources, power, receiver)
    }

    fn read(processors: &Processors, offset: u16) -> u64 {
        let word = |offset: u16| {
            let mut data = [0xee; 4];
            processors.read(offset.into(), &mut data);
            u64::from(u32::from_le_bytes(data))
        };
        word(offset) | word(offset + 4) << 32
    }

    fn eject(processors: &Processors, number: u32) {
        processors.write(EJECT.into(), &number.to_le_bytes());
    }

    fn events(power: &PowerPort) -> u8 {
        let mut data = [0];
        power.read(EVENTS.into(), &mut data);
        data[0]
    }

    #[test]
    fn what_came_and_what_is_asked_for_is_read_once_after_an_event() {
        let (resources, power, _receiver) = resources();
        let processors = Processors::new(resources, 2);
        processors.appear(1);
        assert_eq!(events(&power), 0, "it was there");
        processors.appear(63);
        assert_eq!(events(&power), EVENT_PROCESSORS);
        processors.ask(1);
        processors.ask(0);
        processors.ask(40);
        assert_eq!(events(&power), EVENT_PROCESSORS);
        assert_eq!(read(&processors, PRESENT), 1 << 63 | 3);
        assert_eq!(read(&processors, PRESENT), 1 << 63 | 3, "it stays");
        assert_eq!((read(&processors, UP), read(&processors, UP)), (1 << 63, 0));
        assert_eq!((read(&processors, DOWN), read(&processors, DOWN)), (2, 0));
        // Wanted after all, before the guest has looked.
        processors.ask(63);
        processors.appear(63);
        assert_eq!((read(&processors, UP), read(&processors, DOWN)), (0, 0));
    }

    #[test]
    fn what_is_ejected_is_gone_at_once_and_the_first_stays() {
        let (resources, _power, receiver) = resources();
        let processors = Processors::new(resources, 3);
        for number in [0, 3, 64, 256, u32::MAX] {
            eject(&processors, number);
        }
        // Other widths and places are nothing.
        processors.write(EJECT.into(), &[1]);
        processors.write(PRESENT.into(), &[0; 4]);
        let mut byte = [0];
        processors.read(PRESENT.into(), &mut byte);
        assert_eq!((byte, receiver.try_next()), ([0xff], None));
        eject(&processors, 2);
        eject(&processors, 1);
        eject(&processors, 1);
        assert_eq!(processors.present(), [0]);
        assert_eq!(receiver.try_next(), Some(Request::VcpusEjected));
        assert_eq!(receiver.try_next(), None, "one waits");
        let state = processors.save().unwrap().unpack(STATE_VERSION).unwrap();
        let (resources, _power, receiver) = self::resources();
        let processors = Processors::restore(resources, state).unwrap();
        assert_eq!(receiver.try_next(), Some(Request::VcpusEjected));
        assert_eq!(processors.take_ejected(), [1, 2]);
    }

    #[test]
    fn a_reset_brings_what_is_wanted() {
        let (resources, _power, _receiver) = resources();
        let processors = Processors::new(resources, 4);
        eject(&processors, 3);
        processors.ask(2);
        processors.set_wanted(3);
        processors.reset().unwrap();
        assert_eq!(processors.present(), [0, 1, 2]);
        assert_eq!(read(&processors, DOWN), 0);
        assert_eq!(processors.take_ejected(), []);
    }
}
