//! What hardware-reduced ACPI has of power: sleep control (S5) and the event register of the generic
//! event device, by which the power button and others speak (ACPI 6.5 §4.8.3.7, §5.6.9).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::device::{BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::interrupt::InterruptLine;
use crate::request::{Request, RequestSender};

pub(super) const ID: &str = "power";
const STATE_VERSION: u32 = 1;

/// Offsets from `layout::ACPI_PM_PORT`, a byte each.
pub const SLEEP_CONTROL: u16 = 0;
pub const SLEEP_STATUS: u16 = 1;
pub const EVENTS: u16 = 4;
/// Bytes that the device takes.
pub const SIZE: u64 = 8;

/// SLP_TYP of S5 as the DSDT says, and the bits of sleep control.
pub const S5: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Bits of the event register; reading clears it.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
pub const EVENT_GENERATION: u8 = 1 << 1;
pub const EVENT_PCI_SLOTS: u8 = 1 << 2;
pub const EVENT_PROCESSORS: u8 = 1 << 3;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    events: u8,
}

pub struct PowerResources {
    pub line: Arc<dyn InterruptLine>,
    pub requests: RequestSender,
}

pub struct PowerPort {
    state: Mutex<PowerState>,
    resources: PowerResources,
}

impl PowerPort {
    pub fn new(resources: PowerResources) -> PowerPort {
        PowerPort {
            state: Mutex::default(),
            resources,
        }
    }

    /// The guest is told that somebody pressed the button.
    pub fn press_button(&self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// Has the guest's ACPI look at these events; those that it has not looked at stay.
    pub fn raise(&self, events: u8) {
        self.lock().events |= events;
        self.resources.line.pulse();
    }

    fn lock(&self) -> MutexGuard<'_, PowerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for PowerPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == u64::from(EVENTS)
            && let [value] = data
        {
            *value = std::mem::take(&mut self.lock().events);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == u64::from(SLEEP_CONTROL)
            && let [value] = data
            && value & SLEEP_ENABLE != 0
            && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == S5
        {
            self.resources.requests.send(Request::PowerOff);
        }
    }
}

impl Device for PowerPort {
    fn id(&self) -> &str {
        ID
    }

    fn reset(&self) -> Result<(), DeviceError> {
        *self.lock() = PowerState::default();
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &*self.lock())
    }
}

impl Restore for PowerPort {
    type State = PowerState;
    type Resources = PowerResources;
    const VERSION: u32 = STATE_VERSION;

    fn restore(resources: PowerResources, state: PowerState) -> Result<Self, DeviceError> {
        Ok(PowerPort {
            state: Mutex::new(state),
            resources,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::request::channel;

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl InterruptLine for Edges {
        fn set(&self, high: bool) {
            self.0.fetch_add(u32::from(high), Ordering::Relaxed);
        }
    }

    #[test]
    fn the_button_interrupts_and_its_event_is_read_once_also_after_a_restore() {
        let (requests, _receiver) = channel().unwrap();
        let line = Arc::new(Edges::default());
        let resources = || PowerResources {
            line: line.clone(),
            requests: requests.clone(),
        };
        let port = PowerPort::new(resources());
        port.press_button();
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
        let state = port.save().unwrap().unpack(STATE_VERSION).unwrap();
        let port = PowerPort::restore(resources(), state).unwrap();
        let mut data = [0xff];
        port.read(EVENTS.into(), &mut data);
        assert_eq!(data, [EVENT_POWER_BUTTON]);
        port.read(EVENTS.into(), &mut data);
        assert_eq!(data, [0]);
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let (requests, receiver) = channel().unwrap();
        let port = PowerPort::new(PowerResources {
            line: Arc::new(Edges::default()),
            requests,
        });
        port.write(0, &[S5 << 2]);
        port.write(0, &[3 << 2 | SLEEP_ENABLE]);
        port.write(1, &[S5 << 2 | SLEEP_ENABLE]);
        assert_eq!(receiver.try_next(), None);
        port.write(0, &[S5 << 2 | SLEEP_ENABLE]);
        assert_eq!(receiver.try_next(), Some(Request::PowerOff));
    }
}
