//! The IOAPIC (Intel 82093AA datasheet, and the EOI register of version 0x20), in user space.
//!
//! Owns the redirection table. Pins fire by MSI; KVM tells of the end of level-triggered interrupts,
//! for which it must know the routes of the pins that are in level mode.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::cpu::EndOfInterrupt;
use crate::device::{BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::interrupt::{Gsi, InterruptLine, MsiController, MsiMessage};
use crate::layout::IOAPIC_PINS;

const PINS: usize = IOAPIC_PINS as usize;
pub(super) const ID: &str = "ioapic";
const STATE_VERSION: u32 = 1;

/// Registers in memory.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;
/// Registers behind the window.
const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_TABLE: u8 = 0x10;
/// Version 0x20 has the EOI register; the last entry's number in bits 16 to 23.
const VERSION: u32 = 0x20 | (IOAPIC_PINS as u32 - 1) << 16;

/// Bits of a redirection entry.
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What the guest can write: all but delivery status and remote IRR.
const WRITABLE: u64 = !(1 << 12 | REMOTE_IRR) & 0xff00_0000_0001_ffff;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u32,
    select: u8,
    table: [u64; PINS],
    /// Levels of the pins, bit n for pin n.
    levels: u32,
    /// Edges that came while their pin was masked: delivered when it is unmasked.
    pending: u32,
}

impl Default for IoApicState {
    fn default() -> Self {
        IoApicState {
            id: 0,
            select: 0,
            table: [MASKED; PINS],
            levels: 0,
            pending: 0,
        }
    }
}

pub struct IoApic {
    state: Mutex<IoApicState>,
    msi: Arc<dyn MsiController>,
}

struct Line {
    ioapic: Arc<IoApic>,
    pin: u8,
}

impl InterruptLine for Line {
    fn set(&self, high: bool) {
        self.ioapic.set_pin(self.pin, high);
    }
}

impl IoApic {
    pub fn new(msi: Arc<dyn MsiController>) -> IoApic {
        IoApic {
            state: Mutex::default(),
            msi,
        }
    }

    /// A pin for a device.
    pub fn line(self: &Arc<Self>, pin: u8) -> Arc<dyn InterruptLine> {
        Arc::new(Line {
            ioapic: Arc::clone(self),
            pin,
        })
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_pin(&self, pin: u8, high: bool) {
        let mut state = self.lock();
        let bit = 1u32 << pin;
        let rising = high && state.levels & bit == 0;
        state.levels = if high {
            state.levels | bit
        } else {
            state.levels & !bit
        };
        if rising {
            state.pending |= bit;
        }
        self.deliver(&mut state, pin);
    }

    /// Sends what the pin has to say, if it may.
    fn deliver(&self, state: &mut IoApicState, pin: u8) {
        let bit = 1u32 << pin;
        let Some(entry) = state.table.get_mut(usize::from(pin)) else {
            return;
        };
        if *entry & MASKED != 0 {
            return;
        }
        let level = *entry & LEVEL != 0;
        let fire = match level {
            true => state.levels & bit != 0 && *entry & REMOTE_IRR == 0,
            false => state.pending & bit != 0,
        };
        state.pending &= !bit;
        if fire {
            if level {
                *entry |= REMOTE_IRR;
            }
            if let Err(error) = self.msi.send(message(*entry)) {
                tracing::warn!(pin, %error, "an interrupt of the IOAPIC was lost");
            }
        }
    }

    fn end(&self, state: &mut IoApicState, vector: u8) {
        for pin in 0..IOAPIC_PINS {
            if let Some(entry) = state.table.get_mut(usize::from(pin))
                && *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR
                && *entry as u8 == vector
            {
                *entry &= !REMOTE_IRR;
                self.deliver(state, pin);
            }
        }
    }

    /// KVM reports the end of an interrupt for pins that it has a level route of.
    fn route(&self, state: &IoApicState) {
        let route = |(pin, entry): (u32, &u64)| {
            let level = *entry & (LEVEL | MASKED) == LEVEL;
            (Gsi(pin), level.then(|| message(*entry)))
        };
        let routes: Vec<_> = (0..).zip(&state.table).map(route).collect();
        if let Err(error) = self.msi.route(&routes) {
            tracing::warn!(%error, "ends of interrupts will be missed");
        }
    }

    fn read_window(state: &IoApicState) -> u32 {
        match state.select {
            INDEX_ID | INDEX_ARBITRATION => state.id << 24,
            INDEX_VERSION => VERSION,
            index => {
                let index = index.wrapping_sub(INDEX_TABLE);
                let entry = state
                    .table
                    .get(usize::from(index / 2))
                    .copied()
                    .unwrap_or(0);
                if index & 1 == 0 {
                    entry as u32
                } else {
                    (entry >> 32) as u32
                }
            }
        }
    }

    fn write_window(&self, state: &mut IoApicState, value: u32) {
        if state.select == INDEX_ID {
            state.id = value >> 24 & 0xf;
            return;
        }
        let index = state.select.wrapping_sub(INDEX_TABLE);
        let pin = index / 2;
        let Some(entry) = state.table.get_mut(usize::from(pin)) else {
            return;
        };
        let before = *entry;
        let written = match index & 1 {
            0 => before & !0xffff_ffff | u64::from(value),
            _ => before & 0xffff_ffff | u64::from(value) << 32,
        };
        *entry = written & WRITABLE | before & !WRITABLE;
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        }
        self.route(state);
        self.deliver(state, pin);
    }
}

/// The MSI that a redirection entry stands for.
fn message(entry: u64) -> MsiMessage {
    let destination = entry >> 56;
    let logical = u64::from(entry & LOGICAL != 0);
    let address = 0xfee0_0000 | destination << 12 | logical << 2;
    // Vector and delivery mode; level assert; trigger mode.
    let data = (entry & 0x7ff) as u32 | 1 << 14 | (entry & LEVEL) as u32;
    MsiMessage { address, data }
}

impl EndOfInterrupt for IoApic {
    fn end_of_interrupt(&self, vector: u8) {
        self.end(&mut self.lock(), vector);
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            SELECT => u32::from(state.select),
            WINDOW => IoApic::read_window(&state),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        let mut state = self.lock();
        match offset {
            SELECT => state.select = value as u8,
            WINDOW => self.write_window(&mut state, value),
            END_OF_INTERRUPT => self.end(&mut state, value as u8),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn id(&self) -> &str {
        ID
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        *state = IoApicState::default();
        self.route(&state);
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &*self.lock())
    }
}

impl Restore for IoApic {
    type State = IoApicState;
    type Resources = Arc<dyn MsiController>;
    const VERSION: u32 = STATE_VERSION;

    fn restore(msi: Self::Resources, state: Self::State) -> Result<Self, DeviceError> {
        let ioapic = IoApic {
            state: Mutex::new(state),
            msi,
        };
        ioapic.route(&ioapic.lock());
        Ok(ioapic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventfd::EventFd;
    use crate::interrupt::InterruptError;

    #[derive(Default)]
    struct Sent(
        Mutex<Vec<MsiMessage>>,
        Mutex<Vec<(Gsi, Option<MsiMessage>)>>,
    );

    impl MsiController for Sent {
        fn send(&self, message: MsiMessage) -> Result<(), InterruptError> {
            self.0.lock().unwrap().push(message);
            Ok(())
        }
        fn allocate(&self) -> Result<Gsi, InterruptError> {
            Ok(Gsi(24))
        }
        fn free(&self, _: Gsi) {}
        fn route(&self, routes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
            *self.1.lock().unwrap() = routes.to_vec();
            Ok(())
        }
        fn bind(&self, _: Gsi, _: &EventFd) -> Result<(), InterruptError> {
            Ok(())
        }
        fn unbind(&self, _: Gsi, _: &EventFd) -> Result<(), InterruptError> {
            Ok(())
        }
    }

    fn program(ioapic: &IoApic, pin: u8, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            ioapic.write(
                SELECT,
                &u32::from(INDEX_TABLE + pin * 2 + half).to_le_bytes(),
            );
            ioapic.write(WINDOW, &value.to_le_bytes());
        }
    }

    fn count(sent: &Sent) -> usize {
        sent.0.lock().unwrap().len()
    }

    #[test]
    fn an_edge_fires_once_with_vector_and_destination() {
        let sent = Arc::new(Sent::default());
        let ioapic = Arc::new(IoApic::new(sent.clone()));
        program(&ioapic, 4, 3 << 56 | 0x31);
        let line = ioapic.line(4);
        line.set(true);
        line.set(true);
        let wanted = MsiMessage {
            address: 0xfee0_3000,
            data: 0x4031,
        };
        assert_eq!(*sent.0.lock().unwrap(), [wanted]);
        line.set(false);
        line.set(true);
        assert_eq!(count(&sent), 2);
    }

    #[test]
    fn an_edge_under_the_mask_comes_when_it_is_lifted() {
        let sent = Arc::new(Sent::default());
        let ioapic = Arc::new(IoApic::new(sent.clone()));
        ioapic.line(4).pulse();
        assert_eq!(count(&sent), 0);
        program(&ioapic, 4, 0x31);
        assert_eq!(count(&sent), 1);
    }

    #[test]
    fn a_level_fires_again_after_its_end_while_it_is_high() {
        let sent = Arc::new(Sent::default());
        let ioapic = Arc::new(IoApic::new(sent.clone()));
        program(&ioapic, 9, LEVEL | 0x39);
        assert!(
            sent.1.lock().unwrap()[9].1.is_some(),
            "KVM knows the level route"
        );
        let line = ioapic.line(9);
        line.set(true);
        assert_eq!(count(&sent), 1);
        ioapic.end_of_interrupt(0x39);
        assert_eq!(count(&sent), 2);
        line.set(false);
        ioapic.end_of_interrupt(0x39);
        assert_eq!(count(&sent), 2);
    }

    #[test]
    fn a_restored_ioapic_goes_on_where_the_saved_one_was() {
        let sent = Arc::new(Sent::default());
        let ioapic = Arc::new(IoApic::new(sent.clone()));
        program(&ioapic, 9, LEVEL | 0x39);
        ioapic.line(9).set(true);
        let saved = ioapic.save().unwrap();
        let state: IoApicState = saved.unpack(STATE_VERSION).unwrap();
        let other = Arc::new(Sent::default());
        let restored = Arc::new(IoApic::restore(other.clone(), state).unwrap());
        assert_eq!(restored.save().unwrap(), saved);
        assert_eq!(
            count(&other),
            0,
            "the interrupt is in service, not sent twice"
        );
        restored.end_of_interrupt(0x39);
        assert_eq!(count(&other), 1);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((0u64..0x1000, proptest::prelude::any::<u64>(), 0usize..9, 0u8..24), 0..64)) {
            let ioapic = Arc::new(IoApic::new(Arc::new(Sent::default())));
            for (offset, value, length, pin) in accesses {
                ioapic.write(offset, &value.to_le_bytes()[..length.min(8)]);
                ioapic.read(offset, &mut vec![0; length]);
                ioapic.line(pin).pulse();
            }
        }
    }
}
