//! Ports by which a guest resets the machine: the reset control register and the keyboard
//! controller's pulse.
//!
//! Neither has state that a guest can see, so neither is saved.

use crate::device::BusDevice;
use crate::request::{Request, RequestSender};

/// The reset control register (0xcf9), also named by the FADT.
pub struct ResetRegister(pub RequestSender);

/// Bit 2: reset the CPU.
const RESET_CPU: u8 = 1 << 2;

impl BusDevice for ResetRegister {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & RESET_CPU != 0) {
            self.0.send(Request::Reset);
        }
    }
}

/// What is left of the keyboard controller: data at +0, status and command at +4, no keyboard.
pub struct KeyboardController(pub RequestSender);

const COMMAND: u64 = 4;
/// Command: pulse the reset line.
const PULSE_RESET: u8 = 0xfe;

impl BusDevice for KeyboardController {
    /// Status 0: no data, and ready for commands.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.0.send(Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::channel;

    #[test]
    fn only_the_values_that_mean_reset_reset() {
        let (sender, receiver) = channel().unwrap();
        let (register, keyboard) = (ResetRegister(sender.clone()), KeyboardController(sender));
        register.write(0, &[0x02]);
        keyboard.write(4, &[0xd1]);
        keyboard.write(0, &[PULSE_RESET]);
        assert_eq!(receiver.try_next(), None);
        register.write(0, &[0x06]);
        assert_eq!(receiver.try_next(), Some(Request::Reset));
        keyboard.write(4, &[PULSE_RESET]);
        assert_eq!(receiver.try_next(), Some(Request::Reset));
    }
}
